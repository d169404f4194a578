"""The site builds without a broken link and loads nothing from elsewhere; the tutorial and the notebook run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import anndata
import numpy as np
import pytest
from notebook_runner import cells
from pages import shell
from places import ROOT

EXECUTED = r"^<!-- executed by tests/project/test_site.py -->\n```(bash|python)\n(.*?)^```$"


@pytest.mark.stress
def test_site_builds(tmp_path: Path) -> None:
    """Strictly: a page outside the navigation, a link or an anchor that leads nowhere is an error."""
    pytest.importorskip("mkdocs", reason="the site needs mkdocs: pip install '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {path.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("*.html")}
    assert {"index.html", "tutorial.html", "howto/paper.html", "api/index.html", "notebook.html"} <= set(pages)
    for name, text in pages.items():
        loaded = re.findall(r'<(?:script|img|link)\b[^>]*(?:src|href)="(?:https?:)?//[^"]*"', text)
        assert not loaded, f"{name} loads {loaded}"
        bare = re.findall(r"<p>(?:(?!</p>).)*?\n(?:- |\||```).*", text, re.DOTALL)
        assert not bare, f"{name}: needs an empty line before a list, a table or a block: {bare[0][:200]}"
    assert "<table>" in pages["howto/paper.html"]
    first = re.sub(r"</?span[^>]*>", "", pages["index.html"].partition('role="main"')[2])
    assert first.count("<img", 0, first.index("cyto run IMAGES -o OUT")) == 6  # it opens with cells, then the command
    navigation = pages["index.html"].partition("<nav")[2].partition("</nav>")[0]
    assert "troubleshooting.html" in navigation
    assert "log.html" not in navigation
    found = json.loads((tmp_path / "search" / "search_index.json").read_text())["docs"]  # what the search box reads
    assert {name for name in pages if name not in ("404.html", "search.html")} <= {
        entry["location"].partition("#")[0] or "index.html" for entry in found
    }
    assert not [*tmp_path.rglob("make_*.py"), *tmp_path.rglob("docstring_style.py")]
    assert "#stores.SpecMismatch" in pages["api/barcodes.html"]  # types are links
    for name, text in pages.items():
        assert not name.startswith("api/") or not re.search(r"^\s*-{5,}$", text, re.MULTILINE), f"{name}: a raw section"
    of_precision = pages["api/cytocache.html"].split('id="cytocache.ExtractConfig.precision"')[1]
    assert "<p>" in of_precision.split('id="cytocache.ExtractConfig.')[0], (
        "the comment behind a field of a dataclass is not shown"
    )


@pytest.mark.docs
@pytest.mark.timeout(900)  # two minutes of work, on a machine that may be busy
def test_tutorial_runs(tmp_path: Path) -> None:
    """Every block in order, in one folder; it ends with what it promises."""
    found = re.findall(EXECUTED, (ROOT / "docs" / "tutorial.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(found) >= 11
    printed = ""
    for language, text in found:
        (tmp_path / "block.py").write_text(text)
        printed += shell("python block.py" if language == "python" else text, tmp_path)
    assert "1 of 216 images could not be read (cells/images/P001/torn.png: not a" in printed
    assert anndata.read_zarr(tmp_path / "cells.barcodes" / "patient.zarr").n_obs == 18
    for name in re.findall(r"`([\w.]+/\w+\.png)`", (ROOT / "docs" / "tutorial.md").read_text()):
        assert (tmp_path / name).stat().st_size > 10_000, name


@pytest.mark.docs
@pytest.mark.timeout(900)
def test_notebook_runs(tmp_path: Path) -> None:
    """Cell by cell in a folder of its own, warnings as errors; again, it finds all of it finished.

    At most fifteen lines of code lead from a folder of images to a table of patients, and it says something: patients
    of one disease are more alike than those of two.
    """
    notebook = ROOT / "docs" / "notebook.py"
    begin, to_table = cells(notebook.read_text())[:2]
    assert len([line for line in f"{begin}\n{to_table}".splitlines() if line.strip()]) <= 15
    assert to_table.strip().splitlines()[-1].startswith("patients.to_df()")
    command = [sys.executable, "-W", "error", str(ROOT / "tests" / "support" / "notebook_runner.py"), str(notebook)]
    environment = {**os.environ, "MPLBACKEND": "agg"}
    first, again = (
        subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        for _ in range(2)
    )
    assert first.returncode == again.returncode == 0, first.stderr + again.stderr
    assert first.stdout == again.stdout
    folder = tmp_path / "cyto-notebook"
    patients = anndata.read_zarr(folder / "barcodes" / "patient.zarr")
    values = np.sqrt(patients.X.toarray())
    likeness, disease = np.corrcoef(values - values.mean(0)), np.asarray(patients.obs["disease"])
    is_same = (disease[:, None] == disease) & ~np.eye(len(disease), dtype=bool)
    assert likeness[is_same].mean() > likeness[disease[:, None] != disease].mean() + 0.3
    assert (folder / "map" / "map.png").stat().st_size > 3_000
    shown = [path.read_text() for path in tmp_path.glob("cell*.html")]
    assert sum("<table" in page for page in shown) >= 2  # patients and concepts
    assert sum("data:image/png;base64," in page for page in shown) >= 2  # maps
    assert any((folder / "atlas" / "index.html").as_uri() in page for page in shown)
