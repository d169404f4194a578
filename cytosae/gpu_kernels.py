"""What a training step does with the active latents only, compiled for the GPU. Twin: sparse_kernels.py, on the CPU.

A micro-batch's active latents are kept twice: by token, for the reconstruction, and by latent, for the gradients. Each
output row belongs to one program and nothing is added atomically: every sum has a fixed order, so the same input gives
the same bits. What a latent adds up over more than `PART` tokens is cut into parts, which a second kernel adds up.

Rows that are gathered (decoder, the reconstruction's gradient, centred tokens) may be bfloat16, which halves the bytes;
every sum and every gradient is float32.
Shapes: B tokens, D width, L latents, A active (token, latent) pairs, C chunks of a token's latents, P parts.
"""

from dataclasses import dataclass

import torch

from stores.errors import BadInput

from .model import SparseAutoencoder

try:
    import triton
    import triton.language as tl
except ImportError:
    raise BadInput(
        "training on a GPU needs triton, which comes with torch's CUDA builds; none is installed beside this torch "
        f"({torch.__version__}): install a CUDA build of torch, or train with --device cpu"
    ) from None

PART = 1024  # (token, latent) pairs of one latent that one program adds up
_CHUNK = 4096  # latents of one token that one program looks at
_COLUMNS = 256  # of the reconstruction, per program: 49,152 rows of so many bfloat16 columns fit into an H100's L2
_ROWS = 8  # decoder rows that it adds up side by side
_PAIRS = 4  # pairs that a gradient program works on side by side


@dataclass(frozen=True)
class Active:
    """The active latents of a micro-batch, by latent as in sparse_kernels.py, and by token."""

    starts: torch.Tensor  # (L + 1,) int64: those of latent l are tokens[starts[l] : starts[l + 1]], ascending
    tokens: torch.Tensor  # (A,) int32
    values: torch.Tensor  # (A,) float32
    token_starts: torch.Tensor  # (B + 1,) int64: those of token b are latents[token_starts[b] : token_starts[b + 1]]
    latents: torch.Tensor  # (A,) int32, ascending
    token_values: torch.Tensor  # (A,) float32

    @property
    def fired(self) -> torch.Tensor:
        """(L,) bool: active on any token."""
        return self.starts[1:] > self.starts[:-1]


def count_active(pre_activations_BL: torch.Tensor) -> torch.Tensor:
    """(B, C) int32: active latents of each token, chunk by chunk. NaN counts as active, so that it is not lost."""
    n_tokens, n_latents = pre_activations_BL.shape
    assert pre_activations_BL.is_contiguous()
    n_chunks = triton.cdiv(n_latents, _CHUNK)
    counts_BC = pre_activations_BL.new_empty((n_tokens, n_chunks), dtype=torch.int32)
    if counts_BC.numel():
        with torch.cuda.device_of(pre_activations_BL):
            _count[(n_tokens, n_chunks)](pre_activations_BL, counts_BC, n_latents, n_chunks, CHUNK=_CHUNK)
    return counts_BC


def take_active(pre_activations_BL: torch.Tensor, counts_BC: torch.Tensor) -> Active:
    """What is above 0; `counts_BC` from `count_active`. Memory: 24 bytes per active latent, 60 while sorting."""
    n_tokens, n_latents = pre_activations_BL.shape
    ends = counts_BC.flatten().cumsum(0)
    starts = torch.cat([ends.new_zeros(1), ends])
    n_active = int(starts[-1])
    latents = counts_BC.new_empty(n_active)
    values = pre_activations_BL.new_empty(n_active, dtype=torch.float32)
    n_chunks = counts_BC.shape[1]
    if n_active:
        with torch.cuda.device_of(pre_activations_BL):
            _fill[(n_tokens, n_chunks)](
                pre_activations_BL, starts, latents, values, n_latents, n_chunks, CHUNK=_CHUNK, num_warps=8
            )
    tokens = torch.repeat_interleave(counts_BC.sum(1), output_size=n_active).to(latents.dtype)
    by_latent, order = latents.sort(stable=True)
    bounds = torch.arange(n_latents + 1, dtype=by_latent.dtype, device=by_latent.device)
    return Active(
        starts=torch.searchsorted(by_latent, bounds),
        tokens=tokens[order],
        values=values[order],
        token_starts=starts[::n_chunks].contiguous(),
        latents=latents,
        token_values=values,
    )


def add_decoded(active: Active, W_dec_LD: torch.Tensor, out_BD: torch.Tensor) -> None:
    """out += latents W_dec. The decoder may be a bfloat16 copy."""
    n_tokens, width = out_BD.shape
    _check_rows(W_dec_LD, out_BD)
    if not len(active.values):
        return
    columns = min(_COLUMNS, triton.next_power_of_2(width))
    with torch.cuda.device_of(out_BD):
        _add_decoded[(n_tokens, triton.cdiv(width, columns))](
            *(active.token_starts, active.latents, active.token_values, W_dec_LD, out_BD, width),
            ROWS=_ROWS,
            COLUMNS=columns,
        )


def add_gradients(
    active: Active,
    *,
    W_dec_LD: torch.Tensor,
    d_x_hat_BD: torch.Tensor,
    centred_BD: torch.Tensor,
    penalty: float,
    grad_W_enc_LD: torch.Tensor,
    grad_b_enc_L: torch.Tensor,
    grad_W_dec_LD: torch.Tensor,
) -> None:
    """Add the gradients of encoder and decoder in one pass over the active latents.

    d_z = <d_x_hat, W_dec row> + penalty;  W_dec row += z d_x_hat;  W_enc column += d_z (x - b_dec);  b_enc += d_z

    Parameters
    ----------
    W_dec_LD, d_x_hat_BD, centred_BD : float32, or bfloat16 copies
    d_x_hat_BD : gradient of the loss with respect to the reconstruction
    centred_BD : x - b_dec
    penalty : the L1 term's gradient with respect to an active latent
    grad_W_enc_LD : of W_enc, transposed
    """
    if not len(active.values):
        return
    width = W_dec_LD.shape[1]
    _check_rows(W_dec_LD, d_x_hat_BD, centred_BD, grad_W_enc_LD, grad_W_dec_LD)
    block = triton.next_power_of_2(width)
    n_parts_L = (active.starts.diff() + PART - 1) // PART
    latents_P = torch.repeat_interleave(n_parts_L)  # each latent as often as it has parts
    first_part_L = n_parts_L.cumsum(0) - n_parts_L
    number_P = torch.arange(len(latents_P), device=latents_P.device) - first_part_L[latents_P]
    is_shared_P = n_parts_L[latents_P] > 1
    slots_P = torch.where(is_shared_P, is_shared_P.cumsum(0) - 1, -1)
    shared = (n_parts_L > 1).nonzero().squeeze(1)
    slot_starts = torch.cat([shared.new_zeros(1), n_parts_L[shared].cumsum(0)])
    sums = W_dec_LD.new_empty((int(slot_starts[-1]), 2 * width + 1), dtype=torch.float32)
    grads = grad_W_dec_LD, grad_W_enc_LD, grad_b_enc_L
    with torch.cuda.device_of(W_dec_LD):
        _add_gradients[(len(latents_P),)](
            *(active.starts, active.tokens, active.values, latents_P, number_P, slots_P),
            *(W_dec_LD, d_x_hat_BD, centred_BD, penalty, *grads, sums, width),
            PART=PART,
            PAIRS=_PAIRS,
            BLOCK=block,
            num_warps=max(4, block // 256),  # fewer would not fit into the registers
        )
        if len(shared):
            _add_parts[(len(shared),)](shared, slot_starts, sums, *grads, width, BLOCK=block)


@torch.no_grad()
def step(model: SparseAutoencoder, optimizer: torch.optim.Adam, *, normalise: bool) -> None:
    """One step of Adam over all parameters, with what surrounds it in a step: W_dec is read and written once.

    The same as taking out of each row of W_dec's gradient its part along the row, then `optimizer.step()` and, if
    `normalise`, `model.normalise_decoder()`. The gradient itself stays as it is; Adam's state keeps its place and form.
    """
    W_dec, grad = model.W_dec, model.W_dec.grad
    (group,) = optimizer.param_groups
    assert grad is not None
    assert not any(group[name] for name in ("weight_decay", "amsgrad", "maximize"))
    W_dec.grad = None  # so that the optimiser passes over it
    optimizer.step()
    W_dec.grad = grad
    state = optimizer.state[W_dec]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=W_dec.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(W_dec), torch.zeros_like(W_dec)
    state["step"] += 1
    _check_rows(W_dec, grad, state["exp_avg"], state["exp_avg_sq"])
    betas, n_steps = group["betas"], state["step"].double()  # stays on the device: nobody waits for it
    step_size = (group["lr"] / (1 - betas[0] ** n_steps)).float()
    root = (1 - betas[1] ** n_steps).sqrt().float()
    n_latents, width = W_dec.shape
    with torch.cuda.device_of(W_dec):
        _update[(n_latents,)](
            *(W_dec, grad, state["exp_avg"], state["exp_avg_sq"], step_size, root, width),
            BETA1=betas[0],
            BETA2=betas[1],
            EPS=group["eps"],
            NORMALISE=normalise,
            BLOCK=triton.next_power_of_2(width),
        )


def _check_rows(*matrices: torch.Tensor) -> None:
    """The kernels walk through memory row by row."""
    assert all(matrix.is_contiguous() for matrix in matrices)


@triton.jit
def _count(p: tl.tensor, counts: tl.tensor, n_latents: tl.tensor, n_chunks: tl.tensor, CHUNK: tl.constexpr) -> None:
    token, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    latents = chunk * CHUNK + tl.arange(0, CHUNK)
    values = tl.load(p + token * n_latents + latents, mask=latents < n_latents, other=0)
    tl.store(counts + token * n_chunks + chunk, tl.sum(((values <= 0) == 0).to(tl.int32), 0))


@triton.jit
def _fill(
    p: tl.tensor,
    starts: tl.tensor,
    latents_out: tl.tensor,
    values_out: tl.tensor,
    n_latents: tl.tensor,
    n_chunks: tl.tensor,
    CHUNK: tl.constexpr,
) -> None:
    token, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    latents = chunk * CHUNK + tl.arange(0, CHUNK)
    values = tl.load(p + token * n_latents + latents, mask=latents < n_latents, other=0)
    is_active = (values <= 0) == 0
    ones = is_active.to(tl.int32)
    at = tl.load(starts + token * n_chunks + chunk) + tl.cumsum(ones, 0) - ones
    tl.store(latents_out + at, latents, mask=is_active)
    tl.store(values_out + at, values.to(tl.float32), mask=is_active)


@triton.jit
def _add_decoded(
    starts: tl.tensor,
    latents: tl.tensor,
    values: tl.tensor,
    W_dec: tl.tensor,
    out: tl.tensor,
    width: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """One token, some columns. The tokens run faster than the columns, which are thus read from the L2 cache."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    first, stop = tl.load(starts + token), tl.load(starts + token + 1)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(first, stop, ROWS):
        pairs = k + tl.arange(0, ROWS)
        latent = tl.load(latents + pairs, mask=pairs < stop, other=0).to(tl.int64)
        value = tl.load(values + pairs, mask=pairs < stop, other=0)
        is_in = (pairs < stop)[:, None] & (columns < width)[None, :]
        rows = tl.load(W_dec + latent[:, None] * width + columns[None, :], mask=is_in, other=0)
        sums += value[:, None] * rows.to(tl.float32)
    to = out + token * width + columns
    tl.store(to, tl.load(to, mask=columns < width) + tl.sum(sums, 0), mask=columns < width)


@triton.jit
def _add_gradients(
    starts: tl.tensor,
    tokens: tl.tensor,
    values: tl.tensor,
    latents_P: tl.tensor,
    number_P: tl.tensor,
    slots_P: tl.tensor,
    W_dec: tl.tensor,
    d_x_hat: tl.tensor,
    centred: tl.tensor,
    penalty: tl.tensor,
    grad_W_dec: tl.tensor,
    grad_W_enc: tl.tensor,
    grad_b_enc: tl.tensor,
    sums: tl.tensor,
    width: tl.tensor,
    PART: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One part of one latent: added to its gradients, or put into a slot of `sums` if it has more parts."""
    part = tl.program_id(0)
    latent, slot = tl.load(latents_P + part), tl.load(slots_P + part)
    first = tl.load(starts + latent) + tl.load(number_P + part) * PART
    stop = tl.minimum(first + PART, tl.load(starts + latent + 1))
    columns = tl.arange(0, BLOCK)
    in_width = columns < width
    row = tl.load(W_dec + latent * width + columns, mask=in_width, other=0).to(tl.float32)
    dec = tl.zeros((PAIRS, BLOCK), tl.float32)
    enc = tl.zeros((PAIRS, BLOCK), tl.float32)
    bias = tl.zeros((PAIRS,), tl.float32)
    for k in range(first, stop, PAIRS):
        pairs = k + tl.arange(0, PAIRS)
        token = tl.load(tokens + pairs, mask=pairs < stop, other=0).to(tl.int64)
        value = tl.load(values + pairs, mask=pairs < stop, other=0)
        at = token[:, None] * width + columns[None, :]
        is_in = (pairs < stop)[:, None] & in_width[None, :]
        d_out = tl.load(d_x_hat + at, mask=is_in, other=0).to(tl.float32)
        x = tl.load(centred + at, mask=is_in, other=0).to(tl.float32)
        d_z = tl.where(pairs < stop, tl.sum(d_out * row[None, :], 1) + penalty, 0)
        dec += value[:, None] * d_out
        enc += d_z[:, None] * x
        bias += d_z
    if slot < 0:
        to_dec, to_enc = grad_W_dec + latent * width + columns, grad_W_enc + latent * width + columns
        tl.store(to_dec, tl.load(to_dec, mask=in_width) + tl.sum(dec, 0), mask=in_width)
        tl.store(to_enc, tl.load(to_enc, mask=in_width) + tl.sum(enc, 0), mask=in_width)
        tl.store(grad_b_enc + latent, tl.load(grad_b_enc + latent) + tl.sum(bias, 0))
    else:
        to = sums + slot * (2 * width + 1)
        tl.store(to + columns, tl.sum(dec, 0), mask=in_width)
        tl.store(to + width + columns, tl.sum(enc, 0), mask=in_width)
        tl.store(to + 2 * width, tl.sum(bias, 0))


@triton.jit
def _add_parts(
    latents: tl.tensor,
    slot_starts: tl.tensor,
    sums: tl.tensor,
    grad_W_dec: tl.tensor,
    grad_W_enc: tl.tensor,
    grad_b_enc: tl.tensor,
    width: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """One latent of several parts: their sums, in order, added to its gradients."""
    latent = tl.load(latents + tl.program_id(0))
    first, stop = tl.load(slot_starts + tl.program_id(0)), tl.load(slot_starts + tl.program_id(0) + 1)
    columns = tl.arange(0, BLOCK)
    in_width = columns < width
    to_dec, to_enc = grad_W_dec + latent * width + columns, grad_W_enc + latent * width + columns
    dec, enc = tl.load(to_dec, mask=in_width), tl.load(to_enc, mask=in_width)
    bias = tl.load(grad_b_enc + latent)
    for slot in range(first, stop):
        start = sums + slot * (2 * width + 1)
        dec += tl.load(start + columns, mask=in_width)
        enc += tl.load(start + width + columns, mask=in_width)
        bias += tl.load(start + 2 * width)
    tl.store(to_dec, dec, mask=in_width)
    tl.store(to_enc, enc, mask=in_width)
    tl.store(grad_b_enc + latent, bias)


@triton.jit
def _update(
    weights: tl.tensor,
    grads: tl.tensor,
    firsts: tl.tensor,
    seconds: tl.tensor,
    step_size: tl.tensor,
    root: tl.tensor,
    width: tl.tensor,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    NORMALISE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One row: the gradient's part along it taken out, Adam, norm 1 (a zero row stays zero)."""
    columns = tl.arange(0, BLOCK)
    in_width = columns < width
    at = tl.program_id(0).to(tl.int64) * width + columns
    row, grad = tl.load(weights + at, mask=in_width, other=0), tl.load(grads + at, mask=in_width, other=0)
    grad -= tl.sum(row * grad, 0) * row
    first = BETA1 * tl.load(firsts + at, mask=in_width, other=0) + (1 - BETA1) * grad
    second = BETA2 * tl.load(seconds + at, mask=in_width, other=0) + (1 - BETA2) * grad * grad
    row -= tl.load(step_size) * first / (tl.sqrt(second) / tl.load(root) + EPS)
    if NORMALISE:
        square = tl.sum(row * row, 0)
        row = row / tl.sqrt(tl.where(square == 0, 1, square))
    tl.store(weights + at, row, mask=in_width)
    tl.store(firsts + at, first, mask=in_width)
    tl.store(seconds + at, second, mask=in_width)
