"""A finished training in words: what commands print and notebooks show."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stores.spec import Header
from stores.wording import Report, decimals, percent, printable

from .health import Health


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
