"""Which patch tokens are background, by a rule that needs no masks: they can be left out of training.

The rule `first-component`: patch tokens of a sample of the images (all tokens of evenly spaced images, 65,536 tokens at
most) are projected on their first principal component. A crop shows its cell in the middle, so its rim has a larger
share of background than the rest of it. The rim is the tenth of the patches that are farthest from the middle, which
are its corners: between them neighbours that are cut off lie at the edge. Of the edges of 256 equal bins the threshold
is the one with the largest difference between the shares of rim patches and of other patches beyond it (of those beside
it that are as good but for chance, the middle one), and background is the side with more of the rim: if rim and rest
are two mixtures of the same two densities, that is where these densities cross, however large or rare background is.
Where the two shares differ by less than a tenth, or no more than by chance, the rule does not tell background from
cells, and is refused. CLS and register tokens always stay. Measured beside masks: bench/background.py.

Memory: one chunk, the sample, and a byte for each token of the caches. Twin: tests/cytosae/training/test_background.py.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from stores.activation_store import ActivationStore
from stores.errors import BadInput
from stores.token_layout import TokenLayout

from .finite_tokens import check_finite

Bool = npt.NDArray[np.bool_]
Float = npt.NDArray[np.float64]

_SAMPLE = 65_536  # tokens
_BINS = 256
_LEAST_DIFFERENCE = 0.1  # of the shares of background at the rim and elsewhere
_AS_GOOD = 0.5  # of the deviation by chance: two differences that are nearer are equal
_CHANCE = 2.0  # in few patches the largest difference is that large by chance: Kolmogorov-Smirnov, p 0.0007


@dataclass(frozen=True, eq=False)
class Background:
    """The tokens that stay, and how they were chosen."""

    keep: list[Bool]  # per cache (images, tokens of an image): False for background
    rule: str
    threshold: float  # of the projection on `direction`, of float32 tokens minus `mean`
    explained: float  # share of the sample's variance along the first principal component
    share_at_rim: float  # of the sample's patches in the corners that are background
    share_elsewhere: float
    n_patches: int  # of readable images
    n_left_out: int

    def to_spec(self) -> dict[str, Any]:
        """What `sae.json` says; with the hash, a run is continued with the same tokens only."""
        packed = hashlib.sha256()
        for mask in self.keep:
            packed.update(np.packbits(mask).tobytes())
        return {
            "rule": self.rule,
            "threshold": self.threshold,
            "explained": self.explained,
            "share_at_rim": self.share_at_rim,
            "share_elsewhere": self.share_elsewhere,
            "patches": self.n_patches,
            "left_out": self.n_left_out,
            "sha256": packed.hexdigest(),
        }


def find_background(stores: Sequence[ActivationStore], rule: str = "first-component") -> Background:
    """The background of the readable images of caches with the same kind of tokens. Reads them twice.

    Raises
    ------
    BadInput
        If an image has no square of patches, no image is readable, or the rule does not tell background from cells.
    DamagedStore, StoreUnreachable
        If a cache cannot be read, or a patch token of a readable image is NaN or infinite.
    """
    side, first = _patches(stores[0].spec.layout)
    if side < 3:
        raise BadInput(f"background is told by the corners of an image, which {side} x {side} patches do not have")
    is_rim_P = farthest_tenth(side)
    sample_NPD = _sample(stores, first)
    mean_D, direction_D, explained = _first_component(sample_NPD.reshape(-1, sample_NPD.shape[2]))
    projected_NP = (sample_NPD - mean_D) @ direction_D
    threshold, is_high = rim_threshold(projected_NP, is_rim_P)
    if not is_high:  # then the low side is background: turn the direction
        direction_D, threshold, projected_NP = -direction_D, -threshold, -projected_NP
    at_rim, elsewhere = (float((projected_NP[:, mask] > threshold).mean()) for mask in (is_rim_P, ~is_rim_P))
    n_rim, n_other = (len(sample_NPD) * int(mask.sum()) for mask in (is_rim_P, ~is_rim_P))
    if at_rim - elsewhere < max(_LEAST_DIFFERENCE, _CHANCE * (1 / n_rim + 1 / n_other) ** 0.5):
        raise BadInput(
            f"the rule {rule} does not tell background from cells here: it would call {at_rim:.0%} of the patches in "
            f"the corners of images background, and {elsewhere:.0%} of the others; leave --background out"
        )
    keep, n_patches, n_left_out = [], 0, 0
    for store in stores:
        kept = np.ones((store.spec.n_images, store.spec.tokens_per_image), bool)
        is_readable = store.readable()
        for rows, tokens in store.iter_chunks():
            readable = is_readable[rows.start : rows.stop]
            patches, images = tokens[readable][:, first:], np.flatnonzero(readable) + rows.start
            check_finite(store, patches, images, first_token=first)  # NaN is no background
            kept[images, first:] = (patches.astype(np.float32) - mean_D) @ direction_D <= threshold
        keep.append(kept)
        n_patches += int(is_readable.sum()) * side**2
        n_left_out += int((~kept).sum())
    return Background(
        keep=keep,
        rule=rule,
        threshold=threshold,
        explained=explained,
        share_at_rim=at_rim,
        share_elsewhere=elsewhere,
        n_patches=n_patches,
        n_left_out=n_left_out,
    )


def farthest_tenth(side: int) -> Bool:
    """(side x side,): is a patch among the tenth that is farthest from the middle? As far ones are, too."""
    from_middle = np.square(2 * np.arange(side) - (side - 1))  # four times the square: whole numbers
    distance_P = np.add.outer(from_middle, from_middle).ravel()
    return np.asarray(distance_P >= np.sort(distance_P)[-math.ceil(side**2 / 10)], bool)


def rim_threshold(values_NP: npt.NDArray[np.floating[Any]], is_rim_P: Bool) -> tuple[float, bool]:
    """(threshold, is the side above it background): where the shares of rim and other patches beyond it differ most.

    Of the inner edges of 256 equal bins. The edges beside it that are worse by no more than chance are as good: of
    these, as in a gap between two groups, the middle one.
    """
    edges = np.histogram_bin_edges(values_NP, _BINS)
    rim, other = (np.histogram(values_NP[:, mask], edges)[0] for mask in (is_rim_P, ~is_rim_P))
    n_rim, n_other = int(rim.sum()), int(other.sum())
    above_rim, above_other = (counts[::-1].cumsum()[::-1][1:] for counts in (rim, other))  # at each inner edge
    gain = above_rim * n_other - above_other * n_rim  # whole numbers: n_rim x n_other times the difference
    best = int(np.abs(gain).argmax())
    by_chance = _AS_GOOD * (n_rim * n_other * (n_rim + n_other)) ** 0.5
    worse = np.flatnonzero(gain * np.sign(gain[best]) < abs(int(gain[best])) - by_chance)
    first, last = (int(np.searchsorted(worse, best)) - 1, int(np.searchsorted(worse, best)))
    low = int(worse[first]) + 1 if first >= 0 else 0
    high = int(worse[last]) - 1 if last < len(worse) else len(gain) - 1
    return float(edges[1 + (low + high) // 2]), bool(gain[best] > 0)


def _patches(layout: TokenLayout) -> tuple[int, int]:
    """(side, first): an image ends with side x side patches, from token `first` on."""
    try:
        return layout.side, layout.first_patch
    except BadInput:
        raise BadInput(
            f"background is a matter of patches in a square; found {layout.tokens_per_image} tokens per image, of "
            f"which {layout.n_patches} are patches"
        ) from None


def _sample(stores: Sequence[ActivationStore], first: int) -> npt.NDArray[np.float32]:
    """(images, patches, D): evenly spaced readable images of all caches, `_SAMPLE` tokens at most."""
    places = [(number, row) for number, store in enumerate(stores) for row in np.flatnonzero(store.readable())]
    if not places:
        raise BadInput("no readable image in the given caches: there is no background to find")
    n_images = max(1, min(len(places), _SAMPLE // (stores[0].spec.tokens_per_image - first)))
    chosen = [places[at] for at in np.linspace(0, len(places) - 1, n_images).round().astype(int)]
    found = []
    for number, store in enumerate(stores):
        rows = np.array(sorted({int(row) for which, row in chosen if which == number}), np.int64)
        for chunk in np.unique(rows // store.spec.chunk_images):
            inside = rows[rows // store.spec.chunk_images == chunk] - chunk * store.spec.chunk_images
            patches = store.read_chunk(int(chunk))[inside, first:]
            check_finite(store, patches, inside + chunk * store.spec.chunk_images, first_token=first)
            found.append(patches.astype(np.float32))
    return np.concatenate(found)


def _first_component(tokens_ND: npt.NDArray[np.float32]) -> tuple[Any, Any, float]:
    """(mean, direction of norm 1, its share of the variance), float32 and (D,); the sign is any."""
    mean_D = tokens_ND.mean(0, dtype=np.float64)
    centred = (tokens_ND - mean_D).astype(np.float32)
    values, vectors = np.linalg.eigh((centred.T @ centred).astype(np.float64))
    total = float(values.clip(0).sum())
    return (
        mean_D.astype(np.float32),
        vectors[:, -1].astype(np.float32),
        float(values[-1]) / total if total > 0 else 0.0,
    )
