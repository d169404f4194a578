"""The activation cache: the tokens of every image at one block, as raw float16 chunks that can be memory-mapped.

Format "activation cache", version 1: docs/formats.md. Here are its settings and its reader, which checks the cheap
promises when it opens (complete, all files there, exact sizes); `stores/activation_writer.py` writes it,
`stores/verify.py` checks every byte.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import zarr

from .errors import DamagedStore, SpecMismatch
from .files import read_lines
from .spec import ACTIVATIONS, describe_difference, read_header
from .tables import read_image_table, readable, table_sha256

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


def journals_of(root: Path) -> list[Path]:
    """The journal of a finished cache, and then those of its writers, which are newer; as far as they are there."""
    return sorted(root.glob("journal*.jsonl"), key=lambda path: (path.name != "journal.jsonl", path.name))


def records_of(root: Path, *, skip_damaged: bool = False) -> list[dict[str, Any]]:
    """All journal records of a cache, complete or not; a chunk may have several while it is written.

    Raises
    ------
    DamagedStore
        If a line is not a record (and not `skip_damaged`).
    """
    return [record for path in journals_of(root) for record in read_lines(path, skip_damaged=skip_damaged)]


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
