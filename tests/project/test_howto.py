"""The how-to pages of other programs: their blocks run, where the programs are installed."""

import importlib.util
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from archive_maker import pack_folder
from pages import shell
from PIL import Image
from places import ROOT

from cytocache.demo_cells import draw_cell

GOLDEN = ROOT / "tests" / "golden"
MARK = r"^<!-- executed by tests/project/test_howto.py(?: where (\w+) is installed)? -->\n```(bash|python)\n(.*?)^```$"
PAGES = ("cellxgene", "tables", "r", "search")


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


@pytest.mark.docs
def test_images_where_they_lie(tmp_path: Path) -> None:
    """In a folder with cells/ and cells.zip: three patients, two classes."""
    for n in range(6):
        place = tmp_path / "cells" / ("BAS", "NGS")[n % 2] / f"P0{n // 2}_{n}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw_cell("lymphocyte", np.random.default_rng(n), size=48)).save(place)
    pack_folder(tmp_path / "cells.zip", tmp_path / "cells", under="cells/")
    for _, _, text in re.findall(MARK, (ROOT / "docs/howto/images.md").read_text(), re.MULTILINE | re.DOTALL):
        printed = shell(text, tmp_path)
        assert "P00" in printed or "6 images" in printed
    packed, plain = (pq.read_table(tmp_path / f"{name}.parquet") for name in ("zip", "cells"))
    assert packed.equals(plain)
    assert packed["patient"].to_pylist() == ["P00", "P01", "P02"] * 2


@pytest.mark.docs
def test_baselines(tmp_path: Path) -> None:
    """With a cache of sixty drawn cells, and an SAE of it that held some out."""
    kinds = ("lymphocyte", "eosinophil", "neutrophil_segmented")
    for n in range(60):
        place = tmp_path / "cells" / kinds[n % 3] / f"{n}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw_cell(kinds[n % 3], np.random.default_rng(n), size=48)).save(place)
    shell("cyto cache extract cells cells.acts.zarr --backbone random-vit-tiny --chunk-images 8", tmp_path)
    few = "--expansion 2 --target-l0 8 --batch-tokens 1024 --tokens 60000 --holdout 0.3"
    shell(f"cyto sae train cells.acts.zarr -o cells.sae {few}", tmp_path)
    text = (ROOT / "docs/howto/baselines.md").read_text()
    (_, _, make), (_, _, compare) = re.findall(MARK, text, re.MULTILINE | re.DOTALL)
    shell(make, tmp_path)
    printed = shell(compare, tmp_path)
    assert "explained variance: SAE minus baseline, 95% interval over 18 images" in printed
    assert {"random", "frozen-decoder", "pca", "kmeans"} <= {*printed.split()}
