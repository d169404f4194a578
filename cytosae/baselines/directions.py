"""The fits: from a sample of tokens to the weights of an SAE. Pure functions of tensors; the slow twins are in
tests/cytosae/baselines/.

Shapes: N tokens, D channels, L latents. Every fit is about a centre, b_dec; x below is a token minus it. A direction
that has two signs (pca, ica, neurons) becomes two latents, number i and i + (number of directions), since latents are
>= 0: of the two at most one is active, so the k active latents are the k largest contributions of either sign.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from cytosae.sae import SparseAutoencoder
from cytosae.training import float32_products
from stores.errors import BadInput
from stores.part_files import KeptState

from .iterated import factorise, unmix

_CHUNK = 4096  # tokens that are worked on at once, where there is no dense (tokens, latents) matrix
_LEAST_SHARE = 1e-10  # of the largest variance: a component with less is rounding
_LEAST_WHITE = 1e-6  # of the whole variance: a component with less cannot be scaled to variance 1
_DENSE_BYTES = 128 << 20  # of one (tokens, latents) matrix


@dataclass(frozen=True)
class Weights:
    """What a fit gives: latents = top k of x encoder^T + bias, reconstruction = latents decoder."""

    encoder: torch.Tensor  # (L, D) float32
    decoder: torch.Tensor  # (L, D) float32
    bias: torch.Tensor  # (L,) float32
    notes: tuple[str, ...] = ()  # what makes the fit doubtful


def _tied(directions_LD: torch.Tensor, notes: tuple[str, ...] = ()) -> Weights:
    """Latents that look for what they stand for; rows are scaled to norm 1, a zero row stays zero."""
    rows = directions_LD.float()
    norm_L = rows.norm(dim=1)
    rows = rows / torch.where(norm_L > 0, norm_L, 1)[:, None]
    return Weights(rows, rows.clone(), torch.zeros(len(rows)), notes)


def fit_random(width: int, n_latents: int, *, init: str, seed: int) -> Weights:
    """The initial matrices of a training run with this `init` and `seed`, of which nothing is learnt."""
    model = SparseAutoencoder(width, n_latents)
    model.init_weights(torch.Generator().manual_seed(seed), init=init)
    return Weights(model.W_enc.detach().T.clone(), model.W_dec.detach().clone(), torch.zeros(n_latents))


def fit_tokens(x_ND: torch.Tensor, n_latents: int, *, seed: int) -> Weights:
    """`n_latents` of the tokens, drawn without replacement, each a direction.

    Raises BadInput if there are fewer tokens.
    """
    if len(x_ND) < n_latents:
        raise BadInput(
            f"the baseline tokens draws a token for each of the {n_latents:,} latents; there are {len(x_ND):,} "
            f"training tokens. Compare with a smaller SAE (--expansion), or leave this baseline out"
        )
    drawn = torch.randperm(len(x_ND), generator=torch.Generator().manual_seed(seed))[:n_latents]
    return _tied(x_ND[drawn])


def fit_neurons(width: int) -> Weights:
    """The channels of the tokens themselves, each with both signs: 2 D latents."""
    return _signed(torch.eye(width), torch.eye(width))


def fit_pca(x_ND: torch.Tensor, n: int) -> Weights:
    """The first `n` principal components of the sample, each with both signs; fewer if the sample has fewer."""
    values, vectors = torch.linalg.eigh(second_moments(x_ND))
    is_real = values > _LEAST_SHARE * values[-1]
    rows = vectors.T[is_real].flip(0)[:n].float()
    return _signed(rows, rows)


def fit_ica(x_ND: torch.Tensor, n: int, *, seed: int, iterations: int, state: KeptState | None = None) -> Weights:
    """Independent components of the sample (FastICA, iterated.py), each with both signs; of its first n components.

    With source s_i = <w_i, x> and mixing column a_i, x is the sum of s_i a_i: the latent is ||a_i|| s_i and its decoder
    row a_i / ||a_i||, so that latents compare as the lengths that they add.
    """
    values, vectors = torch.linalg.eigh(second_moments(x_ND) / len(x_ND))
    n = min(n, int((values > _LEAST_WHITE * values.sum()).sum()))
    scale_n, axes_Dn = values.flip(0)[:n].sqrt(), vectors.flip(1)[:, :n]
    white_Nn = (x_ND @ (axes_Dn / scale_n).float()).numpy()
    turned, has_settled = unmix(white_Nn, seed=seed, iterations=iterations, state=state)
    turned_nn = torch.from_numpy(turned)
    encoder, decoder = turned_nn @ (axes_Dn / scale_n).T, turned_nn @ (axes_Dn * scale_n).T
    norm_n = decoder.norm(dim=1, keepdim=True)
    note = f"FastICA had not settled after {iterations:,} iterations; raise --iterations"
    notes = () if has_settled else (note,)
    return _signed((encoder * norm_n).float(), (decoder / norm_n).float(), notes)


def fit_nmf(x_ND: torch.Tensor, n: int, *, seed: int, iterations: int, state: KeptState | None = None) -> Weights:
    """Non-negative factors of the sample: `n` latents, each the projection on a factor's direction.

    A factor's direction is what it has above the centre minus what it has below it (`nmf_factors`). The codes of NMF
    itself are solved for, token by token; no encoder has them.
    """
    factors, notes = nmf_factors(x_ND, n, seed=seed, iterations=iterations, state=state)
    width = x_ND.shape[1]
    return _tied(torch.from_numpy(factors[:, :width] - factors[:, width:]), notes)


def nmf_factors(
    x_ND: torch.Tensor, n: int, *, seed: int, iterations: int, state: KeptState | None = None
) -> tuple[npt.NDArray[np.float32], tuple[str, ...]]:
    """(n, 2 D): non-negative factors of what lies above the centre, and what below (iterated.py).

    Tokens have both signs, and (N, 2 D) has none below 0. Also notes.
    """
    halves = torch.cat([x_ND.clamp(min=0), (-x_ND).clamp(min=0)], dim=1).numpy()
    factors, has_settled = factorise(halves, n, seed=seed, iterations=iterations, state=state)
    note = f"NMF had not settled after {iterations:,} passes; raise --iterations"
    return factors, () if has_settled else (note,)


def fit_kmeans(
    batches: Iterable[torch.Tensor],
    centre_D: torch.Tensor,
    n_latents: int,
    *,
    seed: int,
    device: str = "cpu",
    state: KeptState | None = None,
) -> Weights:
    """k-means in one pass over batches (N, D) float32 of tokens as they are (Sculley 2010): latent = cluster, k = 1.

    The first clusters are tokens of the first batch; a batch moves each cluster to the mean of all tokens that it was
    given so far. A token belongs to the nearest cluster c, the one with the largest <x, c> - ||c||^2 / 2, which is the
    latent's value z; z times 2 c / ||c||^2 is c plus the mirror image of the error along c: as far from x as c itself.
    Where the centre is nearer than any cluster, no latent is active.

    Raises BadInput if the first batch has fewer tokens than there are clusters.
    """
    c_LD: torch.Tensor | None = None
    n_L = torch.zeros(n_latents, device=device)
    state = state or KeptState()
    kept, n_kept = state.read(), 0
    if kept is not None:
        c_LD, n_L = (torch.from_numpy(kept[name]).to(device) for name in ("clusters", "given"))
        n_kept = int(kept["done"][0])
    for number, batch in enumerate(batches):
        if number < n_kept:
            continue
        x_ND = (batch - centre_D).to(device)
        if c_LD is None:
            if len(x_ND) < n_latents:
                raise BadInput(
                    f"the baseline kmeans begins with a token for each of the {n_latents:,} clusters; there are "
                    f"{len(x_ND):,} training tokens. Compare with a smaller SAE (--expansion), or leave it out"
                )
            drawn = torch.randperm(len(x_ND), generator=torch.Generator().manual_seed(seed))[:n_latents]
            c_LD = x_ND[drawn.to(device)].clone()
        nearest_N = _nearest(x_ND, c_LD)
        given_L = torch.bincount(nearest_N, minlength=n_latents).float()
        sum_LD = _sums_by(nearest_N, x_ND, given_L)
        n_L += given_L
        step_LD = (sum_LD - given_L[:, None] * c_LD) / n_L.clamp_min(1)[:, None]
        c_LD += step_LD
        if state.is_due:
            arrays = {"clusters": c_LD.cpu().numpy(), "given": n_L.cpu().numpy()}
            state.write({**arrays, "done": np.array([number + 1])})
    assert c_LD is not None
    c_LD = c_LD.cpu()
    square_L = c_LD.square().sum(1)
    decoder = 2 * c_LD / torch.where(square_L > 0, square_L, 1)[:, None]
    return Weights(c_LD, decoder, -square_L / 2)


def _sums_by(which_N: torch.Tensor, x_ND: torch.Tensor, n_L: torch.Tensor) -> torch.Tensor:
    """(L, D): the sum of the rows of each cluster, which has `n_L` of them.

    On a GPU `index_add_` adds in any order, so that no two fits would be equal; there rows are sorted by cluster first.
    """
    if not x_ND.is_cuda:
        return x_ND.new_zeros(len(n_L), x_ND.shape[1]).index_add_(0, which_N, x_ND)
    return sums_in_order(which_N, x_ND, n_L)


def sums_in_order(which_N: torch.Tensor, x_ND: torch.Tensor, n_L: torch.Tensor) -> torch.Tensor:
    """The same; each sum goes over its rows from the first to the last, on any device."""
    order = which_N.argsort(stable=True)
    return torch.segment_reduce(x_ND[order], "sum", lengths=n_L.long(), initial=0)


def _nearest(x_ND: torch.Tensor, c_LD: torch.Tensor) -> torch.Tensor:
    """(N,): the nearest cluster of each token. Memory: a dense matrix of 128 MiB."""
    half_L = c_LD.square().sum(1) / 2
    step = max(1, _DENSE_BYTES // (4 * len(c_LD)))
    return torch.cat([torch.addmm(-half_L, part, c_LD.T).argmax(1) for part in x_ND.split(step)])


def _signed(encoder: torch.Tensor, decoder: torch.Tensor, notes: tuple[str, ...] = ()) -> Weights:
    both = torch.cat([encoder, -encoder]), torch.cat([decoder, -decoder])
    return Weights(*both, torch.zeros(len(both[0])), notes)


def second_moments(x_ND: torch.Tensor) -> torch.Tensor:
    """(D, D) float64: the sum of x^T x; of tokens about their mean N times the covariance."""
    total = torch.zeros(x_ND.shape[1], x_ND.shape[1], dtype=torch.float64)
    for part in x_ND.split(_CHUNK):
        total += part.double().T @ part.double()
    return total


@torch.inference_mode()
def fitting_scale(model: SparseAutoencoder, tokens_ND: torch.Tensor) -> float:
    """The factor of the decoder with the least squared error on these tokens; NaN where it would not be above 0.

    Without it, a token that many similar latents see would be reconstructed several times over.
    """
    step = max(1, _DENSE_BYTES // (4 * model.n_latents))
    along = square = 0.0
    for part in tokens_ND.to(model.W_dec.device).split(step):
        with float32_products("fp32", part.device.type):
            made = model.encode(part) @ model.W_dec
        along += float((made * (part - model.b_dec)).sum(dtype=torch.float64))
        square += float(made.square().sum(dtype=torch.float64))
    return along / square if square > 0 and along > 0 else math.nan
