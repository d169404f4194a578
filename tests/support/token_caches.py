"""What test_batches.py and other tests share."""

import hashlib
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stores import (
    ActivationSpec,
    ActivationWriter,
    TokenStream,
)
from stores.tables import image_table, table_sha256

Tag = tuple[int, ...]  # (cache, image, token)


def write_cache(
    root: Path,
    tokens: npt.NDArray[np.float16],
    *,
    unreadable: tuple[int, ...] = (),
    chunk_images: int = 4,
    patients: list[str | None] | None = None,
    labels: list[str | None] | None = None,
    n_chunks: int | None = None,
    **changes: Any,
) -> Path:
    """An activation cache that holds these very tokens, (N, T, D) float16, without images or a backbone.

    n_chunks : stop after so many, as an interrupted extraction does; changes : of single fields of the spec
    """
    n_images, tokens_per_image, width = tokens.shape
    names: list[str | None] = [f"{i:03d}.png" for i in range(n_images)]
    columns = {"path": names} | ({"patient": patients} if patients else {}) | ({"label": labels} if labels else {})
    table = image_table(columns, source="test", dataset="synthetic")
    settings: dict[str, Any] = {
        "backbone": "none: synthetic tokens",
        "weights_sha256": "0" * 64,
        "trained": False,
        "block": 10,
        "n_blocks": 12,
        "transform": {"size": 224},
        "precision": "fp32",
        "token_layout": "cls, patches",
    }
    spec = ActivationSpec(
        **(settings | changes),
        n_images=n_images,
        tokens_per_image=tokens_per_image,
        width=width,
        chunk_images=chunk_images,
        manifest_sha256=table_sha256(table),
    )
    writer = ActivationWriter(root, spec, table)
    for chunk in range(spec.n_chunks if n_chunks is None else n_chunks):
        rows = spec.chunk_rows(chunk)
        block = tokens[rows.start : rows.stop].copy()
        block[[row - rows.start for row in unreadable if row in rows]] = np.nan
        errors = ["not an image" if row in unreadable else None for row in rows]
        hashes = [hashlib.sha256(tokens[row].tobytes()).hexdigest() for row in rows]  # other tokens, another image
        writer.write_chunk(chunk, block, [None if e else h for e, h in zip(errors, hashes, strict=True)], errors)
    if n_chunks is None:
        writer.finish()
    return root


def tagged(cache: int, n_images: int, tokens_per_image: int) -> npt.NDArray[np.float16]:
    """Tokens of width 3 whose values are (cache, image, token): whole numbers, exact in float16."""
    image, token = np.meshgrid(np.arange(n_images), np.arange(tokens_per_image), indexing="ij")
    return np.stack([np.full_like(image, cache), image, token], axis=-1).astype(np.float16)


def taken(stream: TokenStream, n_tokens: int, *, batch_tokens: int = 7, position: int = 0) -> list[Tag]:
    """The tags of the first `n_tokens` tokens from `position` on, through batches of `batch_tokens`."""
    n_batches = -(-n_tokens // batch_tokens)
    batches = list(islice(stream.batches(batch_tokens, position=position), n_batches))
    assert {batch.shape for batch in batches} == {(batch_tokens, 3)}
    assert {batch.dtype for batch in batches} == {np.dtype(np.float16)}
    return [tuple(int(value) for value in token) for batch in batches for token in batch][:n_tokens]


def all_tags(cache: int, images: set[int], tokens: range) -> list[Tag]:
    return sorted((cache, image, token) for image in images for token in tokens)
