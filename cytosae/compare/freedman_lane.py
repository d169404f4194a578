"""Permutation p-values of groups adjusted for covariates: residuals are permuted (Freedman and Lane 1983).

    R = values less their regression on strata and covariates        g = groups less theirs
    f*[c] = (g' P R[c])^2 / (|g|^2 (|R[c]|^2 - |Q' P R[c]|^2))        P permutes units, within strata

Q is an orthonormal basis of the covariates within strata. So f is the partial R^2 of the groups in P R, and increases
with |t| of the group in the regression of P R on groups, strata and covariates (Winkler and others 2014). All columns
are permuted together, so that maxima over columns give the max-T adjustment. Twin: test_permutation.py. `adjustment`
takes the same regression out of the values themselves, for means and effect sizes.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from stores.errors import BadInput
from stores.progress import Progress

from .permutation import PermutationTest, in_both_groups

Floats = npt.NDArray[np.float64]
_COLUMNS = 1 << 12  # of one chunk in float64
_PERMUTATIONS = 64  # permutations that are computed together
_SLACK = 1e-5  # relative tolerance of ties: values are of float32


def residual_permutation_test(
    values: npt.NDArray[np.floating],
    is_a: npt.NDArray[np.bool_],
    covariates: Floats,
    *,
    n_permutations: int,
    seed: int,
    strata: npt.NDArray[np.int64] | None = None,
    progress: Progress = lambda done, total, state: None,
) -> PermutationTest:
    """Two-sided p-values of the groups, given covariates (and strata), for every column at once.

    Memory: the values in float64, and 64 of their rows four times.

    Parameters
    ----------
    values : finite, shape (units, columns)
    covariates : finite, shape (units, k)

    Raises
    ------
    BadInput
        If the covariates leave no difference between the groups, or too few units.
    """
    strata = np.zeros(len(is_a), np.int64) if strata is None else strata
    used = in_both_groups(strata, is_a)
    values, is_a, covariates, strata = values[used], is_a[used], covariates[used], strata[used]
    group, base = residual_group(is_a, covariates, strata)
    members = [np.flatnonzero(strata == name) for name in np.unique(strata)]
    residuals = _within(values.astype(np.float64), strata)
    before = np.sqrt((residuals**2).sum(0))
    residuals -= base @ (base.T @ residuals)
    length = np.sqrt((residuals**2).sum(0))
    varies = length > 1e-6 * np.maximum(before, np.abs(values).max(0))
    residuals = np.where(varies, residuals / np.where(varies, length, 1), 0)
    weights = np.vstack([group / np.linalg.norm(group), base.T])

    def sizes(permuted: Floats) -> Floats:
        """(permutations, columns) from weights (permutations, 1 + k, units)."""
        products = (permuted.reshape(-1, len(is_a)) @ residuals).reshape(*permuted.shape[:2], -1) ** 2
        left = 1 - products[:, 1:].sum(1)
        return np.where(left > 1e-9, products[:, 0] / np.maximum(left, 1e-9), 0)

    observed = sizes(weights[None])[0]
    order = np.argsort(-observed, kind="stable")
    residuals, observed = np.ascontiguousarray(residuals[:, order]), observed[order]
    bounds, above = observed * (1 - _SLACK), observed * (1 + _SLACK)
    n_as_extreme, n_above, n_max, n_from_here = np.ones((4, len(order)), np.int64)
    rng = np.random.default_rng(seed)
    for done in range(0, n_permutations, _PERMUTATIONS):
        progress(done, n_permutations, "")
        places = np.tile(np.arange(len(is_a)), (min(_PERMUTATIONS, n_permutations - done), 1))
        for rows in members:
            places[:, rows] = rng.permuted(places[:, rows], axis=1)
        found = sizes(weights[:, places].transpose(1, 0, 2))
        n_as_extreme += (found >= bounds).sum(0)
        n_above += (found > above).sum(0)
        from_here = np.maximum.accumulate(found[:, ::-1], axis=1)[:, ::-1]
        n_from_here += (from_here >= bounds).sum(0)
        n_max += (from_here[:, :1] >= bounds).sum(0)
    progress(n_permutations, n_permutations, "")
    back = np.argsort(order)
    p, p_mid, p_max_t, step_down = (
        count / (1 + n_permutations) for count in (n_as_extreme, (n_as_extreme + n_above) / 2, n_max, n_from_here)
    )
    return PermutationTest(
        p=p[back],
        p_mid=p_mid[back],
        p_max_t=p_max_t[back],
        p_step_down=np.maximum.accumulate(step_down)[back],
        n_permutations=n_permutations,
        is_exact=False,
        floor=1 / (1 + n_permutations),
    )


def adjustment(
    is_a: npt.NDArray[np.bool_], strata: npt.NDArray[np.int64] | None, covariates: Floats | None
) -> tuple[Callable[[npt.NDArray[Any]], npt.NDArray[Any]], float]:
    """A function that adjusts values (patients, latents) for strata and covariates, and the variance inflation.

    The difference of means of adjusted values is the coefficient of the group in the regression on group, strata and
    covariates.

    Raises
    ------
    BadInput
        If strata and covariates determine the group.
    """
    strata = np.zeros(len(is_a), np.int64) if strata is None else strata
    group, base = residual_group(is_a, np.zeros((len(is_a), 0)) if covariates is None else covariates, strata)
    members = np.eye(strata.max() + 1)[strata]
    outside = np.linalg.qr(np.column_stack([members / np.sqrt(members.sum(0)), base]))[0]

    def adjusted(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        found = np.empty_like(values)
        for first in range(0, values.shape[1], _COLUMNS):
            chunk = values[:, first : first + _COLUMNS].astype(np.float64)
            left = chunk - outside @ (outside.T @ chunk)
            slope = group @ chunk / (group @ group)
            found[:, first : first + _COLUMNS] = (
                chunk.mean(0) + np.outer(is_a - is_a.mean(), slope) + left - np.outer(group, slope)
            )
        return found

    return adjusted, float(1 / (group @ group) / (1 / is_a.sum() + 1 / (~is_a).sum()))


def residual_group(
    is_a: npt.NDArray[np.bool_], covariates: Floats, strata: npt.NDArray[np.int64]
) -> tuple[Floats, Floats]:
    """Residuals of the group on strata and covariates (units,), and an orthonormal basis of the covariates (units, k).

    Raises
    ------
    BadInput
        If strata and covariates determine the group, or leave fewer than two degrees of freedom.
    """
    within = _within(covariates, strata)
    scale = np.sqrt((within**2).sum(0))
    kept = scale > 1e-9 * np.maximum(1e-300, np.abs(covariates).max(0, initial=0))
    left, size, _ = np.linalg.svd(within[:, kept] / scale[kept], full_matrices=False)
    base = left[:, size > 1e-8]
    group = _within(is_a.astype(np.float64)[:, None], strata)[:, 0]
    before = group @ group
    group -= base @ (base.T @ group)
    n_left = len(is_a) - len(np.unique(strata)) - base.shape[1] - 1
    if n_left < 2:
        raise BadInput(
            f"{len(is_a)} patients are too few for {base.shape[1]} columns of covariates; adjust for fewer, or group "
            f"their values"
        )
    if group @ group < 1e-6 * before:
        raise BadInput(
            "the columns of --adjust (with --strata) tell the groups apart by themselves, so nothing is left to "
            "compare; adjust for fewer"
        )
    return group, base


def _within(values: Floats, strata: npt.NDArray[np.int64]) -> Floats:
    """Values minus the mean of their stratum."""
    _, number = np.unique(strata, return_inverse=True)
    members = np.eye(number.max() + 1)[number]
    centred: Floats = values - members @ ((members.T @ values) / members.sum(0)[:, None])
    return centred
