"""Shared by all commands: option types, progress lines, printing of results. Only commands import this module."""

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from stores.machine import n_cores
from stores.wording import Report, counted, printable

if TYPE_CHECKING:
    from stores.verify import CheckReport


_READERS = (
    "cache info, sae train, sweep, eval, encode, baseline, versus and score, barcode, and concept stats, neighbours, "
    "ablate and search"
)


class Place(click.Path):
    """A local path. A URL is refused (as a path it would name a local folder), or with `urls` given as a str."""

    def __init__(self, *, urls: bool = False) -> None:
        super().__init__(path_type=Path)
        self.urls = urls

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if "://" not in str(value):
            return super().convert(value, param, ctx)
        if not self.urls:
            self.fail(f"{value!r} is a URL; caches and latents are read from one by {_READERS} only", param, ctx)
        return str(value)


FILE = Place()
STORE = Place(urls=True)  # a Path, or a URL as a str
COUNT = click.IntRange(min=1)
SEED = click.IntRange(min=0, max=2**63 - 1)
TOKEN_SETS = click.Choice(["all", "patch", "cls", "register"])


device_option = click.option(
    "--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N; auto takes a GPU if there is one."
)


assume_option = click.option(
    "--assume-compatible",
    is_flag=True,
    help="Take an imported SAE, which does not say which tokens it was trained on.",
)


overwrite_option = click.option(
    "--overwrite", is_flag=True, help="Replace an output of the same kind; the old one stays until the new is complete."
)


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


readers_option = click.option(
    "--workers", type=COUNT, default=n_cores(), show_default="cores", help="Processes that read images."
)


def typed_options(*names: str) -> list[str]:
    """Of these parameters those that were typed, as they are typed: what would have no effect is refused."""
    context = click.get_current_context()
    return [
        option.opts[0]
        for option in context.command.params
        if option.name in names and context.get_parameter_source(option.name) is ParameterSource.COMMANDLINE
    ]


@contextmanager
def stopping_gently(what: str) -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C or SIGTERM lets the job finish what is in flight; the second stops it at once."""
    asked = False

    def ask(signum: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        click.echo(f"\nfinishing {what} in flight; Ctrl-C again stops at once and loses it", err=True)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_in_place: list[object] = []  # in a terminal: the progress line that the cursor is on, if any


@contextmanager
def progress_line(job: str, unit: str | None) -> Iterator[Callable[[int, int, str], None]]:
    """A progress line on stderr: updated in place in a terminal, one line every ten seconds in a log.

    Several may be open, for jobs that follow one another: the line of a job stays when the next one begins.

    unit : of what is counted; None: a share of the job is done, which has no unit and no rate
    """
    from tqdm import tqdm

    began, shown, last, at_start = time.monotonic(), 0.0, (-1, ""), -1
    own = object()
    in_terminal = sys.stderr.isatty()

    def show(done: int, total: int, state: str) -> None:
        nonlocal shown, last, at_start, began
        now = time.monotonic()
        if at_start < 0 or done < last[0]:  # fewer than before: the next part of the job counts from its own start
            at_start, began = done, now  # the rate counts this run only
        elif (done, state) == last or (done == total == last[0]):
            return
        elif done < total and now - shown < (0.2 if in_terminal else 10):
            return
        shown, last = now, (done, state)
        if in_terminal:
            _end_line_of_other(own)
        line = tqdm.format_meter(
            done,
            total,
            now - began,
            prefix=job,
            unit=f" {unit}s",
            unit_scale=total >= 100_000,
            bar_format=None if unit else "{l_bar}{bar}| [{elapsed}<{remaining}{postfix}]",
            initial=at_start,
            postfix=state,
        )
        click.echo(f"\r\x1b[2K{line}" if in_terminal else line, err=True, nl=not in_terminal)

    try:
        yield show
    finally:
        if own in _in_place:
            _in_place.clear()
            click.echo(err=True)


def _end_line_of_other(own: object) -> None:
    if _in_place and own not in _in_place:
        click.echo(err=True)
    _in_place[:] = [own]


def print_check(report: "CheckReport", as_json: bool) -> None:
    """The problems of a store, and exit code 1 if there is one."""
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=1))
    else:
        tell(report)
    if report.problems:
        raise click.ClickException(f"{report.store} is damaged: {counted(len(report.problems), 'problem')}")


def tell(report: Report, *, were_complete: Sequence[Path] = ()) -> None:
    """Print what was done to stdout; notes (and outputs that were complete before) and warnings go to stderr."""
    for note in report.notes:
        click.echo(printable(note), err=True)
    for path in were_complete:
        say_done(path, True)
    for line in report.lines():
        click.echo(line)
    for warning in report.warnings:
        click.echo(f"warning: {printable(warning)}", err=True)


def say_done(path: Path, was_complete: bool) -> None:
    """A line on stderr if there was nothing to do."""
    if was_complete:
        click.echo(f"{path} is already complete with these settings; nothing to do", err=True)
