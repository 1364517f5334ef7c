"""Parameter groups of an optimizer: when they begin to train, their learning rates, their state by parameter name.

Every loop uses these: the loop of this repository, and any other loop through `Growth`. A group has, beside the
optimizer's own options, `param_names`, `born` (the step from which its parameters train), `initial_lr` (the peak of its
learning rate) and `decay` (whether weight decay applies); `constant` says that it keeps the peak rate.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from increlora.errors import UserError
from increlora.method import Method
from increlora.schedule import multiplier


def parameter_groups(method: Method, model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """What an optimizer is made of: the method's groups, with weight decay where it applies."""
    return [
        {"born": 0, **group, "weight_decay": weight_decay if group["decay"] else 0.0}
        for group in method.param_groups(model)
    ]


def adopt(optimizer: torch.optim.Optimizer, method: Method, model: nn.Module, born: int = 0) -> None:
    """Complete the groups of an optimizer: names, `born`, peak rate; and add the groups of parameters that train later.

    Parameters that train later and stand among others, as in `AdamW(model.parameters())`, move to groups of their own,
    so that these have their restart warmup. An added group takes the options of the first group that decays.

    Args:
        born: the step from which the parameters of groups without `born` train.

    Raises:
        UserError: the optimizer lacks trained parameters of the model, or holds others.
    """
    check(optimizer, model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    later = {id(parameter) for parameter in method.later_parameters()}
    for group in optimizer.param_groups:
        if "born" not in group:
            _take_out(group, later)
        group.setdefault("param_names", [names[id(parameter)] for parameter in group["params"]])
        group.setdefault("initial_lr", group["lr"])
        group.setdefault("born", born)
        if not group.get("decay", True):
            group["weight_decay"] = 0.0
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    like = next((group for group in optimizer.param_groups if group.get("decay", True)), optimizer.param_groups[0])
    options = {key: value for key, value in like.items() if key not in ("params", "param_names")}
    for group in method.param_groups(model):
        if not any(id(parameter) in held for _, parameter in group["params"]):
            optimizer.add_param_group({**options, **group})


def _take_out(group: dict[str, Any], later: set[int]) -> None:
    kept = [number for number, parameter in enumerate(group["params"]) if id(parameter) not in later]
    for key in ("params", "param_names"):
        if key in group:
            group[key] = [group[key][number] for number in kept]


def check(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """The optimizer holds what trains in the model, and nothing else.

    Raises:
        UserError: it lacks trained parameters of the model, or holds others.
    """
    parameters = list(model.parameters())
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [parameter for parameter in parameters if parameter.requires_grad and id(parameter) not in held]
    foreign = held - {id(parameter) for parameter in parameters}
    if missing or foreign:
        raise UserError(
            f"the optimizer lacks {len(missing)} trained parameters of the model and holds {len(foreign)} others. "
            "Make it after method.prepare, over method.param_groups(model); where a model's state is "
            "loaded, load the optimizer's too."
        )


def set_learning_rates(optimizer: torch.optim.Optimizer, step: int, total_steps: int, warmup_steps: int) -> None:
    """Write the learning rate of this step (optimizer steps already taken) into every group."""
    for group in optimizer.param_groups:
        constant = group.get("constant", False)
        factor = 1.0 if constant else multiplier(step, group["born"], total_steps, warmup_steps)
        group["lr"] = group["initial_lr"] * factor


def set_epsilon_before_correction(optimizer: torch.optim.Optimizer, step: int, epsilon: float = 1e-8) -> None:
    """Make this step of torch's AdamW that of transformers 4.4.2, which the authors used.

    Theirs adds epsilon to the root of the second moment before its bias is corrected, torch's after:

        theirs: sqrt(1 - beta2^t) / (sqrt(v) + epsilon)      torch: 1 / (sqrt(v / (1 - beta2^t)) + epsilon)

    They are the same with torch's epsilon at epsilon / sqrt(1 - beta2^t), t steps after the group began.
    """
    for group in optimizer.param_groups:
        steps = max(1, step - group["born"] + 1)
        group["eps"] = epsilon / math.sqrt(1 - group["betas"][1] ** steps)


def rebuild(optimizer: torch.optim.Optimizer, model: nn.Module, names: Sequence[Sequence[str]]) -> None:
    """Give the optimizer these groups, by parameter name and without state; their options are to be loaded.

    Raises:
        UserError: the model lacks some of the parameters.
    """
    parameters = dict(model.named_parameters())
    unknown = [name for group in names for name in group if name not in parameters]
    if unknown:
        raise UserError(
            f"the optimizer's checkpoint has {len(unknown)} parameters that the model lacks, e.g. {unknown[0]!r}. "
            "Load states of model and optimizer that were saved together, into a model prepared in the same way."
        )
    optimizer.param_groups.clear()
    optimizer.state.clear()
    for group in names:
        optimizer.add_param_group({"params": [(name, parameters[name]) for name in group]})


def state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Groups with the names of their parameters, and the state of every parameter by name."""
    groups, states = [], {}
    for group in optimizer.param_groups:
        groups.append({key: value for key, value in group.items() if key != "params"})
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            states[name] = dict(optimizer.state.get(parameter, {}))
    return {"groups": groups, "states": states}


def load_state(optimizer: torch.optim.Optimizer, model: nn.Module, state: Mapping[str, Any]) -> None:
    """Restore what `state` gave, by parameter name, whatever the groups were before.

    Raises:
        UserError: the model lacks some of the parameters.
    """
    rebuild(optimizer, model, [group["param_names"] for group in state["groups"]])
    for group, saved in zip(optimizer.param_groups, state["groups"], strict=True):
        group.update(saved)
    parameters = dict(model.named_parameters())
    for name, values in state["states"].items():
        if values:
            optimizer.state[parameters[name]] = {key: _like(v, parameters[name], key) for key, v in values.items()}


def _like(value: Any, parameter: nn.Parameter, key: str) -> Any:
    if not isinstance(value, Tensor):
        return value
    # Adam's step counter keeps its own dtype
    return value.to(parameter.device, value.dtype if key == "step" else parameter.dtype)
