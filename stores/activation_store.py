"""The activation cache: the tokens of every image after one transformer block, as float16 chunks to be memory-mapped.

Format "activation cache", version 1: docs/formats.md. This is its reader, for a local path or a URL. On opening it
checks what is cheap: the cache is complete, all chunks exist with the right size, and (locally) the checksum at the end
of each file is the one in the journal. The bytes of a local chunk are compared with it by verify.py only, those of a
URL when the chunk is read. Its settings stand in activation_spec.py; activation_writer.py writes it.
"""

import hashlib
import logging
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.core.chunk_key_encodings import DefaultChunkKeyEncoding

from .activation_spec import (
    ActivationSpec,
    Float16,
    chunk_path,
    chunks_written,
    file_crc,
    read_spec,
    require_same_tokens,
)
from .chunk_cache import OpenMaps, ReadAhead, map_file
from .errors import BadInput, CytoError, DamagedStore
from .files import read_lines
from .info import CacheInfo
from .remote import CheckedObjects, RemoteFolder, reachable, small_files, store_root
from .runlog import read_runs
from .seal import travelling
from .spec import ACTIVATIONS, Header, read_header, require_unchanged
from .tables import column, listed, read_image_table, readable, table_sha256, truncated_images
from .token_stream import TokenStream
from .wording import megabytes, size_on_disk
from .zarr_meta import array_meta, read_array

_log = logging.getLogger(__name__)


class ActivationStore:
    """A complete activation cache, open for reading; `root` is a local path or a URL.

    Pickled as its path or URL; unpickling opens and checks it again. Several threads may read. Memory: what is read. A
    local chunk is a memory map. A chunk of a URL is kept whole, its checksum verified; so are prefetched chunks, which
    take twice their size while they arrive.
    """

    def __init__(self, root: Path | str) -> None:
        """Open the cache and make the cheap checks: complete, layout, and each chunk's presence, size and checksum.

        The checksum at the end of a chunk file is compared with the journal: here for a local cache, for a URL when
        the chunk is fetched. The content is not read.

        Raises
        ------
        StoreNotFound, IncompleteStore, SpecMismatch
            If there is no finished activation cache of a version that this program reads.
        DamagedStore
            If a chunk is missing, has a wrong size, or another checksum than in the journal.
        StoreUnreachable
            If a URL cannot be read, after some retries.
        """
        self.root = store_root(root)
        with small_files(self.root) as folder:
            self.header = read_header(folder, ACTIVATIONS)
            self.spec = read_spec(self.header, folder)
            self.images = read_image_table(folder / "images.parquet")
            if self.images.num_rows != self.spec.n_images:  # before loops over numbers that only the header states
                raise DamagedStore(
                    f"{folder}/images.parquet has {self.images.num_rows:,} rows, "
                    f"the cache holds {self.spec.n_images:,} images"
                )
            if table_sha256(self.images) != (self.header.summary or {}).get("images_sha256"):
                raise DamagedStore(f"{folder}/images.parquet was changed: its hash is not the one in the header")
            crcs = _crcs(folder, self.spec)
            self.content_sha256 = _content_sha256(self.header, folder)
        if not isinstance(self.root, Path):
            self.header = replace(self.header, seal=None)  # of the temporary copy, which is deleted
        self._chunks = _open_chunks(self.root, self.spec, crcs)

    def __reduce__(self) -> tuple[Any, ...]:
        return travelling(self)

    @property
    def identity(self) -> str:
        """SHA-256 of everything that decides the numbers."""
        return self.header.identity

    content_sha256: str
    """SHA-256 of the identity and of every chunk's checksum: equal only if the tokens are equal."""

    def describe(self) -> CacheInfo:
        """Size, settings and runs of the cache, as `cyto cache info` prints them."""
        return cache_info(self.root)

    def line(self, name: Path | str | None = None) -> str:
        """The cache in one line: its size, and what its tokens are; called `name`, or else its root."""
        spec = self.spec
        return (
            f"{name or self.root}: {spec.n_images:,} images x {spec.tokens_per_image} tokens x {spec.width} channels, "
            f"block {spec.block} of {spec.backbone}{'' if spec.trained else ' (UNTRAINED)'}, "
            f"{megabytes(size_on_disk(self.root) if isinstance(self.root, Path) else None)}"
        )

    def unreadable_line(self, name: Path | str | None = None) -> str:
        """`2 of 41,621 images could not be read (a.tif: ...); they are listed in images.parquet`."""
        unreadable = self._named(column(self.images, "error"))
        return (
            f"{len(unreadable):,} of {self.images.num_rows:,} images could not be read ({listed(unreadable)}); "
            f"they are listed in {name or self.root}/images.parquet"
        )

    def truncated_line(self, name: Path | str | None = None) -> str:
        """`2 of 41,621 images are cut off and were taken as far as they go (a.tif: its end is missing); ...`."""
        truncated = self._named(truncated_images(self.images))
        return (
            f"{len(truncated):,} of {self.images.num_rows:,} images are cut off and were taken as far as they go "
            f"({listed(truncated)}); the column truncated of {name or self.root}/images.parquet names them"
        )

    def _named(self, found: Sequence[str | None]) -> list[str]:
        """`a.tif: ...` for each image of which something is found."""
        paths = column(self.images, "path")
        return [f"{path}: {what}" for path, what in zip(paths, found, strict=True) if what is not None]

    def _repr_html_(self) -> str:
        return self.describe()._repr_html_()

    def readable(self) -> npt.NDArray[np.bool_]:
        """(n_images,) bool: False where the image could not be read and the tokens are NaN."""
        return np.array(readable(self.images))

    def read_chunk(self, chunk: int) -> Float16:
        """Chunk `chunk`, read-only: (its images, tokens_per_image, width) float16.

        For a local cache a memory map, which is read on access, without a check of its checksum (`cyto cache verify`
        checks it). For a URL the decoded chunk, its checksum verified.

        Raises
        ------
        DamagedStore
            If it is missing, has a wrong size, another checksum than in the journal, or (URL) fails its checksum.
        """
        if not 0 <= operator.index(chunk) < self.spec.n_chunks:
            raise IndexError(f"chunk {chunk} outside 0..{self.spec.n_chunks - 1}")
        try:
            return self._chunks.get(chunk)
        except DamagedStore:
            require_unchanged(self.header)  # the store may have been replaced
            raise

    def prefetch(self, chunks: Sequence[int]) -> None:
        """Announce the chunks that are read next. For a URL they are fetched in the background; each takes memory."""
        self._chunks.prefetch(chunks)

    def release(self) -> None:
        """Let go of the chunks that are kept for the next reader.

        The pages of a map that were read count as memory of this process as long as the map is open.
        """
        self._chunks.release()

    def begin_rows(self, chunk: int, rows: range) -> Future[Float16]:
        """Begin to read some consecutive images of a chunk; `rows`: their positions inside it.

        The future gives (len(rows), tokens_per_image, width) float16, read-only, and holds the only reference to them.
        For a local cache it is a view of the map, and the system is asked to read it from the disk. For a URL only
        these bytes are fetched, without a check of a checksum unless they are the whole chunk. Cancel futures that are
        not needed.

        Raises
        ------
        IndexError
            Outside of the chunk.
        DamagedStore, StoreUnreachable
            From the future, or at once: as `read_chunk`.
        """
        images = len(self.spec.chunk_rows(chunk)) if 0 <= chunk < self.spec.n_chunks else 0
        if rows.step != 1 or not 0 <= rows.start < rows.stop <= images:
            raise IndexError(f"images {rows.start} to {rows.stop} outside the {images} of chunk {chunk}")
        return self._chunks.begin_rows(chunk, rows)

    def iter_chunks(self, *, first: int = 0, ahead: int = 2) -> Iterator[tuple[range, Float16]]:
        """(image indices, tokens as from `read_chunk`) of every chunk from `first` on, in order.

        ahead : chunks of a URL that are fetched in advance
        """
        for chunk, tokens in self._in_order(range(first, self.spec.n_chunks), ahead=ahead):
            yield self.spec.chunk_rows(chunk), tokens

    def read_images(self, image_indices: npt.ArrayLike) -> Float16:
        """The tokens of chosen images in the given order, (len, tokens_per_image, width) float16, copied.

        An image may be named twice. Raises IndexError outside 0..n_images - 1 (negative indices are not allowed).
        """
        indices = np.asarray(image_indices)
        if indices.ndim != 1 or (indices.size and indices.dtype.kind not in "iu"):
            raise TypeError(f"image_indices must be a list of whole numbers; found {image_indices!r}")
        if indices.size and not 0 <= indices.min() <= indices.max() < self.spec.n_images:
            raise IndexError(f"image index outside 0..{self.spec.n_images - 1}")
        indices = indices.astype(np.int64)
        out = np.empty((len(indices), self.spec.tokens_per_image, self.spec.width), np.float16)
        chunks = indices // self.spec.chunk_images
        for chunk, tokens in self._in_order(np.unique(chunks).tolist()):
            chosen = chunks == chunk
            out[chosen] = tokens[indices[chosen] - chunk * self.spec.chunk_images]
        return out

    def read_rows(self, start: int, stop: int) -> Float16:
        """Images `start` to `stop` - 1, (stop - start, tokens_per_image, width) float16, read-only.

        A view if they lie in one chunk (for a local cache, nothing is read yet), else a copy. Raises IndexError
        unless 0 <= start <= stop <= n_images.
        """
        start, stop, size = operator.index(start), operator.index(stop), self.spec.chunk_images
        if not 0 <= start <= stop <= self.spec.n_images:
            raise IndexError(f"images {start} to {stop} outside 0..{self.spec.n_images}")
        chunks = range(start // size, -(-stop // size)) if start < stop else range(0)
        if len(chunks) == 1:
            return self.read_chunk(chunks[0])[start - chunks[0] * size : stop - chunks[0] * size]
        out = np.empty((stop - start, self.spec.tokens_per_image, self.spec.width), np.float16)
        for chunk, tokens in self._in_order(chunks):
            rows = self.spec.chunk_rows(chunk)
            low, high = max(start, rows.start), min(stop, rows.stop)
            out[low - start : high - start] = tokens[low - rows.start : high - rows.start]
        out.flags.writeable = False
        return out

    def shuffled_tokens(
        self,
        batch_tokens: int,
        *,
        seed: int = 0,
        position: int = 0,
        token_set: str = "all",
        pool_chunks: int = 16,
    ) -> Iterator[Float16]:
        """Endless shuffled batches of the readable images' tokens, (batch_tokens, width) float16, as in training.

        Pools of the size of `pool_chunks` chunks, from segments of many chunks, are read and shuffled. Each token comes
        once per epoch; every epoch has another order. The stream starts at token `position`: epoch e begins at
        e * `TokenStream.tokens_per_epoch`.
        """
        stream = TokenStream([self], token_set=token_set, pool_chunks=pool_chunks, seed=seed)
        return stream.batches(batch_tokens, position=position)

    def _in_order(self, chunks: Sequence[int], *, ahead: int = 2) -> Iterator[tuple[int, Float16]]:
        for at, chunk in enumerate(chunks, start=1):
            self.prefetch(chunks[at : at + ahead])
            yield chunk, self.read_chunk(chunk)


def cache_info(store: Path | str, *, header_only: bool = False) -> CacheInfo:
    """What is in the activation cache at `store`, a local path or the URL of a complete one.

    header_only : leave out groups, patients and unreadable images, for which the cache is opened and checked

    Raises
    ------
    StoreNotFound, SpecMismatch, DamagedStore
        If there is no activation cache that this program reads.
    IncompleteStore, StoreUnreachable
        If a URL is of an unfinished cache, or cannot be read.
    """
    store = store_root(store) if isinstance(store, str) else store
    is_url = isinstance(store, str)
    with small_files(store) as folder:
        header = read_header(folder, ACTIVATIONS, complete=is_url)
        spec = read_spec(header, folder)
        chunks = chunks_written(folder, spec)
        n_bytes = size_on_disk(folder) + (len(chunks) * spec.chunk_bytes if is_url else 0)
        runs = tuple(read_runs(folder))
    is_open = header.complete and not header_only
    cache = ActivationStore(store) if is_open else None
    counts = {name: _counts(cache, name) for name in ("label", "disease", "patient")}
    return CacheInfo(
        store=store,
        header=header,
        n_bytes=n_bytes,
        runs=runs,
        spec=spec,
        n_images_written=sum(len(spec.chunk_rows(chunk)) for chunk in chunks),
        groups={name: counts[name] for name in ("label", "disease") if counts[name]},
        n_patients=len(counts["patient"]),
        unreadable=cache.unreadable_line(store) if cache and (header.summary or {}).get("n_unreadable") else "",
        truncated=cache.truncated_line(store) if cache and (header.summary or {}).get("n_truncated") else "",
    )


def open_caches(roots: Sequence[Path | str] | Path | str) -> list[ActivationStore]:
    """Open caches that are to be used together; of one cache its path or URL will do.

    Raises
    ------
    SpecMismatch
        If they do not hold the same kind of tokens.
    BadInput
        If none is given, or one twice.
    """
    return used_together([ActivationStore(root) for root in one_or_more(roots)])


def one_or_more(places: Sequence[Path | str] | Path | str) -> Sequence[Path | str]:
    """A single path or URL as a list of one; it is not read letter by letter."""
    return [places] if isinstance(places, Path | str) else places


def used_together(stores: list[ActivationStore]) -> list[ActivationStore]:
    """The same stores, checked as `open_caches` does."""
    if not stores:
        raise BadInput("no cache is given; give at least one")
    if len({store.content_sha256 for store in stores}) < len(stores):
        raise BadInput("the same cache is given twice; its tokens would count double")
    precisions = sorted({store.spec.precision for store in stores})
    if len(precisions) > 1:
        _log.warning("the caches were made in different precisions: %s", ", ".join(precisions))
    for store in stores[1:]:
        require_same_tokens(stores[0].spec.same_tokens, store.spec.same_tokens, str(stores[0].root), str(store.root))
    return stores


def check_layout(root: Path | str, spec: ActivationSpec, store: CheckedObjects | None = None) -> zarr.Array[Any]:
    """The array of tokens, after a check of its shape, type, byte order, codecs, chunks and chunk names.

    store : the store that zarr reads from; default: the local path `root`

    Raises
    ------
    DamagedStore
        If one is not as in the format (a memory map would misread the chunks), or there is no array.
    """
    wrong = f"{root}/tokens does not have the layout that its header states; make the cache again"
    try:
        if store is None:
            read_array(Path(root) / "tokens")  # before zarr sees it
        else:
            array_meta(store.small_object("tokens/zarr.json"), f"{root}/tokens/zarr.json")
    except DamagedStore as error:
        raise DamagedStore(f"{wrong} ({error})") from None
    try:
        array = zarr.open_array(store or Path(root), path="tokens", mode="r", zarr_format=3)
        codecs = [codec.to_dict() for codec in array.metadata.codecs]  # type: ignore[union-attr]  # version 3
    except CytoError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:  # what zarr raises for metadata it cannot read
        raise DamagedStore(f"{wrong} ({error})") from None
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    fits = (
        array.shape == (spec.n_images, spec.tokens_per_image, spec.width)
        and array.chunks == (spec.chunk_images, spec.tokens_per_image, spec.width)
        and array.dtype == np.float16
        and codecs[0] == little
        and [codec["name"] for codec in codecs[1:]] == ["crc32c"]
        and array.metadata.chunk_key_encoding == DefaultChunkKeyEncoding(separator="/")  # type: ignore[union-attr]  # the same
    )
    if not fits:
        raise DamagedStore(wrong)
    return array


def _counts(cache: ActivationStore | None, name: str) -> dict[str, int]:
    return Counter(value for value in column(cache.images, name) if value is not None) if cache else Counter()


def _crcs(root: Path, spec: ActivationSpec) -> list[str]:
    """The checksum (hex) of every chunk, by the journal of a finished cache."""
    found = {str(record.get("chunk")): str(record.get("crc32c")) for record in read_lines(root / "journal.jsonl")}
    crcs = [found.get(str(chunk), "") for chunk in range(spec.n_chunks)]
    if len(found) != spec.n_chunks or not all(re.fullmatch("[0-9a-f]{8}", crc) for crc in crcs):
        raise DamagedStore(
            f"{root}/journal.jsonl names {len(found):,} chunks, expected {spec.n_chunks:,} with a checksum each. "
            f"cyto cache verify says more"
        )
    return crcs


def _content_sha256(header: Header, root: Path) -> str:
    return hashlib.sha256(header.identity.encode() + (root / "journal.jsonl").read_bytes()).hexdigest()


def _open_chunks(root: Path | str, spec: ActivationSpec, crcs: list[str]) -> OpenMaps | ReadAhead:
    return _local_chunks(root, spec, crcs) if isinstance(root, Path) else _remote_chunks(root, spec, crcs)


def _local_chunks(root: Path, spec: ActivationSpec, crcs: list[str]) -> OpenMaps:
    check_layout(root, spec)
    for chunk in range(spec.n_chunks):
        _require_journalled(root, spec, crcs, chunk)
    return OpenMaps(partial(_map_chunk, root, spec, crcs), partial(chunk_path, root))


def _map_chunk(root: Path, spec: ActivationSpec, crcs: list[str], chunk: int) -> Float16:
    _require_journalled(root, spec, crcs, chunk)
    images = len(spec.chunk_rows(chunk))  # the last chunk ends with padding, which is not mapped
    mapped = map_file(chunk_path(root, chunk), images * spec.image_bytes)
    return mapped.view("<f2").reshape(images, spec.tokens_per_image, spec.width)


def _require_journalled(root: Path, spec: ActivationSpec, crcs: list[str], chunk: int) -> None:
    """Raise DamagedStore unless the file of a chunk is as large as it must be and ends with the journal's checksum."""
    path = chunk_path(root, chunk)
    if file_crc(path, spec.chunk_bytes) != crcs[chunk]:
        raise DamagedStore(
            f"{path} is not the chunk that the journal names: another one took its place. "
            f"cyto cache verify lists every bad chunk"
        )


def _remote_chunks(url: str, spec: ActivationSpec, crcs: list[str]) -> ReadAhead:
    names = [chunk_path(Path(), chunk).as_posix() for chunk in range(spec.n_chunks)]
    ends = [bytes.fromhex(crc)[::-1] for crc in crcs]  # little-endian in the file
    promised: dict[str, tuple[int, bytes | int]] = {
        name: (spec.chunk_bytes, end) for name, end in zip(names, ends, strict=True)
    }
    objects = CheckedObjects(RemoteFolder(url), promised)
    with reachable(url):
        array = check_layout(url, spec, objects)
        objects.check_sizes(prefix="tokens/c/")
    fetch = partial(_fetch_chunk, array, spec, url)
    return ReadAhead(fetch, partial(_fetch_rows, fetch, objects, spec, names))


def _fetch_chunk(array: zarr.Array[Any], spec: ActivationSpec, url: str, chunk: int) -> Float16:
    rows = spec.chunk_rows(chunk)
    try:
        with reachable(url):
            tokens = np.asarray(array[rows.start : rows.stop])
    except CytoError:
        raise
    except ValueError as error:  # zarr's CRC32C codec
        raise DamagedStore(
            f"chunk {chunk} of {url} (images {rows.start:,} to {rows.stop - 1:,}) fails its checksum ({error}). "
            f"Copy the cache there again"
        ) from None
    tokens.flags.writeable = False
    return tokens


def _fetch_rows(
    fetch: Callable[[int], Float16],
    objects: CheckedObjects,
    spec: ActivationSpec,
    names: list[str],
    chunk: int,
    rows: range,
) -> Float16:
    if len(rows) == len(spec.chunk_rows(chunk)):
        return fetch(chunk)
    content = objects.get_range(names[chunk], rows.start * spec.image_bytes, rows.stop * spec.image_bytes)
    tokens: Float16 = np.frombuffer(memoryview(content), "<f2")
    tokens = tokens.reshape(len(rows), spec.tokens_per_image, spec.width)
    if tokens.ctypes.data % 8:  # `gather_rows` needs aligned tokens; rare
        tokens = tokens.copy()
    tokens.flags.writeable = False
    return tokens
