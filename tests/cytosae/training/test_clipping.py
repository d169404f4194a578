"""Clipped gradients against torch's own clipping, and in a step."""

import pytest
import torch
from sae_variants import make_model

from cytosae.training.clipping import clip_gradients_


@pytest.mark.parametrize("most", [1e-3, 1.0, 1e6])
@pytest.mark.parametrize("activation", ["relu", "gated"])
def test_the_norm_of_all_gradients_is_clipped_as_torch_does(activation: str, most: float) -> None:
    model, twin = make_model(activation), make_model(activation)
    draws = torch.Generator().manual_seed(0)
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        theirs.grad = torch.randn(theirs.shape, generator=draws)
        mine.grad = torch.empty_like(mine).copy_(theirs.grad)
    clip_gradients_(model, most)
    torch.nn.utils.clip_grad_norm_(twin.parameters(), most)
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=0)
        assert most < 1e6 or torch.equal(mine.grad, theirs.grad)  # type: ignore[arg-type]  # nothing to clip


def test_what_is_not_finite_is_not_hidden() -> None:
    model = make_model("relu")
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model.b_dec.grad[2] = float("nan")  # type: ignore[index]
    clip_gradients_(model, 1.0)
    assert bool(torch.isnan(model.b_dec.grad[2]))  # type: ignore[index]
