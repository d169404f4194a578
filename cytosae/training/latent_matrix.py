"""The latents of a micro-batch in a training step, as a dense matrix or in compressed sparse columns (CSC).

Both give the same sums; which one is faster depends on the density (share of active entries). The work on CSC is
compiled: kernels_cpu.py for the CPU, kernels_gpu.py for the GPU. Values, weights and rows may have half precision (on
the CPU: bfloat16 values only); sums are float32.
Shapes: B tokens of a micro-batch, D width, L latents.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Protocol

import torch

from cytosae.sae import Active, use_kernels_with_torch_threads

from . import kernels_cpu
from .precision import add_product

SPARSE_BELOW = 0.08  # both take as long at density 0.10 with 49,152 latents, 0.20 with 6,144 (two cores, docs/log.md)
SPARSE_BELOW_ON_GPU = 0.01  # an estimate, not measured: tensor cores make dense work fast (docs/log.md)


class Latents(Protocol):
    """Latents z (B, L) >= 0 of a micro-batch, and what a step computes with them. Active: above 0."""

    n_active: int  # active (token, latent) pairs
    total: torch.Tensor | float  # sum of all values; on a GPU it stays there
    fired: torch.Tensor  # (L,) bool: active on at least one token

    def count(self) -> torch.Tensor:
        """(L,): number of tokens on which a latent is active."""

    def without_values(self) -> "Latents":
        """The same active pairs with values 0, so that the decoder gets no gradient. Overwrites the values."""

    def decoded(self, W_dec: torch.Tensor, b_dec: torch.Tensor) -> torch.Tensor:
        """(B, D): z W_dec + b_dec."""

    def add_gradients(
        self,
        W_dec: torch.Tensor,
        d_x_hat_BD: torch.Tensor,
        centred_BD: torch.Tensor,
        penalty: float,
        grad_W_enc: torch.Tensor,
        grad_b_enc: torch.Tensor,
        grad_W_dec: torch.Tensor,
    ) -> None:
        """Add the gradients of W_enc (D, L), b_enc (L,) and W_dec (L, D), of a loss whose gradient at x_hat is given.

        penalty : gradient of the sparsity term with respect to each active latent's value
        """

    def add_products(
        self, W_dec: torch.Tensor, d_x_hat_BD: torch.Tensor, factor_L: torch.Tensor, out_L: torch.Tensor
    ) -> None:
        """out += factor * (sum over the tokens on which a latent is active of <d_x_hat, its W_dec row>)."""


def latents_of(values_BL: torch.Tensor, sparse_below: float | None = None) -> Latents:
    """The entries above 0 of a matrix, in the form that is faster at its density. The matrix may be overwritten.

    values_BL : (B, L), any float type; NaN counts as active
    sparse_below : density below which the form is CSC; 0: never; default: where both take as long
    """
    device = values_BL.device.type
    if sparse_below is None:
        sparse_below = default_sparse_below(device)
    if sparse_below <= 0 or device not in ("cpu", "cuda") or (device == "cpu" and values_BL.dtype == torch.float16):
        return DenseLatents(values_BL)
    if device == "cpu":
        use_kernels_with_torch_threads()
        is_short = values_BL.dtype == torch.bfloat16  # which numpy does not know
        values = values_BL.view(torch.uint16).numpy() if is_short else values_BL.numpy()
        n_active, active = kernels_cpu.find_active(values, most=math.ceil(sparse_below * values_BL.numel()) - 1)
        return DenseLatents(values_BL, n_active) if active is None else CscLatentsCpu(active)
    from . import kernels_gpu  # needs triton

    marks = kernels_gpu.mark_active(values_BL)
    if marks.n_active < sparse_below * values_BL.numel():
        return CscLatentsGpu(kernels_gpu.take_active(values_BL, marks))
    return DenseLatents(values_BL, n_active=marks.n_active)


def parts_of(values_BL: torch.Tensor, edges: Sequence[int], sparse_below: float | None = None) -> list[Latents]:
    """`latents_of` for each range of latents between two edges; [0, L] gives one matrix."""
    if len(edges) == 2:
        return [latents_of(values_BL, sparse_below)]
    return [latents_of(values_BL[:, low:high].contiguous(), sparse_below) for low, high in pairwise(edges)]


def latents_of_active(active: Active, sparse_below: float | None = None) -> Latents:
    """The same, on the CPU, of entries that were taken already."""
    if sparse_below is None:
        sparse_below = default_sparse_below("cpu")
    if len(active.values) < sparse_below * active.n_tokens * (len(active.starts) - 1):
        return CscLatentsCpu(active)
    return DenseLatents(torch.from_numpy(active.to_dense()))


def latents_of_found(found: Any, n_latents: int, sparse_below: float | None = None) -> Latents:
    """The same, on a GPU, of entries that were taken already: `kernels_gpu.ByToken`."""
    from . import kernels_gpu  # needs triton

    if sparse_below is None:
        sparse_below = default_sparse_below("cuda")
    n_active, n_tokens = len(found.values), len(found.counts)
    if n_active < sparse_below * n_tokens * n_latents:
        return CscLatentsGpu(kernels_gpu.sorted_by_latent(found, n_latents))
    dense_BL = found.values.new_zeros(n_tokens, n_latents)
    tokens = torch.repeat_interleave(found.counts, output_size=n_active)
    dense_BL[tokens, found.latents.long()] = found.values
    return DenseLatents(dense_BL)


def find_few(z_BL: torch.Tensor) -> Active | None:
    """The entries above 0 (or NaN) of float32 latents (B, L) on the CPU; None if they are too many to be worth it."""
    use_kernels_with_torch_threads()
    return kernels_cpu.find_active(z_BL.detach().numpy(), most=SPARSE_BELOW * z_BL.numel())[1]


def default_sparse_below(device: str) -> float:
    """The density below which the form is CSC, on a kind of device."""
    return SPARSE_BELOW_ON_GPU if device == "cuda" else SPARSE_BELOW


class DenseLatents:
    """All B x L values; products are dense, on any device."""

    def __init__(self, values_BL: torch.Tensor, n_active: int | None = None) -> None:
        self._values_BL = values_BL.relu_()
        self._is_on = values_BL > 0
        self.n_active = int(self._is_on.sum()) if n_active is None else n_active  # counted once: 2% of a step
        # rows in float32 first: all in float64 takes 15 times as long
        row_dtype = torch.promote_types(values_BL.dtype, torch.float32)
        self.total: torch.Tensor | float = values_BL.sum(1, dtype=row_dtype).sum(dtype=torch.float64)
        self.fired = values_BL.amax(0) > 0 if len(values_BL) else self._is_on.any(0)

    def count(self) -> torch.Tensor:
        return self._is_on.sum(0)

    def without_values(self) -> "DenseLatents":
        self._values_BL.zero_()
        return self

    def decoded(self, W_dec: torch.Tensor, b_dec: torch.Tensor) -> torch.Tensor:
        out_BD = b_dec.repeat(len(self._values_BL), 1)
        add_product(out_BD, self._values_BL.to(W_dec.dtype), W_dec)
        return out_BD

    def add_gradients(
        self,
        W_dec: torch.Tensor,
        d_x_hat_BD: torch.Tensor,
        centred_BD: torch.Tensor,
        penalty: float,
        grad_W_enc: torch.Tensor,
        grad_b_enc: torch.Tensor,
        grad_W_dec: torch.Tensor,
    ) -> None:
        add_product(grad_W_dec, self._values_BL.to(W_dec.dtype).T, d_x_hat_BD)
        d_z_BL = (d_x_hat_BD @ W_dec.T).add_(penalty).mul_(self._is_on)
        add_product(grad_W_enc, centred_BD.to(d_z_BL.dtype).T, d_z_BL)
        grad_b_enc += d_z_BL.sum(0, dtype=grad_b_enc.dtype)

    def add_products(
        self, W_dec: torch.Tensor, d_x_hat_BD: torch.Tensor, factor_L: torch.Tensor, out_L: torch.Tensor
    ) -> None:
        out_L += factor_L * (d_x_hat_BD @ W_dec.T).mul_(self._is_on).sum(0, dtype=out_L.dtype)


class CscLatentsCpu:
    """The active values, sorted by latent; numba kernels."""

    def __init__(self, active: Active) -> None:
        self._active = active
        self.n_active = len(active.values)
        self.total: torch.Tensor | float = float(active.values.sum(dtype="f8"))
        self.fired = torch.from_numpy(active.fired)

    def count(self) -> torch.Tensor:
        return torch.from_numpy(self._active.counts)

    def without_values(self) -> "CscLatentsCpu":
        self._active.values[:] = 0
        return self

    def decoded(self, W_dec: torch.Tensor, b_dec: torch.Tensor) -> torch.Tensor:
        out_BD = b_dec.repeat(self._active.n_tokens, 1)
        kernels_cpu.add_decoded(self._active, W_dec.numpy(), out_BD.numpy())
        return out_BD

    def add_gradients(
        self,
        W_dec: torch.Tensor,
        d_x_hat_BD: torch.Tensor,
        centred_BD: torch.Tensor,
        penalty: float,
        grad_W_enc: torch.Tensor,
        grad_b_enc: torch.Tensor,
        grad_W_dec: torch.Tensor,
    ) -> None:
        kernels_cpu.add_gradients(
            self._active,
            W_dec_LD=W_dec.numpy(),
            d_x_hat_BD=d_x_hat_BD.numpy(),
            centred_BD=centred_BD.numpy(),
            penalty=penalty,
            grad_W_enc_LD=grad_W_enc.T.numpy(),
            grad_b_enc_L=grad_b_enc.numpy(),
            grad_W_dec_LD=grad_W_dec.numpy(),
        )

    def add_products(
        self, W_dec: torch.Tensor, d_x_hat_BD: torch.Tensor, factor_L: torch.Tensor, out_L: torch.Tensor
    ) -> None:
        products_L = kernels_cpu.sum_products(self._active, W_dec.numpy(), d_x_hat_BD.numpy())
        out_L += factor_L * torch.from_numpy(products_L)


class CscLatentsGpu:
    """The active values, sorted by latent and by token; Triton kernels."""

    def __init__(self, active: Any) -> None:
        self._active = active  # kernels_gpu.Active
        self.n_active = len(active.values)
        self.total: torch.Tensor | float = active.values.sum(dtype=torch.float64)
        self.fired: torch.Tensor = active.fired

    def count(self) -> torch.Tensor:
        counts_L: torch.Tensor = self._active.starts.diff()
        return counts_L

    def without_values(self) -> "CscLatentsGpu":
        self._active.values.zero_()
        self._active.token_values.zero_()
        return self

    def decoded(self, W_dec: torch.Tensor, b_dec: torch.Tensor) -> torch.Tensor:
        from . import kernels_gpu

        out_BD = b_dec.repeat(len(self._active.token_starts) - 1, 1)
        kernels_gpu.add_decoded(self._active, W_dec, out_BD)
        return out_BD

    def add_gradients(
        self,
        W_dec: torch.Tensor,
        d_x_hat_BD: torch.Tensor,
        centred_BD: torch.Tensor,
        penalty: float,
        grad_W_enc: torch.Tensor,
        grad_b_enc: torch.Tensor,
        grad_W_dec: torch.Tensor,
    ) -> None:
        from . import kernels_gpu

        kernels_gpu.add_gradients(
            self._active,
            W_dec_LD=W_dec,
            d_x_hat_BD=d_x_hat_BD,
            centred_BD=centred_BD,
            penalty=penalty,
            grad_W_enc_LD=grad_W_enc.T,
            grad_b_enc_L=grad_b_enc,
            grad_W_dec_LD=grad_W_dec,
        )

    def add_products(
        self, W_dec: torch.Tensor, d_x_hat_BD: torch.Tensor, factor_L: torch.Tensor, out_L: torch.Tensor
    ) -> None:
        products_L = torch.zeros_like(out_L)  # the gradient of b_enc without a penalty; the other two are not used
        unused = [torch.zeros(W_dec.shape, dtype=out_L.dtype, device=out_L.device) for _ in range(2)]
        self.add_gradients(W_dec, d_x_hat_BD, d_x_hat_BD, 0.0, unused[0].T, products_L, unused[1])
        out_L += factor_L * products_L
