"""What wrote the golden artefacts beside this file, kept as a record: one tiny finished artefact per format version.

They must be readable for ever, so they are never written anew: a new format version gets a new function and a new
folder, and tests/test_store_golden.py reads old and new. Run it as `python tests/golden/make_golden.py FOLDER`; it
refuses a folder that already holds one of them.
"""

import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as ss
import torch

from cytosae.checkpoint import save_sae
from cytosae.model import SparseAutoencoder
from stores import csr
from stores.activation_store import ActivationSpec, ActivationStore
from stores.activation_writer import ActivationWriter
from stores.barcode_store import BarcodeWriter
from stores.latent_store import LatentSpec, LatentStore, LatentWriter
from stores.runlog import append_run
from stores.spec import BARCODES, SAE, Header, new_header, write_header
from stores.tables import image_table, table_sha256

N_IMAGES, N_TOKENS, WIDTH, N_LATENTS = 3, 5, 4, 8
UNREADABLE = 1


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


def main(folder: Path) -> None:
    """All artefacts of version 1, each made from the one before."""
    places = [folder / name for name in ("activations-v1.zarr", "sae-v1", "latents-v1.zarr", "barcodes-v1")]
    there = [os.fspath(place) for place in places if place.exists()]
    if there:
        sys.exit(f"golden artefacts are never written anew: {', '.join(there)}")
    csr.CHUNK_ENTRIES = 8  # a store tells the size of its own chunks
    activations, sae, latents, barcodes = places
    write_activations_v1(activations)
    cache = ActivationStore(activations)
    write_latents_v1(latents, cache, write_sae_v1(sae, cache))
    write_barcodes_v1(barcodes, LatentStore(latents))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
