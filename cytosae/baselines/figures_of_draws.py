"""The figures of an SAE on some images, and on bootstrap draws of these images.

    explained variance      1 - sum ||x - x_hat||^2 / sum ||x - mean(x)||^2, the mean that of the draw
    L0                      mean number of active latents per token
    dead share              latents that are active at no token
    label purity            of a latent with p_c, the mean of its summed value in images of label c: max p_c / sum p_c;
                            then the mean over latents that are active in enough labelled images
    ... above chance        minus the same with labels that were shuffled from patient to patient

A draw weights images by how often their group (patient, or image) was drawn. Row 0: the images as they are.
Twin with one loop per draw: tests/cytosae/baselines/.
"""

import math
from typing import Any

import numba
import numpy as np

from .measure import Floats, ImageSums, Ints

METRICS = (
    "explained_variance",
    "l0",
    "dead_share",
    "label_purity",
    "label_purity_by_chance",
    "label_purity_above_chance",
)
# the least and the largest value that there can be: no limit of an interval lies beyond
POSSIBLE = {
    "explained_variance": (-math.inf, 1.0),
    "l0": (0.0, math.inf),
    "dead_share": (0.0, 1.0),
    "label_purity": (0.0, 1.0),
    "label_purity_by_chance": (0.0, 1.0),
    "label_purity_above_chance": (-1.0, 1.0),
}
PURITIES = ("label_purity", "label_purity_by_chance", "label_purity_above_chance")
SHUFFLES = 20


def figures_of_draws(
    sums: ImageSums, weights: Floats, labels: Ints, shuffled: Ints, *, least_images: int
) -> dict[str, Floats]:
    """Each of METRICS, (1 + draws,); NaN where there is none, so purity without labels.

    Parameters
    ----------
    weights : (1 + draws, n), how often each image is drawn; row 0 is 1
    labels : (n,) numbers from 0, -1 for none
    shuffled : (SHUFFLES, n) the same, shuffled; draw b is compared with shuffle b, over and over, row 0 with all
    least_images : labelled images in which a latent must be active to have a purity
    """
    tokens = weights @ sums.tokens
    variance = weights @ sums.square - np.square(weights @ sums.shifted).sum(1) / tokens
    with np.errstate(divide="ignore", invalid="ignore"):
        explained = np.where(variance > 0, 1 - (weights @ sums.error) / variance, np.nan)
    n_labels = int(labels.max(initial=-1)) + 1
    of_entry = np.repeat(labels, np.diff(sums.begins)) >= 0
    n_labelled = np.bincount(sums.latents[of_entry], minlength=sums.n_latents)
    is_counted = (n_labelled >= least_images) & (n_labels > 1)
    dead, purity, chance = np.zeros((3, len(weights)))
    parts = (sums.begins, sums.latents, sums.values)
    which = np.arange(len(weights)) % len(shuffled)
    _per_draw(*parts, weights, labels, shuffled, which, max(1, n_labels), is_counted, dead, purity, chance)
    again = np.zeros((3, len(shuffled)))
    as_is = np.ones((len(shuffled), weights.shape[1]))
    _per_draw(*parts, as_is, labels, shuffled, np.arange(len(shuffled)), max(1, n_labels), is_counted, *again)
    chance[0] = again[2].mean()
    if not is_counted.any():
        purity[:], chance[:] = np.nan, np.nan
    return {
        "explained_variance": explained,
        "l0": (weights @ sums.active) / tokens,
        "dead_share": dead,
        "label_purity": purity,
        "label_purity_by_chance": chance,
        "label_purity_above_chance": purity - chance,
    }


def purity_without(
    sums: ImageSums, labels: Ints, shuffled: Ints, block_of: Ints, *, least_images: int
) -> dict[str, Floats]:
    """The three purities without the images of each block, (blocks,): for intervals, since draws move a purity.

    block_of : (n,) numbers from 0
    """
    n_blocks, n_labels = int(block_of.max()) + 1, int(labels.max(initial=-1)) + 1
    of_entry = np.repeat(labels, np.diff(sums.begins)) >= 0
    n_labelled = np.bincount(sums.latents[of_entry], minlength=sums.n_latents)
    is_counted = (n_labelled >= least_images) & (n_labels > 1)
    if not is_counted.any():
        return {name: np.full(n_blocks, np.nan) for name in PURITIES}
    kept = (block_of != np.arange(n_blocks)[:, None]).astype(np.float64)
    purity, chance = np.zeros((1, n_blocks)), np.zeros((len(shuffled), n_blocks))
    parts = (sums.begins, sums.latents, sums.values, kept)
    _per_block(*parts, np.stack([labels]), max(1, n_labels), is_counted, purity)
    _per_block(*parts, shuffled, max(1, n_labels), is_counted, chance)
    found = purity[0], chance.mean(0), purity[0] - chance.mean(0)
    return dict(zip(PURITIES, found, strict=True))


@numba.njit(parallel=True, cache=True)
def _per_block(
    begins: Any, latents: Any, values: Any, kept: Any, labels: Any, n_labels: int, is_counted: Any, out: Any
) -> None:
    for block in numba.prange(len(kept)):
        for which in range(len(labels)):
            out[which, block] = _purity(begins, latents, values, kept[block], labels[which], n_labels, is_counted)


@numba.njit(parallel=True, cache=True)
def _per_draw(
    begins: Any,
    latents: Any,
    values: Any,
    weights: Any,
    labels: Any,
    shuffled: Any,
    which: Any,
    n_labels: int,
    is_counted: Any,
    dead: Any,
    purity: Any,
    chance: Any,
) -> None:
    n, n_latents = len(labels), len(is_counted)
    for draw in numba.prange(len(weights)):
        weight = weights[draw]
        is_alive = np.zeros(n_latents, np.bool_)
        for image in range(n):
            if weight[image] > 0:
                for entry in range(begins[image], begins[image + 1]):
                    is_alive[latents[entry]] = True
        dead[draw] = 1 - is_alive.sum() / n_latents
        purity[draw] = _purity(begins, latents, values, weight, labels, n_labels, is_counted)
        chance[draw] = _purity(begins, latents, values, weight, shuffled[which[draw]], n_labels, is_counted)


@numba.njit(cache=True)
def _purity(begins: Any, latents: Any, values: Any, weight: Any, labels: Any, n_labels: int, is_counted: Any) -> float:
    """The mean purity of the latents that count and are active; NaN without any."""
    n_of = np.zeros(n_labels)
    for image in range(len(labels)):
        if labels[image] >= 0:
            n_of[labels[image]] += weight[image]
    share = np.zeros((len(is_counted), n_labels))
    for image in range(len(labels)):
        label = labels[image]
        if label >= 0 and weight[image] > 0:
            factor = weight[image] / n_of[label]
            for entry in range(begins[image], begins[image + 1]):
                share[latents[entry], label] += factor * values[entry]
    total, n = 0.0, 0
    for latent in range(len(is_counted)):
        if is_counted[latent]:
            whole = share[latent].sum()
            if whole > 0:
                total += share[latent].max() / whole
                n += 1
    return total / n if n else np.nan
