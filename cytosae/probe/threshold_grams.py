"""One fit per threshold of mean activation where rows are few: Gram matrices of the latents above the threshold.

A latent's mean activation is that over the images of the training rows, so it differs between training sets. But most
latents lie between the same two thresholds whichever rows are left out. So the Gram matrix of the latents of each
interval between thresholds is computed once from all rows; for a training set only latents that change their interval
are added or subtracted. The result is the same up to rounding, and far cheaper.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import issparse

from .cross_validation import Bools, Levels, ThresholdFits
from .logistic_columns import ColumnFit, fit_gram

Float = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
_CHUNK = 1 << 24  # values of a dense copy


class ThresholdGrams:
    """Barcodes (n rows), and the sums and counts that decide which latents are above a threshold.

    Latents that are zero in every row have no effect.

    Memory: n x n for every threshold, and four times that for every thread that fits.
    """

    def __init__(self, values: Any, sums: Any, counts: Any, thresholds: tuple[float, ...]) -> None:
        """Take the barcodes.

        Parameters
        ----------
        values : (m, n) barcodes in float64, a row per latent; a numpy array or scipy CSR matrix, as the next two
        sums, counts : (m, n) sum of image activations, and number of images with any activation
        thresholds : rising, at least 0; a latent is kept at thresholds up to its mean activation, and always at 0
        """
        self._values, self._sums, self._counts = values, sums, counts
        self._thresholds = np.array(thresholds)
        self._level_of_all = self.levels(np.ones((1, values.shape[1]), bool))[0]
        self._grams_of_all = [self._gram(self._level_of_all == t + 1) for t in range(len(thresholds))]

    @property
    def n_thresholds(self) -> int:
        """Number of thresholds."""
        return len(self._thresholds)

    def levels(self, training: Bools) -> Levels:
        """(k, m) number of thresholds that each latent reaches in each of k training sets, (k, n) booleans.

        -1 for a latent that is zero in all training rows: it has no effect there.
        """
        return reached(self._sums, self._counts, self._thresholds, training)

    def fit_predict(
        self, levels: Levels, labels: Ints, training: Bools, tested: Bools, n_classes: int, Cs: Float
    ) -> ThresholdFits:
        """As `Thresholds.fit_predict`. Where latents and C are the same, one fit serves for both."""
        n_kept = [int((levels > t).sum()) for t in range(self.n_thresholds)]
        probabilities, fits = np.zeros((*Cs.shape, int(tested.sum()), n_classes)), []
        for t, gram in self._grams(levels):
            known: dict[float, Float] = {}
            # lower thresholds keep all latents of higher ones, so that equal numbers are the same latents
            if t + 1 < self.n_thresholds and n_kept[t] == n_kept[t + 1]:
                known = dict(zip(Cs[:, t + 1].tolist(), probabilities[:, t + 1], strict=True))
            among, across = gram[np.ix_(training, training)], gram[np.ix_(tested, training)]
            for s, C in enumerate(Cs[:, t].tolist()):
                if C not in known:
                    fits.append(fit_gram(among, labels[training], n_classes, C))
                    known[C] = fits[-1].probabilities(across)
                probabilities[s, t] = known[C]
        return ThresholdFits(
            probabilities,
            n_kept,
            n_unconverged=sum(not fit.converged for fit in fits),
            n_unseen=sum(len(fit.present) < n_classes for fit in fits),
        )

    def fit(self, kept: Bools, labels: Ints, n_classes: int, C: float) -> ColumnFit:
        """As `Thresholds.fit`."""
        found = fit_gram(self._gram(kept), labels, n_classes, C)
        weights = found.scale * (self._values[np.flatnonzero(kept)] @ found.dual)
        return ColumnFit(found.present, weights, found.intercept, n_classes, found.n_steps, found.converged)

    def _grams(self, levels: Levels) -> Iterator[tuple[int, Float]]:
        """From the highest threshold down: its number, and (n, n) products of the training rows with all rows.

        `levels` are those of the training rows; products of two other rows are not valid. The array is overwritten by
        the next threshold's.
        """
        moved = (levels != self._level_of_all) & (levels >= 0)
        gram = np.zeros_like(self._grams_of_all[0])
        for t in reversed(range(self.n_thresholds)):
            gram += self._grams_of_all[t]
            gram += self._gram(moved & (levels == t + 1))
            gram -= self._gram(moved & (self._level_of_all == t + 1))
            yield t, gram

    def _gram(self, latents: Bools) -> Float:
        """(n, n) products over some latents."""
        n = self._values.shape[1]
        gram, chosen, step = np.zeros((n, n)), np.flatnonzero(latents), max(1, _CHUNK // n)
        for start in range(0, len(chosen), step):
            rows = self._values[chosen[start : start + step]]
            dense = rows.toarray() if issparse(rows) else rows
            gram += dense.T @ dense
        return gram


def reached(sums: Any, counts: Any, thresholds: Float, training: Bools) -> Levels:
    """(k, m) number of thresholds that each latent reaches, as `Thresholds.levels`; sums and counts are (m, n)."""
    chosen = training.T.astype(np.float64)
    n_active = (counts @ chosen).T
    mean = (sums @ chosen).T / np.maximum(n_active, 1)
    levels = np.searchsorted(thresholds, mean, side="right").astype(np.int8)
    levels[n_active == 0] = -1
    return levels
