"""The metrics against numbers computed by hand, and where they are undefined."""

import math

import evaluate
import pytest
from naming import naming

from increlora.glue.metrics import METRICS, GlueMetric


def compute(name, predictions, labels):
    return GlueMetric([name]).compute(predictions=predictions, references=labels)[name]


def test_class_metrics_by_hand():
    # 3 true positives, 1 false positive, 2 false negatives, 4 true negatives
    labels = [1, 1, 1, 0, 1, 1, 0, 0, 0, 0]
    predictions = [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    values = GlueMetric(["accuracy", "f1", "matthews_correlation"]).compute(predictions=predictions, references=labels)
    assert values["accuracy"] == pytest.approx(0.7)
    assert values["f1"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 2))
    assert values["matthews_correlation"] == pytest.approx((3 * 4 - 1 * 2) / math.sqrt(4 * 5 * 5 * 6))
    assert all(type(value) is float for value in values.values())


def test_f1_is_of_class_one():
    assert compute("f1", [0, 0, 0, 1], [0, 0, 1, 1]) == pytest.approx(2 / 3)
    assert compute("f1", [0, 0], [0, 0]) == 0.0


def test_accuracy_of_three_classes():
    assert compute("accuracy", [0, 1, 2, 2], [0, 1, 2, 0]) == 0.75


def test_correlations_by_hand():
    predictions, labels = [1.0, 2.0, 3.0, 5.0], [1.0, 4.0, 2.0, 5.0]
    # means 2.75 and 3; deviations (-1.75, -.75, .25, 2.25) and (-2, 1, -1, 2)
    assert compute("pearson", predictions, labels) == pytest.approx(7.0 / math.sqrt(8.75 * 10))
    # ranks (1, 2, 3, 4) and (1, 3, 2, 4): 1 - 6 * 2 / (4 * 15)
    assert compute("spearmanr", predictions, labels) == pytest.approx(0.8)


def test_tied_ranks_are_averaged():
    # ranks (1.5, 1.5, 3) and (1, 2, 3)
    assert compute("spearmanr", [0.0, 0.0, 7.0], [1.0, 2.0, 3.0]) == pytest.approx(1.5 / math.sqrt(1.5 * 2))


def test_constant_predictions_have_no_correlation():
    for value in [0, 1]:
        for name in ["matthews_correlation", "pearson", "spearmanr"]:
            with naming((name, value)):
                assert compute(name, [value] * 4, [0, 1, 1, 0]) == 0.0


def test_a_diverged_regression_scores_zero():
    for bad in [float("nan"), float("inf"), -float("inf")]:
        for name in ["pearson", "spearmanr"]:
            with naming((name, bad)):
                assert compute(name, [bad, 1.0, 2.0], [0.0, 1.0, 2.0]) == 0.0
                assert compute(name, [1.0], [1.0]) == 0.0


def test_it_is_a_metric_of_evaluate():
    metric = GlueMetric(["accuracy"])
    assert isinstance(metric, evaluate.Metric)
    metric.add_batch(predictions=[0, 1], references=[0, 1])
    metric.add_batch(predictions=[1], references=[0])
    assert metric.compute() == {"accuracy": pytest.approx(2 / 3)}


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="Mismatch"):
        compute("accuracy", [0, 1, 1], [0, 1])


def test_names_are_the_functions():
    assert list(METRICS) == ["accuracy", "f1", "matthews_correlation", "pearson", "spearmanr"]


def test_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path))
    assert compute("accuracy", [1], [1]) == 1.0
    assert list(tmp_path.iterdir()) == []
