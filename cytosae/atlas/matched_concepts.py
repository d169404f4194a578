"""Which concept of another atlas is the match of which: what a concept's page says of it, and where both stand."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .other_atlas import OtherAtlas

PER_PAGE = 40
_MOST = 1_000  # pairs: the highest correlations, or of one SAE the largest differences of frequency


@dataclass(frozen=True, eq=False)
class Pairs:
    """Concepts with a page in both atlases, in the order of the pages, and what the pages say of all."""

    other: OtherAtlas
    rows: Sequence[dict[str, Any]]
    facts: Mapping[str, Any]

    @property
    def shown(self) -> Sequence[dict[str, Any]]:
        """Those that stand beside their match."""
        return self.rows[:_MOST]

    @cached_property
    def _place(self) -> dict[int, int]:
        return {row["latent"]: at for at, row in enumerate(self.rows)}

    def of(self, latent: int) -> dict[str, Any]:
        """What the page of a concept says of its match: `match` (None: it has no page in the other atlas).

        `link` leads to the pair, and `cell` is the strongest image of the match with its map; None: it is not shown.
        """
        at = self._place.get(latent)
        said = {"name": self.facts["names"][1], "is_matched": self.facts["is_matched"], "most": _MOST}
        if at is None:
            return {**said, "match": None}
        row = self.rows[at]
        other, is_shown = row["other"], at < _MOST
        cell = frame_of(other, 0) if is_shown and other["images"] else None
        if cell is not None:
            cell["is_seen"] = self.other.has_picture(cell["image"])
        link = f"{page_name(at // PER_PAGE)}#latent-{latent}" if is_shown else None
        return {**said, "match": {**row, "link": link, "cell": cell}}


def page_name(page: int) -> str:
    """Of the pages of pairs, from 0."""
    return "beside.html" if page == 0 else f"beside-{page + 1}.html"


def frame_of(row: Mapping[str, Any], at: int) -> dict[str, Any]:
    """One of the images of a concept of the other atlas."""
    found = {name: row[f"{name}s"][at] for name in ("image", "label")}
    steps = base64.b64encode(row["maps"][at]).decode()
    return {**found, "label": found["label"] or "", "map": steps, "largest": row["largest"][at]}
