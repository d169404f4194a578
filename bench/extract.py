"""What does `cyto cache extract` cost beyond the forward pass itself?

Ours: reading, decoding and resizing image files, the backbone, and a durable cache, as one job. Against: the same model
on normalised float tensors that already lie on the device, same batch and precision, results dropped. Target: 0.98 of
its images/s on a CPU, with the overhead in core-milliseconds per image (and the ratio of processor time, which is
steadier than that of seconds where other programs run); 0.90 on a GPU, or 0.90 of a plain parallel
write+fsync of the same chunk files, whichever is slower.

Loading the model is paid once per job of 10^4 to 10^5 images: it is taken off, and reported as `setup_seconds`. The
line also has the time projected for the 171,373 images of the bone-marrow set and, on a GPU, how busy it was.
Full size: python bench/extract.py --device cuda --images 8192 --batch-size 128 --chunk-images 256
"""

import io
import os
import shutil
import statistics
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from common import Spent, add_folder, alternate, arguments, emit, say, scratch, setup_timed
from PIL import Image

import cytocache.extract
from cytocache.backbones import ARCHITECTURES, load_backbone
from cytocache.datasets import open_images
from cytocache.demo_cells import CELL_TYPES, draw_cell
from cytocache.extract import PRECISIONS, ExtractConfig, extract, resolve_precision
from stores.machine import n_cores

_DRAWN = 256  # distinct pictures; more files are copies of them, which cost as much to read
_RESIDENT = 512  # images of the baseline that lie on the device; it goes round among them


def main() -> None:
    """Measure and print one line of JSON."""
    parser = arguments(__doc__)
    add_folder(parser)
    parser.add_argument("--backbone", default="dinobloom-b", help="with random weights (%(default)s)")
    parser.add_argument("--images", type=int, default=96, help="(%(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="(%(default)s)")
    parser.add_argument("--chunk-images", type=int, default=16, help="(%(default)s)")
    parser.add_argument("--workers", type=int, default=n_cores(), help="processes that read (%(default)s)")
    parser.add_argument("--device", default="cpu", help="(%(default)s)")
    parser.add_argument("--precision", default="auto", help="fp32 on a CPU, bf16 on a GPU, or as said")
    options = parser.parse_args()
    on_gpu = options.device.startswith("cuda")
    weights = "random" if ARCHITECTURES[options.backbone].weights_file else None
    config = ExtractConfig(
        backbone=options.backbone,
        weights=weights,
        precision=options.precision,
        device=options.device,
        batch_size=options.batch_size,
        chunk_images=options.chunk_images,
        workers=options.workers,
    )
    with scratch(options.folder) as folder:
        say(f"drawing {options.images:,} images")
        draw_images(folder / "images", options.images)
        images = open_images(folder / "images")
        store, plain = folder / "cells.acts.zarr", folder / "plain"
        setups: list[Spent] = []
        utilisations: list[float] = []

        def ours() -> Spent:
            with setup_timed(cytocache.extract, "load_backbone") as spent, utilisation_sampled(on_gpu) as busy:
                extract(images, store, config)
            utilisations.extend(busy)
            setups.append(spent[0])
            return spent[0]

        backbone = load_backbone(options.backbone, weights=weights)
        backbone.model.to(options.device)
        low = PRECISIONS[resolve_precision(options.precision, options.device)]
        pixels = resident_pixels(images.root, min(options.images, _RESIDENT), options.device)

        @torch.inference_mode()
        def forward(n_images: int = options.images) -> None:
            at = 0
            for start in range(0, n_images, options.batch_size):
                size = min(options.batch_size, n_images - start)
                at = at if at + size <= len(pixels) else 0
                with torch.autocast(pixels.device.type, low, enabled=low != torch.float32):
                    backbone.model(pixels[at : at + size])
                at += size

        ours()  # one unmeasured job: files in the page cache, and a cache whose files the plain writer writes again
        files = [path.read_bytes() for path in sorted(store.glob("tokens/c/*/0/0"))]
        payload = sum(map(len, files))
        setups.clear()
        utilisations.clear()

        def tidy() -> None:
            shutil.rmtree(store, ignore_errors=True)
            shutil.rmtree(plain, ignore_errors=True)

        tidy()
        forward(min(options.images, 2 * options.batch_size))
        extracting, passing, writing = alternate(
            ours,
            forward,
            lambda: write_plain(plain, files, options.workers),
            rounds=options.rounds,
            warm_up=False,
            sync=torch.cuda.synchronize if on_gpu else lambda: None,
            tidy=tidy,
        )

    n_images = options.images
    baseline = passing.to_json(n_images, "images")
    written = {**writing.to_json(n_images, "images"), "bytes_per_second": payload / writing.seconds}
    lower = min(baseline["rate"], written["rate"]) if on_gpu else baseline["rate"]
    emit(
        "extract",
        ratio=n_images / extracting.seconds / lower,
        target=0.90 if on_gpu else 0.98,
        ours={
            **extracting.to_json(n_images, "images"),
            "setup_seconds": sorted(spent.seconds for spent in setups)[len(setups) // 2],
            "bytes_per_second": payload / extracting.seconds,
            "core_ms_per_image": 1e3 * extracting.cpu_seconds / n_images,
            "projected_minutes_for_171373_images": 171_373 / (n_images / extracting.seconds) / 60,
            "gpu_utilisation_percent": statistics.mean(utilisations) if utilisations else None,
        },
        baseline={**baseline, "what": "forward pass alone", "core_ms_per_image": 1e3 * passing.cpu_seconds / n_images},
        write_fsync={**written, "what": "plain parallel write+fsync of the same chunk files", "counts": on_gpu},
        # what other programs of the machine take changes seconds more than processor time
        ratio_of_processor_time=None if on_gpu else passing.cpu_seconds / extracting.cpu_seconds,
        ratio_of_rounds=[
            one.seconds / other.seconds for one, other in zip(passing.rounds, extracting.rounds, strict=True)
        ],
        overhead_core_ms_per_image=1e3 * (extracting.cpu_seconds - passing.cpu_seconds) / n_images,
        params={**vars(options), "folder": str(options.folder or "temporary"), "chunk_bytes": payload},
        device=options.device,
    )


@contextmanager
def utilisation_sampled(on_gpu: bool) -> Iterator[list[float]]:
    """Percent of each second in which the GPU was busy; filled when the block ends."""
    busy: list[float] = []
    if not on_gpu:
        yield busy
        return
    query = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--loop=1"]
    with subprocess.Popen(query, stdout=subprocess.PIPE, text=True) as sampler:
        yield busy
        sampler.terminate()
        busy += [float(line) for line in sampler.communicate()[0].split() if line.isdigit()]


def draw_images(folder: Path, n_images: int) -> None:
    """250 x 250 JPEG files, the form of the bone-marrow dataset."""
    folder.mkdir()
    drawn = []
    for number in range(min(n_images, _DRAWN)):
        cell = draw_cell(CELL_TYPES[number % len(CELL_TYPES)], np.random.default_rng(number), size=250)
        encoded = io.BytesIO()
        Image.fromarray(cell).save(encoded, "JPEG", quality=90)
        drawn.append(encoded.getvalue())
    for number in range(n_images):
        (folder / f"{number:06d}.jpg").write_bytes(drawn[number % len(drawn)])


def resident_pixels(folder: Path, n_images: int, device: str) -> torch.Tensor:
    """(n, 3, 224, 224) normalised float32 on the device: nothing but the model is left to do."""
    paths = sorted(folder.iterdir())[:n_images]
    resized = [np.asarray(Image.open(path).convert("RGB").resize((224, 224))) for path in paths]
    pixels = torch.from_numpy(np.stack(resized)).to(device).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
    return pixels.contiguous()


def write_plain(folder: Path, files: list[bytes], n_threads: int) -> None:
    """Every file written and synced by its own thread, `n_threads` at a time."""
    folder.mkdir()

    def write(number: int) -> None:
        with (folder / str(number)).open("wb") as file:
            file.write(files[number])
            file.flush()
            os.fsync(file.fileno())

    with ThreadPoolExecutor(n_threads) as threads:
        list(threads.map(write, range(len(files))))


if __name__ == "__main__":
    main()
