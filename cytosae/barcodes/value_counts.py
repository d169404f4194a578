"""How large the stored values of latents are, in exact counts: what a rule for tau looks at (tau_rule.py).

A bin holds the float32 that agree in sign, exponent and the ten upper mantissa bits: with `--value-bits 10`, as latents
are stored by default, each bin is one number. Counts are integers, and a maximum is a maximum: so partitions, workers
and their order change nothing. Twin: tests/support/reference.py.
"""

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from stores.token_layout import TokenLayout, cls_first
from stores.token_sets import chosen_tokens

from .count_kernels import EntryChecker

SHIFT = 13  # mantissa bits of a float32 that a bin does not tell apart
N_BINS = 1 << (31 - SHIFT)

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ValueCounts:
    """Of the stored values at some tokens; L latents. Value v is in bin number (bits of v as float32) >> SHIFT."""

    bins: Ints  # (N_BINS,) values in each bin
    largest: npt.NDArray[np.float32]  # (L,) 0 where there is no value
    n_tokens: int  # of the token set, in readable images

    @staticmethod
    def zeros(n_latents: int) -> "ValueCounts":
        """Of no tokens."""
        return ValueCounts(np.zeros(N_BINS, np.int64), np.zeros(n_latents, np.float32), 0)

    def __add__(self, other: "ValueCounts") -> "ValueCounts":
        return ValueCounts(
            self.bins + other.bins, np.maximum(self.largest, other.largest), self.n_tokens + other.n_tokens
        )

    @property
    def n_values(self) -> int:
        """Stored values, all above 0."""
        return int(self.bins.sum())

    @property
    def n_alive(self) -> int:
        """Latents with a value."""
        return int((self.largest > 0).sum())

    def n_remaining(self, tau: float) -> int:
        """Latents that exceed tau at some token."""
        return int((self.largest > np.float32(tau)).sum())


def lower_edges() -> npt.NDArray[np.float32]:
    """(N_BINS,) the smallest float32 of each bin; not finite at the end, where no value is."""
    return (np.arange(N_BINS, dtype=np.uint32) << np.uint32(SHIFT)).view(np.float32)


@dataclass(frozen=True)
class SparseCounts:
    """The same as it comes back from a worker: only the bins that have a value."""

    n_latents: int
    bins: Ints  # rising
    counts: Ints
    latents: Ints  # rising
    largest: npt.NDArray[np.float32]

    def whole(self) -> ValueCounts:
        """All bins and latents."""
        found = ValueCounts.zeros(self.n_latents)
        found.bins[self.bins] = self.counts
        found.largest[self.latents] = self.largest
        return found


class ValueScanner:
    """Counts the values of token rows of whole images, given in pieces, as `ImageCounter` does."""

    def __init__(
        self,
        row_starts: Ints,
        *,
        n_latents: int,
        tokens_per_image: int,
        token_set: str,
        place: str,
        layout: TokenLayout | None = None,
    ) -> None:
        """See `ImageCounter`."""
        n_images = (len(row_starts) - 1) // tokens_per_image
        chosen = chosen_tokens(token_set, layout or cls_first(tokens_per_image), place)
        self._lows, self._highs = (
            np.ascontiguousarray(row_starts[token::tokens_per_image][:n_images])
            for token in (chosen.start, chosen.stop)
        )
        self._checker = EntryChecker(row_starts, n_latents=n_latents, place=place)
        self._bins = np.zeros(N_BINS, np.int64)
        self._largest = np.zeros(n_latents, np.float32)

    def add(self, first: int, indices: npt.NDArray[Any], values: npt.NDArray[np.float32]) -> None:
        """Count the next entries, from number `first` on. Raises DamagedStore as `ImageCounter.add`."""
        if len(indices):
            self._checker.check(first, indices, values)
            low, high = np.searchsorted(self._highs, first, "right"), np.searchsorted(self._lows, first + len(indices))
            some = slice(int(low), max(int(low), int(high)))
            _scan(first, indices, values, self._lows[some], self._highs[some], self._bins, self._largest)

    def finish(self) -> SparseCounts:
        """What was counted."""
        bins, latents = np.flatnonzero(self._bins), np.flatnonzero(self._largest)
        return SparseCounts(len(self._largest), bins, self._bins[bins], latents, self._largest[latents])


@numba.njit(cache=True)
def _scan(first: int, indices: Any, values: Any, lows: Any, highs: Any, bins: Any, largest: Any) -> None:
    """Entries that lie in [low, high) of an image."""
    bits = values.view(np.uint32)
    for image in range(len(lows)):
        for k in range(max(0, lows[image] - first), min(len(indices), highs[image] - first)):
            bins[bits[k] >> np.uint32(SHIFT)] += 1
            latent = np.intp(indices[k])
            largest[latent] = max(largest[latent], values[k])
