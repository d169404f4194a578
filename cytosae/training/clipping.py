"""Gradients that are scaled down to a norm, so that a single batch cannot move the weights far.

Twin: `torch.nn.utils.clip_grad_norm_`, in tests/cytosae/training/test_clipping.py.
"""

import torch

from cytosae.sae import SparseAutoencoder


@torch.no_grad()
def clip_gradients_(model: SparseAutoencoder, most: float) -> None:
    """Scale the gradients of all weights, in place, so that their norm, all taken together, is at most `most` > 0.

    The host waits for the device on the CPU only. Where ranks have summed their gradients, all do the same.
    """
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    # a transposed weight is dense in memory, which is all that a norm needs
    flat = [grad.T if grad.dim() == 2 and not grad.is_contiguous() else grad for grad in grads]
    norm = torch.stack([torch.linalg.vector_norm(grad) for grad in flat]).norm()
    if norm.is_cuda:
        torch._foreach_mul_(flat, (most / norm).clamp_max_(1.0))
    elif not norm <= most:  # one pass over the gradients less in most steps; NaN goes on into the weights
        torch._foreach_mul_(flat, most / float(norm))
