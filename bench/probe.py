"""How long do the sweep over thresholds and its permutations take at the size of AML Hehr?

Ours: one repeat as `cyto probe` does it (folds of whole groups, a fit per threshold, the threshold chosen inside), on
one thread, 189 synthetic patients x 49,152 latents, 5 classes; then what 10 repeats and 99 permutations come to on all
cores. Against: the same number of direct fits, scikit-learn's LogisticRegression (L-BFGS, at most 1,000 iterations, as
in DinoBloom's code) on all columns; only `--direct` of them are run, each at another threshold, and the rest is
extrapolated. The direct fits stop at their tolerance, earlier than ours.
"""

import os
import time
import warnings

import numpy as np
from common import N_LATENTS, arguments, emit, say
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from cytosae.cross_validation import Plan, run_repeat
from cytosae.probe import THRESHOLDS
from cytosae.threshold_grams import ThresholdGrams


def main() -> None:
    """Measure and print one line of JSON."""
    parser = arguments(__doc__, rounds=2)
    parser.add_argument("--patients", type=int, default=189, help="(%(default)s)")
    parser.add_argument("--latents", type=int, default=N_LATENTS, help="(%(default)s)")
    parser.add_argument("--direct", type=int, default=3, help="direct fits that are run (%(default)s)")
    options = parser.parse_args()
    values, sums, counts, labels = synthetic(options.patients, options.latents)
    n_classes = int(labels.max()) + 1
    strength = options.latents * n_classes / 100
    plan = Plan(n_folds=5, n_inner_folds=3, n_classes=n_classes, strength=lambda n: strength)
    with threadpool_limits(1, user_api="blas"):
        began = time.perf_counter()
        grams = ThresholdGrams(values, sums, counts, THRESHOLDS)
        setup = time.perf_counter() - began
        spent = []
        for number in range(options.rounds):
            began = time.perf_counter()
            found = run_repeat(grams, labels, np.arange(len(labels)), plan, np.random.default_rng(number))
            spent.append(time.perf_counter() - began)
            say(f"repeat {number + 1} of {options.rounds}: {spent[-1]:.2f} s")
        n_fits = sum(len(set(kept.tolist())) for kept in found.n_kept) * (1 + plan.n_inner_folds)
        direct = [direct_fit(values, sums, counts, labels, t, strength) for t in range(options.direct)]
    ours, theirs = float(np.median(spent)), float(np.median(direct)) * n_fits
    n_jobs, cores = 10 + 99, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    emit(
        "probe",
        ratio=theirs / ours,
        target=1.0,
        ours={"rate": n_fits / ours, "unit": "fits/s", "seconds": ours, "rounds": spent, "setup_seconds": setup},
        baseline={"rate": n_fits / theirs, "unit": "fits/s", "seconds": theirs, "extrapolated_from_fits": direct},
        params=vars(options),
        estimate_of_default_seconds=setup + n_jobs * ours / cores,
    )


def synthetic(n_patients: int, n_latents: int) -> tuple[np.ndarray, ...]:
    """Barcodes, sums and counts (latents, patients), most latents rare, and labels; a few latents know the class."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(n_patients) % 5)
    frequency = np.minimum(1, 0.02 / rng.random(n_latents))[:, None]  # share of a patient's 430 images
    own = rng.lognormal(0, 0.7, (n_latents, n_patients))
    own[:50] *= np.where(labels == np.arange(50)[:, None] % 5, 1.5, 1)
    counts = np.minimum(430, rng.poisson(430 * frequency * own)).astype(np.float64)
    mean = 10.0 ** rng.normal(-2.5, 1, (n_latents, 1)) * rng.lognormal(0, 0.3, (n_latents, n_patients))
    values = counts / 430 * rng.gamma(2, 2, (n_latents, 1))
    return values, counts * mean, counts, labels


def direct_fit(
    values: np.ndarray, sums: np.ndarray, counts: np.ndarray, labels: np.ndarray, t: int, strength: float
) -> float:
    """Seconds of one fit on all columns, those below a threshold set to zero, of four fifths of the patients."""
    training = np.arange(len(labels)) % 5 != 0
    mean = sums[:, training].sum(1) / np.maximum(counts[:, training].sum(1), 1)
    x = np.ascontiguousarray((values * (mean >= THRESHOLDS[2 * t % len(THRESHOLDS)])[:, None]).T[training])
    model = LogisticRegression(C=strength, max_iter=1000)
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(x, labels[training])
    spent = time.perf_counter() - began
    say(f"direct fit: {spent:.2f} s, {int(model.n_iter_[0])} iterations")
    return spent


if __name__ == "__main__":
    main()
