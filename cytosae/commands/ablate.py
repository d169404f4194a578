"""cyto concept ablate: does a latent matter to the backbone?"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cytosae.commands.shared import tell_or_json
from stores.console import (
    COUNT,
    FILE,
    SEED,
    STORE,
    TOKEN_SETS,
    assume_option,
    device_option,
    json_option,
    overwrite_option,
    progress_line,
    readers_option,
    say_done,
)

if TYPE_CHECKING:
    from .shared import Bridges


@click.command("ablate")
@click.argument("run", type=FILE)
@click.argument("cache", type=STORE)
@click.option("-o", "--out", type=FILE, required=True, help="Folder of the tables and figures.")
@click.option("--latent", "latents", type=int, multiple=True, required=True, help="A latent to change; may repeat.")
@click.option(
    "--mode",
    default="zero",
    show_default=True,
    metavar="zero|mean|scale:K",
    help="What its values become: 0; its mean over all tokens; or K times what they are.",
)
@click.option(
    "--latents", "stored", type=STORE, help="Latent store of RUN and CACHE, read instead of encoding CACHE again."
)
@click.option(
    "--images",
    type=FILE,
    help="Folder of the images: run them through the first blocks again, in float32  [default: the cached tokens].",
)
@click.option("--weights", help="The weights that CACHE was made with; an untrained backbone needs none.")
@click.option("--probe", type=FILE, help="Folder of cyto probe: also say how its logits and probabilities change.")
@click.option(
    "--target",
    default="",
    metavar="COLUMN",
    help="A column of the image table, such as label: fit a probe of it to the final CLS, and say how that changes.",
)
@click.option(
    "--probe-images", type=COUNT, default=1000, show_default=True, help="With --target: images that it is fitted to."
)
@click.option("--token-set", type=TOKEN_SETS, help="Tokens that are edited  [default: those that RUN was trained on].")
@click.option(
    "--patches", type=FILE, help="Table with image_id and patch (0 at the top left, row by row): edit these only."
)
@click.option(
    "--n-images", type=COUNT, default=32, show_default=True, help="Images of each latent, where it is active."
)
@click.option(
    "--controls",
    "n_controls",
    type=COUNT,
    default=100,
    show_default=True,
    help="Latents of the nearest frequency and norm.",
)
@click.option(
    "--directions",
    "n_directions",
    type=click.IntRange(min=0),
    default=100,
    show_default=True,
    help="Random directions of the same norm at the same tokens.",
)
@click.option(
    "--curve",
    type=COUNT,
    multiple=True,
    default=(1, 2, 5, 10, 20, 50),
    show_default=True,
    help="How many latents together are removed, or alone are kept; repeat it for several.",
)
@click.option(
    "--curve-images",
    type=click.IntRange(min=0),
    default=32,
    show_default=True,
    help="Images of the curves; 0: no curves.",
)
@click.option(
    "--sample",
    type=click.IntRange(min=0),
    default=0,
    help="Look at this many images of CACHE only, from as many patients as there are  [default: all].",
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of all draws.")
@readers_option
@assume_option
@device_option
@overwrite_option
@json_option
@click.pass_obj
def concept_ablate(
    bridges: "Bridges",
    run: Path,
    cache: Path | str,
    out: Path,
    stored: Path | str | None,
    images: Path | None,
    weights: str | None,
    probe: Path | None,
    patches: Path | None,
    token_set: str | None,
    workers: int,
    assume_compatible: bool,
    device: str,
    overwrite: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Change latents inside the backbone, run its later blocks, and say how the final CLS embedding moves.

    RUN is an SAE, CACHE an activation cache that it fits. Each latent is changed in images in which it is active, and
    held against latents of the same frequency and norm, and against random directions. The SAE's own error is added
    back: a latent that is not changed changes nothing.

    \b
    Example: cyto concept ablate cells.sae cells.acts.zarr --latents cells.latents.zarr --latent 17 -o cells.causes
    """
    from cytosae.causes import AblateConfig, ablate_latents

    config = AblateConfig(token_set=token_set or "", **settings)
    with (
        progress_line("download", "byte") as downloading,
        progress_line("survey", "image") as surveying,
        progress_line("ablate", "image") as progress,
    ):
        done = ablate_latents(
            run,
            cache,
            out,
            config,
            latents=stored,
            images=images,
            weights=weights,
            probe=probe,
            patches=patches,
            stage_one=bridges.stage_one,
            device=device,
            workers=workers,
            assume_compatible=assume_compatible,
            overwrite=overwrite,
            say=lambda line: click.echo(line, err=True),
            download_progress=downloading,
            survey_progress=surveying,
            progress=progress,
        )
    say_done(out, done.was_complete)
    tell_or_json(done, done.to_json(), as_json=as_json)
