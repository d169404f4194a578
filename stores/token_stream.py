"""Which tokens come next: an endless stream, a pure function of (caches, settings, seed), that can be entered anywhere.

Order `tokens`: in every epoch the chunks are permuted, pools of `pool_chunks` chunks are read into memory, and the
tokens of a pool are permuted. Order `images`: whole images, permuted once, the same in every pass (released). Each
token comes once per epoch; a batch may reach into the next pool or epoch. Tokens of unreadable images never come.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from .errors import BadInput, DamagedStore
from .spec import check_choice

if TYPE_CHECKING:  # it offers this stream
    from .activation_store import ActivationStore

Float16 = npt.NDArray[np.float16]
Int = npt.NDArray[np.int64]
_TOKEN_SETS = ("all", "patch", "cls")


@dataclass(frozen=True)
class _Chunk:
    """The readable images of one chunk of one cache."""

    store: int
    chunk: int
    rows: Int  # positions inside the chunk


@dataclass(frozen=True)
class _Pool:
    """The tokens of a pool, or a part of them, in the order in which they come."""

    chunks: list[_Chunk]
    owners: npt.NDArray[np.uint16]  # (n,) index into `chunks`
    rows: npt.NDArray[np.int32]  # (n,) of the owner, counted through its images and all their tokens


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
    ) -> None:
        """`threads`: batches that are gathered ahead, each in one. Raises BadInput if no image is readable."""
        check_choice("token_set", token_set, _TOKEN_SETS)
        self._stores, self._order, self._pool_chunks, self._seed = stores, order, pool_chunks, seed
        self._threads = threads
        n_tokens = stores[0].spec.tokens_per_image
        self._token_slice = {"all": slice(0, n_tokens), "patch": slice(1, n_tokens), "cls": slice(0, 1)}[token_set]
        self.tokens_per_image = len(range(n_tokens)[self._token_slice])
        self._chunks = list(_readable_chunks(stores))
        self._images = np.array([(c.store, c.chunk, row) for c in self._chunks for row in c.rows], np.int64)
        if not len(self._images):
            raise BadInput("no readable image in the given caches: there is nothing to train on")

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens in one pass over the caches."""
        return len(self._images) * self.tokens_per_image

    def batches(self, batch_tokens: int, *, position: int = 0) -> Iterator[Float16]:
        """Batches of exactly `batch_tokens` tokens, (batch_tokens, width) float16, from token `position` on.

        Entering at a position reads one pool, not what came before. Raises BadInput for an empty batch or a position
        before the first token, at once.
        """
        if batch_tokens < 1 or position < 0:
            raise BadInput(f"batch_tokens must be above 0 and position not below; found {batch_tokens}, {position}")
        return self._batches(batch_tokens, position)

    def _batches(self, batch_tokens: int, position: int) -> Iterator[Float16]:
        """Some batches are gathered ahead in threads; which tokens a batch has does not depend on that."""
        with ThreadPoolExecutor(self._threads, thread_name_prefix="batch") as threads:
            gathering: deque[Future[Float16]] = deque()
            try:
                for pieces in self._plan(threads, batch_tokens, position):
                    gathering.append(threads.submit(self._gather, pieces))
                    if len(gathering) > self._threads:
                        yield gathering.popleft().result()
            finally:
                threads.shutdown(wait=True, cancel_futures=True)

    def _plan(self, threads: ThreadPoolExecutor, batch_tokens: int, position: int) -> Iterator[list[_Pool]]:
        """What every batch is made of: tokens of one pool, or of the end of one and the beginning of the next."""
        pools = self._pools(position)
        shuffling = deque([threads.submit(self._shuffle, *next(pools))])
        pieces: list[_Pool] = []
        wanted = batch_tokens
        while True:
            shuffling.append(threads.submit(self._shuffle, *next(pools)))
            pool, at = shuffling.popleft().result(), 0
            while at < len(pool.rows):
                pieces.append(_Pool(pool.chunks, pool.owners[at : at + wanted], pool.rows[at : at + wanted]))
                at += len(pieces[-1].rows)
                wanted -= len(pieces[-1].rows)
                if wanted == 0:
                    yield pieces
                    pieces, wanted = [], batch_tokens

    def _pools(self, position: int) -> Iterator[tuple[list[_Chunk], list[int], int]]:
        """(chunks of a pool, seeds of its order, tokens of it to pass over), from `position` on."""
        epoch, skip = divmod(position, self.tokens_per_epoch)
        while True:
            for pool in self._pool_order(epoch):
                n_tokens = sum(len(chunk.rows) for chunk in pool) * self.tokens_per_image
                if skip < n_tokens:
                    yield pool, [self._seed, epoch, pool[0].store, pool[0].chunk], skip
                skip = max(0, skip - n_tokens)
            epoch += 1

    def _shuffle(self, chunks: list[_Chunk], seeds: list[int], skip: int) -> _Pool:
        """The tokens of a pool in the order in which they come, without the first `skip`."""
        per_image, tokens_per_image = self.tokens_per_image, self._stores[0].spec.tokens_per_image
        kept = np.arange(tokens_per_image, dtype=np.int32)[self._token_slice]
        firsts = [(chunk.rows * tokens_per_image).astype(np.int32) for chunk in chunks]
        rows = np.concatenate([(first[:, None] + kept).ravel() for first in firsts])
        owners = np.repeat(np.arange(len(chunks), dtype=np.uint16), [len(chunk.rows) * per_image for chunk in chunks])
        if self._order == "tokens":
            for number, store in enumerate(self._stores):
                store.prefetch([chunk.chunk for chunk in chunks if chunk.store == number])
            order = np.random.default_rng(seeds).permutation(np.arange(len(rows), dtype=np.int32))[skip:]
            return _Pool(chunks, owners[order], rows[order])
        return _Pool(chunks, owners[skip:], rows[skip:])

    def _pool_order(self, epoch: int) -> Iterator[list[_Chunk]]:
        """The pools of an epoch, in order."""
        if self._order == "images":
            rng = np.random.default_rng([self._seed, 0])
            images = self._images[rng.permutation(len(self._images))]
            for start in range(0, len(images), 64):
                yield [_Chunk(int(s), int(c), np.array([row])) for s, c, row in images[start : start + 64]]
            return
        rng = np.random.default_rng([self._seed, epoch])
        order = rng.permutation(len(self._chunks))
        n_pools = -(-len(order) // self._pool_chunks)
        for part in np.array_split(order, n_pools):  # of equal size: a short last pool would be shuffled badly
            yield [self._chunks[i] for i in part]

    def _gather(self, pieces: list[_Pool]) -> Float16:
        """(tokens of the batch, width) float16. Raises DamagedStore if one is not finite."""
        from .gather import gather_rows  # compiling takes a moment, once per machine

        out = np.empty((sum(len(piece.rows) for piece in pieces), self._stores[0].spec.width), np.float16)
        first = 0
        for piece in pieces:
            by_chunk = np.argsort(piece.owners, kind="stable")  # of 16-bit numbers: a radix sort
            ends = np.cumsum(np.bincount(piece.owners, minlength=len(piece.chunks)))
            for chunk, places in zip(piece.chunks, np.split(by_chunk, ends[:-1]), strict=True):
                if not len(places):
                    continue
                store = self._stores[chunk.store]
                tokens = store.read_chunk(chunk.chunk)
                flat = tokens.reshape(-1, tokens.shape[2])
                if not gather_rows(flat, piece.rows[places], out, places + first):
                    raise DamagedStore(
                        f"{store.root} holds NaN or infinity in a readable image of chunk {chunk.chunk}. "
                        f"cyto cache verify names it"
                    )
            first += len(piece.rows)
        return out


def _readable_chunks(stores: list["ActivationStore"]) -> Iterator[_Chunk]:
    for number, store in enumerate(stores):
        is_readable = store.readable()
        for chunk in range(store.spec.n_chunks):
            rows = store.spec.chunk_rows(chunk)
            positions = np.flatnonzero(is_readable[rows.start : rows.stop])
            if len(positions):
                yield _Chunk(number, chunk, positions)
