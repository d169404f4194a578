r"""Columns of the image table from the folders and names of the images: `{patient}/{label}/*`.

A pattern is compared with the whole path of an image below the root:

    {name}   one or more characters, as few as fit, within one folder or file name: the column `name`
    *        any characters within one folder or file name
    **       any folders, also none, and whatever follows
    other    itself (case counts)

An archive counts as a folder called like it without its suffix: `P1.zip::BAS/1.png` is `P1/BAS/1.png`. For what this
cannot say, `regex:` and a regular expression with named groups, which must fit the whole path:
`regex:(?P<patient>P\d+)_.*`.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from stores.errors import BadInput
from stores.tables import MANIFEST_COLUMNS, OUTCOME_COLUMNS, TRUNCATED, check_column_names, listed

from .archives import as_unpacked

_REGEX = "regex:"
_NOT_FROM_NAMES = ("path", "image_id", "mask", "duplicate_of", TRUNCATED, *OUTCOME_COLUMNS)
_PIECE = re.compile(r"\{([^{}]*)\}|(/?\*\*/?)|(\*)|([^{}*]+|[{}])")


@dataclass(frozen=True)
class NamePattern:
    """A pattern that was understood: the columns it names, and what it is compared with."""

    text: str
    columns: tuple[str, ...]
    expression: re.Pattern[str]

    def match(self, path: str) -> tuple[dict[str, str], bool] | None:
        """(column -> value; does a value include the first folder?) for a path; None if the pattern does not fit."""
        unpacked = as_unpacked(path)
        found = self.expression.fullmatch(unpacked)
        if found is None:
            return None
        end = unpacked.find("/")
        takes_folder = any(0 <= found.start(name) < end for name in self.columns)
        return {name: value for name, value in found.groupdict().items() if value}, takes_folder


@dataclass(frozen=True)
class FromNames:
    """What patterns say of some paths."""

    columns: dict[str, list[str | None]]  # column -> value for each path
    takes_folder: list[bool]  # for each path: is its first folder (or a part) one of these values?
    unfit: dict[str, list[str]]  # pattern -> paths that it does not fit


def parse_pattern(text: str, option: str, column: str) -> NamePattern:
    """The pattern that an option gives; `column`: what it must name.

    Raises
    ------
    BadInput
        If it cannot be understood, does not name `column`, or names a column that is not the user's.
    """
    hint = f"expected a pattern such as '{{{column}}}/*' or '*/{{{column}}}_*.png'"
    try:
        if text.startswith(_REGEX):
            expression = re.compile(text.removeprefix(_REGEX))
        else:
            expression = re.compile(_as_expression(as_unpacked(text)))
    except (re.error, ValueError) as error:
        raise BadInput(f"{option}: {text!r} is no pattern ({error}); {hint}") from None
    columns = tuple(expression.groupindex)
    if column not in columns:
        raise BadInput(f"{option}: {text!r} does not say where {{{column}}} is; {hint}")
    ours = [name for name in columns if name in _NOT_FROM_NAMES]
    if ours:
        raise BadInput(f"{option}: {{{ours[0]}}} is a column that cyto writes itself; call it something else")
    check_column_names(columns, option)
    return NamePattern(text, columns, expression)


def columns_from_names(paths: list[str], patterns: Iterable[NamePattern]) -> FromNames:
    """The columns that patterns read from paths; null where a pattern does not fit.

    Raises
    ------
    BadInput
        If a pattern fits no path, or two patterns read different values of one column.
    """
    given = [*patterns]
    names = sorted({name for each in given for name in each.columns}, key=_in_our_order)
    columns: dict[str, list[str | None]] = {name: [None] * len(paths) for name in names}
    takes_folder, unfit = [False] * len(paths), dict[str, list[str]]()
    for pattern in given:
        not_fitting = []
        for row, path in enumerate(paths):
            found = pattern.match(path)
            if found is None:
                not_fitting.append(path)
                continue
            takes_folder[row] |= found[1]
            for name, value in found[0].items():
                if columns[name][row] not in (None, value):
                    raise BadInput(f"two patterns say {name} of {path}: {columns[name][row]!r} and {value!r}")
                columns[name][row] = value
        if len(not_fitting) == len(paths):
            shown = listed([as_unpacked(path) for path in paths])
            raise BadInput(
                f"the pattern {pattern.text!r} fits none of the {len(paths):,} paths ({shown}); it must fit the whole "
                f"path: * is any characters in one folder or file name, ** any folders"
            )
        if not_fitting:
            unfit[pattern.text] = not_fitting
    return FromNames(columns, takes_folder, unfit)


def _as_expression(text: str) -> str:
    parts = []
    for name, anywhere, anything, literal in _PIECE.findall(text):
        if anywhere:
            parts.append(_ANYWHERE[anywhere.startswith("/"), anywhere.endswith("/")])
        elif anything:
            parts.append("[^/]*?")
        elif literal in ("{", "}"):
            raise ValueError(f"a single {literal}")
        elif literal:
            parts.append(re.escape(literal))
        elif not name.isidentifier():
            raise ValueError(f"{{{name}}} is no name: letters, digits and _ are")
        else:
            parts.append(f"(?P<{name}>[^/]+?)")
    return "".join(parts)


_ANYWHERE = {  # by: is there a / before the two asterisks, and after them?
    (False, False): ".*?",
    (False, True): "(?:.*/)?",
    (True, False): "/.*",
    (True, True): "/(?:.*/)?",
}


def _in_our_order(name: str) -> tuple[int, str]:
    return (MANIFEST_COLUMNS.index(name), "") if name in MANIFEST_COLUMNS else (len(MANIFEST_COLUMNS), name)
