"""cyto concept stats, top, thresholds and select: what a latent responds to."""

from pathlib import Path
from typing import Any

import click

from cytosae.commands.shared import dask_client, dask_options, tell_or_json
from stores.console import (
    COUNT,
    FILE,
    SEED,
    STORE,
    TOKEN_SETS,
    json_option,
    overwrite_option,
    progress_line,
    say_done,
    tell,
)


@click.command("stats")
@click.argument("latents", type=STORE, nargs=-1, required=True)
@click.option(
    "-o",
    "--out",
    "concepts",
    type=FILE,
    required=True,
    help="Folder of the concepts; with --scheduler on a file system that all workers share.",
)
@click.option("--token-set", type=TOKEN_SETS, default="all", show_default=True, help="Tokens that count.")
@click.option("--top-k", type=COUNT, default=10, show_default=True, help="Images kept of a latent, in each dataset.")
@click.option(
    "--label",
    type=click.Choice(["label", "label_common"]),
    default="label",
    show_default=True,
    help="Column of the image table that entropies are of.",
)
@click.option(
    "--min-support", type=COUNT, default=5, show_default=True, help="Fewest labelled top images that give an entropy."
)
@click.option(
    "--shuffles",
    type=click.IntRange(min=0),
    default=100,
    show_default=True,
    help="Shuffles of the labels, for the entropy expected by chance.",
)
@click.option(
    "--patient-shuffles",
    type=click.IntRange(min=0),
    default=999,
    show_default=True,
    help="Shuffles of the labels from patient to patient, for the p-value of an entropy.",
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of the shuffles.")
@click.option(
    "--table",
    type=FILE,
    help="CSV or Parquet with image_id and dataset, label, label_common: groups by these instead.",
)
@dask_options
@overwrite_option
def concept_stats(
    latents: tuple[Path | str, ...],
    concepts: Path,
    table: Path | None,
    scheduler: str | None,
    workers: int,
    memory_limit: str,
    overwrite: bool,
    **settings: Any,
) -> None:
    """Statistics of every latent in every dataset: frequency, mean activation, top images and their labels.

    LATENTS are the stored latents (paths or URLs) of one SAE. Also draws the paper's Fig. 2A, and says whether latents
    respond to the same cell type in different datasets.

    \b
    Example: cyto concept stats cells.latents.zarr -o cells.concepts
    """
    from cytosae.concepts import ConceptConfig, concept_statistics

    config = ConceptConfig(**settings)
    with dask_client(scheduler, workers, memory_limit) as client, progress_line("concepts", "image") as progress:
        done = concept_statistics(
            latents, concepts, config, client=client, table=table, overwrite=overwrite, progress=progress
        )
    say_done(concepts, done.was_complete)
    tell(done)


@click.command("top")
@click.argument("concepts", type=FILE)
@click.argument("latent", type=click.IntRange(min=0))
@click.option("--dataset", help="Only this dataset  [default: all].")
@json_option
def concept_top(concepts: Path, latent: int, dataset: str | None, as_json: bool) -> None:
    """One latent: its statistics, and the images with the largest activation, in each dataset.

    \b
    Example: cyto concept top cells.concepts 1412
    """
    from cytosae.concepts import top_images

    found = top_images(concepts, latent, dataset=dataset)
    facts = {"concepts": str(concepts), "latent": latent, "by_dataset": found.by_dataset}
    tell_or_json(found, facts, as_json=as_json)


@click.command("thresholds")
@click.argument("concepts", type=FILE, nargs=-1, required=True)
@click.option("-o", "--out", type=FILE, required=True, help="Folder of the table and the figures.")
@click.option("--dataset", help="Only this dataset  [default: all].")
@overwrite_option
@json_option
def concept_thresholds(
    concepts: tuple[Path, ...], out: Path, dataset: str | None, overwrite: bool, as_json: bool
) -> None:
    """How many latents lie above a mean activation, for several SAEs side by side: the paper's Fig. 2A.

    CONCEPTS are folders of cyto concept stats, such as one for each width.

    \b
    Example: cyto concept thresholds narrow.concepts wide.concepts -o widths
    """
    from cytosae.concepts import compare_thresholds

    done = compare_thresholds(concepts, out, dataset=dataset, overwrite=overwrite)
    say_done(out, done.was_complete)
    facts = {"log10_thresholds": done.log10_thresholds, "counts": [vars(each) for each in done.counts]}
    tell_or_json(done, facts, as_json=as_json)


@click.command("select")
@click.argument("concepts", type=FILE)
@click.option("--dataset", help="Dataset whose statistics are used  [default: the only one].")
@click.option(
    "--threshold", default=1e-3, show_default=True, help="Smallest mean activation of a latent that can be drawn."
)
@click.option("--clusters", type=COUNT, default=10, show_default=True, help="Clusters of KMeans.")
@click.option("--per-cluster", type=COUNT, default=5, show_default=True, help="Latents drawn from each.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of KMeans and of the draws.")
@click.option("--as-released", is_flag=True, help="Cluster mean activation and frequency as they are, without log10.")
@overwrite_option
@json_option
def concept_select(concepts: Path, overwrite: bool, as_json: bool, **settings: Any) -> None:
    """Draw latents for an expert to look at: KMeans on log10 mean activation and log10 frequency, some of each cluster.

    Writes selection.parquet into CONCEPTS, which cyto concept sheet --selected draws.

    \b
    Example: cyto concept select cells.concepts --seed 0
    """
    from cytosae.concepts import SelectionConfig, select_latents

    done = select_latents(concepts, SelectionConfig(**settings), overwrite=overwrite)
    say_done(done.out, done.was_complete)
    tell_or_json(done, {"concepts": str(concepts), "latents": done.table.to_pylist()}, as_json=as_json)
