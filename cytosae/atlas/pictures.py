"""Pictures of a site: each image as a file for its page, and as a thumbnail on a sheet of 256."""

import io
from typing import IO

import numpy as np
import numpy.typing as npt
from PIL import Image

from cytosae.maps import Pixels

from .site import Site

THUMB = 96  # side of a thumbnail, pixels
ACROSS = 16  # thumbnails in each direction of a sheet
_PER_SHEET = ACROSS * ACROSS
_THUMB_BYTES = THUMB * THUMB * 3
SHEET_BYTES = _PER_SHEET * _THUMB_BYTES  # uncompressed
_QUALITY = 88
_EMPTY = 236  # grey level of the thumbnail of an image that cannot be shown


class Sheets:
    """Sheets of thumbnails, added in any order: number k is at (k % 16, k // 16 % 16) of sheet k // 256.

    A sheet is written when it is full. Until then its thumbnails are kept uncompressed in a scratch file, whose size is
    that of all incomplete sheets: one sheet, if thumbnails are added in order.
    """

    def __init__(self, site: Site, n_thumbs: int, scratch: IO[bytes]) -> None:
        """`n_thumbs`: number of thumbnails; each number below it must be added once."""
        self._site, self._n_thumbs, self._scratch = site, n_thumbs, scratch
        self._places: dict[int, int] = {}  # incomplete sheet -> its slot in the scratch file
        self._free: list[int] = []  # slots of sheets that have been written
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
    """Position of a thumbnail: sheet, x and y on it, and the size of that sheet, in pixels."""
    sheet, at = divmod(number, _PER_SHEET)
    n_rows = -(-_n_on(sheet, n_thumbs) // ACROSS)
    place = {"sheet": sheet, "x": at % ACROSS * THUMB, "y": at // ACROSS * THUMB}
    return {**place, "width": ACROSS * THUMB, "height": n_rows * THUMB}


def _n_on(sheet: int, n_thumbs: int) -> int:
    """Number of thumbnails on a sheet."""
    return min(_PER_SHEET, n_thumbs - sheet * _PER_SHEET)


def reduced(picture: Pixels, pixels: int) -> Image.Image:
    """A picture with a longer side of at most `pixels`, same aspect ratio; never enlarged."""
    image = Image.fromarray(picture)
    image.thumbnail((pixels, pixels), Image.Resampling.LANCZOS)
    return image


def jpeg(image: Image.Image, *, quality: int = _QUALITY) -> bytes:
    """A picture as JPEG without chroma subsampling, since stains differ in colour."""
    raw = io.BytesIO()
    try:
        image.save(raw, "JPEG", quality=quality, subsampling=0, optimize=True)
    except OSError:  # pillow's buffer is too small for optimize=True on noisy pictures
        raw = io.BytesIO()
        image.save(raw, "JPEG", quality=quality, subsampling=0)
    return raw.getvalue()


def _thumb(picture: Pixels | str) -> npt.NDArray[np.uint8]:
    if isinstance(picture, str):
        return np.full((THUMB, THUMB, 3), _EMPTY, np.uint8)
    small = np.asarray(reduced(picture, THUMB))
    thumb = np.full((THUMB, THUMB, 3), 255, np.uint8)
    top, left = (THUMB - small.shape[0]) // 2, (THUMB - small.shape[1]) // 2
    thumb[top : top + small.shape[0], left : left + small.shape[1]] = small
    return thumb
