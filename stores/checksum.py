"""CRC32C of memory, without keeping other threads of the process from running.

google_crc32c lets them run only while it reads a `bytes` object of at least 1 MiB; over an array of 100 MB it would
hold all of them for 7 ms, and with them the thread that feeds a GPU.
"""

from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt

_PIECE = 1 << 20  # bytes: the least that google_crc32c reads beside other threads, and small enough for the cache

CRC_BYTES = 4  # a checksum at the end of a file, little-endian


def crc32c(content: bytes | npt.NDArray[Any], start: int = 0) -> int:
    """CRC32C of bytes, or of the memory of a contiguous array of any type and shape.

    Memory: 1 MiB beside the array.

    Parameters
    ----------
    start : the checksum of what comes before `content`; 0 if nothing does
    """
    if isinstance(content, bytes):
        return int(google_crc32c.extend(start, content))
    raw = np.ascontiguousarray(content).reshape(-1).view(np.uint8)
    for at in range(0, len(raw), _PIECE):
        start = google_crc32c.extend(start, raw[at : at + _PIECE].tobytes())
    return int(start)
