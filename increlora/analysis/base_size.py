"""The tables of study B (results/studies/study_b.md): scores at base size, ranks against the published allocation."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from increlora import matrices
from increlora.analysis import comparison, selection
from increlora.analysis.looks import LOOKS, TASKS
from increlora.analysis.selection import Run, Runs
from increlora.analysis.study_tables import Arms, joint_scores, learning_rates
from increlora.analysis.tables import Table, with_interval

EXPERIMENT = "study_b"
SEEDS = (41, 42, 43, 44, 45)
TUNING_SEED = 40
DECIDING = ("cola", "stsb")  # tasks that decide whether IncreLoRA is better than another method
LEVEL = 1 - 0.05 / 4  # four arms
MAP_TASK = "rte"  # the published allocation is of this task

Published = Mapping[str, Mapping[str, float]]  # axis -> kind or layer -> ranks added


def complete(runs: Sequence[Run]) -> dict[str, Runs]:
    """Task -> method -> seed -> run, of the arms that have every seed of the study.

    Raises:
        UserError: two runs of one arm and seed, arms of a seed that did not run alike, or an arm with several settings
            or another learning rate than chosen.
    """
    found: dict[str, Runs] = {}
    for task in TASKS:
        of_task = [run for run in runs if run["run"]["task"] == task]
        selection.ran_alike(of_task)
        arms = selection.by_method(run for run in of_task if run["run"]["seed"] in SEEDS)
        for method, seeds in arms.items():
            trials = [r for r in of_task if r["run"]["method"] == method and r["run"]["seed"] == TUNING_SEED]
            selection.one_arm([*seeds.values()], trials, f"{method} on {task}")
        if whole := {method: seeds for method, seeds in arms.items() if set(seeds) == set(SEEDS)}:
            found[task] = whole
    return found


def scores(tasks: Mapping[str, Runs]) -> Table:
    """Every arm of every task: the primary number, the usual three, and the chosen rate."""
    arms: Arms = {(TASKS[task], LOOKS[name].label): runs for task, of in tasks.items() for name, runs in of.items()}
    return joint_scores("Study B, MPNet-base at r2", arms)


def differences(tasks: Mapping[str, Runs]) -> Table:
    """IncreLoRA minus every arm in the primary number, and the verdict of the protocol."""
    rows = []
    for task, arms in tasks.items():
        for method in arms:
            if method != "increlora" and "increlora" in arms:
                values, interval = _difference(arms, method)
                decided = verdict(tasks, method) if task in DECIDING else "described"
                cells = [with_interval(np.mean(values), interval.low, interval.high), str(len(values))]
                rows.append([TASKS[task], LOOKS[method].label, *cells, decided])
    caption = (
        f"Study B: paired differences in points on {selection.JOINT}, positive where IncreLoRA is better, with "
        f"{LEVEL:.2%} t intervals (four arms). A verdict needs the same side of 0 on CoLA and on STS-B."
    )
    return Table(caption, ["task", "IncreLoRA minus", "difference [interval]", "seeds", "verdict"], rows)


def verdict(tasks: Mapping[str, Runs], method: str) -> str:
    """Whether IncreLoRA is better than an arm: supported, contradicted or undecided, by the protocol."""
    if any(method not in tasks.get(task, {}) or "increlora" not in tasks[task] for task in DECIDING):
        return "undecided"
    intervals = [_difference(tasks[task], method)[1] for task in DECIDING]
    if all(interval.low > 0 for interval in intervals):
        return "supported"
    return "contradicted" if all(interval.high < 0 for interval in intervals) else "undecided"


def _difference(arms: Runs, method: str) -> tuple[list[float], comparison.Interval]:
    given = {name: selection.primary(arms[name]) for name in ("increlora", method)}
    values = list(comparison.paired_differences(given, "increlora", method).values())
    return values, comparison.interval(values, method="t", level=LEVEL)


def correlations(runs: Mapping[int, Run], published: Published) -> dict[str, NDArray]:
    """Axis (kind, layer) -> Spearman's correlation of the ranks added with the published ones, for every seed."""
    found: dict[str, list[float]] = {"kind": [], "layer": []}
    for run in runs.values():
        added = {name: rank - run["ranks"]["start"][name] for name, rank in run["ranks"]["last"].items()}
        layers, kinds, cells = matrices.rank_map(added, run["config"]["method"]["kinds"])
        names = {"kind": kinds, "layer": [str(layer) for layer in layers]}
        for axis, total in (("kind", np.sum(cells, 0)), ("layer", np.sum(cells, 1))):
            known = [published[axis][name] for name in names[axis]]
            found[axis].append(float(stats.spearmanr(total, known).statistic))
    return {axis: np.array(values) for axis, values in found.items()}


def allocation(tasks: Mapping[str, Runs], published: Published) -> Table:
    """How well the ranks added follow the published allocation, by method and task; decided on the published task."""
    rows = []
    for task, arms in tasks.items():
        for method in ("increlora", "adalora", "random_growth"):
            for axis, values in correlations(arms.get(method, {}), published).items():
                if len(values):
                    interval = comparison.interval(values, method="t")
                    decides = task == MAP_TASK and method == "increlora"
                    rows.append([
                        TASKS[task], LOOKS[method].label, f"{axis}s", f"{np.mean(values):+.2f}",
                        f"[{interval.low:+.2f}, {interval.high:+.2f}]", str(len(values)),
                        map_verdict(arms[method], published, axis) if decides else "described",
                    ])  # fmt: skip
    caption = (
        "Study B: Spearman's correlation of the ranks added with the published ones (DeBERTaV3-base on RTE), over the "
        "6 kinds of matrices or the 12 layers; mean over seeds with its 95 % t interval. AdaLoRA's ranks added are "
        "those that it has more than at its start, so fewer where it pruned."
    )
    return Table(caption, ["task", "method", "over", "correlation", "95 % interval", "seeds", "verdict"], rows)


def map_verdict(runs: Mapping[int, Run], published: Published, axis: str) -> str:
    """Whether the ranks added follow the published ones over an axis (kind, layer), by the protocol."""
    interval = comparison.interval(correlations(runs, published)[axis], method="t")
    if interval.low > 0:
        return "supported"
    return "contradicted" if interval.high < 0 else "undecided"


def published_allocation(path: Path) -> Published:
    """The ranks added that were published, from results/paper/allocation.csv."""
    found: dict[str, dict[str, float]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["axis"], {})[row["name"]] = float(row["ranks_added"])
    return found


def built(runs: Sequence[Run], published: Published) -> dict[str, Table]:
    """Name -> table, of the study's runs."""
    tasks = complete(runs)
    trials = [
        r for r in runs if r["run"]["seed"] == TUNING_SEED and r["run"]["method"] in tasks.get(r["run"]["task"], ())
    ]
    return {
        EXPERIMENT: scores(tasks),
        f"{EXPERIMENT}_differences": differences(tasks),
        f"{EXPERIMENT}_allocation": allocation(tasks, published),
        f"{EXPERIMENT}_learning_rates": learning_rates("Study B", trials),
    }
