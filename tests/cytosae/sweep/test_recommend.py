"""What a sweep recommends: the least held-out error at comparable L0, never the densest SAE."""

from pathlib import Path
from typing import Any

import pytest
from token_caches import write_cache
from training_runs import tokens_of_cells

from cytosae.sweep import sweep
from cytosae.sweep.figures import plot_sweep
from cytosae.sweep.recommend import bands_of, is_on_frontier, recommendation

pytestmark = pytest.mark.usefixtures("one_thread")


def row(name: str, l0: float | None, explained: float | None, *, caches: str = "a", **more: Any) -> dict[str, Any]:
    means = {"held_out_l0": l0, "held_out_explained_variance": explained}
    return {
        **{"caches": caches, "name": name, "n": 1, "width": 192, "n_latents": 1536, "n_failed": 0, "n_unfinished": 0},
        **{
            f"{key}_{part}": value if part == "mean" else None
            for key, value in means.items()
            for part in ("mean", "sd")
        },
        **more,
    }


SPARSE = [row("s", 9, 0.6), row("t", 15.9, 0.8), row("u", 12, 0.75)]
DENSE = [row("v", 40, 0.85), row("w", 318, 0.98)]


def test_the_best_of_each_band_is_found_and_the_densest_is_not_recommended() -> None:
    """L0 8 to 16: t of three; 32 to 64: v; 256 to 512: w, which explains most. Healthy: 4 to 48, its middle is 13.9."""
    bands = bands_of([*DENSE, *SPARSE])
    assert [(band.low, band.high, [each["name"] for each in band.rows], band.is_healthy) for band in bands] == [
        (8, 16, ["t", "u", "s"], True),
        (32, 64, ["v"], True),
        (256, 512, ["w"], False),
    ]
    assert [band.best["name"] for band in bands if band.is_recommended] == ["t"]
    text = recommendation([*DENSE, *SPARSE], ["name", "seed"])
    assert "| **8 to 16** | t | 15.9 | 0.2000 | 0.2500 | 3 |" in text
    assert "| 256 to 512 (not healthy) | w | 318.0 | 0.0200 | - | 1 |" in text
    assert "Recommended for barcodes: name t (L0 15.9, in the middle of the healthy range 4 to 48; 0.2000" in text


def test_nothing_is_recommended_where_nothing_is_healthy_or_held_out() -> None:
    assert "None is recommended for barcodes: no L0 lies in the healthy range 4 to 48" in recommendation(
        [DENSE[1]], ["name"]
    )
    unmeasured = [row("x", None, None)]
    assert bands_of(unmeasured) == []
    assert "No setting is recommended: that takes the error on images" in recommendation(unmeasured, ["name"])
    assert recommendation([{**unmeasured[0], "n": 0}], ["name"]) == ""


def test_kinds_of_caches_are_not_compared() -> None:
    """The same L0 of two blocks: each has its own best."""
    table = [
        row("x", 10, 0.9, caches="block10"),
        row("y", 11, 0.5, caches="block2"),
        row("z", 12, 0.4, caches="block2"),
    ]
    assert [(band.caches, band.best["name"], band.is_recommended) for band in bands_of(table)] == [
        ("block10", "x", True),
        ("block2", "y", True),
    ]
    assert "Recommended for barcodes of block2: name y" in recommendation(table, ["name"])


def test_the_frontier_has_all_that_no_other_beats() -> None:
    """t is better than u and s? No: s and u have fewer latents. A twin of t with more latents or more error is out."""
    table = [*SPARSE, *DENSE, row("bad", 20, 0.7), row("worse", 15.9, 0.79), row("twin", 15.9, 0.8)]
    found = [each["name"] for each in table if is_on_frontier(each, table)]
    assert found == ["s", "t", "u", "v", "w", "twin"]


def test_the_figure_has_the_frontier_and_a_ring(tmp_path: Path) -> None:
    table = [*SPARSE, *DENSE, row("bad", 20, 0.7)]
    names = {"x": "held_out_l0", "y": "held_out_explained_variance"}
    plot_sweep(table, ["name"], [tmp_path / "s.svg"], **names)
    drawn = (tmp_path / "s.svg").read_text()
    assert 'id="frontier"' in drawn
    assert 'id="recommended"' in drawn


def test_a_sweep_writes_it_under_its_table(tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "acts.zarr", tokens_of_cells(3))
    text = (
        "[base]\nexpansion = 8\nbatch_tokens = 10\ntokens = 120\nwarmup_steps = 4\n{}[[runs]]\nactivation='topk'\nk=5\n"
    )
    for name, holdout, words in (
        ("with", "holdout = 0.3\n", "Recommended for barcodes"),
        ("without", "", "No setting"),
    ):
        (tmp_path / f"{name}.toml").write_text(text.format(holdout))
        done = sweep(tmp_path / f"{name}.toml", [cache], tmp_path / name)
        assert words in (tmp_path / name / "table.md").read_text()
        assert done.markdown == (tmp_path / name / "table.md").read_text()
        assert len(done.recommended) == (name == "with")
