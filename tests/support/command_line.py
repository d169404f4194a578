"""What test_cli.py and other tests share."""

import re

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
