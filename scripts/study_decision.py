"""What a study shows so far by its own rule, and which runs come next; reads result files only.

    python scripts/study_decision.py study_a [--runs DIR]

The rule is that of increlora/analysis/sequential.py with the numbers of configs/study. The runs that chose learning
rates are the pilot: they fix weights and numbers of seeds, and no mean difference is taken of them.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from increlora import result_files
from increlora.analysis import comparison, selection, sequential
from increlora.analysis.sequential import UNDECIDED, WORDS, Estimate, Plan
from increlora.errors import UserError
from increlora.glue.config import guarded, read_study

RUNS = Path(__file__).resolve().parent.parent / "results" / "runs"
FAR = 10  # points: pairs that differ by more are counted, since a collapsed run decides a mean

Scores = dict[tuple[str, str], dict[int, float]]  # (task, method) -> seed -> score in points


@dataclass
class Runs:
    """The scores of a study: the compared runs, and those that chose learning rates, by rate."""

    compared: Scores
    trials: dict[float, Scores]


def read(plan: Plan, folder: Path) -> Runs:
    """The scores of the study's runs below a folder.

    Raises:
        UserError: two runs that would be one, or a run without the split that the study scores.
    """
    found = Runs({}, {})
    for run in result_files.load_runs(folder):
        if selection.experiment(run) != plan.experiment:
            continue
        seed, cell = run["run"]["seed"], (run["run"]["task"], run["run"]["method"])
        rate = run["config"]["train"]["learning_rate"]
        scores = found.trials.setdefault(rate, {}) if seed in plan.tuning_seeds else found.compared
        if seed in scores.setdefault(cell, {}):
            raise UserError(f"{folder}: {' '.join(cell)} has two runs with seed {seed}; keep the one that is meant")
        scores[cell][seed] = 100 * last_score(run, plan.split)
    return found


def last_score(run: Mapping[str, Any], split: str) -> float:
    """The score of the last step on a split; of a diverged run, of its last evaluation."""
    try:
        return run["scores"]["last"]["metrics"][split]["score"]
    except KeyError:
        name = " ".join(str(run["run"][key]) for key in ("task", "method", "seed"))
        raise UserError(f"{name}: no score on {split} at the last step, which is what the study compares") from None


def pilot(plan: Plan, trials: Mapping[float, Scores]) -> dict[str, float] | None:
    """SD of paired differences by task, from the runs that chose learning rates; None if some are missing."""
    found = {}
    for task in plan.seeds:
        differences = []
        for scores in (trials[rate] for rate in sorted(trials)):
            for control in plan.controls:
                pairs = [scores.get((task, method), {}) for method in (plan.method, control)]
                if not all(set(plan.tuning_seeds) <= set(seeds) for seeds in pairs):
                    return None
                differences.append([pairs[0][seed] - pairs[1][seed] for seed in plan.tuning_seeds])
        if not differences:
            return None
        found[task] = sequential.pilot_sd(differences)
    return found


def differences(plan: Plan, scores: Scores, control: str) -> dict[str, NDArray]:
    """Task -> paired differences of the seeds from the first on, up to the first that is missing."""
    found = {}
    for task in plan.seeds:
        ours, theirs = (scores.get((task, method), {}) for method in (plan.method, control))
        values, seed = [], plan.first_seed
        while seed in ours and seed in theirs:
            values.append(ours[seed] - theirs[seed])
            seed += 1
        found[task] = np.array(values)
    return found


@dataclass
class State:
    """One control so far: the differences used, D at the looks taken, the outcome and its look (0: none)."""

    control: str
    used: dict[str, NDArray]
    looks: list[Estimate]
    outcome: int
    at: int


def state(
    plan: Plan, scores: Scores, control: str, sd: Mapping[str, float], sizes: Sequence[Mapping[str, int]]
) -> State:
    """The decision about one control from the runs that there are."""
    paired = differences(plan, scores, control)
    looks = sequential.estimates(paired, sequential.weights(sizes[-1], sd), sizes)
    outcome, at = (int(value) for value in sequential.decide(plan, looks))
    looks = looks[: at or None]
    used = {task: values[: sizes[len(looks) - 1][task]] for task, values in paired.items()} if looks else {}
    return State(control, used, looks, outcome, at)


# in words


def told(plan: Plan, found: State) -> Iterator[str]:
    """The lines about one control."""
    taken = len(found.looks)
    if not taken:
        yield f"against {found.control}: no look yet"
        return
    word = WORDS[found.outcome] if found.at or taken == plan.looks else "not decided yet"
    yield f"against {found.control}: {word}, look {taken} of {plan.looks}"
    now, (different, same) = found.looks[-1], (bounds[taken - 1] for bounds in plan.bounds())
    low, high = now.interval(different)
    within = min(now.z(-plan.margin), -now.z(plan.margin))
    yield f"  mean over these tasks {now.mean:+.2f} [{low:+.2f}, {high:+.2f}] (repeated interval)"
    yield f"  z {now.z():+.2f}, bound {different:.2f}; within {plan.margin} points: z {within:.2f}, bound {same:.2f}"
    for task, values in found.used.items():
        span = comparison.interval(values)
        yield f"  {task}: {values.mean():+.2f} [{span.low:+.2f}, {span.high:+.2f}], {len(values)} seeds"
    yield from beside(plan, found)


def beside(plan: Plan, found: State) -> Iterator[str]:
    """What is described and decides nothing."""
    across = sequential.across_tasks(found.used)
    differ = "the tasks differ" if across.p < 0.05 else "no difference between tasks shown"
    yield (
        f"  tasks in general (random effect): {across.mean:+.2f} [{across.low:+.2f}, {across.high:+.2f}], "
        f"SD between tasks {across.sd:.2f}; {differ} (p = {across.p:.3f})"
    )
    far = {task: values[np.abs(values) > FAR] for task, values in found.used.items()}
    counts = ", ".join(f"{task} {len(values)}" for task, values in far.items() if len(values))
    yield f"  pairs more than {FAR} points apart: {counts or 'none'}"


def next_commands(plan: Plan, sizes: Sequence[Mapping[str, int]], states: Sequence[State]) -> Iterator[str]:
    """The runs of the next look of every control that has no outcome yet."""
    open_ = [found for found in states if not found.at and len(found.looks) < plan.looks]
    if not open_:
        return
    look = min(len(found.looks) for found in open_)
    methods = ",".join([plan.method, *(found.control for found in open_)])
    for task, n in sizes[look].items():
        seeds = f"$(seq -s, {plan.first_seed} {plan.first_seed + n - 1})"
        yield (
            f"python scripts/sweep.py {plan.experiment} task={task} seed={seeds} method={methods} "
            "task.data_dir=GLUE --jobs 2"
        )


def report(plan: Plan, runs: Runs) -> Iterator[str]:
    """Everything that the command prints."""
    yield f"{plan.experiment}: {plan.about}"
    sd = pilot(plan, runs.trials)
    if sd is None:
        yield "pilot: not complete; the runs that choose learning rates are part of the first look"
        sizes, states = plan.sizes(plan.seeds), [State(control, {}, [], UNDECIDED, 0) for control in plan.controls]
    else:
        sizes = plan.sizes(sequential.needed_seeds(plan, sd))
        weights = sequential.weights(sizes[-1], sd)
        yield f"pilot, SDs of paired differences over seeds {', '.join(map(str, plan.tuning_seeds))}:"
        for task in plan.seeds:
            looks = ", ".join(str(size[task]) for size in sizes)
            yield f"  {task}: SD {sd[task]:.2f}, weight {weights[task]:.2f}, seeds at the looks {looks}"
        states = [state(plan, runs.compared, control, sd, sizes) for control in plan.controls]
        for found in states:
            yield from told(plan, found)
    commands = list(next_commands(plan, sizes, states))
    yield "next:" if commands else "the study has ended by its rule"
    yield from commands


@guarded
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", help="a file of configs/study")
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder of result files (default: results/runs)")
    arguments = parser.parse_args()
    if not arguments.runs.is_dir():
        raise UserError(f"--runs {arguments.runs}: no such folder")
    plan = Plan.of(read_study(arguments.study), arguments.study)
    print("\n".join(report(plan, read(plan, arguments.runs))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
