"""The sparse autoencoder of CytoSAE (arXiv 2507.12464, section 2): what it is, not how it is trained.

Shapes: B tokens, D width of a token, L latents. Both matrices are stored as the released code stores them.
"""

import math

import torch
from torch import nn


class SparseAutoencoder(nn.Module):
    """z = ReLU((x - b_dec) W_enc + b_enc);  x_hat = z W_dec + b_dec."""

    def __init__(self, width: int, n_latents: int) -> None:
        super().__init__()
        self.W_enc = nn.Parameter(
            torch.empty(n_latents, width).T
        )  # (D, L), stored by latent as sparse_kernels.py works
        self.b_enc = nn.Parameter(torch.zeros(n_latents))  # (L,)
        self.W_dec = nn.Parameter(torch.empty(n_latents, width))  # (L, D), rows of norm 1
        self.b_dec = nn.Parameter(torch.zeros(width))  # (D,)

    @property
    def width(self) -> int:
        """D: channels of a token."""
        return self.W_enc.shape[0]

    @property
    def n_latents(self) -> int:
        """L: number of latents."""
        return self.W_enc.shape[1]

    def pre_activations(self, tokens_BD: torch.Tensor) -> torch.Tensor:
        """(B, D) -> (B, L): a latent is active where this is above 0."""
        return torch.addmm(self.b_enc, tokens_BD - self.b_dec, self.W_enc)

    def keep_active_(self, pre_activations_BL: torch.Tensor) -> torch.Tensor:
        """In place: what is above 0 afterwards is active, and its latent's value; the rest is not. Returns it."""
        return pre_activations_BL

    def encode(self, tokens_BD: torch.Tensor) -> torch.Tensor:
        """(B, D) -> dense latents (B, L), all >= 0."""
        return self.keep_active_(self.pre_activations(tokens_BD)).relu_()

    def decode(self, latents_BL: torch.Tensor) -> torch.Tensor:
        """(B, L) -> reconstruction (B, D)."""
        return torch.addmm(self.b_dec, latents_BL, self.W_dec)

    def forward(self, tokens_BD: torch.Tensor) -> torch.Tensor:
        """(B, D) -> reconstruction (B, D)."""
        return self.decode(self.encode(tokens_BD))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """The released start (REFERENCE.md 4.2): Kaiming-uniform with the fans as released, not tied; b_enc = 0."""
        for weight, fan_in in ((self.W_enc, self.n_latents), (self.W_dec, self.width)):
            bound = math.sqrt(6 / fan_in)
            weight.copy_(torch.empty(weight.shape).uniform_(-bound, bound, generator=generator))
        self.b_enc.zero_()
        self.normalise_decoder()

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        """Every decoder row to norm 1 (a zero row stays zero)."""
        norm_L1 = self.W_dec.norm(dim=1, keepdim=True)
        norm_L1[norm_L1 == 0] = 1
        self.W_dec.div_(norm_L1)

    @torch.no_grad()
    def fold_decoder_norm(self) -> None:
        """Decoder rows to norm 1, their norm moved into the encoder, so that the reconstruction stays the same."""
        norm_L = self.W_dec.norm(dim=1)
        norm_L[norm_L == 0] = 1
        self.W_dec.div_(norm_L[:, None])
        self.W_enc.mul_(norm_L)
        self.b_enc.mul_(norm_L)


@torch.no_grad()
def geometric_median(points_ND: torch.Tensor, *, n_rounds: int = 100) -> torch.Tensor:
    """(N, D) -> (D,): the point with the least sum of distances, by Weiszfeld's rounds from the mean.

    Weights are 1 / max(distance, 1e-6), as released. Points of more axes are flattened to vectors: (N, T, D) gives
    (T, D) with Frobenius distances.
    """
    flat = points_ND.reshape(len(points_ND), -1)
    median = flat.mean(0)
    for _ in range(n_rounds):
        weight_N = 1 / (flat - median).norm(dim=1).clamp_min(1e-6)
        median = (weight_N @ flat) / weight_N.sum()
    return median.reshape(points_ND.shape[1:])
