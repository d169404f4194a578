"""cyto atlas: the web pages and the review."""

import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cytosae.commands.shared import require_roots
from stores.console import COUNT, FILE, SEED, json_option, overwrite_option, progress_line, say_done, tell

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
    help="Folder of the images, once for each of --latents  [default: as recorded in the cache].",
)
@click.option("--compare", "comparisons", type=FILE, multiple=True, help="Folder of cyto compare; may repeat.")
@click.option("--neighbours", type=FILE, help="Folder of cyto concept neighbours.")
@click.option("--causes", type=FILE, help="Folder of cyto concept ablate.")
@click.option("--reviews", type=FILE, help="Folder of verdicts of cyto atlas serve, shown on the cards of concepts.")
@click.option("--stability", type=FILE, help="Folder of cyto concept stability, of this SAE and others.")
@click.option("--score", type=FILE, help="Folder of cyto sae score.")
@click.option("--masks", type=FILE, help="Folder of cyto concept masks.")
@click.option("--names", type=FILE, help="Folder of cyto concept describe.")
@click.option(
    "--replicate", "replications", type=FILE, multiple=True, help="Folder of cyto compare replicate; may repeat."
)
@click.option(
    "--beside",
    type=FILE,
    help="Another atlas: its concepts are shown beside these, by --match, or of the same SAE in other images. At most "
    "1,000 pairs: with --match the highest correlations, else the largest differences of frequency.",
)
@click.option("--match", type=FILE, help="With --beside: folder of cyto concept match, these barcodes first.")
@click.option(
    "--pages",
    type=click.Choice(["selected", "top", "all"]),
    default="selected",
    show_default=True,
    help="Latents with a page. selected: of cyto concept select and the top lists of --compare; top: the --top "
    "largest mean activations; all. The scatter plot and the table show all latents.",
)
@click.option("--top", type=COUNT, default=200, show_default=True, help="With --pages top: number of latents.")
@click.option("--n-images", type=COUNT, default=10, show_default=True, help="Reference images per latent and dataset.")
@click.option(
    "--decile-images",
    type=click.IntRange(min=0),
    default=2,
    show_default=True,
    help="Examples from each tenth of a latent's activation.",
)
@click.option(
    "--near-misses",
    type=click.IntRange(min=0),
    default=6,
    show_default=True,
    help="Images that resemble a latent's reference images and lack it.",
)
@click.option(
    "--alike",
    type=click.IntRange(min=0),
    default=6,
    show_default=True,
    help="Images most like an image, and as many of other patients.",
)
@click.option(
    "--patient-images",
    type=click.IntRange(min=0),
    default=12,
    show_default=True,
    help="Images per patient, drawn at random.",
)
@click.option(
    "--patient-concepts",
    type=click.IntRange(min=0),
    default=6,
    show_default=True,
    help="Characteristic latents of a patient, and unusual ones, that are shown with the patient's strongest cells.",
)
@click.option(
    "--pair-concepts",
    type=click.IntRange(min=0),
    default=12,
    show_default=True,
    help="Latents of each side of --compare that are shown with the strongest cells of both sides.",
)
@click.option("--pixels", type=click.IntRange(min=32), default=256, show_default=True, help="Longer side of a picture.")
@click.option("--tau", type=float, help="Which barcodes, if BARCODES holds several.")
@click.option(
    "--pseudonyms",
    is_flag=True,
    help="Name patients P0001, P0002, ... and images by number, in a secret order; DIR.pseudonyms.csv, beside DIR, has "
    "the key and the real names.",
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of the patients' images and the decoys.")
@click.option("--dry-run", is_flag=True, help="Estimate the number of pages and bytes; write nothing.")
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
    replications: tuple[Path, ...],
    neighbours: Path | None,
    causes: Path | None,
    reviews: Path | None,
    stability: Path | None,
    score: Path | None,
    masks: Path | None,
    names: Path | None,
    beside: Path | None,
    match: Path | None,
    dry_run: bool,
    overwrite: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Write web pages of concepts, images, patients and diseases, for a browser without a server or any web server.

    They load nothing from the network.

    \b
    Example: cyto atlas build --barcodes cells.barcodes --concepts cells.concepts --latents cells.latents.zarr -o atlas
    """
    from cytosae.atlas import AtlasConfig, build_atlas, estimate_atlas

    require_roots(stores, roots, "--images")
    given: dict[str, Any] = {"comparisons": comparisons, "neighbours": neighbours, "causes": causes, "roots": roots}
    given |= {"stability": stability, "score": score, "masks": masks, "replications": replications}
    given |= {"beside": beside, "match": match, "reviews": reviews, "names": names}
    given["stage_one"] = bridges.stage_one
    if dry_run:
        done = estimate_atlas(barcodes, concepts, stores, out, AtlasConfig(**settings), **given)
    else:
        with progress_line("atlas", "page") as progress:
            config = AtlasConfig(**settings)
            done = build_atlas(barcodes, concepts, stores, out, config, **given, overwrite=overwrite, progress=progress)
        say_done(out, done.was_complete)
    if as_json:
        click.echo(json.dumps(done.to_json(), indent=1))
    else:
        tell(done)


@click.command("serve")
@click.argument("site", metavar="DIR", type=FILE)
@click.option("--reviews", type=FILE, help="Folder of the verdicts  [default: DIR.reviews].")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8765, show_default=True, help="Port to listen on; 0: any free one."
)
@click.option("--show-labels", is_flag=True, help="In the review, show latents, datasets and labels of images.")
@click.option("--review-only", is_flag=True, help="Serve the review page only, not the atlas, which shows labels.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of each reviewer's order of concepts.")
def atlas_serve(site: Path, reviews: Path | None, review_only: bool, show_labels: bool, port: int, seed: int) -> None:
    """Serve an atlas to a browser on this machine, and save reviews of its concepts.

    A verdict is on disk before the page confirms it. Enter the same name again to continue a review. Ctrl-C stops.

    \b
    Example: cyto atlas serve cells.atlas
    """
    from cytosae.atlas import ServeConfig, open_server

    config = ServeConfig(port=port, seed=seed, shows_labels=show_labels, is_review_only=review_only)
    with open_server(site, reviews, config) as server:
        for line in server.lines():
            click.echo(line)
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
    """The verdicts of all reviewers as one table, with the answers that were hidden from them.

    \b
    Example: cyto atlas export cells.atlas -o reviews.csv
    """
    from cytosae.review import write_verdicts

    tell(write_verdicts(site, out, reviews=reviews, history=history, overwrite=overwrite))


@click.command("agreement")
@click.argument("site", metavar="DIR", type=FILE)
@click.option("--reviews", type=FILE, help="Folder of the verdicts  [default: DIR.reviews].")
@json_option
def atlas_agreement(site: Path, reviews: Path | None, as_json: bool) -> None:
    """Agreement of reviewers, the share of meaningful concepts, and verdicts on listed latents against decoys.

    \b
    Example: cyto atlas agreement cells.atlas
    """
    from cytosae.review import review_agreement

    done = review_agreement(site, reviews=reviews)
    if as_json:
        click.echo(json.dumps(done.to_json(), indent=1))
    else:
        tell(done)
