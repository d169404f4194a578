"""Baselines of the probe: simpler methods on the same patients and the same folds.

majority        the commonest class of the training rows
n_images        the number of images alone, as its logarithm: image counts may differ by disease
mean_tokens     the backbone's patch tokens, averaged over a unit's images
cls_token       the CLS tokens, likewise, if the backbone has one
attention_mil   one instance per image, `cytosae/probe/attention_mil.py`: the family of the deep baseline

Tokens are divided by one number before the rule's C, so that their mean variance over channels is 1 in the training
rows. L2 depends on the scale of the features, and that of tokens is the backbone's: CLS tokens of images may differ by
1e-6 (an untrained backbone) or by 10, and without it no multiple of the rule's C fits all of them (docs/log.md).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stores.activation_store import ActivationStore
from stores.errors import BadInput
from stores.progress import Progress
from stores.tables import column, listed

from .cross_validation import RuleOfC, weighted_f1
from .logistic_columns import NEWTON_ROWS, ColumnFit, fit_columns, fit_gram

Float = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Predict = Callable[[Ints, Bools, Ints], Float]
"""Labels (n,), training rows, folds within these (n,) (-1 outside) -> (other rows, n_classes) probabilities."""
_READ_IMAGES = 64  # that are read together
_ROUNDING = 1e-13  # of the largest value: a smaller deviation is none
COUNT_C = 100.0  # C of the regression on the number of images: one feature needs little regularisation


@dataclass(frozen=True, kw_only=True)
class MilConfig:
    """All settings of the attention-MIL head and of its training."""

    repeats: int = 0  # the head is trained in this many of the first repeats; 0: in all, as every other method
    hidden: int = 64
    epochs: int = 40
    images_per_step: int = 32  # random images of each patient in every step, with replacement where there are fewer
    batch_patients: int = 16
    lr: float = 1e-3
    weight_decay: float = 1e-3

    def __post_init__(self) -> None:
        for name, low in {"repeats": 0, "hidden": 1, "epochs": 1, "images_per_step": 1, "batch_patients": 1}.items():
            if getattr(self, name) < low:
                raise BadInput(f"{name} of the attention-MIL head must be at least {low}; found {getattr(self, name)}")


@dataclass(frozen=True)
class ImageTokens:
    """Two vectors per image, (n_images, width) each: the mean of its patch tokens, and its CLS token."""

    patches: Float
    cls: Float  # (n_images, 0) if the backbone has no CLS token


def read_image_tokens(stores: Sequence[ActivationStore], wanted: Sequence[str], *, progress: Progress) -> ImageTokens:
    """Mean patch token and CLS token of the wanted images, in their order; no others are read. Sums in float64.

    Raises
    ------
    BadInput
        If an image is in none of the caches, or was not readable there.
    """
    place: dict[str, tuple[int, int]] = {}
    for number, store in enumerate(stores):
        ids = column(store.images, "image_id")
        place |= {str(ids[i]): (number, int(i)) for i in np.flatnonzero(store.readable())}
    missing = [image_id for image_id in wanted if image_id not in place]
    if missing:
        raise BadInput(
            f"{len(missing):,} of {len(wanted):,} images of the barcodes are not readable in --cache "
            f"({listed(missing)}); give all caches that the latents were encoded from"
        )
    width = stores[0].spec.width
    layout = stores[0].spec.layout
    found = ImageTokens(np.zeros((len(wanted), width)), np.zeros((len(wanted), width * layout.n_cls)))
    n_done = 0
    for number, store in enumerate(stores):
        mine = sorted((place[image_id][1], k) for k, image_id in enumerate(wanted) if place[image_id][0] == number)
        for start in range(0, len(mine), _READ_IMAGES):
            some = mine[start : start + _READ_IMAGES]
            for tokens, (_, k) in zip(store.read_images([index for index, _ in some]), some, strict=True):
                image = tokens.astype(np.float64)
                found.patches[k] = image[layout.first_patch :].mean(0)
                found.cls[k] = image[: layout.n_cls].ravel()
            n_done += len(some)
            progress(n_done, len(wanted), "tokens")
    return found


def of_units(vectors: Float, rows_of: Sequence[Ints]) -> Float:
    """(n, width) means over the images of every unit."""
    return np.stack([vectors[rows].mean(0) for rows in rows_of])


def majority(n_classes: int) -> Predict:
    """Predict the class shares of the training rows, for every row."""

    def predict(labels: Ints, training: Bools, inner_of: Ints) -> Float:
        shares = np.bincount(labels[training], minlength=n_classes) / training.sum()
        return np.tile(shares, (int((~training).sum()), 1))

    return predict


def number_of_images(n_images: Ints, n_classes: int, c_factors: Sequence[float]) -> Predict:
    """Logistic regression on log(number of images), standardised by the training rows."""

    def predict(labels: Ints, training: Bools, inner_of: Ints) -> Float:
        mean, sd = _of_log(n_images[training])
        values = ((np.log(n_images) - mean) / sd)[:, None]
        return _predict(_Features(values, n_classes, lambda n_rows: COUNT_C, c_factors))(labels, training, inner_of)

    return predict


@dataclass(frozen=True)
class CountFit:
    """The regression on the number of images alone, fitted on all rows."""

    mean: float  # of log(number of images)
    sd: float
    fit: ColumnFit

    def probabilities(self, n_images: Ints) -> Float:
        """(rows, n_classes) of rows with these numbers of images."""
        return self.fit.probabilities(((np.log(n_images) - self.mean) / self.sd)[:, None])


def fit_number_of_images(
    n_images: Ints, labels: Ints, inner_of: Ints, n_classes: int, c_factors: Sequence[float]
) -> CountFit:
    """As `number_of_images`, on all rows, C chosen by the folds `inner_of`."""
    mean, sd = _of_log(n_images)
    values = ((np.log(n_images) - mean) / sd)[:, None]
    factor = _Features(values, n_classes, lambda n_rows: COUNT_C, c_factors).choose(
        labels, np.ones(len(labels), bool), inner_of
    )
    return CountFit(mean, sd, fit_columns(values, labels, n_classes, factor * COUNT_C))


def _of_log(n_images: Ints) -> tuple[float, float]:
    """Mean and standard deviation of log(number of images)."""
    values = np.log(n_images)
    return float(values.mean()), max(float(values.std()), 1e-9)


def features(values: Float, n_classes: int, C_of: RuleOfC, c_factors: Sequence[float]) -> Predict:
    """The probe's own logistic regression on (n, width) tokens, scaled by the rows of each fit.

    C is chosen as for the barcodes: by the weighted F1 of a cross-validation within the training rows; of equal ones
    the smallest C.
    """
    return _predict(_Features(values, n_classes, C_of, c_factors, is_scaled=True))


def _predict(fits: "_Features") -> Predict:
    """Fits with the C that is chosen within the training rows."""

    def predict(labels: Ints, training: Bools, inner_of: Ints) -> Float:
        return fits.fit_predict(labels, training, ~training, fits.choose(labels, training, inner_of))

    return predict


class _Features:
    """Fits on (n, width) features; scaled: to a mean variance of 1 over channels, in the training rows of each fit."""

    def __init__(
        self, values: Float, n_classes: int, C_of: RuleOfC, c_factors: Sequence[float], *, is_scaled: bool = False
    ) -> None:
        # The free intercept takes up whatever is subtracted from all rows, so that no row learns of another by it; the
        # products of rows that differ by 1e-6 of their length would lose to rounding what they differ by.
        values = values - values.mean(0) if is_scaled else values
        self._values, self._n_classes, self._C_of, self._c_factors = values, n_classes, C_of, c_factors
        self._is_scaled = is_scaled
        self._gram = values @ values.T if len(values) <= NEWTON_ROWS else None

    def fit_predict(self, labels: Ints, training: Bools, tested: Bools, factor: float) -> Float:
        """Probabilities of the tested rows."""
        c, scale = factor * self._C_of(int(training.sum())), self._scale(training)
        if self._gram is None:
            fit = fit_columns(self._values[training] / scale, labels[training], self._n_classes, c)
            return fit.probabilities(self._values[tested] / scale)
        found = fit_gram(self._gram[np.ix_(training, training)] / scale**2, labels[training], self._n_classes, c)
        return found.probabilities(self._gram[np.ix_(tested, training)] / scale**2)

    def _scale(self, training: Bools) -> float:
        """What the features are divided by; 1 where all training rows are equal but for rounding, or none is there."""
        if not self._is_scaled or not training.any():
            return 1.0
        rows = self._values[training]
        scale = float(np.sqrt(rows.var(0).mean()))
        return scale if scale > _ROUNDING * np.abs(rows).max() else 1.0

    def choose(self, labels: Ints, training: Bools, inner_of: Ints) -> float:
        """The factor of C."""
        predicted = np.zeros((len(self._c_factors), len(labels)), np.int64)
        for inner in range(inner_of.max() + 1 if len(self._c_factors) > 1 else 0):
            tested = inner_of == inner
            for k, factor in enumerate(self._c_factors):
                predicted[k, tested] = self.fit_predict(labels, training & ~tested, tested, factor).argmax(1)
        best = int(np.argmax(weighted_f1(labels[training], predicted[:, training], self._n_classes)))
        return self._c_factors[best]
