"""cyto concept sheet, map and masks: where in the cell."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cytosae.commands.shared import map_options, sources_of, warn_of_unseen
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
)
from stores.devices import resolve_device
from stores.wording import counted, left_out_text, printable

if TYPE_CHECKING:
    from cytosae.maps import MapResult, MaskResult, PatchQuery, Sources, Subject
    from cytosae.stage_one import StageOne

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
    """A figure per latent: its top images from each dataset beside each other, with the patches that carry it.

    LATENTS are the stores that CONCEPTS was made from.

    \b
    Example: cyto concept sheet cells.concepts cells.latents.zarr -o cells.sheets --latent 17 --latent 210
    """
    from cytosae.concepts import read_selection
    from cytosae.maps import Style, write_sheets
    from stores import ConceptStore

    store = ConceptStore(concepts)
    with progress_line("sheet", "latent") as progress:
        done = write_sheets(
            store,
            sources_of(bridges.stage_one, stores, roots),
            out,
            latents=(*latents, *(read_selection(store).latents if selected else ())),
            datasets=datasets,
            n_images=n_images,
            style=Style(is_smooth=not nearest, is_released=released),
            overwrite=overwrite,
            inputs=(concepts, *stores, *roots),
            progress=progress,
        )
    say_done(out, done.was_complete)
    click.echo(f"{out}: {counted(done.n_latents, 'latent')}, {counted(done.n_images, 'image')}, latent<N>.png and .svg")
    warn_of_unseen(done.unseen)


@click.command("map")
@click.argument("stores", metavar="LATENTS...", type=FILE, nargs=-1, required=True)
@click.option("-o", "--out", type=FILE, required=True, help="Folder of figures and tables.")
@click.option("--image", "image_id", help="The image_id of an image of LATENTS.")
@click.option("--file", type=FILE, help="Or a new image file, with --sae and the backbone that LATENTS were made with.")
@click.option("--sae", "run", type=FILE, help="With --file: the SAE that LATENTS were made with.")
@click.option("--weights", help="With --file: the weights of the backbone; an untrained one needs none.")
@click.option("--latent", "latents", type=int, multiple=True, help="A latent to draw; repeat it for several.")
@click.option("--patch", type=int, help="Or a patch, 0 to 255 row by row: the latents that speak for it are drawn.")
@click.option("--concepts", "concepts", type=FILE, help="Statistics and reference images; needed with --patch.")
@click.option("--top", "n_top", type=COUNT, default=2, show_default=True, help="With --patch: latents to draw.")
@click.option("--dataset", help="With --patch: whose statistics --shared and --noisy mean  [default: the image's].")
@click.option(
    "--shared",
    default=1.0,
    show_default=True,
    help="With --patch: pass over latents of this frequency or more; 1: active in every readable image, above 1: none.",
)
@click.option(
    "--noisy",
    default=0.1,
    show_default=True,
    help="With --patch: pass over latents whose mean activation is above this; 0.1 is made for the released SAE.",
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
    n_top: int,
    dataset: str | None,
    shared: float,
    noisy: float,
    roots: tuple[Path, ...],
    n_images: int,
    nearest: bool,
    released: bool,
    assume_compatible: bool,
    device: str,
    overwrite: bool,
) -> None:
    """Where in an image latents are active: maps of given latents, or of those that speak for one of its patches.

    With --patch: its active latents without the shared and the noisy ones, the largest values first. With --concepts,
    the reference images of each latent too, from all its datasets.

    \b
    Example: cyto concept map cells.latents.zarr -o map --image cells/a.png --patch 57 --concepts cells.concepts
    """
    from cytosae.maps import PatchQuery, Style, write_maps
    from stores import ConceptStore

    if (patch is None) == (not latents):
        raise click.UsageError("give --latent (it may repeat), or --patch for the latents that speak for it")
    if patch is not None and concepts is None:
        raise click.UsageError("--patch needs --concepts, whose statistics say which latents are shared or noisy")
    sources, store, query = (
        sources_of(bridges.stage_one, stores, roots),
        ConceptStore(concepts) if concepts else None,
        None,
    )
    subject = _subject(
        bridges.stage_one,
        sources,
        image_id,
        file,
        run,
        weights=weights,
        device=device,
        assume_compatible=assume_compatible,
    )
    if patch is not None and store is not None:
        known = dataset or (subject.dataset if subject.dataset in store.datasets else None)
        query = PatchQuery(patch=patch, dataset=store.choose_dataset(known), n_top=n_top, shared=shared, noisy=noisy)
    done = write_maps(
        subject,
        out,
        latents=latents,
        query=query,
        concepts=store,
        sources=sources,
        n_images=n_images,
        style=Style(is_smooth=not nearest, is_released=released),
        overwrite=overwrite,
        inputs=tuple(path for path in (*stores, *roots, concepts, file, run) if path),
    )
    _print_maps(out, subject.name, query, done)
    click.echo(f"{out}: map.png and .svg{', latent<N>.png and .svg' if concepts else ''}")
    warn_of_unseen(done.unseen)


def _print_maps(out: Path, name: str, query: "PatchQuery | None", done: "MapResult") -> None:
    say_done(out, done.was_complete)
    if query is not None:
        click.echo(
            f"patch {query.patch} of {name}: {done.n_active:,} active latents; passed over: {done.n_shared:,} shared "
            f"(frequency of at least {query.shared:g} in {query.dataset}), {done.n_noisy:,} noisy (mean activation "
            f"above {query.noisy:g})"
        )
    for latent, largest in zip(done.latents, done.largest, strict=True):
        click.echo(f"  latent {latent}: largest value {largest:.4g}")


@click.command("masks")
@click.argument("latents", type=FILE)
@click.argument("masks", type=FILE)
@click.option("-o", "--out", type=FILE, required=True, help="Folder of the table and the figure.")
@click.option("--root", type=FILE, help="What paths in a table of masks are relative to [default: the table's folder].")
@click.option(
    "--classes",
    metavar="VALUE=NAME,...|any",
    help="Which values of the masks count, and their names, such as 1=cytoplasm,2=nucleus or #ff0000=nucleus; one name "
    "for two values unites them; any: all above 0 together  [default: each value a class, where that is clear].",
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
    help="Times that patients exchange their masks, and that signs are drawn; 0: no p-values.",
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of the shuffles, and of the two halves.")
@overwrite_option
@json_option
@click.pass_obj
def concept_masks(
    bridges: "Bridges",
    latents: Path,
    masks: Path,
    out: Path,
    root: Path | None,
    classes: str | None,
    overwrite: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """How well the map of each latent agrees with segmentation masks: AUROC within images, IoU, and chance.

    MASKS is a .csv or .parquet table with the columns image_id and mask (a path), or a folder of files named like the
    images. PNG, TIFF or BMP of any size, read by value: 0 is background, every other value a class. The shuffles know
    the patients.

    \b
    Example: cyto concept masks cells.latents.zarr nuclei/ -o cells.nuclei
    """
    from cytosae.maps import patch_side, write_mask_agreement
    from stores import LatentStore

    store = LatentStore(latents)
    with progress_line("read", "mask") as progress:
        side = patch_side(store.spec.tokens_per_image)
        shares, named, left_out = bridges.stage_one.read_masks(
            masks, store, side, root=root, classes=classes, progress=progress
        )
    with progress_line("masks", "step") as progress:
        inputs = tuple(path for path in (latents, masks, root) if path)
        done = write_mask_agreement(
            store,
            shares,
            out,
            classes=named,
            overwrite=overwrite,
            inputs=inputs,
            progress=progress,
            **settings,
        )
    say_done(out, done.was_complete)
    if as_json:
        counts = {what: len(names) for what, names in left_out.items()}
        click.echo(json.dumps({"out": str(out), "left_out": counts, **vars(done)}, indent=1))
    else:
        _print_masks(out, done, left_out, store.spec.n_latents)


def _print_masks(out: Path, done: "MaskResult", left_out: dict[str, list[str]], n_latents: int) -> None:
    from stores.tables import listed

    for what, names in left_out.items():
        if names:
            click.echo(f"left out: {left_out_text(len(names), what)} ({listed([printable(name) for name in names])})")
    n_units, classes = done.n_units or 0, done.classes or []
    who = "" if done.unit == "image" else f" of {counted(n_units, 'unit')} (patients, and images without one)"
    click.echo(
        f"{out}: {counted(done.n_images, 'image')} with masks{who}, {done.n_foreground / done.n_patches:.1%} of the "
        f"patches are foreground; {done.n_silent:,} of {n_latents:,} latents are active at none"
    )
    for one in classes:
        values = ", ".join(one["values"])
        click.echo(
            f"  {printable(one['name'])} (value {values}), {one['n_patches'] / done.n_patches:.1%} of the patches"
        )
        for name, words in (("auroc", "AUROC"), ("iou", "IoU")):
            top = ", ".join(f"{row['latent']} ({row[name]:.3f})" for row in one[f"best_by_{name}"])
            chance = one[f"expected_max_{name}"]
            by_chance = "" if chance is None else f"; the best under exchanged masks: {chance:.3f}"
            click.echo(f"  {words:<6} latents {top or '(none)'}{by_chance}")
    if all(one["expected_max_auroc"] is None for one in classes):
        click.echo(
            "  no p-values: nothing was shuffled (one image, --shuffles 0, or no latent active in enough images)"
        )
    elif done.unit == "image":
        click.echo("  p-values take each image for a patient: no two patients are known, and those of one are alike")
    elif n_units < 6:
        click.echo(f"  {n_units} patients: p-values cannot be small, however well a latent agrees")


def _subject(
    stage_one: "StageOne",
    sources: "Sources",
    image_id: str | None,
    file: Path | None,
    run: Path | None,
    *,
    device: str,
    **backbone: Any,
) -> "Subject":
    """An image of a store, or one of a file and the SAE that encodes it."""
    from cytosae.maps import new_subject, stored_subject

    if image_id is not None and file is None and run is None:
        return stored_subject(sources, image_id)
    if image_id is None and file is not None and run is not None:
        with progress_line("download", "byte") as progress:
            return new_subject(
                sources, file, run, stage_one, device=resolve_device(device), progress=progress, **backbone
            )
    raise click.UsageError("give --image; or --file and --sae, for an image that is in no store")
