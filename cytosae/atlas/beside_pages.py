"""Pages that show concepts beside their match in another atlas: another SAE, another layer, or another cohort."""

from typing import Any

from .frames import Frames
from .matched_concepts import PER_PAGE, Pairs, frame_of, page_name
from .other_atlas import OtherAtlas
from .site import Site


def write_beside_pages(site: Site, frames: Frames, pairs: Pairs) -> None:
    """Write beside.html, beside-2.html, ... and the pictures of the other atlas that they show."""
    other, shown = pairs.other, pairs.shown
    n_pages = max(1, -(-len(shown) // PER_PAGE))
    taken: dict[int, bool] = {}  # image of the other atlas -> can it be shown?
    for page in range(n_pages):
        rows = shown[page * PER_PAGE : (page + 1) * PER_PAGE]
        site.page(
            page_name(page),
            "beside.html",
            **frames.shared,
            **pairs.facts,
            n_shown=len(shown),
            pages=[{"name": page_name(n), "text": n + 1, "is_here": n == page} for n in range(n_pages)],
            pairs=[
                {**row, "cells": _ours(frames, row["latent"]), "theirs": _theirs(site, other, row["other"], taken)}
                for row in rows
            ],
        )


def find_pairs(frames: Frames, other: OtherAtlas) -> Pairs:
    """Best match first; of one SAE those whose frequencies differ most."""
    if other.match is None:
        matches = [{"latent_a": latent, "latent_b": latent} for latent in sorted(other.rows)]
    else:
        matches = other.match.table("matches").to_pylist()
        matches.sort(key=lambda row: (-row["correlation"], row["latent_a"]))
    both = [row for row in matches if frames.plan.has_page(row["latent_a"]) and row["latent_b"] in other.rows]
    rows = [
        {**frames.concept(row["latent_a"]), **frames.numbers(row["latent_a"]), "other": other.rows[row["latent_b"]]}
        | {"match": None if other.match is None else row}
        for row in both
    ]
    if other.match is None:  # of one SAE: first those whose frequencies differ most
        rows.sort(key=lambda row: (-abs(row["frequency"] - row["other"]["frequency"]), row["latent"]))
    said = {} if other.match is None else dict(other.match.header.summary or {})
    names = said.get("names", ["this atlas", "the other"])
    facts = {
        "is_matched": other.match is not None,
        "names": ["this atlas", "the other"] if frames.shared["pseudonyms"] else names,
        "summary": said,
        "n_matches": len(matches),
        "n_both": len(both),
        "n_other": len(other.rows),
    }
    return Pairs(other, rows, facts)


def _ours(frames: Frames, latent: int) -> dict[str, Any]:
    mine = frames.references(latent, 3)
    return {"frames": mine, "scale": max((each["largest"] for each in mine), default=0.0)}


def _theirs(site: Site, other: OtherAtlas, row: dict[str, Any], taken: dict[int, bool]) -> dict[str, Any]:
    found = []
    for at, image in enumerate(row["images"]):
        if image not in taken:
            content = other.picture(image)
            taken[image] = content is not None
            if content is not None:
                site.write(f"beside/{image}.jpg", content)
        found.append(frame_of(row, at) | {"is_seen": taken[image]})
    return {"frames": found, "scale": max((each["largest"] for each in found), default=0.0)}
