"""The image table: what users' CSV and Parquet files become, what is refused with which words, and its hash."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stores.barcode_store import begin_level, write_tables
from stores.errors import BadInput
from stores.tables import (
    MANIFEST_COLUMNS,
    column,
    image_table,
    listed,
    parquet_bytes,
    parquet_table,
    read_image_table,
    read_sealed,
    read_table_file,
    readable,
    sealed_parquet,
    table_sha256,
    with_outcome,
    write_image_table,
)


def read_csv(tmp_path: Path, text: str | bytes) -> dict[str, list[str | None]]:
    path = tmp_path / "images.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_table_file(path).to_pydict()


def table_of(**columns: list[str | None]) -> pa.Table:
    return image_table(columns, source="images.csv", dataset="cells")


# -------------------------------------------------------------------------------------------------------- CSV


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("path,label\na.png,x\n", {"path": ["a.png"], "label": ["x"]}),
        (b"\xef\xbb\xbfpath,label\r\na.png,x\r\n", {"path": ["a.png"], "label": ["x"]}),
        ('"path","label"\n"a, b.png","said ""x"""\n', {"path": ["a, b.png"], "label": ['said "x"']}),
        ('path,label\n"a.png","two\nlines"\n', {"path": ["a.png"], "label": ["two\nlines"]}),
        (" path , label \n a.png , x \n", {"path": ["a.png"], "label": ["x"]}),
        ("path,label\n\na.png,\n\n", {"path": ["a.png"], "label": [None]}),
        ("path,label\na.png,x", {"path": ["a.png"], "label": ["x"]}),
        ("path,patient\na.png,007\n", {"path": ["a.png"], "patient": ["007"]}),
        ("path,label\nZellen/große Zelle.png,Prä\n", {"path": ["Zellen/große Zelle.png"], "label": ["Prä"]}),
        ("path\n", {"path": []}),
    ],
    ids=[
        "plain",
        "BOM, CRLF",
        "quotes",
        "line in a cell",
        "blanks",
        "empty lines",
        "no end",
        "zeros",
        "UTF-8",
        "no row",
    ],
)
def test_a_csv_file_is_read_as_strings(text: str | bytes, expected: dict[str, Any], tmp_path: Path) -> None:
    """Whatever Excel or pandas wrote; nothing is taken for a number."""
    assert read_csv(tmp_path, text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "images.csv is empty; expected a header line with a column 'path'"),
        ("path,label\na.png,x\nb.png\n", "line 3 of .*images.csv has 1 fields, the header has 2"),
        ("path\na.png\n\nb, c.png\n", "line 4 of .*images.csv has 2 fields, the header has 1"),
        ("path,label,label\na.png,x,y\n", "has two columns 'label'"),
        ("path,label, label\na.png,x,y\n", "has two columns 'label'"),
        ("path,,label\na.png,x,y\n", "has a column without name"),
        ('path\n"a.png\n', "cannot be read as a UTF-8 CSV file: unexpected end of data"),
        ('path\n"a"b.png\n', "cannot be read as a UTF-8 CSV file: "),
        ("path\na.png\n".encode("utf-16")[:-1], "cannot be read as a UTF-8 CSV file: .*truncated data"),
        (b"path\na\x81\x8d.png\n", "cannot be read as a UTF-8 CSV file: "),  # neither Windows-1252
    ],
)
def test_a_faulty_csv_file_is_refused(text: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=message):
        read_csv(tmp_path, text)


def test_a_table_that_is_no_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no table at .*nowhere.csv: expected a .csv or .parquet file"):
        read_table_file(tmp_path / "nowhere.csv")
    with pytest.raises(BadInput, match="no table at"):
        read_table_file(tmp_path)
    (tmp_path / "images.xlsx").write_bytes(b"PK")
    with pytest.raises(BadInput, match=r"images.xlsx is neither .csv nor .parquet; convert it to one of them"):
        read_table_file(tmp_path / "images.xlsx")
    (tmp_path / "IMAGES.PARQUET").write_bytes(b"PAR1")
    with pytest.raises(BadInput, match="cannot be read as a Parquet table of plain columns"):
        read_table_file(tmp_path / "IMAGES.PARQUET")


CELLS: list[list[str | None]] = [["a.png", "007", "x, y"], ["b.png", None, "Prä;B"], ["c.png", "12", "-1,5"]]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("kind", ["plain", "sep=", "row names", "write.table", "cleared", "blanks"])
def test_what_spreadsheets_and_r_export_means_the_same(
    separator: str, encoding: str, end: str, kind: str, tmp_path: Path
) -> None:
    """Separators, encodings, line ends, row names, cleared rows and columns, blanks around: one table."""
    rows = [["path", "patient", "label"], *[[cell or "" for cell in row] for row in CELLS]]
    if kind in ("row names", "write.table"):
        rows = [[""] * (kind == "row names") + rows[0], *[[str(n), *row] for n, row in enumerate(rows[1:], 1)]]
    if kind == "cleared":
        rows = [[*row, "", ""] for row in rows]
        rows = [*rows[:2], [""] * 5, *rows[2:], [""] * 5, [" "] * 7]
    if kind == "blanks":
        rows = [[f"  {cell} " for cell in row] for row in rows]
    lines = [separator.join(f'"{cell}"' if cell and kind != "blanks" else cell for cell in row) for row in rows]
    if kind == "blanks":
        lines = [separator.join(f'"{cell}"' for cell in row) for row in rows]
    text = (f"sep={separator}{end}" if kind == "sep=" else "") + end.join(lines) + end
    found = read_csv(tmp_path, text.encode(encoding))
    assert found == {name: [row[i] for row in CELLS] for i, name in enumerate(["path", "patient", "label"])}


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["latin-1", "cp1252"])
def test_a_western_spreadsheet_of_before_utf_8_is_read_and_told(
    separator: str, end: str, encoding: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As Excel saves "CSV" on a German Windows; leading zeros of patients stay."""
    rows = [["path", "patient", "label"], ["größe.tif", "007", "Erythroblasten früh"], ["b.tif", "0012", "é"]]
    found = read_csv(tmp_path, (end.join(separator.join(row) for row in rows) + end).encode(encoding))
    assert found == {name: [row[n] for row in rows[1:]] for n, name in enumerate(rows[0])}
    assert "read as Windows-1252 (Latin-1); look whether these are right: 'größe', 'früh', 'é'" in caplog.text


@pytest.mark.timeout(60)
def test_a_long_cell_is_no_matter_in_windows_1252(tmp_path: Path) -> None:
    """A hundred thousand letters, as of a picture in base64: time must not grow with its square."""
    content = b"path,note\na.png," + b"a" * 100_000 + b"\nb.png,fr\xfch\n"
    assert read_csv(tmp_path, content)["note"][1] == "früh"


def test_a_price_in_euros_is_windows_1252(tmp_path: Path) -> None:
    assert read_csv(tmp_path, "path,note\na.png,5 €\n".encode("cp1252"))["note"] == ["5 €"]


def test_blanks_at_the_ends_of_names_are_removed_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = read_csv(tmp_path, "path;patient;label\na.tif;P1 ;NGS\nb.tif;\u00a0P1;BAS\nc.tif; ;two words\n")
    assert found == {
        "path": ["a.tif", "b.tif", "c.tif"],
        "patient": ["P1", "P1", None],
        "label": ["NGS", "BAS", "two words"],
    }
    assert "blanks at the ends of 2 cells are removed: 'P1 ', '\\xa0P1'" in caplog.text
    caplog.clear()
    read_csv(tmp_path, "path,label\na.tif,x\n")
    assert caplog.text == ""


def test_names_that_are_most_likely_one_are_told_and_stay(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`P1` and `p1` are two patients, one of which may stand in the training folds and the other in the test."""
    accents = ("M\u00fcller", "Mu\u0308ller")  # as Windows and as a Mac write it
    rows = zip("abcd", ("P1", "p1", "P2", ""), ("AML", "AML", "aml", "CML"), (*accents, "E OS", "E  OS"), strict=True)
    text = "path,patient,disease,label,slide\n" + "".join(f"{','.join(row)},{row[0].upper()}\n" for row in rows)
    found = read_csv(tmp_path, text)
    assert found["patient"] == ["P1", "p1", "P2", None]
    assert found["label"] == [*accents, "E OS", "E  OS"]
    several = "that differ only in case, blanks or the coding of letters are taken as several"
    assert f"names in 'patient' {several}: 'P1' and 'p1'\n" in caplog.text
    assert f"names in 'disease' {several}: 'AML' and 'aml'\n" in caplog.text
    assert f"names in 'label' {several}: {accents[0]!r} and {accents[1]!r}, 'E OS' and 'E  OS'\n" in caplog.text
    caplog.clear()
    read_csv(tmp_path, "path,patient,slide\na,P1,x\nb,P2,X\nc,P1,x\nd,,x\n")  # only names of groups
    assert caplog.text == ""


def test_columns_of_ours_are_known_in_another_spelling_from_csv_and_parquet(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = [" Path ", "PATIENT", "Disease", "Image ID", "label.common", "Age (years)"]
    cells = [["a.png", "b.png"], ["P1", "P2"], ["AML", "CML"], ["1", "2"], ["x", "y"], ["40", "41"]]
    pq.write_table(pa.table(dict(zip(names, cells, strict=True))), tmp_path / "t.parquet")
    rows = [names, *zip(*cells, strict=True)]
    from_csv = read_csv(tmp_path, "\n".join(",".join(row) for row in rows))
    assert from_csv == read_table_file(tmp_path / "t.parquet").to_pydict()
    assert [*from_csv] == ["path", "patient", "disease", "image_id", "label_common", "Age (years)"]
    assert "'PATIENT' as 'patient'" in caplog.text


@pytest.mark.parametrize("pair", [("patient", "Patient"), ("Age", "age "), ("image_id", "Image-ID"), ("a b", "a_b")])
def test_two_columns_that_are_equal_but_for_case_and_blanks_are_refused(pair: tuple[str, str], tmp_path: Path) -> None:
    message = "has two columns .* equal but for case and blanks; rename one"
    with pytest.raises(BadInput, match=message):
        read_csv(tmp_path, f"path,{pair[0]},{pair[1]}\na.png,1,2\n")
    pq.write_table(pa.table({"path": ["a"], pair[0]: ["1"], pair[1]: ["2"]}), tmp_path / "t.parquet")
    with pytest.raises(BadInput, match=message):
        read_table_file(tmp_path / "t.parquet")


def test_words_for_a_missing_value_are_empty_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """From CSV and Parquet alike; words that may be a label or a name of a file stay."""
    gone = ["NA", "N/A", "#N/A", "<NA>", "NaN", "nan", "NULL", "#NULL!", "None", ".", "-", "?", ""]
    kept = ["none", "unknown", "healthy", "0", "Nan Li", "NAD", "negative", "na"]
    words = gone + kept
    columns = {"path": [*map(str, range(len(words)))], "patient": words, "disease": words, "image_id": words}
    columns["image_id"] = ["NA", *map(str, range(1, len(words)))]
    lines = ["path,patient,disease,image_id", *map(",".join, zip(*columns.values(), strict=True))]
    found = read_csv(tmp_path, "\n".join(lines))
    assert found["patient"] == found["disease"] == [None] * len(gone) + kept
    assert found["image_id"][0] == "NA"
    assert "12 in 'patient', 12 in 'disease'" in caplog.text  # the empty one is no word
    pd.DataFrame(columns).astype({"disease": "category"}).to_parquet(tmp_path / "t.parquet")
    assert read_table_file(tmp_path / "t.parquet").to_pydict() == found


def test_patient_numbers_mean_the_same_however_they_were_saved(tmp_path: Path) -> None:
    """pandas writes 12.0 into CSV where one is missing; text keeps its zeros; a dose is no name and stays."""
    frame = pd.DataFrame({"path": ["a", "b", "c"], "patient": [12.0, np.nan, 7.0]})
    frame.to_parquet(tmp_path / "t.parquet")
    frame.to_csv(tmp_path / "t.csv", index=False)
    found = [read_table_file(tmp_path / name)["patient"].to_pylist() for name in ("t.parquet", "t.csv")]
    assert found == [["12", None, "7"]] * 2
    frame.assign(patient=["012", None, "007"]).to_parquet(tmp_path / "t.parquet")
    assert read_table_file(tmp_path / "t.parquet")["patient"].to_pylist() == ["012", None, "007"]
    # two tables put together, of which pandas had made floats of one
    assert read_csv(tmp_path, "path,patient\na,7\nb,7.0\nc,\nd,012\n")["patient"] == ["7", "7", None, "012"]
    assert read_csv(tmp_path, "path,patient\na,P7\nb,7.0\n")["patient"] == ["P7", "7.0"]
    assert read_csv(tmp_path, "path,patient,dose\na,1.0,1.0\nb,1.5,2.0\n") == {
        "path": ["a", "b"],
        "patient": ["1.0", "1.5"],
        "dose": ["1.0", "2.0"],
    }


# ---------------------------------------------------------------------------------------------------- Parquet


def test_pandas_types_become_the_strings_that_were_meant(tmp_path: Path) -> None:
    """An integer column with gaps is float in pandas: 7.0 was 7. Categories, nulls, dates and numbers as strings."""
    frame = pd.DataFrame(
        {
            "path": ["a.png", "b.png", "c.png"],
            "patient": [7.0, np.nan, 12345678901.0],
            "label": pd.Categorical(["x", None, "x"]),
            "dose": [0.5, -1.25, np.inf],
            "age": pd.array([40, None, 41], dtype="Int64"),
            "plate": [1, 2, 3],
            "lane": pd.Categorical([1.0, 2.0, np.nan]),
            "is_new": [True, False, True],
            "note": ["", None, "ok"],
            "nothing": [None, None, None],
            "day": pd.to_datetime(["2024-05-01"] * 3),
        }
    )
    frame.to_parquet(tmp_path / "images.parquet")
    found = read_table_file(tmp_path / "images.parquet").to_pydict()
    assert {found["day"][0][:10]} == {"2024-05-01"}
    del found["day"]
    assert found == {
        "path": ["a.png", "b.png", "c.png"],
        "patient": ["7", None, "12345678901"],
        "label": ["x", None, "x"],
        "dose": ["0.5", "-1.25", "inf"],
        "age": ["40", None, "41"],
        "plate": ["1", "2", "3"],
        "lane": ["1", "2", None],
        "is_new": ["true", "false", "true"],
        "note": [None, None, "ok"],
        "nothing": [None, None, None],
    }


def test_a_folder_named_like_a_partition_adds_no_column(tmp_path: Path) -> None:
    """Arrow would read `patient=7/` as a column of the table."""
    (tmp_path / "patient=7").mkdir()
    pq.write_table(pa.table({"path": ["a.png"]}), tmp_path / "patient=7" / "images.parquet")
    assert read_table_file(tmp_path / "patient=7" / "images.parquet").column_names == ["path"]


def test_a_parquet_column_that_is_no_plain_column_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"path": ["a.png"], "box": [[1, 2]]}), tmp_path / "lists.parquet")
    with pytest.raises(BadInput, match=r"lists.parquet cannot be read as a Parquet table of plain columns"):
        read_table_file(tmp_path / "lists.parquet")
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["path", "path"])
    pq.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(BadInput, match=r"twice.parquet cannot be read .* (Multiple matches|duplicate field)"):
        read_table_file(tmp_path / "twice.parquet")


# ------------------------------------------------------------------------------------------- the checked manifest


def test_a_manifest_has_seven_columns_then_the_users_own() -> None:
    """Missing ids and datasets are filled in, extra columns travel along, an earlier outcome does not."""
    table = table_of(
        hospital=["H1", None],
        path=["a/./1.png", "b//2.png"],
        dataset=[None, "matek19"],
        label=["x", "y"],
        status=["unreadable", "ok"],
        content_hash=["0", "0"],
        error=["bad", None],
    )
    assert table.column_names == [*MANIFEST_COLUMNS, "hospital"]
    assert {str(kind) for kind in table.schema.types} == {"string"}
    assert table.to_pydict() == {
        "image_id": ["cells/a/1.png", "matek19/b/2.png"],
        "path": ["a/1.png", "b/2.png"],
        "label": ["x", "y"],
        "label_common": [None, None],
        "patient": [None, None],
        "disease": [None, None],
        "dataset": ["cells", "matek19"],
        "hospital": ["H1", None],
    }
    assert column(table, "status") == [None, None]
    assert readable(table) == [False, False]


@pytest.mark.parametrize(
    "path",
    [
        "../a.png",
        "a/../../b.png",
        "a/..",
        "/etc/a.png",
        "//server/share/a.png",
        "C:/cells/a.png",
        "C:\\cells\\a.png",
        "C:a.png",
        "\\\\server\\share\\a.png",
        "\\cells\\a.png",
        "..\\a.png",
        "a\\..\\..\\b.png",
        "a\0.png",
    ],
)
def test_a_path_that_leaves_the_root_on_any_system_is_refused(path: str) -> None:
    words = re.escape(
        f"row 2 of images.csv: path {path!r} does not lie below the images' root; give paths relative to it"
    )
    with pytest.raises(BadInput, match=words):
        table_of(path=["a.png", path])


@pytest.mark.parametrize("path", ["a.png", "a/b c/d.png", "..a/b..png", "a/...png", "Zelle-ß/1.tif"])
def test_an_ordinary_path_is_kept(path: str) -> None:
    assert table_of(path=[path])["path"].to_pylist() == [path]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, r"images.csv has no column 'path' \(found: no columns\)"),
        ({"file": ["a"]}, r"images.csv has no column 'path' \(found: file\); name the column of image paths 'path'"),
        ({"path": []}, "images.csv lists no images; expected one row per image"),
        ({"path": ["a.png", None]}, "row 2 of images.csv has an empty path"),
        ({"path": ["", "a.png"]}, "row 1 of images.csv has an empty path"),
        (
            {"path": ["a.png", "b.png", "a.png", "./a.png"]},
            r"images.csv has 2 repeated image ids \(cells/a.png\); give each row its own image_id",
        ),
        (
            {"path": list("abcdefgh"), "image_id": list("11223344")},
            r"has 4 repeated image ids \(1, 2, 3 and 1 more\)",
        ),
    ],
)
def test_a_manifest_that_cannot_be_used_is_refused(columns: dict[str, list[str | None]], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        table_of(**columns)


def test_a_path_may_repeat_under_distinct_ids() -> None:
    assert table_of(path=["a.png", "a.png"], image_id=["left", "right"]).num_rows == 2


def test_the_outcome_says_which_images_were_read() -> None:
    table = with_outcome(table_of(path=["a", "b"]), ["00", None], [None, "not an image"])
    assert table.slice(1, 1).select(["content_hash", "status", "error"]).to_pylist() == [
        {"content_hash": None, "status": "unreadable", "error": "not an image"}
    ]
    assert readable(table) == [True, False]


# ------------------------------------------------------------------------------------------- on disk, and its hash


def full_table() -> pa.Table:
    manifest = table_of(path=["a.png", "b.png"], patient=["P1", None], hospital=["H\u00e4", "x,\n\"y'"])
    return with_outcome(manifest, ["ab", None], [None, "file ends early"])


def test_a_table_survives_parquet_with_its_hash(tmp_path: Path) -> None:
    """Written by us, or by pandas, with other compression, types and row groups: equal cells, equal hash."""
    table = full_table()
    write_image_table(table, tmp_path / "images.parquet")
    back = read_image_table(tmp_path / "images.parquet")
    assert back.equals(table)
    assert [path.name for path in tmp_path.iterdir()] == ["images.parquet"]

    table.to_pandas().to_parquet(tmp_path / "pandas.parquet", compression=None, row_group_size=1, index=False)
    large = table.cast(pa.schema([(name, pa.large_string()) for name in table.column_names]))
    pq.write_table(large, tmp_path / "large.parquet", use_dictionary=False)
    hashes = {table_sha256(read_image_table(path)) for path in tmp_path.iterdir()}
    assert hashes == {table_sha256(table)}


def test_the_hash_is_the_one_of_the_first_release() -> None:
    """It stands in the header of every store: a change of its recipe would orphan them all."""
    assert table_sha256(full_table()) == "0ee0a31075616c1f43ef8f38a9ded9ee6a43a967467ccb3e8ada19fd972c8038"


def test_the_hash_changes_with_any_cell_name_or_order() -> None:
    """Also where a cell moves between columns, or a null becomes an empty string or the word None."""
    table = full_table()
    others = [table.select(table.column_names[::-1]), table.take([1, 0]), table.slice(0, 1)]
    others.append(table.rename_columns([*table.column_names[:-1], "other"]))
    for name in table.column_names:
        for row in range(2):
            for value in ("changed", "", "None", None):
                cells = table[name].to_pylist()
                if cells[row] != value:
                    cells[row] = value
                    place = table.column_names.index(name)
                    others.append(table.set_column(place, name, pa.array(cells, pa.string())))
    hashes = [table_sha256(other) for other in [table, *others]]
    assert len(hashes) > 60
    assert len(set(hashes)) == len(hashes)


def test_a_file_that_is_no_image_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no image table at .*images.parquet; expected Parquet with columns image_id"):
        read_image_table(tmp_path / "images.parquet")
    pq.write_table(pa.table({"path": ["a"]}), tmp_path / "images.parquet")
    with pytest.raises(BadInput, match="no image table at"):
        read_image_table(tmp_path / "images.parquet")


def test_a_long_list_is_cut() -> None:
    assert listed(["a"]) == "a"
    assert listed(["a", "b", "c"]) == "a, b, c"
    assert listed([str(n) for n in range(2003)]) == "0, 1, 2 and 2,000 more"


@pytest.mark.parametrize(
    "name", ["age/sex", "_index", ".", "..", "status", "error", "content_hash", "__age", "zarr.json", "a\0b"]
)
def test_column_names_that_a_later_stage_cannot_keep_are_refused_at_once(name: str) -> None:
    """Not after hours of extraction; and a clinical `status` is not silently replaced by ours."""
    with pytest.raises(BadInput, match=f"has a column {re.escape(repr(name))}.*rename it"):
        image_table({"path": ["a.png"], name: ["remission"]}, source="m.csv", dataset="d")


def test_a_name_that_is_too_long_for_a_folder_is_refused_and_the_longest_is_written(tmp_path: Path) -> None:
    for name in ("x" * 256, "ä" * 128):
        with pytest.raises(BadInput, match=r"whose name has 256 bytes; expected at most 255"):
            image_table({"path": ["a.png"], name: ["1"]}, source="m.csv", dataset="d")
    longest = "ä" * 127 + "x"
    image_table({"path": ["a.png"], longest: ["1"]}, source="m.csv", dataset="d")
    begin_level(tmp_path / "PML::RARA #1%.zarr")
    write_tables(tmp_path / "PML::RARA #1%.zarr", {"obs": pd.DataFrame({longest: ["1"]}, index=["a"])})
    assert (tmp_path / "PML::RARA #1%.zarr" / "obs" / longest).is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["PML::RARA #1%.zarr"]


def test_a_table_read_from_bytes_holds_on_to_none_of_them() -> None:
    """Arrow's threads let go of a file a moment after its table is there; if it were ours, one could abort the exit."""
    data = parquet_bytes(pa.table({f"c{n}": [n] * 20 for n in range(8)}))
    for _ in range(60):
        content = bytearray(data)
        assert parquet_table(content).num_rows == 20
        content.append(0)  # BufferError while anybody holds it


def test_a_sealed_table_vouches_for_its_cells(tmp_path: Path) -> None:
    """No bit flipped in a page gives other cells; NaN is a value; a table of an older cyto says nothing."""
    path, table = tmp_path / "x.parquet", pa.table({"x": [1.5, float("nan"), None], "y": ["a", "ä", None]})
    path.write_bytes(sealed_parquet(table, seed=3))
    found, said = read_sealed(path)
    assert said.pop("sha256") == table_sha256(table) == table_sha256(found)
    assert said == {"seed": 3}
    whole = path.read_bytes()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    n_found = 0
    for at in range(4, footer):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            assert table_sha256(read_sealed(path)[0]) == table_sha256(table)  # statistics in a page's own header
        except (OSError, ValueError):
            n_found += 1
    assert n_found > 0.5 * (footer - 4)
    pq.write_table(table, path)
    assert read_sealed(path)[1] == {}


@pytest.mark.parametrize("kind", [pa.binary(), pa.duration("s"), pa.timestamp("s"), pa.decimal128(5)])
def test_a_column_whose_type_was_damaged_is_a_changed_table(kind: pa.DataType, tmp_path: Path) -> None:
    """One flipped bit of a Parquet file makes texts bytes, or numbers times, which JSON does not know."""
    values = [b"a"] if pa.types.is_binary(kind) else [1]
    said = pa.table({"a": ["a"]})
    damaged = pa.table({"a": pa.array(values, kind)}, metadata={"cyto": f'{{"sha256": "{table_sha256(said)}"}}'})
    pq.write_table(damaged, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="not the ones that were written"):
        read_sealed(tmp_path / "a.parquet")
