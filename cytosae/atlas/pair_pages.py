"""Pages of pairs of diseases that were compared: two plots, and the strongest cells of both sides."""

from typing import Any

import numpy as np
import pyarrow as pa

from .cohort import Values
from .comparisons import pair_of, taken_into_account
from .drawings import TWO_ROW, composition_picture
from .frames import Frames
from .latent_lists import higher_on
from .plan import LISTED
from .sentence import ALPHA
from .site import Site, packed

_COLUMNS = ("mean_a", "mean_b", "difference", "q", "hedges_g", "p")


def write_pair_pages(site: Site, frames: Frames) -> None:
    """Write a page for each comparison, and its columns as data, which the filters of other pages also use."""
    inputs, cohort, composition = frames.inputs, frames.cohort, frames.composition
    for number, comparison in enumerate(inputs.comparisons):
        table, pair = inputs.comparison_table(number), pair_of(inputs, cohort, number)
        columns = {name: table[name].to_numpy(zero_copy_only=False).astype(np.float32) for name in _COLUMNS}
        site.data(f"pair-{pair['file']}", {name: packed(values) for name, values in columns.items()})
        spec, summary = comparison.header.spec, comparison.header.summary or {}
        names = np.array([cohort.diseases[each] if each >= 0 else "" for each in cohort.disease_of.tolist()], object)
        is_b = (names != "") & (names != spec["a"]) if spec["b_is_rest"] else names == str(spec["b"])
        sides = np.flatnonzero(names == spec["a"]), np.flatnonzero(is_b)
        corrected, is_of_one_mix = taken_into_account(spec)
        site.page(
            f"pairs/{pair['file']}.html",
            "pair.html",
            **frames.shared,
            **pair,
            summary=summary,
            composition=composition_picture(composition, *sides, row=TWO_ROW),
            datasets=sorted({cohort.datasets[each] for each in np.concatenate(sides).tolist()}),
            corrected=corrected,
            is_of_one_mix=is_of_one_mix,
            tau=comparison.header.spec["tau"],
            tops={side: _top(frames, table, side) for side in "ab"},
            shown=_shown(frames, table, number),
            largest_clear_p=largest_clear_p(columns["p"], columns["q"]),
        )


def _shown(frames: Frames, table: pa.Table, number: int) -> list[dict[str, Any]]:
    """The latents whose cells are shown: first those with q of at most `ALPHA`, in both parts by side and rank.

    At the end of each part are those that answer to one place of the image.
    """
    cells = frames.choice.pairs[number]
    rows = []
    for side in "ab":
        some = [latent for latent in higher_on(table, side, table.num_rows) if latent in cells]
        rows += [
            {**row, **frames.concept(latent), **frames.doubts(latent), "side": side}
            | {"cells": frames.beside(latent, cells[latent]), "is_clear": row["q"] is not None and row["q"] <= ALPHA}
            for latent, row in zip(some, table.take(pa.array(some, pa.int64())).to_pylist(), strict=True)
        ]
    return sorted(rows, key=lambda row: (not row["is_clear"], row["same_patch"] is not None))


def largest_clear_p(p: Values, q: Values) -> float | None:
    """The largest p with q of at most `ALPHA`; None if there is none, or if a smaller p has a larger q."""
    is_clear = q <= ALPHA
    if not is_clear.any():
        return None
    largest = float(p[is_clear].max())
    return None if (p[~is_clear] < largest).any() else largest


def _top(frames: Frames, table: pa.Table, side: str) -> list[dict[str, Any]]:
    """The latents that are higher on one side, by rank."""
    ranks = table[f"rank_{side}"].to_numpy(zero_copy_only=False)
    chosen = np.flatnonzero(ranks <= LISTED)
    rows = table.take(pa.array(chosen[np.argsort(ranks[chosen])])).to_pylist()
    return [{**row, **frames.concept(row["latent"])} for row in rows]
