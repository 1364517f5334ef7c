"""What the name of a matrix says: its kind and its layer, and ranks laid out by both."""

import re
from collections.abc import Mapping


def kind_of(name: str, kinds: Mapping[str, str]) -> str | None:
    """The kind of matrix that a module name belongs to, None if it belongs to none."""
    return next((kind for kind, pattern in kinds.items() if re.fullmatch(pattern, name)), None)


def layer_of(name: str) -> int:
    """The layer number in a module name (its first whole number), -1 if it has none."""
    return next((int(part) for part in name.split(".") if part.isdigit()), -1)


def rank_map(ranks: Mapping[str, int], kinds: Mapping[str, str]) -> tuple[list[int], list[str], list[list[int]]]:
    """Ranks laid out as layer x kind of matrix: the layers, the kinds, and one row of ranks per layer.

    A cell holds the sum where a layer has several matrices of a kind, and 0 where it has none.
    """
    layers = sorted({layer_of(name) for name in ranks})
    present = [kind for kind in kinds if any(kind_of(name, kinds) == kind for name in ranks)]
    cells = [[0] * len(present) for _ in layers]
    for name, rank in ranks.items():
        cells[layers.index(layer_of(name))][present.index(str(kind_of(name, kinds)))] += rank
    return layers, present, cells
