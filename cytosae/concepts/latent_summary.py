"""One latent: its statistics and the images with the largest activation, read from a folder of concepts."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stores.concept_store import ConceptStore
from stores.notebook import table_html
from stores.wording import Report, counted, decimals, printable

_COLUMNS = ("dataset", "rank", "value", "image_id", "label", "label_common")


@dataclass(frozen=True, kw_only=True)
class TopImagesResult(Report):
    """The statistics of one latent, and its images with the largest activation, in each dataset."""

    concepts: Path  # the folder
    latent: int
    by_dataset: list[dict[str, Any]]  # a row of latents.parquet, and "top_images": rows of top_images.parquet

    def lines(self) -> Iterator[str]:
        """The statistics, then an image a line, largest activation first; one dataset below the other."""
        for page in self.by_dataset:
            yield from _latent_lines(page)

    def _repr_html_(self) -> str:
        rows = [row for page in self.by_dataset for row in page["top_images"]]
        return super()._repr_html_() + table_html(rows, _COLUMNS)


def top_images(concepts: ConceptStore | Path | str, latent: int, *, dataset: str | None = None) -> TopImagesResult:
    """The images with the largest activation of one latent, and its statistics.

    Image activation: mean over the tokens of an image. Largest first; of equal images the smaller `image_id` first.
    At most `ConceptConfig.top_k` images of each dataset.

    Parameters
    ----------
    concepts : a folder of `cyto concept stats`, or the folder opened
    dataset : only this one; None: all

    Raises
    ------
    BadInput
        If there is no such latent or dataset.
    DamagedStore
        If a table was changed or lost.
    """
    store = concepts if isinstance(concepts, ConceptStore) else ConceptStore(concepts)
    rows = store.top_images(latent, dataset).to_pylist()
    return TopImagesResult(
        concepts=Path(concepts) if isinstance(concepts, Path | str) else store.root,
        latent=latent,
        by_dataset=[
            {
                **store.latents(name).slice(latent, 1).to_pylist()[0],
                "top_images": [row for row in rows if row["dataset"] == name],
            }
            for name in ([dataset] if dataset else store.datasets)
        ],
    )


def _latent_lines(page: dict[str, Any]) -> Iterator[str]:
    """One latent in one dataset."""
    yield f"latent {page['latent']:,} in {printable(page['dataset'])}"
    rows = {
        "frequency": f"{page['frequency']:.3g} ({counted(page['n_images'], 'image')})",
        "activation": f"mean {page['mean_activation']:.3g} where active, largest token {page['max_activation']:.3g}",
        "entropy": f"{decimals(page['label_entropy'])} (shuffled {decimals(page['label_entropy_null'])})",
        "label": f"{printable(page['top_label'] or 'n/a')} ({page['n_labelled']:,} top images with a label)",
    }
    for name, value in rows.items():
        yield f"  {name:<10} {value}"
    for image in page["top_images"]:
        label = printable(image["label"] or image["label_common"] or "")
        yield f"  {image['rank']:>3}  {image['value']:<10.4g} {printable(image['image_id'])}  {label}".rstrip()
