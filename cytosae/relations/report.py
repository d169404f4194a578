"""What cyto concept stability, neighbours and patient have found, as facts and in words."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stores.notebook import figure_html, table_html
from stores.wording import Report, counted, decimals, printable

_MOST_PAIRS, _LEAST_PAIRS = 6, 3  # pairs of SAEs from which on they are summed up; and how many are still named


@dataclass(frozen=True, kw_only=True)
class StabilityResult(Report):
    """How far SAEs agree: one dict per pair of SAEs, as in pairs.parquet."""

    out: Path  # the folder
    saes: tuple[Path, ...]  # as they were given; `sae_a` and `sae_b` of a pair are places in this list
    pairs: list[dict[str, Any]]
    n_without_direction: list[int]  # per SAE: latents whose decoder row is zero
    was_complete: bool
    warnings: tuple[str, ...] = ()  # pairs that may agree because they began alike; a threshold of another SAE

    def lines(self) -> Iterator[str]:
        """What was left out, a line for each pair of SAEs, and what the folder holds."""
        for sae, n_without in zip(self.saes, self.n_without_direction, strict=True):
            if n_without:
                left_out = counted(n_without, "latent")
                yield f"{sae}: {left_out} left out: without a direction, the decoder row is zero"
        shown = sorted(self.pairs, key=lambda pair: pair["share_above_null_p99"])
        if len(shown) > _MOST_PAIRS:
            yield _pairs_text(shown)
            yield f"the {_LEAST_PAIRS} that agree least, all others in pairs.parquet:"
            shown = shown[:_LEAST_PAIRS]
        else:
            shown = self.pairs
        for pair in shown:
            yield f"{self.saes[pair['sae_a']]} and {self.saes[pair['sae_b']]}: {_matching_text(pair)}"
        yield f"{self.out}: matches, stability of each latent, pairs, figure"

    def _repr_html_(self) -> str:
        return super()._repr_html_() + figure_html(self.out / "stability.png")


@dataclass(frozen=True, kw_only=True, eq=False)
class Neighbours(Report):
    """The neighbours of some latents of one SAE."""

    latents: npt.NDArray[np.int64]  # whose neighbours: their numbers, rising
    table: pa.Table  # a row per latent and neighbour, with the columns of neighbours.parquet (docs/formats.md)
    n_tokens: int | None = None  # tokens that were looked at; None: without latent stores
    n_images: int | None = None  # readable images that were looked at; None: without latent stores

    @property
    def n_latents(self) -> int:
        """Latents whose neighbours were asked for."""
        return len(self.latents)

    def lines(self) -> Iterator[str]:
        """For each latent its neighbours by direction, then those by activity, nearest first."""
        rows: dict[int, list[dict[str, Any]]] = {int(latent): [] for latent in self.latents}
        for row in self.table.to_pylist():
            rows[row["latent"]].append(row)
        for latent, of_latent in rows.items():
            yield from _neighbour_lines(latent, of_latent)

    def _repr_html_(self) -> str:
        columns = ("latent", "by", "rank", "neighbour", "cosine", "phi", "lift", "n_tokens_both", "n_images_both")
        shown = self.table.slice(0, 50).to_pylist()
        rest = f"<p>{self.table.num_rows - 50:,} more rows</p>" if self.table.num_rows > 50 else ""
        return table_html(shown, columns, most=50) + rest


@dataclass(frozen=True, kw_only=True)
class NeighboursResult(Report):
    """What was written: the folder, and the summary of its header."""

    out: Path  # the folder
    summary: dict[str, Any]  # n_latents, n_tokens, n_images, n_without_direction, and the checksums of the files
    was_complete: bool

    @property
    def n_latents(self) -> int:
        """Latents whose neighbours were asked for."""
        return int(self.summary["n_latents"])

    @property
    def n_tokens(self) -> int | None:
        """Tokens that were looked at; None: without latent stores."""
        found: int | None = self.summary["n_tokens"]
        return found

    @property
    def n_images(self) -> int | None:
        """Readable images that were looked at; None: without latent stores."""
        found: int | None = self.summary["n_images"]
        return found

    @property
    def n_without_direction(self) -> int:
        """Latents of the SAE whose decoder row is zero."""
        return int(self.summary["n_without_direction"])

    def lines(self) -> Iterator[str]:
        """Of how many latents, by what, and how many have no direction."""
        by = "" if self.n_tokens is None else f" and activity at {self.n_tokens:,} tokens of {self.n_images:,} images"
        yield f"{self.out}: neighbours of {self.n_latents:,} latents by direction{by}"
        if self.n_without_direction:
            yield f"{counted(self.n_without_direction, 'latent')} without a direction: the decoder row is zero"


@dataclass(frozen=True, kw_only=True)
class PatientResult(Report):
    """What sets one patient, or each patient, apart from the others of the same disease and dataset."""

    out: Path  # the folder
    patient: str | None  # None: all patients
    patients: list[dict[str, Any]]  # rows of patients.parquet; `skipped`: the reason in words, or None
    top: list[dict[str, Any]]  # of a single patient the ten latents of largest |z|: rows of patient_concepts.parquet
    was_complete: bool

    def lines(self) -> Iterator[str]:
        """A line for each patient, and for a single one its latents of largest |z|."""
        yield from map(_patient_text, self.patients)
        yield from map(_patient_latent_text, self.top)
        usual = "; what is usual among patients: --all" if self.patient is not None else ""
        yield f"{self.out}: a description without p- or q-values, which so few patients cannot support{usual}"

    def _repr_html_(self) -> str:
        figure = "patients.png" if self.patient is None else "patient_concepts.png"
        columns = ("latent", "z", "barcode", "others_mean", "n_images_active", "n_others_beyond", "replicated")
        return super()._repr_html_() + table_html(self.top, columns) + figure_html(self.out / figure)


def _matching_text(pair: dict[str, Any]) -> str:
    """What was matched, beside chance; a share of 100% is said once, by the highest threshold that all exceed."""
    n = min(pair["n_latents_a"], pair["n_latents_b"])
    matched = f"all {n:,}" if pair["n_matched"] == n else f"{pair['n_matched']:,} of {n:,}"
    proof = "" if pair["is_optimal"] else f" (the best sum is larger by at most {pair['gap']:.3g})"
    above = {
        **{f"{threshold}": (threshold, pair[f"share_above_{threshold}"]) for threshold in (0.7, 0.9)},
        "99% of those by chance": (pair["null_p99"], pair["share_above_null_p99"]),
    }
    least = max((threshold for threshold, share in above.values() if share == 1), default=-1.0)
    shares = [
        f"{'all' if share == 1 else f'{share:.1%}'} above {what}"
        for what, (threshold, share) in above.items()
        if threshold >= least
    ]
    return (
        f"{matched} latents matched{proof}, mean cosine {pair['mean_cosine']:.3f} (by chance "
        f"{pair['null_mean_cosine']:.3f}, 99% of them up to {pair['null_p99']:.3f}, {pair['chance']}), "
        f"{', '.join(shares)}"
    )


def _pairs_text(pairs: list[dict[str, Any]]) -> str:
    """Many pairs in one line: least, median and most."""

    def spread(name: str, form: str) -> str:
        low, middle, high = np.quantile([pair[name] for pair in pairs], [0, 0.5, 1])
        return f"{middle:{form}} ({low:{form}} to {high:{form}})"

    return (
        f"{len(pairs):,} pairs of SAEs, median (least to most): mean cosine {spread('mean_cosine', '.3f')}, by chance "
        f"{spread('null_mean_cosine', '.3f')}; {spread('share_above_null_p99', '.1%')} of the latents above 99% of "
        f"those by chance"
    )


def _neighbour_lines(latent: int, rows: list[dict[str, Any]]) -> Iterator[str]:
    """The neighbours of one latent: by direction, then by activity."""
    n_tokens = next((row["n_tokens"] for row in rows if row["n_tokens"] is not None), None)
    yield f"latent {latent}" + ("" if n_tokens is None else f", active at {counted(n_tokens, 'token')}")
    for by, title in (("direction", "nearest direction"), ("tokens", "active at the same tokens")):
        some = [row for row in rows if row["by"] == by]
        if by == "direction" or n_tokens is not None:
            yield f"  {title}: {'' if some else 'none'}".rstrip()
        for row in some:
            together = ""
            if row["n_tokens_both"] is not None:
                together = (
                    f"  phi {decimals(row['phi'])}  lift {row['lift'] or 0:.1f}  together at "
                    f"{counted(row['n_tokens_both'], 'token')} of {counted(row['n_images_both'], 'image')}"
                )
            yield f"    {row['rank']:>3}  latent {row['neighbour']:<6}  cosine {decimals(row['cosine'])}{together}"


def _patient_text(row: dict[str, Any]) -> str:
    name = printable(row["patient"])
    if row["skipped"]:
        return f"{name}: left out ({printable(row['skipped'])})"
    usual = "no other patient could be counted"
    if row["n_others_counted"]:
        usual = (
            f"of the other patients, {row['n_others_counted']:,} counted in the same way, each has "
            f"{row['others_least']:,} to {row['others_most']:,}, median {row['others_median']:g}"
        )
    return (
        f"{name}: {counted(row['n_images'], 'image')} against {row['n_others']:,} others with "
        f"{printable(row['disease'])}; "
        f"{counted(row['n_raised'], 'latent')} raised and {row['n_lowered']:,} lowered (|z| of 3 or more in all "
        f"images and in both halves, no other as far) of {row['n_latents']:,} looked at; {usual}; halves correlate "
        f"{decimals(row['halves_correlation'])}"
    )


def _patient_latent_text(row: dict[str, Any]) -> str:
    return (
        f"  latent {row['latent']:<6} z {row['z']:>7.1f}  {row['barcode']:.3g} against {row['others_mean']:.3g} "
        f"tokens per image, in {counted(row['n_images_active'], 'image')}; {row['n_others_beyond']:,} others as far; "
        f"|z| of 3 in both halves in {row['replicated']:.0%} of the splits"
    )
