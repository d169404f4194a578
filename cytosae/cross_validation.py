"""One repeat of the probe: folds of whole groups, a fit per threshold, the threshold chosen within the training side.

Everything is a function of the barcodes, the labels, the groups and a seed, so that a permutation test can repeat all
of it on shuffled labels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .folds import assign_folds
from .logistic import RowFit, fit_rows
from .scores import confusion_matrix, score
from .threshold_grams import ThresholdGrams

Float = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Strength = Callable[[int], float]  # number of training rows -> scikit-learn's C


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What every repeat has in common."""

    n_folds: int
    n_inner_folds: int
    n_classes: int
    strength: Strength


@dataclass(frozen=True)
class Repeat:
    """What one repeat found; t thresholds, n rows, c classes."""

    fold_of: Ints  # (n,)
    probabilities: Float  # (t, n, c), each row by the fit that has not seen its group
    chosen: Ints  # (n_folds,) threshold chosen within each training side
    n_kept: Ints  # (n_folds, t) latents that count
    n_unconverged: int  # fits that did not converge
    n_unseen: int  # fits whose training side lacked a class

    @property
    def selected(self) -> Float:
        """(n, c) probabilities at the threshold that was chosen for each row's fold."""
        return self.probabilities[self.chosen[self.fold_of], np.arange(len(self.fold_of))]


def run_repeat(grams: ThresholdGrams, labels: Ints, groups: Ints, plan: Plan, rng: np.random.Generator) -> Repeat:
    """Predict every row at every threshold, by fits on the other folds.

    The threshold of a fold is the one with the best weighted F1 in a cross-validation within its training side (the
    lowest of equals): its latents' means, too, are of the inner training rows alone.
    """
    fold_of = assign_folds(labels, groups, plan.n_folds, rng)
    probabilities = np.zeros((grams.n_thresholds, len(labels), plan.n_classes))
    chosen, n_kept, fits = list[int](), list[list[int]](), list[RowFit]()
    for fold in range(plan.n_folds):
        training = fold_of != fold
        inner_of = np.full(len(labels), -1)
        inner_of[training] = assign_folds(labels[training], groups[training], plan.n_inner_folds, rng)
        sides = np.stack([training, *(training & (inner_of != inner) for inner in range(plan.n_inner_folds))])
        levels = grams.levels(sides)
        predicted = np.zeros((grams.n_thresholds, len(labels)), np.int64)
        for inner in range(plan.n_inner_folds):
            tested = inner_of == inner
            found, _ = _fit_path(grams, levels[1 + inner], labels, sides[1 + inner], tested, plan, fits)
            predicted[:, tested] = found.argmax(2)
        f1 = [
            score(confusion_matrix(labels[training], row[training], plan.n_classes))["weighted_f1"] for row in predicted
        ]
        chosen.append(int(np.argmax(np.round(f1, 12))))
        probabilities[:, ~training], kept = _fit_path(grams, levels[0], labels, training, ~training, plan, fits)
        n_kept.append(kept)
    return Repeat(
        fold_of,
        probabilities,
        np.array(chosen),
        np.array(n_kept),
        n_unconverged=sum(not fit.converged for fit in fits),
        n_unseen=sum(len(fit.present) < plan.n_classes for fit in fits),
    )


def _fit_path(
    grams: ThresholdGrams,
    levels: npt.NDArray[np.int8],
    labels: Ints,
    training: npt.NDArray[np.bool_],
    tested: npt.NDArray[np.bool_],
    plan: Plan,
    fits: list[RowFit],
) -> tuple[Float, list[int]]:
    """(t, tested rows, c) probabilities, one fit per threshold; `fits` receives them. Equal latents, one fit."""
    all_grams, n_kept = grams.grams(levels)
    rows = []
    for t, gram in enumerate(all_grams):
        if not (t and n_kept[t] == n_kept[t - 1]):  # fewer and fewer latents: as many are the same
            strength = plan.strength(int(training.sum()))
            fit = fit_rows(gram[np.ix_(training, training)], labels[training], plan.n_classes, strength)
            fits.append(fit)
            found = fit.probabilities(gram[np.ix_(tested, training)])
        rows.append(found)
    return np.stack(rows), n_kept
