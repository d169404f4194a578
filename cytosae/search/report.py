"""What a search and its evaluation have found, as facts and in words."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stores.notebook import figure_html, table_html
from stores.wording import Report, cell, counted, printable

_SHOWN = ("by", "rank", "image_id", "similarity", "label", "patient", "dataset", "latents")
_WORDS = {
    "fingerprint": "by fingerprint (most active latents)",
    "barcode": "by whole barcode",
    "region": "by the region: share of it that is found at some patch",
    "tokens": "by the backbone's mean patch token, without the SAE",
    "cls": "by the backbone's CLS token, without the SAE",
}


@dataclass(frozen=True, kw_only=True)
class SearchResult(Report):
    """The images and patients most like one image: rows of images.parquet and patients.parquet."""

    out: Path | None  # the folder; None: nothing was written
    name: str  # of the image that was looked for
    ways: tuple[str, ...]  # by which images were compared
    n_images: int  # readable images that it was compared with
    n_copies: int  # images with the same bytes, which are not listed
    latents: list[dict[str, Any]]  # the query's own: rank, latent, value, weight, weighted
    images: list[dict[str, Any]]
    patients: list[dict[str, Any]]
    was_complete: bool = False

    @property
    def notes(self) -> tuple[str, ...]:
        """Copies of the image."""
        return (f"{counted(self.n_copies, 'image')} with the same bytes left out",) if self.n_copies else ()

    def lines(self) -> Iterator[str]:
        """The latents of the query, then for each way the images and the first patients."""
        shown = ", ".join(str(row["latent"]) for row in self.latents[:10])
        yield (
            f"{printable(self.name)} among {counted(self.n_images, 'image')}; its latents, rarest and strongest first: "
            f"{shown}"
        )
        for way in self.ways:
            yield _WORDS[way]
            for row in self.images:
                if row["by"] == way:
                    yield _image_line(row)
            yield "  patients, by the mean over all their images"
            for row in [row for row in self.patients if row["by"] == way][:5]:
                yield _patient_line(row)
        if self.out is not None:
            yield f"{self.out}: images, patients and latents.parquet"

    def to_json(self) -> dict[str, Any]:
        """All rows, in plain values: what `--json` prints."""
        return {"image": self.name, "latents": self.latents, "images": self.images, "patients": self.patients}

    def _repr_html_(self) -> str:
        return table_html(self.images, _SHOWN, most=len(self.images)) + table_html(self.patients)


@dataclass(frozen=True, kw_only=True)
class SearchEvaluation(Report):
    """How often the images that a search lists are of the same type: rows of precision.parquet."""

    out: Path
    n_queries: int
    n_images: int
    rows: list[dict[str, Any]]
    notes: tuple[str, ...] = ()
    was_complete: bool = False

    def lines(self) -> Iterator[str]:
        """A line for each column, scope and way, with the interval and what chance gives."""
        yield (
            f"{counted(self.n_queries, 'image')} looked for among {self.n_images:,}; images of the same patient never "
            f"count"
        )
        seen: set[tuple[str, str]] = set()
        for row in self.rows:
            if (key := (row["column"], row["scope"])) not in seen:
                seen.add(key)
                where = "in other datasets" if row["scope"] == "other datasets" else "of other patients"
                yield (
                    f"share with the same {row['column']} among the nearest images {where} "
                    f"({row['n_queries']:,} queries; by chance {row['chance']:.1%})"
                )
            against = ""
            if row["difference"] is not None:
                limits = f"{cell(row['difference_low'], '+.1%')} to {cell(row['difference_high'], '+.1%')}"
                against = f"; {row['difference']:+.1%} ({limits}) against mean tokens"
            yield (
                f"  {row['by']:<12} at {row['at']:>3}: {row['precision']:.1%} ({cell(row['low'], '.1%')} to "
                f"{cell(row['high'], '.1%')}), mean over types {row['precision_macro']:.1%}{against}"
            )
        yield f"{self.out}: precision and queries.parquet; precision.png, .svg"

    def to_json(self) -> dict[str, Any]:
        """All rows, in plain values: what `--json` prints."""
        return {"evaluation": str(self.out), "n_queries": self.n_queries, "precision": self.rows}

    def _repr_html_(self) -> str:
        return super()._repr_html_() + figure_html(self.out / "precision.png")


def _image_line(row: dict[str, Any]) -> str:
    about = ", ".join(printable(row[name]) for name in ("label", "disease", "patient", "dataset") if row[name])
    why = f"  latents {', '.join(map(str, row['latents'][:5]))}" if row["latents"] else ""
    return f"  {row['rank']:>3}  {row['similarity']:.3f}  {printable(row['image_id'])}  ({about}){why}"


def _patient_line(row: dict[str, Any]) -> str:
    own = ", the image's own" if row["is_own_patient"] else ""
    return (
        f"  {row['rank']:>3}  {row['similarity']:.3f}  {printable(row['patient'])} ({printable(row['dataset'])}"
        f"{', ' + printable(row['disease']) if row['disease'] else ''}, {counted(row['n_images'], 'image')}{own})"
    )
