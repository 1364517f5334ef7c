"""What an adapter is beside its layers: the method, the step at which it stands, and both as tensors."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

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
        self.method.order.next = self.step  # final ranks that were loaded may be in the middle of a run
        self.planned = True

    def _schedule(self, total_steps: int) -> None:
        if not self.final:  # else there is no growth to plan
            self.method.interval, self.method.init_warmup = self.config.interval_and_warmup(total_steps)
        with in_words_of_peft():
            self.method.schedule(len(self.shapes), total_steps)

    @property
    def grows(self) -> bool:
        """Whether its growth is planned, so that its tensors mean nothing without its state."""
        return self.planned and not self.final

    @property
    def finished(self) -> bool:
        """Whether its ranks are final: growth is over and training too, or it was loaded so."""
        return self.final or self.over

    @property
    def final(self) -> bool:
        """Whether it was loaded with final ranks."""
        return isinstance(self.method, Grown)

    @property
    def over(self) -> bool:
        """Whether the run that it was planned for is at its end."""
        return self.planned and self.step >= self.method.order.total_steps

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
        final = self.final or (self.over and not self.in_checkpoints)
        for name, matrix in self.bank.matrices.items():
            kept = matrix.components[: matrix.active] if final else matrix.components
            A = [rows[f"groups.{c.group}.rows.{matrix.in_features}"][c.A_row :][: c.rank] for c in kept]
            B = [rows[f"groups.{c.group}.rows.{matrix.out_features}"][c.B_row :][: c.rank] for c in kept]
            active = matrix.components[: matrix.active]
            E = [rows[f"groups.{c.lambda_group}.lambda_"][c.lambda_row :][: c.rank] for c in active]
            for factor, value in zip(FACTORS, (torch.cat(A), torch.cat(B).t(), torch.cat(E)), strict=True):
                found[f"{name}.{factor}"] = value.detach().contiguous()
        if self.planned and (not final or self.in_checkpoints):
            found[STATE] = self.state()
        return found

    def state(self) -> Tensor:
        """Structure, averages and step as a vector of bytes; of final ranks that were loaded, these and the step."""
        if self.final:
            return pack({"ranks": self.ranks(), "step": self.step, "skipped": self.skipped})
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
        if self.step or self.ranks() != ranks:  # else only values are new
            self._make_final(ranks)

    def _make_final(self, ranks: dict[str, int]) -> None:
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
        theirs = matrices_of(state)
        if theirs != list(self.shapes):
            odd = sorted(set(theirs) ^ set(self.shapes)) or ["their order"]
            raise Refused(
                f"the state that is loaded has other matrices than `{self.name}` of this model, e.g. {odd[0]}: give "
                "both the same base model and `target_modules`"
            )
        if "ranks" in state:
            if not (self.final and self.ranks() == state["ranks"]):
                self._make_final(state["ranks"])
            self.step, self.skipped = state.get("step", 0), state.get("skipped", 0)  # absent from earlier versions
            if self.planned:
                self.method.order.next = self.step
            return
        if self.final or not self.planned or self.method.order.total_steps != state["total_steps"]:
            trains = self.bank.like.requires_grad
            self._make(IncreLoRA(**self.config.settings()), [self.bank.like])
            self.plan(state["total_steps"])
            self.bank.requires_grad_(trains)
        self.method.seed = state["seed"]
        with in_words_of_peft():
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


def matrices_of(state: Mapping[str, Any]) -> list[str]:
    """The names of the matrices of a state, in model order."""
    return list(state["ranks"] if "ranks" in state else state["method"]["structure"]["matrices"])


def fused_experts(model: nn.Module) -> list[str]:
    """Parameters that hold the matrices of several experts in one tensor, which no adapter of layers reaches."""
    convolutions = (nn.Conv1d, nn.ConvTranspose1d, parametrize.ParametrizationList)  # of a convolution, most likely
    return [
        f"{name}.{key}".lstrip(".")
        for name, module in model.named_modules()
        if not isinstance(module, convolutions)
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and 1 not in parameter.shape  # position embeddings are (1, n, d)
    ]
