"""Training and evaluation in words: what commands print and notebooks show."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stores.spec import Header
from stores.wording import Report, decimals, percent, printable

from .health import Health

if TYPE_CHECKING:
    from .evaluation import Evaluation


@dataclass(frozen=True, kw_only=True)
class TrainReport(Report):
    """A finished run."""

    out: Path  # the folder
    header: Header  # of `sae.json`; its summary has the last metrics
    was_complete: bool  # True: nothing had to be trained
    warnings: tuple[str, ...] = ()  # about settings that do not go well together
    health: Health | None = None  # is the SAE fit for barcodes? None: not measured, and
    no_health: str = ""  # why

    @property
    def spec(self) -> dict[str, Any]:
        """Data and settings of the run, which decide its identity."""
        return self.header.spec

    @property
    def summary(self) -> dict[str, Any]:
        """steps, tokens, images, `final` (the last metrics), `held_out` (where images were held out), hashes."""
        return self.header.summary or {}

    @property
    def identity(self) -> str:
        """SHA-256 of data and settings."""
        return self.header.identity

    def lines(self) -> Iterator[str]:
        """Latents and tokens, the last batch, the held-out images."""
        yield f"{self.out}: {self.spec['n_latents']:,} latents after {self.summary['tokens']:,} tokens"
        if "init_from" in self.spec:
            yield f"went on from the SAE with the weights sha256 {self.spec['init_from']['sae_sha256'][:16]}..."
        if "background" in self.spec:
            yield background_line(self.spec["background"])
        yield training_line(self.summary["final"])
        if "penalty" in self.summary:
            yield penalty_line(self.summary["penalty"])
        if "held_out" in self.summary:
            yield f"held out: {held_out_line(self.summary['held_out'])}"
        if self.health is not None:
            yield from self.health.lines()
        elif self.no_health:
            yield f"health: not measured ({printable(self.no_health)}); cyto sae eval --keep measures it"


def training_line(metrics: dict[str, Any]) -> str:
    """A step's metrics: loss, L0, explained variance, dead latents."""
    return (
        f"loss {metrics['loss']:.4g}, L0 {metrics['l0']:.1f}, "
        f"explained variance {decimals(metrics['explained_variance'])}, "
        + (
            f"{metrics['n_dead']:,} dead ({percent(metrics['dead_fraction'])})"
            if metrics["n_dead"] is not None
            else "dead n/a"
        )
    )


def background_line(found: dict[str, Any]) -> str:
    """Background that was left out, from what `Background.to_spec` wrote."""
    return (
        f"background: {found['left_out']:,} of {found['patches']:,} patch tokens left out "
        f"({found['left_out'] / max(1, found['patches']):.0%}) by the rule {found['rule']}; in the corners of images "
        f"{found['share_at_rim']:.0%} are background, elsewhere {found['share_elsewhere']:.0%}"
    )


def penalty_line(found: dict[str, Any]) -> str:
    """Where the steering of L0 has come to."""
    wanted, mean = found["target_l0"], found["running_mean_l0"]
    text = f"L0 steered to {wanted:g}: running mean {mean:.1f} at l1 {found['l1']:.3g}"
    if abs(mean / wanted - 1) <= 0.1:
        return text
    side = "above" if mean > wanted else "below"
    first = "a lower --lr, " if mean < wanted else ""  # at a high one latents come back late
    text = f"{text}; not within 10%: it ended {percent(abs(mean / wanted - 1))} {side}. Train again, into another -o,"
    return f"{text} with {first}more --tokens (or auto) or --schedule linear; or want another L0 (--target-l0)"


def held_out_line(found: dict[str, Any]) -> str:
    """What was measured on held-out images: error, L0, explained variance."""
    return (
        f"{found['n_images']:,} images: mse {found['mse']:.4g}, L0 {found['l0']:.1f}, "
        f"explained variance {decimals(found['explained_variance'])}"
    )


def evaluation_lines(found: "Evaluation") -> Iterator[str]:
    """The page of `cyto sae eval`."""
    window = f"{found.dead_fraction_window:.1%} over the last {found.dead_window_tokens:,} tokens"
    coherence, substitution = found.coherence, found.substitution
    rows = {
        "images": f"{found.n_images:,} readable, {found.n_unreadable:,} not (left out); "
        f"{found.n_tokens:,} tokens (token set {found.token_set})",
        "trained on": found.trained_on_line,
        "MSE": f"{found.mse:.4g} as trained (loss {found.loss}), {found.mse_plain:.4g} plain",
        "explained": f"{_known(found.explained_variance)} of the variance about the mean token, "
        f"{_known(found.explained_variance_uncentered)} uncentred",
        "PCA": f"{_known(found.pca_explained_variance)} of the variance by the first {found.n_pca:,} principal "
        "components of these tokens, as many as L0",
        "L0": f"{found.l0:.1f} per token; percentiles {_percentiles(found.l0_percentiles)}",
        "per image": f"{found.latents_per_image:.1f} different latents; "
        f"percentiles {_percentiles(found.latents_per_image_percentiles)}",
        "dead": f"{found.dead_fraction_whole:.1%} of {found.n_latents:,} latents over all tokens, {window}",
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
    untrained = "" if found.trained_backbone else " (UNTRAINED backbone)"
    yield f"{found.sae} on {found.store}{untrained}"
    for name, value in rows.items():
        yield f"  {name:<10} {value}"
    histogram = found.histogram
    yield f"  {'frequency':<10} latents by the share of images, and of tokens, in which they are active"
    yield f"  {'':<10} {'never':<16} {histogram.n_never:>9,} {histogram.n_never:>9,}"
    for low, by_image, by_token in zip(histogram.edges, histogram.images, histogram.tokens, strict=False):
        if by_image or by_token:
            yield f"  {'':<10} {f'10^{low:g} to 10^{low + 0.5:g}':<16} {by_image:>9,} {by_token:>9,}"
    yield from found.health.lines()


def _known(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}f}" if value == value else "n/a"  # NaN: not defined


def _percentiles(values: dict[int, Any]) -> str:
    """`5: 3, 50: 12, 95: 40, 100: 80`: a selection of the percentiles, on one line."""
    shown = {p: values[p] for p in (5, 50, 95, 100) if p in values}
    return ", ".join(f"{p}: {v:,}" if isinstance(v, int) else f"{p}: {v:.3f}" for p, v in shown.items()) or "n/a"
