"""cyto concept sheet, map and masks: where in the cell."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cytosae.commands.shared import map_options, require_roots
from stores.console import (
    COUNT,
    FILE,
    SEED,
    assume_option,
    device_option,
    json_option,
    overwrite_option,
    progress_line,
    say_done,
    tell,
    typed_options,
)

if TYPE_CHECKING:
    from .shared import Bridges


@click.command("sheet")
@click.argument("concepts", type=FILE)
@click.argument("stores", metavar="LATENTS...", type=FILE, nargs=-1, required=True)
@click.option("-o", "--out", type=FILE, required=True, help="Folder of the figures.")
@click.option("--latent", "latents", type=int, multiple=True, help="A latent to draw; repeat it for several.")
@click.option("--selected", is_flag=True, help="Draw those of cyto concept select.")
@click.option("--dataset", "datasets", multiple=True, help="Datasets to show  [default: all]; repeat it for several.")
@map_options
@overwrite_option
@click.pass_obj
def concept_sheet(
    bridges: "Bridges",
    concepts: Path,
    stores: tuple[Path, ...],
    out: Path,
    latents: tuple[int, ...],
    selected: bool,
    overwrite: bool,
    datasets: tuple[str, ...],
    roots: tuple[Path, ...],
    n_images: int,
    nearest: bool,
    released: bool,
) -> None:
    """A figure per latent: its top images of each dataset, with maps of where it is active.

    LATENTS are the stores that CONCEPTS was made from.

    \b
    Example: cyto concept sheet cells.concepts cells.latents.zarr -o cells.sheets --latent 17 --latent 210
    """
    from cytosae.maps import Style, write_sheets

    require_roots(stores, roots)
    with progress_line("sheet", "latent") as progress:
        done = write_sheets(
            concepts,
            stores,
            out,
            latents=latents,
            selected=selected,
            datasets=datasets,
            n_images=n_images,
            style=Style(is_smooth=not nearest, is_released=released),
            stage_one=bridges.stage_one,
            roots=roots,
            overwrite=overwrite,
            progress=progress,
        )
    say_done(out, done.was_complete)
    tell(done)


@click.command("map")
@click.argument("stores", metavar="LATENTS...", type=FILE, nargs=-1, required=True)
@click.option("-o", "--out", type=FILE, required=True, help="Folder of figures and tables.")
@click.option("--image", "image_id", help="The image_id of an image of LATENTS.")
@click.option("--file", type=FILE, help="Or a new image file, with --sae and the backbone that LATENTS were made with.")
@click.option("--sae", "run", type=FILE, help="With --file: the SAE that LATENTS were made with.")
@click.option("--weights", help="With --file: the weights of the backbone; an untrained one needs none.")
@click.option("--latent", "latents", type=int, multiple=True, help="A latent to draw; repeat it for several.")
@click.option("--patch", type=int, help="Or a patch, 0 to 255 row by row: maps of its most active latents.")
@click.option(
    "--concepts", "concepts", type=FILE, help="Folder of cyto concept stats, for reference images; needed with --patch."
)
@click.option("--top", "n_top", type=COUNT, default=2, show_default=True, help="With --patch: latents to draw.")
@click.option(
    "--dataset", help="With --patch: dataset of the statistics for --shared and --noisy  [default: the image's]."
)
@click.option(
    "--shared",
    default=1.0,
    show_default=True,
    help="With --patch: leave out latents of this frequency or more; 1: active in every readable image, above 1: none.",
)
@click.option(
    "--noisy",
    default=0.1,
    show_default=True,
    help="With --patch: leave out latents with a mean activation above this; 0.1 was chosen for the released SAE.",
)
@map_options
@assume_option
@device_option
@overwrite_option
@click.pass_obj
def concept_map(
    bridges: "Bridges",
    stores: tuple[Path, ...],
    out: Path,
    image_id: str | None,
    file: Path | None,
    run: Path | None,
    weights: str | None,
    latents: tuple[int, ...],
    patch: int | None,
    concepts: Path | None,
    dataset: str | None,
    roots: tuple[Path, ...],
    n_images: int,
    nearest: bool,
    released: bool,
    assume_compatible: bool,
    device: str,
    overwrite: bool,
    **chosen: Any,
) -> None:
    """Where in an image latents are active: maps of given latents, or of the most active latents of a patch.

    With --patch: its active latents without shared and noisy ones, the largest values first. With --concepts, also the
    reference images of each latent, from all datasets.

    \b
    Example: cyto concept map cells.latents.zarr -o map --image cells/a.png --patch 57 --concepts cells.concepts
    """
    from cytosae.maps import PatchQuery, Style, write_maps

    if (patch is None) == (not latents):
        raise click.UsageError("give --latent (it may repeat), or --patch for its most active latents")
    if patch is None and (given := typed_options("n_top", "dataset", "shared", "noisy")):
        raise click.UsageError(f"{', '.join(given)}: only with --patch; --latent draws the latents that it names")
    if patch is not None and concepts is None:
        raise click.UsageError("--patch needs --concepts, whose statistics say which latents are shared or noisy")
    if (image_id is None) != (file is not None and run is not None) or (file is None) != (run is None):
        raise click.UsageError("give --image; or --file and --sae, for an image that is in no store")
    if file is None and weights is not None:
        raise click.UsageError("--weights is of use only with --file, which no backbone has seen")
    require_roots(stores, roots)
    query = PatchQuery(patch=patch, dataset=dataset, **chosen) if patch is not None else None
    with progress_line("download", "byte") as progress:
        done = write_maps(
            stores,
            out,
            image_id=image_id,
            file=file,
            sae=run,
            weights=weights,
            latents=latents,
            query=query,
            concepts=concepts,
            n_images=n_images,
            style=Style(is_smooth=not nearest, is_released=released),
            stage_one=bridges.stage_one,
            roots=roots,
            assume_compatible=assume_compatible,
            device=device,
            overwrite=overwrite,
            progress=progress,
        )
    say_done(out, done.was_complete)
    tell(done)


@click.command("masks")
@click.argument("latents", type=FILE)
@click.argument("masks", type=FILE)
@click.option("-o", "--out", type=FILE, required=True, help="Folder of the table and the figure.")
@click.option("--root", type=FILE, help="What paths in a table of masks are relative to [default: the table's folder].")
@click.option(
    "--classes",
    metavar="VALUE=NAME,...|any",
    help="Which values of the masks count, and their names, such as 1=cytoplasm,2=nucleus or #ff0000=nucleus; one name "
    "for two values joins them; any: all values above 0 are one class  [default: one class per value].",
)
@click.option(
    "--min-share", default=0.5, show_default=True, help="A patch is of a class that covers this share of it or more."
)
@click.option(
    "--shuffles",
    "n_shuffles",
    type=click.IntRange(min=0),
    default=200,
    show_default=True,
    help="Number of random exchanges of masks between patients, of shifts, and of sign flips; 0: no p-values.",
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of the shuffles and of the two halves.")
@overwrite_option
@json_option
@click.pass_obj
def concept_masks(
    bridges: "Bridges",
    latents: Path,
    masks: Path,
    out: Path,
    as_json: bool,
    **settings: Any,
) -> None:
    """How well the map of each latent agrees with segmentation masks: AUROC within images, IoU, and p-values.

    MASKS is a .csv or .parquet table with the columns image_id and mask (a path), or a folder or archive of files named
    like the images. PNG, TIFF or BMP of any size, read by value: 0 is background, every other value a class. The
    shuffles know the patients.

    \b
    Example: cyto concept masks cells.latents.zarr nuclei/ -o cells.nuclei
    """
    from cytosae.maps import write_mask_agreement

    with progress_line("read", "mask") as reading, progress_line("masks", "step") as progress:
        done = write_mask_agreement(
            latents,
            masks,
            out,
            stage_one=bridges.stage_one,
            reading_progress=reading,
            progress=progress,
            **settings,
        )
    say_done(out, done.was_complete)
    if as_json:
        click.echo(json.dumps(done.to_json(), indent=1))
    else:
        tell(done)
