"""Treatment of dead latents: ghost gradients, an auxiliary reconstruction (auxk), or new weights (resample).

ghost (released; docs/reference/paper.md 4.2), with r = x - x_hat and K the dead latents:
    g = exp(p[:, K]) W_dec[K],  a = ||r|| / (1e-6 + 2 ||g||),  G = w_r (a g - r)^2;  r, a and w_r detached
    loss = mean(c G),  c = M / (G + 1e-6) element by element (released), or mean(M) / (mean(G) + 1e-6); detached
    w_r = 1 / ||r|| (loss "normed"), D ("eq1") or 1 ("mse")

auxk (Gao et al., arXiv 2406.04093, A.2): the k largest positive pre-activations among K reconstruct the residual r
    loss = weight * mean(w_x (z_aux W_dec[K] - r)^2);  r detached

resample (Bricken et al. 2023, "Towards Monosemanticity", Neuron Resampling): every `resample_every` steps each dead
latent gets new weights in the direction of a token, drawn with probability proportional to its squared loss.

Shapes: B tokens of a micro-batch, D width, K dead latents.
"""

from typing import Protocol

import torch

from cytosae.sae import SparseAutoencoder, keep_top_k_

from .dead_passes import exp_of, padded, times_slope_
from .distributed import Ranks
from .objective import Objective
from .precision import add_product, product

EPS = 1e-6  # in the denominators of ghost
NORM_FLOOR = 1e-12  # lower bound of a norm that is divided by
_MULTIPLE_ON_GPU = 16  # columns of a matrix of dead latents: rows that begin anywhere make products slow
_RESAMPLED_ENCODER = 0.2  # norm of a resampled encoder column, relative to the mean encoder norm of live latents


class DeadGradients(Protocol):
    """Gradients of the term for dead latents, summed over micro-batches."""

    latents: torch.Tensor  # (K,) int64: indices of the dead latents

    @property
    def loss(self) -> torch.Tensor | float:
        """This term of the loss, summed so far; on a GPU it stays there."""

    def take(self, p_BN: torch.Tensor, columns_K: torch.Tensor | None) -> torch.Tensor:
        """(B, K): what the term needs of one micro-batch's pre-activations, for `add`; in new memory.

        columns_K : those of the dead latents; None: there are no others, and p may be overwritten
        """

    def add(
        self,
        z_BK: torch.Tensor,
        centred_BD: torch.Tensor,
        r_BD: torch.Tensor,
        M_BD: torch.Tensor,
        w_B1: torch.Tensor | float,
        *,
        n_values: int,
    ) -> None:
        """Add one micro-batch.

        z_BK : from `take`; overwritten
        centred_BD : x - b_dec, of any float type
        r_BD : x - x_hat
        M_BD : w_x (x_hat - x)^2
        w_B1 : w_x, (B, 1) or one number
        n_values : tokens of the whole batch times D
        """

    def add_to(self, grads: dict[str, torch.Tensor], *, mse: float, loss: float) -> float:
        """Add them to the model's gradients, given mse and `loss` of the whole batch. Returns the term of the loss."""


def dead_gradients(
    model: SparseAutoencoder,
    dead_L: torch.Tensor | None,
    objective: Objective,
    n_dead: int | None = None,
) -> DeadGradients | None:
    """An empty sum of gradients for the dead latents, (L,) bool; None if no latent is dead or none gets a gradient.

    n_dead : how many there are, if it is known; else the host waits for the device
    """
    if n_dead == 0 or dead_L is None or objective.dead_latents not in ("ghost", "auxk"):
        return None
    latents = dead_L.nonzero().squeeze(1) if n_dead is None else indices_of(dead_L, n_dead)
    if not len(latents):
        return None
    return _Ghost(model, latents, objective) if objective.dead_latents == "ghost" else _AuxK(model, latents, objective)


def indices_of(flags_L: torch.Tensor, n: int) -> torch.Tensor:
    """(n,) int64, ascending: where the flags are True, of which there are n. As `nonzero`, without waiting."""
    places_L = torch.where(flags_L, flags_L.cumsum(0) - 1, n)  # of the others all at the end, which is cut off
    found = places_L.new_zeros(n + 1)
    return found.scatter_(0, places_L, torch.arange(len(flags_L), device=flags_L.device))[:n]


class _DeadWeights:
    """Weights of the dead latents, and their gradients."""

    def __init__(self, model: SparseAutoencoder, latents: torch.Tensor, compute_dtype: torch.dtype) -> None:
        self.latents, self.compute_dtype = latents, compute_dtype
        multiple = _MULTIPLE_ON_GPU if latents.is_cuda else 1
        self.n_columns = -(-len(latents) // multiple) * multiple  # K, the dead latents and some with weights 0
        W_dec_KD = model.W_dec.detach().new_zeros(self.n_columns, model.width)
        torch.index_select(model.W_dec.detach(), 0, latents, out=W_dec_KD[: len(latents)])
        self._W_dec_KD = W_dec_KD.to(compute_dtype)
        self._of_W_enc_KD, self._of_W_dec_KD = torch.zeros_like(W_dec_KD), torch.zeros_like(W_dec_KD)
        self._of_b_enc_K = W_dec_KD.new_zeros(self.n_columns)

    @property
    def dtype(self) -> torch.dtype:
        """That of the model's weights, and of sums."""
        return self._of_b_enc_K.dtype

    def decoded(self, z_BK: torch.Tensor) -> torch.Tensor:
        """(B, D): z W_dec."""
        return product(z_BK.to(self.compute_dtype), self._W_dec_KD, self.dtype)

    def add(self, d_out_BD: torch.Tensor, z_BK: torch.Tensor, slope: str, centred_BD: torch.Tensor) -> None:
        """Add the gradients through out = z W_dec, given d_out = dloss/dout.

        slope : dz/dp; `exp`: z itself, `relu`: 1 where z > 0
        """
        dtype = self.compute_dtype
        d_out_BD, z_BK = d_out_BD.to(dtype), z_BK.to(dtype)
        add_product(self._of_W_dec_KD, z_BK.T, d_out_BD)
        d_p_BK, sums_K = times_slope_(d_out_BD @ self._W_dec_KD.T, z_BK, slope)
        add_product(self._of_W_enc_KD, d_p_BK.T, centred_BD.to(dtype))
        self._of_b_enc_K += sums_K

    def add_to(self, grads: dict[str, torch.Tensor], factor: float) -> None:
        n = len(self.latents)
        grads["W_enc"].T.index_add_(0, self.latents, self._of_W_enc_KD[:n], alpha=factor)
        grads["b_enc"].index_add_(0, self.latents, self._of_b_enc_K[:n], alpha=factor)
        grads["W_dec"].index_add_(0, self.latents, self._of_W_dec_KD[:n], alpha=factor)


class _Ghost:
    """Ghost gradients. A scalar c is known only after the whole batch, so it is multiplied at the end."""

    def __init__(self, model: SparseAutoencoder, latents: torch.Tensor, objective: Objective) -> None:
        self.latents, self._loss, self._is_scalar = latents, objective.loss, objective.ghost_scale == "scalar"
        self._weights = _DeadWeights(model, latents, objective.dtypes(model).others)
        self.loss: torch.Tensor | float = 0.0

    def take(self, p_BN: torch.Tensor, columns_K: torch.Tensor | None) -> torch.Tensor:
        """exp(p)."""
        return exp_of(p_BN, columns_K, self._weights.compute_dtype, self._weights.n_columns)

    def add(
        self,
        z_BK: torch.Tensor,
        centred_BD: torch.Tensor,
        r_BD: torch.Tensor,
        M_BD: torch.Tensor,
        w_B1: torch.Tensor | float,
        *,
        n_values: int,
    ) -> None:
        g_BD = self._weights.decoded(z_BK)
        r_norm_B1 = r_BD.norm(dim=1, keepdim=True)
        a_B1 = r_norm_B1 / (EPS + 2 * g_BD.norm(dim=1, keepdim=True))
        w_r = {"normed": 1 / r_norm_B1.clamp_min(NORM_FLOOR), "eq1": float(r_BD.shape[1]), "mse": 1.0}[self._loss]
        error_BD = a_B1 * g_BD - r_BD
        G_BD = error_BD.square() * w_r
        d_g_BD = error_BD * (a_B1 * w_r * (2 / n_values))
        if not self._is_scalar:
            c_BD = M_BD / (G_BD + EPS)
            G_BD, d_g_BD = c_BD * G_BD, c_BD * d_g_BD
        self.loss += G_BD.sum(dtype=torch.float64) / n_values
        self._weights.add(d_g_BD, z_BK, "exp", centred_BD)

    def add_to(self, grads: dict[str, torch.Tensor], *, mse: float, loss: float) -> float:
        factor = mse / (loss + EPS) if self._is_scalar else 1.0
        self._weights.add_to(grads, factor)
        return factor * loss


class _AuxK:
    """Gradients of the auxiliary reconstruction of the residual by dead latents only."""

    def __init__(self, model: SparseAutoencoder, latents: torch.Tensor, objective: Objective) -> None:
        self.latents, self._weight = latents, objective.auxk_weight
        self._k = objective.auxk or max(1, model.width // 2)
        self._weights = _DeadWeights(model, latents, objective.dtypes(model).others)
        self.loss: torch.Tensor | float = 0.0

    def take(self, p_BN: torch.Tensor, columns_K: torch.Tensor | None) -> torch.Tensor:
        """The k largest of each token, 0 elsewhere."""
        p_BK = p_BN if columns_K is None else p_BN[:, columns_K]
        return padded(keep_top_k_(p_BK.to(self._weights.dtype), self._k).relu_(), self._weights.n_columns)

    def add(
        self,
        z_BK: torch.Tensor,
        centred_BD: torch.Tensor,
        r_BD: torch.Tensor,
        M_BD: torch.Tensor,
        w_B1: torch.Tensor | float,
        *,
        n_values: int,
    ) -> None:
        error_BD = self._weights.decoded(z_BK) - r_BD
        self.loss += self._weight * (error_BD.square() * w_B1).sum(dtype=torch.float64) / n_values
        self._weights.add(error_BD * w_B1 * (2 * self._weight / n_values), z_BK, "relu", centred_BD)

    def add_to(self, grads: dict[str, torch.Tensor], *, mse: float, loss: float) -> float:
        self._weights.add_to(grads, 1.0)
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
    n_tokens: int | None = None,
    micro_batch: int,
) -> int:
    """Give the dead latents new weights, in place, in the directions of badly reconstructed tokens of the batch.

    Token t is drawn with probability proportional to (||x - x_hat||^2)^2. The decoder row becomes x - b_dec at norm 1;
    the encoder column the same at 0.2 times the mean encoder norm of live latents; the bias 0; and Adam's moments of
    these weights 0. Two differences from Bricken et al.: tokens are drawn from the batch instead of from 819,200
    tokens, and b_dec is subtracted from the token.

    Parameters
    ----------
    dead_L : (L,) bool, equal on all ranks
    tokens_ND : (N, D), this rank's tokens of the batch, any float type
    generator : for the draws; equal on all ranks
    n_tokens : tokens of the batch, of all ranks together, which several ranks must say; default: N
    micro_batch : tokens that are reconstructed at a time

    Returns
    -------
    The number of latents that got new weights; 0 if none is dead, or if every token is reconstructed exactly.
    """
    dead = dead_L.nonzero().squeeze(1)
    if not len(dead):
        return 0
    n = n_tokens or len(tokens_ND)
    mine = ranks.local_slice(n)
    loss_N = torch.zeros(n, dtype=torch.float64, device=tokens_ND.device)
    for start in range(0, len(tokens_ND), micro_batch):
        x_BD = tokens_ND[start : start + micro_batch].float() * token_scale
        first = mine.start + start
        loss_N[first : first + len(x_BD)] = (model(x_BD) - x_BD).square().sum(1).double()
    ranks.all_reduce_sum_(loss_N)
    if not bool(loss_N.any()):
        return 0
    drawn = torch.multinomial(loss_N.cpu().square(), len(dead), replacement=True, generator=generator).to(dead.device)
    directions_KD = torch.zeros(len(dead), model.width, device=dead.device)
    is_mine = (drawn >= mine.start) & (drawn < mine.stop)
    directions_KD[is_mine] = tokens_ND[drawn[is_mine] - mine.start].float() * token_scale - model.b_dec
    ranks.all_reduce_sum_(directions_KD)
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
