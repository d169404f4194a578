"""The arrows of the architecture: stores <- cytocache, cytosae <- cli, and what stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"stores", "cytocache", "cytosae", "cli"}
ALLOWED = {
    "stores": {"stores"},
    "cytocache": {"stores", "cytocache"},
    "cytosae": {"stores", "cytosae"},
    "cli": PACKAGES,
}
TORCH_ALLOWED = {
    "cytocache": {"backbones", "extract", "fidelity", "sample", "torchvision_guard", "weights_file"},
    "cytosae": {
        *("model", "losses", "active_latents", "gpu_kernels", "dead_latents", "ranks", "reconstruction"),
        *(
            "checkpoint",
            "train",
            "training_data",
            "train_state",
            "compact",
            "device_batches",
            "encode",
            "evaluate",
            "interop",
            "saelens",
            "sweep",
            "mil",
        ),
    },
    "stores": set(),
}


def imported_names(path: Path) -> set[str]:
    """Top-level names that a file imports anywhere, function bodies included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_arrows(package: str) -> None:
    """No file imports a package of ours that it must not know."""
    files = [ROOT / "cli.py"] if package == "cli" else sorted((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        wrong = (imported_names(path) & PACKAGES) - ALLOWED[package]
        assert not wrong, f"{path.name} imports {wrong}"


@pytest.mark.parametrize("package", sorted(TORCH_ALLOWED))
def test_torch_stays_where_it_is_needed(package: str) -> None:
    """What a laptop without torch runs does not name it, nor do the stores name dask or click."""
    for path in sorted((ROOT / package).rglob("*.py")):
        names = imported_names(path)
        if path.stem not in TORCH_ALLOWED[package]:
            assert not names & {"torch", "timm", "torchvision"}, path.name
        assert "click" not in names, path.name
        if package != "cytosae":
            assert not names & {"dask", "distributed"}, path.name


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("cli", {"torch", "zarr", "dask", "numpy", "pyarrow"}),
        ("cytosae.barcodes", {"torch", "timm", "cytocache"}),
        ("cytosae.concepts, cytosae.concepts.thresholds", {"torch", "timm", "cytocache", "matplotlib"}),
        ("cytosae.barcodes.figures, cytosae.sweep.figures", {"torch", "cytocache"}),
        ("cytosae.compare", {"torch", "cytocache", "dask", "matplotlib"}),
        (
            "cytosae.relations.stability, cytosae.relations.neighbours, cytosae.relations.patient_concepts",
            {"torch", "timm", "cytocache", "anndata"},
        ),
        (
            "cytosae.maps, cytosae.maps.reference_sheets, cytosae.maps.mask_agreement, cytosae.concepts.selection",
            {"torch", "cytocache", "dask", "sklearn"},
        ),
        ("cytosae.probe", {"torch", "cytocache", "dask"}),
        ("cytosae.atlas.build", {"torch", "cytocache", "dask", "anndata", "matplotlib", "sklearn"}),
        ("cytosae.atlas.review_server, cytosae.atlas.agreement", {"torch", "cytocache", "dask", "matplotlib"}),
        ("stores", {"torch", "dask", "click", "cytocache", "cytosae", "anndata"}),
        ("cytocache.images, cytocache.preprocess", {"torch", "zarr", "pyarrow", "stores", "dask", "click"}),
        ("cytosae.training.train", {"timm", "torchvision", "cytocache", "dask"}),
    ],
)
def test_import_brings_in_no_more(module: str, absent: set[str]) -> None:
    """Checked in a fresh interpreter, where nothing else has been imported before."""
    code = f"import sys, {module}; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert not loaded & absent


def test_a_missing_triton_is_told_as_such() -> None:
    """In one line that says what to do, where the kernels of the GPU are imported and nowhere else."""
    code = (
        "import sys; sys.modules['triton'] = None; import cytosae.training.train; import cytosae.training.kernels_gpu"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr.splitlines()[-1].startswith(
        "stores.errors.BadInput: training on a GPU needs triton, which comes with torch's CUDA builds; none is"
    )
    assert done.stderr.endswith("install a CUDA build of torch, or train with --device cpu\n")
