"""What a study shows so far by its own rule, and which runs come next; reads result files only.

    python scripts/study_decision.py study_a [--runs DIR]

The rule is that of increlora/analysis/sequential.py with the numbers of configs/study. The runs that chose learning
rates are the pilot: they fix weights and numbers of seeds, and no mean difference is taken of them.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from increlora import result_files
from increlora.analysis import decision, sequential
from increlora.analysis.decision import Progress, State
from increlora.analysis.sequential import Plan
from increlora.analysis.tables import with_interval
from increlora.errors import UserError
from increlora.glue.config import guarded, read_study

RUNS = Path(__file__).resolve().parent.parent / "results" / "runs"
FAR = 10  # points: pairs that differ by more are counted, since a collapsed run decides a mean


def told(plan: Plan, found: State) -> Iterator[str]:
    """The lines about one control."""
    taken = len(found.looks)
    if found.stopped:
        yield f"against {found.control}: the next look cannot be: a run of {plan.method} that it needs has diverged"
    if not taken:
        yield f"against {found.control}: {decision.word(plan, found)}"
        return
    yield f"against {found.control}: {decision.word(plan, found)}, look {taken} of {plan.looks}"
    now, (different, same) = found.looks[-1], (bounds[taken - 1] for bounds in plan.bounds())
    low, high = now.interval(different)
    within = min(now.z(-plan.margin), -now.z(plan.margin))
    yield f"  mean over these tasks {with_interval(now.mean, low, high)} (repeated interval)"
    yield f"  z {now.z():+.2f}, bound {different:.2f}; within {plan.margin} points: z {within:.2f}, bound {same:.2f}"
    for task, span in found.alone().items():
        values = found.used[task]
        yield f"  {task}: {with_interval(values.mean(), span.low, span.high)}, {len(values)} seeds"
    yield from beside(found)


def beside(found: State) -> Iterator[str]:
    """What is described and decides nothing."""
    across = sequential.across_tasks(found.used)
    differ = "the tasks differ" if across.p < 0.05 else "no difference between tasks shown"
    yield (
        f"  tasks in general (random effect): {with_interval(across.mean, across.low, across.high)}, "
        f"SD between tasks {across.sd:.2f}; {differ} (p = {across.p:.3f})"
    )
    far = {task: values[np.abs(values) > FAR] for task, values in found.used.items()}
    counts = ", ".join(f"{task} {len(values)}" for task, values in far.items() if len(values))
    yield f"  pairs more than {FAR} points apart: {counts or 'none'}"


def next_commands(plan: Plan, now: Progress) -> Iterator[str]:
    """The runs of the next look of every control that has no outcome yet."""
    if now.ended:
        return
    open_ = [found for found in now.states if not now.is_over(found)]
    look = min(len(found.looks) for found in open_)
    methods = ",".join([plan.method, *(found.control for found in open_)])
    for task, n in now.sizes[look].items():
        seeds = f"$(seq -s, {plan.first_seed} {plan.first_seed + n - 1})"
        yield (
            f"python scripts/sweep.py {plan.experiment} task={task} seed={seeds} method={methods} "
            "task.data_dir=GLUE --jobs 2"
        )


def report(plan: Plan, runs: decision.Runs) -> Iterator[str]:
    """Everything that the command prints."""
    yield f"{plan.experiment}: {plan.about}"
    now = decision.progress(plan, runs)
    if now.sd is None:
        yield "pilot: not complete; the runs that choose learning rates are part of the first look"
    else:
        weights = sequential.weights(now.sizes[-1], now.sd)
        yield f"pilot, SDs of paired differences over seeds {', '.join(map(str, plan.tuning_seeds))}:"
        for task in plan.seeds:
            looks = ", ".join(str(size[task]) for size in now.sizes)
            yield f"  {task}: SD {now.sd[task]:.2f}, weight {weights[task]:.2f}, seeds at the looks {looks}"
        for found in now.states:
            yield from told(plan, found)
    yield "the study has ended by its rule" if now.ended else "next:"
    yield from next_commands(plan, now)


@guarded
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", help="a file of configs/study")
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder of result files (default: results/runs)")
    arguments = parser.parse_args()
    if not arguments.runs.is_dir():
        raise UserError(f"--runs {arguments.runs}: no such folder")
    plan = Plan.of(read_study(arguments.study), arguments.study)
    print("\n".join(report(plan, decision.read(plan, result_files.load_runs(arguments.runs)))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
