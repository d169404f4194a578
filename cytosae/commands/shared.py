"""What several commands of stage two share: commands below a command, a Dask cluster, images, how maps are drawn."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import click

from stores.console import COUNT, FILE
from stores.machine import n_cores
from stores.wording import Report, printable

if TYPE_CHECKING:
    from distributed import Client

    from cytosae.stage_one import StageOne


class Bridges(Protocol):
    """What cli.py hands to commands that need the other stage, as click's context object."""

    @property
    def stage_one(self) -> "StageOne":
        """Images and the backbone: `cytocache.bridge`."""


class CommandWithCommands(click.Command):
    """A command with arguments of its own, and commands below it: `cyto barcode LATENTS...`, `cyto barcode export`."""

    commands: ClassVar[dict[str, click.Command]]  # as a group has them, for the reference

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        if args and (command := self.commands.get(args[0])):
            return command.make_context(f"{info_name} {args[0]}", args[1:], parent=parent, **extra)
        return super().make_context(info_name, args, parent=parent, **extra)


def dask_options(command: Any) -> Any:
    """Where a job of Dask tasks runs: a cluster that is there, or one that is started for it."""
    options = (
        click.option(
            "--scheduler",
            help="Address of a running Dask scheduler, tcp://HOST:PORT or tls://HOST:PORT  [default: start one].",
        ),
        click.option("--workers", type=COUNT, default=n_cores(), show_default="cores", help="Local worker processes."),
        click.option("--memory-limit", default="2GiB", show_default=True, help="Memory limit of each local worker."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def tell_or_json(done: Report, facts: Any, *, as_json: bool) -> None:
    """What was done, in words or (`as_json`) its `facts` as JSON, to stdout; its warnings to stderr in both cases."""
    for line in [json.dumps(facts, indent=1)] if as_json else done.lines():
        click.echo(line)
    for warning in done.warnings:
        click.echo(f"warning: {printable(warning)}", err=True)


def map_options(command: Any) -> Any:
    """How maps are drawn, and the folders of the images."""
    options = (
        click.option(
            "--root",
            "roots",
            type=FILE,
            multiple=True,
            help="Folder of the images, once for each of LATENTS  [default: as recorded in the cache].",
        ),
        click.option(
            "--n-images", type=click.IntRange(1, 10), default=6, show_default=True, help="Reference images per dataset."
        ),
        click.option(
            "--nearest", is_flag=True, help="Draw patches as squares, instead of bilinear between their centres."
        ),
        click.option(
            "--released",
            is_flag=True,
            help="Draw as the released code: dark and bright patches, without a colour scale.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def require_roots(stores: tuple[Path, ...], roots: tuple[Path, ...], option: str = "--root") -> None:
    """Folders of images are given for all latent stores, or for none."""
    if roots and len(roots) != len(stores):
        raise click.UsageError(
            f"give {option} once for each of LATENTS, or not at all; found {len(roots)} for {len(stores)}"
        )


@contextmanager
def dask_client(scheduler: str | None, workers: int, memory_limit: str) -> Iterator["Client"]:
    """A client of the running scheduler, or of a cluster started here for the time of the command."""
    from cytosae.cluster import open_client

    try:
        with open_client(scheduler, workers=workers, memory_limit=memory_limit) as client:
            yield client
    except KeyboardInterrupt:
        sys.unraisablehook = _print_unless_from_dask
        raise


def _print_unless_from_dask(unraisable: Any) -> None:
    """Ctrl-C inside distributed's Future.__init__ leaves one that is half made; its __del__ then complains."""
    name = getattr(unraisable.object, "__qualname__", "")
    if not (name == "Future.__del__" and isinstance(unraisable.exc_value, AttributeError)):
        sys.__unraisablehook__(unraisable)
