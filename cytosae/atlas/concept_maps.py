"""The patch maps of the images on concept pages: written image by image, read latent by latent, in a file meanwhile."""

import base64
import errno
import os
import tempfile
import weakref
from pathlib import Path

import numpy as np
import numpy.typing as npt

from stores.files import named

from .lies_on import Maps8, PatchKinds, Share
from .plan import Plan


class Maps:
    """A map for each image of each latent, quantised to 8 bits relative to its own largest value.

    They lie in an unnamed temporary file, a byte for each patch: 160 MB for 49,152 latents with 10 images of 256
    patches. A map that was never set is 0.
    """

    def __init__(
        self, n_maps: int, n_patches: int, folder: Path | None = None, *, kinds: PatchKinds | None = None
    ) -> None:
        """`folder`: where the file lies; None: in that of temporary files. `kinds`: of the images with a page."""
        self.kinds = kinds or PatchKinds(0, 0)
        self.largest = np.zeros(n_maps, np.float32)
        self.aspect = np.ones(n_maps, np.float32)  # width by height of the image
        self.unseen: dict[int, str] = {}  # image index -> why it cannot be shown
        self.sizes: set[tuple[int, int]] = set()  # height and width of the images, in pixels
        self.n_patches = n_patches
        self._folder = folder or Path(tempfile.gettempdir())
        self._file = tempfile.TemporaryFile(dir=self._folder)
        self.close = weakref.finalize(self, self._file.close)  # the file is gone with this object at the latest
        self._file.truncate(n_maps * n_patches)

    def set(self, number: int, patches: npt.NDArray[np.float32], *, aspect: float = 1.0) -> None:
        """Store a map."""
        self.aspect[number] = aspect
        largest = patches.max(initial=0)
        self.largest[number] = largest
        steps = np.round(patches / (largest or 1) * 255).astype(np.uint8)
        with named(self._folder):
            if os.pwrite(self._file.fileno(), steps.tobytes(), number * self.n_patches) < steps.nbytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # the rest of the map would stay 0

    def read(self, first: int, n_maps: int) -> Maps8:
        """(n_maps, n_patches) maps that follow each other."""
        raw = os.pread(self._file.fileno(), n_maps * self.n_patches, first * self.n_patches)
        return np.frombuffer(raw, np.uint8).reshape(n_maps, self.n_patches)


def share_of(plan: Plan, maps: Maps, latent: int) -> Share | None:
    """How much of a latent lies on background and nuclei of its reference images; None: not told."""
    first, last = np.searchsorted(plan.references.latent, [latent, latent + 1]).tolist()
    numbers = [plan.place_of.get(image, -1) for image in plan.references.image[first:last].tolist()]
    return maps.kinds.share(numbers, maps.read(first, last - first))


def packed_map(steps: Maps8) -> str:
    """A map as base64, one byte for each patch."""
    return base64.b64encode(steps.tobytes()).decode()
