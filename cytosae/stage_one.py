"""What stage two asks of stage one. `cytocache.bridge` is one; the two packages do not import each other.

A command is handed it by cli.py; a notebook passes the module: `stage_one=cytocache.bridge`.
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
Picture = Callable[[int], Pixels | str]  # image_index -> pixels, or a few words on why there are none


class StageOne(Protocol):
    """Images and the backbone; the docstrings of `cytocache.bridge` say more."""

    def pictures(self, latents: "LatentStore", root: Path | None = None) -> Picture:
        """The pictures of a latent store's images, by `image_index`."""

    def new_image(
        self, file: Path, spec: "ActivationSpec", cache: str, *, weights: str | None, device: str, progress: Progress
    ) -> tuple[npt.NDArray[np.float16], Pixels, str]:
        """(tokens as a cache of `spec` would hold them, picture, SHA-256 of the file) of an image in no store."""

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
        """(outputs of the cached block for a sample of images, way from there to the final CLS embeddings)."""

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
        """(shares of the patches by image_index, classes as (name, values), what was left out: names by reason)."""


def require_stage_one(stage_one: StageOne | None) -> StageOne:
    """What was given; without it, neither images nor a backbone can be had.

    Raises
    ------
    BadInput
        If nothing was given.
    """
    if stage_one is None:
        raise BadInput("images are read by stage one: give stage_one=cytocache.bridge (import cytocache)")
    return stage_one
