"""What one latent says about one label: average precision, and a logistic regression on this latent alone.

Both for every latent and label, from the nonzeros: an image in which a latent is not active has the value 0, and all
of these count together.

average precision   of the images, the largest mean activation first; equal values are one step (as scikit-learn)
one-latent probe    sum of log losses + w^2 / 2 is minimised, of one latent in units of its standard deviation, with a
                    free intercept; reported is the share of the label's own log loss that it removes (McFadden's R2)

Average precision by chance is the share of images with the label, and the best of thousands of latents is above that by
chance, too: compare with the best of the same latents when labels are shuffled.
"""

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from scipy.sparse import csc_matrix

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
_MOST_STEPS = 50
_NEAR = 1e-9  # Newton decrement at which a fit ends


@dataclass(frozen=True)
class SingleLatents:
    """For each latent and class, (n_latents, n_classes)."""

    average_precision: Floats  # NaN for a class without an image
    removed: Floats  # share of the log loss removed by the one-latent probe; NaN where the class is all or none


def single_latents(values: csc_matrix, labels: Ints, n_classes: int) -> SingleLatents:
    """Average precision and one-latent probe of every latent for every class against all other images.

    Time grows with the number of nonzeros, once for average precision, and for each class about eight times for the
    probe. Memory: the two results, and a latent for each thread.

    Parameters
    ----------
    values : (n, n_latents), explicit values are not 0
    labels : (n,) class 0..n_classes - 1 of each image; -1: none of these
    """
    totals = np.bincount(labels[labels >= 0], minlength=n_classes).astype(np.int64)
    shape = (values.shape[1], n_classes)
    precision, removed = np.zeros(shape), np.zeros(shape)
    _every_latent(values.indptr, values.indices, values.data, labels.astype(np.int64), totals, precision, removed)
    precision[:, totals == 0] = np.nan
    removed[:, (totals == 0) | (totals == len(labels))] = np.nan
    return SingleLatents(precision, removed)


def single_without(
    values: csc_matrix, labels: Ints, block_of: Ints, n_blocks: int, latents: Ints
) -> tuple[Floats, Floats]:
    """Average precision, and share of the log loss removed, without the images of each block: (n_classes, n_blocks).

    Parameters
    ----------
    values, labels : as in `single_latents`
    block_of : (n,) numbers from 0
    latents : (n_classes,) which latent for each class
    """
    shape = (len(latents), n_blocks)
    precision, removed = np.full(shape, np.nan), np.full(shape, np.nan)
    for c, latent in enumerate(latents.tolist()):
        low, high = values.indptr[latent], values.indptr[latent + 1]
        images = values.indices[low:high]
        order = np.argsort(-values.data[low:high].astype(np.float64), kind="stable")
        value, of_class = values.data[low:high][order].astype(np.float64), labels == c
        _every_block(
            *(value, np.where(of_class[images[order]], 0, -1), block_of[images[order]]),
            *(np.bincount(block_of, minlength=n_blocks), np.bincount(block_of[of_class], minlength=n_blocks)),
            *(precision[c], removed[c]),
        )
    return precision, removed


@numba.njit(cache=True, parallel=True)
def _every_block(
    value: Any, of: Any, block: Any, n_of: Any, hits_of: Any, precision: Any, removed: Any
) -> None:  # pragma: no cover - compiled
    n, hits = n_of.sum(), hits_of.sum()
    for left_out in numba.prange(len(n_of)):
        kept = block != left_out
        totals = np.array([hits - hits_of[left_out]])
        left = n - n_of[left_out]
        if totals[0] == 0:
            continue
        out = np.zeros(1)
        _average_precision(value[kept], of[kept], left, totals, out)
        precision[left_out] = out[0]
        if totals[0] < left:
            out[0] = 0.0
            _one_latent_probe(value[kept], of[kept], left, totals, out)
            removed[left_out] = out[0]


@numba.njit(cache=True, parallel=True)
def _every_latent(
    indptr: Any, indices: Any, data: Any, labels: Any, totals: Any, precision: Any, removed: Any
) -> None:  # pragma: no cover - compiled
    for latent in numba.prange(len(indptr) - 1):
        low, high = indptr[latent], indptr[latent + 1]
        value, of = data[low:high].astype(np.float64), labels[indices[low:high]]
        order = np.argsort(-value, kind="mergesort")
        value, of = value[order], of[order]
        _average_precision(value, of, len(labels), totals, precision[latent])
        _one_latent_probe(value, of, len(labels), totals, removed[latent])


@numba.njit(cache=True)
def _average_precision(value: Any, of: Any, n: int, totals: Any, out: Any) -> None:  # pragma: no cover - compiled
    n_classes = len(totals)
    hits, new = np.zeros(n_classes, np.int64), np.zeros(n_classes, np.int64)
    zeros = totals.copy()  # images of each class in which the latent is not active
    for label in of:
        if label >= 0:
            zeros[label] -= 1
    seen, at, zeros_done = 0, 0, len(value) == n
    while at < len(value) or not zeros_done:
        new[:] = 0
        if not zeros_done and (at == len(value) or value[at] < 0):
            new[:] = zeros
            seen += n - len(value)
            zeros_done = True
        else:
            first = value[at]
            while at < len(value) and value[at] == first:
                if of[at] >= 0:
                    new[of[at]] += 1
                seen += 1
                at += 1
        for c in range(n_classes):
            if new[c]:
                hits[c] += new[c]
                out[c] += new[c] / totals[c] * hits[c] / seen


@numba.njit(cache=True)
def _one_latent_probe(value: Any, of: Any, n: int, totals: Any, out: Any) -> None:  # pragma: no cover - compiled
    mean = value.sum() / n
    variance = ((value - mean) ** 2).sum() / n + (n - len(value)) / n * mean**2
    if len(value) == 0 or variance <= 1e-24 * max(1e-300, mean**2):
        return
    x = value / np.sqrt(variance)
    for c in range(len(totals)):
        if totals[c] == 0 or totals[c] == n:
            continue
        n_zero, hits_zero = n - len(value), totals[c]
        for label in of:
            if label == c:
                hits_zero -= 1
        share = totals[c] / n
        base = -n * (share * np.log(share) + (1 - share) * np.log(1 - share))
        w, b = 0.0, np.log(share / (1 - share))
        loss, objective = base, base
        for _ in range(_MOST_STEPS):
            p = 1 / (1 + np.exp(-b))
            gb, gw = n_zero * p - hits_zero, w
            hbb, hbw, hww = n_zero * p * (1 - p), 0.0, 1.0
            for k in range(len(x)):
                p = 1 / (1 + np.exp(-(w * x[k] + b)))
                rest, curve = p - (1.0 if of[k] == c else 0.0), p * (1 - p)
                gb += rest
                gw += rest * x[k]
                hbb += curve
                hbw += curve * x[k]
                hww += curve * x[k] * x[k]
            hbb += 1e-12
            determinant = hbb * hww - hbw * hbw
            step_b, step_w = (hww * gb - hbw * gw) / determinant, (hbb * gw - hbw * gb) / determinant
            decrement = gb * step_b + gw * step_w
            if decrement < _NEAR:
                break
            length = 1.0
            while length > 1e-6:
                new_w, new_b = w - length * step_w, b - length * step_b
                new_loss = _log_loss(x, of, c, n_zero, hits_zero, new_w, new_b)
                if new_loss + new_w * new_w / 2 <= objective - 1e-4 * length * decrement:
                    break
                length /= 2
            if length <= 1e-6:
                break
            w, b, loss = new_w, new_b, new_loss
            objective = loss + w * w / 2
        out[c] = 1 - loss / base


@numba.njit(cache=True)
def _log_loss(x: Any, of: Any, c: int, n_zero: int, hits_zero: int, w: float, b: float) -> float:  # pragma: no cover
    loss = hits_zero * _softplus(-b) + (n_zero - hits_zero) * _softplus(b)
    for k in range(len(x)):
        logit = w * x[k] + b
        loss += _softplus(-logit if of[k] == c else logit)
    return loss


@numba.njit(cache=True)
def _softplus(value: float) -> float:  # pragma: no cover - compiled
    return max(value, 0.0) + np.log1p(np.exp(-abs(value)))
