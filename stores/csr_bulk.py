"""Sparse rows in bulk: read a range of rows chunk by chunk, or let many processes fill one matrix.

Reading gives whole chunks as they are decoded, so memory is one or two chunks for any range; the caller checks the
entries. Filling: each process writes its own chunks, in any order; then the lengths of the arrays, indptr and `shape`
are written, which makes the rows visible.
"""

import os
import shutil
import uuid
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import google_crc32c
import numpy as np
import numpy.typing as npt
import zarr
from numcodecs import Blosc, Zstd
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.storage import MemoryStore

from .checksum import CRC_BYTES
from .csr import CsrReader
from .errors import DamagedStore, StoreUnreachable
from .files import PARTIAL_SUFFIX, named, write_files
from .remote import CheckedObjects

CHUNK_ENTRIES = 1 << 20  # per chunk of a matrix that is filled here
_ANNOUNCED_AHEAD = 4  # chunks, some 2 MB each
# dtype, fill value, and the fastest shuffle with a small size (docs/log.md)
_LAYOUT: dict[str, tuple[str, float, Literal["shuffle", "bitshuffle"]]] = {
    "indices": ("int32", 0, "shuffle"),
    "data": ("float32", float("nan"), "bitshuffle"),
}


class EntryReader:
    """Reads a range of rows of one CSR group chunk by chunk; each chunk is decoded once, into the same buffer."""

    def __init__(
        self, path: Path | str, *, shape: tuple[int, int], start: int, stop: int, objects: CheckedObjects | None = None
    ) -> None:
        """Open the group at `path` for rows start..stop, and read their row starts; `objects` as in `CsrReader`.

        Raises
        ------
        DamagedStore
            If the group is damaged, or the row starts decrease or are out of range.
        StoreUnreachable
            If a URL cannot be read, here or later.
        """
        self.path = path
        self.place = f"rows {start:,} to {stop - 1:,} of {path}"
        self._group = CsrReader(path, shape=shape, objects=objects)
        self._arrays = self._group._arrays
        pieces = [values.copy() for _, values in self._read("indptr", start, stop + 1)]
        self.row_starts: npt.NDArray[np.int64] = np.concatenate(pieces)
        nnz = self._arrays["data"].shape[0]
        if self.row_starts.min() < 0 or (np.diff(self.row_starts) < 0).any() or self.row_starts[-1] > nnz:
            raise DamagedStore(f"{self.place}: indptr is not monotone or leaves the data")
        if self._arrays["indices"].chunks != self._arrays["data"].chunks:
            raise DamagedStore(f"{path}: indices and data have chunks of different sizes")

    def entries(self) -> Iterator[tuple[int, npt.NDArray[Any], npt.NDArray[np.float32]]]:
        """The rows' entries: (number of the first entry, indices, values), unchecked, valid until the next iteration.

        Raises
        ------
        DamagedStore
            If a chunk is lost or damaged.
        """
        first, last = int(self.row_starts[0]), int(self.row_starts[-1])
        both = zip(self._read("indices", first, last), self._read("data", first, last), strict=True)
        for (at, indices), (_, values) in both:
            yield at, indices, values

    def _read(self, name: str, first: int, last: int) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        size = self._arrays[name].chunks[0]
        self._group._check_chunk_headers(name, first, last)
        numbers = range(first // size, -(-last // size)) if first < last else range(0)
        is_shared = name == "indptr" and self._group.objects is None
        read = partial(_row_starts, self._group) if is_shared else _chunk_reader(self._group, name, numbers)
        for number in numbers:
            at = number * size
            low, high = max(first, at), min(last, at + size)
            try:
                yield low, read(number)[low - at : high - at]
            except StoreUnreachable:
                raise
            except (ValueError, RuntimeError, OSError) as error:
                raise DamagedStore(f"{self.place} cannot be read: {error}") from None


def _row_starts(group: CsrReader, number: int) -> npt.NDArray[Any]:
    """A chunk of a local indptr, cached: neighbouring partitions share one, and decoding takes 10 ms (others: 1)."""
    state = _chunk_file(Path(group.path) / "indptr", number).stat()
    return _row_starts_as_of(Path(group.path), group.shape, number, (state.st_ino, state.st_mtime_ns, state.st_size))


@lru_cache(maxsize=2)  # 8 MiB each
def _row_starts_as_of(path: Path, shape: tuple[int, int], number: int, state: tuple[int, ...]) -> npt.NDArray[Any]:
    return _chunk_reader(CsrReader(path, shape=shape), "indptr", range(number, number + 1))(number)


def _chunk_reader(group: CsrReader, name: str, numbers: range) -> Callable[[int], npt.NDArray[Any]]:
    """A function: number of a chunk -> its values, decoded into one reused buffer if the codec is known.

    numbers : the chunks that will be read, in order

    For a chunk of 2^20 entries, zarr takes twice the time of the decoding (docs/log.md).
    """
    array = group._arrays[name]
    size = array.chunks[0]
    codecs = [codec.to_dict() for codec in array.metadata.codecs]  # type: ignore[union-attr]  # version 3
    names = [codec["name"] for codec in codecs]
    is_plain = names in (
        ["bytes", "zstd"],
        ["bytes", "blosc"],
        ["bytes", "zstd", "crc32c"],
        ["bytes", "blosc", "crc32c"],
    )
    if not is_plain or codecs[0].get("configuration") != {"endian": "little"} or array.filters:
        return lambda number: _through_zarr(group, name, number)
    fetch = _FileReader(Path(group.path) / name, numbers) if group.objects is None else _ReadAhead(group, name, numbers)
    buffer = np.empty(size, array.dtype)
    last = buffer[-1:].view(np.uint8)
    decode = Zstd().decode if names[1] == "zstd" else Blosc().decode

    def read(number: int) -> npt.NDArray[Any]:
        raw = fetch(number)
        if names[-1] == "crc32c":
            raw, stated = raw[:-CRC_BYTES], bytes(raw[-CRC_BYTES:])
            if google_crc32c.extend(0, raw) != int.from_bytes(stated, "little"):
                raise ValueError(f"the checksum of {group.path}/{name}/c/{number} does not fit")
        last.fill(0xFF)
        decode(raw, out=buffer)
        if (last == 0xFF).all():  # the chunk may be shorter: then the rest shall be NaN, or an index out of range
            buffer.view(np.uint8).fill(0xFF)
            decode(raw, out=buffer)
        return buffer

    return read


class _FileReader:
    """Reads chunk files into one reused buffer, since page faults of new memory cost more than the copy.

    The system is asked to read some chunks ahead, so that the disk works during decoding.
    """

    def __init__(self, folder: Path, numbers: range) -> None:
        self._folder, self._buffer = folder, np.empty(0, np.uint8)
        self._announced, self._end = numbers.start, numbers.stop

    def __call__(self, number: int) -> npt.NDArray[np.uint8]:
        while self._announced < min(number + 1 + _ANNOUNCED_AHEAD, self._end):
            _will_read(_chunk_file(self._folder, self._announced))
            self._announced += 1
        with _chunk_file(self._folder, number).open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size > len(self._buffer):
                self._buffer = np.empty(size + size // 4, np.uint8)
            raw = self._buffer[:size]
            return raw[: file.readinto(raw.data)]


def _will_read(path: Path) -> None:
    """Ask the system to read a file, without waiting; if it is missing, the later read raises the error."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError), path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


class _ReadAhead:
    """Fetches the next chunk of a URL while the one before is processed: one compressed chunk at a time."""

    def __init__(self, group: CsrReader, name: str, numbers: range) -> None:
        self._group, self._name, self._numbers = group, name, numbers
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="fetch")
        self._next: Future[npt.NDArray[np.uint8]] | None = None
        weakref.finalize(self, self._threads.shutdown, wait=False, cancel_futures=True)

    def __call__(self, number: int) -> npt.NDArray[np.uint8]:
        raw = self._next.result() if self._next else self._fetch(number)
        if number + 1 in self._numbers:
            self._next = self._threads.submit(self._fetch, number + 1)
        return raw

    def _fetch(self, number: int) -> npt.NDArray[np.uint8]:
        assert self._group.objects is not None
        return np.frombuffer(self._group.objects.read(f"{self._group.name}/{self._name}/c/{number}"), np.uint8)


def _through_zarr(group: CsrReader, name: str, number: int) -> npt.NDArray[Any]:
    file = _chunk_file(Path(group.path) / name, number)
    if group.objects is None and not file.is_file():  # zarr would read it as its fill value
        raise FileNotFoundError(f"{file} is missing")
    array = group._arrays[name]
    size = array.chunks[0]
    with group._reachable():
        return np.asarray(array[number * size : (number + 1) * size])


def _chunk_file(path: Path, number: int) -> Path:
    return path / "c" / str(number)


def begin_matrix(path: Path) -> None:
    """The folders of a CSR group whose entries may come in any order; it is no group before `finish_matrices`."""
    path.mkdir()
    for name in _LAYOUT:
        (path / name / "c").mkdir(parents=True)


def write_entries(path: Path, name: str, start: int, values: npt.NDArray[Any]) -> None:
    """Write entries of `indices` or `data` from `start`, where a chunk begins, to the end of a chunk or of all."""
    dtype, fill, shuffle = _LAYOUT[name]
    codec = Blosc(cname="lz4", clevel=5, shuffle=Blosc.BITSHUFFLE if shuffle == "bitshuffle" else Blosc.SHUFFLE)
    for at in range(0, len(values), CHUNK_ENTRIES):
        chunk = np.ascontiguousarray(values[at : at + CHUNK_ENTRIES], dtype)
        if len(chunk) < CHUNK_ENTRIES:
            chunk = np.concatenate([chunk, np.full(CHUNK_ENTRIES - len(chunk), fill, dtype)])
        raw = codec.encode(chunk)
        target = _chunk_file(path / name, (start + at) // CHUNK_ENTRIES)
        partial = target.with_name(f"{target.name}.{uuid.uuid4().hex}{PARTIAL_SUFFIX}")
        with named(target), partial.open("xb") as file:
            file.write(raw)
            file.write(google_crc32c.value(raw).to_bytes(CRC_BYTES, "little"))
            file.flush()
            _begin_to_sync(file.fileno())
        partial.replace(target)


def share_entries(source: Path, target: Path, name: str, start: int, stop: int) -> None:
    """Give `target` the chunk files of `source` for entries start..stop, as hard links if possible, else as copies."""
    for chunk in range(start // CHUNK_ENTRIES, -(-stop // CHUNK_ENTRIES)):
        given, wanted = (_chunk_file(matrix / name, chunk) for matrix in (source, target))
        partial = wanted.with_name(f"{wanted.name}.{uuid.uuid4().hex}{PARTIAL_SUFFIX}")
        try:
            try:
                partial.hardlink_to(given)
            except OSError:  # a file system without hard links
                shutil.copyfile(given, partial)
            partial.replace(wanted)
        finally:
            partial.unlink(missing_ok=True)  # a rename onto a link to the same file leaves both


def _begin_to_sync(descriptor: int) -> None:
    """Begin to write a file to the disk, without waiting, so that the final sync takes little time."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def finish_matrices(paths: Sequence[Path], row_lengths: npt.NDArray[Any], n_columns: int) -> None:
    """Where entries are written or still to come: write what makes them a CSR group in AnnData's layout.

    int32 indices, float32 data, row starts and shape, the same in all `paths`. By way of memory, as `write_tables`.
    """
    indptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(row_lengths, dtype=np.int64)])
    files: dict[str, Any] = {}
    group = zarr.open_group(MemoryStore(files), mode="w", zarr_format=3)
    group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0"})
    for name, (dtype, fill, shuffle) in _LAYOUT.items():
        codecs = [BloscCodec(cname="lz4", clevel=5, shuffle=shuffle), Crc32cCodec()]
        shape = (int(indptr[-1]),)
        group.create_array(name, shape=shape, dtype=dtype, chunks=(CHUNK_ENTRIES,), compressors=codecs, fill_value=fill)
    array = group.create_array(
        "indptr",
        shape=indptr.shape,
        # scipy works without a copy only if indptr and indices have one type, so int64 only if needed
        dtype="int32" if indptr[-1] <= np.iinfo(np.int32).max else "int64",
        chunks=(CHUNK_ENTRIES,),
        compressors=[BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle"), Crc32cCodec()],
        fill_value=-1,
    )
    array[:] = indptr  # no chunk has fill values only, so zarr writes all
    group.attrs["shape"] = [len(row_lengths), n_columns]
    raw = {name: content.to_bytes() for name, content in files.items()}
    for path in paths:
        write_files(path, raw)
