"""Stage one: images through the backbone, once, into an activation cache. The only file that writes one.

The loop reads as a story: plan what is missing, and per chunk read, forward, write. Reading runs ahead in threads and
writing behind in one, each by one chunk, so memory does not depend on the number of images. Batches end at chunk
edges, so an interrupted and continued cache equals an uninterrupted one, byte for byte (same device and versions).
"""

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from stores.activation_store import ActivationSpec
from stores.activation_writer import ActivationWriter
from stores.errors import BadInput
from stores.files import sync_folder
from stores.output import plan_output
from stores.runlog import append_run
from stores.spec import ACTIVATIONS, check_choice, new_header, read_header
from stores.tables import column, table_sha256

from .backbones import TOKEN_LAYOUT, TOKENS_PER_IMAGE, Backbone, load_backbone
from .datasets import Images
from .images import pillow_silenced, read_image
from .preprocess import Preprocess

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# images done (those of the chunk in flight are not yet on the disk), images in all, a word on the state
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """What to run. Device, batch size and workers change speed only; they go to the run log, not into the identity."""

    backbone: str = "random-vit-tiny"
    weights: str | None = None  # a DinoBloom .pth file, or "random"
    block: int = -2
    precision: str = "auto"  # auto: bf16 on a GPU, fp32 on the CPU
    chunk_images: int = 256
    device: str = "cpu"
    batch_size: int = 32
    workers: int = 2  # threads that read and resize images

    def __post_init__(self) -> None:
        check_choice("precision", self.precision, ("auto", *PRECISIONS))
        for name in ("chunk_images", "batch_size", "workers"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} must be at least 1; found {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class ExtractResult:
    """What lies in the finished cache."""

    spec: ActivationSpec
    n_readable: int
    n_unreadable: int
    was_complete: bool  # nothing had to be done


@dataclass(frozen=True)
class _Pictures:
    """One chunk's images as the backbone takes them, and what became of each file."""

    pixels: npt.NDArray[np.uint8]  # (n, size, size, 3); zeros where unreadable
    content_hash: list[str | None]
    errors: list[str | None]


def extract(
    images: Images,
    store: Path,
    config: ExtractConfig,
    *,
    overwrite: bool = False,
    inputs: tuple[Path, ...] = (),
    progress: Progress = lambda done, total, state: None,
) -> ExtractResult:
    """Write (or continue) the activation cache of `images` at `store`.

    An unreadable image is listed with its error in the cache's image table, keeps a NaN block and does not end the job.
    Memory: about 4 chunks of tokens and 2 of pixels, whatever the number of images.

    Raises
    ------
    BadInput
        For settings or weights that cannot be used, if a token of a readable image does not fit float16, or
        if no image at all could be read.
    SpecMismatch
        If `store` holds something else, or a cache with other settings (and not `overwrite`).
    """
    backbone = load_backbone(config.backbone, weights=config.weights, blocks=(config.block,))
    spec = _make_spec(backbone, images, config)
    output = plan_output(store, new_header(ACTIVATIONS, spec.to_dict()), overwrite=overwrite, inputs=inputs)
    if output.is_complete:
        output.publish()
        return _read_result(store, spec)

    output.work.parent.mkdir(parents=True, exist_ok=True)
    writer = ActivationWriter(output.work, spec, images.table)
    sync_folder(output.work.parent)
    append_run(
        output.work,
        packages=("torch", "timm", "pillow", "numpy"),
        images_root=os.fspath(images.root),
        device=_device_name(config.device),
        threads=torch.get_num_threads(),
        batch_size=config.batch_size,
    )
    backbone.model.to(config.device)
    for row in writer.errors():  # a share that was not mounted, a file that has been copied again
        writer.read_again(row, read_image(images.root / str(images.table["path"][row]))[1])
    chunks = writer.missing_chunks()
    n_done, n_unreadable = writer.counts()

    def report(n_more: int = 0) -> None:
        progress(n_done + n_more, spec.n_images, f"{n_unreadable:,} unreadable" if n_unreadable else "")

    report()
    with ExitStack() as stack:
        stack.enter_context(pillow_silenced)  # from here, before there are threads: it sets what all threads share
        readers = stack.enter_context(ThreadPoolExecutor(config.workers, thread_name_prefix="read"))
        writers = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="write"))
        # an error or Ctrl-C must not wait for the images that were read ahead
        stack.callback(readers.shutdown, wait=False, cancel_futures=True)
        ahead = _submit(readers, images, spec.chunk_rows(chunks[0]), backbone.preprocess) if chunks else []
        written: Future[None] | None = None
        for position, chunk in enumerate(chunks):
            pictures = _collect(ahead, backbone.preprocess.size)
            if position + 1 < len(chunks):
                ahead = _submit(readers, images, spec.chunk_rows(chunks[position + 1]), backbone.preprocess)
            names = column(images.table.slice(spec.chunk_rows(chunk).start, len(pictures.pixels)), "image_id")
            tokens = _forward(backbone, pictures, names, spec, config, report)
            if written is not None:
                written.result()
            n_done += len(names)
            n_unreadable += sum(error is not None for error in pictures.errors)
            written = writers.submit(writer.write_chunk, chunk, tokens, pictures.content_hash, pictures.errors)
        if written is not None:
            written.result()
    report()

    if n_unreadable == spec.n_images:
        row, error = next(iter(writer.errors().items()))
        name = column(images.table, "path")[row]
        raise BadInput(
            f"none of the {spec.n_images:,} images could be read ({name}: {error}); "
            f"put the files into place and run the same command again"
        )
    writer.finish()
    output.publish()
    return ExtractResult(
        spec=spec, n_readable=spec.n_images - n_unreadable, n_unreadable=n_unreadable, was_complete=False
    )


def resolve_precision(precision: str, device: str) -> str:
    """`auto` becomes bf16 on a GPU and fp32 on the CPU."""
    if precision != "auto":
        return precision
    return "fp32" if device == "cpu" else "bf16"


def _make_spec(backbone: Backbone, images: Images, config: ExtractConfig) -> ActivationSpec:
    return ActivationSpec(
        backbone=backbone.name,
        weights_sha256=backbone.weights_sha256,
        trained=backbone.trained,
        block=backbone.blocks[0],
        n_blocks=backbone.n_blocks,
        transform=backbone.preprocess.to_dict(),
        precision=resolve_precision(config.precision, config.device),
        token_layout=TOKEN_LAYOUT,
        n_images=images.table.num_rows,
        tokens_per_image=TOKENS_PER_IMAGE,
        width=backbone.width,
        chunk_images=min(config.chunk_images, images.table.num_rows),
        manifest_sha256=table_sha256(images.table),
    )


def _submit(
    readers: ThreadPoolExecutor, images: Images, rows: range, preprocess: Preprocess
) -> list[Future[tuple[npt.NDArray[np.uint8] | None, str | None, str | None]]]:
    paths = column(images.table.slice(rows.start, len(rows)), "path")
    return [readers.submit(_read_and_resize, images.root / str(path), preprocess) for path in paths]


def _read_and_resize(path: Path, preprocess: Preprocess) -> tuple[npt.NDArray[np.uint8] | None, str | None, str | None]:
    picture, content_hash, error = read_image(path)
    return (None if picture is None else preprocess.resize(picture)), content_hash, error


def _collect(
    reading: list[Future[tuple[npt.NDArray[np.uint8] | None, str | None, str | None]]], size: int
) -> _Pictures:
    pictures = _Pictures(np.zeros((len(reading), size, size, 3), np.uint8), [], [])
    for position, future in enumerate(reading):
        pixels, content_hash, error = future.result()
        if pixels is not None:
            pictures.pixels[position] = pixels
        pictures.content_hash.append(content_hash)
        pictures.errors.append(error)
    return pictures


@torch.inference_mode()
def _forward(
    backbone: Backbone,
    pictures: _Pictures,
    names: list[str | None],
    spec: ActivationSpec,
    config: ExtractConfig,
    report: Callable[[int], None],
) -> npt.NDArray[np.float16]:
    """The tokens of one chunk in float16, batch by batch; NaN where there was no picture."""
    n_images = len(pictures.pixels)
    tokens = np.empty((n_images, spec.tokens_per_image, spec.width), np.float16)
    low = PRECISIONS[spec.precision]
    for start in range(0, n_images, config.batch_size):
        stop = min(start + config.batch_size, n_images)
        pixels = torch.from_numpy(pictures.pixels[start:stop]).to(config.device)
        with torch.autocast(pixels.device.type, low, enabled=low != torch.float32):
            (full,) = backbone.tokens(pixels)
        half = full.to(torch.float16)
        is_finite = torch.isfinite(half).flatten(1).all(1).cpu().numpy()
        tokens[start:stop] = half.cpu().numpy()
        for position in range(start, stop):
            if pictures.errors[position] is not None:
                tokens[position] = np.nan
            elif not is_finite[position - start]:
                largest = full[position - start].abs().max().item()
                raise BadInput(
                    f"the tokens of image {names[position]} do not fit float16: largest magnitude {largest:.4g}, "
                    f"expected at most 65,504. Choose another --block, or check the weights"
                )
        report(stop)
    return tokens


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def _read_result(store: Path, spec: ActivationSpec) -> ExtractResult:
    summary = read_header(store, ACTIVATIONS).summary or {}
    return ExtractResult(
        spec=spec, n_readable=summary["n_readable"], n_unreadable=summary["n_unreadable"], was_complete=True
    )
