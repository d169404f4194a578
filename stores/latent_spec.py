"""The settings of a latent store, and which images and folder each of its writers has.

Format "latent store", version 1: docs/formats.md.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .shards import Shard
from .spec import Header, stated


@dataclass(frozen=True, kw_only=True)
class LatentSpec:
    """All settings that decide the numbers in a latent store; its identity is their hash."""

    sae_sha256: str  # of sae.safetensors
    cache_sha256: str  # of the activation cache's identity and chunk checksums
    cache: dict[str, Any]  # the spec of the cache
    images_sha256: str  # of the image table, with the outcome columns
    n_images: int
    tokens_per_image: int
    n_latents: int
    precision: str  # of the encoder product
    value_bits: int  # mantissa bits kept: 10 or 23
    min_activation: float  # smaller values were dropped; 0: none

    def to_dict(self) -> dict[str, Any]:
        """The spec as plain JSON values."""
        return dict(vars(self))

    @property
    def n_rows(self) -> int:
        """Number of CSR rows: one per token."""
        return self.n_images * self.tokens_per_image


def read_latent_spec(header: Header, root: Path) -> LatentSpec:
    """The spec in a header. Raises DamagedStore if it has other fields, other types, or impossible sizes."""
    return stated(LatentSpec, header.spec, root, positive=("n_images", "tokens_per_image", "n_latents"))


def part_folder(root: Path, shard: Shard) -> Path:
    """The folder of one of several writers, until the parts are joined."""
    return root / f"part-{shard.file_part}"


def shard_images(spec: LatentSpec, shard: Shard) -> range:
    """The images of a shard: consecutive whole chunks of the cache."""
    if shard.is_only:
        return range(spec.n_images)
    size = int(spec.cache["chunk_images"])
    chunks = shard.chunks(-(-spec.n_images // size))
    return range(min(chunks.start * size, spec.n_images), min(chunks.stop * size, spec.n_images))
