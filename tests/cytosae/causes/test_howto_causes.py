"""docs/howto/causes.md runs, on small stores, and names every column and quantity."""

import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from pages import shell
from places import ROOT

MARK = r"^<!-- executed by tests/cytosae/causes/test_howto_causes.py -->\n```(bash|python)\n(.*?)^```$"


@pytest.mark.docs
@pytest.mark.timeout(600)
def test_blocks_run(made: Path, tmp_path: Path) -> None:
    for name, here in (("acts.zarr", "cells.acts.zarr"), ("run", "cells.sae"), ("latents.zarr", "cells.latents.zarr")):
        shutil.copytree(made / name, tmp_path / here)
    text = (ROOT / "docs" / "howto" / "causes.md").read_text()
    printed = []
    for language, block in re.findall(MARK, text, re.MULTILINE | re.DOTALL):
        (tmp_path / "block.py").write_text(block)
        printed.append(shell("python block.py" if language == "python" else block, tmp_path))
    assert "latent 210: the final CLS moves by" in printed[0]
    assert "17 cls_change" in printed[1]
    quantities = {*pq.read_table(tmp_path / "cells.causes" / "curves.parquet")["quantity"].to_pylist()}
    assert quantities <= {*re.findall(r"`(\w+)`", text)}
