"""The health of an SAE that has just been trained, on images of its caches: all of them, or a sample that is cheap.

`cyto sae eval` measures on all images, and the final CLS too. This is for the end of a training run: at most a
sixteenth of the budget (with tokens "auto" of the largest one, since rare latents need many images), and at most 2^20
tokens, in whole chunks that lie evenly over the caches. A sample has an error, which is told: two standard errors by
the delete-one jackknife over at most 16 groups of neighbouring chunks (images beside each other are often of the same
patient or class, so single images would make it too small).
Source: Efron and Stein 1981, Annals of Statistics 9, 586. Twin: tests/cytosae/training/test_health.py.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cytosae.sae import SparseAutoencoder, TrainConfig, load_sae
from stores.activation_store import ActivationStore
from stores.files import sha256_json
from stores.progress import Progress
from stores.spec import require_unchanged
from stores.token_sets import chosen_tokens

from .data import TrainingData
from .health import Health, SampleErrors, assess_health, read_health, share_everywhere, write_health
from .held_out import images_of, tokens_at_a_time
from .measured_sums import MeasuredSums

LEAST_IMAGES = 64  # are measured on, whatever it costs
SHARE = 16  # as many tokens are measured on as the (largest) budget has, divided by this
MOST_TOKENS = 1 << 20  # whatever the budget is: 4,080 images of 257 tokens
_GROUPS = 16  # of chunks, for the jackknife


@dataclass(frozen=True)
class _Measured:
    """What `assess_health` reads."""

    sae_sha256: str
    cache_sha256: str
    token_set: str
    activation: str
    width: int
    n_latents: int
    n_images: int
    n_tokens: int
    l0: float
    n_images_active: npt.NDArray[np.int64]
    explained_variance: float
    n_pca: int
    pca_explained_variance: float
    errors: SampleErrors | None  # None: all images were measured on, or too few chunks to say
    substitution: None = None


def caches_sha256(stores: Sequence[ActivationStore]) -> str:
    """Which caches: the hash of one, as in an evaluation; of several, that of the list of theirs."""
    hashes = [store.content_sha256 for store in stores]
    return hashes[0] if len(hashes) == 1 else sha256_json(hashes)


def health_of_run(
    run: Path,
    data: TrainingData,
    config: TrainConfig,
    *,
    n_steps: int,
    device: str,
    progress: Progress = lambda done, total, state: None,
) -> Health:
    """What is kept beside the SAE in `run`; if nothing is, it is measured and kept.

    Images that were trained on and held-out ones count, excluded ones do not.

    progress : images that are measured

    Raises
    ------
    DamagedStore, StoreUnreachable
        If the SAE, its `health.json` or a cache cannot be read.
    OSError
        If `health.json` cannot be written.
    """
    sae = load_sae(run, device=device)
    cache_sha256 = caches_sha256(data.stores)
    known = read_health(run, sae_sha256=sae.sha256, cache_sha256=cache_sha256)
    if known is not None:
        return known
    masks = [train | held for train, held in zip(data.chosen.train, data.chosen.held_out, strict=True)]
    most = min(n_steps * config.batch_tokens // SHARE, MOST_TOKENS)
    measured = measure_sample(sae.model, data.stores, masks, config, most_tokens=most, device=device, progress=progress)
    figures = _Measured(sae_sha256=sae.sha256, cache_sha256=cache_sha256, token_set=config.token_set, **measured)
    health = assess_health(figures, n_images_in_all=sum(int(mask.sum()) for mask in masks), errors=figures.errors)
    require_unchanged(sae.header, *(store.header for store in data.stores))
    write_health(run, health)
    return health


@torch.inference_mode()
def measure_sample(
    model: SparseAutoencoder,
    stores: Sequence[ActivationStore],
    masks: Sequence[npt.NDArray[np.bool_]],
    config: TrainConfig,
    *,
    most_tokens: int,
    device: str,
    progress: Progress = lambda done, total, state: None,
) -> dict[str, Any]:
    """Sums over the images in `masks`, or over those of evenly spaced chunks if these have more than `most_tokens`."""
    per_image = len(chosen_tokens(config.token_set, stores[0].spec.layout))
    step = tokens_at_a_time(model)
    sums = MeasuredSums(model, loss=config.loss, step=step, window_begins=0, with_pca=True)
    chunks = [
        (store, mask, chunk, int(mask[store.spec.chunk_rows(chunk).start : store.spec.chunk_rows(chunk).stop].sum()))
        for store, mask in zip(stores, masks, strict=True)
        for chunk in range(store.spec.n_chunks)
    ]
    chunks = [each for each in chunks if each[3]]
    most_images = max(LEAST_IMAGES, most_tokens // per_image)
    drawn = evenly_spaced([n_images for *_, n_images in chunks], most_images)
    total = sum(chunks[number][3] for number in drawn)
    groups = [_Group.of(sums)]  # the sums after each group of chunks, so that each one can be left out
    for numbers in np.array_split(drawn, min(_GROUPS, len(drawn))):
        for number in numbers:
            store, mask, chunk, _ = chunks[number]
            for _, x_NTD in images_of(store, mask, config.token_set, [chunk], step=step):
                sums.add(x_NTD.to(device).float())
                progress(sums.n_images, total, "the health of the SAE")
        groups.append(_Group.of(sums))
    left = 1 - sums.n_images / sum(n_images for *_, n_images in chunks)
    return {
        "errors": jackknife(groups, share_left=left) if left > 0 and len(groups) > 2 else None,
        "activation": model.activation,
        "width": model.width,
        "n_latents": model.n_latents,
        "n_images": sums.n_images,
        "n_tokens": sums.n_tokens,
        "l0": sums.l0,
        "n_images_active": sums.n_images_active.cpu().numpy(),
        "explained_variance": sums.explained_variance,
        "n_pca": sums.n_pca,
        "pca_explained_variance": sums.pca_explained_variance,
    }


@dataclass(frozen=True)
class _Group:
    """Running sums of a pass: over all tokens so far, or of some left out. D channels, L latents."""

    n_images: int
    n_tokens: int
    error: float
    square: float  # of tokens about a point that stays
    sum_D: npt.NDArray[np.float64]  # likewise
    n_images_active: npt.NDArray[np.int64]
    n_active: int  # latents of tokens

    @classmethod
    def of(cls, sums: MeasuredSums) -> "_Group":
        """What the pass has summed so far."""
        shifted_D, shifted_square = sums.shifted()
        return cls(
            n_images=sums.n_images,
            n_tokens=sums.n_tokens,
            error=sums.error,
            square=shifted_square,
            sum_D=shifted_D.cpu().numpy().copy(),
            n_images_active=sums.n_images_active.cpu().numpy().copy(),
            n_active=int(sums.n_tokens_active.sum()),
        )

    def without(self, before: "_Group", after: "_Group") -> "_Group":
        """The sums less what was added from `before` to `after`."""
        return _Group(
            **{name: value - getattr(after, name) + getattr(before, name) for name, value in vars(self).items()}
        )

    def figures(self) -> tuple[float, float, float, float]:
        """L0, share of latents active everywhere, dead share, explained variance; NaN for what is not known."""
        variance = self.square - float(self.sum_D @ self.sum_D) / self.n_tokens
        return (
            self.n_active / self.n_tokens,
            share_everywhere(self.n_images_active, self.n_images),
            float((self.n_images_active == 0).mean()),
            1 - self.error / variance if variance > 0 else math.nan,
        )


def jackknife(running: Sequence[_Group], *, share_left: float) -> SampleErrors:
    """Two standard errors of each figure of a sample, from the figures without each of its groups.

    Parameters
    ----------
    running : sums before the first group, and after each; three or more
    share_left : share of the images that are not in the sample, in (0, 1)
    """
    n, all_of_it = len(running) - 1, running[-1]
    without = np.array([all_of_it.without(running[k], running[k + 1]).figures() for k in range(n)])
    error = 2 * np.sqrt(share_left * (n - 1) / n * np.square(without - without.mean(0)).sum(0))
    return SampleErrors(*map(float, error))


def evenly_spaced(sizes: Sequence[int], most: int) -> list[int]:
    """Numbers of some chunks, rising: all if they have at most `most` images together, else every n-th or one."""
    total = sum(sizes)
    if total <= most:
        return list(range(len(sizes)))
    n = max(1, len(sizes) * most // total)
    return sorted({(2 * k + 1) * len(sizes) // (2 * n) for k in range(n)})
