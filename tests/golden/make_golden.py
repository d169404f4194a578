"""What wrote the golden artefacts beside this file, kept as a record: one tiny finished artefact per format version.

They must be readable for ever, so they are never written anew: a new format version gets a new function and a new
folder, and tests/stores/test_store_golden.py reads old and new. Run it as `PYTHONPATH=.:tests/support python
tests/golden/make_golden.py FOLDER`; in a folder that holds the FIRST ones it makes the LATER ones from them, and it
refuses one that holds any of these.
"""

import hashlib
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as ss
import torch
from barcode_writer import BarcodeWriter
from named_cells import make_world, seeing
from PIL import Image

from cytocache.pictures import Pictures
from cytosae.atlas import AtlasConfig, open_inputs, pseudonyms_file, write_atlas
from cytosae.atlas.pseudonyms import Pseudonyms, write_pseudonyms
from cytosae.barcodes import BarcodeConfig, write_barcodes
from cytosae.baselines import VersusConfig, compare_with_baselines
from cytosae.causes import AblateConfig, ablate_latents
from cytosae.cluster import open_client
from cytosae.compare import CompareConfig, ReplicateConfig, compare, replicate
from cytosae.concepts import ConceptConfig, SelectionConfig, compare_thresholds, concept_statistics, select_latents
from cytosae.maps import PatchQuery, Sources, write_maps, write_mask_agreement, write_sheets
from cytosae.names import AskConfig, DescribeConfig, describe_latents
from cytosae.probe import ProbeConfig, UnitConfig, apply_model, probe
from cytosae.relations import (
    MatchConfig,
    NeighbourConfig,
    PatientConfig,
    match_latents,
    write_neighbours,
    write_patient_concepts,
    write_stability,
)
from cytosae.review import read_review
from cytosae.review.questions import Question, Review
from cytosae.review.verdicts import Verdict, new_verdict, save_verdict, withdrawal
from cytosae.sae import SparseAutoencoder, load_sae, save_sae
from cytosae.score import ScoreConfig, score_sae
from cytosae.search import SearchConfig, search_cells
from cytosae.sweep import sweep
from stores import ConceptStore, csr
from stores.activation_spec import ActivationSpec
from stores.activation_store import ActivationStore
from stores.activation_writer import ActivationWriter
from stores.latent_spec import LatentSpec
from stores.latent_store import LatentStore
from stores.latent_writer import LatentWriter
from stores.runlog import append_run
from stores.spec import BARCODES, SAE, Header, find_header, new_header, write_header
from stores.tables import image_table, table_sha256, with_outcome

N_IMAGES, N_TOKENS, WIDTH, N_LATENTS = 3, 5, 4, 8
UNREADABLE = 1
IMAGE_IDS = ["golden/Zellen/größte.png", "golden/torn.tif", "golden/c.png"]
RESULTS = ("concepts-v1", "comparison-v1", "patient-concepts-v1", "probe-v1", "neighbours-v1", "stability-v1")
FIRST = ("activations-v1.zarr", "sae-v1", "latents-v1.zarr", "barcodes-v1", *RESULTS)
OF_CONCEPTS = ("thresholds-v1", "maps-v1", "sheets-v1", "masks-v1")
LATER = (*OF_CONCEPTS, "sweep-v1", "atlas-v1", "atlas-v1.pseudonyms.csv", "atlas-v1.reviews")
OF_MODEL = ("probe-model-v1", "probe-test-v1")
OF_BASELINES = ("versus-v1",)
OF_OTHERS = ("search-v1", "replication-v1", "match-v1")
OF_CAUSES = ("ablation-v1",)
OF_SCORE = ("scorecard-v1",)
OF_NAMES = ("names-v1", "names-v1.answers")
OF_REVIEWS = ("atlas-v1.reviews-v2",)  # of the atlas above: a verdict that is taken back
GRID = """[base]
expansion = 2
batch_tokens = 5
tokens = 20
warmup_steps = 1
l1 = 1e-3
log_every = 1
[[runs]]
[[runs]]
seed = 1
[[runs]]
lr = 1e30
"""


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
        concept_statistics(latents, folder / "concepts-v1", ConceptConfig(min_support=1), client=client)
        select_latents(ConceptStore(folder / "concepts-v1"), SelectionConfig(dataset="golden", clusters=2))
    compare(cohort, folder / "comparison-v1", CompareConfig(a="AML", b="well", n_permutations=99, n_bootstraps=20))
    write_patient_concepts(cohort, "P00", folder / "patient-concepts-v1", PatientConfig(n_splits=20))
    units = UnitConfig(target="disease")
    config = ProbeConfig(units=units, folds=2, inner_folds=2, repeats=1, permutations=2, thresholds=(0.0, 1.0))
    probe(cohort, folder / "probe-v1", config)
    settings = NeighbourConfig(min_images=1, n_top=2)
    write_neighbours(sae, folder / "neighbours-v1", settings, latents=latents, chosen=[0, 5])
    model = load_sae(sae).model
    with torch.no_grad():
        model.W_dec.copy_(model.W_dec.flip(0))  # latent s stands at 7 - s
    header = new_header(SAE, {**load_sae(sae).header.spec, "config": {"seed": 1}})
    (folder / "flipped").mkdir()
    save_sae(folder / "flipped", model, header, {"steps": 3, "tokens": 30, "images": 6, "final": {"loss": 1.5}})
    write_stability([sae, folder / "flipped"], folder / "stability-v1")
    remove_figures(folder, RESULTS)
    shutil.rmtree(cohort)
    shutil.rmtree(folder / "flipped")


def remove_figures(folder: Path, names: Sequence[str]) -> None:
    """Checksums do not cover them, and they are large."""
    for name in names:
        for figure in [*(folder / name).glob("*.png"), *(folder / name).glob("*.svg")]:
            figure.unlink()


def write_of_model_v1(folder: Path) -> None:
    """A probe of the cohort that saved its model, tried on patients with the same numbers, but other images."""
    latents = LatentStore(folder / "latents-v1.zarr")
    for name, first_hash in (("cohort", 0), ("others", 1000)):
        write_cohort(folder / name, latents, first_hash=first_hash)
    units = UnitConfig(target="disease")
    config = ProbeConfig(units=units, folds=2, inner_folds=2, repeats=1, permutations=2, thresholds=(0.0, 1.0))
    probe(folder / "cohort", folder / "probe-model-v1", config)
    apply_model(folder / "probe-model-v1", folder / "others", folder / "probe-test-v1")
    remove_figures(folder, OF_MODEL)
    for name in OF_MODEL:  # and from their headers, so that they verify
        header = find_header(folder / name)
        assert header is not None
        assert header.summary is not None
        figures = {
            file: sha256 for file, sha256 in header.summary["figures"].items() if (folder / name / file).exists()
        }
        write_header(folder / name, replace(header, summary={**header.summary, "figures": figures}))
    for name in ("cohort", "others"):
        shutil.rmtree(folder / name)


def write_of_baselines_v1(folder: Path) -> None:
    """The golden SAE beside itself upside down, whose latents have the directions of others."""
    sae = folder / "sae-v1"
    model = load_sae(sae).model
    with torch.no_grad():
        model.W_dec.copy_(model.W_dec.flip(0))
    header = new_header(SAE, {**load_sae(sae).header.spec, "config": {"seed": 1}})
    (folder / "flipped").mkdir()
    save_sae(folder / "flipped", model, header, {"steps": 3, "tokens": 30, "images": 6, "final": {"loss": 1.5}})
    config = VersusConfig(all_images=True, draws=100, least_images=2)
    compare_with_baselines(sae, folder / "activations-v1.zarr", [folder / "flipped"], folder / "versus-v1", config)
    shutil.rmtree(folder / "flipped")
    remove_figures(folder, OF_BASELINES)
    for name in OF_BASELINES:
        made = find_header(folder / name)
        assert made is not None
        write_header(folder / name, replace(made, summary={**(made.summary or {}), "figures": {}}))


def write_of_others_v1(folder: Path) -> None:
    """A search for image 2 in the golden barcodes; the golden comparison in other patients; two SAEs that are one.

    The other patients have the numbers of the cohort.
    """
    latents = LatentStore(folder / "latents-v1.zarr")
    for name in ("cohort", "others"):
        write_cohort(folder / name, latents, made_up=name)
    with open_client(None, workers=1, memory_limit="2GiB") as client:
        write_barcodes(folder / "latents-v1.zarr", folder / "counted", BarcodeConfig(tau=0.2), client=client)
    config = SearchConfig(weigh="none", k=4, top=5)
    search_cells(folder / "counted", IMAGE_IDS[2], config, out=folder / "search-v1")
    asked = ReplicateConfig(top=3, n_permutations=99, n_bootstraps=50)
    replicate(folder / "comparison-v1", folder / "others", folder / "replication-v1", asked)
    match = MatchConfig(strata=("patient",), n_permutations=9)
    match_latents(folder / "cohort", folder / "others", folder / "match-v1", match)
    remove_figures(folder, OF_OTHERS)
    for name in OF_OTHERS:
        header = find_header(folder / name)
        assert header is not None
        write_header(folder / name, replace(header, summary={**(header.summary or {}), "figures": {}}))
    for name in ("cohort", "others", "counted"):
        shutil.rmtree(folder / name)


def write_cohort(root: Path, latents: LatentStore, *, first_hash: int = 0, made_up: str = "cohort") -> None:
    """Barcodes of the twelve patients; their images have the hashes from this number on."""
    root.mkdir()
    p, i, s = np.ogrid[:12, :4, :N_LATENTS]
    counts = ((5 * p + 3 * i + s) % 7 + 3 * ((p < 6) & (s == 2))).astype(np.float32)
    names = [f"P{number:02d}" for number in range(12)]
    diseases = ["AML"] * 6 + ["well"] * 6
    of_patient = {"patient_id": names, "dataset": "golden", "disease": diseases, "n_images": 4, "n_unreadable": 0}
    patients = pd.DataFrame(of_patient, index=pd.Index(names, name="patient"))
    images = pd.DataFrame({"patient": np.repeat(names, 4), "dataset": "golden", "status": "ok"})
    images.index = pd.Index([f"golden/{number}" for number in range(48)], name="image_id")
    images["content_hash"] = [f"{first_hash + number:064x}" for number in range(48)]
    both = pd.DataFrame({"n_patients": [6, 6]}, index=pd.Index(["AML", "well"], name="disease"))
    var = pd.DataFrame({"latent": np.arange(N_LATENTS)}, index=[str(number) for number in range(N_LATENTS)])
    made_from = {"latents": latents.identity, "latents_spec": latents.spec.to_dict(), "made_up": made_up}
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


# --------------------------------------------------------------------------------- later: all that was missing yet


def write_of_concepts_v1(folder: Path, made: Path) -> None:
    """Thresholds, maps, sheets and masks of the golden concepts and latents; the images are white.

    The mask of image 0 covers patch 0, that of image 2 patches 0 and 1.
    """
    concepts, latents = ConceptStore(folder / "concepts-v1"), LatentStore(folder / "latents-v1.zarr")
    sources = Sources([latents], [lambda image: np.full((8, 8, 3), 255, np.uint8)])
    compare_thresholds([concepts.root, made / "concepts"], folder / "thresholds-v1")
    query = PatchQuery(patch=3, dataset="golden", shared=2, noisy=3)
    write_maps(sources, folder / "maps-v1", image_id="golden/c.png", query=query, concepts=concepts)
    write_sheets(concepts, sources, folder / "sheets-v1", latents=[3, 0])
    shares = {0: np.array([[1, 0.25], [0, 0]]), 2: np.array([[0.5, 1], [0, 0]])}
    write_mask_agreement(latents, shares, folder / "masks-v1", n_shuffles=4, seed=1)
    remove_figures(folder, OF_CONCEPTS)


def write_sweep_v1(folder: Path) -> None:
    """Three SAEs of four steps, of which the last fails: its learning rate is 1e30."""
    (folder / "grid.toml").write_text(GRID)
    sweep(folder / "grid.toml", [folder / "activations-v1.zarr"], folder / "sweep-v1")
    (folder / "grid.toml").unlink()
    remove_figures(folder, ["sweep-v1"])
    for log in (folder / "sweep-v1").rglob("runs.jsonl"):  # it names the place where this was made
        log.write_text(log.read_text().replace(f"{folder.absolute()}/", ""))


def write_cells(made: Path) -> None:
    """What an atlas is built from: five images of 8 x 6 pixels, their latents, barcodes, concepts and a comparison.

    The first two patients have AML, the others none; image 3 is lost after its latents were made, image 4 unreadable.
    """
    write_latents_of_pictures(made / "latents", write_pictures(made / "images"))
    (made / "images" / "3.png").unlink()
    with open_client(None, workers=1, memory_limit="2GiB") as client:
        write_barcodes(made / "latents", made / "barcodes", BarcodeConfig(tau=0.2), client=client)
        concept_statistics(made / "latents", made / "concepts", ConceptConfig(min_support=1), client=client)
    config = CompareConfig(a="AML", b="none", n_permutations=9, n_bootstraps=2, top=5)
    compare(made / "barcodes", made / "comparison", config)
    select_latents(ConceptStore(made / "concepts"), SelectionConfig(dataset="golden", clusters=2))


def write_atlas_v1(folder: Path, made: Path) -> None:
    """An atlas with pseudonyms, whose key was there before, as it is when an atlas is built anew."""
    out, latents = folder / "atlas-v1", LatentStore(made / "latents")
    sources = Sources([latents], [Pictures(latents, made / "images")])
    inputs = open_inputs(made / "barcodes", made / "concepts", sources, comparisons=[made / "comparison"])
    write_pseudonyms(pseudonyms_file(out), Pseudonyms("0123456789abcdef" * 4), [])
    write_atlas(inputs, out, AtlasConfig(pseudonyms=True, pixels=32))


def write_pictures(root: Path) -> list[str]:
    """0.png to 3.png, each of one grey; their hashes."""
    root.mkdir(parents=True)
    for image in range(4):
        Image.fromarray(np.full((6, 8, 3), 50 * (image + 1), np.uint8)).save(root / f"{image}.png")
    return [hashlib.sha256((root / f"{image}.png").read_bytes()).hexdigest() for image in range(4)]


def write_latents_of_pictures(root: Path, hashes: list[str]) -> None:
    """Latent s of image i has (i + 1) / 4 + s / 16 in the first tokens, as many as `counts` says."""
    paths: list[str | None] = [*(f"{image}.png" for image in range(4)), "torn.png"]
    more: dict[str, list[str | None]] = {
        "label": ["blast", "blast", "neutrophil", None, None],
        "patient": ["=Müller, J.", "B", "C", "D", None],
        "disease": ["AML", "AML", "none", "none", None],
    }
    manifest = image_table({"path": paths, **more}, source="make_golden.py", dataset="golden")
    images = with_outcome(manifest, [*hashes, None], [None] * 4 + ["file ends early"])
    counts = np.array(
        [
            [3, 4, 1, 2, 1, 0],  # tokens in which a latent is active, per image
            [4, 3, 0, 2, 3, 0],
            [1, 0, 4, 2, 1, 0],
            [0, 1, 3, 2, 3, 0],
            [0, 0, 0, 0, 0, 0],
        ]
    )
    i, t, s = np.ogrid[:5, :N_TOKENS, :6]
    dense = np.where(t < counts[:, None], (i + 1) / 4 + s / 16, 0).astype(np.float32)
    spec = LatentSpec(
        sae_sha256="1" * 64,
        cache_sha256="2" * 64,
        cache={"backbone": "none", "trained": False, "block": 2},
        images_sha256=table_sha256(images),
        n_images=5,
        tokens_per_image=N_TOKENS,
        n_latents=6,
        precision="fp32",
        value_bits=10,
        min_activation=0.0,
    )
    writer, rows = LatentWriter(root, spec, images), ss.csr_matrix(dense.reshape(-1, 6))
    writer.append_tokens(rows.indices, rows.data, np.diff(rows.indptr))
    writer.commit(5)
    writer.finish()


def write_reviews_v1(folder: Path) -> None:
    """Two experts; one thinks better of a verdict, the other sees labels once and judges what is no longer asked."""
    review, reviews = read_review(folder / "atlas-v1"), folder / "atlas-v1.reviews"
    meaningful, specific = review.questions
    first, second = "Dr. Zoë Müller", "B. Okafor"
    notes = "=nuclei, lobed\nnot sure of image 2"
    some = [
        said(review, meaningful, 0, first, "not", minute=0),
        said(review, meaningful, 1, first, "meaningful", minute=1, name="Auer-Stäbchen", confidence=5),
        said(review, meaningful, 2, first, "not", minute=2, notes=notes, confidence=1),
        said(review, meaningful, 0, first, "meaningful", minute=3, name="blasts", confidence=4),
        said(review, meaningful, 3, first, "unsure", minute=4),
        said(review, specific, 0, first, "a", minute=5),
        said(review, specific, 1, first, "neither", minute=6),
        said(review, specific, 2, first, "b", minute=7, confidence=3),
        said(review, specific, 3, first, "neither", minute=8),
        said(review, meaningful, 0, second, "meaningful", minute=10),
        said(review, meaningful, 1, second, "not", minute=11),
        said(review, meaningful, 2, second, "not", minute=12),
        said(review, specific, 0, second, "a", minute=13, is_blinded=False),
    ]
    earlier = said(review, meaningful, 4, second, "meaningful", minute=14)
    some.append(replace(earlier, item="0123456789abcdef", latent=5, concepts="3" * 64, atlas="4" * 64))
    for verdict in some:
        save_verdict(reviews, verdict)


def said(
    review: Review,
    question: Question,
    latent: int,
    reviewer: str,
    verdict: str,
    *,
    minute: int,
    is_blinded: bool = True,
    **more: Any,
) -> Verdict:
    """What a page sends of a latent, at a stated time."""
    (item,) = [each.item for each in question.items if each.latent == latent]
    sent = {"item": item, "reviewer": reviewer, "verdict": verdict, **more}
    found = new_verdict(sent, review, is_blinded=is_blinded)
    return replace(found, time=f"2026-11-21T12:{minute:02d}:00+00:00")


def write_scorecard_v1(folder: Path) -> None:
    """Of the golden SAE on its two readable images, which are too few for labels."""
    config = ScoreConfig(ks=(1,), folds=3, shuffles=2, min_images=2)
    sae, latents, cache = (folder / name for name in ("sae-v1", "latents-v1.zarr", "activations-v1.zarr"))
    score_sae(sae, folder / OF_SCORE[0], config, latents=[latents], caches=[cache])


def write_first(folder: Path) -> None:
    """Those of the first day."""
    csr.CHUNK_ENTRIES = 8  # a store tells the size of its own chunks
    activations, sae, latents, barcodes = (folder / name for name in FIRST[:4])
    write_activations_v1(activations)
    cache = ActivationStore(activations)
    write_latents_v1(latents, cache, write_sae_v1(sae, cache))
    write_barcodes_v1(barcodes, LatentStore(latents))
    write_results_v1(folder, sae, latents)


class MeanToken:
    """In the place of stage one: the final CLS embedding is the mean token."""

    def backbone_rest(self, *args: Any, **settings: Any) -> tuple[Any, None]:
        """As `cytocache.bridge.backbone_rest`, without images."""
        return lambda tokens: tokens.mean(1), None


def write_ablation_v1(folder: Path) -> None:
    """Latent 7 of the golden SAE set to 0 at the golden tokens."""
    config = AblateConfig(latents=(7,), n_controls=2, n_directions=2, curve=(1,), curve_images=2)
    inputs = (folder / "sae-v1", folder / "activations-v1.zarr")
    ablate_latents(*inputs, folder / "ablation-v1", config, stage_one=MeanToken(), device="cpu")  # type: ignore[arg-type]
    remove_figures(folder, OF_CAUSES)
    header = find_header(folder / "ablation-v1")
    assert header is not None
    assert header.summary is not None
    write_header(folder / "ablation-v1", replace(header, summary={**header.summary, "figures": {}}))


def write_names_v1(folder: Path) -> None:
    """Two latents of `named_cells.py`, named by a function and a colleague, tested by one that sees colours."""
    world = make_world(folder / "world")
    table = folder / "world" / "colleague.csv"
    names = iter(("red square", "green square"))
    table.write_text("latent,name,text,given_by,confidence\n0,rötliches <b>Quadrat</b>,,Ada,4\n")
    describe_latents(
        *world.inputs,
        folder / OF_NAMES[0],
        DescribeConfig(n_shown=2, n_test=6, pixels=32),
        AskConfig(n_bootstraps=100),
        latents=[0, 1],
        command=lambda request: {"name": next(names), "text": "a patch"},
        by="a function",
        answers=[table],
        judge=seeing,
        judge_by="colours",
    )
    shutil.rmtree(folder / "world")


def write_reviews_v2(folder: Path) -> None:
    """An expert takes a verdict back: none of hers counts then; the one on another item does."""
    review, reviews = read_review(folder / "atlas-v1"), folder / OF_REVIEWS[0]
    meaningful = review.questions[0]
    (first,) = [each for each in meaningful.items if each.latent == 0]
    for verdict in (
        said(review, meaningful, 0, "Ada", "meaningful", minute=20, name="blasts"),
        said(review, meaningful, 1, "Ada", "not", minute=21),
    ):
        save_verdict(reviews, verdict)
    withdrawn = withdrawal({"item": first.item, "reviewer": "Ada"}, review, is_blinded=True)
    save_verdict(reviews, replace(withdrawn, time="2026-11-29T12:22:00+00:00"))


def main(folder: Path) -> None:
    """All artefacts of version 1, each made from those before; where the first ones are there, only the later."""
    there = [
        name
        for name in (
            *FIRST,
            *LATER,
            *OF_MODEL,
            *OF_BASELINES,
            *OF_OTHERS,
            *OF_CAUSES,
            *OF_SCORE,
            *OF_NAMES,
            *OF_REVIEWS,
        )
        if (folder / name).exists()
    ]
    if there == [*FIRST, *LATER]:
        return write_of_model_v1(folder)
    if there == [*FIRST, *LATER, *OF_MODEL]:
        return write_of_baselines_v1(folder)
    if there == [*FIRST, *LATER, *OF_MODEL, *OF_BASELINES]:
        return write_of_others_v1(folder)
    if there == [*FIRST, *LATER, *OF_MODEL, *OF_BASELINES, *OF_OTHERS]:
        return write_ablation_v1(folder)
    if there == [*FIRST, *LATER, *OF_MODEL, *OF_BASELINES, *OF_OTHERS, *OF_CAUSES]:
        return write_scorecard_v1(folder)
    if there == [*FIRST, *LATER, *OF_MODEL, *OF_BASELINES, *OF_OTHERS, *OF_CAUSES, *OF_SCORE]:
        return write_names_v1(folder)
    if there == [*FIRST, *LATER, *OF_MODEL, *OF_BASELINES, *OF_OTHERS, *OF_CAUSES, *OF_SCORE, *OF_NAMES]:
        return write_reviews_v2(folder)
    if there not in ([], [*FIRST]):
        sys.exit(f"golden artefacts are never written anew: {', '.join(os.fspath(folder / name) for name in there)}")
    if not there:
        write_first(folder)
    write_cells(folder / "made")
    write_of_concepts_v1(folder, folder / "made")
    write_sweep_v1(folder)
    write_atlas_v1(folder, folder / "made")
    write_reviews_v1(folder)
    write_of_model_v1(folder)
    write_of_baselines_v1(folder)
    write_of_others_v1(folder)
    write_ablation_v1(folder)
    write_scorecard_v1(folder)
    write_names_v1(folder)
    write_reviews_v2(folder)
    shutil.rmtree(folder / "made")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
