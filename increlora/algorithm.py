"""IncreLoRA: every matrix starts at rank 1, and the most important ones grow until the budget is spent."""

import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from increlora import surgery
from increlora.allocator import Allocator
from increlora.bank import Bank
from increlora.base_weights import checksums
from increlora.components import Component, GroupSize
from increlora.errors import UserError
from increlora.importance import DeltaGradient, ImportanceScore
from increlora.linear import IncrementalLinear
from increlora.method import Allocation, Method, named
from increlora.order import AFTER, StepOrder
from increlora.orthogonality import orthogonal_penalty
from increlora.streams import stream
from increlora.validation import other_settings

START, FIRST_RESERVES = 0, 1  # numbers of groups in the bank; each growth brings one more
MADE_BY_PREPARE = ("allocator", "bank", "linears", "importance", "watchers", "penalties", "merged", "order")
# fields that a state cannot change; the schedule's are compared as they were resolved
SETTINGS = (
    "alpha", "dropout", "beta1", "beta2", "orth_weight", "advance_learning", "reserve_lambda", "restart_warmup",
    "score_reduction", "last_use_only", "rank_epsilon", "new_groups_at_peak", "seed",
)  # fmt: skip
TAKEN = 3  # steps of the optimizer that must change what they train; the rate of the first one may be 0
FORGOTTEN = 1e-4  # weight in the moving averages below which the past is left out


@dataclass
class IncreLoRA(Method):
    """Incremental parameter allocation (arXiv 2308.12043).

    Args:
        target_rank: average rank at the end; the budget is target_rank * number of matrices.
        init_rank: rank of every matrix at the start.
        rank_step: ranks that a chosen matrix gains in a growth; None: half of target_rank (1, 2, 3, 4 for 2, 4, 6, 8).
        top_h: matrices per growth; None: the fewest with which growth ends in the first half of training.
        max_rank: no matrix grows above it; None: no limit. A matrix grows by whole steps, so it ends at
            init_rank + k * rank_step or below.
        interval, init_warmup: growth at steps t > init_warmup with t % interval == 0.
        beta1, beta2: decay of the averages of sensitivity and uncertainty.
        advance_learning: components learn in reserve before they are chosen.
        reserve_lambda: lambda of a component in reserve.
        restart_warmup: every group of new parameters gets a warmup of its own.
        orth_weight: weight of the orthogonal penalty.
        alpha: scale of the update, divided by the rank.
        dropout: dropout on the input of the update.
        scoring_window: score only in this many steps up to each growth; the averages continue from the previous
            window. "all": in every step until the budget is spent. "auto": in so many steps that a step left out
            weighs less than 1e-4 in the averages (57 steps at beta 0.85).
        score_reduction: the sum over the elements of a matrix is divided by the square root of their number
            ("sqrt", the authors' code) or by their number ("mean", the paper).
        last_use_only, rank_epsilon: the authors' two defects, for replaying their code (configs/compat).
        new_groups_at_peak: without restart warmup, new parameters keep the peak rate to the end, as in the authors'
            code (configs/compat), instead of following the first schedule.
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
    new_groups_at_peak: bool = False
    max_rank: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta1", "beta2", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"`{name}` must be in [0, 1), it is {getattr(self, name)}")
        for name in ("orth_weight", "reserve_lambda", "rank_epsilon"):
            if getattr(self, name) < 0:
                raise UserError(f"`{name}` must not be negative, it is {getattr(self, name)}")
        if self.max_rank is not None and self.max_rank < self.target_rank:
            raise UserError(
                f"`max_rank` {self.max_rank} is below the average rank at the end, target_rank {self.target_rank}"
            )
        if self.score_reduction not in ("sqrt", "mean"):
            raise UserError(f"`score_reduction` must be sqrt or mean, it is '{self.score_reduction}'")
        if self.scoring_window not in ("auto", "all") and not (type(self.scoring_window) is int and self.window > 0):
            raise UserError(f"`scoring_window` must be auto, all or a number above 0, it is {self.scoring_window}")

    def __getattr__(self, name: str) -> NoReturn:
        if name in MADE_BY_PREPARE:
            raise UserError(f"{self.name} is not prepared: call method.prepare(model, total_steps) first")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    # set up

    def prepare(self, model: nn.Module, total_steps: int) -> None:
        if "order" in vars(self):
            raise UserError(f"this {self.name} object was prepared on a model already: make another one for this model")
        bases = self.adapted_matrices(model)
        self.schedule(len(bases), total_steps)  # refused before anything is changed
        self.start({name: (base.out_features, base.in_features) for name, base in bases.items()},
                   [base.weight for base in bases.values()])  # fmt: skip
        self.plan(total_steps)
        self.freeze_all_but_head(model)
        for name, base in bases.items():
            self.linears[name] = IncrementalLinear(base, self.bank, name, self.dropout)
            surgery.replace(model, name, self.linears[name])
        self.bank.attach(model)

    def start(self, shapes: Mapping[str, tuple[int, int]], weights: Sequence[Tensor], *, open: bool = False) -> None:
        """Make the components of the start; no model is changed.

        Args:
            shapes: (out, in) of every matrix by name, in model order.
            weights: of these matrices; the components lie on their device.
            open: see `Bank`.

        Raises:
            UserError: the matrices lie on several devices.
        """
        devices = sorted({str(weight.device) for weight in weights})
        if len(devices) > 1:
            raise UserError(
                f"the adapted matrices lie on several devices ({', '.join(devices)}), their components must lie on "
                "one: load the whole model on one device, without device_map"
            )
        ranks = self.start_ranks(list(shapes))
        self.bank = Bank(
            shapes, [_group_size(shapes, ranks, lambdas=sum(ranks.values()))],
            alpha=self.alpha, rank_epsilon=self.rank_epsilon,
            reserve_lambda=self.reserve_lambda if self.advance_learning else 0.0,
            # in half precision, steps of the size of a learning rate would be lost
            dtype=torch.float64 if weights[0].dtype == torch.float64 else torch.float32, device=weights[0].device,
            open=open,
        )  # fmt: skip
        for name in shapes:
            self.bank.add_active(name, ranks[name], START, self._stream(name))
        self.bank.release(START)
        self._note_birth(START, step=-1)
        self.importance = ImportanceScore(list(shapes), self.beta1, self.beta2)
        self.watchers: list[DeltaGradient] = []
        self.penalties = 0  # gradients of the penalty that have arrived in the step under way
        self.merged = False
        self.linears: dict[str, Any] = {}  # the layers, or (in PEFT's layers) the updates, by matrix

    def plan(self, total_steps: int) -> None:
        """Make the tensors of every later allocation of the run: the first reserves, each growth.

        Raises:
            UserError: the schedule is impossible in `total_steps`.
        """
        shapes = {name: (matrix.out_features, matrix.in_features) for name, matrix in self.bank.matrices.items()}
        self.allocator = allocator = self.schedule(len(shapes), total_steps)
        sizes = []
        if allocator.needed:
            sizes.append(_group_size(shapes, dict.fromkeys(shapes, allocator.rank_step), lambdas=0))
        for grown in allocator.growths():
            sizes.append(_largest_group_size(shapes, grown, allocator.rank_step))
        self.bank.add_groups(sizes)
        self.order = StepOrder(total_steps)

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The groups of the start, and one for each later allocation; its parameters train from the step `born` on."""
        later = {id(parameter) for parameter in self.later_parameters()}
        groups = super().param_groups(model)
        for group in groups:
            group["params"] = [(name, p) for name, p in group["params"] if id(p) not in later]
        for number, born in self.births().items():
            params = named(model, self.bank.groups[number].parameters())
            constant = self.new_groups_at_peak and not self.restart_warmup
            born = born if self.restart_warmup or constant else 0
            group = {"params": params, "decay": True, "born": born}
            groups.append(group | ({"constant": True} if constant else {}))
        return groups

    def births(self) -> dict[int, int]:
        """The step from which the tensors of each later allocation train, by its number in the bank."""
        if not self.allocator.needed:
            return {}
        reserves = {FIRST_RESERVES: 1} if self.advance_learning else {}
        return reserves | {FIRST_RESERVES + 1 + i: step + 1 for i, step in enumerate(self.allocator.growth_steps())}

    def later_parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.bank.all_groups[START + 1 :] for parameter in group.parameters()]

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
            matrices,
            self.init_rank,
            self.target_rank,
            rank_step,
            top_h,
            self.interval,
            self.init_warmup,
            self.max_rank,
        )
        if self.top_h is None:
            allocator = replace(allocator, top_h=allocator.smallest_top_h(total_steps))
        allocator.check(total_steps)
        return allocator

    def _stream(self, matrix: str) -> torch.Generator:
        # keyed by matrix and index, so that what one matrix draws does not depend on the others
        return stream(self.seed, "component", matrix, len(self.bank.matrices[matrix].components))

    # one step

    def begin_step(self, step: int, micro_batches: int = 1, loss_scale: float = 1.0) -> None:
        if self.merged:
            raise UserError(f"{self.name} was merged into the model, which trains no further: prepare a fresh model")
        if self.order.next is None:
            self._check_ranks(step)
        self.order.begin(step)
        self.bank.check_dtype()
        self.bank.forget()  # a change of `.data` since the last pass shows nowhere
        self.loss_scale = loss_scale
        self.penalties, self.bank.passed = 0, False
        self.watchers = [
            DeltaGradient(linear, micro_batches, self.score_reduction, self.last_use_only)
            for linear in (self.linears.values() if self.scores_at(step) else ())
        ]

    def _check_ranks(self, step: int) -> None:
        """The ranks of a state that was loaded are those of the step at which training goes on."""
        plan = self.planned_ranks()
        due = plan[max((at for at in plan if at < step), default=0)]
        if self.total_rank != due:
            raise UserError(
                f"begin_step({step}): the loaded state has total rank {self.total_rank}, at this step it is {due}; go "
                "on at the step at which the state was taken"
            )

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
        if not self.orth_weight:
            return 0.0
        loss = self.orth_weight * self.orthogonal_penalty()
        if loss.requires_grad:
            loss.register_hook(self._count_penalty)
        return loss

    def _count_penalty(self, _: Tensor) -> None:
        self.penalties += 1

    def orthogonal_penalty(self) -> Tensor:
        """The unweighted penalty over all adapted matrices, a scalar."""
        return orthogonal_penalty(self.bank.stacks())

    def before_step(self, step: int) -> None:
        self.order.before(step)
        self._check_penalty()
        if self.watchers:
            self._check_watchers()
            S = torch.stack([watcher.finish() for watcher in self.watchers])
            self.importance.update(S / self.loss_scale)
            self.watchers = []
        if self.allocator.due(step, self.total_rank):
            self._check_training(step)
        self.allocate(step)

    def after_step(self, step: int) -> None:
        self.order.after(step)

    def _check_penalty(self) -> None:
        """The orthogonal penalty was trained on exactly once."""
        if self.orth_weight and self.penalties != 1:
            raise UserError(
                f"the gradient of the penalty arrived {self.penalties} times in this step: add method.extra_loss() to "
                "the loss of exactly one backward pass between begin_step and before_step"
            )
        if self.penalties and all(parameter.grad is None for parameter in self.bank.parameters()):
            raise UserError(
                "there are no gradients, though the penalty's arrived in this step: call optimizer.zero_grad() only "
                "after method.after_step()"
            )

    def _note_birth(self, group: int, step: int) -> None:
        """Keep the lambdas of a group that trains after this step, as they are now."""
        lambdas = self.bank.all_groups[group].lambda_
        self.youngest: tuple[int, nn.Parameter, Tensor] | None = None
        if lambdas is not None:
            self.youngest = step, lambdas, lambdas.detach().clone()

    def _check_training(self, step: int) -> None:
        """At a growth: the optimizer has changed what began to train last, to numbers; read from the device."""
        if self.youngest is None or step - self.youngest[0] <= TAKEN or not any(self.scores().values()):
            return  # where all scores are 0, `deciding_scores` says why
        born, lambdas, before = self.youngest
        if not lambdas.isfinite().all():
            raise UserError(
                f"the growth at step {step}: components are no numbers any more. Leave out steps whose gradients are "
                "not finite: no before_step and no optimizer.step(), and begin_step of the same step again"
            )
        if torch.equal(lambdas.detach(), before.to(lambdas.device)):
            what = "the components" if born < 0 else f"the components of the growth at step {born}"
            raise UserError(
                f"the growth at step {step}: {what} have not changed since they began to train. Call optimizer.step() "
                "in every step, with learning rates above 0, and make the optimizer over method.param_groups(model)"
            )

    def _check_watchers(self) -> None:
        """The gradients that the score needs have come, and no more than were announced."""
        late = [watcher.linear.name for watcher in self.watchers if watcher.late]
        if late:
            raise UserError(
                f"{late[0]} got gradients after the backward passes that were announced: raise `micro_batches` of "
                "begin_step to their number (with activation checkpointing: times the uses of a layer); a larger one "
                "does no harm"
            )
        if not self.bank.passed and not any(watcher.took_part for watcher in self.watchers):
            raise UserError(
                "no forward pass with gradients came between begin_step and before_step: begin_step comes before the "
                "forward"
            )

    def allocate(self, step: int) -> None:
        """What is due at this step: the reserves at step 0, ranks at a growth."""
        if step == 0 and self.allocator.needed:
            for name in self.linears:
                self._add_reserve(name, FIRST_RESERVES)
            if self.advance_learning:
                self.bank.release(FIRST_RESERVES)
        elif self.allocator.due(step, self.total_rank):
            self._grow(step)

    def _grow(self, step: int) -> None:
        scores = self.deciding_scores(step)
        gains = self.allocator.choose(self.ranks(), scores)
        group = FIRST_RESERVES + 1 + len(self.allocations)
        for name, rank in gains.items():
            self._activate(name, rank, group)
        self.bank.release(group)
        self.allocations.append(Allocation(step, gains, scores))
        self._note_birth(group, step)
        if self.allocator.spent(self.total_rank):
            self.bank.silence_reserves()

    def deciding_scores(self, step: int) -> dict[str, float]:
        """The score of every matrix by which this growth chooses.

        Raises:
            UserError: a matrix would grow whose score is 0, because no gradient ever reached it.
        """
        scores = self.scores()
        silent = [name for name, score in scores.items() if score == 0]
        if not silent:
            return scores
        said = (
            f"{len(silent)} of {len(scores)} matrices have score 0, e.g. {silent[0]}: no gradient reached their update"
        )
        if set(silent) & set(self.allocator.choose(self.ranks(), scores)):
            raise UserError(
                f"the growth at step {step} would be decided by nothing: {said}. Reasons: activation checkpointing "
                "(use_reentrant=False), a part that the loss does not use (leave it out of `kinds`), gradients that "
                "vanish in half precision."
            )
        if not self.allocations:
            warnings.warn(f"{said}. They will not grow; if the loss does not use them, leave them out", stacklevel=2)
        return scores

    def _activate(self, name: str, rank: int, group: int) -> None:
        """A matrix gains ranks; it gets a new reserve when nothing of the old one is left."""
        if self.advance_learning:
            self.bank.activate_reserve(name, rank, group)
            if self.bank.matrices[name].reserve is None:
                self._add_reserve(name, group)
        else:
            place = self.bank.activate_inert_reserve(name, rank, group)
            if place is not None:
                self._add_reserve(name, FIRST_RESERVES, place)

    def _add_reserve(self, name: str, group: int, place: Component | None = None) -> None:
        rank_step, generator = self.allocator.rank_step, self._stream(name)
        self.bank.add_reserve(name, rank_step, group, generator, self.advance_learning, place)

    # what is known of it

    @property
    def total_rank(self) -> int:
        """Sum of the ranks of all matrices."""
        return sum(self.ranks().values())

    def ranks(self) -> dict[str, int]:
        return {name: matrix.rank for name, matrix in self.bank.matrices.items()}

    def planned_ranks(self) -> dict[int, int]:
        plan = {0: sum(matrix.components[0].rank for matrix in self.bank.matrices.values())}
        for step, gained in zip(self.allocator.growth_steps(), self.allocator.growths(), strict=True):
            plan[step] = plan[max(plan)] + gained
        return plan

    def scores(self) -> dict[str, float]:
        return self.importance.scores()

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        return super().metrics() | {"train/orthogonal_penalty": self.orthogonal_penalty().item()}

    @torch.no_grad()
    def orthogonal_penalties(self) -> dict[str, float]:
        """The unweighted penalty over all components, over the active ones alone, and over the reserves alone."""
        parts: dict[str, list[Tensor]] = {"active": [], "reserve": []}
        for name, matrix in self.bank.matrices.items():
            rows = [self.bank.rows(name, index) for index in range(len(matrix.components))]
            for part, of_part in (("active", rows[: matrix.active]), ("reserve", rows[matrix.active :])):
                for factor in zip(*of_part, strict=True):
                    R = torch.cat(factor)
                    parts[part].append(torch.norm(R @ R.t() - torch.eye(len(R), device=R.device)))
        apart = {part: torch.stack(found).mean().item() for part, found in parts.items() if found}
        return {"all": self.orthogonal_penalty().item(), **apart}

    def parameters_by_kind(self, model: nn.Module) -> dict[str, int]:
        counts = super().parameters_by_kind(model)
        update = reserve = 0
        for matrix in self.bank.matrices.values():
            widths = matrix.in_features + matrix.out_features
            update += matrix.rank * (widths + 1)
            reserve += matrix.reserve.rank * widths if matrix.reserve and self.advance_learning else 0
        # the bank also has rows for later growths and rows that no matrix took: they are not counted
        other = sum(p.numel() for p in self.bank.parameters())
        return counts | {"update": update, "reserve": reserve, "total": counts["total"] - other + update + reserve}

    # keep and restore

    def trained_state(self, model: nn.Module) -> dict[str, Tensor]:
        begun = [p for group in self.bank.all_groups if group.next_row for p in group.parameters()]
        return super().trained_state(model) | {name: p.detach() for name, p in named(model, begun)}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {
            "structure": self.bank.structure(),
            "importance": self.importance.state_dict(),
            "settings": self.settings(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._check_settings(state)
        super().load_state_dict(state)
        self.importance.load_state_dict(state["importance"])
        self.bank.load_structure(state["structure"])
        self.watchers = []
        self.youngest = None
        self.order.loaded()

    def settings(self) -> dict[str, Any]:
        """What a state depends on, with the schedule as it was resolved; plain values."""
        settings = {name: getattr(self, name) for name in SETTINGS} | asdict(self.allocator)
        settings |= {"scoring_window": self.window if math.isfinite(self.window) else "all"}
        return settings | {"total_steps": self.order.total_steps}

    def _check_settings(self, state: Mapping[str, Any]) -> None:
        """Refuse the state of a method that was made or prepared otherwise.

        Raises:
            UserError: with what differs.
        """
        saved, own = list(state["structure"]["matrices"]), list(self.bank.matrices)
        if saved != own:
            odd = sorted(set(saved) ^ set(own)) or own
            raise UserError(
                f"the checkpoint is of another model or method: it adapts {len(saved)} matrices, this one {len(own)}, "
                f"and they differ, e.g. in {odd[0]}. Prepare the method as in that run."
            )
        mine = self.settings()
        changed = other_settings(state.get("settings", mine), mine, "`")  # absent from states of earlier versions
        if changed:
            raise UserError(
                f"the loaded state was trained with other settings: {'; '.join(changed[:5])}. Make and prepare the "
                "method as in that run, or start again from the pretrained model."
            )

    @torch.no_grad()
    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        # while ranks grow a reserve learns at the output, with lambda 1e-5: leaving it out would change the logits
        return {name: self.bank.factors(name) for name in self.linears}

    def warn_of_an_early_end(self, what: str) -> None:
        """Before what was trained leaves: a warning if the run is not at its end."""
        step, total = self.order.next, self.order.total_steps
        if self.merged or step is None or step >= total:
            return
        reason = f"the run is at step {step} of {total}, its total rank {sum(self.ranks().values())}"
        if step == 0 and self.order.last == AFTER and not self.allocations:
            reason = (
                "no step was begun, so nothing has grown: make Growth(method, model, optimizer, ...) and call "
                "growth.begin_step() in every step, or give the Trainer its callback and optimizers"
            )
        warnings.warn(f"{what}: {reason}", stacklevel=3)

    def merge(self, model: nn.Module) -> None:
        self.warn_of_an_early_end("merge")
        surgery.refuse_other_model(model, self.linears, self.merged)
        for linear in self.linears.values():
            linear.check_merge()
        for name, linear in self.linears.items():
            surgery.replace(model, name, linear.merged())
        self.bank.detach(model)
        self.merged = True
        self.weights_merged = checksums({f"{name}.weight": linear.base.weight for name, linear in self.linears.items()})


def _group_size(shapes: Mapping[str, tuple[int, int]], ranks: Mapping[str, int], lambdas: int) -> GroupSize:
    """A group that gives every matrix so many components."""
    rows: Counter[int] = Counter()
    for name, widths in shapes.items():
        rows.update({width: ranks[name] * widths.count(width) for width in widths})
    return GroupSize(rows, lambdas)


def _largest_group_size(shapes: Mapping[str, tuple[int, int]], gained: int, rank_step: int) -> GroupSize:
    """A group that is large enough whichever matrices gain these ranks in a growth."""
    grown = -(-gained // rank_step)
    rows = {}
    for width in {width: None for widths in shapes.values() for width in widths}:
        uses = sorted((widths.count(width) for widths in shapes.values()), reverse=True)
        rows[width] = rank_step * sum(uses[:grown])
    return GroupSize(rows, lambdas=gained)
