"""Repair: whatever was damaged, the store is afterwards what it was before, byte for byte; or it is left alone."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
import pytest
import torch
from artefacts import contents
from click.testing import CliRunner, Result
from kills import KILLED, die_at, exit_code, forked
from PIL import Image

from cli import cli
from cytocache import repair as repair_module
from cytocache.datasets import open_images
from cytocache.extract import ExtractConfig, extract
from cytocache.extract import fill as real_fill
from cytocache.repair import RepairResult, repair
from stores.activation_spec import chunk_path
from stores.activation_store import ActivationStore
from stores.activation_writer import reopen, writer_lock
from stores.errors import BadInput, CytoError, IncompleteStore, SpecMismatch, StoreNotFound
from stores.files import locked
from stores.runlog import read_runs
from stores.shards import ONE_WRITER
from stores.spec import ACTIVATIONS, read_header
from stores.tables import read_image_table, write_image_table
from stores.verify import verify_activations

N_IMAGES, TORN, GONE = 7, 2, 6  # chunks (0, 1), (2, 3), (4, 5), (6)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """images.csv, its images (one torn, one not there) and their cache; read-only."""
    root = tmp_path_factory.mktemp("made")
    for n in range(N_IMAGES):
        Image.fromarray(np.random.default_rng(n).integers(0, 256, (20, 20, 3), np.uint8)).save(root / f"{n}.png")
    (root / f"{TORN}.png").write_bytes((root / f"{TORN}.png").read_bytes()[:99])
    (root / f"{GONE}.png").unlink()
    (root / "images.csv").write_text("path,label\n" + "".join(f"{n}.png,a\n" for n in range(N_IMAGES)))
    config = ExtractConfig(blocks=(0,), chunk_images=2, batch_size=2, workers=1)
    extract(open_images(root / "images.csv"), root / "acts.zarr", config)
    return root


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    """A copy of the cache that a test may damage."""
    return Path(shutil.copytree(made / "acts.zarr", tmp_path / "acts.zarr"))


@pytest.fixture
def moved(made: Path, tmp_path: Path) -> Path:
    """A copy of the images that a test may change."""
    return Path(shutil.copytree(made, tmp_path / "moved", ignore=shutil.ignore_patterns("*.zarr")))


def everything(root: Path) -> dict[str, tuple[bytes, int]]:
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in root.rglob("*") if path.is_file()}


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 4
    path.write_bytes(raw)


def swap(store: Path) -> None:
    a, b = chunk_path(store, 0), chunk_path(store, 2)
    raw = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(raw)


def edit_record(store: Path, chunk: int, **changes: Any) -> None:
    lines = [json.loads(line) for line in (store / "journal.jsonl").read_text().splitlines()]
    lines[chunk] |= changes
    (store / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def edit_table(store: Path, row: int, name: str, value: str | None) -> None:
    table = read_image_table(store / "images.parquet")
    values = table[name].to_pylist()
    values[row] = value
    write_image_table(
        table.set_column(table.column_names.index(name), name, pa.array(values, pa.string())), store / "images.parquet"
    )


def foreign_chunk(store: Path) -> None:
    """Whole in itself, with a readable image that holds NaN: another run's."""
    bits = np.full(2 * 257 * 192, 0x7E00, "<u2").tobytes()
    chunk_path(store, 0).write_bytes(bits + google_crc32c.value(bits).to_bytes(4, "little"))


def edit_journal(edit: Callable[[list[str]], list[str]]) -> Callable[[Path], None]:
    def damage(store: Path) -> None:
        path = store / "journal.jsonl"
        path.write_text("".join(edit(path.read_text().splitlines(keepends=True))))

    return damage


def no_table_no_journal(store: Path) -> None:
    for name in ("images.parquet", "journal.jsonl"):
        (store / name).unlink()


def garbled_run_log(store: Path) -> None:
    """With chunks to make again, so that somebody asks it where the images lie."""
    (store / "runs.jsonl").write_bytes(b"\0\0\n{}\n")
    swap(store)


# name -> (damage, the chunks that must be made again, whether only --images knows the manifest);
# None: the manifest is known, but not the folder of the images
DAMAGES: dict[str, tuple[Callable[[Path], Any], list[int], bool | None]] = {
    "missing chunk": (lambda store: chunk_path(store, 1).unlink(), [1], False),
    "missing folder": (lambda store: shutil.rmtree(store / "tokens" / "c" / "1"), [1], False),
    "no chunk at all": (lambda store: shutil.rmtree(store / "tokens" / "c"), [0, 1, 2, 3], False),
    "empty file": (lambda store: chunk_path(store, 3).write_bytes(b""), [3], False),
    "truncated file": (lambda store: os.truncate(chunk_path(store, 0), 1000), [0], False),
    "trailing byte": (lambda store: os.truncate(chunk_path(store, 0), 197381), [0], False),
    "flipped bit": (lambda store: flip(chunk_path(store, 1), 5000), [1], False),
    "flipped bit in the checksum": (lambda store: flip(chunk_path(store, 2), -2), [2], False),
    "flipped bit in the padding": (lambda store: flip(chunk_path(store, 3), -9), [3], False),
    "swapped chunks": (swap, [0, 2], False),
    "another run's chunk": (foreign_chunk, [0], False),
    "no journal": (lambda store: (store / "journal.jsonl").unlink(), [0, 1, 2, 3], False),
    "empty journal": (edit_journal(lambda lines: []), [0, 1, 2, 3], False),
    "garbled line": (edit_journal(lambda lines: [lines[0], "\0\0\0garbage\n", *lines[2:]]), [1], False),
    "a line that is no record": (edit_journal(lambda lines: [*lines, '{"chunk": [1]}\n', "{}\n", "[]\n"]), [], False),
    "torn journal": (edit_journal(lambda lines: [*lines[:3], lines[3][:20]]), [3], False),
    "a line twice": (edit_journal(lambda lines: [*lines, lines[0]]), [], False),
    "a chunk too many": (edit_journal(lambda lines: [*lines, lines[0].replace('"chunk":0', '"chunk":9')]), [], False),
    "another checksum": (lambda store: edit_record(store, 1, crc32c="0badf00d"), [1], False),
    "another first image": (lambda store: edit_record(store, 1, first_image=1), [1], False),
    "other hashes": (lambda store: edit_record(store, 1, content_hash=["0" * 64, "1" * 64]), [1], False),
    "no hashes": (lambda store: edit_record(store, 1, content_hash=None, errors=7), [1], False),
    "one hash": (lambda store: edit_record(store, 1, content_hash=[]), [1], False),
    "other errors": (lambda store: edit_record(store, 0, errors={"0": "was not liked"}), [0], False),
    "another patient": (lambda store: edit_table(store, 0, "patient", "P2"), [], True),
    "another hash in the table": (lambda store: edit_table(store, 0, "content_hash", "0" * 64), [], False),
    "another status": (lambda store: edit_table(store, TORN, "status", "ok"), [], False),
    "no table": (lambda store: (store / "images.parquet").unlink(), [], True),
    "garbled table": (lambda store: (store / "images.parquet").write_bytes(b"PAR1no tablePAR1"), [], True),
    "no table, no journal": (no_table_no_journal, [0, 1, 2, 3], True),
    "another layout": (lambda store: flip(store / "tokens" / "zarr.json", 60), [], False),
    "no layout": (lambda store: (store / "tokens" / "zarr.json").unlink(), [], False),
    "garbled run log": (garbled_run_log, [0, 2], None),
    "everything": (
        lambda store: [
            path.write_bytes(b"\0") for path in store.rglob("*") if path.is_file() and path.name != "zarr.json"
        ],
        [0, 1, 2, 3],
        True,
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
@pytest.mark.stress
def test_after_any_damage_the_store_is_what_it_was(name: str, made: Path, store: Path) -> None:
    """Only the damaged chunks are made again; the others are not touched."""
    damage, chunks, needs_images = DAMAGES[name]
    before = contents(store)
    damage(store)
    damaged = everything(store)
    assert any(verify_activations(store)), "verify does not see it"
    images, root = None, None
    if needs_images:
        with pytest.raises(CytoError, match=r"give the folder, CSV|Give the folder, CSV|--root"):
            repair(store)
        assert everything(store) == damaged
        images = open_images(made / "images.csv")
    elif needs_images is None:  # the run log knew where the images lie
        root = made
    done = repair(store, images=images, root=root, workers=1, batch_size=2)
    assert contents(store) == before
    assert done.chunks == chunks
    assert done.problems
    assert not done.other_images
    kept = {str(chunk_path(store, chunk)) for chunk in range(4)} - {str(chunk_path(store, chunk)) for chunk in chunks}
    assert {name: what for name, what in everything(store).items() if name in kept} == {
        name: what for name, what in damaged.items() if name in kept
    }
    assert not [problem for problem in verify_activations(store) if problem]


def test_a_whole_store_is_left_alone(store: Path) -> None:
    """Not even the images are needed, or looked at."""
    before = everything(store)
    assert repair(store, root=Path("/nowhere")) == RepairResult(out=store, problems=[], chunks=[], other_bits=[])
    assert everything(store) == before


def test_it_takes_the_batch_size_of_the_run_that_wrote_the_store(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def fill(backbone: Any, images: Any, writers: Any, config: ExtractConfig, **kwargs: Any) -> None:
        seen.append((config.batch_size, config.workers))
        real_fill(backbone, images, writers, config, **kwargs)

    monkeypatch.setattr(repair_module, "fill", fill)
    for batch_size in (None, 1):
        chunk_path(store, 0).unlink()
        repair(store, batch_size=batch_size, workers=1)
    assert seen == [(2, 1), (1, 1)]
    assert [run["batch_size"] for run in read_runs(store)] == [2, 2, 1]


# ------------------------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize("how", ["changed", "missing", "changed, no journal", "changed, no table", "elsewhere"])
def test_other_image_files_are_refused_and_nothing_is_touched(how: str, store: Path, moved: Path) -> None:
    """A changed image would make other tokens under the same name. Those of whole chunks do not matter."""
    flip(chunk_path(store, 0), 99)
    Image.new("RGB", (9, 9)).save(moved / "5.png")  # of a chunk that is whole
    images, words = None, r"1 image files of the damaged chunks are missing below .*moved or are not those that were"
    if "changed" in how:
        Image.new("RGB", (9, 9)).save(moved / "1.png")
    elif how == "missing":
        (moved / "1.png").unlink()
    else:
        words = r"2 image files .* \(0\.png, 1\.png\); put them back, or say where they are with --root"
        moved = Path("/nowhere")
    if how == "changed, no journal":
        (store / "journal.jsonl").unlink()
        words = r"2 image files of .* \(1\.png, 5\.png\)"
    if how == "changed, no table":
        (store / "images.parquet").unlink()
        images = open_images(moved / "images.csv")
    before = everything(store)
    with pytest.raises(BadInput, match=words):
        repair(store, images=images, root=moved)
    assert everything(store) == before


def test_other_files_that_no_hash_betrays_are_named_afterwards(store: Path, moved: Path) -> None:
    """Neither table nor journal is left: all is made again, but not without a word."""
    for name in ("images.parquet", "journal.jsonl"):
        (store / name).unlink()
    Image.new("RGB", (9, 9)).save(moved / "1.png")
    result = CliRunner().invoke(cli, ["cache", "repair", str(store), "--images", str(moved / "images.csv")])
    assert result.exit_code == 0, result.output
    assert "warning: other image files are there, or can be read, than when the cache was made" in result.stderr


def test_unreadable_images_of_whole_chunks_are_not_tried_again(made: Path, store: Path, moved: Path) -> None:
    """Extraction would read a file that has been put into place; repair makes the store what it was."""
    before = contents(store)
    for row in (TORN, GONE):
        Image.new("RGB", (9, 9)).save(moved / f"{row}.png")
    flip(chunk_path(store, 0), 99)
    assert repair(store, root=moved, workers=1).chunks == [0]
    assert contents(store) == before
    (store / "tokens" / "zarr.json").unlink()
    assert repair(store, root=Path("/nowhere")).chunks == []
    assert contents(store) == before


def test_another_manifest_is_refused(made: Path, store: Path, tmp_path: Path) -> None:
    (store / "images.parquet").unlink()
    before = everything(store)
    (tmp_path / "other.csv").write_text("path,label\n" + "".join(f"{n}.png,b\n" for n in range(N_IMAGES)))
    words = r"the images do not have the table that .*acts\.zarr was made from \(sha256 .*\); give the folder, CSV"
    with pytest.raises(SpecMismatch, match=words):
        repair(store, images=open_images(tmp_path / "other.csv", root=made))
    assert everything(store) == before


@pytest.mark.stress
def test_other_weights_are_refused(made: Path, tmp_path: Path) -> None:
    """A trained backbone needs its own file."""
    from cytocache.torchvision_guard import declare_missing_operators

    declare_missing_operators()
    import timm

    with torch.device("meta"):
        model = timm.create_model("vit_small_patch14_dinov2", img_size=224, num_classes=0)
    state = {f"backbone.{key}": torch.zeros(()).expand(value.shape) for key, value in model.state_dict().items()}
    for name, bias in [("right", 0.5), ("wrong", 0.25)]:
        state["backbone.patch_embed.proj.bias"] = torch.full((), bias).expand(384)
        torch.save({"teacher": state}, tmp_path / f"{name}.pth")
    store, right = tmp_path / "acts.zarr", str(tmp_path / "right.pth")
    config = ExtractConfig(backbone="dinobloom-s", weights=right, blocks=(0,), chunk_images=4, workers=1)
    extract(open_images(made / "images.csv"), store, config)
    whole = contents(store)
    chunk_path(store, 0).unlink()
    before = everything(store)
    with pytest.raises(BadInput, match=r"dinobloom-s needs weights: get DinoBloom-S\.pth from"):
        repair(store)
    with pytest.raises(SpecMismatch, match=r"was made with other settings \(weights_sha256 .* against .*\); repair it"):
        repair(store, weights=str(tmp_path / "wrong.pth"))
    assert everything(store) == before
    repair(store, weights=right, workers=1)
    assert contents(store) == whole


def test_what_is_no_finished_cache_is_refused(made: Path, tmp_path: Path) -> None:
    images = open_images(made / "images.csv")
    config = ExtractConfig(blocks=(0,), chunk_images=2, workers=1)
    with pytest.raises(KeyboardInterrupt):
        extract(images, tmp_path / "begun.zarr", config, stop=lambda: True)
    with pytest.raises(IncompleteStore, match="Run the same cyto cache extract command again"):
        repair(tmp_path / "begun.zarr")
    with pytest.raises(StoreNotFound, match="nothing is there"):
        repair(tmp_path / "nowhere.zarr")


def test_while_another_process_writes_nothing_is_touched(store: Path) -> None:
    """Above all not the chunks that the other repair has just made."""
    flip(chunk_path(store, 0), 99)
    with locked(writer_lock(store, ONE_WRITER)):
        before = everything(store)
        with pytest.raises(BadInput, match=r"another process is writing .*acts\.zarr at this moment"):
            repair(store)
        assert everything(store) == before


# -------------------------------------------------------------------------------------------------- interrupted


def test_interrupted_gently_it_is_continued(made: Path, store: Path) -> None:
    """By repair or by a second repair; what has been made is not made again. Meanwhile the cache is incomplete."""
    before = contents(store)
    for chunk in (0, 1, 3):
        flip(chunk_path(store, chunk), 77)
    damaged = everything(store)
    with pytest.raises(KeyboardInterrupt):  # while it verifies
        repair(store, workers=1, stop=iter([False, True]).__next__)
    assert everything(store) == damaged
    with pytest.raises(KeyboardInterrupt):
        repair(store, workers=1, stop=iter([False] * 5 + [True]).__next__)
    with pytest.raises(IncompleteStore):
        ActivationStore(store)
    done = repair(store, workers=1)
    assert done == RepairResult(out=store, problems=[], chunks=[1, 3], other_bits=[])
    assert contents(store) == before


@pytest.mark.stress
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks into Linux's /proc")
@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["flipped bit", "other hashes", "another hash in the table"])
def test_killed_before_any_chunk_is_made_it_forgets_no_damage(name: str, every: int, store: Path, made: Path) -> None:
    """Damage that only reading every byte shows: once the header says incomplete, nobody reads them again."""
    before = contents(store)
    damage, chunks, _ = DAMAGES[name]
    for n_calls in range(every % 3, 1000, every):

        def job(n_calls: int = n_calls) -> None:
            die_at(n_calls)
            reopen(store, chunks)

        damage(store)
        code = exit_code(forked(job))
        assert code in (0, KILLED)
        repair(store, workers=1)
        assert contents(store) == before, n_calls
        if code == 0:
            return


def test_killed_between_a_chunk_and_its_journal_line_the_old_line_does_not_count(store: Path) -> None:
    """It has the checksum of the chunk that was made again, but names other images."""
    before = contents(store)
    edit_record(store, 1, content_hash=["0" * 64, "1" * 64])
    raw = chunk_path(store, 1).read_bytes()
    reopen(store, [1])
    chunk_path(store, 1).write_bytes(raw)
    repair(store, workers=1)
    assert contents(store) == before


# ------------------------------------------------------------------------------------------------------ the command


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["cache", "repair", *map(str, arguments)])


def test_the_command_says_what_was_wrong_and_what_became_of_it(made: Path, store: Path, moved: Path) -> None:
    swap(store)
    (store / "tokens" / "zarr.json").unlink()
    result = run(store, "--workers", 1, "--batch-size", 2)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"was: store: {store}/tokens does not have the layout that its header states")
    assert re.fullmatch(
        r"was: chunk 0 \(images 0 to 1\): is not the chunk that the journal names: .* chunk 2", lines[1]
    )
    assert lines[2].startswith("was: chunk 2 (images 4 to 5): is not the chunk")
    assert lines[3:] == [f"{store}: repaired; 2 chunks made again"]
    assert "warning" not in result.stderr
    assert contents(store) == contents(made / "acts.zarr")

    result = run(store)
    assert (result.exit_code, result.stdout) == (0, f"{store}: whole; nothing to repair\n")

    chunk_path(store, 0).unlink()
    result = run(store, "--root", moved.parent / "nowhere")
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith("Error: 2 image files of the damaged chunks are missing below ")
    assert read_header(store, ACTIVATIONS).complete


def test_other_last_bits_are_warned_of(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another device or version: the chunk is right, but not the one that SAEs were trained on."""
    from cytocache.backbones import Backbone

    real = Backbone.tokens
    monkeypatch.setattr(Backbone, "tokens", lambda self, pixels: [full * 1.002 for full in real(self, pixels)])
    chunk_path(store, 0).unlink()
    result = run(store, "--workers", 1)
    assert result.exit_code == 0, result.output
    assert "warning: 1 of them differ in the last bits from what was there" in result.stderr
    assert not [problem for problem in verify_activations(store) if problem]
