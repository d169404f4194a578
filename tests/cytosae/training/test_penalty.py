"""`target_l0`: the law against a slow twin, on made-up SAEs that answer late, and in real training."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from token_caches import write_cache

from cytosae.sae import SparseAutoencoder, TrainConfig
from cytosae.training.penalty import Penalty, begin_steering
from cytosae.training.report import penalty_line
from cytosae.training.train import train

pytestmark = pytest.mark.usefixtures("one_thread")


def slow_twin(l0: list[float], paces: list[float], target: float, weight: float) -> list[tuple[float, bool]]:
    """(weight, is it held) behind each step; means are computed anew from all steps."""
    found, near, is_held = [], 0, False
    for step in range(1, len(l0) + 1):
        seen = [max(value, 0.01 * target) for value in l0[:step]]
        logs = [math.log(value) for value in seen]
        mean, recent, before = math.exp(_decaying_mean(logs, 50)), _decaying_mean(logs, 6), _decaying_mean(logs, 24)
        off, off_now = math.log(mean / target), recent - math.log(target)
        near = near + 1 if abs(off) <= 0.05 and abs(off_now) <= 0.08 else 0
        if is_held:
            is_held = abs(off) <= 0.08
        elif near >= 20:
            is_held = True
        else:
            many = 1 if target <= 32 else 2 if target >= 64 else target / 32
            wanted = off_now + (1.5 + 1.5 * many) * (recent - before)
            wanted *= 0.04 / many if wanted < 0 else 0.04
            weight *= math.exp(paces[step - 1] * min(0.03, max(-0.03, wanted)))
        found.append((weight, is_held))
    return found


def _decaying_mean(values: list[float], time: int) -> float:
    newest = 1 / np.minimum(np.arange(1, len(values) + 1), time)  # the share of each value when it is the newest one
    left = np.append(np.cumprod((1 - newest)[:0:-1])[::-1], 1.0)  # what the later values leave of it
    return float((newest * left * values).sum())


@pytest.mark.parametrize("target", [16.0, 48.0, 256.0])
def test_the_law_equals_its_slow_twin(target: float) -> None:
    """L0 comes down from far above, overshoots to 0, stays near, and leaves again: steered, held, steered, held."""
    rng = np.random.default_rng(0)
    course = np.concatenate(
        [np.geomspace(250, 0.5, 80), np.zeros(4), np.full(400, 1.0), np.full(60, 1.19), np.full(260, 1.006)]
    )
    l0 = (target * course * rng.normal(1, 0.01, len(course))).tolist()
    paces = [min(1.0, (step + 1) / 20) for step in range(len(l0))]
    penalty, found = Penalty(target=target, weight=1e-3), []
    for step, value in enumerate(l0, start=1):
        penalty = penalty.after(value, step=step, pace=paces[step - 1])
        found.append((penalty.weight, penalty.is_held))
    twin = slow_twin(l0, paces, target, 1e-3)
    assert [held for _, held in found] == [held for _, held in twin]
    assert [weight for weight, _ in found] == pytest.approx([weight for weight, _ in twin], rel=1e-9)
    assert penalty.is_held
    assert penalty.n_releases == 1


@pytest.mark.parametrize("target", [8, 128])
@pytest.mark.parametrize("slope", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("delay", [15, 40, 120])
def test_it_settles_on_saes_that_answer_late(target: int, slope: float, delay: int) -> None:
    """L0 follows weight^-slope with a time constant of `delay` steps, from 3,000 down, with a noise of 2%."""
    rng = np.random.default_rng(1)
    penalty, log_l0 = Penalty(target=float(target), weight=1.0), math.log(3000)
    seen = []
    for step in range(1, 4001):
        log_l0 += (math.log(200) - slope * math.log(penalty.weight) - log_l0) / delay
        seen.append(math.exp(log_l0))
        penalty = penalty.after(seen[-1] * rng.normal(1, 0.02), step=step, pace=1.0)
    late = np.array(seen[2000:])
    assert (np.abs(late / target - 1) < 0.1).all()
    assert penalty.is_held
    assert min(seen) > 0.4 * target  # it does not empty the SAE on its way


def test_thresholds_are_steered_both_ways() -> None:
    """By their law, anew from all steps; and an L0 that falls by itself is kept, which no penalty could do."""
    rng = np.random.default_rng(2)
    penalty, log_threshold, seen, shifts = Penalty(target=32.0, weight=1e-3, bandwidth=0.1), 0.0, [], []
    for step in range(1, 1001):
        pace = min(1.0, step / 40)
        log_l0 = math.log(128) - 1.5 * log_threshold - 0.002 * step  # latents learn, and are active less often
        seen.append(math.exp(log_l0) * rng.normal(1, 0.02))
        penalty = penalty.after(seen[-1], step=step, pace=pace)
        shifts.append(penalty.threshold_shift(2e-3 * pace))
        gap = _decaying_mean([math.log(value) for value in seen], 6) - math.log(32)
        assert shifts[-1] == pytest.approx(min(1, 2 * pace) * min(0.03, max(-0.03, 0.05 * gap)), abs=1e-12)
        log_threshold += shifts[-1]
    assert max(shifts) > 0.01
    assert min(shifts) < 0
    assert (np.abs(np.array(seen[300:]) / 32 - 1) < 0.1).all()
    assert Penalty(target=32.0, weight=1e-3).after(99, step=1, pace=1.0).threshold_shift(1e-3) == 0  # relu, gated


def test_the_mean_is_geometric_but_for_jumprelu() -> None:
    for bandwidth, mean in ((None, 8.0), (0.1, 17.0)):
        penalty = Penalty(target=8.0, weight=1.0, bandwidth=bandwidth)
        assert penalty.after(2.0, step=1, pace=1.0).after(32.0, step=2, pace=1.0).mean == pytest.approx(mean)


def test_the_state_keeps_every_bit() -> None:
    penalty = Penalty(target=32.0, weight=0.1 + 0.2, mean=1 / 3, recent=None, n_near=4, held_since=None, n_releases=2)
    assert Penalty.from_tensor(penalty.to_tensor()) == penalty
    held = Penalty(target=32.0, weight=1e-30, bandwidth=0.3, mean=31.9, recent=math.pi, n_near=9, held_since=77)
    assert Penalty.from_tensor(held.to_tensor()) == held


def test_the_start_is_in_the_unit_of_loss_and_tokens() -> None:
    """Half as long tokens and another loss change the first weight as they change what a latent can gain."""
    tokens = torch.randn(500, 24, generator=torch.Generator().manual_seed(0)) + 1

    def first(activation: str, tokens: torch.Tensor, loss: str) -> Penalty:
        model = SparseAutoencoder(24, 96, activation)
        model.init_weights(torch.Generator().manual_seed(1))
        config = TrainConfig(expansion=4, activation=activation, target_l0=6.0, loss=loss)
        penalty = begin_steering(model, config, tokens)
        if activation == "jumprelu":
            active = (model.encode(tokens) > 0).sum(1).double().mean()
            assert float(active) == pytest.approx(6.0 * 4, abs=0.1)
        return penalty

    for activation, power in {"relu": 1, "gated": 1, "jumprelu": 2}.items():
        plain = first(activation, tokens, "mse")
        assert first(activation, tokens / 2, "mse").weight == pytest.approx(plain.weight / 2**power)
        assert first(activation, tokens, "eq1").weight == pytest.approx(plain.weight * 24)
    model = SparseAutoencoder(24, 96, "relu")
    model.init_weights(torch.Generator().manual_seed(1))
    configs = [TrainConfig(expansion=4, loss="normed", target_l0=k) for k in (8.0, 32.0, 64.0)]
    wide = [begin_steering(model, config, tokens).weight for config in configs]
    assert wide == pytest.approx([wide[0], wide[0], wide[0] / 2])  # beyond 32 latents share what there is to gain
    norms = tokens.norm(dim=1)
    assert first("relu", tokens, "normed").weight == pytest.approx(float(2 * 0.02 * (norms / norms).mean() / 24))
    half, whole = first("jumprelu", tokens / 2, "mse"), first("jumprelu", tokens, "mse")
    assert half.bandwidth is not None
    assert whole.bandwidth == pytest.approx(2 * half.bandwidth)


D, N_ATOMS, PER_TOKEN = 24, 48, 3


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens that are sums of three of 48 random directions in 24 dimensions, 0.5 to 1.5 of each, with some noise."""
    rng = np.random.default_rng(0)
    atoms = rng.normal(size=(N_ATOMS, D))
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    chosen = rng.random((200 * 64, N_ATOMS)).argsort(axis=1)[:, :PER_TOKEN]
    amounts = np.zeros((len(chosen), N_ATOMS))
    np.put_along_axis(amounts, chosen, rng.uniform(0.5, 1.5, chosen.shape), axis=1)
    tokens = (amounts @ atoms + 0.01 * rng.normal(size=(len(chosen), D))).reshape(200, 64, D)
    return write_cache(tmp_path_factory.mktemp("planted") / "acts.zarr", tokens.astype(np.float16))


@pytest.mark.stress
@pytest.mark.parametrize(
    ("activation", "target", "least", "settings"),
    [
        # L1 shrinks what is active: with a fixed weight that lands at L0 3.4, relu explains 0.37; at 6.7, 0.82
        ("relu", 3.0, 0.4, {}),
        ("relu", 6.0, 0.8, {"loss": "normed", "seed": 1}),
        ("gated", 4.0, 0.8, {}),
        ("jumprelu", 4.0, 0.8, {}),
    ],
)
def test_training_comes_to_the_wanted_l0(
    planted: Path, tmp_path: Path, activation: str, target: float, least: float, settings: dict[str, Any]
) -> None:
    """Within 10%, on the tokens of training and on held-out ones, and every row of the metrics has the weight."""
    common: dict[str, Any] = {
        **{"activation": activation, "target_l0": target, "loss": "mse", "expansion": 4, "lr": 3e-3},
        **{"batch_tokens": 512, "tokens": 1200 * 512, "warmup_steps": 50, "dead_after_steps": 50},
        **{"schedule": "linear", "holdout": 0.1, "log_every": 50},
    }
    config = TrainConfig(**common | settings)
    done = train([planted], tmp_path / "run", config)
    penalty = done.summary["penalty"]
    assert penalty["running_mean_l0"] == pytest.approx(target, rel=0.1)
    assert done.summary["held_out"]["l0"] == pytest.approx(target, rel=0.1)
    assert done.summary["held_out"]["explained_variance"] > least
    assert penalty["target_l0"] == target
    assert penalty["held_since_step"] is not None
    assert [row["step"] for row in penalty["course"]] == list(range(50, 1201, 50))
    assert penalty["course"][-1]["l1_weight"] == penalty["l1"]


def test_a_run_that_ended_off_says_so_and_what_to_type() -> None:
    near = {"target_l0": 128.0, "running_mean_l0": 120.0, "l1": 2e-6}
    assert penalty_line(near) == "L0 steered to 128: running mean 120.0 at l1 2e-06"
    below, above = penalty_line(near | {"running_mean_l0": 84.7}), penalty_line(near | {"running_mean_l0": 160.0})
    assert "not within 10%: it ended 33.8% below" in below
    assert "25.0% above" in above
    assert all(name in below for name in ("-o", "a lower --lr, more --tokens", "--schedule linear", "--target-l0"))
    assert "--lr" not in above
