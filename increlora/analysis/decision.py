"""What a study that looks several times says so far, from its runs by its plan (`sequential`)."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from increlora.analysis import comparison, selection, sequential
from increlora.analysis.comparison import Interval
from increlora.analysis.looks import LOOKS, TASKS
from increlora.analysis.selection import Run
from increlora.analysis.sequential import HELPS, HURTS, SAME, UNDECIDED, WORDS, Estimate, Plan
from increlora.analysis.study_tables import joint_scores, learning_rates
from increlora.analysis.tables import Table, with_interval
from increlora.errors import UserError

Scores = dict[tuple[str, str], dict[int, float]]  # (task, method) -> seed -> score in points


@dataclass
class Runs:
    """The scores of a study: the compared runs, and those that chose learning rates, by rate.

    `diverged` has (task, rate, seed) of the runs of the method that did, and `dependent` the controls that need a
    finished run of the method for each of theirs: of a diverged one there is no pattern.
    """

    compared: Scores
    trials: dict[float, Scores]
    diverged: set[tuple[str, float, int]]
    dependent: set[str]


def read(plan: Plan, runs: Iterable[Run]) -> Runs:
    """The scores of the study's runs among these.

    Raises:
        UserError: two runs that would be one, runs that cannot be compared (`selection.ran_alike`, `one_arm`), or a run
            without the split that the study scores.
    """
    of_study = selection.of_experiment(runs, plan.experiment)
    for task in plan.seeds:
        selection.ran_alike(run for run in of_study if run["run"]["task"] == task)
    found = Runs({}, {}, set(), set())
    arms: dict[tuple[str, str], tuple[list[Run], list[Run]]] = {}
    for run in of_study:
        cell = run["run"]["task"], run["run"]["method"]
        arms.setdefault(cell, ([], []))[run["run"]["seed"] in plan.tuning_seeds].append(run)
        if run["config"]["method"].get("pattern"):
            found.dependent.add(cell[1])
        if cell[1] == plan.method and run["status"] == "diverged":
            found.diverged.add((cell[0], selection.rate(run), run["run"]["seed"]))
    for cell, (compared, trials) in arms.items():
        name = " ".join(cell)
        selection.one_arm(compared, trials, name)
        found.compared[cell] = _points(selection.by_seed(compared, name), plan.split)
        for rate, of_rate in selection.by_rate(trials, name).items():
            found.trials.setdefault(rate, {})[cell] = _points(of_rate, plan.split)
    return found


def _points(runs: Mapping[int, Run], split: str) -> dict[int, float]:
    return {seed: selection.points(run, split) for seed, run in runs.items()}


def pilot(plan: Plan, runs: Runs) -> dict[str, float] | None:
    """SD of paired differences by task, from the runs that chose learning rates; None if some are missing.

    Raises:
        UserError: an SD of 0, which would give its task all the weight.
    """
    found = {}
    for task in plan.seeds:
        differences = []
        for rate, control in itertools.product(sorted(runs.trials), plan.controls):
            ours, theirs = (runs.trials[rate].get((task, method), {}) for method in (plan.method, control))
            missing = [seed for seed in plan.tuning_seeds if seed not in ours or seed not in theirs]
            if not missing:
                differences.append([ours[seed] - theirs[seed] for seed in plan.tuning_seeds])
            elif not all(_impossible(runs, task, control, seed, rate) for seed in missing):
                return None
        if not differences:
            return None
        found[task] = sequential.pilot_sd(differences)
        if not found[task]:
            raise UserError(
                f"{plan.experiment}: the paired differences of {task} do not vary over the tuning seeds; "
                "tune on a grid in which most rates train"
            )
    return found


def _impossible(runs: Runs, task: str, control: str, seed: int, rate: float | None = None) -> bool:
    """Whether a run of a control cannot be, because the run of the method that it needs has diverged."""
    return control in runs.dependent and any(
        (task, seed) == (where, k) and rate in (None, tried) for where, tried, k in runs.diverged
    )


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
    """One control so far: the differences used, D at the looks taken, the outcome and its look (0: none).

    `stopped`: its next look cannot be taken, because a run that it needs has diverged.
    """

    control: str
    used: dict[str, NDArray]
    looks: list[Estimate]
    outcome: int
    at: int
    stopped: bool = False

    def alone(self) -> dict[str, Interval]:
        """Task -> 95 % t interval of its mean difference by itself; it decides nothing."""
        return {task: comparison.interval(values, method="t") for task, values in self.used.items()}


def state(plan: Plan, runs: Runs, control: str, sd: Mapping[str, float], sizes: Sequence[Mapping[str, int]]) -> State:
    """The decision about one control from the runs that there are."""
    paired = differences(plan, runs.compared, control)
    looks = sequential.estimates(paired, sequential.weights(sizes[-1], sd), sizes)
    outcome, at = (int(value) for value in sequential.decide(plan, looks))
    looks = looks[: at or None]
    used = {task: values[: sizes[len(looks) - 1][task]] for task, values in paired.items()} if looks else {}
    following = sizes[len(looks)] if len(looks) < len(sizes) else {}
    first_missing = {task: plan.first_seed + len(paired[task]) for task in following}
    stopped = not at and any(
        seed < plan.first_seed + following[task] and _impossible(runs, task, control, seed)
        for task, seed in first_missing.items()
    )
    return State(control, used, looks, outcome, at, stopped)


@dataclass(frozen=True)
class Progress:
    """Where a study stands: SDs of its pilot (None: not complete), numbers of seeds at the looks, every control."""

    sd: dict[str, float] | None
    sizes: list[dict[str, int]]
    states: list[State]

    @property
    def ended(self) -> bool:
        """Whether every control has its outcome."""
        return all(self.is_over(found) for found in self.states)

    def is_over(self, found: State) -> bool:
        """Whether a control has its outcome, or can have none."""
        return bool(found.at) or found.stopped or len(found.looks) == len(self.sizes)


def progress(plan: Plan, runs: Runs) -> Progress:
    """Where the study stands by the runs that there are."""
    sd = pilot(plan, runs)
    if sd is None:
        return Progress(None, plan.sizes(plan.seeds), [State(name, {}, [], UNDECIDED, 0) for name in plan.controls])
    sizes = plan.sizes(sequential.needed_seeds(plan, sd))
    return Progress(sd, sizes, [state(plan, runs, name, sd, sizes) for name in plan.controls])


# tables


def tables(plan: Plan, now: Progress, runs: Iterable[Run]) -> dict[str, Table]:
    """Name -> table, of the study's runs; empty before the first look."""
    found = selection.of_experiment(runs, plan.experiment)
    if not any(state.looks for state in now.states):
        return {}
    seen = {task: max(len(state.used.get(task, ())) for state in now.states) for task in plan.seeds}
    arms: dict[tuple[str, ...], dict[int, Run]] = {}
    for task in plan.seeds:
        for method in (plan.method, *plan.controls):
            arms[TASKS[task], LOOKS[method].label] = {
                run["run"]["seed"]: run for run in found
                if (run["run"]["task"], run["run"]["method"]) == (task, method)
                and plan.first_seed <= run["run"]["seed"] < plan.first_seed + seen[task]
            }  # fmt: skip
    trials = [run for run in found if run["run"]["seed"] in plan.tuning_seeds]
    return {
        plan.experiment: joint_scores(plan.about, arms),
        f"{plan.experiment}_outcomes": outcomes(plan, now),
        f"{plan.experiment}_learning_rates": learning_rates(plan.about, trials),
    }


def outcomes(plan: Plan, now: Progress) -> Table:
    """Every control: its outcome, the mean over the tasks with the interval of the looks, and every task alone."""
    rows = []
    for state in now.states:
        cells = [LOOKS[state.control].label, word(plan, state)]
        if state.looks:
            last = state.looks[-1]
            low, high = last.interval(plan.bounds()[0][len(state.looks) - 1])
            general = sequential.across_tasks(state.used)
            cells += [
                f"{len(state.looks)} of {plan.looks}",
                with_interval(last.mean, low, high),
                with_interval(general.mean, general.low, general.high),
            ]
            for task, span in state.alone().items():
                values = state.used[task]
                cells.append(f"{with_interval(values.mean(), span.low, span.high)} ({len(values)})")
        rows.append([*cells, *[""] * (5 + len(plan.seeds) - len(cells))])
    method = LOOKS[plan.method].label
    caption = (
        f"{method} minus each control in points on {plan.split}, positive where {method} is better: the mean over the "
        f"tasks, weighted by precision, with the repeated interval of the looks, which alone decides; the mean of a "
        f"random effect of the task, which speaks of tasks in general, with its 95 % interval; every task alone with "
        f"its 95 % t interval (seeds). Does not help: the mean over these tasks lies within {plan.margin} points of 0."
    )
    columns = [
        f"{method} against", "outcome", "look", "mean over these tasks", "tasks in general",
        *(TASKS[task] for task in plan.seeds),
    ]  # fmt: skip
    return Table(caption, columns, rows)


def word(plan: Plan, state: State) -> str:
    """The outcome of a control in words."""
    if state.stopped:
        return WORDS[UNDECIDED]
    if not state.looks:
        return "no look yet"
    return WORDS[state.outcome] if state.at or len(state.looks) == plan.looks else "not decided yet"


def verdict(now: Progress, control: str) -> str:
    """What the study says of "better than this control"."""
    (state,) = (state for state in now.states if state.control == control)
    return {HELPS: "supported", HURTS: "contradicted", SAME: "no effect", UNDECIDED: "undecided"}[state.outcome]
