"""The quality of an SAE on a whole cache: error, sparsity, dead latents, decoder, effect on the backbone's output.

One pass over the tokens of every readable image; what each figure means stands in evaluation.py. The effect of a
reconstruction on the backbone's output needs images, which belong to stage one: the caller gives them as a
`BackboneSample`. Shapes: N images and B tokens of a micro-batch, T chosen tokens of an image, D width, L latents.
"""

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cytosae.sae import LOSSES, load_sae
from stores.activation_store import ActivationStore
from stores.content_hashes import find_trained_on
from stores.devices import memory_told, resolve_device
from stores.errors import BadInput
from stores.progress import Progress
from stores.spec import check_choice, require_unchanged
from stores.tables import column, listed
from stores.token_sets import TOKEN_SETS, chosen_tokens

from .evaluation import Coherence, Evaluation, Int
from .finite_tokens import check_finite
from .held_out import tokens_at_a_time
from .measured_sums import MeasuredSums, explained_share
from .substitution import BackboneSample, substitute

DEAD_WINDOW = 64 * 16_448  # tokens: what `dead_fraction` means in a training run with the default settings
PERCENTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)
_DECODER_TILE = 4096  # rows; a tile of cosines has 64 MiB


@memory_told("End what else uses this memory, or give --device cpu")
@torch.inference_mode()
def evaluate(
    cache: Path | str,
    run: Path | str,
    *,
    token_set: str | None = None,
    dead_window: int = DEAD_WINDOW,
    only: Collection[str] | None = None,
    sample: BackboneSample | None = None,
    assume_compatible: bool = False,
    device: str = "auto",
    micro_batch: int | None = None,
    progress: Progress = lambda done, total, state: None,
    decoder_progress: Progress = lambda done, total, state: None,
) -> Evaluation:
    """Measure the SAE in the folder `run` on all readable images of `cache` (a path or a URL). Writes nothing.

    Memory: dense latents of one micro-batch (256 MiB; on a GPU 1 GiB, for topk 2), one chunk of the cache, the decoder
    once more, and the tokens of the sample.

    Parameters
    ----------
    token_set : all, patch, cls or register; default: what the SAE was trained on
    dead_window : number of last tokens for `dead_fraction_window`, > 0; rounded up to whole images
    only : ids of the images to measure on, for instance those in `held_out.parquet` of a run; None: all
    sample : images for the effect on the backbone's final CLS embedding; read before the pass begins
    assume_compatible : accept an imported SAE, which does not say which tokens it was trained on
    micro_batch : tokens at a time; the result depends on it in the last bits only
    decoder_progress : called with tiles of cosines, done and in all

    Raises
    ------
    SpecMismatch
        If the SAE was trained on another kind of tokens, or does not say on which.
    BadInput
        If there is no readable image, the SAE's numbers become NaN or infinite, or a number is below 1.
    DamagedStore
        If a token of a readable image is NaN or infinite; the message names it.
    """
    device = resolve_device(device)
    run = Path(run)
    store, sae = ActivationStore(cache), load_sae(run, device=device)
    assumed = sae.require_tokens(store.spec, f"the cache {cache}", assume_compatible=assume_compatible)
    sae.warn_of_precision(store.spec)
    model, config = sae.model, sae.header.spec.get("config", {})
    token_set = token_set or config.get("token_set", "all")
    loss = config.get("loss", "normed")
    check_choice("token_set", token_set, TOKEN_SETS)
    check_choice("loss", loss, LOSSES)
    if dead_window < 1:
        raise BadInput(f"the window of dead latents must be at least 1 token; found {dead_window:,}")
    if micro_batch is not None and micro_batch < 1:
        raise BadInput(f"micro_batch must be at least 1; found {micro_batch}")
    positions = chosen_tokens(token_set, store.spec.layout, f"the tokens of {cache}")
    per_image, chosen = len(positions), slice(positions.start, positions.stop)
    is_readable = store.readable()
    if only is not None:
        is_readable &= _named(store, only)
    n_images = int(is_readable.sum())
    if not n_images * per_image:
        raise BadInput(f"no readable image with {token_set} tokens in {cache}: there is nothing to evaluate")
    step = micro_batch or tokens_at_a_time(model)
    n_window = min(n_images, -(-dead_window // per_image))

    is_training_cache = store.content_sha256 in [known.get("sha256") for known in sae.header.spec.get("caches", [])]
    trained_on = find_trained_on(run, sae.header, store.images, cache_sha256=store.content_sha256).of(is_readable)
    outputs = [tokens.cpu() for tokens in sample.outputs] if sample else []
    coherence = decoder_coherence(model.W_dec, progress=decoder_progress)
    sums = MeasuredSums(model, loss=loss, step=step, window_begins=n_images - n_window, with_pca=True)
    n_together = max(1, step // per_image)
    for rows, tokens in store.iter_chunks():
        for start in range(0, len(rows), n_together):
            some = range(rows.start + start, min(rows.start + start + n_together, rows.stop))
            kept = is_readable[some.start : some.stop]
            x_NTD = tokens[start : start + len(some)][kept][:, chosen]
            check_finite(store, x_NTD, np.flatnonzero(kept) + some.start, first_token=chosen.start)
            if len(x_NTD):
                sums.add(torch.from_numpy(x_NTD).to(device).float())
            progress(some.stop, store.spec.n_images, f"{sums.l0:.1f} active per token")

    require_unchanged(store.header, sae.header)
    substitution = None
    if sample:
        mean_D = sums.mean_D.float()
        substitution = substitute(model, sample, outputs, mean_D, chosen, step=step, device=device)
    latents_per_image = np.array(sums.latents_per_image, np.int64)
    return Evaluation(
        sae=run,
        store=cache,
        sae_sha256=sae.sha256,
        cache_sha256=store.content_sha256,
        assumed_equal=tuple(assumed),
        is_training_cache=is_training_cache,
        n_known=trained_on.n_known,
        n_trained_on=trained_on.n_trained_on,
        n_held_out=trained_on.n_held_out,
        trained_backbone=store.spec.trained,
        token_set=token_set,
        loss=loss,
        n_latents=model.n_latents,
        n_images=n_images,
        n_unreadable=int((~store.readable()).sum()),
        n_tokens=sums.n_tokens,
        mse=sums.scaled_error / (sums.n_tokens * model.width),
        mse_plain=sums.error / (sums.n_tokens * model.width),
        explained_variance=sums.explained_variance,
        explained_variance_uncentered=explained_share(sums.error, sums.square),
        l0=sums.l0,
        l0_percentiles=_percentiles_of_counts(sums.l0_counts.cpu().numpy()),
        latents_per_image=float(latents_per_image.mean()),
        latents_per_image_percentiles={p: int(value) for p, value in _percentiles(latents_per_image).items()},
        dead_fraction_whole=float((sums.n_images_active == 0).double().mean()),
        dead_fraction_window=float((~sums.fired_in_window).double().mean()),
        dead_window_tokens=n_window * per_image,
        n_images_active=sums.n_images_active.cpu().numpy(),
        n_tokens_active=sums.n_tokens_active.cpu().numpy(),
        coherence=coherence,
        substitution=substitution,
        activation=model.activation,
        width=model.width,
        n_pca=sums.n_pca,
        pca_explained_variance=sums.pca_explained_variance,
    )


@torch.inference_mode()
def decoder_coherence(
    decoder_LD: torch.Tensor,
    *,
    tile: int = _DECODER_TILE,
    progress: Progress = lambda done, total, state: None,
) -> Coherence:
    """The largest |cosine| of each decoder row, of (L, D), with any other row.

    Memory: tile x tile cosines, and the decoder once more.
    progress : called with tiles, done and in all
    """
    largest_L1 = decoder_LD.abs().amax(1, keepdim=True)
    has_direction = largest_L1[:, 0] > 0
    rows = decoder_LD[has_direction] / largest_L1[has_direction]  # first, so that no square over- or underflows
    rows /= rows.norm(dim=1, keepdim=True)
    n_zero = len(decoder_LD) - len(rows)
    if len(rows) < 2:
        return Coherence(n_zero_rows=n_zero, largest=math.nan, mean=math.nan, percentiles={})
    nearest = torch.zeros(len(rows), device=rows.device)
    starts = range(0, len(rows), tile)
    pairs = [(first, second) for first in starts for second in starts if first <= second]  # cosines are symmetric
    for n_done, (first, second) in enumerate(pairs, start=1):
        cosines = (rows[first : first + tile] @ rows[second : second + tile].T).abs_()
        if first == second:
            cosines.fill_diagonal_(0)  # a row is not its own neighbour
        for begin, found in ((first, cosines.amax(1)), (second, cosines.amax(0))):
            some = nearest[begin : begin + tile]
            torch.maximum(some, found, out=some)
        progress(n_done, len(pairs), "")
    values = nearest.clamp_max_(1).double().cpu().numpy()  # equal rows differ from 1 in the last bit
    return Coherence(
        n_zero_rows=n_zero, largest=float(values.max()), mean=float(values.mean()), percentiles=_percentiles(values)
    )


def _named(store: ActivationStore, only: Collection[str]) -> npt.NDArray[np.bool_]:
    """(n_images,): is it one of `only`? Raises BadInput for an id that the cache does not have."""
    ids, wanted = column(store.images, "image_id"), set(only)
    unknown = sorted(wanted.difference(ids))
    if unknown:
        raise BadInput(
            f"{len(unknown):,} of {len(wanted):,} images to measure on are not in {store.root}: {listed(unknown)}"
        )
    return np.array([name in wanted for name in ids], bool)


def _percentiles(values: npt.NDArray[Any]) -> dict[int, float]:
    ordered = np.sort(values)
    return {p: float(ordered[_rank(p, len(ordered)) - 1]) for p in PERCENTILES}


def _percentiles_of_counts(counts: Int) -> dict[int, int]:
    """`counts[v]` values are v."""
    up_to = np.cumsum(counts)
    return {p: int(np.searchsorted(up_to, _rank(p, int(up_to[-1])))) for p in PERCENTILES}


def _rank(percent: int, n: int) -> int:
    """The rank, from 1, of a percentile among n sorted values; computed in integers."""
    return max(1, -(-percent * n // 100))
