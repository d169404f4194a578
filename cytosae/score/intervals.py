"""95% intervals of a scorecard's figures, over patients; over images where no patient is known.

A figure is computed again without each patient (a jackknife, Miller 1974): its variance over patients is that of these
figures, times (blocks - 1)^2 / blocks. Fits, thresholds and the choice of a latent stay as they are, so an interval
says how far other patients of the same kind would move this figure, not how far another choice would: for that a
figure stands beside its null. More than MOST_BLOCKS patients are put together at random, to save time.

A figure between 0 and 1 has limits like Wilson's for a share, as the AUC of `cyto compare` (`share_limits`).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import t as student

from cytosae.compare import share_limits

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
MOST_BLOCKS = 200


@dataclass(frozen=True)
class Blocks:
    """Which images are left out together."""

    of_image: Ints  # (n,) numbers from 0
    n: int
    unit: str  # patient or image

    def having(self, images: npt.NDArray[np.bool_]) -> int:
        """Blocks with one of these images."""
        return len(np.unique(self.of_image[images]))


def blocks_of(groups: Ints, unit: str, seed: int) -> Blocks:
    """A block for each group; of more than MOST_BLOCKS several together, as equal in number as they can be.

    groups : (n,) numbers
    """
    number = np.unique(groups, return_inverse=True)[1].astype(np.int64)
    n = int(number.max()) + 1
    if n > MOST_BLOCKS:
        number = np.random.default_rng((seed, 6)).permutation(n)[number] % MOST_BLOCKS
    return Blocks(number, min(n, MOST_BLOCKS), unit)


def limits(value: float, without: Floats, n: int, *, bounded: bool) -> tuple[float | None, float | None]:
    """95% limits of a figure; none where it is not known, or of fewer than two blocks.

    Parameters
    ----------
    without : (blocks,) the figure without each block; NaN where there is none without it
    n : blocks that the figure rests on, such as those with a label
    bounded : it lies from 0 to 1
    """
    known = without[np.isfinite(without)]
    if not np.isfinite(value) or len(known) < 2 or n < 2:
        return None, None
    variance = (len(known) - 1) / len(known) * float(((known - known.mean()) ** 2).sum())
    t = float(student.ppf(0.975, n - 1))
    if not bounded:
        far = t * variance**0.5
        return value - far, value + far
    low, high = share_limits(np.array(value), np.array(variance), t, n)
    return min(float(low), value), max(float(high), value)
