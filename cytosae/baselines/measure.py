"""What an SAE does with each image: sums over its tokens, from which every figure of versus.py follows.

Shapes: n images, T tokens of each, D channels, L latents.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from cytosae.sae import Active, SparseAutoencoder
from cytosae.training import MeasuredLatents, image_totals, images_of
from stores.activation_store import ActivationStore
from stores.errors import BadInput
from stores.progress import Progress

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
_DENSE_BYTES = 128 << 20  # of one (tokens, latents) matrix


@dataclass(frozen=True, eq=False)
class ImageSums:
    """Sums over the tokens of each image."""

    n_latents: int
    tokens: Floats  # (n,) how many
    error: Floats  # (n,) of ||x - x_hat||^2
    square: Floats  # (n,) of ||x - x_0||^2, with x_0 the first token of all
    shifted: Floats  # (n, D) of x - x_0
    active: Floats  # (n,) of the number of active latents
    begins: Ints  # (n + 1,): entries begins[i] to begins[i + 1] below are those of image i
    latents: npt.NDArray[np.int32]  # which latent
    values: npt.NDArray[np.float32]  # its value, summed over the tokens, above 0


@torch.inference_mode()
def measure_images(
    model: SparseAutoencoder,
    store: ActivationStore,
    rows: Ints,
    *,
    token_set: str,
    device: str,
    progress: Progress = lambda done, total, state: None,
) -> ImageSums:
    """One pass over some images of a cache. Memory: two dense micro-batches (128 MiB each) and what is returned.

    rows : (n,) positions of the images in the cache, all readable; results are in this order
    progress : called with images

    Raises
    ------
    BadInput
        If a reconstruction becomes NaN or infinite.
    DamagedStore
        If a token is NaN or infinite.
    """
    n = len(rows)
    place = np.full(store.spec.n_images, -1)
    place[rows] = np.arange(n)
    step = max(1, _DENSE_BYTES // (4 * model.n_latents))
    tokens, error, square, active = np.zeros((4, n))
    shifted = np.zeros((n, model.width))
    first: torch.Tensor | None = None
    found: list[tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]] = [(_NO_LATENTS, _NO_VALUES)] * n
    n_done, encoder = 0, MeasuredLatents(model)
    for images, half_NTD in images_of(store, place >= 0, token_set, range(store.spec.n_chunks), step=step):
        at = place[images]
        x_NTD = half_NTD.to(device).float()
        if first is None:  # sums of x itself would cancel where the tokens vary little
            first = x_NTD[0, 0].double()
        z = encoder.of(x_NTD.reshape(-1, model.width))
        error_NT = (encoder.decoded(z).view_as(x_NTD) - x_NTD).double().square().sum(2)
        if not bool(torch.isfinite(error_NT).all()):
            raise BadInput("a reconstruction became NaN or infinite: the SAE's weights do not fit these tokens")
        away_NTD = x_NTD.double() - first
        tokens[at] = x_NTD.shape[1]
        error[at] = error_NT.sum(1).cpu().numpy()
        square[at] = away_NTD.square().sum((1, 2)).cpu().numpy()
        shifted[at] = away_NTD.sum(1).cpu().numpy()
        if isinstance(z, Active):
            active_NL, total_NL = image_totals(z, len(images))
            active[at] = active_NL.sum(1)
        else:
            z_NTL = z.view(*x_NTD.shape[:2], -1)
            active[at], total_NL = (z_NTL > 0).sum((1, 2)).cpu().numpy(), z_NTL.sum(1).cpu().numpy()
        for image, total_L in zip(at.tolist(), total_NL, strict=True):
            latents = np.flatnonzero(total_L)
            found[image] = latents.astype(np.int32), total_L[latents].astype(np.float32)
        n_done += len(images)
        progress(n_done, n, "")
    return ImageSums(
        n_latents=model.n_latents,
        tokens=tokens,
        error=error,
        square=square,
        shifted=shifted,
        active=active,
        begins=np.concatenate([[0], np.cumsum([len(latents) for latents, _ in found])]),
        latents=np.concatenate([_NO_LATENTS, *(latents for latents, _ in found)]),
        values=np.concatenate([_NO_VALUES, *(values for _, values in found)]),
    )


_NO_LATENTS, _NO_VALUES = np.zeros(0, np.int32), np.zeros(0, np.float32)
