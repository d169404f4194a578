"""What `cyto concept match` has found, as facts and in words."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stores.notebook import figure_html
from stores.wording import Report, printable


@dataclass(frozen=True, kw_only=True)
class MatchResult(Report):
    """How far two SAEs agree on images; `summary` is that of the header (docs/formats.md)."""

    out: Path
    summary: dict[str, Any]
    was_complete: bool = False

    @property
    def notes(self) -> tuple[str, ...]:
        """Images that were not drawn, and why there may be no cosines."""
        return tuple(self.summary["notes"])

    def lines(self) -> Iterator[str]:
        """What was compared, how many counterparts there are, and those of the differential latents."""
        said = self.summary
        a, b = (printable(name) for name in said["names"])
        yield (
            f"{said['n_images']:,} images in {said['n_strata']:,} strata; {said['n_compared'][0]:,} of "
            f"{said['n_latents'][0]:,} latents of {a} and {said['n_compared'][1]:,} of {said['n_latents'][1]:,} of {b} "
            f"are active in enough of them"
        )
        yield (
            f"{said['n_matched']:,} matched one to one, mean correlation {said['mean_correlation']:.3f} (images "
            f"permuted within strata: {said['null_mean_correlation']:.3f})"
        )
        yield (
            f"counterparts: {said['n_counterparts']:,}, {said['share']:.1%} of the smaller SAE, have a correlation "
            f"above 99% of those by chance ({said['null_p99']:.3f})"
        )
        yield (
            f"q <= 0.05 that a latent answers to the same images as some latent of the other: "
            f"{said['n_q_at_most_0.05'][0]:,} of {a}, {said['n_q_at_most_0.05'][1]:,} of {b}; no p can be below "
            f"{said['p_floor']:.2g}"
        )
        if said["median_cosine"] is not None:
            yield (
                f"decoder rows of matched latents: median cosine {said['median_cosine']:.3f}; the partner is the "
                f"nearest row of all in {said['share_nearest_by_decoder']:.1%}"
            )
        if said["differential"] is not None:
            yield from _differential_lines(said["differential"], b)
        yield f"{self.out}: matches and latents.parquet; match.png, .svg"

    def to_json(self) -> dict[str, Any]:
        """The summary, in plain values: what `--json` prints."""
        return {"match": str(self.out), **self.summary}

    def _repr_html_(self) -> str:
        return super()._repr_html_() + figure_html(self.out / "match.png")


def _differential_lines(said: dict[str, Any], b: str) -> Iterator[str]:
    if not said["n"]:
        yield "no latent differs between the groups of the comparison, so there is none to find again"
        return
    yield (
        f"of {said['n']:,} differential latents {said['n_with_counterpart']:,} ({said['share']:.1%}) have a "
        f"counterpart in {b} (of all compared: {said['share_of_all']:.1%}; {said['n'] - said['n_compared']:,} are "
        f"active in too few of the images)"
    )
    if said["n_replicated"] is not None:
        yield (
            f"  {said['n_same_direction']:,} counterparts differ in the same direction, {said['n_replicated']:,} "
            f"({said['share_replicated']:.1%} of the differential latents) significantly, too"
        )
