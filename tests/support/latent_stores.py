"""What test_barcodes.py and other tests share."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from distributed import Client, LocalCluster

from stores import (
    LatentSpec,
    LatentWriter,
)
from stores.tables import image_table, table_sha256, with_outcome

Float = npt.NDArray[np.float32]


Row = tuple[str | None, str | None, bool]  # patient, disease, is it readable?


def write_latents(
    root: Path,
    dense: npt.NDArray[Any],
    rows: Sequence[Row],
    *,
    value_bits: int = 10,
    min_activation: float = 0.0,
    dataset: str = "drawn",
    sae_sha256: str = "1" * 64,
    cache_sha256: str = "2" * 64,
    further: Mapping[str, Sequence[str | None]] | None = None,
    precision: str = "fp32",
    hashes: list[str] | None = None,
    **cache: Any,
) -> Path:
    """A latent store that holds these very latents, (n_images, T, n_latents) float32, without cache or SAE."""
    n_images, n_tokens, n_latents = dense.shape
    columns: dict[str, list[str | None]] = {
        "path": [f"{i:04d}.png" for i in range(n_images)],
        "label": [f"type {i % 3}" for i in range(n_images)],
        "patient": [patient for patient, _, _ in rows],
        "disease": [disease for _, disease, _ in rows],
        "stain": ["pale" for _ in rows],
        **{name: list(values) for name, values in (further or {}).items()},
    }
    errors = [None if ok else "file ends early" for _, _, ok in rows]
    known = hashes or ["0" * 64] * n_images
    content = [None if error else name for name, error in zip(known, errors, strict=True)]
    images = with_outcome(image_table(columns, source="test", dataset=dataset), content, errors)
    spec = LatentSpec(
        sae_sha256=sae_sha256,
        cache_sha256=cache_sha256,
        cache={"backbone": "none", "trained": False, "block": 10, **cache},
        images_sha256=table_sha256(images),
        n_images=n_images,
        tokens_per_image=n_tokens,
        n_latents=n_latents,
        precision=precision,
        value_bits=value_bits,
        min_activation=min_activation,
    )
    writer = LatentWriter(root, spec, images)
    flat = dense.reshape(-1, n_latents)
    writer.append_tokens(np.nonzero(flat)[1], flat[flat != 0], (flat != 0).sum(axis=1))
    writer.commit(n_images)
    writer.finish()
    return root


@contextmanager
def local_client(workers: int, threads: int, *, processes: bool = False) -> Iterator[Client]:
    with (
        LocalCluster(
            n_workers=workers,
            threads_per_worker=threads,
            processes=processes,
            dashboard_address="127.0.0.1:0",  # None would still ask for port 8787
            scheduler_kwargs={"dashboard": False},
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


def random_latents(seed: int, shape: tuple[int, int, int], rows: list[Row], *, share: float = 0.3) -> Float:
    """Sparse positive values of all sizes, some exactly at 0.2 as float32; nothing where an image is unreadable."""
    rng = np.random.default_rng(seed)
    dense = np.where(rng.random(shape) < share, rng.lognormal(-1.5, 1.5, shape), 0).astype(np.float32)
    dense[(dense != 0) & (rng.random(shape) < 0.2)] = np.float32(0.2)
    dense[[not ok for _, _, ok in rows]] = 0
    return dense
