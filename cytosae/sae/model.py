"""The sparse autoencoder of CytoSAE (arXiv 2507.12464, section 2), and the same with other activations.

Shapes: B tokens, D width of a token, L latents. Both matrices are stored as the released code stores them.
"""

import math

import torch
from torch import nn

from stores.errors import BadInput

from .config import ACTIVATIONS
from .top_k import keep_top_k_


class SparseAutoencoder(nn.Module):
    """A sparse autoencoder: p = (x - b_dec) W_enc + b_enc;  z = activation(p);  x_hat = z W_dec + b_dec.

    x (B, D) are tokens, p (B, L) pre-activations, z (B, L) latents >= 0, x_hat (B, D) reconstructions. A latent is
    active on a token where z > 0. Activations (z is 0 wherever p <= 0):

    relu       p
    topk       p where it is among the token's k largest (Gao et al., arXiv 2406.04093)
    batchtopk  p where p > threshold, the running mean of the smallest of the k x B largest values of a batch
               (Bussmann et al., arXiv 2412.06410)
    jumprelu   p where p > exp(log_threshold) (Rajamanoharan et al., arXiv 2407.14435)
    gated      ReLU(exp(r_mag) (x - b_dec) W_enc + b_mag) where p > 0 (Rajamanoharan et al., arXiv 2404.16014)
    """

    def __init__(self, width: int, n_latents: int, activation: str = "relu", k: int | None = None) -> None:
        """An SAE whose matrices are not initialised (`init_weights`); biases are 0.

        Parameters
        ----------
        width : D, channels of a token
        n_latents : L
        activation : relu, topk, batchtopk, jumprelu or gated
        k : 1 to L, for topk and batchtopk only

        Raises
        ------
        BadInput
            For another activation, or a k that does not fit.
        """
        super().__init__()
        if activation not in ACTIVATIONS:
            raise BadInput(f"the activation must be one of {', '.join(ACTIVATIONS)}; found {activation!r}")
        if activation in ("topk", "batchtopk") and not (k is not None and 1 <= k <= n_latents):
            raise BadInput(f"k must lie between 1 and the {n_latents:,} latents; found {k}")
        self.activation, self.k = activation, k
        # (D, L), in memory transposed: one row per latent, as training/kernels_cpu.py reads it
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

    def pre_activations(self, tokens_BD: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """Tokens (B, D) -> pre-activations p (B, L), before the activation.

        out : (B, L) memory to write them into, without gradients: new memory costs a page fault for each 4 KiB
        """
        return torch.addmm(self.b_enc, tokens_BD - self.b_dec, self.W_enc, out=out)

    def keep_active_(self, pre_activations_BL: torch.Tensor) -> torch.Tensor:
        """Apply the activation to p (B, L) in place and return it; entries <= 0 afterwards are inactive (`relu_`).

        NaN stays NaN, so that it is noticed.
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
        """Tokens (B, D) -> dense latents (B, L), all >= 0, in the unit of the tokens.

        For inference; training has its own gradients (training/losses.py).
        """
        return self.keep_active_(self.pre_activations(tokens_BD)).relu_()

    def decode(self, latents_BL: torch.Tensor) -> torch.Tensor:
        """Latents (B, L) -> reconstructions (B, D)."""
        return torch.addmm(self.b_dec, latents_BL, self.W_dec)

    def forward(self, tokens_BD: torch.Tensor) -> torch.Tensor:
        """Tokens (B, D) -> reconstructions (B, D)."""
        return self.decode(self.encode(tokens_BD))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator, *, threshold: float = 1e-3, init: str = "kaiming") -> None:
        """Initialise in place as the released code does: Kaiming-uniform, biases 0, rows of norm 1.

        Source: docs/reference/paper.md 4.2.

        Bounds are sqrt(6 / L) for W_enc and sqrt(6 / D) for W_dec; the two matrices are drawn separately.

        threshold : initial threshold of jumprelu, > 0
        init : "transpose": W_enc is then the transpose of W_dec, so that a latent looks for what it stands for
            (Gao et al., arXiv 2406.04093, 2.4)
        """
        for weight, fan_in in ((self.W_enc, self.n_latents), (self.W_dec, self.width)):
            bound = math.sqrt(6 / fan_in)
            weight.copy_(torch.empty(weight.shape).uniform_(-bound, bound, generator=generator))
        self.b_enc.zero_()
        if self.activation == "jumprelu":
            self.log_threshold.fill_(math.log(threshold))
        self.normalise_decoder()
        if init == "transpose":
            self.W_enc.copy_(self.W_dec.T)

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        """Scale every decoder row to norm 1, in place (a zero row stays zero)."""
        self.W_dec.div_(_norms(self.W_dec)[:, None])

    @torch.no_grad()
    def fold_decoder_norm(self) -> None:
        """Scale decoder rows to norm 1 and move their norms into the encoder, in place: reconstructions do not change.

        For topk and batchtopk the norms are dropped: in the encoder they would change which latents are the largest.
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
        """Change, in place, an SAE of tokens multiplied by `scale` > 0 into one of the tokens themselves.

        Latents and reconstructions are divided by `scale`.
        """
        self.b_dec.div_(scale)
        self.b_enc.div_(scale)
        if self.activation == "batchtopk":
            self.threshold.div_(scale)
        if self.activation == "jumprelu":
            self.log_threshold.sub_(math.log(scale))
        if self.activation == "gated":
            self.b_mag.div_(scale)


def _norms(rows_LD: torch.Tensor) -> torch.Tensor:
    """(L,): norms of the rows, 1 for a zero row."""
    norm_L = rows_LD.norm(dim=1)
    norm_L[norm_L == 0] = 1
    return norm_L


@torch.no_grad()
def geometric_median(points_ND: torch.Tensor, *, n_rounds: int = 100) -> torch.Tensor:
    """The point with the smallest sum of Euclidean distances to N points, by Weiszfeld's algorithm from their mean.

    Weights are 1 / max(distance, 1e-6), as in the released code; the iteration stops after `n_rounds` rounds.

    points_ND : (N, D) gives (D,); (N, T, D) gives (T, D), with Frobenius distances
    """
    flat = points_ND.reshape(len(points_ND), -1)
    median = flat.mean(0)
    for _ in range(n_rounds):
        weight_N = 1 / (flat - median).norm(dim=1).clamp_min(1e-6)
        median = (weight_N @ flat) / weight_N.sum()
    return median.reshape(points_ND.shape[1:])
