"""Sparse rows in Zarr, in AnnData's `csr_matrix` 0.1.0 layout: append, commit, read a range of rows.

Written in this order: data and indices, indptr, the attribute `shape`, so rows become visible when complete. Rows have
strictly increasing indices and no explicit zeros, so reading rows detects a lost or damaged chunk
(docs/reference/storage.md 2.2). Zarr reads a missing chunk as its fill value, which no valid row contains. The
exception is indices, whose fill value is column 0 (an index out of range would crash scipy): there, the existence of
the files is checked.
"""

import operator
import os
import weakref
import zlib
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import google_crc32c
import numpy as np
import numpy.typing as npt
import zarr
from numcodecs import blosc, zstd
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

from stores.machine import n_cores

from .errors import CytoError, DamagedStore
from .files import named, sync_folder, write_atomic
from .remote import CheckedObjects, reachable
from .zarr_meta import ArrayMeta, array_meta, check_chunk_header, group_attributes, read_array, read_group

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

CHUNK_ENTRIES = 1 << 20  # per chunk of all three arrays
_NAMES = ("indices", "data", "indptr")
_INDEX_KINDS = ("uint16", "uint32", "int32")
_POINTER_KINDS = ("int64", "int32")  # types of indptr; barcodes use int32 if it is large enough
_FILLS = {"indices": 0, "data": float("nan"), "indptr": -1}
_MOST_MISSING = 1000  # missing chunk files that are listed
_BEGIN_AGAIN = ", so the job cannot go on from it; begin again with --overwrite"


@dataclass(frozen=True)
class CsrRows:
    """A range of rows in memory: `indices[indptr[r]:indptr[r + 1]]` are the columns of row r, strictly increasing."""

    indices: npt.NDArray[Any]  # (nnz,) unsigned or int32
    values: npt.NDArray[np.float32]  # (nnz,) finite, never 0
    indptr: npt.NDArray[np.int64]  # (n_rows + 1,) from 0

    @property
    def n_rows(self) -> int:
        """Number of rows, empty ones included."""
        return len(self.indptr) - 1

    def to_scipy(self, n_columns: int) -> "csr_matrix":
        """The rows as a scipy.sparse matrix (n_rows, n_columns), which shares their memory where its types allow."""
        from scipy.sparse import csr_matrix

        return csr_matrix((self.values, self.indices, self.indptr), shape=(self.n_rows, n_columns))


def index_dtype(n_columns: int) -> str:
    """The smallest unsigned type that holds every column number."""
    return "uint16" if n_columns <= 1 << 16 else "uint32"


@dataclass(frozen=True, kw_only=True)
class CsrCommit:
    """The state after a commit, which is recorded in the journal; all that is needed to continue from there."""

    n_rows: int
    nnz: int
    # array -> (size in bytes, CRC-32) of each chunk file filled since the previous commit
    chunks: dict[str, list[tuple[int, str]]]
    tail: str | None  # CRC-32 of the file with entries that do not fill a chunk; None: the rows are finished

    def to_json(self) -> dict[str, Any]:
        """The commit as plain JSON values."""
        return {**vars(self), "chunks": {name: [list(file) for file in files] for name, files in self.chunks.items()}}

    @classmethod
    def from_json(cls, records: Sequence[dict[str, Any]]) -> Self:
        """All commits of a journal, joined into one.

        Raises
        ------
        DamagedStore
            If a record is invalid, or records do not follow each other.
        """
        chunks: dict[str, list[tuple[int, str]]] = {name: [] for name in _NAMES}
        n_rows = nnz = 0
        try:
            for record in records:
                if not n_rows <= record["n_rows"] or not nnz <= record["nnz"]:
                    raise ValueError("counts fall")
                n_rows, nnz = int(record["n_rows"]), int(record["nnz"])
                for name in _NAMES:
                    chunks[name] += [(int(size), str(crc)) for size, crc in record["chunks"][name]]
            return cls(n_rows=n_rows, nnz=nnz, chunks=chunks, tail=records[-1]["tail"])
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedStore(f"the journal does not name what was written ({error!r})") from None


class CsrWriter:
    """Appends rows to one CSR group. Full chunks are compressed and written in threads, each once.

    Memory: the entries of one unfinished chunk per array, and of two chunks per core that are being written.
    """

    def __init__(self, path: Path, *, n_columns: int, indices: str, at: CsrCommit | None = None) -> None:
        """Create the group, or continue it after the commit `at` (all commits joined, `CsrCommit.from_json`).

        Raises
        ------
        DamagedStore
            If what was committed is not there any more.
        """
        self.path, self.n_columns, self.is_finished = path, n_columns, at is not None and at.tail is None
        self._buffers: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in _NAMES}
        self._last_tail: Path | None = None
        if at is None:
            self._arrays = _create(path, indices)
            self._buffers["indptr"].append(np.zeros(1, np.int64))
            self._n_sent = dict.fromkeys(_NAMES, 0)  # chunks
            self.n_rows = self.nnz = 0
        else:
            self._arrays = _open_to_continue(path, at)
            self._n_sent = {name: len(files) for name, files in at.chunks.items()}
            self.n_rows, self.nnz = at.n_rows, at.nnz
            if not self.is_finished:
                self._read_tail(at)
        self._size = self._arrays["data"].chunks[0]
        self._threads = ThreadPoolExecutor(n_cores(), thread_name_prefix="chunk")
        # a writer that is dropped must not go on writing while the next one does
        self.close = weakref.finalize(self, self._threads.shutdown, wait=True, cancel_futures=True)
        self._pending: deque[tuple[str, Future[tuple[int, str]]]] = deque()
        self._written: dict[str, list[tuple[int, str]]] = {name: [] for name in _NAMES}
        self._unsynced: list[Path] = []

    def append(self, indices: npt.NDArray[Any], values: npt.NDArray[np.float32], row_lengths: npt.NDArray[Any]) -> None:
        """Append `len(row_lengths)` rows. The arrays are kept until they are written: do not change them.

        The caller guarantees strictly increasing indices in each row, no zeros, and finite values.
        """
        assert len(indices) == len(values) == int(row_lengths.sum())
        assert not self.is_finished
        self._buffers["indices"].append(indices.astype(self._arrays["indices"].dtype, copy=False))
        self._buffers["data"].append(values.astype(np.float32, copy=False))
        self._buffers["indptr"].append(self.nnz + np.cumsum(row_lengths, dtype=np.int64))
        self.n_rows += len(row_lengths)
        self.nnz += len(indices)
        for name in _NAMES:
            if sum(map(len, self._buffers[name])) >= self._size:
                self._send_whole_chunks(name)

    def commit(self) -> CsrCommit:
        """Make all appended rows durable. Entries that do not fill a chunk go, uncompressed, to a separate file."""
        tails = [self._tail(name).tobytes() for name in _NAMES]
        path = self.path / f"tail-{self.n_rows}"
        write_atomic(path, *tails)
        for older in tail_files(self.path):
            if older not in (path, self._last_tail):  # the last record still names the last one
                older.unlink()
        self._last_tail = path
        return self._commit(tail=crc32(b"".join(tails)))

    def finish(self) -> CsrCommit:
        """Write the short last chunks, then the exact lengths of the arrays, then the shape, all durable. Repeatable.

        The tail files (`tail_files`) stay until this last commit is recorded.
        """
        if not self.is_finished:
            for name in _NAMES:
                if len(tail := self._tail(name)):
                    self._send(name, tail)
                self._buffers[name] = []
        commit = self._commit(tail=None)
        self.close()
        for name, length in (("data", self.nnz), ("indices", self.nnz), ("indptr", self.n_rows + 1)):
            self._arrays[name].resize((length,))
            _sync_file(self.path / name / "zarr.json")
        group = zarr.open_group(self.path, mode="r+")
        group.attrs["shape"] = [self.n_rows, self.n_columns]
        _sync_file(self.path / "zarr.json")
        self.is_finished = True
        return commit

    def _read_tail(self, at: CsrCommit) -> None:
        """Read the tail file of a commit into the buffers."""
        self._last_tail = self.path / f"tail-{at.n_rows}"
        try:
            raw = self._last_tail.read_bytes()
        except OSError:
            raw = b""
        size, start = self._arrays["data"].chunks[0], 0
        ends = {"indices": at.nnz, "data": at.nnz, "indptr": at.n_rows + 1}
        for name in _NAMES:
            kind = self._arrays[name].dtype
            stop = start + (ends[name] - self._n_sent[name] * size) * kind.itemsize
            part = raw[start : max(start, stop)]
            if len(part) == stop - start:
                self._buffers[name].append(np.frombuffer(part, kind))
            start = stop
        if start != len(raw) or crc32(raw) != at.tail:
            raise DamagedStore(f"{self._last_tail} is missing or damaged{_BEGIN_AGAIN}")

    def _tail(self, name: str) -> npt.NDArray[Any]:
        """The entries that do not fill a chunk yet."""
        parts = self._buffers[name] or [np.empty(0, self._arrays[name].dtype)]
        self._buffers[name] = [np.concatenate(parts) if len(parts) > 1 else parts[0]]
        return self._buffers[name][0]

    def _send_whole_chunks(self, name: str) -> None:
        values = self._tail(name)
        whole = len(values) - len(values) % self._size
        for start in range(0, whole, self._size):
            self._send(name, values[start : start + self._size])
        self._buffers[name] = [values[whole:].copy()]  # a view would keep all of it in memory

    def _send(self, name: str, values: npt.NDArray[Any]) -> None:
        """Give one chunk to a thread; wait if too many are being written."""
        path = self.path / name / "c" / str(self._n_sent[name])
        self._n_sent[name] += 1
        self._unsynced.append(path)
        self._pending.append((name, self._threads.submit(_write_chunk, path, name, values, self._size)))
        self._collect(2 * n_cores())

    def _collect(self, n_left: int) -> None:
        while len(self._pending) > n_left:
            name, chunk = self._pending[0]
            self._written[name].append(chunk.result())
            self._pending.popleft()  # only now: a chunk that was not written must make every later commit fail

    def _commit(self, *, tail: str | None) -> CsrCommit:
        self._collect(0)
        for path in self._unsynced:
            _sync_file(path)
        for folder in dict.fromkeys(path.parent for path in self._unsynced):
            for each in (folder, folder.parent):
                sync_folder(each)
        self._unsynced = []
        chunks, self._written = self._written, {name: [] for name in _NAMES}
        return CsrCommit(n_rows=self.n_rows, nnz=self.nnz, chunks=chunks, tail=tail)


class CsrReader:
    """Reads ranges of rows of one CSR group. Memory: the requested rows, and their chunks."""

    def __init__(self, path: Path | str, *, shape: tuple[int, int], objects: CheckedObjects | None = None) -> None:
        """Open the group; `shape` is the one that its store states.

        objects : if `path` is a URL, the objects at the URL of the store; the group is the last name of `path`

        Raises
        ------
        DamagedStore
            If arrays or attributes are missing or disagree with `shape` or with each other.
        StoreUnreachable
            If a URL cannot be read, here or later.
        """
        self.path, self.shape, self.objects = path, shape, objects
        self.name = str(path).rpartition("/")[2]
        try:
            with self._reachable():
                try:
                    attributes, self._metas = self._read_layout()
                except DamagedStore as error:
                    raise DamagedStore(f"{path} is not a sparse matrix ({error})") from None
                self._arrays: dict[str, zarr.Array[Any]] = {
                    name: zarr.open_array(objects, path=f"{self.name}/{name}", mode="r", zarr_format=3)
                    if objects
                    else zarr.open_array(Path(path) / name, mode="r", zarr_format=3)
                    for name in _NAMES
                }
        except CytoError:
            raise
        except (FileNotFoundError, KeyError, ValueError) as error:
            raise DamagedStore(f"{path} is not a sparse matrix ({error})") from None
        if attributes.get("shape") != list(shape):
            raise DamagedStore(f"{path} states shape {attributes.get('shape')}, expected {list(shape)}")
        lengths = {name: array.shape[0] for name, array in self._arrays.items()}
        if lengths["indptr"] != shape[0] + 1 or lengths["indices"] != lengths["data"]:
            raise DamagedStore(f"{path}: lengths disagree: {lengths}, expected {shape[0] + 1} in indptr")
        kinds = {name: str(array.dtype) for name, array in self._arrays.items()}
        if kinds["indices"] not in _INDEX_KINDS or kinds["data"] != "float32" or kinds["indptr"] not in _POINTER_KINDS:
            raise DamagedStore(f"{path}: types are {kinds}, expected float32 data and int64 (or int32) indptr")
        self.nnz = lengths["data"]

    def _read_layout(self) -> tuple[dict[str, Any], dict[str, ArrayMeta]]:
        """The group's attributes and the arrays' layouts, checked before zarr allocates memory for them."""
        if self.objects is None:
            folders = {name: Path(self.path) / name for name in _NAMES}
            attributes, metas = read_group(Path(self.path)), {name: read_array(folders[name]) for name in _NAMES}
        else:
            texts = {name: self.objects.small_object(f"{name}/zarr.json") for name in self._remote_names()}
            attributes = group_attributes(texts.pop(self.name), self.path)
            metas = {name.rpartition("/")[2]: array_meta(text, f"{self.path}/{name}") for name, text in texts.items()}
        for name, meta in metas.items():
            if len(meta.shape) != 1:
                raise DamagedStore(f"{self.path}/{name} has shape {meta.shape}, expected one dimension")
        return attributes, metas

    def _remote_names(self) -> list[str]:
        return [self.name, *(f"{self.name}/{name}" for name in _NAMES)]

    def missing_chunks(self) -> list[Path]:
        """Chunk files of a local group that are missing or empty: the first thousand."""
        missing: list[Path] = []
        for name, array in self._arrays.items():
            # one listing of the folder, instead of a look at each file
            there = _files_with_content(Path(self.path) / name / "c")
            size, folder = array.chunks[0], Path(self.path) / name / "c"
            for chunk in range(-(-array.shape[0] // size)):  # a false length may be huge
                if len(missing) == _MOST_MISSING:
                    break
                if str(chunk) not in there:
                    missing.append(folder / str(chunk))
        return missing

    def chunk_counts(self) -> dict[str, int]:
        """Array -> number of its chunk files."""
        return {name: -(-array.shape[0] // array.chunks[0]) for name, array in self._arrays.items()}

    def chunk_entries(self, name: str, chunk: int) -> range:
        """The entries of an array that a chunk holds."""
        array = self._arrays[name]
        return range(chunk * array.chunks[0], min((chunk + 1) * array.chunks[0], array.shape[0]))

    def chunks_of(self, entries: range, rows: range) -> list[tuple[str, int]]:
        """(array, chunk) of every file that `read_rows` needs for some rows, whose nonzeros are `entries`."""
        needed = {"indices": entries, "data": entries, "indptr": range(rows.start, rows.stop + 1)}
        return [
            (name, int(path.name))
            for name, some in needed.items()
            for path in self._chunk_files(name, some.start, some.stop)
        ]

    def row_starts(self, start: int, stop: int, step: int = 1) -> npt.NDArray[np.int64]:
        """`indptr[start:stop:step]`, read in pieces, so that a long indptr is never whole in memory."""
        piece = CHUNK_ENTRIES * step // np.gcd(CHUNK_ENTRIES, step)
        self._check_chunk_headers("indptr", start, stop)
        with self._reachable():
            parts = [
                np.asarray(self._arrays["indptr"][at : min(at + piece, stop)], np.int64)[::step]
                for at in range(start, stop, piece)
            ]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def read_rows(self, start: int, stop: int) -> CsrRows:
        """Rows start..stop, checked: indptr monotone, indices in range and strictly increasing, values finite.

        Raises
        ------
        DamagedStore
            If a chunk is damaged or missing, or the rows break an invariant; wrong rows are never returned.
        IndexError
            Unless 0 <= start <= stop <= the number of rows.
        """
        start, stop = operator.index(start), operator.index(stop)
        if not 0 <= start <= stop <= self.shape[0]:
            raise IndexError(f"rows {start:,} to {stop:,} outside 0..{self.shape[0]:,}")
        place = f"rows {start:,} to {stop - 1:,} of {self.path}"
        try:
            self._check_chunk_headers("indptr", start, stop + 1)
            with self._reachable():
                indptr = np.asarray(self._arrays["indptr"][start : stop + 1], np.int64)
                first, last = int(indptr[0]), int(indptr[-1])
                if indptr.min() < 0 or (np.diff(indptr) < 0).any() or last > self.nnz:
                    raise DamagedStore(f"{place}: indptr is not monotone or leaves the data")
                self._check_chunk_headers("indices", first, last)
                self._check_chunk_headers("data", first, last)
                indices = np.asarray(self._arrays["indices"][first:last])
                values = np.asarray(self._arrays["data"][first:last])
        except CytoError:
            raise
        except (ValueError, RuntimeError, OSError) as error:
            raise DamagedStore(f"{place} cannot be read: {error}") from None
        rows = CsrRows(indices, values, indptr - first)
        _check_rows(rows, self.shape[1], place)
        return rows

    def _check_chunk_headers(self, name: str, start: int, stop: int) -> None:
        """For a local group, check that the chunk files of these entries exist and decode to the size of a chunk.

        Zarr would read a missing one as its fill value. For a URL, `CheckedObjects` raises an error for it.
        """
        if self.objects is None:
            for path in self._chunk_files(name, start, stop):
                check_chunk_header(path, self._metas[name])

    def _chunk_files(self, name: str, start: int, stop: int) -> list[Path]:
        """The files that hold entries start..stop of an array."""
        size = self._arrays[name].chunks[0]
        return [Path(self.path) / name / "c" / str(chunk) for chunk in range(start // size, -(-stop // size))]

    def _reachable(self) -> AbstractContextManager[None]:
        return nullcontext() if self.objects is None else reachable(self.objects.url)


def _files_with_content(folder: Path) -> set[str]:
    """Names of the files in a folder that are not empty; none if there is no folder."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file() and entry.stat().st_size > 0}
    except (FileNotFoundError, NotADirectoryError):
        return set()


def _check_rows(rows: CsrRows, n_columns: int, place: str) -> None:
    if not np.isfinite(rows.values).all() or (rows.values == 0).any():
        raise DamagedStore(f"{place}: a value is zero, NaN or infinite; a chunk of data is lost or damaged")
    if not len(rows.indices):
        return
    starts = np.zeros(len(rows.indices) + 1, bool)
    starts[rows.indptr] = True  # between two rows, the index may decrease
    rising = rows.indices[1:] > rows.indices[:-1]
    if int(rows.indices.max()) >= n_columns or not (rising | starts[1:-1]).all():
        raise DamagedStore(f"{place}: indices out of range or not increasing; a chunk of indices is lost or damaged")


def check_chunk(path: Path, size: int, crc: str) -> str | None:
    """What is wrong with a chunk file that a commit names, in words; None if it is whole."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error}"
    if len(raw) != size:
        return f"has {len(raw):,} bytes, expected {size:,}"
    return None if crc32(raw) == crc else "fails its checksum"


def crc32(raw: bytes) -> str:
    """CRC-32 (hex) of a whole chunk file. (The CRC32C of a file that ends with its own CRC32C is a constant.)"""
    return f"{zlib.crc32(raw):08x}"


def tail_files(path: Path) -> list[Path]:
    """The files with entries of unfinished chunks; a finished group has none."""
    return sorted(path.glob("tail-*"))


def _create(path: Path, indices: str) -> dict[str, zarr.Array[Any]]:
    group = zarr.open_group(path, mode="w-", zarr_format=3)
    group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0"})
    kinds = {"indices": indices, "data": "float32", "indptr": "int64"}
    return {
        name: group.create_array(
            name,
            shape=(0,),
            dtype=kinds[name],
            chunks=(CHUNK_ENTRIES,),
            fill_value=_FILLS[name],
            compressors=_codecs(name),
        )
        for name in _NAMES
    }


def _codecs(name: str) -> list[Any]:
    if name != "data":
        return [ZstdCodec(level=0, checksum=True)]
    # bitshuffle removes the bit planes that rounding has emptied (docs/reference/storage.md 1.3)
    return [BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle"), Crc32cCodec()]


def _write_chunk(path: Path, name: str, values: npt.NDArray[Any], size: int) -> tuple[int, str]:
    """Write one chunk with the codecs of `_codecs`; returns (size in bytes, CRC-32). Tested against zarr.

    Runs in a thread, where numcodecs compresses with one thread, so the bytes are always the same. A file that was cut
    off by a kill is in no commit, and is written again.
    """
    if len(values) < size:  # Zarr stores the last chunk at full size
        values = np.concatenate([values, np.full(size - len(values), _FILLS[name], values.dtype)])
    values = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
    if name == "data":
        raw = bytes(blosc.compress(values, b"lz4", 5, blosc.BITSHUFFLE))
        raw += int(google_crc32c.value(raw)).to_bytes(4, "little")
    else:
        raw = bytes(zstd.compress(values, 0, True))
    path.parent.mkdir(exist_ok=True)
    with named(path):
        path.write_bytes(raw)
    return len(raw), crc32(raw)


def _open_to_continue(path: Path, at: CsrCommit) -> dict[str, zarr.Array[Any]]:
    """The arrays of an unfinished group. Raises DamagedStore if a committed chunk is missing or damaged."""
    for name, files in at.chunks.items():
        for number, (size, _) in enumerate(files):
            chunk = path / name / "c" / str(number)
            if not chunk.is_file() or chunk.stat().st_size != size:
                raise DamagedStore(f"{chunk} is missing or damaged{_BEGIN_AGAIN}")
    try:
        for name in _NAMES:
            read_array(path / name)
        return {name: zarr.open_array(path / name, mode="r+", zarr_format=3) for name in _NAMES}
    except DamagedStore as error:
        raise DamagedStore(f"{error}{_BEGIN_AGAIN}") from None
    except (FileNotFoundError, KeyError, ValueError) as error:
        raise DamagedStore(f"{path} is not a sparse matrix ({error}){_BEGIN_AGAIN}") from None


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
