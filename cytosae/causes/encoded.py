"""Latents of a cache that no store holds: its images are encoded when they are asked for."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from cytosae.sae import SparseAutoencoder
from cytosae.training import float32_products
from stores.activation_spec import Float16
from stores.activation_store import ActivationStore
from stores.csr import CsrRows
from stores.errors import BadInput, DamagedStore

from .places import Ints


@dataclass(frozen=True)
class EncodedLatents:
    """The latents of the images of a cache, encoded one image at a time."""

    store: ActivationStore
    model: SparseAutoencoder

    def rows(self, images: Ints) -> Iterator[tuple[int, CsrRows]]:
        """As `LatentSource`. Memory: the dense latents of one image, and a chunk of the cache."""
        for image, tokens in cached_tokens(self.store, images):
            yield image, encoded(self.model, torch.from_numpy(tokens.astype(np.float32)))


@torch.inference_mode()
def encoded(model: SparseAutoencoder, tokens_TD: torch.Tensor) -> CsrRows:
    """The nonzero latents of some tokens, (T, D) float32.

    Raises
    ------
    BadInput
        If a latent is NaN or infinite.
    """
    with float32_products("fp32", model.W_enc.device.type):
        z_TL = model.encode(tokens_TD.to(model.W_enc.device))
    token, latent = z_TL.nonzero(as_tuple=True)
    values = z_TL[token, latent].cpu().numpy()
    if not np.isfinite(values).all():
        raise BadInput("a latent became NaN or infinite: the SAE's weights do not fit these tokens")
    lengths = torch.bincount(token, minlength=len(z_TL)).cpu().numpy()
    return CsrRows(latent.cpu().numpy(), values, np.append(0, np.cumsum(lengths)).astype(np.int64))


def cached_tokens(store: ActivationStore, images: Ints) -> Iterator[tuple[int, Float16]]:
    """(image index, its tokens (T, D)) of these images, which rise. Memory: one chunk of the cache.

    Raises
    ------
    DamagedStore
        If a token is NaN or infinite.
    """
    size = store.spec.chunk_images
    chunks = images // size
    for chunk in np.unique(chunks).tolist():
        tokens, first = store.read_chunk(chunk), store.spec.chunk_rows(chunk).start
        for image in images[chunks == chunk].tolist():
            found = tokens[image - first]
            if not np.isfinite(found).all():
                raise DamagedStore(
                    f"a token of image {image:,} in {store.root} is NaN or infinite. cyto cache verify names it"
                )
            yield image, found
