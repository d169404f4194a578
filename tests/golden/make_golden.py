"""What wrote the golden artefacts beside this file, kept as a record: one tiny finished artefact per format version.

They must be readable for ever, so they are never written anew: a new format version gets a new function and a new
folder, and tests/test_store_golden.py reads old and new. Run it as `PYTHONPATH=tests python tests/golden/make_golden.py
FOLDER`; it refuses a folder that already holds one of them.
"""

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as ss
import torch
from barcode_writer import BarcodeWriter

from cytosae.checkpoint import load_sae, save_sae
from cytosae.cluster import open_client
from cytosae.coactivation import Coactivation
from cytosae.compare import CompareConfig, compare
from cytosae.concepts import ConceptConfig, write_concepts
from cytosae.model import SparseAutoencoder
from cytosae.neighbours import write_neighbours
from cytosae.patient_concepts import PatientSettings, write_patient_concepts
from cytosae.probe import ProbeConfig, write_probe
from cytosae.probe_units import UnitConfig
from cytosae.selection import SelectionConfig, select_latents
from cytosae.stability import write_stability
from stores import ConceptStore, csr
from stores.activation_store import ActivationSpec, ActivationStore
from stores.activation_writer import ActivationWriter
from stores.latent_store import LatentSpec, LatentStore, LatentWriter
from stores.runlog import append_run
from stores.spec import BARCODES, SAE, Header, new_header, write_header
from stores.tables import image_table, table_sha256

N_IMAGES, N_TOKENS, WIDTH, N_LATENTS = 3, 5, 4, 8
UNREADABLE = 1
RESULTS = ("concepts-v1", "comparison-v1", "patient-concepts-v1", "probe-v1", "neighbours-v1", "stability-v1")


def write_activations_v1(root: Path) -> None:
    """Token t of image i has (100 i + 10 t + channel) / 8; image 1 is unreadable; two images a chunk."""
    paths: list[str | None] = ["Zellen/größte.png", "torn.tif", "c.png"]
    more: dict[str, list[str | None]] = {
        "label": ["neutrophil", None, "blast"],
        "patient": ["P1", "P1", "P2"],
        "disease": ["well", "well", "AML"],
        "hospital": ["H1", None, "H2"],
    }
    manifest = image_table({"path": paths, **more}, source="make_golden.py", dataset="golden")
    spec = ActivationSpec(
        backbone="random-vit-tiny",
        weights_sha256="ab" * 32,
        trained=False,
        block=2,
        n_blocks=4,
        transform={
            "size": 224,
            "interpolation": "bicubic",
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
        },
        precision="fp32",
        token_layout="cls, 2x2 patches row-major",
        n_images=N_IMAGES,
        tokens_per_image=N_TOKENS,
        width=WIDTH,
        chunk_images=2,
        manifest_sha256=table_sha256(manifest),
    )
    i, t, c = np.ogrid[:N_IMAGES, :N_TOKENS, :WIDTH]
    tokens = ((100 * i + 10 * t + c) / 8).astype(np.float16)
    tokens[UNREADABLE] = np.nan
    writer = ActivationWriter(root, spec, manifest)
    append_run(root, packages=("numpy", "zarr"), device="cpu")
    writer.write_chunk(0, tokens[:2], ["00" * 32, None], [None, "file ends early"])
    writer.write_chunk(1, tokens[2:], ["22" * 32], [None])
    writer.finish()


def write_sae_v1(root: Path, cache: ActivationStore) -> str:
    """W_enc counts up from -1 by 1/16, W_dec is its transpose, b_enc and b_dec count up from 0 by 1/4."""
    model = SparseAutoencoder(WIDTH, N_LATENTS)
    with torch.no_grad():
        model.W_enc.copy_((torch.arange(WIDTH * N_LATENTS) / 16 - 1).reshape(WIDTH, N_LATENTS))
        model.W_dec.copy_(model.W_enc.T)
        model.b_enc.copy_(torch.arange(N_LATENTS) / 4)
        model.b_dec.copy_(torch.arange(WIDTH) / 4)
    spec = {
        "width": WIDTH,
        "n_latents": N_LATENTS,
        "activation": "relu",
        "tokens": cache.spec.same_tokens,
        "trained_backbone": False,
        "caches": [{"identity": cache.identity, "sha256": cache.content_sha256, "precision": "fp32"}],
        "tokens_per_epoch": 10,
        "n_steps": 3,
        "config": {"expansion": 2, "l1": 8e-5, "lr": 4e-4, "batch_tokens": 10, "seed": 0},
    }
    root.mkdir()
    header = new_header(SAE, spec)
    write_header(root, header)
    append_run(root, packages=("torch",), device="cpu")
    header = save_sae(root, model, header, {"steps": 3, "tokens": 30, "images": 6, "final": {"loss": 1.5}})
    return str((header.summary or {})["sae_sha256"])


def golden_rows() -> ss.csr_matrix:
    """Latent s of row r is (r + 1) + s / 8 where (3 r + 5 s) mod 4 is 0, else silent; image 1 is all silent."""
    r, s = np.ogrid[: N_IMAGES * N_TOKENS, :N_LATENTS]
    dense = np.where((3 * r + 5 * s) % 4 == 0, r + 1 + s / 8, 0).astype(np.float32)
    dense[UNREADABLE * N_TOKENS : (UNREADABLE + 1) * N_TOKENS] = 0
    return ss.csr_matrix(dense)


def write_latents_v1(root: Path, cache: ActivationStore, sae_sha256: str) -> None:
    """The rows above, in chunks of 8 entries, one commit per image."""
    spec = LatentSpec(
        sae_sha256=sae_sha256,
        cache_sha256=cache.content_sha256,
        cache=cache.spec.to_dict(),
        images_sha256=table_sha256(cache.images),
        n_images=N_IMAGES,
        tokens_per_image=N_TOKENS,
        n_latents=N_LATENTS,
        precision="fp32",
        value_bits=10,
        min_activation=0.0,
    )
    writer, rows = LatentWriter(root, spec, cache.images), golden_rows()
    append_run(root, packages=("numpy", "zarr"), device="cpu")
    for image in range(N_IMAGES):
        some = rows[image * N_TOKENS : (image + 1) * N_TOKENS]
        writer.append_tokens(some.indices, some.data, np.diff(some.indptr))
        writer.commit(image + 1)
    writer.finish()


def write_barcodes_v1(root: Path, latents: LatentStore) -> None:
    """Counts above tau 0.2 of all tokens, per image, patient and disease."""
    spec = {
        "latents": latents.identity,
        "latents_spec": latents.spec.to_dict(),
        "tau": 0.2,
        "token_set": "all",
        "normalize": "images",
    }
    root.mkdir()
    header = new_header(BARCODES, spec)
    write_header(root, header)
    append_run(root, packages=("anndata", "zarr"))
    blocks = golden_rows().toarray().reshape(N_IMAGES, N_TOKENS, N_LATENTS)
    counts, largest, mean = (blocks > 0.2).sum(1), blocks.max(1), blocks.mean(1)
    per_patient = ss.csr_matrix(counts[[0, 2]])  # P1 has image 0 and the unreadable one, P2 image 2

    obs = latents.images.to_pandas().set_index("image_id")[["label", "patient", "disease", "status"]].fillna("")
    index = pd.Index([str(s) for s in range(N_LATENTS)], name="latent_name")
    columns = {"latent": np.arange(N_LATENTS), "frequency": (largest > 0).sum(0) / 2, "max_activation": largest.max(0)}
    var = pd.DataFrame(columns, index=index)
    uns = {"cyto": {"tau": 0.2, "token_set": "all", "normalize": "images", "identity": header.identity}}
    images = BarcodeWriter(root / "image.zarr", n_latents=N_LATENTS, layers=("max", "mean"))
    images.append({"X": ss.csr_matrix(counts), "max": ss.csr_matrix(largest), "mean": ss.csr_matrix(mean)})
    images.finish(obs=obs, var=var, uns=uns)

    patients = BarcodeWriter(root / "patient.zarr", n_latents=N_LATENTS, layers=("activation_sum", "n_active_images"))
    sums, n_active = ss.csr_matrix(mean[[0, 2]]), ss.csr_matrix((largest[[0, 2]] > 0).astype(np.int64))
    patients.append({"X": per_patient, "activation_sum": sums, "n_active_images": n_active})
    of_patient = {"disease": ["well", "AML"], "n_images": [1, 1], "n_unreadable": [1, 0]}
    patients.finish(obs=pd.DataFrame(of_patient, index=pd.Index(["P1", "P2"], name="patient")), var=var, uns=uns)

    diseases = BarcodeWriter(root / "disease.zarr", n_latents=N_LATENTS)
    diseases.append({"X": per_patient[[1, 0]]})
    of_disease = {"n_patients": [1, 1], "n_images": [1, 1]}
    diseases.finish(obs=pd.DataFrame(of_disease, index=pd.Index(["AML", "well"], name="disease")), var=var, uns=uns)
    summary = {"n_images": 2, "n_unreadable": 1, "n_patients": 2, "n_diseases": 2, "n_latents": N_LATENTS}
    write_header(root, Header(**{**vars(header), "complete": True, "summary": summary}))


def write_results_v1(folder: Path, sae: Path, latents: Path) -> None:
    """Every kind of results that something of ours reads again, by its own command; their figures are left out.

    Twelve patients, six with each of two diseases, of four images; latent s of image i of patient p counts
    (5 p + 3 i + s) mod 7 tokens, and 3 more if the patient has the first disease and s is 2.
    """
    cohort = folder / "cohort"
    write_cohort(cohort, LatentStore(latents))
    with open_client(None, workers=1, memory_limit="2GiB") as client:
        write_concepts(latents, folder / "concepts-v1", ConceptConfig(min_support=1), client=client)
        select_latents(ConceptStore(folder / "concepts-v1"), SelectionConfig(dataset="golden", clusters=2))
    compare(cohort, folder / "comparison-v1", CompareConfig(a="AML", b="well", n_permutations=99, n_bootstraps=20))
    write_patient_concepts(cohort, "P00", folder / "patient-concepts-v1", PatientSettings(n_splits=20))
    units = UnitConfig(target="disease")
    config = ProbeConfig(units=units, folds=2, inner_folds=2, repeats=1, permutations=2, thresholds=(0.0, 1.0))
    write_probe(cohort, folder / "probe-v1", config)
    settings = Coactivation(min_images=1, n_top=2)
    write_neighbours(sae, folder / "neighbours-v1", [latents], chosen=[0, 5], settings=settings)
    model = load_sae(sae).model
    with torch.no_grad():
        model.W_dec.copy_(model.W_dec.flip(0))  # latent s stands at 7 - s
    header = new_header(SAE, {**load_sae(sae).header.spec, "config": {"seed": 1}})
    (folder / "flipped").mkdir()
    save_sae(folder / "flipped", model, header, {"steps": 3, "tokens": 30, "images": 6, "final": {"loss": 1.5}})
    write_stability([sae, folder / "flipped"], folder / "stability-v1")
    for name in RESULTS:
        for figure in [*(folder / name).glob("*.png"), *(folder / name).glob("*.svg")]:
            figure.unlink()  # checksums do not cover them, and they are large
    shutil.rmtree(cohort)
    shutil.rmtree(folder / "flipped")


def write_cohort(root: Path, latents: LatentStore) -> None:
    """Barcodes of the twelve patients."""
    root.mkdir()
    p, i, s = np.ogrid[:12, :4, :N_LATENTS]
    counts = ((5 * p + 3 * i + s) % 7 + 3 * ((p < 6) & (s == 2))).astype(np.float32)
    names = [f"P{number:02d}" for number in range(12)]
    diseases = ["AML"] * 6 + ["well"] * 6
    of_patient = {"patient_id": names, "dataset": "golden", "disease": diseases, "n_images": 4, "n_unreadable": 0}
    patients = pd.DataFrame(of_patient, index=pd.Index(names, name="patient"))
    images = pd.DataFrame({"patient": np.repeat(names, 4), "dataset": "golden", "status": "ok"})
    images.index = pd.Index([f"golden/{number}" for number in range(48)], name="image_id")
    images["content_hash"] = [f"{number:064x}" for number in range(48)]
    both = pd.DataFrame({"n_patients": [6, 6]}, index=pd.Index(["AML", "well"], name="disease"))
    var = pd.DataFrame({"latent": np.arange(N_LATENTS)}, index=[str(number) for number in range(N_LATENTS)])
    made_from = {"latents": latents.identity, "latents_spec": latents.spec.to_dict(), "made_up": "cohort"}
    header = new_header(BARCODES, {**made_from, "tau": 0.2, "token_set": "all", "normalize": "images"})
    mean = counts.mean(1)
    of_disease = np.stack([mean[:6].mean(0), mean[6:].mean(0)])
    levels = {"image": (counts.reshape(48, -1), images), "patient": (mean, patients), "disease": (of_disease, both)}
    layers = {"image": ("mean",), "patient": ("activation_sum", "n_active_images"), "disease": ()}
    for level, (rows, obs) in levels.items():
        writer = BarcodeWriter(root / f"{level}.zarr", n_latents=N_LATENTS, layers=layers[level])
        writer.append(dict.fromkeys(("X", *layers[level]), ss.csr_matrix(rows)))
        writer.finish(obs=obs, var=var, uns={"cyto": {"tau": 0.2}})
    write_header(root, Header(**{**vars(header), "complete": True, "summary": {}}))


def main(folder: Path) -> None:
    """All artefacts of version 1, each made from the one before."""
    places = [folder / name for name in ("activations-v1.zarr", "sae-v1", "latents-v1.zarr", "barcodes-v1", *RESULTS)]
    there = [os.fspath(place) for place in places if place.exists()]
    if there:
        sys.exit(f"golden artefacts are never written anew: {', '.join(there)}")
    csr.CHUNK_ENTRIES = 8  # a store tells the size of its own chunks
    activations, sae, latents, barcodes = places[:4]
    write_activations_v1(activations)
    cache = ActivationStore(activations)
    write_latents_v1(latents, cache, write_sae_v1(sae, cache))
    write_barcodes_v1(barcodes, LatentStore(latents))
    write_results_v1(folder, sae, latents)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
