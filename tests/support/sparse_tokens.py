"""What test_encode.py and other tests share."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from sae_variants import make_model

from cytosae.sae import SparseAutoencoder, save_sae
from stores import (
    SAE,
    ActivationStore,
    new_header,
)

WIDTH = 12


def write_sae(
    root: Path,
    cache: Path,
    *,
    n_latents: int,
    seed: int = 0,
    activation: str = "relu",
    change: Callable[[SparseAutoencoder], object] | None = None,
) -> Path:
    """A finished SAE for the tokens of `cache`, with seeded weights instead of trained ones."""
    spec = ActivationStore(cache).spec
    model = make_model(activation, seed, width=spec.width, n_latents=n_latents)
    with torch.no_grad():
        model.b_dec.fill_(1)
        if change:
            change(model)
    root.mkdir(parents=True)
    settings = {"width": spec.width, "n_latents": n_latents, "tokens": spec.same_tokens, "caches": [], "config": {}}
    settings |= {"activation": activation, "k": model.k}
    save_sae(root, model, new_header(SAE, settings), {"final": {}})
    return root


def random_tokens(n_images: int, tokens_per_image: int = 257, seed: int = 0) -> npt.NDArray[np.float16]:
    return np.random.default_rng(seed).normal(1, 1, (n_images, tokens_per_image, WIDTH)).astype(np.float16)
