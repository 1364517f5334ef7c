"""A frozen linear layer with a growing low-rank update, and the penalty that keeps its components apart.

Paper section 3.1 and 3.2:

    h = W0 x + b + delta x,   delta = alpha / rank * B diag(lambda) A
    penalty = mean over all A and B of || A A^T - I ||_F  and  || B^T B - I ||_F
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INIT_STD = 0.02


class Component(nn.Module):
    """An addend B diag(lambda_) A of the update: A (rank, in), lambda_ (rank,), B (out, rank).

    It is born in one piece, per allocation, because a learning-rate schedule belongs to a Parameter.
    """

    def __init__(self, rank: int, base: nn.Linear, lambda_value: float, generator: torch.Generator):
        super().__init__()
        like = {"dtype": base.weight.dtype, "device": base.weight.device}

        def normal(*shape: int) -> nn.Parameter:
            # drawn on the CPU in float32, so that the values do not depend on the device
            return nn.Parameter((torch.randn(*shape, generator=generator) * INIT_STD).to(**like))

        self.A = normal(rank, base.in_features)
        self.lambda_ = nn.Parameter(torch.full((rank,), lambda_value, **like))
        self.B = normal(base.out_features, rank)

    @property
    def rank(self) -> int:
        return len(self.lambda_)


class IncrementalLinear(nn.Module):
    """`base` plus the update of its active components and of at most one component in reserve.

    Args:
        base: the pretrained layer; it is frozen.
        alpha: scale of the update, divided by the rank (so growing rescales the old components).
        dropout: dropout on the input of the update.
        rank_epsilon: added to the rank in that division (the authors' code: 1e-5).
    """

    def __init__(self, base: nn.Linear, alpha: float, dropout: float = 0.0, rank_epsilon: float = 0.0):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.components = nn.ModuleList()  # the active ones first, then at most one in reserve
        self.active = 0
        self.reserve_learns = False
        self.alpha, self.rank_epsilon = alpha, rank_epsilon
        self.dropout = nn.Dropout(dropout)
        self.watcher = None  # importance.DeltaGradient while a step is scored

    @property
    def rank(self) -> int:
        """Number of active rank-one components."""
        return sum(component.rank for component in self.components[: self.active])

    @property
    def reserve(self) -> Component | None:
        """The component that learns in advance, or waits inert."""
        return self.components[self.active] if len(self.components) > self.active else None

    # what other code asks of a linear layer
    in_features = property(lambda self: self.base.in_features)
    out_features = property(lambda self: self.base.out_features)
    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def add_reserve(self, component: Component, learns: bool) -> None:
        """Put a component in reserve: lambda frozen; A and B train only if it learns in advance."""
        component.lambda_.requires_grad_(False)
        component.A.requires_grad_(learns)
        component.B.requires_grad_(learns)
        self.components.append(component)
        self.reserve_learns = learns

    def activate_reserve(self) -> Component:
        """The reserve becomes part of the rank; returns it, all of it training."""
        component = self.reserve.requires_grad_(True)
        self.active += 1
        self.reserve_learns = False
        return component

    def silence_reserve(self) -> None:
        """Set the reserve's lambda to 0; A and B go on in the penalty (as in the authors' code)."""
        if self.reserve is not None:
            self.reserve.lambda_.data.zero_()
        self.reserve_learns = False

    def factors(self) -> tuple[Tensor, Tensor]:
        """A with alpha / rank * lambda folded in, (r, in), and B, (out, r), of all that reaches the output."""
        used = self.components[: self.active + self.reserve_learns]
        scale = self.alpha / (self.rank + self.rank_epsilon)
        lambda_ = torch.cat([component.lambda_ for component in used]) * scale
        A = torch.cat([component.A for component in used])
        return lambda_.unsqueeze(1) * A, torch.cat([component.B for component in used], dim=1)

    def delta(self) -> Tensor:
        """The update matrix, (out, in), reserve included."""
        A, B = self.factors()
        return B @ A

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> h (..., out); delta itself is never formed."""
        h = self.base(x)
        A, B = self.factors()
        x = self.dropout(x)
        update = F.linear(x, A).flatten(0, -2)
        h = torch.addmm(h.flatten(0, -2), update, B.t()).view(h.shape)
        if self.watcher is not None and h.requires_grad:
            self.watcher.watch(x, h)
        return h

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain linear layer with the same outputs (in evaluation mode)."""
        self.base.weight += self.delta()
        return self.base


def orthogonal_penalty(linears: Iterable[IncrementalLinear]) -> Tensor:
    """Mean over all A and B of || A A^T - I ||_F and || B^T B - I ||_F, a scalar (paper, equation 7).

    A (rank, in) and B (out, rank) hold all components of a matrix, the reserve included. The norm is
    not squared: the paper writes it squared, the code behind its numbers does not square it.
    Matrices of equal width share one batched product, ranks padded with zero rows.
    """
    by_width: dict[int, list[Tensor]] = {}
    for linear in linears:
        by_width.setdefault(linear.in_features, []).append(torch.cat([c.A for c in linear.components]))
        by_width.setdefault(linear.out_features, []).append(torch.cat([c.B.t() for c in linear.components]))
    return torch.cat([_distances_to_orthogonal(rows) for rows in by_width.values()]).mean()


def _distances_to_orthogonal(rows: list[Tensor]) -> Tensor:
    """|| R R^T - I ||_F of each R (rank_i, width) in `rows`."""
    # autocast would take the products in half precision, where I - I is noise
    with torch.autocast(rows[0].device.type, enabled=False):
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        ranks = torch.tensor([len(r) for r in rows], device=padded.device)
        real = torch.arange(padded.shape[1], device=padded.device) < ranks.unsqueeze(1)
        return torch.linalg.vector_norm(padded @ padded.mT - torch.diag_embed(real.to(padded.dtype)), dim=(1, 2))
