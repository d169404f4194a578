"""What the backbone itself says of each image, without an SAE: the mean of its patch tokens, and its CLS token.

One pass over the caches; what it finds is kept as part files, one for each few thousand images, so that an interrupted
pass goes on and the next search reads 6 kB an image instead of all tokens. Parts that are damaged or of other caches
are made again. Compared by the cosine after the mean over all readable images is taken off.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stores.activation_store import ActivationStore
from stores.errors import BadInput, DamagedStore
from stores.files import sha256_json, sweep_partials
from stores.part_files import Part, open_part, write_part
from stores.progress import Progress
from stores.tables import column, listed

from .config import CLS, TOKENS

PART_IMAGES = 4096
_VERSION = 1
Float32s = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TokenIndex:
    """Means and CLS tokens of all images of some caches, on disk."""

    folder: Path
    stores: list[ActivationStore]
    parts: list[tuple[int, int, int, str]]  # cache, first image, last, tag
    centers: dict[str, npt.NDArray[np.float64]]  # "tokens", "cls" -> (width,) mean over readable images

    @property
    def ways(self) -> tuple[str, ...]:
        """What images can be compared by."""
        return tuple(self.centers)

    def blocks(self, way: str) -> Iterator[tuple[int, int, Float32s]]:
        """(cache, first image, rows of norm 1) part by part; a row is 0 where the image is not readable."""
        for cache, first, last, tag in self.parts:
            part = open_part(_path(self.folder, cache, first, last), tag)
            yield cache, first, self.unit(np.asarray(part[way]), way) * np.asarray(part["readable"])[:, None]

    def unit(self, vectors: Float32s, way: str) -> Float32s:
        """(n, width) vectors less the mean image, at norm 1."""
        centred = vectors.astype(np.float64) - self.centers[way]
        norms = np.linalg.norm(centred, axis=-1, keepdims=True)
        return np.asarray(centred / np.where(norms > 0, norms, 1), np.float32)

    def vector(self, cache: int, image: int, way: str) -> Float32s:
        """(width,) of one image, as it is in the cache."""
        for number, first, last, tag in self.parts:
            if number == cache and first <= image < last:
                return np.array(open_part(_path(self.folder, number, first, last), tag)[way][image - first])
        raise IndexError(image)


def build_index(
    stores: list[ActivationStore], folder: Path, *, progress: Progress = lambda done, total, state: None
) -> TokenIndex:
    """Read the caches once, or what is left of them; `folder` keeps the parts.

    Parameters
    ----------
    stores : caches of one kind of tokens (`open_caches`)

    Raises
    ------
    BadInput
        If no image is readable.
    DamagedStore
        If a chunk is damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sweep_partials(folder)
    layout = stores[0].spec.layout
    ways = (TOKENS, CLS) if layout.n_cls else (TOKENS,)
    parts = [
        (number, first, min(first + PART_IMAGES, store.spec.n_images), _tag(store, first))
        for number, store in enumerate(stores)
        for first in range(0, store.spec.n_images, PART_IMAGES)
    ]
    total, n_done, n_readable = sum(store.spec.n_images for store in stores), 0, 0
    sums = {way: np.zeros(stores[0].spec.width) for way in ways}
    for cache, first, last, tag in parts:
        part = _open(folder, cache, first, last, tag)
        if part is None:
            arrays = _read(stores[cache], first, last, partial(_tell, progress, n_done, total))
            write_part(_path(folder, cache, first, last), tag, arrays)
            part = open_part(_path(folder, cache, first, last), tag)
        readable = np.asarray(part["readable"], bool)
        n_readable += int(readable.sum())
        for way in ways:
            sums[way] += np.asarray(part[way])[readable].astype(np.float64).sum(0)
        n_done += last - first
        progress(n_done, total, "tokens")
    if not n_readable:
        raise BadInput(f"{listed([str(store.root) for store in stores])}: no image of these caches could be read")
    return TokenIndex(folder, stores, parts, {way: total / n_readable for way, total in sums.items()})


def places_of(stores: Sequence[ActivationStore], ids: Sequence[str], is_needed: npt.NDArray[np.bool_]) -> list[Ints]:
    """For each cache (images,) the number in `ids` of its images; -1: not among them.

    Raises
    ------
    BadInput
        If a needed image is not readable in any cache.
    """
    number_of = {name: number for number, name in enumerate(ids)}
    found, seen = [], np.zeros(len(ids), bool)
    for store in stores:
        numbers = np.array([number_of.get(str(name), -1) for name in column(store.images, "image_id")], np.int64)
        there = numbers[(numbers >= 0) & store.readable()]
        seen[there] = True
        found.append(numbers)
    missing = [ids[number] for number in np.flatnonzero(is_needed & ~seen).tolist()]
    if missing:
        raise BadInput(
            f"{len(missing):,} images of the barcodes are not readable in --cache ({listed(missing)}); give all caches "
            f"that the latents were encoded from"
        )
    return found


def _tell(progress: Progress, n_before: int, total: int, done: int) -> None:
    progress(n_before + done, total, "tokens")


def _read(store: ActivationStore, first: int, last: int, tell: Any) -> dict[str, npt.NDArray[Any]]:
    layout, width = store.spec.layout, store.spec.width
    found: dict[str, npt.NDArray[Any]] = {TOKENS: np.zeros((last - first, width), np.float32)}
    if layout.n_cls:
        found[CLS] = np.zeros((last - first, width), np.float32)
    found["readable"] = store.readable()[first:last].astype(np.uint8)
    size = store.spec.chunk_images
    for start in range(first, last, size):
        stop = min(start + size, last)
        tokens = store.read_rows(start, stop)
        for at in np.flatnonzero(found["readable"][start - first : stop - first]):
            image = tokens[at].astype(np.float32)
            found[TOKENS][start - first + at] = image[layout.first_patch :].mean(0, dtype=np.float64)
            if layout.n_cls:
                found[CLS][start - first + at] = image[0]
        tell(stop - first)
    return found


def _open(folder: Path, cache: int, first: int, last: int, tag: str) -> Part | None:
    try:
        part = open_part(_path(folder, cache, first, last), tag, verify=True)
        return part if len(part["readable"]) == last - first else None
    except (DamagedStore, KeyError):
        return None


def _path(folder: Path, cache: int, first: int, last: int) -> Path:
    return folder / f"{cache}-{first}-{last}.part"


def _tag(store: ActivationStore, first: int) -> str:
    return sha256_json({"version": _VERSION, "cache": store.content_sha256, "first": first})
