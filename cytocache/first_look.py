"""A first look at images through a backbone, before they are extracted: the form of the tokens, and what they cost."""

import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from stores.errors import BadInput
from stores.progress import Progress
from stores.tables import column, listed

from .backbones import load_backbone
from .datasets import Images
from .extract import PRECISIONS, ExtractConfig, resolve_precision
from .readers import ImageReaders


@dataclass(frozen=True, kw_only=True, eq=False)
class FirstLook:
    """Some images through the backbone, as `extract` would run it."""

    backbone: str
    trained: bool
    block: int
    n_blocks: int
    precision: str  # fp32, bf16 or fp16: `auto` is resolved for the device
    width: int
    tokens_per_image: int
    tokens: npt.NDArray[np.float16]  # (n_read, tokens_per_image, width)
    n_read: int
    unreadable: tuple[str, ...]  # of the images that were tried: `path: error`
    seconds_per_image: float  # reading and forward pass, when warm
    seconds_to_start: float  # until the first image is done: the model, reader processes


@torch.inference_mode()
def first_look(
    images: Images,
    config: ExtractConfig,
    *,
    n_images: int = 32,
    progress: Progress = lambda done, total, state: None,
) -> FirstLook:
    """Run `n_images` images, evenly spaced in the table, through the backbone; nothing is written.

    Parameters
    ----------
    config : with one block, and a device that is resolved
    progress : bytes of the weights downloaded, bytes in all

    Raises
    ------
    BadInput
        For settings or weights that cannot be used, or if none of these images can be read.
    """
    began = time.perf_counter()
    backbone = load_backbone(
        config.backbone,
        weights=config.weights,
        blocks=config.blocks,
        image_size=config.image_size,
        crop=config.crop,
        progress=progress,
    )
    precision = resolve_precision(config.precision, config.device)
    device, low = torch.device(config.device), PRECISIONS[precision]
    backbone.model.to(device)
    paths = column(images.table, "path")
    rows = np.unique(np.linspace(0, len(paths) - 1, min(n_images, len(paths))).astype(int)).tolist()
    size = min(8 if config.device == "cpu" else config.images_per_pass, len(rows))
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    tokens, unreadable, ends = [], [], []
    preprocess = backbone.preprocess
    with ImageReaders(
        config.workers,
        batch_size=size,
        size=preprocess.size,
        preprocess=preprocess,
        allow_truncated=config.allow_truncated,
    ) as readers:
        reading = readers.read([images.root / str(paths[row]) for row in batch] for batch in batches)
        for batch, pictures in zip(batches, reading, strict=True):
            with torch.autocast(device.type, low, enabled=low != torch.float32):
                full = backbone.tokens(torch.from_numpy(pictures.pixels).to(device))
            found = full[0].to(torch.float16).cpu().numpy()
            is_read = np.array([error is None for error in pictures.errors])
            tokens.append(found[is_read])
            unreadable += [
                f"{paths[row]}: {error}" for row, error in zip(batch, pictures.errors, strict=True) if error is not None
            ]
            ends.append(time.perf_counter())
    taken = np.concatenate(tokens)
    if not len(taken):
        raise BadInput(
            f"none of {len(rows):,} images that were tried can be read ({listed(unreadable)}); check the files, "
            f"and --root"
        )
    warm = ends[-1] - ends[0] if len(ends) > 1 else ends[0] - began
    n_warm = len(rows) - len(batches[0]) if len(ends) > 1 else len(rows)
    return FirstLook(
        backbone=backbone.name,
        trained=backbone.trained,
        block=backbone.blocks[0],
        n_blocks=backbone.n_blocks,
        precision=precision,
        width=int(taken.shape[2]),
        tokens_per_image=int(taken.shape[1]),
        tokens=taken,
        n_read=len(taken),
        unreadable=tuple(unreadable),
        seconds_per_image=warm / max(1, n_warm),
        seconds_to_start=ends[0] - began,
    )
