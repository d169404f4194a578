"""95% intervals over patients of a difference of means, Hedges' g and AUC, for many columns at once.

Chosen by the coverage that bench/calibration.py measures at frequencies from 30% to 0.2%, with and without a
difference: docs/benchmarks.md. The mean of a rare latent is as skewed as a small count, and a group in which it is 0 in
every patient has no variance of its own. So:
difference: each group's mean has a score interval, its variance taken to be proportional to the mean (as Wilson's for
shares; at a mean of 0 the upper limit is that of a count of 0), and the two are combined by their squares (Newcombe
1998; MOVER of Zou and Donner 2008). Of adjusted values: the same from the values before adjusting, scaled to the
variance that remains, and no narrower than Welch's t with a variance no smaller than the pooled one.
g: by the influence of each patient (mean and SD of a skewed latent are correlated), no narrower than by normal theory,
nor than the interval of the difference divided by the standard deviation.
AUC: Wilson's interval with the variance c AUC (1 - AUC), c from DeLong's variance (`share_limits`). On the logit an AUC
near 1 had limits as wide as from 0.4 to 1, since a small AUC of the rest, and its error, are divided by 1 - AUC.
With fewer than SUPPORT patients above 0 the data do not say how large other values may be, and there are no limits of
difference and g.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata
from scipy.stats import t as student

SUPPORT = 3  # patients above 0, of both groups; after thinning, a third as many on average over draws
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


def is_supported(values: npt.NDArray[np.floating], draws: Sequence[npt.NDArray[np.floating]]) -> Bools:
    """(columns,): whether enough patients are above 0 for limits of difference and g; by values before adjusting."""
    n_drawn = np.mean([(draw > 0).sum(0) for draw in draws], 0)
    return np.asarray(((values > 0).sum(0) >= SUPPORT) & (n_drawn >= SUPPORT / 3))


def intervals(
    values: Floats,
    draws: Sequence[Floats],
    is_a: Bools,
    *,
    inflation: float = 1.0,
    counted: tuple[Floats, Sequence[Floats]] | None = None,
) -> dict[str, Floats]:
    """Estimates and limits, (columns,) each: `difference`, `hedges_g`, `auc`, with `_low` and `_high`.

    Limits of difference and g are NaN where too few patients show a column (`is_supported`); g where no draw varies.

    Parameters
    ----------
    values : (patients, columns); the difference is that of their means
    draws : the same from equal numbers of images: g and AUC are means over these, since both depend on the noise
    inflation : factor on the variance of the difference, from adjusting
    counted : values and draws before they were adjusted; None: they are not adjusted
    """
    n_a, n_b = int(is_a.sum()), int((~is_a).sum())
    n = n_a + n_b
    supported = is_supported(*(counted or (values, draws)))
    difference = values[is_a].mean(0) - values[~is_a].mean(0)
    pooled = np.mean([_pooled(draw, is_a) for draw in draws], 0)
    plain = _plain_distance(values, is_a, pooled)
    if counted is None:
        skewed = _skewed_distances(values, draws, is_a, pooled)
        down, up = (np.where(values.min(0) < 0, plain, distance) for distance in skewed)  # counts are not negative
    else:
        before = np.mean([_pooled(draw, is_a) for draw in counted[1]], 0)
        left = np.sqrt(np.divide(pooled, before, out=np.ones_like(pooled), where=before > 0))
        down, up = (np.maximum(plain, left * far) for far in _skewed_distances(*counted, is_a, before))
    down, up = down * np.sqrt(inflation), up * np.sqrt(inflation)
    found = {"difference": difference}
    found["difference_low"] = np.where(supported, difference - down, np.nan)
    found["difference_high"] = np.where(supported, difference + up, np.nan)

    g, influence = np.zeros(values.shape[1]), np.zeros(values.shape)
    above, below = np.zeros((n_a, values.shape[1])), np.zeros((n_b, values.shape[1]))
    for draw in draws:
        sd = np.sqrt(_pooled(draw, is_a))
        sd = np.where(sd > 0, sd, np.nan)
        one = (draw[is_a].mean(0) - draw[~is_a].mean(0)) / sd
        g += np.nan_to_num(one) / len(draws)
        for members, size, sign in ((is_a, n_a, 1), (~is_a, n_b, -1)):
            z = (draw[members] - draw[members].mean(0)) / sd
            influence[members] += np.nan_to_num(sign * z / size - one / (2 * n) * (z**2 - 1)) / len(draws)
        ranks = rankdata(draw, axis=0)
        above += (ranks[is_a] - rankdata(draw[is_a], axis=0)) / n_b / len(draws)
        below += (rankdata(draw[~is_a], axis=0) + n_a - ranks[~is_a]) / n_a / len(draws)
    varies = pooled > 0
    small = 1 - 3 / (4 * (n - 2) - 1)
    normal = (1 / n_a + 1 / n_b) + g**2 / (2 * n)
    half = student.ppf(0.975, n - 2) * np.sqrt(np.maximum((influence**2).sum(0) * n / (n - 2), normal) * inflation)
    sd = np.sqrt(np.where(varies, pooled, np.nan))
    found["hedges_g"] = np.where(varies, g * small, np.nan)
    found["hedges_g_low"] = np.where(varies & supported, (g - np.fmax(half, down / sd)) * small, np.nan)
    found["hedges_g_high"] = np.where(varies & supported, (g + np.fmax(half, up / sd)) * small, np.nan)

    auc = above.mean(0)
    variance = above.var(0, ddof=1) / n_a + below.var(0, ddof=1) / n_b  # DeLong's
    t = float(student.ppf(0.975, n - 2))
    low, high = share_limits(auc, variance, t, min(n_a, n_b), inflation=inflation)
    found["auc"] = auc
    found["auc_low"] = np.minimum(auc, low)
    found["auc_high"] = np.maximum(auc, high)
    return found


def share_limits(value: Floats, variance: Floats, t: float, n: int, *, inflation: float = 1.0) -> tuple[Floats, Floats]:
    """Limits of figures from 0 to 1 that are means over units, such as an AUC over patients: Wilson's interval.

    All v with |value - v| <= t sqrt(c v (1 - v)), where a share of n units has c = 1 / n. Here c is the variance over
    value (1 - value), drawn to 1 / n, which no mean over units exceeds (for an AUC: Birnbaum), where that is small:
    near 0 and 1 few units show any variance. With how much weight was chosen by coverage: docs/benchmarks.md.

    Parameters
    ----------
    value, variance : of one shape; variances of the values, which may be 0
    t : how many standard deviations
    n : units; of two groups the smaller one
    inflation : factor on c
    """
    little = 1 / (4 * (n + 1))
    c = inflation * (variance + little / n) / (value * (1 - value) + little)
    middle = t**2 * c / 2
    half = np.sqrt(t**2 * c * value * (1 - value) + middle**2)
    width = 1 + 2 * middle
    return (value + middle - half) / width, (value + middle + half) / width


def _skewed_distances(values: Floats, draws: Sequence[Floats], is_a: Bools, pooled: Floats) -> tuple[Floats, Floats]:
    """(columns,) distances from the difference of means down and up to its limits.

    A group of mean m has the limits mu of (m - mu)^2 = t^2 c mu, where c is its variance over m, divided by its size.
    That variance is no smaller than the draws' pooled one, scaled down to m if m is smaller than the draws' mean.
    """
    groups = [(members, int(members.sum())) for members in (is_a, ~is_a)]
    n = len(is_a)
    shared = sum(
        ((size - 1) / (n - 2) * np.mean([draw[members].mean(0) for draw in draws], 0) for members, size in groups),
        np.zeros(values.shape[1]),
    )
    ratio = np.divide(pooled, shared, out=np.zeros_like(pooled), where=shared > 0)
    lower, upper = [], []
    for members, size in groups:
        mean, variance = values[members].mean(0), values[members].var(0, ddof=1)
        floor = np.minimum(ratio * mean, pooled)
        use = np.maximum(variance, floor)
        c = np.divide(use, mean, out=ratio.copy(), where=mean > 0) / size
        t = student.ppf(0.975, np.where(variance > floor, size - 1, n - 2))
        middle = t**2 * c / 2
        half = np.sqrt(middle**2 + 2 * middle * np.maximum(mean, 0))
        lower.append(half - middle)
        upper.append(half + middle)
    return np.hypot(lower[0], upper[1]), np.hypot(upper[0], lower[1])


def _plain_distance(values: Floats, is_a: Bools, pooled: Floats) -> Floats:
    """(columns,) half width of the interval by Welch's t, or by the pooled variance where that is larger."""
    size_a, size_b = int(is_a.sum()), int((~is_a).sum())
    n, of_a, of_b = len(is_a), values[is_a].var(0, ddof=1) / size_a, values[~is_a].var(0, ddof=1) / size_b
    welch = of_a + of_b
    spread = welch**2 / np.maximum(of_a**2 / (size_a - 1) + of_b**2 / (size_b - 1), 1e-300)
    both = pooled * (1 / size_a + 1 / size_b)
    freedom = np.where(both > welch * (1 + 1e-9), n - 2, np.clip(spread, min(size_a, size_b) - 1, n - 2))
    return np.asarray(student.ppf(0.975, freedom) * np.sqrt(np.maximum(welch, both)), np.float64)


def _pooled(values: Floats, is_a: Bools) -> Floats:
    """Variance within groups (n - 2)."""
    squares = sum((((values[some] - values[some].mean(0)) ** 2).sum(0) for some in (is_a, ~is_a)), np.zeros(1))
    return np.asarray(squares / (len(is_a) - 2), np.float64)
