"""A frozen linear layer with a growing low-rank update, and the penalty that keeps its components apart.

The paper's reconstructed update and its orthogonal regularisation (arXiv 2308.12043, checked against the code):

    h = W0 x + b + delta x,   delta = alpha / rank * B diag(lambda) A
    penalty = mean over all A and B of || A A^T - I ||_F  and  || B^T B - I ||_F
"""

from collections.abc import Iterable
from typing import Any, cast

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
        like: dict[str, Any] = {"dtype": base.weight.dtype, "device": base.weight.device}

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
        self.alpha, self.rank_epsilon = alpha, rank_epsilon
        self.dropout = nn.Dropout(dropout)
        self.watcher: Any = None  # importance.DeltaGradient while a step is scored
        self.set_structure(0, False)

    def set_structure(self, active: int, reserve_learns: bool) -> None:
        """Say how many of the components are active, and whether the one in reserve reaches the output.

        What every forward needs of the structure is worked out here, once per growth.
        """
        components = self.all_components
        self.active, self.reserve_learns = active, reserve_learns
        self.rank = sum(component.rank for component in components[:active])  # of rank-one components
        self.used = components[: active + reserve_learns]
        self.scale = self.alpha / (self.rank + self.rank_epsilon) if self.rank else 0.0

    @property
    def all_components(self) -> list[Component]:
        """The active ones first, then at most one in reserve."""
        return cast(list[Component], list(self.components))

    @property
    def reserve(self) -> Component | None:
        """The component that learns in advance, or waits inert."""
        return self.all_components[self.active] if len(self.components) > self.active else None

    # what other code asks of a linear layer
    in_features = property(lambda self: self.base.in_features)
    out_features = property(lambda self: self.base.out_features)
    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def add_active(self, component: Component) -> None:
        """Add a component that is part of the rank from the start."""
        self.components.append(component)
        self.set_structure(self.active + 1, False)

    def add_reserve(self, component: Component, learns: bool) -> None:
        """Put a component in reserve: lambda frozen; A and B train only if it learns in advance."""
        component.lambda_.requires_grad_(False)
        component.A.requires_grad_(learns)
        component.B.requires_grad_(learns)
        self.components.append(component)
        self.set_structure(self.active, learns)

    def activate_reserve(self) -> Component:
        """The reserve becomes part of the rank; returns it, all of it training."""
        component = self.all_components[self.active].requires_grad_(True)
        self.set_structure(self.active + 1, False)
        return component

    def silence_reserve(self) -> None:
        """Set the reserve's lambda to 0; A and B go on in the penalty (as in the authors' code)."""
        if self.reserve is not None:
            self.reserve.lambda_.data.zero_()
        self.set_structure(self.active, False)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A with alpha / rank * lambda folded in, (r, in), and B, (out, r), of all that reaches the output."""
        lambda_ = torch.cat([component.lambda_ for component in self.used]) * self.scale
        A = torch.cat([component.A for component in self.used])
        return lambda_.unsqueeze(1) * A, torch.cat([component.B.t() for component in self.used]).t()

    def delta(self) -> Tensor:
        """The update matrix, (out, in), reserve included."""
        A, B = self.factors()
        return B @ A

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> h (..., out); delta itself is never formed."""
        rows = x.reshape(-1, x.shape[-1])
        h = self.base(rows)
        A, B = self.factors()
        rows = self.dropout(rows)
        # thin products take up to ten times as long in other orders, and backward keeps the order of forward
        update = A @ rows.t()
        h = h.addmm_(update.t().to(h.dtype), B.t().to(h.dtype))
        if self.watcher is not None and h.requires_grad:
            self.watcher.watch(rows, h)
        return h.view(*x.shape[:-1], self.out_features)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain linear layer with the same outputs (in evaluation mode)."""
        self.base.weight += self.delta()
        return self.base


class OrthogonalPenalty:
    """Mean over all A and B of || A A^T - I ||_F and || B^T B - I ||_F (the paper's regulariser).

    A (rank, in) and B (out, rank) hold all components of a matrix, the reserve included. The norm is
    not squared: the paper writes it squared, the code behind its numbers does not square it.

    Matrices of equal width share one batched product, ranks padded with rows of zeros. Which row goes
    where is worked out here, so an object is good until the next growth.

    Args:
        linears: the adapted matrices.
    """

    def __init__(self, linears: Iterable[IncrementalLinear]):
        by_width: dict[tuple[bool, int], list[list[Component]]] = {}
        for linear in linears:
            for is_A, width in ((True, linear.in_features), (False, linear.out_features)):
                by_width.setdefault((is_A, width), []).append(linear.all_components)
        self.sides = [self._side(matrices, is_A) for (is_A, _), matrices in by_width.items()]

    @property
    def device(self) -> torch.device:
        return self.sides[0][2].device

    @staticmethod
    def _side(matrices: list[list[Component]], is_A: bool) -> tuple[list[Component], bool, Tensor, Tensor]:
        """All components of some matrices, the row of each place in the padded stack, and its identities."""
        ranks = [sum(component.rank for component in components) for components in matrices]
        device, dtype = matrices[0][0].A.device, matrices[0][0].A.dtype
        places = torch.full((len(ranks), max(ranks)), sum(ranks))  # the row of zeros
        first = 0
        for place, rank in zip(places, ranks, strict=True):
            place[:rank] = torch.arange(first, first + rank)
            first += rank
        identities = torch.diag_embed((places < sum(ranks)).to(dtype))
        components = [component for several in matrices for component in several]
        return components, is_A, places.to(device), identities.to(device)

    def __call__(self) -> Tensor:
        """The penalty, a scalar."""
        # autocast would take the products in half precision, where I - I is noise
        with torch.autocast(self.device.type, enabled=False):
            return torch.cat([self._distances(*side) for side in self.sides]).mean()

    @staticmethod
    def _distances(components: list[Component], is_A: bool, places: Tensor, identities: Tensor) -> Tensor:
        """|| R R^T - I ||_F of every matrix R (rank, width) of a side."""
        rows = torch.cat([component.A if is_A else component.B.t() for component in components])
        stack = F.pad(rows, (0, 0, 0, 1))[places]
        return torch.linalg.vector_norm(stack @ stack.mT - identities, dim=(1, 2))
