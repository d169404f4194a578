"""The activation cache: the tokens of every image at one block, as raw float16 chunks that can be memory-mapped.

Format "activation cache", version 1: docs/formats.md. One writer owns a chunk; what its journal line names is on
disk, durable, with that size and checksum. The reader checks the cheap promises when it opens (complete, all files
there, exact sizes); `stores/verify.py` checks every byte.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import google_crc32c
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import zarr
from zarr.codecs import Crc32cCodec

from .errors import DamagedStore, SpecMismatch
from .files import append_line, read_lines, sweep_partials, sync_folder, sync_tree, write_atomic, write_lines
from .spec import ACTIVATIONS, Header, describe_difference, new_header, read_header, write_header
from .tables import read_image_table, readable, table_sha256, with_outcome, write_image_table

Float16 = npt.NDArray[np.float16]
CRC_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class ActivationSpec:
    """What the numbers in a cache are; hashed into its identity. Two caches are compatible if `same_tokens` agree."""

    backbone: str
    weights_sha256: str
    trained: bool  # False: seeded random weights, marked so everywhere
    block: int  # index from 0 of the transformer block whose output is stored
    n_blocks: int  # of the backbone
    transform: dict[str, Any]  # how pixels became the backbone's input
    precision: str  # of the forward pass: fp32, bf16, fp16
    token_layout: str  # order of the tokens of an image
    n_images: int
    tokens_per_image: int
    width: int
    chunk_images: int
    manifest_sha256: str  # of the manifest columns of the image table

    def to_dict(self) -> dict[str, Any]:
        """The spec as plain JSON values."""
        return dict(vars(self))

    @property
    def same_tokens(self) -> dict[str, Any]:
        """The part that must be equal for an SAE trained on one cache to fit another (DESIGN.md section 4)."""
        names = ("backbone", "weights_sha256", "block", "transform", "token_layout", "tokens_per_image", "width")
        return {name: getattr(self, name) for name in names}

    @property
    def n_chunks(self) -> int:
        """Number of chunk files, the short last one included."""
        return -(-self.n_images // self.chunk_images)

    @property
    def chunk_bytes(self) -> int:
        """Size of every chunk file, the padded last one included, with the checksum."""
        return self.chunk_images * self.tokens_per_image * self.width * 2 + CRC_BYTES

    def chunk_rows(self, chunk: int) -> range:
        """The image indices that chunk `chunk` holds."""
        return range(chunk * self.chunk_images, min((chunk + 1) * self.chunk_images, self.n_images))


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


class ActivationStore:
    """A complete activation cache, open for reading. Pickles as its path; memory: what is asked for."""

    def __init__(self, root: Path | str, *, check_files: bool = True) -> None:
        """Open the cache at `root` and check what is cheap: complete, layout, presence and size of every chunk.

        Raises
        ------
        StoreNotFound, IncompleteStore, SpecMismatch
            If there is no finished activation cache of a version that this program reads.
        DamagedStore
            If a chunk file is missing or has a wrong size.
        """
        self.root = Path(root).absolute()
        self.header = read_header(self.root, ACTIVATIONS)
        self.spec = ActivationSpec(**self.header.spec)
        check_layout(self.root, self.spec)
        if check_files:
            for chunk in range(self.spec.n_chunks):
                file_crc(chunk_path(self.root, chunk), self.spec.chunk_bytes)
        self.images = read_image_table(self.root / "images.parquet")
        if self.images.num_rows != self.spec.n_images:
            raise DamagedStore(
                f"{self.root}/images.parquet has {self.images.num_rows:,} rows, "
                f"the cache holds {self.spec.n_images:,} images"
            )
        if table_sha256(self.images) != (self.header.summary or {}).get("images_sha256"):
            raise DamagedStore(f"{self.root}/images.parquet was changed: its hash is not the one in the header")

    def __reduce__(self) -> tuple[type[Self], tuple[Path]]:
        return type(self), (self.root,)

    @property
    def identity(self) -> str:
        """SHA-256 of everything that decides the numbers."""
        return self.header.identity

    @property
    def content_sha256(self) -> str:
        """SHA-256 of the identity and of every chunk's checksum: equal only if the tokens are equal."""
        journal = (self.root / "journal.jsonl").read_bytes()
        return hashlib.sha256(self.identity.encode() + journal).hexdigest()

    def readable(self) -> npt.NDArray[np.bool_]:
        """(n_images,) bool: False where the image could not be read and the tokens are NaN."""
        return np.array(readable(self.images))

    def map_chunk(self, chunk: int) -> Float16:
        """Chunk `chunk` as a read-only memory map: (its images, tokens_per_image, width) float16.

        Nothing is read before it is touched. The map bypasses the checksum: `cyto cache verify` checks it.
        """
        spec, path = self.spec, chunk_path(self.root, chunk)
        file_crc(path, spec.chunk_bytes)
        shape = (spec.chunk_images, spec.tokens_per_image, spec.width)
        return np.memmap(path, dtype="<f2", mode="r", shape=shape)[: len(spec.chunk_rows(chunk))]

    def iter_chunks(self) -> Iterator[tuple[range, Float16]]:
        """(image indices, mapped tokens) of every chunk, in order."""
        for chunk in range(self.spec.n_chunks):
            yield self.spec.chunk_rows(chunk), self.map_chunk(chunk)

    def read_images(self, image_indices: npt.ArrayLike) -> Float16:
        """The tokens of chosen images in the given order, (len, tokens_per_image, width) float16, copied."""
        indices = np.asarray(image_indices, np.int64)
        if len(indices) and not 0 <= indices.min() <= indices.max() < self.spec.n_images:
            raise IndexError(f"image index outside 0..{self.spec.n_images - 1}")
        out = np.empty((len(indices), self.spec.tokens_per_image, self.spec.width), np.float16)
        chunks = indices // self.spec.chunk_images
        for chunk in np.unique(chunks):
            chosen = chunks == chunk
            out[chosen] = self.map_chunk(int(chunk))[indices[chosen] - chunk * self.spec.chunk_images]
        return out


def require_same_tokens(first: dict[str, Any], second: dict[str, Any], first_name: str, second_name: str) -> None:
    """Refuse to mix two kinds of tokens (`ActivationSpec.same_tokens` of each).

    Raises
    ------
    SpecMismatch
        Naming what differs.
    """
    if first != second:
        difference = describe_difference(first, second)
        raise SpecMismatch(
            f"{first_name} and {second_name} do not hold the same kind of tokens: {difference}. "
            f"Compare: cyto sae info, cyto cache info"
        )


def journal_of(root: Path) -> list[dict[str, Any]]:
    """The journal of a finished cache, or of one that is being written."""
    return read_lines(root / "journal.jsonl") or read_lines(root / "journal-0-of-1.jsonl")


def chunk_path(root: Path, chunk: int) -> Path:
    """The file of chunk `chunk` (Zarr's default chunk key, split on axis 0 only)."""
    return root / "tokens" / "c" / str(chunk) / "0" / "0"


def file_crc(path: Path, size: int) -> str:
    """The checksum that a chunk file carries at its end (hex), after checking presence and size.

    Raises
    ------
    DamagedStore
        If the file is missing or its size is not `size`.
    """
    try:
        found = path.stat().st_size
        if found == size:
            with path.open("rb") as file:
                file.seek(size - CRC_BYTES)
                return f"{int.from_bytes(file.read(CRC_BYTES), 'little'):08x}"
    except FileNotFoundError:
        raise DamagedStore(f"{path} is missing. cyto cache verify lists every bad chunk") from None
    raise DamagedStore(f"{path} has {found:,} bytes, expected {size:,}. cyto cache verify lists every bad chunk")


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


def check_layout(root: Path, spec: ActivationSpec) -> None:
    """Refuse an array that a memory map would misread: other shape, type, byte order, codecs or chunks.

    Raises
    ------
    DamagedStore
        If it is so, or if there is no array at all.
    """
    wrong = f"{root}/tokens does not have the layout that its header states; make the cache again"
    try:
        array = zarr.open_array(os.fspath(root / "tokens"), mode="r")
    except (OSError, ValueError, KeyError, TypeError) as error:  # what zarr raises for metadata it cannot read
        raise DamagedStore(f"{wrong} ({error})") from None
    codecs = [codec.to_dict() for codec in array.metadata.codecs]  # type: ignore[union-attr]
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    fits = (
        array.shape == (spec.n_images, spec.tokens_per_image, spec.width)
        and array.chunks == (spec.chunk_images, spec.tokens_per_image, spec.width)
        and array.dtype == np.float16
        and codecs[0] == little
        and [codec["name"] for codec in codecs[1:]] == ["crc32c"]
    )
    if not fits:
        raise DamagedStore(wrong)
