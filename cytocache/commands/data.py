"""cyto data: image tables."""

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stores.console import FILE, json_option, overwrite_option, progress_line, say_done
from stores.wording import more_or_fewer, printable

if TYPE_CHECKING:
    from cytocache.published_datasets import Index


@click.command("index")
@click.argument("source", type=FILE)
@click.option("-o", "--out", type=FILE, required=True, help="The image table to write, a .parquet file.")
@click.option(
    "--dataset",
    type=click.Choice(["mll23", "acevedo", "matek19", "bmc", "aml-hehr", "folder"]),
    default="folder",
    show_default=True,
    help="Whose layout SOURCE has; folder: one sub-folder per class.",
)
@click.option("--class-set", help="Of acevedo: 13 (default), 11 (the paper's) or 10 (DinoBloom's).")
@click.option("--no-hash", is_flag=True, help="Do not read the files to find those that are byte-identical.")
@overwrite_option
@json_option
def data_index(
    source: Path, out: Path, dataset: str, class_set: str | None, no_hash: bool, overwrite: bool, as_json: bool
) -> None:
    """One row per image of SOURCE: path, label, patient, disease; and what differs from the published dataset.

    SOURCE is the unpacked dataset, or a folder above it. Nothing in it is moved, changed or deleted.

    \b
    Example: cyto data index PBC_dataset_normal_DIB -o acevedo.parquet --dataset acevedo --class-set 11
    """
    from cytocache.index import make_index

    with progress_line("compare", "file") as progress:
        index, was_complete = make_index(
            source,
            out,
            dataset=dataset,
            class_set=class_set,
            compare_files=not no_hash,
            overwrite=overwrite,
            progress=progress,
        )
    say_done(out, was_complete)
    root = source / index.images.root.relative_to(source.absolute())
    command = ["cyto", "cache", "extract", out, out.with_suffix(".acts.zarr")]
    command += [] if index.images.root == out.absolute().parent else ["--root", root]
    step = shlex.join(str(word) for word in command)
    if as_json:
        click.echo(json.dumps({**_index_json(index), "root": str(root), "table": str(out), "next": step}, indent=1))
    else:
        _print_index(index, root, out)
        click.echo(f"next: {printable(step)}")


def _index_json(index: "Index") -> dict[str, Any]:
    return {
        "dataset": index.dataset,
        "class_set": index.class_set,
        "n_images": index.images.table.num_rows,
        "unit": index.unit,
        "counts": [vars(count) for count in index.counts],
        "stated": [vars(stated) for stated in index.stated],
        "findings": [
            {"what": finding.what, "n": len(finding.names), "names": finding.names} for finding in index.findings
        ],
    }


def _print_index(index: "Index", root: Path, out: Path) -> None:
    """Found and published counts side by side, each difference in words; then what is odd."""
    from stores.tables import column, listed

    class_set = f", class set {index.class_set}" if index.class_set else ""
    n_images = index.images.table.num_rows
    click.echo(f"{index.dataset}{class_set}: {n_images:,} images in {printable(str(root))}")
    rows = [(printable(count.name), count.found, count.published) for count in index.counts]
    published = [number for _, _, number in rows if number is not None]
    rows.append(("total", sum(found for _, found, _ in rows), sum(published) if published else None))
    width = max(len(name) for name, _, _ in rows)
    click.echo(f"  {'':<{width}}  {index.unit:>9}{'  published' if published else ''}")
    for name, found, number in rows:
        beside = "" if number is None else f"  {number:>9,}  {more_or_fewer(found, number)}"
        click.echo(f"  {name:<{width}}  {found:>9,}{beside}".rstrip())
    for stated in index.stated:
        click.echo(f"  stated elsewhere: {stated.n:,} ({stated.source})")
    for finding in index.findings:
        click.echo(f"  {finding.what}: {len(finding.names):,} ({listed([printable(name) for name in finding.names])})")
    if any(len(finding.names) > 3 for finding in index.findings):
        click.echo("  (--json names all of them)")
    groups = {
        kind: len({value for value in column(index.images.table, name) if value is not None})
        for name, kind in (("label", "classes"), ("patient", "patients"), ("disease", "diseases"))
    }
    click.echo(", ".join([f"{out}: {n_images:,} images", *(f"{n:,} {kind}" for kind, n in groups.items() if n)]))
