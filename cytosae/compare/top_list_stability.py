"""How often is a latent in its top list again, when the patients are drawn anew; and how often if nothing differs?"""

import numpy as np
import numpy.typing as npt

_COLUMNS = 1 << 12  # latents of one chunk in float64
_BOOTSTRAPS = 64  # bootstraps that are computed together
_NULLS = 20  # shuffles of the groups behind the stability under no effect
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


def stability_without_effect(
    values: npt.NDArray[np.floating], is_a: Bools, *, top: int, n_bootstraps: int, seed: int
) -> Floats:
    """(latents,): for each rank, the mean stability of the latents of that rank when groups are shuffled; else NaN.

    Over both sides of 20 shuffles, with a twentieth of the bootstraps each: it takes as long as `bootstrap_stability`.
    """
    rng = np.random.default_rng([seed, 3])
    sums, times = np.zeros((2, values.shape[1]))
    for number in range(_NULLS if n_bootstraps else 0):
        shuffled = rng.permuted(is_a)
        found = bootstrap_stability(
            values, shuffled, top=top, n_bootstraps=-(-n_bootstraps // _NULLS), seed=seed + 1 + number
        )
        weights = np.where(shuffled, 1 / shuffled.sum(), -1 / (~shuffled).sum())
        difference = _products(weights[None], values)[0]
        for sign in (1, -1):
            ranks = ranks_of(sign * difference)
            has = ~np.isnan(ranks) & ~np.isnan(found)
            np.add.at(sums, ranks[has].astype(np.int64) - 1, found[has])
            np.add.at(times, ranks[has].astype(np.int64) - 1, 1)
    by_rank = np.full(values.shape[1], np.nan)
    np.divide(sums, times, out=by_rank, where=times > 0)
    return by_rank


def ranks_of(difference: Floats) -> Floats:
    """1 for the largest positive difference, and so on; ties in the order of latents; NaN where not positive."""
    order = np.argsort(-difference, kind="stable")
    ranks = np.full(len(difference), np.nan)
    n_positive = int((difference > 0).sum())
    ranks[order[:n_positive]] = np.arange(1, n_positive + 1)
    return ranks


def bootstrap_stability(
    values: npt.NDArray[np.floating], is_a: Bools, *, top: int, n_bootstraps: int, seed: int
) -> Floats:
    """(latents,) share of bootstraps in which a latent is among the `top` largest differences in its direction.

    Patients are drawn with replacement within each group. All latents that tie for the last place are counted. NaN
    without bootstraps, or where the groups' means are equal.

    Parameters
    ----------
    values : shape (patients, latents)
    """
    rng = np.random.default_rng([seed, 1])  # independent of the permutations
    n_latents, top = values.shape[1], min(top, values.shape[1])
    observed = np.where(is_a, 1 / is_a.sum(), -1 / (~is_a).sum())
    direction = np.sign(_products(observed[None], values)[0])
    hits = np.zeros(n_latents, np.int64)
    for done in range(0, n_bootstraps, _BOOTSTRAPS):
        weights = np.empty((min(_BOOTSTRAPS, n_bootstraps - done), len(is_a)))
        for members in (is_a, ~is_a):
            n = int(members.sum())
            weights[:, members] = rng.multinomial(n, np.full(n, 1 / n), len(weights)) * observed[members]
        differences = _products(weights, values)
        for sign in (1, -1):
            ours = sign * differences
            last = np.partition(ours, n_latents - top, axis=1)[:, n_latents - top, None]
            hits += ((ours >= last) & (ours > 0) & (direction == sign)).sum(0)
    shares = np.full(n_latents, np.nan)
    np.divide(hits, n_bootstraps, out=shares, where=(direction != 0) & (n_bootstraps > 0))
    return shares


def _products(weights: Floats, values: npt.NDArray[np.floating]) -> Floats:
    """weights @ values in float64, some latents at a time."""
    starts = range(0, values.shape[1], _COLUMNS)
    return np.hstack([weights @ values[:, first : first + _COLUMNS].astype(np.float64) for first in starts])
