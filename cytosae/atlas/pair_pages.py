"""Pages of pairs of diseases that were compared: two plots, and the strongest cells of both sides."""

from typing import Any

import numpy as np
import pyarrow as pa

from .concept_pages import pair_of
from .frames import Frames
from .plan import LISTED
from .site import Site, packed

_COLUMNS = ("mean_a", "mean_b", "difference", "q", "hedges_g", "p")


def write_pair_pages(site: Site, frames: Frames) -> None:
    """Write a page for each comparison, and its columns as data, which the filters of other pages also use."""
    inputs = frames.inputs
    for number, comparison in enumerate(inputs.comparisons):
        table, pair = inputs.comparison_table(number), pair_of(inputs, frames.cohort, number)
        columns = {name: table[name].to_numpy(zero_copy_only=False).astype(np.float32) for name in _COLUMNS}
        site.data(f"pair-{pair['file']}", {name: packed(values) for name, values in columns.items()})
        summary = comparison.header.summary or {}
        site.page(
            f"pairs/{pair['file']}.html",
            "pair.html",
            **frames.shared,
            **pair,
            summary=summary,
            tau=comparison.header.spec["tau"],
            tops={side: _top(frames, table, side) for side in "ab"},
            shown=[
                {**row, "side": side, "cells": frames.beside(row["latent"], frames.choice.pairs[number][row["latent"]])}
                for side in "ab"
                for row in _top(frames, table, side)
                if row["latent"] in frames.choice.pairs[number]
            ],
        )


def _top(frames: Frames, table: pa.Table, side: str) -> list[dict[str, Any]]:
    """The latents that are higher on one side, by rank."""
    ranks = table[f"rank_{side}"].to_numpy(zero_copy_only=False)
    chosen = np.flatnonzero(ranks <= LISTED)
    rows = table.take(pa.array(chosen[np.argsort(ranks[chosen])])).to_pylist()
    return [{**row, **frames.concept(row["latent"])} for row in rows]
