"""Copies tokens from where they lie to their places in a batch, and checks them on the way. Compiled, without the GIL.

One call gathers a batch out of any number of memory maps, since it goes by the addresses of images.
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
    """out[places[i]] = token `order[i]` of the images, counted through them all; gives the first i that is not finite.

    Four numbers are moved and checked at a time where the width allows: twice as fast as one.

    Parameters
    ----------
    images : (n,) the address of each one's first token; the others follow it, width float16 each. What lies there
        must be kept by the caller, aligned to 8 bytes; this is not checked
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
def _pointer(typing, address, word):  # type: ignore[no-untyped-def]  # numba's to type
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
