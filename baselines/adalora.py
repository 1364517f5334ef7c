"""AdaLoRA (arXiv 2303.10512) on PEFT's own layers and rank allocator: it starts above the budget and prunes.

    h = W0 x + b + alpha / init_rank * P Lambda Q x                               (PEFT's B, E and A)
    loss = task loss + orth_weight * mean over all P and Q of || P^T P - I ||_F and || Q Q^T - I ||_F

The total rank b(t) falls from b_0 = init_rank * matrices to b_T = target_rank * matrices over T steps:

    b_0                                                            t <= t_i               (init_warmup)
    b_T + (b_0 - b_T) (1 - (t - t_i) / (T - t_i - t_f))^3          pruned at t % dT == 0  (interval)
    b_T                                                            t >= T - t_f           (final_steps)

t_f is the length of the last phase, not the step at which pruning ends: both the authors' code
(`final_warmup`) and PEFT (`tfinal`) end the cubic phase at T - t_f. t counts from 0 and is the number of
steps taken before the one that has just been taken, as in the authors' loop.

Where PEFT differs from what is needed here, and what is done about it:

- `AdaLoraModel.forward` adds the penalty to the reported loss: the model is called directly, the penalty is
  `extra_loss`.
- The allocator prunes all scores that equal the threshold, so ties end below the budget: `ExactAllocator`.
- The allocator's averages and its mask are in no state dict: they are in `state_dict` here.
- t_f = 0 never reaches the last mask and ends above the budget: refused.
- Pruned triplets keep their tensors, and their P and Q stay in penalty and optimizer (PEFT does not resize in
  training): they are counted as `reserve`, not as `update`.
- Between two prunings of the middle phase a pruned value may grow again; in this way the method lets it come
  back. Ranks are those of the last pruning. In the last phase the mask is applied after every step.
- The start is drawn from the global random state: forked and seeded from the method's own stream.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.adalora import AdaLoraConfig, AdaLoraModel, RankAllocator, SVDLinear
from torch import Tensor, nn

from increlora import surgery
from increlora.errors import UserError
from increlora.method import Allocation, Method
from increlora.streams import derive_seed

ADAPTER = "default"
FACTORS = ("lora_E", "lora_B", "lora_A")  # Lambda (r, 1), P (out, r), Q (r, in)


class ExactAllocator(RankAllocator):
    """PEFT's allocator, except that exactly `budget` triplets survive; of equal scores the earlier one.

    Args:
        layers: the adapted layers by module name, in model order.
    """

    def __init__(self, model: nn.Module, config: AdaLoraConfig, layers: dict[str, SVDLinear]):
        super().__init__(model, config, ADAPTER)
        self.layers = layers

    def _triplet_scores(self, name: str) -> Tensor:
        """Paper, equation 7, (init_rank,): score of the singular value plus mean scores of its two vectors."""
        value, left, right = (self._element_score(f"{name}.{factor}.{ADAPTER}") for factor in FACTORS)
        return value.view(-1) + left.mean(0) + right.mean(1)

    @torch.no_grad()
    def mask_to_budget(self, model: nn.Module, budget: int) -> dict[str, list[bool]]:
        scores = [self._triplet_scores(name) for name in self.layers]
        best = torch.cat(scores).argsort(descending=True, stable=True)[:budget]
        kept = torch.zeros(self.init_bgt, dtype=torch.bool, device=best.device)
        kept[best] = True
        masks = dict(zip(self.layers, kept.split([len(score) for score in scores]), strict=True))
        for name, mask in masks.items():
            self.layers[name].lora_E[ADAPTER][~mask] = 0.0
        return {f"{name}.lora_E.{ADAPTER}": mask.tolist() for name, mask in masks.items()}


@dataclass
class AdaLoRA(Method):
    """Adaptive budget allocation by pruning singular values.

    Args:
        target_rank: average rank at the end; the budget is target_rank * number of matrices.
        init_rank: rank of every matrix at the start; None: 1.5 * target_rank, rounded up.
        init_warmup: t_i, steps before pruning starts; None: a seventh of all steps.
        interval: dT, steps between two prunings; None: 1/200 of the pruning phase, at least 1.
        final_steps: t_f, steps of training at the final ranks; None: half of all steps.
            (Published on GLUE: t_i 9 to 18 %, t_f 44 to 58 %, 64 to 1,500 prunings.)
        beta1, beta2: decay of the averages of sensitivity and uncertainty.
        orth_weight: weight of the orthogonal penalty.
        alpha: scale of the update, divided by init_rank throughout.
        dropout: dropout on the input of the update.
    """

    name: str = "adalora"
    target_rank: int = 2
    init_rank: int | None = None
    init_warmup: int | None = None
    interval: int | None = None
    final_steps: int | None = None
    beta1: float = 0.85
    beta2: float = 0.85
    orth_weight: float = 0.1
    alpha: float = 32.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                raise UserError(f"`{name}` must be in (0, 1), it is {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"`dropout` must be in [0, 1), it is {self.dropout}")
        if self.orth_weight < 0:
            raise UserError(f"`orth_weight` must not be negative, it is {self.orth_weight}")

    # set up

    def prepare(self, model: nn.Module, total_steps: int) -> None:
        names = list(self.adapted_matrices(model))
        config = self.peft_config(names, total_steps)
        with torch.random.fork_rng(devices=[]):
            # not torch.manual_seed, which would seed the GPUs too
            torch.default_generator.manual_seed(derive_seed(self.seed, "adalora"))
            self.tuner = AdaLoraModel(model, {ADAPTER: config}, ADAPTER)
        del model.peft_config  # PEFT's own record; a second injection would be refused because of it
        self.layers: dict[str, SVDLinear] = {name: model.get_submodule(name) for name in names}
        self.tuner.rankallocator = ExactAllocator(model, config, self.layers)
        self.freeze_all_but_head(model)
        for layer in self.layers.values():
            for factor in FACTORS:
                getattr(layer, factor).requires_grad_(True)

    def peft_config(self, names: list[str], total_steps: int) -> AdaLoraConfig:
        """PEFT's description of the method for these matrices and this many steps.

        Raises:
            UserError: the schedule leaves no step to prune in, or the ranks do not fall.
        """
        init_rank = math.ceil(1.5 * self.target_rank) if self.init_rank is None else self.init_rank
        init_warmup, interval, final_steps = self.schedule(total_steps)
        if not init_rank > self.target_rank >= 1:
            raise UserError(
                f"AdaLoRA starts above its budget: `init_rank` {init_rank} must be above `target_rank` "
                f"{self.target_rank}, which must be at least 1"
            )
        return AdaLoraConfig(
            init_r=init_rank, target_r=self.target_rank, lora_alpha=self.alpha, lora_dropout=self.dropout,
            target_modules=names, tinit=init_warmup, tfinal=final_steps, deltaT=interval, total_step=total_steps,
            beta1=self.beta1, beta2=self.beta2, orth_reg_weight=self.orth_weight,
        )  # fmt: skip

    def schedule(self, total_steps: int) -> tuple[int, int, int]:
        """t_i, dT and t_f.

        Raises:
            UserError: they are impossible in `total_steps`.
        """
        init_warmup = total_steps // 7 if self.init_warmup is None else self.init_warmup
        final_steps = max(1, total_steps // 2) if self.final_steps is None else self.final_steps
        pruning = total_steps - init_warmup - final_steps
        interval = max(1, pruning // 200) if self.interval is None else self.interval
        if init_warmup < 0 or final_steps < 1 or interval < 1 or pruning < 1:
            raise UserError(
                f"AdaLoRA's schedule does not fit: init_warmup {init_warmup} + final_steps {final_steps} must be below "
                f"the {total_steps} training steps, interval {interval} and final_steps at least 1. Change them, or "
                "leave `init_warmup`, `interval` and `final_steps` null: they are derived then"
            )
        return init_warmup, interval, final_steps

    # one step

    def extra_loss(self) -> Tensor | float:
        return self.orth_weight * self.orthogonal_penalty() if self.orth_weight else 0.0

    def orthogonal_penalty(self) -> Tensor:
        """The unweighted penalty over all P and Q, a scalar (paper, equation 4, norms not squared as in both codes)."""
        rows = [layer.lora_A[ADAPTER] for layer in self.layers.values()]
        rows += [layer.lora_B[ADAPTER].t() for layer in self.layers.values()]
        by_width: dict[int, list[Tensor]] = {}
        for row in rows:
            by_width.setdefault(row.shape[1], []).append(row)
        # autocast would take the products in half precision, where I - I is noise
        with torch.autocast(rows[0].device.type, enabled=False):
            eye = torch.eye(len(rows[0]), dtype=rows[0].dtype, device=rows[0].device)
            stacks = [torch.stack(group) for group in by_width.values()]
            return torch.cat([torch.linalg.vector_norm(R @ R.mT - eye, dim=(1, 2)) for R in stacks]).mean()

    def after_step(self, step: int) -> None:
        before = self.ranks()
        self.tuner.update_and_allocate(step)
        added = {name: rank - before[name] for name, rank in self.ranks().items() if rank != before[name]}
        if added:
            self.allocations.append(Allocation(step, added, {}))

    # what is known of it

    @property
    def config(self) -> AdaLoraConfig:
        """PEFT's configuration; it also holds the mask of the last pruning, `rank_pattern`."""
        return self.tuner.peft_config[ADAPTER]

    def ranks(self) -> dict[str, int]:
        pattern = self.config.rank_pattern
        if pattern is None:
            return dict.fromkeys(self.layers, self.config.init_r)
        return {name: sum(pattern[f"{name}.lora_E.{ADAPTER}"]) for name in self.layers}

    def planned_ranks(self) -> dict[int, int]:
        allocator = self.tuner.rankallocator
        plan = {0: allocator.init_bgt}
        for step in range(self.config.tinit + 1, self.config.total_step - self.config.tfinal + 1):
            total, pruned = allocator.budget_schedule(step)
            if (pruned or step == self.config.total_step - self.config.tfinal) and total != plan[max(plan)]:
                plan[step] = total
        return plan

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        return super().metrics() | {"train/orthogonal_penalty": self.orthogonal_penalty().item()}

    def parameters_by_kind(self, model: nn.Module) -> dict[str, int]:
        counts = super().parameters_by_kind(model)
        pruned = {name: self.config.init_r - rank for name, rank in self.ranks().items()}
        reserve = sum(n * (self.layers[m].in_features + self.layers[m].out_features + 1) for m, n in pruned.items())
        return counts | {"update": counts["update"] - reserve, "reserve": reserve}

    # keep and restore

    def state_dict(self) -> dict[str, Any]:
        allocator = self.tuner.rankallocator
        return super().state_dict() | {
            "kept": self.config.rank_pattern,
            "sensitivity": dict(allocator.exp_avg_ipt),
            "uncertainty": dict(allocator.exp_avg_unc),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        allocator, model = self.tuner.rankallocator, self.tuner.model
        self.config.rank_pattern = state["kept"]
        for averages, saved in (
            (allocator.exp_avg_ipt, state["sensitivity"]),
            (allocator.exp_avg_unc, state["uncertainty"]),
            (allocator.ipt, state["sensitivity"]),  # overwritten before it is read; PEFT only asks whether it is there
        ):
            averages |= {name: value.to(model.get_parameter(name).device) for name, value in saved.items()}

    @torch.no_grad()
    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {name: _factors(layer) for name, layer in self.layers.items() if layer.lora_E[ADAPTER].any()}

    def merge(self, model: nn.Module) -> None:
        for name, layer in self.layers.items():
            layer.merge()
            surgery.replace(model, name, layer.get_base_layer())


def _factors(layer: SVDLinear) -> tuple[Tensor, Tensor]:
    """Q with Lambda and the scale folded in, and P, of the triplets that are not zero.

    Between two prunings of the middle phase these may be more than the last pruning kept.
    """
    values, left, right = (getattr(layer, factor)[ADAPTER] for factor in FACTORS)
    alive = values.view(-1) != 0
    scale = layer.scaling[ADAPTER] / (layer.ranknum[ADAPTER] + 1e-5)  # as PEFT's forward divides
    return scale * values[alive] * right[alive], left[:, alive].detach()
