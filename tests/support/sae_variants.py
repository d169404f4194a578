"""What test_variants.py and other tests share."""

import torch

from cytosae.sae import SparseAutoencoder

K, L1, BANDWIDTH = 5, 1e-2, 0.1


def make_model(activation: str, seed: int = 0, *, width: int = 8, n_latents: int = 40) -> SparseAutoencoder:
    """Released starting weights, and everything else moved away from its start."""
    draws = torch.Generator().manual_seed(seed)
    model = SparseAutoencoder(width, n_latents, activation, K if "topk" in activation else None)
    model.init_weights(draws)
    with torch.no_grad():
        model.b_enc.copy_(0.05 * torch.randn(n_latents, generator=draws))
        model.b_dec.copy_(torch.randn(width, generator=draws))
        if activation == "jumprelu":
            model.log_threshold.copy_(torch.log(0.05 + 0.3 * torch.rand(n_latents, generator=draws)))
        if activation == "gated":
            model.r_mag.copy_(0.3 * torch.randn(n_latents, generator=draws))
            model.b_mag.copy_(0.2 * torch.randn(n_latents, generator=draws))
        if activation == "batchtopk":
            model.threshold.fill_(0.3)
    return model
