"""The table of who is who, beside an atlas with pseudonyms."""

import csv
from pathlib import Path

from cytosae.atlas.pseudonyms import Pseudonyms, write_pseudonyms


def test_no_name_is_taken_for_a_formula(tmp_path: Path) -> None:
    """As in every other .csv (`stores.tables.csv_bytes`): after blanks, line breaks, and in full-width forms, too."""
    bad = ["=1", "+1", "-1", "@1", "\t1", "\r1", "\n=1", " =1", "\uff1d1"]
    good = ["", "P1", "1-2", "a\nb"]
    write_pseudonyms(tmp_path / "a.csv", Pseudonyms("0" * 64), [(str(n), name) for n, name in enumerate(bad + good)])
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.reader(file))[2:]
    assert [row[1] for row in rows] == [*(f"'{name}" for name in bad), *good]
