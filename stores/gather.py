"""Copies chosen rows of a chunk to their places in a batch, and checks them on the way. Compiled, without the GIL."""

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

Int = npt.NDArray[np.integer[Any]]
_EXPONENT, _ONE, _CARRY = 0x7C00, 0x0400, 0x8000  # of float16: an exponent of all ones (NaN, infinity) plus one carries


def gather_rows(chunk: npt.NDArray[np.float16], rows: Int, out: npt.NDArray[np.float16], places: Int) -> bool:
    """out[places[i]] = chunk[rows[i]] for every i; False if any copied number is NaN or infinite.

    Four numbers are moved and checked at a time where the width allows: twice as fast as one.

    Parameters
    ----------
    chunk : (n, width) float16, C order
    rows, places : (k,) inside `chunk` and `out`; this is not checked
    out : (m, width) float16, C order
    """
    word: type[np.unsignedinteger[Any]] = np.uint64 if chunk.shape[1] % 4 == 0 else np.uint16
    repeated = 0x0001_0001_0001_0001 if word is np.uint64 else 1
    exponent, one, carry = (word(bits * repeated) for bits in (_EXPONENT, _ONE, _CARRY))
    return bool(_gather(np.asarray(chunk).view(word), rows, out.view(word), places, exponent, one, carry))


@numba.njit(nogil=True, cache=True)
def _gather(chunk, rows, out, places, exponent, one, carry):  # type: ignore[no-untyped-def]  # compiled
    carried = exponent & one & carry  # 0, of the right type
    for i in range(len(rows)):
        row, place = rows[i], places[i]
        for d in range(chunk.shape[1]):
            word = chunk[row, d]
            out[place, d] = word
            carried |= ((word & exponent) + one) & carry
    return carried == 0
