"""Do two groups of units differ, column by column, by more than groups drawn at random do?

The statistic is the difference of the two means. Each column is centred, divided by its standard deviation over all
units of both groups, and quantised to integers, so that the sum over one group is proportional to the difference:

    z[i, c] = (x[i, c] - mean of c) / sd of c        s*[c] = sum of z over the units that a permutation calls A
    p[c]       = (1 + number of permutations with     |s*[c]| >= |s[c]|) / (1 + number of permutations)
    p_max_t[c] = (1 + number of permutations with max_k |s*[k]| >= |s[c]|) / (1 + number of permutations)

|s| is an increasing function of the absolute pooled t statistic, the same function for every column. So ordering by |s|
is ordering by |t|, and p_max_t is the single-step max-T adjustment of Westfall and Young. p_step_down is their
step-down adjustment: the maximum is taken over the columns whose |s| is no larger than that of c, and p is made
non-decreasing towards smaller |s|. If there are no more splits of the units than permutations asked for, each split is
taken once, the observed one included: p = number / all.

With strata, units are permuted within their stratum, and z is centred within each: |s| then increases with |t| of the
group in a regression on group and strata. Units of a stratum with one group only are left out.

Sums are of int32, which is exact in any order: p-values do not depend on threads, libraries or processors. A sum is
looked up eight units at a time, in tables of the 256 sums of eight units. Twin: test_permutation.py.
"""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain, combinations, islice

import numba
import numpy as np
import numpy.typing as npt

from stores.machine import n_cores
from stores.progress import Progress

_RANGE = 1 << 30  # bound on sums, in steps: the absolute z of n units sum to at most n (Cauchy-Schwarz)
_SPLITS = 1 << 14  # splits that are generated together
_PIECE = 1 << 11  # splits, at least, of one thread's task
_COLUMNS = 1 << 11  # columns that are quantised together
_LANES = 64  # columns of a table of sums
_BYTES = 8  # bytes of a split whose sums are added together
_ORDER = -0.8  # of the generalised mean that combines the p-values of draws


@dataclass(frozen=True)
class PermutationTest:
    """P-values of every column."""

    p: npt.NDArray[np.float64]  # (columns,), two-sided
    p_mid: npt.NDArray[np.float64]  # (columns,): the same, with splits that tie with the observed one counted half
    p_max_t: npt.NDArray[np.float64]  # (columns,), adjusted for all columns
    p_step_down: npt.NDArray[np.float64]  # (columns,), adjusted step by step: never above p_max_t
    n_permutations: int  # that were counted: those asked for, or all splits
    is_exact: bool  # all splits were counted, once each
    floor: float  # the smallest possible p


def permutation_test(
    values: npt.NDArray[np.floating],
    is_a: npt.NDArray[np.bool_],
    *,
    n_permutations: int,
    seed: int,
    strata: npt.NDArray[np.int64] | None = None,
    progress: Progress = lambda done, total, state: None,
) -> PermutationTest:
    """Two-sided p-values of the difference of means, for every column at once.

    Sums that differ by less than the rounding error (of the values' own type, and of the quantisation) count as equal,
    which can only make a p larger. A column that does not vary has p 1. Memory: another eight bytes per value.

    Parameters
    ----------
    values : finite, shape (units, columns)
    is_a : shape (units,): whether a unit is of group A; both groups have members
    n_permutations : at least 1
    strata : shape (units,): units are permuted within each; None: one stratum

    Raises
    ------
    ValueError
        If no stratum has members of both groups.
    """
    if strata is not None:
        used = in_both_groups(strata, is_a)
        if not used.any():
            raise ValueError("no stratum has members of both groups")
        values, is_a, strata = values[used], is_a[used], strata[used]
    members = [np.arange(len(is_a))] if strata is None else [np.flatnonzero(strata == s) for s in np.unique(strata)]
    n_columns = values.shape[1]
    n_of_a = [int(is_a[rows].sum()) for rows in members]
    n_splits = math.prod(math.comb(len(rows), n) for rows, n in zip(members, n_of_a, strict=True))
    is_exact = n_splits <= n_permutations
    total = n_splits if is_exact else n_permutations
    steps, slack = _quantise(values, members)
    bounds = np.abs(steps[:, : len(is_a)][:, is_a].sum(1, dtype=np.int64))
    above = bounds.copy()  # of equal sums none reaches it
    above[:n_columns] += slack + 1
    bounds[:n_columns] -= slack
    order = np.concatenate([np.argsort(-bounds[:n_columns], kind="stable"), np.arange(n_columns, len(steps))])
    most = np.iinfo(np.int32).max
    bounds[n_columns:] = above[n_columns:] = most  # that no column of the padding reaches
    steps, bounds, above = steps[order], bounds[order].astype(np.int32), np.minimum(above[order], most).astype(np.int32)

    n_as_extreme, n_above, n_max, n_from_here = np.zeros((4, len(steps)), np.int64)
    n_threads = n_cores()
    n_done = 0
    progress(0, total, "")
    with ThreadPoolExecutor(n_threads, thread_name_prefix="permutation") as threads:
        for masks in _all_splits(members, n_of_a) if is_exact else _random_splits(is_a, members, total, seed):
            codes = _to_bytes(masks)
            size = max(_PIECE, -(-len(codes) // n_threads))
            pieces = [codes[first : first + size] for first in range(0, len(codes), size)]
            for alone, beyond, from_here, largest in threads.map(
                lambda some: _count(steps, some, bounds, above), pieces
            ):
                n_as_extreme += alone
                n_above += beyond
                n_from_here += from_here
                n_max += len(largest) - np.searchsorted(np.sort(largest), bounds)
            n_done += len(codes)
            progress(n_done, total, "")

    drawn = 0 if is_exact else 1  # the observed split counts as one of the permutations
    has_mirror = all(2 * n == len(rows) for rows, n in zip(members, n_of_a, strict=True))
    n_at_least = 2 if is_exact and has_mirror else 1  # groups of one size: every split has its mirror
    floor = n_at_least / (drawn + total)
    back = np.argsort(order[:n_columns])
    with_half = (drawn + n_as_extreme + n_above + 1) / 2  # of those that tie, but for the observed split
    p, p_mid, p_max_t, step_down = (
        count[:n_columns] / (drawn + total)
        for count in (drawn + n_as_extreme, with_half, drawn + n_max, drawn + n_from_here)
    )
    return PermutationTest(
        p=p[back],
        p_mid=np.maximum(p_mid, floor)[back],
        p_max_t=p_max_t[back],
        p_step_down=np.maximum.accumulate(step_down)[back],
        n_permutations=total,
        is_exact=is_exact,
        floor=floor,
    )


def combine_draws(tests: Sequence[PermutationTest]) -> PermutationTest:
    """One p-value from those of several draws of the same units: a generalised mean of order -0.8 (Vovk, Wang 2020).

    Averaging the draws' *values* would undo the thinning: units with more images to draw from would have less noise
    again. The p-value of each draw is valid, so the p-values are combined; draws that agree leave p as it is. The
    arithmetic mean is conservative, since in many draws a rare column is zero everywhere; the harmonic mean and the
    Cauchy combination are slightly anti-conservative. The order between them was chosen by simulation
    (docs/benchmarks.md).

    In each draw ties are counted half (Lancaster's mid-p): since ties differ between draws, that is close to breaking
    them at random. The adjusted p-values count all ties, as p of a single draw does.
    """
    if len(tests) == 1:
        return tests[0]

    def combined(ps: Sequence[npt.NDArray[np.float64]]) -> npt.NDArray[np.float64]:
        stacked = np.stack(ps)
        return np.where((stacked == stacked[0]).all(0), stacked[0], (stacked**_ORDER).mean(0) ** (1 / _ORDER))

    agree = (np.stack([test.p for test in tests]) == tests[0].p).all(0)
    p_mid = combined([test.p_mid for test in tests])
    return replace(
        tests[0],
        p=np.where(agree, tests[0].p, p_mid),
        p_mid=p_mid,
        p_max_t=combined([test.p_max_t for test in tests]),
        p_step_down=combined([test.p_step_down for test in tests]),
    )


def in_both_groups(strata: npt.NDArray[np.int64], is_a: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """(units,): whether the stratum of a unit has members of both groups; others carry no information."""
    return np.isin(strata, np.intersect1d(strata[is_a], strata[~is_a]))


def _quantise(
    values: npt.NDArray[np.floating], members: list[npt.NDArray[np.int64]]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """z of each column in integer steps (padded columns, padded units), and the tolerance within which sums are equal.

    A step is n_units / _RANGE standard deviations. Quantisation changes each of two sums by at most half a step per
    unit; the rounding of the values themselves by half an eps of each value in the sum, or of the mean.
    """
    n_units, n_columns = values.shape
    steps = np.zeros((_padded(n_columns, _LANES), _padded(n_units, 8 * _BYTES)), np.int32)
    slack = np.empty(n_columns, np.int64)
    for first in range(0, n_columns, _COLUMNS):
        chunk = np.ascontiguousarray(values[:, first : first + _COLUMNS].T, np.float64)
        centred, varies = chunk.copy(), np.zeros(len(chunk), bool)
        for rows in members:
            of_stratum = chunk[:, rows]
            centred[:, rows] -= of_stratum.mean(1, keepdims=True)
            varies |= of_stratum.min(1) < of_stratum.max(1)
        per_step = np.zeros(len(chunk))
        np.divide(_RANGE / n_units, np.sqrt((centred**2).mean(1)), out=per_step, where=varies)
        steps[first : first + len(chunk), :n_units] = np.rint(centred * per_step[:, None])
        rounding = 2 * np.finfo(values.dtype).eps * np.abs(chunk).sum(1) * per_step
        slack[first : first + len(chunk)] = n_units + np.ceil(np.minimum(rounding, _RANGE))
    return steps, slack


def _padded(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _random_splits(
    is_a: npt.NDArray[np.bool_], members: list[npt.NDArray[np.int64]], total: int, seed: int
) -> Iterator[npt.NDArray[np.uint8]]:
    rng = np.random.default_rng(seed)
    for done in range(0, total, _SPLITS):
        masks = np.tile(is_a.astype(np.uint8), (min(_SPLITS, total - done), 1))
        for rows in members:
            masks[:, rows] = rng.permuted(masks[:, rows], axis=1)
        yield masks


def _all_splits(members: list[npt.NDArray[np.int64]], n_of_a: list[int]) -> Iterator[npt.NDArray[np.uint8]]:
    splits = _ways(members, n_of_a)
    n_units, n_a = sum(map(len, members)), sum(n_of_a)
    while some := list(islice(splits, _SPLITS)):
        masks = np.zeros((len(some), n_units), np.uint8)
        np.put_along_axis(masks, np.fromiter(chain.from_iterable(some), np.int64).reshape(len(some), n_a), 1, 1)
        yield masks


def _ways(members: list[npt.NDArray[np.int64]], n_of_a: list[int]) -> Iterator[tuple[int, ...]]:
    """Every choice of `n_of_a` units of each stratum, one after the other: they are never held together."""
    first = combinations(members[0].tolist(), n_of_a[0])
    if len(members) == 1:
        yield from first
        return
    for some in first:
        yield from (some + others for others in _ways(members[1:], n_of_a[1:]))


def _to_bytes(masks: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """(splits, units) of 0 and 1 as bits: unit 8 k + b is bit b of byte k; padded as the steps are."""
    packed = np.packbits(masks, axis=1, bitorder="little")
    return np.pad(packed, ((0, 0), (0, _padded(packed.shape[1], _BYTES) - packed.shape[1])))


@numba.njit(nogil=True, cache=True)
def _count(steps, codes, bounds, above):  # type: ignore[no-untyped-def]  # numba's to type
    """For each column: splits that reach its bounds, and those that do so in it or in a later column; largest |sum|s.

    Bounds decrease from column to column except for the padding, and columns are processed from the last to the first,
    so that the largest |sum| so far is that of later columns. Once it reaches the largest bound of a table, it reaches
    all of them. Loops over lanes become vector instructions; the eight table rows have names so that the compiler
    vectorises their sum.
    """
    n_bytes = codes.shape[1]
    largest = np.zeros(len(codes), np.int32)
    n_alone, n_above, n_from_here = np.zeros((3, len(steps)), np.int64)
    table = np.empty((n_bytes, 256, _LANES), np.int32)
    unit, total, counts, beyond, later = np.empty((5, _LANES), np.int32)
    for group in range(len(steps) // _LANES - 1, -1, -1):
        first = group * _LANES
        for byte in range(n_bytes):
            table[byte, 0] = 0
            for bit in range(8):
                for lane in range(_LANES):
                    unit[lane] = steps[first + lane, 8 * byte + bit]
                for lower in range(1 << bit):
                    for lane in range(_LANES):
                        table[byte, (1 << bit) | lower, lane] = table[byte, lower, lane] + unit[lane]
        reached, passed = bounds[first : first + _LANES], above[first : first + _LANES]
        counts[:] = 0
        beyond[:] = 0
        later[:] = 0
        n_all = 0
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
                total[lane] = size
                counts[lane] += np.int32(size >= reached[lane])
                beyond[lane] += np.int32(size >= passed[lane])
                most = max(most, size)
            running = largest[split]
            if running >= reached[0]:
                n_all += 1
            else:
                for lane in range(_LANES - 1, -1, -1):
                    running = max(running, total[lane])
                    later[lane] += np.int32(running >= reached[lane])
            largest[split] = max(most, largest[split])
        n_alone[first : first + _LANES] = counts
        n_above[first : first + _LANES] = beyond
        n_from_here[first : first + _LANES] = later + n_all
    return n_alone, n_above, n_from_here, largest
