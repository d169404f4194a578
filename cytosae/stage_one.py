"""The functions of stage one that stage two calls, as a protocol. `cytocache.bridge` implements it.

The two packages do not import each other: cli.py passes the module to commands, and a notebook passes
`stage_one=cytocache.bridge`.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from stores.errors import BadInput
from stores.progress import Progress

if TYPE_CHECKING:
    import torch

    from stores import ActivationSpec, LatentStore

Pixels = npt.NDArray[np.uint8]  # (height, width, 3) RGB
Picture = Callable[[int], Pixels | str]  # image_index -> pixels, or the reason why there are none


class StageOne(Protocol):
    """Access to images and the backbone; for details see the docstrings of `cytocache.bridge`."""

    def pictures(self, latents: "LatentStore", root: Path | None = None) -> Picture:
        """The images of a latent store as pixels, by `image_index`."""

    def new_image(
        self, file: Path, spec: "ActivationSpec", cache: str, *, weights: str | None, device: str, progress: Progress
    ) -> tuple[npt.NDArray[np.float16], Pixels, str]:
        """(tokens as in a cache of `spec`, pixels, SHA-256 of the file) of an image that is in no store."""

    def backbone_sample(
        self,
        store: Path | str,
        root: Path,
        *,
        weights: str | None,
        device: str,
        n_images: int,
        seed: int,
        workers: int,
        download_progress: Progress,
        progress: Progress,
    ) -> "tuple[Iterator[torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]":
        """(block outputs for a sample of images, function from there to the final CLS embeddings)."""

    def read_masks(
        self,
        masks: Path,
        latents: "LatentStore",
        side: int,
        *,
        root: Path | None,
        classes: str | None,
        progress: Progress,
    ) -> tuple[dict[int, Any], list[tuple[str, tuple[str, ...]]], dict[str, list[str]]]:
        """(shares of the patches by image_index, classes as (name, values), masks left out: names by reason)."""


def require_stage_one(stage_one: StageOne | None) -> StageOne:
    """`stage_one`, which is needed to read images or run the backbone.

    Raises
    ------
    BadInput
        If nothing was given.
    """
    if stage_one is None:
        raise BadInput("images are read by stage one: give stage_one=cytocache.bridge (import cytocache)")
    return stage_one
