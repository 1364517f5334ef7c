"""Controls for claims about allocation: IncreLoRA with matrices drawn at random, or with ranks fixed beforehand.

The fourth control, `uniform`, is IncreLoRA with init_rank = target_rank and needs no code.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from increlora.algorithm import IncreLoRA
from increlora.errors import UserError
from increlora.streams import stream

RESULT_FILE = "result.json"


@dataclass
class RandomGrowth(IncreLoRA):
    """IncreLoRA's schedule, but the matrices that grow are drawn at random; no importance is computed."""

    name: str = "random_growth"

    def begin_step(self, step: int, micro_batches: int = 1, loss_scale: float = 1.0) -> None:
        """Nothing is scored, so no gradient is watched."""

    def deciding_scores(self, step: int) -> dict[str, float]:
        # keyed by the step, so that a resumed run draws the same
        drawn = torch.rand(len(self.linears), generator=stream(self.seed, "random_growth", step))
        return dict(zip(self.linears, drawn.tolist(), strict=True))

    def scores(self) -> dict[str, float]:
        return {}


@dataclass
class StaticPattern(IncreLoRA):
    """IncreLoRA's parameterisation with the final ranks of a finished run from the start; nothing grows.

    Args:
        pattern: the result file of that run, or its directory. Its ranks must sum to this run's budget.
            A matrix of rank 0 (AdaLoRA) is left as it is.
    """

    name: str = "static_pattern"
    pattern: str | None = None

    def adapted_matrices(self, model: nn.Module) -> dict[str, nn.Linear]:
        matrices = super().adapted_matrices(model)
        self.pattern_ranks = self.deal(self._checked(read_ranks(self.pattern), list(matrices)))
        return {name: matrix for name, matrix in matrices.items() if self.pattern_ranks[name]}

    def inputs(self) -> dict[str, str]:
        ranks = json.dumps(sorted(read_ranks(self.pattern).items()))
        return {"pattern": hashlib.sha256(ranks.encode()).hexdigest()}

    def deal(self, ranks: dict[str, int]) -> dict[str, int]:
        """The rank of every matrix, in model order, from those of the finished run."""
        return ranks

    def start_ranks(self, matrices: list[str]) -> dict[str, int]:
        return {name: self.pattern_ranks[name] for name in matrices}

    def ranks(self) -> dict[str, int]:
        return dict.fromkeys(self.pattern_ranks, 0) | super().ranks()

    def _checked(self, ranks: dict[str, int], matrices: list[str]) -> dict[str, int]:
        if set(ranks) != set(matrices):
            odd = sorted(set(ranks) ^ set(matrices))
            raise UserError(
                f"method.pattern={self.pattern} has ranks of {len(ranks)} matrices, this model has {len(matrices)}; "
                f"they differ in {len(odd)}, e.g. {odd[0]}. Use the result of a run with this backbone."
            )
        if sum(ranks.values()) != self.target_rank * len(matrices):
            raise UserError(
                f"method.pattern={self.pattern} has a total rank of {sum(ranks.values())}, the budget is "
                f"{self.target_rank * len(matrices)} ({self.target_rank} x {len(matrices)} matrices). Use the result "
                "of a finished run with this budget."
            )
        return {name: ranks[name] for name in matrices}


@dataclass
class ShuffledPattern(StaticPattern):
    """The same ranks, dealt to matrices at random; matrices differ in size, so the parameter count may differ."""

    name: str = "shuffled_pattern"

    def deal(self, ranks: dict[str, int]) -> dict[str, int]:
        order = torch.randperm(len(ranks), generator=stream(self.seed, "shuffled_pattern")).tolist()
        values = list(ranks.values())
        return {name: values[i] for name, i in zip(ranks, order, strict=True)}


def read_ranks(pattern: str | None) -> dict[str, int]:
    """The final ranks in a result file (or in the directory that holds it), by matrix.

    Raises:
        UserError: there is no such file, or it is not the result of a finished run with ranks.
    """
    if pattern is None:
        raise UserError("method.pattern is missing: method.pattern=PATH of a finished run's result file or directory")
    path = Path(pattern).expanduser()
    path = path / RESULT_FILE if path.is_dir() else path
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        status, ranks = result["status"], result["ranks"].get("last")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"method.pattern: cannot read ranks from {path}: {error or type(error).__name__}") from None
    if status != "finished" or not ranks:
        raise UserError(f"method.pattern: {path} is no finished run with ranks (status {status})")
    return ranks
