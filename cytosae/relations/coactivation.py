"""Which latents are active at the same tokens: exact counts for chosen latents against all others, compiled.

A task takes a group of chosen latents and reads all stores once, so nothing is added up between tasks, and the numbers
cannot depend on the groups or the workers. Association is phi, the correlation of two latents' being active: with n
tokens in all, n_a and n_b with one of them, n_ab with both,

    phi = (n n_ab - n_a n_b) / sqrt(n_a n_b (n - n_a) (n - n_b))        0 by chance, 1: always together
    lift = n n_ab / (n_a n_b)                                           1 by chance
    jaccard = n_ab / (n_a + n_b - n_ab)

Tokens of one image are alike, so a pair counts only if it is active together in `min_images` images or more; there is
no p-value. Twin: test_neighbours.py.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from stores.errors import BadInput
from stores.latent_store import LatentStore
from stores.spec import as_floats, check_choice
from stores.token_sets import TOKEN_SETS, chosen_tokens

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
MOST_NEIGHBOURS = 1000
_CHUNK_ENTRIES = 4 << 20  # nonzeros that are read together
_GROUP_BYTES = 256 << 20  # of the counts of one group


@dataclass(frozen=True, kw_only=True)
class NeighbourConfig:
    """How many neighbours, and what counts as active together.

    Attributes
    ----------
    tau : 0 or more; a latent is active at a token if its stored value is greater
    token_set : tokens that count: all, patch, cls or register
    min_images : fewest images in which two latents must be active at one token, to be neighbours by activity
    n_top : neighbours of each kind, 1 to 1,000
    """

    tau: float = 0.0
    token_set: str = "all"
    min_images: int = 5
    n_top: int = 10

    def __post_init__(self) -> None:
        check_choice("token_set", self.token_set, TOKEN_SETS)
        if not self.tau >= 0:
            raise BadInput(f"tau must be a number of at least 0; found {self.tau!r}")
        if self.min_images < 1 or not 1 <= self.n_top <= MOST_NEIGHBOURS:
            raise BadInput(
                f"min_images must be at least 1, and neighbours 1 to {MOST_NEIGHBOURS:,}; "
                f"found {self.min_images} and {self.n_top}"
            )
        as_floats(self, "tau")


Coactivation = NeighbourConfig  # its name in 0.1; stays for one release


@dataclass(frozen=True, eq=False)
class GroupCounts:
    """Of a group of G latents: the ones most associated with each, and how often pairs are active together.

    The pairs are (latent, top[g, k]) and then (latent, also[g, k]), side by side.
    """

    n_tokens: Ints  # (L,) tokens at which a latent is active
    n_images: Ints  # (L,) images in which it is, at a token of the set
    top: npt.NDArray[np.int32]  # (G, n_top), strongest first; -1 where there are fewer
    n_tokens_both: Ints  # (G, n_top + n_also)
    n_images_both: Ints  # (G, n_top + n_also)


def group_size(n_latents: int) -> int:
    """How many chosen latents a task counts for: as many as have their counts in 256 MiB, and at least one."""
    return max(1, _GROUP_BYTES // (16 * n_latents))


def count_group(
    latents: Sequence[Path | str], chosen: Ints, also: npt.NDArray[np.int32], config: NeighbourConfig
) -> GroupCounts:
    """Count for some latents over all stores, and take the most associated: phi above 0, of equals the lower number.

    Memory: 16 bytes for every pair of a chosen latent and any other, and a chunk of a store.

    Parameters
    ----------
    latents : paths or URLs of finished latent stores by one SAE
    chosen : (G,) different latents
    also : (G, n_also) latents to be counted with each of them, whatever their phi; -1: none

    Raises
    ------
    DamagedStore
        If rows of a store cannot be read.
    """
    counter = _Counter(LatentStore(latents[0], check_files=False).spec.n_latents, chosen)
    for path in latents:
        counter.add_store(LatentStore(path, check_files=False), config)
    top = np.full((len(chosen), config.n_top), -1, np.int32)
    for g, latent in enumerate(chosen):
        n_both, images_both = counter.n_both[g], counter.n_images_both[g]
        phi = phi_of(counter.n_all, counter.n_tokens[latent], counter.n_tokens, n_both)
        counts = (phi > 0) & (images_both >= config.min_images)
        counts[latent] = False
        some = np.flatnonzero(counts)
        best = some[np.lexsort((some, -phi[some]))][: config.n_top]  # of equals the lower number
        top[g, : len(best)] = best
    pairs = np.concatenate([top, also], axis=1)
    there = np.maximum(pairs, 0), np.arange(len(chosen))[:, None]
    return GroupCounts(
        n_tokens=counter.n_tokens,
        n_images=counter.n_images,
        top=top,
        n_tokens_both=np.where(pairs >= 0, counter.n_both[there[1], there[0]], 0),
        n_images_both=np.where(pairs >= 0, counter.n_images_both[there[1], there[0]].astype(np.int64), 0),
    )


def phi_of(n: int, n_a: Any, n_b: Any, n_ab: Any) -> Any:
    """Phi, the correlation of being active at a token; -1 where a latent is so everywhere or nowhere: undefined.

    Parameters
    ----------
    n : tokens
    n_a, n_b, n_ab : tokens at which one, the other, both are active; numbers or arrays that broadcast
    """
    a, b = np.asarray(n_a, np.float64), np.asarray(n_b, np.float64)
    spread = np.sqrt(a * (n - a)) * np.sqrt(b * (n - b))
    is_defined = spread > 0
    return np.where(is_defined, (n * np.asarray(n_ab, np.float64) - a * b) / np.where(is_defined, spread, 1), -1.0)


class _Counter:
    """Running counts of G chosen latents against all L. Memory: 16 bytes for every pair of them."""

    def __init__(self, n_latents: int, chosen: Ints) -> None:
        self.n_tokens, self.n_images = np.zeros(n_latents, np.int64), np.zeros(n_latents, np.int64)
        self.n_both = np.zeros((len(chosen), n_latents), np.int64)
        self.n_images_both = np.zeros((len(chosen), n_latents), np.int32)
        self.n_all = 0  # tokens of the set, of readable images
        self._group_of = np.full(n_latents, -1, np.int32)
        self._group_of[chosen] = np.arange(len(chosen))
        self._last, self._last_both = np.full(n_latents, -1, np.int32), np.full(self.n_both.shape, -1, np.int32)
        self._found = np.empty(n_latents, np.int32)
        self._n_images_before = 0

    def add_store(self, store: LatentStore, config: NeighbourConfig) -> None:
        per_image, tau = store.spec.tokens_per_image, np.float32(config.tau)
        tokens = chosen_tokens(config.token_set, store.layout, f"the tokens of {store.root}")
        self.n_all += int(store.readable().sum()) * len(tokens)
        for images in _chunks(store):
            rows = store.read_images(images.start, images.stop)
            first = self._n_images_before + images.start
            counts = self.n_tokens, self.n_images, self.n_both, self.n_images_both
            scratch = self._group_of, self._last, self._last_both, self._found
            where = first, per_image, tokens.start, tokens.stop
            _count(rows.indices, rows.values, rows.indptr, *where, tau, *counts, *scratch)
        self._n_images_before += store.spec.n_images


def _chunks(store: LatentStore) -> Iterator[range]:
    """Consecutive images whose nonzeros are read together."""
    starts, at = store.image_indptr, 0
    while at < store.spec.n_images:
        stop = int(np.searchsorted(starts, starts[at] + _CHUNK_ENTRIES, side="right")) - 1
        stop = min(max(stop, at + 1), store.spec.n_images)
        yield range(at, stop)
        at = stop


@numba.njit(cache=True)
def _count(
    indices: Any,
    values: Any,
    indptr: Any,
    first_image: int,
    per_image: int,
    first_token: int,
    end_token: int,
    tau: Any,
    n_tokens: Any,
    n_images: Any,
    n_both: Any,
    n_images_both: Any,
    group_of: Any,
    last: Any,
    last_both: Any,
    found: Any,
) -> None:
    for row in range(len(indptr) - 1):
        image, token = first_image + row // per_image, row % per_image
        if token < first_token or token >= end_token:
            continue
        n_found = 0
        for k in range(indptr[row], indptr[row + 1]):
            if values[k] > tau:
                found[n_found] = indices[k]
                n_found += 1
        for i in range(n_found):
            latent = found[i]
            n_tokens[latent] += 1
            if last[latent] != image:
                last[latent] = image
                n_images[latent] += 1
            group = group_of[latent]
            if group < 0:
                continue
            for j in range(n_found):
                other = found[j]
                n_both[group, other] += 1
                if last_both[group, other] != image:
                    last_both[group, other] = image
                    n_images_both[group, other] += 1
