"""Folders of results, beyond what test_store_suite.py asks of every kind: their words, and figures as equal files."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cytosae.plotting import new_figure, plain, save_both
from stores import COMPARISON, PROBE, ResultStore, begin_results
from stores.errors import BadInput, IncompleteStore, StoreNotFound
from stores.result_folder import ResultWriter

TABLE = pa.table({"latent": [0, 1], "difference": [0.5, None]})


def begun(root: Path) -> ResultWriter:
    return begin_results(root, COMPARISON, {"a": "1"})


def test_written_is_read_and_repeated_is_complete(tmp_path: Path) -> None:
    """Also after a run that was cut before its end, whose half is written again."""
    root = tmp_path / "out"
    begun(root).write_table("differential", TABLE.slice(0, 1))
    with pytest.raises(IncompleteStore, match="the cyto compare that writes it has not finished"):
        ResultStore(root, COMPARISON)
    writer = begun(root)
    assert not writer.is_complete
    writer.write_table("differential", TABLE)
    writer.write_json("scores", {"n": 1})
    writer.finish({})
    store = ResultStore(root, COMPARISON)
    assert store.table("differential").equals(TABLE)
    assert store.json("scores") == {"n": 1}
    assert pq.read_schema(root / "differential.parquet").metadata[b"cyto"].decode() == store.header.identity
    assert begun(root).is_complete
    with pytest.raises(BadInput, match=r"has no other.parquet; it holds differential.parquet, scores.json"):
        store.table("other")
    with pytest.raises(StoreNotFound, match=r"no probe at .*: it holds a comparison, version 1"):
        ResultStore(root, PROBE)


def test_figures_draw_hostile_names_as_they_stand(tmp_path: Path) -> None:
    """Mathematics, markup, control characters and length; and twice the same figure gives the same bytes."""
    names = ["$\\frac{", "<script>alert(1)</script>", "a\x1b[31m\nb", "x" * 500]
    for copy in ("one", "two"):
        figure, axes = new_figure(width=8, height=3)
        for number, name in enumerate(names):
            axes.text(0, number / 4, plain(name), fontsize=6)
        save_both(figure, tmp_path / copy)
    svg = (tmp_path / "one.svg").read_bytes()
    assert svg == (tmp_path / "two.svg").read_bytes()
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert b"<script>" not in svg
    assert b"&lt;script&gt;" in svg
    assert b"\\frac{" in svg
    assert b"\x1b" not in svg
