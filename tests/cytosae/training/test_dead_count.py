"""The number of dead latents comes with the losses of the step before, so that the host does not wait for it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from token_caches import write_cache
from torch.utils._python_dispatch import TorchDispatchMode
from training_runs import BATCH, SETTINGS, _what_was_trained, tokens_of_cells

from cytosae.sae import SparseAutoencoder, make_config
from cytosae.training import Objective, loss_and_gradients
from cytosae.training import train as train_module
from cytosae.training.dead_latents import indices_of
from cytosae.training.dead_passes import exp_plainly, padded
from cytosae.training.train import train

pytestmark = pytest.mark.usefixtures("one_thread")


class Nonzero(TorchDispatchMode):
    """Counts the calls of `nonzero`, for whose result a GPU is waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n += func.__name__.startswith("nonzero")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("share", [0, 0.3, 1])
@pytest.mark.parametrize("n", [1, 5, 1_000])
def test_indices_without_waiting_are_those_of_nonzero(n: int, share: float) -> None:
    flags = torch.rand(n, generator=torch.Generator().manual_seed(n)) < share
    assert torch.equal(indices_of(flags, int(flags.sum())), flags.nonzero().squeeze(1))


def test_columns_behind_the_dead_latents_are_zero() -> None:
    """As on a GPU, where their matrix is widened: the values stay in the columns of their latents."""
    p_BN = torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]])
    found = exp_plainly(p_BN, torch.tensor([0, 2]), torch.float32, n_columns=5)
    assert torch.equal(found[:, :2], p_BN[:, [0, 2]].exp())
    assert torch.equal(found[:, 2:], torch.zeros(2, 3))
    assert torch.equal(padded(p_BN, 4), torch.tensor([[0.0, 1.0, 2.0, 0.0], [3.0, 4.0, 5.0, 0.0]]))
    assert padded(p_BN, 3) is p_BN


@pytest.mark.parametrize("most", [0, 2, 5])
def test_losses_say_how_many_latents_are_dead_behind_the_step(most: int) -> None:
    """And the gradients with a known number are those without, to the bit."""
    torch.manual_seed(0)
    model = SparseAutoencoder(8, 64)
    model.init_weights(torch.Generator().manual_seed(1))
    tokens, steps = torch.randn(6, 8), torch.randint(0, 6, (64,))
    dead = steps > most
    objective = Objective.from_config(make_config(options={**SETTINGS, "tokens": BATCH, "dead_latents": "ghost"}))
    found = {}
    for n_dead in (None, int(dead.sum())):
        with Nonzero() as waits:
            losses = loss_and_gradients(
                *(model, tokens, objective),
                l1=0.1,
                dead_L=dead,
                n_dead=n_dead,
                silence=(steps, most),
                sparse_below=0,
            )
        assert waits.n == (n_dead is None)
        found[n_dead] = (
            losses.loss,
            [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None],
        )
        behind = (steps + 1).masked_fill(losses.fired, 0)
        assert losses.n_dead_next == int((behind > most).sum())
    (loss, grads), (other_loss, other_grads) = found.values()
    assert loss == other_loss
    assert all(torch.equal(*pair) for pair in zip(grads, other_grads, strict=True))


@pytest.mark.parametrize("dead_latents", ["ghost", "auxk", "resample"])
def test_a_run_that_is_told_trains_what_one_that_counts_does(
    tmp_path: Path, dead_latents: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: each step is told the number by the one before, but the first, and behind new weights."""
    cache = write_cache(tmp_path / "acts.zarr", tokens_of_cells(3))
    changes = {"dead_latents": dead_latents, "resample_every": 4, "b_dec_init": "zeros", "tokens": 12 * BATCH}
    config = make_config(options={**SETTINGS, **changes})
    train([cache], tmp_path / "counts", config)
    told, real = [], loss_and_gradients

    def watched(*given: Any, **more: Any) -> Any:
        if more["n_dead"] is not None:
            assert more["n_dead"] == int(more["dead_L"].sum())
        told.append(more["n_dead"])
        return real(*given, **more)

    monkeypatch.setattr(train_module, "loss_and_gradients", watched)
    monkeypatch.setattr(train_module, "_must_wait_for", lambda tokens: True)
    train([cache], tmp_path / "told", config)
    assert [step for step, n_dead in enumerate(told) if n_dead is None] == (
        [0, 4, 8] if dead_latents == "resample" else [0]
    )
    assert any(told)
    assert _what_was_trained(tmp_path / "told") == _what_was_trained(tmp_path / "counts")
