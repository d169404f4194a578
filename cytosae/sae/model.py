"""The sparse autoencoder of CytoSAE (arXiv 2507.12464, section 2) and its variants: what they are, not how they learn.

Shapes: B tokens, D width of a token, L latents. Both matrices are stored as the released code stores them.
"""

import math

import torch
from torch import nn

from stores.errors import BadInput

from .config import ACTIVATIONS
from .top_k import keep_top_k_


class SparseAutoencoder(nn.Module):
    """p = (x - b_dec) W_enc + b_enc;  z = activation(p);  x_hat = z W_dec + b_dec.

    Activations (z is 0 wherever p <= 0):

    relu       p
    topk       p where it is among the token's k largest (Gao et al., arXiv 2406.04093)
    batchtopk  p where p > threshold, a running mean of what it took to be among a batch's k x B largest
               (Bussmann et al., arXiv 2412.06410)
    jumprelu   p where p > exp(log_threshold) (Rajamanoharan et al., arXiv 2407.14435)
    gated      ReLU(exp(r_mag) (x - b_dec) W_enc + b_mag) where p > 0 (Rajamanoharan et al., arXiv 2404.16014)
    """

    def __init__(self, width: int, n_latents: int, activation: str = "relu", k: int | None = None) -> None:
        """`k`: of topk and batchtopk. Raises BadInput for another activation, or a k that does not fit."""
        super().__init__()
        if activation not in ACTIVATIONS:
            raise BadInput(f"the activation must be one of {', '.join(ACTIVATIONS)}; found {activation!r}")
        if activation in ("topk", "batchtopk") and not (k is not None and 1 <= k <= n_latents):
            raise BadInput(f"k must lie between 1 and the {n_latents:,} latents; found {k}")
        self.activation, self.k = activation, k
        # (D, L), stored by latent, as training/kernels_cpu.py reads them
        self.W_enc = nn.Parameter(torch.empty(n_latents, width).T)
        self.b_enc = nn.Parameter(torch.zeros(n_latents))  # (L,)
        self.W_dec = nn.Parameter(torch.empty(n_latents, width))  # (L, D), rows of norm 1
        self.b_dec = nn.Parameter(torch.zeros(width))  # (D,)
        if activation == "batchtopk":
            self.threshold: torch.Tensor
            self.register_buffer("threshold", torch.zeros(()))
        if activation == "jumprelu":
            self.log_threshold = nn.Parameter(torch.zeros(n_latents))
        if activation == "gated":
            self.r_mag = nn.Parameter(torch.zeros(n_latents))
            self.b_mag = nn.Parameter(torch.zeros(n_latents))

    @property
    def width(self) -> int:
        """D: channels of a token."""
        return self.W_enc.shape[0]

    @property
    def n_latents(self) -> int:
        """L: number of latents."""
        return self.W_enc.shape[1]

    def pre_activations(self, tokens_BD: torch.Tensor) -> torch.Tensor:
        """(B, D) -> p (B, L)."""
        return torch.addmm(self.b_enc, tokens_BD - self.b_dec, self.W_enc)

    def keep_active_(self, pre_activations_BL: torch.Tensor) -> torch.Tensor:
        """In place: what is above 0 afterwards is active, and its latent's value; the rest is not. Returns it.

        NaN stays NaN, so that it is not lost.
        """
        p_BL = pre_activations_BL
        if self.activation == "topk":
            assert self.k is not None
            return keep_top_k_(p_BL, self.k)
        if self.activation == "batchtopk":
            return p_BL.masked_fill_(p_BL <= self.threshold, 0)
        if self.activation == "jumprelu":
            return p_BL.masked_fill_(p_BL <= self.log_threshold.exp(), 0)
        if self.activation == "gated":
            is_off = p_BL <= 0
            return p_BL.sub_(self.b_enc).mul_(self.r_mag.exp()).add_(self.b_mag).masked_fill_(is_off, 0)
        return p_BL

    def encode(self, tokens_BD: torch.Tensor) -> torch.Tensor:
        """(B, D) -> dense latents (B, L), all >= 0. For use, not for training: losses.py has the gradients."""
        return self.keep_active_(self.pre_activations(tokens_BD)).relu_()

    def decode(self, latents_BL: torch.Tensor) -> torch.Tensor:
        """(B, L) -> reconstruction (B, D)."""
        return torch.addmm(self.b_dec, latents_BL, self.W_dec)

    def forward(self, tokens_BD: torch.Tensor) -> torch.Tensor:
        """(B, D) -> reconstruction (B, D)."""
        return self.decode(self.encode(tokens_BD))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator, *, threshold: float = 1e-3) -> None:
        """The released start (docs/reference/paper.md 4.2): Kaiming-uniform, the fans as released, not tied; biases 0.

        threshold : where jumprelu's thresholds begin
        """
        for weight, fan_in in ((self.W_enc, self.n_latents), (self.W_dec, self.width)):
            bound = math.sqrt(6 / fan_in)
            weight.copy_(torch.empty(weight.shape).uniform_(-bound, bound, generator=generator))
        self.b_enc.zero_()
        if self.activation == "jumprelu":
            self.log_threshold.fill_(math.log(threshold))
        self.normalise_decoder()

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        """Every decoder row to norm 1 (a zero row stays zero)."""
        self.W_dec.div_(_norms(self.W_dec)[:, None])

    @torch.no_grad()
    def fold_decoder_norm(self) -> None:
        """Decoder rows to norm 1, their norm moved into the encoder, so that the reconstruction stays the same.

        Not for topk and batchtopk, where it would change which latents are the largest: there the norm is dropped.
        """
        norm_L = _norms(self.W_dec)
        self.W_dec.div_(norm_L[:, None])
        if self.activation == "gated":
            self.r_mag.add_(norm_L.log())
            self.b_mag.mul_(norm_L)
        elif self.activation in ("relu", "jumprelu"):
            self.W_enc.mul_(norm_L)
            self.b_enc.mul_(norm_L)
        if self.activation == "jumprelu":
            self.log_threshold.add_(norm_L.log())

    @torch.no_grad()
    def fold_token_scale(self, scale: float) -> None:
        """From an SAE of tokens that were multiplied by `scale` to one of the tokens themselves: latents / scale."""
        self.b_dec.div_(scale)
        self.b_enc.div_(scale)
        if self.activation == "batchtopk":
            self.threshold.div_(scale)
        if self.activation == "jumprelu":
            self.log_threshold.sub_(math.log(scale))
        if self.activation == "gated":
            self.b_mag.div_(scale)


def _norms(rows_LD: torch.Tensor) -> torch.Tensor:
    """(L,): what to divide a row by, 1 for a zero row."""
    norm_L = rows_LD.norm(dim=1)
    norm_L[norm_L == 0] = 1
    return norm_L


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
