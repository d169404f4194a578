"""Which tokens come next: an endless stream, a pure function of (caches, settings, seed), that can be entered anywhere.

Order `tokens`: in every epoch the chunks are permuted, pools of `pool_chunks` chunks are read into memory, and the
tokens of a pool are permuted. Order `images`: whole images, permuted once, the same in every pass (released). Each
token comes once per epoch; a batch may reach into the next pool or epoch. Tokens of unreadable images never come.
"""

from collections.abc import Iterator
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
_AHEAD = 2  # chunks of a URL that are fetched while one is copied


@dataclass(frozen=True)
class _Chunk:
    """The readable images of one chunk of one cache."""

    store: int
    chunk: int
    rows: Int  # positions inside the chunk


class TokenStream:
    """The training tokens of one or several caches, in order. Memory: one pool and one batch."""

    def __init__(
        self,
        stores: list["ActivationStore"],
        *,
        token_set: str = "all",
        order: str = "tokens",
        pool_chunks: int = 16,
        seed: int = 0,
    ) -> None:
        """Raises BadInput if no cache holds a readable image."""
        check_choice("token_set", token_set, _TOKEN_SETS)
        self._stores, self._order, self._pool_chunks, self._seed = stores, order, pool_chunks, seed
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
        pieces: list[Float16] = []
        wanted = batch_tokens
        for tokens, order in self._pools(position):
            at = 0
            while at < len(order):
                taken = order[at : at + wanted]
                pieces.append(tokens[taken])
                at += len(taken)
                wanted -= len(taken)
                if wanted == 0:
                    yield pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
                    pieces, wanted = [], batch_tokens

    def _pools(self, position: int) -> Iterator[tuple[Float16, Int]]:
        """(tokens of a pool as they lie in the caches, the order in which they come), from `position` on."""
        epoch, skip = divmod(position, self.tokens_per_epoch)
        while True:
            for pool in self._pool_order(epoch):
                n_tokens = sum(len(rows) for _, _, rows in pool) * self.tokens_per_image
                if skip >= n_tokens:
                    skip -= n_tokens
                    continue
                order = np.arange(n_tokens)
                if self._order == "tokens":
                    store, chunk, _ = pool[0]
                    order = np.random.default_rng([self._seed, epoch, store, chunk]).permutation(n_tokens)
                yield self._read_pool(pool), order[skip:]
                skip = 0
            epoch += 1

    def _pool_order(self, epoch: int) -> Iterator[list[tuple[int, int, Int]]]:
        """The pools of an epoch: lists of (store, chunk, rows in the chunk) in reading order."""
        if self._order == "images":
            rng = np.random.default_rng([self._seed, 0])
            images = self._images[rng.permutation(len(self._images))]
            for start in range(0, len(images), 64):
                yield [(int(s), int(c), np.array([row])) for s, c, row in images[start : start + 64]]
            return
        rng = np.random.default_rng([self._seed, epoch])
        order = rng.permutation(len(self._chunks))
        n_pools = -(-len(order) // self._pool_chunks)
        for part in np.array_split(order, n_pools):  # of equal size: a short last pool would be shuffled badly
            yield [(c.store, c.chunk, c.rows) for c in (self._chunks[i] for i in part)]

    def _read_pool(self, pool: list[tuple[int, int, Int]]) -> Float16:
        """(tokens of the pool, width) float16, as they lie in the caches.

        Raises DamagedStore if a token of a readable image is not finite.
        """
        per_image = self.tokens_per_image
        n_images = sum(len(rows) for _, _, rows in pool)
        tokens = np.empty((n_images * per_image, self._stores[0].spec.width), np.float16)
        at = 0
        for number, (store, chunk, rows) in enumerate(pool, start=1):
            for following in pool[number : number + _AHEAD]:
                self._stores[following[0]].prefetch([following[1]])
            block = self._stores[store].read_chunk(chunk)
            kept = block[:, self._token_slice] if len(rows) == len(block) else block[rows][:, self._token_slice]
            end = at + len(rows) * per_image
            tokens[at:end] = kept.reshape(-1, tokens.shape[1])
            if not _all_finite(tokens[at:end]):
                raise DamagedStore(
                    f"{self._stores[store].root} holds NaN or infinity in a readable image of chunk {chunk}. "
                    f"cyto cache verify names it"
                )
            at = end
        return tokens


def _readable_chunks(stores: list["ActivationStore"]) -> Iterator[_Chunk]:
    for number, store in enumerate(stores):
        is_readable = store.readable()
        for chunk in range(store.spec.n_chunks):
            rows = store.spec.chunk_rows(chunk)
            positions = np.flatnonzero(is_readable[rows.start : rows.stop])
            if len(positions):
                yield _Chunk(number, chunk, positions)


def _all_finite(tokens: Float16) -> bool:
    bits = tokens.view(np.uint16)
    return bool(((bits & np.uint16(0x7FFF)) < 0x7C00).all())
