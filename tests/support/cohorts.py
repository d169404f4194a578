"""What test_probe.py and other tests share."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from barcode_writer import BarcodeWriter
from scipy.sparse import csr_matrix
from threadpoolctl import threadpool_limits

from cytosae.probe import (
    ProbeConfig,
)
from stores import BARCODES, new_header, write_header
from stores.spec import Header

Array = npt.NDArray[Any]


N_LATENTS = 40


THRESHOLDS = (0.0, 0.01, 0.1, 1.0)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in `probe`: two threads of BLAS on a machine that is shared take ten times as long."""
    with threadpool_limits(1, user_api="blas"):
        yield


def cohort(
    *, n_per_class: int = 8, n_classes: int = 2, signal: float = 3.0, seed: int = 0, images_each: int = 3
) -> tuple[pd.DataFrame, Array, Array]:
    """Image table, counts (n_images, N_LATENTS) and image means: latent k is stronger in class k."""
    rng = np.random.default_rng(seed)
    rows, counts = [], []
    for number in range(n_per_class * n_classes):
        k = number % n_classes
        own = rng.poisson(1.0, N_LATENTS)
        for image in range(images_each + number % 3):
            rates = 0.5 + own + signal * (np.arange(N_LATENTS) == k)
            counts.append(rng.poisson(rates) * (rng.random(N_LATENTS) < 0.7))
            name = f"P{number:02d}"
            rows.append(
                (f"i{number:02d}_{image}", name, f"D{k}", f"L{rng.integers(2)}", f"{number}-{image}", f"f{number}")
            )
    columns = ["image_id", "patient", "disease", "label", "content_hash", "field"]
    table = pd.DataFrame(rows, columns=columns).assign(dataset="d", status="ok")
    values = np.array(counts, float)
    scale = 10.0 ** rng.uniform(-3, 0.5, N_LATENTS)
    return table, values, values * scale * rng.uniform(0.5, 1.5, values.shape)


def write_folder(
    root: Path,
    table: pd.DataFrame,
    counts: Array,
    means: Array,
    *,
    order: Sequence[int] = (),
    cache: str = "c" * 64,
    normalize: str = "images",
) -> Path:
    """A barcodes folder as `cyto barcode` would count it; patients in `order`."""
    images = table.set_index("image_id")
    fill(root / "image.zarr", images, {"X": counts, "mean": means})
    names = sorted({name for name in table["patient"] if name})
    names = [names[k] for k in order] if len(order) else names
    mine = [np.asarray((table["patient"] == name) & (table["status"] == "ok")) for name in names]
    patients = pd.DataFrame(
        {
            "patient_id": names,
            "dataset": "d",
            "disease": [table["disease"][rows].iloc[0] for rows in mine],
            "n_images": [int(rows.sum()) for rows in mine],
        },
        index=pd.Index(names, name="patient"),
    )
    layers = {
        "X": [counts[rows].mean(0) for rows in mine],
        "activation_sum": [means[rows].sum(0) for rows in mine],
        "n_active_images": [(means[rows] > 0).sum(0) for rows in mine],
    }
    fill(root / "patient.zarr", patients, {name: np.array(values) for name, values in layers.items()})
    return finished(root, not_read=("disease",), cache=cache, normalize=normalize)


def finished(root: Path, *, not_read: Sequence[str], cache: str = "c" * 64, normalize: str = "images") -> Path:
    """The folder with its header, and with empty levels that no test reads."""
    for level in not_read:
        fill(root / f"{level}.zarr", pd.DataFrame({"n_patients": [0]}, index=["none"]), {"X": np.zeros((1, N_LATENTS))})
    spec = {
        "latents": "l" * 64,
        "latents_spec": {"sae_sha256": "s" * 64, "cache_sha256": cache, "cache": {"width": 6, "trained": True}},
        "tau": 0.2,
        "token_set": "all",
        "normalize": normalize,
    }
    header = new_header(BARCODES, spec)
    write_header(root, Header(**{**vars(header), "complete": True, "summary": {}}))
    return root


def fill(root: Path, obs: pd.DataFrame, matrices: dict[str, Any]) -> None:
    n_latents = matrices["X"].shape[1]
    writer = BarcodeWriter(root, n_latents=n_latents, layers=tuple(name for name in matrices if name != "X"))
    writer.append({name: csr_matrix(values.astype(np.float32)) for name, values in matrices.items()})
    var = pd.DataFrame({"latent": range(n_latents)}, index=[str(k) for k in range(n_latents)])
    writer.finish(obs=obs, var=var, uns={"cyto": {"tau": 0.2}})


def quick(**changes: Any) -> ProbeConfig:
    settings = {"folds": 4, "repeats": 2, "permutations": 0, "thresholds": THRESHOLDS, **changes}
    return ProbeConfig(**settings)


def kept_latents(sums: Array, counts: Array, training: Array, threshold: float) -> Array:
    n_active = counts[:, training].sum(1)
    mean = np.where(n_active > 0, sums[:, training].sum(1) / np.maximum(n_active, 1), 0)
    return mean >= threshold
