"""Restart warmup against the learning rates that the authors' code wrote, and at its corners."""

import json

import pytest
from conftest import ROOT

from increlora.schedule import multiplier

TRACE = json.loads((ROOT / "tests" / "reference_trace" / "trace.json").read_text())


def test_every_learning_rate_of_the_reference_trace():
    given = TRACE["hyperparameters"]
    # groups: decay, no decay, then one per growth, the first of them made at step 0
    born = [0, 0, 1, *(event["step"] + 1 for event in TRACE["events"])]
    for step, theirs in enumerate(TRACE["lr"]):
        ours = [given["lr"] * multiplier(step, b, given["steps"], given["warmup"]) for b in born]
        assert ours[: len(theirs)] == pytest.approx(theirs, abs=1e-12)


def test_corners():
    assert multiplier(0, 0, 100, 10) == 0.0
    assert multiplier(5, 0, 100, 10) == 0.5
    assert multiplier(10, 0, 100, 10) == 1.0
    assert multiplier(100, 0, 100, 10) == 0.0
    assert multiplier(60, 60, 100, 10) == 0.0  # a newborn group starts at 0
    assert multiplier(85, 60, 100, 10) == pytest.approx(15 / 30)
    assert multiplier(0, 0, 100, 0) == 1.0  # no warmup
    assert multiplier(59, 60, 100, 10) == 0.0  # not born yet
    assert multiplier(3, 0, 5, 10) == 0.3  # a life shorter than the warmup never decays
