"""`cyto demo` as a user runs it: everything is made, the pictures are pictures, and it can be repeated."""

import re
import shlex
import shutil
from pathlib import Path

import anndata
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from places import ROOT

from cli import cli
from stores import read_runs


@pytest.mark.docs
@pytest.mark.timeout(900)  # two minutes of work, on a machine that may be busy
def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "demo"
    done = CliRunner().invoke(cli, ["demo", "--out", str(out)])
    assert done.exit_code == 0, done.output
    printed = re.findall(r"^  (\S+)", done.stdout.partition("\nLook at:\n")[2], re.MULTILINE)
    assert len(printed) >= 6
    for name in printed:
        assert Path(name).exists()
    for name in ("patients_by_latents.png", "reference_images.png"):
        with Image.open(out / name) as picture:
            assert min(picture.size) > 500
            assert np.asarray(picture.convert("L")).std() > 20
    patients = anndata.read_zarr(out / "cells.barcodes" / "patient.zarr")
    assert patients.n_obs == 18
    # patients of one disease look more alike than patients of two: the point of a barcode
    values = np.sqrt(patients.X.toarray())
    likeness = np.corrcoef(values - values.mean(0))
    disease = np.asarray(patients.obs["disease"])
    same = disease[:, None] == disease[None, :]
    assert likeness[same & ~np.eye(len(same), dtype=bool)].mean() > likeness[~same].mean() + 0.3

    (printed_command,) = [line[2:].split()[1:] for line in done.stdout.splitlines() if line.startswith("$ cyto")]
    again = CliRunner().invoke(
        cli, printed_command
    )  # the printed command is the one that was run: nothing is to be done
    assert again.exit_code == 0, again.output
    assert "already complete" in again.stderr
    monkeypatch.chdir(out)
    commands = [shlex.split(line)[1:] for line in (out / "commands.sh").read_text().splitlines() if line[:5] == "cyto "]
    assert len(commands) >= 15
    for command in commands[:-1]:  # and each of its steps by hand
        again = CliRunner().invoke(cli, command)
        assert again.exit_code == 0, again.output
        assert "already complete" in again.stderr

    gallery = (ROOT / "docs" / "gallery.md").read_text()  # its commands, in the folder of the demo
    mark = r"^<!-- executed by tests/command_line/test_demo.py -->\n```bash\ncyto (.*?)^```$"
    shown = re.findall(mark, gallery, re.MULTILINE | re.DOTALL)
    assert len(shown) >= 9
    for text in shown:
        made = CliRunner().invoke(cli, shlex.split(text.replace("\\\n", " ")))
        assert made.exit_code == 0, made.output
    for name in re.findall(r"`(\w+\.png)`", gallery):
        assert [*out.rglob(name)], f"the gallery names {name}"

    for name in ("cells.acts.zarr", "cells.sae", "cells.latents.zarr"):  # a GPU would change the last bits
        assert {run["device"] for run in read_runs(out / name)} == {"cpu"}

    shutil.rmtree(out / "cells.barcodes")
    repeated = CliRunner().invoke(cli, ["demo", "--out", str(out)])
    assert repeated.exit_code == 0
    assert (out / "cells.barcodes" / "barcodes.json").exists()


def test_demo_leaves_foreign_folders_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("do not touch")
    done = CliRunner().invoke(cli, ["demo", "--out", str(tmp_path)])
    assert done.exit_code == 1
    assert "holds something else" in done.output
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_demo_leaves_the_users_own_project_alone(tmp_path: Path) -> None:
    """Also one that uses the names of the quickstart, and a demo of another seed."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images.csv").write_text("path,patient\nmine.png,REAL1\n")
    assert CliRunner().invoke(cli, ["demo", "--out", str(tmp_path)]).exit_code == 1
    assert "REAL1" in (tmp_path / "images.csv").read_text()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "demo.json").write_text('{"made_by": "cyto demo", "seed": 0}')
    done = CliRunner().invoke(cli, ["demo", "--out", str(tmp_path / "other"), "--seed", "1"])
    assert done.exit_code == 1
    assert "a demo with other settings" in done.output
