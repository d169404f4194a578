"""Folders of results: whole or incomplete, never half; changed files are found; equal figures are equal files."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cytosae.drawing import new_figure, plain, save_both
from stores import COMPARISON, PROBE, ResultStore, begin_results
from stores.errors import BadInput, DamagedStore, IncompleteStore, SpecMismatch, StoreNotFound
from stores.results import ResultWriter

TABLE = pa.table({"latent": [0, 1], "difference": [0.5, None]})


def begun(root: Path, a: int = 1, *, overwrite: bool = False) -> ResultWriter:
    return begin_results(root, COMPARISON, {"a": a}, overwrite=overwrite)


def write_all(writer: ResultWriter, n: int = 1) -> None:
    writer.write_table("differential", TABLE)
    writer.write_json("scores", {"n": n})
    writer.finish({"n": n})


def test_written_is_read_and_repeated_is_complete(tmp_path: Path) -> None:
    """Also after a run that was cut before its end, whose half is written again."""
    root = tmp_path / "out"
    begun(root).write_table("differential", TABLE.slice(0, 1))
    with pytest.raises(IncompleteStore, match="the cyto compare that writes it has not finished"):
        ResultStore(root, COMPARISON)
    writer = begun(root)
    assert not writer.is_complete
    write_all(writer)
    store = ResultStore(root, COMPARISON)
    assert store.table("differential").equals(TABLE)
    assert store.json("scores") == {"n": 1}
    assert pq.read_schema(root / "differential.parquet").metadata[b"cyto"].decode() == store.header.identity
    assert begun(root).is_complete
    with pytest.raises(BadInput, match=r"has no other.parquet; it holds differential.parquet, scores.json"):
        store.table("other")
    with pytest.raises(StoreNotFound, match=r"no probe at .*: it holds a comparison, version 1"):
        ResultStore(root, PROBE)


def test_other_settings_are_refused_and_overwrite_swaps_at_the_end(tmp_path: Path) -> None:
    root = tmp_path / "out"
    write_all(begun(root))
    with pytest.raises(SpecMismatch, match=r"a comparison with other settings \(a 1 against 2"):
        begun(root, 2)
    writer = begun(root, 2, overwrite=True)
    writer.write_json("scores", {"n": 2})
    assert ResultStore(root, COMPARISON).json("scores") == {"n": 1}  # the old ones, until the new are whole
    write_all(writer, 2)
    assert ResultStore(root, COMPARISON).json("scores") == {"n": 2}


@pytest.mark.parametrize("damage", ["change", "remove"])
def test_a_changed_or_lost_file_is_found(tmp_path: Path, damage: str) -> None:
    root = tmp_path / "out"
    write_all(begun(root))
    path = root / "differential.parquet"
    if damage == "change":
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    else:
        path.unlink()
    with pytest.raises(DamagedStore, match=r"differential.parquet is .*cyto compare --overwrite makes it again"):
        ResultStore(root, COMPARISON).table("differential")
    with pytest.raises(DamagedStore):
        begun(root)  # not "already complete"


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
