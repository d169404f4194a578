"""docs/howto/run.md runs, in a folder with small drawn cells."""

import re
import shutil
from pathlib import Path

import pytest
from pages import shell
from places import ROOT

from cytocache.demo_cells import write_demo_images

MARK = r"^<!-- executed by tests/cytosae/pipeline/test_howto_run.py -->\n```(bash|python)\n(.*?)^```$"


@pytest.mark.docs
@pytest.mark.timeout(900)
def test_blocks_run(tmp_path: Path) -> None:
    write_demo_images(tmp_path, n_patients=9, images_per_patient=5, size=48)
    shutil.move(tmp_path / "images.csv", tmp_path / "cells.csv")
    text = (ROOT / "docs" / "howto" / "run.md").read_text()
    printed = []
    for language, block in re.findall(MARK, text, re.MULTILINE | re.DOTALL):
        (tmp_path / "block.py").write_text(block)
        printed.append(shell("python block.py" if language == "python" else block, tmp_path))
    first, repeated, report, by_hand, python = printed
    assert first.count("in all about") == 2
    assert "nothing was written" in first
    planned = re.findall(r"^  (\S.*?) {2,}.*again: n_images 10 against 8$", repeated, re.MULTILINE)
    assert planned == ["atlas"]
    assert "open file://" in report
    assert int(by_hand) > 8
    assert "'atlas'" in python
