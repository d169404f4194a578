"""Gram matrices of barcodes in which only latents above a mean-activation threshold count, for any training rows.

A latent's mean activation is that over the images of the training rows, so every training set has latents of its own.
Most lie between the same two thresholds whatever rows are left out. Hence one Gram matrix per threshold for all rows is
kept, and only the latents that moved are added or taken away: the same numbers, up to rounding, far cheaper.
"""

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float64]
Levels = npt.NDArray[np.int8]


class ThresholdGrams:
    """Barcodes (n rows), and what decides which latents count; latents that are zero in every row have no effect."""

    def __init__(self, values: Float, sums: Float, counts: Float, thresholds: tuple[float, ...]) -> None:
        """Take the barcodes.

        Parameters
        ----------
        values : (m, n) barcodes in float64, a row per latent
        sums, counts : (m, n) sum of image activations, and number of images with any activation
        thresholds : rising, at least 0; a latent counts from its mean activation down, and at 0 always
        """
        self._values, self._sums, self._counts = values, sums, counts
        self._thresholds = np.array(thresholds)
        self._level_of_all = self.levels(np.ones((1, values.shape[1]), bool))[0]
        self._grams_of_all = self._grams(np.arange(len(values)), self._level_of_all)

    @property
    def n_thresholds(self) -> int:
        """How many matrices `grams` gives."""
        return len(self._thresholds)

    def levels(self, training: npt.NDArray[np.bool_]) -> Levels:
        """(k, m) number of thresholds that each latent reaches in each of k training sets, (k, n) booleans.

        -1 for a latent that no training row has: it is zero there, and so counts for nothing.
        """
        chosen = training.T.astype(np.float64)
        n_active = (self._counts @ chosen).T
        mean = (self._sums @ chosen).T / np.maximum(n_active, 1)
        levels = np.searchsorted(self._thresholds, mean, side="right").astype(np.int8)
        levels[n_active == 0] = -1
        return levels

    def grams(self, levels: Levels) -> tuple[Float, list[int]]:
        """(t, n, n) for every threshold, products of the training rows with all rows, and how many latents count.

        `levels` are those of the training rows; other products than theirs mean nothing.
        """
        moved = np.flatnonzero((levels != self._level_of_all) & (levels >= 0))
        change = self._grams(moved, levels[moved]) - self._grams(moved, self._level_of_all[moved])
        n_kept = [int((levels > t).sum()) for t in range(len(self._thresholds))]
        return self._grams_of_all + change, n_kept

    def _grams(self, latents: npt.NDArray[np.intp], levels: Levels) -> Float:
        n = self._values.shape[1]
        grams = np.zeros((self.n_thresholds, n, n))
        for t in range(len(grams)):
            rows = self._values[latents[levels == t + 1]]
            grams[t] = rows.T @ rows
        return grams[::-1].cumsum(0)[::-1]
