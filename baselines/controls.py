"""Controls for claims about allocation: IncreLoRA whose matrices are drawn, permuted, or given their ranks beforehand.

One more control, `uniform`, is IncreLoRA with init_rank = target_rank and needs no code.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from increlora import result_files
from increlora.algorithm import IncreLoRA
from increlora.errors import UserError, first_line
from increlora.streams import stream


@dataclass
class RandomGrowth(IncreLoRA):
    """IncreLoRA's schedule, but the matrices that grow are drawn at random; no importance is computed.

    Args:
        keyed_by: a word that the draws depend on beside the seed, e.g. the task; without it all tasks draw the same.
    """

    name: str = "random_growth"
    keyed_by: str = ""

    def scores_at(self, step: int) -> bool:
        """Nothing is scored, so no gradient is watched."""
        return False

    def deciding_scores(self, step: int) -> dict[str, float]:
        # keyed by the step, so that a resumed run draws the same
        drawn = torch.rand(len(self.linears), generator=stream(self.seed, "random_growth", self.keyed_by, step))
        return dict(zip(self.linears, drawn.tolist(), strict=True))

    def scores(self) -> dict[str, float]:
        return {}


@dataclass
class PermutedGrowth(RandomGrowth):
    """The growths of a finished IncreLoRA run at their steps, but on other matrices of the same shape.

    One permutation, drawn within every shape, serves the whole run. So the ranks end as
    concentrated as IncreLoRA's and have as many parameters; only their places differ.

    Args:
        pattern: the result file of that run, or its directory. Its growths must fit this run's schedule.
    """

    name: str = "permuted_growth"
    pattern: str | None = None

    def adapted_matrices(self, model: nn.Module) -> dict[str, nn.Linear]:
        matrices = super().adapted_matrices(model)
        growths = read_growths(self.pattern)
        check_names(self.pattern, {name for added in growths.values() for name in added}, matrices, all_of_them=False)
        place = self.places(matrices)
        self.growths = {step: {place[name]: by for name, by in added.items()} for step, added in growths.items()}
        return matrices

    def prepare(self, model: nn.Module, total_steps: int) -> None:
        super().prepare(model, total_steps)
        steps = [0, *self.growths]
        ranks = itertools.accumulate([self.total_rank, *(sum(added.values()) for added in self.growths.values())])
        reached, planned = dict(zip(steps, ranks, strict=True)), self.planned_ranks()
        if reached != planned:
            raise UserError(
                f"`pattern` {self.pattern} has the total rank {reached} (step: rank), this run plans {planned}. "
                "Use the result of a finished run with the same budget and schedule of growth."
            )

    def inputs(self) -> dict[str, str]:
        return {"pattern": digest(read_growths(self.pattern))}

    def places(self, matrices: dict[str, nn.Linear]) -> dict[str, str]:
        """Matrix -> the matrix of the same shape that grows in its place, a permutation."""
        by_shape: dict[torch.Size, list[str]] = {}
        for name, matrix in matrices.items():
            by_shape.setdefault(matrix.weight.shape, []).append(name)
        places: dict[str, str] = {}
        for shape, names in by_shape.items():
            drawn = stream(self.seed, "permuted_growth", self.keyed_by, *shape)
            order = torch.randperm(len(names), generator=drawn).tolist()
            places |= {name: names[i] for name, i in zip(names, order, strict=True)}
        return places

    def deciding_scores(self, step: int) -> dict[str, float]:
        return {name: float(self.growths[step].get(name, 0)) for name in self.linears}


@dataclass
class StaticPattern(IncreLoRA):
    """IncreLoRA's parameterisation with the final ranks of a finished run from the start; nothing grows.

    Args:
        pattern: the result file of that run, or its directory. Its ranks must sum to this run's budget.
            A matrix of rank 0 (AdaLoRA) is not adapted.
    """

    name: str = "static_pattern"
    pattern: str | None = None

    def adapted_matrices(self, model: nn.Module) -> dict[str, nn.Linear]:
        matrices = super().adapted_matrices(model)
        self.pattern_ranks = self.deal(self._checked(read_ranks(self.pattern), list(matrices)))
        return {name: matrix for name, matrix in matrices.items() if self.pattern_ranks[name]}

    def inputs(self) -> dict[str, str]:
        return {"pattern": digest(sorted(read_ranks(self.pattern).items()))}

    def deal(self, ranks: dict[str, int]) -> dict[str, int]:
        """The rank of every matrix, in model order, from those of the finished run."""
        return ranks

    def start_ranks(self, matrices: list[str]) -> dict[str, int]:
        return {name: self.pattern_ranks[name] for name in matrices}

    def ranks(self) -> dict[str, int]:
        return dict.fromkeys(self.pattern_ranks, 0) | super().ranks()

    def _checked(self, ranks: dict[str, int], matrices: list[str]) -> dict[str, int]:
        check_names(self.pattern, ranks, matrices)
        if sum(ranks.values()) != self.target_rank * len(matrices):
            raise UserError(
                f"`pattern` {self.pattern} has a total rank of {sum(ranks.values())}, the budget is "
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


# the finished run


def check_names(
    pattern: str | None, named: Collection[str], matrices: Collection[str], all_of_them: bool = True
) -> None:
    """Refuse a finished run of another model.

    Args:
        named: the matrices that the run names; with `all_of_them` it must name every one of `matrices`.
    """
    odd = sorted(set(named) ^ set(matrices) if all_of_them else set(named) - set(matrices))
    if odd:
        raise UserError(
            f"`pattern` {pattern} has ranks of {len(named)} matrices, this model has {len(matrices)}; "
            f"they differ in {len(odd)}, e.g. {odd[0]}. Use the result of a run with this backbone."
        )


def digest(content: Any) -> str:
    """sha256 (hex) of content that JSON can hold."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def read_ranks(pattern: str | None) -> dict[str, int]:
    """The final ranks in a result file (or in the directory that holds it), by matrix.

    Raises:
        UserError: there is no such file, or it is not the result of a finished run with ranks.
    """
    return read(pattern, "ranks", lambda ranks: ranks.get("last"))


def read_growths(pattern: str | None) -> dict[int, dict[str, int]]:
    """Step -> matrix -> ranks gained, in a result file or in the directory that holds it.

    Raises:
        UserError: there is no such file, or it is not the result of a finished run that grew.
    """
    return read(pattern, "allocations", lambda growths: {growth["step"]: growth["added"] for growth in growths})


def read(pattern: str | None, part: str, wanted: Callable[[Any], Any]) -> Any:
    """What is wanted of one part of a finished run's result; a file with `status` and that part will do."""
    if pattern is None:
        raise UserError("`pattern` is missing: give the result file of a finished run, or its directory")
    path = Path(pattern).expanduser()
    path = path / result_files.FILE_NAME if path.is_dir() else path
    try:
        result = result_files.read(path, ("status", part))
        status, found = result["status"], wanted(result[part])
    except (UserError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"`pattern`: cannot read ranks from {path}: {first_line(error)}") from None
    if status != "finished" or not found:
        raise UserError(f"`pattern`: {path} is not a finished run with ranks (status {status})")
    return found
