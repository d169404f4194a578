"""The two fits that go through the sample again and again: independent components, and non-negative factors.

Both keep their state between two rounds (`KeptState`), all that the next round needs, so that an interrupted fit goes
on to the same bits. Numpy on the CPU, float32; sums over tokens in float64. Slow twins: tests/cytosae/baselines/.

Shapes: N tokens, D channels, n directions.
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from stores.part_files import KeptState

Float32s = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
_ROWS = 4096  # tokens that are worked on at once
_NEAR = 1e-4  # change of a round at which a fit has settled
_KEPT = 0.7  # share of the sums of a whole pass ago that still counts for the factors
_PATIENCE = 10  # batches without a smaller error, after which the factors have settled
_TINY = np.float32(np.finfo(np.float32).eps)


def unmix(white_Nn: Float32s, *, seed: int, iterations: int, state: KeptState | None = None) -> tuple[Doubles, bool]:
    """(n, n) orthonormal rows, each the direction of a source in whitened tokens, and whether they had settled.

    Symmetric FastICA with tanh (Hyvarinen and Oja 2000, doi 10.1016/S0893-6080(00)00026-5): every row w becomes
    mean(tanh(w x) x) - mean(1 - tanh(w x)^2) w, then all rows are made orthonormal together, until no row turns.

    white_Nn : tokens with mean 0, variance 1 in every column, columns uncorrelated
    iterations : rounds over all tokens, at most
    state : kept after each round
    """
    state = state or KeptState()
    n_tokens, n = white_Nn.shape
    w, done, has_settled = _orthonormal(np.random.default_rng(seed).normal(size=(n, n))), 0, False
    if (kept := state.read()) is not None:
        w, done, has_settled = kept["rows"], int(kept["done"][0]), bool(kept["has_settled"][0])
    while done < iterations and not has_settled:
        narrow = w.astype(np.float32)
        moment, slope = np.zeros((n, n)), np.zeros(n)
        for first in range(0, n_tokens, _ROWS):
            x = white_Nn[first : first + _ROWS]
            bent = np.tanh(x @ narrow.T)
            moment += bent.T @ x
            slope += len(x) - np.square(bent).sum(0, dtype=np.float64)
        new = _orthonormal(moment / n_tokens - (slope / n_tokens)[:, None] * w)
        has_settled = bool(np.abs(np.abs((new * w).sum(1)) - 1).max() < _NEAR)
        w, done = new, done + 1
        if state.is_due:
            state.write({"rows": w, "done": np.array([done]), "has_settled": np.array([int(has_settled)])})
    return w, has_settled


def _orthonormal(rows: Doubles) -> Doubles:
    """The nearest matrix with orthonormal rows."""
    u, _, v = np.linalg.svd(rows)
    return np.asarray(u @ v)


@dataclass
class _Factors:
    """The state of `factorise` between two batches."""

    codes: Float32s  # (N, n)
    factors: Float32s  # (n, D)
    above: Float32s  # (n, D): what pulls each number of the factors up, summed over batches, older ones less
    below: Float32s  # (n, D): and down
    # batches done, batches without improvement, has it settled, and the smoothed error with its least value
    numbers: Doubles = field(default_factory=lambda: np.array([0, 0, 0, np.nan, np.nan]))

    @staticmethod
    def begin(x_ND: Float32s, n: int, seed: int) -> "_Factors":
        rng = np.random.default_rng(seed)
        level = np.float32(np.sqrt(x_ND.mean(dtype=np.float64) / n))
        factors, codes = (
            level * np.abs(rng.standard_normal(size, np.float32)) for size in ((n, x_ND.shape[1]), (len(x_ND), n))
        )
        return _Factors(codes, factors, factors.copy(), np.ones_like(factors))


def factorise(
    x_ND: Float32s, n: int, *, seed: int, iterations: int, state: KeptState | None = None
) -> tuple[Float32s, bool]:
    """(n, D) factors >= 0, of which sums with weights >= 0 come near the tokens; and whether they had settled.

    Multiplicative updates (Lee and Seung 2001) batch by batch, the sums of older batches fading (Lefevre, Bach and
    Fevotte 2011, doi 10.1109/ASPAA.2011.6082314), for the squared error. Settled: a batch hardly moves the factors, or
    ten in turn have not made the smoothed error smaller.

    x_ND : nothing below 0
    iterations : passes over all tokens, at most
    state : kept after a batch; 4 bytes for each token and factor
    """
    state = state or KeptState()
    kept = state.read()
    f = _Factors.begin(x_ND, n, seed) if kept is None else _Factors(**kept)
    size = min(_ROWS, len(x_ND))
    n_batches = -(-len(x_ND) // size)
    keep, weight = np.float32(_KEPT ** (size / len(x_ND))), min(1.0, size / (len(x_ND) + 1))
    while f.numbers[0] < iterations * n_batches and not f.numbers[2]:
        first = int(f.numbers[0]) % n_batches * size
        x, codes = x_ND[first : first + size], f.codes[first : first + size]
        along, gram = x @ f.factors.T, f.factors @ f.factors.T
        codes *= along / np.maximum(codes @ gram, _TINY)
        both = codes.T @ codes
        error = float(np.square(x).sum(dtype=np.float64) - 2 * (along * codes).sum(dtype=np.float64))
        error = (error + float((both * gram).sum(dtype=np.float64))) / (2 * len(x))
        f.above = keep * f.above + f.factors * (codes.T @ x)
        f.below = keep * f.below + np.maximum(both @ f.factors, _TINY)
        before, f.factors = f.factors, f.above / f.below
        f.numbers = _judged(f.numbers, error, weight, float(np.linalg.norm(f.factors - before)), f.factors)
        if state.is_due:
            state.write(vars(f))
    return f.factors, bool(f.numbers[2])


def _judged(numbers: Doubles, error: float, weight: float, moved: float, factors: Float32s) -> Doubles:
    """The numbers of the state after one more batch with this error, whose weight in the smoothed one is given."""
    done, n_worse, _, smooth, least = numbers
    done += 1
    if done == 1:  # the factors were those at random
        return np.array([done, n_worse, 0, smooth, least])
    smooth = error if np.isnan(smooth) else smooth * (1 - weight) + error * weight
    is_better = bool(np.isnan(least) or smooth < least)
    n_worse, least = (0, smooth) if is_better else (n_worse + 1, least)
    has_settled = moved <= _NEAR * float(np.linalg.norm(factors)) or n_worse >= _PATIENCE
    return np.array([done, n_worse, int(has_settled), smooth, least])
