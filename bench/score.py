"""`cyto sae score`: the time of each measure at the size of a full scorecard, on invented means of latents.

The ratio is average precision and one-latent probe of every latent for every label, against a loop over scikit-learn,
in latents a second. `parts` has the seconds of each measure, once, without its shuffles; the nulls take as much for
each shuffle. Reading stores is measured by `encode` and `barcode`. Peak memory is of the whole process.
"""

import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from common import N_LATENTS, WIDTH, alternate, arguments, emit, latent_frequency, say
from scipy.sparse import csc_matrix, csr_matrix
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score

from cytosae.probe import assign_folds
from cytosae.score.monosemanticity import monosemanticity, unit_rows
from cytosae.score.morans_i import morans_i
from cytosae.score.single_latents import single_latents
from cytosae.score.sparse_probing import sparse_probing


def main() -> None:
    """Run, and print one line."""
    parser = arguments(__doc__, rounds=1)
    parser.add_argument("--images", type=int, default=2_000)
    parser.add_argument("--latents", type=int, default=N_LATENTS)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--loop-latents", type=int, default=20, help="for the loop over scikit-learn (%(default)s)")
    asked = parser.parse_args()
    rng = np.random.default_rng(0)
    frequency, origin = latent_frequency(asked.latents)
    means = invent(frequency, asked.images, rng)
    labels = rng.integers(0, asked.classes, asked.images)
    groups = np.arange(asked.images) // 5
    dense = rng.normal(size=(asked.images, asked.width)).astype(np.float32)
    by_latent = csc_matrix(means)
    by_latent.sort_indices()
    few = by_latent[:, rng.permutation(asked.latents)[: asked.loop_latents]]

    def loop() -> None:
        for latent in range(few.shape[1]):
            x = few[:, [latent]].toarray().astype(np.float64)
            for c in range(asked.classes):
                average_precision_score(labels == c, x[:, 0])
                LogisticRegression(C=1).fit(x / max(x.std(), 1e-9), labels == c)

    ours, baseline = alternate(lambda: single_latents(by_latent, labels, asked.classes), loop, rounds=asked.rounds)
    fold_of = assign_folds(labels, groups, 5, rng)
    ks = [k for k in (1, 2, 5, 10, 50) if k <= asked.latents]
    units = unit_rows(dense)
    maps = rng.random((16, 16, 1000))
    parts = {
        "sparse_probes": timed(lambda: sparse_probing(means, labels, fold_of, asked.classes, ks)),
        "dense_probes_of_one_class": timed(
            lambda: sparse_probing(means, np.where(labels == 0, 0, -1), fold_of, 1, ks[:1], dense=dense)
        ),
        "single_latents": ours.seconds,
        "monosemanticity": timed(lambda: monosemanticity(by_latent, units)),
        "morans_i_of_1000_maps": timed(lambda: morans_i(maps)),
    }
    rates = [asked.latents / ours.seconds, few.shape[1] / baseline.seconds]
    emit(
        "score",
        ratio=rates[0] / rates[1],
        target=10,
        ours=ours.to_json(asked.latents, "latents"),
        baseline=baseline.to_json(few.shape[1], "latents"),
        params={**vars(asked), "nonzeros": int(means.nnz), "frequency": origin},
        parts=parts,
        peak_gib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    )


def invent(frequency: Any, n_images: int, rng: np.random.Generator) -> csr_matrix:
    """(n_images, n_latents) means: each latent in its share of the images."""
    blocks = []
    for start in range(0, n_images, 500):
        n = min(500, n_images - start)
        row, column = np.nonzero(rng.random((n, len(frequency)), np.float32) < frequency)
        values = rng.gamma(1, 0.1, len(row)).astype(np.float32) + np.float32(1e-6)
        blocks.append((row + start, column, values))
    row, column, values = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
    return csr_matrix((values, (row, column)), shape=(n_images, len(frequency)))


def timed(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    work()
    took = time.perf_counter() - began
    say(f"{took:.1f} s")
    return took


if __name__ == "__main__":
    main()
