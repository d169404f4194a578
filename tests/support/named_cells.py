"""Cells whose latents answer to coloured squares: pictures, latents, barcodes and concepts, made without a cluster.

Latents 0, 1 and 2 are active where a red, green or blue square is; 3 at random; 4 never; 5 in one image alone.
"""

import hashlib
from base64 import b64decode
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from concept_folders import make_concepts
from latent_stores import write_latents
from PIL import Image
from search_cells import write_search_barcodes

from cytosae.maps import Sources
from stores import LatentStore
from stores.tables import column

COLOURS = {"red": 0, "green": 1, "blue": 2}
N_IMAGES, N_PATIENTS, SIDE, PIXELS, N_LATENTS = 160, 20, 4, 32, 6
SECRETS = ("Quentin", "secret", "ward")  # in ids, patients and datasets: they must not leave


@dataclass(frozen=True)
class World:
    """Where everything lies, and how active each latent is, (images, latents)."""

    root: Path
    sources: Sources
    means: npt.NDArray[np.float32]
    images: pd.DataFrame
    pictures: list[npt.NDArray[np.uint8]]

    @property
    def inputs(self) -> tuple[Path, Path, Sources]:
        """What `describe_latents` takes first."""
        return self.root / "barcodes", self.root / "concepts", self.sources


def make_world(root: Path, *, n_patients: int = N_PATIENTS, seed: int = 0) -> World:
    """160 grey cells of as many patients as are asked for; image 9 is unreadable, image 21 a copy of image 20.

    Below `root`: images, latents, barcodes, concepts.
    """
    rng = np.random.default_rng(seed)
    has = rng.random((N_IMAGES, 3)) < 0.4
    dense = np.zeros((N_IMAGES, 1 + SIDE * SIDE, N_LATENTS), np.float32)
    pictures = []
    for image in range(N_IMAGES):
        pixels = np.full((PIXELS, PIXELS, 3), 150, np.uint8)
        pixels += rng.integers(0, 3, (PIXELS, PIXELS, 1), dtype=np.uint8)
        for colour, patch in zip(range(3), rng.permutation(SIDE * SIDE)[:3], strict=True):
            if has[image, colour]:
                y, x = divmod(int(patch), SIDE)
                square = pixels[y * 8 : y * 8 + 8, x * 8 : x * 8 + 8]
                square[:] = 20
                square[:, :, colour] = 230
                dense[image, 1 + patch, colour] = rng.uniform(1, 3)
        pictures.append(pixels)
    pictures[21], dense[21] = pictures[20], dense[20]
    dense[:, 5, 3] = np.where(rng.random(N_IMAGES) < 0.4, rng.uniform(1, 3, N_IMAGES), 0)
    dense[30, 7, 5] = 1
    dense[9] = 0
    dense = dense.astype(np.float16).astype(np.float32)
    patients = [f"Quentin {n % n_patients:02d}" for n in range(N_IMAGES)]
    datasets = [f"ward {n % n_patients % 2}" for n in range(N_IMAGES)]
    ids = [f"secret/{patients[n]}/{n:03d}" for n in range(N_IMAGES)]
    (root / "images").mkdir(parents=True)
    hashes = []
    for n in range(N_IMAGES):
        path = root / "images" / f"{n:04d}.png"
        Image.fromarray(pictures[20 if n == 21 else n]).save(path)
        hashes.append(hashlib.sha256(path.read_bytes()).hexdigest())
    labels = [f"kind {n % 2}" for n in range(N_IMAGES)]
    write_latents(
        root / "latents",
        dense,
        [(patient, None, n != 9) for n, patient in enumerate(patients)],
        hashes=hashes,
        further={"image_id": ids, "dataset": datasets, "label": labels},
    )
    store = LatentStore(root / "latents")
    means = dense.mean(1)
    images = pd.DataFrame(
        {
            "patient": patients,
            "dataset": datasets,
            "label": labels,
            "status": ["ok" if n != 9 else "unreadable" for n in range(N_IMAGES)],
            "content_hash": [name or "" for name in column(store.images, "content_hash")],
        },
        index=pd.Index(ids, name="image_id"),
    )
    write_search_barcodes(root / "barcodes", dense.max(1), means, (dense > 0.2).sum(1), images, latents=store.identity)
    top = [
        {"latent": latent, "dataset": "ward 0", "rank": rank, "image_id": ids[image], "image_index": int(image)}
        | {"value": float(means[image, latent]), "label": labels[image]}
        for latent in range(N_LATENTS)
        for rank, image in enumerate(np.argsort(-means[:, latent], kind="stable")[:4], start=1)
        if means[image, latent] > 0
    ]
    active = (means > 0).sum(0).tolist()
    statistics = {"ward 0": {"mean_activation": [1.0] * N_LATENTS, "frequency": [0.4] * N_LATENTS, "n_images": active}}
    make_concepts(root / "concepts", statistics, top=top, sae_sha256="1" * 64, latents=[store.identity])
    return World(root, Sources([store], [lambda n: pictures[n]]), means, images, pictures)


def colours_of(picture: dict[str, Any]) -> dict[str, float]:
    """The share of a picture, as a command gets it, that is red, green and blue."""
    pixels = np.asarray(Image.open(BytesIO(b64decode(picture["base64"]))).convert("RGB"), int)
    rest = [pixels[:, :, [n for n in range(3) if n != colour]].max(2) for colour in range(3)]
    return {name: float((pixels[:, :, n] > rest[n] + 80).mean()) for name, n in COLOURS.items()}


def seeing(request: dict[str, Any]) -> dict[str, Any]:
    """A command that sees colours: it gives no names, but says how much of the named colour is in a picture."""
    shares = [colours_of(picture) for picture in request["pictures"]]
    colour = next((name for name in COLOURS if name in request["name"]), None)
    return {"scores": [0.5 if colour is None else min(1.0, 20 * share[colour]) for share in shares]}


def guessing(seed: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A judge that does not look."""
    rng = np.random.default_rng(seed)
    return lambda request: {"scores": rng.random(len(request["pictures"])).tolist()}
