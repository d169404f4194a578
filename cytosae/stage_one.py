"""The functions of stage one that stage two calls, as a protocol. `cytocache.bridge` implements it.

The two packages do not import each other: cli.py passes the module to commands, and a notebook passes
`stage_one=cytocache.bridge`.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from stores.errors import BadInput
from stores.progress import Progress
from stores.shards import Shard

if TYPE_CHECKING:
    import pyarrow as pa
    import torch

    from stores import ActivationSpec, LatentStore

Pixels = npt.NDArray[np.uint8]  # (height, width, 3) RGB
Picture = Callable[[int], Pixels | str]  # image_index -> pixels, or the reason why there are none


class ImageList(Protocol):
    """The images of a folder or a table (`cytocache.Images`)."""

    @property
    def table(self) -> "pa.Table":
        """The image table."""

    @property
    def root(self) -> Path:
        """The folder that its paths are relative to."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What was passed over, in words."""


class FirstLook(Protocol):
    """Some images through the backbone (`cytocache.first_look.FirstLook`)."""

    @property
    def backbone(self) -> str: ...
    @property
    def trained(self) -> bool: ...
    @property
    def block(self) -> int: ...
    @property
    def precision(self) -> str: ...
    @property
    def width(self) -> int: ...
    @property
    def tokens_per_image(self) -> int: ...
    @property
    def tokens(self) -> npt.NDArray[np.float16]: ...
    @property
    def n_read(self) -> int: ...
    @property
    def unreadable(self) -> tuple[str, ...]: ...
    @property
    def seconds_per_image(self) -> float: ...
    @property
    def seconds_to_start(self) -> float: ...


class Extraction(Protocol):
    """A cache that was written (`cytocache.ExtractResult`)."""

    @property
    def is_complete(self) -> bool:
        """No shard is missing."""

    @property
    def was_complete(self) -> bool:
        """There was nothing to do."""

    @property
    def notes(self) -> tuple[str, ...]: ...
    @property
    def warnings(self) -> tuple[str, ...]: ...
    def lines(self) -> Iterator[str]: ...


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

    def backbone_rest(
        self,
        store: Path | str,
        *,
        root: Path | None,
        weights: str | None,
        device: str,
        workers: int | None,
        download_progress: Progress,
    ) -> "tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[Any], Iterator[torch.Tensor]] | None]":
        """(function from block outputs to the final CLS embeddings, function from image indices to block outputs)."""

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

    def open_images(self, source: Path | str, *, root: Path | None) -> ImageList:
        """The images of a folder or a table."""

    def changed_files(self, images: Any, cache: Path) -> str:
        """Which image files are others than those that the cache was made from, in words; empty if none is."""

    def first_look(
        self,
        images: Any,
        settings: Mapping[str, Any],
        *,
        device: str,
        workers: int | None,
        n_images: int,
        download_progress: Progress,
    ) -> FirstLook:
        """Some images through the backbone: the form of the tokens, and what they cost."""

    def extract(
        self,
        images: Any,
        out: Path,
        settings: Mapping[str, Any],
        *,
        device: str,
        workers: int | None,
        shard: Shard,
        overwrite: bool,
        progress: Progress,
        download_progress: Progress,
        stop: Callable[[], bool],
    ) -> Extraction:
        """Write (or continue) the activation cache of `images`, as `open_images` gave them."""


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
