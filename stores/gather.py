"""Copies chosen rows of a chunk to their places in a batch, and checks them on the way. Compiled, without the GIL."""

import numba
import numpy as np
import numpy.typing as npt

_NOT_FINITE = np.uint16(0x7C00)  # float16's exponent, all ones: NaN and infinity
Int = npt.NDArray[np.int64]


def gather_rows(chunk: npt.NDArray[np.float16], rows: Int, out: npt.NDArray[np.float16], places: Int) -> bool:
    """out[places[i]] = chunk[rows[i]] for every i; False if any copied number is NaN or infinite.

    Parameters
    ----------
    chunk : (n, width) float16, C order
    rows, places : (k,) inside `chunk` and `out`; this is not checked
    out : (m, width) float16, C order
    """
    return bool(_gather(chunk.view(np.uint16), rows, out.view(np.uint16), places))


@numba.njit(
    numba.boolean(
        numba.types.Array(numba.uint16, 2, "C", readonly=True), numba.int64[::1], numba.uint16[:, ::1], numba.int64[::1]
    ),
    nogil=True,
    cache=True,
)
def _gather(chunk, rows, out, places):  # type: ignore[no-untyped-def]
    exponents = np.uint16(0)
    for i in range(len(rows)):
        row, place = rows[i], places[i]
        for d in range(chunk.shape[1]):
            bits = chunk[row, d]
            out[place, d] = bits
            exponents |= np.uint16((bits & _NOT_FINITE) == _NOT_FINITE)
    return exponents == 0
