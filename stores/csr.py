"""Sparse rows in Zarr, in AnnData's `csr_matrix` 0.1.0 layout: append, commit, read a range of rows.

What makes rows visible is written last: data and indices, then indptr, then the attribute `shape`. Rows have
strictly increasing indices and no explicit zeros, so a lost or damaged chunk shows when rows are read (STORAGE.md,
recipe R5). A missing chunk reads as its fill value, which no valid row contains; only in indices, where the fill is
column 0 (scipy does not survive one out of range), it could pass in rows of one entry: there the files are looked for.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

from .errors import DamagedStore
from .files import sync_folder

CHUNK_ENTRIES = 1 << 20  # per chunk of all three arrays
_NAMES = ("indices", "data", "indptr")
_KEEP_EMPTY: Any = {"write_empty_chunks": True}  # lives in the handle, not in the store: renewed on every open


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


def index_dtype(n_columns: int) -> str:
    """The narrowest unsigned type that holds every column number."""
    return "uint16" if n_columns <= 1 << 16 else "uint32"


class CsrWriter:
    """Appends rows to one CSR group. Memory: the entries of one unfinished chunk per array."""

    def __init__(self, path: Path, *, n_columns: int, indices: str, at: tuple[int, int] = (0, 0)) -> None:
        """Create the group, or continue it after the committed (n_rows, nnz) = `at`."""
        self.path, self.n_columns = path, n_columns
        if at == (0, 0):
            self._arrays = _create(path, indices)
            self._written = dict.fromkeys(_NAMES, 0)
            self._buffers: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in _NAMES}
            self._buffers["indptr"].append(np.zeros(1, np.int64))
        else:
            self._arrays = {name: _open(path, name, "r+") for name in _NAMES}
            ends = {"indices": at[1], "data": at[1], "indptr": at[0] + 1}
            self._written = {name: end - end % CHUNK_ENTRIES for name, end in ends.items()}
            # the tail chunk may hold rows that were never committed: read ours back, it is rewritten at once
            self._buffers = {name: [self._read_tail(name, ends[name])] for name in _NAMES}
        self.n_rows, self.nnz = at
        self._touched: set[Path] = set()

    def _read_tail(self, name: str, end: int) -> npt.NDArray[Any]:
        """The committed part of an array's last chunk. A lost or torn chunk must not go on as fill values."""
        start = self._written[name]
        path = self.path / name / "c" / str(start // CHUNK_ENTRIES)
        try:
            tail = np.asarray(self._arrays[name][start:end])
            is_whole = start == end or path.is_file()
        except (ValueError, RuntimeError, OSError):
            is_whole = False
        if not is_whole or len(tail) != end - start or (name == "data" and not np.isfinite(tail).all()):
            raise DamagedStore(
                f"{path} is missing or damaged, so the job cannot go on from it; begin again with --overwrite"
            )
        return tail

    def append(self, indices: npt.NDArray[Any], values: npt.NDArray[np.float32], row_lengths: npt.NDArray[Any]) -> None:
        """Append `len(row_lengths)` rows; whole chunks are written at once, the rest waits for `commit`.

        The caller vouches for the order: strictly increasing indices in each row, no zeros, all finite.
        """
        assert len(indices) == len(values) == int(row_lengths.sum())
        self._buffers["indices"].append(indices.astype(self._arrays["indices"].dtype, copy=False))
        self._buffers["data"].append(values.astype(np.float32, copy=False))
        self._buffers["indptr"].append(self.nnz + np.cumsum(row_lengths, dtype=np.int64))
        self.n_rows += len(row_lengths)
        self.nnz += len(indices)
        for name in _NAMES:
            if sum(map(len, self._buffers[name])) >= CHUNK_ENTRIES:
                self._write(name, whole_chunks_only=True)

    def commit(self) -> tuple[int, int]:
        """Make everything appended so far durable; returns (n_rows, nnz), to be recorded and given as `at` later."""
        for name in _NAMES:
            self._write(name, whole_chunks_only=False)
        for path in self._touched:
            with path.open("rb") as file:
                os.fsync(file.fileno())
        for folder in {path.parent for path in self._touched}:
            sync_folder(folder)
        self._touched.clear()
        return self.n_rows, self.nnz

    def finish(self) -> None:
        """Commit, cut the arrays to their exact length, and state the shape."""
        self.commit()
        for name, length in (("indices", self.nnz), ("data", self.nnz), ("indptr", self.n_rows + 1)):
            self._arrays[name].resize((length,))
        group = zarr.open_group(os.fspath(self.path), mode="r+")
        group.attrs["shape"] = [self.n_rows, self.n_columns]

    def _write(self, name: str, *, whole_chunks_only: bool) -> None:
        """Move the buffer to disk; the part behind the last chunk edge stays in the buffer as well."""
        values = np.concatenate(self._buffers[name]) if self._buffers[name] else np.empty(0)
        whole = len(values) - len(values) % CHUNK_ENTRIES
        end = whole if whole_chunks_only else len(values)
        start, array = self._written[name], self._arrays[name]
        if end:
            if array.shape[0] != start + end:
                array.resize((start + end,))
            array[start : start + end] = values[:end]
            chunks = range(start // CHUNK_ENTRIES, -(-(start + end) // CHUNK_ENTRIES))
            self._touched |= {self.path / name / "c" / str(chunk) for chunk in chunks}
            self._touched.add(self.path / name / "zarr.json")
        self._written[name] = start + whole
        self._buffers[name] = [values[whole:]]


class CsrReader:
    """Reads ranges of rows of one CSR group. Memory: the rows asked for, and the chunks they lie in."""

    def __init__(self, path: Path, *, shape: tuple[int, int]) -> None:
        """Open the group; `shape` is what the store that owns it promises.

        Raises
        ------
        DamagedStore
            If arrays or attributes are missing or disagree with `shape` or with each other.
        """
        self.path, self.shape = path, shape
        try:
            attributes = dict(zarr.open_group(os.fspath(path), mode="r").attrs)
            self._arrays = {name: _open(path, name, "r") for name in _NAMES}
        except (FileNotFoundError, KeyError, ValueError) as error:
            raise DamagedStore(f"{path} is not a sparse matrix ({error})") from None
        if attributes.get("shape") != list(shape):
            raise DamagedStore(f"{path} states shape {attributes.get('shape')}, expected {list(shape)}")
        lengths = {name: array.shape[0] for name, array in self._arrays.items()}
        if lengths["indptr"] != shape[0] + 1 or lengths["indices"] != lengths["data"]:
            raise DamagedStore(f"{path}: lengths disagree: {lengths}, expected {shape[0] + 1} in indptr")
        self.nnz = lengths["data"]

    def missing_chunks(self) -> list[Path]:
        """Chunk files that should be there and are not, or are empty."""
        files = [path for name, array in self._arrays.items() for path in self._chunk_files(name, 0, array.shape[0])]
        return [path for path in files if not path.is_file() or path.stat().st_size == 0]

    def row_starts(self, start: int, stop: int, step: int = 1) -> npt.NDArray[np.int64]:
        """`indptr[start:stop:step]`, read in pieces, so that a long indptr never lies in memory whole."""
        piece = CHUNK_ENTRIES * step // np.gcd(CHUNK_ENTRIES, step)
        parts = [
            np.asarray(self._arrays["indptr"][at : min(at + piece, stop)])[::step] for at in range(start, stop, piece)
        ]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def read_rows(self, start: int, stop: int) -> CsrRows:
        """Rows start..stop, checked: indptr monotone, indices in range and strictly increasing, values finite.

        Raises
        ------
        DamagedStore
            If a chunk is damaged or missing, or the rows break an invariant; nothing wrong is ever returned.
        """
        place = f"rows {start:,} to {stop - 1:,} of {self.path}"
        try:
            indptr = np.asarray(self._arrays["indptr"][start : stop + 1])
            first, last = int(indptr[0]), int(indptr[-1])
            if indptr.min() < 0 or (np.diff(indptr) < 0).any() or last > self.nnz:
                raise DamagedStore(f"{place}: indptr is not monotone or leaves the data")
            indices = np.asarray(self._arrays["indices"][first:last])
            values = np.asarray(self._arrays["data"][first:last])
            lost = [path for path in self._chunk_files("indices", first, last) if not path.is_file()]
            if lost:
                raise DamagedStore(f"{place}: {lost[0]} is missing")
        except (ValueError, RuntimeError, OSError) as error:
            if isinstance(error, DamagedStore):
                raise
            raise DamagedStore(f"{place} cannot be read: {error}") from None
        rows = CsrRows(indices, values, indptr - first)
        _check_rows(rows, self.shape[1], place)
        return rows

    def _chunk_files(self, name: str, start: int, stop: int) -> list[Path]:
        """The files that hold entries start..stop of an array."""
        size = self._arrays[name].chunks[0]
        return [self.path / name / "c" / str(chunk) for chunk in range(start // size, -(-stop // size))]


def _check_rows(rows: CsrRows, n_columns: int, place: str) -> None:
    if not np.isfinite(rows.values).all() or (rows.values == 0).any():
        raise DamagedStore(f"{place}: a value is zero, NaN or infinite; a chunk of data is lost or damaged")
    if not len(rows.indices):
        return
    starts = np.zeros(len(rows.indices) + 1, bool)
    starts[rows.indptr] = True  # where a row begins, the index may step down
    rising = rows.indices[1:] > rows.indices[:-1]
    if int(rows.indices.max()) >= n_columns or not (rising | starts[1:-1]).all():
        raise DamagedStore(f"{place}: indices out of range or not increasing; a chunk of indices is lost or damaged")


def _create(path: Path, indices: str) -> dict[str, zarr.Array[Any]]:
    group = zarr.open_group(os.fspath(path), mode="w-", zarr_format=3)
    group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0"})
    zstd = [ZstdCodec(level=0, checksum=True)]
    # bitshuffle removes the bit planes that rounding has emptied (STORAGE.md 1.3)
    lz4 = [BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle"), Crc32cCodec()]
    layout: dict[str, tuple[str, float, Any]] = {
        "indices": (indices, 0, zstd),
        "data": ("float32", float("nan"), lz4),
        "indptr": ("int64", -1, zstd),
    }
    return {
        name: group.create_array(
            name, shape=(0,), dtype=dtype, chunks=(CHUNK_ENTRIES,), fill_value=fill, compressors=codecs
        ).with_config(_KEEP_EMPTY)
        for name, (dtype, fill, codecs) in layout.items()
    }


def _open(path: Path, name: str, mode: Any) -> zarr.Array[Any]:
    array: zarr.Array[Any] = zarr.open_array(os.fspath(path / name), mode=mode)
    return array.with_config(_KEEP_EMPTY)
