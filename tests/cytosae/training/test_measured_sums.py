"""Measuring with active latents alone gives the sums of dense ones."""

import numpy as np
import pytest
import torch

from cytosae.sae import SparseAutoencoder, screen
from cytosae.sae.config import ACTIVATIONS
from cytosae.training import latent_matrix, measured_latents
from cytosae.training.measured_sums import MeasuredSums
from stores.errors import BadInput

WIDTH, L, T = 32, 512, 6

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=["found in dense latents", "screened"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Screened: also at this size, and on a processor without VNNI."""
    if request.param == "screened":
        monkeypatch.setattr(screen, "_SMALLEST", 0)
        monkeypatch.setattr(screen, "multiplies_whole_numbers", lambda: True)
        monkeypatch.setattr(screen, "_MOST", 1.0)
    else:
        monkeypatch.setattr(screen, "_SMALLEST", 1 << 60)
    return str(request.param)


def model_of(activation: str) -> SparseAutoencoder:
    """A few percent of the latents are active."""
    model = SparseAutoencoder(WIDTH, L, activation=activation, k=8 if activation in ("topk", "batchtopk") else None)
    model.init_weights(torch.Generator().manual_seed(0), threshold=0.5)
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        model.b_dec.normal_(generator=draws)
        model.W_enc.mul_(2)
        model.b_enc.fill_(-2.0 if activation in ("relu", "gated") else 0.0)
        if activation == "batchtopk":
            model.threshold.fill_(2.0)
        if activation == "jumprelu":
            model.log_threshold.fill_(float(np.log(2.0)))
    return model


def images(n: int) -> torch.Tensor:
    """(n, T, WIDTH): the second is the first one again, so that images share active latents."""
    drawn = torch.randn(n, T, WIDTH, generator=torch.Generator().manual_seed(2))
    drawn[1] = drawn[0]
    return drawn


def sums_of(model: SparseAutoencoder, step: int) -> MeasuredSums:
    with torch.inference_mode():
        sums = MeasuredSums(model, loss="normed", step=step, window_begins=3, with_pca=True)
        for some in images(7).split((3, 1, 3)):
            sums.add(some)
    return sums


@pytest.mark.parametrize("step", [4, 100])  # an image in two parts; several images at once
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_sums_are_those_of_dense_latents(
    way: str, activation: str, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(activation)
    with monkeypatch.context() as patch:
        patch.setattr(MeasuredSums, "_add_dense", lambda *_: pytest.fail("dense"))
        if way == "screened":
            patch.setattr(measured_latents, "find_few", lambda *_: pytest.fail("dense latents were made"))
        found = sums_of(model, step)
    monkeypatch.setattr(screen, "_SMALLEST", 1 << 60)
    monkeypatch.setattr(latent_matrix, "SPARSE_BELOW", 0)
    monkeypatch.setattr(MeasuredSums, "_add_active", lambda *_: pytest.fail("not dense"))
    wanted = sums_of(model, step)
    assert 0.01 < wanted.l0 / L < 0.07
    for name in ("n_tokens", "n_images", "latents_per_image", "l0"):
        assert getattr(found, name) == getattr(wanted, name), name
    for name in ("l0_counts", "n_images_active", "n_tokens_active", "fired_in_window"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name
    for name in ("error", "scaled_error", "square", "explained_variance", "variance", "pca_explained_variance"):
        assert getattr(found, name) == pytest.approx(getattr(wanted, name), rel=1e-5), name
    torch.testing.assert_close(found._activation_L, wanted._activation_L, rtol=1e-5, atol=1e-5)
    assert found.n_meaningful() == wanted.n_meaningful()


def test_many_active_latents_are_dense() -> None:
    model = SparseAutoencoder(WIDTH, L)
    model.init_weights(torch.Generator().manual_seed(0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MeasuredSums, "_add_active", lambda *_: pytest.fail("not dense"))
        assert sums_of(model, 100).l0 / L > 0.3


def test_nan_is_told(way: str) -> None:
    model = model_of("topk")
    with torch.no_grad():
        model.W_enc[0, 0] = torch.nan
    with pytest.raises(BadInput, match="NaN or infinite"):
        sums_of(model, 100)
