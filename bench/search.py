"""How fast is a search for cells like one image, against nothing but reading the barcodes?

Ours: `search_cells`, by fingerprint and by whole barcode: every image is compared, exactly. Against: the same chunks
of the two matrices read and decoded with zarr in as many threads, results dropped. Target: 0.3 of that rate, and less
than 2 GiB at the peak. `--evaluate Q` also measures `evaluate_search` with Q queries, once.

The barcodes are invented: image.zarr alone, a share of the bone-marrow dataset of 171,373 images, each with about
1,853 of 49,152 latents, by the released frequencies where they are at hand. The page cache is warm for both, where
memory holds the store. Full size (some 3 GB, made in some minutes): bench/search.py --share 1 --folder /big/disk
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from common import N_LATENTS, add_folder, alternate, arguments, emit, latent_frequency, now, say, scratch

from stores.machine import n_cores

ALL_IMAGES = 171_373
_BLOCK = 512  # images that are drawn together
_CHUNKS = 4  # of a task of the baseline
TYPES = 12


def main() -> None:
    """Measure and print one line of JSON."""
    parser = arguments(__doc__)
    add_folder(parser)
    parser.add_argument("--share", type=float, default=0.02, help=f"of {ALL_IMAGES:,} images (%(default)s)")
    parser.add_argument("--latents", type=int, default=N_LATENTS, help="(%(default)s)")
    parser.add_argument("--images-per-patient", type=int, default=430, help="(%(default)s)")
    parser.add_argument("--evaluate", type=int, default=0, help="queries of an evaluation; 0: none (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--keep", type=Path, help="make the barcodes here and keep them; those that are there are used")
    options = parser.parse_args()
    n_images = max(TYPES, round(options.share * ALL_IMAGES))
    with scratch(options.folder) as folder:
        root = options.keep or folder / "cells.barcodes"
        if not (root / "barcodes.json").is_file():
            generate(root, n_images, options)
        measured = measure(root, folder, options)
    ours, reading = measured.pop("ours"), measured.pop("reading")
    emit(
        "search",
        ratio=reading.seconds / ours.seconds,
        target=0.3,
        ours=ours.to_json(n_images, "images"),
        baseline=reading.to_json(n_images, "images") | {"what": "reading and decoding the same chunks with zarr"},
        **measured,
        target_peak_gib=2,
        params={key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
    )


def generate(root: Path, n_images: int, options: Any) -> None:
    """Image barcodes with the layer `mean`; an image of type t has the latents s with s mod 12 = t thrice as often."""
    import pandas as pd

    from stores.barcode_store import NOTHING_ELSE, begin_level, write_tables
    from stores.csr import CsrWriter
    from stores.spec import BARCODES, Header, new_header, write_header

    frequency, _ = latent_frequency(options.latents)
    rng = np.random.default_rng(options.seed)
    kind = rng.integers(TYPES, size=n_images)
    own = np.arange(options.latents) % TYPES
    root.mkdir(parents=True, exist_ok=True)
    image = root / "image.zarr"
    begin_level(image)
    writers = {
        name: CsrWriter(image / path, n_columns=options.latents, indices="int32")
        for name, path in {"X": "X", "mean": "layers/mean"}.items()
    }
    n_active = np.zeros(options.latents, np.int64)
    odds = np.where(own == np.arange(TYPES)[:, None], 3.0, 1 - 2 / (TYPES - 1)) * frequency
    # a latent that is drawn a Poisson number of times of mean -log(1 - p) is drawn at all with probability p
    times = np.cumsum(-np.log1p(-np.minimum(odds, 1 - 1e-6)), axis=1)
    for first in range(0, n_images, _BLOCK):
        types = kind[first : first + _BLOCK]
        drawn = []
        for t in range(TYPES):
            rows = np.flatnonzero(types == t)
            n_of_row = rng.poisson(times[t, -1], len(rows))
            found = np.searchsorted(times[t], rng.random(int(n_of_row.sum())) * times[t, -1])
            drawn.append(np.repeat(rows, n_of_row) * options.latents + found)
        row, column = np.divmod(np.unique(np.concatenate(drawn)), options.latents)
        lengths = np.bincount(row, minlength=len(types))
        n_active += np.bincount(column, minlength=options.latents)
        values = {
            "X": 1 + np.floor(rng.exponential(12, len(column))).clip(0, 256),
            "mean": rng.lognormal(-3, 1, len(column)),
        }
        for name, writer in writers.items():
            writer.append(column.astype(np.int32), values[name].astype(np.float32), lengths)
        if first % (64 * _BLOCK) == 0:
            say(f"{first:,} of {n_images:,} images drawn")
    for writer in writers.values():
        writer.finish()
    patient = np.arange(n_images) // options.images_per_patient
    obs = pd.DataFrame(
        {
            "patient": [f"P{p:04d}" for p in patient],
            "dataset": [f"set{p % 3}" for p in patient],
            "label_common": [f"type {t}" for t in kind],
            "disease": [f"D{p % 5}" for p in patient],
            "status": "ok",
            "content_hash": [f"{number:064x}" for number in range(n_images)],
        },
        index=pd.Index([f"{number:06d}.jpg" for number in range(n_images)], name="image_id"),
    )
    latents = np.arange(options.latents)
    var = pd.DataFrame({"latent": latents, "n_active_images": n_active}, index=latents.astype(str))
    write_tables(image, {"obs": obs, "var": var, "uns": {"cyto": {"tau": 0.2}}, **NOTHING_ELSE})
    header = new_header(BARCODES, {"latents": "0" * 64, "tau": 0.2, "token_set": "all", "normalize": "images"})
    write_header(root, Header(**{**vars(header), "complete": True, "summary": {}}))


def measure(root: Path, folder: Path, options: Any) -> dict[str, Any]:
    """Both sides in turns, our memory, and the evaluation."""
    from barcode import peak_bytes, reset_peak

    from cytosae.search import SearchConfig, SearchEvaluationConfig, evaluate_search, search_cells, search_scale
    from stores import BarcodeStore

    matrices = [root / "image.zarr" / "layers" / "mean", root / "image.zarr" / "X"]
    peaks: list[int] = []

    def ours() -> None:
        reset_peak()
        found = search_cells(root, "000007.jpg")
        assert len(found.images) == 40
        peaks.append(peak_bytes())

    def reading() -> None:
        with ThreadPoolExecutor(n_cores()) as threads:
            list(threads.map(lambda task: read_chunks(*task), tasks_of(matrices)))

    searching, plain = alternate(ours, reading, rounds=options.rounds)
    found: dict[str, Any] = {
        "ours": searching,
        "reading": plain,
        "peak_gib": max(peaks) / 2**30,
        "said_before": search_scale(root, SearchConfig()),
        "nonzeros": BarcodeStore(root).matrix("image", None).nnz,
        "bytes": sum(path.stat().st_size for path in root.rglob("*") if path.is_file()),
        "threads": n_cores(),
    }
    if options.evaluate:
        config = SearchEvaluationConfig(n_queries=options.evaluate)
        reset_peak()
        began = now()
        done = evaluate_search(root, folder / "evaluated", config)
        found["evaluation"] = {
            "seconds": (now() - began).seconds,
            "peak_gib": peak_bytes() / 2**30,
            "said_before": search_scale(root, config),
            "precision_at_10": {row["by"]: row["precision"] for row in done.rows if row["at"] == 10},
        }
    return found


def tasks_of(matrices: list[Path]) -> list[tuple[Path, str, int, int]]:
    """(matrix, array, first entry, last) of every few chunks."""
    import zarr

    tasks = []
    for matrix in matrices:
        for name in ("indices", "data"):
            array = zarr.open_array(matrix / name, mode="r")
            step = _CHUNKS * array.chunks[0]
            tasks += [(matrix, name, at, min(at + step, array.shape[0])) for at in range(0, array.shape[0], step)]
    return tasks


def read_chunks(matrix: Path, name: str, first: int, last: int) -> int:
    """Decode some entries."""
    import zarr

    return len(np.asarray(zarr.open_array(matrix / name, mode="r")[first:last]))


if __name__ == "__main__":
    main()
