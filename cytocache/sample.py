"""Runs images of a cache through its backbone again, for what cannot be computed from the cached tokens.

Image files and weights must be the ones that were cached, by their hashes.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from stores.activation_spec import ActivationSpec
from stores.activation_store import ActivationStore
from stores.devices import float32_stays_float32
from stores.errors import BadInput, SpecMismatch
from stores.progress import Progress
from stores.tables import column

from .backbones import Backbone, load_backbone
from .extract import PRECISIONS
from .images import read_image
from .preprocess import Preprocess
from .readers import ImageReaders

Rows = npt.NDArray[np.int64]


def load_backbone_of(
    cache: ActivationStore,
    *,
    weights: str | None,
    device: str,
    keep_tail: bool = False,
    progress: Progress = lambda done, total, state: None,
) -> Backbone:
    """The backbone that `cache` was made with, up to its block, on `device`, without TF32.

    Parameters
    ----------
    weights : the file of the trained backbone; an untrained one needs none
    keep_tail : see `load_backbone`

    Raises
    ------
    BadInput
        If the weights are missing or cannot be read.
    SpecMismatch
        If they are not those of the cache.
    """
    return load_backbone_as(
        cache.spec, str(cache.root), weights=weights, device=device, keep_tail=keep_tail, progress=progress
    )


def load_backbone_as(
    spec: ActivationSpec,
    made: str,
    *,
    weights: str | None,
    device: str,
    keep_tail: bool = False,
    progress: Progress = lambda done, total, state: None,
) -> Backbone:
    """As `load_backbone_of`, by the spec of a cache; `made`: name of the cache in errors."""
    backbone = load_for_spec(spec, made, weights=weights, keep_tail=keep_tail, progress=progress)
    if backbone.weights_sha256 != spec.weights_sha256:
        raise SpecMismatch(
            f"{made} was made with weights of sha256 {spec.weights_sha256[:12]}…, found "
            f"{backbone.weights_sha256[:12]}…; give the file that it was made with: --weights"
        )
    float32_stays_float32()
    for part in (backbone.model, backbone.tail):
        if part is not None:
            part.to(device)
    return backbone


def load_for_spec(
    spec: ActivationSpec,
    made: str,
    *,
    weights: str | None,
    keep_tail: bool = False,
    progress: Progress = lambda done, total, state: None,
) -> Backbone:
    """The backbone of a cache with the cache's own preprocessing, on the CPU; its weights are not compared.

    Raises
    ------
    BadInput
        If the weights are missing or cannot be read, or some are given for an untrained backbone.
    SpecMismatch
        If this version computes other tokens than the cache holds.
    """
    if not spec.trained and weights not in (None, "random"):
        raise BadInput(f"{made} is of an untrained backbone, whose weights follow from its seed: leave --weights out")
    preprocess = Preprocess.from_dict(spec.transform)
    backbone = load_backbone(
        spec.backbone,
        weights=weights if spec.trained else "random",
        blocks=(spec.block,),
        keep_tail=keep_tail,
        image_size=preprocess.size,
        progress=progress,
    )
    if (backbone.layout, backbone.width) != (spec.layout, spec.width):
        raise SpecMismatch(
            f"{made} holds tokens {spec.token_layout} of {spec.width} channels; the backbone gives "
            f"{backbone.layout.text} of {backbone.width}; give the weights that it was made with: --weights"
        )
    return replace(backbone, preprocess=preprocess)


def read_new_image(
    path: Path, spec: ActivationSpec, backbone: Backbone, *, device: str
) -> tuple[npt.NDArray[np.float16], Image.Image, str]:
    """For an image file: ((T, width) tokens as in a cache of `spec`, the decoded image, SHA-256 of the file).

    Raises
    ------
    BadInput
        If the file cannot be read, or its tokens do not fit float16.
    """
    picture, content_hash, error = read_image(path)
    if picture is None:
        raise BadInput(f"{path} cannot be shown: {error}")
    pixels = torch.from_numpy(backbone.preprocess.resize(picture).copy())[None].to(device)
    low = PRECISIONS[spec.precision]
    with torch.inference_mode(), torch.autocast(torch.device(device).type, low, enabled=low != torch.float32):
        (tokens,) = backbone.tokens(pixels)
    values = tokens[0].to(torch.float16)
    if not bool(torch.isfinite(values).all()):
        raise BadInput(f"the tokens of {path} do not fit float16")
    return values.cpu().numpy(), picture, str(content_hash)


def draw_sample(cache: ActivationStore, *, n_images: int, seed: int) -> Rows:
    """Image indices, ascending, of `n_images` readable images drawn with `seed`; all if there are fewer."""
    readable = np.flatnonzero(cache.readable())
    return np.sort(np.random.default_rng(seed).permutation(readable)[:n_images])


def read_sample(
    cache: ActivationStore,
    rows: Rows,
    backbone: Backbone,
    *,
    root: Path,
    device: str,
    workers: int = 2,
    root_option: str = "--root",
    progress: Progress = lambda done, total, state: None,
) -> Iterator[torch.Tensor]:
    """The float32 tokens of these images after the cache's block, (tokens_per_image, width) each.

    They are on `device`.

    root : folder of the images now; root_option : the command's option for it, for errors

    Raises
    ------
    BadInput
        If an image cannot be read, or its file is not the one that was cached.
    """
    paths, hashes = column(cache.images, "path"), column(cache.images, "content_hash")
    preprocess, allowed = backbone.preprocess, cache.spec.allow_truncated
    with ImageReaders(
        workers, batch_size=1, size=preprocess.size, preprocess=preprocess, allow_truncated=allowed
    ) as readers:
        reading = readers.read([root / str(paths[row])] for row in rows)
        for n_done, (row, pictures) in enumerate(zip(rows, reading, strict=True), start=1):
            if pictures.errors[0] is not None or pictures.content_hash[0] != hashes[row]:
                raise BadInput(
                    f"{root / str(paths[row])} is missing, or not the file that was cached"
                    f"{f' ({pictures.errors[0]})' if pictures.errors[0] else ''}; "
                    f"say where the images are with {root_option}"
                )
            with torch.inference_mode():
                (tokens,) = backbone.tokens(torch.from_numpy(pictures.pixels).to(device))
            yield tokens[0]
            progress(n_done, len(rows), "")
