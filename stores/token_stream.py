"""Which tokens come next: an endless stream, a pure function of (caches, settings, seed), that can be entered anywhere.

Order `tokens`: chunks are cut into parts of some images; in every epoch the parts are permuted, pools of parts are
read, as large as `pool_chunks` chunks, and the tokens of a pool are permuted. So a pool mixes also a cache that is
sorted by class. Order `images`: whole images, permuted once, the same in every pass (released). Each token comes once
per epoch; a batch may reach into the next pool or epoch. Tokens of unreadable images never come, nor those of images
left out. Several ranks share a batch by its rows.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from .token_sets import TOKEN_SETS, chosen_tokens

Float16 = npt.NDArray[np.float16]
Int = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]
Bool = npt.NDArray[np.bool_]
Job = Callable[[], Float16]  # gathers one batch
PART_IMAGES = 8  # a part is at most so many images of a chunk, side by side: docs/log.md says why 8
_MOST_TOKENS = 2**31 - 1  # of a pool: `Tokens.order` has 32 bits


class TokenShape(Protocol):
    """What the stream needs of a cache's settings; `ActivationSpec` has it."""

    @property
    def tokens_per_image(self) -> int:
        """T: tokens of an image."""

    @property
    def width(self) -> int:
        """D: channels of a token."""

    @property
    def chunk_images(self) -> int:
        """Images of a chunk, the last one's excepted."""


class TokenSource(Protocol):
    """What the stream needs of an activation cache; `ActivationStore` is one."""

    @property
    def root(self) -> Path | str:
        """Where it lies, for error messages."""

    @property
    def spec(self) -> TokenShape:
        """Shape of the tokens, images per chunk."""

    def readable(self) -> Bool:
        """(images,): False where an image could not be read."""

    def begin_rows(self, chunk: int, rows: range) -> Future[Float16]:
        """Schedule reading these images of one chunk: (rows, tokens, width)."""


@dataclass(frozen=True)
class PoolPart:
    """Eligible images of one chunk of one cache, close together; their read is scheduled."""

    store: TokenSource
    chunk: int
    rows: Int  # positions inside the chunk, rising
    block: Future[Float16]  # the images from the first row to the last


@dataclass(frozen=True)
class Pool:
    """The images whose tokens are shuffled together, and of each the tokens that may come."""

    parts: list[PoolPart]
    tokens: range

    @cached_property
    def images(self) -> npt.NDArray[np.uintp]:
        """(n_images,) where each one's first token that may come lies in memory; waits until all are there.

        Raises what reading them raises. They lie there as long as the pool is kept.
        """
        return np.concatenate([self._addresses(part) for part in self.parts])

    def _addresses(self, part: PoolPart) -> npt.NDArray[np.uintp]:
        block = part.block.result()
        image_bytes, token_bytes = block.strides[:2]
        first = block.ctypes.data + self.tokens.start * token_bytes
        return np.array((part.rows - part.rows[0]) * image_bytes + first, np.uintp)

    def part_of(self, image: int) -> PoolPart:
        """The part that an image of the pool is in."""
        ends = np.cumsum([len(part.rows) for part in self.parts])
        return self.parts[int(np.searchsorted(ends, image, side="right"))]

    def give_up(self) -> None:
        """Nobody will ask for it any more: what is not yet being read need not be."""
        for part in self.parts:
            part.block.cancel()


@dataclass(frozen=True)
class Tokens:
    """The tokens of a pool, or some of them, in the order in which they come."""

    pool: Pool
    order: Int32  # (n,) counted through the images of the pool and their tokens that may come

    def chosen(self, which: slice | Bool) -> "Tokens":
        """Some of them, in the same order."""
        return Tokens(self.pool, self.order[which])

    def __len__(self) -> int:
        return len(self.order)


_NO_TOKENS = Tokens(Pool([], range(0)), np.zeros(0, np.int32))


class TokenStream:
    """The training tokens of one or several caches, in order.

    Memory: `threads` + 1 batches, and the page cache's share of two pools; of a URL the two pools themselves. A pool
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
    ) -> None:
        """Open the stream; nothing is read yet.

        Parameters
        ----------
        threads : batches that are gathered ahead, each in one
        images : per cache (n_images,) bool: those that may come, if they are readable; None: all (`chosen_images`)

        Raises
        ------
        BadInput
            If no image is readable and chosen, `images` does not fit the caches, or a setting is out of its range.
        """
        check_choice("token_set", token_set, TOKEN_SETS)
        check_choice("order", order, ("tokens", "images"))
        if pool_chunks < 1:
            raise BadInput(f"pool_chunks must be above 0; found {pool_chunks}")
        self._stores, self._order, self._seed = stores, order, seed
        self._threads = threads
        self._tokens = chosen_tokens(token_set, stores[0].spec.tokens_per_image)
        self.tokens_per_image = len(self._tokens)
        self._images = np.concatenate(list(_images(stores, _may_come(stores, images))))
        if not len(self._images):
            chosen = "readable" if images is None else "readable and chosen"
            raise BadInput(f"no {chosen} image in the given caches: there is nothing to train on")
        of_part = self._images // [1, 1, PART_IMAGES]
        begins = (of_part[1:] != of_part[:-1]).any(axis=1)
        self._borders = np.array([0, *(np.flatnonzero(begins) + 1), len(self._images)])  # part i: from i to i + 1
        n_chunks = 1 + int((of_part[1:, :2] != of_part[:-1, :2]).any(axis=1).sum())
        self._n_pools = -(-n_chunks // pool_chunks)
        largest = -(-(len(self._borders) - 1) // self._n_pools) * PART_IMAGES * self.tokens_per_image
        if largest > _MOST_TOKENS:
            raise BadInput(f"pools of {pool_chunks:,} chunks have up to {largest:,} tokens; take pool_chunks smaller")

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens in one pass over the caches."""
        return len(self._images) * self.tokens_per_image

    def batches(self, batch_tokens: int, *, position: int = 0, part: tuple[int, int] = (0, 1)) -> Iterator[Float16]:
        """Batches of exactly `batch_tokens` tokens, (batch_tokens, width) float16, from token `position` on.

        Entering at a position reads one pool, not what came before.

        Parameters
        ----------
        part : (rank, number of ranks): of every batch only the rows that `rows_of_part` names are gathered and given;
            those of all ranks, one behind the other, are the batch

        Raises
        ------
        BadInput
            For an empty batch, a position before the first token or a rank that is not there, at once.
        """
        if batch_tokens < 1 or position < 0:
            raise BadInput(f"batch_tokens must be above 0 and position not below; found {batch_tokens}, {position}")
        rows = rows_of_part(batch_tokens, part)
        return gather_ahead(lambda reader: self._jobs(reader, batch_tokens, position, rows), self._threads)

    def _jobs(self, reader: ThreadPoolExecutor, batch_tokens: int, position: int, rows: range) -> Iterator[Job]:
        for pieces in self.plan(reader, repeat(batch_tokens), position):
            yield partial(gather, _within(pieces, rows), np.arange(len(rows)), self._stores[0].spec.width)

    def plan(self, reader: ThreadPoolExecutor, sizes: Iterable[int], position: int) -> Iterator[list[Tokens]]:
        """What each of the next batches, of these sizes, is made of: tokens of one pool, or of the end of one and the
        beginning of the next. In `reader` the next pool is made ready meanwhile.
        """
        pools = self._pools(position)
        tokens, at, following = _NO_TOKENS, 0, None
        try:
            for size in sizes:
                pieces: list[Tokens] = []  # lets go of a pool that is used up, before the next but one is read
                while size:
                    following = following or reader.submit(self._begin, *next(pools))
                    if at == len(tokens):
                        tokens, at, following = following.result(), 0, None
                    pieces.append(tokens.chosen(slice(at, at + size)))
                    at += len(pieces[-1])
                    size -= len(pieces[-1])
                yield pieces
        finally:
            tokens.pool.give_up()
            if following and not following.cancel() and not following.exception():
                following.result().pool.give_up()

    def _pools(self, position: int) -> Iterator[tuple[list[Int], list[int], int]]:
        """(images of each part of a pool, seeds of its order, tokens of it to pass over), from `position` on."""
        epoch, skip = divmod(position, self.tokens_per_epoch)
        while True:
            for number, parts in enumerate(self._pool_order(epoch), start=1):
                n_tokens = sum(map(len, parts)) * self.tokens_per_image
                if skip < n_tokens:
                    yield parts, [self._seed, epoch, number], skip
                skip = max(0, skip - n_tokens)
            epoch += 1

    def _begin(self, parts: list[Int], seeds: list[int], skip: int) -> Tokens:
        """Begin to read a pool; its tokens in the order in which they come, without the first `skip`."""
        pool = Pool([self._begin_part(images) for images in parts], self._tokens)
        order = np.arange(sum(map(len, parts)) * self.tokens_per_image, dtype=np.int32)
        if self._order == "tokens":
            order = np.random.default_rng(seeds).permutation(order)
        return Tokens(pool, order[skip:])

    def _begin_part(self, images: Int) -> PoolPart:
        number, chunk, first = images[0].tolist()
        store, rows = self._stores[number], images[:, 2]
        return PoolPart(store, chunk, rows, store.begin_rows(chunk, range(first, int(rows[-1]) + 1)))

    def _pool_order(self, epoch: int) -> Iterator[list[Int]]:
        """The pools of an epoch, in order: of each part the images, (n, 3) number of the cache, chunk, row."""
        if self._order == "images":
            order = np.random.default_rng([self._seed, 0]).permutation(len(self._images))
            for start in range(0, len(order), 64):
                yield [self._images[image, None] for image in order[start : start + 64]]
            return
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._borders) - 1)
        for pool in np.array_split(order, self._n_pools):  # of equal size: a short last pool would be shuffled badly
            yield [
                self._images[start:end] for start, end in zip(self._borders[pool], self._borders[pool + 1], strict=True)
            ]


def rows_of_part(batch_tokens: int, part: tuple[int, int]) -> range:
    """The rows of every batch that belong to rank `part[0]` of `part[1]`.

    Raises
    ------
    BadInput
        For an empty batch, or a rank that is not there.
    """
    rank, n_ranks = part
    if batch_tokens < 1:
        raise BadInput(f"batch_tokens must be above 0; found {batch_tokens}")
    if not 0 <= rank < n_ranks:
        raise BadInput(f"part must be a rank and the number of ranks, rank from 0 to one less; found {rank}, {n_ranks}")
    return range(rank * batch_tokens // n_ranks, (rank + 1) * batch_tokens // n_ranks)


def gather_ahead(jobs_of: Callable[[ThreadPoolExecutor], Iterator[Job]], n_threads: int) -> Iterator[Float16]:
    """What the jobs give, in their order; some are done ahead in threads. What they give does not depend on that.

    `jobs_of` gets a thread of its own, for what comes before the jobs.
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
    """(tokens of the pieces, width) float16: token i of them all in row `places[i]`; all rows must be named.

    Raises DamagedStore if one is not finite, and what reading them raises.
    """
    from .gather_kernel import gather_rows  # compiling takes a moment, once per machine

    out = np.empty((len(places), width), np.float16)
    first = 0
    for piece in pieces:
        pool, per_image = piece.pool, len(piece.pool.tokens)
        bad = gather_rows(pool.images, piece.order, per_image, out, places[first : first + len(piece)])
        if bad >= 0:
            part = pool.part_of(int(piece.order[bad]) // per_image)
            raise DamagedStore(
                f"{part.store.root} holds NaN or infinity in a readable image of chunk {part.chunk}. "
                f"cyto cache verify names it"
            )
        first += len(piece)
    return out


def _within(pieces: list[Tokens], rows: range) -> list[Tokens]:
    """Of the tokens of a batch those in `rows`."""
    kept, first = [], 0
    for piece in pieces:
        kept.append(piece.chosen(slice(max(0, rows.start - first), max(0, rows.stop - first))))
        first += len(piece)
    return [piece for piece in kept if len(piece)]


def _may_come(stores: Sequence[TokenSource], images: Sequence[Bool] | None) -> list[Bool]:
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


def _images(stores: Sequence[TokenSource], may_come: list[Bool]) -> Iterator[Int]:
    """Of each cache (n, 3): its number, and chunk and row of each image that may come."""
    for number, (store, mask) in enumerate(zip(stores, may_come, strict=True)):
        chunk, row = np.divmod(np.flatnonzero(mask), store.spec.chunk_images)
        yield np.stack([np.full_like(chunk, number), chunk, row], axis=1)
