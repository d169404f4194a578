"""What stage two needs of stage one: pixels, masks, the tokens of a new image, the later blocks, a whole cache.

`cytosae.stage_one` declares the same functions as a protocol. In a notebook pass this module:
`stage_one=cytocache.bridge`. Only the functions that need torch import it.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from stores.activation_spec import ActivationSpec
from stores.activation_store import ActivationStore
from stores.devices import resolve_device
from stores.latent_store import LatentStore
from stores.machine import n_cores
from stores.progress import Progress
from stores.shards import ONE_WRITER, Shard

from .changed_files import changed_files as changed_files
from .datasets import Images
from .datasets import open_images as open_images
from .masks import find_masks, read_all_shares
from .pictures import Pictures, Pixels, to_pixels
from .preprocess import Preprocess

if TYPE_CHECKING:
    import torch

    from .extract import ExtractConfig, ExtractResult
    from .first_look import FirstLook


def _silent(done: int, total: int, state: str) -> None:
    pass


def pictures(latents: LatentStore, root: Path | str | None = None) -> Pictures:
    """The images of a latent store as pixels, by `image_index`.

    root : folder or archive of the images now; None: as recorded when the cache was made, if it was
    """
    return Pictures(latents, root)


def new_image(
    file: Path,
    spec: ActivationSpec,
    cache: str,
    *,
    weights: str | None = None,
    device: str = "auto",
    progress: Progress = _silent,
) -> tuple[npt.NDArray[np.float16], Pixels, str]:
    """For an image that is in no store: its tokens, (T, width) float16, its pixels, and the SHA-256 of its file.

    Parameters
    ----------
    spec : of the cache that the tokens must be compatible with
    cache : name of that cache in errors
    weights : the file of the trained backbone; an untrained one needs none
    device : auto, cpu, cuda or cuda:N; auto takes a GPU if there is one
    progress : bytes downloaded, bytes in all

    Raises
    ------
    BadInput
        If the file or the weights cannot be read, or tokens do not fit float16.
    SpecMismatch
        If the weights are not those of the cache.
    """
    from .sample import load_backbone_as, read_new_image

    device = resolve_device(device)
    backbone = load_backbone_as(spec, cache, weights=weights, device=device, progress=progress)
    tokens, picture, content_hash = read_new_image(file, spec, backbone, device=device)
    return tokens, to_pixels(picture, Preprocess.seen_in(spec.transform)), content_hash


def backbone_sample(
    store: Path | str,
    root: Path,
    *,
    weights: str | None = None,
    device: str = "auto",
    n_images: int = 64,
    seed: int = 0,
    workers: int | None = None,
    download_progress: Progress = _silent,
    progress: Progress = _silent,
) -> "tuple[Iterator[torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]":
    """Block outputs for a sample of a cache's images, computed lazily, and a function that runs the later blocks.

    Parameters
    ----------
    store : the activation cache, a path or a URL
    root : folder of its images now
    weights : the file of the trained backbone; an untrained one needs none
    device : auto, cpu, cuda or cuda:N; auto takes a GPU if there is one
    n_images, seed : how many, and the seed of the draw
    workers : processes that read images; None: one for each core
    progress : images read, images in all

    Returns
    -------
    An iterator over images: the float32 output of the block, (tokens_per_image, width). And a function: (n,
    tokens_per_image, width) -> final CLS embeddings, (n, width).

    Raises
    ------
    BadInput, SpecMismatch
        If the weights are missing or not those of the cache, or the backbone has no CLS token; while iterating, if an
        image file has changed.
    """
    from .backbones import require_cls
    from .sample import draw_sample, load_backbone_of, read_sample

    cache, device = ActivationStore(store), resolve_device(device)
    require_cls(cache.spec.layout, cache.spec.backbone)
    backbone = load_backbone_of(cache, weights=weights, device=device, keep_tail=True, progress=download_progress)

    def outputs() -> "Iterator[torch.Tensor]":
        yield from read_sample(
            cache,
            draw_sample(cache, n_images=n_images, seed=seed),
            backbone,
            root=root,
            device=device,
            workers=workers or n_cores(),
            root_option="--images",
            progress=progress,
        )

    return outputs(), backbone.final_cls


def backbone_rest(
    store: Path | str,
    *,
    root: Path | None = None,
    weights: str | None = None,
    device: str = "auto",
    workers: int | None = None,
    download_progress: Progress = _silent,
) -> "tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[Any], Iterator[torch.Tensor]] | None]":
    """A function that runs the blocks after that of a cache, and one that runs its images up to there.

    Parameters
    ----------
    store : the activation cache, a path or a URL
    root : folder of its images now; None: no image is read, and there is no second function
    weights : the file of the trained backbone; an untrained one needs none
    device : auto, cpu, cuda or cuda:N; auto takes a GPU if there is one
    workers : processes that read images; None: one for each core

    Returns
    -------
    (n, tokens_per_image, width) -> final CLS embeddings, (n, width). And: image indices -> an iterator over the float32
    outputs of the block, (tokens_per_image, width), computed lazily.

    Raises
    ------
    BadInput, SpecMismatch
        If the weights are missing or not those of the cache, or the backbone has no CLS token; while iterating, if an
        image file has changed.
    """
    from .backbones import require_cls
    from .sample import load_backbone_of, read_sample

    cache, device = ActivationStore(store), resolve_device(device)
    require_cls(cache.spec.layout, cache.spec.backbone)
    backbone = load_backbone_of(cache, weights=weights, device=device, keep_tail=True, progress=download_progress)

    def outputs(images: Any) -> "Iterator[torch.Tensor]":
        assert root is not None
        yield from read_sample(
            cache,
            np.asarray(images, np.int64),
            backbone,
            root=root,
            device=device,
            workers=workers or n_cores(),
            root_option="--images",
        )

    return backbone.final_cls, None if root is None else outputs


def read_masks(
    masks: Path,
    latents: LatentStore,
    side: int,
    *,
    root: Path | None = None,
    classes: str | None = None,
    progress: Progress = _silent,
) -> tuple[dict[int, Any], list[tuple[str, tuple[str, ...]]], dict[str, list[str]]]:
    """Segmentation masks of a latent store's images, as fractions of side x side patches, 0 to 1.

    The patches are those that the backbone saw: what its preprocessing cuts off of the images is cut off here, too.

    Parameters
    ----------
    masks : a table with image_id and mask (a path), or a folder or archive of files named like the images
    root : what paths in the table are relative to; None: the table's folder
    classes : as `--classes` of cyto concept masks
    progress : masks read, masks in all

    Returns
    -------
    By image_index the fraction of each patch that each class covers, (n_classes, side, side); the classes, as (name,
    values); and the masks that were left out, names by reason.

    Raises
    ------
    BadInput
        If a table or mask cannot be understood (see `find_masks`, `read_all_shares`).
    """
    found = find_masks(masks, latents.images, root=root)
    preprocess = Preprocess.seen_in(latents.spec.cache.get("transform"))
    read = read_all_shares(found, latents.readable(), side, classes, preprocess=preprocess, progress=progress)
    left_out = {
        "masks of no image here": found.unknown,
        "unreadable masks": read.unreadable,
        "masks of unreadable images": read.of_unreadable_images,
    }
    return read.shares, [(one.name, one.values) for one in read.classes], left_out


def first_look(
    images: Images,
    settings: Mapping[str, Any],
    *,
    device: str = "auto",
    workers: int | None = None,
    n_images: int = 32,
    download_progress: Progress = _silent,
) -> "FirstLook":
    """Some images through the backbone, before anything is extracted; see `cytocache.first_look`.

    Parameters
    ----------
    settings : as of `extract`
    device : auto, cpu, cuda or cuda:N; auto takes a GPU if there is one
    workers : processes that read images; None: one for each core

    Raises
    ------
    BadInput
        For settings or weights that cannot be used, or if none of these images can be read.
    """
    from .first_look import first_look as look

    config = _extract_config(settings, device=resolve_device(device), workers=workers)
    return look(images, config, n_images=n_images, progress=download_progress)


def extract(
    images: Images,
    out: Path,
    settings: Mapping[str, Any],
    *,
    device: str = "auto",
    workers: int | None = None,
    shard: Shard = ONE_WRITER,
    overwrite: bool = False,
    progress: Progress = _silent,
    download_progress: Progress = _silent,
    stop: Callable[[], bool] = lambda: False,
) -> "ExtractResult":
    """Write (or continue) the activation cache of `images` at `out`; see `cytocache.extract`.

    settings : backbone, weights, block, precision, chunk_images; those that are missing have their defaults

    Raises
    ------
    BadInput, SpecMismatch
        As `cytocache.extract`.
    """
    from .extract import extract as run

    config = _extract_config(settings, device=device, workers=workers)
    return run(
        images,
        out,
        config,
        shard=shard,
        overwrite=overwrite,
        progress=progress,
        download_progress=download_progress,
        stop=stop,
    )


def _extract_config(settings: Mapping[str, Any], *, device: str, workers: int | None) -> "ExtractConfig":
    from .extract import ExtractConfig

    given = {name: value for name, value in settings.items() if name != "block"}
    blocks = (int(settings["block"]),) if "block" in settings else (-2,)
    return ExtractConfig(**given, blocks=blocks, device=device, workers=workers or n_cores())
