"""Independent components of a sample of tokens: symmetric FastICA with tanh (Hyvarinen and Oja 2000).

As scikit-learn's FastICA (its twin in tests/cytosae/baselines/), in pieces of the sample instead of several copies of
it, and with a state that an interrupted fit goes on from.
"""

import numpy as np
import numpy.typing as npt

from stores.part_files import KeptState

Floats = npt.NDArray[np.float64]
_CHUNK = 4096  # tokens that are worked on at once
_SETTLED = 1e-4  # change of the cosine of a row with itself in a step, at most


def fast_ica(
    x: npt.NDArray[np.float32], moments: Floats, n: int, *, seed: int, iterations: int, state: KeptState
) -> tuple[Floats, bool]:
    """Unmixing rows (n, D) of tokens (N, D) about their mean; and whether they settled. Sources have variance 1.

    moments : (D, D) sum of x^T x
    """
    values, vectors = np.linalg.eigh(moments)
    vectors = vectors[:, ::-1][:, :n]
    vectors = vectors * np.sign(vectors[:1])  # which sign an eigenvector has is not promised
    whitening = (vectors * np.sqrt(len(x) / values[::-1][:n])).T
    kept = state.read()
    if kept is None:
        w = _orthogonal(np.random.RandomState(seed % 2**32).normal(size=(n, n)))
        done, is_settled = 0, False
    else:
        w, done, is_settled = kept["w"], int(kept["done"][0]), bool(kept["done"][1])
    while done < iterations and not is_settled:
        rows, slopes = np.zeros((n, n)), np.zeros(n)
        for first in range(0, len(x), _CHUNK):
            white = (x[first : first + _CHUNK] @ whitening.T).astype(np.float32)
            bent = np.tanh(white @ w.T.astype(np.float32))
            rows += bent.T @ white
            slopes += (1 - bent**2).sum(0, dtype=np.float64)
        new = _orthogonal(rows / len(x) - (slopes / len(x))[:, None] * w)
        is_settled = bool(np.abs(np.abs((new * w).sum(1)) - 1).max() < _SETTLED)
        w, done = new, done + 1
        if state.is_due:
            state.write({"w": w, "done": np.array([done, is_settled])})
    return w @ whitening, is_settled


def _orthogonal(w: Floats) -> Floats:
    """(w w^T)^-1/2 w."""
    values, vectors = np.linalg.eigh(w @ w.T)
    found: Floats = (vectors / np.sqrt(np.maximum(values, 1e-300))) @ vectors.T @ w
    return found
