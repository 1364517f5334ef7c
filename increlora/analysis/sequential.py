"""The decision rule of a study over several tasks: it looks several times, and can end with "yes" and with "no".

For one control, d_ki is the difference (method minus control, in points) on task k with seed i. The estimand is the
precision-weighted mean over these tasks, with weights fixed before the first difference is seen:

    D = sum_k w_k mean_i(d_ki),   w_k ~ n_k / sd_k^2,   var D = sum_k w_k^2 s_k^2 / n_k

sd_k comes from a pilot that looks at no difference, n_k is the number of seeds, s_k the SD seen; degrees of freedom
by Satterthwaite. With fixed weights D means the same at every look, and its variance needs no correction.

The tasks are fixed, not drawn. A mixed model with task as random effect asks about tasks in general, and of three
tasks it has 2 degrees of freedom for that: by z its error rate is three times too high where tasks differ by .2 points
(DerSimonian and Laird), and by t with 2 degrees of freedom it cannot stop early (Hartung and Knapp). So the rule speaks
of the mean over the tasks of the study; what the random effect says is shown beside it (`across_tasks`).

Looks are taken at equal shares of the seeds. Both kinds of test have O'Brien-Fleming bounds, c * sqrt(looks / look):

    helps, hurts     D differs from 0, two-sided
    does not help    |D| < margin, two one-sided tests, with bounds of their own

Every control gets alpha / number of controls (Bonferroni). Whatever the true difference of a control is, a wrong word
about it comes from one of the two kinds of test alone, so the chance of any wrong word about any control is at most
alpha. A fixed order of controls would be weaker here: an outcome "does not help" would open the way to the next test.

Sources: O'Brien and Fleming, Biometrics 35, 1979; Jennison and Turnbull, Group Sequential Methods, 2000 (repeated
intervals; t statistics at the levels of normal ones); Schuirmann, J. Pharmacokin. Biopharm. 15, 1987 (two one-sided
tests); Hartung and Knapp, Statistics in Medicine 20, 2001; DerSimonian and Laird, Controlled Clinical Trials 7, 1986.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

from increlora.errors import UserError

UNDECIDED, HELPS, HURTS, SAME = range(4)
WORDS = ("undecided", "helps", "hurts", "does not help")
NODES = 200  # of the quadrature over one look
NO_VARIANCE = 1e-12  # points squared: equal differences have this variance, so that nothing is divided by 0


@dataclass(frozen=True)
class Plan:
    """What a study fixes before its first run: the keys of `configs/study/<name>.yaml`.

    Args:
        about: one sentence.
        experiment: the experiment of its runs.
        method: what is compared.
        controls: with what.
        split, seeds: what is scored at the last step; planned number of seeds by task, a multiple of `looks`.
        first_seed: seeds count from here.
        tuning_seeds: the seeds that chose learning rates; they are the pilot, and in no comparison.
        expected_sd: SDs of the paired differences in points by task, to simulate with: one or several.
        standard_error: the pilot raises all numbers of seeds alike until D has this standard error at the last look.
        most: times the planned numbers, at most.
        margin: differences below this many points do not matter.
        alpha: chance of a wrong word about any control.
        looks: at equal shares of the seeds.

    Raises:
        UserError: a value out of range.
    """

    about: str
    experiment: str
    method: str
    controls: list[str]
    split: str
    seeds: dict[str, int]
    first_seed: int
    tuning_seeds: list[int]
    expected_sd: dict[str, list[float]]
    standard_error: float
    most: float
    margin: float
    alpha: float = 0.05
    looks: int = 3

    def __post_init__(self) -> None:
        odd = [task for task, seeds in self.seeds.items() if seeds < 2 * self.looks or seeds % self.looks]
        if odd:
            raise UserError(f"seeds of {odd[0]}: a multiple of the {self.looks} looks, two at least for each look")
        numbers = 0 < self.alpha < 1 and self.margin > 0 and self.looks > 0
        if not (numbers and self.controls and len(self.tuning_seeds) > 1):
            raise UserError("a study needs 0 < alpha < 1, margin and looks above 0, controls, and two tuning seeds")

    @classmethod
    def of(cls, content: Mapping[str, Any], where: str) -> "Plan":
        """The plan that a file holds.

        Raises:
            UserError: a key that no plan has or that is missing, or a value out of range.
        """
        known = {field.name for field in fields(cls)}
        if odd := sorted(set(content) - known) or sorted(known - set(content) - {"alpha", "looks"}):
            raise UserError(f"{where}: {', '.join(odd)}: unknown or missing; a study has {', '.join(sorted(known))}")
        return cls(**content)

    @property
    def level(self) -> float:
        """The part of alpha that each control has."""
        return self.alpha / len(self.controls)

    def bounds(self) -> tuple[NDArray, NDArray]:
        """Bounds (looks,) of z for "helps" and "hurts", and of each one-sided test for "does not help"."""
        return obrien_fleming(self.looks, self.level), obrien_fleming(self.looks, self.level, sides=1)

    def sizes(self, seeds: Mapping[str, int]) -> list[dict[str, int]]:
        """Number of seeds by task at every look."""
        return [{task: n * look // self.looks for task, n in seeds.items()} for look in range(1, self.looks + 1)]


# bounds


def obrien_fleming(looks: int, alpha: float, sides: int = 2) -> NDArray:
    """Bounds (looks,) of the normal statistic that it crosses at any of equally spaced looks with probability alpha.

    The bound at look j is c sqrt(looks / j): a random walk of standard normal steps meets one barrier, c sqrt(looks).
    """
    barrier = optimize.brentq(lambda b: staying(b, looks, sides) - (1 - alpha), 0.1, 10 * math.sqrt(looks), xtol=1e-10)
    return barrier / np.sqrt(np.arange(1, looks + 1))


def staying(barrier: float, steps: int, sides: int) -> float:
    """Probability that a random walk of standard normal steps stays below a barrier (on both sides of 0, or above)."""
    low = -barrier if sides == 2 else -9 * math.sqrt(steps)
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    x, weights = (barrier + low + nodes * (barrier - low)) / 2, weights * (barrier - low) / 2
    density = stats.norm.pdf(x)
    for _ in range(steps - 1):
        density = stats.norm.pdf(x[:, None] - x) @ (weights * density)
    return float(weights @ density)


# the estimate


@dataclass(frozen=True)
class Estimate:
    """The weighted mean difference D in points, its standard error and degrees of freedom, of any common shape."""

    mean: NDArray
    error: NDArray
    freedom: NDArray

    def z(self, against: ArrayLike = 0.0) -> NDArray:
        """The normal value as unlikely as t of "D is `against`", positive above it."""
        t = (self.mean - against) / self.error
        return np.sign(t) * stats.norm.isf(stats.t.sf(np.abs(t), self.freedom))

    def interval(self, bound: float) -> tuple[NDArray, NDArray]:
        """What D can be if |z| stays within a bound: with the bounds of the looks, the repeated interval."""
        half = stats.t.isf(stats.norm.sf(bound), self.freedom) * self.error
        return self.mean - half, self.mean + half


def estimate(differences: Mapping[str, NDArray], weights: Mapping[str, ArrayLike]) -> Estimate:
    """D from paired differences, task -> (..., seeds), with weights that sum to 1.

    Raises:
        UserError: a task with a single seed.
    """
    if single := [task for task, values in differences.items() if values.shape[-1] < 2]:
        raise UserError(f"{single[0]} has one seed: an estimate needs two at least")
    w = {task: np.asarray(weights[task]) for task in differences}
    mean = sum(w[task] * values.mean(-1) for task, values in differences.items())
    parts = {task: w[task] ** 2 * variance(values) for task, values in differences.items()}
    total = sum(parts.values())
    freedom = total**2 / sum(part**2 / (differences[task].shape[-1] - 1) for task, part in parts.items())
    return Estimate(np.asarray(mean), np.sqrt(total), np.asarray(freedom))


def variance(values: NDArray) -> NDArray:
    """Of the mean of values (..., seeds)."""
    return np.maximum(values.var(-1, ddof=1), NO_VARIANCE) / values.shape[-1]


# the pilot


def pilot_sd(differences: ArrayLike) -> float:
    """SD of paired differences, from trials (trials, seeds) that each have a mean of their own.

    What is seen is how differences of one trial vary over seeds, never their mean. The median over trials keeps one
    collapsed run from deciding; it is divided by the median of chi-squared, so that it estimates the SD of normal
    differences.
    """
    values = np.asarray(differences, dtype=float)
    freedom = values.shape[-1] - 1
    return math.sqrt(np.median(values.var(-1, ddof=1)) * freedom / stats.chi2.median(freedom))


def weights(seeds: Mapping[str, int], sd: Mapping[str, ArrayLike]) -> dict[str, NDArray]:
    """Task -> its share in D, by the precision that it is planned to have."""
    precision = {task: seeds[task] / np.maximum(np.square(sd[task]), NO_VARIANCE) for task in seeds}
    return {task: value / sum(precision.values()) for task, value in precision.items()}


def needed_seeds(plan: Plan, sd: Mapping[str, float]) -> dict[str, int]:
    """The planned numbers of seeds, raised alike as the SDs of the pilot ask, in whole looks; never lowered."""
    error = 1 / math.sqrt(sum(n / max(sd[task] ** 2, NO_VARIANCE) for task, n in plan.seeds.items()))
    factor = min(max(1.0, (error / plan.standard_error) ** 2), plan.most)
    return {task: plan.looks * math.ceil(n * factor / plan.looks - 1e-9) for task, n in plan.seeds.items()}


# the decision


def decide(plan: Plan, estimates: Sequence[Estimate]) -> tuple[NDArray, NDArray]:
    """Outcome (`UNDECIDED` to `SAME`) and the look at which it fell, 0 if none did; both of the estimates' shape.

    An outcome stays. Where a difference is shown and is below the margin as well, the difference is the outcome.

    Args:
        estimates: one for every look that was taken, in order.
    """
    shape = np.shape(estimates[0].mean) if estimates else ()
    outcome, at = np.full(shape, UNDECIDED), np.zeros(shape, dtype=int)
    for look, (now, different, same) in enumerate(zip(estimates, *plan.bounds(), strict=False), start=1):
        z = now.z()
        within = np.minimum(now.z(-plan.margin), -now.z(plan.margin)) > same
        found = np.select([z > different, z < -different, within], [HELPS, HURTS, SAME], UNDECIDED)
        new = (outcome == UNDECIDED) & (found != UNDECIDED)
        outcome, at = np.where(new, found, outcome), np.where(new, look, at)
    return outcome, at


def estimates(
    differences: Mapping[str, NDArray], shares: Mapping[str, ArrayLike], sizes: Sequence[Mapping[str, int]]
) -> list[Estimate]:
    """D at every look for which there are enough seeds, from differences task -> (..., seeds in order)."""
    taken = [look for look in sizes if all(differences[task].shape[-1] >= n for task, n in look.items())]
    return [estimate({task: differences[task][..., :n] for task, n in look.items()}, shares) for look in taken]


# beside it


@dataclass(frozen=True)
class AcrossTasks:
    """What a mixed model with task as random effect says: mean, its 95 % interval, SD between tasks (points).

    `p` is of "the tasks do not differ" (Cochran's Q).
    """

    mean: float
    low: float
    high: float
    sd: float
    p: float


def across_tasks(differences: Mapping[str, NDArray]) -> AcrossTasks:
    """The mean over tasks in general: SD between tasks by DerSimonian and Laird, interval by Hartung and Knapp.

    Args:
        differences: task -> (seeds,), two tasks at least.
    """
    means = np.array([values.mean() for values in differences.values()])
    variances = np.array([variance(values) for values in differences.values()])
    w, freedom = 1 / variances, len(means) - 1
    q = (w * (means - np.average(means, weights=w)) ** 2).sum()
    between = max(0.0, (q - freedom) / (w.sum() - (w**2).sum() / w.sum()))
    w = 1 / (variances + between)
    mean = np.average(means, weights=w)
    error = math.sqrt((w * (means - mean) ** 2).sum() / freedom / w.sum())
    half = stats.t.isf(0.025, freedom) * error
    p = float(stats.chi2.sf(q, freedom))
    return AcrossTasks(float(mean), float(mean - half), float(mean + half), math.sqrt(between), p)
