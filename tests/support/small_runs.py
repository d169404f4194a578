"""A small run of the whole way: drawn cells, hostile names, everything quick."""

import contextlib
import csv
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latent_stores import local_client
from PIL import Image

import cytocache.bridge
from cytocache.demo_cells import draw_cell
from cytosae.pipeline import RunConfig, RunResult, run_pipeline

# names as a spreadsheet may hold them, or somebody who means harm
DISEASES = ("-AML</td><script>alert(1)</script>", 'control" onerror="alert(2)\' $HOME `id` $x$')
LABELS = ("lymphocyte", "eosinophil", "neutrophil_segmented")
SHOWN = ("lymphocyte<img src=x onerror=alert(3)>", "eosinophil {{ 7 * 7 }}", "neutrophil\u202e; rm -rf /")
FEW: dict[str, dict[str, Any]] = {
    "sae": {"expansion": 2, "tokens": 20_000, "batch_tokens": 1024, "warmup_steps": 2, "k": 8},
    "extract": {"chunk_images": 16},
    "barcode": {"tau": 0.0},
    "concepts": {"shuffles": 5, "patient_shuffles": 19},
    "select": {"clusters": 3, "per_cluster": 2},
    "compare": {"n_permutations": 50, "n_bootstraps": 5, "top": 4},
    "probe": {"folds": 3, "inner_folds": 2, "repeats": 1, "permutations": 2, "thresholds": [0.0], "c_factors": [1.0]},
    "atlas": {"n_images": 2, "patient_images": 1, "pixels": 48},
}


def draw_cohort(root: Path, *, n_patients: int = 10, n_images: int = 4) -> Path:
    """Patients of two diseases that differ in their mixture of cells; one image is torn. Returns the table."""
    root.mkdir(parents=True, exist_ok=True)
    rows = []
    for patient in range(n_patients):
        for number in range(n_images):
            kind = (number + (number % 2) * (patient % 2)) % 3
            path = root / "cells" / f"{patient}-{number}.png"
            path.parent.mkdir(exist_ok=True)
            rng = np.random.default_rng([patient, number])
            Image.fromarray(draw_cell(LABELS[kind], rng, size=40)).save(path)
            rows.append((f"cells/{path.name}", SHOWN[kind], f"P{patient:02d}<b>", DISEASES[patient % 2], "smear"))
    torn = root / rows[0][0]
    torn.write_bytes(torn.read_bytes()[:150])
    table = root / "cells.csv"
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "patient", "disease", "slide"), *rows])
    return table


@contextlib.contextmanager
def one_cluster() -> Iterator[None]:
    """Jobs of Dask run in this process, on one thread."""
    with pytest.MonkeyPatch.context() as patch, local_client(1, 1) as client:
        patch.setattr("cytosae.cluster.open_client", lambda *given, **more: nullcontext(client))
        yield


def run_small(source: Path, out: Path | None, *, config: RunConfig | None = None, **more: Any) -> RunResult:
    """`cyto run` with few of everything; of a recipe as it says."""
    if config is None and source.suffix != ".toml":
        config = RunConfig(settings=FEW, stability=True)
    return run_pipeline(source, out, config, stage_one=cytocache.bridge, device="cpu", workers=1, **more)


def contents(root: Path) -> dict[str, bytes]:
    """Every file by its path, but for those that tell the time: logs of runs, metrics and seconds."""
    timed = ("runs.jsonl", "stages.json", "metrics.parquet", "sae.json")
    paths = [path for path in root.rglob("*") if path.is_file() and path.name not in timed]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths if path.suffix != ".lock"}
