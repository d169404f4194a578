"""How fast is one training step of a large SAE on the CPU, against plain dense autograd?

Ours: decoder rows to norm 1, `loss_and_gradients`, the gradient's parallel part removed, Adam, as
`cytosae/training/train.py` does it. Against: the same step with the same loss written down densely and left to
autograd, float32, at the fastest of several micro-batches. Target: 4 times the tokens/s at 768 -> 49,152, 16,448
tokens, L0 200, no dead latents; with `--sweep` also L0 50, 2,000 and 24,576 (the start of training) and dead shares
0.02, 0.25, 0.57.

The tokens are normal around a common mean, and the encoder's biases are set so that the mean L0 is what is asked for.
The learning rate is 0: Adam does all its work, and every round sees the same L0. Gradients of both sides are compared,
max|difference| / max|reference| per tensor, in float32 on both sides: about 1e-6 is rounding. More of W_enc and b_enc
is of pairs (`near_zero`) whose pre-activation is 0 but for rounding, and which one side alone calls active.
Full size: python bench/sae_step.py --tokens 16448 --sweep
"""

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from common import N_LATENTS, WIDTH, alternate, arguments, emit, latent_frequency, now, say, token_share
from scipy.special import ndtri

from cytosae.sae import SparseAutoencoder
from cytosae.training import BatchLosses, Objective, loss_and_gradients, remove_parallel_gradient

L1 = 8e-5
EPS = 1e-6
SWEEP = [(50, 0.0), (200, 0.0), (2_000, 0.0), (24_576, 0.0), (200, 0.02), (200, 0.25), (200, 0.57)]


@dataclass(frozen=True)
class Case:
    """One point of the sweep: a model that is active as asked for, tokens, and which latents count as dead."""

    model: SparseAutoencoder
    tokens: torch.Tensor  # (N, D) float16, as batches come
    dead: torch.Tensor | None  # (L,) bool


def main() -> None:
    """Measure and print one line of JSON."""
    parser = arguments(__doc__)
    add_sizes(parser, tokens=1_028)
    parser.add_argument("--micro-batches", type=numbers, default="128,257,514,1028,2056", help="dense (%(default)s)")
    parser.add_argument("--fold-b-dec", action="store_true", help="spare dense autograd its sixth matrix product")
    parser.add_argument("--dead", type=float, default=0.0, help="share of dead latents (%(default)s)")
    parser.add_argument("--sweep", action="store_true", help="all L0 and dead shares of the table; the first is --l0")
    options = parser.parse_args()
    points = [(options.l0, options.dead)]
    if options.sweep:
        points += [point for point in SWEEP if point not in points and point[0] <= options.latents / 2]

    micro_batches = sorted({min(size, options.tokens) for size in options.micro_batches})
    case = make_case(options, *points[0])
    dense(Case(case.model, case.tokens[: micro_batches[0]], None), micro_batches[0])  # warm up
    speeds = {size: _dense_speed(case, size, options.fold_b_dec) for size in micro_batches}
    best = max(speeds, key=lambda size: speeds[size])
    results = []
    for l0, dead in points:
        say(f"L0 {l0:g}, dead {dead:g}")
        case = make_case(options, l0, dead)
        results.append(measure(case, options.rounds, lambda case=case: dense(case, best, options.fold_b_dec)))  # type: ignore[misc]
        results[-1] = {"asked_l0": l0, "dead_share": dead, **results[-1]}
    first = results[0]
    emit(
        "sae_step",
        ratio=first["ratio"],
        target=4,
        ours=first["ours"],
        baseline=first["baseline"] | {"what": "dense autograd, float32", "micro_batch": best},
        l0=first["l0"],
        gradient_differences=first["gradient_differences"],
        near_zero=first["near_zero"],
        sweep=results if options.sweep else None,
        dense_tokens_per_second_by_micro_batch=speeds,
        params={**vars(options), "l1": L1},
    )


def add_sizes(parser: argparse.ArgumentParser, *, tokens: int) -> None:
    """Options that both SAE step benchmarks have."""
    parser.add_argument("--tokens", type=int, default=tokens, help="tokens of a step (%(default)s)")
    parser.add_argument("--l0", type=float, default=200, help="mean active latents per token (%(default)s)")
    parser.add_argument("--width", type=int, default=WIDTH, help="(%(default)s)")
    parser.add_argument("--latents", type=int, default=N_LATENTS, help="(%(default)s)")
    parser.add_argument(
        "--popularity", choices=("flat", "released"), default="flat", help="how unequally latents fire (%(default)s)"
    )


def make_case(options: Any, l0: float, dead_share: float, *, device: str = "cpu") -> Case:
    """A model whose latents are active on shares of the tokens that add up to `l0`; dead ones never are."""
    rng = np.random.default_rng(0)
    dead = np.zeros(options.latents, bool)
    dead[rng.permutation(options.latents)[: round(dead_share * options.latents)]] = True
    popularity = np.ones(options.latents) if options.popularity == "flat" else latent_frequency(options.latents)[0]
    share = np.full(options.latents, 1e-12)
    share[~dead] = token_share(popularity[~dead], l0)
    mean = rng.standard_normal(options.width).astype(np.float32)
    model = make_model(options.width, share, mean=mean)
    tokens = (mean + rng.standard_normal((options.tokens, options.width), np.float32)).astype(np.float16)
    return Case(
        model.to(device),
        torch.from_numpy(tokens).to(device),
        torch.from_numpy(dead).to(device) if dead.any() else None,
    )


def make_model(width: int, share: npt.NDArray[np.float64], *, mean: npt.NDArray[np.float32]) -> SparseAutoencoder:
    """An SAE at its start, whose latent s is active on `share[s]` of tokens that are normal around `mean`.

    There the pre-activation of s is normal with deviation ||W_enc[:, s]||, so the bias is a quantile times that.
    """
    model = copy.deepcopy(_drawn(width, len(share)))
    with torch.no_grad():
        model.b_dec.copy_(torch.from_numpy(mean))
        model.b_enc.copy_(model.W_enc.norm(dim=0) * torch.from_numpy(ndtri(share)).float())
    return model


@lru_cache(1)
def _drawn(width: int, n_latents: int) -> SparseAutoencoder:
    """Seeded weights, which all cases of a size share: drawing 49,152 latents takes two seconds."""
    model = SparseAutoencoder(width, n_latents)
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def measure(case: Case, rounds: int, baseline: Callable[[], None]) -> dict[str, Any]:
    """Both sides in turns, and whether they agree."""
    optimizer = torch.optim.Adam(case.model.parameters(), lr=0.0, fused=True)
    case.model.normalise_decoder()
    difference, losses = compare(case, baseline)
    alone = alternate(lambda: ours(case), rounds=1, warm_up=False)[0]
    fast, slow = alternate(
        lambda: step(case.model, optimizer, lambda: ours(case)),
        lambda: step(case.model, optimizer, baseline),
        rounds=rounds,
    )
    n = len(case.tokens)
    return {
        "ratio": slow.seconds / fast.seconds,
        "l0": losses.l0,
        "ours": fast.to_json(n, "tokens") | {"loss_and_gradients_seconds": alone.seconds},
        "baseline": slow.to_json(n, "tokens"),
        "gradient_differences": difference,
        "near_zero": near_zero(case),
    }


def step(model: SparseAutoencoder, optimizer: torch.optim.Adam, gradients: Callable[[], Any]) -> None:
    """What surrounds the gradients in `cytosae/training/train.py`; the same for both sides."""
    model.normalise_decoder()
    gradients()
    remove_parallel_gradient(model)
    optimizer.step()


def ours(case: Case, *, precision: str = "fp32", **more: Any) -> BatchLosses:
    """The product's gradients, with the loss of the default settings."""
    return loss_and_gradients(case.model, case.tokens, Objective(precision=precision), l1=L1, dead_L=case.dead, **more)


def dense(case: Case, micro_batch: int, fold_b_dec: bool = False) -> None:
    """The same loss, dense: what autograd makes of it, one micro-batch at a time.

    The ghost term's factor is known only after the whole batch, so its gradients are summed apart, with respect to
    copies of the dead latents' weights: cheaper than gathering them in every micro-batch.
    """
    model, tokens, n_values = case.model, case.tokens, case.tokens.numel()
    for parameter in model.parameters():
        parameter.grad = None
    dead = case.dead.nonzero().squeeze(1) if case.dead is not None else None
    if dead is not None:
        chosen = (model.W_enc[:, dead], model.b_enc[dead], model.W_dec[dead], model.b_dec)
        ghosts = [weight.detach().clone().requires_grad_() for weight in chosen]
        W_enc_DK, b_enc_K, W_dec_KD, ghost_b_dec = (*ghosts[:3], ghosts[3].detach() if fold_b_dec else ghosts[3])
    mse = ghost = 0.0
    for start in range(0, len(tokens), micro_batch):
        x = tokens[start : start + micro_batch].float()
        centred = x - (model.b_dec.detach() if fold_b_dec else model.b_dec)
        z = torch.relu(torch.addmm(model.b_enc, centred, model.W_enc))
        x_hat = torch.addmm(model.b_dec, z, model.W_dec)
        error = ((x_hat - x) ** 2 / x.norm(dim=1, keepdim=True)).sum() / n_values
        (error + L1 * z.sum() / len(tokens)).backward()
        mse += error.item()
        if dead is not None:
            r = (x - x_hat).detach()
            g = torch.addmm(b_enc_K, x - ghost_b_dec, W_enc_DK).exp() @ W_dec_KD
            a = (r.norm(dim=1, keepdim=True) / (EPS + 2 * g.norm(dim=1, keepdim=True))).detach()
            part = ((a * g - r) ** 2 / r.norm(dim=1, keepdim=True)).sum() / n_values
            part.backward()
            ghost += part.item()
    with torch.no_grad():
        grads = [parameter.grad for parameter in (model.W_enc, model.b_enc, model.W_dec, model.b_dec)]
        if dead is not None:
            factor = mse / (ghost + EPS)
            for grad, axis, weight in zip(grads[:3], (1, 0, 0), ghosts[:3], strict=True):
                grad.index_add_(axis, dead, weight.grad, alpha=factor)  # type: ignore[union-attr, arg-type]
            if not fold_b_dec:
                grads[3].add_(ghosts[3].grad, alpha=factor)  # type: ignore[union-attr, arg-type]
        if fold_b_dec:
            grads[3] -= model.W_enc @ grads[1]  # type: ignore[operator]


def compare(case: Case, baseline: Callable[[], None]) -> tuple[dict[str, float], BatchLosses]:
    """max|ours - baseline| / max|baseline| of each parameter's gradient, and our losses."""
    baseline()
    reference = {name: parameter.grad for name, parameter in case.model.named_parameters()}
    for parameter in case.model.parameters():
        parameter.grad = None  # or `ours` might write into the reference
    losses = ours(case)
    found = {name: parameter.grad for name, parameter in case.model.named_parameters()}
    difference = {name: relative_difference(found[name], reference[name]) for name in reference}
    return difference, losses


@torch.no_grad()
def near_zero(case: Case) -> int:
    """Pre-activations within 1e-6 of zero, where rounding decides whether a latent is active."""
    pieces = case.tokens.split(512)
    return sum(int((case.model.pre_activations(piece.float()).abs() < 1e-6).sum()) for piece in pieces)


def relative_difference(found: torch.Tensor | None, reference: torch.Tensor | None) -> float:
    assert found is not None
    assert reference is not None
    return float((found.float() - reference).abs().max() / reference.abs().max())


def _dense_speed(case: Case, micro_batch: int, fold_b_dec: bool) -> float:
    """Tokens/s of dense gradients at one micro-batch, on a part of the batch."""
    n = min(len(case.tokens), max(micro_batch, 1_028) // micro_batch * micro_batch)
    part = Case(case.model, case.tokens[:n], case.dead)
    began = now()
    dense(part, micro_batch, fold_b_dec)
    speed = n / (now() - began).seconds
    say(f"dense, micro-batch {micro_batch:,}: {speed:,.0f} tokens/s")
    return speed


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    main()
