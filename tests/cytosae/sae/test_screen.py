"""The screen of the encoder loses no active latent, and a step with it is the dense step but for rounding.

Twin: every product in float64, and the dense step of losses.py.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from objectives import L1

from cytosae.sae import SparseAutoencoder, screen
from cytosae.sae.config import ACTIVATIONS
from cytosae.sae.top_k import use_threads
from cytosae.training import Objective, loss_and_gradients

WIDTH, L = 24, 96
ROUNDING = 1e-5  # max|difference| / max|reference|, per tensor (docs/reference/design.md 6)

pytestmark = pytest.mark.skipif(not screen.multiplies_whole_numbers(), reason="this processor has no VNNI")


@pytest.fixture(autouse=True)
def _at_any_size() -> Iterator[None]:
    """Small encoders are screened, too, and whatever number of candidates is left."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(screen, "_SMALLEST", 0)
        patch.setattr(screen, "_MOST", 1.0)
        yield


def model_of(seed: int, activation: str, *, bias: float = -0.1, k: int = 5) -> SparseAutoencoder:
    rng = np.random.default_rng(seed)
    model = SparseAutoencoder(WIDTH, L, activation, k if "topk" in activation else None)
    model.init_weights(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        model.b_enc.copy_(torch.from_numpy(rng.normal(bias, 0.3, L)))
        model.b_dec.copy_(torch.from_numpy(rng.normal(0, 1, WIDTH)))
        if activation == "batchtopk":
            model.threshold.fill_(0.4)
        if activation == "jumprelu":
            model.log_threshold.copy_(torch.from_numpy(rng.normal(-1, 1, L)))
        if activation == "gated":
            model.r_mag.copy_(torch.from_numpy(rng.normal(0, 0.5, L)))
            model.b_mag.copy_(torch.from_numpy(rng.normal(0, 0.3, L)))
    return model


def screen_of(model: SparseAutoencoder) -> screen.Screen:
    return screen.Screen(model.W_enc.detach().T.numpy(), model.b_enc.detach().numpy(), model.k)


def tokens_of(seed: int, n: int, kind: str) -> torch.Tensor:
    """x - b_dec: normal, with one channel far above all others, or nearly all alike; the last token is 0."""
    x = np.random.default_rng(seed + 1).normal(size=(n, WIDTH)).astype(np.float32)
    if kind == "outlier":
        x[:, 3] *= 300
    if kind == "alike":
        x = x[:1] + 1e-3 * x
    x[-1] = 0
    return torch.from_numpy(x)


def twin(model: SparseAutoencoder, x: torch.Tensor) -> Any:
    """p in float64, and by how much float32 may miss it."""
    weights, bias = model.W_enc.detach().double().numpy(), model.b_enc.detach().double().numpy()
    p = x.double().numpy() @ weights + bias
    return p, 1e-6 * (x.norm(dim=1).numpy()[:, None] * np.linalg.norm(weights, axis=0) + np.abs(bias))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 40),
    kind=st.sampled_from(["normal", "outlier", "alike"]),
    scale=st.sampled_from([1e-20, 1.0, 1e6]),
    activation=st.sampled_from(["relu", "topk"]),
)
def test_no_active_latent_is_lost(seed: int, n: int, kind: str, scale: float, activation: str) -> None:
    model, x = model_of(seed, activation), tokens_of(seed, n, kind) * scale
    p, rounding = twin(model, x)
    least = 0.0 if activation == "relu" else np.maximum(np.sort(p)[:, -5][:, None], 0)
    searcher = screen_of(model)
    candidates = searcher.candidates(x, torch.empty(n, L))
    active = searcher.active(x, torch.empty(n, L))
    assert candidates is not None
    assert active is not None
    is_candidate = np.zeros((n, L), bool)
    latents = np.repeat(np.arange(L), candidates.counts)
    is_candidate[candidates.tokens, latents] = True
    assert is_candidate[(p > 0) & (p >= least)].all()
    assert (np.abs(candidates.values - p[candidates.tokens, latents]) <= rounding[candidates.tokens, latents]).all()
    z = active.to_dense()
    is_sure = np.abs(p - least) > 2 * rounding  # of the others float32 decides
    is_at_least = (p >= least) & (p > 0)
    assert np.array_equal((z > 0)[is_sure], is_at_least[is_sure])
    assert (np.abs(z - p)[z > 0] <= rounding[z > 0]).all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 40),
    kind=st.sampled_from(["normal", "outlier", "alike"]),
    activation=st.sampled_from(ACTIVATIONS),
)
def test_latents_of_any_activation_are_those_of_the_model(seed: int, n: int, kind: str, activation: str) -> None:
    """Against the model's own `encode` in float64: who is active, where float32 can tell, and the values."""
    model, x = model_of(seed, activation), tokens_of(seed, n, kind)
    x = x + model.b_dec.detach()
    found = screen.ScreenedEncoder(model).latents(x, torch.empty(n, L))
    assert found is not None
    assert (found.values > 0).all()
    z = found.to_dense()
    exact = twin_model(model)
    p, rounding = twin(model, x - model.b_dec.detach())
    with torch.no_grad():
        wanted = exact.keep_active_(torch.from_numpy(p.copy())).relu_().numpy()
        threshold_L = exact.log_threshold.exp().numpy() if activation == "jumprelu" else 0.0
        threshold_L = float(exact.threshold) if activation == "batchtopk" else threshold_L
        least = np.maximum(np.sort(p)[:, -5][:, None], 0) if activation == "topk" else threshold_L
        is_sure = np.abs(p - least) > 2 * rounding  # of the others float32 decides
        if activation == "gated":
            scale_L = exact.r_mag.exp().numpy()
            magnitude = (p - exact.b_enc.numpy()) * scale_L + exact.b_mag.numpy()
            rounding = rounding * (1 + scale_L) + 1e-6 * (np.abs(p) * scale_L + 1)
            is_sure &= np.abs(magnitude) > rounding
    assert np.array_equal((z > 0)[is_sure], (wanted > 0)[is_sure])
    is_on = (z > 0) & (wanted > 0)
    assert (np.abs(z - wanted)[is_on] <= rounding[is_on]).all()


def twin_model(model: SparseAutoencoder) -> SparseAutoencoder:
    """The same in float64."""
    exact = SparseAutoencoder(model.width, model.n_latents, model.activation, model.k).double()
    exact.load_state_dict(model.state_dict())
    return exact


def test_each_micro_batch_decides_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when another was dense before, so that a job that goes on in the middle finds the same."""
    monkeypatch.setattr(screen, "_MOST", 0.25)
    model, few = model_of(13, "relu", bias=-1.0), tokens_of(13, 40, "normal") * 0.1
    many, buffer = tokens_of(14, 40, "normal") * 100, torch.empty(40, L)
    first = screen.ScreenedEncoder(model).latents(few + model.b_dec.detach(), buffer)
    encoder = screen.ScreenedEncoder(model)
    assert encoder.latents(many + model.b_dec.detach(), buffer) is None
    later = encoder.latents(few + model.b_dec.detach(), buffer)
    assert first is not None
    assert later is not None
    assert np.array_equal(first.to_dense(), later.to_dense())


def test_sums_that_may_overflow_are_left_to_the_dense_product() -> None:
    """Its sums may be infinity - infinity, which is to be noticed, and the screen would find nothing there."""
    model = model_of(15, "relu")
    with torch.no_grad():
        model.W_enc.mul_(1e36)
    x = tokens_of(15, 9, "normal")
    assert screen_of(model).candidates(x, torch.empty(9, L)) is not None
    assert screen_of(model).candidates(x * 1e3, torch.empty(9, L)) is None


def test_of_equal_values_the_first_ones_are_kept() -> None:
    """As in `keep_top_k_`, which the dense step uses."""
    model, x = model_of(3, "topk", bias=1.0), tokens_of(3, 9, "normal")
    with torch.no_grad():
        model.W_enc[:, 1::2] = model.W_enc[:, ::2]
        model.b_enc[1::2] = model.b_enc[::2]
    active = screen_of(model).active(x, torch.empty(9, L))
    assert active is not None
    z = active.to_dense()
    assert ((z > 0).sum(1) == 5).all()
    assert ((z[:, ::2] > 0).sum(1) == 3).all()  # of the third pair the first


def test_the_margin_is_what_makes_it_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it latents would be lost, so that the tests above could fail."""
    model, x = model_of(5, "relu"), tokens_of(5, 40, "outlier")
    monkeypatch.setattr(screen, "rounded_rows", without_margin(screen.rounded_rows))
    searcher = screen_of(model)
    candidates = searcher.candidates(x, torch.empty(40, L))
    assert candidates is not None
    p, rounding = twin(model, x)
    is_candidate = np.zeros((40, L), bool)
    is_candidate[candidates.tokens, np.repeat(np.arange(L), candidates.counts)] = True
    assert not is_candidate[p > 2 * rounding].all()


def without_margin(rounded_rows: Any) -> Any:
    def changed(rows: Any) -> Any:
        found = rounded_rows(rows)
        return screen.Rounded(found.q, found.scale, found.norm * 0, found.rounded_norm * 0, found.off * 0)

    return changed


def gradients(model: SparseAutoencoder, x: torch.Tensor, objective: Objective, **more: Any) -> Any:
    for parameter in model.parameters():
        parameter.grad = None
    losses = loss_and_gradients(model, x, objective, l1=L1, **more)
    return losses, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("nested", [None, (0.25, 1.0)])
@pytest.mark.parametrize("dead_latents", ["none", "ghost", "auxk"])
@pytest.mark.parametrize("activation", ["relu", "topk"])
def test_a_step_is_the_dense_step(
    activation: str, dead_latents: str, nested: tuple[float, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(7, activation)
    x = tokens_of(7, 60, "normal") + model.b_dec.detach()
    objective = Objective(dead_latents=dead_latents, nested=nested)
    dead = torch.arange(L) % 7 == 0
    losses, found = gradients(model, x, objective, dead_L=dead, micro_batch=25, sparse_below=2.0)
    with monkeypatch.context() as patch:
        patch.setattr(screen, "multiplies_whole_numbers", lambda: False)
        dense_losses, dense = gradients(model, x, objective, dead_L=dead, micro_batch=25, sparse_below=2.0)
    assert losses.l0 == dense_losses.l0
    assert losses.loss == pytest.approx(dense_losses.loss, rel=ROUNDING)
    assert torch.equal(losses.fired, dense_losses.fired)
    for name, reference in dense.items():
        assert (found[name] - reference).abs().max() <= ROUNDING * reference.abs().max(), name
    assert any(not torch.equal(found[name], reference) for name, reference in dense.items())  # two ways indeed


def test_bits_do_not_depend_on_threads_or_on_the_batch() -> None:
    model, x = model_of(11, "relu"), tokens_of(11, 70, "normal")
    first = screen_of(model).active(x, torch.empty(70, L))
    part = screen_of(model).active(x[:30], torch.empty(30, L))
    assert first is not None
    assert part is not None
    assert np.array_equal(first.to_dense()[:30], part.to_dense())
    n_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = screen_of(model).active(x, torch.empty(70, L))
    finally:
        torch.set_num_threads(n_threads)
        use_threads(n_threads)
    assert alone is not None
    assert np.array_equal(first.to_dense(), alone.to_dense())


def test_where_it_would_not_help_the_product_is_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the latents active; another activation or type; values that are not finite; a small encoder."""
    model, x = model_of(13, "relu", bias=0.0), tokens_of(13, 40, "normal")
    assert screen.screen_of(model, x, 1.0) is not None
    assert screen.screen_of(model, x, 0.0) is None
    assert screen.screen_of(model, x.double(), 1.0) is None
    assert screen.screen_of(model_of(13, "topk"), x, 1.0) is not None
    assert screen.screen_of(SparseAutoencoder(WIDTH, L, "gated"), x, 1.0) is None
    spoiled = x.clone()
    spoiled[2, 3] = torch.inf
    assert screen.screen_of(model, spoiled, 1.0) is None
    losses, _ = gradients(model, torch.full_like(x, torch.nan), Objective(), sparse_below=2.0)
    assert np.isnan(losses.loss)
    with torch.no_grad():
        model.W_enc[4, 5] = torch.nan
    assert screen.screen_of(model, x, 1.0) is None
    monkeypatch.setattr(screen, "_MOST", 0.05)
    assert screen.screen_of(model_of(13, "relu", bias=0.0), x, 1.0) is None
    assert screen.screen_of(model_of(13, "relu", bias=-9.0), x, 1.0) is not None
    monkeypatch.setattr(screen, "_SMALLEST", WIDTH * L + 1)
    assert screen.screen_of(model_of(13, "relu", bias=-9.0), x, 1.0) is None
