"""How far a patient's barcode is from those of the other patients of its disease and dataset: one z for all pages.

For patient p and latent s, with the n others (at least 5), of mean m and standard deviation sd, and N_p images of the
patient:

    t     = (a_p[s] - m) / sqrt(sd^2 (1 + 1 / n) + e^2)
    t_log = the same of ln(1 + K a), with its own mean and sd, and e K / (1 + K max(a_p[s], m)) in place of e
    z     : as far out in a normal distribution as the smaller of |t| and |t_log| is in Student's with n - 1 degrees of
            freedom; 0 where the two are on different sides

That is the prediction of one more patient from n: with 5 others |z| = 3 is |t| = 6.6. Both scales, since it is not
known how levels spread over patients: on the plain one a spread in ratios (log-normal) has too many large values, on
the logarithmic one a plain spread has too many small ones. K is the mean number of images of the group's patients, the
patient included, so 1 / K is one token in all images of such a patient.

e is the error of a mean over the patient's own images: e^2 = C max(a_p[s], m) / N_p, at least 1 / N_p^2. C is
the index of dispersion: the variance over the images of one patient divided by their mean, over the whole group, at
least 1 (tokens that are independent of each other, Poisson, have 1). Where a latent is active at many patches of few
images, few images say little.

Simulated where no patient differs from the others: docs/benchmarks.md, bench/patients.py.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

Floats = npt.NDArray[np.float64]
LEAST_OTHERS = 5  # below, a mean and a standard deviation say nothing


@dataclass(frozen=True, eq=False)
class Others:
    """The other patients of a disease and dataset, per latent, (L,) each; barcodes in mean tokens above tau per image.

    mean, sd : of the others' barcodes; sd with n - 1
    log_mean, log_sd : of their `log_scale`
    dispersion : C, the index of dispersion; see the module
    """

    n: int
    mean: Floats
    sd: Floats
    log_mean: Floats
    log_sd: Floats
    dispersion: Floats
    images_per_patient: float  # K, of the whole group


def log_scale(barcodes: Floats, images_per_patient: float) -> Floats:
    """ln(1 + K a), 0 for a of 0."""
    found: Floats = np.log1p(barcodes * images_per_patient)
    return found


def describe_others(barcodes: Floats, dispersion: Floats, images_per_patient: float) -> Others:
    """From the barcodes of the others themselves, (n, L)."""
    logs = log_scale(barcodes, images_per_patient)
    return Others(
        len(barcodes),
        barcodes.mean(axis=0),
        barcodes.std(axis=0, ddof=1),
        logs.mean(axis=0),
        logs.std(axis=0, ddof=1),
        dispersion,
        images_per_patient,
    )


def dispersion_of(squares: Floats, levels: Floats) -> Floats:
    """(L,) C, the index of dispersion of each latent, at least 1.

    Parameters
    ----------
    squares : (L,) squared distances of images from the mean of their patient, summed over all images of the group
    levels : (L,) sum of N_q - 1 times the barcode, over the patients q of the group
    """
    found: Floats = np.maximum(1, squares / np.where(levels > 0, levels, np.inf))
    return found


def own_variance(value: Floats, others: Others, n_images: int) -> Floats:
    """e^2, see the module."""
    found: Floats = np.maximum(others.dispersion * np.maximum(value, others.mean) / n_images, 1 / n_images**2)
    return found


def prediction_t(value: Floats, others: Others, n_images: int) -> Floats:
    """(L,) t of the prediction of one more patient: t or t_log of its barcode, the one nearer to 0; `as_z` makes it z.

    Parameters
    ----------
    value : (L,) the patient's mean tokens above tau per image
    n_images : of the patient
    """
    own, spread = own_variance(value, others, n_images), 1 + 1 / others.n
    k = others.images_per_patient
    slope = k / (1 + k * np.maximum(value, others.mean))
    t = (value - others.mean) / np.sqrt(others.sd**2 * spread + own)
    t_log = (log_scale(value, k) - others.log_mean) / np.sqrt(others.log_sd**2 * spread + own * slope**2)
    found: Floats = np.where(t * t_log > 0, np.where(np.abs(t) < np.abs(t_log), t, t_log), 0.0)
    return found


def as_z(t: Floats, n_others: int) -> Floats:
    """The z with the same tail probability and sign as a t with n_others - 1 degrees of freedom."""
    tail = np.maximum(stats.t.sf(np.abs(t), n_others - 1), 1e-300)
    found: Floats = np.where(t == 0, 0, np.sign(t) * stats.norm.isf(tail))
    return found
