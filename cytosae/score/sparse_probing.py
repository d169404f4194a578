"""How well do k latents tell a label from all others, and how much of what the dense tokens can tell is that?

For each label and each fold of whole patients, the k latents are those whose means in and outside of the label differ
most, in units of their standard deviation, in the training rows; then a logistic regression on them, standardised.
Strength of the penalty: of three, the one whose fit without one training fold ranks that fold best. The dense tokens
are fitted by the same rule. Score: area under the ROC curve of the fold that is held out, averaged over folds; 0.5 by
chance, whatever the frequency of the label.

Nothing is chosen with rows that are predicted. (SAIL, arXiv 2603.23794, and SAEBench choose latents in the training
rows likewise; neither holds out patients.)
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_matrix
from scipy.stats import rankdata
from threadpoolctl import threadpool_limits

from cytosae.probe import fit_columns
from stores.machine import n_cores
from stores.part_files import Arrays, Keep, computed
from stores.progress import Progress

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
PENALTIES = (1e-3, 1e-1, 10.0)  # scikit-learn's C, on standardised columns
_LEFT_OUT = -2  # in the place of a class: a row that is not of the training side; -1 is a row of no class


@dataclass(frozen=True)
class ProbeScores:
    """Areas under the ROC curve, averaged over folds; NaN where no fold has the label in both sides."""

    latents: Floats  # (number of ks, n_classes)
    dense: Floats | None  # (n_classes,)
    latents_without: Floats | None = None  # (number of ks, n_classes, blocks): the same without each block of images
    dense_without: Floats | None = None  # (n_classes, blocks)


def sparse_probing(
    values: csr_matrix,
    labels: Ints,
    fold_of: Ints,
    n_classes: int,
    ks: Sequence[int],
    *,
    dense: npt.NDArray[np.float32] | None = None,
    block_of: Ints | None = None,
    keep: Keep = computed,
    progress: Progress = lambda done, total, state: None,
) -> ProbeScores:
    """Probe every class against all other rows with k latents, and with all dense columns.

    Memory: a float64 number per latent and class, and for each thread a few copies of the dense columns in float64.

    Parameters
    ----------
    values : (n, n_latents) means of latents
    labels : (n,) class 0..n_classes - 1; -1: none of these
    fold_of : (n,) fold of each row; three folds or more, whole groups in one
    dense : (n, width)
    block_of : (n,) numbers from 0: also score the same fits without the tested rows of each block
    keep : each fold is kept
    """
    n_folds, n_blocks = int(fold_of.max()) + 1, 0 if block_of is None else int(block_of.max()) + 1
    areas = []
    n_done, n_jobs = 0, n_folds * n_classes
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(n_cores()) as pool:
        for fold in range(n_folds):

            def one_fold(fold: int = fold, n_done: int = n_done) -> Arrays:
                training = fold_of != fold
                ranked = rank_latents(values, labels, n_classes, max(ks), training)
                found = np.full((len(ks) + 1, n_classes, 1 + n_blocks), np.nan)

                def probe(c: int) -> None:
                    truth = labels == c
                    if not (truth & training).any() or not (truth & ~training).any() or (truth | training).all():
                        return
                    x = values[:, ranked[c]].toarray().astype(np.float64)
                    for number, k in enumerate(ks):
                        found[number, c] = _held_out(x[:, :k], truth, fold_of, fold, n_folds, block_of, n_blocks)
                    if dense is not None:
                        whole = dense.astype(np.float64)
                        found[-1, c] = _held_out(whole, truth, fold_of, fold, n_folds, block_of, n_blocks)

                for n_probed, _ in enumerate(pool.map(probe, range(n_classes)), start=n_done + 1):
                    progress(n_probed, n_jobs, "probes")
                return {"areas": found}

            areas.append(keep(f"fold_{fold}", one_fold)["areas"])
            n_done += n_classes
            progress(n_done, n_jobs, "probes")
    means = _mean(np.stack(areas, axis=-1))
    return ProbeScores(
        means[:-1, :, 0],
        None if dense is None else means[-1, :, 0],
        None if block_of is None else means[:-1, :, 1:],
        None if block_of is None or dense is None else means[-1, :, 1:],
    )


def rank_latents(values: csr_matrix, labels: Ints, n_classes: int, n_top: int, training: Bools | None = None) -> Ints:
    """(n_classes, up to n_top) latents whose mean in the class differs most from the mean elsewhere, best first.

    In units of the standard deviation over all rows; equal ones by their number; those that do not vary are last.

    training : (n,) the rows that count; None: all. The others are not looked at, and nothing is copied
    """
    n_latents = values.shape[1]
    class_of = labels.astype(np.int64) if training is None else np.where(training, labels, _LEFT_OUT)
    n = int((class_of > _LEFT_OUT).sum())
    totals, squares = np.zeros((2, n_latents))
    of_class = np.zeros((n_classes, n_latents))
    _add_rows(values.indptr, values.indices, values.data, class_of, totals, squares, of_class)
    spread = np.sqrt(np.maximum(squares / n - (totals / n) ** 2, 0))
    top = np.zeros((n_classes, min(n_top, n_latents)), np.int64)
    for c in range(n_classes):
        inside, n_inside = of_class[c], int((class_of == c).sum())
        difference = inside / max(1, n_inside) - (totals - inside) / max(1, n - n_inside)
        varies = spread > 1e-9 * np.maximum(np.abs(totals / n), 1e-300)
        effect = np.where(varies, np.abs(difference) / np.where(varies, spread, 1), -1)
        top[c] = np.argsort(-np.round(effect, 12), kind="stable")[: top.shape[1]]
    return top


@numba.njit(cache=True, nogil=True)
def _add_rows(
    indptr: Any, indices: Any, data: Any, class_of: Any, totals: Any, squares: Any, of_class: Any
) -> None:  # pragma: no cover - compiled
    """Sums of the values and of their squares, in float64, of the rows that count; and of those of each class."""
    for row in range(len(class_of)):
        c = class_of[row]
        if c <= _LEFT_OUT:
            continue
        for at in range(indptr[row], indptr[row + 1]):
            latent, value = indices[at], np.float64(data[at])
            totals[latent] += value
            squares[latent] += value * value
            if c >= 0:
                of_class[c, latent] += value


def area_under_roc(truth: Bools, score: Floats) -> float:
    """Share of pairs of a true and another row that the score ranks rightly, ties half."""
    n_true = int(truth.sum())
    return float((rankdata(score)[truth].sum() - n_true * (n_true + 1) / 2) / (n_true * (len(truth) - n_true)))


def areas_without(truth: Bools, score: Floats, block_of: Ints, n_blocks: int) -> Floats:
    """(1 + n_blocks,) area under the ROC curve of all rows, and without the rows of each block; NaN without pairs.

    From the pairs that each row wins: a block takes with it those of its rows, but pairs of two of its rows only once.
    """
    n_true = int(truth.sum())
    ranks, is_false = rankdata(score), ~truth
    won = np.zeros(len(score))
    won[truth] = ranks[truth] - rankdata(score[truth])  # other rows below this one, ties half
    won[is_false] = n_true - (ranks[is_false] - rankdata(score[is_false]))
    total = float(won[truth].sum())
    left = total - np.bincount(block_of, won, n_blocks)
    of_true = np.bincount(block_of[truth], minlength=n_blocks)
    of_false = np.bincount(block_of[is_false], minlength=n_blocks)
    for block in np.flatnonzero((of_true > 0) & (of_false > 0)).tolist():
        mine = block_of == block
        left[block] += area_under_roc(truth[mine], score[mine]) * of_true[block] * of_false[block]
    pairs = (n_true - of_true) * (len(truth) - n_true - of_false)
    without = np.where(pairs > 0, left / np.maximum(1, pairs), np.nan)
    return np.concatenate([[total / (n_true * (len(truth) - n_true))], without])


def _held_out(
    x: Floats, truth: Bools, fold_of: Ints, fold: int, n_folds: int, block_of: Ints | None, n_blocks: int
) -> Floats:
    """(1 + n_blocks,) areas of the fold: as it is, and without the rows of each block."""
    training, inner = fold_of != fold, fold_of == (fold + 1) % n_folds
    best = PENALTIES[0]
    seen = training & ~inner
    if truth[inner].any() and not truth[inner].all() and truth[seen].any() and not truth[seen].all():
        tried = [area_under_roc(truth[inner], _logits(x, truth, seen, inner, C)) for C in PENALTIES]
        best = PENALTIES[int(np.argmax(np.round(tried, 9)))]  # of equal ones the strongest penalty
    tested = ~training
    if truth[tested].all():
        return np.full(1 + n_blocks, np.nan)
    logits = _logits(x, truth, training, tested, best)
    if block_of is None:
        return np.array([area_under_roc(truth[tested], logits)])
    return areas_without(truth[tested], logits, block_of[tested], n_blocks)


def _logits(x: Floats, truth: Bools, training: Bools, tested: Bools, C: float) -> Floats:
    """Decision values, not probabilities: these are equal where they are near 1."""
    seen = x[training]
    mean, spread = seen.mean(0), seen.std(0)
    spread = np.where(spread > 1e-9 * np.maximum(np.abs(mean), 1e-300), spread, np.inf)
    fit = fit_columns((seen - mean) / spread, truth[training].astype(np.int64), 2, C)
    logits: Floats = ((x[tested] - mean) / spread) @ (fit.weights[:, 1] - fit.weights[:, 0])
    return logits


def _mean(scores: Floats) -> Floats:
    """Over the last axis, without NaN; NaN where there is nothing else."""
    known = ~np.isnan(scores)
    sums = np.where(known, scores, 0).sum(-1)
    return np.where(known.any(-1), sums / np.maximum(1, known.sum(-1)), np.nan)
