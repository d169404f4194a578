"""Writes a latent store: rows of images in order, each commit durable before its journal line.

Format "latent store", version 1: docs/formats.md.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import zarr
from zarr.codecs import ZstdCodec

from .csr import CsrCommit, CsrReader, CsrWriter, index_dtype, tail_files
from .errors import BadInput, DamagedStore
from .files import append_line, read_lines, sha256_file, sweep_partials, sync_tree, write_new
from .latent_spec import LatentSpec, part_folder, shard_images
from .runlog import join_runs
from .shards import ONE_WRITER, Shard
from .spec import LATENTS, Header, begin_header, new_header, write_header
from .tables import parquet_bytes, read_image_table, table_sha256, write_image_table


class LatentWriter:
    """Appends the latents of images in order; committed rows survive a crash.

    One of several writers (`Shard`) writes its rows into a folder of its own; `latent_shards.py` joins them.
    """

    def __init__(self, root: Path, spec: LatentSpec, images: pa.Table, shard: Shard = ONE_WRITER) -> None:
        """Create the store, or continue it after its last commit (at image `n_images`).

        Raises
        ------
        DamagedStore
            If committed rows are missing or damaged.
        """
        self.root, self.spec, self.images = root, spec, shard_images(spec, shard)
        self._folder = root if shard.is_only else part_folder(root, shard)
        self._journal, rows = self._folder / "journal.jsonl", self._folder / "X"
        _begin(root, spec, images)
        self._folder.mkdir(exist_ok=True)
        records = read_lines(self._journal, mend=True)
        sweep_partials(self._folder)
        last = records[-1] if records else {}
        if not records:
            _remove_rows(rows)
        self.n_images: int = last.get("n_images", self.images.start)
        self.n_dropped: int = last.get("n_dropped", 0)  # values that were pruned
        try:
            at = CsrCommit.from_json(records) if records else None
        except DamagedStore as error:
            raise DamagedStore(
                f"{self._journal}: {error}, so the job cannot go on from it; begin again with --overwrite"
            ) from None
        self._rows = CsrWriter(rows, n_columns=spec.n_latents, indices=index_dtype(spec.n_latents), at=at)

    @property
    def nnz(self) -> int:
        """Nonzeros appended so far."""
        return self._rows.nnz

    def append_tokens(
        self,
        indices: npt.NDArray[Any],
        values: npt.NDArray[np.float32],
        row_lengths: npt.NDArray[Any],
        *,
        n_dropped: int = 0,
    ) -> None:
        """Append the rows of some tokens, in order; indices strictly increasing in each row, values rounded.

        n_dropped : values of these tokens that were below `min_activation`
        """
        self._rows.append(indices, values, row_lengths)
        self.n_dropped += n_dropped

    def commit(self, n_images: int) -> None:
        """Make the rows of the images before image `n_images` durable and record it."""
        assert self._rows.n_rows == (n_images - self.images.start) * self.spec.tokens_per_image
        self.n_images = n_images
        self._record(self._rows.commit())

    def finish(self) -> Header | None:
        """Write the shape of the rows; for the whole store also the row starts of the images, and mark it complete.

        None for a shard: its part is finished, but not the store.
        """
        assert self.n_images == self.images.stop
        was_finished = self._rows.is_finished
        commit = self._rows.finish()
        if not was_finished:
            self._record(commit)
        if self._folder != self.root:
            self._sync_and_tidy()
            return None
        reader = CsrReader(self.root / "X", shape=(self.spec.n_rows, self.spec.n_latents))
        starts = reader.row_starts(0, self.spec.n_rows + 1, self.spec.tokens_per_image)
        array = zarr.create_array(
            self.root,
            name="image_indptr",
            shape=starts.shape,
            dtype="int64",
            chunks=(max(1, len(starts)),),
            compressors=[ZstdCodec(level=0, checksum=True)],
            fill_value=-1,
            zarr_format=3,
            overwrite=True,
        )
        array[:] = starts
        join_runs(self.root)
        self._sync_and_tidy()
        header = new_header(LATENTS, self.spec.to_dict())
        summary = {"nnz": self.nnz, "n_dropped": self.n_dropped, "journal_sha256": sha256_file(self._journal)}
        header = Header(**{**vars(header), "complete": True, "summary": summary})
        write_header(self.root, header)
        return header

    def close(self) -> None:
        """End the threads; rows that were not committed are lost."""
        self._rows.close()

    def _sync_and_tidy(self) -> None:
        sync_tree(self._folder)
        for path in tail_files(self._folder / "X"):  # no valid record names one any more
            path.unlink()

    def _record(self, commit: CsrCommit) -> None:
        append_line(self._journal, {"n_images": self.n_images, "n_dropped": self.n_dropped, **commit.to_json()})


def _begin(root: Path, spec: LatentSpec, images: pa.Table) -> None:
    """Write the initial files, unless another writer has; every writer makes the same bytes."""
    root.mkdir(parents=True, exist_ok=True)
    begin_header(root, new_header(LATENTS, spec.to_dict()))
    table = root / "images.parquet"
    if not write_new(table, parquet_bytes(images)) and not _is_table(table, spec):
        write_image_table(images, table)


def _is_table(path: Path, spec: LatentSpec) -> bool:
    try:
        return table_sha256(read_image_table(path)) == spec.images_sha256
    except BadInput:
        return False


def _remove_rows(path: Path) -> None:
    """Remove rows that a killed writer left before its first commit (our own folder, never a link)."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
