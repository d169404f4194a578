"""Barcodes of invented cells for tests of searching: types share latents, and so do datasets."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from barcode_writer import BarcodeWriter
from scipy.sparse import csr_matrix

from stores import BARCODES, new_header, write_header
from stores.spec import Header

Array = npt.NDArray[Any]


def write_search_barcodes(
    root: Path, maxima: Array, means: Array, counts: Array, images: pd.DataFrame, *, latents: str = "l" * 64
) -> Path:
    """A barcodes folder with image.zarr alone, as `cyto barcode` lays it out: (images, latents) each."""
    root.mkdir(parents=True)
    writer = BarcodeWriter(root / "image.zarr", n_latents=counts.shape[1], layers=("mean", "max"))
    found = {"X": counts, "mean": means, "max": maxima}
    writer.append({name: csr_matrix(np.asarray(values, np.float32)) for name, values in found.items()})
    var = pd.DataFrame({"latent": range(counts.shape[1]), "n_active_images": (maxima > 0).sum(0)})
    var.index = pd.Index([str(latent) for latent in range(counts.shape[1])], name="name")
    writer.finish(obs=images, var=var, uns={"cyto": {"tau": 0.2}})
    spec = {"latents": latents, "tau": 0.2, "token_set": "all", "normalize": "images"}
    header = new_header(BARCODES, spec)
    write_header(root, Header(**{**vars(header), "complete": True, "summary": {}}))
    return root


def draw_cells(
    *, n_images: int = 240, n_latents: int = 80, n_types: int = 4, seed: int = 0, signal: float = 3.0
) -> tuple[Array, Array, Array, pd.DataFrame]:
    """(maxima, means, counts, image table): latents 5 t to 5 t + 4 are those of type t; the rest is chance.

    Two datasets of six patients each; the last 10 latents are of a dataset (stain), in all its images.
    """
    rng = np.random.default_rng(seed)
    kind, patient = rng.integers(n_types, size=n_images), rng.integers(12, size=n_images)
    dataset = patient // 6
    present = rng.random((n_images, n_latents)) < 0.15
    own = (np.arange(n_latents) // 5 == kind[:, None]) & (np.arange(n_latents) < 5 * n_types)
    stain = (np.arange(n_latents) >= n_latents - 10) & ((np.arange(n_latents) % 2) == dataset[:, None])
    present |= (own & (rng.random(present.shape) < 0.95) & (signal > 0)) | stain
    level = rng.gamma(2, 0.3, present.shape) + signal * own
    maxima = np.where(present, level, 0).astype(np.float32)
    counts = np.where(present, rng.integers(0, 30, present.shape) + (10 * signal * own), 0).astype(np.float32)
    means = (maxima * rng.uniform(0.1, 0.9, present.shape)).astype(np.float32)
    images = pd.DataFrame(
        {
            "patient": [f"P{p:02d}" for p in patient],
            "dataset": [f"set{d}" for d in dataset],
            "label": [f"{'ab'[d]}{t}" for d, t in zip(dataset, kind, strict=True)],
            "label_common": [f"type {t}" for t in kind],
            "disease": [f"D{p % 3}" for p in patient],
            "status": "ok",
            "content_hash": [f"{number:064x}" for number in range(n_images)],
        },
        index=pd.Index([f"i{number:03d}" for number in range(n_images)], name="image_id"),
    )
    return maxima, means, counts, images
