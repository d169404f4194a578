"""A matrix that is not trained: what a run with `frozen` is compared with (arXiv 2602.14111, frozen baselines).

Without a gradient Adam leaves a weight as it is: both its moments stay 0. Decoder rows are scaled to norm 1 as ever,
which changes rows of norm 1 in the last bits.
"""

import torch

from cytosae.sae import SparseAutoencoder


@torch.no_grad()
def drop_frozen_gradient(model: SparseAutoencoder, frozen: str) -> None:
    """Set the gradient of the frozen matrix to 0, in place.

    frozen : encoder, decoder or none
    """
    weight = {"encoder": model.W_enc, "decoder": model.W_dec}.get(frozen)
    if weight is not None and weight.grad is not None:
        weight.grad.zero_()
