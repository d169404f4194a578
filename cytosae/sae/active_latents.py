"""The active latents of a micro-batch, in compressed sparse columns, as training and encoding on the CPU take them.

Latent l is active on the tokens tokens[starts[l] : starts[l + 1]], ascending, with the values at the same places.
Shapes: B tokens, L latents, A active (token, latent) pairs.
"""

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[Any]  # float32, or float64 in tests


@dataclass(frozen=True)
class Active:
    """The active latents of a micro-batch, in compressed sparse columns."""

    n_tokens: int
    starts: npt.NDArray[np.int64]  # (L + 1,)
    tokens: npt.NDArray[np.int32]  # (A,)
    values: Floats  # (A,)

    @property
    def fired(self) -> npt.NDArray[np.bool_]:
        """(L,): True if active on at least one token."""
        return self.starts[1:] > self.starts[:-1]

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """(L,): number of tokens on which each is active."""
        return np.diff(self.starts)

    def part(self, low: int, high: int) -> "Active":
        """Those of the latents from `low` to before `high`, which are counted from 0 on then."""
        first, last = self.starts[low], self.starts[high]
        return Active(
            self.n_tokens, self.starts[low : high + 1] - first, self.tokens[first:last], self.values[first:last]
        )

    def at_least(self, bound: float) -> "Active":
        """Those with a value of at least `bound`, or NaN."""
        return self.kept(~(self.values < bound))

    def kept(self, is_kept: npt.NDArray[np.bool_]) -> "Active":
        """Those where (A,) is True."""
        before = np.concatenate([np.zeros(1, np.int64), np.cumsum(is_kept)])
        return Active(self.n_tokens, before[self.starts], self.tokens[is_kept], self.values[is_kept])

    def by_token(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], Floats]:
        """(starts (B + 1,), latents (A,), values (A,)): the same in compressed sparse rows, latents ascending."""
        starts, latents, values = by_latent(self.starts[:-1], self.counts, self.tokens, self.values, self.n_tokens)
        return starts, latents, values

    def to_dense(self) -> Floats:
        """(B, L), 0 where a latent is not active."""
        dense = np.zeros((self.n_tokens, len(self.starts) - 1), self.values.dtype)
        dense[self.tokens, np.repeat(np.arange(len(self.counts)), self.counts)] = self.values
        return dense


def equal_work(active: Active) -> npt.NDArray[np.int64]:
    """(threads + 1,): first latent of each thread, so that all threads get about as many active entries."""
    shares = np.linspace(0, active.starts[-1], numba.get_num_threads() + 1)
    cuts = np.searchsorted(active.starts, shares).astype(np.int64)
    cuts[0], cuts[-1] = 0, len(active.starts) - 1
    return cuts


@numba.njit(cache=True)
def by_latent(starts_B: Any, counts_B: Any, latents: Any, values: Any, n_latents: int) -> Any:
    """(starts, tokens, values) as in `Active`: a stable counting sort by latent. With the two exchanged, by token.

    starts_B, counts_B, latents, values : of token b the entries starts[b] and behind, counts[b] many
    """
    starts = np.zeros(n_latents + 1, np.int64)
    for b in range(len(starts_B)):
        for k in range(starts_B[b], starts_B[b] + counts_B[b]):
            starts[latents[k] + 1] += 1
    for latent in range(n_latents):
        starts[latent + 1] += starts[latent]
    at = starts[:-1].copy()
    tokens = np.empty(starts[-1], np.int32)
    sorted_values = np.empty(starts[-1], values.dtype)
    for b in range(len(starts_B)):
        for k in range(starts_B[b], starts_B[b] + counts_B[b]):
            to = at[latents[k]]
            tokens[to] = b
            sorted_values[to] = values[k]
            at[latents[k]] = to + 1
    return starts, tokens, sorted_values
