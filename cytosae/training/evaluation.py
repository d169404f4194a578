"""What the evaluation of an SAE says: each figure with its definition.

Quantities that metrics.parquet has too have the same names here. Shapes: D width, L latents.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stores.wording import Report

from .health import Health, assess_health
from .substitution import Substitution

Int = npt.NDArray[np.int64]
LOG10_FREQUENCY_EDGES = tuple(-8 + half / 2 for half in range(17))


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
        """The page of `cyto sae eval`."""
        window = f"{self.dead_fraction_window:.1%} over the last {self.dead_window_tokens:,} tokens"
        coherence, substitution = self.coherence, self.substitution
        rows = {
            "images": f"{self.n_images:,} readable, {self.n_unreadable:,} not (left out); "
            f"{self.n_tokens:,} tokens (token set {self.token_set})",
            "trained on": self.trained_on_line,
            "MSE": f"{self.mse:.4g} as trained (loss {self.loss}), {self.mse_plain:.4g} plain",
            "explained": f"{_known(self.explained_variance)} of the variance about the mean token, "
            f"{_known(self.explained_variance_uncentered)} uncentred",
            "PCA": f"{_known(self.pca_explained_variance)} of the variance by the first {self.n_pca:,} principal "
            "components of these tokens, as many as L0",
            "L0": f"{self.l0:.1f} per token; percentiles {_percentiles(self.l0_percentiles)}",
            "per image": f"{self.latents_per_image:.1f} different latents; "
            f"percentiles {_percentiles(self.latents_per_image_percentiles)}",
            "dead": f"{self.dead_fraction_whole:.1%} of {self.n_latents:,} latents over all tokens, {window}",
            "decoder": f"nearest other row, |cosine|: mean {_known(coherence.mean)}, "
            f"percentiles {_percentiles(coherence.percentiles)}"
            + (f"; {coherence.n_zero_rows:,} rows are zero" if coherence.n_zero_rows else ""),
        }
        if substitution:
            rows["final CLS"] = (
                f"{_known(substitution.recovered)} recovered against zeros, "
                f"{_known(substitution.recovered_from_mean)} against the mean token (1: as without the SAE, 0: as with "
                f"these); {substitution.n_images:,} images, seed {substitution.seed}"
            )
            for name, change in {
                "  SAE": substitution.reconstruction,
                "  mean": substitution.mean_token,
                "  zeros": substitution.zeros,
            }.items():
                rows[name] = f"cosine {_known(change.cosine, 5)}, changed by {change.relative_l2:.2%} of its length"
        untrained = "" if self.trained_backbone else " (UNTRAINED backbone)"
        yield f"{self.sae} on {self.store}{untrained}"
        for name, value in rows.items():
            yield f"  {name:<10} {value}"
        histogram = self.histogram
        yield f"  {'frequency':<10} latents by the share of images, and of tokens, in which they are active"
        yield f"  {'':<10} {'never':<16} {histogram.n_never:>9,} {histogram.n_never:>9,}"
        for low, by_image, by_token in zip(histogram.edges, histogram.images, histogram.tokens, strict=False):
            if by_image or by_token:
                yield f"  {'':<10} {f'10^{low:g} to 10^{low + 0.5:g}':<16} {by_image:>9,} {by_token:>9,}"
        yield from self.health.lines()

    def to_json(self, *, per_latent: bool = False) -> dict[str, Any]:
        """Plain JSON values, null for NaN; the two counts of every latent only on request."""
        names = [field.name for field in dataclasses.fields(self) if field.name not in ("sae", "store")]
        values = {name: getattr(self, name) for name in names}
        counts = {name: values.pop(name).tolist() for name in ("n_images_active", "n_tokens_active")}
        values["log10_frequency"] = self.histogram
        health = self.health.to_json()
        values["health"] = {name: health[name] for name in ("is_fit", "rows")}  # the rest stands here already
        return {**{name: plain_values(value) for name, value in values.items()}, **(counts if per_latent else {})}


def _histogram(frequency: npt.NDArray[np.float64]) -> tuple[int, ...]:
    n_bins = len(LOG10_FREQUENCY_EDGES) - 1
    bounds = 10.0 ** np.array(LOG10_FREQUENCY_EDGES)  # compared as frequencies: 1 in 1,000 is at an edge exactly
    places = np.searchsorted(bounds, frequency[frequency > 0], side="right") - 1
    return tuple(np.bincount(places.clip(0, n_bins - 1), minlength=n_bins).tolist())


def plain_values(value: Any) -> Any:
    """JSON values: of a dataclass its fields, None for NaN."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {str(name): plain_values(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def _known(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}f}" if value == value else "n/a"  # NaN: not defined


def _percentiles(values: dict[int, Any]) -> str:
    """`5: 3, 50: 12, 95: 40, 100: 80`: a selection of the percentiles, on one line."""
    shown = {p: values[p] for p in (5, 50, 95, 100) if p in values}
    return ", ".join(f"{p}: {v:,}" if isinstance(v, int) else f"{p}: {v:.3f}" for p, v in shown.items()) or "n/a"
