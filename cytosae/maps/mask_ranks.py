"""How well does a latent's map agree with a mask? Place within images (AUROC) and overlap (IoU), per latent.

AUROC of an image: the probability that a patch of the class has a larger value than another patch of the SAME image;
ties count half. Within a unit (a patient, or an image without a patient) images are averaged, weighted by their number
of pairs; then the units are averaged with equal weights. Only images in which the latent is active are used, since an
inactive latent says nothing about place. So neither the size of a class nor the frequency of a latent moves the AUROC
away from 0.5.

IoU: the patches at or above a threshold against the patches of the class, summed over all images. The threshold is
cross-fitted: it is chosen on one half of the units and applied to the other half, and the other way round.

The stored values are ranked once (`read_ranked`), for any number of masks. Slow reference code: test_masks.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from stores.errors import BadInput
from stores.latent_store import LatentStore
from stores.progress import Progress

MAX_NONZEROS = 1 << 28  # of the masked images together: about 12 GiB
Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class RankedValues:
    """The stored values of all latents at some patches, in two orders; the patches of an image are contiguous.

    An image has `n_per_image` patches. The images of a unit are contiguous (`unit_of` increases from 0).
    """

    n_per_image: int
    unit_of: Int  # (n_images,)
    starts: Int  # (n_latents + 1,) first entry of each latent, in both orders
    patches: npt.NDArray[np.int32]  # (nnz,) by latent, then image
    ranks: npt.NDArray[np.float32]  # (nnz,) rank of each among the patches of its image, from 1; ties get the mean rank
    by_value: npt.NDArray[np.float32]  # (nnz,) by latent, then value rising
    patches_by_value: npt.NDArray[np.int32]  # (nnz,) of these

    @property
    def n_images(self) -> int:
        """Images with a mask."""
        return len(self.unit_of)

    @property
    def n_units(self) -> int:
        """Patients, and images without one."""
        return int(self.unit_of[-1]) + 1


@dataclass(frozen=True)
class MaskAgreement:
    """Per latent, (n_latents,); NaN where it is not defined.

    auroc : probability that a patch of the class has a larger value than another patch of the same image
    iou : intersection over union of the class with the patches at or above a threshold of the other half
    threshold : the stored value that is best over all images (the largest, if several are)
    """

    auroc: Float
    iou: Float
    threshold: Float


def read_ranked(
    latents: LatentStore,
    images: Sequence[int],
    unit_of: Int,
    *,
    progress: Progress = lambda done, total, state: None,
) -> RankedValues:
    """The values at all patches of these images, patch p of the i-th at number i * n_patches + p; others are left out.

    Raises
    ------
    BadInput
        If they are more than `MAX_NONZEROS`.
    """
    nnz = int(np.diff(latents.image_indptr)[list(images)].sum())
    if nnz > MAX_NONZEROS:
        raise BadInput(
            f"the {len(images):,} masked images hold {nnz:,} values, more than {MAX_NONZEROS:,}; take fewer masks"
        )
    n_patches, first_patch = latents.layout.n_patches, latents.layout.first_patch
    indices, values, patches = [], [], []
    for number, image in enumerate(images):
        rows = latents.read_images(image, image + 1)
        begin = int(rows.indptr[first_patch])
        of_image = np.repeat(np.arange(n_patches), np.diff(rows.indptr[first_patch:]))
        indices.append(rows.indices[begin:])
        values.append(rows.values[begin:])
        patches.append((number * n_patches + of_image).astype(np.int32))
        progress(number + 1, len(images), "reading")
    return rank(
        np.concatenate(indices),
        np.concatenate(values),
        np.concatenate(patches),
        n_latents=latents.spec.n_latents,
        n_per_image=n_patches,
        unit_of=unit_of,
    )


def rank(
    indices: npt.NDArray[Any],
    values: npt.NDArray[np.float32],
    patches: npt.NDArray[np.int32],
    *,
    n_latents: int,
    n_per_image: int,
    unit_of: Int,
) -> RankedValues:
    """Sort entries (latent, value, patch), and rank each among the patches of its image, the zeros lowest.

    Parameters
    ----------
    indices : (nnz,) latents
    values : (nnz,) above 0
    patches : (nnz,) from 0 to n_images * n_per_image - 1, each at most once per latent
    unit_of : (n_images,) rising
    """
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.bincount(indices, minlength=n_latents))])
    # positive floats have the same order as their bit patterns
    order = np.argsort(indices.astype(np.uint64) << np.uint64(32) | values.view(np.uint32), kind="stable")
    by_value, patches_by_value = values[order], patches[order]
    run = indices[order].astype(np.int64) * len(unit_of) + patches_by_value // n_per_image
    order = np.argsort(run, kind="stable")  # stable: within a run values still increase
    run, own = run[order], by_value[order]
    is_first = np.ones(len(run), bool)
    is_first[1:] = run[1:] != run[:-1]
    position, length = _positions(is_first)
    is_new = is_first.copy()
    is_new[1:] |= own[1:] != own[:-1]
    tie_position, ties = _positions(is_new)
    ranks = n_per_image - length + position - tie_position + (ties - 1) / 2 + 1
    return RankedValues(
        n_per_image,
        unit_of,
        starts,
        patches_by_value[order],
        ranks.astype(np.float32),
        by_value,
        patches_by_value,
    )


def _positions(is_first: Bool) -> tuple[Int, Int]:
    """For entries in runs: the position of each in its run, from 0, and the length of the run."""
    first = np.flatnonzero(is_first)
    length = np.diff(np.append(first, len(is_first)))
    return np.arange(len(is_first)) - np.repeat(first, length), np.repeat(length, length)


def halves(n_units: int, seed: int) -> npt.NDArray[np.int64]:
    """(n_units,) 0 or 1: the half of each, drawn with `seed`."""
    half = np.zeros(n_units, np.int64)
    half[np.random.default_rng([seed, 1]).permutation(n_units)[: n_units // 2]] = 1
    return half


def mask_agreement(ranked: RankedValues, foreground: Bool, half: Int) -> MaskAgreement:
    """AUROC, IoU and best threshold of every latent with a class.

    Parameters
    ----------
    foreground : (n_images, n_per_image)
    half : (n_units,) 0 or 1, see `halves`; the IoU is NaN if all are 0
    """
    n_latents = len(ranked.starts) - 1
    auroc, iou, threshold = (np.full(n_latents, np.nan) for _ in range(3))
    nothing = np.zeros((0, 0))
    fill_auroc(ranked.starts, ranked.patches, ranked.ranks, foreground, ranked.unit_of, auroc, nothing)
    _fill_iou(ranked.starts, ranked.by_value, ranked.patches_by_value, foreground, half[ranked.unit_of], iou, threshold)
    return MaskAgreement(auroc, iou if half.any() else np.full(n_latents, np.nan), threshold)


@numba.njit(cache=True)
def count_images(starts: Any, patches: Any, n_per_image: int) -> Any:
    """(n_latents,) images in which each latent is active."""
    found = np.zeros(len(starts) - 1, np.int64)
    for latent in range(len(starts) - 1):
        last = -1
        for k in range(starts[latent], starts[latent + 1]):
            image = patches[k] // n_per_image
            if image != last:
                found[latent] += 1
                last = image
    return found


@numba.njit(cache=True)
def fill_auroc(starts: Any, patches: Any, ranks: Any, foreground: Any, unit_of: Any, auroc: Any, units: Any) -> None:
    """Fill auroc (n_latents,), and units (n_latents, n_units) unless that is empty; unknown entries stay unchanged.

    The entries of a latent are sorted by image, and so by unit: one pass.
    """
    n_per_image = foreground.shape[1]
    n_inside = np.zeros(len(foreground), np.int64)
    for image in range(len(foreground)):
        for patch in range(n_per_image):
            n_inside[image] += foreground[image, patch]
    for latent in range(len(starts) - 1):
        k, stop = starts[latent], starts[latent + 1]
        total, n_units, won, pairs, unit = 0.0, 0, 0.0, 0.0, -1
        while k < stop:
            image = patches[k] // n_per_image
            if unit_of[image] != unit:
                if pairs > 0:
                    total += won / pairs
                    n_units += 1
                    if len(units):
                        units[latent, unit] = won / pairs
                unit, won, pairs = unit_of[image], 0.0, 0.0
            begin, n_hit, rank_sum = k, 0, 0.0
            while k < stop and patches[k] // n_per_image == image:
                if foreground[image, patches[k] % n_per_image]:
                    n_hit += 1
                    rank_sum += ranks[k]
                k += 1
            inside = n_inside[image]
            rank_sum += (inside - n_hit) * (n_per_image - (k - begin) + 1) / 2  # the zeros share a mean rank
            won += rank_sum - inside * (inside + 1) / 2
            pairs += inside * (n_per_image - inside)
        if pairs > 0:
            total += won / pairs
            n_units += 1
            if len(units):
                units[latent, unit] = won / pairs
        if n_units:
            auroc[latent] = total / n_units


@numba.njit(cache=True)
def _fill_iou(starts: Any, values: Any, patches: Any, foreground: Any, half_of: Any, iou: Any, threshold: Any) -> None:
    """Fill iou and threshold (n_latents,); entries of latents without a value stay unchanged."""
    n_per_image = foreground.shape[1]
    n_inside = np.zeros(2, np.int64)
    for image in range(len(foreground)):
        for patch in range(n_per_image):
            n_inside[half_of[image]] += foreground[image, patch]
    for latent in range(len(starts) - 1):
        first, stop = starts[latent], starts[latent + 1]
        if first == stop:
            continue
        n_hit, n_on = np.zeros(2, np.int64), np.zeros(2, np.int64)
        best, at = np.zeros(2), np.full(2, np.inf)  # of each half; without an overlap no patch is chosen
        best_of_all, at_of_all = -1.0, 0.0
        for k in range(stop - 1, first - 1, -1):  # from the largest value down
            image = patches[k] // n_per_image
            n_on[half_of[image]] += 1
            n_hit[half_of[image]] += foreground[image, patches[k] % n_per_image]
            if k == first or values[k - 1] != values[k]:  # equal values are on the same side of a threshold
                for half in range(2):
                    union = n_inside[half] + n_on[half] - n_hit[half]
                    if union > 0 and n_hit[half] / union > best[half]:
                        best[half], at[half] = n_hit[half] / union, values[k]
                hit, union = n_hit.sum(), n_inside.sum() + n_on.sum() - n_hit.sum()
                if union > 0 and hit / union > best_of_all:
                    best_of_all, at_of_all = hit / union, values[k]
        hit, on = 0, 0
        for k in range(first, stop):
            image = patches[k] // n_per_image
            if values[k] >= at[1 - half_of[image]]:
                on += 1
                hit += foreground[image, patches[k] % n_per_image]
        if n_inside.sum() + on - hit > 0:
            iou[latent] = hit / (n_inside.sum() + on - hit)
        threshold[latent] = at_of_all
