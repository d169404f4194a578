"""The demo's pictures show what is in the stores."""

from pathlib import Path

import numpy as np
import pytest
from anndata import AnnData
from PIL import Image
from scipy.sparse import csr_matrix

from cytosae.figures import characteristic_latents, patch_map, plot_patient_barcodes
from stores import LatentStore


def test_patch_map_is_the_row_of_each_patch(made: Path) -> None:
    """Patch k sits at row k // 16, column k % 16, and CLS is left out."""
    latents = LatentStore(made / "latents.zarr")
    rows = latents.read_images(0, 1)
    dense = np.zeros((257, latents.spec.n_latents), np.float32)
    for token in range(257):
        chosen = slice(rows.indptr[token], rows.indptr[token + 1])
        dense[token, rows.indices[chosen]] = rows.values[chosen]
    latent = int(dense[1:].sum(0).argmax())
    shown = patch_map(latents, 0, latent)
    for k in (0, 15, 16, 100, 255):
        assert shown[k // 16, k % 16] == dense[1 + k, latent]
    assert not patch_map(latents, 4, latent).any()  # image 4 could not be read


def test_characteristic_latents_finds_the_planted_one() -> None:
    rng = np.random.default_rng(0)
    values = rng.random((30, 8)).astype(np.float32)
    labels = np.array(["a", "b", ""] * 10)
    values[labels == "a", 3] += 5
    values[labels == "b", 6] += 5
    images = AnnData(csr_matrix(values))
    images.layers["mean"] = csr_matrix(values)
    images.obs["label"] = labels
    assert characteristic_latents(images, group="label") == {"a": 3, "b": 6}


def test_patient_picture_is_written(tmp_path: Path) -> None:
    patients = AnnData(csr_matrix(np.random.default_rng(0).random((5, 20)).astype(np.float32)))
    patients.obs["disease"] = ["x", "y", "x", "", "y"]
    patients.uns["cyto"] = {"tau": 0.2}
    plot_patient_barcodes(patients, tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.width > 300
        assert np.asarray(picture.convert("L")).std() > 10


@pytest.mark.parametrize("n_patients", [1, 2])
def test_patient_picture_of_few(tmp_path: Path, n_patients: int) -> None:
    patients = AnnData(csr_matrix(np.ones((n_patients, 3), np.float32)))
    patients.obs["disease"] = ["x"] * n_patients
    patients.uns["cyto"] = {"tau": 0.2}
    plot_patient_barcodes(patients, tmp_path / "p.png")
