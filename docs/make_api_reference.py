"""Writes docs/api.md, what a Python user calls; tests/test_docs.py checks that it is fresh.

Public is what the doors of the three packages name, and what that returns. The source is parsed, never imported: the
page needs no torch, and shows signatures and settings as they are written.
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
_HEAD = """# Python API

Made by `make docs` from the source; a test checks that it is fresh. Here is what the [commands](cli.md) call, and what
they return; the [notebook](notebook.md) has it in use. All of it is had by `import stores, cytocache, cytosae`
(`cytosae.write_barcodes`, `stores.LatentStore`); the headings say where each is defined. Whatever a user can put right
is raised as a `CytoError`, in one line.
"""
_SECTIONS = ("Parameters", "Returns", "Yields", "Raises", "Notes", "Attributes", "Examples")
_NOT_RUN = "<!-- not executed: a signature -->"

Definition = ast.FunctionDef | ast.ClassDef


def api_reference() -> str:
    """The whole page."""
    parts = [_HEAD]
    for module, names in _public().items():
        source = _Source(module)
        parts.append(f"\n## {module}\n\n{_escaped(source.summary())}\n")
        for name in names:
            parts += _entry(*source.find(name), name)
    return "".join(parts)


class _Source:
    """A module as text and as a tree."""

    def __init__(self, module: str) -> None:
        path = ROOT / Path(*module.split("."))
        self.path = path / "__init__.pyi" if path.is_dir() else path.with_suffix(".py")
        self.module = module
        self.text = self.path.read_text()
        self.tree = ast.parse(self.text)

    def summary(self) -> str:
        return (ast.get_docstring(self.tree) or "").split("\n\n")[0].replace("\n", " ")

    def find(self, name: str) -> tuple["_Source", ast.stmt]:
        """The definition of `name`, followed to where it was imported from."""
        for node in self.tree.body:
            if isinstance(node, Definition) and node.name == name:
                return self, node
            if isinstance(node, ast.Assign) and name in [ast.unparse(target) for target in node.targets]:
                return self, node
            if isinstance(node, ast.ImportFrom) and name in [alias.asname or alias.name for alias in node.names]:
                package = self.module if self.path.name == "__init__.pyi" else self.module.rpartition(".")[0]
                return _Source(f"{package}.{node.module}" if node.level else str(node.module)).find(name)
        raise LookupError(f"{self.module} has no {name}")

    def lines(self, first: int, last: int) -> str:
        """Lines first to last, from 1, without their common indentation."""
        return textwrap.dedent("\n".join(self.text.splitlines()[first - 1 : last]))


def _public() -> dict[str, list[str]]:
    """Module -> names, in the order of the page: what the doors of the three packages name, and what these return."""
    public: dict[str, list[str]] = {}
    for package in ("stores", "cytocache", "cytosae"):
        for name in _named_by_door(package):
            source, node = _Source(package).find(name)
            names = public.setdefault(source.module, [])
            found = [*_returned(source, node)] if isinstance(node, Definition) else []
            names += [each for each in (*found, name) if each not in names]
    return {module: sorted(names, key=str.lower) for module, names in public.items()}


def _named_by_door(package: str) -> list[str]:
    tree = ast.parse((ROOT / package / "__init__.pyi").read_text())
    nodes = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module is not None]
    return [alias.name for node in nodes for alias in node.names]


def _returned(source: _Source, node: Definition) -> Iterator[str]:
    """Public classes of the same module that a function returns."""
    if isinstance(node, ast.FunctionDef) and node.returns is not None:
        names = set(re.findall(r"\w+", ast.unparse(node.returns)))
        for other in source.tree.body:
            if isinstance(other, ast.ClassDef) and other.name in names and not other.name.startswith("_"):
                yield other.name


def _entry(source: _Source, node: ast.stmt, name: str) -> Iterator[str]:
    yield f"\n### {name}\n"
    if isinstance(node, ast.FunctionDef):
        yield from _function(source, node)
    elif isinstance(node, ast.ClassDef):
        yield from _class(source, node)
    else:
        yield _code(source.lines(node.lineno, node.end_lineno or node.lineno))


def _function(source: _Source, node: ast.FunctionDef) -> Iterator[str]:
    marks = [f"@{ast.unparse(mark)}" for mark in node.decorator_list]
    signature = source.lines(node.lineno, node.body[0].lineno - 1)
    yield _code("\n".join([*marks, signature]).removesuffix(":"))
    yield _markdown(ast.get_docstring(node) or "")


def _class(source: _Source, node: ast.ClassDef) -> Iterator[str]:
    bases = ", ".join(ast.unparse(base) for base in node.bases)
    fields = [child for child in node.body if isinstance(child, ast.AnnAssign)]
    head = f"class {node.name}({bases})" if bases else f"class {node.name}"
    if fields:
        last = max(child.end_lineno or child.lineno for child in node.body if not isinstance(child, Definition))
        body = source.lines(fields[0].lineno, last)
        head += ":\n" + textwrap.indent(body, "    ")
    yield _code(head)
    yield _markdown(ast.get_docstring(node) or "")
    methods = [child for child in node.body if isinstance(child, ast.FunctionDef) and ast.get_docstring(child)]
    methods = [child for child in methods if not child.name.startswith("_") or child.name == "__init__"]
    properties = [child for child in methods if "property" in map(ast.unparse, child.decorator_list)]
    if properties:
        yield "\n" + "\n".join(map(_property, properties)) + "\n"
    for child in methods:
        if child not in properties:
            yield f"\n#### {node.name}.{child.name}\n"
            yield from _function(source, child)


def _property(node: ast.FunctionDef) -> str:
    said = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
    return f"- `{node.name}` (`{ast.unparse(node.returns) if node.returns else 'Any'}`): {_escaped(said)}"


def _code(text: str) -> str:
    return f"\n{_NOT_RUN}\n```python\n{text}\n```\n"


def _markdown(docstring: str) -> str:
    """A docstring with numpydoc headings: the prose as it is, a list for each section."""
    headings = rf"^({'|'.join(_SECTIONS)})\n-+\n"
    prose, *rest = re.split(headings, inspect.cleandoc(docstring), flags=re.MULTILINE)
    paragraphs = re.split(r"\n\n+(?!    )", prose.strip())
    parts = [f"\n{_escaped(text) if not _is_table(text) else _as_text(text)}\n" for text in paragraphs if text]
    for title, body in zip(rest[::2], rest[1::2], strict=True):
        items = [_item(entry) for entry in re.split(r"\n(?=\S)", body.strip())]
        parts.append(f"\n**{title}**\n\n" + "\n".join(items) + "\n")
    return "".join(parts)


def _is_table(paragraph: str) -> bool:
    """Columns made with blanks, which markdown would close up."""
    return re.search(r"\S {3,}\S", paragraph) is not None and not paragraph.startswith("    ")


def _as_text(paragraph: str) -> str:
    return f"```text\n{paragraph}\n```"


def _item(entry: str) -> str:
    """`name : text`, or a name (`name : type`) with its text below, as an item of a list."""
    head, *below = entry.split("\n")
    name, colon, text = head.partition(" : ")
    if not colon and not below:
        return f"- {_escaped(head)}"
    if below and " " not in text:
        name, text = f"{name}: {text}" if text else name, ""
    return f"- `{name.strip()}`: {_escaped(' '.join([text, *below]).strip())}".replace("    ", "")


def _escaped(text: str) -> str:
    """Nothing outside of backticks and indented lines is taken for markup."""
    lines = []
    for line in text.split("\n"):
        pieces = line.split("`")
        pieces[::2] = [re.sub(r"([*_\[\]])", r"\\\1", piece).replace("<", "&lt;") for piece in pieces[::2]]
        lines.append(line if line.startswith("    ") else "`".join(pieces))
    return "\n".join(lines)


if __name__ == "__main__":
    (Path(__file__).parent / "api.md").write_text(api_reference())
