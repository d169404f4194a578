"""`cyto barcode export --h5ad`: what a viewer needs, and everything that the barcodes hold. No torch."""

from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from barcode_maker import write_patient_barcodes
from click.testing import CliRunner
from cohorts import cohort, write_folder
from places import GOLDEN

from cli import cli
from cytosae.barcodes.export import export_h5ad, principal_components
from stores.barcode_store import BarcodeStore
from stores.errors import BadInput

GOLDEN = GOLDEN / "barcodes-v1"


@pytest.fixture(scope="module")
def barcodes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 patients in two diseases, 4 images each on average."""
    return write_folder(tmp_path_factory.mktemp("export") / "barcodes", *cohort())


@pytest.mark.parametrize("level", ["image", "patient"])
def test_the_same_numbers_with_categories_and_a_map(barcodes: Path, tmp_path: Path, level: str) -> None:
    """Through the command line; ids stay texts, what repeats is a category of texts."""
    out = tmp_path / "cells.h5ad"
    done = CliRunner().invoke(cli, ["barcode", "export", str(barcodes), "--h5ad", str(out), "--level", level])
    assert done.exit_code == 0, done.output
    found, stored = anndata.read_h5ad(out), BarcodeStore(barcodes).read(level)
    np.testing.assert_array_equal(found.X.toarray(), stored.X.toarray())
    assert found.X.dtype == np.float32
    for name, layer in stored.layers.items():
        if name is not None:
            np.testing.assert_array_equal(found.layers[name].toarray(), layer.toarray())
    assert [*found.obs_names] == [*stored.obs_names]
    assert isinstance(found.obs["disease"].dtype, pd.CategoricalDtype)
    assert [*found.obs["disease"]] == [*stored.obs["disease"]]
    assert anndata.read_h5ad(out, backed="r")[1:3].to_memory().n_obs == 2
    points = found.obsm["X_pca"]
    assert points.dtype == np.float32
    assert np.isfinite(points).all()
    with h5py.File(out) as file:  # as viewers read it, which know no newer encodings
        obs = file["obs"]
        assert obs["disease"].attrs["encoding-type"] == "categorical"
        assert obs["disease/categories"].attrs["encoding-type"] == "string-array"
        assert obs[obs.attrs["_index"]].attrs["encoding-type"] == "string-array"
        assert file["X"].attrs["encoding-type"] == "csr_matrix"
    assert [path.name for path in tmp_path.iterdir()] == ["cells.h5ad"]


def test_components_equal_those_of_the_dense_twin() -> None:
    """Principal components are known up to their sign; the seed decides nothing that can be seen."""
    rng = np.random.default_rng(0)
    counts = rng.poisson(2, (30, 12)) * (rng.random((30, 12)) < 0.6) * np.array([5.0, 3, *[1] * 10])
    values = np.log1p(counts)
    left, sizes, _ = np.linalg.svd(values - values.mean(0), full_matrices=False)
    for seed in (0, 2**63 - 1):
        found = principal_components(counts, seed=seed)
        assert found is not None
        np.testing.assert_allclose(np.abs(found[:, :5]), np.abs(left * sizes)[:, :5], atol=1e-4)


@pytest.mark.parametrize("counts", [np.zeros((5, 4)), np.ones((5, 4)), np.eye(2, 4), np.zeros((0, 4))])
def test_rows_that_do_not_differ_have_no_map(counts: np.ndarray) -> None:
    assert principal_components(counts, seed=0) is None


def test_a_level_without_rows_is_refused(tmp_path: Path) -> None:
    """Barcodes of nobody: a file of no rows was written, with a warning of the map alone."""
    root = write_patient_barcodes(tmp_path / "b", np.ones((3, 4), np.float32), [""] * 3)
    with pytest.raises(BadInput, match=r"has no disease, since no image has one in its table; count again with"):
        export_h5ad(root, tmp_path / "out.h5ad", level="disease")
    assert not (tmp_path / "out.h5ad").exists()


def test_the_golden_barcodes_go_out_at_every_level(tmp_path: Path) -> None:
    for level in ("image", "patient", "disease"):
        done = export_h5ad(GOLDEN, tmp_path / f"{level}.h5ad", level=level)
        found = anndata.read_h5ad(done.path)
        assert (found.n_obs, found.n_vars) == (done.n_rows, done.n_latents)
        assert found.uns["cyto"]["tau"] == BarcodeStore(GOLDEN).read(level).uns["cyto"]["tau"]


def test_what_cannot_be_written_is_told(barcodes: Path, tmp_path: Path) -> None:
    """And nothing is touched."""
    out = tmp_path / "cells.h5ad"
    export_h5ad(barcodes, out)
    before = out.read_bytes()
    with pytest.raises(BadInput, match=r"cells.h5ad is there already; choose another output, or add --overwrite"):
        export_h5ad(barcodes, out)
    with pytest.raises(BadInput, match="has no 'cell' barcodes"):
        export_h5ad(barcodes, tmp_path / "x.h5ad", level="cell")
    with pytest.raises(BadInput, match=r"x.zarr must end with .h5ad"):
        export_h5ad(barcodes, tmp_path / "x.zarr")
    with pytest.raises(BadInput, match=r"lies inside .*, whose files are recorded"):
        export_h5ad(barcodes, barcodes / "x.h5ad")
    assert out.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["cells.h5ad"]


def test_a_map_by_umap_where_it_is_installed(barcodes: Path, tmp_path: Path) -> None:
    pytest.importorskip("umap", reason="X_umap needs umap-learn")
    done = export_h5ad(barcodes, tmp_path / "a.h5ad")
    assert done.has_umap
    points = anndata.read_h5ad(done.path).obsm["X_umap"]
    assert points.shape == (done.n_rows, 2)
    assert np.isfinite(points).all()
    again = export_h5ad(barcodes, tmp_path / "b.h5ad")
    np.testing.assert_array_equal(points, anndata.read_h5ad(again.path).obsm["X_umap"])


def test_counting_is_still_the_command_itself() -> None:
    """`cyto barcode` has its own options; only the word export, in first place, is another command."""
    said = CliRunner().invoke(cli, ["barcode", "--help"]).output
    assert "LATENTS" in said
    assert "cyto barcode export" in " ".join(said.split())
    context = cli.commands["barcode"].make_context("barcode", ["./export", "-o", "out"])
    assert context.params["latents"] == (Path("export"),)
