"""The quality of an SAE on a whole cache: error, sparsity, dead latents, decoder, effect on the backbone's output.

One pass over the tokens of every readable image, with sums in float64. Quantities that metrics.parquet has too have the
same names there; each definition is at its field below. The effect of a reconstruction on the backbone's output needs
images, which belong to stage one: the caller gives them as a `BackboneSample`.
Shapes: N images and B tokens of a micro-batch, T chosen tokens of an image, D width, L latents.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cytosae.sae import LOSSES, SparseAutoencoder, TrainConfig, load_sae
from stores.activation_store import ActivationStore, Float16
from stores.concept_store import MEANINGFUL
from stores.content_hashes import find_trained_on
from stores.devices import memory_told, resolve_device
from stores.errors import BadInput, DamagedStore
from stores.progress import Progress
from stores.spec import check_choice, require_unchanged
from stores.tables import column, listed
from stores.token_sets import TOKEN_SETS, chosen_tokens
from stores.wording import Report

from .data import TrainingData
from .device_prefetch import one_ahead
from .distributed import ALONE, Ranks
from .health import Health, assess_health
from .losses import loss_weight
from .report import evaluation_lines

Int = npt.NDArray[np.int64]
DEAD_WINDOW = 64 * 16_448  # tokens: what `dead_fraction` means in a training run with the default settings
PERCENTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)
LOG10_FREQUENCY_EDGES = tuple(-8 + half / 2 for half in range(17))
_MICRO_BATCH_BYTES = 128 << 20  # of one dense (tokens, latents) float32 matrix; topk holds two
_MICRO_BATCH_BYTES_ON_GPU = 1 << 30  # small ones leave a GPU idle
_DECODER_TILE = 4096  # rows; a tile of cosines has 64 MiB


@dataclass(frozen=True, kw_only=True)
class BackboneSample:
    """Some images at the transformer block of the cache, and the rest of the backbone from there.

    outputs : for each image the float32 output of the block, (tokens_per_image, D)
    final_cls : maps (n, tokens_per_image, D) at the block to the final CLS embeddings, (n, any width)
    seed : with which the images were drawn
    """

    outputs: Iterable[torch.Tensor]
    final_cls: Callable[[torch.Tensor], torch.Tensor]
    seed: int


@dataclass(frozen=True, kw_only=True)
class Change:
    """Distance of the final CLS embedding c' from the original one c: means over the images of a sample."""

    cosine: float  # c . c' / (||c|| ||c'||); NaN if any of them is a zero vector
    relative_l2: float  # ||c' - c|| / ||c||


@dataclass(frozen=True, kw_only=True)
class Substitution:
    """Change of the final CLS embedding when the chosen tokens at the block are replaced and the others are not.

    A loss recovered is, for language models, (loss(zeros) - loss(reconstruction)) / (loss(zeros) - loss(untouched)):
    zero-ablation (Rajamanoharan et al. 2024, Gated SAEs; SAELens). A feature extractor has no loss of its own: here it
    is the mean of ||c' - c|| / ||c||, which is 0 when nothing is replaced. So
    recovered = 1 - reconstruction.relative_l2 / zeros.relative_l2: 1 if the reconstruction changes nothing, 0 if it is
    no better than zeros, below 0 if it is worse; NaN if zeros change nothing either. `recovered_from_mean` has
    mean-ablation in place of zeros, `mean_token`: the harder reference where tokens share a large mean.
    """

    n_images: int
    seed: int
    reconstruction: Change
    zeros: Change
    mean_token: Change  # the mean of the chosen tokens over the whole cache, at every position
    recovered: float
    recovered_from_mean: float


@dataclass(frozen=True, kw_only=True)
class Coherence:
    """Largest |cosine| of each decoder row with any other row; exact, over all pairs of rows.

    NaN (and no percentiles) where fewer than two rows have a direction.
    """

    n_zero_rows: int  # left out, since they have no direction
    largest: float  # 1: two rows are parallel
    mean: float
    percentiles: dict[int, float]


@dataclass(frozen=True, kw_only=True)
class FrequencyHistogram:
    """Number of latents by the log10 of their frequency: bin k is edges[k] <= log10(frequency) < edges[k + 1].

    The last bin includes frequency 1, the first one all lower frequencies; `n_never` latents are in no bin.
    """

    edges: tuple[float, ...]
    images: tuple[int, ...]  # by the share of readable images
    tokens: tuple[int, ...]  # by the share of chosen tokens
    n_never: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation(Report):
    """Results of an SAE on the chosen tokens x of all readable images of a cache; x_hat are their reconstructions.

    A percentile p is the smallest value v such that at least p % of the values are <= v (0: minimum, 100: maximum).
    """

    sae: Path  # its folder
    store: Path | str  # the cache
    sae_sha256: str
    cache_sha256: str
    assumed_equal: tuple[
        str, ...
    ]  # properties of its tokens that an imported SAE does not name, assumed to be those of the cache
    is_training_cache: bool  # the SAE was trained on tokens of this very cache
    n_known: int  # images of which the hashes of their files tell whether the SAE trained on them
    n_trained_on: int  # of these, the images that it trained on
    n_held_out: int  # of these, the others
    trained_backbone: bool  # False: seeded random weights
    token_set: str
    loss: str  # the form of `mse`: that of the training run, `normed` where it is unknown
    n_latents: int
    n_images: int  # readable images; everything below is about these
    n_unreadable: int
    n_tokens: int
    mse: float  # as in training: mean of (x_hat - x)^2 / ||x|| ("normed"), or of D (x_hat - x)^2 ("eq1")
    mse_plain: float  # mean of (x_hat - x)^2 over tokens and channels
    explained_variance: float  # 1 - sum ||x - x_hat||^2 / sum ||x - mean(x)||^2; NaN if the tokens do not vary
    explained_variance_uncentered: float  # the same against sum ||x||^2
    l0: float  # mean number of active latents per token
    l0_percentiles: dict[int, int]  # over tokens
    latents_per_image: float  # mean number of latents that are active at any token of an image
    latents_per_image_percentiles: dict[int, int]  # over images
    dead_fraction_whole: float  # share of latents that are never active
    dead_fraction_window: float  # the same over the last `dead_window_tokens` tokens, in the order of the cache
    dead_window_tokens: int  # whole images
    n_images_active: Int  # (L,) images in which a latent is active
    n_tokens_active: Int  # (L,) tokens at which it is active
    coherence: Coherence
    substitution: Substitution | None  # None: no images were given
    activation: str = "relu"
    width: int = 0  # of a token
    n_pca: int = 0  # L0, rounded, at most the width: components of
    pca_explained_variance: float = math.nan  # a PCA of these very tokens, and the variance that they explain

    @property
    def health(self) -> Health:
        """Is the SAE fit for barcodes? Each figure with its healthy range."""
        return assess_health(self)

    @property
    def frequency(self) -> npt.NDArray[np.float64]:
        """(L,): share of the readable images in which a latent is active."""
        return self.n_images_active / self.n_images

    @property
    def token_frequency(self) -> npt.NDArray[np.float64]:
        """(L,): share of the chosen tokens at which a latent is active."""
        return self.n_tokens_active / self.n_tokens

    @property
    def histogram(self) -> FrequencyHistogram:
        """How frequent the latents are."""
        return FrequencyHistogram(
            edges=LOG10_FREQUENCY_EDGES,
            images=_histogram(self.frequency),
            tokens=_histogram(self.token_frequency),
            n_never=int((self.n_images_active == 0).sum()),
        )

    @property
    def trained_on_line(self) -> str:
        """One line: how many of the images the SAE is known to have trained on."""
        cache = "this very cache" if self.is_training_cache else "another cache"
        if not self.n_known:
            return f"{cache}; not known of any of the {self.n_images:,} images: none is called held out"
        return (
            f"{cache}; {self.n_known:,} of {self.n_images:,} images are known: {self.n_trained_on:,} trained on, "
            f"{self.n_held_out:,} not"
        )

    def lines(self) -> Iterator[str]:
        """A page of all figures."""
        return evaluation_lines(self)

    def to_json(self, *, per_latent: bool = False) -> dict[str, Any]:
        """Plain JSON values, null for NaN; the two counts of every latent only on request."""
        names = [field.name for field in dataclasses.fields(self) if field.name not in ("sae", "store")]
        values = {name: getattr(self, name) for name in names}
        counts = {name: values.pop(name).tolist() for name in ("n_images_active", "n_tokens_active")}
        values["log10_frequency"] = self.histogram
        health = self.health.to_json()
        values["health"] = {name: health[name] for name in ("is_fit", "rows")}  # the rest stands here already
        return {**{name: _plain(value) for name, value in values.items()}, **(counts if per_latent else {})}


@memory_told("End what else uses this memory, or give --device cpu")
@torch.inference_mode()
def evaluate(
    cache: Path | str,
    run: Path,
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
        If there is no readable image, or the SAE's numbers become NaN or infinite.
    DamagedStore
        If a token of a readable image is NaN or infinite; the message names it.
    """
    device = resolve_device(device)
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
    sums = _Sums(model, loss=loss, step=step, window_begins=n_images - n_window, with_pca=True)
    n_together = max(1, step // per_image)
    for rows, tokens in store.iter_chunks():
        for start in range(0, len(rows), n_together):
            some = range(rows.start + start, min(rows.start + start + n_together, rows.stop))
            kept = is_readable[some.start : some.stop]
            x_NTD = tokens[start : start + len(some)][kept][:, chosen]
            _check_finite(store, x_NTD, np.flatnonzero(kept) + some.start, first_token=chosen.start)
            if len(x_NTD):
                sums.add(torch.from_numpy(x_NTD).to(device).float())
            progress(some.stop, store.spec.n_images, f"{sums.l0:.1f} active per token")

    require_unchanged(store.header, sae.header)
    substitution = None
    if sample:
        mean_D = sums.mean_D.float()
        substitution = _substitute(model, sample, outputs, mean_D, chosen, step=step, device=device)
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
        explained_variance_uncentered=_explained(sums.error, sums.square),
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


class _Sums:
    """Running sums of the pass: float64, and int64 for what is counted.

    with_pca : also the products of channels, (D, D), for the variance that principal components explain
    """

    def __init__(
        self, model: SparseAutoencoder, *, loss: str, step: int, window_begins: int, with_pca: bool = False
    ) -> None:
        self.n_tokens = self.n_images = 0
        self.error = self.scaled_error = self.square = 0.0
        self.latents_per_image: list[int] = []
        device, n_latents = model.W_enc.device, model.n_latents
        self.l0_counts = torch.zeros(n_latents + 1, dtype=torch.int64, device=device)  # tokens by their L0
        self.n_images_active = torch.zeros(n_latents, dtype=torch.int64, device=device)
        self.n_tokens_active = torch.zeros(n_latents, dtype=torch.int64, device=device)
        self.fired_in_window = torch.zeros(n_latents, dtype=torch.bool, device=device)
        self._activation_L = torch.zeros(n_latents, dtype=torch.float64, device=device)  # summed over tokens
        # sums of x - first token: sums of x would cancel where the tokens vary little
        self._about_D = torch.zeros(0)
        self._shifted_D = torch.zeros(model.width, dtype=torch.float64, device=device)
        self._shifted_square = 0.0
        side = model.width if with_pca else 0
        self._shifted_DD = torch.zeros(side, side, dtype=torch.float64, device=device)
        self._model, self._loss, self._step, self._window_begins = model, loss, step, window_begins

    @property
    def l0(self) -> float:
        """Mean number of active latents per token, so far."""
        return int(self.n_tokens_active.sum()) / max(1, self.n_tokens)

    def n_meaningful(self) -> int:
        """Latents whose mean activation (over the images in which they are active) is at least 10^-3."""
        per_image = self.n_tokens / max(1, self.n_images)
        mean_L = self._activation_L / (per_image * self.n_images_active.clamp_min(1))
        return int((mean_L >= MEANINGFUL).sum())

    @property
    def mean_D(self) -> torch.Tensor:
        """(D,) float64: the mean token."""
        return self._about_D + self._shifted_D / self.n_tokens

    @property
    def variance(self) -> float:
        """Sum of squared distances from the mean token."""
        return self._shifted_square - self._shifted_D.square().sum().item() / self.n_tokens

    def shifted(self) -> tuple[torch.Tensor, float]:
        """The sum of the tokens (D,), and of their squares, about the first token."""
        return self._shifted_D, self._shifted_square

    @property
    def explained_variance(self) -> float:
        """Share of the variance about the mean token; NaN if the tokens do not vary."""
        return _explained(self.error, self.variance)

    @property
    def n_pca(self) -> int:
        """L0 as a number of components."""
        return min(round(self.l0), self._model.width)

    @property
    def pca_explained_variance(self) -> float:
        """The variance that the first `n_pca` components of the tokens explain; NaN if the tokens do not vary."""
        if not self.variance > 0:
            return math.nan
        about_mean_DD = self._shifted_DD - torch.outer(self._shifted_D, self._shifted_D) / self.n_tokens
        rising = torch.linalg.eigvalsh(about_mean_DD.cpu()).clamp_min(0)
        total = rising.sum().item()
        return rising[len(rising) - self.n_pca :].sum().item() / total if total > 0 else math.nan

    def add_other_ranks(self, ranks: Ranks) -> None:
        """Add the sums of the other ranks, on all of them; not those of the window and of each image."""
        if ranks.size == 1:
            return
        about = ranks.broadcast(self._about_D.double().cpu() if self.n_tokens else None)  # which all sums are moved to
        width, device = self._model.width, self._shifted_D.device
        about_D = torch.zeros(width, dtype=torch.float64, device=device) if about is None else about.to(device)
        if self.n_tokens:
            move_D = self._about_D.double() - about_D  # x - about = (x - own about) + move
            self._shifted_square += (2 * move_D @ self._shifted_D + self.n_tokens * move_D.square().sum()).item()
            self._shifted_D += self.n_tokens * move_D
        self._about_D = about_D
        names = ("n_tokens", "n_images", "error", "scaled_error", "square", "_shifted_square")
        numbers = torch.tensor([float(getattr(self, name)) for name in names], dtype=torch.float64, device=device)
        ranks.all_reduce_sum_(
            *(numbers, self._shifted_D, self._activation_L, self.n_images_active, self.n_tokens_active)
        )
        for name, value in zip(names, numbers.tolist(), strict=True):
            setattr(self, name, round(value) if name.startswith("n_") else value)

    def add(self, x_NTD: torch.Tensor) -> None:
        """Add whole images, (N, T, D) float32, `step` tokens of each at a time if it has more."""
        n_images, per_image, width = x_NTD.shape
        active_NL = torch.zeros(n_images, self._model.n_latents, device=x_NTD.device)
        for start in range(0, per_image, self._step):
            x_BD = x_NTD[:, start : start + self._step].reshape(-1, width)
            z_BL = self._model.encode(x_BD)
            self._add_tokens(x_BD.double(), self._model.decode(z_BL).double())
            self._activation_L += z_BL.view(n_images, -1, z_BL.shape[1]).sum(1).double().sum(0)
            z_BL.gt_(0)  # in place, 0 or 1: sums of such floats are exact, and ten times as fast as of booleans
            self.l0_counts += torch.bincount(z_BL.sum(1).long(), minlength=len(self.l0_counts))
            active_NL += z_BL.view(n_images, -1, z_BL.shape[1]).sum(1)
        self.n_tokens_active += active_NL.long().sum(0)
        fired_NL = active_NL > 0
        self.n_images_active += fired_NL.sum(0)
        self.latents_per_image += fired_NL.sum(1).tolist()
        self.fired_in_window |= fired_NL[max(0, self._window_begins - self.n_images) :].any(0)
        self.n_images += n_images

    def _add_tokens(self, x_BD: torch.Tensor, x_hat_BD: torch.Tensor) -> None:
        error_B = (x_hat_BD - x_BD).square().sum(1)
        if not bool(torch.isfinite(error_B).all()):
            raise BadInput("a reconstruction became NaN or infinite: the SAE's weights do not fit these tokens")
        if not self.n_tokens:
            self._about_D = x_BD[0]
        square_B = x_BD.square().sum(1)
        scale_B = loss_weight(x_BD, self._loss)
        scale_B = scale_B.squeeze(1) if isinstance(scale_B, torch.Tensor) else scale_B
        shifted_BD = x_BD - self._about_D
        self.n_tokens += len(x_BD)
        self.error += error_B.sum().item()
        self.scaled_error += (error_B * scale_B).sum().item()
        self.square += square_B.sum().item()
        self._shifted_D += shifted_BD.sum(0)
        self._shifted_square += shifted_BD.square().sum().item()
        if len(self._shifted_DD):
            self._shifted_DD += shifted_BD.T @ shifted_BD


def tokens_at_a_time(model: SparseAutoencoder) -> int:
    """Tokens of one micro-batch of a measurement: 128 MiB of dense latents, on a GPU 1 GiB."""
    n_bytes = _MICRO_BATCH_BYTES_ON_GPU if model.W_enc.device.type == "cuda" else _MICRO_BATCH_BYTES
    return max(1, n_bytes // (4 * model.n_latents))


@torch.no_grad()
def measure_held_out(
    model: SparseAutoencoder, data: TrainingData, config: TrainConfig, *, device: str, ranks: Ranks = ALONE
) -> dict[str, float | int | None]:
    """Metrics on the held-out images, by the names of metrics.parquet, of unscaled tokens; None for NaN.

    Called on all ranks: each measures on its share of the chunks, and gets the metrics of all.
    """
    sums = _Sums(model, loss=config.loss, step=tokens_at_a_time(model), window_begins=0)
    for x_NTD in held_out_pieces(data, config, device, step=tokens_at_a_time(model), part=(ranks.rank, ranks.size)):
        sums.add(x_NTD.to(device).float())
    sums.add_other_ranks(ranks)
    if not sums.n_tokens:
        raise BadInput("the held-out images are all background: hold out more, or leave --background out")
    found: dict[str, float | int | None] = _plain(
        {
            "n_images": sums.n_images,
            "n_tokens": sums.n_tokens,
            "mse": sums.scaled_error / (sums.n_tokens * model.width),
            "explained_variance": sums.explained_variance,
            "explained_variance_uncentered": _explained(sums.error, sums.square),
            "l0": sums.l0,
            "n_meaningful": sums.n_meaningful(),
        }
    )
    return found


def held_out_pieces(
    data: TrainingData, config: TrainConfig, device: str, *, step: int, part: tuple[int, int] = (0, 1)
) -> Iterator[torch.Tensor]:
    """Tokens of held-out images, (N, T, D) float16, about `step` tokens at a time; without background.

    On a CPU a piece is of one chunk. For a GPU those of several chunks are taken together, and a thread reads ahead.

    part : (rank, size): of all chunks with a held-out image, only every `size`-th from number `rank` on
    """
    keep: Sequence[npt.NDArray[np.bool_] | None] = (
        data.background.keep if data.background else [None] * len(data.stores)
    )
    work = [
        (store, mask, kept, chunk)
        for store, mask, kept in zip(data.stores, data.chosen.held_out, keep, strict=True)
        for chunk in range(store.spec.n_chunks)
        if mask[store.spec.chunk_rows(chunk).start : store.spec.chunk_rows(chunk).stop].any()
    ]

    def pieces() -> Iterator[torch.Tensor]:
        for store, mask, kept, chunk in work[part[0] :: part[1]]:
            for images, x_NTD in images_of(store, mask, config.token_set, [chunk], step=step):
                yield from [x_NTD] if kept is None else _without_background(x_NTD, kept[images], store, config)

    if not device.startswith("cuda"):
        return pieces()
    return one_ahead(_together(pieces(), step), lambda x_NTD: lambda: x_NTD)


def _without_background(
    x_NTD: torch.Tensor, kept_NT: npt.NDArray[np.bool_], store: ActivationStore, config: TrainConfig
) -> Iterator[torch.Tensor]:
    """The images one by one, (1, T, D) with a T of their own; none of an image that is all background."""
    positions = chosen_tokens(config.token_set, store.spec.layout)
    for x_TD, is_kept in zip(x_NTD, kept_NT[:, positions.start : positions.stop], strict=True):
        if is_kept.any():
            yield x_TD[torch.from_numpy(is_kept)][None]


def _together(pieces: Iterable[torch.Tensor], step: int) -> Iterator[torch.Tensor]:
    """Images with the same number of tokens that follow each other, together, as long as they have `step` tokens."""
    waiting: list[torch.Tensor] = []
    for x_NTD in pieces:
        n_tokens = sum(piece.shape[0] * piece.shape[1] for piece in (*waiting, x_NTD))
        if waiting and (n_tokens > step or waiting[0].shape[1] != x_NTD.shape[1]):
            yield torch.cat(waiting)
            waiting = []
        waiting.append(x_NTD)
    if waiting:
        yield torch.cat(waiting)


def images_of(
    store: ActivationStore, mask: npt.NDArray[np.bool_], token_set: str, chunks: Iterable[int], *, step: int
) -> Iterator[tuple[npt.NDArray[np.int64], torch.Tensor]]:
    """Images in `mask` (n_images,) chunk by chunk, about `step` tokens each: (N,) their indices in the store, and their
    chosen tokens (N, T, D) float16.

    Raises
    ------
    DamagedStore
        If a token is NaN or infinite.
    """
    positions = chosen_tokens(token_set, store.spec.layout)
    per_image, chosen = len(positions), slice(positions.start, positions.stop)
    for chunk in chunks:
        rows = store.spec.chunk_rows(chunk)
        images = np.flatnonzero(mask[rows.start : rows.stop])
        if not len(images):
            continue
        tokens = store.read_chunk(chunk)
        for some in np.array_split(images, -(-len(images) * per_image // step)):
            x_NTD = tokens[some][:, chosen]
            _check_finite(store, x_NTD, some + rows.start, first_token=chosen.start)
            yield some + rows.start, torch.from_numpy(x_NTD)


def _named(store: ActivationStore, only: Collection[str]) -> npt.NDArray[np.bool_]:
    """(n_images,): is it one of `only`? Raises BadInput for an id that the cache does not have."""
    ids, wanted = column(store.images, "image_id"), set(only)
    unknown = sorted(wanted.difference(ids))
    if unknown:
        raise BadInput(
            f"{len(unknown):,} of {len(wanted):,} images to measure on are not in {store.root}: {listed(unknown)}"
        )
    return np.array([name in wanted for name in ids], bool)


def _substitute(
    model: SparseAutoencoder,
    sample: BackboneSample,
    outputs: list[torch.Tensor],
    mean_D: torch.Tensor,
    chosen: slice,
    *,
    step: int,
    device: str,
) -> Substitution:
    """The effect on the final CLS embedding: each image goes through with its three replacements."""
    cosines, distances = [], []
    for tokens_TD in outputs:
        four = tokens_TD.to(device).repeat(4, 1, 1)  # untouched, reconstruction, zeros, mean token
        four[1, chosen] = torch.cat([model(part) for part in four[1, chosen].split(step)])
        four[2, chosen] = 0
        four[3, chosen] = mean_D
        embedded = sample.final_cls(four).double().cpu()
        if not bool(torch.isfinite(embedded).all()):
            raise BadInput("a final CLS embedding became NaN or infinite: the SAE's weights do not fit these tokens")
        untouched, norms = embedded[0], embedded.norm(dim=1)
        cosines.append(embedded[1:] @ untouched / (norms[1:] * norms[0]))
        distances.append((embedded[1:] - untouched).norm(dim=1) / norms[0])
    changes = [
        Change(cosine=cosine, relative_l2=distance)
        for cosine, distance in zip(
            torch.stack(cosines).mean(0).tolist(), torch.stack(distances).mean(0).tolist(), strict=True
        )
    ]
    reconstruction, zeros, mean_token = changes
    return Substitution(
        n_images=len(outputs),
        seed=sample.seed,
        reconstruction=reconstruction,
        zeros=zeros,
        mean_token=mean_token,
        recovered=_explained(reconstruction.relative_l2, zeros.relative_l2),
        recovered_from_mean=_explained(reconstruction.relative_l2, mean_token.relative_l2),
    )


def _check_finite(store: ActivationStore, x_NTD: Float16, images: Int, *, first_token: int) -> None:
    bad = np.argwhere(~np.isfinite(x_NTD).all(axis=2))
    if len(bad):
        image, token = int(images[bad[0, 0]]), int(bad[0, 1]) + first_token
        raise DamagedStore(
            f"token {token} of image {image:,} ({column(store.images, 'path')[image]}) in {store.root} is NaN or "
            f"infinite, and the image is a readable one. cyto cache verify lists every bad chunk"
        )


def _explained(error: float, total: float) -> float:
    return 1 - error / total if total > 0 else math.nan


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


def _histogram(frequency: npt.NDArray[np.float64]) -> tuple[int, ...]:
    n_bins = len(LOG10_FREQUENCY_EDGES) - 1
    bounds = 10.0 ** np.array(LOG10_FREQUENCY_EDGES)  # compared as frequencies: 1 in 1,000 is at an edge exactly
    places = np.searchsorted(bounds, frequency[frequency > 0], side="right") - 1
    return tuple(np.bincount(places.clip(0, n_bins - 1), minlength=n_bins).tolist())


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {str(name): _plain(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
