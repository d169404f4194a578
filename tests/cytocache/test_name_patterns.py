"""Columns from folder and file names, and masks that lie beside images."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from archive_maker import pack
from command_line import run
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cytocache.index import index_images
from cytocache.masks import find_masks
from cytocache.masks_beside import find_masks_beside
from cytocache.name_patterns import columns_from_names, parse_pattern
from stores.errors import BadInput
from stores.tables import column, read_image_table


def matched(text: str, path: str) -> dict[str, str] | None:
    found = parse_pattern(text, "--patient-from", "patient").match(path)
    return None if found is None else found[0]


def write(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(path.encode())
    return root


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("{patient}/*", "P1/1.png", {"patient": "P1"}),
        ("{patient}/*", "P1/NGS/1.png", None),
        ("{patient}/**", "P1/NGS/x/1.png", {"patient": "P1"}),
        ("**/{patient}/*", "P1/1.png", {"patient": "P1"}),
        ("**/{patient}/*", "a/b/P1/1.png", {"patient": "P1"}),
        ("a/**/{patient}_*", "a/b/c/P1_7_x.png", {"patient": "P1"}),
        ("a/**/{patient}_*", "a/P1_7_x.png", {"patient": "P1"}),
        ("*/{patient}_*.png", "NGS/P1_7.png", {"patient": "P1"}),
        ("*/{patient}_*.png", "NGS/P1-7.png", None),
        ("{disease}/{patient}/{label}/*", "AML/P 1/NGS/1.png", {"disease": "AML", "patient": "P 1", "label": "NGS"}),
        ("P{patient}.*", "P007.png", {"patient": "007"}),
        ("{patient}.png", "a+(b).png", {"patient": "a+(b)"}),
        ("x.y/{patient}.png", "xzy/a.png", None),
        ("{patient}/*", "P1.zip::1.png", {"patient": "P1"}),
        ("{patient}.zip::{label}/*", "P1.zip::BAS/1.png", {"patient": "P1", "label": "BAS"}),
        (r"regex:.*/(?P<patient>P\d+)_.*", "NGS/P12_3.png", {"patient": "P12"}),
        (r"regex:(?P<patient>P\d+)", "P12_3.png", None),
        (r"regex:(?P<patient>P\d+)(_(?P<batch>b\d))?\.png", "P12.png", {"patient": "P12"}),
    ],
)
def test_what_a_pattern_reads(pattern: str, path: str, expected: dict[str, str] | None) -> None:
    assert matched(pattern, path) == expected


@given(
    st.lists(
        st.text(st.characters(exclude_characters="/\n\0{}*:", exclude_categories=["Cs"]), min_size=1),
        min_size=2,
        max_size=2,
    )
)
def test_any_two_names_are_read_as_they_are(parts: list[str]) -> None:
    """Whatever stands in a name means itself; against a split of the path."""
    path = "/".join(parts)
    assert matched("{patient}/{label}", path) == {"patient": parts[0], "label": parts[1]}
    assert matched(f"{parts[0]}/{{patient}}", path) == {"patient": parts[1]}


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("*/{label}/*", r"--patient-from: .* does not say where \{patient\} is; expected a pattern such as"),
        ("{patient/*", r"is no pattern \(a single \{\)"),
        ("{pat ient}", r"\{pat ient\} is no name"),
        ("{patient}_{patient}", "is no pattern"),
        ("regex:(?P<patient>", "is no pattern"),
        ("{patient}/{path}", r"\{path\} is a column that cyto writes itself"),
        ("{patient}/{status}", r"\{status\} is a column that cyto writes itself"),
        ("{patient}/{__x}", "rename it"),
    ],
)
def test_a_faulty_pattern_is_told_in_words(pattern: str, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        parse_pattern(pattern, "--patient-from", "patient")


def test_patterns_that_fit_nothing_or_contradict_each_other() -> None:
    with pytest.raises(BadInput, match=r"fits none of the 2 paths \(a.png, b.png\); it must fit the whole path"):
        columns_from_names(["a.png", "b.png"], [parse_pattern("{patient}/*", "--patient-from", "patient")])
    both = [
        parse_pattern("{patient}/*", "--patient-from", "patient"),
        parse_pattern("*/{label}_{patient}.png", "", "label"),
    ]
    with pytest.raises(BadInput, match=r"two patterns say patient of P1/x_P2.png: 'P1' and 'P2'"):
        columns_from_names(["P1/x_P2.png"], both)


def test_a_table_from_folder_and_file_names(tmp_path: Path) -> None:
    root = write(tmp_path / "cells", "P007/NGS/1.tif", "P007/BAS/2.tif", "P8/NGS/3.tif", "loose.tif")
    done = run(
        *("data", "index", root, "-o", tmp_path / "t.parquet", "--patient-from", "P{patient}/*/*"),
        *("--label-from", "*/{label}/*"),
    )
    assert done.exit_code == 0, done.output
    table = read_image_table(tmp_path / "t.parquet")
    assert column(table, "path") == ["P007/BAS/2.tif", "P007/NGS/1.tif", "P8/NGS/3.tif", "loose.tif"]
    assert column(table, "patient") == ["007", "007", "8", None]
    assert column(table, "label") == ["BAS", "NGS", "NGS", None]
    lines = done.stdout.splitlines()
    assert "  first rows:" in lines
    assert lines[lines.index("  first rows:") + 1].split() == ["path", "label", "patient"]
    assert lines[lines.index("  first rows:") + 2].split() == ["P007/BAS/2.tif", "BAS", "007"]
    assert "  paths that '*/{label}/*' does not fit; kept, without its columns: 1 (loose.tif)" in lines


def test_the_first_folder_is_the_label_unless_a_pattern_takes_it(tmp_path: Path) -> None:
    root = write(tmp_path / "cells", "NGS/P1_1.png", "BAS/P2_1.png")
    by_file = index_images(root, patient_from="*/{patient}_*").images.table
    assert column(by_file, "label") == ["BAS", "NGS"]
    assert column(by_file, "patient") == ["P2", "P1"]
    by_folder = index_images(root, patient_from="{patient}/*").images.table
    assert column(by_folder, "label") == [None, None]
    assert column(by_folder, "patient") == ["BAS", "NGS"]


def test_further_columns_and_suffixes(tmp_path: Path) -> None:
    root = write(tmp_path / "cells", "AML/P1/1_rgb.PNG", "AML/P1/1_red.png", "AML/P1/1.dat", "ok/P2/1_rgb.png")
    index = index_images(root, patient_from="{disease}/{patient}/{cell}_rgb.*", suffixes=["_rgb.png"])
    assert column(index.images.table, "path") == ["AML/P1/1_rgb.PNG", "ok/P2/1_rgb.png"]
    assert column(index.images.table, "disease") == ["AML", "ok"]
    assert index.images.table.column_names[-2:] == ["cell", "duplicate_of"]
    assert index_images(root, suffixes=[".dat"]).images.table.num_rows == 1
    with pytest.raises(BadInput, match=r"expected files ending in .gif; found 4 other files"):
        index_images(root, suffixes=[".gif"])


def test_an_index_without_patterns_is_byte_for_byte_as_before(tmp_path: Path) -> None:
    """The seven columns, the same metadata, and no line more on the screen."""
    root = write(tmp_path / "cells", "NGS/1.png", "BAS/2.png")
    done = run("data", "index", root, "-o", tmp_path / "t.parquet", "--no-hash")
    assert done.stdout.splitlines() == [
        f"folder: 2 images in {root}",
        "            images",
        "  BAS            1",
        "  NGS            1",
        "  total          2",
        f"{tmp_path / 't.parquet'}: 2 images, 2 classes",
        f"next: cyto cache extract {tmp_path / 't.parquet'} {tmp_path / 't.acts.zarr'} --root {root}",
    ]
    metadata = pq.read_schema(tmp_path / "t.parquet").metadata
    assert json.loads(metadata[b"cyto"]) == {"made_by": "cyto data index", "dataset": "folder", "class_set": None}


def test_patterns_belong_to_ones_own_data(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="mll23 has a layout that is known"):
        index_images(tmp_path, dataset="mll23", patient_from="{patient}/*")


# ------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize(
    ("mask", "image"),
    [
        ("A/1_mask.png", "A/1.jpg"),
        ("A/1-seg.png", "A/1.jpg"),
        ("A/1 Mask.PNG", "A/1.jpg"),
        ("A/1_nucleus_mask.png", None),
        ("masks/A/1.png", "A/1.jpg"),
        ("A/Masks/1.png", "A/1.jpg"),
        ("masks/1.png", "images/1.jpg"),
        ("masks/1_mask.png", "images/1.jpg"),
        ("1_mask.png", "1_rgb.png"),
        ("labels/1.png", "2.png"),
        ("mask.png", "A/1.jpg"),
        ("A/_mask.png", "A/1.jpg"),
    ],
)
def test_which_files_are_masks_of_which_images(mask: str, image: str | None) -> None:
    pairs: dict[str, dict[str, str]] = {
        "A/1_nucleus_mask.png": {},
        "labels/1.png": {},
        "mask.png": {},
        "A/_mask.png": {},
    }
    images = [image or "A/1.jpg", "B/7.jpg"]
    assert find_masks_beside([mask, *images]) == pairs.get(mask, {mask: image})


def test_a_mask_of_two_images_is_of_none() -> None:
    assert find_masks_beside(["1_mask.png", "1.png", "1.jpg"]) == {}


@pytest.mark.parametrize("packed", [False, True])
def test_masks_are_named_and_with_the_option_left_out_and_kept_by_name(packed: bool, tmp_path: Path) -> None:
    """As far as `cyto concept masks` reads them: the table that is written is the one that it takes."""
    files: dict[str, bytes] = {}
    for name in ("NGS/1.png", "NGS/2.png", "NGS/1_mask.png", "BAS/3.png", "masks/BAS/3.png"):
        (tmp_path / "cells" / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(len(files)).integers(0, 2, (8, 8), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "cells" / name)
        files[name] = (tmp_path / "cells" / name).read_bytes()
    root = pack(tmp_path / "cells.zip", files) if packed else tmp_path / "cells"
    plain = index_images(root, tmp_path / "plain.parquet")
    assert plain.images.table.num_rows == 5
    (named,) = [finding for finding in plain.findings if "masks of others" in finding.what]
    assert named.what.endswith("taken as images; --masks leaves them out")
    assert named.names == ("NGS/1_mask.png of NGS/1.png", "masks/BAS/3.png of BAS/3.png")
    assert re.search("2 files may be masks of other images", " ".join(plain.images.notes))
    index = index_images(root, tmp_path / "t.parquet", masks=True)
    table = read_image_table(tmp_path / "t.parquet")
    assert column(table, "path") == ["BAS/3.png", "NGS/1.png", "NGS/2.png"]
    assert column(table, "mask") == ["masks/BAS/3.png", "NGS/1_mask.png", None]
    found = find_masks(tmp_path / "t.parquet", table, root=index.images.root)
    assert found.paths == {0: index.images.root / "masks/BAS/3.png", 1: index.images.root / "NGS/1_mask.png"}
