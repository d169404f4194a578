"""The files of a site: pages from templates, data as scripts, and a list of all with their hashes.

Data travels in scripts, as a browser fetches nothing from file://. Each script is one call, `CYTO.add("<name>", ...)`.
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

from stores.files import is_dropping, sha256_file

_NONE = "\N{EN DASH}"  # what is not defined
_HERE = Path(__file__).parent
_KINDS = {"float32": "f4", "float16": "f2", "uint32": "u4", "uint16": "u2", "uint8": "u1", "int32": "i4"}
# what could end a script element, or a line of JavaScript
_ESCAPES = {ord(letter): f"\\u{ord(letter):04x}" for letter in "<>&\u2028\u2029"}


class Site:
    """A folder that a site is written into, and what was written. With no folder, files are only measured."""

    def __init__(self, root: Path | None) -> None:
        self.root = root
        self._files: dict[str, tuple[int, str]] = {}

    def write(self, name: str, content: bytes) -> None:
        """Write one file; `name` is its path below the root, of our own making, never from the data."""
        assert ".." not in name
        assert name not in self._files
        if self.root is not None:
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        self._files[name] = (len(content), hashlib.sha256(content).hexdigest())

    def take_in(self, folder: str) -> None:
        """Files that somebody else wrote into a folder of the site."""
        assert self.root is not None
        for path in sorted((self.root / folder).iterdir()):
            if is_dropping(path.name):
                continue
            self._files[f"{folder}/{path.name}"] = (path.stat().st_size, sha256_file(path))

    def page(self, name: str, template: str, /, **context: Any) -> None:
        """Write a page from a template; names in `context` are escaped there."""
        depth = name.count("/")
        self.write(name, _templates().get_template(template).render(up="../" * depth, **context).encode())

    def data(self, name: str, value: Any) -> None:
        """Write data/`name`.js."""
        self.write(f"data/{name}.js", script_data(name, value))

    def n_bytes(self, prefix: str = "") -> int:
        """Size of the files below a folder."""
        return sum(size for name, (size, _) in self._files.items() if name.startswith(prefix))

    def n_files(self, prefix: str = "") -> int:
        """Number of them."""
        return sum(name.startswith(prefix) for name in self._files)

    def table(self) -> pa.Table:
        """name, bytes, sha256 of every file, by name."""
        names = sorted(self._files)
        sizes, hashes = ([self._files[name][n] for name in names] for n in (0, 1))
        return pa.table({"name": names, "bytes": pa.array(sizes, pa.int64()), "sha256": pa.array(hashes, pa.string())})


def script_data(name: str, value: Any) -> bytes:
    """A script that hands `value` (plain JSON values, `packed` arrays) to the pages; it can end no element."""
    text = f"CYTO.add({json.dumps(name)},{json.dumps(value, separators=(',', ':'), allow_nan=False)});\n"
    return text.translate(_ESCAPES).encode()


def packed(values: npt.NDArray[Any]) -> dict[str, str]:
    """An array as little-endian bytes in base64, which a page reads far quicker than numbers in JSON."""
    kind = _KINDS[values.dtype.name]
    raw = np.ascontiguousarray(values, values.dtype.newbyteorder("<")).tobytes()
    return {"dtype": kind, "b64": base64.b64encode(raw).decode()}


def copy_static(site: Site) -> None:
    """The style sheet and the script; those of the review page belong to its server."""
    for name in ("atlas.css", "atlas.js"):
        site.write(f"assets/{name}", (_HERE / "static" / name).read_bytes())


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
    environment.filters |= {"short": short, "share": share, "whole": whole, "json": readable}
    return environment


def _clean(value: Any) -> Any:
    """What a template prints: a name from the data goes through `plain_text`; it is escaped afterwards."""
    return plain_text(value) if type(value) is str else value


def short(value: float | None) -> str:
    """Three significant digits; a dash for what is not defined."""
    return _NONE if value is None or value != value else f"{value:.3g}"


def share(value: float | None) -> str:
    """Percent."""
    return _NONE if value is None or value != value else f"{100 * value:.3g}%"


def whole(value: int | None) -> str:
    """A whole number with commas."""
    return _NONE if value is None else f"{value:,}"


def readable(value: Mapping[str, Any]) -> str:
    """JSON for people."""
    return json.dumps(value, indent=1, ensure_ascii=False)


def plain_text(name: str) -> str:
    """A name from the data as it is shown: what cannot be printed becomes the replacement character.

    Among it are the marks that turn the direction of writing, with which a name could disguise what follows it.
    """
    return "".join(letter if letter.isprintable() or letter == "\n" else "\N{REPLACEMENT CHARACTER}" for letter in name)
