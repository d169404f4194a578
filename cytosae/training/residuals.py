"""What follows from a micro-batch's reconstruction, value by value: the gradient, and the sums that losses.py needs.

A dozen passes over (tokens, width) are nothing beside the products on a CPU; on a GPU they would cost as much as
finding the active latents, so there it is one (kernels_gpu.py). Nothing is read back from the device here.
Shapes: B tokens, D width.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Residuals:
    """x_hat against x, with error = x_hat - x."""

    d_x_hat_BD: torch.Tensor  # factor * weight * error: the gradient, in the type of the products' operands
    d_sum_D: torch.Tensor  # its sum over the tokens, before it was rounded
    weighted: torch.Tensor  # () float64, as those below: sum of weight * error^2
    error: torch.Tensor  # sum of error^2
    square: torch.Tensor  # sum of x^2
    x_sum_D: torch.Tensor  # float64


def compare_reconstruction(
    x_hat_BD: torch.Tensor, x_BD: torch.Tensor, w_B1: torch.Tensor | float, factor: float, half: torch.dtype
) -> Residuals:
    """Compare a reconstruction with its tokens; weights are (B, 1), or one number for all tokens."""
    compare_here = compare_in_one_pass if x_BD.is_cuda else compare_plainly
    return compare_here(x_hat_BD, x_BD, w_B1, factor, half)


def compare_plainly(
    x_hat_BD: torch.Tensor, x_BD: torch.Tensor, w_B1: torch.Tensor | float, factor: float, half: torch.dtype
) -> Residuals:
    """In a dozen passes, of any float type."""
    error_BD = x_hat_BD - x_BD
    d_x_hat_BD = error_BD * w_B1 * factor
    return Residuals(
        d_x_hat_BD.to(half),
        d_x_hat_BD.sum(0),
        _sum(error_BD.square() * w_B1),
        _sum(error_BD.square()),
        _sum(x_BD.square()),
        x_BD.sum(0, dtype=torch.float64),
    )


def compare_in_one_pass(
    x_hat_BD: torch.Tensor, x_BD: torch.Tensor, w_B1: torch.Tensor | float, factor: float, half: torch.dtype
) -> Residuals:
    """Of float32 matrices on a GPU."""
    from . import kernels_gpu  # needs triton

    weights_B = w_B1.flatten() if isinstance(w_B1, torch.Tensor) else x_BD.new_full(x_BD.shape[:1], w_B1)
    d_x_hat_BD = torch.empty_like(x_BD, dtype=half)
    d_sum_D, x_sum_D, sums = kernels_gpu.compare_tokens(x_hat_BD, x_BD, weights_B, factor, d_x_hat_BD)
    weighted, error, square = sums.unbind()
    return Residuals(d_x_hat_BD, d_sum_D, weighted, error, square, x_sum_D)


def _sum(values: torch.Tensor) -> torch.Tensor:
    return values.sum(dtype=torch.float64)
