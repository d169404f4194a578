"""What is done for latents that have fallen silent: ghost gradients, an auxiliary reconstruction, or a new start.

ghost (released; docs/reference/paper.md 4.2), with r = x - x_hat and K the dead latents:
    g = exp(p[:, K]) W_dec[K],  a = ||r|| / (1e-6 + 2 ||g||),  G = w_r (a g - r)^2;  r, a and w_r detached
    loss = mean(c G),  c = M / (G + 1e-6) element by element (released), or mean(M) / (mean(G) + 1e-6); detached
    w_r = 1 / ||r|| (loss "normed"), D ("eq1") or 1 ("mse")

auxk (Gao et al., arXiv 2406.04093, A.2): the k largest positive pre-activations among K reconstruct what is left over
    loss = weight * mean(w_x (z_aux W_dec[K] - r)^2);  r detached

resample (Bricken et al. 2023, "Towards Monosemanticity", Neuron Resampling): every so many steps a dead latent starts
anew at a token that is reconstructed badly, drawn with a probability that goes like its squared loss.

Shapes: B tokens of a micro-batch, D width, K dead latents.
"""

from typing import Protocol

import torch

from cytosae.sae import SparseAutoencoder, keep_top_k_

from .distributed import Ranks
from .latent_matrix import add_product

EPS = 1e-6
NORM_FLOOR = 1e-12
_RESAMPLED_ENCODER = 0.2  # of the mean norm of the living


class DeadGradients(Protocol):
    """Gradients that dead latents get, summed over micro-batches."""

    latents: torch.Tensor  # (K,)

    @property
    def loss(self) -> torch.Tensor | float:
        """The sum so far; stays on the device."""

    def add(
        self,
        p_BK: torch.Tensor,
        centred_BD: torch.Tensor,
        r_BD: torch.Tensor,
        M_BD: torch.Tensor,
        w_B1: torch.Tensor | float,
        *,
        n_values: int,
    ) -> None:
        """Add one micro-batch's share. p_BK is given away; centred_BD has the type of the products' operands;
        n_values: tokens of the batch times D.
        """

    def add_to(self, grads: dict[str, torch.Tensor], *, mse: float, loss: float) -> float:
        """Add them to the model's gradients; mse and loss are the whole batch's. Returns the term of the loss."""


def dead_gradients(
    model: SparseAutoencoder,
    dead_L: torch.Tensor | None,
    *,
    method: str,
    loss: str,
    ghost_scale: str,
    k: int | None,
    weight: float,
    half: torch.dtype = torch.float32,
) -> DeadGradients | None:
    """What sums the dead latents' gradients, or None if nothing is dead or nothing is done in a step.

    half : type of the operands of products
    """
    if dead_L is None or method not in ("ghost", "auxk"):
        return None
    latents = dead_L.nonzero().squeeze(1)  # waits for the device, once a step
    if not len(latents):
        return None
    if method == "ghost":
        return _Ghost(model, latents, loss, half, is_scalar=ghost_scale == "scalar")
    return _AuxK(model, latents, k or max(1, model.width // 2), weight, half)


class _Rows:
    """Weights of the dead latents, and room for their gradients."""

    def __init__(self, model: SparseAutoencoder, latents: torch.Tensor, half: torch.dtype) -> None:
        self.latents, self._half = latents, half
        W_dec_KD = model.W_dec.detach()[latents]
        self._W_dec_KD = W_dec_KD.to(half)
        self._of_W_enc_KD, self._of_W_dec_KD = torch.zeros_like(W_dec_KD), torch.zeros_like(W_dec_KD)
        self._of_b_enc_K = torch.zeros_like(model.b_enc.detach()[latents])

    def decoded(self, z_BK: torch.Tensor) -> torch.Tensor:
        """(B, D): z W_dec."""
        return (z_BK.to(self._half) @ self._W_dec_KD).to(z_BK.dtype)

    def add(self, d_out_BD: torch.Tensor, z_BK: torch.Tensor, dz_dp_BK: torch.Tensor, centred_BD: torch.Tensor) -> None:
        """Of the term z W_dec, whose gradient is d_out, with dz/dp."""
        half, d_out_half_BD = self._half, d_out_BD.to(self._half)
        add_product(self._of_W_dec_KD, z_BK.to(half).T, d_out_half_BD)
        d_p_BK = (d_out_half_BD @ self._W_dec_KD.T).to(d_out_BD.dtype).mul_(dz_dp_BK)
        add_product(self._of_W_enc_KD, d_p_BK.to(half).T, centred_BD)
        self._of_b_enc_K += d_p_BK.sum(0)

    def add_to(self, grads: dict[str, torch.Tensor], factor: float) -> None:
        grads["W_enc"].T.index_add_(0, self.latents, self._of_W_enc_KD, alpha=factor)
        grads["b_enc"].index_add_(0, self.latents, self._of_b_enc_K, alpha=factor)
        grads["W_dec"].index_add_(0, self.latents, self._of_W_dec_KD, alpha=factor)


class _Ghost:
    """Gradients of ghost (of mean(G), if its factor is a scalar, which is known only after the whole batch)."""

    def __init__(
        self, model: SparseAutoencoder, latents: torch.Tensor, loss: str, half: torch.dtype, *, is_scalar: bool
    ) -> None:
        self.latents, self._loss, self._is_scalar = latents, loss, is_scalar
        self._rows = _Rows(model, latents, half)
        self.loss: torch.Tensor | float = 0.0

    def add(
        self,
        p_BK: torch.Tensor,
        centred_BD: torch.Tensor,
        r_BD: torch.Tensor,
        M_BD: torch.Tensor,
        w_B1: torch.Tensor | float,
        *,
        n_values: int,
    ) -> None:
        exp_BK = p_BK.exp_()
        g_BD = self._rows.decoded(exp_BK)
        length_B1 = r_BD.norm(dim=1, keepdim=True)
        a_B1 = length_B1 / (EPS + 2 * g_BD.norm(dim=1, keepdim=True))
        w_r = {"normed": 1 / length_B1.clamp_min(NORM_FLOOR), "eq1": float(r_BD.shape[1]), "mse": 1.0}[self._loss]
        rest_BD = a_B1 * g_BD - r_BD
        G_BD = rest_BD.square() * w_r
        d_g_BD = rest_BD * (a_B1 * w_r * (2 / n_values))
        if not self._is_scalar:
            c_BD = M_BD / (G_BD + EPS)
            G_BD, d_g_BD = c_BD * G_BD, c_BD * d_g_BD
        self.loss += G_BD.sum(dtype=torch.float64) / n_values
        self._rows.add(d_g_BD, exp_BK, exp_BK, centred_BD)

    def add_to(self, grads: dict[str, torch.Tensor], *, mse: float, loss: float) -> float:
        factor = mse / (loss + EPS) if self._is_scalar else 1.0
        self._rows.add_to(grads, factor)
        return factor * loss


class _AuxK:
    """Gradients of the auxiliary reconstruction of what is left over, by the dead latents alone."""

    def __init__(
        self, model: SparseAutoencoder, latents: torch.Tensor, k: int, weight: float, half: torch.dtype
    ) -> None:
        self.latents, self._k, self._weight = latents, k, weight
        self._rows = _Rows(model, latents, half)
        self.loss: torch.Tensor | float = 0.0

    def add(
        self,
        p_BK: torch.Tensor,
        centred_BD: torch.Tensor,
        r_BD: torch.Tensor,
        M_BD: torch.Tensor,
        w_B1: torch.Tensor | float,
        *,
        n_values: int,
    ) -> None:
        z_BK = keep_top_k_(p_BK, self._k).relu_()
        rest_BD = self._rows.decoded(z_BK) - r_BD
        self.loss += self._weight * (rest_BD.square() * w_B1).sum(dtype=torch.float64) / n_values
        self._rows.add(rest_BD * w_B1 * (2 * self._weight / n_values), z_BK, z_BK > 0, centred_BD)

    def add_to(self, grads: dict[str, torch.Tensor], *, mse: float, loss: float) -> float:
        self._rows.add_to(grads, 1.0)
        return loss


@torch.no_grad()
def resample(
    model: SparseAutoencoder,
    optimizer: torch.optim.Optimizer,
    dead_L: torch.Tensor,
    tokens_ND: torch.Tensor,
    generator: torch.Generator,
    *,
    token_scale: float = 1.0,
    ranks: Ranks,
    micro_batch: int,
) -> int:
    """Give dead latents, (L,) bool, a new start from this rank's part of the batch, (N, D); returns how many.

    Token t is drawn with probability proportional to (||x - x_hat||^2)^2. Its x - b_dec, at norm 1, becomes the decoder
    row; at 0.2 of the mean norm of the living encoder columns, the column; the bias becomes 0, and Adam forgets.
    What differs from the source: the batch stands for its 819,200 tokens, and b_dec is taken off first.
    """
    dead = dead_L.nonzero().squeeze(1)
    if not len(dead):
        return 0
    n = ranks.total(len(tokens_ND))
    mine = ranks.part(n)
    loss_N = torch.zeros(n, dtype=torch.float64, device=tokens_ND.device)
    for start in range(0, len(tokens_ND), micro_batch):
        x_BD = tokens_ND[start : start + micro_batch].float() * token_scale
        first = mine.start + start
        loss_N[first : first + len(x_BD)] = (model(x_BD) - x_BD).square().sum(1).double()
    ranks.sum_(loss_N)
    if not bool(loss_N.any()):
        return 0
    drawn = torch.multinomial(loss_N.cpu().square(), len(dead), replacement=True, generator=generator).to(dead.device)
    directions_KD = torch.zeros(len(dead), model.width, device=dead.device)
    is_mine = (drawn >= mine.start) & (drawn < mine.stop)
    directions_KD[is_mine] = tokens_ND[drawn[is_mine] - mine.start].float() * token_scale - model.b_dec
    ranks.sum_(directions_KD)
    directions_KD /= directions_KD.norm(dim=1, keepdim=True).clamp_min(NORM_FLOOR)
    norm_L = model.W_enc.norm(dim=0)
    norm = norm_L[~dead_L].mean() if not bool(dead_L.all()) else norm_L.mean()
    model.W_dec[dead] = directions_KD
    model.W_enc.T[dead] = directions_KD * (_RESAMPLED_ENCODER * norm)
    model.b_enc[dead] = 0
    for parameter, axis in ((model.W_dec, 0), (model.W_enc, 1), (model.b_enc, 0)):
        for name in ("exp_avg", "exp_avg_sq"):
            if name in optimizer.state[parameter]:
                optimizer.state[parameter][name].index_fill_(axis, dead, 0)
    return len(dead)
