"""Scores of predictions from the confusion matrix; a score whose denominator is 0 is 0.

The same numbers as scikit-learn's (test_probe.py). They are computed here since the choice of threshold and C
scores twenty thousand sets of predictions in a default run, at 0.05 ms each instead of 2.3 ms (docs/log.md).
"""

from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
METRICS = ("weighted_f1", "macro_f1", "balanced_accuracy", "accuracy")


def confusion_matrix(true: Ints, predicted: Ints, n_classes: int) -> Ints:
    """(n_classes, n_classes) counts: rows true, columns predicted."""
    counts = np.bincount(true * n_classes + predicted, minlength=n_classes**2)
    return counts.reshape(n_classes, n_classes).astype(np.int64)


def score(confusion: Ints) -> dict[str, float]:
    """The METRICS of a confusion matrix. Classes without a true row have no score of their own.

    Rows that are predicted to be of such a class still count as wrong.
    """
    _, recall, f1, support = _by_class(confusion)
    there = support > 0
    return {
        "weighted_f1": float((f1 * support).sum() / support.sum()),
        "macro_f1": float(f1[there].mean()),
        "balanced_accuracy": float(recall[there].mean()),
        "accuracy": float(confusion.trace() / support.sum()),
    }


def class_scores(confusion: Ints, classes: list[str]) -> dict[str, dict[str, float]]:
    """Precision, recall, F1 and number of true rows of each class."""
    columns = zip(*(column.tolist() for column in _by_class(confusion)), strict=True)
    names = ("precision", "recall", "f1", "support")
    return {name: dict(zip(names, row, strict=True)) for name, row in zip(classes, columns, strict=True)}


def summarize(values: list[float]) -> dict[str, Any]:
    """Mean, standard deviation (n - 1; 0 for one value) and the values."""
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return {"mean": float(np.mean(values)), "sd": spread, "values": [float(value) for value in values]}


def finite_or_none(value: float) -> float | None:
    """As JSON and tables keep a number that may be NaN or infinite: None."""
    return float(value) if np.isfinite(value) else None


def _by_class(confusion: Ints) -> tuple[npt.NDArray[np.float64], ...]:
    hits = confusion.diagonal().astype(np.float64)
    support, claimed = confusion.sum(1), confusion.sum(0)
    precision, recall = hits / np.maximum(claimed, 1), hits / np.maximum(support, 1)
    return precision, recall, 2 * hits / np.maximum(support + claimed, 1), support.astype(np.float64)
