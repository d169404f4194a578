"""Writes an activation cache: each chunk is durable before its journal line; the header is marked complete at the end.

Format "activation cache", version 1: docs/formats.md. Each chunk has one writer. A chunk named by a journal line is
durable on the disk, with the size and checksum in the line. Several writers (`Shard`) share no file: the first one
writes the initial files, and the last one completes the cache.
"""

import re
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import zarr
from zarr.codecs import Crc32cCodec

from .activation_spec import (
    ActivationSpec,
    Float16,
    chunk_path,
    file_crc,
    journals_of,
    read_spec,
    records_of,
)
from .activation_store import ActivationStore
from .checksum import CRC_BYTES, crc32c
from .destination import claimed
from .errors import BadInput, DamagedStore, IncompleteStore, SpecMismatch
from .files import (
    LOCK_SUFFIX,
    append_line,
    locked,
    read_lines,
    sweep_partials,
    sync_folder,
    sync_tree,
    write_atomic,
    write_lines,
    write_new,
)
from .runlog import join_runs, shard_logs
from .shards import ONE_WRITER, Shard
from .spec import ACTIVATIONS, Header, begin_header, new_header, read_header, write_header
from .tables import (
    column,
    listed,
    parquet_bytes,
    read_image_table,
    table_sha256,
    with_outcome,
    without_outcome,
    write_image_table,
)
from .wording import Report

_SECONDS_TO_FINISH = 600.0  # syncing 67 GB takes minutes


class ActivationWriter:
    """Writes the chunks of one shard of a cache, in any order and from any thread, and completes the cache.

    Opened on an incomplete cache with the same spec, it continues: `missing_chunks` lists the chunks to write, whoever
    wrote the others. Memory: the chunks that are being written, which the caller holds.
    """

    def __init__(self, root: Path, spec: ActivationSpec, manifest: pa.Table, shard: Shard = ONE_WRITER) -> None:
        """The caller must hold the lock of the shard (`writer_lock`)."""
        self.root, self.spec, self.chunks = root, spec, shard.chunks(spec.n_chunks)
        self._journal = root / f"journal-{shard.file_part}.jsonl"
        self._lock = threading.Lock()
        _begin(root, spec, manifest)
        if shard.is_only:
            sweep_partials(root)
        for chunk in self.chunks:
            sweep_partials(chunk_path(root, chunk).parent)
        read_lines(self._journal, mend=True, skip_damaged=True)
        self._records = written_records(root, spec, self.chunks)

    def missing_chunks(self) -> list[int]:
        """Chunks of this shard that no journal names, or whose file has another size or checksum."""
        self._records = written_records(self.root, self.spec, self.chunks, among=[*self._records.values()])
        return [chunk for chunk in self.chunks if chunk not in self._records]

    def write_chunk(
        self,
        chunk: int,
        tokens: Float16,
        content_hash: list[str | None],
        errors: list[str | None],
        truncated: list[str | None] | None = None,
    ) -> None:
        """Write one chunk durably, then its journal line.

        Parameters
        ----------
        tokens : (rows of the chunk, tokens_per_image, width) float16, C order; NaN for unreadable images
        content_hash : per image, SHA-256 of its file; None if the file could not be opened
        errors : per image, None or why it could not be read
        truncated : per image, None or what is missing of its file, which was taken as far as it goes
        """
        rows, spec = self.spec.chunk_rows(chunk), self.spec
        expected = (len(rows), spec.tokens_per_image, spec.width)
        assert chunk in self.chunks
        assert tokens.shape == expected
        assert tokens.dtype == np.float16
        assert tokens.flags.c_contiguous
        if len(rows) < spec.chunk_images:  # Zarr stores the last chunk at full size, padded with the fill value
            padded = np.full((spec.chunk_images, *expected[1:]), np.nan, np.float16)
            padded[: len(rows)] = tokens
            tokens = padded
        tokens = tokens.astype("<f2", copy=False)
        crc = crc32c(tokens)
        path = chunk_path(self.root, chunk)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, tokens.data.cast("B"), crc.to_bytes(CRC_BYTES, "little"))
        for folder in (path.parent.parent, path.parents[2], path.parents[3]):
            sync_folder(folder)
        record = {
            "chunk": chunk,
            "first_image": rows.start,
            "n_images": len(rows),
            "size": spec.chunk_bytes,
            "crc32c": f"{crc:08x}",
            "content_hash": content_hash,
            "errors": {str(row): error for row, error in zip(rows, errors, strict=True) if error is not None},
        }
        if truncated is not None and any(truncated):
            record["truncated"] = {
                str(row): what for row, what in zip(rows, truncated, strict=True) if what is not None
            }
        with self._lock:
            append_line(self._journal, record)
            self._records[chunk] = record

    def counts(self) -> tuple[int, int]:
        """(written images of this shard, unreadable ones among them)."""
        records = self._records.values()
        return sum(r["n_images"] for r in records), sum(len(r["errors"]) for r in records)

    def errors(self) -> dict[int, str]:
        """Image index -> why it could not be read, for the written images of this shard."""
        return _errors(self._records.values())

    def read_again(self, image_index: int, content_hash: str | None) -> None:
        """Mark the chunk of an unreadable image as missing if the image file has changed since it was tried."""
        chunk = image_index // self.spec.chunk_images
        record = self._records.get(chunk)
        if record and record["content_hash"][image_index - record["first_image"]] != content_hash:
            chunk_path(self.root, chunk).unlink()
            del self._records[chunk]

    def finish(self) -> Header | None:
        """Complete the cache; None if chunks of other shards are missing: the last of their writers completes it.

        Waits while another writer tries to complete it: that one may have looked before our last chunk was written,
        and then neither would complete the cache.
        """
        missing = self.missing_chunks()
        assert not missing, f"finish called with {len(missing)} chunks missing"
        until = time.monotonic() + _SECONDS_TO_FINISH
        while time.monotonic() < until:
            try:
                header = complete_cache(self.root)
            except IncompleteStore:
                return None
            if header is not None:
                return header
            time.sleep(0.1)
        return None


def writer_lock(root: Path, shard: Shard) -> Path:
    """The lock file (`files.locked`) that keeps a second process from writing the same shard."""
    return root / f"writer-{shard.file_part}{LOCK_SUFFIX}"


def overlapping_writer(root: Path, shard: Shard, n_chunks: int) -> Shard | None:
    """A running writer whose chunks overlap with those of `shard` (of another number of shards), or None.

    Both would write the same files, perhaps with other last bits after the cache was completed.
    """
    for path in root.glob(f"writer-*{LOCK_SUFFIX}"):
        named = re.fullmatch(rf"writer-(\d+)-of-(\d+){re.escape(LOCK_SUFFIX)}", path.name)
        other = Shard(int(named[1]), int(named[2])) if named else shard
        if other != shard and {*other.chunks(n_chunks)} & {*shard.chunks(n_chunks)}:
            with locked(path) as is_idle:
                if not is_idle:
                    return other
    return None


def complete_cache(root: Path) -> Header | None:
    """Complete a cache: write the final image table and journal, sync all files, then mark the header complete.

    Every step can be repeated, so after a crash it is called again. None if another process is completing the cache.

    Raises
    ------
    IncompleteStore
        If chunks are missing.
    BadInput
        If no image could be read.
    DamagedStore
        If the image table is not the manifest that the cache was started with.
    """
    read_header(root, ACTIVATIONS, complete=False)  # refuse anything else before a file is written
    with locked(root / f"finish{LOCK_SUFFIX}") as is_ours:
        if not is_ours:
            return None
        header = read_header(root, ACTIVATIONS, complete=False)
        if not header.complete:
            header = _complete(root, header)
        for path in left_overs(root):
            if path.name != f"finish{LOCK_SUFFIX}":
                path.unlink(missing_ok=True)
        return header


@dataclass(frozen=True, kw_only=True)
class MergeResult(Report):
    """Stores that are complete now."""

    out: Path
    stores: tuple[Path, ...]  # `out`, or the cache of each block in it
    was_complete: bool  # nothing had to be done
    described: tuple[str, ...]  # each store in one line

    def lines(self) -> Iterator[str]:
        """A line for each store."""
        yield from self.described


def merge_cache(store: Path | str) -> MergeResult:
    """Complete an activation cache whose shards have all ended (`complete_cache`), or each block's cache in a folder.

    Raises
    ------
    IncompleteStore
        If chunks are missing.
    SpecMismatch
        If another process replaces or completes one of them at this moment.
    """
    store = Path(store)
    places = sorted(store.glob("block*.zarr")) or [store]
    was_complete = True
    for place in places:
        was_complete &= read_header(place, ACTIVATIONS, complete=False).complete  # before a lock file is made
        with claimed(place, shared=True):
            if complete_cache(place) is None:
                raise SpecMismatch(f"{place} is being completed by another process; wait until it ends")
    return MergeResult(
        out=store,
        stores=tuple(places),
        was_complete=was_complete,
        described=tuple(ActivationStore(place).line(place) for place in places),
    )


def left_overs(root: Path) -> list[Path]:
    """Files that a complete cache no longer needs; they exist if its last writer was killed just before its end."""
    journals = [path for path in journals_of(root) if path.name != "journal.jsonl"]
    return [*journals, *shard_logs(root), *root.glob(f"writer-*{LOCK_SUFFIX}"), *root.glob(f"finish{LOCK_SUFFIX}")]


def reopen(root: Path, damaged: list[int]) -> None:
    """Mark a complete cache as incomplete, without the damaged chunks, so that a writer can make them again.

    The damaged files are deleted before the header is changed: otherwise a crash between the two would leave a damaged
    chunk that the journal names as written. The summary stays in the header: it shows that the cache was complete.
    """
    for chunk in damaged:
        path = chunk_path(root, chunk)
        path.unlink(missing_ok=True)
        if path.parent.is_dir():
            sync_folder(path.parent)
    records = [
        # without its checksum, a record does not count for the new chunk, but still has the file hashes
        {**record, "crc32c": None, "crc32c_before": record.get("crc32c") or record.get("crc32c_before")}
        if record.get("chunk") in damaged
        else record
        for record in records_of(root, skip_damaged=True)
    ]
    write_lines(root / "journal.jsonl", records)
    header = read_header(root, ACTIVATIONS, complete=False)
    write_header(root, Header(**{**vars(header), "complete": False}))


def written_records(
    root: Path, spec: ActivationSpec, chunks: range, *, among: list[dict[str, Any]] | None = None
) -> dict[int, dict[str, Any]]:
    """Chunk -> the journal record that agrees with its file, for `chunks`; a chunk without one is missing.

    A chunk may have several records, if it was written again or by two overlapping writers; the last one counts.
    Damaged lines are skipped.
    """
    found: dict[int, dict[str, Any]] = {}
    crcs: dict[int, str | None] = {}
    for record in records_of(root, skip_damaged=True) if among is None else among:
        chunk = record.get("chunk")
        if not isinstance(chunk, int) or chunk not in chunks or not _is_record(record, spec):
            continue
        if chunk not in crcs:
            try:
                crcs[chunk] = file_crc(chunk_path(root, chunk), spec.chunk_bytes)
            except DamagedStore:
                crcs[chunk] = None
        if crcs[chunk] == record["crc32c"]:
            found[chunk] = record
    return found


def _is_record(record: dict[str, Any], spec: ActivationSpec) -> bool:
    """Is it a valid record of `write_chunk`? Otherwise the line may be damaged."""
    rows, hashes, errors = spec.chunk_rows(record["chunk"]), record.get("content_hash"), record.get("errors")
    named = (record.get("first_image"), record.get("n_images"), record.get("size"))
    truncated = record.get("truncated", {})
    return (
        named == (rows.start, len(rows), spec.chunk_bytes)
        and isinstance(record.get("crc32c"), str)
        and isinstance(hashes, list)
        and len(hashes) == len(rows)
        and isinstance(errors, dict)
        and {*errors} <= {str(row) for row in rows}
        and isinstance(truncated, dict)
        and {*truncated} <= {str(row) for row in rows}
        and all(isinstance(what, str) for what in truncated.values())
    )


def _complete(root: Path, header: Header) -> Header:
    spec = read_spec(header, root)
    found = written_records(root, spec, range(spec.n_chunks))
    missing = [chunk for chunk in range(spec.n_chunks) if chunk not in found]
    if missing:
        raise IncompleteStore(
            f"{root} is incomplete: {len(missing):,} of {spec.n_chunks:,} chunks are not there "
            f"(chunk {listed([str(chunk) for chunk in missing])}). Run the cyto cache extract commands that did not "
            f"end; without --shard, the command makes all that is missing"
        )
    manifest = without_outcome(read_image_table(root / "images.parquet"))
    if table_sha256(manifest) != spec.manifest_sha256:
        raise DamagedStore(
            f"{root}/images.parquet is not the table that the cache was begun with; "
            f"run the same cyto cache extract command again"
        )
    records = [found[chunk] for chunk in range(spec.n_chunks)]
    hashes = [value for record in records for value in record["content_hash"]]
    errors = _errors(records)
    if len(errors) == spec.n_images:
        raise BadInput(
            f"none of the {spec.n_images:,} images could be read ({column(manifest, 'path')[0]}: {errors[0]}); "
            f"put the files into place and run the same command again"
        )
    truncated = {int(row): what for record in records for row, what in record.get("truncated", {}).items()}
    table = with_outcome(
        manifest, hashes, *([each.get(row) for row in range(spec.n_images)] for each in (errors, truncated))
    )
    sweep_partials(root)
    write_image_table(table, root / "images.parquet")
    write_lines(root / "journal.jsonl", records)
    join_runs(root)
    sync_tree(root)
    summary = {
        "images_sha256": table_sha256(table),
        "n_readable": spec.n_images - len(errors),
        "n_unreadable": len(errors),
        **({"n_truncated": len(truncated)} if truncated else {}),
    }
    header = Header(**{**vars(header), "complete": True, "summary": summary})
    write_header(root, header)
    return header


def _errors(records: Any) -> dict[int, str]:
    errors = {int(row): error for record in records for row, error in record["errors"].items()}
    return dict(sorted(errors.items()))


def _begin(root: Path, spec: ActivationSpec, manifest: pa.Table) -> None:
    """Write the initial files, unless another writer has; every writer makes the same bytes."""
    root.mkdir(parents=True, exist_ok=True)
    begin_header(root, new_header(ACTIVATIONS, spec.to_dict()))
    table = root / "images.parquet"
    if not write_new(table, parquet_bytes(manifest)) and not _is_manifest(table, spec):
        write_image_table(manifest, table)
    (root / "tokens").mkdir(exist_ok=True)
    array = root / "tokens" / "zarr.json"
    content = _array_metadata(spec)
    if not write_new(array, content) and array.read_bytes() != content:
        write_atomic(array, content)


def _is_manifest(path: Path, spec: ActivationSpec) -> bool:
    try:
        return table_sha256(without_outcome(read_image_table(path))) == spec.manifest_sha256
    except BadInput:
        return False


def _array_metadata(spec: ActivationSpec) -> bytes:
    """`tokens/zarr.json`, as zarr writes it."""
    with tempfile.TemporaryDirectory() as folder:
        zarr.create_array(
            Path(folder),  # as a str, a TMPDIR with "::" in its name would be read as a chained URL
            shape=(spec.n_images, spec.tokens_per_image, spec.width),
            dtype="float16",
            chunks=(spec.chunk_images, spec.tokens_per_image, spec.width),
            compressors=[Crc32cCodec()],
            fill_value=float("nan"),
            dimension_names=("image", "token", "channel"),
            zarr_format=3,
        )
        return (Path(folder) / "zarr.json").read_bytes()
