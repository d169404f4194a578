"""One finished run for all tests of the room."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small_runs import draw_cohort, one_cluster, run_small


@pytest.fixture(scope="package")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; read-only: see `copied`."""
    root = tmp_path_factory.mktemp("run")
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch, one_cluster():
        patch.setattr(os, "fsync", lambda descriptor: None)
        torch.set_num_threads(1)
        run_small(draw_cohort(root), root / "out")
    torch.set_num_threads(before)
    return root / "out"


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the run and its images, to be changed; its recipe names the images of the copy."""
    shutil.copytree(finished.parent, tmp_path / "all")
    out = tmp_path / "all" / "out"
    path = out / "recipe.toml"
    path.write_text(path.read_text().replace(str(finished.parent), str(tmp_path / "all")))
    with one_cluster():
        yield out
