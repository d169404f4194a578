"""What test_images.py and other tests share."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image


def _rough(*shape: int, high: int = 256, seed: int = 0) -> npt.NDArray[np.int64]:
    """Random integers below `high`; both ends of the range are always there."""
    values = np.random.default_rng(seed).integers(0, high, shape)
    values.flat[0], values.flat[-1] = 0, high - 1
    return values


def _picture(values: npt.NDArray[Any], mode: str) -> Image.Image:
    """A picture of any 8-bit mode from its raw samples (`Image.fromarray` guesses the mode)."""
    return Image.frombytes(mode, (values.shape[1], values.shape[0]), values.astype(np.uint8).tobytes())


def _file(picture: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
