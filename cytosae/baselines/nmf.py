"""Non-negative factors of a sample of tokens, in batches: multiplicative updates with a memory (Lefevre et al. 2011).

As scikit-learn's MiniBatchNMF, number for number (its twin in tests/cytosae/baselines/), but the halves of the tokens
are made batch by batch, and an interrupted fit goes on from a state.
"""

import math

import numpy as np
import numpy.typing as npt

from stores.part_files import KeptState

Rows = npt.NDArray[np.float32]
_BATCH = 4096  # tokens of a step
_FORGET = 0.7  # what of the old sums is left after a pass over the sample
_SETTLED = 1e-4  # relative change of the factors in a step
_PATIENCE = 10  # steps without a smaller mean cost
_LEAST = np.float32(np.finfo(np.float32).eps)


def non_negative_factors(x: Rows, n: int, *, seed: int, iterations: int, state: KeptState) -> tuple[Rows, bool]:
    """Factors (n, 2 D) of what lies above 0 in tokens (N, D), and what below; and whether they settled.

    iterations : passes over the tokens, at most
    """
    n_tokens, size = len(x), min(_BATCH, len(x))
    batches = [slice(first, first + size) for first in range(0, n_tokens, size)]
    kept = state.read()
    if kept is None:
        rng = np.random.RandomState(seed % 2**32)
        average = np.sqrt(np.float32(np.abs(x).mean(dtype=np.float64) / 2) / n)
        factors = np.abs(average * rng.standard_normal((n, 2 * x.shape[1])).astype(np.float32))
        codes = np.abs(average * rng.standard_normal((n_tokens, n)).astype(np.float32))
        above, below = factors.copy(), np.ones_like(factors)
        cost, least, n_worse, done, is_settled = math.nan, math.inf, 0, 0, False
    else:
        factors, codes, above, below = (kept[name] for name in ("factors", "codes", "above", "below"))
        cost, least = kept["costs"].tolist()
        n_worse, done, is_settled = kept["done"].tolist()
    keep = np.float32(_FORGET ** (size / n_tokens))
    while done < iterations * len(batches) and not is_settled:
        batch = batches[done % len(batches)]
        some = np.concatenate([x[batch].clip(min=0), (-x[batch]).clip(min=0)], axis=1)
        z = codes[batch]
        z *= some @ factors.T / _above_zero(z @ (factors @ factors.T))
        of_batch = float(np.linalg.norm(some - z @ factors)) ** 2 / 2 / len(some)
        above = keep * above + (z.T @ some) * factors
        below = keep * below + _above_zero((z.T @ z) @ factors)
        new = above / below
        new[new < np.finfo(np.float64).eps] = 0
        change = float(np.linalg.norm(new - factors) / np.linalg.norm(new))
        factors, done = new, done + 1
        if done > 1:
            share = min(1.0, len(some) / (n_tokens + 1))
            cost = of_batch if math.isnan(cost) else cost * (1 - share) + of_batch * share
            is_settled = change <= _SETTLED
            if not is_settled:
                n_worse, least = (0, cost) if cost < least else (n_worse + 1, least)
                is_settled = n_worse >= _PATIENCE
        if state.is_due:
            arrays = {"factors": factors, "codes": codes, "above": above, "below": below}
            further = {"costs": np.array([cost, least]), "done": np.array([n_worse, done, int(is_settled)])}
            state.write({**arrays, **further})
    return factors, math.ceil(done / len(batches)) < iterations


def _above_zero(values: Rows) -> Rows:
    values[values == 0] = _LEAST
    return values
