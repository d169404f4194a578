"""Kernels of a training step that work on active latents only, for the GPU (Triton). Twin: kernels_cpu.py.

The active latents of a micro-batch are stored twice: by token (CSR), for the reconstruction, and by latent (CSC), for
the gradients. Each output row is written by one program, and no atomic additions are used: every sum has a fixed order,
so the same input gives the same bits. A latent that is active on more than `PART` tokens is cut into parts; a second
kernel adds the sums of the parts.
The host waits for the device in `mark_active` only. Sizes that depend on more than the count found there are upper
bounds.

Rows that are gathered (decoder, gradient of the reconstruction, centred tokens) may be bfloat16 or float16, which
halves the traffic; every sum and every gradient is float32.
Shapes: B tokens, D width, L latents, A active (token, latent) pairs, W words of 32 latents, P parts, K dead latents.
"""

from dataclasses import dataclass

import torch

from cytosae.sae import SparseAutoencoder
from stores.errors import BadInput

try:
    import triton
    import triton.language as tl
except ImportError:
    raise BadInput(
        "training on a GPU needs triton, which comes with torch's CUDA builds; none is installed beside this torch "
        f"({torch.__version__}): install a CUDA build of torch, or train with --device cpu"
    ) from None

PART = 1024  # (token, latent) pairs of one latent that one program sums
_WORDS = 128  # words (32 latents each) of a token that a program handles together
_COLUMNS = (
    256  # columns of the reconstruction per program: 49,152 rows of so many bfloat16 columns fit into an H100's L2
)
_ROWS = 8  # decoder rows that it adds in parallel
_PAIRS = 4  # pairs that a gradient program handles in parallel
_TOKENS = 16  # tokens that one program compares with their reconstructions
_DEAD = 512  # dead latents that a program handles together
_DEAD_TOKENS = 256  # tokens whose values one program handles, a few at a time
_DEAD_ROWS = 4  # of them at a time


@dataclass(frozen=True)
class Active:
    """The active latents of a micro-batch, by latent (as in kernels_cpu.py) and by token."""

    starts: torch.Tensor  # (L + 1,) int64: those of latent l are tokens[starts[l] : starts[l + 1]], ascending
    tokens: torch.Tensor  # (A,) int32
    values: torch.Tensor  # (A,) float32
    token_starts: torch.Tensor  # (B + 1,) int64: those of token b are latents[token_starts[b] : token_starts[b + 1]]
    latents: torch.Tensor  # (A,) int32, ascending
    token_values: torch.Tensor  # (A,) float32

    @property
    def fired(self) -> torch.Tensor:
        """(L,) bool: active on at least one token."""
        return self.starts[1:] > self.starts[:-1]


@dataclass(frozen=True)
class Marks:
    """Which latents are active, one bit each: the second pass reads these instead of all pre-activations."""

    words: torch.Tensor  # (B, W) int32: bit l % 32 of word l // 32 is latent l
    counts: torch.Tensor  # (B,) int32
    n_active: int


@dataclass(frozen=True)
class ByToken:
    """Active latents as they are found: by token, with their values."""

    counts: torch.Tensor  # (B,) int32
    latents: torch.Tensor  # (A,) int32: those of the first token, ascending, then those of the next
    values: torch.Tensor  # (A,) float32

    def kept(self, is_kept_A: torch.Tensor) -> "ByToken":
        """Those where `is_kept`, (A,) bool. Waits for the device."""
        before = _starts(is_kept_A.int())
        starts = before[_starts(self.counts)]
        return ByToken(starts.diff().to(self.counts.dtype), self.latents[is_kept_A], self.values[is_kept_A])

    def part(self, low: int, high: int) -> "ByToken":
        """Those of the latents from `low` to before `high`, which are counted from 0 on then. Waits for the device."""
        found = self.kept((self.latents >= low) & (self.latents < high))
        return ByToken(found.counts, found.latents - low, found.values)


def mark_active(pre_activations_BL: torch.Tensor, above: float = 0.0) -> Marks:
    """Mark the entries above `above` (>= 0), in one pass. NaN counts as active, to reach the loss.

    Waits for the device.
    """
    n_tokens, n_latents = pre_activations_BL.shape
    _check_rows(pre_activations_BL)
    n_words = triton.cdiv(n_latents, 32)
    words = pre_activations_BL.new_empty((n_tokens, n_words), dtype=torch.int32)
    counts = pre_activations_BL.new_empty(n_tokens, dtype=torch.int32)
    if n_tokens:
        with torch.cuda.device_of(pre_activations_BL):
            _mark[(n_tokens,)](pre_activations_BL, words, counts, float(above), n_latents, n_words, WORDS=_WORDS)
    return Marks(words, counts, int(counts.sum()))


def take_active(pre_activations_BL: torch.Tensor, marks: Marks) -> Active:
    """The marked entries; `marks` from `mark_active`. Memory: 24 bytes per active entry, 60 while sorting."""
    return sorted_by_latent(take_by_token(pre_activations_BL, marks), pre_activations_BL.shape[1])


def take_by_token(pre_activations_BL: torch.Tensor, marks: Marks) -> ByToken:
    """The marked entries, by token only. Memory: 8 bytes per active entry."""
    n_tokens, n_latents = pre_activations_BL.shape
    token_starts = _starts(marks.counts)
    latents = marks.counts.new_empty(marks.n_active)
    values = pre_activations_BL.new_empty(marks.n_active, dtype=torch.float32)
    if marks.n_active:
        with torch.cuda.device_of(pre_activations_BL):
            _take[(n_tokens,)](
                *(pre_activations_BL, marks.words, token_starts, latents, values, n_latents, marks.words.shape[1]),
                WORDS=4 * _WORDS,
            )
    return ByToken(marks.counts, latents, values)


def sorted_by_latent(found: ByToken, n_latents: int) -> Active:
    """The same entries by latent, too."""
    latents, values = found.latents, found.values
    tokens = torch.repeat_interleave(found.counts, output_size=len(latents)).to(latents.dtype)
    by_latent, order = latents.sort(stable=True)
    bounds = torch.arange(n_latents + 1, dtype=by_latent.dtype, device=by_latent.device)
    return Active(
        starts=torch.searchsorted(by_latent, bounds),
        tokens=tokens[order],
        values=values[order],
        token_starts=_starts(found.counts),
        latents=latents,
        token_values=values,
    )


def add_decoded(active: Active, W_dec_LD: torch.Tensor, out_BD: torch.Tensor) -> None:
    """out += z W_dec. The decoder may be a bfloat16 copy."""
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
    W_dec_LD, d_x_hat_BD, centred_BD : float32, bfloat16 or float16, each its own
    d_x_hat_BD : gradient of the loss with respect to the reconstruction
    centred_BD : x - b_dec; its rows may lie further apart than their length
    penalty : the L1 term's gradient with respect to an active latent
    grad_W_enc_LD : of W_enc, transposed
    """
    if not len(active.values):
        return
    width = W_dec_LD.shape[1]
    _check_rows(W_dec_LD, d_x_hat_BD, grad_W_enc_LD, grad_W_dec_LD)
    assert centred_BD.stride(1) == 1
    block = triton.next_power_of_2(width)
    n_pairs, n_latents = len(active.values), len(W_dec_LD)
    n_parts_L = (active.starts.diff() + PART - 1) // PART
    part_starts = _starts(n_parts_L)
    most_parts = n_latents + n_pairs // PART  # the last part of each, and the full ones before
    latents_P = torch.searchsorted(part_starts[1:], torch.arange(most_parts, device=part_starts.device), right=True)
    slot_starts = _starts(torch.where(n_parts_L > 1, n_parts_L, 0))  # of the latents with several parts
    # two parts or more are at most twice the pairs / PART
    sums = W_dec_LD.new_empty((2 * n_pairs // PART, 2 * width + 1), dtype=torch.float32)
    grads = grad_W_dec_LD, grad_W_enc_LD, grad_b_enc_L
    with torch.cuda.device_of(W_dec_LD):
        _add_gradients[(most_parts,)](
            *(active.starts, active.tokens, active.values, latents_P, part_starts, slot_starts),
            *(W_dec_LD, d_x_hat_BD, centred_BD, penalty, *grads, sums, n_latents, width, centred_BD.stride(0)),
            PART=PART,
            PAIRS=_PAIRS,
            BLOCK=block,
            num_warps=max(4, block // 256),  # fewer would not fit into the registers
        )
        if n_pairs > PART:
            _add_parts[(n_latents,)](slot_starts, sums, *grads, width, BLOCK=block)


def compare_tokens(
    x_hat_BD: torch.Tensor, x_BD: torch.Tensor, weights_B: torch.Tensor, factor: float, d_x_hat_BD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Write the gradient factor * weight * (x_hat - x) into `d_x_hat_BD`, of any float type, and sum, all in one pass.

    Returns
    -------
    (D,) float32: sum of the gradient over the tokens, before rounding; (D,) float64: sum of x over the tokens; and (3,)
    float64: sums of weight * error^2, error^2 and x^2.
    """
    n_tokens, width = x_BD.shape
    _check_rows(x_hat_BD, x_BD, weights_B, d_x_hat_BD)
    n_programs = triton.cdiv(n_tokens, _TOKENS)
    d_sums = x_BD.new_empty((n_programs, width))
    x_sums = x_BD.new_empty((n_programs, width), dtype=torch.float64)
    sums = x_BD.new_empty((n_programs, 3), dtype=torch.float64)
    if n_tokens:
        with torch.cuda.device_of(x_BD):
            _compare[(n_programs,)](
                *(x_hat_BD, x_BD, weights_B, factor, d_x_hat_BD, d_sums, x_sums, sums, n_tokens, width),
                TOKENS=_TOKENS,
                BLOCK=triton.next_power_of_2(width),
            )
    return d_sums.sum(0), x_sums.sum(0), sums.sum(0)


def exp_of_columns(
    p_BN: torch.Tensor, columns_K: torch.Tensor | None, dtype: torch.dtype, n_columns: int
) -> torch.Tensor:
    """(B, n_columns): exp(p) of some columns (None: of all), computed in float32 and rounded; 0 in further columns.

    p_BN : any float type; the columns are read where they lie
    """
    _check_rows(p_BN)
    n_tokens, n_all = p_BN.shape
    if columns_K is None:
        columns_K = torch.arange(n_all, device=p_BN.device)
    columns_K = columns_K.to(torch.int32)
    out = p_BN.new_empty((n_tokens, n_columns), dtype=dtype)
    if out.numel():
        with torch.cuda.device_of(p_BN):
            _exp_of[(triton.cdiv(n_columns, _DEAD), triton.cdiv(n_tokens, _DEAD_TOKENS))](
                *(p_BN, columns_K, out, n_tokens, n_all, len(columns_K), n_columns),
                TOKENS=_DEAD_TOKENS,
                ROWS=_DEAD_ROWS,
                BLOCK=_DEAD,
            )
    return out


def times_slope_(d_z_BK: torch.Tensor, z_BK: torch.Tensor, *, is_exp: bool) -> torch.Tensor:
    """d_z becomes d_p = d_z dz/dp; returns the sums of d_p over the tokens, (K,) float32, from before rounding.

    is_exp : dz/dp is z; False: 1 where z > 0
    """
    _check_rows(d_z_BK, z_BK)
    n_tokens, n_dead = d_z_BK.shape
    n_parts = triton.cdiv(n_tokens, _DEAD_TOKENS)
    sums = d_z_BK.new_empty((n_parts, n_dead), dtype=torch.float32)
    if sums.numel():
        with torch.cuda.device_of(d_z_BK):
            _times_slope[(triton.cdiv(n_dead, _DEAD), n_parts)](
                *(d_z_BK, z_BK, sums, n_tokens, n_dead),
                IS_EXP=is_exp,
                TOKENS=_DEAD_TOKENS,
                ROWS=_DEAD_ROWS,
                BLOCK=_DEAD,
            )
    return sums.sum(0)


@torch.no_grad()
def step(model: SparseAutoencoder, optimizer: torch.optim.Adam, *, normalise: bool) -> None:
    """Projection of W_dec's gradient, one step of Adam over all parameters, and decoder norms: W_dec is read once.

    The same as `remove_parallel_gradient`, then `optimizer.step()` and, if `normalise`, `model.normalise_decoder()`,
    except that `W_dec.grad` is left unchanged. Adam's state keeps its names and shapes.
    """
    W_dec, grad = model.W_dec, model.W_dec.grad
    (group,) = optimizer.param_groups
    assert grad is not None
    assert not any(group[name] for name in ("weight_decay", "amsgrad", "maximize"))
    W_dec.grad = None  # so that the optimizer skips it
    optimizer.step()
    W_dec.grad = grad
    state = optimizer.state[W_dec]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=W_dec.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(W_dec), torch.zeros_like(W_dec)
    state["step"] += 1
    _check_rows(W_dec, grad, state["exp_avg"], state["exp_avg_sq"])
    betas, n_steps = group["betas"], state["step"].double()  # on the device: the host does not wait for it
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


def _starts(counts: torch.Tensor) -> torch.Tensor:
    """(n + 1,) int64: the start of each of n segments of these lengths, and the end of the last one."""
    ends = counts.cumsum(0)
    return torch.cat([ends.new_zeros(1), ends])


def _check_rows(*matrices: torch.Tensor) -> None:
    """The kernels need matrices that are contiguous, row by row."""
    assert all(matrix.is_contiguous() for matrix in matrices)


@triton.jit
def _mark(
    p: tl.tensor,
    words_out: tl.tensor,
    counts: tl.tensor,
    above: tl.tensor,
    n_latents: tl.tensor,
    n_words: tl.tensor,
    WORDS: tl.constexpr,
) -> None:
    """One token."""
    token = tl.program_id(0).to(tl.int64)
    bits = tl.arange(0, 32)
    n_active = tl.zeros((WORDS,), tl.int32)
    for first in range(0, n_words, WORDS):
        words = first + tl.arange(0, WORDS)
        latents = words[:, None] * 32 + bits[None, :]
        values = tl.load(p + token * n_latents + latents, mask=latents < n_latents, other=0)
        marked = tl.sum(((values.to(tl.float32) <= above) == 0).to(tl.int32) << bits[None, :], 1)
        tl.store(words_out + token * n_words + words, marked, mask=words < n_words)
        n_active += _count_bits(marked.to(tl.uint32, bitcast=True))
    tl.store(counts + token, tl.sum(n_active, 0))


@triton.jit
def _take(
    p: tl.tensor,
    words_in: tl.tensor,
    starts: tl.tensor,
    latents_out: tl.tensor,
    values_out: tl.tensor,
    n_latents: tl.tensor,
    n_words: tl.tensor,
    WORDS: tl.constexpr,
) -> None:
    """One token: the set bits of each word, the lowest first."""
    token = tl.program_id(0).to(tl.int64)
    start = tl.load(starts + token)
    for first in range(0, n_words, WORDS):
        words = first + tl.arange(0, WORDS)
        marked = tl.load(words_in + token * n_words + words, mask=words < n_words, other=0).to(tl.uint32, bitcast=True)
        n_active = _count_bits(marked)
        at = start + tl.cumsum(n_active, 0) - n_active
        for _ in range(tl.max(n_active, 0)):
            is_left = marked != 0
            rest = marked & (marked - 1)
            latents = words * 32 + _count_bits((marked ^ rest) - 1)
            tl.store(latents_out + at, latents, mask=is_left)
            values = tl.load(p + token * n_latents + latents, mask=is_left, other=0)
            tl.store(values_out + at, values.to(tl.float32), mask=is_left)
            marked = rest
            at += 1
        start += tl.sum(n_active, 0)


@triton.jit
def _count_bits(words: tl.tensor) -> tl.tensor:
    """Number of set bits of each uint32, as int32: sums of neighbouring fields, twice as wide each time."""
    pairs = words - ((words >> 1) & 0x55555555)
    fours = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    bytes_ = (fours + (fours >> 4)) & 0x0F0F0F0F
    halves = bytes_ + (bytes_ >> 8)
    return ((halves + (halves >> 16)) & 63).to(tl.int32)


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
    """One token, some columns. The token is the fast index of the grid, so that these columns stay in the L2 cache."""
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
    part_starts: tl.tensor,
    slot_starts: tl.tensor,
    W_dec: tl.tensor,
    d_x_hat: tl.tensor,
    centred: tl.tensor,
    penalty: tl.tensor,
    grad_W_dec: tl.tensor,
    grad_W_enc: tl.tensor,
    grad_b_enc: tl.tensor,
    sums: tl.tensor,
    n_latents: tl.tensor,
    width: tl.tensor,
    centred_stride: tl.tensor,
    PART: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One part of one latent: added to its gradients, or written to a slot of `sums` if there are several."""
    part = tl.program_id(0)
    latent = tl.load(latents_P + part)
    if latent >= n_latents:  # there are fewer parts than programs
        return
    number = part - tl.load(part_starts + latent)
    slot, slot_end = tl.load(slot_starts + latent) + number, tl.load(slot_starts + latent + 1)
    first = tl.load(starts + latent) + number * PART
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
        is_in = (pairs < stop)[:, None] & in_width[None, :]
        d_at = token[:, None] * width + columns[None, :]
        x_at = token[:, None] * centred_stride + columns[None, :]
        d_out = tl.load(d_x_hat + d_at, mask=is_in, other=0).to(tl.float32)
        x = tl.load(centred + x_at, mask=is_in, other=0).to(tl.float32)
        d_z = tl.where(pairs < stop, tl.sum(d_out * row[None, :], 1) + penalty, 0)
        dec += value[:, None] * d_out
        enc += d_z[:, None] * x
        bias += d_z
    if slot >= slot_end:  # the only part
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
    slot_starts: tl.tensor,
    sums: tl.tensor,
    grad_W_dec: tl.tensor,
    grad_W_enc: tl.tensor,
    grad_b_enc: tl.tensor,
    width: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """One latent: if it has several parts, their sums, in order, added to its gradients."""
    latent = tl.program_id(0).to(tl.int64)
    first, stop = tl.load(slot_starts + latent), tl.load(slot_starts + latent + 1)
    if first == stop:
        return
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
def _compare(
    x_hat: tl.tensor,
    x: tl.tensor,
    weights: tl.tensor,
    factor: tl.tensor,
    d_x_hat: tl.tensor,
    d_sums: tl.tensor,
    x_sums: tl.tensor,
    sums: tl.tensor,
    n_tokens: tl.tensor,
    width: tl.tensor,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Some tokens, one after the other; sums over the columns are computed at the end."""
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    in_width = columns < width
    d_sum = tl.zeros((BLOCK,), tl.float32)
    x_sum = tl.zeros((BLOCK,), tl.float64)
    weighted = tl.zeros((BLOCK,), tl.float64)
    squares = tl.zeros((BLOCK,), tl.float64)
    x_squares = tl.zeros((BLOCK,), tl.float64)
    for token in range(program * TOKENS, tl.minimum(program * TOKENS + TOKENS, n_tokens)):
        at = tl.cast(token, tl.int64) * width + columns
        x_row, x_hat_row = tl.load(x + at, mask=in_width, other=0), tl.load(x_hat + at, mask=in_width, other=0)
        weight = tl.load(weights + token)
        error = x_hat_row - x_row
        d = error * weight * factor
        tl.store(d_x_hat + at, d, mask=in_width)
        d_sum += d
        x_sum += x_row
        weighted += error * error * weight
        squares += error * error
        x_squares += x_row * x_row
    tl.store(d_sums + program * width + columns, d_sum, mask=in_width)
    tl.store(x_sums + program * width + columns, x_sum, mask=in_width)
    tl.store(sums + program * 3, tl.sum(weighted, 0))
    tl.store(sums + program * 3 + 1, tl.sum(squares, 0))
    tl.store(sums + program * 3 + 2, tl.sum(x_squares, 0))


@triton.jit
def _exp_of(
    p: tl.tensor,
    columns_in: tl.tensor,
    out: tl.tensor,
    n_tokens: tl.tensor,
    n_all: tl.tensor,
    n_given: tl.tensor,
    n_columns: tl.tensor,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Some columns of some tokens: their places are read once."""
    to = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_given = to < n_given
    columns = tl.load(columns_in + to, mask=is_given, other=0)
    first = tl.program_id(1) * TOKENS
    for token in range(first, tl.minimum(first + TOKENS, n_tokens), ROWS):
        tokens = (token + tl.arange(0, ROWS)).to(tl.int64)
        is_token = tokens < n_tokens
        from_ = p + tokens[:, None] * n_all + columns[None, :]
        values = tl.exp(tl.load(from_, mask=is_token[:, None] & is_given[None, :], other=0).to(tl.float32))
        values = tl.where(is_given[None, :], values, 0)
        is_out = is_token[:, None] & (to < n_columns)[None, :]
        tl.store(out + tokens[:, None] * n_columns + to[None, :], values, mask=is_out)


@triton.jit
def _times_slope(
    d_z: tl.tensor,
    z: tl.tensor,
    sums: tl.tensor,
    n_tokens: tl.tensor,
    n_dead: tl.tensor,
    IS_EXP: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Some columns of some tokens, and their sums over these tokens."""
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_column = columns < n_dead
    sum_ = tl.zeros((ROWS, BLOCK), tl.float32)
    first = tl.program_id(1) * TOKENS
    for token in range(first, tl.minimum(first + TOKENS, n_tokens), ROWS):
        tokens = (token + tl.arange(0, ROWS)).to(tl.int64)
        at = tokens[:, None] * n_dead + columns[None, :]
        is_in = (tokens < n_tokens)[:, None] & is_column[None, :]
        value = tl.load(z + at, mask=is_in, other=0).to(tl.float32)
        d = tl.load(d_z + at, mask=is_in, other=0).to(tl.float32)
        if IS_EXP:
            d *= value
        else:
            d = tl.where(value > 0, d, 0)
        tl.store(d_z + at, d, mask=is_in)
        sum_ += d
    tl.store(sums + tl.program_id(1).to(tl.int64) * n_dead + columns, tl.sum(sum_, 0), mask=is_column)


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
    """One row: remove the gradient's component along it, Adam, norm 1 (a zero row stays zero)."""
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
