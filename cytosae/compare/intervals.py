"""95% intervals over patients of a difference of means, Hedges' g and AUC, for many columns at once.

Chosen by the coverage that bench/calibration.py measures at frequencies from 30% to 0.2%: docs/benchmarks.md. A group
in which nobody shows a rare latent has no variance of its own, and an interval by it alone is far too narrow. So:
difference: t of Welch, its variance no smaller than that of the pooled groups. g: influence of each patient on it
(a skewed latent's mean and spread move together), no smaller than the normal theory's variance. AUC: variance of
DeLong with two more patients in each group, one below and one above all (Agresti and Caffo's idea), on the logit.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata
from scipy.stats import t as student

Floats = npt.NDArray[np.float64]


def intervals(
    values: Floats, draws: Sequence[Floats], is_a: npt.NDArray[np.bool_], *, inflation: float = 1.0
) -> dict[str, Floats]:
    """Estimates and limits, (columns,) each: `difference`, `hedges_g`, `auc`, with `_low` and `_high`.

    Parameters
    ----------
    values : (patients, columns); the difference is that of their means
    draws : the same from equal numbers of images: g and AUC are means over these, since both depend on the noise
    inflation : of the variance of the difference, by what was adjusted for
    """
    n_a, n_b = int(is_a.sum()), int((~is_a).sum())
    n = n_a + n_b
    difference = values[is_a].mean(0) - values[~is_a].mean(0)
    pooled = np.mean([_pooled(draw, is_a) for draw in draws], 0)
    parts = values[is_a].var(0, ddof=1) / n_a, values[~is_a].var(0, ddof=1) / n_b
    welch = parts[0] + parts[1]
    spread = welch**2 / np.maximum(parts[0] ** 2 / (n_a - 1) + parts[1] ** 2 / (n_b - 1), 1e-300)
    both = pooled * (1 / n_a + 1 / n_b)
    freedom = np.where(both > welch * (1 + 1e-9), n - 2, np.clip(spread, min(n_a, n_b) - 1, n - 2))
    half = student.ppf(0.975, freedom) * np.sqrt(np.maximum(welch, both) * inflation)
    found = {"difference": difference, "difference_low": difference - half, "difference_high": difference + half}

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
    for name, limit in (("hedges_g", g), ("hedges_g_low", g - half), ("hedges_g_high", g + half)):
        found[name] = np.where(varies, limit * small, np.nan)

    auc = above.mean(0)
    center = ((above.sum(0) + 1) / (n_a + 2) + (below.sum(0) + 1) / (n_b + 2)) / 2
    variance = inflation * sum(
        (((part - center) ** 2).sum(0) + center**2 + (1 - center) ** 2) / ((len(part) + 1) * (len(part) + 2))
        for part in (above, below)
    )
    logit = np.log(center / (1 - center))
    half = student.ppf(0.975, n - 2) * np.sqrt(variance) / (center * (1 - center))
    found["auc"] = auc
    found["auc_low"] = np.minimum(auc, 1 / (1 + np.exp(half - logit)))
    found["auc_high"] = np.maximum(auc, 1 / (1 + np.exp(-half - logit)))
    return found


def _pooled(values: Floats, is_a: npt.NDArray[np.bool_]) -> Floats:
    """Variance within groups (n - 2)."""
    squares = sum((((values[some] - values[some].mean(0)) ** 2).sum(0) for some in (is_a, ~is_a)), np.zeros(1))
    return np.asarray(squares / (len(is_a) - 2), np.float64)
