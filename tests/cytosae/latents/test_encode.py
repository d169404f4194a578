"""Encoding: the sparse rows are the dense latents, an interruption leaves no trace, what does not fit is refused."""

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import numpy.typing as npt
import pytest
import reference
import scipy.sparse as ss
import torch
import zarr
from artefacts import contents
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from latent_stores import write_latents
from reference import Params, image_counts
from sae_variants import K
from sparse_tokens import WIDTH, random_tokens, write_sae
from token_caches import write_cache

from cli import cli
from cytosae.latents import sparsify
from cytosae.latents.encode import encode
from cytosae.latents.sparse_rows import Rounding, SparseRows
from cytosae.latents.sparsify import Compactor, round_mantissa, rows_of_active
from cytosae.latents.sparsify import _on_device as on_device
from cytosae.sae import Active, SparseAutoencoder, load_sae, load_tensors, save_tensors, screen
from cytosae.sae.config import ACTIVATIONS
from cytosae.training.evaluate import evaluate
from stores import (
    LATENTS,
    ActivationStore,
    BadInput,
    DamagedStore,
    IncompleteStore,
    LatentStore,
    LatentWriter,
    SpecMismatch,
    find_header,
    latents_info,
    read_runs,
    verify_latents,
)
from stores.csr import CHUNK_ENTRIES
from stores.shards import Shard

Float = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """acts.zarr: 7 images of 257 tokens, 2 a chunk, images 1 and 6 (a chunk of its own) unreadable; run: 40 latents."""
    root = tmp_path_factory.mktemp("encode")
    write_cache(root / "acts.zarr", random_tokens(7), unreadable=(1, 6), chunk_images=2)
    write_sae(root / "run", root / "acts.zarr", n_latents=40)
    return root


def dense_latents(cache: Path, run: Path) -> Float:
    """(n_images * T, n_latents) float32 of the model's own `encode`, zeros for unreadable images; not rounded.

    A chunk at a time, as encoding does it: the last bits of a matrix product depend on the number of rows.
    """
    store, model = ActivationStore(cache), load_sae(run).model
    blocks = []
    for rows, tokens in store.iter_chunks():
        ok = store.readable()[rows]
        block = np.zeros((*tokens.shape[:2], model.n_latents), np.float32)
        if ok.any():
            x = torch.from_numpy(tokens[ok].astype(np.float32).reshape(-1, model.width))
            block[ok] = model.encode(x).numpy().reshape(*block[ok].shape)
        blocks.append(block.reshape(-1, model.n_latents))
    return np.concatenate(blocks)


# ------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("value_bits", [10, 23])
def test_rows_are_the_dense_latents_rounded(made: Path, tmp_path: Path, value_bits: int) -> None:
    """Row by row: which latents (sorted), which values, to the last bit; nothing for unreadable images."""
    result = encode(made / "acts.zarr", made / "run", tmp_path / "latents.zarr", value_bits=value_bits)
    store = LatentStore(tmp_path / "latents.zarr")
    rows = store.read_images(0, 7)
    dense = dense_latents(made / "acts.zarr", made / "run")
    assert rows.n_rows == len(dense) == 7 * 257
    lengths = np.diff(rows.indptr)
    assert lengths.tolist() == (dense > 0).sum(axis=1).tolist()
    assert not lengths[257 : 2 * 257].any()
    assert not lengths[6 * 257 :].any()
    where = np.nonzero(dense > 0)  # row by row, latents rising
    assert rows.indices.dtype == np.uint16
    assert rows.indices.tolist() == where[1].tolist()
    wanted = reference.round_mantissa(dense[where], value_bits)
    assert rows.values.dtype == np.float32
    assert rows.values.tobytes() == wanted.tobytes()
    if value_bits == 23:
        assert wanted.tobytes() == dense[where].tobytes()
    else:
        assert (wanted != dense[where]).mean() > 0.9
        assert not (rows.values.view(np.uint32) & 0x1FFF).any()
    assert (result.nnz, result.n_readable, result.was_complete) == (len(where[0]), 5, False)
    assert result.l0 == pytest.approx((dense > 0).sum() / (5 * 257))
    assert list(verify_latents(tmp_path / "latents.zarr")) == [None]


@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_rows_are_the_latents_of_any_activation(made: Path, tmp_path: Path, activation: str) -> None:
    run = write_sae(tmp_path / "run", made / "acts.zarr", n_latents=40, activation=activation)
    result = encode(made / "acts.zarr", run, tmp_path / "latents.zarr", value_bits=23)
    rows = LatentStore(tmp_path / "latents.zarr").read_images(0, 7)
    dense = dense_latents(made / "acts.zarr", run)
    assert rows.indices.tolist() == np.nonzero(dense)[1].tolist()
    assert rows.values.tobytes() == dense[np.nonzero(dense)].tobytes()
    found = evaluate(made / "acts.zarr", run)
    assert result.l0 == pytest.approx(found.l0)
    assert 1 < found.l0 < 20
    assert (found.l0 == K) == (activation == "topk")


def test_latents_equal_the_float64_twin(made: Path, tmp_path: Path) -> None:
    encode(made / "acts.zarr", made / "run", tmp_path / "latents.zarr", value_bits=23)
    rows = LatentStore(tmp_path / "latents.zarr").read_images(2, 4)
    model = load_sae(made / "run").model
    params = Params(*(getattr(model, name).double().numpy() for name in ("W_enc", "b_enc", "W_dec", "b_dec")))
    p, h, _ = reference.sae_forward(params, random_tokens(7)[2:4].reshape(-1, WIDTH))
    dense = np.zeros_like(h)
    dense[np.repeat(np.arange(rows.n_rows), np.diff(rows.indptr)), rows.indices] = rows.values
    clear = np.abs(p) > 1e-6
    assert (~clear).sum() <= 2
    assert np.abs(dense - h)[clear].max() <= 1e-5 * h.max()


def test_what_would_round_to_zero_stays_above_zero(made: Path, tmp_path: Path) -> None:
    """A latent is active or not before rounding: denormal values survive ten bits, as the least number above zero."""

    def shrink(model: SparseAutoencoder) -> None:
        model.W_enc.zero_()
        values = [2.0**-149, 1e-42, 2.0**-137, 1.2e-38, 0.0, -1e-42, 1.0, 3.0]
        model.b_enc.copy_(torch.tensor(values, dtype=torch.float64))

    run = write_sae(tmp_path / "run", made / "acts.zarr", n_latents=8, change=shrink)
    for value_bits in (10, 23):
        encode(made / "acts.zarr", run, tmp_path / str(value_bits), value_bits=value_bits)
    ten, all_bits = (LatentStore(tmp_path / str(bits)).read_images(0, 1) for bits in (10, 23))
    least = 2.0**-136  # ten mantissa bits of a denormal number: multiples of 2^-136
    for rows in (ten, all_bits):
        assert rows.indices[:6].tolist() == [0, 1, 2, 3, 6, 7]
        assert np.diff(rows.indptr).tolist() == [6] * 257
    assert all_bits.values[:3].tolist() == [2.0**-149, float(np.float32(1e-42)), 2.0**-137]
    assert ten.values[:3].tolist() == [least, least, least]
    assert ten.values[3] == reference.round_mantissa_scalar(float(np.float32(1.2e-38)), 10)
    assert ten.values[4:6].tolist() == [1.0, 3.0]


@pytest.mark.parametrize("scratch", [1, 1 << 18])
@pytest.mark.parametrize("n_latents", [1, 63, 64, 200, 70_000])
def test_compacting_equals_the_obvious_way(n_latents: int, scratch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU and as on a GPU; rows that are full, and rows that do not fit into the scratch arrays together."""
    monkeypatch.setattr(sparsify, "_MIN_ENTRIES", scratch)
    generator = torch.Generator().manual_seed(n_latents)
    p = torch.randn(11, n_latents, generator=generator)
    p[3], p[4] = p[3].abs(), -p[4].abs()
    p[5, 0], p[6, -1], p[7, 0] = -np.inf, 2.0**-149, -0.0
    for rounding in (Rounding(10), Rounding(23), Rounding(10, 0.2), Rounding(23, 1.0)):
        dense = p.numpy().copy()
        rounded = np.where(dense > 0, reference.round_mantissa(np.maximum(dense, 0), rounding.value_bits), 0)
        rounded[(dense > 0) & (rounded == 0)] = 2.0 ** (-126 - rounding.value_bits)
        wanted = np.nonzero((rounded > 0) & (rounded >= np.float32(rounding.min_activation)))
        compactor = Compactor(n_latents, rounding)
        pieces = compactor.rows(p)
        compactor.close()
        assert len(pieces) > torch.get_num_threads() or scratch > 1 or n_latents == 1
        found = SparseRows(
            indices=np.concatenate([piece.indices for piece in pieces]),
            values=np.concatenate([piece.values for piece in pieces]),
            lengths=np.concatenate([piece.lengths for piece in pieces]),
            n_dropped=sum(piece.n_dropped for piece in pieces),
        )
        for rows in (found, on_device(p, rounding)):
            assert rows.indices.tolist() == wanted[1].tolist()
            assert rows.values.tobytes() == rounded[wanted].tobytes()
            assert rows.lengths.tolist() == np.bincount(wanted[0], minlength=11).tolist()
            assert rows.n_dropped == (dense > 0).sum() - len(wanted[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_compacts_as_the_cpu_does() -> None:
    """The same dense numbers on both: the same rows, to the last bit."""
    p = torch.randn(514, 49_152, generator=torch.Generator().manual_seed(0)) - 2.9
    for rounding in (Rounding(10), Rounding(23, 0.3)):
        (gpu,), cpu = Compactor(49_152, rounding).rows(p.cuda()), Compactor(49_152, rounding).rows(p)
        for name in ("indices", "values", "lengths"):
            assert np.array_equal(getattr(gpu, name), np.concatenate([getattr(piece, name) for piece in cpu]))
        assert gpu.n_dropped == sum(piece.n_dropped for piece in cpu)


@pytest.mark.parametrize("n_latents", [3, 64, 150])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, 3.4028e38])
def test_compacting_lets_nothing_pass_that_is_not_finite(n_latents: int, bad: float) -> None:
    """Anywhere in a row; 3.4028e38 becomes infinite when it is rounded to ten bits."""
    for place in {0, n_latents // 2, n_latents - 1}:
        p = torch.full((4, n_latents), -1.0)
        p[2, place] = bad
        for rows_of in (Compactor(n_latents, Rounding(10)).rows, lambda p: on_device(p, Rounding(10))):
            with pytest.raises(BadInput, match="a latent became NaN or infinite"):
                rows_of(p)


def test_rows_of_active_latents_are_those_of_a_dense_matrix() -> None:
    """Found without it, by latent: the same rows, to the last bit, rounded and pruned; infinity is refused."""
    for n_latents in (40, 70_000):
        dense = np.maximum(np.random.default_rng(n_latents).normal(-1, 1, (23, n_latents)).astype(np.float32), 0)
        dense[4], dense[5, 7] = 0, 1e-42
        latents, tokens = np.nonzero(dense.T)
        starts = np.searchsorted(latents, np.arange(n_latents + 1))
        active = Active(23, starts, tokens.astype(np.int32), dense[tokens, latents])
        for rounding in (Rounding(10), Rounding(23), Rounding(10, 0.2), Rounding(23, 1.0)):
            compactor = Compactor(n_latents, rounding)
            pieces, found = compactor.rows(torch.from_numpy(dense)), rows_of_active(active, rounding)
            compactor.close()
            for name in ("indices", "values", "lengths"):
                wanted = np.concatenate([getattr(piece, name) for piece in pieces])
                assert getattr(found, name).dtype == wanted.dtype
                assert getattr(found, name).tobytes() == wanted.tobytes()
            assert found.n_dropped == sum(piece.n_dropped for piece in pieces)
    one = Active(1, np.array([0, 1]), np.zeros(1, np.int32), np.array([3.4028e38], np.float32))
    with pytest.raises(BadInput, match="a latent became NaN or infinite"):
        rows_of_active(one, Rounding(10))


# ------------------------------------------------------------------------------------------- screened

needs_screen = pytest.mark.skipif(not screen.multiplies_whole_numbers(), reason="this processor has no VNNI")


@pytest.fixture
def screened(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Small encoders are screened, too, if up to a third of their latents can be active; True for each that was."""
    real, done = screen.ScreenedEncoder.latents, list[bool]()

    def latents(self: screen.ScreenedEncoder, *arguments: torch.Tensor) -> Active | None:
        done.append((found := real(self, *arguments)) is not None)
        return found

    monkeypatch.setattr(screen, "_SMALLEST", 0)
    monkeypatch.setattr(screen, "_MOST", 0.33)
    monkeypatch.setattr(screen.ScreenedEncoder, "latents", latents)
    return done


def uneven_tokens() -> npt.NDArray[np.float16]:
    """12 images, of which the middle ones have so many active latents that they are left to the dense product."""
    tokens = random_tokens(12)
    tokens[3:9] = 1 + 40 * (tokens[3:9] - 1)
    return tokens


def quiet(model: SparseAutoencoder) -> None:
    model.b_enc.fill_(-1)


@needs_screen
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_screened_rows_are_those_of_the_dense_product(tmp_path: Path, activation: str, screened: list[bool]) -> None:
    """But for the order of a sum: other last bits, and another decision only where a value is 0 within them."""
    cache = write_cache(tmp_path / "acts.zarr", random_tokens(7), unreadable=(1, 6), chunk_images=2)
    change = None if activation == "topk" else quiet
    run = write_sae(tmp_path / "run", cache, n_latents=48, activation=activation, change=change)
    result = encode(cache, run, tmp_path / "latents.zarr", value_bits=23, min_activation=0.05)
    assert screened == [True, True, True]
    rows, dense = LatentStore(tmp_path / "latents.zarr").read_images(0, 7), dense_latents(cache, run)
    found = np.zeros_like(dense)
    found[np.repeat(np.arange(rows.n_rows), np.diff(rows.indptr)), rows.indices] = rows.values
    wanted = np.where(dense >= np.float32(0.05), dense, 0)
    assert (found > 0).sum() > 1000
    differs = (found > 0) != (wanted > 0)
    assert differs.sum() <= 2
    assert (np.abs(found - wanted)[~differs] <= 1e-5 * dense.max()).all()
    assert abs(result.n_dropped - ((dense > 0) & (dense < np.float32(0.05))).sum()) <= 2
    assert list(verify_latents(tmp_path / "latents.zarr")) == [None]


@needs_screen
@pytest.mark.parametrize("stop_at", [3, 6, 9])
def test_screened_or_not_a_continued_store_is_the_same(tmp_path: Path, stop_at: int, screened: list[bool]) -> None:
    """Interrupted anywhere, and in shards: whether a micro-batch is screened is a matter of its own tokens alone."""
    cache = write_cache(tmp_path / "acts.zarr", uneven_tokens(), unreadable=(2,), chunk_images=3)
    run = write_sae(tmp_path / "run", cache, n_latents=48, change=quiet)
    encode(cache, run, tmp_path / "never.zarr")
    assert screened == [True, False, False, True]

    def interrupt(done: int, total: int, state: str) -> None:
        if done == stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode(cache, run, tmp_path / "latents.zarr", progress=interrupt)
    encode(cache, run, tmp_path / "latents.zarr")
    for number in (1, 0):
        encode(cache, run, tmp_path / "shards.zarr", shard=Shard(number, 2))
    assert contents(tmp_path / "latents.zarr") == contents(tmp_path / "never.zarr")
    wanted, found = (LatentStore(tmp_path / name).read_images(0, 12) for name in ("never.zarr", "shards.zarr"))
    for name in ("indptr", "indices", "values"):
        assert getattr(found, name).tobytes() == getattr(wanted, name).tobytes()


@needs_screen
def test_screened_values_do_not_depend_on_the_batch_size(tmp_path: Path, screened: list[bool]) -> None:
    """Unlike those of the dense product; nor on the number of threads."""
    cache = write_cache(tmp_path / "acts.zarr", random_tokens(6), chunk_images=6)
    run, n_threads = write_sae(tmp_path / "run", cache, n_latents=48, change=quiet), torch.get_num_threads()
    encode(cache, run, tmp_path / "all.zarr", value_bits=23)
    encode(cache, run, tmp_path / "five.zarr", value_bits=23, batch_size=5)
    try:
        torch.set_num_threads(1)
        encode(cache, run, tmp_path / "one.zarr", value_bits=23, batch_size=1)
    finally:
        torch.set_num_threads(n_threads)
    assert screened == [True] * 9
    assert contents(tmp_path / "five.zarr") == contents(tmp_path / "all.zarr") == contents(tmp_path / "one.zarr")


@needs_screen
def test_a_screened_job_refuses_what_is_not_finite(tmp_path: Path, screened: list[bool]) -> None:
    """Tokens are looked at before; a latent that overflows is left to the dense product, which tells it."""
    tokens = random_tokens(4)
    cache = write_cache(tmp_path / "acts.zarr", tokens, chunk_images=2)
    run = write_sae(tmp_path / "run", cache, n_latents=48, change=lambda model: model.W_enc[:, 3].fill_(5e37))
    with pytest.raises(BadInput, match="a latent became NaN or infinite"):
        encode(cache, run, tmp_path / "latents.zarr")
    tokens[3, 100, 3] = np.inf
    cache, run = write_cache(tmp_path / "spoiled.zarr", tokens, chunk_images=2), tmp_path / "quiet"
    write_sae(run, cache, n_latents=48, change=quiet)
    with pytest.raises(DamagedStore, match="a token of a readable image is NaN or infinite"):
        encode(cache, run, tmp_path / "other.zarr")


# ------------------------------------------------------------------------------------- pruning and precision


@pytest.mark.parametrize("value_bits", [10, 23])
def test_pruned_is_the_whole_store_without_small_values(made: Path, tmp_path: Path, value_bits: int) -> None:
    """By the stored value, itself kept; what is dropped is counted, and the mean L0 does not change."""
    whole = encode(made / "acts.zarr", made / "run", tmp_path / "whole.zarr", value_bits=value_bits)
    rows = LatentStore(tmp_path / "whole.zarr").read_images(0, 7)
    least = float(np.quantile(rows.values, 0.4, method="nearest"))  # a stored value: it stays
    settings: dict[str, Any] = {"value_bits": value_bits, "min_activation": least}
    pruned = encode(made / "acts.zarr", made / "run", tmp_path / "pruned.zarr", **settings)
    kept, found = rows.values >= np.float32(least), LatentStore(tmp_path / "pruned.zarr").read_images(0, 7)
    row = np.repeat(np.arange(rows.n_rows), np.diff(rows.indptr))
    assert found.indices.tolist() == rows.indices[kept].tolist()
    assert found.values.tobytes() == rows.values[kept].tobytes()
    assert np.diff(found.indptr).tolist() == np.bincount(row[kept], minlength=rows.n_rows).tolist()
    assert (pruned.nnz, pruned.n_dropped) == (kept.sum(), (~kept).sum())
    assert pruned.l0 == whole.l0 == whole.stored_per_token > pruned.stored_per_token
    assert LatentStore(tmp_path / "pruned.zarr").n_dropped == (~kept).sum()
    assert list(verify_latents(tmp_path / "pruned.zarr")) == [None]
    with pytest.raises(SpecMismatch, match=r"with other settings \(min_activation"):
        encode(made / "acts.zarr", made / "run", tmp_path / "pruned.zarr", value_bits=value_bits)


def test_counts_at_a_tau_of_at_least_the_pruning_do_not_change(made: Path, tmp_path: Path) -> None:
    """At the very threshold, just above, and at values that float32 rounds to it; below it, barcodes refuse."""
    encode(made / "acts.zarr", made / "run", tmp_path / "whole.zarr")
    values = LatentStore(tmp_path / "whole.zarr").read_images(0, 7).values
    for least in (0.2, float(np.median(values)), float(np.nextafter(np.median(values), np.float32(9)))):
        encode(made / "acts.zarr", made / "run", tmp_path / "l.zarr", min_activation=least, overwrite=True)
        stores = [LatentStore(tmp_path / name) for name in ("whole.zarr", "l.zarr")]
        for tau in (least, least * (1 + 1e-12), least * 1.01, 1.0):
            rows = [store.read_images(0, 7) for store in stores]
            dense = [ss.csr_matrix((r.values, r.indices, r.indptr), shape=(7 * 257, 40)).toarray() for r in rows]
            one, other = (image_counts(latents, tau, 257, "all") for latents in dense)
            assert (one == other).all()


@pytest.mark.parametrize("least", [-0.1, float("nan"), float("inf"), 1e39])
def test_a_threshold_that_is_none_is_refused(made: Path, tmp_path: Path, least: float) -> None:
    with pytest.raises(BadInput, match="min_activation must be a number of at least 0; found"):
        encode(made / "acts.zarr", made / "run", tmp_path / "latents.zarr", min_activation=least)


def test_ten_bits_change_counts_only_for_values_that_round_across_tau(made: Path, tmp_path: Path) -> None:
    """0.2 is no multiple of what ten bits know: a value in (0.2, 0.2000122) is stored as 0.19995 and not counted."""
    kept = {bits: round_mantissa(np.linspace(0.19, 0.21, 200_001, dtype=np.float32), bits) for bits in (10, 23)}
    lost = kept[23][(kept[23] > np.float32(0.2)) & (kept[10] <= np.float32(0.2))]
    assert not ((kept[23] <= np.float32(0.2)) & (kept[10] > np.float32(0.2))).any()
    assert 0.2 < lost.min() < lost.max() < 0.2000123
    for bits in (10, 23):
        encode(made / "acts.zarr", made / "run", tmp_path / str(bits), value_bits=bits)
    ten, whole = (LatentStore(tmp_path / str(bits)).read_images(0, 7) for bits in (10, 23))
    assert ten.indices.tolist() == whole.indices.tolist()
    differs = (ten.values > np.float32(0.2)) != (whole.values > np.float32(0.2))
    assert (np.abs(whole.values[differs] - 0.2) < 1.3e-5).all()


def test_bf16_stands_in_the_store_and_is_near(made: Path, tmp_path: Path) -> None:
    """Operands and results keep eight bits: other latents cross zero only near it, and the settings are others."""
    encode(made / "acts.zarr", made / "run", tmp_path / "bf16.zarr", precision="bf16", value_bits=23)
    store, dense = LatentStore(tmp_path / "bf16.zarr"), dense_latents(made / "acts.zarr", made / "run")
    assert store.spec.precision == "bf16"
    rows = store.read_images(0, 7)
    found = np.zeros_like(dense)
    found[np.repeat(np.arange(rows.n_rows), np.diff(rows.indptr)), rows.indices] = rows.values
    assert 1e-4 < np.abs(found - dense).max() < 0.02 * dense.max()
    with pytest.raises(SpecMismatch, match="precision bf16 against fp32"):
        encode(made / "acts.zarr", made / "run", tmp_path / "bf16.zarr", value_bits=23)
    with pytest.raises(BadInput, match="precision must be one of fp32, bf16; found 'fp16'"):
        encode(made / "acts.zarr", made / "run", tmp_path / "x.zarr", precision="fp16")


def test_what_is_active_is_for_the_model_to_say(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other activations than ReLU: here the four largest of each token."""

    def keep_active_(self: SparseAutoencoder, p: torch.Tensor) -> torch.Tensor:
        return p.masked_fill_(p < p.topk(4).values[:, 3:], -np.inf)

    monkeypatch.setattr(SparseAutoencoder, "keep_active_", keep_active_)
    encode(made / "acts.zarr", made / "run", tmp_path / "latents.zarr")
    lengths = np.diff(LatentStore(tmp_path / "latents.zarr").read_images(2, 4).indptr)
    assert lengths.tolist() == [4] * 514


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    values=hnp.arrays(np.float32, st.integers(0, 20), elements=st.floats(2.0**-149, 2.0**127, width=32)),
    bits=st.sampled_from([10, 23]),
)
def test_rounding_equals_the_twin(values: Float, bits: int) -> None:
    """Any positive float32, denormals and ties included; where the twin gives zero, the least number above it."""
    least = np.float32(2.0 ** (-126 - bits))
    wanted = np.maximum(reference.round_mantissa(values, bits), least)
    assert round_mantissa(values, bits).tobytes() == wanted.tobytes()


def test_anndata_opens_the_rows_as_they_are(made: Path, tmp_path: Path) -> None:
    """AnnData's csr_matrix layout: a backed sparse dataset of any scverse tool, equal to the dense latents."""
    encode(made / "acts.zarr", made / "run", tmp_path / "latents.zarr")
    group = zarr.open_group(tmp_path / "latents.zarr", mode="r")
    backed = anndata.io.sparse_dataset(group["X"])
    assert backed.shape == (7 * 257, 40)
    wanted = dense_latents(made / "acts.zarr", made / "run")
    wanted[wanted > 0] = round_mantissa(wanted[wanted > 0], 10)
    assert np.array_equal(backed[300:900].toarray(), wanted[300:900])
    assert np.array_equal(backed.to_memory().toarray(), wanted)


# ------------------------------------------------------------------------------------------- interruptions


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """So many nonzeros (about 1.6 million) that a CSR chunk is full in the middle; never.zarr: nobody stopped it."""
    root = tmp_path_factory.mktemp("wide")
    write_cache(root / "acts.zarr", random_tokens(12), unreadable=(5,), chunk_images=3)
    write_sae(root / "run", root / "acts.zarr", n_latents=1100)
    result = encode(root / "acts.zarr", root / "run", root / "never.zarr")
    assert 1.2 * CHUNK_ENTRIES < result.nnz < 1.8 * CHUNK_ENTRIES
    return root


@pytest.mark.parametrize("stop_at", [3, 6, 9, 12])
def test_interrupted_at_any_chunk_and_continued_is_the_same_store(wide: Path, tmp_path: Path, stop_at: int) -> None:
    """Chunk after chunk, the first and the last one included: every byte but the run log."""

    def interrupt(done: int, total: int, state: str) -> None:
        if done == stop_at:
            raise KeyboardInterrupt

    latents, seen = tmp_path / "latents.zarr", []
    with pytest.raises(KeyboardInterrupt):
        encode(wide / "acts.zarr", wide / "run", latents, progress=interrupt)
    with pytest.raises(IncompleteStore, match="Run the same cyto sae encode command again"):
        LatentStore(latents)
    encode(wide / "acts.zarr", wide / "run", latents, progress=lambda done, total, state: seen.append(done))
    assert seen == list(range(stop_at - 3, 13, 3))  # what was committed is counted, and not done again
    assert contents(latents) == contents(wide / "never.zarr")
    assert len(read_runs(latents)) == 2


def test_interrupted_again_and_again_is_the_same_store(wide: Path, tmp_path: Path) -> None:
    """One chunk gets through each time; what the next one wrote and did not commit is left behind each time."""
    latents, began = tmp_path / "latents.zarr", []

    def interrupt(done: int, total: int, state: str) -> None:
        if state == "":
            began.append(done)
        elif done == began[-1] + 6:
            raise KeyboardInterrupt

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            encode(wide / "acts.zarr", wide / "run", latents, progress=interrupt)
    encode(wide / "acts.zarr", wide / "run", latents, progress=interrupt)
    assert began == [0, 3, 6, 9]
    assert contents(latents) == contents(wide / "never.zarr")


@pytest.mark.stress
def test_a_command_killed_at_random_moments_and_repeated_gives_the_same_store(tmp_path: Path) -> None:
    """SIGKILL of real processes, each behind some commits of its own; the same command again completes it."""
    cache = write_cache(tmp_path / "acts.zarr", random_tokens(60, 17), unreadable=(2, 37), chunk_images=1)
    run = write_sae(tmp_path / "run", cache, n_latents=300)
    encode(cache, run, tmp_path / "never.zarr")
    latents = tmp_path / "latents.zarr"
    arguments = ["sae", "encode", str(cache), str(run), "-o", str(latents), "--device", "cpu"]

    def n_commits() -> int:
        journal = latents / "journal.jsonl"
        return journal.read_bytes().count(b"\n") if journal.exists() else 0

    n_killed = 0
    for delay in (0.0, random.uniform(0, 0.1), random.uniform(0, 0.2)):  # they differ from run to run, on purpose
        process = subprocess.Popen(
            [sys.executable, "-m", "cli", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        n_before = n_commits()
        while n_commits() == n_before and process.poll() is None:
            time.sleep(0.001)
        time.sleep(delay)
        process.kill()
        said = process.communicate()[1]
        assert process.returncode in (0, -signal.SIGKILL), said
        n_killed += process.returncode != 0
    assert n_killed
    header = find_header(latents)
    assert header is not None
    again = CliRunner().invoke(cli, arguments)
    assert again.exit_code == 0, again.output
    assert contents(latents) == contents(tmp_path / "never.zarr")


@pytest.mark.parametrize("name", ["append_tokens", "commit"])
def test_an_error_of_the_writing_thread_ends_the_job(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A full disk: nothing is written behind it, and the job goes on from the last commit."""
    real, n_calls = getattr(LatentWriter, name), 0

    def full(self: LatentWriter, *arguments: Any, **more: Any) -> None:
        nonlocal n_calls
        n_calls += 1
        if n_calls == 2:
            time.sleep(0.3)  # meanwhile, more is waiting behind it
            raise OSError(28, "No space left on device")
        real(self, *arguments, **more)

    latents = tmp_path / "latents.zarr"
    with monkeypatch.context() as patch:
        patch.setattr(LatentWriter, name, full)
        with pytest.raises(OSError, match="No space left"):
            encode(wide / "acts.zarr", wide / "run", latents)
    assert n_calls == 2
    encode(wide / "acts.zarr", wide / "run", latents)
    assert contents(latents) == contents(wide / "never.zarr")


def test_a_complete_store_is_not_encoded_again(made: Path, tmp_path: Path) -> None:
    first = encode(made / "acts.zarr", made / "run", tmp_path / "latents.zarr")
    again = encode(
        made / "acts.zarr", made / "run", tmp_path / "latents.zarr", progress=lambda *_: pytest.fail("it encoded")
    )
    assert again.was_complete
    assert (again.nnz, again.n_readable, again.spec) == (first.nnz, first.n_readable, first.spec)
    with pytest.raises(SpecMismatch, match=r"with other settings \(value_bits 10 against 23\)"):
        encode(made / "acts.zarr", made / "run", tmp_path / "latents.zarr", value_bits=23)


# ------------------------------------------------------------------------------------------- what is refused


def test_an_sae_of_other_tokens_is_refused_with_the_difference_in_words(made: Path, tmp_path: Path) -> None:
    other = write_cache(tmp_path / "other.zarr", random_tokens(2), block=9, backbone="another")
    words = (
        r"the SAE .*run and the cache .*other\.zarr do not hold the same kind of tokens: "
        r"backbone none: synthetic tokens against another, block 10 against 9\. Compare: cyto sae info, cyto cache info"
    )
    with pytest.raises(SpecMismatch, match=words):
        encode(other, made / "run", tmp_path / "latents.zarr")
    assert not (tmp_path / "latents.zarr").exists()


def test_an_sae_encodes_the_cache_of_another_dataset(made: Path, tmp_path: Path) -> None:
    """Same backbone, weights, block and transform; images, chunks and precision may differ."""
    other = write_cache(tmp_path / "other.zarr", random_tokens(3, seed=5), precision="bf16", chunk_images=8)
    assert encode(other, made / "run", tmp_path / "latents.zarr").n_readable == 3


def _change_weights(run: Path) -> None:
    tensors, metadata = load_tensors(run / "sae.safetensors")
    tensors["b_enc"][0] += 1
    save_tensors(run / "sae.safetensors", tensors, metadata)


def _truncate(run: Path) -> None:
    (run / "sae.safetensors").write_bytes((run / "sae.safetensors").read_bytes()[:100])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_change_weights, "was changed: its SHA-256 is not the one in sae.json"),
        (_truncate, "was changed: its SHA-256 is not the one in sae.json"),
        (lambda run: (run / "sae.safetensors").unlink(), "is missing; train again with cyto sae train"),
    ],
    ids=["changed", "truncated", "missing"],
)
def test_weights_that_are_not_those_of_the_run_are_refused(
    made: Path, tmp_path: Path, damage: Callable[[Path], None], words: str
) -> None:
    run = write_sae(tmp_path / "run", made / "acts.zarr", n_latents=40)
    damage(run)
    with pytest.raises(DamagedStore, match=rf"sae\.safetensors {words}"):
        encode(made / "acts.zarr", run, tmp_path / "latents.zarr")


def test_weights_that_are_not_finite_are_refused(made: Path, tmp_path: Path) -> None:
    run = write_sae(tmp_path / "run", made / "acts.zarr", n_latents=40, change=lambda model: model.b_enc.fill_(np.nan))
    with pytest.raises(DamagedStore, match="holds weights that are NaN or infinite"):
        encode(made / "acts.zarr", run, tmp_path / "latents.zarr")


def test_latents_that_become_infinite_are_refused(made: Path, tmp_path: Path) -> None:
    run = write_sae(tmp_path / "run", made / "acts.zarr", n_latents=40, change=lambda model: model.W_enc.mul_(3e38))
    with pytest.raises(BadInput, match="a latent became NaN or infinite: the SAE's weights do not fit these tokens"):
        encode(made / "acts.zarr", run, tmp_path / "latents.zarr")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_latents_that_become_nan_do_not_pass_for_silence(made: Path, tmp_path: Path, activation: str) -> None:
    """inf - inf inside a product: NaN is not above 0, and would be an empty row."""

    def overflow(model: SparseAutoencoder) -> None:
        model.W_enc[::2] = 3e38
        model.W_enc[1::2] = -3e38

    run = write_sae(tmp_path / "run", made / "acts.zarr", n_latents=40, activation=activation, change=overflow)
    with pytest.raises(BadInput, match="a latent became NaN or infinite"):
        encode(made / "acts.zarr", run, tmp_path / "latents.zarr")


def test_nan_in_a_readable_image_is_an_error_and_no_store(made: Path, tmp_path: Path) -> None:
    tokens = random_tokens(3)
    tokens[1, 100, 3] = np.nan
    cache = write_cache(tmp_path / "acts.zarr", tokens, chunk_images=1)
    with pytest.raises(DamagedStore, match="a token of a readable image is NaN or infinite"):
        encode(cache, made / "run", tmp_path / "latents.zarr")
    header = find_header(tmp_path / "latents.zarr")
    assert header is not None
    assert (header.kind, header.complete) == (LATENTS.kind, False)


def test_info_of_a_store_without_a_nonzero(tmp_path: Path) -> None:
    """Everything was pruned: no size of each of none."""
    empty = write_latents(tmp_path / "none.zarr", np.zeros((2, 3, 4), np.float32), [("A", None, True)] * 2)
    assert latents_info(empty).rows()["nonzeros"] == "0 (0.0 per token of a readable image)"
    one = write_latents(tmp_path / "one.zarr", np.eye(4, dtype=np.float32)[None, :3], [("A", None, True)])
    size = sum(path.stat().st_size for path in one.rglob("*") if path.is_file())
    assert latents_info(one).rows()["nonzeros"] == f"3 (1.0 per token of a readable image, {size / 3:.2f} bytes each)"
