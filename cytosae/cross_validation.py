"""One repeat of the probe: folds of whole groups, a fit per threshold, the threshold chosen within the training side.

Everything is a function of the barcodes, the labels, the groups and a seed, so that a permutation test can repeat all
of it on shuffled labels. Folds are drawn first; then each stands alone, so that threads can share them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .folds import assign_folds
from .scores import confusion_matrix, score

Float = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Levels = npt.NDArray[np.int8]
Strength = Callable[[int], float]  # number of training rows -> scikit-learn's C


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What every repeat has in common."""

    n_folds: int
    n_inner_folds: int
    n_classes: int
    strength: Strength


@dataclass(frozen=True)
class Sweep:
    """Fits on one training side, one per threshold; t thresholds, c classes."""

    probabilities: Float  # (t, tested rows, c)
    n_kept: list[int]  # latents that count
    n_unconverged: int  # fits that did not converge
    n_unseen: int  # fits whose training side lacked a class


class Thresholds(Protocol):
    """Barcodes, and how they are fitted along the thresholds: `threshold_grams.py` or `threshold_columns.py`."""

    @property
    def n_thresholds(self) -> int:
        """How many fits a sweep has."""

    def levels(self, training: Bools) -> Levels:
        """(k, m) number of thresholds that each latent reaches in each of k training sets, (k, n) booleans."""

    def sweep(self, levels: Levels, labels: Ints, training: Bools, tested: Bools, plan: Plan) -> Sweep:
        """Fit the training rows, whose `levels` are given, at every threshold, and predict the tested ones."""


@dataclass(frozen=True)
class Division:
    """Who is left out when, by the number of a fold."""

    fold_of: Ints  # (n,)
    inner_of: Ints  # (n_folds, n) folds within the training side of each fold; -1 outside


@dataclass(frozen=True)
class Fold:
    """What one fold found."""

    sweep: Sweep  # its rows, predicted by the others
    chosen: int  # threshold chosen within the training side
    n_unconverged: int  # of all its fits, the inner ones included
    n_unseen: int


@dataclass(frozen=True)
class Repeat:
    """What one repeat found; t thresholds, n rows, c classes."""

    fold_of: Ints  # (n,)
    probabilities: Float  # (t, n, c), each row by the fit that has not seen its group
    chosen: Ints  # (n_folds,) threshold chosen within each training side
    n_kept: Ints  # (n_folds, t) latents that count
    n_unconverged: int
    n_unseen: int

    @property
    def selected(self) -> Float:
        """(n, c) probabilities at the threshold that was chosen for each row's fold."""
        return self.probabilities[self.chosen[self.fold_of], np.arange(len(self.fold_of))]


def run_repeat(barcodes: Thresholds, labels: Ints, groups: Ints, plan: Plan, rng: np.random.Generator) -> Repeat:
    """Predict every row at every threshold, by fits on the other folds."""
    division = divide(labels, groups, plan, rng)
    return gather(division, [run_fold(barcodes, labels, division, fold, plan) for fold in range(plan.n_folds)])


def divide(labels: Ints, groups: Ints, plan: Plan, rng: np.random.Generator) -> Division:
    """Draw the folds, and the folds within."""
    fold_of = assign_folds(labels, groups, plan.n_folds, rng)
    inner_of = np.full((plan.n_folds, len(labels)), -1)
    for fold in range(plan.n_folds):
        training = fold_of != fold
        inner_of[fold, training] = assign_folds(labels[training], groups[training], plan.n_inner_folds, rng)
    return Division(fold_of, inner_of)


def run_fold(barcodes: Thresholds, labels: Ints, division: Division, fold: int, plan: Plan) -> Fold:
    """Predict the rows of one fold.

    Its threshold is the one with the best weighted F1 in a cross-validation within its training side (the lowest of
    equals): its latents' means, too, are of the inner training rows alone. Of a single threshold nothing is chosen.
    """
    training, inner_of = division.fold_of != fold, division.inner_of[fold]
    n_inner = plan.n_inner_folds if barcodes.n_thresholds > 1 else 0
    sides = np.stack([training, *(training & (inner_of != inner) for inner in range(n_inner))])
    levels = barcodes.levels(sides)
    predicted = np.zeros((barcodes.n_thresholds, len(labels)), np.int64)
    sweeps = []
    for inner in range(n_inner):
        tested = inner_of == inner
        sweeps.append(barcodes.sweep(levels[1 + inner], labels, sides[1 + inner], tested, plan))
        predicted[:, tested] = sweeps[-1].probabilities.argmax(2)
    f1 = [score(confusion_matrix(labels[training], row[training], plan.n_classes))["weighted_f1"] for row in predicted]
    sweeps.append(barcodes.sweep(levels[0], labels, training, ~training, plan))
    return Fold(
        sweeps[-1],
        chosen=int(np.argmax(np.round(f1, 12))),
        n_unconverged=sum(each.n_unconverged for each in sweeps),
        n_unseen=sum(each.n_unseen for each in sweeps),
    )


def gather(division: Division, folds: Sequence[Fold]) -> Repeat:
    """The folds of a division, put together."""
    n_thresholds, _, n_classes = folds[0].sweep.probabilities.shape
    probabilities = np.zeros((n_thresholds, len(division.fold_of), n_classes))
    for number, fold in enumerate(folds):
        probabilities[:, division.fold_of == number] = fold.sweep.probabilities
    return Repeat(
        division.fold_of,
        probabilities,
        chosen=np.array([fold.chosen for fold in folds]),
        n_kept=np.array([fold.sweep.n_kept for fold in folds]),
        n_unconverged=sum(fold.n_unconverged for fold in folds),
        n_unseen=sum(fold.n_unseen for fold in folds),
    )
