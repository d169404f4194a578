"""Nested (Matryoshka) dictionaries: the first latents must reconstruct the tokens on their own (arXiv 2503.17547).

With edges 0 = m_0 < m_1 < ... < m_G = L and w_x of losses.py, x_hat_g = sum over s < m_g of z_s W_dec[s] + b_dec:

    mean(M) = 1/G sum_g mean(w_x (x_hat_g - x)^2)

The paper has the sum; the mean keeps the weights of the other terms comparable. So a latent of range h gets the mean of
the gradients of x_hat_h to x_hat_G, and b_dec that of all. x_hat without an index is x_hat_G. In use such an SAE is one
of its activation, without a difference. Twin: tests/cytosae/training/test_nested.py.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import torch

from .latent_matrix import Latents
from .residuals import Residuals, compare_reconstruction


def nested_edges(nested: Sequence[float] | None, n_latents: int) -> list[int]:
    """[0, m_1, ..., L] of the shares of `TrainConfig.nested`; [0, L] for None. Ranges that are empty are left out."""
    edges = [0, *(round(share * n_latents) for share in nested or ()), n_latents]
    return sorted(set(edges))


def add_nested(
    parts: Sequence[Latents],
    edges: Sequence[int],
    W_dec: torch.Tensor,
    b_dec: torch.Tensor,
    x_BD: torch.Tensor,
    w_B1: torch.Tensor | float,
    centred_BD: torch.Tensor,
    *,
    factor: float,
    penalty: float,
    compute_dtype: torch.dtype,
    grads: dict[str, torch.Tensor],
) -> tuple[torch.Tensor, Residuals]:
    """Add the gradients of encoder and decoder (not of b_dec), as `Latents.add_gradients`; (x_hat, its comparison).

    The comparison is of x_hat_G, but `weighted` and `d_sum_D` are of the mean over g.

    parts : the latents of each range between two of `edges`
    factor : as in `compare_reconstruction`, of the mean over g
    """
    n_nested = len(parts)
    x_hats: list[torch.Tensor] = []
    zeros_D = torch.zeros_like(b_dec)
    for part, (low, high) in zip(parts, pairwise(edges), strict=True):
        x_hats.append(part.decoded(W_dec[low:high], zeros_D if x_hats else b_dec))
    x_hats = list(accumulate(x_hats))
    found = [compare_reconstruction(x_hat, x_BD, w_B1, factor / n_nested, compute_dtype) for x_hat in x_hats]
    d_x_hats = list(accumulate(each.d_x_hat_BD.to(x_BD.dtype) for each in reversed(found)))[::-1]
    for part, d_x_hat_BD, (low, high) in zip(parts, d_x_hats, pairwise(edges), strict=True):
        part.add_gradients(
            *(W_dec[low:high], d_x_hat_BD.to(compute_dtype), centred_BD, penalty),
            *(grads["W_enc"][:, low:high], grads["b_enc"][low:high], grads["W_dec"][low:high]),
        )
    together = replace(
        found[-1],
        d_sum_D=torch.stack([each.d_sum_D for each in found]).sum(0),
        weighted=torch.stack([each.weighted for each in found]).sum() / n_nested,
    )
    return x_hats[-1], together
