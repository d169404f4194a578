"""`cyto verify`: any folder of ours is whole, or names the file in which one bit changed or which is gone."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from click.testing import CliRunner
from places import GOLDEN

from cli import cli
from cytosae.sweep.record import RESULTS
from cytosae.training.state import remove_states, states, write_metrics
from stores import verify_any
from stores.errors import DamagedStore, StoreReplaced
from stores.files import sha256_file
from stores.result_folder import ADDED_LATER, ResultStore, begin_results
from stores.runlog import append_run
from stores.spec import COMPARISON, Header
from stores.verify_any import sweep_sha256, verify

FOLDERS = [path.name for path in sorted(GOLDEN.iterdir()) if path.is_dir() and "-v1" in path.name]
FOLDERS = [
    name for name in FOLDERS if not name.endswith((".reviews", ".reviews-v2", ".answers")) and name != "barcodes-v1"
]  # barcodes: their own


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("name", FOLDERS)
def test_every_table_of_every_kind(name: str, tmp_path: Path) -> None:
    """Whole as it is; with a bit flipped in, or without, any Parquet, JSON or weights file that has a hash: not."""
    root = Path(shutil.copytree(GOLDEN / name, tmp_path / name))
    whole = verify(root)
    assert whole.problems == []
    headers = ("zarr.json", "journal.jsonl", "runs.jsonl", "sweep.json", *whole.unrecorded)
    files = [path for path in root.rglob("*") if path.suffix in (".parquet", ".json", ".safetensors")]
    files = [path for path in files if path.name not in headers and path.with_suffix("").name not in name]
    files = [
        path
        for path in files
        if not (path.parent.parent.name == "runs" and path.suffix != ".safetensors") and path.name != "sae.json"
    ]
    # metrics: of an older cyto, no hash. A selection and names are added later: they may be missing, and are checked by
    # who reads them. Of images.parquet the values are hashed, not the bytes
    files = [path for path in files if path.name not in ("metrics.parquet", *ADDED_LATER, "images.parquet")]
    for path in files[:20]:
        if '"complete"' in path.read_bytes()[:4000].decode(errors="ignore"):
            continue  # the header itself
        kept = path.read_bytes()
        for harm in (flip, Path.unlink):
            harm(path)
            try:
                found = verify(root).problems
            except ValueError as error:
                found = [str(error)]
            assert found, path
            path.write_bytes(kept)


@pytest.mark.parametrize("harm", [flip, Path.unlink])
def test_tables_and_figures_of_results(harm: Callable[[Path], None], tmp_path: Path) -> None:
    """Each is named, by the command and by the one that would find its results complete."""
    out = tmp_path / "out"
    writer = begin_results(out, COMPARISON, {"a": "1"})
    writer.write_table("numbers", pa.table({"x": [1, 2]}))
    (writer.root / "volcano.svg").write_text("<svg/>")
    (writer.root / "more").mkdir()
    (writer.root / "more" / "page.html").write_text("<p>")
    writer.finish({})
    assert (verify(out).problems, verify(out).unrecorded) == ([], [])
    for name in ("numbers.parquet", "volcano.svg", "more/page.html"):
        kept = (out / name).read_bytes()
        harm(out / name)
        result = CliRunner().invoke(cli, ["verify", str(out), "--json"])
        (found,) = json.loads(result.stdout)
        assert (result.exit_code, found["ok"], len(found["problems"])) == (1, False, 1)
        assert f"{out / name} is" in found["problems"][0]
        assert "cyto compare --overwrite makes it again" in found["problems"][0]
        with pytest.raises(DamagedStore, match=name):
            begin_results(out, COMPARISON, {"a": "1"})
        (out / name).write_bytes(kept)
    header = out / "comparison.json"  # as an older cyto wrote it
    content = json.loads(header.read_text())
    del content["summary"]["figures"]
    header.write_text(json.dumps(content))
    flip(out / "volcano.svg")
    result = CliRunner().invoke(cli, ["verify", str(out)])
    assert result.exit_code == 0
    assert "no hash recorded, so not checked: more/page.html, volcano.svg" in result.stdout
    assert ResultStore(out, COMPARISON).table("numbers").num_rows == 2


def test_metrics_of_an_sae(tmp_path: Path) -> None:
    root = Path(shutil.copytree(GOLDEN / "sae-v1", tmp_path / "sae"))
    (root / "metrics.parquet").write_bytes(b"some bytes")

    content = json.loads((root / "sae.json").read_text())
    content["summary"]["files"] = {"metrics.parquet": sha256_file(root / "metrics.parquet")}
    (root / "sae.json").write_text(json.dumps(content))
    assert verify(root).problems == []
    flip(root / "metrics.parquet")
    assert [root.name in problem and "metrics.parquet" in problem for problem in verify(root).problems] == [True]


def test_what_says_its_own_hash(tmp_path: Path) -> None:
    """Metrics, which hold times; a line of the run log; a sweep and its tables. An older cyto says nothing of them."""
    root = Path(shutil.copytree(GOLDEN / "sae-v1", tmp_path / "sae"))
    write_metrics(root, [{"step": step, "loss": step / 7} for step in range(50)])
    append_run(root, packages=("numpy",), device="cpu")
    assert (verify(root).problems, verify(root).unrecorded) == ([], [])
    flip(root / "metrics.parquet")
    log = (root / "runs.jsonl").read_text()
    (root / "runs.jsonl").write_text(log[:-60].replace('"device":"cpu"', '"device":"cpv"') + log[-60:] + "{")
    problems = verify(root).problems
    assert ["metrics.parquet is not the table" in each for each in problems] == [True, False]
    assert "runs.jsonl is not what was written" in problems[1]

    root = Path(shutil.copytree(GOLDEN / "sweep-v1", tmp_path / "sweep"))
    assert "table.parquet" in verify(root).unrecorded
    record = json.loads((root / "sweep.json").read_text())
    record["files"] = {name: sha256_file(root / name) for name in RESULTS if (root / name).exists()}
    (root / "sweep.json").write_text(json.dumps({**record, "sha256": sweep_sha256(record)}))
    whole = verify(root)
    assert whole.problems == []
    assert "table.parquet" not in whole.unrecorded
    flip(root / "table.parquet")
    record["members"][0]["seconds"] += 1
    (root / "sweep.json").write_text(json.dumps({**record, "sha256": "0" * 64}))
    found = "\n".join(verify(root).problems)
    assert "sweep.json is not the file that was written" in found
    assert "table.parquet is not the file that was written; the same cyto sae sweep makes it again" in found


def test_an_sae_of_a_sweep_that_is_replaced_meanwhile_is_no_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    def replaced(*headers: Header) -> None:
        raise StoreReplaced("it was replaced")

    monkeypatch.setattr(verify_any, "require_unchanged", replaced)
    for name in ("sae-v1", "sweep-v1"):
        with pytest.raises(StoreReplaced):
            verify(GOLDEN / name)


def test_what_is_not_ours(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["verify", str(tmp_path)])
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: no store or results of cyto at")


@pytest.mark.parametrize("n_before", range(4))
def test_a_kill_at_any_removal_of_a_state(n_before: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one command leaves, the same command removes when it finds the run finished."""
    (tmp_path / "state").mkdir()
    for step in range(3):
        (tmp_path / "state" / f"state-{step:09d}.safetensors").touch()
    n_removed = 0

    def unlink(path: Path, missing_ok: bool = False) -> None:
        nonlocal n_removed
        if n_removed == n_before:
            raise KeyboardInterrupt
        n_removed += 1
        path.rename(path.with_suffix(".gone"))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink)
        if n_before < 3:
            with pytest.raises(KeyboardInterrupt):
                remove_states(tmp_path)
        else:
            remove_states(tmp_path)
    assert len(states(tmp_path)) == 3 - n_before
    remove_states(tmp_path)
    assert states(tmp_path) == []
