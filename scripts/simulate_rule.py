"""Simulate the decision rule of a study before it is run: how often each outcome comes, and at which look.

    python scripts/simulate_rule.py study_a [--repetitions N]

Differences are normal, with the expected SDs of configs/study; the pilot is simulated too, with as many degrees of
freedom as its trials have. A word is wrong if it does not fit the mean of the tasks' true differences. Seeds count
what one control needs, over all tasks. Results depend on nothing but the arguments.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from increlora.analysis import sequential
from increlora.analysis.sequential import HELPS, HURTS, SAME, UNDECIDED, Plan
from increlora.glue.config import guarded, read_study

TRUE = (0.0, 0.15, 0.3, 0.5, 1.0)  # points
BETWEEN = (0.0, 0.2)  # SD of the true difference between tasks, in points
PILOT_FREEDOM = 6  # of the pilot's SD: three rates, and three controls that share the method's runs
COLUMNS = ("SDs", "between tasks", "true difference", "helps", "hurts", "does not help", "undecided", "wrong",
           "look 1", "look 2", "look 3", "seeds")  # fmt: skip


def settings(plan: Plan) -> Iterator[dict[str, float]]:
    """Every combination of the expected SDs."""
    return (dict(zip(plan.expected_sd, sds, strict=True)) for sds in itertools.product(*plan.expected_sd.values()))


def shares(plan: Plan, sd: Mapping[str, float], repetitions: int, random: np.random.Generator) -> dict[str, NDArray]:
    """The weights (repetitions,) that pilots would give."""
    freedom = PILOT_FREEDOM
    seen = {task: value * np.sqrt(random.chisquare(freedom, repetitions) / freedom) for task, value in sd.items()}
    return sequential.weights(plan.seeds, seen)


def draw(
    plan: Plan, true: float, between: float, sd: Mapping[str, float], controls: int, repetitions: int,
    random: np.random.Generator,
) -> tuple[dict[str, NDArray], dict[str, NDArray]]:  # fmt: skip
    """True differences task -> (controls, repetitions), and paired ones (controls, repetitions, seeds).

    All controls share the method's runs, so their differences correlate by one half.
    """
    truths, differences = {}, {}
    for task, seeds in plan.seeds.items():
        truths[task] = true + between * random.standard_normal((controls, repetitions))
        runs = sd[task] / np.sqrt(2) * random.standard_normal((controls + 1, repetitions, seeds))
        differences[task] = truths[task][..., None] + runs[0] - runs[1:]
    return truths, differences


def simulate(
    plan: Plan, true: float, between: float, sd: Mapping[str, float], repetitions: int, seed: int = 0, controls: int = 1
) -> tuple[NDArray, NDArray, NDArray]:
    """Outcomes, their looks (0: none) and whether the word was wrong, each (controls, repetitions)."""
    random = np.random.default_rng(seed)
    weights = shares(plan, sd, repetitions, random)
    truths, differences = draw(plan, true, between, sd, controls, repetitions, random)
    mean = sum(weights[task] * truths[task] for task in truths)
    outcome, look = sequential.decide(plan, sequential.estimates(differences, weights, plan.sizes(plan.seeds)))
    tiny = 1e-12
    wrong = ((outcome == HELPS) & (mean < tiny)) | ((outcome == HURTS) & (mean > -tiny))
    return outcome, look, wrong | ((outcome == SAME) & (np.abs(mean) > plan.margin - tiny))


def rows(plan: Plan, repetitions: int) -> Iterator[list[str]]:
    """One row for every SD, spread between tasks and true difference."""
    for sd, between, true in itertools.product(settings(plan), BETWEEN, TRUE):
        outcome, look, wrong = simulate(plan, true, between, sd, repetitions)
        used = np.array([sum(size.values()) for size in (plan.sizes(plan.seeds)[-1], *plan.sizes(plan.seeds))])
        counts = [np.mean(outcome == word) for word in (HELPS, HURTS, SAME, UNDECIDED)]
        counts += [wrong.mean(), *(np.mean(look == number) for number in range(1, plan.looks + 1))]
        sds = " ".join(f"{value:.2f}" for value in sd.values())
        yield [sds, f"{between:g}", f"{true:g}", *(f"{value:.3f}" for value in counts), f"{used[look].mean():.0f}"]


def family(plan: Plan, repetitions: int) -> Iterator[str]:
    """How often any word about any control is wrong, where that is likeliest."""
    for sd, true in itertools.product(settings(plan), (0.0, plan.margin)):
        _, _, wrong = simulate(plan, true, 0.0, sd, repetitions, controls=len(plan.controls))
        sds = " ".join(f"{value:.2f}" for value in sd.values())
        yield f"SDs {sds}, all {len(plan.controls)} true differences {true:g}: {wrong.any(0).mean():.3f}"


@guarded
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", help="a file of configs/study")
    parser.add_argument("--repetitions", type=int, default=20000)
    arguments = parser.parse_args()
    plan = Plan.of(read_study(arguments.study), arguments.study)
    different, same = plan.bounds()
    print(f"Bounds of z: {np.round(different, 3)} for a difference, {np.round(same, 3)} for each one-sided test.")
    print(f"Seeds by task: {plan.seeds}. SDs in this order. {arguments.repetitions} repetitions.\n")
    for row in (COLUMNS, ["---"] * len(COLUMNS), *rows(plan, arguments.repetitions)):
        print(f"| {' | '.join(row)} |")
    print("\nAny wrong word about any control:\n")
    for line in family(plan, arguments.repetitions):
        print(f"- {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
