"""cyto concept describe: names for latents, from others, and a test of each name."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cytosae.commands.shared import require_roots
from stores.console import COUNT, FILE, SEED, json_option, overwrite_option, progress_line, say_done, tell

if TYPE_CHECKING:
    from .shared import Bridges

_ASK = ("timeout", "at_once", "batch", "shuffles", "n_bootstraps", "give_up", "use_shell")


@click.command("describe")
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
@click.option("-o", "--out", type=FILE, required=True, help="Folder of items, names and scores; DIR.answers, beside "
    "it, keeps what was answered.")  # fmt: skip
@click.option("--latent", "latents", type=int, multiple=True, help="A latent to name; repeat it for several.")
@click.option("--selected", is_flag=True, help="Those of cyto concept select.")
@click.option(
    "--images",
    "roots",
    type=FILE,
    multiple=True,
    help="Folder of the images, once for each of --latents  [default: as recorded in the cache].",
)
@click.option(
    "--with",
    "command",
    metavar="CMD",
    help="Ask this command for names: it is started once for each latent, with the item on stdin as JSON, and prints "
    "JSON. It sees the pictures, and what it sends to others is its own doing: nothing else leaves this machine.",
)
@click.option("--by", help="Who gives these names, as MODEL VERSION; also for --answers  [default: the program].")
@click.option(
    "--answers",
    type=FILE,
    multiple=True,
    help="Names of people: .csv, .parquet or .json with latent, name, given_by, or of cyto atlas export; may repeat.",
)
@click.option(
    "--judge",
    metavar="CMD",
    help="Test all names with this command, which sees a name and pictures that no item shows; may be that of --with.",
)
@click.option("--judge-by", help="Who tests, as MODEL VERSION  [default: the program].")
@click.option("--shell", "use_shell", is_flag=True, help="Give both command lines to the shell, as they stand.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=120.0,
    show_default=True,
    help="Seconds of a call.",
)
@click.option("--at-once", type=COUNT, default=1, show_default=True, help="Calls at the same time.")
@click.option("--give-up", type=COUNT, default=5, show_default=True, help="Failures in a row that end the calls.")
@click.option("--batch", type=COUNT, default=10, show_default=True, help="Pictures of one call of the judge.")
@click.option(
    "--shuffles",
    type=click.IntRange(min=0),
    default=3,
    show_default=True,
    help="Names of other latents that are tested on the same images.",
)
@click.option(
    "--bootstraps", "n_bootstraps", type=COUNT, default=1_000, show_default=True, help="Of patients, for intervals."
)
@click.option(
    "--shown", "n_shown", type=click.IntRange(2, 60), default=12, show_default=True, help="Strong images of an item."
)
@click.option(
    "--test", "n_test", type=click.IntRange(min=2), default=20, show_default=True, help="Active images of a test; as "
    "many are not active."
)  # fmt: skip
@click.option(
    "--min-test", type=click.IntRange(min=2), default=5, show_default=True, help="Fewest of each, or there is no test."
)
@click.option(
    "--match",
    type=click.Choice(["patient", "label"]),
    default="patient",
    show_default=True,
    help="Inactive images are of the same patient (else dataset) as active ones; or of the same dataset and label.",
)
@click.option("--labels", is_flag=True, help="Tell the labels of the images in the items.")
@click.option(
    "--pixels", type=click.IntRange(32, 512), default=120, show_default=True, help="Side of a picture on a sheet."
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the images, the other names, the intervals.")
@overwrite_option
@json_option
@click.pass_obj
def concept_describe(
    bridges: "Bridges",
    barcodes: Path,
    concepts: Path,
    stores: tuple[Path, ...],
    out: Path,
    latents: tuple[int, ...],
    selected: bool,
    roots: tuple[Path, ...],
    command: str | None,
    by: str | None,
    answers: tuple[Path, ...],
    judge: str | None,
    judge_by: str | None,
    seed: int,
    overwrite: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Names for latents: writes an item for each, takes names from others, and tests every name.

    An item is a contact sheet with maps, statistics and a question, without names of images, patients or latents. Names
    come from a command (--with), from people (--answers), or both: all stand side by side, each with who gave it. The
    test (--judge): from the name alone, tell images with the latent from images without it, of patients that no item
    shows; beside it the score of other latents' names. The same command again continues, and adds further sources.

    \b
    Example: cyto concept describe --barcodes b --concepts c --latents l -o names --selected --with "python model.py"
    """
    from cytosae.names import AskConfig, DescribeConfig, describe_latents, plan_describe

    require_roots(stores, roots, "--images")
    ask = AskConfig(seed=seed, **{name: settings.pop(name) for name in _ASK})
    config = DescribeConfig(seed=seed, **settings)
    wanted: dict[str, Any] = {"latents": latents, "selected": selected, "command": command, "judge": judge}
    tell_plan = plan_describe(barcodes, concepts, config, ask, **wanted)
    for line in tell_plan.lines():
        click.echo(line, err=True)
    with progress_line("describe", "step") as progress:
        done = describe_latents(
            barcodes,
            concepts,
            stores,
            out,
            config,
            ask,
            **wanted,
            by=by,
            answers=answers,
            judge_by=judge_by,
            stage_one=bridges.stage_one,
            roots=roots,
            overwrite=overwrite,
            progress=progress,
        )
    say_done(out, done.was_complete and not (command or judge or answers))
    if as_json:
        click.echo(json.dumps(done.to_json(), indent=1))
    else:
        tell(done)
    if done.gave_up is not None:
        raise click.ClickException(done.gave_up)
