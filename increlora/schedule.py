"""Learning rate with restart warmup, a pure function of the step (arXiv 2308.12043)."""


def multiplier(step: int, born: int, total_steps: int, warmup_steps: int) -> float:
    """Factor on the peak learning rate for parameters that train from step `born` on.

    They have a linear warmup of their own over `warmup_steps`, then a linear decay to 0 at the last step of the run:

        age / warmup                       if age < warmup,  age = step - born
        (life - age) / (life - warmup)     otherwise,        life = total_steps - born
    """
    age, life = step - born, total_steps - born
    if age < 0:
        return 0.0
    if age < warmup_steps:
        return age / warmup_steps
    return max(0.0, (life - age) / max(1, life - warmup_steps))
