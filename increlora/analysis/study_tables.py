"""The tables of a study: scores, paired differences, learning rates, and IncreLoRA without its parts."""

from collections.abc import Callable, Iterable, Mapping, Sequence

from increlora.analysis import comparison, selection
from increlora.analysis.looks import LOOKS, TASKS, position
from increlora.analysis.selection import JOINT, PROTOCOLS, Run, Runs
from increlora.analysis.tables import Table, interval_text, spread

ABLATION = ("raw_growth", "only_orthogonality", "only_advance_learning", "only_restart_warmup", "no_orthogonality",
            "no_advance_learning", "no_restart_warmup")  # fmt: skip
CONTROLS = ("random_growth", "uniform")  # what the study asks about
ARM = ("task", "method")  # columns that name an arm, in most studies

Arms = Mapping[tuple[str, ...], Mapping[int, Run]]  # what names an arm, one text per column -> seed -> run


def study(experiment: str, tasks: Mapping[str, Runs]) -> dict[str, Table]:
    """The tables of an experiment over tasks, methods and seeds.

    Args:
        tasks: task -> method -> seed -> run, without the runs that chose learning rates.
    """
    rows = [
        [TASKS[task], LOOKS[method].label, *(spread(selection.scores(runs, p).values()) for p in PROTOCOLS),
         _interval(selection.scores(runs, "last").values()), _diverged(runs), _one(map(selection.rate, runs.values()))]
        for task, methods in tasks.items()
        for method, runs in methods.items()
    ]  # fmt: skip
    columns = ["task", "method", *PROTOCOLS, "95 % interval of last", "diverged", "learning rate"]
    caption = f"{experiment}: mean ± SD over seeds (number of seeds), per cent."
    controls = {
        task: {m: methods[m] for m in methods if m == "increlora" or m in CONTROLS} for task, methods in tasks.items()
    }
    return {
        experiment: Table(caption, columns, rows),
        f"{experiment}_differences": differences(experiment, tasks),
        f"{experiment}_controls": differences(experiment, controls),
        f"{experiment}_summary": summary(experiment, tasks),
    }


def summary(experiment: str, tasks: Mapping[str, Runs]) -> Table:
    """One row per task: IncreLoRA's score, and its difference to each control over the seeds that both have."""
    rows = []
    for task, methods in tasks.items():
        ours = methods.get("increlora", {})
        compared = [_difference(methods, c) if set(methods.get(c, ())) & set(ours) else [""] * 3 for c in CONTROLS]
        seeds = ", ".join(dict.fromkeys(cells[2] for cells in compared if cells[2]))
        if seeds:
            score = spread(selection.scores(ours, "last").values())
            rows.append([TASKS[task], score, *(cells[0] for cells in compared), seeds])
    columns = ["task", "IncreLoRA", *(f"minus {LOOKS[control].label} [95 %]" for control in CONTROLS), "seeds"]
    caption = (
        f"{experiment}: score of the last step in per cent, mean ± SD (number of seeds); then the paired difference to "
        "each control in points with its 95 % interval, positive where IncreLoRA is better."
    )
    return Table(caption, columns, rows)


def differences(experiment: str, tasks: Mapping[str, Runs]) -> Table:
    """IncreLoRA minus every other method over the seeds that both have."""
    rows = []
    for task, methods in tasks.items():
        for other in methods:
            if other != "increlora" and set(methods[other]) & set(methods.get("increlora", ())):
                rows.append([TASKS[task], LOOKS[other].label, *_difference(methods, other)])
    columns = ["task", "IncreLoRA minus", "last, difference [95 %]", "p (sign flip)", "seeds", "seeds it would need",
               "best", "clean"]  # fmt: skip
    caption = (
        f"{experiment}: paired differences in points, positive where IncreLoRA is better; p is not adjusted: "
        "the protocol fixes the order of tests. The seeds it would need show a true difference of this size and spread "
        "with 80 % power."
    )
    return Table(caption, columns, rows)


def _difference(methods: Runs, other: str) -> list[str]:
    compared = {}
    for protocol in PROTOCOLS:
        scores = {name: selection.scores(methods[name], protocol) for name in ("increlora", other)}
        if seeds := comparison.common_seeds(scores):
            compared[protocol] = comparison.compare(scores, "increlora", other, seeds)
    last = compared["last"]
    span = f" [{last.interval.low:+.2f}, {last.interval.high:+.2f}]" if last.interval else ""
    needed = str(last.seeds_needed(abs(last.mean))) if last.sd and last.mean else ""
    means = [f"{compared[p].mean:+.2f}" if p in compared else "" for p in ("best", "clean")]
    return [f"{last.mean:+.2f}{span}", f"{last.p:.3f}", str(len(last.seeds)), needed, *means]


def joint_scores(name: str, arms: Arms, columns: Sequence[str] = ARM) -> Table:
    """One row per arm: the primary number of studies A to C, the usual three on dev, and the chosen rate."""
    rows = [
        [*cells, spread(selection.primary(runs).values()),
         *(spread(selection.scores(runs, p).values()) for p in PROTOCOLS), _diverged(runs),
         _one(map(selection.rate, runs.values()))]
        for cells, runs in arms.items()
    ]  # fmt: skip
    caption = (
        f"{name}: mean ± SD over seeds (number of seeds), per cent. {JOINT} is the primary number: the last step on "
        "dev and held-out examples together. last, best and clean are on dev alone."
    )
    return Table(caption, [*columns, JOINT, *PROTOCOLS, "diverged", "learning rate"], rows)


def task_and_method(run: Run) -> tuple[str, ...]:
    """The arm of a run, in most studies."""
    return TASKS[run["run"]["task"]], LOOKS[run["run"]["method"]].label


def learning_rates(
    name: str,
    trials: Iterable[Run],
    arm: Callable[[Run], tuple[str, ...]] = task_and_method,
    columns: Sequence[str] = ARM,
) -> Table:
    """Score of the last step on held-out examples by learning rate, the chosen one in bold.

    Args:
        arm: the first cells of the row of a run, one for each column; rows come in the order of tasks and methods, then
            as the trials are given.

    Raises:
        UserError: two trials of one arm, rate and seed.
    """
    trials = sorted(trials, key=_in_order)
    found: dict[tuple[str, ...], list[Run]] = {}
    for run in trials:
        found.setdefault(arm(run), []).append(run)
    by_arm = {
        cells: selection.trial_means(selection.by_rate(of_arm, " ".join(cells))) for cells, of_arm in found.items()
    }
    rows, most = [], max((len(means) for means in by_arm.values()), default=0)
    for cells, means in by_arm.items():
        best = max(means, key=means.__getitem__)
        shown = [f"{rate:g}: {f'**{s:.2f}**' if rate == best else f'{s:.2f}'}"
                 for rate, s in ((rate, 100 * mean) for rate, mean in means.items())]  # fmt: skip
        edge = "yes" if len(means) > 1 and best in (min(means), max(means)) else ""
        rows.append([*cells, *shown, *[""] * (most - len(shown)), edge])
    seeds = ", ".join(map(str, sorted({run["run"]["seed"] for run in trials})))
    caption = (
        f"{name}: learning rate: score of the last step on held-out examples of train, seed {seeds} (per cent, a mean "
        "over seeds); the best is used for all other seeds. Edge: the best rate is the lowest or the highest of its "
        "grid."
    )
    return Table(caption, [*columns, *["trial"] * most, "edge"], rows)


def _in_order(run: Run) -> tuple[tuple[int, str], tuple[int, str]]:
    return position(run["run"]["task"], TASKS), position(run["run"]["method"], LOOKS)


def _one(values: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in sorted(set(values)))


def _diverged(runs: Mapping[int, Run]) -> str:
    return str(sum(run["status"] == "diverged" for run in runs.values()))


def _interval(scores: Iterable[float]) -> str:
    """The 95 % interval of a mean, nothing for a single score."""
    values = list(scores)
    return interval_text(values) if len(values) > 1 else ""


def ablation(runs: Sequence[Run]) -> Table:
    """IncreLoRA as it is and without parts of it, by backbone, budget and task."""
    cells: dict[tuple[str, ...], dict[str | None, list[Run]]] = {}
    for run in runs:
        name = selection.experiment(run)
        if run["run"]["method"] == "increlora" and selection.is_published(run, name) and name in (None, *ABLATION):
            cell = tuple(run["run"][key] for key in ("backbone", "budget", "task"))
            cells.setdefault(cell, {}).setdefault(name, []).append(run)
    rows = []
    for (backbone, budget, task), variants in sorted(cells.items()):
        for name in (None, *ABLATION) if set(variants) - {None} else ():
            seeds = {run["run"]["seed"]: run for run in selection.one_per_seed(variants.get(name, []))}
            scores = [spread(selection.scores(seeds, protocol).values()) for protocol in PROTOCOLS]
            rows.append([backbone, budget, TASKS[task], name or "IncreLoRA", *scores])
    caption = "Ablation (paper, Table 2): mean ± SD over seeds (number of seeds), per cent."
    return Table(caption, ["backbone", "budget", "task", "variant", *PROTOCOLS], rows)
