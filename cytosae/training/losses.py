"""The objective and its exact gradients, in micro-batches (docs/reference/paper.md 4.2; twin: tests/reference.py).

    M = w_x (x_hat - x)^2                w_x = 1 / ||x|| (loss "normed", released), D ("eq1", the paper's), or 1 ("mse")
    loss = mean(M) + sparsity + what dead_latents.py adds for dead latents

    sparsity = l1 * mean_t of            sum_s z (relu), sum_s ReLU(p) (gated), number of active latents (jumprelu);
                                         topk and batchtopk have none
    gated adds mean(w_x (x_gate - x)^2), x_gate = ReLU(p) W_dec + b_dec, both held constant (arXiv 2404.16014, eq. 8)

jumprelu's thresholds t = exp(log_threshold) learn by straight-through estimates with a window of `bandwidth` e
(arXiv 2407.14435, eq. 11, 12): where |p - t| < e/2, dz/dt = -t/e and d(number of active)/dt = -1/e.

Means run over the whole batch, whatever the micro-batch and the number of ranks: gradients are sums.

The product of the encoder is dense. What follows costs four dense products more, or works on the active latents only:
each micro-batch takes what is faster at its density (latent_matrix.py). Both give the same sums.
On a GPU the host waits for the device once per micro-batch, for the number of active latents (jumprelu, gated: twice;
batchtopk: more), and twice per step: which latents are dead, and all numbers of the loss together.
Shapes: B tokens of a micro-batch, N of the batch, D width, L latents, K dead latents.
"""

import math
from dataclasses import dataclass

import torch

from cytosae.sae import SparseAutoencoder

from .dead_latents import dead_gradients
from .distributed import ALONE, Ranks
from .latent_matrix import latents_of
from .residuals import compare_reconstruction

NORM_FLOOR = 1e-12  # a zero token divides by this, not by zero
_MICRO_BATCH_BYTES = 256 << 20  # of one dense (tokens, latents) matrix
_MICRO_BATCH_BYTES_ON_GPU = 1 << 30
_SUMS = ("active", "mse", "sparsity", "gate", "error", "square", "dead")


@dataclass(frozen=True)
class BatchLosses:
    """The parts of the loss on one batch, and what the log needs. `loss` = mse + l1 + gate + dead."""

    mse: float
    l1: float  # the sparsity term, whatever it counts
    gate: float  # gated's second reconstruction
    dead: float  # what dead latents add: ghost gradients' or auxk's loss
    l0: float  # mean number of active latents per token
    explained_variance: float  # 1 - sum ||x - x_hat||^2 / sum ||x - mean(x)||^2
    explained_variance_uncentered: float  # the same against sum ||x||^2, as the released code logs it
    fired: torch.Tensor  # (L,) bool: active on any token of the batch
    threshold: float | None = None  # batchtopk: the least value that was kept

    @property
    def loss(self) -> float:
        """What is minimised."""
        return self.mse + self.l1 + self.gate + self.dead


def loss_and_gradients(
    model: SparseAutoencoder,
    tokens_ND: torch.Tensor,
    *,
    loss: str,
    l1: float,
    dead_L: torch.Tensor | None,
    dead_latents: str = "ghost",
    ghost_scale: str = "scalar",
    auxk: int | None = None,
    auxk_weight: float = 1 / 32,
    bandwidth: float = 1e-3,
    token_scale: float = 1.0,
    ranks: Ranks = ALONE,
    micro_batch: int | None = None,
    sparse_below: float | None = None,
    precision: str = "fp32",
) -> BatchLosses:
    """Set `.grad` of the parameters to the gradient of the mean loss over the batch.

    Memory: one dense (tokens, L) matrix of a micro-batch; a second one where work is dense, for jumprelu and gated.

    Parameters
    ----------
    tokens_ND : (N, D) on the model's device, any float type; cast to float32 piece by piece. This rank's part of the
        batch, if there are several: all ranks get the gradients and losses of the whole
    dead_L : (L,) bool, the latents that are dead; None or all False: none are
    dead_latents, ghost_scale, auxk, auxk_weight : what is done for them (dead_latents.py)
    token_scale : what tokens are multiplied with first
    micro_batch : tokens at a time; default: as many as keep one dense (tokens, L) matrix below 256 MiB (GPU: 1 GiB)
    sparse_below : density of active latents in a micro-batch below which work is sparse; default: break-even
    precision : "fp32", or "bf16": operands of products in bfloat16; weights, gradients and sums stay float32
    """
    n, width = ranks.total(len(tokens_ND)), tokens_ND.shape[1]
    half = torch.bfloat16 if precision == "bf16" else model.W_dec.dtype
    step = micro_batch or _micro_batch(len(tokens_ND), model, half)
    b_dec = model.b_dec.detach()
    W_enc, b_enc, W_dec = (weight.detach().to(half) for weight in (model.W_enc, model.b_enc, model.W_dec))
    grads = _zeroed_gradients(model)
    dead = dead_gradients(
        model, dead_L, method=dead_latents, loss=loss, ghost_scale=ghost_scale, k=auxk, weight=auxk_weight, half=half
    )
    threshold = None
    if model.activation == "batchtopk":
        threshold = _batch_threshold(model, tokens_ND, token_scale, n, step, ranks)
    gated = _MagnitudeGradients(model) if model.activation == "gated" else None
    penalty = l1 / n if model.activation == "relu" else 0.0
    device = tokens_ND.device
    numbers = torch.zeros(len(_SUMS), dtype=torch.float64, device=device)
    sums = dict(zip(_SUMS, numbers.unbind(), strict=True))  # what is added to them is added to `numbers`
    mean_D = torch.zeros(width, dtype=torch.float64, device=device)
    room_BL = torch.empty(min(step, len(tokens_ND)), model.n_latents, dtype=half, device=device)  # new pages cost time
    fired = torch.zeros(model.n_latents, dtype=torch.bool, device=device)

    for start in range(0, len(tokens_ND), step):
        x_BD = tokens_ND[start : start + step].float()
        if token_scale != 1:
            x_BD = x_BD * token_scale
        centred_BD = torch.sub(x_BD, b_dec, out=torch.empty_like(x_BD, dtype=half))  # rounded in the same pass
        p_BL = torch.addmm(b_enc, centred_BD, W_enc, out=room_BL[: len(x_BD)])
        p_dead_BK = p_BL[:, dead.latents].to(b_dec.dtype) if dead is not None else None
        near = None
        if model.activation == "jumprelu":
            threshold_L = model.log_threshold.detach().exp()
            near = latents_of(((p_BL - threshold_L).abs_() < bandwidth / 2).to(p_BL.dtype), sparse_below)
        gate = latents_of(p_BL.clone(), sparse_below) if gated is not None else None
        with torch.no_grad():
            p_BL = model.keep_active_(p_BL) if threshold is None else p_BL.masked_fill_(p_BL < threshold, 0)
        z = latents_of(p_BL, sparse_below)

        x_hat_BD, w_B1 = z.decoded(W_dec, b_dec), loss_weight(x_BD, loss)
        found = compare_reconstruction(x_hat_BD, x_BD, w_B1, 2 / (n * width), half)
        into = grads if gated is None else gated.grads
        z.add_gradients(W_dec, found.d_x_hat_BD, centred_BD, penalty, into["W_enc"], into["b_enc"], grads["W_dec"])
        grads["b_dec"] += found.d_sum_D
        if gate is not None:
            of_gate = compare_reconstruction(gate.decoded(W_dec, b_dec), x_BD, w_B1, 2 / (n * width), half)
            sums["gate"] += of_gate.weighted / (n * width)
            sums["sparsity"] += l1 * gate.total / n
            gate.without_values().add_gradients(  # the decoder is held constant here
                W_dec, of_gate.d_x_hat_BD, centred_BD, l1 / n, grads["W_enc"], grads["b_enc"], grads["W_dec"]
            )
        elif near is not None:
            # dz/dlog t = t dz/dt
            near.add_products(W_dec, found.d_x_hat_BD, -(threshold_L.square()) / bandwidth, grads["log_threshold"])
            grads["log_threshold"] -= threshold_L * near.count() * (l1 / (n * bandwidth))
            sums["sparsity"] += l1 * z.n_active / n
        else:
            sums["sparsity"] += penalty * z.total
        if dead is not None and p_dead_BK is not None:
            error_BD = x_hat_BD - x_BD
            dead.add(p_dead_BK, centred_BD, -error_BD, error_BD.square() * w_B1, w_B1, n_values=n * width)

        fired |= z.fired
        sums["active"] += z.n_active
        sums["mse"] += found.weighted / (n * width)
        sums["error"] += found.error
        sums["square"] += found.square
        mean_D += found.x_sum_D / n

    if dead is not None:
        sums["dead"] += dead.loss
    ranks.sum_(numbers, mean_D)
    ranks.any_(fired)
    *values, mean_square = torch.cat([numbers, mean_D.square().sum()[None]]).tolist()
    total = dict(zip(_SUMS, values, strict=True))
    if gated is not None:
        gated.add_to(grads)
    if dead is not None:
        total["dead"] = dead.add_to(grads, mse=total["mse"], loss=total["dead"])
    # through x - b_dec in the encoder: the gradient there is -W_enc times that of b_enc
    grads["b_dec"] -= model.W_enc.detach() @ grads["b_enc"]
    if gated is not None:
        grads["b_dec"] -= model.W_enc.detach() @ (grads["b_mag"] * model.r_mag.detach().exp())
    ranks.sum_(*grads.values())
    return BatchLosses(
        mse=total["mse"],
        l1=total["sparsity"],
        gate=total["gate"],
        dead=total["dead"],
        l0=total["active"] / n,
        explained_variance=_explained(total["error"], total["square"] - n * mean_square),
        explained_variance_uncentered=_explained(total["error"], total["square"]),
        fired=fired,
        threshold=threshold,
    )


class _MagnitudeGradients:
    """Gated: gradients through the magnitudes ReLU(exp(r_mag) u + b_mag), u = (x - b_dec) W_enc, summed apart.

    With d = dloss/dmagnitude: W_enc gets exp(r_mag) d (x - b_dec), b_mag gets d, and r_mag gets exp(r_mag) d u, which
    is exp(r_mag) times <W_enc column, sum of d (x - b_dec)>.
    """

    def __init__(self, model: SparseAutoencoder) -> None:
        self._model = model
        self.grads = {
            "W_enc": torch.zeros_like(model.W_enc.detach()),
            "b_enc": torch.zeros_like(model.b_enc.detach()),
        }

    def add_to(self, grads: dict[str, torch.Tensor]) -> None:
        scale_L = self._model.r_mag.detach().exp()
        of_W_enc = self.grads["W_enc"].mul_(scale_L)
        grads["r_mag"] += (of_W_enc * self._model.W_enc.detach()).sum(0)
        grads["W_enc"] += of_W_enc
        grads["b_mag"] += self.grads["b_enc"]


def _micro_batch(n: int, model: SparseAutoencoder, half: torch.dtype) -> int:
    """Tokens at a time, of n; on a GPU pieces of one size, so that none is too small for it."""
    is_on_gpu = model.W_enc.device.type == "cuda"
    n_bytes = _MICRO_BATCH_BYTES_ON_GPU if is_on_gpu else _MICRO_BATCH_BYTES
    most = max(1, n_bytes // (half.itemsize * model.n_latents))
    return math.ceil(n / math.ceil(n / most)) if is_on_gpu and n else most


def _zeroed_gradients(model: SparseAutoencoder) -> dict[str, torch.Tensor]:
    """The gradients by parameter, all 0; their memory is kept from step to step."""
    grads = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)  # in W_enc's own layout: stored by latent
        else:
            parameter.grad.zero_()
        grads[name] = parameter.grad
    return grads


def _batch_threshold(
    model: SparseAutoencoder, tokens_ND: torch.Tensor, token_scale: float, n: int, step: int, ranks: Ranks
) -> float:
    """The k x n-th largest positive pre-activation of the batch, or the least positive one if there are fewer.

    Costs the encoder's product once more. Memory: the candidates, at most twice k x n.
    """
    assert model.k is not None
    wanted = model.k * n
    kept, least = torch.zeros(0, device=tokens_ND.device), 0.0
    for start in range(0, len(tokens_ND), step):
        p_BL = model.pre_activations(tokens_ND[start : start + step].float() * token_scale).detach()
        if bool(torch.isnan(p_BL).any()):
            return float("nan")
        kept = _largest(torch.cat([kept, p_BL[p_BL > least]]), wanted)
        if len(kept) == wanted:
            least = float(kept.min())
    kept = _largest(ranks.gathered(kept, wanted), wanted)
    return float(kept.min()) if len(kept) else 0.0


def _largest(values: torch.Tensor, n: int) -> torch.Tensor:
    return values if len(values) <= n else values.topk(n, sorted=False).values


def loss_weight(x_BD: torch.Tensor, loss: str) -> torch.Tensor | float:
    """w_x: what a squared error is multiplied with before the mean over tokens and channels; (B, 1) or one for all."""
    if loss == "normed":
        return 1 / x_BD.norm(dim=1, keepdim=True).clamp_min(NORM_FLOOR)
    return float(x_BD.shape[1]) if loss == "eq1" else 1.0  # eq1's error is a sum over D, not a mean


def _explained(error: float, total: float) -> float:
    return 1 - error / total if total > 0 else float("nan")
