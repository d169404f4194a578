"""The one-to-one assignment with the largest sum, over a sparse list of pairs, with the dual prices that prove it.

Shortest augmenting paths (Jonker and Volgenant, Computing 38, 1987) on lists of pairs; a row may stay unmatched, which
is worth 0. The dual prices u of rows and v of columns are at least 0, and u + v >= weight for every pair in the list,
so the sum of all prices is a bound on every assignment, and equal to the sum of this one. Twin: scipy's dense
linear_sum_assignment, in test_stability.py.

scipy's min_weight_full_bipartite_matching finds the same sums, but is 4 to 24 times slower on sparse candidates and
does not return the prices, which `stability.py` needs (measured: docs/log.md).
"""

from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

_PASSES = 2  # of the auction that comes first, since it is cheap


@dataclass(frozen=True, eq=False)
class Assignment:
    """A one-to-one assignment and its dual prices."""

    column_of_row: npt.NDArray[np.int64]  # (n_rows,); -1: unmatched
    row_prices: npt.NDArray[np.float64]  # (n_rows,)
    column_prices: npt.NDArray[np.float64]  # (n_columns,)


def assign(
    row: npt.NDArray[np.int64],
    column: npt.NDArray[np.int64],
    weight: npt.NDArray[np.float64],
    n_rows: int,
    n_columns: int,
) -> Assignment:
    """The best assignment among the pairs (row[k], column[k]), each given once; a weight of 0 or less never counts."""
    counts = weight > 0
    row, column, weight = row[counts], column[counts], weight[counts]
    order = np.lexsort((column, row))
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.bincount(row, minlength=n_rows))])
    pairs = starts, column[order], weight[order]
    column_of_row, row_of_column = np.full(n_rows, -1), np.full(n_columns, -1)
    u, v = np.zeros(n_rows), np.zeros(n_columns)
    free = np.arange(n_rows)
    for _ in range(_PASSES):
        free = _bid(*pairs, free, column_of_row, row_of_column, u, v)
    _augment(*pairs, free, column_of_row, row_of_column, u, v)
    return Assignment(column_of_row, u, v)


@numba.njit(cache=True)
def _bid(
    starts: Any, columns: Any, weights: Any, free: Any, column_of_row: Any, row_of_column: Any, u: Any, v: Any
) -> Any:
    """One pass of an auction: each free row takes its best column, at a price that makes its second best as good.

    Returns the rows that lost their column to another row, and are free again.
    """
    left = [np.int64(0) for _ in range(0)]
    for i in free:
        best, second, at = 0.0, 0.0, -1  # staying unmatched is worth 0
        for k in range(starts[i], starts[i + 1]):
            worth = weights[k] - v[columns[k]]
            if worth > best:
                best, second, at = worth, best, columns[k]
            elif worth > second:
                second = worth
        u[i] = second
        if at < 0:
            continue
        v[at] += best - second
        if row_of_column[at] >= 0:
            column_of_row[row_of_column[at]] = -1
            left.append(row_of_column[at])
        row_of_column[at] = i
        column_of_row[i] = at
    return np.array(left, np.int64)


@numba.njit(cache=True)
def _augment(
    starts: Any, columns: Any, weights: Any, free: Any, column_of_row: Any, row_of_column: Any, u: Any, v: Any
) -> None:
    """Match the free rows one by one, each along the augmenting path of least cost (Dijkstra, with a heap)."""
    distance = np.full(len(v), np.inf)
    came_from = np.full(len(v), -1)  # row from which a column is reached
    is_done = np.zeros(len(v), np.bool_)
    for f in free:
        u[f] = 0.0
        for k in range(starts[f], starts[f + 1]):
            u[f] = max(u[f], weights[k] - v[columns[k]])
        heap = [(0.0, np.int64(-1)) for _ in range(0)]
        seen = [np.int64(0) for _ in range(0)]
        done = [np.int64(0) for _ in range(0)]
        row, so_far = f, 0.0
        end, end_row, least = -1, f, u[f]  # the row itself stays unmatched
        while True:
            for k in range(starts[row], starts[row + 1]):
                j = columns[k]
                there = so_far + max(0.0, u[row] + v[j] - weights[k])
                if there < distance[j] and there < least and not is_done[j]:
                    if distance[j] == np.inf:
                        seen.append(j)
                    distance[j] = there
                    came_from[j] = row
                    if row_of_column[j] < 0:
                        end, least = j, there
                    else:
                        heappush(heap, (there, j))
            j = np.int64(-1)
            while len(heap) > 0:
                so_far, j = heappop(heap)
                if not is_done[j] and so_far == distance[j]:
                    break
                j = np.int64(-1)
            if j < 0 or so_far >= least:
                break
            is_done[j] = True
            done.append(j)
            row = row_of_column[j]
            if so_far + u[row] < least:  # this row stays unmatched instead
                end, end_row, least = -1, row, so_far + u[row]
        u[f] -= least
        for j in done:
            u[row_of_column[j]] -= least - distance[j]
            v[j] += least - distance[j]
        if end < 0:  # `end_row` loses its column to the one before it on the path
            end = column_of_row[end_row]
            column_of_row[end_row] = -1
            u[end_row] = 0.0
        while end >= 0:
            row = came_from[end]
            row_of_column[end] = row
            end, column_of_row[row] = column_of_row[row], end
        for j in seen:
            distance[j] = np.inf
            is_done[j] = False
