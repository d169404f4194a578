"""The active entries of a matrix, found in one pass, against numpy's."""

import numpy as np
import pytest
import torch

from cytosae.training import kernels_cpu


def drawn(n_tokens: int, n_latents: int, density: float) -> np.ndarray:
    rng = np.random.default_rng(n_tokens + n_latents)
    matrix = rng.normal(size=(n_tokens, n_latents)).astype(np.float32)
    return np.where(rng.random(matrix.shape) < density, np.abs(matrix) + 0.5, -np.abs(matrix)).astype(np.float32)


@pytest.mark.parametrize("is_bfloat16", [False, True])
@pytest.mark.parametrize("density", [0.0, 0.02, 0.6, 1.0])
@pytest.mark.parametrize("shape", [(0, 40), (1, 1), (3, 15), (17, 16), (100, 333)])
def test_the_entries_are_those_of_numpy(shape: tuple[int, int], density: float, is_bfloat16: bool) -> None:
    """By latent, and of one latent by token; also where one token has nearly all of them, which no guess foresees."""
    matrix = drawn(*shape, density)
    if len(matrix) > 40:
        matrix[[31, 40]] = 2.0
        matrix[31, 7] = np.nan
    if is_bfloat16:
        short = torch.from_numpy(matrix).bfloat16()
        matrix = short.float().numpy()
    given = short.view(torch.uint16).numpy() if is_bfloat16 else matrix
    n_active, active = kernels_cpu.find_active(given)
    latents, tokens = np.nonzero(~(matrix.T <= 0))
    assert active is not None
    assert n_active == len(tokens)
    assert np.array_equal(active.tokens, tokens)
    assert np.array_equal(active.starts, np.searchsorted(latents, np.arange(shape[1] + 1)))
    assert np.array_equal(active.values, matrix.T[latents, tokens], equal_nan=True)


def test_more_than_asked_for_are_only_counted() -> None:
    for density in (0.05, 0.9):
        matrix = drawn(64, 200, density)
        n = int((matrix > 0).sum())
        assert kernels_cpu.find_active(matrix, most=n - 1) == (n, None)
        found, active = kernels_cpu.find_active(matrix, most=n)
        assert found == n
        assert active is not None
        assert np.array_equal(active.to_dense(), np.maximum(matrix, 0))


def test_a_bound_leaves_the_smaller_ones_out() -> None:
    matrix = drawn(64, 200, 0.3)
    _, active = kernels_cpu.find_active(matrix, above=0.9)
    assert active is not None
    assert np.array_equal(active.to_dense(), np.where(matrix > 0.9, matrix, 0))
