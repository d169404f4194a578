"""The files of a site: pages from templates, data as scripts, and a list of all files with their hashes.

Data is in scripts, since browsers do not fetch files from file:// pages. Each is one call, `CYTO.add("<name>", ...)`.
"""

import base64
import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stores.files import is_dropping, named, plain_number, sha256_file
from stores.wording import plain_text

_NONE = "\N{EN DASH}"  # shown for undefined values
_HERE = Path(__file__).parent
CARD_SIZE = (288, 192)  # width and height of the picture of a card (cards.py), as in gallery.js
_KINDS = {"float32": "f4", "float16": "f2", "uint32": "u4", "uint16": "u2", "uint8": "u1"}
_KINDS |= {"int32": "i4", "int16": "i2"}
# characters that could end a script element or a line of JavaScript
_ESCAPES = {ord(letter): f"\\u{ord(letter):04x}" for letter in "<>&\u2028\u2029"}


class Site:
    """The folder of a site and a record of its files. Without a folder, files are only measured."""

    def __init__(self, root: Path | None) -> None:
        self.root = root
        self._files: dict[str, tuple[int, str]] = {}

    def write(self, name: str, content: bytes) -> None:
        """Write one file; `name` is its path below the root, never taken from the data."""
        assert ".." not in name
        assert name not in self._files
        if self.root is not None:
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with named(path):
                path.write_bytes(content)
        self._files[name] = (len(content), hashlib.sha256(content).hexdigest())

    def take_in(self, folder: str) -> None:
        """Record the files that were written to a folder of the site by other code."""
        assert self.root is not None
        for path in sorted((self.root / folder).iterdir()):
            if not is_dropping(path.name):
                self.take_in_file(f"{folder}/{path.name}")

    def take_in_file(self, name: str) -> None:
        """Record one such file."""
        assert self.root is not None
        self._files[name] = ((self.root / name).stat().st_size, sha256_file(self.root / name))

    def page(self, name: str, template: str, /, **context: Any) -> None:
        """Write a page from a template; names in `context` are escaped there."""
        context |= {"up": "../" * name.count("/"), "here": _section(name)}
        self.write(name, _templates().get_template(template).render(**context).encode())

    def data(self, name: str, value: Any) -> None:
        """Write data/`name`.js."""
        self.write(f"data/{name}.js", script_data(name, value))

    def n_bytes(self, prefix: str = "") -> int:
        """Bytes of all files whose name starts with `prefix`."""
        return sum(size for name, (size, _) in self._files.items() if name.startswith(prefix))

    def n_files(self, prefix: str = "") -> int:
        """Number of files whose name starts with `prefix`."""
        return sum(name.startswith(prefix) for name in self._files)

    def table(self) -> pa.Table:
        """name, bytes, sha256 of every file, by name."""
        names = sorted(self._files)
        sizes, hashes = ([self._files[name][n] for name in names] for n in (0, 1))
        return pa.table({"name": names, "bytes": pa.array(sizes, pa.int64()), "sha256": pa.array(hashes, pa.string())})


def script_data(name: str, value: Any) -> bytes:
    """A script with `value` (plain JSON values, `packed` arrays) for the pages, safe inside a script element."""
    plain = json.dumps(value, separators=(",", ":"), allow_nan=False, default=plain_number)
    text = f"CYTO.add({json.dumps(name)},{plain});\n"
    return text.translate(_ESCAPES).encode()


def packed(values: npt.NDArray[Any]) -> dict[str, str]:
    """An array as base64 of little-endian bytes, which a page reads much faster than numbers in JSON."""
    kind = _KINDS[values.dtype.name]
    raw = np.ascontiguousarray(values, values.dtype.newbyteorder("<")).tobytes()
    return {"dtype": kind, "b64": base64.b64encode(raw).decode()}


def _section(name: str) -> str:
    """The page in the list at the top of each page that one belongs to; "" for images, which belong to several."""
    folder, _, last = name.rpartition("/")
    sections = {"concepts": "index", "patients": "patients", "diseases": "diseases", "pairs": "diseases", "images": ""}
    own = "beside" if last.startswith("beside-") else last.removesuffix(".html")
    return sections.get(folder, {"families": "diseases"}.get(own, own))


def copy_static(site: Site) -> None:
    """Copy the style sheets and scripts of the pages; the server has those of the review page."""
    for path in sorted((_HERE / "static").iterdir()):
        if path.suffix in (".css", ".js") and path.stem != "review":
            site.write(f"assets/{path.name}", path.read_bytes())


@lru_cache(maxsize=1)
def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_clean,
    )
    environment.globals["card_size"] = CARD_SIZE
    environment.filters |= {"short": short, "share": share, "whole": whole, "json": readable}
    return environment


def _clean(value: Any) -> Any:
    """Finalize of the templates: each text goes through `plain_text` before it is escaped."""
    return plain_text(value) if type(value) is str else value


def short(value: float | None) -> str:
    """Three significant digits; a dash if undefined."""
    return _NONE if value is None or value != value else f"{value:.3g}"


def share(value: float | None) -> str:
    """Percent."""
    return _NONE if value is None or value != value else f"{100 * value:.3g}%"


def whole(value: int | None) -> str:
    """A whole number with commas."""
    return _NONE if value is None else f"{value:,}"


def readable(value: Mapping[str, Any]) -> str:
    """Indented JSON."""
    return json.dumps(value, indent=1, ensure_ascii=False, default=plain_number)
