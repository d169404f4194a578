"""scanpy takes the barcode stores as they are. A group of its own: `pytest -m slow tests/cytosae/barcodes`, with
scanpy, igraph and leidenalg installed (none of them is a dependency of ours)."""

import re
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import scipy.sparse as ss
from click.testing import CliRunner
from pages import shell
from places import ROOT

from cli import cli

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),  # scanpy's own warnings are not ours to mend
]


@pytest.fixture(scope="module")
def scanpy() -> Any:
    for name in ("igraph", "leidenalg"):
        pytest.importorskip(name, reason="the group needs scanpy, igraph and leidenalg")
    return pytest.importorskip("scanpy", reason="the group needs scanpy, igraph and leidenalg")


@pytest.fixture(scope="module")
def barcodes(scanpy: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scanpy") / "demo"
    done = CliRunner().invoke(cli, ["demo", "--out", str(out)])
    assert done.exit_code == 0, done.output
    return out / "cells.barcodes"


def test_the_usual_analysis_runs_on_image_barcodes(scanpy: Any, barcodes: Path) -> None:
    """Normalise, logarithm, PCA, neighbours, UMAP, leiden, rank_genes_groups; and the clusters are the cell types."""
    from sklearn.metrics import adjusted_rand_score

    images = anndata.read_zarr(barcodes / "image.zarr")
    before = images.X.copy()
    scanpy.pp.filter_genes(images, min_cells=3)
    scanpy.pp.normalize_total(images, target_sum=257)
    scanpy.pp.log1p(images)
    assert isinstance(images.X, ss.csr_matrix)  # still sparse, still float32
    assert images.X.dtype == np.float32
    scanpy.pp.pca(images, n_comps=20, random_state=0)
    scanpy.pp.neighbors(images, n_neighbors=15, random_state=0)
    scanpy.tl.umap(images, random_state=0)
    assert images.obsm["X_umap"].shape == (images.n_obs, 2)
    assert np.isfinite(images.obsm["X_umap"]).all()
    scanpy.tl.leiden(images, resolution=0.3, flavor="igraph", n_iterations=2, directed=False, random_state=0)
    assert adjusted_rand_score(images.obs["label"], images.obs["leiden"]) > 0.5
    scanpy.tl.rank_genes_groups(images, "label", method="wilcoxon")
    ranked = scanpy.get.rank_genes_groups_df(images, group=images.obs["label"].astype(str).iloc[0])
    assert set(ranked["names"]) <= set(images.var_names)  # latents by their names
    assert ranked["pvals_adj"].min() < 1e-6
    again = anndata.read_zarr(barcodes / "image.zarr")
    assert (again.X != before).nnz == 0  # what is on the disk was not touched


@pytest.mark.parametrize("level", ["patient", "disease"])
def test_groups_can_be_looked_at_too(scanpy: Any, barcodes: Path, level: str) -> None:
    """Quality control reads every store; patients also have principal components that tell diseases apart."""
    groups = anndata.read_zarr(barcodes / f"{level}.zarr")
    scanpy.pp.calculate_qc_metrics(groups, percent_top=None, inplace=True)
    assert np.allclose(groups.obs["total_counts"], np.asarray(groups.X.sum(axis=1)).ravel())
    if level == "patient":
        scanpy.pp.log1p(groups)
        scanpy.pp.pca(groups, n_comps=5, random_state=0)
        scanpy.tl.rank_genes_groups(groups, "disease", method="t-test")
        assert set(groups.uns["rank_genes_groups"]["names"].dtype.names) == set(groups.obs["disease"])


def test_written_by_scanpy_users_and_read_again(scanpy: Any, barcodes: Path, tmp_path: Path) -> None:
    """A subset goes to h5ad and back with its provenance."""
    images = anndata.read_zarr(barcodes / "image.zarr")
    some = images[images.obs["label"] == images.obs["label"].iloc[0]].copy()
    some.write_h5ad(tmp_path / "some.h5ad")
    read = anndata.read_h5ad(tmp_path / "some.h5ad")
    assert (read.X != some.X).nnz == 0
    assert float(read.uns["cyto"]["tau"]) == float(images.uns["cyto"]["tau"]) > 0


def test_the_page_on_scanpy(scanpy: Any, barcodes: Path, tmp_path: Path) -> None:
    """Its blocks run, in order, and draw what they say."""
    page = (ROOT / "docs" / "howto" / "scanpy.md").read_text()
    marked = r"^<!-- executed by tests/cytosae/barcodes/test_scanpy.py -->\n```python\n(.*?)^```$"
    found = re.findall(marked, page, re.MULTILINE | re.DOTALL)
    assert len(found) >= 4
    (tmp_path / "cyto-demo").symlink_to(barcodes.parent)
    (tmp_path / "page.py").write_text("\n".join(found))
    printed = shell("MPLBACKEND=agg python page.py", tmp_path)
    assert "pvals_adj" in printed
    for name in ("umap.png", "patients.png"):
        assert (tmp_path / name).stat().st_size > 10_000
