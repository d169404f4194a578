"""cyto barcode: latents to barcodes of images, patients and diseases."""

from pathlib import Path
from typing import Any, ClassVar

import click

from cytosae.commands.shared import CommandWithCommands, dask_client, dask_options
from stores.console import FILE, SEED, STORE, TOKEN_SETS, overwrite_option, progress_line, say_done, tell


@click.command("export")
@click.argument("barcodes", type=FILE)
@click.option("--h5ad", "out", type=FILE, required=True, help="The file to write, .h5ad.")
@click.option(
    "--level",
    type=click.Choice(["image", "patient", "disease"]),
    default="image",
    show_default=True,
    help="Level of the barcodes.",
)
@click.option("--tau", type=float, help="Which barcodes, if BARCODES holds several.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of the two maps.")
@overwrite_option
def barcode_export(barcodes: Path, out: Path, level: str, tau: float | None, seed: int, overwrite: bool) -> None:
    """BARCODES as one .h5ad file for cellxgene and the like: texts as categories, X_pca, and X_umap (with umap-learn).

    \b
    Example: cyto barcode export cells.barcodes --h5ad cells.h5ad
    """
    from cytosae.barcodes import export_h5ad

    tell(export_h5ad(barcodes, out, level=level, tau=tau, seed=seed, overwrite=overwrite))


class _Tau(click.ParamType):
    """A number, or auto."""

    name = "float|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | str:
        return "auto" if value == "auto" else click.FLOAT.convert(value, param, ctx)


class _Barcode(CommandWithCommands):
    commands: ClassVar[dict[str, click.Command]] = {"export": barcode_export}


@click.command(cls=_Barcode)
@click.argument("latents", type=STORE, nargs=-1, required=True)
@click.option(
    "-o",
    "--out",
    "barcodes",
    type=FILE,
    required=True,
    help="Folder of the barcodes; with --scheduler on a file system that all workers share.",
)
@click.option(
    "--tau",
    "taus",
    type=_Tau(),
    multiple=True,
    default=(0.2,),
    help="A latent is active above this value (strictly)  [default: 0.2]. Repeat it for several in one pass: each gets "
    "its own stores, image_tau0.2.zarr and so on. auto: a value that follows from the latents, not from labels; it is "
    "written into the barcodes with its rule.",
)
@click.option("--token-set", type=TOKEN_SETS, default="all", show_default=True, help="Tokens that count.")
@click.option(
    "--normalize",
    type=click.Choice(["images", "cytosae-release"]),
    default="images",
    show_default=True,
    help="images: mean over a patient's readable images; cytosae-release: the released divisor.",
)
@click.option(
    "--table",
    type=FILE,
    help="CSV or Parquet with image_id and patient, disease, label, ...: groups by these instead.",
)
@dask_options
@overwrite_option
def barcode(
    latents: tuple[Path | str, ...],
    barcodes: Path,
    taus: tuple[float | str, ...],
    table: Path | None,
    scheduler: str | None,
    workers: int,
    memory_limit: str,
    overwrite: bool,
    **settings: Any,
) -> None:
    """Image, patient and disease barcodes from the stored latents (paths or URLs) of one or more datasets.

    Patients of two datasets are two people, even if they have the same name. `cyto barcode export` writes barcodes as
    one .h5ad file.

    \b
    Example: cyto barcode cells.latents.zarr -o cells.barcodes --tau 0.2
    """
    from cytosae.barcodes import BarcodeConfig, write_barcodes

    if "auto" in taus and len(taus) > 1:
        raise click.UsageError("--tau auto is one tau: give it alone, or numbers")
    numbers = tuple(tau for tau in taus if not isinstance(tau, str))
    config = BarcodeConfig(tau=(numbers if len(numbers) > 1 else numbers[0]) if numbers else "auto", **settings)
    with dask_client(scheduler, workers, memory_limit) as client, progress_line("barcode", "image") as progress:
        done = write_barcodes(
            latents, barcodes, config, client=client, table=table, overwrite=overwrite, progress=progress
        )
    say_done(barcodes, done.was_complete)
    tell(done)
