"""The latents of a micro-batch in a training step: as a matrix, or as a list of what is active.

Both give the same sums; which one is faster hangs on the density. The lists' work is compiled: kernels_cpu.py for
the CPU, kernels_gpu.py for the GPU. Weights and rows may be bfloat16 copies (not in the CPU's lists); sums are float32.
Shapes: B tokens of a micro-batch, D width, L latents.
"""

from typing import Any, Protocol

import torch

from cytosae.sae import use_kernels_with_torch_threads

from . import kernels_cpu

SPARSE_BELOW = 0.08  # density of break-even: 0.10 at 49,152 latents, 0.20 at 6,144 (two cores, docs/log.md)
SPARSE_BELOW_ON_GPU = 0.01  # an estimate: tensor cores make dense work cheap (docs/log.md)


class Latents(Protocol):
    """Latents z (B, L), and what is computed with them."""

    n_active: int
    total: torch.Tensor | float  # sum of all values; stays on the device
    fired: torch.Tensor  # (L,) bool: active on any token

    def count(self) -> torch.Tensor:
        """(L,): tokens on which each is active."""

    def without_values(self) -> "Latents":
        """The same ones active, but their values 0, so that the decoder gets no gradient. The old ones are lost."""

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
        """Of W_enc (D, L), b_enc and W_dec: those of a loss with gradient d_x_hat, and `penalty` at each active one."""

    def add_products(
        self, W_dec: torch.Tensor, d_x_hat_BD: torch.Tensor, factor_L: torch.Tensor, out_L: torch.Tensor
    ) -> None:
        """out += factor * sum over a latent's active tokens of <d_x_hat, W_dec row>."""


def latents_of(values_BL: torch.Tensor, sparse_below: float | None = None) -> Latents:
    """What is above 0 in a matrix that is given away, in the form that is faster at its density.

    sparse_below : density below which it is a list; 0: never; default: where the two break even
    """
    device = values_BL.device.type
    if sparse_below is None:
        sparse_below = SPARSE_BELOW_ON_GPU if device == "cuda" else SPARSE_BELOW
    if sparse_below <= 0 or device not in ("cpu", "cuda") or (device == "cpu" and values_BL.dtype == torch.bfloat16):
        return _Matrix(values_BL)
    if device == "cpu":
        use_kernels_with_torch_threads()
        counts = kernels_cpu.count_active(values_BL.numpy())
        if counts.sum() < sparse_below * values_BL.numel():
            return _CpuList(kernels_cpu.take_active(values_BL.numpy(), counts))
        return _Matrix(values_BL, n_active=int(counts.sum()))
    from . import kernels_gpu  # needs triton

    marks = kernels_gpu.mark_active(values_BL)
    if marks.n_active < sparse_below * values_BL.numel():
        return _GpuList(kernels_gpu.take_active(values_BL, marks))
    return _Matrix(values_BL, n_active=marks.n_active)


class _Matrix:
    def __init__(self, values_BL: torch.Tensor, n_active: int | None = None) -> None:
        self._values_BL = values_BL.relu_()
        self._is_on = values_BL > 0
        self.n_active = int(self._is_on.sum()) if n_active is None else n_active  # counting twice costs 2% of a step
        # all in float64 takes 15 times as long
        self.total: torch.Tensor | float = values_BL.sum(1).sum(dtype=torch.float64)
        self.fired = values_BL.amax(0) > 0 if len(values_BL) else self._is_on.any(0)

    def count(self) -> torch.Tensor:
        return self._is_on.sum(0)

    def without_values(self) -> "_Matrix":
        self._values_BL.zero_()
        return self

    def decoded(self, W_dec: torch.Tensor, b_dec: torch.Tensor) -> torch.Tensor:
        out_BD = b_dec.repeat(len(self._values_BL), 1)
        add_product(out_BD, self._values_BL, W_dec)
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
        add_product(grad_W_dec, self._values_BL.T, d_x_hat_BD)
        d_z_BL = (d_x_hat_BD @ W_dec.T).add_(penalty).mul_(self._is_on)
        add_product(grad_W_enc, centred_BD.T, d_z_BL)
        grad_b_enc += d_z_BL.sum(0, dtype=grad_b_enc.dtype)

    def add_products(
        self, W_dec: torch.Tensor, d_x_hat_BD: torch.Tensor, factor_L: torch.Tensor, out_L: torch.Tensor
    ) -> None:
        out_L += factor_L * (d_x_hat_BD @ W_dec.T).mul_(self._is_on).sum(0, dtype=out_L.dtype)


class _CpuList:
    def __init__(self, active: kernels_cpu.Active) -> None:
        self._active = active
        self.n_active = len(active.values)
        self.total: torch.Tensor | float = float(active.values.sum(dtype="f8"))
        self.fired = torch.from_numpy(active.fired)

    def count(self) -> torch.Tensor:
        return torch.from_numpy(self._active.counts)

    def without_values(self) -> "_CpuList":
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


class _GpuList:
    def __init__(self, active: Any) -> None:
        self._active = active  # kernels_gpu.Active
        self.n_active = len(active.values)
        self.total: torch.Tensor | float = active.values.sum(dtype=torch.float64)
        self.fired: torch.Tensor = active.fired

    def count(self) -> torch.Tensor:
        counts_L: torch.Tensor = self._active.starts.diff()
        return counts_L

    def without_values(self) -> "_GpuList":
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
        products_L = torch.zeros_like(out_L)  # b_enc's gradient without a penalty; the rest is dropped
        dropped = [torch.zeros(W_dec.shape, dtype=out_L.dtype, device=out_L.device) for _ in range(2)]
        self.add_gradients(W_dec, d_x_hat_BD, d_x_hat_BD, 0.0, dropped[0].T, products_L, dropped[1])
        out_L += factor_L * products_L


def add_product(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """out += left right, whose type is that of `out`, or bfloat16."""
    if left.dtype == out.dtype:
        out.addmm_(left, right)
    else:
        out += left @ right
