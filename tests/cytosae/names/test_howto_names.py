"""docs/howto/names.md runs, on small invented cells, and names every column."""

import re
import shutil
from pathlib import Path

import pytest
from named_cells import make_world
from pages import shell
from places import ROOT

from cytosae.names.read import DETECTION_COLUMNS, NAME_COLUMNS

MARK = r"^<!-- executed by tests/cytosae/names/test_howto_names.py -->\n```(bash|python)\n(.*?)^```$"


@pytest.mark.docs
def test_blocks_run(tmp_path: Path) -> None:
    world = make_world(tmp_path / "world")
    for name, here in (("barcodes", "cells.barcodes"), ("concepts", "cells.concepts"), ("images", "cells")):
        shutil.copytree(world.root / name, tmp_path / here)
    shutil.copytree(world.root / "latents", tmp_path / "cells.latents.zarr")
    text = (ROOT / "docs" / "howto" / "names.md").read_text()
    printed = []
    for language, block in re.findall(MARK, text, re.MULTILINE | re.DOTALL):
        (tmp_path / "block.py").write_text(block)
        printed.append(shell("python block.py" if language == "python" else block, tmp_path))
    assert "3 items" in printed[0]
    assert "2 names by Ada" in printed[1]
    assert "supported one by one: 2" in printed[2]
    assert printed[3] == "red square by Ada 1.0 True\n"


def test_the_page_names_every_column() -> None:
    named = {*re.findall(r"\w+", " ".join(re.findall(r"`([^`\n]+)`", (ROOT / "docs/howto/names.md").read_text())))}
    missing = {*DETECTION_COLUMNS, *NAME_COLUMNS} - named
    assert missing <= {"shuffled_low", "shuffled_high", "difference_high"}
