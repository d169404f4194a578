"""What test_store_suite.py and other tests share."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import scipy.sparse as ss

from stores.activation_spec import ActivationSpec
from stores.activation_writer import ActivationWriter
from stores.latent_spec import LatentSpec
from stores.latent_writer import LatentWriter
from stores.tables import image_table, table_sha256, with_outcome

N_IMAGES, N_TOKENS, WIDTH, N_LATENTS = 10, 3, 4, 16


UNREADABLE = 5


def manifest() -> pa.Table:
    """Ten images of two patients."""
    paths: list[str | None] = [f"cells/{n}.png" for n in range(N_IMAGES)]
    patients: list[str | None] = ["P1" if n < 6 else "P2" for n in range(N_IMAGES)]
    return image_table({"path": paths, "patient": patients}, source="here", dataset="tiny")


def outcome(unreadable: tuple[int, ...] = (UNREADABLE,)) -> pa.Table:
    """The image table after reading: image 5 was torn."""
    errors = ["file ends early" if n in unreadable else None for n in range(N_IMAGES)]
    return with_outcome(manifest(), [f"{n:064x}" for n in range(N_IMAGES)], errors)


def cache_spec(**changes: Any) -> ActivationSpec:
    """Three chunks of 4, 4 and 2 images."""
    settings = {
        "backbone": "random-vit-tiny",
        "weights_sha256": "ab" * 32,
        "trained": False,
        "block": 2,
        "n_blocks": 4,
        "transform": {"size": 224, "mean": [0.5, 0.5, 0.5]},
        "precision": "fp32",
        "token_layout": "cls, patches",
        "n_images": N_IMAGES,
        "tokens_per_image": N_TOKENS,
        "width": WIDTH,
        "chunk_images": 4,
        "manifest_sha256": table_sha256(manifest()),
    }
    return ActivationSpec(**{**settings, **changes})


def cache_tokens() -> npt.NDArray[np.float16]:
    tokens = np.random.default_rng(1).normal(size=(N_IMAGES, N_TOKENS, WIDTH)).astype(np.float16)
    tokens[UNREADABLE] = np.nan
    return tokens


def write_cache(root: Path, n_steps: int | None = None) -> None:
    """Begin or continue an activation cache; None: to its end, else so many chunks more, then walk away."""
    writer, tokens, table = ActivationWriter(root, cache_spec(), manifest()), cache_tokens(), outcome()
    hashes, errors = table["content_hash"].to_pylist(), table["error"].to_pylist()
    for chunk in writer.missing_chunks()[:n_steps]:
        rows = writer.spec.chunk_rows(chunk)
        some = slice(rows.start, rows.stop)
        writer.write_chunk(chunk, tokens[some], hashes[some], errors[some])
    if n_steps is None:
        writer.finish()


def latent_spec(images: pa.Table | None = None) -> LatentSpec:
    return LatentSpec(
        sae_sha256="cd" * 32,
        cache_sha256="ef" * 32,
        cache=cache_spec().to_dict(),
        images_sha256=table_sha256(images or outcome()),
        n_images=N_IMAGES,
        tokens_per_image=N_TOKENS,
        n_latents=N_LATENTS,
        precision="fp32",
        value_bits=10,
        min_activation=0.0,
    )


def latent_rows() -> ss.csr_matrix:
    """(tokens, latents); the unreadable image and some other tokens have none."""
    rows = ss.random_array((N_IMAGES * N_TOKENS, N_LATENTS), density=0.2, rng=np.random.default_rng(2), dtype="f4")
    rows = ss.lil_array(rows)
    rows[UNREADABLE * N_TOKENS : (UNREADABLE + 1) * N_TOKENS] = 0
    matrix = ss.csr_matrix(rows)
    matrix.sort_indices()
    return matrix


def write_latents(root: Path, n_steps: int | None = None, *, images: pa.Table | None = None) -> None:
    """Begin or continue a latent store, two images a commit; n: so many commits more, then walk away amid a block."""
    writer, rows = LatentWriter(root, latent_spec(images), images or outcome()), latent_rows()
    n_committed = 0
    while writer.n_images < N_IMAGES:
        stop = writer.n_images + 2
        some = rows[writer.n_images * N_TOKENS : stop * N_TOKENS]
        writer.append_tokens(some.indices, some.data, np.diff(some.indptr))
        if n_committed == n_steps:
            return
        writer.commit(stop)
        n_committed += 1
    if n_steps is None:
        writer.finish()


def contents(root: Path) -> dict[str, bytes]:
    """Every file below `root`, apart from the run log."""
    files = (path for path in root.rglob("*") if path.is_file() and path.name != "runs.jsonl")
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}
