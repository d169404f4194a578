"""The commands of docs/evidence.md at 171,373 images and 49,152 latents, on invented stores: time and memory of each.

    make     tokens (65 of width 128 for each image, so that they fit on a disk), an SAE that was trained for a moment,
             a baseline of it, latents with the released frequencies, barcodes of all images, of every second patient,
             and of a second SAE; pictures, each one of 64 drawn cells
    measure  score, versus, ablate, search, compare and replicate, match, concepts, atlas with all pages: each a process
             of its own, whose processor time and largest resident memory count, with the bytes and files that it wrote;
             what it says before it starts stands beside

Images have one of 12 types (label), in four groups (label_common), 430 of a patient; an image of type t has the latents
s with s mod 12 = t three times as often. Numbers that come out mean nothing. The stores (10 GB, the atlas
10 GB) stay in --folder, so that a part can be measured again; remove them at the end. An interrupted call continues.
"""

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from common import N_LATENTS, arguments, latent_frequency, machine, say

ALL_IMAGES = 171_373
TYPES, GROUPS, OF_PATIENT, DRAWN = 12, 4, 430, 64
_CHUNK = 1024
_CLI = "import sys; from cyto_start import start; sys.exit(start())"


def main() -> None:
    """Make what is missing, measure, and print a line of JSON for each command."""
    parser = arguments(__doc__, rounds=1)
    parser.add_argument("--folder", type=Path, required=True, help="where the stores are made, and stay")
    parser.add_argument("--images", type=int, default=ALL_IMAGES, help="(%(default)s)")
    parser.add_argument("--latents", type=int, default=N_LATENTS, help="(%(default)s)")
    parser.add_argument("--tokens", type=int, default=65, help="CLS and a square of patches (%(default)s)")
    parser.add_argument("--width", type=int, default=128, help="(%(default)s)")
    parser.add_argument("--l0", type=float, default=32, help="(%(default)s)")
    parser.add_argument("--permutations", type=int, default=9, help="of match, whose default is 99 (%(default)s)")
    parser.add_argument("--only", choices=[*COMMANDS], action="append", help="this one (may repeat)")
    parser.add_argument("--as-child", choices=["ablate"], help="how this script calls itself")
    options = parser.parse_args()
    if options.as_child:
        ablate(options)
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in options.only or COMMANDS:
        for needed in NEEDS[name]:
            done = options.folder / f"{needed}.made"
            if not done.is_file():
                began = time.process_time()
                say(f"making {needed}")
                MAKERS[needed](options)
                done.write_text(f"{time.process_time() - began:.0f}\n")
        found = measured(COMMANDS[name](options), options.folder)
        print(json.dumps({"command": name, **found, "params": {"images": options.images}}, default=str), flush=True)
    say(json.dumps(machine()))


# ------------------------------------------------------------------------------------------------- stores


def types_of(options: Any) -> Any:
    """(images,) the type of each."""
    return np.random.default_rng(5).integers(TYPES, size=options.images)


def frequencies(options: Any) -> Any:
    """(TYPES, latents) share of images of each type in which each latent is active."""
    frequency, _ = latent_frequency(options.latents)
    own = np.arange(options.latents) % TYPES == np.arange(TYPES)[:, None]
    return np.minimum(np.where(own, 3.0, 1 - 2 / (TYPES - 1)) * frequency, 1)


def table_of(options: Any) -> Any:
    """The image table."""
    from stores import tables

    kind, patients = types_of(options), np.arange(options.images) // OF_PATIENT
    columns: dict[str, list[str | None]] = {
        "path": [f"{image:06d}.jpg" for image in range(options.images)],
        "image_id": [f"{image:06d}.jpg" for image in range(options.images)],
        "patient": [f"P{patient:04d}" for patient in patients],
        "disease": [f"D{patient % 2}" for patient in patients // 2],
        "label": [f"type {t:02d}" for t in kind],
        "label_common": [f"group {t % GROUPS}" for t in kind],
    }
    return tables.image_table(columns, source="synthetic", dataset="synthetic")


def pictures(options: Any) -> Iterator[bytes]:
    """The file of each image: one of 64 drawn cells, with the image's number as a comment, so that all differ."""
    from PIL import Image

    from cytocache.demo_cells import CELL_TYPES, draw_cell

    drawn: list[bytes] = []
    for n in range(DRAWN):
        file = io.BytesIO()
        cell = draw_cell(CELL_TYPES[n % len(CELL_TYPES)], np.random.default_rng([8, n]), size=250)
        Image.fromarray(cell).save(file, "jpeg", quality=90)
        drawn.append(file.getvalue())
    for n in range(options.images):
        start, rest = drawn[n % DRAWN][:2], drawn[n % DRAWN][2:]
        yield start + b"\xff\xfe\x00\x0a" + f"{n:08d}".encode() + rest


def make_pictures(options: Any) -> None:
    """pictures: a folder of all images."""
    (options.folder / "pictures").mkdir(exist_ok=True)
    for n, file in enumerate(pictures(options)):
        (options.folder / "pictures" / f"{n:06d}.jpg").write_bytes(file)


def make_cache(options: Any) -> None:
    """acts.zarr: the tokens of an image are a direction of its type, one of its own, and noise."""
    from stores.activation_spec import ActivationSpec
    from stores.activation_writer import ActivationWriter
    from stores.tables import table_sha256

    table, side = table_of(options), round((options.tokens - 1) ** 0.5)
    spec = ActivationSpec(
        backbone="synthetic", weights_sha256="0" * 64, trained=False, block=10, n_blocks=12,
        transform={"size": 224, "interpolation": "none"}, precision="fp32",
        token_layout=f"1 CLS + {side}x{side} patches, row-major", n_images=options.images,
        tokens_per_image=options.tokens, width=options.width, chunk_images=min(_CHUNK, options.images),
        manifest_sha256=table_sha256(table),
    )  # fmt: skip
    writer, kind = ActivationWriter(options.folder / "acts.zarr", spec, table), types_of(options)
    hashes: list[str | None] = [hashlib.sha256(file).hexdigest() for file in pictures(options)]
    of_type = np.random.default_rng(6).standard_normal((TYPES, options.width), np.float32)
    for chunk in writer.missing_chunks():
        rows, rng = spec.chunk_rows(chunk), np.random.default_rng([7, chunk])
        images = np.arange(rows.start, rows.stop)
        tokens = rng.standard_normal((len(images), options.tokens, options.width), np.float32)
        tokens += (of_type[kind[images]] + rng.standard_normal((len(images), options.width), np.float32))[:, None]
        writer.write_chunk(chunk, tokens.astype(np.float16), hashes[rows.start : rows.stop], [None] * len(images))
    writer.finish()


def make_sae(options: Any) -> None:
    """cells.sae, trained for 16 steps, a tenth of the patients held out."""
    train = ["sae", "train", "acts.zarr", "-o", "cells.sae", "--activation", "topk", "--k", "32", "--tokens", "32768"]
    train += ["--batch-tokens", "2048", "--expansion", str(options.latents // options.width), "--holdout", "0.1"]
    call(options, [*train, "--holdout-by", "patient", "--b-dec-init", "zeros", "--warmup-steps", "2"])


def make_baseline(options: Any) -> None:
    """random.sae."""
    call(options, ["sae", "baseline", "acts.zarr", "-o", "random.sae", "--kind", "random", "--like", "cells.sae"])


def make_latents(options: Any) -> None:
    """latents.zarr, said to be of cells.sae and acts.zarr."""
    from latent_generator import generate_block

    from stores.activation_store import ActivationStore
    from stores.latent_spec import LatentSpec
    from stores.latent_writer import LatentWriter
    from stores.spec import SAE, read_header
    from stores.tables import table_sha256

    store = ActivationStore(options.folder / "acts.zarr")
    spec = LatentSpec(
        sae_sha256=str((read_header(options.folder / "cells.sae", SAE).summary or {})["sae_sha256"]),
        cache_sha256=store.content_sha256, cache=store.spec.to_dict(), images_sha256=table_sha256(store.images),
        n_images=options.images, tokens_per_image=options.tokens, n_latents=options.latents, precision="fp32",
        value_bits=10, min_activation=0.0,
    )  # fmt: skip
    kind, frequency = types_of(options), frequencies(options)
    latents = LatentWriter(options.folder / "latents.zarr", spec, store.images)
    for first in range(latents.n_images, options.images, 512):
        last = min(first + 512, options.images)
        parts = [
            generate_block(
                n, n + 1, frequency=frequency[kind[n]], l0=options.l0, tokens_per_image=options.tokens, seed=0
            )
            for n in range(first, last)
        ]
        indices, values, lengths = (np.concatenate(each) for each in zip(*parts, strict=True))
        latents.append_tokens(indices, values, lengths)
        latents.commit(last)
        if first // 512 % 20 == 0:
            say(f"{last:,} of {options.images:,} images have latents")
    latents.finish()


def make_barcodes(options: Any) -> None:
    """cells.barcodes of all images, and half.barcodes of every second patient."""
    count = ["barcode", "latents.zarr", "--tau", "0.2", "--workers", "1", "--memory-limit", "2GiB"]
    call(options, [*count, "-o", "cells.barcodes"])


def make_half(options: Any) -> None:
    """half.barcodes, of every second patient."""
    import pyarrow.parquet as pq

    table = table_of(options)
    number = np.array([int(str(name)[1:]) for name in table["patient"].to_pylist()])
    pq.write_table(table.filter(number % 2 == 0), options.folder / "half.parquet")
    count = ["barcode", "latents.zarr", "--tau", "0.2", "--workers", "1", "--memory-limit", "2GiB"]
    call(options, [*count, "-o", "half.barcodes", "--table", "half.parquet"])


def make_other(options: Any) -> None:
    """other.barcodes: of a second SAE, of the same images."""
    from search import generate

    generate(
        options.folder / "other.barcodes",
        options.images,
        SimpleNamespace(latents=options.latents, seed=1, images_per_patient=OF_PATIENT),
    )


MAKERS: dict[str, Callable[[Any], None]] = {
    "cache": make_cache,
    "sae": make_sae,
    "baseline": make_baseline,
    "latents": make_latents,
    "barcodes": make_barcodes,
    "half": make_half,
    "other": make_other,
    "pictures": make_pictures,
}
_LATENTS = ["cache", "sae", "latents"]
NEEDS = {
    "versus": ["cache", "sae", "baseline"],
    "ablate": _LATENTS,
    "score": _LATENTS,
    "search": [*_LATENTS, "barcodes"],
    "compare": [*_LATENTS, "half"],
    "replicate": [*_LATENTS, "barcodes", "half"],
    "match": [*_LATENTS, "barcodes", "other"],
    "concepts": _LATENTS,
    "atlas": [*_LATENTS, "barcodes", "pictures"],
}


# ------------------------------------------------------------------------------------------------- measuring


def cli(options: Any, arguments: list[str]) -> list[str]:
    """How `cyto` is called."""
    del options
    return [sys.executable, "-c", _CLI, *arguments]


def ablate_call(options: Any) -> list[str]:
    """This script, as a child."""
    sizes = [f"--{name}={getattr(options, name)}" for name in ("images", "latents", "tokens", "width")]
    return [sys.executable, __file__, "--folder", str(options.folder.resolve()), "--as-child", "ablate", *sizes]


_ATLAS = ["atlas", "build", "--barcodes", "cells.barcodes", "--concepts", "cells.concepts", "--latents", "latents.zarr"]
_MATCH = ["concept", "match", "cells.barcodes", "other.barcodes"]
COMMANDS: dict[str, Callable[[Any], list[str]]] = {
    "versus": lambda o: cli(
        o, ["sae", "versus", "cells.sae", "acts.zarr", "--baseline", "random.sae", "-o", "out.versus"]
    ),
    "ablate": ablate_call,
    "search": lambda o: cli(o, ["concept", "search", "cells.barcodes", "000007.jpg", "-o", "out.search"]),
    "compare": lambda o: cli(o, ["compare", "half.barcodes", "D0", "D1", "-o", "out.compare"]),
    "replicate": lambda o: cli(
        o, ["compare", "replicate", "out.compare", "cells.barcodes", "--top", "50", "-o", "out.replicate"]
    ),
    "score": lambda o: cli(
        o, ["sae", "score", "cells.sae", "--latents", "latents.zarr", "--cache", "acts.zarr", "-o", "out.score"]
    ),
    "match": lambda o: cli(o, [*_MATCH, "--permutations", str(o.permutations), "-o", "out.match"]),
    "concepts": lambda o: cli(o, ["concept", "stats", "latents.zarr", "-o", "cells.concepts"]),
    "atlas": lambda o: cli(o, [*_ATLAS, "--images", "pictures", "--pages", "all", "--pseudonyms", "-o", "atlas"]),
}


def measured(command: list[str], folder: Path) -> dict[str, Any]:
    """Seconds, processor seconds, largest resident memory, and what was said, of a command in the folder."""
    began = time.monotonic()
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen(command, cwd=folder, stdout=said, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        lines = [re.sub(r".*\r", "", line) for line in said.read().decode(errors="replace").splitlines()]
    return {
        "exit_code": child.returncode,
        "seconds": round(time.monotonic() - began, 1),
        "processor_seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak_gib": round(used.ru_maxrss / (1 << 20), 2),
        "written": written(folder / (command[command.index("-o") + 1] if "-o" in command else "out.ablate")),
        "said": [line for line in lines if line.strip()][:12],
    }


def written(folder: Path) -> dict[str, int]:
    """How many files a command wrote, and their bytes."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {"files": len(files), "bytes": sum(path.stat().st_size for path in files)}


def call(options: Any, arguments: list[str]) -> None:
    """Run `cyto` in the folder, to its end."""
    subprocess.run(cli(options, arguments), cwd=options.folder, check=True)


def ablate(options: Any) -> None:
    """`cyto concept ablate` with one transformer layer in the place of the later blocks."""
    import torch
    from ablate import LaterBlocks

    from cytosae import AblateConfig, ablate_latents
    from stores.latent_store import LatentStore

    os.chdir(options.folder)
    some = LatentStore("latents.zarr").read_images(0, min(64, options.images))
    active = np.bincount(some.indices.astype(np.int64), minlength=options.latents)
    chosen = np.argsort(-active, kind="stable")[:4]
    torch.manual_seed(0)
    rest: Any = LaterBlocks(options.width)
    done = ablate_latents(
        "cells.sae", "acts.zarr", "out.ablate", AblateConfig(latents=tuple(chosen.tolist()), target="label"),
        latents="latents.zarr", stage_one=rest, device="cpu", say=print,
    )  # fmt: skip
    print("\n".join(done.lines()))


if __name__ == "__main__":
    main()
