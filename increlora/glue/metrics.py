"""The metrics of GLUE as a local `evaluate.Metric`: scipy and scikit-learn, no network, nothing written.

Importing `evaluate` takes seconds, so `tasks.py` imports this module when it first evaluates.
"""

from collections.abc import Callable, Sequence
from typing import Any

import evaluate
import numpy as np
from evaluate.info import Features, Value
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Share of equal class ids."""
    return float(accuracy_score(labels.astype(int), predictions.astype(int)))


def f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """F1 of class 1; 0.0 where neither predictions nor labels have it."""
    return float(f1_score(labels.astype(int), predictions.astype(int), zero_division=0.0))


def matthews_correlation(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Matthews correlation of class ids; 0.0 for constant predictions."""
    return float(matthews_corrcoef(labels.astype(int), predictions.astype(int)))


def pearson(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Pearson correlation; 0.0 where it is undefined."""
    return _correlation(stats.pearsonr, predictions, labels)


def spearmanr(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Spearman rank correlation; 0.0 where it is undefined."""
    return _correlation(stats.spearmanr, predictions, labels)


def _correlation(correlate: Callable[..., Any], predictions: np.ndarray, labels: np.ndarray) -> float:
    """A correlation; 0.0 for constant or non-finite predictions, as of a diverged run."""
    if not np.isfinite(predictions).all() or np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return 0.0
    value = float(correlate(predictions, labels).statistic)
    return value if np.isfinite(value) else 0.0


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    metric.__name__: metric for metric in (accuracy, f1, matthews_correlation, pearson, spearmanr)
}


class GlueMetric(evaluate.Metric):
    """Chosen metrics of one task, in natural units (accuracy and F1 0..1, correlations -1..1).

    Args:
        names: keys of `METRICS`.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        super().__init__(keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Accuracy, F1, Matthews, Pearson and Spearman correlation as GLUE defines them.",
            citation="Wang et al., GLUE: A Multi-Task Benchmark and Analysis Platform, ICLR 2019.",
            inputs_description="predictions and references: class ids, or scores for regression.",
            features=Features({"predictions": Value("float64"), "references": Value("float64")}),
        )

    def _build_data_dir(self) -> str:
        # The base class makes a folder in the user's cache, which in-memory use never needs and which
        # may be read-only or shared by parallel runs.
        return ""

    def _compute(self, predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
        arrays = np.asarray(predictions, dtype=np.float64), np.asarray(references, dtype=np.float64)
        return {name: METRICS[name](*arrays) for name in self.names}
