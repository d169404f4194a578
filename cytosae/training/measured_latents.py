"""The latents of an SAE whose weights stay as they are while it is measured, and what they reconstruct.

On the CPU, where few latents are active, only these are kept and decoded; where few can be, only these are computed
(sae/screen.py). Otherwise, and on a GPU, they are dense. Products are of float32, whatever the environment says.
Shapes: N images and B tokens of a micro-batch, D width, L latents.
Twin: tests/cytosae/training/test_measured_sums.py.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cytosae.sae import Active, ScreenedEncoder, SparseAutoencoder

from .kernels_cpu import add_decoded
from .latent_matrix import find_few
from .precision import float32_products


class MeasuredLatents:
    """Encodes and decodes. Memory: two dense matrices (B, L)."""

    def __init__(self, model: SparseAutoencoder) -> None:
        self._model = model
        self._screen = ScreenedEncoder(model) if model.W_enc.device.type == "cpu" else None
        self._buffer_BL = torch.empty(0, model.n_latents)

    def of(self, x_BD: torch.Tensor) -> torch.Tensor | Active:
        """The latents of float32 tokens: dense (B, L), or the active ones alone."""
        with float32_products("fp32", x_BD.device.type):
            if self._screen is None:
                return self._model.encode(x_BD)
            if len(self._buffer_BL) < len(x_BD):
                self._buffer_BL = torch.empty(len(x_BD), self._model.n_latents)
            found = self._screen.latents(x_BD, self._buffer_BL[: len(x_BD)])
            if found is not None:
                return found
            z_BL = self._model.encode(x_BD)
            return find_few(z_BL) or z_BL

    def decoded(self, z: torch.Tensor | Active) -> torch.Tensor:
        """(B, D) float32: z W_dec + b_dec."""
        if isinstance(z, torch.Tensor):
            with float32_products("fp32", z.device.type):
                return self._model.decode(z)
        x_hat_BD = self._model.b_dec.detach().repeat(z.n_tokens, 1)
        add_decoded(z, self._model.W_dec.detach().numpy(), x_hat_BD.numpy())
        return x_hat_BD


def image_totals(z: Active, n_images: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """((N, L) tokens on which each latent is active, (N, L) sum of its values), of images with as many tokens each."""
    n_latents = len(z.counts)
    latents, images = np.repeat(np.arange(n_latents), z.counts), z.tokens // (z.n_tokens // n_images)
    at, shape = images * np.int64(n_latents) + latents, (n_images, n_latents)
    active: npt.NDArray[np.int64] = np.bincount(at, minlength=n_images * n_latents).reshape(shape)
    total: npt.NDArray[Any] = np.bincount(at, z.values, n_images * n_latents).reshape(shape)
    return active, total
