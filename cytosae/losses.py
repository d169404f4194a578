"""The objective and its exact gradients, in micro-batches (REFERENCE.md section 4.2; twin: tests/reference.py).

    M = (x_hat - x)^2 / ||x||          loss "normed" (released); D (x_hat - x)^2 for "eq1" (the paper's Eq. 1)
    loss = mean(M) + l1 * mean_t sum_s z + ghost

    r = x - x_hat, g = exp(p[:, dead]) W_dec[dead], a = ||r|| / (1e-6 + 2 ||g||)
    G = (a g - r)^2 / ||r||            D (a g - r)^2 for "eq1";  r and a detached
    ghost = mean(c G),  c = M / (G + 1e-6) element by element (released), or mean(M) / (mean(G) + 1e-6); detached

Means run over the whole batch, whatever the micro-batch: gradients are sums over micro-batches, and the scalar ghost
factor, known only at the end, multiplies ghost gradients that were summed apart.
Shapes: B tokens of a micro-batch, D width, L latents, K dead latents.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .model import SparseAutoencoder

EPS = 1e-6
NORM_FLOOR = 1e-12  # a zero token divides by this, not by zero
_MICRO_BATCH_BYTES = 256 << 20  # of one dense (tokens, latents) float32 matrix


@dataclass(frozen=True)
class BatchLosses:
    """The parts of the loss on one batch, and what the log needs. `loss` = mse + l1 + ghost."""

    mse: float
    l1: float
    ghost: float
    l0: float  # mean number of active latents per token
    explained_variance: float  # 1 - sum ||x - x_hat||^2 / sum ||x - mean(x)||^2
    explained_variance_uncentered: float  # the same against sum ||x||^2, as the released code logs it
    fired: torch.Tensor  # (L,) bool: active on any token of the batch

    @property
    def loss(self) -> float:
        """What is minimised."""
        return self.mse + self.l1 + self.ghost


def loss_and_gradients(
    model: SparseAutoencoder,
    tokens_ND: torch.Tensor,
    *,
    loss: str,
    l1: float,
    ghost_scale: str,
    dead_L: torch.Tensor | None,
    micro_batch: int | None = None,
) -> BatchLosses:
    """Set `.grad` of the four parameters to the gradient of the mean loss over `tokens_ND`.

    Parameters
    ----------
    tokens_ND : (N, D) on the model's device, any float type; cast to float32 piece by piece
    dead_L : (L,) bool, the latents that get ghost gradients; None or all False: none do
    micro_batch : tokens at a time; default: as many as keep one dense (tokens, L) matrix below 256 MiB
    """
    n, width = tokens_ND.shape
    dead = dead_L.nonzero().squeeze(1) if dead_L is not None and bool(dead_L.any()) else None
    step = micro_batch or max(1, _MICRO_BATCH_BYTES // (4 * model.n_latents))
    parameters = [model.W_enc, model.b_enc, model.W_dec, model.b_dec]
    grads: list[torch.Tensor] = []
    ghost_grads = _GhostGradients(model, dead) if dead is not None and ghost_scale == "scalar" else None
    sums = dict.fromkeys(("mse", "l1", "ghost", "active", "error", "square"), 0.0)
    mean_D = torch.zeros(width, dtype=torch.float64, device=tokens_ND.device)
    fired = torch.zeros(model.n_latents, dtype=torch.bool, device=tokens_ND.device)

    for start in range(0, n, step):
        x_BD = tokens_ND[start : start + step].float()
        # b_dec is left out of the encoder's graph: its gradient there is -W_enc times that of b_enc, added below
        centred_BD = x_BD - model.b_dec.detach()
        z_BL = torch.relu(torch.addmm(model.b_enc, centred_BD, model.W_enc))
        x_hat_BD = model.decode(z_BL)
        scale_B1 = _scale(x_BD, loss)
        M_BD = (x_hat_BD - x_BD) ** 2 * scale_B1
        mse, penalty = M_BD.sum() / (n * width), l1 * z_BL.sum() / n
        total = mse + penalty
        if dead is not None:
            r_BD = (x_BD - x_hat_BD).detach()
            if ghost_grads is None:
                G_BD = _ghost(centred_BD, r_BD, (model.W_enc[:, dead], model.b_enc[dead], model.W_dec[dead]), loss)
                ghost = ((M_BD / (G_BD + EPS)).detach() * G_BD).sum() / (n * width)
                total = total + ghost
                sums["ghost"] += ghost.item()
            else:
                ghost_grads.add(centred_BD, r_BD, loss=loss, n_values=n * width)
        parts = torch.autograd.grad(total, parameters)
        if grads:
            for grad, part in zip(grads, parts, strict=True):
                grad += part
        else:
            grads = list(parts)
        with torch.no_grad():
            fired |= z_BL.amax(0) > 0
            sums["active"] += int(z_BL.count_nonzero())
            sums["mse"] += mse.item()
            sums["l1"] += penalty.item()
            sums["error"] += (x_hat_BD - x_BD).square().sum(dtype=torch.float64).item()
            sums["square"] += x_BD.square().sum(dtype=torch.float64).item()
            mean_D += x_BD.sum(0, dtype=torch.float64) / n

    with torch.no_grad():
        if ghost_grads is not None:
            factor = sums["mse"] / (ghost_grads.mean + EPS)
            sums["ghost"] = factor * ghost_grads.mean
            ghost_grads.add_to(grads, factor)
        grad_b_enc, grad_b_dec = grads[1], grads[3]
        grad_b_dec -= model.W_enc @ grad_b_enc
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
    centred_square = sums["square"] - n * mean_D.square().sum().item()
    return BatchLosses(
        mse=sums["mse"],
        l1=sums["l1"],
        ghost=sums["ghost"],
        l0=sums["active"] / n,
        explained_variance=_explained(sums["error"], centred_square),
        explained_variance_uncentered=_explained(sums["error"], sums["square"]),
        fired=fired,
    )


class _GhostGradients:
    """Gradients of mean(G) with respect to the dead latents' weights only, summed over micro-batches."""

    def __init__(self, model: SparseAutoencoder, dead: torch.Tensor) -> None:
        self.dead, self.mean = dead, 0.0
        chosen = (model.W_enc[:, dead], model.b_enc[dead], model.W_dec[dead])
        self._weights = [weight.detach().requires_grad_() for weight in chosen]
        self._grads = [torch.zeros_like(weight) for weight in self._weights]

    def add(self, centred_BD: torch.Tensor, r_BD: torch.Tensor, *, loss: str, n_values: int) -> None:
        """Add one micro-batch's share."""
        part = _ghost(centred_BD, r_BD, self._weights, loss).sum() / n_values
        self.mean += part.item()
        for grad, piece in zip(self._grads, torch.autograd.grad(part, self._weights), strict=True):
            grad += piece

    def add_to(self, grads: list[torch.Tensor], factor: float) -> None:
        """grads += factor x the gradients of mean(G), at the dead latents."""
        W_enc_DK, b_enc_K, W_dec_KD = (grad * factor for grad in self._grads)
        grads[0].index_add_(1, self.dead, W_enc_DK)
        grads[1].index_add_(0, self.dead, b_enc_K)
        grads[2].index_add_(0, self.dead, W_dec_KD)


def _ghost(
    centred_BD: torch.Tensor,
    r_BD: torch.Tensor,
    dead_weights: Sequence[torch.Tensor],
    loss: str,
) -> torch.Tensor:
    """G (B, D): how badly the dead latents, with exp for ReLU, would explain half of the residual's length."""
    W_enc_DK, b_enc_K, W_dec_KD = dead_weights
    g_BD = torch.addmm(b_enc_K, centred_BD, W_enc_DK).exp() @ W_dec_KD
    a_B1 = (r_BD.norm(dim=1, keepdim=True) / (EPS + 2 * g_BD.norm(dim=1, keepdim=True))).detach()
    return (a_B1 * g_BD - r_BD) ** 2 * _scale(r_BD, loss)


def _scale(vectors_BD: torch.Tensor, loss: str) -> torch.Tensor | int:
    """What a squared error is multiplied with: 1 / ||vector||, or D for Eq. 1, whose error is a sum over D."""
    if loss == "eq1":
        return vectors_BD.shape[1]
    return 1 / vectors_BD.norm(dim=1, keepdim=True).clamp_min(NORM_FLOOR)


def _explained(error: float, total: float) -> float:
    return 1 - error / total if total > 0 else float("nan")
