"""The contact sheet of an item: rows of cells, each with the map of the latent on its right. PNG, drawn pixel by pixel.

No text but the headings of the rows and the numbers of the images stands on it: no name, no patient, no dataset.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from cytosae.maps import Map, Pixels, blended

ACROSS = 6  # images in a row
_GAP, _HEADING, _MARGIN = 6, 22, 10  # pixels
_EMPTY = 225  # grey of an image that cannot be shown
_INK = (20, 20, 20)


@dataclass(frozen=True)
class Cell:
    """One image of a sheet; `picture` None: it cannot be shown."""

    number: int
    picture: Pixels | None
    patches: Map | None = None  # None: without a map


def draw_sheet(rows: Sequence[tuple[str, Sequence[Cell]]], largest: float, *, pixels: int) -> bytes:
    """The sheet as PNG: equal input gives equal bytes.

    Parameters
    ----------
    rows : (heading, images); more than six images continue on the next line
    largest : value of the brightest colour of all maps
    pixels : side of a picture
    """
    lines = [(heading if n == 0 else "", cells[n : n + ACROSS]) for heading, cells in rows for n in _steps(cells)]
    width = 2 * _MARGIN + ACROSS * (2 * pixels + 2 * _GAP) - _GAP
    height = 2 * _MARGIN + sum((_HEADING if heading else _GAP) + pixels for heading, _ in lines)
    sheet = Image.new("RGB", (width, max(height, 1)), "white")
    pen = ImageDraw.Draw(sheet)
    top = _MARGIN
    for heading, cells in lines:
        if heading:
            pen.text((_MARGIN, top + 2), heading, fill=_INK, font=ImageFont.load_default(14))
        top += _HEADING if heading else _GAP
        for at, cell in enumerate(cells):
            left = _MARGIN + at * (2 * pixels + 2 * _GAP)
            for n, tile in enumerate(_tiles(cell, largest, pixels)):
                sheet.paste(Image.fromarray(tile), (left + n * (pixels + 1), top))
            pen.rectangle((left, top, left + 20, top + 14), fill="white")
            pen.text((left + 2, top + 1), str(cell.number), fill=_INK, font=ImageFont.load_default(12))
        top += pixels
    return encoded(sheet, "PNG")


def scaled(picture: Pixels, pixels: int) -> Pixels:
    """The picture with a longer side of `pixels`, in its own aspect; small ones are enlarged."""
    image = Image.fromarray(picture)
    scale = pixels / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return np.asarray(image.resize(size, Image.Resampling.LANCZOS), np.uint8)


def centred(picture: Pixels, pixels: int) -> Pixels:
    """(pixels, pixels, 3): a picture of at most this size on white."""
    tile = np.full((pixels, pixels, 3), 255, np.uint8)
    top, left = (pixels - picture.shape[0]) // 2, (pixels - picture.shape[1]) // 2
    tile[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return tile


def encoded(image: Image.Image, kind: str) -> bytes:
    """A picture as PNG or JPEG."""
    data = io.BytesIO()
    if kind == "PNG":
        image.save(data, "PNG", compress_level=6)
    else:
        image.save(data, "JPEG", quality=92, subsampling=0)
    return data.getvalue()


def _steps(cells: Sequence[Cell]) -> range:
    return range(0, len(cells), ACROSS)


def _tiles(cell: Cell, largest: float, pixels: int) -> list[npt.NDArray[np.uint8]]:
    """The picture and, on its right, its map."""
    empty = np.full((pixels, pixels, 3), _EMPTY, np.uint8)
    if cell.picture is None:
        return [empty, empty]
    small = scaled(cell.picture, pixels)
    shown = centred(small, pixels)
    return [shown] if cell.patches is None else [shown, centred(blended(small, cell.patches, largest), pixels)]
