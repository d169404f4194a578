"""The objective and its exact gradients, in micro-batches (REFERENCE.md section 4.2; twin: tests/reference.py).

    M = (x_hat - x)^2 / ||x||          loss "normed" (released); D (x_hat - x)^2 for "eq1" (the paper's Eq. 1)
    loss = mean(M) + l1 * mean_t sum_s z + ghost

    r = x - x_hat, g = exp(p[:, dead]) W_dec[dead], a = ||r|| / (1e-6 + 2 ||g||)
    G = (a g - r)^2 / ||r||            D (a g - r)^2 for "eq1";  r and a detached
    ghost = mean(c G),  c = M / (G + 1e-6) element by element (released), or mean(M) / (mean(G) + 1e-6); detached

Means run over the whole batch, whatever the micro-batch: gradients are sums over micro-batches, and the scalar ghost
factor, known only at the end, multiplies ghost gradients that were summed apart.

The product of the encoder is dense. What follows costs four dense products more, or works on the active latents only
(sparse_kernels.py): each micro-batch takes what is faster at its density. Both give the same sums.
Shapes: B tokens of a micro-batch, D width, L latents, K dead latents.
"""

from dataclasses import dataclass

import torch

from . import sparse_kernels
from .model import SparseAutoencoder

EPS = 1e-6
NORM_FLOOR = 1e-12  # a zero token divides by this, not by zero
SPARSE_BELOW = 0.08  # density of break-even: 0.10 at 49,152 latents, 0.20 at 6,144 (two cores, docs/log.md)
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
    sparse_below: float = SPARSE_BELOW,
) -> BatchLosses:
    """Set `.grad` of the four parameters to the gradient of the mean loss over `tokens_ND`.

    Memory: one dense (tokens, L) matrix of a micro-batch, a second one where work is dense.

    Parameters
    ----------
    tokens_ND : (N, D) on the model's device, any float type; cast to float32 piece by piece
    dead_L : (L,) bool, the latents that get ghost gradients; None or all False: none do
    micro_batch : tokens at a time; default: as many as keep one dense (tokens, L) matrix below 256 MiB
    sparse_below : density of active latents in a micro-batch below which work is sparse (CPU only)
    """
    n, width = tokens_ND.shape
    step = micro_batch or max(1, _MICRO_BATCH_BYTES // (4 * model.n_latents))
    W_enc, b_enc, W_dec, b_dec = (weight.detach() for weight in (model.W_enc, model.b_enc, model.W_dec, model.b_dec))
    grad_W_enc, grad_b_enc, grad_W_dec, grad_b_dec = _zeroed_gradients(model)
    dead = dead_L.nonzero().squeeze(1) if dead_L is not None and bool(dead_L.any()) else None
    ghost_gradients = (
        _GhostGradients(model, dead, loss, is_scalar=ghost_scale == "scalar") if dead is not None else None
    )
    sums = dict.fromkeys(("mse", "l1", "ghost", "active", "error", "square"), 0.0)
    mean_D = torch.zeros(width, dtype=torch.float64, device=tokens_ND.device)
    fired = torch.zeros(model.n_latents, dtype=torch.bool, device=tokens_ND.device)

    for start in range(0, n, step):
        x_BD = tokens_ND[start : start + step].float()
        centred_BD = x_BD - b_dec
        p_BL = torch.addmm(b_enc, centred_BD, W_enc)
        ghost_p_BK = p_BL[:, dead] if dead is not None else None
        active = _active(p_BL, sparse_below)
        if active is not None:
            x_hat_BD = b_dec.repeat(len(x_BD), 1)
            sparse_kernels.add_decoded(active, W_dec.numpy(), x_hat_BD.numpy())
            n_active, total, fires = (
                len(active.values),
                float(active.values.sum(dtype="f8")),
                torch.from_numpy(active.fired),
            )
        else:
            z_BL = p_BL.relu_()
            x_hat_BD = torch.addmm(b_dec, z_BL, W_dec)
            n_active, total, fires = int(z_BL.count_nonzero()), float(z_BL.sum(dtype=torch.float64)), z_BL.amax(0) > 0

        error_BD, scale_B1 = x_hat_BD - x_BD, _scale(x_BD, loss)
        M_BD = error_BD.square() * scale_B1
        d_x_hat_BD = error_BD * scale_B1 * (2 / (n * width))
        if active is not None:
            sparse_kernels.add_gradients(
                active,
                W_dec_LD=W_dec.numpy(),
                d_x_hat_BD=d_x_hat_BD.numpy(),
                centred_BD=centred_BD.numpy(),
                penalty=l1 / n,
                grad_W_enc_LD=grad_W_enc.T.numpy(),
                grad_b_enc_L=grad_b_enc.numpy(),
                grad_W_dec_LD=grad_W_dec.numpy(),
            )
        else:
            grad_W_dec.addmm_(z_BL.T, d_x_hat_BD)
            d_z_BL = (d_x_hat_BD @ W_dec.T).add_(l1 / n).mul_(z_BL > 0)
            grad_W_enc.addmm_(centred_BD.T, d_z_BL)
            grad_b_enc += d_z_BL.sum(0)
        grad_b_dec += d_x_hat_BD.sum(0)
        if ghost_gradients is not None and ghost_p_BK is not None:
            ghost_gradients.add(ghost_p_BK, centred_BD, -error_BD, M_BD, n_values=n * width)

        fired |= fires
        sums["active"] += n_active
        sums["mse"] += float(M_BD.sum(dtype=torch.float64)) / (n * width)
        sums["l1"] += l1 * total / n
        sums["error"] += float(error_BD.square().sum(dtype=torch.float64))
        sums["square"] += float(x_BD.square().sum(dtype=torch.float64))
        mean_D += x_BD.sum(0, dtype=torch.float64) / n

    if ghost_gradients is not None:
        sums["ghost"] = ghost_gradients.add_to((grad_W_enc, grad_b_enc, grad_W_dec), mse=sums["mse"])
    # through x - b_dec in the encoder: the gradient there is -W_enc times that of b_enc
    grad_b_dec -= W_enc @ grad_b_enc
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


def _zeroed_gradients(model: SparseAutoencoder) -> list[torch.Tensor]:
    """The gradients of W_enc, b_enc, W_dec and b_dec, all 0; their memory is kept from step to step."""
    grads = []
    for parameter in (model.W_enc, model.b_enc, model.W_dec, model.b_dec):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)  # in W_enc's own layout: stored by latent
        else:
            parameter.grad.zero_()
        grads.append(parameter.grad)
    return grads


def _active(p_BL: torch.Tensor, sparse_below: float) -> sparse_kernels.Active | None:
    """The active latents, or None where dense products are faster."""
    if p_BL.device.type != "cpu" or sparse_below <= 0:
        return None
    n_threads = torch.get_num_threads()
    sparse_kernels.use_threads(n_threads)
    if torch.get_num_threads() != n_threads:
        torch.set_num_threads(n_threads)
    counts = sparse_kernels.count_active(p_BL.numpy())
    return sparse_kernels.take_active(p_BL.numpy(), counts) if counts.sum() < sparse_below * p_BL.numel() else None


class _GhostGradients:
    """Gradients of ghost at the dead latents' weights (of mean(G), if its factor is a scalar), over micro-batches."""

    def __init__(self, model: SparseAutoencoder, dead: torch.Tensor, loss: str, *, is_scalar: bool) -> None:
        self._dead, self._loss, self._is_scalar = dead, loss, is_scalar
        self._W_dec_KD = model.W_dec.detach()[dead]
        self._W_enc_KD, self._b_enc_K = torch.zeros_like(self._W_dec_KD), torch.zeros_like(model.b_enc.detach()[dead])
        self._W_dec_grad_KD = torch.zeros_like(self._W_dec_KD)
        self._mean = 0.0

    def add(
        self,
        p_BK: torch.Tensor,
        centred_BD: torch.Tensor,
        r_BD: torch.Tensor,
        M_BD: torch.Tensor,
        *,
        n_values: int,
    ) -> None:
        """Add one micro-batch's share."""
        exp_BK = p_BK.exp_()
        g_BD = exp_BK @ self._W_dec_KD
        a_B1 = r_BD.norm(dim=1, keepdim=True) / (EPS + 2 * g_BD.norm(dim=1, keepdim=True))
        scale_B1, rest_BD = _scale(r_BD, self._loss), a_B1 * g_BD - r_BD
        G_BD = rest_BD.square() * scale_B1
        d_g_BD = rest_BD * (a_B1 * scale_B1 * (2 / n_values))
        if not self._is_scalar:
            c_BD = M_BD / (G_BD + EPS)
            G_BD, d_g_BD = c_BD * G_BD, c_BD * d_g_BD
        self._mean += float(G_BD.sum(dtype=torch.float64)) / n_values
        self._W_dec_grad_KD.addmm_(exp_BK.T, d_g_BD)
        d_p_BK = (d_g_BD @ self._W_dec_KD.T).mul_(exp_BK)
        self._W_enc_KD.addmm_(d_p_BK.T, centred_BD)
        self._b_enc_K += d_p_BK.sum(0)

    def add_to(self, grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor], *, mse: float) -> float:
        """Add them to the gradients of W_enc, b_enc and W_dec at the dead latents; returns the ghost loss."""
        factor = mse / (self._mean + EPS) if self._is_scalar else 1.0
        grads[0].T.index_add_(0, self._dead, self._W_enc_KD, alpha=factor)
        grads[1].index_add_(0, self._dead, self._b_enc_K, alpha=factor)
        grads[2].index_add_(0, self._dead, self._W_dec_grad_KD, alpha=factor)
        return factor * self._mean


def _scale(vectors_BD: torch.Tensor, loss: str) -> torch.Tensor | int:
    """What a squared error is multiplied with: 1 / ||vector||, or D for Eq. 1, whose error is a sum over D."""
    if loss == "eq1":
        return vectors_BD.shape[1]
    return 1 / vectors_BD.norm(dim=1, keepdim=True).clamp_min(NORM_FLOOR)


def _explained(error: float, total: float) -> float:
    return 1 - error / total if total > 0 else float("nan")
