"""The order of training tokens if each cache has a weight, instead of counting by its size.

Each cache has its own stream (`TokenStream`) with its own epochs, so a small cache with a large weight is repeated more
often. After any number of batches, every cache has given its weighted share of tokens, up to less than one token.
Inside a batch, tokens are shuffled.
"""

import math
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import partial
from itertools import accumulate, count, pairwise
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from .errors import BadInput
from .files import sha256_json
from .token_stream import Bool, Float16, Job, Tokens, TokenStream, gather, gather_ahead, rows_of_part

if TYPE_CHECKING:
    from .activation_store import ActivationStore


class TokenMix:
    """The training tokens of several caches, mixed by weights; determined by (caches, weights, settings, seed).

    The order in which the caches are given does not matter. Memory: as `TokenStream`, with two pools per cache.
    """

    def __init__(
        self,
        stores: list["ActivationStore"],
        weights: Sequence[float],
        *,
        token_set: str = "all",
        order: str = "tokens",
        pool_chunks: int = 16,
        seed: int = 0,
        threads: int = 2,
        images: Sequence[Bool] | None = None,
        keep: Sequence[Bool] | None = None,
    ) -> None:
        """`weights`: one per cache, above 0, in any unit; for the other parameters see `TokenStream`.

        Raises
        ------
        BadInput
            If a weight is missing or not above 0, for order `images`, or if a cache has no eligible image.
        """
        if len(weights) != len(stores) or not all(math.isfinite(weight) and weight > 0 for weight in weights):
            raise BadInput(
                f"expected one weight above 0 for each of the {len(stores)} caches; "
                f"found {', '.join(map(str, weights)) or 'none'}"
            )
        if order == "images":
            raise BadInput("whole images in order cannot be mixed by weights; take order tokens, or no weights")
        if images is not None and len(images) != len(stores):
            raise BadInput(f"images must be given for each of the {len(stores)} caches; found {len(images)}")
        self._seed, self._threads = seed, threads
        named = [(store.identity, store.content_sha256) for store in stores]
        by_name = sorted(range(len(stores)), key=named.__getitem__)
        self._stores = [stores[number] for number in by_name]
        self._streams = [
            TokenStream(
                [stores[number]],
                token_set=token_set,
                order=order,
                pool_chunks=pool_chunks,
                seed=store_seed(seed, stores[number]),
                images=None if images is None else [images[number]],
                keep=None if keep is None else [keep[number]],
            )
            for number in by_name
        ]
        exact = [Fraction(float(weights[number])) for number in by_name]
        self._borders = [border / sum(exact) for border in accumulate(exact, initial=Fraction(0))]  # from 0 to 1
        self.tokens_per_image = self._streams[0].tokens_per_image

    @property
    def tokens_per_epoch(self) -> int:
        """Number of tokens of all caches: the length of an epoch if weights are proportional to sizes."""
        return sum(stream.tokens_per_epoch for stream in self._streams)

    @property
    def mean_tokens_per_image(self) -> float:
        """Tokens of all caches by their images; fewer than `tokens_per_image` where some are left out."""
        n_images = sum(stream.tokens_per_epoch / stream.mean_tokens_per_image for stream in self._streams)
        return self.tokens_per_epoch / round(n_images)

    def batches(
        self, batch_tokens: int, *, position: int = 0, part: tuple[int, int] = (0, 1)
    ) -> Generator[Float16, None, None]:
        """Batches of exactly `batch_tokens` tokens, (batch_tokens, width) float16, from token `position` on.

        To start at a position, one pool of each cache is read. For `part` see `TokenStream.batches`.

        Raises
        ------
        BadInput
            As `TokenStream.batches`; also if `position` is not the first token of a batch, or a weight is so small that
            its cache would give less than one token to a batch.
        """
        rows = rows_of_part(batch_tokens, part)
        if position < 0 or position % batch_tokens:
            raise BadInput(
                f"a mix by weights is entered at the beginning of a batch, a multiple of {batch_tokens:,}; "
                f"found {position}"
            )
        for store, (start, end) in zip(self._stores, pairwise(self._borders), strict=True):
            if (end - start) * batch_tokens < 1:
                raise BadInput(
                    f"with a share of {float(end - start):.3g}, {store.root} would give less than one token to a batch "
                    f"of {batch_tokens:,}; raise its weight, take larger batches, or leave it out"
                )
        return gather_ahead(
            lambda reader: self._jobs(reader, batch_tokens, position // batch_tokens, rows), self._threads
        )

    def _jobs(self, reader: ThreadPoolExecutor, batch_tokens: int, first: int, rows: range) -> Iterator[Job]:
        width = self._stores[0].spec.width
        plans = [
            stream.plan(reader, self._sizes(number, batch_tokens, first), self._given(number, first * batch_tokens))
            for number, stream in enumerate(self._streams)
        ]
        for batch in count(first):
            pieces = [piece for plan in plans for piece in next(plan)]
            yield partial(_gather_shuffled, pieces, [self._seed, batch], rows, width)

    def _sizes(self, number: int, batch_tokens: int, first: int) -> Iterator[int]:
        """Tokens of cache `number` in each batch from `first` on."""
        for before, after in pairwise(self._given(number, batch * batch_tokens) for batch in count(first)):
            yield after - before

    def _given(self, number: int, n_tokens: int) -> int:
        """How many of the first `n_tokens` tokens are of cache `number`: its weighted share, up to less than one token.

        The borders between caches are rounded, so all numbers add up to `n_tokens`. The number does not decrease from
        batch to batch, as long as the share of a batch is at least one token.
        """
        return math.floor(self._borders[number + 1] * n_tokens) - math.floor(self._borders[number] * n_tokens)


def store_seed(seed: int, store: "ActivationStore") -> int:
    """The seed of one cache, which does not depend on its position among the caches."""
    return int(sha256_json([seed, store.identity])[:16], 16)


def _gather_shuffled(pieces: list[Tokens], seeds: list[int], rows: range, width: int) -> Float16:
    """The rows `rows` of a batch: the tokens of `pieces`, shuffled with `seeds`."""
    places: npt.NDArray[np.int64] = np.random.default_rng(seeds).permutation(sum(map(len, pieces)))
    is_wanted = (places >= rows.start) & (places < rows.stop)
    wanted, first = [], 0
    for piece in pieces:
        wanted.append(piece.chosen(is_wanted[first : first + len(piece)]))
        first += len(piece)
    return gather(wanted, places[is_wanted] - rows.start, width)
