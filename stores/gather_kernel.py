"""Copies tokens of many images into a batch and checks that they are finite. Compiled by numba, without the GIL.

One call reads from any number of memory maps, since images are given by their addresses.
"""

from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from numba.core import types
from numba.extending import intrinsic

_EXPONENT, _ONE, _CARRY = 0x7C00, 0x0400, 0x8000  # of float16: an exponent of all ones (NaN, infinity) plus one carries


def gather_rows(
    images: npt.NDArray[np.uintp],
    order: npt.NDArray[np.int32],
    tokens_per_image: int,
    out: npt.NDArray[np.float16],
    places: npt.NDArray[np.integer[Any]],
) -> int:
    """out[places[i]] = token `order[i]`, numbered over all images; returns the first i whose token is not finite.

    If the width is a multiple of four, four numbers are copied and checked at a time: twice as fast.

    Parameters
    ----------
    images : (n,) address of the first token of each image; the others follow it, width float16 each. The memory must
        be kept by the caller and aligned to 8 bytes, which is not checked
    order : (k,) from 0 to n * tokens_per_image - 1; this is not checked
    out : (m, width) float16, C order
    places : (k,) inside `out`; this is not checked

    Returns
    -------
    int, -1 if all copied numbers are finite; else not all are copied
    """
    word: type[np.unsignedinteger[Any]] = np.uint64 if out.shape[1] % 4 == 0 else np.uint16
    repeated = 0x0001_0001_0001_0001 if word is np.uint64 else 1
    exponent, one, carry = (word(bits * repeated) for bits in (_EXPONENT, _ONE, _CARRY))
    return int(_gather(images, order, np.int32(tokens_per_image), out.view(word), places, exponent, one, carry))


@intrinsic
def _pointer(typing, address, word):  # type: ignore[no-untyped-def]  # typed by numba
    """The address as a pointer to words of this type; numba makes an array of it (`carray`)."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]  # the same
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(word)(types.uintp, word), generate  # type: ignore[no-untyped-call]


@numba.njit(nogil=True, cache=True)
def _gather(images, order, tokens_per_image, out, places, exponent, one, carry):  # type: ignore[no-untyped-def]  # compiled
    width = out.shape[1]
    token_bytes = np.uintp(width * out.itemsize)
    for i in range(len(order)):
        image = order[i] // tokens_per_image
        token = order[i] - image * tokens_per_image
        address = images[image] + np.uintp(token) * token_bytes
        words = numba.carray(_pointer(address, carry), (width,))  # type: ignore[attr-defined,call-arg]
        place, carried = places[i], exponent & one & carry  # 0, of the right type
        for d in range(width):
            word = words[d]
            out[place, d] = word
            carried |= ((word & exponent) + one) & carry
        if carried != 0:
            return i
    return -1
