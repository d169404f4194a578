"""cyto barcode: latents to barcodes of images, patients and diseases."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cytosae.commands.shared import dask_client, dask_options
from stores.console import FILE, STORE, TOKEN_SETS, overwrite_option, progress_line, say_done, tell

if TYPE_CHECKING:
    pass


@click.command()
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
    type=float,
    multiple=True,
    default=(0.2,),
    help="A latent is active above this value (strictly)  [default: 0.2]. Repeat it for several in one pass: each gets "
    "its own stores, image_tau0.2.zarr and so on.",
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
    taus: tuple[float, ...],
    table: Path | None,
    scheduler: str | None,
    workers: int,
    memory_limit: str,
    overwrite: bool,
    **settings: Any,
) -> None:
    """Image, patient and disease barcodes from the stored latents (paths or URLs) of one or more datasets.

    Patients of two datasets are two people, even if they have the same name.

    \b
    Example: cyto barcode cells.latents.zarr -o cells.barcodes --tau 0.2
    """
    from cytosae.barcodes import BarcodeConfig, write_barcodes

    config = BarcodeConfig(tau=taus if len(taus) > 1 else taus[0], **settings)
    with dask_client(scheduler, workers, memory_limit) as client, progress_line("barcode", "image") as progress:
        done = write_barcodes(
            latents, barcodes, config, client=client, table=table, overwrite=overwrite, progress=progress
        )
    say_done(barcodes, done.was_complete)
    tell(done)
