"""Every activation, every loss and every way with dead latents, against its published equations in float64 autograd."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_variants import BANDWIDTH, L1, K, make_model

from cytosae.sae import LOSSES, SparseAutoencoder, keep_top_k_, replace_least
from cytosae.sae.config import ACTIVATIONS
from cytosae.training import BatchLosses, Objective, loss_and_gradients
from stores.errors import BadInput

WAYS = ("ghost", "elementwise", "auxk", "none")
WORK = {"dense": 0.0, "sparse": 2.0}
EQUAL = 1e-5
Tensors = dict[str, torch.Tensor]


def make_tokens(model: SparseAutoencoder, n: int = 24, seed: int = 1) -> torch.Tensor:
    draws = torch.Generator().manual_seed(seed)
    return (torch.randn(n, model.width, generator=draws) + model.b_dec.detach().cpu()).half().float()


# ------------------------------------------------------------------------------------------------ the slow twin


def latents_of(activation: str, w: Tensors, p: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(n, S): z as in training; batchtopk by its batch. Gradients are the published ones."""
    if activation == "relu":
        return torch.relu(p)
    if activation == "topk":
        rows = [torch.where(row >= row.sort(descending=True).values[K - 1], torch.relu(row), 0.0) for row in p]
        return torch.stack(rows)
    if activation == "batchtopk":
        least = torch.relu(p).flatten().sort(descending=True).values[K * len(p) - 1]
        return torch.where(p >= least, torch.relu(p), 0.0)
    if activation == "jumprelu":  # z = p H(p - t); dz/dt = -(t / e) K((p - t) / e), arXiv 2407.14435, eq. 11
        t = w["log_threshold"].exp()
        window = (((p - t) / BANDWIDTH).abs() < 0.5).double()
        straight_through = -(t / BANDWIDTH).detach() * window * (t - t.detach())
        return p * (p > t) + straight_through
    magnitude = torch.relu(w["r_mag"].exp() * ((x - w["b_dec"]) @ w["W_enc"]) + w["b_mag"])
    return (p > 0) * magnitude


def sparsity_of(activation: str, w: Tensors, p: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    if activation == "relu":
        return z.abs().sum(1).mean()
    if activation == "gated":
        return torch.relu(p).sum(1).mean()
    if activation == "jumprelu":  # dH/dt = -(1 / e) K((p - t) / e), eq. 12
        t = w["log_threshold"].exp()
        window = (((p - t) / BANDWIDTH).abs() < 0.5).double()
        return ((p > t).double() - window * (t - t.detach()) / BANDWIDTH).sum(1).mean()
    return p.new_zeros(())


def twin(
    model: SparseAutoencoder, tokens: torch.Tensor, *, loss: str, way: str, dead: torch.Tensor
) -> tuple[dict[str, float], Tensors, torch.Tensor]:
    """(parts of the loss, gradients, p), all in float64: dense, by autograd."""
    w = {name: value.detach().double().requires_grad_() for name, value in model.named_parameters()}
    x, activation = tokens.double(), model.activation
    p = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    z = latents_of(activation, w, p, x)
    x_hat = z @ w["W_dec"] + w["b_dec"]
    weight = {"normed": 1 / x.norm(dim=1, keepdim=True), "eq1": float(model.width), "mse": 1.0}[loss]
    M = weight * (x_hat - x) ** 2
    parts = {"mse": M.mean(), "l1": L1 * sparsity_of(activation, w, p, z)}
    if activation == "gated":
        frozen = torch.relu(p) @ w["W_dec"].detach() + w["b_dec"].detach()
        parts["gate"] = (weight * (frozen - x) ** 2).mean()
    if dead.any() and way != "none":
        r, rows = (x - x_hat).detach(), w["W_dec"][dead]
        if way == "auxk":
            p_dead = torch.relu(p[:, dead])
            k = min(model.width // 2, p_dead.shape[1])
            kept = p_dead >= p_dead.sort(dim=1, descending=True).values[:, k - 1 : k]
            parts["dead"] = ((p_dead * kept @ rows - r) ** 2 * weight).mean() / 32
        else:
            g = p[:, dead].exp() @ rows
            a = (r.norm(dim=1, keepdim=True) / (1e-6 + 2 * g.norm(dim=1, keepdim=True))).detach()
            w_r = {"normed": 1 / r.norm(dim=1, keepdim=True), "eq1": float(model.width), "mse": 1.0}[loss]
            G = w_r * (a * g - r) ** 2
            c = M / (G + 1e-6) if way == "elementwise" else M.mean() / (G.mean() + 1e-6)
            parts["dead"] = (c.detach() * G).mean()
    torch.stack(list(parts.values())).sum().backward()
    found = {name: 0.0 for name in ("mse", "l1", "gate", "dead")} | {name: v.item() for name, v in parts.items()}
    grads = {name: value.grad if value.grad is not None else torch.zeros_like(value) for name, value in w.items()}
    return found, grads, p.detach()


def ours(
    model: SparseAutoencoder, tokens: torch.Tensor, *, loss: str, way: str, dead: torch.Tensor | None, **more: Any
) -> BatchLosses:
    return loss_and_gradients(
        model,
        tokens,
        Objective(
            loss=loss,
            dead_latents="ghost" if way == "elementwise" else way,
            ghost_scale="elementwise" if way == "elementwise" else "scalar",
            jump_bandwidth=BANDWIDTH,
        ),
        l1=L1,
        dead_L=dead,
        **more,
    )


def assert_same(model: SparseAutoencoder, tokens: torch.Tensor, losses: BatchLosses, wanted: Any, equal: float) -> None:
    parts, grads, _ = wanted
    for name, value in parts.items():
        assert getattr(losses, name) == pytest.approx(value, rel=equal, abs=1e-12), name
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        difference, size = (parameter.grad.double() - grads[name]).abs().max(), grads[name].abs().max()
        assert difference <= equal * size, f"{name}: {difference:.3g} of {size:.3g}"


# -------------------------------------------------------------------------------------------- loss and gradients


@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_loss_and_gradients_equal_the_equations(activation: str, loss: str, way: str, work: str) -> None:
    """In float64, so that no token has to be left out at a kink; whatever the micro-batch."""
    for seed, micro_batch in enumerate((None, 5, 1)):
        model = make_model(activation, seed)
        tokens, dead = make_tokens(model), torch.rand(40, generator=torch.Generator().manual_seed(seed)) < 0.3
        model.double()
        wanted = twin(model, tokens, loss=loss, way=way, dead=dead)
        losses = ours(model, tokens, loss=loss, way=way, dead=dead, micro_batch=micro_batch, sparse_below=WORK[work])
        assert_same(model, tokens, losses, wanted, 1e-6)  # 1 / ||x|| stays float32, as the tokens are


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_in_float32_too(activation: str) -> None:
    model = make_model(activation, 3)
    tokens, dead = make_tokens(model), torch.arange(40) % 3 == 0
    for work in WORK.values():
        losses = ours(model, tokens, loss="normed", way="auxk", dead=dead, sparse_below=work)
        assert_same(model, tokens, losses, twin(model, tokens, loss="normed", way="auxk", dead=dead), EQUAL)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_scaled_tokens_are_the_same_as_tokens_scaled_before(activation: str) -> None:
    model, halves = make_model(activation), make_model(activation)
    tokens = make_tokens(model)
    one = ours(model, tokens, loss="mse", way="none", dead=torch.zeros(40, dtype=torch.bool), token_scale=0.25)
    two = ours(halves, tokens * 0.25, loss="mse", way="none", dead=torch.zeros(40, dtype=torch.bool))
    assert one.loss == two.loss
    for (name, mine), (_, other) in zip(model.named_parameters(), halves.named_parameters(), strict=True):
        assert torch.equal(mine.grad, other.grad), name  # type: ignore[arg-type]


def test_what_is_not_finite_is_never_lost() -> None:
    for activation, work in itertools.product(ACTIVATIONS, WORK.values()):
        for value in (float("nan"), float("inf")):
            model = make_model(activation)
            with torch.no_grad():
                model.W_enc[3, 5] = value
            losses = ours(
                model, make_tokens(model), loss="mse", way="none", dead=torch.zeros(40, dtype=torch.bool),
                sparse_below=work,
            )  # fmt: skip
            assert not np.isfinite(losses.loss), (activation, work, value)


# ------------------------------------------------------------------------------------------------- in use


def slow_encode(model: SparseAutoencoder, tokens: torch.Tensor) -> torch.Tensor:
    """(n, S) float64, one number at a time."""
    w = {name: value.detach().double() for name, value in model.state_dict().items()}
    x = tokens.double()
    p = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    z = torch.zeros_like(p)
    for t, s in itertools.product(range(len(x)), range(model.n_latents)):
        is_on = {
            "relu": p[t, s] > 0,
            "topk": p[t, s] > 0 and int((p[t] > p[t, s]).sum()) < K,
            "batchtopk": p[t, s] > w.get("threshold", 0) and p[t, s] > 0,
            "jumprelu": "log_threshold" in w and p[t, s] > w["log_threshold"][s].exp(),
            "gated": p[t, s] > 0,
        }[model.activation]
        value = p[t, s]
        if model.activation == "gated":
            value = torch.relu(w["r_mag"][s].exp() * ((x[t] - w["b_dec"]) @ w["W_enc"][:, s]) + w["b_mag"][s])
        z[t, s] = value if is_on else 0
    return z


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_encode_equals_the_definition(activation: str) -> None:
    model = make_model(activation, 5)
    tokens = make_tokens(model, 12)
    with torch.no_grad():
        found, wanted = model.encode(tokens).double(), slow_encode(model, tokens)
    assert torch.equal(found > 0, wanted > 0)
    assert (found - wanted).abs().max() < 1e-5
    if activation == "topk":
        assert set((found > 0).sum(1).tolist()) == {K}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_folding_keeps_the_reconstruction(activation: str) -> None:
    """Of rows that are nearly of norm 1, as after a last step; and of tokens that were scaled in training."""
    model = make_model(activation, 2)
    tokens = make_tokens(model, 200)
    with torch.no_grad():
        if "topk" not in activation:
            model.W_dec.mul_(1 + 0.1 * torch.rand(model.n_latents, 1))
        before = model(tokens * 0.5) / 0.5
        model.fold_decoder_norm()
        model.fold_token_scale(0.5)
        assert (model.W_dec.norm(dim=1) - 1).abs().max() < 1e-6
        assert (model(tokens) - before).abs().max() < 1e-4


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31), n=st.integers(0, 4), width=st.integers(1, 60), k=st.integers(1, 70), ties=st.booleans()
)
def test_the_k_largest_stay_and_the_first_of_equals(seed: int, n: int, width: int, k: int, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    values = rng.integers(-3, 4, (n, width)) if ties else rng.normal(size=(n, width))
    found = keep_top_k_(torch.from_numpy(values.astype(np.float32)), k).numpy()
    for row, kept in zip(values.astype(np.float32), found, strict=True):
        best = sorted(range(width), key=lambda i: (-row[i], i))[:k]
        assert [i for i in range(width) if kept[i] > 0] == sorted(i for i in best if row[i] > 0)
        assert all(kept[i] == row[i] for i in range(width) if kept[i] > 0)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31), size=st.integers(1, 9))
def test_a_heap_keeps_the_largest_and_nothing_beside_it_is_read(seed: int, size: int) -> None:
    """Without compilation, where an index behind the end is an error; compiled, it reads what lies there."""
    values = np.random.default_rng(seed).integers(0, 12, 30).tolist()
    heap = np.full(size, -1)
    for value in values:
        if value > heap[0]:
            replace_least.py_func(heap, value)
        assert heap[0] == heap.min()
    assert sorted(heap.tolist()) == sorted(values)[-size:]


@pytest.mark.parametrize(("activation", "k"), [("topk", None), ("topk", 0), ("batchtopk", 41), ("tanh", None)])
def test_a_variant_that_cannot_be_is_refused(activation: str, k: int | None) -> None:
    with pytest.raises(BadInput, match="must"):
        SparseAutoencoder(8, 40, activation, k)
