"""What the bank is made of: a component, the components of a matrix, the tensors that one allocation brings."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn

NAME = "increlora_bank"  # of the bank, in the model that it serves
STATE = "increlora_state"  # the entry of a model's state dict for structure, averages and step, written by Growth
NO_GROUP = -1  # the lambda of a component in reserve is a constant, and in no group


@dataclass
class Component:
    """One addend of a matrix's update: `rank` rows of A, as many columns of B, as many lambdas.

    Args:
        group: number of the group that holds its rows.
        A_row, B_row: the first of them, in the group's tensors of the matrix's input and output width.
        lambda_group, lambda_row: the same for its lambdas; `NO_GROUP` while it is in reserve.
    """

    rank: int
    group: int
    A_row: int
    B_row: int
    lambda_group: int = NO_GROUP
    lambda_row: int = 0

    def split(self, rank: int) -> tuple["Component", list["Component"]]:
        """A component in reserve in two parts: its first `rank` rows, and a list with the rest (empty without one)."""
        first = replace(self, rank=rank)
        rest = replace(self, rank=self.rank - rank, A_row=self.A_row + rank, B_row=self.B_row + rank)
        return first, [rest] if rest.rank else []


@dataclass
class Matrix:
    """The components of one matrix: the active ones first, then at most one in reserve.

    Args:
        reserve_learns: whether the component in reserve learns, and so reaches the output.
    """

    name: str
    in_features: int
    out_features: int
    components: list[Component] = field(default_factory=list)
    active: int = 0
    reserve_learns: bool = False

    @property
    def rank(self) -> int:
        """Sum of the ranks of the active components."""
        return sum(component.rank for component in self.components[: self.active])

    @property
    def used(self) -> list[Component]:
        """The components that reach the output."""
        return self.components[: self.active + self.reserve_learns]

    @property
    def reserve(self) -> Component | None:
        """The component that learns in advance, or is inert; None if there is none."""
        return self.components[self.active] if len(self.components) > self.active else None


@dataclass(frozen=True)
class GroupSize:
    """How many rows of every width a group holds, and how many lambdas."""

    rows: Mapping[int, int]
    lambdas: int


class ComponentGroup(nn.Module):
    """The tensors that one allocation brings: `rows` by width, (rows, width), and `lambda_`, (lambdas,).

    All are zero and frozen until the allocation. Rows that no matrix takes stay zero.
    """

    def __init__(self, size: GroupSize, dtype: torch.dtype, device: torch.device):
        super().__init__()

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*shape, dtype=dtype, device=device), requires_grad=False)

        self.size = size
        self.rows = nn.ParameterDict({str(width): zeros(rows, width) for width, rows in size.rows.items()})
        self.lambda_ = zeros(size.lambdas) if size.lambdas else None
        self.next_row: dict[str, int] = {}  # by width, or "lambda_"
        self.trains = False  # whether its allocation has come, and its tensors train

    @torch.no_grad()
    def clear(self) -> None:
        """Back to the start: nothing is taken, nothing trains, all is zero."""
        self.next_row, self.trains = {}, False
        for parameter in self.parameters():
            parameter.zero_()
            parameter.grad = None

    def take(self, what: str, rows: int) -> int:
        """Take the next free rows; returns the number of the first."""
        first = self.next_row.get(what, 0)
        self.next_row[what] = first + rows
        return first
