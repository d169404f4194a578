"""The training loss and its exact gradients, in micro-batches (docs/reference/paper.md 4.2).

Twin: tests/support/reference.py.

    M = w_x (x_hat - x)^2                w_x = 1 / ||x|| (loss "normed", released), D ("eq1", the paper's), or 1 ("mse")
    loss = mean(M) + sparsity + the term for dead latents (dead_latents.py)

    sparsity = l1 * mean_t of            sum_s z (relu), sum_s ReLU(p) (gated), number of active latents (jumprelu);
                                         topk and batchtopk have none
    with `nested`, mean(M) is a mean over several reconstructions (nested.py)
    gated adds mean(w_x (x_gate - x)^2), x_gate = ReLU(p) W_dec + b_dec, both held constant (arXiv 2404.16014, eq. 8)

The thresholds of jumprelu, t = exp(log_threshold), get straight-through estimates of their gradients, with a window of
width e = `jump_bandwidth` (arXiv 2407.14435, eq. 11, 12): where |p - t| < e/2,
    dz/dt = -t/e and d(number of active)/dt = -1/e.

Means are over the whole batch, for any size of the micro-batches and any number of ranks: gradients are sums.

The product of the encoder is dense. The other four products are dense, or use the active latents only: for each
micro-batch the faster way at its density is taken (latent_matrix.py). Both ways compute the same sums.

On a GPU, where a batch is one micro-batch if a sixteenth of the memory holds its dense (tokens, L) matrix, the host
waits for the device once per micro-batch, for the number of active latents (jumprelu and gated:
twice; batchtopk: four times), and once per step for all terms of the loss, with the number of latents that are dead
behind it; where that number is not given to the next step, once more for their indices.
Shapes: B tokens of a micro-batch, N of the batch, D width, L latents, K dead latents.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from itertools import pairwise
from typing import Concatenate, ParamSpec

import torch

from cytosae.sae import SparseAutoencoder, screen_of

from .batch_top_k import choose_largest
from .dead_latents import dead_gradients
from .distributed import ALONE, Ranks
from .encoder_product import EncoderProduct
from .latent_matrix import default_sparse_below, latents_of, latents_of_active, parts_of
from .nested import add_nested, nested_edges
from .objective import Objective
from .precision import float32_products
from .residuals import Residuals, compare_reconstruction

_Rest = ParamSpec("_Rest")
NORM_FLOOR = 1e-12  # lower bound of ||x|| in 1 / ||x||, for tokens that are zero
_MICRO_BATCH_BYTES = 256 << 20  # of one dense (tokens, latents) matrix
_MICRO_BATCH_BYTES_ON_GPU = 1 << 30  # at least
_SHARE_OF_GPU = 16  # of its memory; up to four such matrices are there at a time


@dataclass(frozen=True)
class BatchLosses:
    """The terms of the loss on one batch, and what the log needs. `loss` = mse + l1 + gate + dead."""

    mse: float  # mean(M), in the form that the objective asks for
    l1: float  # the sparsity term of any activation
    gate: float  # gated: error of the second reconstruction
    dead: float  # loss of ghost gradients or auxk
    l0: float  # mean number of active latents per token
    explained_variance: float  # 1 - sum ||x - x_hat||^2 / sum ||x - mean(x)||^2
    explained_variance_uncentered: float  # the same with sum ||x||^2, as in the log of the released code
    fired: torch.Tensor  # (L,) bool: active on at least one token of the batch
    threshold: float | None = None  # batchtopk: the smallest pre-activation that was kept
    n_dead_next: int | None = None  # latents that are dead behind the step, if it was asked for

    @property
    def loss(self) -> float:
        """The value that is minimised."""
        return self.mse + self.l1 + self.gate + self.dead


def _at_its_precision(
    step: Callable[Concatenate[SparseAutoencoder, torch.Tensor, Objective, _Rest], BatchLosses],
) -> Callable[Concatenate[SparseAutoencoder, torch.Tensor, Objective, _Rest], BatchLosses]:
    """The step, in which products of float32 are what the objective's precision says."""

    @wraps(step)
    def exact(
        model: SparseAutoencoder,
        tokens_ND: torch.Tensor,
        objective: Objective,
        *args: _Rest.args,
        **kwargs: _Rest.kwargs,
    ) -> BatchLosses:
        with float32_products(objective.precision, tokens_ND.device.type):
            return step(model, tokens_ND, objective, *args, **kwargs)

    return exact


@_at_its_precision
def loss_and_gradients(
    model: SparseAutoencoder,
    tokens_ND: torch.Tensor,
    objective: Objective,
    *,
    l1: float,
    dead_L: torch.Tensor | None = None,
    n_dead: int | None = None,
    silence: tuple[torch.Tensor, int] | None = None,
    token_scale: float = 1.0,
    ranks: Ranks = ALONE,
    n_tokens: int | None = None,
    micro_batch: int | None = None,
    sparse_below: float | None = None,
) -> BatchLosses:
    """Set `.grad` of all parameters to the gradient of the mean loss over the batch; change nothing else.

    Memory: one dense (tokens, L) matrix of a micro-batch; for jumprelu and gated a second one where work is dense.

    Parameters
    ----------
    tokens_ND : (N, D) on the model's device, any float type; converted to float32 per micro-batch. With several ranks,
        this rank's tokens: every rank gets gradients and losses of the whole batch
    l1 : weight of the sparsity term in this step, >= 0
    dead_L : (L,) bool, the dead latents; None: there are none
    n_dead : how many they are, if it is known: then the host need not wait for it
    silence : ((L,) int64 steps since each latent was active, the most for one that is not dead), both before this step:
        count the latents that are dead behind it
    token_scale : factor that tokens are multiplied with first
    n_tokens : tokens of all ranks together, which several ranks must say; default: N
    micro_batch : tokens per micro-batch; default: one dense (tokens, L) matrix has at most 256 MiB (GPU: a
        sixteenth of its memory, at least 1 GiB)
    sparse_below : share of active entries, 0 to 1, below which work is sparse; default: where both ways take as long

    Returns
    -------
    The losses; NaN or infinite if the tokens or the weights are (the caller decides what to do).
    """
    n, width, device = n_tokens or len(tokens_ND), tokens_ND.shape[1], tokens_ND.device
    dtypes = objective.dtypes(model)
    compute_dtype = dtypes.others
    micro_batch = micro_batch or _micro_batch(len(tokens_ND), model, dtypes.p)
    b_dec, W_dec = model.b_dec.detach(), model.W_dec.detach().to(compute_dtype)
    encoder = EncoderProduct(model, dtypes)
    grads = _zeroed_gradients(model)
    dead = dead_gradients(model, dead_L, objective, n_dead)
    magnitudes = _MagnitudeGradients(model) if model.activation == "gated" else None
    penalty = l1 / n if model.activation == "relu" else 0.0
    totals = _Totals(n, width, model.n_latents, device)
    sums = totals.by_name
    # one buffer for all micro-batches: fresh memory would cost a page fault per page
    pre_acts_buffer = torch.empty(min(micro_batch, len(tokens_ND)), model.n_latents, dtype=dtypes.p, device=device)
    edges = nested_edges(objective.nested, model.n_latents)
    starts = range(0, len(tokens_ND), micro_batch)

    def tokens(number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens x of a micro-batch, and the encoder's operand of them."""
        x_BD = tokens_ND[starts[number] : starts[number] + micro_batch].float()
        if token_scale != 1:
            x_BD = x_BD * token_scale
        return x_BD, encoder.operand(x_BD)

    def encoded(operand: torch.Tensor) -> torch.Tensor:
        return encoder.pre_activations(operand, pre_acts_buffer[: len(operand)])

    screen = None
    if len(starts) and device.type == "cpu":
        screen = screen_of(model, tokens(0)[1], default_sparse_below("cpu") if sparse_below is None else sparse_below)
    largest = None
    if model.activation == "batchtopk":
        assert model.k is not None
        largest = choose_largest(lambda i: encoded(tokens(i)[1]), len(starts), k=model.k, n=n, ranks=ranks)
        if largest is None:
            return _not_finite(totals.fired)

    for number in range(len(starts)):
        # encoder: pre-activations p, then latents z
        x_BD, operand = tokens(number)
        centred_BD = encoder.centred(x_BD, operand)
        p_BL = pre_acts_buffer[: len(x_BD)]
        found = None if screen is None else screen.active(operand, p_BL)
        if largest is None and found is None:
            p_BL = encoded(operand)
        z_dead_BK = None
        if dead is not None and found is None and (largest is None or len(starts) == 1):
            z_dead_BK = dead.take(p_BL, dead.latents)
        elif dead is not None:  # of the others the largest are known
            z_dead_BK = dead.take(encoder.of_latents(operand, dead.latents), None)
        near = gate = None  # these read p, which becomes z in place
        if model.activation == "jumprelu":
            threshold_L = model.log_threshold.detach().exp()
            is_near_BL = (p_BL - threshold_L).abs_() < objective.jump_bandwidth / 2
            near = latents_of(is_near_BL.to(p_BL.dtype), sparse_below)
        elif model.activation == "gated":
            gate = latents_of(p_BL.clone(), sparse_below)
        if found is not None:
            parts = [latents_of_active(found.part(*ends), sparse_below) for ends in pairwise(edges)]
        elif largest is None:
            with torch.no_grad():
                p_BL = model.keep_active_(p_BL)
            parts = parts_of(p_BL, edges, sparse_below)
        else:
            parts = largest.latents(number, edges, sparse_below)

        # decoder: reconstruction, its error, and the gradients through z
        w_B1, factor = loss_weight(x_BD, objective.loss), 2 / (n * width)
        if len(parts) == 1:
            z = parts[0]
            x_hat_BD = z.decoded(W_dec, b_dec)
            residuals = compare_reconstruction(x_hat_BD, x_BD, w_B1, factor, compute_dtype)
            of_encoder = grads if magnitudes is None else magnitudes.grads
            z.add_gradients(
                *(W_dec, residuals.d_x_hat_BD, centred_BD, penalty),
                *(of_encoder["W_enc"], of_encoder["b_enc"], grads["W_dec"]),
            )
        else:
            x_hat_BD, residuals = add_nested(
                *(parts, edges, W_dec, b_dec, x_BD, w_B1, centred_BD),
                factor=factor,
                penalty=penalty,
                compute_dtype=compute_dtype,
                grads=grads,
            )
        d_x_hat_BD = residuals.d_x_hat_BD
        grads["b_dec"] += residuals.d_sum_D
        n_active = sum(part.n_active for part in parts)
        totals.add(n_active, torch.cat([part.fired for part in parts]), residuals)

        # sparsity, and what it adds to the gradients (relu: `penalty` above)
        if gate is not None:
            of_gate = compare_reconstruction(gate.decoded(W_dec, b_dec), x_BD, w_B1, 2 / (n * width), compute_dtype)
            sums["gate"] += of_gate.weighted / (n * width)
            sums["sparsity"] += l1 * gate.total / n
            gate.without_values().add_gradients(  # without values: the decoder is held constant here
                W_dec, of_gate.d_x_hat_BD, centred_BD, l1 / n, grads["W_enc"], grads["b_enc"], grads["W_dec"]
            )
        elif near is not None:
            bandwidth = objective.jump_bandwidth
            # dz/dlog t = t dz/dt
            near.add_products(W_dec, d_x_hat_BD, -(threshold_L.square()) / bandwidth, grads["log_threshold"])
            grads["log_threshold"] -= threshold_L * near.count() * (l1 / (n * bandwidth))
            sums["sparsity"] += l1 * n_active / n
        else:
            for part in parts:
                sums["sparsity"] += penalty * part.total

        # dead latents
        if dead is not None and z_dead_BK is not None:
            error_BD = x_hat_BD - x_BD
            dead.add(z_dead_BK, centred_BD, -error_BD, error_BD.square() * w_B1, w_B1, n_values=n * width)

    if dead is not None:
        sums["dead"] += dead.loss
    total = totals.reduced(ranks, silence)
    if magnitudes is not None:
        magnitudes.add_to(grads)
    if dead is not None:
        total["dead"] = dead.add_to(grads, mse=total["mse"], loss=total["dead"])
    # through x - b_dec in the encoder: the gradient there is -W_enc times that of b_enc
    grads["b_dec"] -= model.W_enc.detach() @ grads["b_enc"]
    if magnitudes is not None:
        grads["b_dec"] -= model.W_enc.detach() @ (grads["b_mag"] * model.r_mag.detach().exp())
    ranks.all_reduce_sum_(*grads.values())
    return BatchLosses(
        mse=total["mse"],
        l1=total["sparsity"],
        gate=total["gate"],
        dead=total["dead"],
        l0=total["active"] / n,
        explained_variance=_explained(total["error"], total["square"] - n * total["square_of_mean"]),
        explained_variance_uncentered=_explained(total["error"], total["square"]),
        fired=totals.fired,
        threshold=None if largest is None else largest.threshold,
        n_dead_next=None if silence is None else int(total["dead_next"]),
    )


class _Totals:
    """Sums over a batch, in float64. They stay on the device until `reduced` reads all of them at once."""

    NAMES = ("active", "mse", "sparsity", "gate", "error", "square", "dead")

    def __init__(self, n: int, width: int, n_latents: int, device: torch.device) -> None:
        self._n, self._width = n, width
        self._values = torch.zeros(len(self.NAMES), dtype=torch.float64, device=device)
        self.by_name = dict(zip(self.NAMES, self._values.unbind(), strict=True))  # views: `+=` changes `_values`
        self._mean_D = torch.zeros(width, dtype=torch.float64, device=device)
        self.fired = torch.zeros(n_latents, dtype=torch.bool, device=device)

    def add(self, n_active: int, fired_L: torch.Tensor, residuals: Residuals) -> None:
        """Add what every activation has in common, of one micro-batch."""
        self.fired |= fired_L
        self.by_name["active"] += n_active
        self.by_name["mse"] += residuals.weighted / (self._n * self._width)
        self.by_name["error"] += residuals.error
        self.by_name["square"] += residuals.square
        self._mean_D += residuals.x_sum_D / self._n

    def reduced(self, ranks: Ranks, silence: tuple[torch.Tensor, int] | None = None) -> dict[str, float]:
        """The sums over all ranks; `square_of_mean`, ||mean(x)||^2; and `dead_next`. Waits for the device, once."""
        ranks.all_reduce_sum_(self._values, self._mean_D)
        ranks.all_reduce_any_(self.fired)
        values = torch.cat([self._values, self._mean_D.square().sum()[None], self._dead_next(silence)]).tolist()
        return dict(zip((*self.NAMES, "square_of_mean", "dead_next")[: len(values)], values, strict=True))

    def _dead_next(self, silence: tuple[torch.Tensor, int] | None) -> torch.Tensor:
        """(1,): the number of dead latents behind the step; (0,) if it was not asked for."""
        if silence is None:
            return self._values[:0]
        steps_L, most = silence
        return ((steps_L + 1 > most) & ~self.fired).sum().double()[None]


class _MagnitudeGradients:
    """Gated: gradients through the magnitudes ReLU(exp(r_mag) u + b_mag), u = (x - b_dec) W_enc, summed separately.

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


def _micro_batch(n: int, model: SparseAutoencoder, p_dtype: torch.dtype) -> int:
    """Tokens per micro-batch, of n; on a GPU all of equal size, so that none is too small to use the GPU well."""
    is_on_gpu = model.W_enc.device.type == "cuda"
    n_bytes = _micro_batch_bytes_on_gpu(model.W_enc.device) if is_on_gpu else _MICRO_BATCH_BYTES
    most = max(1, n_bytes // (p_dtype.itemsize * model.n_latents))
    return math.ceil(n / math.ceil(n / most)) if is_on_gpu and n else most


def _micro_batch_bytes_on_gpu(device: torch.device) -> int:
    """A sixteenth of the card's memory, so that a whole batch is one micro-batch where it fits: fewer waits.

    Of all its memory, not of what is free: a run that is continued on such a card must cut its batches in the same way.
    """
    total = torch.cuda.get_device_properties(device).total_memory
    return max(_MICRO_BATCH_BYTES_ON_GPU, total // _SHARE_OF_GPU)


def _zeroed_gradients(model: SparseAutoencoder) -> dict[str, torch.Tensor]:
    """The gradients by parameter, all 0; their memory is reused in every step."""
    grads = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)  # in W_enc's own layout: stored by latent
        else:
            parameter.grad.zero_()
        grads[name] = parameter.grad
    return grads


def _not_finite(fired: torch.Tensor) -> BatchLosses:
    """The losses of a batch with a pre-activation that is NaN."""
    nan = math.nan
    return BatchLosses(
        mse=nan,
        l1=0.0,
        gate=0.0,
        dead=0.0,
        l0=nan,
        explained_variance=nan,
        explained_variance_uncentered=nan,
        fired=fired,
        threshold=nan,
    )


def loss_weight(x_BD: torch.Tensor, loss: str) -> torch.Tensor | float:
    """w_x, the factor of a token's squared errors in the mean over tokens and channels: (B, 1), or one number for all.

    loss : "normed" (1 / ||x||), "eq1" (D, so that the mean over channels becomes a sum), or "mse" (1)
    """
    if loss == "normed":
        return 1 / x_BD.norm(dim=1, keepdim=True).clamp_min(NORM_FLOOR)
    return float(x_BD.shape[1]) if loss == "eq1" else 1.0


def _explained(error: float, total: float) -> float:
    return 1 - error / total if total > 0 else float("nan")
