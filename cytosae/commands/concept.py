"""cyto concept stats, top, thresholds and select: what a latent answers to."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cytosae.commands.shared import dask_client, dask_options
from stores.console import (
    COUNT,
    FILE,
    SEED,
    STORE,
    TOKEN_SETS,
    json_option,
    overwrite_option,
    print_page,
    progress_line,
    say_done,
    tell,
)
from stores.wording import counted, decimals, printable

if TYPE_CHECKING:
    from cytosae.concepts import Selection, SelectionConfig


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
    help="Of the labels, for the entropy that chance would give.",
)
@click.option(
    "--patient-shuffles",
    type=click.IntRange(min=0),
    default=999,
    show_default=True,
    help="Of the labels from patient to patient, for the p of an entropy.",
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
    answer to the same cell type in different datasets.

    \b
    Example: cyto concept stats cells.latents.zarr -o cells.concepts
    """
    from cytosae.concepts import ConceptConfig, write_concepts

    config = ConceptConfig(**settings)
    with dask_client(scheduler, workers, memory_limit) as client, progress_line("concepts", "image") as progress:
        done = write_concepts(
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
    from stores import ConceptStore

    store = ConceptStore(concepts)
    top = store.top_images(latent, dataset).to_pylist()
    names = [dataset] if dataset else store.datasets
    pages = [
        {
            **store.latents(name).slice(latent, 1).to_pylist()[0],
            "top_images": [row for row in top if row["dataset"] == name],
        }
        for name in names
    ]
    if as_json:
        click.echo(json.dumps({"concepts": str(concepts), "latent": latent, "by_dataset": pages}, indent=1))
        return
    for page in pages:
        _print_latent(page)


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
    from cytosae.concepts import LOG10_THRESHOLDS, compare_thresholds

    found, was_complete = compare_thresholds(concepts, out, dataset=dataset, overwrite=overwrite)
    say_done(out, was_complete)
    if as_json:
        rows = [vars(each) for each in found]
        click.echo(json.dumps({"log10_thresholds": LOG10_THRESHOLDS, "counts": rows}, indent=1))
        return
    names = [f"{printable(each.concepts)} {printable(each.dataset)}" for each in found]
    width = max(map(len, names))
    click.echo(f"latents with a mean activation above 10 to the\n{'':<{width}} " + _cells(LOG10_THRESHOLDS))
    for name, each in zip(names, found, strict=True):
        click.echo(f"{name:<{width}} " + _cells(f"{n:,}" for n in each.n_above))
    click.echo(f"table and figures in {out}")


@click.command("select")
@click.argument("concepts", type=FILE)
@click.option("--dataset", help="Whose statistics decide  [default: the only one].")
@click.option("--threshold", default=1e-3, show_default=True, help="Least mean activation of a latent that takes part.")
@click.option("--clusters", type=COUNT, default=10, show_default=True, help="Clusters of KMeans.")
@click.option("--per-cluster", type=COUNT, default=5, show_default=True, help="Latents drawn from each.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of clusters and draws.")
@click.option("--as-released", is_flag=True, help="Cluster mean activation and frequency as they are, without log10.")
@overwrite_option
@json_option
def concept_select(concepts: Path, dataset: str | None, overwrite: bool, as_json: bool, **settings: Any) -> None:
    """Draw latents for an expert to look at: KMeans on log10 mean activation and log10 frequency, some of each cluster.

    Writes selection.parquet into CONCEPTS, which cyto concept sheet --selected draws.

    \b
    Example: cyto concept select cells.concepts --seed 0
    """
    from cytosae.concepts import FILE, SelectionConfig, select_latents
    from stores import ConceptStore

    store = ConceptStore(concepts)
    config = SelectionConfig(dataset=store.choose_dataset(dataset), **settings)
    found = select_latents(store, config, overwrite=overwrite)
    say_done(concepts / FILE, found.was_complete)
    if found.warning:
        click.echo(f"warning: {found.warning}", err=True)
    if as_json:
        click.echo(json.dumps({"concepts": str(concepts), "latents": found.table.to_pylist()}, indent=1))
    else:
        _print_selection(concepts / FILE, config, found)


def _print_selection(path: Path, config: "SelectionConfig", found: "Selection") -> None:
    click.echo(
        f"{path}: {len(found.latents):,} of {found.n_candidates:,} latents of {config.dataset} with a mean "
        f"activation of at least {config.threshold:g}, from {len(found.cluster_sizes)} clusters (seed {config.seed})"
    )
    if len(found.cluster_sizes) < config.clusters:
        click.echo(f"fewer clusters than {config.clusters}: the latents have only so many different values")
    small = [size for size in found.cluster_sizes if size < config.per_cluster]
    if small:
        click.echo(
            f"all latents taken of {len(small)} clusters with fewer than {config.per_cluster} "
            f"({', '.join(map(str, small))})"
        )
    clusters = found.table["cluster"].to_pylist()
    for cluster, size in enumerate(found.cluster_sizes):
        drawn = [str(latent) for latent, of in zip(found.latents, clusters, strict=True) if of == cluster]
        click.echo(f"  cluster {cluster} ({counted(size, 'latent')}): {', '.join(drawn)}")


def _print_latent(page: dict[str, Any]) -> None:
    """One latent in one dataset."""
    rows = {
        "frequency": f"{page['frequency']:.3g} ({counted(page['n_images'], 'image')})",
        "activation": f"mean {page['mean_activation']:.3g} where active, largest token {page['max_activation']:.3g}",
        "entropy": f"{decimals(page['label_entropy'])} (shuffled {decimals(page['label_entropy_null'])})",
        "label": f"{printable(page['top_label'] or 'n/a')} ({page['n_labelled']:,} top images with a label)",
    }
    print_page(f"latent {page['latent']:,} in {printable(page['dataset'])}", rows)
    for image in page["top_images"]:
        label = printable(image["label"] or image["label_common"] or "")
        click.echo(f"  {image['rank']:>3}  {image['value']:<10.4g} {printable(image['image_id'])}  {label}".rstrip())


def _cells(values: Iterable[Any]) -> str:
    return "".join(f"{value:>9}" for value in values)
