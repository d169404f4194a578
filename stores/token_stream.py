"""The order of training tokens: an endless stream that can start at any position, determined by caches, settings, seed.

Order `tokens`: chunks are divided into segments of up to 8 images. In every epoch the segments are permuted; pools of
segments, of the size of `pool_chunks` chunks, are read, and the tokens of a pool are permuted. So tokens are mixed well
also in a cache that is sorted by class. Order `images`: whole images, permuted once, the same in every epoch (as
released). Each token comes once per epoch; a batch may continue into the next pool or epoch. Only eligible images are
used: readable ones that were chosen for training. Several ranks share a batch by its rows.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import repeat
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .errors import BadInput, DamagedStore
from .spec import check_choice
from .token_layout import TokenLayout
from .token_sets import TOKEN_SETS, chosen_tokens

Float16 = npt.NDArray[np.float16]
Int = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]
Bool = npt.NDArray[np.bool_]
Job = Callable[[], Float16]  # gathers one batch
SEGMENT_IMAGES = 8  # most images of a segment, which are neighbours in a chunk: docs/log.md says why 8
_MOST_TOKENS = 2**31 - 1  # of a pool: `Tokens.order` has 32 bits


class TokenShape(Protocol):
    """What the stream needs of a cache's settings; `ActivationSpec` has it."""

    @property
    def tokens_per_image(self) -> int:
        """T: tokens of an image."""

    @property
    def layout(self) -> TokenLayout:
        """Which token of an image is what."""

    @property
    def width(self) -> int:
        """D: channels of a token."""

    @property
    def chunk_images(self) -> int:
        """Images per chunk, except in the last one."""


class TokenSource(Protocol):
    """What the stream needs of an activation cache; `ActivationStore` is one."""

    @property
    def root(self) -> Path | str:
        """Its path or URL, for error messages."""

    @property
    def spec(self) -> TokenShape:
        """Shape of the tokens, images per chunk."""

    def readable(self) -> Bool:
        """(images,): False where an image could not be read."""

    def begin_rows(self, chunk: int, rows: range) -> Future[Float16]:
        """Schedule reading these images of one chunk: (rows, tokens, width)."""


@dataclass(frozen=True)
class PoolSegment:
    """Eligible images of one chunk of one cache, close together; their read is scheduled."""

    store: TokenSource
    chunk: int
    rows: Int  # positions inside the chunk, ascending
    future: Future[Float16]  # all images from the first to the last of `rows`


@dataclass(frozen=True)
class Pool:
    """The images whose tokens are shuffled together, and the positions of the tokens that are used."""

    segments: list[PoolSegment]
    tokens: range

    @cached_property
    def images(self) -> npt.NDArray[np.uintp]:
        """(n_images,) memory address of the first used token of each image; waits until all images are read.

        Raises the errors of reading them. The addresses are valid as long as the pool exists.
        """
        return np.concatenate([self._addresses(segment) for segment in self.segments])

    def _addresses(self, segment: PoolSegment) -> npt.NDArray[np.uintp]:
        tokens = segment.future.result()
        image_bytes, token_bytes = tokens.strides[:2]
        first = tokens.ctypes.data + self.tokens.start * token_bytes
        return np.array((segment.rows - segment.rows[0]) * image_bytes + first, np.uintp)

    def segment_of(self, image: int) -> PoolSegment:
        """The segment of an image of the pool."""
        ends = np.cumsum([len(segment.rows) for segment in self.segments])
        return self.segments[int(np.searchsorted(ends, image, side="right"))]

    def cancel(self) -> None:
        """Cancel the reads that have not started: the pool is not needed any more."""
        for segment in self.segments:
            segment.future.cancel()


@dataclass(frozen=True)
class Tokens:
    """The tokens of a pool, or some of them, in training order."""

    pool: Pool
    order: Int32  # (n,) number of each token, counted over the images of the pool and their used tokens

    def chosen(self, which: slice | Bool) -> "Tokens":
        """Some of them, in the same order."""
        return Tokens(self.pool, self.order[which])

    def __len__(self) -> int:
        return len(self.order)


_NO_TOKENS = Tokens(Pool([], range(0)), np.zeros(0, np.int32))


class TokenStream:
    """The training tokens of one or several caches, in order.

    Memory: `threads` + 1 batches, and two pools: in the page cache for local caches, in this process for URLs. A pool
    has as many images as `pool_chunks` chunks.
    """

    def __init__(
        self,
        stores: Sequence[TokenSource],
        *,
        token_set: str = "all",
        order: str = "tokens",
        pool_chunks: int = 16,
        seed: int = 0,
        threads: int = 2,
        images: Sequence[Bool] | None = None,
        keep: Sequence[Bool] | None = None,
    ) -> None:
        """Open the stream; nothing is read yet.

        Parameters
        ----------
        threads : batches that are gathered in advance, one in each thread
        images : per cache (n_images,) bool: the images to use, if they are readable; None: all (see `chosen_images`)
        keep : per cache (n_images, tokens of an image) bool: the tokens to use, of those in `token_set`; None: all

        Raises
        ------
        BadInput
            If there is no cache, no image is readable and chosen, `images` does not fit the caches, or a setting is out
            of its range.
        """
        check_choice("token_set", token_set, TOKEN_SETS)
        check_choice("order", order, ("tokens", "images"))
        if pool_chunks < 1:
            raise BadInput(f"pool_chunks must be above 0; found {pool_chunks}")
        if not stores:
            raise BadInput("no cache is given: there is nothing to train on")
        self._stores, self._order, self._seed = stores, order, seed
        self._threads = threads
        self._tokens = chosen_tokens(token_set, stores[0].spec.layout, f"the tokens of {stores[0].root}")
        self.tokens_per_image = len(self._tokens)
        self._images = np.concatenate(list(_images(stores, _eligible(stores, images))))
        if not len(self._images):
            chosen = "readable" if images is None else "readable and chosen"
            raise BadInput(f"no {chosen} image in the given caches: there is nothing to train on")
        self._keep = None if keep is None else [mask[:, self._tokens.start : self._tokens.stop] for mask in keep]
        self._n_tokens = self._count(self._images)
        if not self._n_tokens:
            raise BadInput("no token of the given caches is left to train on: all are left out")
        of_segment = self._images // [1, 1, SEGMENT_IMAGES]
        begins = (of_segment[1:] != of_segment[:-1]).any(axis=1)
        self._borders = np.array([0, *(np.flatnonzero(begins) + 1), len(self._images)])  # segment i: from i to i + 1
        n_chunks = 1 + int((of_segment[1:, :2] != of_segment[:-1, :2]).any(axis=1).sum())
        self._n_pools = -(-n_chunks // pool_chunks)
        largest = -(-(len(self._borders) - 1) // self._n_pools) * SEGMENT_IMAGES * self.tokens_per_image
        if largest > _MOST_TOKENS:
            raise BadInput(f"pools of {pool_chunks:,} chunks have up to {largest:,} tokens; take pool_chunks smaller")

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens in one pass over the caches."""
        return self._n_tokens

    @property
    def mean_tokens_per_image(self) -> float:
        """Tokens in one pass by the number of images: `tokens_per_image`, or fewer where some are left out."""
        return self._n_tokens / len(self._images)

    def _count(self, images: Int) -> int:
        """Tokens that are used, of images given by cache, chunk and row."""
        return len(images) * self.tokens_per_image if self._keep is None else int(self._kept(images).sum())

    def _kept(self, images: Int) -> Bool:
        """(n, tokens of an image): is the token used?"""
        assert self._keep is not None
        found = np.empty((len(images), self.tokens_per_image), bool)
        rows = images[:, 1] * [self._stores[number].spec.chunk_images for number in images[:, 0].tolist()]
        rows += images[:, 2]
        for number, mask in enumerate(self._keep):
            is_here = images[:, 0] == number
            found[is_here] = mask[rows[is_here]]
        return found

    def batches(
        self, batch_tokens: int, *, position: int = 0, part: tuple[int, int] = (0, 1)
    ) -> Generator[Float16, None, None]:
        """Batches of exactly `batch_tokens` tokens, (batch_tokens, width) float16, from token `position` on.

        To start at a position, one pool is read.

        Parameters
        ----------
        part : (rank, number of ranks): of every batch only the rows of this rank (`rows_of_part`) are gathered; the
            rows of all ranks, concatenated, are the batch

        Raises
        ------
        BadInput
            For an empty batch, a negative position or an unknown rank, at the call.
        """
        if batch_tokens < 1 or position < 0:
            raise BadInput(f"batch_tokens must be above 0 and position not below; found {batch_tokens}, {position}")
        rows = rows_of_part(batch_tokens, part)
        return gather_ahead(lambda reader: self._jobs(reader, batch_tokens, position, rows), self._threads)

    def _jobs(self, reader: ThreadPoolExecutor, batch_tokens: int, position: int, rows: range) -> Iterator[Job]:
        for pieces in self.plan(reader, repeat(batch_tokens), position):
            yield partial(gather, _within(pieces, rows), np.arange(len(rows)), self._stores[0].spec.width)

    def plan(self, reader: ThreadPoolExecutor, sizes: Iterable[int], position: int) -> Iterator[list[Tokens]]:
        """The tokens of each of the next batches, which have these sizes: from one pool, or from two neighbouring ones.

        The next pool is prepared in `reader` in the meantime.
        """
        pools = self._pools(position)
        tokens, at, following = _NO_TOKENS, 0, None
        try:
            for size in sizes:
                pieces: list[Tokens] = []  # releases a used pool before the next but one is read
                while size:
                    following = following or reader.submit(self._begin, *next(pools))
                    if at == len(tokens):
                        tokens, at, following = following.result(), 0, None
                    pieces.append(tokens.chosen(slice(at, at + size)))
                    at += len(pieces[-1])
                    size -= len(pieces[-1])
                yield pieces
        finally:
            tokens.pool.cancel()
            if following and not following.cancel() and not following.exception():
                following.result().pool.cancel()

    def _pools(self, position: int) -> Iterator[tuple[list[Int], list[int], int]]:
        """(images of each segment of a pool, seed of its order, number of its tokens to skip), from `position` on."""
        epoch, skip = divmod(position, self.tokens_per_epoch)
        while True:
            for number, segments in enumerate(self._pool_order(epoch), start=1):
                n_tokens = sum(map(self._count, segments))
                if skip < n_tokens:
                    yield segments, [self._seed, epoch, number], skip
                skip = max(0, skip - n_tokens)
            epoch += 1

    def _begin(self, segments: list[Int], seeds: list[int], skip: int) -> Tokens:
        """Begin to read a pool; returns its tokens in training order, without the first `skip`."""
        pool = Pool([self._begin_segment(images) for images in segments], self._tokens)
        order = np.arange(sum(map(len, segments)) * self.tokens_per_image, dtype=np.int32)
        if self._keep is not None:
            order = order[self._kept(np.concatenate(segments)).ravel()]
        if self._order == "tokens":
            order = np.random.default_rng(seeds).permutation(order)
        return Tokens(pool, order[skip:])

    def _begin_segment(self, images: Int) -> PoolSegment:
        number, chunk, first = images[0].tolist()
        store, rows = self._stores[number], images[:, 2]
        return PoolSegment(store, chunk, rows, store.begin_rows(chunk, range(first, int(rows[-1]) + 1)))

    def _pool_order(self, epoch: int) -> Iterator[list[Int]]:
        """The pools of an epoch, in order: for each segment its images, (n, 3) number of the cache, chunk, row."""
        if self._order == "images":
            order = np.random.default_rng([self._seed, 0]).permutation(len(self._images))
            for start in range(0, len(order), 64):
                yield [self._images[image, None] for image in order[start : start + 64]]
            return
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._borders) - 1)
        for pool in np.array_split(order, self._n_pools):  # of equal size, since a small last pool would be mixed less
            yield [
                self._images[start:end] for start, end in zip(self._borders[pool], self._borders[pool + 1], strict=True)
            ]


def rows_of_part(batch_tokens: int, part: tuple[int, int]) -> range:
    """The rows of every batch that belong to rank `part[0]` of `part[1]`.

    Raises
    ------
    BadInput
        For an empty batch, or an unknown rank.
    """
    rank, n_ranks = part
    if batch_tokens < 1:
        raise BadInput(f"batch_tokens must be above 0; found {batch_tokens}")
    if not 0 <= rank < n_ranks:
        raise BadInput(f"part must be a rank and the number of ranks, rank from 0 to one less; found {rank}, {n_ranks}")
    return range(rank * batch_tokens // n_ranks, (rank + 1) * batch_tokens // n_ranks)


def gather_ahead(
    jobs_of: Callable[[ThreadPoolExecutor], Iterator[Job]], n_threads: int
) -> Generator[Float16, None, None]:
    """The results of the jobs, in order; `n_threads` of them run in advance, which does not change the results.

    `jobs_of` gets an extra thread, for work that precedes the jobs.
    """
    with (
        ThreadPoolExecutor(1, thread_name_prefix="pool") as reader,
        ThreadPoolExecutor(n_threads, thread_name_prefix="batch") as threads,
        closing(jobs_of(reader)) as jobs,  # type: ignore[type-var]  # a generator
    ):
        gathering: deque[Future[Float16]] = deque()
        try:
            for job in jobs:
                gathering.append(threads.submit(job))
                if len(gathering) > n_threads:
                    yield gathering.popleft().result()
        finally:
            for future in gathering:
                future.cancel()


def gather(pieces: list[Tokens], places: npt.NDArray[np.integer[Any]], width: int) -> Float16:
    """(number of tokens, width) float16: token i of the pieces in row `places[i]`, a permutation of all rows.

    Raises DamagedStore if a token is not finite, and the errors of reading.
    """
    from .gather_kernel import gather_rows  # imported here: compiling takes a moment, once per machine

    out = np.empty((len(places), width), np.float16)
    first = 0
    for piece in pieces:
        pool, per_image = piece.pool, len(piece.pool.tokens)
        bad = gather_rows(pool.images, piece.order, per_image, out, places[first : first + len(piece)])
        if bad >= 0:
            segment = pool.segment_of(int(piece.order[bad]) // per_image)
            raise DamagedStore(
                f"{segment.store.root} holds NaN or infinity in a readable image of chunk {segment.chunk}. "
                f"cyto cache verify names it"
            )
        first += len(piece)
    return out


def _within(pieces: list[Tokens], rows: range) -> list[Tokens]:
    """The tokens of a batch that are in `rows`."""
    kept, first = [], 0
    for piece in pieces:
        kept.append(piece.chosen(slice(max(0, rows.start - first), max(0, rows.stop - first))))
        first += len(piece)
    return [piece for piece in kept if len(piece)]


def _eligible(stores: Sequence[TokenSource], images: Sequence[Bool] | None) -> list[Bool]:
    readable = [store.readable() for store in stores]
    if images is None:
        return readable
    expected, found = ([f"{mask.dtype} {mask.shape}" for mask in masks] for masks in (readable, images))
    if found != expected:
        raise BadInput(
            f"images must say yes or no for each image of each cache: expected {', '.join(expected)}; "
            f"found {', '.join(found) or 'nothing'}"
        )
    return [mask & chosen for mask, chosen in zip(readable, images, strict=True)]


def _images(stores: Sequence[TokenSource], eligible: list[Bool]) -> Iterator[Int]:
    """For each cache (n, 3): its number, and chunk and row of each eligible image."""
    for number, (store, mask) in enumerate(zip(stores, eligible, strict=True)):
        chunk, row = np.divmod(np.flatnonzero(mask), store.spec.chunk_images)
        yield np.stack([np.full_like(chunk, number), chunk, row], axis=1)
