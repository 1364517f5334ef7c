"""The decision rule of a study: bounds as published, estimates by hand, errors as promised."""

import math

import numpy as np
import pytest
from scipy import stats

from increlora.analysis import sequential
from increlora.analysis.sequential import HELPS, HURTS, SAME, UNDECIDED, Plan
from increlora.errors import UserError

SETTINGS = {
    "about": "a test", "experiment": "x", "method": "increlora", "controls": ["uniform"], "split": "dev",
    "seeds": {"a": 12, "b": 24}, "first_seed": 1, "tuning_seeds": [0, 1], "expected_sd": {"a": [1.0], "b": [1.0]},
    "standard_error": 0.2, "most": 2, "margin": 0.3,
}  # fmt: skip


def plan(**changes) -> Plan:
    return Plan(**(SETTINGS | changes))


# Jennison and Turnbull, Group Sequential Methods, table 2.3
@pytest.mark.parametrize(
    ("looks", "alpha", "c"), [(1, 0.05, 1.960), (2, 0.05, 1.977), (3, 0.05, 2.004), (5, 0.05, 2.040), (3, 0.01, 2.595)]
)
def test_the_bounds_are_the_published_ones(looks, alpha, c):
    expected = c * np.sqrt(looks / np.arange(1, looks + 1))
    np.testing.assert_allclose(sequential.obrien_fleming(looks, alpha), expected, atol=1e-3)


def test_three_looks_at_five_per_cent_and_one_sided_at_half_of_it():
    np.testing.assert_allclose(sequential.obrien_fleming(3, 0.05), [3.471, 2.454, 2.004], atol=1e-3)
    np.testing.assert_allclose(sequential.obrien_fleming(3, 0.025, sides=1), [3.471, 2.454, 2.004], atol=2e-3)


def test_an_estimate_by_hand():
    found = sequential.estimate({"a": np.array([1.0, 2, 3]), "b": np.array([0.0, 2])}, {"a": 0.5, "b": 0.5})
    # variances of the means 1/3 and 1; D = (2 + 1) / 2; var D = 1/12 + 1/4; df = (1/3)^2 / ((1/12)^2 / 2 + (1/4)^2 / 1)
    assert found.mean == pytest.approx(1.5) and found.error == pytest.approx(math.sqrt(1 / 3))
    assert found.freedom == pytest.approx(1.684, abs=1e-3)
    assert stats.norm.sf(found.z()) == pytest.approx(stats.t.sf(1.5 * math.sqrt(3), found.freedom))
    low, high = found.interval(stats.norm.isf(0.025))
    assert (high - low) / 2 == pytest.approx(stats.t.isf(0.025, found.freedom) * math.sqrt(1 / 3))
    assert found.z(low) == pytest.approx(1.959964) == -found.z(high)


def test_weights_are_planned_precisions():
    shares = sequential.weights({"a": 12, "b": 24}, {"a": 1.0, "b": 2.0})
    assert shares == {"a": pytest.approx(12 / 18), "b": pytest.approx(6 / 18)}


def test_the_pilot_sees_spread_and_no_difference():
    drawn = np.random.default_rng(0).normal(0, 0.7, (4000, 2))
    assert sequential.pilot_sd(drawn) == pytest.approx(0.7, rel=0.05)
    moved = drawn + np.linspace(-50, 50, 4000)[:, None]
    assert sequential.pilot_sd(moved) == pytest.approx(sequential.pilot_sd(drawn))
    drawn[:400] += [[0, 80]]  # collapsed runs
    assert sequential.pilot_sd(drawn) < 0.9


def test_the_pilot_raises_seeds_alike_in_whole_looks_and_never_lowers_them():
    # 12 + 24 seeds at SD 1: the standard error is 1/6
    assert sequential.needed_seeds(plan(), {"a": 1.0, "b": 1.0}) == {"a": 12, "b": 24}
    assert sequential.needed_seeds(plan(standard_error=0.15), {"a": 1.0, "b": 1.0}) == {"a": 15, "b": 30}  # x 1.235
    assert sequential.needed_seeds(plan(), {"a": 9.0, "b": 9.0}) == {"a": 24, "b": 48}
    assert plan().sizes({"a": 12, "b": 24})[1] == {"a": 8, "b": 16}


def decided(mean: float, error: float, looks: int = 3) -> tuple[int, int]:
    same = [sequential.Estimate(np.array(mean), np.array(error), np.array(1e9))] * looks
    return tuple(int(value) for value in sequential.decide(plan(), same))


def test_outcomes_by_hand():
    assert decided(0.348, 0.1) == (HELPS, 1) and decided(0.346, 0.1) == (HELPS, 2)  # 3.471 errors, then 2.454
    assert decided(-0.348, 0.1) == (HURTS, 1)
    assert decided(0.19, 0.1) == (UNDECIDED, 0) and decided(0.21, 0.1, looks=2) == (UNDECIDED, 0)
    assert decided(0.0, 0.1) == (SAME, 1)  # 3 errors from the margin; one-sided bounds 2.961, 2.094, 1.710
    assert decided(0.0, 0.14) == (SAME, 2) and decided(0.0, 0.18) == (UNDECIDED, 0)
    assert decided(0.2, 0.04) == (HELPS, 1)  # below the margin as well: the difference is the outcome


def test_errors_are_what_they_promise():
    random, repetitions, rule = np.random.default_rng(1), 4000, plan(margin=1e-9)
    shares, sizes = {"a": 0.4, "b": 0.6}, rule.sizes(rule.seeds)

    def outcomes(rule: Plan, mean: float) -> np.ndarray:
        drawn = {task: random.normal(mean, 1.0, (repetitions, n)) for task, n in rule.seeds.items()}
        return sequential.decide(rule, sequential.estimates(drawn, shares, sizes))[0]

    two_sided = outcomes(rule, 0.0)
    assert np.mean(two_sided != UNDECIDED) == pytest.approx(0.05, abs=0.011)  # 3 standard errors
    assert np.mean(two_sided == HELPS) == pytest.approx(0.025, abs=0.008)
    at_the_margin = outcomes(plan(margin=2.0), 2.0)
    assert np.mean(at_the_margin == SAME) == 0  # shown to be a difference long before
    near = outcomes(plan(margin=0.3), 0.3)
    assert np.mean(near == SAME) < 0.061 and np.mean(near == HURTS) < 0.003


def test_tasks_in_general_are_a_t_interval_of_means_where_all_tasks_are_as_precise():
    values = np.array([-1.0, 0.0, 1.0])
    found = sequential.across_tasks({"a": values + 0.5, "b": values + 2.5, "c": values + 0.9})
    by_t = stats.ttest_1samp([0.5, 2.5, 0.9], 0.0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((by_t.low, by_t.high))
    assert found.mean == pytest.approx(1.3) and found.sd == pytest.approx(math.sqrt(1.12 - 1 / 3))  # moments, by hand
    assert found.p == pytest.approx(stats.chi2.sf(2 * 1.12 * 3, 2))


def test_plans_that_cannot_be_are_refused():
    for changes, words in (({"seeds": {"a": 10}}, "seeds of a: a multiple"), ({"margin": 0}, "margin")):
        with pytest.raises(UserError, match=words):
            plan(**changes)
    for content in ({**SETTINGS, "seed": 1}, {key: value for key, value in SETTINGS.items() if key != "split"}):
        with pytest.raises(UserError, match=r"^x: se?p?\w+: unknown or missing"):
            Plan.of(content, "x")
