"""Pictures of a site: each image as a file for its page."""

import io

from PIL import Image

from cytosae.maps import Pixels

_QUALITY = 88


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
