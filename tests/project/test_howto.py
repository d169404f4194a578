"""The how-to pages of other programs: their blocks run, where the programs are installed."""

import importlib.util
import re
import shutil
from pathlib import Path

import pytest
from pages import shell
from places import ROOT

GOLDEN = ROOT / "tests" / "golden"
MARK = r"^<!-- executed by tests/project/test_howto.py(?: where (\w+) is installed)? -->\n```(bash|python)\n(.*?)^```$"
PAGES = ("cellxgene", "tables", "r")


@pytest.mark.docs
@pytest.mark.parametrize("page", PAGES)
def test_blocks_run(tmp_path: Path, page: str) -> None:
    """In a folder with the golden latents and concepts, and barcodes of these."""
    found = re.findall(MARK, (ROOT / "docs" / "howto" / f"{page}.md").read_text(), re.MULTILINE | re.DOTALL)
    assert found
    wanted = [block for block in found if not block[0] or importlib.util.find_spec(block[0])]
    if not wanted:
        pytest.skip(f"needs {', '.join(block[0] for block in found)}")
    shutil.copytree(GOLDEN / "latents-v1.zarr", tmp_path / "cells.latents.zarr")
    shutil.copytree(GOLDEN / "concepts-v1", tmp_path / "cells.concepts")
    shell("cyto barcode cells.latents.zarr -o cells.barcodes --workers 1", tmp_path)
    for _, language, text in wanted:
        (tmp_path / "block.py").write_text(text)
        printed = shell("python block.py" if language == "python" else text, tmp_path)
        assert printed.strip()
