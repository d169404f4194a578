"""How fast do shuffled training tokens come out of a cache, and how well are they shuffled?

Ours: `TokenStream.batches` over whole epochs, started anew in every round (nothing is read ahead outside the measured
time). Against:
- a sequential copy of the same memory-mapped chunks, each into new memory, as the stream's batches lie in new memory
  too (target 0.5 of its tokens/s); a copy into one buffer that stays, which spares page faults, is shown beside it;
- a PyTorch DataLoader over single memory-mapped rows, `shuffle=True`, the same batch, the better of no workers and one
  worker per core (target 10 times); one that gathers a whole batch at once (`__getitems__`) is shown beside it.
The page cache is warm for all.

Shuffle quality comes from caches of narrow tokens that carry their image's number, of images in any order and of
images sorted by class (each class in one stretch, its images alike): distinct images per batch, correlation of
neighbouring tokens in a batch, and how far the classes of a batch are from those of the whole, beside those of a
perfect shuffle and of no shuffle at all. Over the sorted cache also with pools of four times as many chunks, and with
pools of as many images out of parts of other sizes, up to whole chunks.
Full size: python bench/loader.py --images 16384
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch
from common import (
    TOKENS_PER_IMAGE,
    WIDTH,
    add_folder,
    alternate,
    arguments,
    chunk_sizes,
    emit,
    say,
    scratch,
    similar_tokens,
    write_cache,
)
from torch.utils.data import DataLoader, Dataset

from stores import token_stream
from stores.activation_store import ActivationStore
from stores.machine import n_cores
from stores.token_stream import TokenStream

Int = npt.NDArray[np.int64]
_QUALITY_WIDTH = 16
_CLASSES, _ALIKE = 18, 0.5  # as many as MLL23 has; share of a token's variance that its class explains
_BASE = 1024  # the first two channels hold the image's number in this base: whole numbers that float16 keeps


def main() -> None:
    """Measure and print one line of JSON."""
    parser = arguments(__doc__)
    add_folder(parser)
    parser.add_argument("--images", type=int, default=4_096, help="(%(default)s)")
    parser.add_argument("--chunk-images", type=int, default=256, help="(%(default)s)")
    parser.add_argument("--pool-chunks", type=int, default=16, help="chunks shuffled together (%(default)s)")
    parser.add_argument("--batch-tokens", type=int, default=16_448, help="(%(default)s)")
    parser.add_argument("--epochs", type=int, default=2, help="passes in a round (%(default)s)")
    parser.add_argument("--dataloader-batches", type=int, default=12, help="in a round (%(default)s)")
    parser.add_argument("--quality-images", type=int, default=24_576, help="(%(default)s)")
    parser.add_argument("--width", type=int, default=WIDTH, help="(%(default)s)")
    options = parser.parse_args()
    n_epoch = options.images * TOKENS_PER_IMAGE
    n_batches = max(1, options.epochs * n_epoch // options.batch_tokens)
    n_rows = min(options.dataloader_batches, max(1, n_epoch // options.batch_tokens))

    with scratch(options.folder) as folder:
        say(f"writing {options.images:,} images of random tokens")
        sizes = chunk_sizes(options.images, options.chunk_images)
        blocks = _random_blocks(sizes, options.width)
        write_cache(
            folder / "speed.acts.zarr",
            blocks,
            n_images=options.images,
            width=options.width,
            chunk_images=options.chunk_images,
        )
        store = ActivationStore(folder / "speed.acts.zarr")
        buffer = np.empty((options.chunk_images, TOKENS_PER_IMAGE, options.width), np.float16)

        def ours() -> None:
            stream = TokenStream([store], pool_chunks=options.pool_chunks)
            with closing(stream.batches(options.batch_tokens)) as batches:
                for batch in islice(batches, n_batches):
                    assert len(batch) == options.batch_tokens

        def sequential() -> None:
            for _ in range(options.epochs):
                for chunk in range(len(sizes)):
                    np.array(store.read_chunk(chunk))

        def into_buffer() -> None:
            for _ in range(options.epochs):
                for chunk, size in enumerate(sizes):
                    np.copyto(buffer[:size], store.read_chunk(chunk))

        rows, rows_workers = _fastest(MappedRows(store), options, n_rows)
        gathered, gathered_workers = _fastest(GatheredRows(store), options, n_rows)
        timings = alternate(ours, sequential, into_buffer, rows, gathered, rounds=options.rounds)
        shutil.rmtree(store.root)
        quality = shuffle_quality(folder, options)

    amounts = [n_batches * options.batch_tokens, *[options.epochs * n_epoch] * 2, *[n_rows * options.batch_tokens] * 2]
    stream, copied, buffered, plain, batched = (
        timing.to_json(amount, "tokens") for timing, amount in zip(timings, amounts, strict=True)
    )
    emit(
        "loader",
        ratio=stream["rate"] / copied["rate"],
        target=0.5,
        ours=stream | {"bytes_per_second": stream["rate"] * options.width * 2},
        baseline=copied | {"what": "sequential copy of the same mapped chunks"},
        ratio_into_buffer=stream["rate"] / buffered["rate"],
        into_buffer=buffered | {"what": "the same copy into one buffer that stays"},
        ratio_dataloader=stream["rate"] / plain["rate"],
        target_dataloader=10,
        dataloader=plain | {"what": "PyTorch DataLoader over memory-mapped rows", "workers": rows_workers},
        dataloader_gathered=batched
        | {"what": "the same with __getitems__: a batch gathered at once", "workers": gathered_workers},
        quality=quality,
        params={**vars(options), "folder": str(options.folder or "temporary"), "bytes": n_epoch * options.width * 2},
    )


class MappedRows(Dataset[torch.Tensor]):
    """One token per item, out of memory maps that stay open: what one would write first."""

    def __init__(self, store: ActivationStore) -> None:
        self.chunks = [store.read_chunk(chunk) for chunk in range(store.spec.n_chunks)]
        self.rows = [chunk.reshape(-1, store.spec.width) for chunk in self.chunks]
        self.per_chunk = store.spec.chunk_images * store.spec.tokens_per_image
        self.n_rows = store.spec.n_images * store.spec.tokens_per_image

    def __len__(self) -> int:
        return self.n_rows

    def __getitem__(self, index: int) -> torch.Tensor:
        chunk, row = divmod(index, self.per_chunk)
        return torch.from_numpy(np.array(self.rows[chunk][row]))


class GatheredRows(MappedRows):
    """A whole batch at once, chunk by chunk; the batch comes ready made."""

    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        """The rows of a batch, in the order asked for."""
        chunk, row = np.divmod(np.asarray(indices), self.per_chunk)
        out = np.empty((len(indices), self.rows[0].shape[1]), np.float16)
        for number in np.unique(chunk):
            chosen = np.flatnonzero(chunk == number)
            out[chosen] = self.rows[number][row[chosen]]
        return [torch.from_numpy(out)]


def shuffle_quality(folder: Path, options: Any) -> dict[str, Any]:
    """How far a batch is from a perfect shuffle: caches of several pools, read as in training for one epoch."""
    n_images, chunk_images, pool = options.quality_images, options.chunk_images, options.pool_chunks
    in_order = np.arange(n_images) * min(_CLASSES, n_images) // n_images
    anyhow = np.random.default_rng(2).permutation(in_order)
    by_class = streamed_quality(folder, options, in_order, _ALIKE, pool_chunks=pool)
    by_class["four_times_the_pool"] = streamed_quality(
        folder, options, in_order, _ALIKE, pool_chunks=4 * pool, is_compared=False
    )["ours"]
    by_class["parts_of"] = {}
    for part_images in sorted({1, 8, 16, 32, chunk_images}):
        with mock.patch.object(token_stream, "SEGMENT_IMAGES", part_images):
            found = streamed_quality(folder, options, in_order, _ALIKE, pool_chunks=pool, is_compared=False)
        by_class["parts_of"][str(part_images)] = found["ours"]
    return {
        "images": n_images,
        "images_per_pool": min(n_images, pool * chunk_images),
        "part_images": token_stream.SEGMENT_IMAGES,
        "classes": int(in_order[-1]) + 1,
        "any_order": streamed_quality(folder, options, anyhow, 0.0, pool_chunks=pool),
        "sorted_by_class": by_class,
    }


def streamed_quality(
    folder: Path,
    options: Any,
    class_of: Int,
    alike: float,
    *,
    pool_chunks: int,
    is_compared: bool = True,
) -> dict[str, Any]:
    """Of an epoch's batches over a cache whose image i is of class `class_of[i]`, on `alike` of its tokens' variance.

    is_compared : also of batches out of a perfect shuffle, and of stretches of the cache as it is
    """
    n_images, n_tokens, root = len(class_of), options.batch_tokens, folder / "quality.acts.zarr"
    chunk_images, part_images = options.chunk_images, token_stream.SEGMENT_IMAGES
    say(f"shuffle quality of {n_images:,} images: pools of {pool_chunks} chunks in parts of {part_images}")
    blocks = _numbered_blocks(chunk_sizes(n_images, chunk_images), class_of, alike)
    write_cache(root, blocks, n_images=n_images, width=_QUALITY_WIDTH, chunk_images=chunk_images)
    store = ActivationStore(root)
    stream = TokenStream([store], pool_chunks=pool_chunks)
    n_batches = max(1, stream.tokens_per_epoch // n_tokens)
    with closing(stream.batches(n_tokens)) as batches:
        found: dict[str, Any] = {"ours": _quality(islice(batches, n_batches), class_of)}
    if is_compared:
        everything = np.concatenate([tokens.reshape(-1, _QUALITY_WIDTH) for _, tokens in store.iter_chunks()])
        order = np.random.default_rng(0).permutation(len(everything)).astype(np.int32)
        n_shown = min(n_batches, 64)
        starts = np.linspace(0, max(0, len(everything) - n_tokens), n_shown).astype(np.int64)
        found |= {
            "perfect": _quality((everything[order[n * n_tokens :][:n_tokens]] for n in range(n_shown)), class_of),
            "unshuffled": _quality((everything[start:][:n_tokens] for start in starts), class_of),
            "batches": n_batches,
            "correlation_within_an_image": (1 + alike) / 2,
        }
    shutil.rmtree(root)
    return found


def _quality(batches: Iterator[npt.NDArray[np.float16]], class_of: Int) -> dict[str, float]:
    """Means over batches.

    Distinct images; correlation of neighbours; share of neighbours out of one image; distinct classes; total variation
    distance of the classes from those of the whole cache (0 equal, 1 nothing in common); their chi-square per degree of
    freedom (1 for independent draws, k where every token has k - 1 others of its class beside it).
    """
    of_class = np.bincount(class_of) / len(class_of)
    rows = []
    for batch in batches:
        image = batch[:, 0].astype(np.int64) * _BASE + batch[:, 1].astype(np.int64)
        values = batch[:, 2:].astype(np.float32)
        values /= np.linalg.norm(values, axis=1, keepdims=True)
        is_there = np.bincount(image) > 0
        classes = np.bincount(class_of[image], minlength=len(of_class))
        expected = of_class * len(batch)
        rows.append(
            (
                is_there.sum(),
                (values[1:] * values[:-1]).sum(1).mean(),
                (image[1:] == image[:-1]).mean(),
                (classes > 0).sum(),
                np.abs(classes - expected).sum() / len(batch) / 2,
                ((classes - expected) ** 2 / expected).sum() / max(1, len(of_class) - 1),
            )
        )
    names = (
        "distinct_images_per_batch",
        "neighbour_correlation",
        "neighbours_of_one_image",
        "classes_per_batch",
        "class_distance",
        "class_chi_square_per_degree",
    )
    return dict(zip(names, np.mean(rows, axis=0).tolist(), strict=True))


def _random_blocks(sizes: list[int], width: int) -> Iterator[npt.NDArray[np.float16]]:
    """Chunks of finite float16 with random sign and mantissa, made as fast as a disk writes them."""
    rng = np.random.default_rng(0)
    for size in sizes:
        bits = rng.integers(0, 1 << 16, (size, TOKENS_PER_IMAGE, width), np.uint16)
        yield ((bits & np.uint16(0x83FF)) | np.uint16(0x3800)).view(np.float16)


def _numbered_blocks(sizes: list[int], class_of: Int, alike: float) -> Iterator[npt.NDArray[np.float16]]:
    """Chunks of tokens with their image's number; those of a class share a mean, `alike` of their variance."""
    rng, first = np.random.default_rng(1), 0
    means = rng.standard_normal((class_of.max() + 1, 1, _QUALITY_WIDTH)).astype(np.float32)
    for size in sizes:
        image = np.arange(first, first + size)
        tokens = similar_tokens(rng, size, _QUALITY_WIDTH)
        if alike:
            tokens = (np.sqrt(alike) * means[class_of[image]] + np.sqrt(1 - alike) * tokens).astype(np.float16)
        tokens[:, :, 0], tokens[:, :, 1] = image[:, None] // _BASE, image[:, None] % _BASE
        yield tokens
        first += size


def _fastest(rows: MappedRows, options: Any, n_batches: int) -> tuple[Callable[[], None], int]:
    """The DataLoader with the better number of workers, found by one run of each."""
    counts = _worker_counts(options.batch_tokens * options.width * 2)
    sides = [_dataloader(rows, options.batch_tokens, n_batches, workers) for workers in counts]
    seconds = [timing.seconds for timing in alternate(*sides, rounds=1)]
    best = int(np.argmin(seconds))
    return sides[best], counts[best]


def _dataloader(rows: MappedRows, batch_tokens: int, n_batches: int, workers: int) -> Callable[[], None]:
    def run() -> None:
        collate = (lambda batch: batch[0]) if isinstance(rows, GatheredRows) else None
        generator = torch.Generator().manual_seed(0)
        loader = DataLoader(
            rows, batch_tokens, shuffle=True, num_workers=workers, collate_fn=collate, generator=generator
        )
        for batch in islice(loader, n_batches):
            assert len(batch) == batch_tokens

    return run


def _worker_counts(batch_bytes: int) -> list[int]:
    """No workers, and one per core where shared memory holds the batches that they read ahead."""
    cores = n_cores()
    shared = Path("/dev/shm")
    needed = 2 * batch_bytes * (2 * cores + 1)
    return [0, cores] if shared.is_dir() and shutil.disk_usage(shared).free > needed else [0]


if __name__ == "__main__":
    main()
