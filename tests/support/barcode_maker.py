"""Barcodes of patients that a test makes up, without images, latents or Dask."""

import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
from barcode_writer import BarcodeWriter
from scipy.sparse import csr_matrix

from stores import BARCODES, new_header, write_header
from stores.barcode_store import level_name
from stores.spec import Header


def write_patient_barcodes(
    root: Path,
    values: npt.NDArray[np.floating],
    diseases: list[str],
    *,
    names: list[str] | None = None,
    datasets: list[str] | None = None,
    n_images: list[int] | None = None,
    taus: tuple[float, ...] = (0.2,),
    normalize: str = "images",
    token_set: str = "all",
    content_hashes: list[str] | None = None,
) -> Path:
    """A complete barcodes folder whose patients have these values (patients, latents); one image each."""
    n_patients, n_latents = values.shape
    names = names or [f"P{number:03d}" for number in range(n_patients)]
    obs = pd.DataFrame(
        {
            "patient_id": names,
            "dataset": datasets or ["drawn"] * n_patients,
            "disease": diseases,
            "n_images": n_images or [10] * n_patients,
            "n_unreadable": 0,
        },
        index=pd.Index(names, name="patient"),
    )
    known = sorted({*diseases} - {""})
    means = np.array([values[[disease == name for disease in diseases]].mean(0) for name in known])
    images = obs.assign(patient=names, status="ok", content_hash=content_hashes or names)
    levels = {"image": (values, images), "patient": (values, obs), "disease": (means, pd.DataFrame(index=known))}
    var = pd.DataFrame({"latent": np.arange(n_latents)}, index=[str(latent) for latent in range(n_latents)])
    root.mkdir(parents=True, exist_ok=True)
    for tau in taus:
        for level, (rows, table) in levels.items():
            writer = BarcodeWriter(root / f"{level_name(level, tau, is_only=len(taus) == 1)}.zarr", n_latents=n_latents)
            writer.append({"X": csr_matrix(np.asarray(rows, np.float32).reshape(-1, n_latents))})
            writer.finish(obs=table, var=var, uns={"cyto": {"tau": tau}})
    spec = {
        "tau": taus[0] if len(taus) == 1 else [*taus],
        "normalize": normalize,
        "token_set": token_set,
        "made_up": names,
    }
    header = new_header(BARCODES, spec)
    write_header(root, Header(**{**vars(header), "complete": True, "summary": {}}))
    return root


def write_image_barcodes(
    root: Path,
    values: npt.NDArray[np.floating],
    patient_of: npt.NDArray[np.int64],
    diseases: list[str],
    **columns: object,
) -> Path:
    """A complete barcodes folder from images (images, latents); patients have the means. `columns`: of the images."""
    n_images, n_latents = values.shape
    names = [f"P{number:03d}" for number in range(len(diseases))]
    members = np.eye(len(diseases))[patient_of]
    means = (members.T @ values) / members.sum(0)[:, None]
    write_patient_barcodes(root, means.astype(np.float32), diseases, n_images=members.sum(0).astype(int).tolist())
    images = pd.DataFrame(
        {
            "patient": [names[i] for i in patient_of],
            "dataset": "drawn",
            "disease": [diseases[i] for i in patient_of],
            "status": "ok",
            "content_hash": [f"h{number}" for number in range(n_images)],
            **columns,
        },
        index=pd.Index([f"i{number}" for number in range(n_images)], name="image_id"),
    )
    var = pd.DataFrame({"latent": np.arange(n_latents)}, index=[str(latent) for latent in range(n_latents)])
    shutil.rmtree(root / "image.zarr")
    writer = BarcodeWriter(root / "image.zarr", n_latents=n_latents)
    writer.append({"X": csr_matrix(np.asarray(values, np.float32))})
    writer.finish(obs=images, var=var, uns={"cyto": {"tau": 0.2}})
    return root
