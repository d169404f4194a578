"""Lets mkdocstrings read the docstrings of this project; mkdocs.yml names this file as an extension of griffe.

Docstrings here are numpydoc with three habits of their own: a parameter is `name : what it is` (its type stands in
the signature), what is returned may be described without its type, and a field of a dataclass may be described by the
comment behind it. Nothing is imported: griffe parses the source.
"""

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import griffe

_SECTIONS = ("Parameters", "Returns", "Yields", "Raises", "Notes", "Attributes", "Examples")
_HEADING = re.compile(rf"^({'|'.join(_SECTIONS)})\n-+\n", re.MULTILINE)


class OurDocstrings(griffe.Extension):
    """Rewrites docstrings before they are parsed."""

    def on_function(self, *, func: griffe.Function, **kwargs: Any) -> None:
        """Parameters and what is returned, as numpydoc has them."""
        if func.docstring:
            func.docstring.value = as_numpydoc(func.docstring.value, str(func.returns or ""))

    def on_class(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        """The same for the docstring of a class."""
        if cls.docstring:
            cls.docstring.value = as_numpydoc(cls.docstring.value, "")

    def on_attribute(self, *, attr: griffe.Attribute, **kwargs: Any) -> None:
        """A comment behind a field becomes its docstring."""
        if attr.docstring is None and attr.lineno and isinstance(attr.filepath, Path):
            lines = attr.filepath.read_text().splitlines()[attr.lineno - 1 : attr.endlineno]
            if said := comment_behind(lines[-1]):
                attr.docstring = griffe.Docstring(said, lineno=attr.lineno, parent=attr)


def as_numpydoc(docstring: str, returned: str) -> str:
    """The docstring with sections as griffe's numpydoc parser reads them.

    returned : the type in the signature
    """
    prose, *rest = _HEADING.split(inspect.cleandoc(docstring))
    parts = [_with_tables(prose.strip())]
    for title, body in zip(rest[::2], rest[1::2], strict=True):
        entries = re.split(r"\n(?=\S)", body.strip())
        if title in ("Parameters", "Attributes"):
            body = "\n".join(map(_parameter, entries))
        elif title in ("Returns", "Yields") and not _has_type(entries):
            body = f"{returned}\n    " + " ".join(body.split())
        parts.append(f"{title}\n{'-' * len(title)}\n{body.strip()}")
    return "\n\n".join(parts)


def comment_behind(line: str) -> str:
    """The comment at the end of a line of code; empty if there is none."""
    at = line.find("  # ")
    while at >= 0:
        try:
            ast.parse(line[:at].strip())
        except SyntaxError:
            at = line.find("  # ", at + 1)
        else:
            return line[at + 4 :].strip()
    return ""


def _parameter(entry: str) -> str:
    """`name : text`, also over several lines, as the name with the text below; a type stays where it is."""
    head, *below = entry.split("\n")
    name, colon, text = head.partition(" : ")
    if not colon or (below and " " not in text):
        return entry
    return f"{name}\n    " + " ".join([text, *(line.strip() for line in below)])


def _has_type(entries: list[str]) -> bool:
    """Whether each entry is a type (or a name and a type) with its text indented below."""
    return all(re.match(r"[\w.\[\], :|]+\n    ", entry) for entry in entries)


def _with_tables(prose: str) -> str:
    """Columns made with blanks become preformatted text, which markdown would close up."""
    paragraphs = re.split(r"\n\n+", prose)
    return "\n\n".join(
        f"```text\n{each}\n```" if re.search(r"\S {3,}\S", each) and not each.startswith("    ") else each
        for each in paragraphs
    )
