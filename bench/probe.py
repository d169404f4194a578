"""How long do the sweep over thresholds and its permutations take at the size of AML Hehr, or of thousands of images?

Ours: one fold of a repeat as `cyto probe` does it (a fit per threshold, the threshold chosen inside), on one thread, of
189 synthetic patients (or `--level image`, 2,000 images of 100 patients) x 49,152 latents, 5 classes; then what the
default's repeats and permutations come to on all cores. Against: the same number of direct fits, scikit-learn's
LogisticRegression (L-BFGS, at most 1,000 iterations, as in DinoBloom's code) on all columns, sparse for images; only
`--direct` of them are run, each at another threshold, and the rest is extrapolated. The direct fits stop at their
tolerance, earlier than ours.
"""

import time
import warnings
from typing import Any

import numpy as np
from common import N_LATENTS, arguments, emit, latent_frequency, say
from scipy.sparse import csr_matrix
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from cytosae.probe import C_FACTORS, REPETITIONS, THRESHOLDS, Plan, along_thresholds, divide, run_fold
from stores.machine import n_cores

N_FOLDS, N_PATIENTS = 5, 100  # patients of the images


def main() -> None:
    """Measure and print one line of JSON."""
    parser = arguments(__doc__, rounds=2)
    parser.add_argument("--level", choices=("patient", "image"), default="patient", help="(%(default)s)")
    parser.add_argument("--units", type=int, help="patients or images (189 or 2,000)")
    parser.add_argument("--latents", type=int, default=N_LATENTS, help="(%(default)s)")
    parser.add_argument("--direct", type=int, default=3, help="direct fits that are run (%(default)s)")
    options = parser.parse_args()
    options.units = options.units or {"patient": 189, "image": 2000}[options.level]
    made = {"patient": synthetic_patients, "image": synthetic_images}[options.level]
    values, sums, counts, labels, groups = made(options.units, options.latents)
    n_classes = int(labels.max()) + 1
    C = options.latents * n_classes / 100
    plan = Plan(n_folds=N_FOLDS, n_inner_folds=3, n_classes=n_classes, C_of=lambda n: C, c_factors=C_FACTORS)
    with threadpool_limits(1, user_api="blas"):
        began = time.perf_counter()
        barcodes = along_thresholds(values, sums, counts, THRESHOLDS)
        setup = time.perf_counter() - began
        say(f"setup: {setup:.2f} s")
        division, spent = divide(labels, groups, plan, np.random.default_rng(0)), []
        for number in range(options.rounds):
            began = time.perf_counter()
            found = run_fold(barcodes, labels, division, number % N_FOLDS, plan)
            spent.append(time.perf_counter() - began)
            accuracy = (found.fits.probabilities[0, 0].argmax(1) == labels[division.fold_of == number % N_FOLDS]).mean()
            say(f"fold {number + 1} of {options.rounds}: {spent[-1]:.2f} s, accuracy {accuracy:.3f}")
        n_fits = len(set(found.fits.n_kept)) * (1 + plan.n_inner_folds * len(C_FACTORS))
        direct = [direct_fit(values, sums, counts, labels, t, C) for t in range(options.direct)]
    ours, theirs = float(np.median(spent)), float(np.median(direct)) * n_fits
    repeats, permutations = REPETITIONS[options.level]
    n_jobs = N_FOLDS * (repeats + permutations)
    cores = n_cores()
    emit(
        "probe",
        ratio=theirs / ours,
        target=1.0,
        ours={"rate": n_fits / ours, "unit": "fits/s", "seconds": ours, "rounds": spent, "setup_seconds": setup},
        baseline={"rate": n_fits / theirs, "unit": "fits/s", "seconds": theirs, "extrapolated_from_fits": direct},
        params=vars(options),
        estimate_of_default_seconds=setup + n_jobs * ours / cores,
    )


def synthetic_patients(n_patients: int, n_latents: int) -> tuple[Any, ...]:
    """Barcodes, sums and counts (patients, latents), most latents rare, labels, groups; a few know the class."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(n_patients) % 5)
    frequency = np.minimum(1, 0.02 / rng.random(n_latents))[:, None]  # share of a patient's 430 images
    own = rng.lognormal(0, 0.7, (n_latents, n_patients))
    own[:50] *= np.where(labels == np.arange(50)[:, None] % 5, 1.5, 1)
    counts = np.minimum(430, rng.poisson(430 * frequency * own)).astype(np.float64)
    mean = 10.0 ** rng.normal(-2.5, 1, (n_latents, 1)) * rng.lognormal(0, 0.3, (n_latents, n_patients))
    values = counts / 430 * rng.gamma(2, 2, (n_latents, 1))
    return *(csr_matrix(matrix.T) for matrix in (values, counts * mean, counts)), labels, np.arange(n_patients)


def synthetic_images(n_images: int, n_latents: int) -> tuple[Any, ...]:
    """The same of images: as many latents fire in one as in a released one; patients differ, and one in ten is odd."""
    rng = np.random.default_rng(0)
    frequency, _ = latent_frequency(n_latents)
    labels, patients = rng.integers(0, 5, n_images), rng.integers(0, N_PATIENTS, n_images)
    boost, knowing = np.ones((5, n_latents)), rng.choice(n_latents, n_latents // 50, replace=False)
    boost[rng.integers(0, 5, len(knowing)), knowing] = 3
    own = rng.lognormal(0, 0.3, (N_PATIENTS, n_latents))
    size, mean = rng.lognormal(1, 1, n_latents), 10.0 ** rng.normal(-2.5, 1, n_latents)
    like = np.where(rng.random(n_images) < 0.1, rng.integers(0, 5, n_images), labels)
    indices, counts = [], []
    for patient, k in zip(patients, like, strict=True):
        active = np.flatnonzero(rng.random(n_latents) < frequency * boost[k] * own[patient])
        indices.append(active.astype(np.int32))
        counts.append(np.minimum(257, 1 + rng.poisson(size[active] * boost[k, active])))
    indptr = np.cumsum([0, *map(len, indices)])
    columns, values = np.concatenate(indices), np.concatenate(counts).astype(np.float64)
    data = values, values * mean[columns], np.ones(len(columns))
    matrices = (csr_matrix((each, columns, indptr), shape=(n_images, n_latents)) for each in data)
    return *matrices, labels, np.unique(patients, return_inverse=True)[1]


def direct_fit(values: Any, sums: Any, counts: Any, labels: np.ndarray, t: int, C: float) -> float:
    """Seconds of one fit on all columns, those below a threshold left out, of four fifths of the rows."""
    training = np.arange(len(labels)) % 5 != 0
    mean = np.ravel(sums[training].sum(0)) / np.maximum(np.ravel(counts[training].sum(0)), 1)
    x = values[training][:, mean >= THRESHOLDS[2 * t % len(THRESHOLDS)]]
    x = x.toarray() if x.nnz > x.shape[0] * x.shape[1] / 4 else x
    model = LogisticRegression(C=C, max_iter=1000)
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(x, labels[training])
    spent = time.perf_counter() - began
    say(f"direct fit: {spent:.2f} s, {int(model.n_iter_[0])} iterations")
    return spent


if __name__ == "__main__":
    main()
