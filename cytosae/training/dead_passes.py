"""Passes over a (tokens, dead latents) matrix that the term for dead latents needs between its products.

With half of the latents dead such a matrix is half as large as all pre-activations. On a GPU each function here is one
kernel, which reads and writes short numbers once (kernels_gpu.py); in PyTorch operations it was about 30 GB a step.
Shapes: B tokens of a micro-batch, N columns, K dead latents.
"""

import torch


def exp_of(p_BN: torch.Tensor, columns_K: torch.Tensor | None, dtype: torch.dtype, n_columns: int) -> torch.Tensor:
    """(B, n_columns): exp(p) of some columns, computed in float32 or longer, rounded to `dtype`; then columns of 0.

    columns_K : None: all columns, which may be overwritten
    n_columns : K or more
    """
    exp_here = exp_in_one_pass if p_BN.is_cuda else exp_plainly
    return exp_here(p_BN, columns_K, dtype, n_columns)


def times_slope_(d_z_BK: torch.Tensor, z_BK: torch.Tensor, slope: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(d_p = d_z dz/dp, in the memory of d_z; its sums over the tokens, (K,), summed in float32 or longer).

    slope : dz/dp is z (`exp`), or 1 where z > 0 (`relu`)
    """
    times_here = times_in_one_pass_ if d_z_BK.is_cuda else times_plainly_
    return times_here(d_z_BK, z_BK, slope)


def exp_plainly(p_BN: torch.Tensor, columns_K: torch.Tensor | None, dtype: torch.dtype, n_columns: int) -> torch.Tensor:
    """In PyTorch operations: any device, any float type."""
    p_BK = p_BN if columns_K is None else p_BN[:, columns_K]
    exp_BK = p_BK.to(_sum_dtype(p_BK)).exp_().to(dtype)
    return padded(exp_BK, n_columns)


def padded(values_BK: torch.Tensor, n_columns: int) -> torch.Tensor:
    """The values, and columns of 0 until there are `n_columns`."""
    n_more = n_columns - values_BK.shape[1]
    return torch.nn.functional.pad(values_BK, (0, n_more)) if n_more else values_BK


def times_plainly_(d_z_BK: torch.Tensor, z_BK: torch.Tensor, slope: str) -> tuple[torch.Tensor, torch.Tensor]:
    """In PyTorch operations: any device, any float type."""
    d_p_BK = d_z_BK.mul_(z_BK if slope == "exp" else z_BK > 0)
    return d_p_BK, d_p_BK.sum(0, dtype=_sum_dtype(d_p_BK))


def exp_in_one_pass(
    p_BN: torch.Tensor, columns_K: torch.Tensor | None, dtype: torch.dtype, n_columns: int
) -> torch.Tensor:
    """In one kernel, on a GPU."""
    from . import kernels_gpu  # needs triton

    return kernels_gpu.exp_of_columns(p_BN, columns_K, dtype, n_columns)


def times_in_one_pass_(d_z_BK: torch.Tensor, z_BK: torch.Tensor, slope: str) -> tuple[torch.Tensor, torch.Tensor]:
    """In one kernel, on a GPU; the sums are those before rounding."""
    from . import kernels_gpu  # needs triton

    return d_z_BK, kernels_gpu.times_slope_(d_z_BK, z_BK, is_exp=slope == "exp")


def _sum_dtype(values: torch.Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)
