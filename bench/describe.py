"""How fast are the images of named latents found, against nothing but reading the mean activations once?

Ours: `read_activations`, which finds the images of `--items` latents in the means of all images, in one pass. Against:
the same chunks read and decoded with zarr in as many threads, results dropped. Target: 0.3 of that rate. Then
`describe_latents` once, with a function for names and one for scores, which take no time: that pass, the choice of
images, contact sheets, statistics, pictures for the judge, figures with intervals; less than 2 GiB at the peak.

The barcodes are invented as in bench/search.py; the latents have few nonzeros, since only the maps of the shown images
are read; pictures are drawn. Full size: bench/describe.py --share 1 --folder /big/disk --rounds 1
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from common import N_LATENTS, add_folder, alternate, arguments, emit, now, scratch
from search import ALL_IMAGES, TYPES, generate, read_chunks, tasks_of

from stores.machine import n_cores

_TOKENS = 17  # of an image: CLS and 4 x 4 patches


def main() -> None:
    """Measure and print one line of JSON."""
    parser = arguments(__doc__)
    add_folder(parser)
    parser.add_argument("--share", type=float, default=0.02, help=f"of {ALL_IMAGES:,} images (%(default)s)")
    parser.add_argument("--latents", type=int, default=N_LATENTS, help="(%(default)s)")
    parser.add_argument("--images-per-patient", type=int, default=430, help="(%(default)s)")
    parser.add_argument("--items", type=int, default=50, help="latents to name (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    options = parser.parse_args()
    n_images = max(TYPES, round(options.share * ALL_IMAGES))
    with scratch(options.folder) as folder:
        generate(folder / "barcodes", n_images, options)
        measured = measure(folder, n_images, options)
    ours, reading = measured.pop("ours"), measured.pop("reading")
    emit(
        "describe",
        ratio=reading.seconds / ours.seconds,
        target=0.3,
        ours=ours.to_json(n_images, "images"),
        baseline=reading.to_json(n_images, "images") | {"what": "reading and decoding the means with zarr"},
        **measured,
        target_peak_gib=2,
        params={key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
    )


def measure(folder: Path, n_images: int, options: argparse.Namespace) -> dict[str, Any]:
    """Both sides in turns, our memory, and what was said before."""
    from barcode import peak_bytes, reset_peak

    from cytosae.maps import Sources
    from cytosae.names import describe_latents, plan_describe
    from cytosae.names.activations import means_of_images, read_activations
    from stores import BarcodeStore, LatentStore

    write_others(folder, n_images, options)
    rng = np.random.default_rng(options.seed)
    texture = rng.integers(60, 220, (256, 256, 3), dtype=np.uint8)
    sources = Sources([LatentStore(folder / "latents")], [lambda n: np.roll(texture, n, axis=0)])
    active = BarcodeStore(folder / "barcodes").read_element("image", "var")["n_active_images"].to_numpy()
    chosen = np.argsort(-active, kind="stable")[: 4 * options.items : 4].tolist()
    given: dict[str, Any] = {"latents": chosen, "command": naming, "judge": scoring}
    reader = means_of_images(BarcodeStore(folder / "barcodes"), None)

    def ours() -> None:
        assert len(list(read_activations(reader, chosen))) == options.items

    def reading() -> None:
        with ThreadPoolExecutor(n_cores()) as threads:
            list(threads.map(lambda task: read_chunks(*task), tasks_of([folder / "barcodes/image.zarr/layers/mean"])))

    finding, plain = alternate(ours, reading, rounds=options.rounds)
    reset_peak()
    began = now()
    done = describe_latents(folder / "barcodes", folder / "concepts", sources, folder / "names", **given)
    spent = now() - began
    assert done.n_items == options.items
    plan = plan_describe(folder / "barcodes", folder / "concepts", latents=chosen, command="x", judge="x")
    return {
        "ours": finding,
        "reading": plain,
        "describe": {"seconds": spent.seconds, "cpu_seconds": spent.cpu_seconds, "n_items": done.n_items},
        "peak_gib": peak_bytes() / 2**30,
        "said_before": [*plan.lines()],
        "nonzeros": plan.n_nonzeros,
        "threads": n_cores(),
    }


def naming(request: dict[str, Any]) -> dict[str, Any]:
    """A name at once."""
    return {"name": f"cells like {request['picture']['sha256'][:6]}"}


def scoring(request: dict[str, Any]) -> dict[str, Any]:
    """Scores at once, which mean nothing."""
    return {"scores": [len(each["base64"]) % 97 / 97 for each in request["pictures"]]}


def write_others(folder: Path, n_images: int, options: argparse.Namespace) -> None:
    """Latents with two nonzeros an image, concepts with a top image of each latent, and barcodes that fit them."""
    from stores import BARCODES, CONCEPTS, LatentSpec, LatentWriter, begin_results, new_header, write_header
    from stores.concept_store import LATENT_COLUMNS, TOP_COLUMNS
    from stores.spec import Header
    from stores.tables import image_table, table_sha256, with_outcome

    ids: list[str | None] = [f"{number:06d}.jpg" for number in range(n_images)]
    hashes: list[str | None] = [f"{number:064x}" for number in range(n_images)]
    images = with_outcome(image_table({"path": ids}, source="bench", dataset="set0"), hashes, [None] * n_images)
    spec = LatentSpec(
        sae_sha256="1" * 64,
        cache_sha256="2" * 64,
        cache={"backbone": "none", "trained": False, "block": 10},
        images_sha256=table_sha256(images),
        n_images=n_images,
        tokens_per_image=_TOKENS,
        n_latents=options.latents,
        precision="fp32",
        value_bits=10,
        min_activation=0.0,
    )
    writer = LatentWriter(folder / "latents", spec, images)
    lengths = np.zeros(n_images * _TOKENS, np.int64)
    lengths[1::_TOKENS] = lengths[9::_TOKENS] = 1
    columns = np.random.default_rng(1).integers(0, options.latents, 2 * n_images)
    writer.append_tokens(columns, np.ones(2 * n_images, np.float32), lengths)
    writer.commit(n_images)
    header = writer.finish()
    assert header is not None
    rows = {"latent": np.arange(options.latents), "dataset": ["set0"] * options.latents}
    top = {**rows, "rank": [1] * options.latents, "image_index": np.arange(options.latents) % n_images}
    concepts = begin_results(
        folder / "concepts", CONCEPTS, {"latents_spec": [{"sae_sha256": "1" * 64}], "latents": [header.identity]}
    )
    for name, kinds, held in (("latents", LATENT_COLUMNS, rows), ("top_images", TOP_COLUMNS, top)):
        cells = {key: pa.array(held.get(key, [None] * options.latents), kind) for key, kind in kinds.items()}
        concepts.write_table(name, pa.table(cells))
    concepts.finish({"n_latents": options.latents, "by_dataset": [{"dataset": "set0"}]})
    told = new_header(BARCODES, {"latents": header.identity, "tau": 0.2, "token_set": "all", "normalize": "images"})
    (folder / "barcodes" / "barcodes.json").unlink()
    write_header(folder / "barcodes", Header(**{**vars(told), "complete": True, "summary": {}}))


if __name__ == "__main__":
    main()
