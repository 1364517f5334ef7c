"""Find, freeze and replace modules of a model by name."""

import re
from collections.abc import Mapping

from torch import nn

from increlora.errors import UserError


def find_matrices(model: nn.Module, kinds: Mapping[str, str]) -> dict[str, nn.Linear]:
    """The linear layers whose full module name matches one of the kinds, in model order.

    Args:
        model: any module.
        kinds: kind of matrix -> regular expression, matched against the whole module name, e.g.
            `{"query": r".*\\.attention\\.self\\.query_proj"}`.

    Raises:
        UserError: a kind matches no linear layer; the message lists what there is.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for kind, pattern in kinds.items():
        if not any(re.fullmatch(pattern, name) for name in linears):
            raise UserError(
                f"no linear layer matches matrix kind '{kind}' ({pattern!r}); the model has: "
                f"{', '.join(_shapes_of_names(linears)) or 'none'}. Set backbone.kinds.{kind}."
            )
    return {name: module for name, module in linears.items() if kind_of(name, kinds) is not None}


def kind_of(name: str, kinds: Mapping[str, str]) -> str | None:
    """The kind of matrix that a module name belongs to, None if it belongs to none."""
    return next((kind for kind, pattern in kinds.items() if re.fullmatch(pattern, name)), None)


def layer_of(name: str) -> int:
    """The layer number in a module name (its first whole number), -1 if it has none."""
    return next((int(part) for part in name.split(".") if part.isdigit()), -1)


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
        raise UserError(f"no parameter matches the head pattern {pattern!r}; the model's parts are: {children}")
    for name in names:
        model.get_parameter(name).requires_grad_(True)
    return names


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where `name` stands."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _shapes_of_names(names) -> list[str]:
    return sorted({re.sub(r"\b\d+\b", "N", name) for name in names})


def rank_map(ranks: Mapping[str, int], kinds: Mapping[str, str]) -> tuple[list[int], list[str], list[list[int]]]:
    """Ranks laid out as layer x kind of matrix: the layers, the kinds, and one row of ranks per layer.

    A cell holds the sum where a layer has several matrices of a kind, and 0 where it has none.
    """
    layers = sorted({layer_of(name) for name in ranks})
    present = [kind for kind in kinds if any(kind_of(name, kinds) == kind for name in ranks)]
    cells = [[0] * len(present) for _ in layers]
    for name, rank in ranks.items():
        cells[layers.index(layer_of(name))][present.index(kind_of(name, kinds))] += rank
    return layers, present, cells
