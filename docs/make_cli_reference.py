"""Writes docs/cli.md from the --help texts; tests/project/test_docs.py checks that it is fresh."""

from collections.abc import Iterator
from pathlib import Path

import click

from cli import cli

_HEAD = """# Command line

Every command with its options, as `--help` prints them. Made by `make docs`; a test checks that it is fresh.
"""
_TAIL = (
    "\nNext: the [Quickstart](quickstart.md), which has the commands in use; [Troubleshooting](troubleshooting.md).\n"
)


def cli_reference() -> str:
    """The whole page."""
    parts = [_HEAD]
    for name, command in _commands("cyto", cli):
        settings = {**cli.context_settings, "max_content_width": 100, "terminal_width": 100}
        with click.Context(command, info_name=name, **settings) as context:
            parts.append(f"\n## {name}\n\n```text\n{command.get_help(context)}\n```\n")
    return "".join([*parts, _TAIL])


def _commands(name: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    yield name, command
    for child, other in getattr(command, "commands", {}).items() if not isinstance(command, click.Group) else ():
        yield from _commands(f"{name} {child}", other)  # `cyto barcode` is no group, and has one
    if isinstance(command, click.Group):
        context = click.Context(command)
        for child in command.list_commands(context):
            found = command.get_command(context, child)
            assert found is not None
            yield from _commands(f"{name} {child}", found)


if __name__ == "__main__":
    (Path(__file__).parent / "cli.md").write_text(cli_reference())
