"""Writes an activation cache: each chunk durable before its journal line, the header complete last of all.

Format "activation cache", version 1: docs/formats.md. One writer owns a chunk; what its journal line names is on
disk, durable, with that size and checksum.
"""

import os
from pathlib import Path

import google_crc32c
import numpy as np
import pyarrow as pa
import zarr
from zarr.codecs import Crc32cCodec

from .activation_store import CRC_BYTES, ActivationSpec, Float16, chunk_path, file_crc
from .errors import DamagedStore
from .files import append_line, read_lines, sweep_partials, sync_folder, sync_tree, write_atomic, write_lines
from .spec import ACTIVATIONS, Header, new_header, write_header
from .tables import table_sha256, with_outcome, write_image_table


class ActivationWriter:
    """Writes the chunks of one cache, in any order, and completes it.

    Opening it on a half-written cache with the same spec continues: `missing_chunks` tells what is left to do.
    Memory: one chunk, given by the caller.
    """

    def __init__(self, root: Path, spec: ActivationSpec, manifest: pa.Table) -> None:
        self.root, self.spec, self._manifest = root, spec, manifest
        self._journal = root / "journal-0-of-1.jsonl"
        if not (root / "tokens" / "zarr.json").exists():
            _create(root, spec, manifest)
        sweep_partials(root)
        # journal.jsonl is there if a crash came between `finish` joining the journals and marking the cache complete
        records = [*read_lines(root / "journal.jsonl"), *read_lines(self._journal, mend=True)]
        self._records = {record["chunk"]: record for record in records}

    def missing_chunks(self) -> list[int]:
        """Chunks that the journal does not name, or whose file has not the size and checksum it names."""
        return [chunk for chunk in range(self.spec.n_chunks) if not self._is_written(chunk)]

    def write_chunk(
        self, chunk: int, tokens: Float16, content_hash: list[str | None], errors: list[str | None]
    ) -> None:
        """Write one chunk durably, then its journal line.

        Parameters
        ----------
        tokens : (rows of the chunk, tokens_per_image, width) float16, C order; NaN blocks for unreadable images
        content_hash : per image, SHA-256 of its file; None if the file could not be opened
        errors : per image, None or why it could not be read
        """
        rows, spec = self.spec.chunk_rows(chunk), self.spec
        expected = (len(rows), spec.tokens_per_image, spec.width)
        assert tokens.shape == expected
        assert tokens.dtype == np.float16
        assert tokens.flags.c_contiguous
        if len(rows) < spec.chunk_images:  # Zarr stores the last chunk at full size, padded with the fill value
            padded = np.full((spec.chunk_images, *expected[1:]), np.nan, np.float16)
            padded[: len(rows)] = tokens
            tokens = padded
        tokens = tokens.astype("<f2", copy=False)
        crc = google_crc32c.value(tokens)  # takes arrays, refuses memoryviews
        path = chunk_path(self.root, chunk)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, tokens.data.cast("B"), crc.to_bytes(CRC_BYTES, "little"))
        sync_folder(path.parent.parent)
        record = {
            "chunk": chunk,
            "first_image": rows.start,
            "n_images": len(rows),
            "size": spec.chunk_bytes,
            "crc32c": f"{crc:08x}",
            "content_hash": content_hash,
            "errors": {str(row): error for row, error in zip(rows, errors, strict=True) if error is not None},
        }
        append_line(self._journal, record)
        self._records[chunk] = record

    def counts(self) -> tuple[int, int]:
        """(images written so far, unreadable ones among them)."""
        records = self._records.values()
        return sum(r["n_images"] for r in records), sum(len(r["errors"]) for r in records)

    def errors(self) -> dict[int, str]:
        """Image index -> why it could not be read, of the images written so far."""
        errors = {int(row): error for record in self._records.values() for row, error in record["errors"].items()}
        return dict(sorted(errors.items()))

    def read_again(self, image_index: int, content_hash: str | None) -> None:
        """Forget the chunk of an unreadable image if its file is another one now than when it was tried."""
        chunk = image_index // self.spec.chunk_images
        record = self._records.get(chunk)
        if record and record["content_hash"][image_index - record["first_image"]] != content_hash:
            del self._records[chunk]

    def finish(self) -> Header:
        """Write the final image table and journal, sync everything, and only then mark the cache complete."""
        missing = self.missing_chunks()
        assert not missing, f"finish called with {len(missing)} chunks missing"
        records = [self._records[chunk] for chunk in range(self.spec.n_chunks)]
        hashes = [value for record in records for value in record["content_hash"]]
        errors = self.errors()
        table = with_outcome(self._manifest, hashes, [errors.get(row) for row in range(self.spec.n_images)])
        write_image_table(table, self.root / "images.parquet")
        write_lines(self.root / "journal.jsonl", records)
        self._journal.unlink(missing_ok=True)
        sync_tree(self.root)
        summary = {
            "images_sha256": table_sha256(table),
            "n_readable": self.spec.n_images - len(errors),
            "n_unreadable": len(errors),
        }
        header = new_header(ACTIVATIONS, self.spec.to_dict())
        header = Header(**{**vars(header), "complete": True, "summary": summary})
        write_header(self.root, header)
        return header

    def _is_written(self, chunk: int) -> bool:
        record = self._records.get(chunk)
        if record is None:
            return False
        try:
            return bool(file_crc(chunk_path(self.root, chunk), self.spec.chunk_bytes) == record["crc32c"])
        except DamagedStore:
            return False


def _create(root: Path, spec: ActivationSpec, manifest: pa.Table) -> None:
    root.mkdir(parents=True, exist_ok=True)
    write_header(root, new_header(ACTIVATIONS, spec.to_dict()))
    write_image_table(manifest, root / "images.parquet")
    zarr.create_array(
        os.fspath(root),
        name="tokens",
        shape=(spec.n_images, spec.tokens_per_image, spec.width),
        dtype="float16",
        chunks=(spec.chunk_images, spec.tokens_per_image, spec.width),
        compressors=[Crc32cCodec()],
        fill_value=float("nan"),
        dimension_names=("image", "token", "channel"),
        zarr_format=3,
    )
