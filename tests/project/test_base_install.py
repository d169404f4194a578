"""What runs behind latents needs no torch: a laptop or a Dask worker has the base install only.

No module imported here brings torch, so `make test-versions` runs these tests where it is not installed, with the
lowest and the newest versions of everything else.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import zarr
from barcode_maker import write_patient_barcodes
from cohorts import cohort, write_folder
from places import ROOT

from stores.barcode_store import BarcodeStore, begin_level, plain_anndata, plain_strings, write_tables

GOLDEN = ROOT / "tests" / "golden"
NEEDS_TORCH = "needs the package torch; install it: pip install 'cytobarcode[torch]'"

# read by every Python process below it, workers of Dask included: as if torch and its like were not installed
HIDING = """
import sys

class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "torchvision", "timm", "triton"):
            return None
        return self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
"""
MANY = """
import json, sys
from cli import cli
if __name__ == "__main__":  # workers of Dask import this file again
    for arguments in json.loads(sys.argv[1]):
        cli(arguments, standalone_mode=False)
"""


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("hiding")
    (folder / "sitecustomize.py").write_text(HIDING)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]), "MPLBACKEND": "agg"}


def cyto(folder: Path, environment: dict[str, str], *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from cyto_start import start; start()", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.stress  # compiles and starts a cluster; tests/project/test_imports.py guards the imports in every run
def test_what_is_behind_latents_runs(tmp_path: Path, without_torch: dict[str, str]) -> None:
    """Latents to barcodes to a page, in processes that cannot import torch."""
    rng = np.random.default_rng(0)
    diseases = ["A"] * 6 + ["B"] * 6
    values = rng.gamma(2, 1, (12, 20))
    values[:6, 3] += 9
    write_patient_barcodes(tmp_path / "many", values, diseases)
    write_folder(tmp_path / "cohort", *cohort(n_per_class=4))
    latents = GOLDEN / "latents-v1.zarr"
    inputs = ("--barcodes", "barcodes", "--concepts", GOLDEN / "concepts-v1", "--latents", latents)
    commands = [
        ("barcode", latents, "-o", "barcodes", "--workers", 1),
        ("compare", "many", "A", "B", "-o", "comparison", "--permutations", 99),
        ("probe", "cohort", "-o", "probe", "--folds", 3, "--repeats", 1, "--permutations", 0, "--workers", 1),
        ("cache", "verify", GOLDEN / "activations-v1.zarr"),
        ("concept", "neighbours", GOLDEN / "sweep-v1" / "runs" / "lr=0.0004-seed=0", "--latent", 0, "-o", "neighbours"),
        ("atlas", "build", *inputs, "-o", "atlas"),
    ]
    (tmp_path / "run.py").write_text(MANY)
    text = json.dumps([[*map(str, command)] for command in commands])
    done = subprocess.run(
        [sys.executable, "run.py", text], cwd=tmp_path, env=without_torch, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "probe" / "scores.json").read_text())["methods"]
    assert "Made by cyto" in (tmp_path / "atlas" / "index.html").read_text()


@pytest.mark.parametrize(
    "arguments",
    [
        ("cache", "extract", "images", "cells.acts.zarr"),
        ("sae", "train", "cells.acts.zarr", "-o", "run"),
        ("sae", "encode", "cells.acts.zarr", "run", "-o", "latents.zarr"),
        ("sae", "eval", "run", "cells.acts.zarr"),
        ("demo",),
    ],
    ids=" ".join,
)
def test_one_line_names_the_extra(tmp_path: Path, without_torch: dict[str, str], arguments: tuple[str, ...]) -> None:
    """And nothing is begun."""
    done = cyto(tmp_path, without_torch, *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"Error: this command {NEEDS_TORCH}\n"
    assert not [*tmp_path.iterdir()]


def encodings(root: Path) -> dict[str, str]:
    """Path below an AnnData store -> its encoding, of tables and what is in them."""
    group = zarr.open_group(root, mode="r")
    return {
        name: f"{member.attrs['encoding-type']} {member.attrs['encoding-version']}"
        for name, member in group.members(max_depth=None)
        if name.split("/")[0] in ("obs", "var", "uns") and "encoding-type" in member.attrs
    }


@pytest.mark.stress
@pytest.mark.parametrize("infer_string", [False, True], ids=["texts as objects", "texts as pandas 3 has them"])
def test_texts_are_written_as_every_anndata_reads_them(tmp_path: Path, infer_string: bool) -> None:
    """Tables of the golden store, written again: the same encodings, whatever pandas makes of texts; and h5ad."""
    old = {name: encodings(GOLDEN / "barcodes-v1" / f"{name}.zarr") for name in ("image", "patient", "disease")}
    assert old["image"]["obs/image_id"] == old["image"]["var/latent_name"] == "string-array 0.2.0"
    for level, expected in old.items():
        table = BarcodeStore(GOLDEN / "barcodes-v1").read(level)
        frames = {"obs": as_texts(table.obs, infer_string), "var": as_texts(table.var, infer_string)}
        begin_level(tmp_path / f"{level}.zarr")
        write_tables(tmp_path / f"{level}.zarr", {**frames, "uns": dict(table.uns)})
        assert encodings(tmp_path / f"{level}.zarr") == expected
        again = anndata.AnnData(table.X, obs=plain_strings(frames["obs"]), var=plain_strings(frames["var"]))
        with plain_anndata():
            again.write_h5ad(tmp_path / f"{level}.h5ad")
        assert [*anndata.read_h5ad(tmp_path / f"{level}.h5ad").obs_names] == [*table.obs_names]


def as_texts(table: pd.DataFrame, infer_string: bool) -> pd.DataFrame:
    """Its texts as pandas 3 has them (an array type of its own), or as Python's."""
    kind: object = pd.StringDtype() if infer_string else object
    texts = {name: table[name].astype(kind) for name in table if isinstance(table[name].iloc[0], str)}
    found = table.assign(**texts)
    found.index = table.index.astype(kind)
    return found
