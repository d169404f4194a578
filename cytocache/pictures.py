"""Pixels of images for the figures of stage two, or the reason why an image cannot be shown.

An image is shown only if its file is the one that was cached: a map drawn over another image would be wrong.
"""

from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt
from PIL import Image

from stores.latent_store import LatentStore
from stores.runlog import read_runs
from stores.tables import column, truncated_images

from .images import read_image_file
from .preprocess import Preprocess

_MOST_PIXELS = 512  # along the longer side: enough for a figure
Pixels = npt.NDArray[np.uint8]  # (height, width, 3) RGB


class Pictures:
    """The images of a latent store, by `image_index`."""

    def __init__(self, latents: LatentStore, root: Path | str | None = None) -> None:
        """`root`: folder or archive of the images now; default: as recorded when the cache was made, if it was."""
        self.root = Path(root) if root else _recorded_root(latents)
        self._paths, self._hashes = column(latents.images, "path"), column(latents.images, "content_hash")
        self._errors, self._truncated = column(latents.images, "error"), truncated_images(latents.images)
        self._preprocess = Preprocess.seen_in(latents.spec.cache.get("transform"))

    def __call__(self, image_index: int) -> Pixels | str:
        """(height, width, 3) RGB in the image's aspect ratio, at most 512 pixels long; or why it cannot be shown.

        What the backbone's preprocessing cuts off is left out, so that maps of patches fit over it.
        """
        if self.root is None:
            return "where the images lie is not known"
        if self._errors[image_index] is not None:
            return f"unreadable: {self._errors[image_index]}"
        path = str(self._paths[image_index])
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            return "its path leaves the folder of the images"
        found = read_image_file(self.root / path, allow_truncated=self._truncated[image_index] is not None)
        if found.picture is None:
            return str(found.error)
        if found.content_hash != self._hashes[image_index]:
            return "another file than the one that was cached"
        return to_pixels(found.picture, self._preprocess)


def to_pixels(picture: Image.Image, preprocess: Preprocess | None = None) -> Pixels:
    """What a backbone sees of an image, with the same aspect ratio, at most 512 pixels along its longer side.

    preprocess : of the backbone; None: it sees the whole image
    """
    left, top, right, bottom = (preprocess or Preprocess()).view(*picture.size)
    box = (round(left), round(top), max(round(left) + 1, round(right)), max(round(top) + 1, round(bottom)))
    if box != (0, 0, *picture.size):
        picture = picture.crop(box)
    scale = _MOST_PIXELS / max(picture.size)
    if scale < 1:
        width, height = (max(1, round(side * scale)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(picture, np.uint8)


def _recorded_root(latents: LatentStore) -> Path | None:
    """Folder of the images by the run logs of the latents and of their cache; None if one of them does not say it."""
    runs = read_runs(latents.root) if isinstance(latents.root, Path) else []
    cache = (runs or [{}])[-1].get("cache")
    root = (read_runs(Path(cache)) or [{}])[-1].get("images_root") if isinstance(cache, str) and cache else None
    return Path(root) if isinstance(root, str) else None
