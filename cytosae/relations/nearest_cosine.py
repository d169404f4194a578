"""The nearest directions of two sets, by cosine, by chunks of products instead of the matrix of all.

Twin: a dense product and a sort, in test_stability.py.
"""

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from stores.progress import Progress

Rows = npt.NDArray[np.float32]
_CHUNK = (1024, 8192)  # rows of a and of b: 32 MiB of products


@dataclass(frozen=True, eq=False)
class Nearest:
    """Per row of one set the `k` best of the other, best first; of equals the lower number."""

    value: npt.NDArray[np.float32]  # (n, k); -inf where there are fewer than k
    index: npt.NDArray[np.int32]  # (n, k); -1 there


def nearest(
    a: Rows,
    b: Rows,
    k: int,
    *,
    prices: npt.NDArray[np.float64] | None = None,
    skip: npt.NDArray[Any] | None = None,
    chunk: tuple[int, int] = _CHUNK,
    progress: Progress = lambda done, total, state: None,
) -> tuple[Nearest, Nearest]:
    """For each row of `a` the rows of `b` with the largest product, and the other way round.

    Memory: a chunk of products, and the result. Products are float32; their last bit may depend on the size of the
    chunks.

    Parameters
    ----------
    a, b : (n_a, D) and (n_b, D)
    prices : (n_b,): what is subtracted from every product with a row of `b`
    skip : (n_a,): a row of `b` that does not count for this row of `a`
    """
    of_a, of_b = (_none_yet(len(rows), k) for rows in (a, b))
    height, width = chunk
    n_chunks = -(-len(a) // height) * -(-len(b) // width)
    n_done = 0
    for first_b in range(0, len(b), width):
        columns = b[first_b : first_b + width].T
        price = None if prices is None else prices[first_b : first_b + width].astype(np.float32)
        for first_a in range(0, len(a), height):
            products = a[first_a : first_a + height] @ columns
            if price is not None:
                products -= price
            if skip is not None:
                at = np.arange(len(products)), skip[first_a : first_a + height] - first_b
                is_here = (at[1] >= 0) & (at[1] < products.shape[1])
                products[at[0][is_here], at[1][is_here]] = -np.inf
            _keep_of_rows(products, first_a, first_b, of_a.value, of_a.index)
            _keep_of_columns(products, first_a, first_b, of_b.value, of_b.index)
            n_done += 1
            progress(n_done, n_chunks, "")
    return of_a, of_b


def _none_yet(n: int, k: int) -> Nearest:
    return Nearest(np.full((n, k), -np.inf, np.float32), np.full((n, k), -1, np.int32))


@numba.njit(cache=True)
def _insert(value: Any, number: int, values: Any, numbers: Any) -> None:
    """Insert into a list sorted from large to small, after equal values; the last one is dropped."""
    at = len(values) - 1
    while at > 0 and values[at - 1] < value:
        values[at] = values[at - 1]
        numbers[at] = numbers[at - 1]
        at -= 1
    values[at] = value
    numbers[at] = number


@numba.njit(cache=True)
def _keep_of_rows(products: Any, first_row: int, first_column: int, values: Any, numbers: Any) -> None:
    for i in range(products.shape[0]):
        row = first_row + i
        least = values[row, -1]
        for j in range(products.shape[1]):
            if products[i, j] > least:
                _insert(products[i, j], first_column + j, values[row], numbers[row])
                least = values[row, -1]


@numba.njit(cache=True)
def _keep_of_columns(products: Any, first_row: int, first_column: int, values: Any, numbers: Any) -> None:
    n_columns = products.shape[1]
    least = values[first_column : first_column + n_columns, -1].copy()  # side by side in memory
    for i in range(products.shape[0]):
        for j in range(n_columns):
            if products[i, j] > least[j]:
                _insert(products[i, j], first_row + i, values[first_column + j], numbers[first_column + j])
                least[j] = values[first_column + j, -1]
