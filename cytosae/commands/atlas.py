"""cyto atlas: the web pages and the review."""

import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cytosae.commands.shared import sources_of, warn_of_unseen
from stores.console import COUNT, FILE, SEED, json_option, overwrite_option, progress_line, say_done
from stores.wording import cell, counted, decimals, percent, printable

if TYPE_CHECKING:
    from .shared import Bridges


@click.command("build")
@click.option("--barcodes", type=FILE, required=True, help="Folder of cyto barcode.")
@click.option("--concepts", type=FILE, required=True, help="Folder of cyto concept stats.")
@click.option(
    "--latents",
    "stores",
    type=FILE,
    multiple=True,
    required=True,
    help="Latent store that both were made from; repeat it for several, in the same order.",
)
@click.option("-o", "--out", type=FILE, required=True, help="Folder of the atlas.")
@click.option(
    "--images",
    "roots",
    type=FILE,
    multiple=True,
    help="Where the images lie now, once for each of --latents  [default: where they lay].",
)
@click.option("--compare", "comparisons", type=FILE, multiple=True, help="Folder of cyto compare; may repeat.")
@click.option("--neighbours", type=FILE, help="Folder of cyto concept neighbours.")
@click.option(
    "--pages",
    type=click.Choice(["selected", "top", "all"]),
    default="selected",
    show_default=True,
    help="Latents with a page: those of cyto concept select and in the comparisons' top lists, the --top largest "
    "mean activations, or all. The scatter and the table show every latent.",
)
@click.option("--top", type=COUNT, default=200, show_default=True, help="With --pages top: how many.")
@click.option("--n-images", type=COUNT, default=10, show_default=True, help="Reference images per latent and dataset.")
@click.option(
    "--patient-images", type=click.IntRange(min=0), default=12, show_default=True, help="Cells shown of each patient."
)
@click.option("--pixels", type=click.IntRange(min=32), default=256, show_default=True, help="Longer side of a picture.")
@click.option("--tau", type=float, help="Which barcodes, if BARCODES holds several.")
@click.option(
    "--pseudonyms",
    is_flag=True,
    help="Call patients P0001, P0002, ... and images by number, in an order that only the key in DIR.pseudonyms.csv "
    "tells; that file, beside DIR, also says who is who.",
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the patients' cells and the decoys.")
@click.option("--dry-run", is_flag=True, help="Say how many pages and bytes it would be, and write nothing.")
@overwrite_option
@json_option
@click.pass_obj
def atlas_build(
    bridges: "Bridges",
    barcodes: Path,
    concepts: Path,
    stores: tuple[Path, ...],
    out: Path,
    roots: tuple[Path, ...],
    comparisons: tuple[Path, ...],
    neighbours: Path | None,
    dry_run: bool,
    overwrite: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Write web pages of concepts, images, patients and diseases, to be opened from the disk or any web server.

    Nothing in them asks a network for anything.

    \b
    Example: cyto atlas build --barcodes cells.barcodes --concepts cells.concepts --latents cells.latents.zarr -o atlas
    """
    from cytosae.atlas import AtlasConfig, estimate_atlas, open_inputs, pseudonyms_file, write_atlas

    config = AtlasConfig(**settings)
    sources = sources_of(bridges.stage_one, stores, roots, option="--images")
    inputs = open_inputs(barcodes, concepts, sources, comparisons=comparisons, neighbours=neighbours, tau=config.tau)
    if dry_run:
        done = estimate_atlas(inputs, config)
    else:
        given = [path for path in (barcodes, concepts, *stores, *roots, *comparisons, neighbours) if path is not None]
        with progress_line("atlas", "page") as progress:
            done = write_atlas(inputs, out, config, overwrite=overwrite, given=given, progress=progress)
        say_done(out, done.was_complete)
    if as_json:
        click.echo(json.dumps({"atlas": str(out), "written": not dry_run, **vars(done)}, indent=1))
        return
    counts = ", ".join(counted(number, kind.removesuffix("s")) for kind, number in done.counts.items())
    about = "about " if dry_run else ""
    click.echo(f"{out}: pages of {counts}; {about}{done.n_files:,} files, {about}{done.n_bytes / 1e6:,.1f} MB")
    if dry_run:
        click.echo("nothing was written")
        return
    warn_of_unseen(done.unseen, "--images")
    if config.pseudonyms:
        click.echo(f"who is who, and the key: {pseudonyms_file(out)}; keep it, and never give it away with the atlas")
    click.echo(f"open {(out / 'index.html').absolute().as_uri()}")


@click.command("serve")
@click.argument("site", metavar="DIR", type=FILE)
@click.option("--reviews", type=FILE, help="Folder of the verdicts  [default: DIR.reviews].")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8765, show_default=True, help="Port to listen on; 0: any free one."
)
@click.option("--show-labels", is_flag=True, help="In the review, show latents, datasets and labels of images.")
@click.option("--review-only", is_flag=True, help="Serve the review page, not the atlas, in which labels can be seen.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of each reviewer's order of concepts.")
def atlas_serve(site: Path, reviews: Path | None, review_only: bool, show_labels: bool, port: int, seed: int) -> None:
    """Serve an atlas to a browser on this machine, and take reviews of its concepts.

    Every verdict is on the disk before the page says so; give your name again to go on where you stopped. Ctrl-C stops.

    \b
    Example: cyto atlas serve cells.atlas
    """
    from cytosae.atlas import ServeConfig, open_server

    config = ServeConfig(port=port, seed=seed, shows_labels=show_labels, is_review_only=review_only)
    folder = reviews or _reviews_of(site)
    with open_server(site, folder, config) as server:
        asked = ", ".join(f"{question.title} ({len(question.items):,})" for question in server.review.questions)
        click.echo(f"{site}: {server.address}  review: {server.address}review.html  (Ctrl-C stops)")
        click.echo(f"asked: {printable(asked) or 'nothing; the atlas was built without a selection and comparisons'}")
        click.echo(f"verdicts: {folder}")
        with suppress(KeyboardInterrupt):
            server.serve_forever()
    click.echo("\nstopped")


@click.command("export")
@click.argument("site", metavar="DIR", type=FILE)
@click.option("-o", "--out", type=FILE, required=True, help="The table to write, .csv or .parquet.")
@click.option("--reviews", type=FILE, help="Folder of the verdicts  [default: DIR.reviews].")
@click.option("--history", is_flag=True, help="Also verdicts that a later one of the same reviewer replaced.")
@overwrite_option
def atlas_export(site: Path, out: Path, reviews: Path | None, history: bool, overwrite: bool) -> None:
    """The verdicts of all reviewers as one table, with what was hidden from them.

    \b
    Example: cyto atlas export cells.atlas -o reviews.csv
    """
    from cytosae.atlas import read_review, read_verdicts, verdict_table, write_verdicts

    review = read_review(site)
    table = verdict_table(read_verdicts(reviews or _reviews_of(site)), review, history=history)
    write_verdicts(table, out, overwrite=overwrite)
    n_reviewers = len(set(table["reviewer"].to_pylist()))
    click.echo(f"{out}: {counted(table.num_rows, 'verdict')} of {counted(n_reviewers, 'reviewer')}")


@click.command("agreement")
@click.argument("site", metavar="DIR", type=FILE)
@click.option("--reviews", type=FILE, help="Folder of the verdicts  [default: DIR.reviews].")
@json_option
def atlas_agreement(site: Path, reviews: Path | None, as_json: bool) -> None:
    """Do reviewers agree, which share of concepts is meaningful, and are those of a disease told from decoys?

    \b
    Example: cyto atlas agreement cells.atlas
    """
    from cytosae.atlas import agreement, read_review, read_verdicts

    review = read_review(site)
    found = agreement(read_verdicts(reviews or _reviews_of(site)), review)
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    click.echo(
        f"{counted(found['n_verdicts'], 'verdict')} ({found['n_superseded']:,} earlier ones replaced), of them "
        f"{found['n_seen_with_labels']:,} with labels shown"
    )
    if found["n_not_asked"]:
        click.echo(f"left out: {found['n_not_asked']:,} on concepts that {site} does not ask about")
    for question in found["questions"]:
        _print_reviewed(question)


def _reviews_of(site: Path) -> Path:
    """Beside the atlas: what replaces it leaves the reviews alone."""
    site = site.absolute()
    return site.with_name(f"{site.name}.reviews")


def _print_reviewed(found: dict[str, Any]) -> None:
    """What `cyto atlas agreement` found for one question."""
    from cytosae.atlas import EXTREME

    click.echo(f"\n{printable(found['title'])}: {counted(found['n_items'], 'concept')}")
    for reviewer, given in found["reviewers"].items():
        said = ", ".join(f"{count:,} {verdict}" for verdict, count in given["verdicts"].items())
        click.echo(f"  {printable(reviewer)}: {given['n']:,} judged ({said})")
    for pair in found["cohen"]:
        names = " and ".join(printable(name) for name in pair["reviewers"])
        click.echo(
            f"  {names}: Cohen's kappa {_kappa(pair, 'kappa')} over {counted(pair['n_items'], 'concept')}, "
            f"{percent(pair['agreement'])} equal, Gwet's AC1 {_kappa(pair, 'ac1')}"
        )
    all_of = found["fleiss"]
    if all_of["n_reviewers"] > 2:
        click.echo(
            f"  all {all_of['n_reviewers']:,}: Fleiss' kappa {_kappa(all_of, 'kappa')} over {all_of['n_items']:,} "
            f"concepts that two or more judged (all judged {all_of['n_by_all']:,}), Gwet's AC1 {_kappa(all_of, 'ac1')}"
        )
    if any((each["largest_share"] or 0) >= EXTREME for each in (*found["cohen"], all_of)):
        click.echo(f"  {EXTREME:.0%} or more of the verdicts are one and the same: a kappa says little there, AC1 more")
    for row in found.get("meaningful", ()):
        cluster = "all" if row["cluster"] is None else f"cluster {row['cluster']}"
        who = "most reviewers" if row["reviewer"] is None else printable(row["reviewer"])
        if row["n"]:
            click.echo(f"  {who}, {cluster}: meaningful {_interval(row)}")
        weighted = row.get("of_all_latents")
        if weighted and weighted["share"] is not None:
            click.echo(
                f"  {who}, of all latents (clusters weighted by size): meaningful {weighted['share']:.1%} "
                f"({100 * weighted['low']:.1f} to {100 * weighted['high']:.1f})"
                + (f", of the {weighted['covers']:.1%} in judged clusters" if weighted["covers"] < 1 else "")
            )
    if found.get("specific"):
        medians = {group: cell(found["median_images"][group], "1,.0f") for group in ("a", "b", "decoy")}
        click.echo(
            f"  images with a latent, median: list of {printable(found['a'])} {medians['a']}, "
            f"of {printable(found['b'])} {medians['b']}, decoys {medians['decoy']}"
        )
    for reviewer, said in found.get("specific", {}).items():
        for group, name in (("a", found["a"]), ("b", found["b"])):
            click.echo(
                f"  {printable(reviewer)}: called specific to {printable(name)} "
                f"{_interval(said['confirmed'][group])} of its list, "
                f"{_interval(said['decoys_called'][group])} of the decoys "
                f"(p {cell(said['p_lists'][group], '1.3g')})"
            )
        click.echo(f"  {printable(reviewer)}: the right side of the two, p {cell(said['p_sides'], '1.3g')}")


def _kappa(found: dict[str, Any], name: str) -> str:
    """`0.412 (0.120 to 0.655)`"""
    low, high = found[f"{name}_low"], found[f"{name}_high"]
    return f"{decimals(found[name])}" + ("" if low is None else f" ({low:.3f} to {high:.3f})")


def _interval(row: dict[str, Any]) -> str:
    """`5 of 8 (62.5%, 30.6 to 86.3)`"""
    if not row["n"]:
        return "0 of 0"
    return f"{row['n_yes']:,} of {row['n']:,} ({row['share']:.1%}, {100 * row['low']:.1f} to {100 * row['high']:.1f})"
