"""What a section of the report is made of; the template draws each kind."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from .page_pictures import Picture


@dataclass(frozen=True, kw_only=True)
class Prose:
    """A paragraph."""

    text: str
    kind: str = "prose"


@dataclass(frozen=True, kw_only=True)
class Heading:
    """Of a part of a section."""

    text: str
    kind: str = "heading"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Names and values."""

    rows: Sequence[tuple[str, str]]
    kind: str = "facts"


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table; the first column is text, the columns in `text` too, the others are numbers."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    text: Sequence[int] = ()
    kind: str = "table"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A picture with its numbers."""

    picture: Picture
    alt: str
    caption: str
    is_wide: bool = False
    kind: str = "figure"


@dataclass(frozen=True, kw_only=True)
class Caveats:
    """What to keep in mind."""

    lines: Sequence[str]
    kind: str = "caveats"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One image of a concept: the cell, and the map of the latent over it."""

    cell: Picture | None  # None: it cannot be shown, `label` says why
    map: Picture | None
    label: str


@dataclass(frozen=True, kw_only=True)
class Concept:
    """A latent with its images."""

    name: str
    link: str  # of its page in the atlas; "": none
    why: str  # it is shown
    facts: str
    cells: Sequence[Cell]


@dataclass(frozen=True, kw_only=True)
class Concepts:
    """Latents, one below the other."""

    rows: Sequence[Concept]
    kind: str = "concepts"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One figure of the SAE with its healthy range."""

    name: str
    mark: str  # good, better (could be), bad or unknown
    says: str
    healthy: str
    next: str


@dataclass(frozen=True, kw_only=True)
class Verdicts:
    """The health of the SAE."""

    rows: Sequence[Verdict]
    kind: str = "verdicts"


@dataclass(frozen=True, kw_only=True)
class Files:
    """Where things lie: (path, link or "", what it is, how large, what to type)."""

    rows: Sequence[tuple[str, str, str, str, str]]
    kind: str = "files"


Block = Prose | Heading | Facts | Table | Figure | Caveats | Concepts | Verdicts | Files


@dataclass(kw_only=True)
class Section:
    """A section of the page."""

    id: str
    title: str
    blocks: list[Block] = field(default_factory=list)
