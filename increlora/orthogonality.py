"""The penalty that keeps the components of a matrix apart (the paper's orthogonal regularisation, arXiv 2308.12043).

    penalty = mean over all A and B of || A A^T - I ||_F  and  || B^T B - I ||_F

A (rank, in) and B (out, rank) hold all components of a matrix, the reserve included. The norm is not squared: the paper
writes it squared, the code behind its numbers does not square it.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def orthogonal_penalty(stacks: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """The penalty over all matrices, a scalar.

    Args:
        stacks: one pair per width. rows (matrices, rank, width): each A, or B transposed; missing rows are zero.
            identities (matrices, rank, rank): the target of R R^T; zero for missing rows.
    """
    return torch.cat([_Distances.apply(rows, identities) for rows, identities in stacks]).mean()


class _Distances(torch.autograd.Function):
    """|| R R^T - I ||_F of every matrix R, (matrices,).

    R R^T - I is symmetric, so its derivative, 2 (R R^T - I) R / || R R^T - I ||, needs one product; autograd takes two.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, identities: Tensor) -> Tensor:
        with _full_precision(rows):
            gap = torch.baddbmm(identities, rows, rows.mT, beta=-1)
            distances = torch.linalg.vector_norm(gap, dim=(1, 2))
        ctx.save_for_backward(rows, gap, distances)
        return distances

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        rows, gap, distances = ctx.saved_tensors
        factors = 2 * gradient / distances.clamp_min(torch.finfo(rows.dtype).tiny)  # 0 at the optimum, where gap is 0
        with _full_precision(rows):
            return torch.bmm(gap, rows) * factors.view(-1, 1, 1), None


def _full_precision(like: Tensor) -> torch.autocast:
    # in half precision, as autocast would compute, R R^T - I is only rounding error near the optimum
    return torch.autocast(like.device.type, enabled=False)
