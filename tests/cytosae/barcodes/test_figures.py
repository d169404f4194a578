"""The demo's pictures show what is in the stores."""

from pathlib import Path

import numpy as np
import pytest
from anndata import AnnData
from PIL import Image
from scipy.sparse import csr_matrix

from cytosae.barcodes import characteristic_latents, plot_patient_barcodes


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
