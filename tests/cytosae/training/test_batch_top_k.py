"""The k x N largest of a batch in one product: the same values as sorting all of them, whatever the bound was."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cytosae.training import batch_top_k
from cytosae.training.batch_top_k import choose_largest
from cytosae.training.distributed import ALONE

N, L = 60, 32


def twin(p_NL: np.ndarray[Any, Any], k: int) -> tuple[float, np.ndarray[Any, Any]]:
    """(threshold, z): sort all values; ties with the smallest are kept."""
    positive = np.sort(p_NL[p_NL > 0])[::-1][: k * len(p_NL)]
    threshold = float(positive[-1]) if len(positive) else 0.0
    return threshold, np.where((p_NL >= threshold) & (p_NL > 0), p_NL, 0)


def dense(parts: list[Any], n_tokens: int) -> np.ndarray[Any, Any]:
    """z of a micro-batch, from products with the identity."""
    columns = [part.fired.shape[0] for part in parts]
    blocks = [
        part.decoded(torch.eye(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64))
        for part, width in zip(parts, columns, strict=True)
    ]
    return torch.cat(blocks, 1).numpy().reshape(n_tokens, -1)


class Counted:
    """Micro-batches of given pre-activations, in one buffer that the next one overwrites; counts the products."""

    def __init__(self, p_NL: np.ndarray[Any, Any], size: int) -> None:
        self.parts = [p_NL[at : at + size] for at in range(0, len(p_NL), size)]
        self.n_products = 0
        self._buffer = torch.empty(size, p_NL.shape[1], dtype=torch.float64)

    def __call__(self, number: int) -> torch.Tensor:
        self.n_products += 1
        found = self._buffer[: len(self.parts[number])]
        return found.copy_(torch.from_numpy(self.parts[number]))


def chosen(p_NL: np.ndarray[Any, Any], k: int, size: int, work: float, edges: list[int]) -> tuple[Any, Counted]:
    encode = Counted(p_NL, size)
    found = choose_largest(encode, len(encode.parts), k=k, n=len(p_NL), ranks=ALONE)
    assert found is not None
    z = [dense(found.latents(i, edges, work), len(part)) for i, part in enumerate(encode.parts)]
    return (found.threshold, np.concatenate(z)), encode


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    k=st.integers(1, 40),
    size=st.sampled_from([1, 7, 20, 60]),
    work=st.sampled_from([0.0, 2.0]),
    kind=st.sampled_from(["normal", "ties", "first is large", "last is large", "negative", "few"]),
    edges=st.sampled_from([[0, L], [0, 3, 17, L]]),
)
def test_equal_to_sorting_all_of_them(seed: int, k: int, size: int, work: float, kind: str, edges: list[int]) -> None:
    rng = np.random.default_rng(seed)
    p = rng.normal(size=(N, L))
    if kind == "ties":
        p = rng.integers(-3, 4, (N, L)).astype(float)
    elif kind == "first is large":  # the bound of the first micro-batch is too high
        p[:20] *= 1_000
    elif kind == "last is large":
        p[-20:] *= 1_000
    elif kind == "negative":
        p = -np.abs(p)
    elif kind == "few":
        p = np.where(rng.random((N, L)) < 0.02, np.abs(p), -1.0)
    (threshold, z), _ = chosen(p, k, size, work, edges)
    wanted_threshold, wanted = twin(p, k)
    assert threshold == wanted_threshold
    assert (z == wanted).all()


@pytest.mark.stress
@pytest.mark.parametrize(("k", "n_latents"), [(8, 512), (64, 512), (4, 4096)])
def test_one_product_is_enough_for_tokens_that_are_alike(k: int, n_latents: int) -> None:
    for seed in range(5):
        p = np.random.default_rng(seed).normal(size=(256, n_latents))
        (threshold, z), encode = chosen(p, k, 64, 2.0, [0, n_latents])
        assert encode.n_products == 4
        assert threshold == twin(p, k)[0]
        assert (z > 0).sum() == 256 * k


def test_the_way_of_a_gpu_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def piece(p_BL: torch.Tensor, bound: float) -> Any:
        places = (~(p_BL <= bound)).view(-1).nonzero().squeeze(1)
        return batch_top_k._TorchPiece(p_BL.reshape(-1)[places], places, p_BL.shape)

    p = np.random.default_rng(0).normal(size=(40, 64))
    (threshold, z), _ = chosen(p, 5, 16, 2.0, [0, 10, 64])
    monkeypatch.setattr(batch_top_k, "_piece_above", piece)
    (threshold_here, z_here), _ = chosen(p, 5, 16, 2.0, [0, 10, 64])
    assert threshold == threshold_here == twin(p, 5)[0]
    assert (z == z_here).all()
    assert (z == twin(p, 5)[1]).all()


@pytest.mark.parametrize("row", [0, 59])
def test_nan_is_noticed(row: int) -> None:
    p = np.random.default_rng(0).normal(size=(N, L))
    p[row, 3] = np.nan
    encode = Counted(p, 20)
    assert choose_largest(encode, 3, k=4, n=N, ranks=ALONE) is None


def test_ties_are_kept_in_every_micro_batch_also_in_bf16() -> None:
    """All values alike: more than twice as many as wanted after the first micro-batch, which raises the bound."""
    found = choose_largest(lambda number: torch.ones(16, 8, dtype=torch.bfloat16), 3, k=1, n=48, ranks=ALONE)
    assert found is not None
    assert found.threshold == 1
    assert [found.latents(number, [0, 8], 0.0)[0].n_active for number in range(3)] == [16 * 8] * 3
