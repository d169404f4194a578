"""Do the images of a latent look alike to an image encoder? The monosemanticity of Pach et al. (arXiv 2504.02821).

The mean cosine of the embeddings of two different images, weighted by the product of the latent's activations in them.
Of all pairs, but from sums: with e_n of norm 1 and weights a_n (the smallest activation subtracted; a scale cancels)

    sum over n != m of a_n a_m (e_n . e_m)  =  |sum of a_n e_n|^2 - sum of a_n^2
    sum over n != m of a_n a_m              =  (sum of a_n)^2 - sum of a_n^2

so time grows with the nonzeros times the width, instead of with the square of the images. By chance: embeddings that
are exchanged between images, on average exactly the mean cosine of all pairs. One patient's images resemble each other
for more reasons than one, and the null does not keep patients together: a latent of one patient's stain is well above
it.
"""

from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from scipy.sparse import csc_matrix, csr_matrix

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
_MOST_NUMBERS = 1 << 22  # latents x width, and latents x images, that are worked on at once


def unit_rows(embedding: npt.NDArray[np.floating]) -> Floats:
    """(n, width) about the mean of all rows, then of norm 1; a row that is the mean stays 0.

    Centred, because the tokens of a backbone share a large part, which would bring every cosine near 1.
    """
    centred = embedding.astype(np.float64) - embedding.mean(0, dtype=np.float64)
    norms = np.linalg.norm(centred, axis=1, keepdims=True)
    return np.asarray(centred / np.where(norms > 0, norms, 1))


def monosemanticity(values: csc_matrix, units: Floats) -> Floats:
    """(n_latents,) weighted mean cosine; NaN with fewer than two images of a weight above 0.

    Parameters
    ----------
    values : (n, n_latents) activations, explicit values are not 0
    units : (n, width) rows of norm 1 (or 0)
    """
    n, n_latents = values.shape
    own = (units**2).sum(1)  # 1, or 0
    found = np.full(n_latents, np.nan)
    size = max(1, _MOST_NUMBERS // max(units.shape))
    for start in range(0, n_latents, size):
        some = _weights(values[:, start : start + size], n)
        weights = csr_matrix(some.T)
        sums, squares = np.asarray(weights.sum(1)).ravel(), weights.multiply(weights)
        pairs = sums**2 - np.asarray(squares.sum(1)).ravel()
        top = ((weights @ units) ** 2).sum(1) - np.asarray(squares @ own).ravel()
        is_known = (some.getnnz(0) > 1) & (pairs > 1e-12 * sums**2)
        found[start : start + size][is_known] = top[is_known] / pairs[is_known]
    return found


def monosemanticity_without(values: csc_matrix, units: Floats, block_of: Ints, n_blocks: int) -> Floats:
    """(n_latents, n_blocks): the same without the images of each block, with the same weights and centre.

    block_of : (n,) numbers from 0
    """
    n, n_latents = values.shape
    own = (units**2).sum(1)
    found = np.full((n_latents, n_blocks), np.nan)
    size = max(1, _MOST_NUMBERS // max(units.shape))
    for start in range(0, n_latents, size):
        some = _weights(values[:, start : start + size], n)
        _leave_out(some.indptr, some.indices, some.data, units, own, block_of, found[start : start + size])
    return found


@numba.njit(cache=True, parallel=True, fastmath={"reassoc", "contract"})
def _leave_out(
    indptr: Any, images: Any, weights: Any, units: Any, own: Any, block_of: Any, out: Any
) -> None:  # pragma: no cover - compiled
    width = units.shape[1]
    for latent in numba.prange(len(indptr) - 1):
        low, high = indptr[latent], indptr[latent + 1]
        total, far, equal, sums, squares = np.zeros(width), 0.0, 0.0, 0.0, 0.0
        for k in range(low, high):
            w, e = weights[k], units[images[k]]
            for d in range(width):
                total[d] += w * e[d]
            equal += w * w * own[images[k]]
            sums += w
            squares += w * w
        for d in range(width):
            far += total[d] * total[d]
        order = low + np.argsort(block_of[images[low:high]], kind="mergesort")
        at = 0
        for block in range(out.shape[1]):
            left_far, left_equal, left_sums, left_squares = far, equal, sums, squares
            n_left = high - low
            if at < len(order) and block_of[images[order[at]]] == block:
                part = total.copy()
                while at < len(order) and block_of[images[order[at]]] == block:
                    w, e = weights[order[at]], units[images[order[at]]]
                    for d in range(width):
                        part[d] -= w * e[d]
                    left_equal -= w * w * own[images[order[at]]]
                    left_sums -= w
                    left_squares -= w * w
                    n_left -= 1
                    at += 1
                left_far = 0.0
                for d in range(width):
                    left_far += part[d] * part[d]
            pairs = left_sums * left_sums - left_squares
            if n_left > 1 and pairs > 1e-12 * left_sums * left_sums:
                out[latent, block] = (left_far - left_equal) / pairs


def _weights(values: csc_matrix, n: int) -> csc_matrix:
    """(n, latents) activations less the smallest of their latent, float64."""
    some = csc_matrix(values, dtype=np.float64)
    n_active = np.diff(some.indptr)
    least = np.zeros(len(n_active))
    full = np.flatnonzero(n_active > 0)
    least[full] = np.minimum.reduceat(some.data, some.indptr[full])
    least[n_active < n] = np.minimum(least[n_active < n], 0)  # not active in an image: 0 is there, too
    if (least < 0).any():  # a signed activation: every image then has a weight
        return csc_matrix(some.toarray() - least)
    some.data -= np.repeat(least, n_active)
    return some


def mean_cosine(units: Floats) -> float:
    """Of all pairs of different rows: what shuffled embeddings give on average."""
    n = len(units)
    return float(((units.sum(0) ** 2).sum() - (units**2).sum()) / (n * (n - 1)))
