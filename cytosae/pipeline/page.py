"""`report.html`: one page of a run, for reading and for printing. It says what the stores say, and nothing else.

Sections: page_sections.py; pictures: page_pictures.py; the form: templates/report.html. Names from the data are escaped
in the template; the page has no script and loads nothing.
"""

import base64
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2

from cytosae.stage_one import StageOne
from stores.destination import claimed
from stores.errors import StoreNotFound
from stores.files import write_atomic
from stores.spec import cyto_version
from stores.wording import Report

from .page_inputs import open_run
from .page_sections import make_sections

REPORT = "report.html"
_HERE = Path(__file__).parent / "templates"


@dataclass(frozen=True, kw_only=True)
class ReportResult(Report):
    """The page that was written."""

    out: Path  # the file
    n_bytes: int
    was_complete: bool  # the same page was there
    missing: tuple[str, ...]  # parts of a run that are not there (yet)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Parts of the run that the page could not show."""
        return tuple(f"not in the report: {part}" for part in self.missing)

    @property
    def address(self) -> str:
        """Of the page, for a browser."""
        return self.out.absolute().as_uri()

    def lines(self) -> Iterator[str]:
        """Size, and what to open."""
        yield f"{self.out}: {self.n_bytes / 1e6:.1f} MB in one file, which loads nothing"
        yield f"open {self.address}"

    def _repr_html_(self) -> str:
        return super()._repr_html_() + f'<p><a href="{self.address}">{REPORT}</a></p>'


def write_run_report(run: Path | str, *, stage_one: StageOne | None = None) -> ReportResult:
    """Write `report.html` into the folder of a run, and the pictures that no command draws: patients by latents.

    Parts of the run that are not there are named, not drawn. Equal stores give an equal page. Memory: a level of
    barcodes of at most some hundred patients, and one picture.

    Parameters
    ----------
    stage_one : `cytocache.bridge`, which reads the images; None: concepts are shown without their images

    Raises
    ------
    StoreNotFound
        If there is no run.
    DamagedStore
        If a result of it was changed.
    """
    root = Path(run)
    if not (root / "recipe.toml").is_file():
        raise StoreNotFound(f"no run at {root}: it has no recipe.toml. Make one with cyto run IMAGES -o {root}")
    with claimed(root / REPORT):
        found = open_run(root, stage_one)
        sections = make_sections(found)
        content = render(
            title=root.absolute().name,
            sections=sections,
            short=found.short,
            numbers=found.numbers,
            is_trained=found.is_trained,
        )
        path = root / REPORT
        was_complete = path.is_file() and path.read_bytes() == content
        if not was_complete:
            write_atomic(path, content)
    return ReportResult(out=path, n_bytes=len(content), was_complete=was_complete, missing=tuple(found.missing))


def render(**context: Any) -> bytes:
    """The page; its content security policy names the one style sheet by its hash."""
    style = (_HERE / "report.css").read_text()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    page = _template().render(style=style, style_hash=f"sha256-{digest}", version=cyto_version(), **context)
    return page.encode()


@lru_cache(maxsize=1)
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_clean,
    )
    return environment.get_template("report.html")


def _clean(value: Any) -> Any:
    """Characters that are not printable, such as those that turn the direction of text, become the replacement one."""
    if type(value) is not str:
        return value
    return "".join(
        letter if letter.isprintable() or letter == "\n" else "\N{REPLACEMENT CHARACTER}" for letter in value
    )
