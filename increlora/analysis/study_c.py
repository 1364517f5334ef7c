"""The tests of study C by its protocol (results/studies/study_c.md), from the result files."""

import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

from increlora.analysis import comparison, selection
from increlora.analysis.looks import LOOKS
from increlora.analysis.selection import Run
from increlora.analysis.study_tables import Arms, joint_scores, learning_rates
from increlora.analysis.tables import Table, with_interval
from increlora.errors import UserError

EXPERIMENT = "study_c"
MARGIN = 0.3  # points: an interval within it says that there is no effect
SIX, EIGHT = range(47, 53), range(47, 55)
TUNING = (45, 46)  # seeds that chose learning rates
Values = dict[int, float]  # by seed


@dataclass(frozen=True)
class Outcome:
    """A test: its question, the paired differences by seed, p (of Table 2 Holm's), and the word for it."""

    part: str
    question: str
    values: tuple[float, ...]
    p: float
    word: str  # supported, contradicted, no effect, undecided


USUAL = {
    "budget": "r2", "orthogonality": True, "advance": True, "restart": True, "authors": False, "map": None,
    "data": None,
}  # fmt: skip


def features(run: Run) -> dict[str, object]:
    """What tells the arms of the study apart."""
    config = run["config"]
    method, train = config["method"], config["train"]
    pattern = str(method.get("pattern"))
    return {
        "method": method["name"],
        "budget": run["run"]["budget"],
        "orthogonality": bool(method.get("orth_weight")),
        "advance": method.get("advance_learning", True),
        "restart": method.get("restart_warmup", True),
        "authors": train.get("adamw") == "authors",
        "map": next((name for name in ("increlora", "adalora") if f"/{name}/stsb/" in pattern), None),
        "data": config["task"].get("train_fraction", 1.0) if config["task"]["holdout"] == 0.5 else None,
    }


def compared(runs: Sequence[Run]) -> list[Run]:
    """The runs that the study compares: without the trials of learning rates and without those of Figure 5.

    Raises:
        UserError: arms of a seed that did not run alike, or an arm with several settings or another rate than chosen.
    """
    found = [run for run in runs if run["config"]["train"]["eval_interval"] != 20]
    for low_resource in (True, False):
        selection.ran_alike(run for run in found if (features(run)["data"] is not None) is low_resource)
    arms: dict[tuple[str, ...], tuple[list[Run], list[Run]]] = {}
    for run in found:
        arms.setdefault(cells(run), ([], []))[run["run"]["seed"] in TUNING].append(run)
    for row, (of_arm, trials) in arms.items():
        selection.one_arm(of_arm, trials, " ".join(row))
    return [run for run in found if run["run"]["seed"] in EIGHT]


class Study:
    """The compared runs of the study, found by what tells them apart.

    Args:
        runs: results; those of other experiments must not be among them.
    """

    def __init__(self, runs: Sequence[Run]):
        self.runs = [(features(run), run) for run in compared(runs)]

    def arm(self, method: str, **changes: object) -> Values:
        """The primary number by seed, in points, of the runs of an arm."""
        wanted = USUAL | {"method": method} | changes
        if method in ("lora", "adalora"):  # these have none of IncreLoRA's switches
            wanted.pop("orthogonality")
        found = [run for told, run in self.runs if all(told[key] == value for key, value in wanted.items())]
        name = " ".join([method, *(f"{key}={value}" for key, value in changes.items())])
        return selection.primary(selection.by_seed(found, name))

    def over_lora(self, **changes: object) -> Values:
        return minus(self.arm("increlora", **changes), self.arm("lora", **changes))

    def main_effect(self, factor: str) -> Values:
        """On minus off, a mean over the other two."""
        others = [name for name in ("orthogonality", "advance", "restart") if name != factor]
        effects = []
        for first, second in itertools.product((True, False), repeat=2):
            fixed = dict(zip(others, (first, second), strict=True))
            on, off = (self.arm("increlora", **fixed, **{factor: switched}) for switched in (True, False))
            effects.append(minus(on, off))
        return mean(effects)


def minus(one: Values, other: Values) -> Values:
    return {seed: one[seed] - other[seed] for seed in one.keys() & other.keys()}


def mean(parts: Sequence[Values]) -> Values:
    seeds = set.intersection(*map(set, parts))
    return {seed: float(np.mean([part[seed] for part in parts])) for seed in seeds}


TESTS: dict[str, tuple[range, dict[str, Callable[[Study], Values]]]] = {
    "Figure 4": (SIX, {
        "IncreLoRA minus LoRA, mean over r2, r4, r8, r16":
            lambda s: mean([s.over_lora(budget=budget) for budget in ("r2", "r4", "r8", "r16")]),
        "that difference at r2 minus the one at r16":
            lambda s: minus(s.over_lora(), s.over_lora(budget="r16")),
    }),
    "Table 2": (EIGHT, {
        "orthogonality": lambda s: s.main_effect("orthogonality"),
        "advance learning": lambda s: s.main_effect("advance"),
        "restart warmup": lambda s: s.main_effect("restart"),
    }),
    "Table 3": (SIX, {
        "IncreLoRA's map minus the same map shuffled":
            lambda s: minus(s.arm("static_pattern", map="increlora"), s.arm("shuffled_pattern", map="increlora")),
        "IncreLoRA minus its map from scratch":
            lambda s: minus(s.arm("increlora"), s.arm("static_pattern", map="increlora")),
        "IncreLoRA's map minus AdaLoRA's, from scratch":
            lambda s: minus(s.arm("static_pattern", map="increlora"), s.arm("static_pattern", map="adalora")),
    }),
    "low resource": (SIX, {
        "IncreLoRA minus LoRA at 2 % of the data less the same at 50 %":
            lambda s: minus(s.over_lora(data=0.04), s.over_lora(data=1.0)),
        "IncreLoRA minus LoRA at r1 less the same at r16":
            lambda s: minus(s.over_lora(budget="r1"), s.over_lora(budget="r16")),
    }),
}  # fmt: skip


def outcomes(study: Study, part: str) -> list[Outcome]:
    """The outcome of every test of a part; empty while a run of the part is missing."""
    seeds, tests = TESTS[part]
    values = {question: test(study) for question, test in tests.items()}
    if any(set(found) < set(seeds) for found in values.values()):
        return []
    paired = {question: tuple(found[seed] for seed in seeds) for question, found in values.items()}
    p = [comparison.sign_flip_test(differences) for differences in paired.values()]
    if part == "Table 2":
        p = comparison.holm(p).tolist()
    made, found = True, []
    for (question, differences), value in zip(paired.items(), p, strict=True):
        found.append(Outcome(part, question, differences, value, word(differences, value, made)))
        # of the others, a test is made only if all before it were significant
        made = made and (part == "Table 2" or value < comparison.ALPHA)
    return found


def word(differences: Sequence[float], p: float, made: bool = True) -> str:
    """What a test says by the protocol."""
    if made and p < comparison.ALPHA:
        return "supported" if np.mean(differences) > 0 else "contradicted"
    interval = comparison.interval(differences, method="t")
    return "no effect" if interval.low > -MARGIN and interval.high < MARGIN else "undecided"


def verdict(study: Study, part: str, question: str) -> str:
    """What a test says of its claim; undecided while runs of its part are missing, if it has a pair at all."""
    words = {outcome.question: outcome.word for outcome in outcomes(study, part)}
    begun = TESTS[part][1][question](study)
    return words.get(question, "undecided" if begun else "not run here")


# tables

COLUMNS = ("train", "budget", "arm")
SWITCHES = {"orthogonality": "orthogonality", "advance": "advance learning", "restart": "restart warmup"}
FULL = LOOKS["increlora"].label
REPEATED = ("Figure 4", "Table 2")  # the parts of which one arm had run on another processor


def cells(run: Run) -> tuple[str, ...]:
    """The share of train that is learnt from, the budget, and the arm in words."""
    told, task = features(run), run["config"]["task"]
    arm = LOOKS[str(told["method"])].label
    if told["map"]:
        arm = f"{arm} of {LOOKS[str(told['map'])].label}"
    if told["method"] == "increlora" and (off := [word for key, word in SWITCHES.items() if not told[key]]):
        arm = f"{arm} without {', '.join(off)}"
    if told["authors"]:
        arm = f"{arm} as the authors switch it, their AdamW"
    return f"{task.get('train_fraction', 1.0) * (1 - task['holdout']):.0%}", str(told["budget"]), arm


def place(row: tuple[str, ...]) -> tuple[int, int, str]:
    """A key to sort arms by."""
    share, budget, arm = row
    return -int(share.rstrip("%")), int(budget.lstrip("r")), arm if arm != FULL else ""


def complete(runs: Sequence[Run]) -> Arms:
    """Arm -> seed -> run, of the arms that have every seed."""
    found: dict[tuple[str, ...], list[Run]] = {}
    for run in compared(runs):
        found.setdefault(cells(run), []).append(run)
    arms = {row: selection.by_seed(found[row], " ".join(row)) for row in sorted(found, key=place)}
    return {row: arm for row, arm in arms.items() if set(SIX) <= set(arm)}


def differences(arms: Arms) -> Table:
    """IncreLoRA of the same budget and data minus every other arm."""
    rows = []
    for row, runs in arms.items():
        whole = (*row[:2], FULL)
        if row != whole and whole in arms:
            values = list(minus(selection.primary(arms[whole]), selection.primary(runs)).values())
            rows.append([*row, difference_text(values), str(len(values))])
    caption = (
        f"Study C: paired differences in points on {selection.JOINT} with 95 % t intervals, positive where IncreLoRA "
        "of the same budget and data is better. They are described; the tests of the protocol stand apart."
    )
    return Table(caption, [*COLUMNS, "difference [interval]", "seeds"], rows)


def difference_text(values: Sequence[float]) -> str:
    interval = comparison.interval(values, method="t")
    return with_interval(np.mean(values), interval.low, interval.high)


def built(runs: Sequence[Run], repeats: Sequence[Run] = ()) -> dict[str, Table]:
    """Name -> table, of the study's runs; empty before an arm is complete.

    Args:
        repeats: of some of its runs, on the processor of the others.
    """
    arms = complete(runs)
    if not arms:
        return {}
    trials = [run for run in runs if run["run"]["seed"] in TUNING and cells(run) in arms]
    trials.sort(key=lambda run: place(cells(run)))
    found = {f"{EXPERIMENT}_one_processor": tests(with_repeats(runs, repeats), REPEATED)} if repeats else {}
    return found | {
        EXPERIMENT: joint_scores("Study C, MiniLM on STS-B", arms, COLUMNS),
        f"{EXPERIMENT}_tests": tests(runs),
        f"{EXPERIMENT}_differences": differences(arms),
        f"{EXPERIMENT}_learning_rates": learning_rates("Study C", trials, cells, COLUMNS),
    }


def with_repeats(runs: Sequence[Run], repeats: Sequence[Run]) -> list[Run]:
    """The runs, with those that were made a second time in place of the first.

    Raises:
        UserError: a repeat is of none of the runs.
    """
    second = {_name(run): run for run in repeats}
    if odd := second.keys() - {_name(run) for run in runs}:
        raise UserError(f"results/repeats has a run that results/runs has not: {' '.join(odd.pop())}")
    return [second.get(_name(run), run) for run in runs]


def _name(run: Run) -> tuple[str, ...]:
    told = run["run"]
    return (told["budget"], told["method"], f"seed={told['seed']}", *told["overrides"])


def tests(runs: Sequence[Run], parts: Collection[str] = tuple(TESTS)) -> Table:
    """Every test of these parts that can be made."""
    rows, study = [], Study(runs)
    for outcome in (outcome for part in parts for outcome in outcomes(study, part)):
        rows.append([
            outcome.part, outcome.question, difference_text(outcome.values), str(len(outcome.values)),
            f"{outcome.p:.3f}", outcome.word,
        ])  # fmt: skip
    caption = (
        f"Study C, MiniLM on STS-B: paired differences in points on {selection.JOINT} with 95 % t intervals; p of "
        f"sign-flip tests (Table 2: Holm's). No effect: the interval lies within {MARGIN} points of 0. Of the other "
        "parts, a test after one that is not significant is not made, and its p is described."
    )
    return Table(caption, ["part", "test", "difference [interval]", "seeds", "p", "outcome"], rows)
