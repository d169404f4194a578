"""What do the examples of an atlas cost: deciles, near misses and best cells of every latent, cells like each image?

Ours: `find_examples` for all latents, which reads the image activations two times, and once more for as many patients
as fit; and `nearest_among` for all images. Against: the same image activations read and decoded with zarr, once. The
aim is 20 times that: a small part of the atlas, whose pages take minutes. The barcodes are those of bench/search.py.
Full size: bench/atlas.py --share 1 --folder /big/disk
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from barcode import peak_bytes, reset_peak
from common import N_LATENTS, Spent, Timing, add_folder, arguments, emit, now, scratch
from search import ALL_IMAGES, TYPES, generate, read_chunks, tasks_of

from stores.machine import n_cores

N_REFERENCES = 10  # of each latent, as in an atlas


def main() -> None:
    """Measure and print one line of JSON."""
    parser = arguments(__doc__, rounds=1)
    add_folder(parser)
    parser.add_argument("--share", type=float, default=0.02, help=f"of {ALL_IMAGES:,} images (%(default)s)")
    parser.add_argument("--latents", type=int, default=N_LATENTS, help="(%(default)s)")
    parser.add_argument("--images-per-patient", type=int, default=430, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--keep", type=Path, help="make the barcodes here and keep them; those that are there are used")
    options = parser.parse_args()
    n_images = max(TYPES, round(options.share * ALL_IMAGES))
    with scratch(options.folder) as folder:
        root = options.keep or folder / "cells.barcodes"
        if not (root / "barcodes.json").is_file():
            generate(root, n_images, options)
        measure(root, options)


def measure(root: Path, options: Any) -> None:
    """Both sides, after a first call that compiles."""
    from cytosae.atlas.examples import find_examples
    from cytosae.search import nearest_among
    from stores import BarcodeStore

    store = BarcodeStore(root)
    obs = store.read_obs("image", None)
    patients = np.unique(np.asarray(obs["patient"], str), return_inverse=True)[1]
    names = sorted({*obs["dataset"]})
    inputs: Any = SimpleNamespace(
        barcodes=store, tau=0.2, n_latents=options.latents, concepts=SimpleNamespace(datasets=names)
    )
    cohort: Any = SimpleNamespace(
        is_readable=np.ones(len(obs), bool),
        image_datasets=list(obs["dataset"]),
        patient_of=patients,
        n_patients=int(patients.max()) + 1,
    )
    rng, latents = np.random.default_rng(options.seed), np.arange(options.latents)
    references = np.repeat(latents, N_REFERENCES), rng.integers(len(obs), size=options.latents * N_REFERENCES)
    settings = {"per_decile": 2, "n_near": 6, "seed": 0}
    few = latents[:2]
    warm = find_examples(inputs, cohort, few, (few, np.zeros(2, np.int64)), **settings)
    nearest_among(warm.fingerprints.take(np.arange(2)), patients[:2], np.arange(2), top=6)

    matrix = [root / "image.zarr" / "layers" / "mean"]
    ours: list[Spent] = []
    alike: list[Spent] = []
    reading: list[Spent] = []
    for _ in range(options.rounds):
        began = now()
        with ThreadPoolExecutor(n_cores()) as threads:
            list(threads.map(lambda task: read_chunks(*task), tasks_of(matrix)))
        reading.append(now() - began)
        reset_peak()
        began = now()
        found = find_examples(inputs, cohort, latents, references, **settings)
        ours.append(now() - began)
        peak = peak_bytes()
        began = now()
        nearest_among(found.fingerprints, patients, np.arange(len(obs)), top=6)
        alike.append(now() - began)
    emit(
        "atlas",
        ratio=Timing(ours).seconds / Timing(reading).seconds,
        target=20,
        ours=Timing(ours).to_json(len(latents), "latents"),
        baseline=Timing(reading).to_json(len(latents), "latents")
        | {"what": "reading and decoding the means with zarr"},
        alike=Timing(alike).to_json(len(obs), "images"),
        nonzeros=store.matrix("image", None, "mean").nnz,
        peak_gib=peak / 2**30,
        params={key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
    )


if __name__ == "__main__":
    main()
