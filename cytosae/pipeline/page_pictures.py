"""Pictures of the report, each as a data address of bounded size."""

import base64
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from cytosae.maps import Map, Pixels, stretched

_MOST_WIDE = 1500  # pixels of a figure
_MOST_BYTES = 450_000  # of a figure
_THUMB = 116  # pixels of the longer side
_OPACITY = 0.92  # of a map at its largest value


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image of the page."""

    src: str  # data:image/...
    width: int
    height: int


def figure_picture(content: bytes) -> Picture:
    """A figure of ours (PNG), made smaller where it is large."""
    with Image.open(io.BytesIO(content)) as opened:
        image = opened.convert("RGB")
    scale = min(1.0, _MOST_WIDE / image.width)
    if scale < 1:
        image = image.resize((_MOST_WIDE, max(1, round(image.height * scale))), Image.Resampling.LANCZOS)
    while len(found := _few_colours(image)) > _MOST_BYTES and image.width > 300:
        image = image.resize((image.width * 4 // 5, max(1, image.height * 4 // 5)), Image.Resampling.LANCZOS)
    return Picture(src=_data("png", found), width=image.width, height=image.height)


def thumbnail(pixels: Pixels) -> Picture:
    """A cell."""
    return _jpeg(Image.fromarray(pixels))


def map_thumbnail(pixels: Pixels, patches: Map, largest: float) -> Picture:
    """A cell in grey below the map of a latent; colour and opacity rise with the activation, as in maps/figures.py.

    largest : of the map's scale
    """
    from matplotlib import colormaps

    height, width = pixels.shape[:2]
    grey = np.repeat(pixels.mean(2, keepdims=True), 3, axis=2) * 0.75 + 0.25 * 255
    shares = np.clip(stretched(patches, height, width, is_smooth=True) / (largest or 1.0), 0, 1)
    colours = colormaps["inferno"](0.25 + 0.75 * shares)[:, :, :3] * 255
    opacity = (_OPACITY * shares)[:, :, None]
    return _jpeg(Image.fromarray((grey * (1 - opacity) + colours * opacity).astype(np.uint8)))


def _jpeg(image: Image.Image) -> Picture:
    scale = _THUMB / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    image = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
    content = io.BytesIO()
    image.save(content, "JPEG", quality=82)
    return Picture(src=_data("jpeg", content.getvalue()), width=width, height=height)


def _few_colours(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.quantize(128, dither=Image.Dither.NONE).save(content, "PNG", optimize=True)
    return content.getvalue()


def _data(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
