"""One fit per threshold of mean activation where rows are many: on the sparse barcodes of the latents above it."""

from typing import Any

import numpy as np
import numpy.typing as npt

from .cross_validation import Bools, Levels, ThresholdFits
from .logistic_columns import ColumnFit, fit_columns
from .threshold_grams import reached

Float = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class ThresholdColumns:
    """As `ThresholdGrams`, on sparse barcodes. Memory: twice the training rows for every thread that fits."""

    def __init__(self, values: Any, sums: Any, counts: Any, thresholds: tuple[float, ...]) -> None:
        """Parameters as those of `ThresholdGrams`, but scipy CSR matrices (n, m), a row per unit."""
        self._values, self._sums, self._counts = values, sums.T, counts.T
        self._thresholds = np.array(thresholds)

    @property
    def n_thresholds(self) -> int:
        """Number of thresholds."""
        return len(self._thresholds)

    def levels(self, training: Bools) -> Levels:
        """As `ThresholdGrams.levels`."""
        return reached(self._sums, self._counts, self._thresholds, training)

    def fit_predict(
        self, levels: Levels, labels: Ints, training: Bools, tested: Bools, n_classes: int, Cs: Float
    ) -> ThresholdFits:
        """As `Thresholds.fit_predict`. Where latents and C are the same, one fit serves for both."""
        seen, new, latents = self._values[training], self._values[tested], np.arange(len(levels))
        probabilities = np.zeros((*Cs.shape, int(tested.sum()), n_classes))
        n_kept, fits, known = list[int](), list[ColumnFit](), dict[float, Float]()
        for t in range(self.n_thresholds):
            kept = levels[latents] > t
            if not kept.all():
                seen, new, latents, known = seen[:, kept], new[:, kept], latents[kept], {}
            for s, C in enumerate(Cs[:, t].tolist()):
                if C not in known:
                    fits.append(fit_columns(seen, labels[training], n_classes, C))
                    known[C] = fits[-1].probabilities(new)
                probabilities[s, t] = known[C]
            n_kept.append(len(latents))
        return ThresholdFits(
            probabilities,
            n_kept,
            n_unconverged=sum(not fit.converged for fit in fits),
            n_unseen=sum(len(fit.present) < n_classes for fit in fits),
        )

    def fit(self, kept: Bools, labels: Ints, n_classes: int, C: float) -> ColumnFit:
        """As `Thresholds.fit`."""
        return fit_columns(self._values[:, np.flatnonzero(kept)], labels, n_classes, C)
