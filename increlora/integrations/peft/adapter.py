"""What an adapter is beside its layers: the method, the step at which it stands, and both as tensors."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from increlora.algorithm import START, IncreLoRA
from increlora.components import STATE
from increlora.integrations.packed import pack, unpack
from increlora.integrations.peft.config import IncreLoraConfig, Refused, in_words_of_peft

FACTORS = ("increlora_A", "increlora_B", "increlora_E")  # of a matrix: (r, in), (out, r), and the lambdas
SPREAD = 0.5  # of the rows of an update that is not zero from the start


@dataclass
class Grown(IncreLoRA):
    """IncreLoRA whose matrices have these ranks from the start, and grow no further."""

    given: dict = field(default_factory=dict)

    def start_ranks(self, matrices: list[str]) -> dict[str, int]:
        return {name: self.given[name] for name in matrices}


class Adapter:
    """One adapter of a model.

    Args:
        config: of the adapter; nothing is written into it, so it may serve several models.
        layers: the adapted layers (`layer.Linear`) by name, in model order, or stand-ins with their shapes.
        weights: of these layers, or stand-ins on the meta device.
    """

    def __init__(self, name: str, config: IncreLoraConfig, layers: Mapping[str, Any], weights: list[Tensor]):
        self.name, self.config, self.layers = name, config, layers
        self.step = self.skipped = 0  # optimizer steps taken; steps whose gradients were not finite
        self.warned = False  # that it trains and does not grow
        self.restored = False  # its structure, so that its weights may come
        self.in_checkpoints = False  # what is saved is to be resumed from, also after the last step
        seed = int(torch.randint(2**31, ())) if config.seed is None else config.seed
        self.shapes = {key: (layer.out_features, layer.in_features) for key, layer in layers.items()}
        self._make(IncreLoRA(**config.settings(), seed=seed), weights)
        if not config.init_weights:
            self._draw_an_update()
        if config.total_step is not None:
            self._schedule(config.total_step)  # what cannot be done is refused here, not when training begins

    def _make(self, method: IncreLoRA, weights: list[Tensor]) -> None:
        method.start(self.shapes, weights, open=True)
        self.method, self.bank = method, method.bank
        self.planned = False
        method.linears = self.updates = {
            key: layer.update_layer(self.name, self.bank, key, self.config.lora_dropout)
            for key, layer in self.layers.items()
        }

    @torch.no_grad()
    def _draw_an_update(self) -> None:
        for parameter in self.bank.all_groups[START].parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, SPREAD)
            else:
                parameter.normal_(0, 1 / self.config.lora_alpha)

    def plan(self, total_steps: int) -> None:
        """Make the tensors of all growths: training begins, and the steps of the run are known.

        Raises:
            UserError: growth does not fit into these steps.
        """
        self._schedule(total_steps)
        self.method.plan(total_steps)
        self.planned = True

    def _schedule(self, total_steps: int) -> None:
        if not isinstance(self.method, Grown):  # which has no growth to plan
            self.method.interval, self.method.init_warmup = self.config.interval_and_warmup(total_steps)
        with in_words_of_peft():
            self.method.schedule(len(self.shapes), total_steps)

    @property
    def grows(self) -> bool:
        """Whether its growth is planned, so that its tensors mean nothing without its state."""
        return self.planned and not isinstance(self.method, Grown)

    @property
    def finished(self) -> bool:
        """Whether its ranks are final: growth is over and training too, or it was loaded so."""
        return isinstance(self.method, Grown) or (self.planned and self.step >= self.method.order.total_steps)

    def ranks(self) -> dict[str, int]:
        """The rank of every matrix."""
        return self.method.ranks()

    # as tensors

    def tensors(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The factors of every matrix by `<matrix>.increlora_A` and so on, and the state while the adapter grows.

        A finished adapter has the components that reach the output; one that grows, or whose checkpoints a Trainer
        writes, has its reserves too.

        Args:
            rows: the bank's tensors by the names that they have in it.
        """
        found: dict[str, Tensor] = {}
        final = isinstance(self.method, Grown) or (self.finished and not self.in_checkpoints)
        for name, matrix in self.bank.matrices.items():
            kept = matrix.components[: matrix.active] if final else matrix.components
            A = [rows[f"groups.{c.group}.rows.{matrix.in_features}"][c.A_row :][: c.rank] for c in kept]
            B = [rows[f"groups.{c.group}.rows.{matrix.out_features}"][c.B_row :][: c.rank] for c in kept]
            active = matrix.components[: matrix.active]
            E = [rows[f"groups.{c.lambda_group}.lambda_"][c.lambda_row :][: c.rank] for c in active]
            for factor, value in zip(FACTORS, (torch.cat(A), torch.cat(B).t(), torch.cat(E)), strict=True):
                found[f"{name}.{factor}"] = value.detach().contiguous()
        if not final and self.planned:
            found[STATE] = self.state()
        return found

    def state(self) -> Tensor:
        """Structure, averages and step as a vector of bytes; of final ranks that were loaded, these alone."""
        if isinstance(self.method, Grown):
            return pack({"ranks": self.ranks()})
        return pack(
            {
                "step": self.step,
                "skipped": self.skipped,
                "total_steps": self.method.order.total_steps,
                "seed": self.method.seed,
                "method": self.method.state_dict(),
            }
        )

    def restore(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rebuild the structure that `tensors` has, whatever it was before.

        Args:
            tensors: what `tensors` gave.

        Returns:
            The bank's tensors by the names that they have in it.

        Raises:
            UserError: the tensors are of other matrices, or were trained with other settings.
        """
        self._check_names(tensors)
        if STATE in tensors:
            self.restore_structure(unpack(tensors[STATE]))
        else:
            self._restore_finished({name: len(tensors[f"{name}.{FACTORS[2]}"]) for name in self.shapes})
        return self._rows(tensors)

    def _check_names(self, tensors: Mapping[str, Tensor]) -> None:
        expected = {f"{name}.{factor}" for name in self.shapes for factor in FACTORS}
        odd = sorted(expected ^ (set(tensors) - {STATE}))
        for name, (height, width) in self.shapes.items():
            A, B = (tensors.get(f"{name}.{factor}") for factor in FACTORS[:2])
            if A is not None and B is not None and (A.shape[1], B.shape[0]) != (width, height):
                odd.append(f"{name} of shape {(B.shape[0], A.shape[1])}, here {(height, width)}")
        if odd:
            raise Refused(
                f"the adapter that is loaded has other matrices than `{self.name}` of this model, e.g. {odd[0]}: give "
                "both the same base model and `target_modules`"
            )

    def _restore_finished(self, ranks: dict[str, int]) -> None:
        if self.step == 0 and self.ranks() == ranks:  # only values are new
            return
        trains = self.bank.like.requires_grad
        settings = {**self.config.settings(), "init_rank": 1, "target_rank": 1}
        self._make(Grown(**settings, seed=self.method.seed, given=ranks), [self.bank.like])
        self.bank.requires_grad_(trains)
        self.step = self.skipped = 0

    def restore_structure(self, state: dict[str, Any]) -> None:
        """Take from what `state` packed; the weights come apart from it.

        Raises:
            UserError: it is of other matrices or settings.
        """
        final = state.get("ranks")
        theirs = state["method"]["structure"]["matrices"] if final is None else final
        if list(theirs) != list(self.shapes):
            odd = sorted(set(theirs) ^ set(self.shapes)) or ["their order"]
            raise Refused(
                f"the state that is loaded has other matrices than `{self.name}` of this model, e.g. {odd[0]}: give "
                "both the same base model and `target_modules`"
            )
        if final is not None:
            if not (isinstance(self.method, Grown) and self.ranks() == final):
                self._restore_finished(final)
            return
        if isinstance(self.method, Grown) or not self.planned or self.method.order.total_steps != state["total_steps"]:
            trains = self.bank.like.requires_grad
            self._make(IncreLoRA(**self.config.settings()), [self.bank.like])
            self.plan(state["total_steps"])
            self.bank.requires_grad_(trains)
        self.method.seed = state["seed"]
        self.method.load_state_dict(state["method"])
        self.step, self.skipped = state["step"], state["skipped"]

    def _rows(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        like = next(iter(tensors.values()))
        rows = {
            name: torch.zeros(p.shape, dtype=like.dtype, device=like.device) for name, p in self.bank.named_parameters()
        }
        for name, matrix in self.bank.matrices.items():
            A, B, E = (tensors[f"{name}.{factor}"] for factor in FACTORS)
            at = 0
            for number, c in enumerate(matrix.components):
                rows[f"groups.{c.group}.rows.{matrix.in_features}"][c.A_row :][: c.rank] = A[at:][: c.rank]
                rows[f"groups.{c.group}.rows.{matrix.out_features}"][c.B_row :][: c.rank] = B.t()[at:][: c.rank]
                if number < matrix.active:
                    rows[f"groups.{c.lambda_group}.lambda_"][c.lambda_row :][: c.rank] = E[at:][: c.rank]
                at += c.rank
        return rows


def modules_with_three_dimensions(model: nn.Module) -> list[str]:
    """Parameters that hold the matrices of several experts in one tensor, which no adapter of layers reaches."""
    return [name for name, parameter in model.named_parameters() if parameter.ndim == 3]
