"""Where in an image a latent is active: its map over patches, and the active latents of a patch. Numbers, no drawing.

With S x S patches, patch k is at row k // S, column k % S of what the backbone saw of the image (16 x 16 for DinoBloom,
which sees the whole image resized to a square). CLS and registers have no position in the image, so they are in no map.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import scipy.sparse as ss

from stores.concept_store import ConceptStore
from stores.errors import BadInput
from stores.latent_store import LatentStore
from stores.spec import check_latent
from stores.token_layout import TokenLayout, cls_first

Map = npt.NDArray[np.float32]  # (side, side), row by row from the top left
Pixels = npt.NDArray[np.uint8]  # (height, width, 3) RGB


@dataclass(frozen=True, kw_only=True)
class PatchQuery:
    """Which latents characterise a patch: those with the largest values there, except shared and noisy latents."""

    patch: int
    dataset: str | None = None  # whose statistics decide; None: the image's own, or the only one
    n_top: int = 2
    shared: float = 1.0  # frequency from which on a latent is left out; 1: active in every readable image
    noisy: float = 0.1  # mean activation above which a latent is left out; value of the released code

    def __post_init__(self) -> None:
        for name in ("shared", "noisy"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise BadInput(f"{name} must be a number of at least 0; found {value!r}")
            object.__setattr__(self, name, float(value))  # 1 and 1.0 are the same settings
        if self.n_top < 1:
            raise BadInput(f"n_top must be at least 1; found {self.n_top}")


def read_tokens(latents: LatentStore, image_index: int) -> ss.csr_matrix:
    """(tokens_per_image, n_latents) of one image of a store; all empty if the image was unreadable."""
    return latents.read_images(image_index, image_index + 1).to_scipy(latents.spec.n_latents)


def patch_map(tokens: ss.csr_matrix, latent: int, layout: TokenLayout | None = None) -> Map:
    """(side, side) activation of a latent at the patches of an image, in the latent's own unit.

    layout : of the tokens (`LatentStore.layout`); None: CLS first, then patches

    Raises
    ------
    BadInput
        If there is no such latent, or the patches do not fill a square.
    """
    check_latent(latent, tokens.shape[1], "the SAE of these tokens")
    layout = layout or cls_first(tokens.shape[0])
    side = layout.side
    return tokens[layout.first_patch :, [latent]].toarray().astype(np.float32).reshape(side, side)


def patch_side(tokens_per_image: int) -> int:
    """Number of patches along each side of the image, of tokens that are CLS and patches; else `TokenLayout.side`.

    Raises
    ------
    BadInput
        If the tokens are not CLS and a square of patches.
    """
    return cls_first(tokens_per_image).side


def stretched(patches: Map, height: int, width: int, *, is_smooth: bool) -> Map:
    """The map at (height, width) pixels, stretched as the image was: bilinear between centres of patches, or nearest.

    At the centre of a patch the value is that of the patch; beyond the outermost centres it is constant.
    """
    side = len(patches)
    if not is_smooth:
        rows, columns = (np.arange(n) * side // n for n in (height, width))
        return patches[rows[:, None], columns]
    down, right = _weights(height, side), _weights(width, side)
    return np.asarray(down @ patches @ right.T, np.float32)


def _weights(n: int, side: int) -> npt.NDArray[np.float64]:
    """(n, side): weight of each patch for each pixel, along one side."""
    at = np.clip((np.arange(n) + 0.5) * side / n - 0.5, 0, side - 1)
    return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(side)))


def latents_of_patch(
    tokens: ss.csr_matrix, query: PatchQuery, concepts: ConceptStore, layout: TokenLayout | None = None
) -> pa.Table:
    """All active latents of a patch, the largest value first (ties: the lower number).

    Columns: latent, value, frequency, mean_activation (of `query.dataset`), is_shared, is_noisy, rank (from 1 among
    those that are neither; else null).

    layout : of the tokens (`LatentStore.layout`); None: CLS first, then patches

    Raises
    ------
    BadInput
        If there is no such patch or dataset, or no dataset is named and there are several.
    """
    layout = layout or cls_first(tokens.shape[0])
    side = layout.side
    if not 0 <= query.patch < side * side:
        raise BadInput(
            f"patches are numbered 0 to {side * side - 1:,}, row by row from the top left; found {query.patch:,}"
        )
    row = tokens[layout.patches[query.patch]].tocoo()
    order = np.lexsort((row.col, -row.data))
    latent, value = row.col[order], row.data[order]
    statistics = concepts.latents(concepts.choose_dataset(query.dataset))
    frequency = statistics["frequency"].to_numpy()[latent]
    mean_activation = statistics["mean_activation"].to_numpy()[latent]
    is_shared, is_noisy = frequency >= query.shared, mean_activation > query.noisy
    is_ranked = ~is_shared & ~is_noisy
    return pa.table(
        {
            "latent": pa.array(latent, pa.int64()),
            "value": pa.array(value, pa.float32()),
            "frequency": pa.array(frequency, pa.float64()),
            "mean_activation": pa.array(mean_activation, pa.float64()),
            "is_shared": is_shared,
            "is_noisy": is_noisy,
            "rank": pa.array(np.cumsum(is_ranked), pa.int64(), mask=~is_ranked),
        }
    )
