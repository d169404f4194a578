"""How well scores tell two kinds of images apart, and how far that is known. Pure functions of arrays.

AUC         the share of pairs of an active and an inactive image in which the active one has the higher score; a tie
            counts half, so that yes and no as scores give the balanced accuracy
intervals   95%, from draws of patients (bootstrap), widened where Newcombe's interval of independent images is
            wider: draws of ten perfect answers are all perfect, and the truth need not be (Newcombe 2006, Statistics in
            Medicine 25:559, method 5)
"""

import math

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
LEAST_GROUPS = 5  # patients: an interval over fewer would be a pretence
_Z = 1.959963984540054
_LEVELS = (2.5, 97.5)


def wins(active: Floats, inactive: Floats) -> Floats:
    """(active, inactive): 1 where the active image has the higher score, 1/2 where both are equal."""
    return (active[:, None] > inactive).astype(np.float64) + 0.5 * (active[:, None] == inactive)


def auc(active: Floats, inactive: Floats) -> float:
    """Area under the ROC curve of the scores of two kinds of images; NaN if there is none of a kind."""
    return float(wins(active, inactive).mean()) if len(active) and len(inactive) else math.nan


def drawn_auc(won: Floats, of_active: Ints, of_inactive: Ints, draws: Floats) -> Floats:
    """(draws,) AUC with each image counted as often as its group was drawn; NaN where a kind was not drawn.

    Parameters
    ----------
    won : as of `wins`
    of_active, of_inactive : group of each image, as its place in `draws`
    draws : (draws, groups), how often each group was drawn
    """
    left, right = draws[:, of_active], draws[:, of_inactive]
    pairs = left.sum(1) * right.sum(1)
    hits = np.einsum("bi,ij,bj->b", left, won, right, optimize=True)
    return np.divide(hits, pairs, out=np.full(len(draws), np.nan), where=pairs > 0)


def draw_groups(groups: Ints, n_draws: int, seed: int) -> Floats:
    """(draws, groups): how often each group counts in each draw, a Poisson number of mean 1.

    A group has the same numbers wherever it is asked for, so that names of several latents are drawn with the same
    patients, and no table of all patients is needed. (Poisson bootstrap: Hanley and MacGibbon 2006, Computer Methods
    and Programs in Biomedicine 83:57.)

    Parameters
    ----------
    groups : their numbers, at least 0
    """
    found = np.empty((n_draws, len(groups)))
    for place, group in enumerate(groups.tolist()):
        found[:, place] = np.random.Generator(np.random.Philox(key=(seed << 64) + group)).poisson(1, n_draws)
    return found


def interval(value: float, drawn: Floats, n_active: int, n_inactive: int) -> tuple[float, float]:
    """(low, high) of an AUC: of the draws, or of independent images, whichever is further out."""
    low, high = independent_interval(value, n_active, n_inactive)
    found = drawn[np.isfinite(drawn)]
    if len(found):
        low, high = (min(low, np.percentile(found, _LEVELS[0])), max(high, np.percentile(found, _LEVELS[1])))
    return float(low), float(high)


def drawn_interval(drawn: Floats) -> tuple[float, float] | None:
    """(low, high) of draws; None if none is defined."""
    found = drawn[np.isfinite(drawn)]
    if not len(found):
        return None
    low, high = np.percentile(found, _LEVELS)
    return float(low), float(high)


def independent_interval(value: float, n_active: int, n_inactive: int) -> tuple[float, float]:
    """The AUCs for which `value` lies within 1.96 of their own standard errors, by bisection."""
    return _edge(value, n_active, n_inactive, 0.0), _edge(value, n_active, n_inactive, 1.0)


def _edge(value: float, n_active: int, n_inactive: int, end: float) -> float:
    near, far = value, end  # near is within the interval, far beyond it or its end
    for _ in range(60):
        middle = (near + far) / 2
        if abs(middle - value) <= _Z * _standard_error(middle, n_active, n_inactive):
            near = middle
        else:
            far = middle
    return near


def _standard_error(theta: float, n_active: int, n_inactive: int) -> float:
    """Of an AUC of `theta`: Hanley and McNeil's, with the mean of both numbers in place of either (Newcombe)."""
    rest = (n_active + n_inactive) / 2 - 1
    variance = theta * (1 - theta) * (1 + rest * ((1 - theta) / (2 - theta) + theta / (1 + theta)))
    return math.sqrt(max(0.0, variance / (n_active * n_inactive)))
