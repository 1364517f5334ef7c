"""The order of a method's calls: a call that is missing, doubled or out of place is an error at the next call."""

from increlora.errors import UserError

BEGIN, BEFORE, AFTER = "begin_step", "before_step", "after_step"


class StepOrder:
    """For step 0, 1, 2, ...: begin_step, the forward and backward passes, before_step, the optimizer, after_step.

    A step whose gradients are not finite is begun again: `begin_step` follows `begin_step`, for the same step.

    Args:
        total_steps: of the whole run.
    """

    def __init__(self, total_steps: int):
        self.total_steps = total_steps
        self.next: int | None = 0  # the step under way, or the one to come; None: any, because a state was loaded
        self.last = AFTER  # the last call

    def begin(self, step: int) -> None:
        """Note a call of `begin_step`.

        Raises:
            UserError: the step before is not complete, this is not the next one, or the run is over.
        """
        if self.last == BEFORE:
            raise UserError(
                f"begin_step({step}): step {self.next} is not complete; call after_step({self.next}) after the "
                "optimizer's step"
            )
        if self.next is not None and step != self.next:
            if self.last == BEGIN:
                raise UserError(
                    f"begin_step({step}): step {self.next} is not complete; call before_step and after_step in every "
                    "step"
                )
            raise UserError(
                f"begin_step({step}): step {self.next} is the next. `step` counts optimizer steps over the whole run, "
                "from 0 on; it counts neither batches nor the steps of an epoch."
            )
        if step >= self.total_steps:
            raise UserError(
                f"begin_step({step}): the run has {self.total_steps} steps, as method.prepare was told, and they are "
                "done. Give `prepare` the steps of the whole run."
            )
        self.next, self.last = step, BEGIN

    def before(self, step: int) -> None:
        """Note a call of `before_step`.

        Raises:
            UserError: this step was not begun, or the call is a second one.
        """
        self._follows(BEFORE, BEGIN, step)
        self.last = BEFORE

    def after(self, step: int) -> None:
        """Note a call of `after_step`.

        Raises:
            UserError: `before_step` was not called, or the call is a second one.
        """
        self._follows(AFTER, BEFORE, step)
        self.next, self.last = step + 1, AFTER

    def loaded(self) -> None:
        """A state was loaded: the next call is `begin_step`, of the step at which the state was taken."""
        self.next, self.last = None, AFTER

    def _follows(self, call: str, before: str, step: int) -> None:
        if self.last == call:
            raise UserError(f"{call}({step}) is called twice: call begin_step, before_step and after_step once a step")
        if self.last != before:
            raise UserError(f"{call}({step}): {before}({step}) was not called before it in this step")
        if step != self.next:
            raise UserError(f"{call}({step}): step {self.next} is under way; give all calls of a step the same `step`")
