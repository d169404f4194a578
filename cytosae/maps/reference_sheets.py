"""Reference sheets: a figure per latent, its top images from each dataset, with the patches that carry it (Fig. 2B)."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa

from stores.concept_store import ConceptStore
from stores.errors import BadInput
from stores.progress import Progress
from stores.result_folder import ResultStore, begin_results
from stores.spec import SHEETS

from .figures import Style, plot_rows
from .reference_images import FrameRow, Sources, reference_rows, require_same_sae, unseen

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
class SheetResult:
    """What was drawn."""

    n_latents: int
    n_images: int  # shown or not
    unseen: list[str]  # images that could not be shown, and why
    was_complete: bool = False


def write_sheets(
    concepts: ConceptStore,
    sources: Sources,
    out: Path,
    *,
    latents: Sequence[int],
    datasets: Sequence[str] = (),
    n_images: int = 6,
    style: Style,
    overwrite: bool = False,
    inputs: Sequence[Path] = (),
    progress: Progress = lambda done, total, state: None,
) -> SheetResult:
    """Write `latent<N>.png` and .svg for each latent, and `images.parquet`: which image is active where.

    Parameters
    ----------
    latents : each is drawn once
    datasets : rows of a figure; none: all datasets of `concepts`
    n_images : at most so many of each dataset
    progress : latents done, latents in all

    Raises
    ------
    BadInput
        If no latent is given, there is no such latent or dataset, or an image is in none of the stores.
    SpecMismatch
        If the concepts are of another SAE, or `out` holds something else.
    """
    require_same_sae(concepts, sources)
    latents, datasets = list(dict.fromkeys(latents)), list(dict.fromkeys(datasets)) or concepts.datasets
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
    writer = begin_results(out, SHEETS, spec, overwrite=overwrite, inputs=inputs, packages=("numpy", "matplotlib"))
    writer.watch(concepts.header, *sources.headers)
    if writer.is_complete:
        return ResultStore(out, SHEETS).result(SheetResult, was_complete=True)

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
    result = SheetResult(n_latents=len(latents), n_images=len(table), unseen=list(dict.fromkeys(not_shown)))
    kept = {name: value for name, value in asdict(result).items() if name != "was_complete"}
    writer.finish({"result": kept})
    return result


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
