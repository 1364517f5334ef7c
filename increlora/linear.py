"""A frozen linear layer with its update from the bank of components (arXiv 2308.12043).

h = W0 x + b + delta x,   delta = alpha / rank * B diag(lambda) A
"""

from typing import Any

import torch
from torch import Tensor, nn

from increlora.bank import Bank, Views
from increlora.components import Matrix
from increlora.errors import UserError

LOST = 0.01  # of the update, by its norm, may be lost in a merge


class Update(nn.Module):
    """The update of one matrix: its active components, and the reserve that learns in advance.

    Args:
        bank: holds the components; it is a module of the model, not of this layer.
        name: of the matrix in the bank.
        dropout: dropout on the input of the update.
    """

    def __init__(self, bank: Bank, name: str, dropout: float = 0.0):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.watcher: Any = None  # importance.DeltaGradient while a step is scored
        self.__dict__["bank"] = bank  # not by nn.Module.__setattr__, which would make it a module of this layer
        self.name = name

    bank: Bank

    @property
    def matrix(self) -> Matrix:
        """Which components the update has."""
        return self.bank.matrices[self.name]

    in_features = property(lambda self: self.matrix.in_features)
    out_features = property(lambda self: self.matrix.out_features)

    def delta(self) -> Tensor:
        """The update matrix, (out, in), the reserve that learns included."""
        A, B = self.bank.factors(self.name)
        return B @ A

    def add_to(self, h: Tensor, rows: Tensor, factors: Views, in_place: bool = True) -> Tensor:
        """h (tokens, out) + delta rows (tokens, in); delta itself is never formed.

        Args:
            in_place: h may be overwritten.
        """
        rows = self.dropout(rows)
        # other orders of these thin products take up to ten times as long; backward uses the order of forward
        update = factors.A @ rows.t()
        operands = update.t().to(h.dtype), factors.B.to(h.dtype)
        h = h.addmm_(*operands) if in_place else h.addmm(*operands)
        if self.watcher is not None and h.requires_grad:
            self.watcher.watch(rows, h, factors)
        return h


class IncrementalLinear(Update):
    """`base` plus the update of its matrix.

    Args:
        base: the pretrained layer; it is frozen.
        bank, name, dropout: of the update.
    """

    def __init__(self, base: nn.Linear, bank: Bank, name: str, dropout: float = 0.0):
        super().__init__(bank, name, dropout)
        self.base = base.requires_grad_(False)
        self.train(base.training)  # of its dropout too

    # what other code asks of a linear layer
    in_features = property(lambda self: self.base.in_features)
    out_features = property(lambda self: self.base.out_features)
    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> h (..., out)."""
        dtype = dtype_of_products(x)
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        factors = self.bank.views(self.name, dtype)
        return self.add_to(self.base(rows), rows, factors).view(*x.shape[:-1], self.out_features)

    @torch.no_grad()
    def check_merge(self) -> None:
        """Refuse to merge where rounding to the dtype of the weight would lose a part of the update.

        Raises:
            UserError: more than `LOST` of the update, by its norm, would be lost.
        """
        if self.base.weight.dtype not in (torch.float16, torch.bfloat16):
            return
        delta = self.delta()
        exact = self.base.weight.to(delta.dtype) + delta
        lost = torch.linalg.vector_norm(exact.to(self.base.weight.dtype).to(delta.dtype) - exact)
        if not lost <= LOST * torch.linalg.vector_norm(delta):
            raise UserError(
                f"{self.name} holds its weight in {self.base.weight.dtype}: merging would lose a part of the update to "
                "rounding. Call model.float() before the merge; the merged model may be rounded afterwards."
            )

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain linear layer with the same outputs (in evaluation mode)."""
        self.base.weight += self.delta()
        return self.base


def dtype_of_products(x: Tensor) -> torch.dtype:
    """The dtype of autocast where it is on (it does not change float64), else that of the input."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) and x.dtype != torch.float64 else x.dtype
