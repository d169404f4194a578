"""Pictures of a site: each image once for its page, and once as a thumbnail on a sheet that many share."""

import io
from typing import IO

import numpy as np
import numpy.typing as npt
from PIL import Image

from cytosae.maps import Pixels

from .site import Site

THUMB = 96  # pixels, of a side
ACROSS = 16  # thumbnails in each direction of a sheet
_PER_SHEET = ACROSS * ACROSS
_THUMB_BYTES = THUMB * THUMB * 3
SHEET_BYTES = _PER_SHEET * _THUMB_BYTES  # uncompressed
_QUALITY = 88
_EMPTY = 236  # the grey of a thumbnail that cannot be shown


class Sheets:
    """Sheets of thumbnails, which may come in any order: number k is at (k % 16, k // 16 % 16) of sheet k // 256.

    A sheet is written as soon as it is full. Until then its thumbnails wait, raw, in a scratch file that takes as many
    sheets as are begun at a time: one, if thumbnails come in order.
    """

    def __init__(self, site: Site, n_thumbs: int, scratch: IO[bytes]) -> None:
        """`n_thumbs`: how many will come, each number below it once."""
        self._site, self._n_thumbs, self._scratch = site, n_thumbs, scratch
        self._places: dict[int, int] = {}  # in the scratch file, of the sheets that are begun
        self._free: list[int] = []  # those of sheets that are written
        self._n_missing: dict[int, int] = {}

    def add(self, number: int, picture: Pixels | str) -> None:
        """Thumbnail `number`; an empty one for an image that cannot be shown."""
        sheet, at = divmod(number, _PER_SHEET)
        if sheet not in self._places:
            self._places[sheet] = self._free.pop() if self._free else len(self._places)
            self._n_missing[sheet] = _n_on(sheet, self._n_thumbs)
        self._scratch.seek(self._places[sheet] * SHEET_BYTES + at * _THUMB_BYTES)
        self._scratch.write(_thumb(picture).tobytes())
        self._n_missing[sheet] -= 1
        if not self._n_missing[sheet]:
            self._write(sheet)

    def _write(self, sheet: int) -> None:
        place, n_thumbs = self._places.pop(sheet), _n_on(sheet, self._n_thumbs)
        self._scratch.seek(place * SHEET_BYTES)
        raw = self._scratch.read(n_thumbs * _THUMB_BYTES)
        self._free.append(place)
        n_rows = -(-n_thumbs // ACROSS)
        thumbs = np.full((n_rows * ACROSS, THUMB, THUMB, 3), 255, np.uint8)
        thumbs[:n_thumbs] = np.frombuffer(raw, np.uint8).reshape(n_thumbs, THUMB, THUMB, 3)
        pixels = thumbs.reshape(n_rows, ACROSS, THUMB, THUMB, 3).swapaxes(1, 2)
        picture = Image.fromarray(pixels.reshape(n_rows * THUMB, ACROSS * THUMB, 3))
        self._site.write(f"sprites/{sheet}.jpg", jpeg(picture))


def thumb_place(number: int, n_thumbs: int) -> dict[str, int]:
    """Where a thumbnail is: sheet, x and y there, and the size of that sheet; pixels."""
    sheet, at = divmod(number, _PER_SHEET)
    n_rows = -(-_n_on(sheet, n_thumbs) // ACROSS)
    place = {"sheet": sheet, "x": at % ACROSS * THUMB, "y": at // ACROSS * THUMB}
    return {**place, "width": ACROSS * THUMB, "height": n_rows * THUMB}


def _n_on(sheet: int, n_thumbs: int) -> int:
    """Thumbnails on a sheet, of so many in all."""
    return min(_PER_SHEET, n_thumbs - sheet * _PER_SHEET)


def reduced(picture: Pixels, pixels: int) -> Image.Image:
    """A picture at most so many pixels long, in its own aspect; never enlarged."""
    image = Image.fromarray(picture)
    image.thumbnail((pixels, pixels), Image.Resampling.LANCZOS)
    return image


def jpeg(image: Image.Image) -> bytes:
    """A picture as JPEG, colours unhalved: a stain is a colour."""
    raw = io.BytesIO()
    try:
        image.save(raw, "JPEG", quality=_QUALITY, subsampling=0, optimize=True)
    except OSError:  # noise, for which pillow has too small a buffer when it optimizes
        raw = io.BytesIO()
        image.save(raw, "JPEG", quality=_QUALITY, subsampling=0)
    return raw.getvalue()


def _thumb(picture: Pixels | str) -> npt.NDArray[np.uint8]:
    if isinstance(picture, str):
        return np.full((THUMB, THUMB, 3), _EMPTY, np.uint8)
    small = np.asarray(reduced(picture, THUMB))
    thumb = np.full((THUMB, THUMB, 3), 255, np.uint8)
    top, left = (THUMB - small.shape[0]) // 2, (THUMB - small.shape[1]) // 2
    thumb[top : top + small.shape[0], left : left + small.shape[1]] = small
    return thumb
