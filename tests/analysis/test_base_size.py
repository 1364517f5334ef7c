"""Study B's tables by hand, on made-up runs."""

import numpy as np
import pytest
from scipy import stats

from increlora.analysis import base_size
from increlora.analysis.study_tables import learning_rates

KINDS = {"query": r".*\.q", "key": r".*\.k", "value": r".*\.v"}
PUBLISHED = {"kind": {"query": 1.0, "key": 2.0, "value": 3.0}, "layer": {"0": 5.0, "1": 7.0}}
OURS = np.array([0.50, 0.51, 0.52, 0.53, 0.54])


def run(method: str, seed: int, score: float, task: str = "cola", added=(0, 0, 0, 0, 0, 0), rate: float = 1e-3) -> dict:
    """A made-up result: `score` on dev and held-out examples, ranks added to q, k, v of layer 0, then of layer 1."""
    names = [f"layer.{layer}.{kind}" for layer in (0, 1) for kind in "qkv"]
    metrics = {"dev+holdout": {"score": score}, "holdout": {"score": score}}
    return {
        "status": "finished",
        "run": {
            "method": method,
            "seed": seed,
            "task": task,
            "backbone": "mpnet_base",
            "budget": "r2",
            "overrides": ["experiment=study_b"],
        },
        "code": {"gpu": "H200"},
        "config": {"train": {"precision": "bf16", "learning_rate": rate}, "method": {"kinds": KINDS}},
        "scores": {name: {"score": score, "metrics": metrics} for name in ("last", "best", "clean")},
        "curve": [{"scores": metrics}],
        "ranks": {"start": dict.fromkeys(names, 1), "last": {n: 1 + a for n, a in zip(names, added, strict=True)}},
    }


def arm(method: str, values, task: str = "cola", **other) -> list[dict]:
    return [run(method, 41 + number, value, task, **other) for number, value in enumerate(values)]


def test_an_arm_without_all_seeds_is_not_shown_and_trials_are_no_seeds():
    runs = [*arm("increlora", OURS), *arm("lora", OURS[:4]), run("lora", 40, 0.5)]
    assert {task: list(arms) for task, arms in base_size.complete(runs).items()} == {"cola": ["increlora"]}


@pytest.mark.parametrize(("on_stsb", "expected"), [(1, "supported"), (-1, "undecided")])
def test_a_verdict_needs_the_same_side_of_zero_on_both_tasks(on_stsb, expected):
    gaps = np.array([0.010, 0.012, 0.011, 0.009, 0.013])
    runs = [*arm("increlora", OURS), *arm("lora", OURS - gaps)]
    runs += [*arm("increlora", OURS, "stsb"), *arm("lora", OURS - on_stsb * gaps, "stsb")]
    table = base_size.differences(base_size.complete(runs))
    # mean 1.1 points, variance .025; half width t(1 - .0125 / 2, 4 degrees of freedom) * sqrt(.025 / 5)
    half = stats.t.ppf(1 - 0.0125 / 2, 4) * np.sqrt(0.025 / 5)
    (row,) = (row for row in table.rows if row[0] == "CoLA")
    assert row[1:] == ["LoRA", f"+1.10 [{1.1 - half:+.2f}, {1.1 + half:+.2f}]", "5", expected]


def test_ranks_added_against_the_published_ones_by_hand():
    # kinds: q 1, k 2, v 3 as published; layers: 4 and 2, the other way round
    runs = arm("increlora", OURS, "rte", added=(1, 1, 2, 0, 1, 1))
    found = base_size.correlations({r["run"]["seed"]: r for r in runs}, PUBLISHED)
    assert found["kind"] == pytest.approx([1] * 5) and found["layer"] == pytest.approx([-1] * 5)
    rows = base_size.allocation(base_size.complete(runs), PUBLISHED).rows
    assert [row[2:4] + row[-1:] for row in rows] == [
        ["kinds", "+1.00", "supported"],
        ["layers", "-1.00", "contradicted"],
    ]


def test_the_chosen_rate_and_whether_it_lies_at_the_edge():
    for scores, shown in (
        ((0.4, 0.6, 0.5), ["0.0005: 40.00", "0.001: **60.00**", "0.002: 50.00", ""]),
        ((0.4, 0.5, 0.6), ["0.0005: 40.00", "0.001: 50.00", "0.002: **60.00**", "yes"]),
    ):
        rates = zip((5e-4, 1e-3, 2e-3), scores, strict=True)
        trials = [run("increlora", 40, score, rate=rate) for rate, score in rates]
        (row,) = learning_rates("some", trials).rows
        assert row == ["CoLA", "IncreLoRA", *shown]
