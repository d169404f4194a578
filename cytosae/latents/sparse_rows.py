"""Sparse rows of tokens, and how their values are rounded: the same on every device.

Positive floats are ordered as their bits are, so rounding is arithmetic on int32.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

INFINITY = 0x7F800000  # float32 bits; NaN lies above
NOT_FINITE = "a latent became NaN or infinite: the SAE's weights do not fit these tokens"


@dataclass(frozen=True)
class Rounding:
    """How a value above 0 is rounded before it is stored, in terms of its bits."""

    value_bits: int  # mantissa bits that are kept: 1 to 23
    min_activation: float = 0.0  # a rounded value below it is dropped

    @property
    def drop(self) -> int:
        """Mantissa bits that are removed."""
        return 23 - self.value_bits

    @property
    def least(self) -> int:
        """Bits of the smallest rounded value above 0; a value that would round to 0 becomes this (docs/formats.md)."""
        return 1 << self.drop

    @property
    def smallest(self) -> int:
        """Bits of the smallest value that is stored."""
        return int(np.float32(self.min_activation).view(np.int32))

    @property
    def first_kept(self) -> int:
        """Bits of the smallest value above 0 that is stored once it is rounded: rounding changes no order."""
        low, high = 1, INFINITY
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.rounded(middle) >= self.smallest else (middle + 1, high)
        return low

    def rounded(self, bits: int) -> int:
        """The bits of a rounded value above 0."""
        if not self.drop:
            return bits
        half = (1 << self.drop >> 1) - 1
        return max((bits + half + (bits >> self.drop & 1)) & ~((1 << self.drop) - 1), self.least)


@dataclass(frozen=True)
class SparseRows:
    """Sparse rows of some tokens, in the host's memory."""

    indices: npt.NDArray[Any]  # (nnz,) uint16, uint32 or int32, strictly increasing in each row
    values: npt.NDArray[np.float32]  # (nnz,) rounded, above 0
    lengths: npt.NDArray[np.int64]  # (rows,) number of entries of each row
    n_dropped: int  # values that were above 0, and below `min_activation`
