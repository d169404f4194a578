"""Does a store keep its own promises? Every byte is read; every broken promise is named, by chunk and by image."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa

from .activation_store import CRC_BYTES, ActivationSpec, check_layout, chunk_path
from .errors import BadInput, CytoError, DamagedStore
from .files import read_lines
from .latent_store import LatentStore
from .spec import ACTIVATIONS, read_header
from .tables import column, listed, read_image_table, table_sha256

_FINITE_BELOW = 0x7C00  # float16 bits without the sign: exponents below all-ones


@dataclass(frozen=True)
class Problem:
    """One broken promise: the chunk it lies in (None: the whole store), its images, and what is wrong."""

    chunk: int | None
    images: str
    what: str

    def __str__(self) -> str:
        place = "store" if self.chunk is None else f"chunk {self.chunk} (images {self.images})"
        return f"{place}: {self.what}"


def verify_activations(root: Path) -> Iterator[Problem | None]:
    """Check every byte of an activation cache; yields None for each chunk that is whole, so progress can be shown.

    Found are: missing, empty, truncated or too long chunk files; flipped bits; chunks that were swapped or do not
    fit the journal; NaN or infinity in a readable image; a changed image table; a wrong layout.
    """
    header = read_header(root, ACTIVATIONS)
    spec, summary = ActivationSpec(**header.spec), header.summary or {}
    try:
        check_layout(root, spec)
    except DamagedStore as error:
        yield Problem(None, "all", str(error))

    table = None  # stays so if it is damaged: then there is nothing to compare the journal with
    try:
        images = read_image_table(root / "images.parquet")
        if table_sha256(images) == summary.get("images_sha256"):
            table = images
        else:
            yield Problem(None, "all", "images.parquet was changed: its hash is not the one in the header")
    except BadInput as error:
        yield Problem(None, "all", str(error))

    journal = root / "journal.jsonl"
    try:
        read_lines(journal)
    except DamagedStore as error:
        yield Problem(None, "all", str(error))
    lines = read_lines(journal, skip_damaged=True)
    records = {line["chunk"]: line for line in lines if isinstance(line.get("chunk"), int)}
    if [line.get("chunk") for line in lines] != [*range(spec.n_chunks)]:
        yield Problem(
            None,
            "all",
            f"the journal names {len(records):,} chunks in {len(lines):,} lines, expected {spec.n_chunks:,} in order",
        )

    for chunk in range(spec.n_chunks):
        rows = spec.chunk_rows(chunk)
        what = _check_chunk(root, spec, chunk, records, table)
        yield Problem(chunk, f"{rows.start:,} to {rows.stop - 1:,}", what) if what else None


def verify_latents(root: Path, *, block_images: int = 256) -> Iterator[Problem | None]:
    """Check every chunk and every index of a latent store; yields None for each block of images that is whole."""
    try:
        store = LatentStore(root)
    except (DamagedStore, BadInput) as error:
        yield Problem(None, "all", str(error))
        return
    is_readable = store.readable()
    for block, start in enumerate(range(0, store.spec.n_images, block_images)):
        stop = min(start + block_images, store.spec.n_images)
        try:
            rows = store.read_images(start, stop)
            starts = rows.indptr[:: store.spec.tokens_per_image]
            if (starts + store.image_indptr[start] != store.image_indptr[start : stop + 1]).any():
                raise DamagedStore("image_indptr disagrees with indptr")
            if np.diff(starts)[~is_readable[start:stop]].any():
                raise DamagedStore("an unreadable image has latents")
            yield None
        except CytoError as error:
            yield Problem(block, f"{start:,} to {stop - 1:,}", str(error))


def _check_chunk(
    root: Path, spec: ActivationSpec, chunk: int, records: dict[int, dict[str, Any]], table: pa.Table | None
) -> str | None:
    """What is wrong with one chunk, or None. Memory: one chunk."""
    path = chunk_path(root, chunk)
    try:
        raw = np.fromfile(path, dtype=np.uint8)
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"cannot be read: {error}"
    if len(raw) != spec.chunk_bytes:
        return f"{len(raw):,} bytes, expected {spec.chunk_bytes:,}"
    body, stored = raw[:-CRC_BYTES], int.from_bytes(raw[-CRC_BYTES:].tobytes(), "little")
    crc = google_crc32c.value(body)
    if crc != stored:
        return "fails its checksum: bits have changed"
    record, rows = records.get(chunk), spec.chunk_rows(chunk)
    if record is None:
        return "not named in the journal"
    if record.get("crc32c") != f"{crc:08x}":
        owners = [str(other) for other, line in records.items() if line.get("crc32c") == f"{crc:08x}"]
        found = f"it is chunk {listed(owners)}" if owners else "written by another run"
        return f"is not the chunk that the journal names: {found}"
    if (record.get("first_image"), record.get("n_images"), record.get("size")) != (rows.start, len(rows), len(raw)):
        return "the journal gives it other images, or another size"
    errors, hashes = record.get("errors"), record.get("content_hash")
    if not isinstance(errors, dict) or not isinstance(hashes, list) or len(hashes) != len(rows):
        return "the journal does not say what became of its images"
    ids: list[str | None] = ["?"] * len(rows)
    if table is not None:
        part = table.slice(rows.start, len(rows))
        ids = column(part, "image_id")
        named_errors = zip(rows, column(part, "error"), strict=True)
        if errors != {str(row): error for row, error in named_errors if error is not None}:
            return "the journal and images.parquet disagree about which images could be read"
        if hashes != column(part, "content_hash"):
            return "the journal and images.parquet disagree about the hashes of its images"
    bits = body.view("<u2").reshape(spec.chunk_images, -1) & np.uint16(0x7FFF)
    for position, row in enumerate(rows):
        if str(row) not in errors and (bits[position] >= _FINITE_BELOW).any():
            return f"NaN or infinity in readable image {row:,} ({ids[position]})"
        if str(row) in errors and (bits[position] < _FINITE_BELOW).any():
            return f"numbers instead of NaN in unreadable image {row:,} ({ids[position]})"
    return None
