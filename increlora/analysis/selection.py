"""Which runs a table or a figure shows, and what is read of them."""

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from increlora import result_files
from increlora.analysis.looks import LOOKS, TASKS, position
from increlora.errors import UserError

RESULTS = Path(os.environ.get("INCRELORA_RESULTS", Path(__file__).resolve().parents[2] / "results"))
EXPERIMENTS = ("minilm_study", "minilm_comparison", "minilm_5_epochs")  # what is shown, the first that has it
TUNING_SEED = 40  # chose the learning rates of the study, and so is in no figure
PROTOCOLS = ("last", "best", "clean")
JOINT = "dev+holdout"  # dev and held-out examples together: what the last step of studies A to C is scored on

Run = Mapping[str, Any]  # the content of a result file
Runs = dict[str, dict[int, Run]]  # method -> seed -> run


def experiment(run: Run) -> str | None:
    """The experiment that a run was asked for with, None if with none."""
    chosen = [override for override in run["run"]["overrides"] if override.startswith("experiment=")]
    return chosen[0].partition("=")[2] if chosen else None


def load(method: Collection[str] | None = None) -> list[Run]:
    """The committed runs, by default of all methods, without those that chose learning rates."""
    runs = result_files.load_runs(RESULTS / "runs")
    return [run for run in runs if run["run"]["seed"] != TUNING_SEED and (not method or run["run"]["method"] in method)]


def by_method(runs: Iterable[Run]) -> Runs:
    """Method -> seed -> run, in the order of `LOOKS` and of the seeds.

    Raises:
        UserError: two runs with the same seed.
    """
    arms: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: (position(run["run"]["method"], LOOKS), run["run"]["seed"])):
        arms.setdefault(run["run"]["method"], []).append(run)
    return {method: by_seed(found, f"{method} on {found[0]['run']['task']}") for method, found in arms.items()}


def by_seed(runs: Iterable[Run], arm: str) -> dict[int, Run]:
    """Seed -> run of an arm.

    Raises:
        UserError: two runs with the same seed.
    """
    found: dict[int, Run] = {}
    for run in runs:
        seed = run["run"]["seed"]
        if seed in found:
            raise UserError(
                f"{arm} has two runs with seed {seed} in {experiment(run)}; keep the one that is meant in results/runs"
            )
        found[seed] = run
    return found


def ran_alike(runs: Iterable[Run]) -> None:
    """Refuse runs that are compared by seed and differ in precision or in the kind of machine (a CPU, or which GPU).

    Raises:
        UserError: two runs of a seed do.
    """
    first: dict[int, Run] = {}
    for run in runs:
        other = first.setdefault(run["run"]["seed"], run)
        ways = [
            f"{r['run']['method']} ran in {r['config']['train']['precision']} on {_machine(r)}" for r in (other, run)
        ]
        if ways[0].partition(" ")[2] != ways[1].partition(" ")[2]:
            raise UserError(
                f"{run['run']['task']} seed {run['run']['seed']} in {experiment(run)}: {' and '.join(ways)}; "
                "arms of a seed are compared, so run them alike"
            )


def _machine(run: Run) -> str:
    code = run["code"]
    return " and ".join(code.get("machines_of_sessions") or [code.get("gpu") or "CPU"])


def rate(run: Run) -> float:
    return run["config"]["train"]["learning_rate"]


def by_rate(trials: Iterable[Run], arm: str) -> dict[float, dict[int, Run]]:
    """Learning rate, in order -> seed -> run, of the trials of an arm.

    Raises:
        UserError: two trials of one rate and seed.
    """
    found: dict[float, list[Run]] = {}
    for run in trials:
        found.setdefault(rate(run), []).append(run)
    return {value: by_seed(found[value], f"{arm} at rate {value:g}") for value in sorted(found)}


def trial_means(trials: Mapping[float, Mapping[int, Run]]) -> dict[float, float]:
    """Learning rate -> mean score of the last step on held-out examples, of trials by rate."""
    return result_files.trial_means(
        {value: [result_files.last_score(run, "holdout") for run in seeds.values()] for value, seeds in trials.items()}
    )


def one_arm(runs: Sequence[Run], trials: Sequence[Run], arm: str) -> None:
    """Refuse runs of an arm that have different settings, or another learning rate than the trials of the arm chose.

    Precisions and patterns may differ between seeds. Trials are asked if every rate has the same seeds.

    Raises:
        UserError: they have.
    """
    for run in runs[1:]:
        if changed := sorted(_settings(runs[0]) ^ _settings(run)):
            seeds = " and ".join(str(r["run"]["seed"]) for r in (runs[0], run))
            raise UserError(f"{arm}: the runs of seeds {seeds} in {experiment(run)} differ in {', '.join(changed)}")
    tried = by_rate(trials, arm)
    if not runs or not tried or len({frozenset(seeds) for seeds in tried.values()}) > 1:
        return
    means = trial_means(tried)
    best, ours = max(means.values()), rate(runs[0])
    if means.get(ours) != best:
        chosen = " or ".join(f"{value:g}" for value, mean in means.items() if mean == best)
        where = experiment(runs[0])
        raise UserError(f"{arm}: the runs in {where} have learning rate {ours:g}, its trials chose {chosen}")


def _settings(run: Run) -> set[str]:
    told = {
        o for o in run["run"]["overrides"] if not o.startswith(("precision=", "train.precision=", "method.pattern="))
    }
    return told | {f"budget={run['run']['budget']}", f"train.learning_rate={rate(run)}"}


def one_per_seed(runs: Iterable[Run]) -> list[Run]:
    """The same runs, by task and seed.

    Raises:
        UserError: two of one method, task and seed.
    """
    by_task: dict[str, list[Run]] = {}
    for run in runs:
        by_task.setdefault(run["run"]["task"], []).append(run)
    return [run for found in by_task.values() for seeds in by_method(found).values() for run in seeds.values()]


def of_experiment(runs: Iterable[Run], name: str) -> list[Run]:
    """The runs of an experiment, by task and method."""
    found = [run for run in runs if experiment(run) == name]
    return sorted(found, key=lambda run: (run["run"]["task"], run["run"]["method"]))


def is_published(run: Run, experiment: str | None = None) -> bool:
    """Whether a run has the settings of its recipe, changed by nothing but the given experiment and the precision."""
    return all(o.startswith("precision=") or o == f"experiment={experiment}" for o in run["run"]["overrides"])


def panels(
    methods: Sequence[str],
    needed: Collection[str] = (),
    budget: str = "r2",
    experiments: Sequence[str] = EXPERIMENTS,
) -> dict[str, Runs]:
    """Task -> method -> seed -> run: what to show of these methods, one experiment per task.

    Args:
        methods: what to show.
        needed: only experiments that have all these methods are used; default: any of `methods` is enough.
        budget: of these runs only.
        experiments: where to look, the first that has a task is shown.

    Raises:
        UserError: there is nothing to show.
    """
    runs = [run for run in load(methods) if run["run"]["budget"] == budget]
    shown = {}
    tasks = sorted({run["run"]["task"] for run in runs}, key=lambda task: position(task, TASKS))
    for task, name in ((task, name) for task in tasks for name in experiments):
        found = by_method(run for run in runs if run["run"]["task"] == task and experiment(run) == name)
        if found and task not in shown and set(needed) <= set(found):
            shown[task] = found
    if not shown:
        raise UserError(f"no task has results of {' and '.join(needed or methods)} in {RESULTS.name}/runs")
    return shown


def seeds_of(runs: Runs) -> str:
    """How many seeds, in words for a title: `n = 6 seeds`, or `n = 1 to 6 seeds`."""
    counts = sorted({len(seeds) for seeds in runs.values()})
    return f"n = {' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} seed{'s' * (counts[-1] > 1)}"


def source_of(panels: Mapping[str, Runs]) -> str:
    """Which runs a figure shows, in one line: backbone, experiment and tasks."""
    told: dict[str, list[str]] = {}
    for task, runs in panels.items():
        run = next(iter(next(iter(runs.values())).values()))
        told.setdefault(f"{run['run']['backbone']}, {experiment(run)}", []).append(f"{TASKS[task]} ({seeds_of(runs)})")
    return "; ".join(f"{source}: {', '.join(tasks)}" for source, tasks in told.items())


# what is read from them


def primary(runs: Mapping[int, Run]) -> dict[int, float]:
    """Seed -> the last step's score on dev and held-out examples together, in points."""
    return {seed: points(run, JOINT) for seed, run in runs.items()}


def points(run: Run, split: str) -> float:
    """The score of the last step on a split, times 100; of a diverged run, of its last evaluation.

    Raises:
        UserError: the run was not scored on this split.
    """
    try:
        return 100 * run["scores"]["last"]["metrics"][split]["score"]
    except KeyError:
        name = " ".join(str(run["run"][key]) for key in ("task", "method", "seed"))
        raise UserError(f"{name}: no score on {split} at the last step, which is what the study compares") from None


def scores(runs: Mapping[int, Run], protocol: str) -> dict[int, float]:
    """Seed -> score times 100, of the runs that have it: last, best (on dev) or clean (chosen on held-out data)."""
    return {seed: 100 * run["scores"][protocol]["score"] for seed, run in runs.items() if protocol in run["scores"]}


def rank_history(run: Run) -> list[tuple[int, dict[str, int]]]:
    """(step, matrix -> rank from that step on): at the start, and after every change."""
    history = [(0, dict(run["ranks"]["start"]))]
    for change in run["allocations"]:
        ranks = history[-1][1]
        history.append((change["step"], ranks | {name: ranks[name] + by for name, by in change["added"].items()}))
    return history
