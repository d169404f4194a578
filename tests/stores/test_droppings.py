"""What network disks, macOS and NFS leave in folders is no cell and no damage; Cyto's own pictures are no cells."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from places import GOLDEN

from cytocache.datasets import list_files, open_images
from cytocache.index import index_dataset
from cytosae.review import read_verdicts
from stores import BarcodeStore, LatentStore, plan_output
from stores.errors import BadInput
from stores.files import is_dropping, sync_tree, write_json
from stores.result_folder import ResultStore, begin_results
from stores.spec import COMPARISON, new_header, write_header
from stores.verify import verify_activations, verify_latents

DROPPINGS = (".DS_Store", "._zarr.json", ".nfs000000000001", "Thumbs.db", "desktop.ini", ".fuse_hidden01")
FOLDERS = ("@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found", ".snapshot", ".Trash-1000", "System Volume Information")


def _litter(root: Path) -> None:
    """Droppings in every folder below `root`."""
    for folder in [root, *(path for path in root.rglob("*") if path.is_dir())]:
        for name in DROPPINGS:
            (folder / name).write_bytes(b"\0\1Mac OS X")
        for name in FOLDERS:
            (folder / name).mkdir()
            (folder / name / "SYNOPHOTO_THUMB_M.jpg").write_bytes(b"\xff\xd8\xff")


def test_folders_of_disks_and_systems_hold_no_cells(tmp_path: Path) -> None:
    for name in ("a/1.png", "b/2.png", "b/recycled cells/3.png", "@home/4.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    before = list_files(tmp_path)[0]
    _litter(tmp_path)
    images, others, passed_over = list_files(tmp_path)
    assert images == before
    assert len(images) == 4
    assert len(others) == 5 * len(DROPPINGS)
    assert len(passed_over) == 5 * len(FOLDERS)
    assert open_images(tmp_path).passed_over == tuple(passed_over)
    assert any("network disk" in finding.what for finding in index_dataset(tmp_path).findings)


def test_results_below_the_images_hold_no_cells_and_none_is_taken_for_images(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(b"")
    for name in ("a/compared", "sweep"):
        (tmp_path / name / "figures").mkdir(parents=True)
        (tmp_path / name / "figures" / "f.png").write_bytes(b"")
    write_header(tmp_path / "a" / "compared", new_header(COMPARISON, {"seed": 1}))
    write_json(tmp_path / "sweep" / "sweep.json", {"format": "sweep"})
    assert list_files(tmp_path) == (["a/1.png"], [], ["a/compared", "sweep"])
    with pytest.raises(BadInput, match="holds a comparison, and no images of cells"):
        open_images(tmp_path / "a" / "compared")


def test_droppings_are_no_damage_to_results_and_no_hindrance(tmp_path: Path) -> None:
    _litter_empty = tmp_path / "out"
    _litter_empty.mkdir()
    for name in DROPPINGS:
        (_litter_empty / name).write_bytes(b"")
    writer = begin_results(_litter_empty, COMPARISON, {"seed": 1})
    writer.write_table("t", pa.table({"x": [1]}))
    (writer.root / "._t.parquet").write_bytes(b"fork")
    (writer.root / "._t.json").write_bytes(b"fork")
    header = writer.finish({})
    assert [*(header.summary or {})["files"]] == ["t.parquet"]
    (_litter_empty / "._t.parquet").unlink()
    _litter(_litter_empty)
    ResultStore(_litter_empty, COMPARISON).check()
    assert begin_results(_litter_empty, COMPARISON, {"seed": 1}).is_complete
    assert plan_output(tmp_path / "new", new_header(COMPARISON, {})).work == tmp_path / "new"


def test_droppings_are_no_damage_to_caches_latents_barcodes_and_reviews(tmp_path: Path) -> None:
    for name in ("activations-v1.zarr", "latents-v1.zarr", "barcodes-v1", "atlas-v1.reviews"):
        shutil.copytree(GOLDEN / name, tmp_path / name)
    barcodes = BarcodeStore(tmp_path / "barcodes-v1")
    before = barcodes.read("patient")
    verdicts = read_verdicts(tmp_path / "atlas-v1.reviews")
    _litter(tmp_path)
    (tmp_path / "atlas-v1.reviews" / "._somebody.jsonl").write_bytes(b"\0\5fork\n")
    assert not [problem for problem in verify_activations(tmp_path / "activations-v1.zarr") if problem]
    assert not [problem for problem in verify_latents(tmp_path / "latents-v1.zarr") if problem]
    assert LatentStore(tmp_path / "latents-v1.zarr").read_images(0, 1).values.size
    barcodes = BarcodeStore(tmp_path / "barcodes-v1")
    barcodes.check()
    np.testing.assert_array_equal(barcodes.read("patient").X.toarray(), before.X.toarray())
    assert read_verdicts(tmp_path / "atlas-v1.reviews") == verdicts


def test_names_of_users_are_no_droppings() -> None:
    for name in ("a", "recycled", "@home", "trash", "Thumbs", "snapshots", "nfs", "DS_Store.png", "_index", "#1"):
        assert not is_dropping(name), name
    sync_tree(GOLDEN)
