"""95% intervals of scores: a bootstrap over whole groups, with the same draws for all methods.

    draw b     groups drawn with replacement, as many as there are: a weight for each group, hence for each row
    score      of the weighted rows, averaged over a method's repeats
    interval   the 2.5 and 97.5% quantiles over draws, their distances from the score times 1.3: with other patients
               the fits would change, too, and a bootstrap of predictions does not contain that
    difference barcode minus another method, draw by draw: a paired interval, since both predict the same patients

Nothing is fitted again. The factor is empirical (coverage by simulation: docs/benchmarks.md). The scores of all draws
are computed together, which takes 0.1 s for a repeat of one method; calls of scikit-learn, draw by draw, take 86 s
(docs/log.md). Twin with scikit-learn: test_probe.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
N_DRAWS = 1000
_WIDER = 1.3  # SD of a cross-validated score over cohorts divided by that over draws: 1.14 to 1.38 in simulations
_BINS = 10  # of a calibration
_MOST_NUMBERS = 1 << 22  # draws x rows that are worked on at once


@dataclass(frozen=True)
class Draws:
    """Bootstrap draws of groups; row 0 is the data as they are."""

    weights: Float  # (1 + draws, groups): how often each group is drawn
    groups: Ints  # (n,) of each row

    @property
    def of_rows(self) -> Float:
        """(1 + draws, n)."""
        return self.weights[:, self.groups]


def draw_groups(groups: Ints, seed: Sequence[int], n_draws: int = N_DRAWS) -> Draws:
    """Draw whole groups with replacement.

    Parameters
    ----------
    groups : (n,) numbers from 0
    """
    n = int(groups.max()) + 1
    drawn = np.random.default_rng(list(seed)).multinomial(n, np.full(n, 1 / n), n_draws)
    return Draws(np.vstack([np.ones(n), drawn]), groups)


def scores_of_draws(
    probabilities: Sequence[Float], labels: Ints, draws: Draws, folds: Sequence[Ints]
) -> dict[str, Float]:
    """Each score (1 + draws,), averaged over repeats; NaN where a draw has none.

    AUROC compares pairs of rows of the same fold. Fits of different folds have different scales; and even predictions
    by the shares of the classes would rank rows across folds (below 0.5: a class that is rare in a fold is common in
    its training rows).

    Parameters
    ----------
    probabilities : of each repeat, (n, classes)
    labels : (n,)
    folds : of each repeat, or more, (n,)
    """
    of_repeats = [_one_repeat(p, labels, draws, fold_of) for p, fold_of in zip(probabilities, folds, strict=False)]
    return {name: np.mean([found[name] for found in of_repeats], axis=0) for name in of_repeats[0]}


def interval(scores: Float, wider: float = _WIDER) -> dict[str, float | None]:
    """95% interval, `low` and `high`, of a score (1 + draws,) or of a difference of two; None where there is none.

    Parameters
    ----------
    wider : factor on the distances from the score; above 1 since other rows would also change the fit
    """
    observed, drawn = scores[0], scores[1:][np.isfinite(scores[1:])]
    if not np.isfinite(observed) or len(drawn) < len(scores[1:]) / 2:
        return {"low": None, "high": None}
    low, high = observed + wider * (np.quantile(drawn, [0.025, 0.975]) - observed)
    return {"low": float(low), "high": float(high)}


def possible(name: str, ends: dict[str, float | None]) -> dict[str, float | None]:
    """An interval of a score, cut to what a score can reach: at least 0 and, except for losses, at most 1."""
    most = np.inf if name in ("log_loss", "brier") else 1.0
    return {key: None if end is None else float(min(max(end, 0.0), most)) for key, end in ends.items()}


def faultless(probabilities: Sequence[Float], labels: Ints, groups: Ints) -> list[str]:
    """A warning where no row is predicted wrongly: draws of what is right are all right, and the truth need not be.

    The share is the exact upper 95% limit (Clopper and Pearson 1934) of none in so many groups.
    """
    n = len(np.unique(groups))
    if any((p.argmax(1) != labels).any() for p in probabilities):
        return []
    return [
        f"no prediction of the barcodes is wrong, so intervals of F1 and accuracy have no width and say too much: "
        f"with {n:,} independent groups, up to {1 - 0.025 ** (1 / n):.0%} of others could be predicted wrongly"
    ]


def calibration(probabilities: Sequence[Float], labels: Ints) -> list[dict[str, float]]:
    """Confidence (the largest probability) and accuracy in bins of equal width, over all repeats; no empty bins."""
    confidence = np.concatenate([p.max(1) for p in probabilities])
    is_right = np.concatenate([p.argmax(1) == labels for p in probabilities])
    bins = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    return [
        {
            "n": int((bins == b).sum()),
            "confidence": float(confidence[bins == b].mean()),
            "accuracy": float(is_right[bins == b].mean()),
        }
        for b in np.unique(bins)
    ]


def calibration_error(table: list[dict[str, float]]) -> float:
    """Expected calibration error: |confidence - accuracy|, averaged over predictions."""
    n = sum(row["n"] for row in table)
    return float(sum(row["n"] * abs(row["confidence"] - row["accuracy"]) for row in table) / n)


def _one_repeat(p: Float, labels: Ints, draws: Draws, fold_of: Ints) -> dict[str, Float]:
    n_classes, w = p.shape[1], draws.of_rows
    cell = labels * n_classes + p.argmax(1)
    of_group = np.zeros((draws.weights.shape[1], n_classes**2))
    np.add.at(of_group, (draws.groups, cell), 1)
    confusion = (draws.weights @ of_group).reshape(-1, n_classes, n_classes)
    hits, support, claimed = confusion.diagonal(axis1=1, axis2=2), confusion.sum(2), confusion.sum(1)
    f1 = 2 * hits / np.maximum(support + claimed, 1)
    there, n = support > 0, np.maximum(support.sum(1), 1)
    one_hot = labels[:, None] == np.arange(n_classes)
    of_true = np.clip(p[one_hot], 1e-15, 1)
    within = [_areas_of_folds(p[:, k], one_hot[:, k], w, fold_of) for k in range(n_classes)]
    precision = [_areas(p[:, k], one_hot[:, k], w)[2] for k in range(n_classes)]
    return {
        "weighted_f1": (f1 * support).sum(1) / n,
        "macro_f1": (f1 * there).sum(1) / np.maximum(there.sum(1), 1),
        "balanced_accuracy": (hits / np.maximum(support, 1)).sum(1) / np.maximum(there.sum(1), 1),
        "accuracy": hits.sum(1) / n,
        "auroc": _mean(within),
        "auprc": _mean(precision),
        "log_loss": (w @ -np.log(of_true)) / np.maximum(w.sum(1), 1),
        "brier": (w @ ((p - one_hot) ** 2).sum(1)) / np.maximum(w.sum(1), 1),
    }


def _mean(of_classes: list[Float]) -> Float:
    """The mean over the classes that a draw has; NaN where it has none."""
    values = np.array(of_classes)
    there = np.isfinite(values)
    total = np.where(there, values, 0).sum(0)
    return np.where(there.any(0), total / np.maximum(there.sum(0), 1), np.nan)


def _areas_of_folds(score: Float, is_class: npt.NDArray[np.bool_], weights: Float, fold_of: Ints) -> Float:
    """(draws,) AUROC of one class against the rest, over all pairs of rows of the same fold."""
    won, pairs = np.zeros((2, len(weights)))
    for fold in np.unique(fold_of):
        mine = fold_of == fold
        found = _areas(score[mine], is_class[mine], weights[:, mine])
        won, pairs = won + found[0], pairs + found[1]
    return np.where(pairs > 0, won / np.maximum(pairs, 1), np.nan)


def _areas(score: Float, is_class: npt.NDArray[np.bool_], weights: Float) -> tuple[Float, Float, Float]:
    """For each draw, one class against the rest: pairs in the right order (ties half), pairs, average precision.

    As scikit-learn's `roc_auc_score` and `average_precision_score` with `sample_weight`, for all draws at once.
    """
    order = np.argsort(-score, kind="stable")
    levels = np.flatnonzero(np.diff(score[order], prepend=np.inf))  # where rows of one score begin
    won, pairs = np.zeros((2, len(weights)))
    auprc = np.full(len(weights), np.nan)
    step = max(1, _MOST_NUMBERS // len(score))
    for first in range(0, len(weights), step):
        w = weights[first : first + step, order]
        hits = np.add.reduceat(np.where(is_class[order], w, 0), levels, axis=1)
        misses = np.add.reduceat(np.where(is_class[order], 0, w), levels, axis=1)
        n_hits, n_misses = hits.sum(1), misses.sum(1)
        above = np.cumsum(hits, 1)
        some = slice(first, first + len(w))
        won[some], pairs[some] = (misses * (above - hits / 2)).sum(1), n_hits * n_misses
        precision = above / np.maximum(above + np.cumsum(misses, 1), 1e-12)
        auprc[some] = np.where(n_hits > 0, (precision * hits).sum(1) / np.maximum(n_hits, 1), np.nan)
    return won, pairs, auprc
