"""Is a difference between methods real? Paired tests, intervals that cover, averages over tasks, seeds needed.

Scores may be in any unit, the same for all methods; differences and intervals come out in that unit. Every random
resampling starts from a fixed seed, so the same data give the same table.

Coverage of 95 % intervals of a mean difference in %, by simulation (4,000 samples each, standard error .35; the
skewness of the two gamma shapes is 1 and 2, t3 is Student's with 3 degrees of freedom):

    seeds                                   5     6     8     10    15    20
    BCa as published       normal           84.0  85.0  88.8  89.9  91.9  91.9
                           gamma(4)         83.3  85.3  88.4  89.7  90.6  92.3
                           exponential      80.8  83.5  86.6  87.5  90.0  91.0
                           t3               81.5  83.3  85.2  85.5  88.3  89.7
    BCa, levels expanded   normal           91.4  92.2  94.1  94.8  94.7  94.4
                           gamma(4)         90.6  92.0  94.2  94.1  94.0  94.5
                           exponential      87.8  90.1  91.9  92.5  93.2  93.0
                           t3               90.7  91.6  91.9  91.0  91.7  92.6
    Student's t            normal           94.9  94.5  94.8  95.3  94.8  94.6
                           gamma(4)         93.2  93.3  94.2  93.9  93.3  94.2
                           exponential      88.7  89.0  89.7  90.2  91.2  91.2
                           t3               96.1  96.0  96.2  95.6  95.5  95.5

BCa as published is too narrow with few seeds. So `interval` takes t below 10 seeds and BCa at expanded levels from 10
on, where it covers more evenly under skew; t remains the better one where tails are heavy and even. Neither covers
where a rare divergence decides the mean (5 % of runs 20 SD lower: 52 to 69 % at 5 to 20 seeds): there the count of
diverged runs says more than the interval.
"""

import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from increlora.errors import UserError

ALPHA = 0.05
MIN_SEEDS = 6  # the fewest with which a two-sided sign-flip test can reach ALPHA
BCA_FROM = 10  # seeds from which on BCa at expanded levels covers at least as well as t
RESAMPLES = 9999
EXACT_UP_TO = 16  # seeds up to which all sign flips are tried

Scores = Mapping[str, Mapping[int, float]]  # method -> seed -> score
Statistic = Callable[..., NDArray]  # (*samples, axis) -> one value per sample set, like np.mean


@dataclass(frozen=True)
class Interval:
    """A confidence interval at `level` (0..1) and how it was made: "t" or "bca"."""

    low: float
    high: float
    method: str
    level: float = 0.95


@dataclass(frozen=True)
class Verdict:
    """Whether a table may call a difference significant, and the words for it."""

    significant: bool
    text: str


@dataclass(frozen=True)
class Comparison:
    """A method against another on one task, over paired seeds; positive differences favour `method`.

    Attributes:
        differences: score of `method` minus score of `against`, by seed in the order of `seeds`.
        sd: of the differences, with n - 1; None with one seed.
        interval: of the mean difference; None with one seed.
        p: of the sign-flip test of this task alone; `adjusted_p` is Holm's over the tasks compared together.
        smallest_p: the least that `adjusted_p` could have been with these numbers of seeds and tasks.
        diverged: runs of (method, against) that diverged; they are among the differences.
    """

    method: str
    against: str
    seeds: tuple[int, ...]
    differences: tuple[float, ...]
    mean: float
    sd: float | None
    interval: Interval | None
    p: float
    adjusted_p: float
    smallest_p: float
    diverged: tuple[int, int]

    @property
    def verdict(self) -> Verdict:
        """Significant only if enough seeds could show it and the adjusted p does; never with fewer than 6 seeds."""
        n = len(self.seeds)
        if n < MIN_SEEDS or self.smallest_p > ALPHA:
            return Verdict(False, f"too few seeds: {n} give p >= {_short(self.smallest_p)}")
        if self.adjusted_p > ALPHA:
            return Verdict(False, f"no difference shown (p = {_short(self.adjusted_p)})")
        word = "better" if self.mean > 0 else "worse"
        return Verdict(True, f"{word} than {self.against} (p = {_short(self.adjusted_p)})")

    def seeds_needed(self, difference: float) -> int:
        """Seeds that would show a true mean difference of this size, at the SD seen here: a rough number.

        The true SD is between .62 and 2.45 times that of 6 seeds (95 %, normal), and the seeds go with its square.

        Raises:
            UserError: there is only one seed.
        """
        if self.sd is None:
            raise UserError("one seed has no spread: how many seeds a difference needs takes at least two")
        return seeds_needed(difference, self.sd)


def _short(p: float) -> str:
    return f"{p:.3g}".removeprefix("0") or "0"


def common_seeds(scores: Scores, methods: Collection[str] | None = None) -> list[int]:
    """The seeds that all these methods have, ascending; default: all methods."""
    return sorted(set.intersection(*(set(scores[name]) for name in (methods or scores))))


def paired_differences(
    scores: Scores, method: str, against: str, seeds: Sequence[int] | None = None
) -> dict[int, float]:
    """Seed -> score of `method` minus score of `against`, by ascending seed.

    Args:
        scores: method -> seed -> score. A diverged run stays in, with the score it reached.
        seeds: compare on these only (`common_seeds`); by default on all, and both methods must have the same.

    Raises:
        UserError: an unknown method, seeds that only one of the two has, no seeds, a score that is no number.
    """
    for name in (method, against):
        if name not in scores:
            raise UserError(f"no scores of the method '{name}'; there are {', '.join(scores)}")
    wanted = set(scores[method]) | set(scores[against]) if seeds is None else set(seeds)
    for name in (method, against):
        missing = sorted(wanted - set(scores[name]))
        if missing:
            raise UserError(
                f"{method} and {against} are not paired: {name} has no run with seed {', '.join(map(str, missing))}. "
                "Run it, or compare on the seeds both have (seeds=common_seeds(...))."
            )
        _refuse_missing(name, {seed: scores[name][seed] for seed in wanted})
    if not wanted:
        raise UserError(f"{method} and {against} have no seeds to compare")
    return {seed: float(scores[method][seed] - scores[against][seed]) for seed in sorted(wanted)}


def _refuse_missing(method: str, scores: Mapping[int, float]) -> None:
    for seed, score in scores.items():
        if score is None or not math.isfinite(score):
            raise UserError(
                f"{method} with seed {seed} has the score {score}. A diverged run must stay in: "
                "give it the score of its last evaluation, or of a constant prediction if it has none."
            )


def compare(
    scores: Scores,
    method: str,
    against: str,
    seeds: Sequence[int] | None = None,
    diverged: Mapping[str, Collection[int]] | None = None,
) -> Comparison:
    """Everything a table says of two methods on one task.

    Args:
        scores, seeds: as of `paired_differences`.
        diverged: method -> seeds of its diverged runs, to be counted.

    Raises:
        UserError: the runs are not paired.
    """
    paired = paired_differences(scores, method, against, seeds)
    differences = np.array(list(paired.values()))
    several = len(paired) > 1
    p = sign_flip_test(differences)
    of_method, of_against = (len(set(paired) & set((diverged or {}).get(name, ()))) for name in (method, against))
    return Comparison(
        method=method,
        against=against,
        seeds=tuple(paired),
        differences=tuple(paired.values()),
        mean=float(differences.mean()),
        sd=float(differences.std(ddof=1)) if several else None,
        interval=interval(differences) if several else None,
        p=p,
        adjusted_p=p,
        smallest_p=smallest_p(len(paired)),
        diverged=(of_method, of_against),
    )


def compare_tasks(
    scores: Mapping[str, Scores],
    method: str,
    against: str,
    seeds: Mapping[str, Sequence[int]] | None = None,
    diverged: Mapping[str, Mapping[str, Collection[int]]] | None = None,
) -> dict[str, Comparison]:
    """`compare` by task, with p adjusted over the tasks (Holm); the arguments are those of `compare` by task.

    Holm costs seeds: with 6 each, no adjusted p falls below .0625 over two tasks or .09375 over three; 5 % needs
    7 seeds over two or three tasks, 8 over four to six, 9 over eight. The verdicts say so.
    """
    alone = {
        task: compare(scores[task], method, against, (seeds or {}).get(task), (diverged or {}).get(task))
        for task in scores
    }
    adjusted = holm([c.p for c in alone.values()])
    smallest = holm([c.smallest_p for c in alone.values()])  # Holm is monotone in every p: this is a bound
    return {
        task: replace(c, adjusted_p=float(p), smallest_p=float(least))
        for (task, c), p, least in zip(alone.items(), adjusted, smallest, strict=True)
    }


def smallest_p(seeds: int) -> float:
    """The least two-sided p that `sign_flip_test` can return: 2 / 2^n, above 16 seeds 2 / 10,000 (random flips).

    A difference of exactly 0 doubles it: its sign does not matter.
    """
    return 2.0 ** (1 - seeds) if seeds <= EXACT_UP_TO else 2 / (RESAMPLES + 1)


def sign_flip_test(differences: ArrayLike) -> float:
    """Two-sided p of "the differences are symmetric about 0", by flipping their signs; exact up to 16 seeds.

    The statistic is the mean. It is rounded at 1e-10 of the largest difference, so that scores that are
    equal on paper tie in floating point too. All differences 0, or a single one: p = 1.

    Args:
        differences: (seeds,).

    Source: Fisher, The Design of Experiments, 1935, section 21; scipy.stats.permutation_test.
    """
    values = _sample(differences)
    scale = np.abs(values).max()
    if scale == 0 or len(values) == 1:
        return 1.0
    flips = 2 ** len(values) if len(values) <= EXACT_UP_TO else RESAMPLES
    return float(
        stats.permutation_test(
            (values / scale,),
            lambda x, axis: np.round(x.mean(axis=axis), 10),
            permutation_type="samples",
            n_resamples=flips,
            vectorized=True,
            batch=4096,
            rng=np.random.default_rng(0),
        ).pvalue
    )


def holm(p: ArrayLike) -> NDArray:
    """Adjusted p (tests,) of Holm's step-down: the k-th smallest times m - k + 1, never below
    an earlier one, at most 1.

    Source: Holm, A simple sequentially rejective multiple test procedure, Scand. J. Statistics 6, 1979.
    """
    p = np.asarray(p, dtype=float)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted


def interval(differences: ArrayLike, method: str | None = None, level: float = 0.95) -> Interval:
    """Confidence interval of the mean of differences (seeds,), two seeds at least.

    Args:
        method: "t" or "bca" (at expanded levels); default by the number of seeds, see the table of this module.

    Where all differences are equal both ends are that value: no spread was seen, which on a small dev set
    (one example of RTE is .36 points) does not mean that there is none. The test still counts the seeds.
    """
    values = _sample(differences)
    if len(values) < 2:
        raise UserError("one seed has no spread: an interval needs at least two")
    method = method or ("bca" if len(values) >= BCA_FROM else "t")
    limits = {"t": t_limits, "bca": lambda x, level: bca_limits((x,), level=level)}
    if method not in limits:
        raise ValueError(f"method must be t or bca, it is {method}")
    low, high = limits[method](values, level=level)
    return Interval(float(low), float(high), method, level)


def t_limits(values: NDArray, level: float = 0.95) -> tuple[NDArray, NDArray]:
    """Both ends (...) of Student's interval of the mean of values (..., seeds)."""
    n, mean = values.shape[-1], values.mean(-1)
    half = stats.t.ppf((1 + level) / 2, n - 1) * values.std(-1, ddof=1) / math.sqrt(n)
    return mean - half, mean + half


def bca_limits(
    samples: Sequence[NDArray],
    statistic: Statistic = np.mean,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    expand: bool = True,
) -> tuple[NDArray, NDArray]:
    """Both ends (...) of the BCa bootstrap interval of a statistic of samples, each (..., seeds), resampled one by one.

    With `expand` the level is that at which a percentile interval of a normal sample has the length of
    Student's (Hesterberg); without, it is Efron's. Where BCa is undefined (a jackknife or bootstrap
    without spread) the ends are those of the percentile bootstrap; if all values are equal, that value.

    Source: Efron, Better bootstrap confidence intervals, JASA 82, 1987; Hesterberg, What teachers should
    know about the bootstrap, American Statistician 69, 2015; scipy.stats.bootstrap.
    """
    if expand:
        level = _expanded(samples, level)
    settings = {"n_resamples": resamples, "confidence_level": level, "vectorized": True, "axis": -1, "batch": 256}
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        done = stats.bootstrap(samples, statistic, method="BCa", rng=np.random.default_rng(0), **settings)
        low, high = done.confidence_interval
        if np.all(np.isfinite(low) & np.isfinite(high)):
            return low, high
        settings["n_resamples"] = 0  # the same bootstrap distribution, read by its percentiles
        plain = stats.bootstrap(samples, statistic, method="percentile", bootstrap_result=done, **settings)
    defined = np.isfinite(low) & np.isfinite(high)
    low, high = (np.where(defined, a, b) for a, b in zip((low, high), plain.confidence_interval, strict=True))
    return low, high


def _expanded(samples: Sequence[NDArray], level: float) -> float:
    """The level 1 - 2 a with a = Phi(-t sqrt(r)); r: unbiased over plug-in variance, t with Satterthwaite's degrees.

    For one sample r = n / (n - 1) and the degrees of freedom are n - 1, whatever its values.
    """
    n = np.array([sample.shape[-1] for sample in samples])
    if len(n) == 1:
        ratio, degrees = n[0] / (n[0] - 1), n[0] - 1
    else:
        variance = np.array([sample.var(ddof=1) for sample in samples]) / n
        if not variance.any():
            return level
        ratio = variance.sum() / (variance * (n - 1) / n).sum()
        degrees = variance.sum() ** 2 / (variance**2 / (n - 1)).sum()
    return float(1 - 2 * stats.norm.sf(stats.t.ppf((1 + level) / 2, degrees) * math.sqrt(ratio)))


def _sample(values: ArrayLike) -> NDArray:
    array = np.asarray(values, dtype=float)
    if array.ndim != 1 or not array.size or not np.isfinite(array).all():
        raise UserError("a sample is one finite number per seed, at least one")
    return array


def average_of_means(*samples: NDArray, axis: int = -1) -> NDArray:
    """Mean over tasks of the mean over seeds: every task weighs the same, however many seeds it has."""
    return np.mean([sample.mean(axis=axis) for sample in samples], axis=0)


def interquartile_mean(*samples: NDArray, axis: int = -1) -> NDArray:
    """Mean of the middle half of all runs pooled; a quarter, rounded down, is dropped at each end.

    Source: Agarwal et al., Deep reinforcement learning at the edge of the statistical precipice, NeurIPS 2021.
    """
    return stats.trim_mean(np.concatenate(samples, axis=axis), 0.25, axis=axis)


def stratified_interval(
    samples: Mapping[str, ArrayLike], statistic: Statistic = average_of_means, level: float = 0.95
) -> tuple[float, Interval]:
    """A statistic over tasks and its interval: seeds are resampled within each task, the tasks stay.

    It speaks of these tasks, not of others. Coverage, average of 3 tasks with spreads 2.5, 1.8 and .3, normal: 94.6 %
    with 6 seeds, 94.4 % with 10 (89.1 % and 91.6 % without expanded levels).

    Args:
        samples: task -> scores, or paired differences, (seeds,) of it; two seeds at least, numbers may differ.
        statistic: `average_of_means` or `interquartile_mean`.
    """
    values = [_sample(sample) for sample in samples.values()]
    if min(map(len, values), default=0) < 2:
        raise UserError("an interval over tasks needs at least two seeds of every task")
    low, high = bca_limits(values, statistic, level)
    return float(statistic(*values, axis=-1)), Interval(float(low), float(high), "bca", level)


def seeds_needed(difference: float, sd: float, power: float = 0.8, normal: bool = False) -> int:
    """Paired seeds with which the two-sided test at 5 % finds a true mean difference with this power; at least 6.

    By default from the power of the paired t test (noncentral t), which that of the sign-flip test follows
    from 7 seeds on; with 6 all signs must agree, Phi(difference / sd)^6. `normal` is the textbook's
    ((z_.975 + z_power) sd / difference)^2, rounded up: two seeds too few.

    At SD 1.8 half a point takes 104 seeds (normal 102), one 28 (26), two 9 (7). The design's 98, 25 and 7 are
    the normal formula at an SD of 1.758 to 1.766, which rounds to 1.8.

    Args:
        difference: not 0, in the unit of `sd`; its sign does not matter.
        sd: of the paired differences, with n - 1; 0 gives 6 seeds.
        power: above .05 and below 1.
    """
    if not (difference and math.isfinite(difference) and 0 <= sd < math.inf and ALPHA < power < 1):
        raise ValueError(f"not a difference, an SD and a power: {difference}, {sd}, {power}")
    if sd == 0:
        return MIN_SEEDS
    effect = abs(difference) / sd
    quantiles = stats.norm.ppf(1 - ALPHA / 2) + stats.norm.ppf(power)
    seeds = max(MIN_SEEDS, math.ceil((quantiles / effect) ** 2))
    while not normal and _power(seeds, effect) < power:
        seeds += 1
    return seeds


def _power(seeds: int, effect: float) -> float:
    """Power at a true difference of `effect` SDs of normal differences."""
    if seeds == MIN_SEEDS:
        return float(stats.norm.cdf(effect) ** seeds + stats.norm.cdf(-effect) ** seeds)
    critical = stats.t.ppf(1 - ALPHA / 2, seeds - 1)
    shift = effect * math.sqrt(seeds)
    return float(stats.nct.sf(critical, seeds - 1, shift) + stats.nct.cdf(-critical, seeds - 1, shift))


OTHERS = (("sst2",), ("cola",), ("qnli",), ("rte",), ("mrpc",), ("stsb",))
GLUE_AVERAGES = {
    "both": (("mnli_m", "mnli_mm"), ("qqp_acc", "qqp_f1"), *OTHERS),
    "plain": (("mnli_m",), ("qqp_acc",), *OTHERS),
}


def glue_average(cells: Mapping[str, float], convention: str) -> float:
    """The average over the eight tasks; print the convention beside it.

    Args:
        cells: mnli_m, mnli_mm, sst2, cola (Matthews), qqp_acc, qqp_f1, qnli, rte, mrpc (accuracy), stsb (mean of
            Pearson and Spearman), as in results/paper/published.csv; more are ignored.
        convention: "both" takes the means of MNLI m and mm and of QQP accuracy and F1 (AdaLoRA's Table 1),
            "plain" takes MNLI-m and QQP accuracy.

    Raises:
        UserError: a cell is missing: an average over other tasks is not comparable.
    """
    if convention not in GLUE_AVERAGES:
        raise ValueError(f"convention must be {' or '.join(GLUE_AVERAGES)}, it is {convention}")
    tasks = GLUE_AVERAGES[convention]
    missing = [name for task in tasks for name in task if name not in cells]
    if missing:
        raise UserError(f"the GLUE average needs all eight tasks; missing: {', '.join(missing)}")
    return float(np.mean([np.mean([cells[name] for name in task]) for task in tasks]))
