"""The autoencoder itself: how it starts, what it computes, and what may be done to its decoder's norms."""

import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Params

from cytosae.sae import SparseAutoencoder, geometric_median


def _started(seed: int, width: int = 12, n_latents: int = 96) -> SparseAutoencoder:
    model = SparseAutoencoder(width, n_latents)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model.requires_grad_(False)


def _trained(seed: int, *, zero_row: bool = False) -> SparseAutoencoder:
    """Decoder rows of any norm, biases that are not zero."""
    model = _started(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    model.W_dec.mul_(0.5 + torch.rand(model.n_latents, 1, generator=generator))
    model.b_enc.add_(0.1 * torch.randn(model.n_latents, generator=generator))
    model.b_dec.add_(torch.randn(model.width, generator=generator))
    if zero_row:
        model.W_dec[5] = 0
    return model


def _params(model: SparseAutoencoder) -> Params:
    return Params(*(getattr(model, name).double().numpy() for name in ("W_enc", "b_enc", "W_dec", "b_dec")))


def test_weights_start_as_released() -> None:
    """docs/reference/paper.md 4.2: U(+-sqrt(6 / n_latents)) in W_enc, decoder rows of norm 1, untied, biases 0."""
    model = _started(0, width=48, n_latents=480)
    bound = math.sqrt(6 / 480)
    assert 0.99 * bound < model.W_enc.abs().max() <= bound
    assert model.W_enc.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert abs(model.W_enc.mean().item()) < 0.02 * bound
    torch.testing.assert_close(model.W_dec.norm(dim=1), torch.ones(480), rtol=0, atol=3e-7)
    # normalised uniform entries: none can pass bound / (norm of the smallest row), and they fill their range
    assert model.W_dec.std().item() == pytest.approx(1 / math.sqrt(48), rel=0.02)
    cosines = (model.W_enc.T * model.W_dec).sum(1) / model.W_enc.norm(dim=0)
    assert cosines.abs().mean() < 0.2
    assert not model.b_enc.any()
    assert not model.b_dec.any()


def test_the_seed_decides_the_start() -> None:
    first, again, other = _started(7), _started(7), _started(8)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.W_enc, other.W_enc)
    assert not torch.equal(first.W_dec, other.W_dec)


def test_encoding_and_decoding_equal_the_twin() -> None:
    model = _trained(1)
    tokens = torch.randn(50, model.width, generator=torch.Generator().manual_seed(2)) + model.b_dec
    p, h, x_hat = reference.sae_forward(_params(model), tokens.numpy())
    np.testing.assert_allclose(model.pre_activations(tokens), p, atol=1e-5 * np.abs(p).max())
    np.testing.assert_allclose(model.encode(tokens), h, atol=1e-5 * h.max())
    np.testing.assert_allclose(model(tokens), x_hat, atol=1e-5 * np.abs(x_hat).max())
    assert torch.equal(model(tokens), model.decode(model.encode(tokens)))


@pytest.mark.parametrize("zero_row", [False, True])
def test_folding_the_decoder_norm_leaves_the_reconstruction_unchanged(zero_row: bool) -> None:
    model = _trained(3, zero_row=zero_row)
    tokens = torch.randn(50, model.width, generator=torch.Generator().manual_seed(4)) + model.b_dec
    before, twin = model(tokens), reference.fold_decoder_norm(_params(model))
    model.fold_decoder_norm()
    torch.testing.assert_close(model(tokens), before, rtol=0, atol=1e-5 * before.abs().max().item())
    norms = model.W_dec.norm(dim=1)
    is_zero = torch.arange(model.n_latents) == (5 if zero_row else -1)
    torch.testing.assert_close(norms, (~is_zero).float(), rtol=0, atol=3e-7)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        np.testing.assert_allclose(getattr(model, name), getattr(twin, name), rtol=1e-6, atol=1e-9)


def test_normalising_divides_rows_by_their_norm_and_spares_a_zero_row() -> None:
    model = _trained(5, zero_row=True)
    twin = reference.normalise_decoder(_params(model))
    model.normalise_decoder()
    np.testing.assert_allclose(model.W_dec, twin.W_dec, rtol=1e-6, atol=1e-9)
    assert not model.W_dec[5].any()


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31), n=st.integers(1, 30), width=st.integers(1, 6))
def test_the_geometric_median_equals_the_twin(seed: int, n: int, width: int) -> None:
    """Token by token; outliers included, and points that coincide with the median (weights are capped there)."""
    rng = np.random.default_rng(seed)
    points = rng.normal(5, 1, (n, width)).astype(np.float32)
    points[n // 2 :: 3] *= 10
    points[: n // 3] = points[0]
    found, wanted = geometric_median(torch.from_numpy(points)), reference.geometric_median(points)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_the_geometric_median_of_images_measures_them_whole() -> None:
    """(N, T, D): one Frobenius distance per image, as the released start takes it; then the mean over positions."""
    images = np.random.default_rng(9).normal(2, 1, (12, 5, 4)).astype(np.float32)
    images[3] += 40
    found = geometric_median(torch.from_numpy(images))
    assert found.shape == (5, 4)
    wanted = reference.geometric_median_per_position(images)
    np.testing.assert_allclose(found.mean(0), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    apart = reference.geometric_median(images.reshape(-1, 4))
    assert np.abs(wanted - apart).max() > 1e-2  # the two starts are different ones


def test_the_geometric_median_withstands_outliers() -> None:
    points = torch.cat([torch.full((7, 2), 1.0), torch.full((3, 2), 1000.0)])
    torch.testing.assert_close(geometric_median(points), torch.ones(2), rtol=0, atol=1e-3)
