"""A notebook equals the command line for stage one and the stores: what a call returns is what its command prints."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

import cytocache
import cytosae
import stores
from cli import cli
from cytocache import ExtractConfig


def printed(*arguments: object) -> str:
    result = CliRunner().invoke(cli, [*map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


def lines(report: object) -> str:
    return "".join(f"{line}\n" for line in report.lines())  # type: ignore[attr-defined]


@pytest.fixture
def cells(made: Path, tmp_path: Path) -> Path:
    """A folder with three images that can be read, a damaged one, a text, and results of Cyto."""
    folder = tmp_path / "cells"
    (folder / "a").mkdir(parents=True)
    readable = [path for path in sorted(made.glob("images/*/*.png")) if path.name != "04.png"][:3]
    assert len(readable) == 3
    for path in readable:
        shutil.copy(path, folder / "a" / path.name)
    (folder / "a" / "bad.png").write_bytes(b"no image")
    (folder / "notes.txt").write_text("text")
    return folder


def test_extract_knows_what_its_command_knows(cells: Path, tmp_path: Path) -> None:
    """It takes a path; left-out files are notes, unreadable images a warning, and a notebook shows both."""
    done = cytocache.extract(cells, tmp_path / "acts.zarr")
    result = CliRunner().invoke(cli, ["cache", "extract", str(cells), str(tmp_path / "acts.zarr")])
    assert result.stdout == lines(done)
    assert result.stderr.splitlines() == [
        *done.notes,
        f"{tmp_path / 'acts.zarr'} is already complete with these settings; nothing to do",
        *(f"warning: {warning}" for warning in done.warnings),
    ]
    assert done.notes == (f"1 file passed over in {cells} (notes.txt): not images by their name",)
    (warning,) = done.warnings
    assert warning.startswith("1 of 4 images could not be read (a/bad.png: ")
    assert "not images by their name" in done._repr_html_()
    assert "<b>warning:</b> 1 of 4 images" in done._repr_html_()
    config = ExtractConfig(device="cpu")
    assert (config.images_per_pass, ExtractConfig(batch_size=3).images_per_pass) == (32, 3)
    with pytest.raises(stores.BadInput, match="batch_size must be at least 1; found 0"):
        ExtractConfig(batch_size=0)
    with pytest.raises(stores.BadInput, match="device must be auto, cpu or"):
        cytocache.extract(cells, tmp_path / "other.zarr", ExtractConfig(device="tpu"))
    with pytest.raises(stores.SpecMismatch, match="is or contains an input of this command"):
        cytocache.extract(cells, cells, overwrite=True)  # what it reads is known without `inputs`


def test_pages_checks_and_merges(made: Path, tmp_path: Path) -> None:
    acts, latents = (Path(shutil.copytree(made / name, tmp_path / name)) for name in ("acts.zarr", "latents.zarr"))
    cache, sparse = stores.ActivationStore(acts), stores.LatentStore(latents)
    assert printed("cache", "info", acts) == lines(cache.describe())
    assert printed("latents", "info", latents) == lines(sparse.describe())
    assert json.loads(printed("cache", "info", acts, "--json")) == json.loads(json.dumps(cache.describe().to_json()))
    assert "<p>1 of 10 images could not be read (images/" in cache._repr_html_()
    for store in (cache, sparse):
        assert "<th style='text-align:left'>identity</th>" in store._repr_html_()
    assert printed("cache", "verify", acts) == lines(stores.check_cache(acts))
    assert printed("latents", "verify", latents) == lines(stores.check_latents(latents))
    both = [stores.verify_folder(each) for each in (acts, latents)]
    assert printed("verify", acts, latents) == "".join(map(lines, both))
    assert [report.is_whole for report in both] == [True, True]
    merged = stores.merge_cache(acts)
    assert printed("cache", "merge", acts) == lines(merged)
    assert (merged.was_complete, merged.stores) == (True, (acts,))
    assert printed("latents", "merge", latents) == lines(stores.merge_latents(latents))
    assert printed("cache", "repair", acts, "--root", made) == lines(cytocache.repair(acts, root=made))

    next((acts / "tokens" / "c").glob("*/0/0")).unlink()
    (problem,) = stores.check_cache(acts).problems
    assert problem.what == "missing"
    assert not stores.check_cache(acts).is_whole
    result = CliRunner().invoke(cli, ["cache", "verify", str(acts), "--json"])
    assert (result.exit_code, json.loads(result.stdout)) == (1, stores.check_cache(acts).to_json())
    assert "activation cache" in printed("cache", "info", acts, "--json")  # the header alone is enough
    result = CliRunner().invoke(cli, ["cache", "info", str(acts)])  # what it was made from, and then what is wrong
    assert (result.exit_code, result.stdout) == (1, lines(stores.cache_info(acts, header_only=True)))
    assert result.stderr.startswith("Error: ")


def test_an_index_is_a_report(cells: Path, tmp_path: Path) -> None:
    """Written or not; the old name gives the old pair."""
    out = tmp_path / "cells.parquet"
    index = cytocache.index_images(cells, out)
    assert not index.was_complete
    assert printed("data", "index", cells, "-o", out) == lines(index)
    assert json.loads(printed("data", "index", cells, "-o", out, "--json")) == json.loads(json.dumps(index.to_json()))
    again, was_complete = cytocache.make_index(cells, out)
    assert (was_complete, again.images.table.equals(index.images.table)) == (True, True)
    unwritten = cytocache.index_images(cells)
    assert (unwritten.out, unwritten.next_command, unwritten.to_json()["table"]) == (None, "", None)
    assert [*unwritten.lines()][-1] == "4 images, 1 classes"


@pytest.mark.stress
def test_fidelity_takes_an_sae(made: Path) -> None:
    acts = made / "acts.zarr"
    found = cytocache.measure_fidelity(acts, sae=cytosae.load_sae(made / "run"), n_images=2, root=made)
    command = ("cache", "fidelity", acts, "--sample", 2, "--root", made)
    assert printed(*command, "--sae", made / "run") == lines(found)
    assert json.loads(printed(*command, "--sae", made / "run", "--json")) == found.to_json()
    assert found.assumed_equal == ()
    plain = cytocache.measure_fidelity(acts, n_images=2, root=made)
    assert printed(*command) == lines(plain)
    assert "assumed_equal" not in plain.to_json()
    assert "<caption>" in plain._repr_html_()
