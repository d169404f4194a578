"""A micro-batch's reconstruction compared with its tokens: the gradient, and the sums that losses.py needs.

On a CPU about twelve passes over (tokens, width) take little time beside the matrix products. On a GPU they would take
as long as finding the active latents, so one kernel does all of it (kernels_gpu.py). The host never waits here.
Shapes: B tokens, D width.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Residuals:
    """Results of the comparison, with error = x_hat - x."""

    d_x_hat_BD: torch.Tensor  # gradient of the loss: factor * weight * error, in `compute_dtype`
    d_sum_D: torch.Tensor  # its sum over the tokens, computed before rounding to `compute_dtype`
    weighted: torch.Tensor  # () float64: sum of weight * error^2
    error: torch.Tensor  # () float64: sum of error^2
    square: torch.Tensor  # () float64: sum of x^2
    x_sum_D: torch.Tensor  # float64: sum of x over the tokens


def compare_reconstruction(
    x_hat_BD: torch.Tensor, x_BD: torch.Tensor, w_B1: torch.Tensor | float, factor: float, compute_dtype: torch.dtype
) -> Residuals:
    """Compare a reconstruction with its tokens, in the way that is faster on their device.

    w_B1 : weight of each token's squared errors, (B, 1) or one number for all tokens
    factor : of the gradient: d_x_hat = factor * weight * error
    compute_dtype : type of the returned gradient, which goes into matrix products
    """
    compare_here = compare_in_one_pass if x_BD.is_cuda else compare_plainly
    return compare_here(x_hat_BD, x_BD, w_B1, factor, compute_dtype)


def compare_plainly(
    x_hat_BD: torch.Tensor, x_BD: torch.Tensor, w_B1: torch.Tensor | float, factor: float, compute_dtype: torch.dtype
) -> Residuals:
    """In PyTorch operations: any device, any float type."""
    error_BD = x_hat_BD - x_BD
    d_x_hat_BD = error_BD * w_B1 * factor
    return Residuals(
        d_x_hat_BD.to(compute_dtype),
        d_x_hat_BD.sum(0),
        _sum(error_BD.square() * w_B1),
        _sum(error_BD.square()),
        _sum(x_BD.square()),
        x_BD.sum(0, dtype=torch.float64),
    )


def compare_in_one_pass(
    x_hat_BD: torch.Tensor, x_BD: torch.Tensor, w_B1: torch.Tensor | float, factor: float, compute_dtype: torch.dtype
) -> Residuals:
    """In one kernel: float32 matrices on a GPU."""
    from . import kernels_gpu  # needs triton

    weights_B = w_B1.flatten() if isinstance(w_B1, torch.Tensor) else x_BD.new_full(x_BD.shape[:1], w_B1)
    d_x_hat_BD = torch.empty_like(x_BD, dtype=compute_dtype)
    d_sum_D, x_sum_D, sums = kernels_gpu.compare_tokens(x_hat_BD, x_BD, weights_B, factor, d_x_hat_BD)
    weighted, error, square = sums.unbind()
    return Residuals(d_x_hat_BD, d_sum_D, weighted, error, square, x_sum_D)


def _sum(values: torch.Tensor) -> torch.Tensor:
    return values.sum(dtype=torch.float64)
