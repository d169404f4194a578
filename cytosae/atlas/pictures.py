"""Pictures of a site: each image once for its page, and once as a thumbnail on a sheet that many share."""

import io

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..patch_maps import Pixels
from .site import Site

THUMB = 96  # pixels, of a side
ACROSS = 16  # thumbnails in each direction of a sheet
_QUALITY = 88
_EMPTY = 236  # the grey of a thumbnail that cannot be shown


class Sheets:
    """Sheets of thumbnails, filled in order: number k is at (k % 16, k // 16 % 16) of sheet k // 256."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._waiting: list[npt.NDArray[np.uint8]] = []
        self._n_written = 0

    def add(self, picture: Pixels | str) -> None:
        """The next thumbnail; an empty one for an image that cannot be shown."""
        self._waiting.append(_thumb(picture))
        if len(self._waiting) == ACROSS * ACROSS:
            self.flush()

    def flush(self) -> None:
        """Write what no sheet holds yet."""
        if not self._waiting:
            return
        n_rows = -(-len(self._waiting) // ACROSS)
        sheet = np.full((n_rows * THUMB, ACROSS * THUMB, 3), 255, np.uint8)
        for number, thumb in enumerate(self._waiting):
            top, left = number // ACROSS * THUMB, number % ACROSS * THUMB
            sheet[top : top + THUMB, left : left + THUMB] = thumb
        self._site.write(f"sprites/{self._n_written}.jpg", jpeg(Image.fromarray(sheet)))
        self._n_written += 1
        self._waiting = []


def thumb_place(number: int, n_thumbs: int) -> dict[str, int]:
    """Where a thumbnail is: sheet, x and y there, and the size of that sheet; pixels."""
    per_sheet = ACROSS * ACROSS
    sheet, at = divmod(number, per_sheet)
    n_rows = -(-min(per_sheet, n_thumbs - sheet * per_sheet) // ACROSS)
    place = {"sheet": sheet, "x": at % ACROSS * THUMB, "y": at // ACROSS * THUMB}
    return {**place, "width": ACROSS * THUMB, "height": n_rows * THUMB}


def reduced(picture: Pixels, pixels: int) -> Image.Image:
    """A picture at most so many pixels long, in its own aspect; never enlarged."""
    image = Image.fromarray(picture)
    image.thumbnail((pixels, pixels), Image.Resampling.LANCZOS)
    return image


def jpeg(image: Image.Image) -> bytes:
    """A picture as JPEG, colours unhalved: a stain is a colour."""
    raw = io.BytesIO()
    image.save(raw, "JPEG", quality=_QUALITY, subsampling=0, optimize=True)
    return raw.getvalue()


def _thumb(picture: Pixels | str) -> npt.NDArray[np.uint8]:
    if isinstance(picture, str):
        return np.full((THUMB, THUMB, 3), _EMPTY, np.uint8)
    small = np.asarray(reduced(picture, THUMB))
    thumb = np.full((THUMB, THUMB, 3), 255, np.uint8)
    top, left = (THUMB - small.shape[0]) // 2, (THUMB - small.shape[1]) // 2
    thumb[top : top + small.shape[0], left : left + small.shape[1]] = small
    return thumb
