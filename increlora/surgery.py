"""Find, freeze and replace modules of a model by name."""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from increlora.errors import UserError
from increlora.linear import IncrementalLinear
from increlora.matrices import kind_of


def find_matrices(model: nn.Module, kinds: Mapping[str, str]) -> dict[str, nn.Linear]:
    """The linear layers whose full module name matches one of the kinds, in model order.

    Args:
        model: any module.
        kinds: kind of matrix -> regular expression, matched against the whole module name, e.g.
            `{"query": r".*\\.attention\\.self\\.query_proj"}`.

    Raises:
        UserError: a kind matches no linear layer (the message lists what there is), or a layer that cannot be adapted:
            its weight is read directly by other code or is tied, or the model has been prepared already.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for kind, pattern in kinds.items():
        if not any(re.fullmatch(pattern, name) for name in linears):
            raise UserError(
                f"no linear layer matches matrix kind '{kind}' ({pattern!r}); the model has: "
                f"{', '.join(_shapes_of_names(linears)) or 'none'}. An expression in `kinds` must match the whole name."
            )
    found = {name: module for name, module in linears.items() if kind_of(name, kinds) is not None}
    _refuse_what_cannot_be_adapted(model, found)
    return found


# their code reads `weight` of their layers directly and does not call the layers: it would ignore an update
READ_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def _refuse_what_cannot_be_adapted(model: nn.Module, found: Mapping[str, nn.Linear]) -> None:
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name, linear in found.items():
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, IncrementalLinear):
            raise UserError(f"{name} has an update already: prepare a fresh model, or merge the first update before")
        if isinstance(parent, READ_WEIGHTS):
            raise UserError(
                f"{name} lies in torch's {type(parent).__name__}, which reads its weight directly and would ignore "
                "the update; choose other layers (kinds), or a model that calls its layers"
            )
        if len(names := owners[id(linear.weight)]) > 1:
            raise UserError(
                f"the weight of {name} is tied ({', '.join(names)}): an update would not reach all of them, and "
                "merging it would; choose other layers (kinds)"
            )


def kinds_of_layers(model: nn.Module, head: str | None = None) -> dict[str, str]:
    """Kinds for every linear layer that lies in a numbered layer of the model and not in the head.

    A kind is called by the module's name with N for the numbers, e.g. `model.layers.N.self_attn.q_proj`.

    Args:
        head: regular expression over parameter names; None: the model has no head.

    Raises:
        UserError: the model has no such layer.
    """
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    in_head = {name for name in linears if head and re.fullmatch(head, f"{name}.weight")}
    inside = [name for name in linears if any(part.isdigit() for part in name.split(".")[:-1]) and name not in in_head]
    if not inside:
        raise UserError(
            f"the model has no nn.Linear in numbered layers, it has: {', '.join(_shapes_of_names(linears)) or 'none'}. "
            "Say which to adapt: kinds={'name': r'regular expression over module names'}."
        )
    return {_shape_of(name): re.sub(r"\b\d+\b", r"\\d+", re.escape(name)) for name in inside}


def freeze(model: nn.Module) -> None:
    """Stop training every parameter."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def unfreeze_matching(model: nn.Module, pattern: str) -> list[str]:
    """Train every parameter whose name matches the whole pattern; returns the names.

    Raises:
        UserError: nothing matches.
    """
    names = [name for name, _ in model.named_parameters() if re.fullmatch(pattern, name)]
    if not names:
        children = ", ".join(name for name, _ in model.named_children())
        raise UserError(
            f"no parameter matches the head pattern {pattern!r}; the model's parts are: {children}. "
            "Set `head`; use None if only the adapted matrices should train."
        )
    for name in names:
        model.get_parameter(name).requires_grad_(True)
    return names


def hold_frozen_layers_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Hold the frozen weights of linear layers in the dtype in which autocast computes.

    Autocast would cast them to the same values at every use. So this saves time and memory and changes no result.
    """
    others = (module for module in model.modules() if type(module) is not nn.Linear)
    shared = {id(parameter) for module in others for parameter in module.parameters(recurse=False)}
    for module in model.modules():
        for parameter in module.parameters(recurse=False) if type(module) is nn.Linear else ():
            if not parameter.requires_grad and id(parameter) not in shared:
                parameter.data = parameter.data.to(dtype)


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the module called `name` by `module`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _shapes_of_names(names: Iterable[str]) -> list[str]:
    return sorted({_shape_of(name) for name in names})


def _shape_of(name: str) -> str:
    return re.sub(r"\b\d+\b", "N", name)
