"""What experts have said of each concept in a review: how many called it meaningful, and the name they gave it.

Read from the journals of `cyto atlas serve` when an atlas is built (again). Who said it is not shown.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from stores.files import sha256_json

from .questions import MEANINGFUL
from .verdicts import current, read_verdicts

NOT_ASKED = "not asked about"
OPEN = "not yet reviewed"
DIFFER = "verdicts differ"
VERDICTS = (NOT_ASKED, OPEN, *MEANINGFUL.values(), DIFFER)  # as gallery.js counts them


@dataclass(frozen=True)
class Opinion:
    """The verdicts that count on one concept, one per reviewer."""

    verdicts: tuple[str, ...]
    names: tuple[str, ...]  # what those who called it meaningful called it; the last one last

    @property
    def verdict(self) -> str:
        """One of `VERDICTS`: what all said, or that they differ."""
        said = {*self.verdicts}
        return MEANINGFUL[said.pop()] if len(said) == 1 else DIFFER

    @property
    def name(self) -> str:
        """The name that most gave, of equal ones the latest; "" if nobody gave one."""
        counts = Counter(name.casefold() for name in self.names)
        most = max(counts.values(), default=0)
        return next((name for name in reversed(self.names) if counts[name.casefold()] == most), "")


def read_opinions(reviews: Path, concepts: str) -> dict[int, Opinion]:
    """Latent -> what was said of it when it was asked whether it is a meaningful concept.

    Parameters
    ----------
    reviews : folder of journals
    concepts : identity of the concepts; verdicts on others are left out

    Raises
    ------
    StoreNotFound, DamagedStore, SpecMismatch
        As `read_verdicts`.
    """
    found: dict[int, list[tuple[str, str, str]]] = {}
    for verdict in current(read_verdicts(reviews)).values():
        if verdict.question == "meaningful" and verdict.concepts == concepts:
            found.setdefault(verdict.latent, []).append((verdict.time, verdict.verdict, verdict.name.strip()))
    return {
        latent: Opinion(
            tuple(said for _, said, _ in rows),
            tuple(name for _, said, name in sorted(rows) if said == "meaningful" and name),
        )
        for latent, rows in sorted(found.items())
    }


def opinions_identity(opinions: dict[int, Opinion]) -> str:
    """SHA-256 of all that is shown of them: another verdict makes another atlas."""
    return sha256_json([[latent, each.verdict, each.name] for latent, each in opinions.items()])
