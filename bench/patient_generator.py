"""Means of made-up patients, drawn without making their images: what `bench/calibration.py` tests and covers.

Of each patient and latent only the images that show it are drawn, one after the other (the gap to the next one is
geometric), with their count of patches, and added to the sums of the draws that hold this image. The law is that of
images made one by one and thinned at random (test_calibration.py), the work that of the images shown.
"""

import math

import numba
import numpy as np
import numpy.typing as npt

LARGEST = 257  # patches of an image
MEAN = 20.0  # of the exponential that a count is drawn from
ALIKE = 4.0  # shape of the gamma by which patients' rates differ

Floats = npt.NDArray[np.float64]


def rates(rng: np.random.Generator, frequency: npt.NDArray[np.floating], n_latents: int) -> Floats:
    """(patients, latents): shares of images that show each latent; `frequency` (patients,): their means."""
    return np.minimum(1, rng.gamma(ALIKE, 1 / ALIKE, (len(frequency), n_latents)) * np.asarray(frequency)[:, None])


def patient_means(
    rng: np.random.Generator, n_images: npt.NDArray[np.int64], rate: Floats, ties: bool, n_thinned: int, n_draws: int
) -> tuple[Floats, list[Floats]]:
    """(patients, latents): means over all images, and over `n_thinned` of them in each draw.

    A draw takes the same images of a patient for all latents. An image that shows a latent has a count of 1 with
    `ties`, else the next whole number above an exponential, 257 at most. All sums are whole numbers below 2**53.
    """
    held = np.zeros((len(n_images), int(n_images.max())), np.uint64)
    sums = np.zeros((n_draws + 1, *rate.shape))
    _add(rng, n_images, rate, ties, n_thinned, n_draws, held, sums)
    return sums[0] / n_images[:, None], list(sums[1:] / max(1, n_thinned))


@numba.njit(cache=True)
def _add(rng, n_images, rate, ties, n_thinned, n_draws, held, sums):  # type: ignore[no-untyped-def]  # numba's to type
    n_patients, n_latents = rate.shape
    for patient in range(n_patients):
        n = n_images[patient]
        order = np.arange(n)
        for draw in range(n_draws):  # the first of a shuffle
            for place in range(n_thinned):
                other = place + int(rng.random() * (n - place))
                order[place], order[other] = order[other], order[place]
                held[patient, order[place]] |= np.uint64(1) << np.uint64(draw)
        for latent in range(n_latents):
            share = rate[patient, latent]
            if share <= 0:
                continue
            per_gap = 0.0 if share >= 1 else 1 / math.log1p(-share)
            image = -1
            while True:
                gap = math.log(1 - rng.random()) * per_gap
                if gap >= n:
                    break
                image += 1 + int(gap)
                if image >= n:
                    break
                value = 1.0 if ties else min(LARGEST, max(1.0, math.ceil(-MEAN * math.log(1 - rng.random()))))
                sums[0, patient, latent] += value
                draws = held[patient, image]
                draw = 1
                while draws:
                    if draws & np.uint64(1):
                        sums[draw, patient, latent] += value
                    draws >>= np.uint64(1)
                    draw += 1
