"""Stage one: runs the backbone once over all images and writes their tokens into activation caches.

The loop in `fill`: find the missing chunks; for each chunk read its images, run the backbone, save. Processes read
ahead and threads save in the background, both a bounded number of steps, so memory does not grow with the images.
No batch crosses a chunk's end, so a cache that was interrupted and continued equals one made in a single run, byte for
byte (same device and versions).
"""

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from stores.activation_spec import ActivationSpec
from stores.activation_store import ActivationStore
from stores.activation_writer import (
    ActivationWriter,
    complete_cache,
    left_overs,
    overlapping_writer,
    reopen,
    writer_lock,
)
from stores.destination import plan_output
from stores.devices import device_name, float32_stays_float32, memory_told, resolve_device
from stores.doors import make_callable
from stores.errors import BadInput
from stores.files import locked, sync_folder
from stores.machine import n_cores
from stores.progress import Progress
from stores.runlog import append_run
from stores.shards import ONE_WRITER, Shard
from stores.spec import ACTIVATIONS, check_choice, new_header, read_header
from stores.tables import TRUNCATED, column, table_sha256
from stores.wording import Report

from .backbones import CROPS, Backbone, load_backbone
from .changed_files import changed_files
from .datasets import Images, open_images
from .device_copies import ChunkBuffers, HostChunk, PixelSender
from .image_files import hash_of
from .readers import ImageReaders

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SAVING_AT_ONCE = 4  # chunks: while one waits for fsync, the next is saved
_FLOAT16_LIMIT = 65_520.0  # a float16 value of this magnitude rounds to infinity


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """Settings of `extract`. Device, batch size and workers change speed only; they are logged and not in the identity.

    Raises BadInput for an unknown precision, a number below 1, or no block.
    """

    backbone: str = "random-vit-tiny"
    weights: str | None = None  # see `load_backbone`
    # transformer blocks, see `load_backbone`; with several, a store for each, in one pass
    blocks: tuple[int, ...] = (-2,)
    image_size: int | None = None  # pixels along each side of the model's input; None: what it was trained on
    crop: str = "own"  # own: as the model's preprocessing; none: the whole image, as a square
    precision: str = "auto"  # auto: bf16 on a GPU, fp32 on the CPU
    chunk_images: int = 256
    device: str = "auto"  # auto, cpu, cuda or cuda:N; auto takes a GPU if there is one
    batch_size: int | None = None  # images per forward pass; None: 128 on a GPU, else 32
    workers: int = field(default_factory=n_cores)  # processes that read and resize images
    allow_truncated: bool = False  # take images that are cut off as far as they go, and mark them; in the identity

    def __post_init__(self) -> None:
        check_choice("precision", self.precision, ("auto", *PRECISIONS))
        check_choice("crop", self.crop, CROPS)
        for name in ("chunk_images", "batch_size", "workers", "image_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BadInput(f"{name} must be at least 1; found {value}")
        if not self.blocks:
            raise BadInput("blocks must name at least one block; found none")

    @property
    def images_per_pass(self) -> int:
        """Images per forward pass, once `device` is resolved."""
        return self.batch_size or (32 if self.device == "cpu" else 128)


@dataclass(frozen=True, kw_only=True)
class ExtractResult(Report):
    """What was done: for the whole cache, or for this shard while other shards are missing."""

    out: Path
    stores: tuple[Path, ...]  # `out`, or with several blocks a cache for each in it, ascending
    n_readable: int
    n_unreadable: int
    is_complete: bool  # False: other shards are still missing
    was_complete: bool  # nothing had to be done
    shard: Shard = field(default=ONE_WRITER, compare=False)
    described: tuple[str, ...] = field(default=(), compare=False)  # each finished cache in one line
    unreadable: str = field(default="", compare=False)  # which images could not be read, in words
    n_truncated: int = 0  # images that are cut off and were taken; known once the cache is complete
    truncated: str = field(default="", compare=False)  # these, in words
    left_out: tuple[str, ...] = field(default=(), compare=False)  # files and folders that were passed over, in words
    cropped: str = field(default="", compare=False)  # what of each image the backbone does not see, in words
    changed: str = field(default="", compare=False)  # files that are others than those in a complete cache, in words

    @property
    def notes(self) -> tuple[str, ...]:
        """Files and folders below the images that were passed over; that borders of the images are cut off."""
        return (*self.left_out, *([self.cropped] if self.cropped else ()))

    @property
    def warnings(self) -> tuple[str, ...]:
        """Images that could not be read, or not to their end; files that have changed since the cache was made."""
        changed = f"{self.changed}. For the files of now: the same command with a new STORE" if self.changed else ""
        return tuple(words for words in (self.unreadable, self.truncated, changed) if words)

    def lines(self) -> Iterator[str]:
        """A line for each finished cache, or that other shards are still missing."""
        if not self.is_complete:
            yield (
                f"{self.out}: shard {self.shard} is done, {self.n_readable + self.n_unreadable:,} images; other shards "
                f"are not. The last one completes the store; if all have ended: cyto cache merge {self.out}"
            )
        yield from self.described


@dataclass(frozen=True)
class _Chunk:
    """One chunk that is to be saved."""

    number: int
    image_ids: list[str]
    content: HostChunk  # of as many images as the largest chunk has
    content_hash: list[str | None]
    errors: list[str | None]
    truncated: list[str | None]


def extract(
    images: Images | Path | str,
    out: Path | str,
    config: ExtractConfig | None = None,
    *,
    root: Path | None = None,
    shard: Shard = ONE_WRITER,
    overwrite: bool = False,
    inputs: tuple[Path, ...] = (),
    progress: Progress = lambda done, total, state: None,
    download_progress: Progress = lambda done, total, state: None,
    stop: Callable[[], bool] = lambda: False,
) -> ExtractResult:
    """Write (or continue) the activation cache of `images` at `out`; with several blocks, `out/block<k>.zarr`.

    An unreadable image is listed with its error in the cache's image table, has NaN tokens and does not end the job. An
    image whose file ends too early is one of these, unless `config.allow_truncated`.
    Memory: `_SAVING_AT_ONCE` + 1 chunks of tokens for each block, pinned for a GPU, and a few batches of pixels.

    Parameters
    ----------
    images : as of `open_images`, or what it opens: a folder, an archive, a .csv or .parquet table
    config : None: the defaults of `ExtractConfig`
    root : as of `open_images`
    shard : the share of the images that this process writes; the last one to end completes the cache
    overwrite : replace a cache with other settings; the old one stays until the new one is complete
    inputs : further files that must not be overwritten
    progress : images done (including those of chunks that are not saved yet), images in all
    download_progress : bytes of the weights downloaded, bytes in all
    stop : called before each chunk; once True, chunks in flight are saved and KeyboardInterrupt is raised

    Raises
    ------
    BadInput
        For settings or weights that cannot be used, if a token of a readable image does not fit float16, if no image
        at all could be read, or if another process writes the same shard.
    SpecMismatch
        If `out` holds something else, or a cache with other settings (and not `overwrite`).
    OutOfMemory
        If memory is not enough for the batch size.
    """
    config, out = config or ExtractConfig(), Path(out)
    images = images if isinstance(images, Images) else open_images(images, root=root)
    config = replace(config, device=resolve_device(config.device))
    known = (images.source, images.root, *(Path(each) for each in (config.weights, config.backbone) if each))
    inputs = (*inputs, *(path for path in known if path is not None and path.exists()))
    if config.allow_truncated and TRUNCATED in images.table.column_names:
        raise BadInput(f"{images.source or 'the table'} has a column {TRUNCATED!r}, which is ours to write; rename it")
    if overwrite and not shard.is_only:
        raise BadInput("a shard cannot overwrite what other shards may be writing; remove the old store, or name a new")
    backbone = load_backbone(
        config.backbone,
        weights=config.weights,
        blocks=config.blocks,
        image_size=config.image_size,
        crop=config.crop,
        progress=download_progress,
    )
    specs = [make_spec(backbone, images, config, block) for block in backbone.blocks]
    places = [out] if len(specs) == 1 else [out / f"block{spec.block}.zarr" for spec in specs]
    outputs = [
        plan_output(place, new_header(ACTIVATIONS, spec.to_dict()), overwrite=overwrite, inputs=inputs, shared=True)
        for place, spec in zip(places, specs, strict=True)
    ]
    with ExitStack() as stack:
        writers = [
            open_writer(stack, output.work, spec, images, config, shard, weights=backbone.weights_source)
            for output, spec in zip(outputs, specs, strict=True)
            if not output.is_complete
        ]
        for output in outputs:
            if output.is_complete and left_overs(output.work):
                complete_cache(output.work)
        if writers:
            fill(backbone, images, writers, config, progress=progress, stop=stop)
        is_complete = all([writer.finish() is not None for writer in writers])
    if is_complete:
        for output in outputs:
            output.publish()
        summary = read_header(places[0], ACTIVATIONS).summary or {}
        n_readable, n_unreadable = summary["n_readable"], summary["n_unreadable"]
        n_truncated = summary.get("n_truncated", 0)
    else:
        n_truncated = 0
        n_images, n_unreadable = writers[0].counts()
        n_readable = n_images - n_unreadable
    caches = [ActivationStore(place) for place in places] if is_complete else []
    return ExtractResult(
        out=out,
        stores=tuple(places),
        n_readable=n_readable,
        n_unreadable=n_unreadable,
        is_complete=is_complete,
        was_complete=not writers,
        shard=shard,
        described=tuple(cache.line(place) for cache, place in zip(caches, places, strict=False)),
        unreadable=caches[0].unreadable_line(places[0]) if caches and n_unreadable else "",
        n_truncated=n_truncated,
        truncated=caches[0].truncated_line(places[0]) if n_truncated else "",
        left_out=images.notes,
        cropped=backbone.preprocess.cropped_text,
        changed="" if writers else changed_files(images, places[0]),
    )


@torch.inference_mode()
def fill(
    backbone: Backbone,
    images: Images,
    writers: list[ActivationWriter],
    config: ExtractConfig,
    *,
    progress: Progress,
    stop: Callable[[], bool],
) -> None:
    """Write every missing chunk of the writers (one writer for each block, all of the same shard).

    Memory: as `extract`. Raises OutOfMemory, and KeyboardInterrupt if `stop` has ended it early.
    """
    spec, paths, names = writers[0].spec, column(images.table, "path"), column(images.table, "image_id")
    blocks = [backbone.blocks.index(writer.spec.block) for writer in writers]
    missing = [set(writer.missing_chunks()) for writer in writers]
    wanted = set.union(*missing)
    chunks = sorted(wanted)
    n_images = sum(len(spec.chunk_rows(chunk)) for chunk in writers[0].chunks)
    n_done = n_images - sum(len(spec.chunk_rows(chunk)) for chunk in chunks)
    n_unreadable = sum(row // spec.chunk_images not in wanted for row in writers[0].errors())

    def report(n_more: int = 0) -> None:
        progress(n_done + n_more, n_images, f"{n_unreadable:,} unreadable" if n_unreadable else "")

    report()
    if not chunks:
        return
    device, low = torch.device(config.device), PRECISIONS[spec.precision]
    on_gpu = device.type == "cuda"
    float32_stays_float32()
    batches = [batch for chunk in chunks for batch in _batches(spec.chunk_rows(chunk), config.images_per_pass)]
    batch_size = max(map(len, batches))
    with ExitStack() as stack:
        stack.enter_context(memory_told(_less_memory(batch_size)))
        if on_gpu:  # else events and pinned memory belong to GPU 0
            stack.enter_context(torch.cuda.device(device))
        readers = stack.enter_context(
            ImageReaders(
                config.workers,
                batch_size=batch_size,
                size=backbone.preprocess.size,
                preprocess=backbone.preprocess,
                allow_truncated=config.allow_truncated,
            )
        )
        backbone.model.to(device)  # meanwhile the readers start
        sender = PixelSender(device, batch_size=batch_size, size=backbone.preprocess.size)
        shape = (max(len(spec.chunk_rows(chunk)) for chunk in chunks), spec.tokens_per_image, spec.width)
        n_buffers = min(_SAVING_AT_ONCE + 1, len(chunks))
        buffers = ChunkBuffers(device, n_chunks=n_buffers, n_blocks=len(writers), shape=shape)
        savers = stack.enter_context(ThreadPoolExecutor(_SAVING_AT_ONCE, thread_name_prefix="save"))
        reading = readers.read([images.root / str(paths[row]) for row in batch] for batch in batches)
        saved: deque[Future[None]] = deque()
        for chunk in chunks:
            if stop():
                break
            rows = spec.chunk_rows(chunk)
            content = buffers.take()
            content_hash: list[str | None] = []
            errors: list[str | None] = []
            truncated: list[str | None] = []
            for batch in _batches(range(len(rows)), config.images_per_pass):
                pictures = next(reading)
                pixels = sender.send(pictures.pixels)
                with torch.autocast(device.type, low, enabled=low != torch.float32):
                    full = backbone.tokens(pixels)
                buffers.fill(content, slice(batch.start, batch.stop), [full[block] for block in blocks])
                content_hash += pictures.content_hash
                errors += pictures.errors
                truncated += pictures.truncated
                n_unreadable += sum(error is not None for error in pictures.errors)
                report(batch.stop)
            n_done += len(rows)
            ids = [str(name) for name in names[rows.start : rows.stop]]
            done = _Chunk(chunk, ids, content, content_hash, errors, truncated)
            owners = [writer if chunk in own else None for writer, own in zip(writers, missing, strict=True)]
            saved.append(savers.submit(_save, done, owners, buffers))
            while saved and (saved[0].done() or len(saved) > _SAVING_AT_ONCE):
                saved.popleft().result()
        for saving in saved:
            saving.result()
    if n_done < n_images:
        raise KeyboardInterrupt


def make_spec(backbone: Backbone, images: Images, config: ExtractConfig, block: int) -> ActivationSpec:
    """The spec of the cache of `block`."""
    return ActivationSpec(
        backbone=backbone.name,
        weights_sha256=backbone.weights_sha256,
        trained=backbone.trained,
        block=block,
        n_blocks=backbone.n_blocks,
        transform=backbone.preprocess.to_dict(),
        precision=resolve_precision(config.precision, config.device),
        token_layout=backbone.layout.text,
        n_images=images.table.num_rows,
        tokens_per_image=backbone.layout.tokens_per_image,
        width=backbone.width,
        chunk_images=min(config.chunk_images, images.table.num_rows),
        manifest_sha256=table_sha256(images.table),
        allow_truncated=config.allow_truncated,
    )


def resolve_precision(precision: str, device: str) -> str:
    """`auto` becomes bf16 on a GPU and fp32 on the CPU."""
    if precision != "auto":
        return precision
    return "fp32" if device == "cpu" else "bf16"


def open_writer(
    stack: ExitStack,
    root: Path,
    spec: ActivationSpec,
    images: Images,
    config: ExtractConfig,
    shard: Shard,
    *,
    weights: str = "",
    damaged: list[int] | None = None,
) -> ActivationWriter:
    """The only writer of this shard while `stack` is open; this run is added to the log.

    weights : of a download, the value of --weights that gives the same file again; for the log
    damaged : chunks of a complete cache, which is opened again to make only these anew
    """
    root.mkdir(parents=True, exist_ok=True)
    other: Shard | None = shard
    if stack.enter_context(locked(writer_lock(root, shard))):
        other = overlapping_writer(root, shard, spec.n_chunks)
    if other is not None:
        what = root if other.is_only else f"shard {other} of {root}"
        raise BadInput(f"another process is writing {what} at this moment; wait until it ends, or stop it")
    if damaged is not None:
        reopen(root, damaged)
    writer = ActivationWriter(root, spec, images.table, shard)
    for folder in (root, *root.parents)[1:3]:  # so that a new store's name is durable, and that of its parent folder
        sync_folder(folder)
    append_run(
        root,
        packages=("torch", "timm", "pillow", "numpy"),
        shard=shard,
        images_root=os.fspath(images.root),
        device=device_name(config.device),
        threads=torch.get_num_threads(),
        batch_size=config.images_per_pass,
        **({"weights": weights} if weights else {}),
    )
    if damaged is None:
        for row in writer.errors():  # such a file may be readable now: a disk was mounted, a file copied again
            writer.read_again(row, hash_of(images.root / str(images.table["path"][row])))
    return writer


def _batches(rows: range, batch_size: int) -> list[range]:
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


def _less_memory(batch_size: int) -> str:
    """What to type when memory has run out."""
    if batch_size > 1:
        return (
            f"Run the same command with --batch-size {batch_size // 2} (now {batch_size}); chunks that are written stay"
        )
    return "One image at a time does not fit: lower --chunk-images or --workers, or take a smaller --backbone"


def _save(chunk: _Chunk, owners: list[ActivationWriter | None], buffers: ChunkBuffers) -> None:
    """In a saving thread: check the tokens of a chunk, and write them for each block whose cache lacks the chunk."""
    try:
        chunk.content.wait()
        for writer, tokens, largest in zip(owners, chunk.content.tokens, chunk.content.largest, strict=True):
            if writer is not None:
                n = len(chunk.errors)
                values = _checked(chunk, tokens[:n].numpy(), largest[:n].numpy(), writer.spec.block)
                writer.write_chunk(chunk.number, values, chunk.content_hash, chunk.errors, chunk.truncated)
    finally:
        buffers.give_back(chunk.content)


def _checked(
    chunk: _Chunk, values: npt.NDArray[np.float16], magnitudes: npt.NDArray[np.float32], block: int
) -> npt.NDArray[np.float16]:
    """The tokens of a chunk, NaN where an image is unreadable. Raises BadInput where they do not fit float16."""
    for position, error in enumerate(chunk.errors):
        if error is not None:
            values[position] = np.nan
        elif not magnitudes[position] < _FLOAT16_LIMIT:
            raise BadInput(
                f"the tokens of image {chunk.image_ids[position]} do not fit float16: largest magnitude "
                f"{magnitudes[position]:.4g} after block {block}, expected at most 65,504. "
                f"Choose another --block, or check the weights"
            )
    return values


make_callable(__name__, "extract")  # cytocache.extract(...)
