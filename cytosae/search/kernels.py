"""How alike a query and the images of a block are, row by row of sparse barcodes. Twin: test_search.py, in plain loops.

fingerprint  an image's k latents of largest weighted mean activation; the cosine of two such lists
barcode      the cosine of ln(1 + tokens above tau), weighted
region       of the query region's k largest weighted activations, the share that is found as strongly at some patch of
             the image: sum of w min(value, largest in the image) / sum of w value

All are in [0, 1]. A latent that is in every image has weight 0 by rarity, so it says nothing.
"""

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from stores.csr import CsrRows

Float32s = npt.NDArray[np.float32]


def fingerprint_products(rows: CsrRows, weights: Float32s, k: int, queries: Float32s) -> Float32s:
    """(rows, queries) cosines of fingerprints.

    weights : (latents,)
    queries : (latents, queries), columns of norm 1 or 0
    """
    out = np.zeros((rows.n_rows, queries.shape[1]), np.float32)
    _fingerprints(rows.indptr, rows.indices, rows.values, weights, k, queries, out)
    return out


def barcode_products(rows: CsrRows, weights: Float32s, queries: Float32s) -> Float32s:
    """(rows, queries) cosines of whole barcodes; rows hold counts. Arguments as `fingerprint_products`."""
    out = np.zeros((rows.n_rows, queries.shape[1]), np.float32)
    _cosines(rows.indptr, rows.indices, np.log1p(rows.values), weights, queries, out)
    return out


def region_shares(rows: CsrRows, weights: Float32s, region: Float32s) -> Float32s:
    """(rows, 1) shares of the region that the images have; rows hold the largest value of each latent.

    region : (latents,) values of its k latents, else 0
    """
    out = np.zeros((rows.n_rows, 1), np.float32)
    _shares(rows.indptr, rows.indices, rows.values, weights, region, float(weights @ region), out)
    return out


def fingerprint(
    indices: npt.NDArray[Any], values: Float32s, weights: Float32s, k: int
) -> tuple[npt.NDArray[np.int64], Float32s]:
    """The latents of one fingerprint, largest weighted value first (ties: lower number), and these values.

    indices, values : (n,) the image's latents, rising, and their mean activations
    """
    weighted = values * weights[indices]
    order = np.lexsort((indices, -weighted))[:k]
    order = order[weighted[order] > 0]
    return indices[order].astype(np.int64), weighted[order]


@numba.njit(cache=True, nogil=True)
def _fingerprints(indptr: Any, indices: Any, values: Any, weights: Any, k: int, queries: Any, out: Any) -> None:
    best = np.zeros(k, np.float32)
    which = np.zeros(k, np.int64)
    for row in range(len(indptr) - 1):
        n = 0
        for at in range(indptr[row], indptr[row + 1]):
            value = values[at] * weights[indices[at]]
            if value <= 0 or (n == k and value <= best[k - 1]):
                continue
            n = min(n + 1, k)
            place = n - 1
            while place > 0 and best[place - 1] < value:
                best[place] = best[place - 1]
                which[place] = which[place - 1]
                place -= 1
            best[place] = value
            which[place] = indices[at]
        squares = 0.0
        for place in range(n):
            squares += best[place] * best[place]
        if squares == 0:
            continue
        scale = np.float32(1 / np.sqrt(squares))
        for place in range(n):
            part, latent = best[place] * scale, which[place]
            for query in range(queries.shape[1]):
                out[row, query] += part * queries[latent, query]


@numba.njit(cache=True, nogil=True)
def _cosines(indptr: Any, indices: Any, values: Any, weights: Any, queries: Any, out: Any) -> None:
    for row in range(len(indptr) - 1):
        squares = 0.0
        for at in range(indptr[row], indptr[row + 1]):
            latent = indices[at]
            value = values[at] * weights[latent]
            squares += value * value
            if value != 0:
                for query in range(queries.shape[1]):
                    out[row, query] += value * queries[latent, query]
        if squares > 0:
            scale = np.float32(1 / np.sqrt(squares))
            for query in range(queries.shape[1]):
                out[row, query] *= scale


@numba.njit(cache=True, nogil=True)
def _shares(indptr: Any, indices: Any, values: Any, weights: Any, region: Any, whole: float, out: Any) -> None:
    for row in range(len(indptr) - 1):
        found = 0.0
        for at in range(indptr[row], indptr[row + 1]):
            latent = indices[at]
            if region[latent] > 0:
                found += weights[latent] * min(region[latent], values[at])
        out[row, 0] = found / whole if whole > 0 else 0.0


@numba.njit(cache=True)
def keep_best(scores: Any, numbers: Any, own: Any, of_query: Any, eligible: Any, values: Any, indices: Any) -> None:
    """Put a block's scores into the lists of the best, of equals the earlier image first.

    scores : (rows, queries); numbers : (rows,) of the images; eligible : (rows,) bool
    own, of_query : (rows,), (queries,): an image is passed over where both are equal (the same patient, say)
    values, indices : (queries, n) the lists, changed in place
    """
    n = values.shape[1]
    for row in range(scores.shape[0]):
        if not eligible[row]:
            continue
        for query in range(scores.shape[1]):
            score = scores[row, query]
            if score <= values[query, n - 1] or own[row] == of_query[query]:
                continue
            at = n - 1
            while at > 0 and values[query, at - 1] < score:
                values[query, at] = values[query, at - 1]
                indices[query, at] = indices[query, at - 1]
                at -= 1
            values[query, at] = score
            indices[query, at] = numbers[row]
