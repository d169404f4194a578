"""Sparse rows in Zarr: what was written is what is read, by us, scipy and AnnData; damage is never read as numbers."""

import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import google_crc32c
import numpy as np
import numpy.typing as npt
import pytest
import scipy.sparse as ss
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numcodecs import Blosc, Zstd

from stores import csr, csr_bulk
from stores.csr import CsrCommit, CsrReader, CsrRows, CsrWriter, index_dtype, tail_files
from stores.errors import DamagedStore

N_COLUMNS = 40
NAMES = ("indices", "data", "indptr")


@dataclass(frozen=True)
class Rows:
    """Rows to write: the same three arrays that `CsrWriter.append` takes."""

    indices: npt.NDArray[np.int64]
    values: npt.NDArray[np.float32]
    lengths: npt.NDArray[np.int64]

    def part(self, start: int, stop: int) -> "Rows":
        """Rows start..stop."""
        first, last = self.lengths[:start].sum(), self.lengths[:stop].sum()
        return Rows(self.indices[first:last], self.values[first:last], self.lengths[start:stop])

    def to_scipy(self, n_columns: int = N_COLUMNS) -> ss.csr_matrix:
        indptr = np.append(0, np.cumsum(self.lengths))
        return ss.csr_matrix((self.values, self.indices, indptr), (len(self.lengths), n_columns))


def rows_of(lists: list[list[int]]) -> Rows:
    """Rows with the given columns; the values are all different."""
    indices = np.array([column for row in lists for column in row], np.int64)
    values = np.arange(1, len(indices) + 1, dtype=np.float32) * np.float32(0.37)
    return Rows(indices, values, np.array([len(row) for row in lists], np.int64))


some_rows = st.lists(st.sets(st.integers(0, N_COLUMNS - 1), max_size=9).map(sorted), max_size=14).map(rows_of)


@pytest.fixture(autouse=True, scope="module")
def small_chunks() -> Iterator[None]:
    """Five entries a chunk: tiny matrices have many, and rows lie across their edges. And no waiting for the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(csr, "CHUNK_ENTRIES", 5)
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


def write(path: Path, rows: Rows, *, n_columns: int = N_COLUMNS) -> None:
    writer = CsrWriter(path, n_columns=n_columns, indices=index_dtype(n_columns))
    writer.append(rows.indices, rows.values, rows.lengths)
    writer.finish()


def through_json(commit: CsrCommit) -> dict[str, Any]:
    """As a journal gives it back."""
    found: dict[str, Any] = json.loads(json.dumps(commit.to_json()))
    return found


def same(found: CsrRows, expected: ss.csr_matrix) -> bool:
    return (
        np.array_equal(found.indptr, expected.indptr)
        and np.array_equal(found.indices, expected.indices)
        and np.array_equal(found.values, expected.data)
    )


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------------- round trips


@pytest.mark.stress
@settings(max_examples=40, deadline=None)
@given(rows=some_rows, data=st.data())
def test_rows_survive_commits_and_interruptions_anywhere(
    rows: Rows, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Any split into appends, commits and resumes after a crash gives the very files of one append, and its rows."""
    root, n_rows = tmp_path_factory.mktemp("csr"), len(rows.lengths)
    write(root / "whole", rows)

    writer = CsrWriter(root / "pieces", n_columns=N_COLUMNS, indices="uint16")
    at, commits = 0, []
    while at < n_rows:
        stop = data.draw(st.integers(at + 1, n_rows), label="append up to row")
        part = rows.part(at, stop)
        writer.append(part.indices, part.values, part.lengths)
        at = stop
        then = data.draw(st.sampled_from(["append", "commit", "crash"]), label="and then")
        if then == "commit":
            commits.append(through_json(writer.commit()))
        elif then == "crash" and commits:  # the writer is dropped with what it did not commit
            committed = CsrCommit.from_json(commits)
            writer = CsrWriter(root / "pieces", n_columns=N_COLUMNS, indices="uint16", at=committed)
            at = committed.n_rows
            if data.draw(st.booleans(), label="commit at once"):
                commits.append(through_json(writer.commit()))
    commits.append(through_json(writer.finish()))
    for path in tail_files(root / "pieces"):
        path.unlink()
    closed = CsrWriter(root / "pieces", n_columns=N_COLUMNS, indices="uint16", at=CsrCommit.from_json(commits))
    assert (closed.is_finished, closed.n_rows) == (True, n_rows)
    closed.finish()  # can be repeated
    for name, files in CsrCommit.from_json(commits).chunks.items():
        paths = sorted((root / "pieces" / name).glob("c/*"), key=lambda path: int(path.name))
        assert [(path.stat().st_size, f"{zlib.crc32(path.read_bytes()):08x}") for path in paths] == files

    assert contents(root / "pieces") == contents(root / "whole")
    expected, reader = rows.to_scipy(), CsrReader(root / "pieces", shape=(n_rows, N_COLUMNS))
    assert reader.nnz == expected.nnz
    assert reader.missing_chunks() == []
    start = data.draw(st.integers(0, n_rows), label="read from")
    stop = data.draw(st.integers(start, n_rows), label="read to")
    assert same(reader.read_rows(start, stop), expected[start:stop])
    step = data.draw(st.integers(1, 7), label="every so many rows")
    assert np.array_equal(reader.row_starts(start, n_rows + 1, step), expected.indptr[start::step])
    for start, stop in ((-1, n_rows), (n_rows, n_rows + 1), (1, 0)):
        with pytest.raises(IndexError, match=rf"rows {start} to {stop} outside 0\.\.{n_rows}"):
            reader.read_rows(start, stop)


@pytest.mark.parametrize("n_columns", [40, 65_536, 65_537])
def test_the_widest_index_fits(n_columns: int, tmp_path: Path) -> None:
    """uint16 up to 65,536 columns, uint32 above: the last column is read back."""
    rows = rows_of([[0, n_columns - 1], [], [n_columns - 1]])
    write(tmp_path / "m", rows, n_columns=n_columns)
    assert same(CsrReader(tmp_path / "m", shape=(3, n_columns)).read_rows(0, 3), rows.to_scipy(n_columns))
    dtype = zarr.open_array(tmp_path / "m" / "indices", mode="r").dtype
    assert dtype == ("uint16" if n_columns <= 65_536 else "uint32")


@settings(max_examples=25, deadline=None)
@given(rows=some_rows, wide=st.booleans())
# AnnData says that it keeps our uint16 indices as they are
@pytest.mark.stress
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_anndata_reads_the_bare_group(rows: Rows, wide: bool, tmp_path_factory: pytest.TempPathFactory) -> None:
    root, n_columns = tmp_path_factory.mktemp("csr"), 70_000 if wide else N_COLUMNS
    zarr.open_group(root, mode="w", zarr_format=3)
    write(root / "X", rows, n_columns=n_columns)
    group, expected = zarr.open_group(root, mode="r")["X"], rows.to_scipy(n_columns)
    dataset = anndata.io.sparse_dataset(group)
    matrices = {"read_elem": anndata.io.read_elem(group), "to_memory": dataset.to_memory()}
    if len(rows.lengths):
        matrices |= {"slice": dataset[:]}
        half = len(rows.lengths) // 2
        assert (dataset[half:] != expected[half:]).nnz == 0
    for name, found in matrices.items():
        assert found.shape == expected.shape, name
        assert np.array_equal(found.toarray(), expected.toarray()), name
        assert found.dtype == np.float32, name


# ------------------------------------------------------------------------------------------------------ damage


MIXED = rows_of([[3, 7, 39], [], [0], [5], [1, 2, 4, 8, 16], [], [9, 30], [0, 1, 2, 3], [38], [6], [0, 9, 12], []])
SINGLE = rows_of([[7], [], [0], [39], [4], [], [12], [5], [5], [31], [8], [], [1], [2]])


def damages(raw: bytes) -> Iterator[tuple[str, bytes | None]]:
    """(what was done, the damaged file) for one chunk file: None is a deleted file."""
    yield "deleted", None
    yield "emptied", b""
    for length in range(1, len(raw), 8):
        yield f"cut to {length} bytes", raw[:length]
    yield "cut by one byte", raw[:-1]
    yield "one byte longer", raw + b"\0"
    yield "doubled", raw + raw
    yield "zeroed", bytes(len(raw))
    for position in range(len(raw)):
        for bit in range(8) if position < 6 else [position * 5 % 8]:  # the codecs' own headers: every bit
            flipped = raw[position] ^ 1 << bit
            yield f"bit {bit} of byte {position} flipped", raw[:position] + bytes([flipped]) + raw[position + 1 :]


@pytest.mark.stress
@pytest.mark.parametrize(("name", "rows"), [*((name, MIXED) for name in NAMES), ("indices", SINGLE)])
def test_a_damaged_chunk_is_never_read_as_numbers(name: str, rows: Rows, tmp_path: Path) -> None:
    """Whatever happens to a chunk file, `read_rows` gives exactly the right rows or a DamagedStore, and no other error.

    Rows of one entry matter: there a lost chunk of indices reads as zeros, which is a valid row.
    """
    write(tmp_path / "m", rows)
    n_rows, expected = len(rows.lengths), rows.to_scipy()
    reader = CsrReader(tmp_path / "m", shape=(n_rows, N_COLUMNS))
    files = sorted((tmp_path / "m" / name / "c").iterdir())
    assert len(files) >= 2
    n_found = 0
    for path in files:
        raw = path.read_bytes()
        for what, damaged in damages(raw):
            path.unlink(missing_ok=True)
            if damaged is not None:
                path.write_bytes(damaged)
            for start, stop in [(0, n_rows)] if damaged else [(0, n_rows), (n_rows // 2, n_rows - 2)]:
                try:
                    rows_read = reader.read_rows(start, stop)
                except DamagedStore:
                    n_found += 1
                else:
                    assert same(rows_read, expected[start:stop]), f"wrong rows from {path}: {what}"
            if not damaged:
                assert reader.missing_chunks() == [path]
        path.write_bytes(raw)
    assert n_found > 100
    assert same(reader.read_rows(0, n_rows), expected)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (Rows(np.array([3, 3]), np.array([1, 1], np.float32), np.array([2])), "not increasing"),
        (Rows(np.array([4, 3]), np.array([1, 1], np.float32), np.array([2])), "not increasing"),
        (Rows(np.array([40]), np.array([1], np.float32), np.array([1])), "indices out of range"),
        (Rows(np.array([4]), np.array([0], np.float32), np.array([1])), "a value is zero, NaN or infinite"),
        (Rows(np.array([4]), np.array([np.nan], np.float32), np.array([1])), "a value is zero, NaN or infinite"),
        (Rows(np.array([4]), np.array([-np.inf], np.float32), np.array([1])), "a value is zero, NaN or infinite"),
    ],
)
def test_rows_that_break_an_invariant_are_refused(rows: Rows, message: str, tmp_path: Path) -> None:
    write(tmp_path / "m", rows)
    with pytest.raises(DamagedStore, match=f"rows 0 to 0 of .*{message}"):
        CsrReader(tmp_path / "m", shape=(1, N_COLUMNS)).read_rows(0, 1)


def test_indptr_that_falls_or_leaves_the_data_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "m", MIXED)
    indptr = zarr.open_array(tmp_path / "m" / "indptr", mode="r+")
    whole = np.asarray(indptr[:])
    for changed in (whole[::-1], np.append(whole[:-1], 1000), whole - 1):
        indptr[:] = changed
        with pytest.raises(DamagedStore, match="indptr is not monotone or leaves the data"):
            CsrReader(tmp_path / "m", shape=(12, N_COLUMNS)).read_rows(0, 12)


def test_a_group_that_does_not_hold_what_its_store_promises_is_refused(tmp_path: Path) -> None:
    """Shape, lengths and presence are checked on opening: a group that was never finished does not open."""
    path = tmp_path / "m"
    write(path, MIXED)
    with pytest.raises(DamagedStore, match=r"states shape \[12, 40\], expected \[13, 40\]"):
        CsrReader(path, shape=(13, N_COLUMNS))
    with pytest.raises(DamagedStore, match="is not a sparse matrix"):
        CsrReader(tmp_path / "nothing", shape=(12, N_COLUMNS))

    zarr.open_array(path / "data", mode="r+").resize((3,))
    with pytest.raises(DamagedStore, match=r"lengths disagree: .*'data': 3"):
        CsrReader(path, shape=(12, N_COLUMNS))
    (path / "data" / "zarr.json").write_text("{")
    with pytest.raises(DamagedStore, match="is not a sparse matrix"):
        CsrReader(path, shape=(12, N_COLUMNS))

    writer = CsrWriter(tmp_path / "begun", n_columns=N_COLUMNS, indices="uint16")
    writer.append(MIXED.indices, MIXED.values, MIXED.lengths)
    writer.commit()
    assert "shape" not in json.loads((tmp_path / "begun" / "zarr.json").read_text())["attributes"]
    with pytest.raises(DamagedStore, match="states shape None"):
        CsrReader(tmp_path / "begun", shape=(12, N_COLUMNS))


def zarr_written(path: Path, rows: Rows) -> dict[str, bytes]:
    """The chunk files of the same rows as zarr itself writes them."""
    group = zarr.open_group(path, mode="w", zarr_format=3)
    arrays = {"indices": rows.indices.astype("u2"), "data": rows.values, "indptr": np.append(0, rows.lengths.cumsum())}
    for name, values in arrays.items():
        fill, codecs = csr._FILLS[name], csr._codecs(name)
        kind, chunks = (values.dtype if name != "indptr" else "int64"), (5,)
        with zarr.config.set({"array.write_empty_chunks": True}):
            array = group.create_array(
                name, shape=values.shape, dtype=kind, chunks=chunks, fill_value=fill, compressors=codecs
            )
            array[:] = values
    return {name: raw for name, raw in contents(path).items() if "/c/" in name}


def test_chunk_files_are_those_that_zarr_writes(tmp_path: Path) -> None:
    """Byte for byte, the padded last ones and those that hold nothing but zeros included."""
    for number, rows in enumerate([MIXED, SINGLE, rows_of([[0]] * 11)]):
        write(tmp_path / f"ours{number}", rows)
        ours = contents(tmp_path / f"ours{number}")
        assert {name: raw for name, raw in ours.items() if "/c/" in name} == zarr_written(tmp_path / str(number), rows)


def test_a_chunk_that_cannot_be_written_is_in_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk: whoever goes on all the same is told again and again."""
    real = csr._write_chunk

    def write_chunk(path: Path, *arguments: Any) -> tuple[int, str]:
        if path == tmp_path / "X" / "data" / "c" / "1":
            raise OSError(28, "No space left on device")
        return real(path, *arguments)

    monkeypatch.setattr(csr, "_write_chunk", write_chunk)
    writer = CsrWriter(tmp_path / "X", n_columns=N_COLUMNS, indices="uint16")

    def append_and_commit() -> None:
        for _ in range(50):
            writer.append(MIXED.indices, MIXED.values, MIXED.lengths)
        writer.commit()

    for _ in range(3):
        with pytest.raises(OSError, match="No space left"):
            append_and_commit()
    with pytest.raises(OSError, match="No space left"):
        writer.finish()
    assert "shape" not in json.loads((tmp_path / "X" / "zarr.json").read_text())["attributes"]


def committed(path: Path) -> CsrCommit:
    """One whole chunk of data and of indices, and a tail of every array."""
    rows = rows_of([[1, 2], [3], [0, 4, 7, 9, 12, 13]])
    writer = CsrWriter(path, n_columns=N_COLUMNS, indices="uint16")
    writer.append(rows.indices, rows.values, rows.lengths)
    return writer.commit()


@pytest.mark.parametrize("damage", [None, b"", b"torn", "flipped", "longer"])
@pytest.mark.parametrize("name", ["tail-3", "data/c/0", "indices/c/0"])
def test_a_job_does_not_go_on_from_what_is_lost(name: str, damage: bytes | str | None, tmp_path: Path) -> None:
    """What was committed and is not there any more must not go on as fill values."""
    at, path = committed(tmp_path / "X"), tmp_path / "X" / name
    raw = path.read_bytes()
    if damage == "flipped" and name != "tail-3":
        return  # of whole chunks, only presence and size are looked at: cyto latents verify reads them
    path.unlink()
    if damage is not None:
        spoiled = {"flipped": raw[:-1] + bytes([raw[-1] ^ 1]), "longer": raw + b"x"}
        path.write_bytes(damage if isinstance(damage, bytes) else spoiled[damage])
    with pytest.raises(DamagedStore, match=r"is missing or damaged, so the job cannot go on from it; begin again with"):
        CsrWriter(tmp_path / "X", n_columns=N_COLUMNS, indices="uint16", at=at)


def test_a_journal_that_makes_no_sense_is_refused(tmp_path: Path) -> None:
    line = through_json(committed(tmp_path / "X"))
    fewer = {**line, "n_rows": 1}
    senseless: list[list[dict[str, Any]]] = [
        [{}],
        [{**line, "chunks": {}}],
        [{**line, "nnz": "many"}],
        [line, fewer],
        [{**line, "chunks": [1]}],
    ]
    for records in senseless:
        with pytest.raises(DamagedStore, match="the journal does not name what was written"):
            CsrCommit.from_json(records)


@pytest.mark.parametrize("name", ["indices", "data"])
def test_a_chunk_that_holds_less_than_its_entries_leaves_nothing_of_the_one_before(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks are decoded into one buffer: what a short one does not fill must be NaN, or no latent."""
    rows = rows_of([[1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [0, 7]])
    write(tmp_path / "X", rows)
    short = np.ones(3, np.float32 if name == "data" else np.uint16)
    raw = Blosc(cname="lz4").encode(short) if name == "data" else Zstd(checksum=True).encode(short)
    crc = google_crc32c.value(raw).to_bytes(4, "little") if name == "data" else b""
    (tmp_path / "X" / name / "c" / "1").write_bytes(raw + crc)
    reader = csr_bulk.EntryReader(tmp_path / "X", shape=(3, N_COLUMNS), start=0, stop=3)
    with pytest.raises(DamagedStore, match=rf"X/{name}/c/1 is damaged: it does not decode to the"):
        list(reader.entries())
    monkeypatch.setattr(csr, "check_chunk_header", lambda path, meta: None)  # one that states a size that it lacks
    reader = csr_bulk.EntryReader(tmp_path / "X", shape=(3, N_COLUMNS), start=0, stop=3)
    found = [(indices.tolist(), values.tolist()) for _, indices, values in reader.entries()]
    assert found[0] == (rows.indices[:5].tolist(), rows.values[:5].tolist()), "the whole one before it is read as it is"
    if name == "data":
        assert found[1][1][:3] == [1, 1, 1]
        assert np.isnan(found[1][1][3:]).all()
    else:
        assert found[1][0] == [1, 1, 1, 65535, 65535]
    assert found[2] == (rows.indices[10:].tolist(), rows.values[10:].tolist())
