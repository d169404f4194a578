"""Which latents can be active, found by a product of whole numbers: the exact product is computed for these only.

Tokens x (here: x - b_dec) and columns w of W_enc are rounded to 8 bits, x^ = s_x q_x and w^ = s_w q_w. Then

    |x w - x^ w^| = |(x - x^) w + x^ (w - w^)| <= ||x - x^|| ||w|| + ||x^|| ||w - w^||        (Cauchy-Schwarz)

so p = x w + b_enc lies within this of p^ = x^ w^ + b_enc. Of a token, a latent can matter if the upper end is above 0
and, with topk, not below the k-th largest of the lower ends. For these latents, one in a hundred, p is computed in
float32. The result is that of the dense product, but for the order of a sum: no latent is lost, because the bound also
holds every rounding of float32 (`_SLACK`), in whatever order the dense product adds. Twin: tests/.../test_screen.py.
Other activations than relu and topk have a threshold of their own in place of 0.

q_x q_w takes about 0.3 of the time of the float32 product on a processor with VNNI. Where more than `_MOST` of the
latents can be active (as at the start of training, when half of them are), the product is dense as before. That is
decided by weights and tokens alone: in training once a step (`screen_of`), in encoding for each micro-batch
(`ScreenedEncoder`), so that a job that is continued decides as one that never stopped.
Shapes: B tokens of a micro-batch, D width, L latents, C candidates: (token, latent) pairs that can be active.
"""

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch

from .active_latents import Active, by_latent, equal_work
from .model import SparseAutoencoder
from .top_k import replace_least, use_kernels_with_torch_threads

_MOST = 0.05  # candidates, as a share of all pairs, for which this is still faster (docs/log.md)
_SAMPLE, _SAMPLE_LATENTS = 64, 2048  # tokens and latents from which it is foreseen whether it will be
_SMALLEST = 1 << 22  # weights of an encoder, below which the dense product takes too little time
_LEVELS = 127  # of 8 bits with a sign
_TINY = 1e-30  # a row whose largest value is below this becomes 0
_PARTS = 16  # of a micro-batch, each searched by one thread
_CHUNK = 16  # latents that are tested together: most chunks have no candidate
_LARGEST = float(np.finfo(np.float32).max) / 2  # what a sum may come to, so that none of float32 overflows
_UP = 1 + 2.0**-22  # a float64 times this is no smaller as a float32
_SLACK = 2.0**-24  # float32 rounds by at most this; times D and a few, and ||x|| ||w||, that is the error of a product

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Rounded:
    """Rows v as v^ = scale * q, with what bounds need: norms as float32, never below the true ones."""

    q: npt.NDArray[np.int8]  # (R, D)
    scale: npt.NDArray[np.float32]  # (R,)
    norm: npt.NDArray[np.float32]  # (R,) ||v||
    rounded_norm: npt.NDArray[np.float32]  # (R,) ||v^||
    off: npt.NDArray[np.float32]  # (R,) ||v - v^||

    @property
    def is_finite(self) -> bool:
        """False if any value is NaN or infinite; then nothing else here means anything."""
        return bool(np.isfinite(self.norm).all())


def rounded_rows(rows_RD: Array) -> Rounded:
    """Rows (R, D) float32 in 8 bits, each with its own scale."""
    n_rows, width = rows_RD.shape
    q, norms = np.empty((n_rows, width), np.int8), np.empty((4, n_rows), np.float32)
    _round_rows(rows_RD, q, *norms)
    return Rounded(q, *norms)


class Screen:
    """The encoder of an SAE on the CPU, whose weights do not change meanwhile."""

    def __init__(self, W_enc_LD: Array, b_enc_L: Array, k: int | None, above_L: Array | None = None) -> None:
        """A screen for latents with p > above, and of these, with topk, the `k` largest of each token.

        Parameters
        ----------
        W_enc_LD, b_enc_L : W_enc (L, D), transposed, and b_enc (L,), float32; L is a multiple of 16
        k : of topk; None for other activations
        above_L : (L,) float32, at least 0; None: 0
        """
        use_kernels_with_torch_threads()
        self._k, self._W_enc_LD, self._b_enc_L = k, W_enc_LD, b_enc_L
        self._weights = rounded_rows(W_enc_LD)
        self._q_W_enc_DL = torch.from_numpy(self._weights.q).T
        above_L = np.zeros_like(b_enc_L) if above_L is None else above_L
        self._distance_L = b_enc_L - above_L  # p > above where x w + distance > 0
        # more than float32 can round in a sum with it
        self._off_distance_L = (np.abs(b_enc_L) + above_L) * np.float32(2.0**-21)
        self._largest = float(self._weights.norm.max(initial=0)), float(np.abs(b_enc_L).max(initial=0))
        self.is_finite = self._weights.is_finite and bool(np.isfinite(b_enc_L).all() and np.isfinite(above_L).all())

    @property
    def n_latents(self) -> int:
        """L."""
        return len(self._b_enc_L)

    def candidates(self, centred_BD: torch.Tensor, buffer_BL: torch.Tensor) -> Active | None:
        """All that can be active, with p as value; None if they are too many, or a sum may not be finite.

        centred_BD : x - b_dec, float32
        buffer_BL : float32, is overwritten
        """
        x_BD = centred_BD.numpy()
        x, w = rounded_rows(x_BD), self._weights
        of_weights, of_bias = self._largest
        if not x.is_finite or not float(x.norm.max(initial=0)) * of_weights + of_bias < _LARGEST:
            return None
        n_tokens, n_latents = buffer_BL.shape
        products_BL = buffer_BL.view(torch.int32)
        torch._int_mm(torch.from_numpy(x.q), self._q_W_enc_DL, out=products_BL)
        slack = np.float32((x_BD.shape[1] + 16) * _SLACK)
        off_B = (x.off + slack * x.norm) * np.float32(_UP)
        of_latents = (w.scale, self._distance_L, self._off_distance_L, w.norm, w.off)
        intervals = (  # of every pair: what its kernels need for the two ends
            products_BL.numpy().reshape(n_tokens, -1, _CHUNK),
            *(x.scale, off_B, x.rounded_norm),
            *(values_L.reshape(-1, _CHUNK) for values_L in of_latents),
        )
        above_B = np.zeros(n_tokens, np.float32)
        if self._k is not None:
            _kth_lower_end(intervals, self._k, above_B)
            above_B *= np.float32(1 - 2.0**-20)
        n_parts = max(1, min(_PARTS, n_tokens))
        room = int(2 * _MOST * n_latents * -(-n_tokens // n_parts)) + _CHUNK
        starts, counts = np.empty(n_tokens, np.int64), np.empty(n_tokens, np.int64)
        latents = np.empty(n_parts * room, np.int32)
        _find_candidates(intervals, above_B, room, starts, counts, latents)
        if (starts < 0).any() or counts.sum() > _MOST * n_tokens * n_latents:
            return None
        places = by_latent(starts, counts, latents, latents.view(np.float32), n_latents)
        found = Active(n_tokens, *places)  # its values are overwritten now
        _compute(found.starts, found.tokens, found.values, equal_work(found), self._W_enc_LD, self._b_enc_L, x_BD)
        return found if np.isfinite(found.values).all() else None

    def active(self, centred_BD: torch.Tensor, buffer_BL: torch.Tensor) -> Active | None:
        """The active latents z > 0 of a micro-batch, of a relu or topk SAE; None as `candidates`."""
        found = self.candidates(centred_BD, buffer_BL)
        if found is None:
            return None
        if self._k is None:
            return found.kept(found.values > 0)
        is_kept = np.zeros(len(found.values), np.bool_)
        _mark_top_k(found.starts, found.tokens, found.values, self._k, found.n_tokens, numba.get_num_threads(), is_kept)
        return found.kept(is_kept)


class ScreenedEncoder:
    """Finds the latents of an SAE on the CPU whose weights do not change any more, as they are rounded once.

    Each micro-batch decides for itself whether the screen is faster, so that its latents do not depend on others.
    """

    def __init__(self, model: SparseAutoencoder) -> None:
        """`model`: of any activation."""
        self._model = model
        self._few = _screen(model, few=True) if _may_be_screened(model) else None
        self._all: Screen | None = None  # made when it is first needed

    @torch.inference_mode()
    def latents(self, tokens_BD: torch.Tensor, buffer_BL: torch.Tensor) -> Active | None:
        """The latents z > 0 of tokens x, float32; None where the dense product is to be taken.

        buffer_BL : float32, is overwritten
        """
        if self._few is None or not len(tokens_BD):
            return None
        centred_BD = tokens_BD - self._model.b_dec
        if not _is_foreseen(self._few, centred_BD[:: max(1, len(centred_BD) // _SAMPLE)]):
            return None
        if self._all is None:
            self._all = _screen(self._model, few=False)
        if not self._all.is_finite:
            return None
        if self._model.activation in ("relu", "topk"):
            return self._all.active(centred_BD, buffer_BL)
        found = self._all.candidates(centred_BD, buffer_BL)
        return None if found is None else _activated(self._model, found)


def screen_of(model: SparseAutoencoder, centred_BD: torch.Tensor, sparse_below: float) -> Screen | None:
    """A screen for a step of training, where it is faster than the dense product for tokens like these; else None.

    centred_BD : x - b_dec of the first micro-batch, in the type of the encoder's operands
    sparse_below : density below which latents are stored sparsely
    """
    if (
        model.activation not in ("relu", "topk")
        or not _may_be_screened(model)
        or centred_BD.dtype != torch.float32
        or sparse_below < _MOST
        or not len(centred_BD)
        or not _is_foreseen(_screen(model, few=True), centred_BD)
    ):
        return None
    screen = _screen(model, few=False)
    return screen if screen.is_finite else None


def _may_be_screened(model: SparseAutoencoder) -> bool:
    weights = model.W_enc
    return (
        weights.device.type == "cpu"
        and weights.dtype == torch.float32
        and weights.T.is_contiguous()
        and weights.numel() >= _SMALLEST
        and model.n_latents % _CHUNK == 0
        and multiplies_whole_numbers()
    )


def _screen(model: SparseAutoencoder, *, few: bool) -> Screen:
    """With `few`: of some latents, which tell in a fiftieth of the time whether there will be too many candidates."""
    W_enc_LD, b_enc_L = model.W_enc.detach().T.numpy(), model.b_enc.detach().numpy()
    k = model.k if model.activation == "topk" else None
    above_L = _above(model)
    if not few:
        return Screen(W_enc_LD, b_enc_L, k, above_L)
    step = max(1, model.n_latents // _SAMPLE_LATENTS)
    some = slice(0, len(b_enc_L) // (step * _CHUNK) * step * _CHUNK, step)
    return Screen(
        W_enc_LD[some].copy(), b_enc_L[some].copy(), None if k is None else max(1, k // step), above_L[some].copy()
    )


def _is_foreseen(few: Screen, centred_BD: torch.Tensor) -> bool:
    """Will there be few candidates among all latents of tokens like these?"""
    some_BD = centred_BD[:_SAMPLE]
    return few.is_finite and few.candidates(some_BD, torch.empty(len(some_BD), few.n_latents)) is not None


@torch.no_grad()
def _above(model: SparseAutoencoder) -> Array:
    """(L,): a latent is not active unless p is above it."""
    above_L = torch.zeros_like(model.b_enc)
    if model.activation == "batchtopk":
        above_L += model.threshold.clamp_min(0)
    if model.activation == "jumprelu":
        above_L += model.log_threshold.exp()
    return above_L.numpy()


@torch.no_grad()
def _activated(model: SparseAutoencoder, found: Active) -> Active | None:
    """As `keep_active_`, of candidates with p as value, and only z > 0; None if one is not finite."""
    latents = np.repeat(np.arange(model.n_latents), found.counts)
    z, is_on = found.values, found.values > _above(model)[latents]
    if model.activation == "gated":
        b_enc_L, scale_L, b_mag_L = (of.numpy() for of in (model.b_enc, model.r_mag.exp(), model.b_mag))
        z = (z - b_enc_L[latents]) * scale_L[latents] + b_mag_L[latents]
        if not np.isfinite(z).all():
            return None
    is_kept = is_on & (z > 0)
    return Active(found.n_tokens, found.starts, found.tokens, z).kept(is_kept)


def multiplies_whole_numbers() -> bool:
    """Does this processor multiply 8-bit numbers fast and exactly (VNNI), and torch use it?"""
    return (
        hasattr(torch, "_int_mm")
        and torch.backends.mkldnn.is_available()
        and bool(getattr(torch.cpu, "_is_vnni_supported", lambda: False)())
    )


# Sums in float64, so that their rounding is far below `_UP`.
@numba.njit(parallel=True, cache=True, fastmath={"reassoc", "contract"})
def _round_rows(rows: Any, q: Any, scale: Any, norm: Any, rounded_norm: Any, off: Any) -> None:
    for i in numba.prange(len(rows)):
        row, q_row = rows[i], q[i]
        largest = np.float32(0)
        for d in range(len(row)):
            largest = max(largest, abs(row[d]))
        s = largest / np.float32(_LEVELS) if largest > _TINY else np.float32(1)
        of_row, of_rounded, of_rest = 0.0, 0.0, 0.0
        for d in range(len(row)):
            level = np.rint(row[d] / s)
            q_row[d] = np.int8(level)
            rounded = np.float64(s) * np.float64(level)
            rest = np.float64(row[d]) - rounded
            of_row += np.float64(row[d]) * np.float64(row[d])
            of_rounded += rounded * rounded
            of_rest += rest * rest
        scale[i] = s
        norm[i] = np.sqrt(of_row) * _UP
        rounded_norm[i] = np.sqrt(of_rounded) * _UP
        off[i] = np.sqrt(of_rest) * _UP


# The k-th largest lower end of each token, or 0 if that is below.
@numba.njit(parallel=True, cache=True, fastmath={"contract"})
def _kth_lower_end(intervals: Any, k: int, out: Any) -> None:
    products, scale_x, off_x, norm_x, scale_w, bias, off_bias, norm_w, off_w = intervals
    for b in numba.prange(products.shape[0]):
        row, s, off, norm = products[b], scale_x[b], off_x[b], norm_x[b]
        ends = np.empty(_CHUNK, np.float32)  # of one chunk: written for all, so that all are computed at once
        heap = np.zeros(k, np.float32)  # the k largest so far, the smallest first
        for c in range(products.shape[1]):
            least, is_any = heap[0], False
            for j in range(_CHUNK):
                margin = off * norm_w[c, j] + norm * off_w[c, j] + off_bias[c, j]
                ends[j] = np.float32(row[c, j]) * s * scale_w[c, j] + bias[c, j] - margin
                is_any |= ends[j] > least
            if is_any:
                for j in range(_CHUNK):
                    if ends[j] > heap[0]:
                        replace_least(heap, ends[j])
        out[b] = heap[0]


# Latents whose upper end is above `above`: of token b they come to latents[starts[b]] and behind, counts[b] many; -1 in
# starts: there was no room.
@numba.njit(parallel=True, cache=True, fastmath={"contract"})
def _find_candidates(intervals: Any, above: Any, room: int, starts: Any, counts: Any, latents: Any) -> None:
    products, scale_x, off_x, norm_x, scale_w, bias, off_bias, norm_w, off_w = intervals
    n_tokens = products.shape[0]
    n_parts = len(latents) // room
    for part in numba.prange(n_parts):
        at, end = part * room, (part + 1) * room
        ends = np.empty(_CHUNK, np.float32)
        for b in range(part * n_tokens // n_parts, (part + 1) * n_tokens // n_parts):
            row, s, off, norm, least = products[b], scale_x[b], off_x[b], norm_x[b], above[b]
            starts[b], is_lost = at, False
            for c in range(products.shape[1]):
                is_any = False
                for j in range(_CHUNK):
                    margin = off * norm_w[c, j] + norm * off_w[c, j] + off_bias[c, j]
                    ends[j] = np.float32(row[c, j]) * s * scale_w[c, j] + bias[c, j] + margin
                    is_any |= not ends[j] <= least
                if is_any and at + _CHUNK <= end:
                    for j in range(_CHUNK):
                        latents[at] = c * _CHUNK + j
                        at += not ends[j] <= least
                elif is_any:
                    is_lost = True
            counts[b] = at - starts[b]
            if is_lost:
                starts[b] = -1


@numba.njit(parallel=True, cache=True, fastmath={"reassoc", "contract"})
def _compute(starts: Any, tokens: Any, values: Any, cuts: Any, W_enc: Any, b_enc: Any, x: Any) -> None:
    """values = x w + b, each in an order of its own: they do not depend on what else is a candidate."""
    width = W_enc.shape[1]
    for part in numba.prange(len(cuts) - 1):
        for latent in range(cuts[part], cuts[part + 1]):
            row, bias = W_enc[latent], b_enc[latent]
            for k in range(starts[latent], starts[latent + 1]):
                x_row = x[tokens[k]]
                total = np.float32(0)
                for d in range(width):
                    total += x_row[d] * row[d]
                values[k] = total + bias


# As `keep_top_k_`: of equal values the first ones; here also only what is above 0. Each part has its own tokens.
@numba.njit(parallel=True, cache=True)
def _mark_top_k(starts: Any, tokens: Any, values: Any, k: int, n_tokens: int, n_parts: int, is_kept: Any) -> None:
    for part in numba.prange(n_parts):
        low, high = part * n_tokens // n_parts, (part + 1) * n_tokens // n_parts
        heaps = np.zeros((high - low, k), np.float32)
        for i in range(len(values)):
            b = tokens[i] - low
            if 0 <= b < high - low and values[i] > heaps[b, 0]:
                replace_least(heaps[b], values[i])
        n_equal = np.zeros(high - low, np.int64)
        for b in range(high - low):
            for j in range(k):
                n_equal[b] += heaps[b, j] == heaps[b, 0]
        for i in range(len(values)):
            b = tokens[i] - low
            if 0 <= b < high - low and values[i] > 0:
                if values[i] > heaps[b, 0]:
                    is_kept[i] = True
                elif values[i] == heaps[b, 0] and n_equal[b] > 0:
                    n_equal[b] -= 1
                    is_kept[i] = True
