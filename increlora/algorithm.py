"""IncreLoRA: every matrix starts at rank 1, and the most important ones grow until the budget is spent."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from increlora import surgery
from increlora.allocator import Allocator
from increlora.errors import UserError
from increlora.importance import DeltaGradient, ImportanceScore
from increlora.linear import Component, IncrementalLinear, OrthogonalPenalty
from increlora.method import Allocation, Method, named
from increlora.streams import stream

FORGOTTEN = 1e-4  # weight in the moving averages below which the past is left out


@dataclass
class IncreLoRA(Method):
    """Incremental parameter allocation (arXiv 2308.12043).

    Args:
        target_rank: average rank at the end; the budget is target_rank * number of matrices.
        init_rank: rank of every matrix at the start.
        rank_step: ranks per growth and matrix; None: half of target_rank (1, 2, 3, 4 for 2, 4, 6, 8).
        top_h: matrices per growth; None: as many as it takes to end growth in the first half.
        interval, init_warmup: growth at steps t > init_warmup with t % interval == 0.
        beta1, beta2: decay of the averages of sensitivity and uncertainty.
        advance_learning: components learn in reserve before they are chosen.
        reserve_lambda: lambda of a component in reserve.
        restart_warmup: every group of new parameters gets a warmup of its own.
        orth_weight: weight of the orthogonal penalty.
        alpha: scale of the update, divided by the rank.
        dropout: dropout on the input of the update.
        scoring_window: score only in this many steps up to each growth, the averages going on from the window
            before; "all": in every step until the budget is spent; "auto": so many that what is left out
            weighs less than `FORGOTTEN` in the averages (57 at beta 0.85).
        score_reduction: "sqrt" (the authors' code) or "mean" (the paper) over the elements of a matrix.
        last_use_only, rank_epsilon: the authors' two defects, for replaying their code (configs/compat).
    """

    name: str = "increlora"
    target_rank: int = 2
    init_rank: int = 1
    rank_step: int | None = None
    top_h: int | None = None
    interval: int = 100
    init_warmup: int = 100
    beta1: float = 0.85
    beta2: float = 0.85
    advance_learning: bool = True
    reserve_lambda: float = 1e-5
    restart_warmup: bool = True
    orth_weight: float = 0.1
    alpha: float = 32.0
    dropout: float = 0.0
    scoring_window: int | str = "auto"
    score_reduction: str = "sqrt"
    last_use_only: bool = False
    rank_epsilon: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta1", "beta2", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"method.{name} must be in [0, 1), it is {getattr(self, name)}")
        for name in ("orth_weight", "reserve_lambda"):
            if getattr(self, name) < 0:
                raise UserError(f"method.{name} must not be negative, it is {getattr(self, name)}")
        if self.score_reduction not in ("sqrt", "mean"):
            raise UserError(f"method.score_reduction must be sqrt or mean, it is '{self.score_reduction}'")
        if self.scoring_window not in ("auto", "all") and not (type(self.scoring_window) is int and self.window > 0):
            raise UserError(f"method.scoring_window must be auto, all or a number above 0, it is {self.scoring_window}")

    # set up

    def prepare(self, model: nn.Module, total_steps: int) -> None:
        bases = self.adapted_matrices(model)
        self.allocator = self.schedule(len(bases), total_steps)
        self.freeze_all_but_head(model)
        self.linears: dict[str, IncrementalLinear] = {}
        ranks = self.start_ranks(list(bases))
        for name, base in bases.items():
            linear = IncrementalLinear(base, self.alpha, self.dropout, self.rank_epsilon)
            self.linears[name] = linear
            linear.add_active(self._new_component(name, ranks[name], 0.0))
            surgery.replace(model, name, linear)
        self.importance = ImportanceScore(list(bases), self.beta1, self.beta2)
        self.watchers: list[DeltaGradient] = []
        self.penalty: OrthogonalPenalty | None = None  # made anew after each growth

    def start_ranks(self, matrices: list[str]) -> dict[str, int]:
        """The rank of every matrix at the start, at least 1."""
        return dict.fromkeys(matrices, self.init_rank)

    def schedule(self, matrices: int, total_steps: int) -> Allocator:
        """The growth schedule for a model with this many matrices.

        Raises:
            UserError: the schedule is impossible in `total_steps`.
        """
        if total_steps < 1:
            raise UserError(
                f"the run has {total_steps} steps: give the optimizer steps of the whole run "
                "(where a Trainer counts epochs, its max_steps is -1)"
            )
        rank_step = max(1, self.target_rank // 2) if self.rank_step is None else self.rank_step
        top_h = 1 if self.top_h is None else self.top_h
        allocator = Allocator(
            matrices, self.init_rank, self.target_rank, rank_step, top_h, self.interval, self.init_warmup
        )
        if self.top_h is None:
            allocator = replace(allocator, top_h=allocator.smallest_top_h(total_steps))
        allocator.check(total_steps)
        return allocator

    def _new_component(self, matrix: str, rank: int, lambda_value: float) -> Component:
        # the stream is keyed by matrix and index, so what one matrix draws does not depend on the others
        linear = self.linears[matrix]
        generator = stream(self.seed, "component", matrix, len(linear.components))
        return Component(rank, linear.base, lambda_value, generator)

    # one step

    def begin_step(self, step: int, micro_batches: int = 1, loss_scale: float = 1.0) -> None:
        self.loss_scale = loss_scale
        self.watchers = [
            DeltaGradient(linear, micro_batches, self.score_reduction, self.last_use_only)
            for linear in (self.linears.values() if self.scores_at(step) else ())
        ]

    def scores_at(self, step: int) -> bool:
        """Whether the gradients of this step enter the importance score."""
        if self.allocator.spent(self.total_rank):
            return False
        return self.allocator.next_growth(step) - step < self.window

    @property
    def window(self) -> float:
        """Steps up to each growth in which the score is computed."""
        if self.scoring_window == "all":
            return math.inf
        if self.scoring_window == "auto":
            slower = max(self.beta1, self.beta2)
            return math.ceil(math.log(FORGOTTEN) / math.log(slower)) if slower else 1
        return int(self.scoring_window)

    def extra_loss(self) -> Tensor | float:
        return self.orth_weight * self.orthogonal_penalty() if self.orth_weight else 0.0

    def orthogonal_penalty(self) -> Tensor:
        """The unweighted penalty over all adapted matrices, a scalar."""
        device = next(iter(self.linears.values())).weight.device
        if self.penalty is None or self.penalty.device != device:
            self.penalty = OrthogonalPenalty(self.linears.values())
        return self.penalty()

    def before_step(self, step: int) -> list[dict[str, Any]]:
        if self.watchers:
            S = torch.stack([watcher.finish() for watcher in self.watchers])
            self.importance.update(S / self.loss_scale)
            self.watchers = []
        if step == 0 and not self.allocator.spent(self.total_rank):
            return self._group([p for name in self.linears for p in self._add_reserve(name)])
        return self._grow(step) if self.allocator.due(step, self.total_rank) else []

    def _grow(self, step: int) -> list[dict[str, Any]]:
        scores = self.deciding_scores(step)
        chosen = self.allocator.choose(list(self.linears), scores, self.total_rank)
        parameters: list[nn.Parameter] = []
        for name in chosen:
            parameters += self._activate(name) + self._add_reserve(name)
        self.allocations.append(Allocation(step, dict.fromkeys(chosen, self.allocator.rank_step), scores))
        if self.allocator.spent(self.total_rank):
            for linear in self.linears.values():
                linear.silence_reserve()
        return self._group(parameters)

    def deciding_scores(self, step: int) -> dict[str, float]:
        """The score of every matrix by which this growth chooses."""
        return self.scores()

    def _activate(self, name: str) -> list[nn.Parameter]:
        component = self.linears[name].activate_reserve()
        return [component.lambda_] if self.advance_learning else list(component.parameters())

    def _add_reserve(self, name: str) -> list[nn.Parameter]:
        lambda_value = self.reserve_lambda if self.advance_learning else 0.0
        component = self._new_component(name, self.allocator.rank_step, lambda_value)
        self.linears[name].add_reserve(component, learns=self.advance_learning)
        self.penalty = None
        return [component.A, component.B] if self.advance_learning else []

    def _group(self, parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
        wanted = {id(parameter) for parameter in parameters}
        params = [
            (f"{matrix}.{name}", parameter)
            for matrix, linear in self.linears.items()
            for name, parameter in linear.named_parameters()
            if id(parameter) in wanted
        ]
        group: dict[str, Any] = {"params": params, "decay": True}
        return [group if self.restart_warmup else group | {"born": 0}] if params else []

    # what is known of it

    @property
    def total_rank(self) -> int:
        """Sum of the ranks of all matrices."""
        return sum(self.ranks().values())

    def ranks(self) -> dict[str, int]:
        return {name: linear.rank for name, linear in self.linears.items()}

    def planned_ranks(self) -> dict[int, int]:
        allocator, plan = self.allocator, super().planned_ranks()
        for step in allocator.growth_steps():
            grown = allocator.rank_step * min(allocator.top_h, allocator.matrices)
            plan[step] = min(allocator.budget, plan[max(plan)] + grown)
        return plan

    def scores(self) -> dict[str, float]:
        return self.importance.scores()

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        return super().metrics() | {"train/orthogonal_penalty": self.orthogonal_penalty().item()}

    def parameters_by_kind(self, model: nn.Module) -> dict[str, int]:
        counts = super().parameters_by_kind(model)
        reserves = [linear.reserve for linear in self.linears.values() if linear.reserve is not None]
        reserve = sum(p.numel() for component in reserves for p in component.parameters() if p.requires_grad)
        return counts | {"update": counts["update"] - reserve, "reserve": reserve}

    # keep and restore

    def trained_state(self, model: nn.Module) -> dict[str, Tensor]:
        components = [p for linear in self.linears.values() for p in linear.components.parameters()]
        return super().trained_state(model) | {name: p.detach() for name, p in named(model, components)}

    def state_dict(self) -> dict[str, Any]:
        structure = {
            name: {
                "components": [component.rank for component in linear.all_components],
                "active": linear.active,
                "reserve_learns": linear.reserve_learns,
            }
            for name, linear in self.linears.items()
        }
        return super().state_dict() | {"structure": structure, "importance": self.importance.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.importance.load_state_dict(state["importance"])
        for name, shape in state["structure"].items():
            linear = self.linears[name]
            del linear.components[1:]  # an earlier structure may be loaded over a later one
            for rank in shape["components"][1:]:
                linear.add_reserve(self._new_component(name, rank, 0.0), learns=self.advance_learning)
            for component in linear.components[: shape["active"]]:
                component.requires_grad_(True)
            linear.set_structure(shape["active"], shape["reserve_learns"])
        self.penalty = None

    @torch.no_grad()
    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        # while ranks grow a reserve learns at the output, with lambda 1e-5: leaving it out would change the logits
        return {name: linear.factors() for name, linear in self.linears.items()}

    def merge(self, model: nn.Module) -> None:
        for name, linear in self.linears.items():
            surgery.replace(model, name, linear.merged())
