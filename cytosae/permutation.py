"""Do two groups of units differ, column by column, by more than groups drawn at random do?

The statistic is the difference of the two means. Each column is centred and divided by its standard deviation over all
units, whoever they belong to, and put in whole steps, so that the sum over one group stands for the difference:

    z[i, c] = (x[i, c] - mean of c) / sd of c        s*[c] = sum of z over the units that a permutation calls A
    p[c]       = (1 + number of permutations with     |s*[c]| >= |s[c]|) / (1 + number of permutations)
    p_max_t[c] = (1 + number of permutations with max_k |s*[k]| >= |s[c]|) / (1 + number of permutations)

|s| rises with the absolute value of the pooled t statistic, the same way in every column: so the two orders are those
of |t|, and p_max_t is the single-step max-T adjustment of Westfall and Young. Where there are no more splits than
permutations asked for, all of them are taken, once each, the observed one included: p = number / all.

Sums are of int32: exact in any order, so p-values depend on no thread, library or processor. A sum is put together
from the sums of eight units at a time, of which a table holds all 256. Twin: tests/test_permutation.py.
"""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, combinations, islice

import numba
import numpy as np
import numpy.typing as npt

from cyto_machine import n_cores
from stores.progress import Progress

_RANGE = 1 << 30  # steps: no sum is larger, since the absolute z of n units sum to at most n (Cauchy and Schwarz)
_SPLITS = 1 << 14  # looked at together
_COLUMNS = 1 << 11  # of a task
_LANES = 64  # columns of a table of sums
_BYTES = 8  # of a split that are looked up together


@dataclass(frozen=True)
class PermutationTest:
    """What came of it."""

    p: npt.NDArray[np.float64]  # (columns,), two-sided
    p_max_t: npt.NDArray[np.float64]  # (columns,), adjusted for all columns
    n_permutations: int  # that were looked at: those asked for, or all splits
    is_exact: bool  # all splits
    floor: float  # no p can be smaller


def permutation_test(
    values: npt.NDArray[np.floating],
    is_a: npt.NDArray[np.bool_],
    *,
    n_permutations: int,
    seed: int,
    progress: Progress = lambda done, total, state: None,
) -> PermutationTest:
    """Two-sided p-values of the difference of means, for every column at once.

    Sums that differ by less than what rounding leaves open (of the values' own type, and to steps) count as equal,
    which can only make a p larger. A column that does not vary has p 1. Memory: another four bytes per value.

    Parameters
    ----------
    values : finite, shape (units, columns)
    is_a : shape (units,): which group a unit belongs to; both have members
    n_permutations : at least 1
    """
    n_units, n_columns = values.shape
    n_a = int(is_a.sum())
    n_splits = math.comb(n_units, n_a)
    is_exact = n_splits <= n_permutations
    total = n_splits if is_exact else n_permutations
    steps, slack = _to_steps(values)
    observed = np.abs(steps[:, :n_units][:, is_a].sum(1, dtype=np.int64))
    bounds = np.full(len(steps), np.iinfo(np.int32).max, np.int32)  # that no column of the padding reaches
    bounds[:n_columns] = observed[:n_columns] - slack

    n_as_extreme, n_max = np.zeros((2, len(steps)), np.int64)
    tasks = [slice(first, first + _COLUMNS) for first in range(0, len(steps), _COLUMNS)]
    n_done = 0
    progress(0, total, "")
    with ThreadPoolExecutor(n_cores(), thread_name_prefix="permutation") as threads:
        for masks in _all_splits(n_units, n_a) if is_exact else _random_splits(is_a, total, seed):
            codes = _to_bytes(masks)

            def count(some: slice, codes: npt.NDArray[np.uint8] = codes) -> npt.NDArray[np.int32]:
                return _count(steps[some], codes, bounds[some], n_as_extreme[some])

            largest = np.sort(np.max(list(threads.map(count, tasks)), 0))
            n_max += len(largest) - np.searchsorted(largest, bounds)
            n_done += len(largest)
            progress(n_done, total, "")

    drawn = 0 if is_exact else 1  # the observed split counts as one of the permutations
    n_at_least = 2 if is_exact and 2 * n_a == n_units else 1  # groups of one size: every split has its mirror
    return PermutationTest(
        p=(drawn + n_as_extreme[:n_columns]) / (drawn + total),
        p_max_t=(drawn + n_max[:n_columns]) / (drawn + total),
        n_permutations=total,
        is_exact=is_exact,
        floor=n_at_least / (drawn + total),
    )


def _to_steps(values: npt.NDArray[np.floating]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """z of each column in steps (padded columns, padded units), and up to which difference two sums are equal.

    A step is n_units / _RANGE standard deviations. Rounding to steps moves each of two sums by at most half a step per
    unit; the rounding that the values have behind them, by half an eps of each value that stands in it, or of the mean.
    """
    n_units, n_columns = values.shape
    steps = np.zeros((_padded(n_columns, _LANES), _padded(n_units, 8 * _BYTES)), np.int32)
    slack = np.empty(n_columns, np.int64)
    for first in range(0, n_columns, _COLUMNS):
        block = np.ascontiguousarray(values[:, first : first + _COLUMNS].T, np.float64)
        centred = block - block.mean(1, keepdims=True)
        varies = block.min(1) < block.max(1)
        per_step = np.zeros(len(block))
        np.divide(_RANGE / n_units, np.sqrt((centred**2).mean(1)), out=per_step, where=varies)
        steps[first : first + len(block), :n_units] = np.rint(centred * per_step[:, None])
        rounding = 2 * np.finfo(values.dtype).eps * np.abs(block).sum(1) * per_step
        slack[first : first + len(block)] = n_units + np.ceil(np.minimum(rounding, _RANGE))
    return steps, slack


def _padded(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _random_splits(is_a: npt.NDArray[np.bool_], total: int, seed: int) -> Iterator[npt.NDArray[np.uint8]]:
    rng = np.random.default_rng(seed)
    for done in range(0, total, _SPLITS):
        masks = np.tile(is_a.astype(np.uint8), (min(_SPLITS, total - done), 1))
        yield rng.permuted(masks, axis=1, out=masks)


def _all_splits(n_units: int, n_a: int) -> Iterator[npt.NDArray[np.uint8]]:
    splits = combinations(range(n_units), n_a)
    while some := list(islice(splits, _SPLITS)):
        masks = np.zeros((len(some), n_units), np.uint8)
        np.put_along_axis(masks, np.fromiter(chain.from_iterable(some), np.int64).reshape(len(some), n_a), 1, 1)
        yield masks


def _to_bytes(masks: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """(splits, units) of 0 and 1 as bits, unit 8 k + b being bit b of byte k; padded as the steps are."""
    packed = np.packbits(masks, axis=1, bitorder="little")
    return np.pad(packed, ((0, 0), (0, _padded(packed.shape[1], _BYTES) - packed.shape[1])))


@numba.njit(nogil=True, cache=True)
def _count(steps, codes, bounds, n_as_extreme):  # type: ignore[no-untyped-def]  # numba's to type
    """Add to each column how many splits reach its bound; the largest |sum| of each split over these columns.

    Loops over lanes become vector instructions; the eight rows of a line are named so that the compiler sees them.
    """
    n_bytes = codes.shape[1]
    largest = np.zeros(len(codes), np.int32)
    table = np.empty((n_bytes, 256, _LANES), np.int32)
    unit, total, counts = np.empty((3, _LANES), np.int32)
    for first in range(0, len(steps), _LANES):
        for byte in range(n_bytes):
            table[byte, 0] = 0
            for bit in range(8):
                for lane in range(_LANES):
                    unit[lane] = steps[first + lane, 8 * byte + bit]
                for lower in range(1 << bit):
                    for lane in range(_LANES):
                        table[byte, (1 << bit) | lower, lane] = table[byte, lower, lane] + unit[lane]
        reached = bounds[first : first + _LANES]
        counts[:] = 0
        for split in range(len(codes)):
            code = codes[split]
            total[:] = 0
            for byte in range(0, n_bytes, 8):
                a, b = table[byte, code[byte]], table[byte + 1, code[byte + 1]]
                c, d = table[byte + 2, code[byte + 2]], table[byte + 3, code[byte + 3]]
                e, f = table[byte + 4, code[byte + 4]], table[byte + 5, code[byte + 5]]
                g, h = table[byte + 6, code[byte + 6]], table[byte + 7, code[byte + 7]]
                for lane in range(_LANES):
                    total[lane] += a[lane] + b[lane] + c[lane] + d[lane] + e[lane] + f[lane] + g[lane] + h[lane]
            most = np.int32(0)
            for lane in range(_LANES):
                size = np.int32(abs(total[lane]))
                counts[lane] += np.int32(size >= reached[lane])
                most = max(most, size)
            largest[split] = max(most, largest[split])
        n_as_extreme[first : first + _LANES] += counts
    return largest
