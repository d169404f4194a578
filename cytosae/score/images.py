"""What is read for a scorecard: of each chosen image the means of its latents and of its tokens over the patches.

Two ways of one average, so that latents and tokens can be compared. Registers and CLS have no part in it.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy.sparse import csc_matrix, csr_matrix, vstack

from cytosae.probe import connected_groups
from stores.activation_store import ActivationStore, open_caches
from stores.csr import CsrRows
from stores.errors import BadInput, SpecMismatch
from stores.latent_store import LatentStore
from stores.part_files import Arrays, Keep, computed
from stores.progress import Progress
from stores.tables import column, listed, read_table_file

from .config import ScoreConfig

Ints = npt.NDArray[np.int64]
Float32s = npt.NDArray[np.float32]
_BLOCK_IMAGES = 64  # that are read together
_PART_IMAGES = 4096  # of a store, of which the means are kept together: a whole number of blocks


@dataclass(frozen=True)
class Chosen:
    """The images of a scorecard, n of them, in the order of their stores."""

    ids: list[str]
    labels: list[str | None]
    parents: list[str | None]
    groups: Ints  # (n,) images of one patient, and identical images, have one number
    store: Ints  # (n,) which store
    index: Ints  # (n,) which image of it, rising within a store
    n_candidates: int  # readable images from which they were drawn
    n_patients: int  # 0: none is known


def open_latents(places: Sequence[Path | str], sae_sha256: str) -> list[LatentStore]:
    """The latent stores of an SAE.

    Raises
    ------
    BadInput
        Without a store.
    SpecMismatch
        If one is of another SAE.
    """
    if not places:
        raise BadInput(
            "a scorecard is of stored latents; found none; give --latents STORE, which cyto sae encode makes"
        )
    stores = [LatentStore(place) for place in places]
    for store in stores:
        if store.spec.sae_sha256 != sae_sha256:
            raise SpecMismatch(
                f"the latents {store.root} are of another SAE ({store.spec.sae_sha256[:12]}), expected "
                f"{sae_sha256[:12]}; give the RUN that they were encoded with, or encode again: cyto sae encode"
            )
    return stores


def choose_images(stores: Sequence[LatentStore], config: ScoreConfig) -> Chosen:
    """Readable images, those with a label where there are labels; drawn at random if they are too many.

    Raises
    ------
    BadInput
        If there is none, one is in two stores, or a column that is asked for does not exist.
    """
    columns: dict[str, list[Any]] = {
        name: [] for name in ("image_id", "dataset", "patient", "content_hash", "label", "parent")
    }
    where: list[tuple[int, int]] = []
    there = {name for store in stores for name in store.images.column_names}
    for option, asked in {"label": config.label, "parent": config.parent}.items():
        if asked and asked not in there | {"label", "label_common"}:
            raise BadInput(
                f"no image table of --latents has the column {asked!r} of --{option}; there are "
                f"{listed(sorted(there), 20)}"
            )
    for number, store in enumerate(stores):
        rows = np.flatnonzero(store.readable()).tolist()
        for name, values in columns.items():
            asked = {"label": config.label, "parent": config.parent or ""}.get(name, name)
            cells = column(store.images, asked)
            values.extend(cells[row] or None for row in rows)
        where += [(number, row) for row in rows]
    ids = [str(name) for name in columns["image_id"]]
    if len(set(ids)) < len(ids):
        twice = [name for name, n in Counter(ids).items() if n > 1]
        raise BadInput(f"{len(twice):,} images are in two of --latents ({listed(twice)}); give each image once")
    labels = columns["label"]
    candidates = np.array([n for n in range(len(ids)) if labels[n] is not None] or range(len(ids)), np.int64)
    if not len(candidates):
        raise BadInput("no readable image in --latents: there is nothing to score")
    chosen = candidates
    if config.max_images and len(candidates) > config.max_images:
        rng = np.random.default_rng((config.seed, 1))
        chosen = np.sort(rng.choice(candidates, config.max_images, replace=False))
    patients = [
        f"{columns['dataset'][n]}/{columns['patient'][n]}" if columns["patient"][n] else "" for n in chosen.tolist()
    ]
    hashes = [str(columns["content_hash"][n] or "") for n in chosen.tolist()]
    return Chosen(
        ids=[ids[n] for n in chosen],
        labels=[labels[n] for n in chosen],
        parents=[columns["parent"][n] for n in chosen],
        groups=connected_groups([patients, hashes]),
        store=np.array([where[n][0] for n in chosen], np.int64),
        index=np.array([where[n][1] for n in chosen], np.int64),
        n_candidates=len(candidates),
        n_patients=len(set(patients) - {""}),
    )


def _blocks(store: LatentStore, wanted: Ints) -> Iterator[tuple[int, CsrRows, Ints]]:
    """(first image, its block's rows, positions in `wanted` of the block's images), for blocks with a wanted image."""
    if not len(wanted):
        return
    for start in range(int(wanted[0]) // _BLOCK_IMAGES * _BLOCK_IMAGES, int(wanted[-1]) + 1, _BLOCK_IMAGES):
        low, high = np.searchsorted(wanted, (start, start + _BLOCK_IMAGES))
        if low < high:
            first, last = int(wanted[low]), int(wanted[high - 1]) + 1
            yield first, store.read_images(first, last), np.arange(low, high)


def read_means(stores: Sequence[LatentStore], chosen: Chosen, progress: Progress, keep: Keep = computed) -> csr_matrix:
    """(n, n_latents) float32: means of the stored latents over the patches of each image. Sums in float64.

    Memory: the means once, 8 bytes for each that is not 0, and a part of the images.
    """
    n_latents, done, n_found = stores[0].spec.n_latents, 0, 0
    most = sum(  # of an image: pages that are not written take no memory
        int(np.minimum(np.diff(store.image_indptr)[chosen.index[chosen.store == number]], n_latents).sum())
        for number, store in enumerate(stores)
    )
    data, indices = np.empty(most, np.float32), np.empty(most, np.int32 if most < 1 << 31 else np.int64)
    indptr = np.zeros(len(chosen.ids) + 1, indices.dtype)
    for number, store in enumerate(stores):
        wanted = chosen.index[chosen.store == number]
        for part in _parts(wanted):

            def compute(part: Ints = part, store: LatentStore = store, done: int = done) -> Arrays:
                rows = []
                for first, read, at in _blocks(store, part):
                    rows.append(_means(read, part[at] - first, store))
                    progress(done + int(at[-1]) + 1, len(chosen.ids), "latents")
                found = vstack(rows, format="csr")
                return {"data": found.data, "indices": found.indices, "indptr": found.indptr.astype(np.int64)}

            kept = keep(f"latents_{number}_{part[0]}", compute)
            ends = n_found + kept["indptr"]
            data[n_found : ends[-1]], indices[n_found : ends[-1]] = kept["data"], kept["indices"]
            indptr[done : done + len(part) + 1] = ends
            n_found, done = int(ends[-1]), done + len(part)
            progress(done, len(chosen.ids), "latents")
    found = csr_matrix((data[:n_found], indices[:n_found], indptr), shape=(len(chosen.ids), n_latents))
    found.sort_indices()
    return found


def _parts(wanted: Ints) -> list[Ints]:
    """The images of a store in parts that are kept together."""
    ends = np.flatnonzero(np.diff(wanted // _PART_IMAGES)) + 1
    return [part for part in np.split(wanted, ends) if len(part)]


def _means(rows: CsrRows, images: Ints, store: LatentStore) -> csr_matrix:
    tokens, layout = store.spec.tokens_per_image, store.layout
    row = np.repeat(np.arange(rows.n_rows), np.diff(rows.indptr))
    is_patch = row % tokens >= layout.first_patch
    shape = (rows.n_rows // tokens, store.spec.n_latents)
    values = rows.values[is_patch].astype(np.float64)
    sums = csr_matrix((values, (row[is_patch] // tokens, rows.indices[is_patch].astype(np.int64))), shape=shape)
    means = (sums[images] / layout.n_patches).astype(np.float32)
    means.eliminate_zeros()
    return csr_matrix(means)


def iter_maps(
    stores: Sequence[LatentStore], chosen: Chosen, latents_of: dict[int, Ints], progress: Progress
) -> Iterator[tuple[int, Ints, npt.NDArray[np.float64]]]:
    """(image, its latents, their maps (side, side, latents)) of every image in `latents_of`, in order."""
    done = 0
    for number, store in enumerate(stores):
        tokens, layout = store.spec.tokens_per_image, store.layout
        mine = np.array([n for n in sorted(latents_of) if chosen.store[n] == number], np.int64)
        for first, rows, at in _blocks(store, chosen.index[mine]):
            matrix = rows.to_scipy(store.spec.n_latents)
            for n in mine[at].tolist():
                start = (int(chosen.index[n]) - first) * tokens
                patches = matrix[start + layout.first_patch : start + tokens][:, latents_of[n]].toarray()
                yield n, latents_of[n], patches.astype(np.float64).reshape(layout.side, layout.side, -1)
            done += len(at)
            progress(done, len(latents_of), "maps")


def open_tokens(places: Sequence[Path | str], stores: Sequence[LatentStore]) -> list[ActivationStore]:
    """The caches that the latents were encoded from.

    Raises
    ------
    SpecMismatch
        If a latent store is of none of them.
    """
    caches = open_caches(places) if places else []
    known = {cache.content_sha256 for cache in caches}
    for store in stores if caches else ():
        if store.spec.cache_sha256 not in known:
            raise SpecMismatch(
                f"the latents {store.root} were encoded from another cache than --cache; give the cache of each of "
                f"--latents, or none"
            )
    return caches


def read_tokens(
    caches: Sequence[ActivationStore],
    stores: Sequence[LatentStore],
    chosen: Chosen,
    progress: Progress,
    keep: Keep = computed,
) -> Float32s:
    """(n, width) float32: mean patch token of each image. Memory: the result, and what is read of 4,096 images."""
    by_hash = {cache.content_sha256: cache for cache in caches}
    found, done = [], 0
    for number, store in enumerate(stores):
        cache = by_hash[store.spec.cache_sha256]
        for part in _parts(chosen.index[chosen.store == number]):

            def compute(part: Ints = part, cache: ActivationStore = cache, done: int = done) -> Arrays:
                means = np.zeros((len(part), cache.spec.width), np.float32)
                for start in range(0, len(part), _BLOCK_IMAGES):
                    tokens = cache.read_images(part[start : start + _BLOCK_IMAGES])
                    some = tokens[:, cache.spec.layout.first_patch :].mean(1, dtype=np.float64)
                    means[start : start + len(some)] = some
                    progress(done + start + len(some), len(chosen.ids), "tokens")
                return {"means": means}

            found.append(keep(f"tokens_{number}_{part[0]}", compute)["means"])
            cache.release()
            done += len(part)
            progress(done, len(chosen.ids), "tokens")
    return np.concatenate(found)


def read_embedding(path: Path, chosen: Chosen) -> Float32s:
    """(n, width) float32 of another image encoder: a Parquet or CSV table with `image_id` and columns of numbers.

    Raises
    ------
    BadInput
        If an image is missing or twice, or a column holds something else than finite numbers.
    """
    table = read_table_file(path)
    names = [name for name in table.column_names if name != "image_id"]
    if "image_id" not in table.column_names or not names:
        raise BadInput(
            f"{path} has columns {listed(table.column_names)}; expected image_id, and one or more columns of numbers"
        )
    ids = [str(name) for name in table["image_id"].to_pylist()]
    place = {name: row for row, name in enumerate(ids)}
    if len(place) < len(ids):
        raise BadInput(f"{path} names an image_id twice; give one row for each image")
    missing = [name for name in chosen.ids if name not in place]
    if missing:
        raise BadInput(
            f"{path} lacks {len(missing):,} of {len(chosen.ids):,} images ({listed(missing)}); give a row for each"
        )
    rows = pa.array([place[name] for name in chosen.ids])
    found = np.empty((len(chosen.ids), len(names)), np.float32)
    for number, name in enumerate(names):
        try:
            values = table[name].take(rows).cast(pa.float64()).to_numpy()
        except (pa.ArrowException, ValueError):
            values = np.array([np.nan])
        if not np.isfinite(values.astype(np.float64)).all():
            raise BadInput(f"{path}: column {name!r} is not all finite numbers; expected an embedding")
        found[:, number] = values
    return found


def csc(means: csr_matrix) -> csc_matrix:
    """The same by latents, rows of each latent rising."""
    found = csc_matrix(means)
    found.sort_indices()
    return found


def some_rows(values: csc_matrix, rows: Ints) -> csc_matrix:
    """(len(rows), n_latents) these rows. Memory: the result, and a number for each row.

    values : (n, n_latents), rows of each latent rising
    rows : rising, each once
    """
    place = np.full(values.shape[0], -1, values.indices.dtype)
    place[rows] = np.arange(len(rows))
    indptr = np.zeros_like(values.indptr)
    _count_rows(values.indptr, values.indices, place, indptr)
    indices, data = np.empty(indptr[-1], values.indices.dtype), np.empty(indptr[-1], values.data.dtype)
    _take_rows(values.indices, values.data, place, indices, data)
    return csc_matrix((data, indices, indptr), shape=(len(rows), values.shape[1]))


@numba.njit(cache=True)
def _count_rows(indptr: Any, indices: Any, place: Any, out: Any) -> None:  # pragma: no cover - compiled
    for latent in range(len(indptr) - 1):
        n = 0
        for at in range(indptr[latent], indptr[latent + 1]):
            n += place[indices[at]] >= 0
        out[latent + 1] = out[latent] + n


@numba.njit(cache=True)
def _take_rows(indices: Any, data: Any, place: Any, out_indices: Any, out_data: Any) -> None:  # pragma: no cover
    n = 0
    for at in range(len(indices)):
        if place[indices[at]] >= 0:
            out_indices[n], out_data[n] = place[indices[at]], data[at]
            n += 1
