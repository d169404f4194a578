"""The fits of baselines beside slow, obvious twins in numpy; k-means also interrupted."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.optimize import nnls
from torch._subclasses.fake_tensor import FakeTensorMode

from cytosae.baselines import directions as fitting
from cytosae.baselines.directions import (
    Weights,
    fit_ica,
    fit_kmeans,
    fit_neurons,
    fit_nmf,
    fit_pca,
    fit_tokens,
    fitting_scale,
    nmf_factors,
)
from cytosae.sae import SparseAutoencoder
from stores.errors import BadInput
from stores.part_files import KeptParts, KeptState

Floats = npt.NDArray[np.float64]
pytestmark = pytest.mark.usefixtures("one_thread")


def sae_of(weights: Weights, k: int, centre: torch.Tensor | None = None) -> SparseAutoencoder:
    n_latents, width = weights.decoder.shape
    model = SparseAutoencoder(width, n_latents, "topk", k)
    with torch.no_grad():
        model.W_enc.copy_(weights.encoder.T)
        model.W_dec.copy_(weights.decoder)
        model.b_enc.copy_(weights.bias)
        model.b_dec.copy_(torch.zeros(width) if centre is None else centre)
    return model.requires_grad_(False)


def spread_tokens(n: int = 500, width: int = 6) -> Floats:
    """(n, width) about 0, with another variance along each of some oblique axes."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, width)) * np.arange(1, width + 1) @ np.linalg.qr(rng.normal(size=(width, width)))[0]
    return np.asarray(x - x.mean(0))


def k_largest(x: Floats, axes: Floats, k: int) -> Floats:
    """Each token from its k largest coordinates along orthonormal axes, of either sign."""
    made = np.zeros_like(x)
    for number, token in enumerate(x):
        scores = axes @ token
        for which in np.argsort(-np.abs(scores))[:k]:
            made[number] += scores[which] * axes[which]
    return made


@pytest.mark.parametrize("k", [1, 3, 6])
def test_pca_and_neurons_keep_the_largest_coordinates(k: int) -> None:
    x = spread_tokens()
    axes = np.linalg.svd(x, full_matrices=False)[2]
    fits: list[tuple[Weights, Floats]] = [(fit_pca(torch.from_numpy(x).float(), 6), axes), (fit_neurons(6), np.eye(6))]
    for weights, directions in fits:
        made = sae_of(weights, k)(torch.from_numpy(x).float()).numpy()
        np.testing.assert_allclose(made, k_largest(x, directions, k), atol=1e-4)
        assert fitting_scale(sae_of(weights, k), torch.from_numpy(x).float()) == pytest.approx(1, abs=1e-5)


def test_pca_has_no_components_without_variance() -> None:
    x = spread_tokens()
    x[:, 2:] = 0
    assert len(fit_pca(torch.from_numpy(x).float(), 6).bias) == 4  # two components, each with both signs


def test_tokens_are_drawn_once_each() -> None:
    x = torch.from_numpy(spread_tokens(40)).float()
    rows = fit_tokens(x, 40, seed=3).decoder
    unit = x / x.norm(dim=1, keepdim=True)
    assert torch.equal(torch.sort(rows[:, 0]).values, torch.sort(unit[:, 0]).values)
    assert not torch.equal(fit_tokens(x, 20, seed=1).decoder, fit_tokens(x, 20, seed=2).decoder)
    with pytest.raises(BadInput, match=r"each of the 41 latents; there are 40 training tokens. Compare with a smaller"):
        fit_tokens(x, 41, seed=0)


def test_kmeans_is_the_loop_over_tokens() -> None:
    rng, centre = np.random.default_rng(1), np.full(4, 3.0)
    tokens = centre + rng.normal(size=(90, 4)) + 5 * rng.integers(0, 2, (90, 4))
    batches = [torch.from_numpy(part).float() for part in np.split(tokens, 3)]
    weights = fit_kmeans(batches, torch.from_numpy(centre).float(), 7, seed=2)

    first = torch.randperm(30, generator=torch.Generator().manual_seed(2))[:7].numpy()
    clusters, n = (tokens - centre)[first].copy(), np.zeros(7)
    for batch in np.split(tokens - centre, 3):
        before = clusters.copy()
        nearest = [int(np.argmin([np.sum((token - cluster) ** 2) for cluster in before])) for token in batch]
        for token, which in zip(batch, nearest, strict=True):  # the mean of all tokens so far, one after the other
            n[which] += 1
            clusters[which] += (token - clusters[which]) / n[which]
    np.testing.assert_allclose(weights.encoder.numpy(), clusters, atol=1e-4)

    model = sae_of(weights, 1, torch.from_numpy(centre).float())
    made = model(torch.from_numpy(tokens).float()).numpy()
    for token, reconstruction in zip(tokens, made, strict=True):  # as far as the nearest cluster, or the centre
        nearest_square = min(np.sum((token - centre - each) ** 2) for each in [*clusters, np.zeros(4)])
        assert np.sum((token - reconstruction) ** 2) == pytest.approx(nearest_square, rel=1e-3, abs=1e-3)


def test_sums_of_clusters_on_a_gpu_have_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's bits, clusters without a token among them; on a GPU nothing is added in the order of its threads."""
    rng = np.random.default_rng(0)
    which, x = torch.from_numpy(rng.integers(0, 9, 500)), torch.from_numpy(rng.normal(size=(500, 6))).float()
    which[which == 4] = 5
    given = torch.bincount(which, minlength=10).float()
    wanted = torch.zeros(10, 6).index_add_(0, which, x)
    assert torch.equal(fitting.sums_in_order(which, x, given), wanted)
    assert torch.equal(fitting._sums_by(which, x, given), wanted)

    taken: list[torch.Tensor] = []
    monkeypatch.setattr(fitting, "sums_in_order", lambda which, x, given: taken.append(which))
    with FakeTensorMode(), torch.device("cuda"):
        fitting._sums_by(torch.empty(500), torch.empty(500, 6), torch.empty(10))
    assert len(taken) == 1


def slow_ica(x: Floats, seed: int) -> Floats:
    """Symmetric FastICA with tanh, as Hyvarinen and Oja (2000) print it: unmixing rows of whitened tokens."""
    values, vectors = np.linalg.eigh(x.T @ x / len(x))
    white = x @ vectors / np.sqrt(values)
    w = np.random.default_rng(seed).normal(size=(x.shape[1], x.shape[1]))
    for _ in range(200):
        u, _, v = np.linalg.svd(w)
        w = u @ v
        g = np.tanh(white @ w.T)
        w = g.T @ white / len(x) - (1 - g**2).mean(0)[:, None] * w
    u, _, v = np.linalg.svd(w)
    return np.asarray(u @ v @ (vectors / np.sqrt(values)).T)


def test_ica_finds_independent_sources_as_its_twin_does() -> None:
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(5, 5))
    x = rng.laplace(size=(4000, 5)) @ mixing
    x -= x.mean(0)
    weights = fit_ica(torch.from_numpy(x).float(), 5, seed=0, iterations=200)
    assert not weights.notes

    def best_cosines(rows: Floats, wanted: Floats) -> Floats:
        a, b = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (rows, wanted))
        return np.asarray(np.abs(a @ b.T).max(1))

    assert best_cosines(weights.decoder[:5].double().numpy(), mixing).min() > 0.99
    assert best_cosines(weights.encoder[:5].double().numpy(), slow_ica(x, 7)).min() > 0.999
    whole = sae_of(weights, 5)(torch.from_numpy(x).float())  # all sources together are the token
    np.testing.assert_allclose(whole.numpy(), x, atol=1e-3)
    assert fit_ica(torch.from_numpy(x).float(), 5, seed=0, iterations=1).notes


def slow_nmf(halves: Floats, n: int, rounds: int) -> Floats:
    """Multiplicative updates of Lee and Seung (2001): factors (n, columns)."""
    rng = np.random.default_rng(0)
    codes, factors = rng.random((len(halves), n)), rng.random((n, halves.shape[1]))
    for _ in range(rounds):
        codes *= halves @ factors.T / (codes @ factors @ factors.T + 1e-12)
        factors *= codes.T @ halves / (codes.T @ codes @ factors + 1e-12)
    return factors


def test_nmf_fits_as_well_as_its_twin() -> None:
    x = np.abs(np.random.default_rng(0).normal(size=(200, 3))) @ np.random.default_rng(1).normal(size=(3, 5))
    halves = np.concatenate([np.maximum(x, 0), np.maximum(-x, 0)], axis=1)

    def error(factors: Floats) -> float:
        return sum(nnls(factors.T, row)[1] ** 2 for row in halves) / float((halves**2).sum())

    found, _ = nmf_factors(torch.from_numpy(x).float(), 4, seed=0, iterations=300)
    assert (found >= 0).all()
    twin = error(slow_nmf(halves, 4, 600))
    assert twin < 0.2
    assert error(found.astype(np.float64)) < 1.2 * twin + 0.01
    rows = fit_nmf(torch.from_numpy(x).float(), 4, seed=0, iterations=300).decoder.numpy()
    wanted = found[:, :5] - found[:, 5:]
    np.testing.assert_allclose(rows, wanted / np.linalg.norm(wanted, axis=1, keepdims=True), atol=1e-5)


def test_the_scale_has_the_least_error() -> None:
    x = torch.from_numpy(spread_tokens()).float()
    model = sae_of(fit_tokens(x, 100, seed=0), 8)  # many alike: the plain sum is far too long
    scale = fitting_scale(model, x)

    def error(factor: float) -> float:
        return float((factor * model(x) - x).double().square().sum())

    assert 0 < scale < 0.7
    assert error(scale) < min(error(scale * 0.99), error(scale * 1.01), error(1.0))
    opposite = sae_of(Weights(torch.eye(6), -torch.eye(6), torch.zeros(6)), 2)
    assert np.isnan(fitting_scale(opposite, x))


class _StoppedError(Exception):
    pass


class Stopping(KeptState):
    """Keeps every state, and stops after some."""

    def __init__(self, folder: Path, after: int) -> None:
        super().__init__(KeptParts(folder, "job"), seconds=0.0)
        self.left = after

    def write(self, state: dict[str, Any]) -> None:
        super().write(state)
        self.left -= 1
        if not self.left:
            raise _StoppedError


def test_interrupted_k_means_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    rows = torch.from_numpy(np.random.default_rng(0).normal(size=(2000, 6)).astype(np.float32))

    def fit(state: KeptState) -> npt.NDArray[np.float32]:
        found: npt.NDArray[np.float32] = fit_kmeans(
            rows.split(400), torch.zeros(6), 7, seed=1, state=state
        ).encoder.numpy()
        return found

    whole = fit(KeptState())
    for after in (3, 1):
        with pytest.raises(_StoppedError):
            fit(Stopping(tmp_path, after))
    np.testing.assert_array_equal(fit(Stopping(tmp_path, 10_000)), whole)
    assert KeptState(KeptParts(tmp_path, "job")).read() is not None
    assert KeptState(KeptParts(tmp_path, "another job")).read() is None
