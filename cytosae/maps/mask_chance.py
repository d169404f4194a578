"""Does a latent agree with masks by more than chance? Two questions, both with two-sided tests.

    place: does the AUROC differ from 0.5? There are two null distributions, and the larger p counts. (1) Sign flips:
        the distance of each unit from 0.5 changes its sign at random. This is valid for any spread between units if
        the distances are symmetric around 0, which they are not where a class or a latent has few patches. (2) Shifts:
        the masks of a unit are all shifted by one random step of 0 to 255 patches, with wrap-around. Their mean AUROC
        is 0.5, with the skewness of the data. A latent that marks the centre of the picture passes this test for the
        nucleus of centred cells.
    own mask: does the latent follow the mask of its own image more than that of another cell? Units exchange their
        masks as a whole. Each statistic is scaled by its mean and standard deviation over all shuffles, the observed
        one included. An effect that is the same for all cells, such as the centre, is not significant here.

Both tests keep every map and every mask as it is, so neighbouring patches, and images of one patient, may be
correlated. `p_any` (family-wise) uses the largest absolute scaled value among all tested latents and classes of a
shuffle. Measured false positive rates: test_masks.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stores.progress import Progress

from .mask_ranks import Bool, Float, Int, MaskAgreement, RankedValues, count_images, fill_auroc, halves, mask_agreement

LEAST_IMAGES = 5  # in which a latent must be active to be tested; of fewer images: all
LEVEL = 0.05  # of the p among all latents that a value is needed for
_CELLS = 1 << 22  # of units x latents that are dense at a time


@dataclass(frozen=True, kw_only=True)
class Chance:
    """Null means and p-values, (n_classes, n_latents); NaN for latents that were not tested."""

    mean_auroc: Float  # under exchanged masks
    mean_iou: Float
    p_auroc: Float  # own mask
    p_iou: Float
    p_any_auroc: Float
    p_any_iou: Float
    p_place: Float
    p_any_place: Float
    expected_max_auroc: Float  # (n_classes,) the best latent's mean over the shuffles
    expected_max_iou: Float
    needed_auroc: Float  # (n_classes, n_latents) the value from which on p_any is at most 0.05; NaN: none of 1 or less
    needed_iou: Float


def chance_agreement(
    ranked: RankedValues,
    foreground: Bool,
    found: Sequence[MaskAgreement],
    *,
    n_shuffles: int,
    seed: int,
    progress: Progress = lambda done, total, state: None,
) -> Chance | None:
    """Null distributions and p-values; None without shuffles, or if no latent is tested.

    Parameters
    ----------
    foreground : (n_classes, n_images, n_per_image), the images in the order of the patches of `ranked`
    found : the agreement with each class's masks as they are
    n_shuffles : number of exchanges of masks, of shifts, and of sign flips, each drawn with `seed`
    progress : shuffles done, shuffles in all
    """
    n_active = count_images(ranked.starts, ranked.patches, ranked.n_per_image)
    tested = n_active >= min(LEAST_IMAGES, ranked.n_images)
    if not n_shuffles or not tested.any():
        return None
    rng, half = np.random.default_rng(seed), halves(ranked.n_units, seed)
    n_classes = len(foreground)
    # [AUROC, IoU] of the observed and every shuffle
    drawn = np.empty((2, n_shuffles + 1, n_classes, len(tested)), np.float32)
    shifted = np.full((n_shuffles + 1, n_classes, len(tested)), np.nan, np.float32)  # AUROC under shifted masks
    steps = np.random.default_rng([seed, 3]).integers(ranked.n_per_image, size=(n_shuffles, ranked.n_units))
    for number, one in enumerate(found):
        drawn[0, 0, number], drawn[1, 0, number] = one.auroc, one.iou
        shifted[0, number] = one.auroc
    for n_done in range(n_shuffles):
        order = rng.permutation(ranked.n_units)
        for number, masks in enumerate(foreground):
            one = mask_agreement(ranked, exchanged_masks(masks, ranked.unit_of, order), half)
            drawn[0, n_done + 1, number], drawn[1, n_done + 1, number] = one.auroc, one.iou
            other = shifted_masks(masks, steps[n_done][ranked.unit_of])
            nothing = np.zeros((0, 0))
            fill_auroc(
                ranked.starts,
                ranked.patches,
                ranked.ranks,
                other,
                ranked.unit_of,
                shifted[n_done + 1, number],
                nothing,
            )
        progress(n_done + 1, n_shuffles, "shuffling")
    own = [_scaled_p(values, tested) for values in drawn]
    mean, largest = zip(*(_mean_and_largest(values[1:], tested) for values in drawn), strict=True)
    by_sign = _place_p(ranked, foreground, tested, n_shuffles=n_shuffles, seed=seed)
    p_place, p_any_place = (np.maximum(a, b) for a, b in zip(by_sign, _scaled_p(shifted, tested)[:2], strict=True))
    return Chance(
        mean_auroc=mean[0],
        mean_iou=mean[1],
        p_auroc=own[0][0],
        p_iou=own[1][0],
        p_any_auroc=own[0][1],
        p_any_iou=own[1][1],
        p_place=p_place,
        p_any_place=p_any_place,
        expected_max_auroc=largest[0],
        expected_max_iou=largest[1],
        needed_auroc=own[0][2],
        needed_iou=own[1][2],
    )


def exchanged_masks(foreground: Bool, unit_of: Int, order: Int) -> Bool:
    """(n_images, n_per_image): the masks after unit u received those of unit order[u], repeated if these are fewer."""
    first = np.searchsorted(unit_of, np.arange(len(order)))
    count = np.bincount(unit_of, minlength=len(order))
    within = np.arange(len(unit_of)) - first[unit_of]
    source = order[unit_of]
    found: Bool = foreground[first[source] + within % count[source]]
    return found


def shifted_masks(foreground: Bool, steps: Int) -> Bool:
    """(n_images, n_per_image): each mask shifted by its own step, (n_images,), with wrap-around over all patches."""
    n_per_image = foreground.shape[1]
    found: Bool = np.take_along_axis(foreground, (np.arange(n_per_image) - steps[:, None]) % n_per_image, axis=1)
    return found


def _mean_and_largest(shuffled: Any, tested: Bool) -> tuple[Float, Float]:
    """(n_classes, n_latents) means over (n_shuffles, n_classes, n_latents), and the mean of the largest, by class."""
    is_known = ~np.isnan(shuffled)
    n_known = is_known.sum(axis=0)
    mean = np.where(n_known > 0, np.where(is_known, shuffled, 0).sum(axis=0, dtype=np.float64), np.nan)
    mean = mean / np.maximum(1, n_known)
    largest = np.where(is_known, shuffled, -np.inf)[:, :, tested].max(axis=2).astype(np.float64)
    with np.errstate(invalid="ignore"):
        return mean, np.where(np.isfinite(largest).all(axis=0), largest.mean(axis=0), np.nan)


def _scaled_p(drawn: Any, tested: Bool) -> tuple[Float, Float, Float]:
    """p and p_any (n_classes, n_latents) of the first of (1 + n_shuffles, n_classes, n_latents), two-sided.

    All 1 + n_shuffles are treated alike, so the rank of the observed one is exact if they are exchangeable.
    Also the value from which on p_any of a latent is at most 0.05: p_any and values have one scale with it, while the
    largest value of a shuffle is that of whichever latent varies most.
    """
    n_drawn, shape = len(drawn), drawn.shape[1:]
    p, p_any, needed = np.full(shape, np.nan), np.full(shape, np.nan), np.full(shape, np.nan)
    largest = np.zeros(n_drawn)
    for number in range(shape[0]):
        values = drawn[:, number].astype(np.float64)
        distance = np.abs(_scaled(values))
        usable = tested & ~np.isnan(values[0])
        # tolerance: equal masks give equal values only up to rounding
        p[number, usable] = (distance >= distance[0] - 1e-6).sum(axis=0)[usable] / n_drawn
        largest = np.maximum(largest, distance[:, usable].max(axis=1, initial=0))
    n_allowed = int(LEVEL * n_drawn + 1e-9)
    for number in range(shape[0]):
        values = drawn[:, number].astype(np.float64)
        distance = np.abs(_scaled(values))[0]
        usable = ~np.isnan(p[number])
        n_beyond = n_drawn - np.searchsorted(np.sort(largest), distance[usable] - 1e-6)
        p_any[number, usable] = n_beyond / n_drawn
        if n_allowed:
            known = ~np.isnan(values[:, usable])
            sizes, held = known.sum(axis=0), np.where(known, values[:, usable], 0)
            mean = held.sum(axis=0) / sizes
            sd = np.sqrt((np.where(known, held - mean, 0) ** 2).sum(axis=0) / sizes)
            from_here = mean + sd * (np.sort(largest)[n_drawn - 1 - n_allowed] + 1e-6)
            needed[number, usable] = np.where((sd > 1e-6) & (from_here <= 1), from_here, np.nan)
    return p, p_any, needed


def _scaled(values: Float) -> Float:
    """Each column minus its mean, divided by its standard deviation; 0 if it does not vary, or a value is unknown."""
    known = ~np.isnan(values)
    n = np.maximum(1, known.sum(axis=0))
    centred = np.where(known, values - np.where(known, values, 0).sum(axis=0) / n, 0)
    sd = np.sqrt((centred**2).sum(axis=0) / n)
    scaled: Float = centred / np.where(sd > 1e-6, sd, np.inf)
    return scaled


def _place_p(
    ranked: RankedValues, foreground: Bool, tested: Bool, *, n_shuffles: int, seed: int
) -> tuple[Float, Float]:
    """p and p_any (n_classes, n_latents) of the null hypothesis AUROC = 0.5, by sign flips of the units' distances.

    The statistic |sum of d| / sqrt(sum of d^2) over the units is a monotone function of that of a one-sample t test.
    Its denominator does not depend on signs, so it has one scale for latents of few and of many units.
    """
    rng = np.random.default_rng([seed, 2])
    signs = rng.choice(np.array([-1.0, 1.0]), (n_shuffles, ranked.n_units))
    shape = (len(foreground), len(tested))
    observed, n_beyond, largest = np.full(shape, np.nan), np.zeros(shape), np.zeros(n_shuffles)
    step = max(1, _CELLS // max(ranked.n_units, n_shuffles))
    for number, masks in enumerate(foreground):
        for first in range(0, len(tested), step):
            stop = min(first + step, len(tested))
            units = np.full((stop - first, ranked.n_units), 0.5)
            starts = ranked.starts[first : stop + 1]
            fill_auroc(starts, ranked.patches, ranked.ranks, masks, ranked.unit_of, np.empty(stop - first), units)
            distance = units - 0.5
            scale = np.sqrt((distance**2).sum(axis=1))
            use = np.flatnonzero(tested[first:stop] & (scale > 1e-9))
            unit = distance[use] / scale[use, None]
            now = np.abs(unit.sum(axis=1))
            shuffled = np.abs(signs @ unit.T)  # (n_shuffles, n)
            observed[number, first + use] = now
            n_beyond[number, first + use] = (shuffled >= now - 1e-9).sum(axis=0)
            largest = np.maximum(largest, shuffled.max(axis=1, initial=0))
    known = ~np.isnan(observed)
    p = np.where(known, (1 + n_beyond) / (1 + n_shuffles), np.nan)
    p_any = np.full(shape, np.nan)
    n_any = n_shuffles - np.searchsorted(np.sort(largest), observed[known] - 1e-9)
    p_any[known] = (1 + n_any) / (1 + n_shuffles)
    exactly_half = tested & ~known  # 0.5 in every unit: p is 1
    p[exactly_half] = p_any[exactly_half] = 1
    return p, p_any
