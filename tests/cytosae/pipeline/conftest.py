"""One finished run for all tests of the room."""

import os
import shutil
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pytest
import torch
from PIL import Image
from small_runs import draw_cohort, one_cluster, run_small
from threadpoolctl import threadpool_limits


@pytest.fixture(scope="package")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, on one thread, since last bits depend on their number; read-only: see `copied`."""
    root = tmp_path_factory.mktemp("run")
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch, one_cluster(), threadpool_limits(1):
        patch.setattr(os, "fsync", lambda descriptor: None)
        torch.set_num_threads(1)
        run_small(draw_cohort(root / "out"), root / "out")
    torch.set_num_threads(before)
    return root / "out"


@pytest.fixture
def quick_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are one small picture, for tests that do not look at them."""
    content = BytesIO()
    Image.new("RGB", (8, 8)).save(content, "PNG")
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig", lambda figure, path, **more: Path(path).write_bytes(content.getvalue())
    )


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the run and its images, which lie in its folder, to be changed."""
    with one_cluster():
        yield Path(shutil.copytree(finished, tmp_path / "copy" / "out"))
