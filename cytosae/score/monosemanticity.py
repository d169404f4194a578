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

import numpy as np
import numpy.typing as npt
from scipy.sparse import csc_matrix, csr_matrix

Floats = npt.NDArray[np.float64]
_MOST_NUMBERS = 1 << 22  # latents x width that are summed at once


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
    size = max(1, _MOST_NUMBERS // units.shape[1])
    for start in range(0, n_latents, size):
        some = csc_matrix(values[:, start : start + size], dtype=np.float64)
        n_active = np.diff(some.indptr)
        least = np.zeros(len(n_active))
        full = np.flatnonzero(n_active > 0)
        least[full] = np.minimum.reduceat(some.data, some.indptr[full])
        least[n_active < n] = np.minimum(least[n_active < n], 0)  # not active in an image: 0 is there, too
        if (least < 0).any():  # a signed activation: every image then has a weight
            some = csc_matrix(some.toarray() - least)
        else:
            some.data -= np.repeat(least, n_active)
        weights = csr_matrix(some.T)
        sums, squares = np.asarray(weights.sum(1)).ravel(), weights.multiply(weights)
        pairs = sums**2 - np.asarray(squares.sum(1)).ravel()
        top = ((weights @ units) ** 2).sum(1) - np.asarray(squares @ own).ravel()
        is_known = (some.getnnz(0) > 1) & (pairs > 1e-12 * sums**2)
        found[start : start + size][is_known] = top[is_known] / pairs[is_known]
    return found


def mean_cosine(units: Floats) -> float:
    """Of all pairs of different rows: what shuffled embeddings give on average."""
    n = len(units)
    return float(((units.sum(0) ** 2).sum() - (units**2).sum()) / (n * (n - 1)))
