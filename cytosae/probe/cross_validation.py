"""One repeat of the probe: folds of whole groups, a fit for each threshold, threshold and C chosen within the training.

All of it is a function of barcodes, labels, groups and a seed, so that a permutation test can repeat it on shuffled
labels. Folds are drawn first and are then independent of each other, so that threads can work on them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .folds import assign_folds
from .logistic_columns import ColumnFit
from .scores import confusion_matrix, score

Float = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Levels = npt.NDArray[np.int8]
RuleOfC = Callable[[int], float]  # number of training rows -> scikit-learn's C


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Settings that all repeats share."""

    n_folds: int
    n_inner_folds: int
    n_classes: int
    C_of: RuleOfC
    c_factors: tuple[float, ...] = (1.0,)  # multiples of that C, rising: one is chosen within each training side


@dataclass(frozen=True)
class ThresholdFits:
    """Fits on one training side, one for each C and threshold; s values of C, t thresholds, c classes."""

    probabilities: Float  # (s, t, tested rows, c)
    n_kept: list[int]  # latents that count
    n_unconverged: int  # fits that did not converge
    n_unseen: int  # fits whose training side lacked a class


class Thresholds(Protocol):
    """Barcodes prepared for one fit per threshold: `threshold_grams.py` or `threshold_columns.py`."""

    @property
    def n_thresholds(self) -> int:
        """Number of thresholds."""

    def levels(self, training: Bools) -> Levels:
        """(k, m) number of thresholds that each latent reaches in each of k training sets, (k, n) booleans."""

    def fit_predict(
        self, levels: Levels, labels: Ints, training: Bools, tested: Bools, n_classes: int, Cs: Float
    ) -> ThresholdFits:
        """Fit the training rows, whose `levels` are given, at every threshold, and predict the tested ones.

        `Cs` (s, t) as in scikit-learn: s fits at each of t thresholds.
        """

    def fit(self, kept: Bools, labels: Ints, n_classes: int, C: float) -> ColumnFit:
        """One fit of all rows on the latents that are `kept`, (m,) booleans; its weights are of these, in order."""


@dataclass(frozen=True)
class Division:
    """Folds, and the inner folds within the training side of each."""

    fold_of: Ints  # (n,)
    inner_of: Ints  # (n_folds, n) inner fold of each row of the training side; -1 for the other rows


@dataclass(frozen=True)
class Choice:
    """Threshold and C, chosen within a training side; t thresholds, m latents."""

    levels: Levels  # (m,) thresholds that each latent reaches in the training side
    threshold: int
    c_factors: Float  # (t,) for each threshold
    inner_fits: list[ThresholdFits]


@dataclass(frozen=True)
class Final:
    """The fit on all rows, for new rows."""

    fit: ColumnFit  # its weights are of the `kept` latents
    kept: Bools  # (m,)
    threshold: int
    c_factor: float
    C: float  # scikit-learn's C: the factor times the rule's
    inner_of: Ints  # (n,) the inner folds by which threshold and C were chosen


@dataclass(frozen=True)
class Fold:
    """The predictions of one fold, and what was chosen for it."""

    fits: ThresholdFits  # on the other folds; they predict the rows of this one
    chosen: int  # threshold chosen within the training side
    c_factors: Float  # (t,) factor of C chosen there for each threshold
    n_unconverged: int  # of all its fits, the inner ones included
    n_unseen: int


@dataclass(frozen=True)
class Repeat:
    """The predictions of one repeat; t thresholds, n rows, c classes."""

    fold_of: Ints  # (n,)
    probabilities: Float  # (t, n, c), each row by the fit without its group
    chosen: Ints  # (n_folds,) threshold chosen within each training side
    c_factors: Float  # (n_folds, t) factor of C chosen there for each threshold
    inner_of: Ints  # (n_folds, n) inner fold of each row of the training side; -1 for the other rows
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
    return join_folds(division, [run_fold(barcodes, labels, division, fold, plan) for fold in range(plan.n_folds)])


def divide(labels: Ints, groups: Ints, plan: Plan, rng: np.random.Generator) -> Division:
    """Draw the folds, and the folds within."""
    fold_of = assign_folds(labels, groups, plan.n_folds, rng)
    inner_of = np.full((plan.n_folds, len(labels)), -1)
    for fold in range(plan.n_folds):
        training = fold_of != fold
        inner_of[fold, training] = assign_folds(labels[training], groups[training], plan.n_inner_folds, rng)
    return Division(fold_of, inner_of)


def run_fold(barcodes: Thresholds, labels: Ints, division: Division, fold: int, plan: Plan) -> Fold:
    """Predict the rows of one fold; threshold and C are chosen within its training side."""
    training = division.fold_of != fold
    choice = choose_inside(barcodes, labels, training, division.inner_of[fold], plan)
    Cs = choice.c_factors * plan.C_of(int(training.sum()))
    fits = barcodes.fit_predict(choice.levels, labels, training, ~training, plan.n_classes, Cs[None])
    return Fold(
        fits,
        chosen=choice.threshold,
        c_factors=choice.c_factors,
        n_unconverged=sum(each.n_unconverged for each in (*choice.inner_fits, fits)),
        n_unseen=sum(each.n_unseen for each in (*choice.inner_fits, fits)),
    )


def choose_inside(barcodes: Thresholds, labels: Ints, training: Bools, inner_of: Ints, plan: Plan) -> Choice:
    """Choose threshold and C by a cross-validation within the training rows (n,), with the folds `inner_of`.

    By weighted F1: at each threshold the best C, of equal ones the smallest; then the best threshold, of equal ones the
    lowest. The latents' mean activations, too, are those of the inner training rows alone. With one threshold and one
    factor of C there is no inner cross-validation.
    """
    factors, n_thresholds = np.array(plan.c_factors), barcodes.n_thresholds
    n_inner = plan.n_inner_folds if n_thresholds > 1 or len(factors) > 1 else 0
    sides = np.stack([training, *(training & (inner_of != inner) for inner in range(n_inner))])
    levels = barcodes.levels(sides)
    predicted = np.zeros((len(factors), n_thresholds, len(labels)), np.int64)
    inner_fits = []
    for inner in range(n_inner):
        tested, side = inner_of == inner, sides[1 + inner]
        Cs = np.tile(factors[:, None] * plan.C_of(int(side.sum())), n_thresholds)
        inner_fits.append(barcodes.fit_predict(levels[1 + inner], labels, side, tested, plan.n_classes, Cs))
        predicted[:, :, tested] = inner_fits[-1].probabilities.argmax(3)
    f1 = weighted_f1(labels[training], predicted[:, :, training], plan.n_classes)
    of_threshold = np.argmax(f1, axis=0)
    return Choice(levels[0], int(np.argmax(f1.max(0))), factors[of_threshold], inner_fits)


def fit_all(barcodes: Thresholds, labels: Ints, groups: Ints, plan: Plan, rng: np.random.Generator) -> Final:
    """Fit all rows; threshold and C are chosen as in a fold whose training side are all rows."""
    inner_of = assign_folds(labels, groups, plan.n_inner_folds, rng)
    choice = choose_inside(barcodes, labels, np.ones(len(labels), bool), inner_of, plan)
    kept, factor = choice.levels > choice.threshold, float(choice.c_factors[choice.threshold])
    C = factor * plan.C_of(len(labels))
    fit = barcodes.fit(kept, labels, plan.n_classes, C)
    return Final(fit, kept, choice.threshold, factor, C, inner_of)


def weighted_f1(true: Ints, predicted: Ints, n_classes: int) -> Float:
    """Weighted F1 of each row of predictions (..., n); rounded, so that equal scores compare as equal."""
    rows = predicted.reshape(-1, predicted.shape[-1])
    found = [score(confusion_matrix(true, row, n_classes))["weighted_f1"] for row in rows]
    return np.round(np.array(found).reshape(predicted.shape[:-1]), 12)


def join_folds(division: Division, folds: Sequence[Fold]) -> Repeat:
    """The repeat that the folds of a division form together."""
    _, n_thresholds, _, n_classes = folds[0].fits.probabilities.shape
    probabilities = np.zeros((n_thresholds, len(division.fold_of), n_classes))
    for number, fold in enumerate(folds):
        probabilities[:, division.fold_of == number] = fold.fits.probabilities[0]
    return Repeat(
        division.fold_of,
        probabilities,
        chosen=np.array([fold.chosen for fold in folds]),
        c_factors=np.array([fold.c_factors for fold in folds]),
        inner_of=division.inner_of,
        n_kept=np.array([fold.fits.n_kept for fold in folds]),
        n_unconverged=sum(fold.n_unconverged for fold in folds),
        n_unseen=sum(fold.n_unseen for fold in folds),
    )
