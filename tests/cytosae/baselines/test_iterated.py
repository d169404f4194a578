"""Independent components and non-negative factors: beside slow twins, and interrupted, also by a kill."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy.optimize import nnls
from sklearn.decomposition import FastICA, MiniBatchNMF

from cytosae.baselines import iterated
from cytosae.baselines.iterated import factorise, unmix
from stores.part_files import KeptParts, KeptState

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
pytestmark = pytest.mark.usefixtures("one_thread")


def white_tokens(n: int = 3000, width: int = 6) -> Floats:
    """(n, width) sums of independent Laplacian sources, whitened."""
    x = np.random.default_rng(0).laplace(size=(n, width)) @ np.random.default_rng(1).normal(size=(width, width))
    x -= x.mean(0)
    values, vectors = np.linalg.eigh(x.T @ x / n)
    return np.asarray(x @ vectors / np.sqrt(values), np.float32)


def noise() -> Floats:
    """(500, 6) without sources, in which no rows settle soon."""
    return np.random.default_rng(4).standard_normal((500, 6), np.float32)


def non_negative(n: int = 300, width: int = 12) -> Floats:
    """(n, width) sums of five planted factors."""
    codes = np.random.default_rng(2).gamma(0.5, 1, (n, 5))
    return np.asarray(codes @ np.random.default_rng(3).gamma(0.5, 1, (5, width)), np.float32)


def slow_unmix(x: Doubles, seed: int, rounds: int) -> Doubles:
    """Token by token."""
    u, _, v = np.linalg.svd(np.random.default_rng(seed).normal(size=(x.shape[1], x.shape[1])))
    rows = u @ v
    for _ in range(rounds):
        new = np.zeros_like(rows)
        for number, row in enumerate(rows):
            for token in x:
                bent = np.tanh(row @ token)
                new[number] += (bent * token - (1 - bent**2) * row) / len(x)
        u, _, v = np.linalg.svd(new)
        rows = u @ v
    return np.asarray(rows)


def test_unmixing_equals_its_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iterated, "_ROWS", 70)
    x = white_tokens(200, 4)
    found, has_settled = unmix(x, seed=5, iterations=3)
    assert not has_settled
    np.testing.assert_allclose(found, slow_unmix(x.astype(np.float64), 5, 3), atol=1e-5)


def test_unmixing_finds_what_scikit_learn_finds() -> None:
    x = white_tokens()
    found, has_settled = unmix(x, seed=0, iterations=200)
    assert has_settled
    np.testing.assert_allclose(found @ found.T, np.eye(6), atol=1e-9)
    theirs = FastICA(whiten=False, random_state=1, max_iter=500, tol=1e-7).fit(x.astype(np.float64)).components_
    cosines = np.abs(found @ (theirs / np.linalg.norm(theirs, axis=1, keepdims=True)).T)
    assert cosines.max(1).min() > 0.9999
    assert sorted(cosines.argmax(1)) == list(range(6))


def slow_factors(x: Doubles, n: int, seed: int, n_batches: int, size: int) -> tuple[Doubles, list[float]]:
    """Number by number, with the start of `factorise`; and the error of each batch before its update of factors."""
    rng = np.random.default_rng(seed)
    level = np.sqrt(x.mean() / n)
    h = level * np.abs(rng.standard_normal((n, x.shape[1]), np.float32)).astype(np.float64)
    w = level * np.abs(rng.standard_normal((len(x), n), np.float32)).astype(np.float64)
    above, below, errors = h.copy(), np.ones_like(h), []
    starts = [*range(0, len(x), size)]
    for number in range(n_batches):
        rows = range(starts[number % len(starts)], min(starts[number % len(starts)] + size, len(x)))
        for i in rows:
            made = w[i] @ h
            w[i] = [w[i, j] * (x[i] @ h[j]) / (made @ h[j]) for j in range(n)]
        errors.append(float(np.mean([0.5 * ((x[i] - w[i] @ h) ** 2).sum() for i in rows])))
        for j in range(n):
            for d in range(x.shape[1]):
                keep = 0.7 ** (size / len(x))
                above[j, d] = keep * above[j, d] + h[j, d] * sum(w[i, j] * x[i, d] for i in rows)
                below[j, d] = keep * below[j, d] + sum(w[i, j] * (w[i] @ h[:, d]) for i in rows)
        h = above / below
    return h, errors


def test_factors_equal_their_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iterated, "_ROWS", 16)
    x, errors = non_negative(40, 5), []
    judged = iterated._judged

    def watched(numbers: Doubles, error: float, *rest: Any) -> Doubles:
        errors.append(error)
        return judged(numbers, error, *rest)

    monkeypatch.setattr(iterated, "_judged", watched)
    found, has_settled = factorise(x, 3, seed=4, iterations=3)
    assert not has_settled
    twin, of_twin = slow_factors(x.astype(np.float64), 3, 4, 9, 16)
    np.testing.assert_allclose(found, twin, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(errors, of_twin, rtol=1e-3)


def test_factors_fit_as_well_as_those_of_scikit_learn() -> None:
    x = non_negative()

    def error(factors: Floats) -> float:
        return sum(nnls(factors.T.astype(np.float64), row)[1] ** 2 for row in x) / float((x**2).sum())

    found, has_settled = factorise(x, 5, seed=0, iterations=1000)
    assert has_settled
    assert (found >= 0).all()
    theirs = MiniBatchNMF(5, init="random", batch_size=300, max_iter=1000, random_state=0).fit(x).components_
    assert error(found) < 1.1 * error(theirs.astype(np.float32)) + 1e-3
    assert error(found) < 0.01


FITS: dict[str, tuple[Any, Any]] = {
    "ica": (noise, lambda x, state: unmix(x, seed=3, iterations=12, state=state)),
    "nmf": (non_negative, lambda x, state: factorise(x, 4, seed=3, iterations=12, state=state)),
}


class _StoppedError(Exception):
    pass


class Ending(KeptState):
    """Keeps every state; after some of them the fit ends: with an error, or the process by a kill."""

    def __init__(self, folder: Path, after: int, *, by_kill: bool = False) -> None:
        super().__init__(KeptParts(folder, "job"), seconds=0.0)
        self.left, self.by_kill = after, by_kill

    def write(self, state: dict[str, Any]) -> None:
        super().write(state)
        self.left -= 1
        if not self.left:
            if self.by_kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise _StoppedError


@pytest.mark.parametrize("kind", FITS)
def test_an_interrupted_fit_goes_on_to_the_same_bits(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(iterated, "_ROWS", 110)  # a stop is in the middle of a pass
    make, fit = FITS[kind]
    whole, has_settled = fit(make(), None)
    assert not has_settled  # so there are as many states as the stops below need
    for after in (1, 2, 4):
        with pytest.raises(_StoppedError):
            fit(make(), Ending(tmp_path, after))
    found, settled_again = fit(make(), Ending(tmp_path, 10_000))
    np.testing.assert_array_equal(found, whole)
    assert not settled_again
    np.testing.assert_array_equal(fit(make(), Ending(tmp_path, 1))[0], whole)  # from the last state nothing is left


@pytest.mark.stress
@pytest.mark.parametrize("kind", FITS)
def test_a_killed_fit_goes_on_to_the_same_bits(kind: str, tmp_path: Path) -> None:
    """Processes that end without a word after their first, second and third state; a fourth ends by itself."""
    make, fit = FITS[kind]
    code = (
        "import sys; from pathlib import Path; import numpy as np; from test_iterated import FITS, Ending\n"
        "make, fit = FITS[sys.argv[1]]; folder = Path(sys.argv[2])\n"
        "found, _ = fit(make(), Ending(folder, int(sys.argv[3]), by_kill=True))\n"
        "np.save(folder / 'found.npy', found)\n"
    )
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    one = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    for after in (1, 2, 3, 10_000):
        command = [sys.executable, "-c", code, kind, str(tmp_path), str(after)]
        done = subprocess.run(command, env={**os.environ, **one}, capture_output=True, text=True)
        assert done.returncode == (-signal.SIGKILL if after < 10_000 else 0), done.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "found.npy"), fit(make(), None)[0])
