"""A small cohort with hostile names, from which an atlas is built: real files, invented latents."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from latent_stores import local_client, write_latents
from PIL import Image

from cytocache.demo_cells import draw_cell
from cytosae.barcodes import BarcodeConfig, write_barcodes
from cytosae.compare import CompareConfig, compare
from cytosae.concepts import ConceptConfig, SelectionConfig, concept_statistics, select_latents
from stores import ConceptStore, begin_results
from stores.spec import ABLATION, NEIGHBOURS

SCRIPT = "<script>document.title='owned'</script>"
QUOTES = "\" onmouseover='alert(1)' x=\""
PATIENTS = [SCRIPT, QUOTES, "=cmd|' /C calc'!A0", "Müller, J.", *(f"Quentin {n:02d}" for n in range(10))]
DISEASES = ["AML </title><b>& co", "control"]  # the first nine patients have the first
LABELS = ["neutrophil", "<img src=x onerror=alert(2)>", None]
DATASETS = ["cells", "</script><b>other"]
N_LATENTS, IMAGES_PER_PATIENT = 40, 7
OF_NOBODY = f"nobody/{len(PATIENTS) * IMAGES_PER_PATIENT}"  # the id of the last image
_DTYPES = {"f4": "<f4", "f2": "<f2", "u4": "<u4", "u2": "<u2", "u1": "<u1", "i4": "<i4", "i2": "<i2"}


@dataclass(frozen=True)
class Cohort:
    """Where everything lies, and the latents as they were made: (images, 257, 40)."""

    root: Path
    dense: npt.NDArray[np.float32]
    patient_of: list[str | None]
    disease_of: list[str | None]
    image_ids: list[str]

    @property
    def build(self) -> list[str]:
        """Options of `cyto atlas build` with everything; the last word is missing: where to."""
        folders = {
            name: self.root / name for name in ("barcodes", "concepts", "latents", "images", "neighbours", "causes")
        }
        options = [word for name, path in folders.items() for word in (f"--{name}", str(path))]
        return ["atlas", "build", *options, "--compare", str(self.root / "compare"), "-o"]


def label_of(image: int) -> str | None:
    """Of seven images of a patient five have one label, by turns; one has the other, one none."""
    patient, number = divmod(image, IMAGES_PER_PATIENT)
    common = patient // 2 % 2  # both labels are common in both datasets
    return LABELS[common] if number < 5 else (LABELS[1 - common], None)[number - 5]


def make_cohort(root: Path) -> Cohort:
    """14 patients of two diseases and an image of nobody; two datasets; image 4 is unreadable, image 7 is lost."""
    rng = np.random.default_rng(0)
    n_images = len(PATIENTS) * IMAGES_PER_PATIENT + 1
    patients: list[str | None] = [*np.repeat(PATIENTS, IMAGES_PER_PATIENT).tolist(), None]
    diseases = [None if name is None else DISEASES[PATIENTS.index(name) >= 9] for name in patients]
    strength = rng.gamma(1, 0.5, (n_images, 1, N_LATENTS)) * 10 ** rng.uniform(-2, 0.5, N_LATENTS)
    strength[: 9 * IMAGES_PER_PATIENT, :, 3] += 2  # sets the diseases apart
    strength[:, :, 39] = 0  # never active
    strength[np.arange(n_images), :, 20 + np.arange(n_images) % 15] = 0  # images differ: each lacks a latent
    dense = (strength * (rng.random((n_images, 257, N_LATENTS)) < rng.uniform(0.05, 0.7, N_LATENTS))).astype(np.float32)
    dense = dense.astype(np.float16).astype(np.float32)  # what a store of 10 bits keeps
    dense[4] = 0
    (root / "images").mkdir(parents=True)
    hashes = []
    for n in range(n_images):
        path = root / "images" / f"{n:04d}.png"
        Image.fromarray(draw_cell("lymphocyte", rng, size=64)[: 64 - 8 * (n % 3)]).save(path)
        hashes.append(hashlib.sha256(path.read_bytes()).hexdigest())
    (root / "images" / "0007.png").unlink()
    paths: list[str | None] = [f"{n:04d}.png" for n in range(n_images)]
    paths[7] = "Secret, S./0007.png"  # a name in a path
    ids = [f"{patients[n] or 'nobody'}/{n}" for n in range(n_images)]  # ids that hold the patient's name
    write_latents(
        root / "latents",
        dense,
        [(patient, disease, n != 4) for n, (patient, disease) in enumerate(zip(patients, diseases, strict=True))],
        hashes=hashes,
        further={
            "image_id": [*ids],
            "path": paths,
            "label": [label_of(n) for n in range(n_images)],
            "dataset": [DATASETS[(n // IMAGES_PER_PATIENT) % 2] for n in range(n_images)],
        },
    )
    with local_client(1, 2) as client, without_figures():
        write_barcodes(root / "latents", root / "barcodes", BarcodeConfig(tau=0.2), client=client)
        concept_statistics(root / "latents", root / "concepts", ConceptConfig(min_support=1), client=client)
        compare(root / "barcodes", root / "compare", CompareConfig(a=DISEASES[0], b=DISEASES[1], top=5))
    select_latents(ConceptStore(root / "concepts"), SelectionConfig(dataset=DATASETS[0], clusters=3, per_cluster=3))
    write_neighbours(root / "neighbours")
    write_causes(root / "causes")
    return Cohort(root, dense, patients, diseases, ids)


@contextmanager
def without_figures() -> Iterator[None]:
    """Drawing takes longer than all else here."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("statistics.plot_scatter", "statistics.plot_thresholds"):
            patch.setattr(f"cytosae.concepts.{name}", lambda panels, path: None)
        for name in ("plot_correlation", "plot_patients", "plot_scatter"):
            patch.setattr(f"cytosae.compare.differential.{name}", lambda *args, **settings: None)
        yield


def write_causes(out: Path) -> None:
    """Made-up effects of latents 0 and 3, in the format of `cyto concept ablate`; the probe has a hostile class."""
    rows = [
        {"latent": latent, "quantity": quantity, "effect": 0.125 * (latent + 1), "low": None, "high": None}
        | {"n_patients": 14, "control_mean": 0.0625, "control_low": 0.03125, "control_high": 0.09375, "p": 0.0099}
        | {"direction_mean": None}
        for latent in (0, 3)
        for quantity in ("cls_change", "cls_norm", "cls_gain", f"logit:{SCRIPT}", f"probability:{SCRIPT}")
    ]
    writer = begin_results(out, ABLATION, {"sae_sha256": "1" * 64})
    writer.write_table("effects", pa.Table.from_pylist(rows))
    writer.finish({})


def write_neighbours(out: Path) -> None:
    """Made-up neighbours of every latent, in the format of `cyto concept neighbours`."""
    rows = [
        {"latent": latent, "by": by, "rank": 1, "neighbour": (latent + step) % N_LATENTS, "cosine": 0.5}
        | {"n_tokens_both": 7, "phi": 0.25, "lift": None}
        for latent in range(N_LATENTS)
        for by, step in (("direction", 1), ("tokens", 2))
    ]
    writer = begin_results(out, NEIGHBOURS, {"sae_sha256": "1" * 64})
    writer.write_table("neighbours", pa.Table.from_pylist(rows))
    writer.finish({})


def data(atlas: Path, name: str) -> dict[str, Any]:
    """What a data file hands to the page, its columns as arrays."""
    text = (atlas / "data" / f"{name}.js").read_text()
    found = re.fullmatch(r'CYTO\.add\("([^"]+)",(.*)\);\n', text, re.DOTALL)
    assert found
    assert found[1] == name
    return {key: _unpacked(value) for key, value in json.loads(found[2]).items()}


def _unpacked(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return np.frombuffer(base64.b64decode(value["b64"]), _DTYPES[value["dtype"]])
