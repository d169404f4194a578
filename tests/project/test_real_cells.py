"""Real cells, where ../shared is there: a subset of the simulated cohort through all five commands."""

import csv
from pathlib import Path

import anndata
import numpy as np
import pytest
from click.testing import CliRunner
from places import SHARED
from scipy.sparse import csr_matrix
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cli import cli

CELLS = SHARED / "bccd_cells"


@pytest.mark.stress
@pytest.mark.skipif(not CELLS.is_dir(), reason="the real crops of ../shared are not here")
def test_real_cells_to_disease_barcodes(tmp_path: Path) -> None:
    """Barcodes of 180 real crops, from an SAE trained on them, tell white cells, red cells and platelets apart."""
    with (CELLS / "simulated_cohort.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    chosen: list[dict[str, str]] = []
    for disease in sorted({row["disease"] for row in rows}):
        patients = sorted({row["patient"] for row in rows if row["disease"] == disease})[:2]
        chosen += [row for row in rows if row["patient"] in patients]
    with (tmp_path / "cells.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(chosen)

    acts, sae, latents, barcodes = (tmp_path / name for name in ("a.zarr", "sae", "l.zarr", "b"))
    settings = "--expansion 4 --tokens 400000 --batch-tokens 2048 --lr 1e-3 --l1 2e-4 --warmup-steps 20".split()
    for command in (
        ["cache", "extract", tmp_path / "cells.csv", acts, "--root", CELLS, "--chunk-images", 64],
        ["cache", "verify", acts],
        ["sae", "train", acts, "-o", sae, *settings],
        ["sae", "encode", acts, sae, "-o", latents],
        ["latents", "verify", latents],
        ["barcode", latents, "-o", barcodes, "--workers", 2],
    ):
        done = CliRunner().invoke(cli, list(map(str, command)))
        assert done.exit_code == 0, done.output

    images = anndata.read_zarr(barcodes / "image.zarr")
    assert list(images.obs_names) == [row["image_id"] for row in chosen]
    assert list(images.obs["field"]) == [row["field"] for row in chosen]  # the user's own column travelled along
    counts = np.log1p(csr_matrix(images.X).toarray())
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    accuracy = cross_val_score(model, counts, np.asarray(images.obs["label"]), cv=3).mean()
    assert accuracy > 0.85  # chance 0.35; measured 0.98 with longer training (docs/log.md)

    patients = anndata.read_zarr(barcodes / "patient.zarr")
    by_hand = csr_matrix(images.X).toarray()
    for patient in patients.obs_names:
        mine = np.asarray(images.obs["patient"]) == patient
        np.testing.assert_allclose(patients[patient].X.toarray()[0], by_hand[mine].mean(0), rtol=1e-6)
    diseases = anndata.read_zarr(barcodes / "disease.zarr")
    for disease in diseases.obs_names:
        mine = np.asarray(patients.obs["disease"]) == disease
        np.testing.assert_allclose(diseases[disease].X.toarray()[0], patients.X.toarray()[mine].mean(0), rtol=1e-5)
