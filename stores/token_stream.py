"""Which tokens come next: an endless stream, a pure function of (caches, settings, seed), that can be entered anywhere.

Order `tokens`: in every epoch the chunks are permuted, pools of `pool_chunks` chunks are read into memory, and the
tokens of a pool are permuted. Order `images`: whole images, permuted once, the same in every pass (released). Each
token comes once per epoch; a batch may reach into the next pool or epoch. Tokens of unreadable images never come, nor
those of images left out. Several ranks share a batch by its rows.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .errors import BadInput, DamagedStore
from .spec import check_choice

if TYPE_CHECKING:  # it offers this stream
    from .activation_store import ActivationStore

Float16 = npt.NDArray[np.float16]
Int = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]
Job = Callable[[], Float16]  # gathers one batch
_TOKEN_SETS = ("all", "patch", "cls")
_MOST_CHUNKS = 1 << 16  # of a pool: `Tokens.owners` has 16 bits


@dataclass(frozen=True)
class Chunk:
    """The images of one chunk of one cache that may come."""

    store: "ActivationStore"
    number: int  # of the cache among those of its stream
    chunk: int
    rows: Int  # positions inside the chunk


@dataclass(frozen=True)
class Tokens:
    """The tokens of a pool, or a part of them, in the order in which they come."""

    chunks: list[Chunk]
    owners: npt.NDArray[np.uint16]  # (n,) index into `chunks`
    rows: npt.NDArray[np.int32]  # (n,) of the owner, counted through its images and all their tokens

    def chosen(self, which: slice | Bool) -> "Tokens":
        """Some of them, in the same order."""
        return Tokens(self.chunks, self.owners[which], self.rows[which])

    def __len__(self) -> int:
        return len(self.rows)


_NO_TOKENS = Tokens([], np.zeros(0, np.uint16), np.zeros(0, np.int32))


class TokenStream:
    """The training tokens of one or several caches, in order.

    Memory: `threads` + 1 batches, and the page cache's share of two pools; of a URL the two pools themselves.
    """

    def __init__(
        self,
        stores: list["ActivationStore"],
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
        check_choice("token_set", token_set, _TOKEN_SETS)
        check_choice("order", order, ("tokens", "images"))
        if not 1 <= pool_chunks <= _MOST_CHUNKS:
            raise BadInput(f"pool_chunks must be from 1 to {_MOST_CHUNKS:,}; found {pool_chunks}")
        self._stores, self._order, self._pool_chunks, self._seed = stores, order, pool_chunks, seed
        self._threads = threads
        n_tokens = stores[0].spec.tokens_per_image
        self._token_slice = {"all": slice(0, n_tokens), "patch": slice(1, n_tokens), "cls": slice(0, 1)}[token_set]
        self.tokens_per_image = len(range(n_tokens)[self._token_slice])
        self._chunks = list(_chunks(stores, _may_come(stores, images)))
        self._images = np.array([(c.number, c.chunk, row) for c in self._chunks for row in c.rows], np.int64)
        if not len(self._images):
            chosen = "readable" if images is None else "readable and chosen"
            raise BadInput(f"no {chosen} image in the given caches: there is nothing to train on")

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
        return gather_ahead(lambda threads: self._jobs(threads, batch_tokens, position, rows), self._threads)

    def _jobs(self, threads: ThreadPoolExecutor, batch_tokens: int, position: int, rows: range) -> Iterator[Job]:
        for pieces in self.plan(threads, repeat(batch_tokens), position):
            yield partial(gather, _within(pieces, rows), np.arange(len(rows)), self._stores[0].spec.width)

    def plan(self, threads: ThreadPoolExecutor, sizes: Iterable[int], position: int) -> Iterator[list[Tokens]]:
        """What each of the next batches, of these sizes, is made of: tokens of one pool, or of the end of one and the
        beginning of the next. `threads` prepare the orders of the pools.
        """
        pools = self._pools(position)
        shuffling = deque([threads.submit(self._shuffle, *next(pools))])
        pool, at = _NO_TOKENS, 0
        for size in sizes:
            pieces: list[Tokens] = []
            while size:
                if at == len(pool):
                    shuffling.append(threads.submit(self._shuffle, *next(pools)))
                    pool, at = shuffling.popleft().result(), 0
                pieces.append(pool.chosen(slice(at, at + size)))
                at += len(pieces[-1])
                size -= len(pieces[-1])
            yield pieces

    def _pools(self, position: int) -> Iterator[tuple[list[Chunk], list[int], int]]:
        """(chunks of a pool, seeds of its order, tokens of it to pass over), from `position` on."""
        epoch, skip = divmod(position, self.tokens_per_epoch)
        while True:
            for pool in self._pool_order(epoch):
                n_tokens = sum(len(chunk.rows) for chunk in pool) * self.tokens_per_image
                if skip < n_tokens:
                    yield pool, [self._seed, epoch, pool[0].number, pool[0].chunk], skip
                skip = max(0, skip - n_tokens)
            epoch += 1

    def _shuffle(self, chunks: list[Chunk], seeds: list[int], skip: int) -> Tokens:
        """The tokens of a pool in the order in which they come, without the first `skip`."""
        per_image, tokens_per_image = self.tokens_per_image, self._stores[0].spec.tokens_per_image
        kept = np.arange(tokens_per_image, dtype=np.int32)[self._token_slice]
        firsts = [(chunk.rows * tokens_per_image).astype(np.int32) for chunk in chunks]
        rows = np.concatenate([(first[:, None] + kept).ravel() for first in firsts])
        owners = np.repeat(np.arange(len(chunks), dtype=np.uint16), [len(chunk.rows) * per_image for chunk in chunks])
        if self._order == "tokens":
            for number, store in enumerate(self._stores):
                store.prefetch([chunk.chunk for chunk in chunks if chunk.number == number])
            order = np.random.default_rng(seeds).permutation(np.arange(len(rows), dtype=np.int32))[skip:]
            return Tokens(chunks, owners[order], rows[order])
        return Tokens(chunks, owners[skip:], rows[skip:])

    def _pool_order(self, epoch: int) -> Iterator[list[Chunk]]:
        """The pools of an epoch, in order."""
        if self._order == "images":
            rng = np.random.default_rng([self._seed, 0])
            images = self._images[rng.permutation(len(self._images))]
            for start in range(0, len(images), 64):
                part = images[start : start + 64].tolist()
                yield [Chunk(self._stores[number], number, chunk, np.array([row])) for number, chunk, row in part]
            return
        rng = np.random.default_rng([self._seed, epoch])
        order = rng.permutation(len(self._chunks))
        n_pools = -(-len(order) // self._pool_chunks)
        for part in np.array_split(order, n_pools):  # of equal size: a short last pool would be shuffled badly
            yield [self._chunks[i] for i in part]


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
    """What the jobs give, in their order; some are done ahead in threads. What they give does not depend on that."""
    with ThreadPoolExecutor(n_threads, thread_name_prefix="batch") as threads:
        gathering: deque[Future[Float16]] = deque()
        try:
            for job in jobs_of(threads):
                gathering.append(threads.submit(job))
                if len(gathering) > n_threads:
                    yield gathering.popleft().result()
        finally:
            threads.shutdown(wait=True, cancel_futures=True)


def gather(pieces: list[Tokens], places: npt.NDArray[np.integer[Any]], width: int) -> Float16:
    """(tokens of the pieces, width) float16: token i of them all in row `places[i]`; all rows must be named.

    Raises DamagedStore if one is not finite.
    """
    from .gather import gather_rows  # compiling takes a moment, once per machine

    out = np.empty((len(places), width), np.float16)
    first = 0
    for piece in pieces:
        by_chunk = np.argsort(piece.owners, kind="stable")  # of 16-bit numbers: a radix sort
        ends = np.cumsum(np.bincount(piece.owners, minlength=len(piece.chunks)))
        for chunk, tokens in zip(piece.chunks, np.split(by_chunk, ends[:-1]), strict=True):
            if not len(tokens):
                continue
            read = chunk.store.read_chunk(chunk.chunk)
            if not gather_rows(read.reshape(-1, width), piece.rows[tokens], out, places[first + tokens]):
                raise DamagedStore(
                    f"{chunk.store.root} holds NaN or infinity in a readable image of chunk {chunk.chunk}. "
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


def _may_come(stores: list["ActivationStore"], images: Sequence[Bool] | None) -> list[Bool]:
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


def _chunks(stores: list["ActivationStore"], may_come: list[Bool]) -> Iterator[Chunk]:
    for number, store in enumerate(stores):
        for chunk in range(store.spec.n_chunks):
            rows = store.spec.chunk_rows(chunk)
            positions = np.flatnonzero(may_come[number][rows.start : rows.stop])
            if len(positions):
                yield Chunk(store, number, chunk, positions)
