"""Reference sheets: one figure per latent with its top images of each dataset and their maps (CytoSAE, Fig. 2B)."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from cytosae.concepts import read_selection
from cytosae.stage_one import StageOne
from stores.activation_store import one_or_more
from stores.concept_store import ConceptStore
from stores.errors import BadInput
from stores.notebook import figure_html
from stores.progress import Progress
from stores.result_folder import ResultStore, begin_results
from stores.spec import SHEETS
from stores.wording import Report, counted

from .figures import Style, plot_rows
from .reference_images import (
    FrameRow,
    Places,
    Sources,
    as_concepts,
    as_sources,
    check_n_images,
    reference_rows,
    require_same_sae,
    unseen,
    unseen_warnings,
)

_SHOWN = 3  # sheets that a notebook shows

_COLUMNS = {
    "latent": pa.int64(),
    "dataset": pa.string(),
    "rank": pa.int64(),
    "image_id": pa.string(),
    "n_patches": pa.int64(),  # in which the latent is active
    "patch": pa.int64(),  # the one with the largest value; null if only CLS is active
    "value": pa.float32(),  # there
}


@dataclass(frozen=True, kw_only=True)
class SheetResult(Report):
    """What was drawn."""

    out: Path  # the folder
    latents: tuple[int, ...]  # in the order of the call
    n_latents: int
    n_images: int  # in all sheets, including those that could not be shown
    unseen: list[str]  # images that could not be shown, and why
    was_complete: bool = False

    @property
    def warnings(self) -> tuple[str, ...]:
        """Images that could not be shown."""
        return unseen_warnings(self.unseen, "--root")

    def lines(self) -> Iterator[str]:
        """How many latents and images, and the names of the files."""
        yield (
            f"{self.out}: {counted(self.n_latents, 'latent')}, {counted(self.n_images, 'image')}, "
            f"latent<N>.png and .svg"
        )

    def _repr_html_(self) -> str:
        figures = [figure_html(self.out / f"latent{latent}.png") for latent in self.latents[:_SHOWN]]
        return super()._repr_html_() + "".join(figures)


def write_sheets(
    concepts: ConceptStore | Path | str,
    stores: Sources | Places,
    out: Path | str,
    *,
    latents: Sequence[int] = (),
    selected: bool = False,
    datasets: Sequence[str] = (),
    n_images: int = 6,
    style: Style | None = None,
    stage_one: StageOne | None = None,
    roots: Sequence[Path | str] = (),
    overwrite: bool = False,
    progress: Progress = lambda done, total, state: None,
) -> SheetResult:
    """Write `latent<N>.png` and .svg for each latent, and `images.parquet` with the most active patch of each image.

    Parameters
    ----------
    concepts : a folder of `concept_statistics`
    stores : the latent stores that it was made from, as paths (then with `stage_one`) or opened by `open_sources`
    latents : each is drawn once
    selected : also those of `select_latents`
    datasets : rows of a figure; none: all datasets of `concepts`
    n_images : number of images per dataset, at most
    style : how maps are drawn over images; None: `Style()`
    stage_one : `cytocache.bridge`, which reads the images
    roots : folder of the images of each store; none: as recorded when the caches were made
    progress : latents done, latents in all

    Raises
    ------
    BadInput
        If no latent is given, there is no such latent or dataset, an image is in none of the stores, or `n_images` is
        below 1.
    SpecMismatch
        If the concepts are of another SAE, or `out` holds something else.
    """
    out, concepts, sources = Path(out), as_concepts(concepts), as_sources(stores, stage_one, roots)
    style = style or Style()
    check_n_images(n_images)
    require_same_sae(concepts, sources)
    latents = (*latents, *(read_selection(concepts).latents if selected else ()))
    latents = list(dict.fromkeys(latents))
    datasets = list(dict.fromkeys(map(str, one_or_more(datasets)))) or concepts.datasets
    if not latents:
        raise BadInput("no latent to draw a sheet of; name some with --latent, or draw a sample: cyto concept select")
    for latent in latents:
        concepts.check_latent(latent)
    for dataset in datasets:
        concepts.latents(dataset)
    spec = {
        "concepts": concepts.identity,
        "stores": sources.identities,
        "latents": latents,
        "datasets": datasets,
        "n_images": n_images,
        "style": asdict(style),
    }
    inputs = (concepts.root, *sources.places)
    writer = begin_results(out, SHEETS, spec, overwrite=overwrite, inputs=inputs, packages=("numpy", "matplotlib"))
    writer.watch(concepts.header, *sources.headers)
    if writer.is_complete:
        return ResultStore(out, SHEETS).result(SheetResult, out=out, latents=tuple(latents), was_complete=True)

    table: list[dict[str, object]] = []
    not_shown: list[str] = []
    for n_done, latent in enumerate(latents):
        progress(n_done, len(latents), "")
        rows = reference_rows(concepts, sources, latent, n_images=n_images, datasets=datasets)
        plot_rows(rows, writer.root / f"latent{latent}", title=f"Latent {latent}", style=style)
        table += _describe(latent, rows)
        not_shown += unseen(rows)
    progress(len(latents), len(latents), "")
    writer.write_table("images", pa.Table.from_pylist(table, pa.schema(list(_COLUMNS.items()))))
    found: dict[str, Any] = {
        "n_latents": len(latents),
        "n_images": len(table),
        "unseen": list(dict.fromkeys(not_shown)),
    }
    writer.finish({"result": found})
    return SheetResult(out=out, latents=tuple(latents), **found)


def _describe(latent: int, rows: Sequence[FrameRow]) -> list[dict[str, object]]:
    return [
        {
            "latent": latent,
            "dataset": row.dataset,
            "rank": rank,
            "image_id": frame.image_id,
            "n_patches": int((frame.patches > 0).sum()),
            "patch": int(frame.patches.argmax()) if frame.patches.any() else None,
            "value": float(frame.patches.max()),
        }
        for row in rows
        for rank, frame in enumerate(row.frames, start=1)
    ]
