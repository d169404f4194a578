"""cyto concept search: cells like this one."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stores.console import (
    COUNT,
    FILE,
    SEED,
    STORE,
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


class _Patches(click.ParamType):
    """Numbers and ranges: 57,58,72-75."""

    name = "N,N-M,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        found: list[int] = []
        for part in str(value).split(","):
            first, _, last = part.partition("-")
            is_range = len(part) <= 20 and first.isdecimal() and (last or first).isdecimal()
            if not is_range or not 0 <= int(last or first) - int(first) <= 1 << 16:
                self.fail(f"{part!r} is no patch and no range of patches such as 57-60", param, ctx)
            found += range(int(first), int(last or first) + 1)
        return tuple(found)


_OF_IMAGE = ("top", "patches", "other_patients", "latents", "roots", "sae", "weights", "assume_compatible", "device")
_OF_EVALUATION = ("n_queries", "n_bootstraps", "seed")


def _refuse_without_effect(*, evaluate: bool) -> None:
    """Options that were typed and would change nothing."""
    if given := typed_options(*(_OF_IMAGE if evaluate else _OF_EVALUATION)):
        raise click.UsageError(
            f"{', '.join(given)}: {'only for an IMAGE, not with --evaluate' if evaluate else 'only with --evaluate'}"
        )
    params = click.get_current_context().params
    if params["keep"] is not None and not params["caches"]:
        raise click.UsageError("--keep holds what is read of --cache; give --cache, too")


@click.command("search")
@click.argument("barcodes", type=FILE)
@click.argument("image", required=False)
@click.option("-o", "--out", type=FILE, help="Folder of tables  [default: print only]; needed with --evaluate.")
@click.option("--top", type=COUNT, default=20, show_default=True, help="Images, and patients, to list.")
@click.option("--k", type=COUNT, default=32, show_default=True, help="Latents of a fingerprint.")
@click.option(
    "--weigh",
    type=click.Choice(["rarity", "none"]),
    default="rarity",
    show_default=True,
    help="Latents in few images count more, ln((n + 1) / (images with it + 1)); or all alike.",
)
@click.option("--tau", type=float, help="Which barcodes, if BARCODES holds several.")
@click.option(
    "--patches", type=_Patches(), default=(), help="Look for this region of IMAGE; patches are counted row by row."
)
@click.option("--other-patients", is_flag=True, help="Leave out images of IMAGE's own patient.")
@click.option(
    "--latents",
    type=STORE,
    multiple=True,
    help="Latent stores of BARCODES, for --patches, an image file, and with -o a figure of the cells; may repeat.",
)
@click.option(
    "--root",
    "roots",
    type=FILE,
    multiple=True,
    help="For the figure: folder of the images, once for each of --latents  [default: as recorded in the cache].",
)
@click.option("--sae", type=FILE, help="For an image file: the SAE that the latents were made with.")
@click.option("--weights", help="For an image file: the weights of the trained backbone; an untrained one needs none.")
@click.option(
    "--cache",
    "caches",
    type=STORE,
    multiple=True,
    help="Activation cache of the same images: also search by mean patch token and by CLS; may repeat.",
)
@click.option(
    "--keep", type=FILE, help="Folder that keeps what is read of --cache (6 kB an image) for the next search."
)
@click.option("--evaluate", is_flag=True, help="Instead: how often are the nearest images of the same label?")
@click.option(
    "--queries", "n_queries", type=COUNT, default=200, show_default=True, help="With --evaluate: images to look for."
)
@click.option(
    "--bootstraps", "n_bootstraps", type=COUNT, default=1_000, show_default=True, help="With --evaluate: of patients."
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="With --evaluate: of queries and bootstraps.")
@assume_option
@device_option
@overwrite_option
@json_option
@click.pass_obj
def concept_search(
    bridges: "Bridges",
    barcodes: Path,
    image: str | None,
    out: Path | None,
    latents: tuple[Path | str, ...],
    roots: tuple[Path, ...],
    sae: Path | None,
    weights: str | None,
    caches: tuple[Path | str, ...],
    keep: Path | None,
    evaluate: bool,
    n_queries: int,
    n_bootstraps: int,
    seed: int,
    assume_compatible: bool,
    device: str,
    overwrite: bool,
    as_json: bool,
    k: int,
    weigh: str,
    tau: float | None,
    **settings: Any,
) -> None:
    """Cells like this one: the images and patients whose latents are most like those of IMAGE.

    IMAGE is an image_id of BARCODES or an image file. Compared by fingerprint (the k most active latents) and by whole
    barcode; with --cache also by the backbone's own tokens. --evaluate measures whether a search finds cells of the
    same label, in other patients and other datasets.

    \b
    Example: cyto concept search cells.barcodes cells/a.png --top 20
    Example: cyto concept search cells.barcodes --evaluate --cache cells.acts.zarr -o cells.search
    """
    from cytosae.search import SearchConfig, SearchEvaluationConfig, evaluate_search, search_cells, search_scale

    if evaluate == (image is not None) or (evaluate and out is None):
        raise click.UsageError("name one IMAGE, or give --evaluate with -o DIR")
    _refuse_without_effect(evaluate=evaluate)
    done: Any
    shared: dict[str, Any] = {"k": k, "weigh": weigh, "tau": tau}
    config: Any = (
        SearchEvaluationConfig(n_queries=n_queries, n_bootstraps=n_bootstraps, seed=seed, **shared)
        if evaluate
        else SearchConfig(**shared, **settings)
    )
    click.echo(search_scale(barcodes, config, caches=caches), err=True)
    with progress_line("search", "image") as progress:
        if evaluate:
            assert out is not None
            done = evaluate_search(
                barcodes, out, config, caches=caches, keep=keep, overwrite=overwrite, progress=progress
            )
        else:
            assert image is not None
            done = search_cells(
                barcodes,
                image,
                config,
                out=out,
                latents=latents,
                sae=sae,
                weights=weights,
                caches=caches,
                keep=keep,
                stage_one=bridges.stage_one,
                roots=roots,
                device=device,
                assume_compatible=assume_compatible,
                overwrite=overwrite,
                progress=progress,
            )
    if out is not None:
        say_done(out, done.was_complete)
    if as_json:
        click.echo(json.dumps(done.to_json(), indent=1))
    else:
        tell(done)
