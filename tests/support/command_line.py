"""What test_cli.py and other tests share."""

import re
from collections.abc import Iterator

import click
from click.testing import CliRunner, Result

from cli import cli


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def fails(words: str, *arguments: object) -> None:
    """The command ends with exit code 1 and one line, with these words, on stderr; stdout stays empty."""
    done = run(*arguments)
    assert done.exit_code == 1, done.output
    lines = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1
    assert re.search(words, lines[0]), lines[0]
    assert "Traceback" not in done.output


def commands(group: click.Group = cli, path: str = "") -> Iterator[tuple[str, click.Command]]:
    """(`cache extract`, command) of all commands below a group; a command may have commands of its own (`barcode`)."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        place = f"{path} {name}".strip()
        if isinstance(command, click.Group):
            yield from commands(command, place)
            continue
        yield place, command
        for inner, below in getattr(command, "commands", {}).items():
            yield f"{place} {inner}", below
