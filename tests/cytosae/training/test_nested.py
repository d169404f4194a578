"""Nested (Matryoshka) dictionaries against arXiv 2503.17547, and against an SAE that is cut by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sae_variants import L1, K, make_model
from token_caches import write_cache
from training_runs import BATCH, SETTINGS, tokens_of_cells

from cytosae.sae import LOSSES, load_sae, make_config
from cytosae.training import Objective, loss_and_gradients
from cytosae.training.nested import nested_edges
from cytosae.training.train import train
from stores import BadInput

pytestmark = pytest.mark.usefixtures("one_thread")

NESTED, EDGES = (0.1, 0.3, 0.5), (4, 12, 20, 40)  # of 40 latents


def twin(activation: str, model: Any, x: torch.Tensor, loss: str, way: str, dead: torch.Tensor) -> Any:
    """The loss of the paper in float64, by autograd: one reconstruction after the other, each from the first latents.

    The paper adds them up; ours is their mean.
    """
    w = {name: value.detach().double().requires_grad_() for name, value in model.named_parameters()}
    p = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    z = torch.relu(p)
    if activation == "topk":
        z = torch.where(p >= p.sort(1, descending=True).values[:, K - 1 : K], z, 0.0)
    elif activation == "batchtopk":
        z = torch.where(p >= z.flatten().sort(descending=True).values[K * len(p) - 1], z, 0.0)
    weight = {"normed": 1 / x.norm(dim=1, keepdim=True), "eq1": float(model.width), "mse": 1.0}[loss]
    errors = []
    for m in EDGES:
        x_hat = z[:, :m] @ w["W_dec"][:m] + w["b_dec"]
        errors.append((weight * (x_hat - x) ** 2).mean())
    mse = torch.stack(errors).mean()
    total = mse + (L1 * z.sum(1).mean() if activation == "relu" else 0.0)
    r, rows = (x - x_hat).detach(), w["W_dec"][dead]
    if way == "auxk":
        p_dead = torch.relu(p[:, dead])
        k = min(model.width // 2, p_dead.shape[1])
        kept = p_dead >= p_dead.sort(dim=1, descending=True).values[:, k - 1 : k]
        total = total + ((p_dead * kept @ rows - r) ** 2 * weight).mean() / 32
    elif way == "ghost":
        g = p[:, dead].exp() @ rows
        a = (r.norm(dim=1, keepdim=True) / (1e-6 + 2 * g.norm(dim=1, keepdim=True))).detach()
        w_r = {"normed": 1 / r.norm(dim=1, keepdim=True), "eq1": float(model.width), "mse": 1.0}[loss]
        G = w_r * (a * g - r) ** 2
        total = total + (mse / (G.mean() + 1e-6)).detach() * G.mean()
    total.backward()
    return total.item(), mse.item(), {name: value.grad for name, value in w.items()}


@pytest.mark.parametrize("work", [0.0, 2.0], ids=["dense", "sparse"])
@pytest.mark.parametrize("way", ["ghost", "auxk", "none"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("activation", ["relu", "topk", "batchtopk"])
def test_loss_and_gradients_equal_the_equations(activation: str, loss: str, way: str, work: float) -> None:
    for seed, micro_batch in enumerate((None, 5)):
        model = make_model(activation, seed)
        draws = torch.Generator().manual_seed(seed)
        tokens = (torch.randn(24, model.width, generator=draws) + model.b_dec.detach()).half().float()
        dead = torch.rand(40, generator=draws) < 0.3
        model.double()
        wanted, mse, grads = twin(activation, model, tokens.double(), loss, way, dead)
        objective = Objective(loss=loss, dead_latents=way, nested=NESTED)
        found = loss_and_gradients(
            model, tokens, objective, l1=L1, dead_L=dead, micro_batch=micro_batch, sparse_below=work
        )
        assert found.loss == pytest.approx(wanted, rel=1e-6)
        assert found.mse == pytest.approx(mse, rel=1e-6)
        for name, parameter in model.named_parameters():
            difference = (parameter.grad - grads[name]).abs().max()
            assert difference <= 1e-6 * grads[name].abs().max(), name


def test_explained_variance_is_that_of_all_latents() -> None:
    model = make_model("topk")
    tokens = torch.randn(30, 8, generator=torch.Generator().manual_seed(1))
    plain = loss_and_gradients(model, tokens, Objective(), l1=0.0)
    nested = loss_and_gradients(model, tokens, Objective(nested=NESTED), l1=0.0)
    assert nested.explained_variance == pytest.approx(plain.explained_variance, abs=1e-6)
    assert (nested.l0, nested.fired.tolist()) == (plain.l0, plain.fired.tolist())
    assert nested.mse != pytest.approx(plain.mse, rel=1e-3)


def test_the_first_latents_reconstruct_better_alone_than_without_nesting(tmp_path: Path) -> None:
    """What nesting is for: cut after a quarter of the latents, the nested SAE is the better one by far."""
    cache = write_cache(tmp_path / "a.zarr", tokens_of_cells(3))
    x = torch.from_numpy(tokens_of_cells(3).reshape(-1, 8)).float()
    variance = (x - x.mean(0)).square().sum()
    explained = {}
    for name, nested in (("plain", None), ("nested", (0.25, 0.5))):
        options = {**SETTINGS, "tokens": 300 * BATCH, "activation": "topk", "k": 4, "lr": 1e-2, "nested": nested}
        header = train([cache], tmp_path / name, make_config(options=options)).header
        assert header.spec["config"].get("nested") == (list(nested) if nested else None)
        model = load_sae(tmp_path / name).model
        with torch.no_grad():
            z = model.encode(x)[:, :16]
            explained[name] = float(1 - (z @ model.W_dec[:16] + model.b_dec - x).square().sum() / variance)
    assert explained["nested"] > 0.6
    assert explained["nested"] > explained["plain"] + 0.2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"nested": (0.5, 0.25)}, "nested must be ascending shares of the latents above 0 and below 1"),
        ({"nested": (0.5, 1.0)}, "nested must be ascending shares"),
        ({"nested": ()}, "nested must be ascending shares"),
        ({"nested": (0.5,), "activation": "gated"}, "nested dictionaries are for relu, topk and batchtopk"),
    ],
)
def test_what_cannot_be_nested_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        make_config(options=changes)


def test_edges() -> None:
    assert nested_edges(NESTED, 40) == [0, *EDGES]
    assert nested_edges(None, 7) == [0, 7]
    assert nested_edges((0.01, 0.5), 10) == [0, 5, 10]  # a range without latents is left out
    assert np.diff(nested_edges(NESTED, 40)).min() > 0
