"""Sparse rows in bulk: read a range of rows chunk by chunk, or let many processes fill one matrix.

Reading hands out whole chunks as they are decoded, so memory is one or two chunks whatever the range; who counts them
checks them. Filling: the entries' number is known before, so the arrays are created at their full length, each
process writes chunks of its own, and what makes the rows visible (indptr, then `shape`) comes last.
"""

import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec

from .csr import CsrReader
from .errors import DamagedStore
from .files import PARTIAL_SUFFIX

CHUNK_ENTRIES = 1 << 20  # of a matrix that is filled here
_KEEP_EMPTY: Any = {"write_empty_chunks": True}  # lives in the handle: renewed on every open


def read_row_starts(path: Path, shape: tuple[int, int], start: int, stop: int) -> npt.NDArray[np.int64]:
    """`indptr[start : stop + 1]` of the matrix at `path`, checked: it rises, and stays within the entries.

    Raises
    ------
    DamagedStore
        If it cannot be read, or does not.
    """
    reader = CsrReader(path, shape=shape)
    place = _place(path, start, stop)
    try:
        starts = reader.row_starts(start, stop + 1)
    except (ValueError, RuntimeError, OSError) as error:
        raise DamagedStore(f"{place} cannot be read: {error}") from None
    if starts.min() < 0 or (np.diff(starts) < 0).any() or starts[-1] > reader.nnz:
        raise DamagedStore(f"{place}: indptr is not monotone or leaves the data")
    return starts


def read_entries(
    path: Path, start: int, stop: int, row_starts: npt.NDArray[np.int64]
) -> Iterator[tuple[int, npt.NDArray[Any], npt.NDArray[np.float32]]]:
    """The entries of rows start..stop, a chunk at a time: (number of its first entry, indices, values), unchecked.

    Raises
    ------
    DamagedStore
        If a chunk is lost or damaged.
    """
    first, last, place = int(row_starts[0]), int(row_starts[-1]), _place(path, start, stop)
    try:
        arrays = {name: zarr.open_array(os.fspath(path / name), mode="r") for name in ("indices", "data")}
        size = arrays["data"].chunks[0]
        for at in range(first - first % size, last, size):
            low, high = max(first, at), min(last, at + size)
            indices, values = (np.asarray(array[low:high]) for array in arrays.values())
            lost = [f for f in (path / name / "c" / str(at // size) for name in arrays) if not f.is_file()]
            if lost:  # would read as its fill value
                raise DamagedStore(f"{place}: {lost[0]} is missing")
            yield low, indices, values
    except (ValueError, RuntimeError, OSError) as error:
        if isinstance(error, DamagedStore):
            raise
        raise DamagedStore(f"{place} cannot be read: {error}") from None


def create_matrix(path: Path, nnz: int) -> None:
    """An empty CSR group in AnnData's layout (int32 indices, float32 data) that waits for `nnz` entries."""
    group = zarr.open_group(os.fspath(path), mode="w-", zarr_format=3)
    group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0"})
    for name, dtype in (("indices", "int32"), ("data", "float32")):
        group.create_array(
            name,
            shape=(nnz,),
            dtype=dtype,
            chunks=(CHUNK_ENTRIES,),
            compressors=[BloscCodec(cname="lz4", clevel=1, shuffle="bitshuffle"), Crc32cCodec()],
            fill_value=0 if name == "indices" else float("nan"),
        )


def write_entries(path: Path, name: str, start: int, values: npt.NDArray[Any]) -> None:
    """Write entries of `indices` or `data` from `start`, on a chunk edge, to the end of a chunk or of all."""
    array: zarr.Array[Any] = zarr.open_array(os.fspath(path / name), mode="r+").with_config(_KEEP_EMPTY)
    array[start : start + len(values)] = values


def share_entries(source: Path, target: Path, name: str, start: int, stop: int) -> None:
    """Give `target` the chunk files of `source` for entries start..stop: the same file where links can be made."""
    for chunk in range(start // CHUNK_ENTRIES, -(-stop // CHUNK_ENTRIES)):
        given, wanted = (matrix / name / "c" / str(chunk) for matrix in (source, target))
        wanted.parent.mkdir(exist_ok=True)
        partial = wanted.with_name(f"{wanted.name}.{uuid.uuid4().hex}{PARTIAL_SUFFIX}")
        try:
            try:
                partial.hardlink_to(given)
            except OSError:  # a file system without hard links
                shutil.copyfile(given, partial)
            partial.replace(wanted)
        finally:
            partial.unlink(missing_ok=True)  # renaming a link onto another of the same file leaves both


def finish_matrix(path: Path, row_lengths: npt.NDArray[Any], n_columns: int) -> None:
    """All entries are there: write the row starts, then state the shape."""
    group = zarr.open_group(os.fspath(path), mode="r+")
    indptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(row_lengths, dtype=np.int64)])
    array = group.create_array(
        "indptr",
        shape=indptr.shape,
        dtype="int64",
        chunks=(CHUNK_ENTRIES,),
        compressors=[BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle"), Crc32cCodec()],
        fill_value=-1,
    ).with_config(_KEEP_EMPTY)
    array[:] = indptr
    group.attrs["shape"] = [len(row_lengths), n_columns]


def _place(path: Path, start: int, stop: int) -> str:
    return f"rows {start:,} to {stop - 1:,} of {path}"
