"""Images whose files are cut off: left out, or with `--allow-truncated` taken as far as they go, marked and counted."""

import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from archive_maker import pack_folder
from artefacts import contents
from command_line import run
from PIL import Image, ImageFile

from cytocache import bridge
from cytocache.extract import ExtractConfig, extract
from cytocache.images import UnreadableImage, decode_image, read_image, read_image_file
from cytocache.repair import repair
from cytosae.latents.encode import encode
from cytosae.sae import TrainConfig
from cytosae.training.train import train
from stores import ActivationStore, LatentStore
from stores.activation_spec import chunk_path
from stores.errors import BadInput, SpecMismatch
from stores.spec import ACTIVATIONS, read_header
from stores.tables import column, image_table, truncated_images, with_outcome, without_outcome
from stores.verify import verify_activations

SIDE, N_IMAGES, CUT = 64, 7, (1, 4)
CONFIG = ExtractConfig(blocks=(0,), chunk_images=2, batch_size=2, workers=1, device="cpu")
ALLOWED = ExtractConfig(blocks=(0,), chunk_images=2, batch_size=2, workers=1, device="cpu", allow_truncated=True)

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


def pixels(seed: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), np.uint8)


def encoded(form: str, seed: int = 0) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels(seed)).save(file, form)
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven images, of which two are cut off in the middle and one is no image; read-only."""
    root = tmp_path_factory.mktemp("made") / "cells"
    root.mkdir()
    for n in range(N_IMAGES):
        raw = encoded("PNG", n)
        (root / f"{n}.png").write_bytes(raw[: len(raw) // 2] if n in CUT else raw)
    (root / "6.png").write_bytes(b"no image")
    return root


# -------------------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "JPEG"])
def test_the_rows_that_are_there_are_the_right_ones(form: str, tmp_path: Path) -> None:
    """Against the whole file; the number of missing rows is the one that is told."""
    raw = encoded(form)
    (tmp_path / "a").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(UnreadableImage, match="image file is truncated"):
        decode_image(raw[: len(raw) // 2])
    assert read_image(tmp_path / "a")[0] is None
    found = read_image_file(tmp_path / "a", allow_truncated=True)
    assert found.error is None
    assert found.picture is not None
    assert found.truncated is not None
    whole, part = np.asarray(decode_image(raw)), np.asarray(found.picture)
    n_missing = int(found.truncated.removeprefix("its end is missing: ").split()[0])
    assert SIDE // 3 < n_missing < 2 * SIDE // 3
    there = slice(n_missing + 8, None) if form == "BMP" else slice(0, SIDE - n_missing - 18)
    np.testing.assert_array_equal(part[there], whole[there])
    assert np.isin(part[:n_missing] if form == "BMP" else part[SIDE - n_missing :], (0, 128)).all()


def test_whole_files_are_read_as_ever_and_other_damage_stays_an_error(tmp_path: Path) -> None:
    (tmp_path / "whole.png").write_bytes(encoded("PNG"))
    found = read_image_file(tmp_path / "whole.png", allow_truncated=True)
    assert found.truncated is None
    np.testing.assert_array_equal(np.asarray(found.picture), pixels(0))
    changed = bytearray(encoded("PNG"))
    changed[len(changed) // 2] ^= 255
    (tmp_path / "changed.png").write_bytes(changed)
    (tmp_path / "no.png").write_bytes(b"no image")
    (tmp_path / "head.png").write_bytes(encoded("PNG")[:41])  # the header, and the start of an empty piece
    for name in ("changed.png", "no.png", "head.png", "gone.png"):
        plain, allowed = (read_image_file(tmp_path / name, allow_truncated=each) for each in (False, True))
        assert allowed.picture is None, name
        assert (plain.error is None, allowed.error is None) == (False, False)


def test_pillows_setting_does_not_leak_into_other_threads(tmp_path: Path) -> None:
    """While one thread accepts what is cut off, no other does."""
    raw = encoded("JPEG")
    (tmp_path / "a.jpg").write_bytes(raw[: len(raw) // 2])

    def one(n: int) -> bool:
        return read_image_file(tmp_path / "a.jpg", allow_truncated=n % 2 == 0).picture is not None

    with ThreadPoolExecutor(4) as threads:
        assert [*threads.map(one, range(60))] == [n % 2 == 0 for n in range(60)]
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


# ---------------------------------------------------------------------------------------------------- stores


def test_cut_off_images_are_taken_marked_and_counted(folder: Path, tmp_path: Path) -> None:
    done = run("cache", "extract", folder, tmp_path / "acts", "--allow-truncated", "--chunk-images", 2, "--workers", 1)
    assert done.exit_code == 0, done.output
    assert "2 of 7 images are cut off and were taken as far as they go (1.png: its end is missing: " in done.stderr
    assert "1 of 7 images could not be read (6.png: " in done.stderr
    store = ActivationStore(tmp_path / "acts")
    assert column(store.images, "status") == ["ok"] * 6 + ["unreadable"]
    assert [n for n, what in enumerate(truncated_images(store.images)) if what is not None] == [*CUT]
    assert store.images.column_names[-4:] == ["content_hash", "status", "error", "truncated"]
    assert store.readable().tolist() == [True] * 6 + [False]
    assert (store.header.summary or {})["n_truncated"] == 2
    assert np.isfinite(store.read_images(CUT)).all()
    assert [problem for problem in verify_activations(tmp_path / "acts") if problem] == []
    assert "2 of 7 images are cut off" in run("cache", "info", tmp_path / "acts").output
    again = run("cache", "extract", folder, tmp_path / "acts", "--allow-truncated", "--chunk-images", 2)
    assert "already complete" in again.stderr
    assert extract(folder, tmp_path / "other", ALLOWED).n_truncated == 2


def test_without_the_option_nothing_changes(folder: Path, tmp_path: Path) -> None:
    """Neither in the header nor in the table: older versions read the cache."""
    done = extract(folder, tmp_path / "acts", CONFIG)
    assert (done.n_readable, done.n_unreadable, done.n_truncated) == (4, 3, 0)
    header = (
        json.loads((tmp_path / "acts" / "zarr.json").read_text()) if (tmp_path / "acts" / "zarr.json").exists() else {}
    )
    assert "truncated" not in json.dumps(header)
    assert "truncated" not in json.dumps(read_header(tmp_path / "acts", ACTIVATIONS).spec)
    assert ActivationStore(tmp_path / "acts").images.column_names[-1] == "error"
    assert "truncated" not in (tmp_path / "acts" / "journal.jsonl").read_text().replace("image file is truncated", "")
    with pytest.raises(SpecMismatch, match="allow_truncated"):
        extract(folder, tmp_path / "acts", ALLOWED)


def test_tokens_of_whole_images_do_not_depend_on_the_option(folder: Path, tmp_path: Path) -> None:
    extract(folder, tmp_path / "plain", CONFIG)
    extract(folder, tmp_path / "allowed", ALLOWED)
    plain, allowed = ActivationStore(tmp_path / "plain"), ActivationStore(tmp_path / "allowed")
    whole = [n for n in range(N_IMAGES - 1) if n not in CUT]
    np.testing.assert_array_equal(plain.read_images(whole), allowed.read_images(whole))
    assert plain.spec.same_tokens == allowed.spec.same_tokens
    assert plain.identity != allowed.identity


def test_repair_pictures_and_latents_know_that_an_image_is_cut_off(folder: Path, tmp_path: Path) -> None:
    archive = pack_folder(tmp_path / "cells.zip", folder)
    extract(archive, tmp_path / "acts", ALLOWED)
    before = contents(tmp_path / "acts")
    chunk_path(tmp_path / "acts", 2).write_bytes(b"damage")
    assert repair(tmp_path / "acts", device="cpu").chunks == [2]
    assert contents(tmp_path / "acts") == before
    train([tmp_path / "acts"], tmp_path / "sae", TrainConfig(expansion=1, batch_tokens=256, tokens=1_280, l1=1e-4))
    encode(tmp_path / "acts", tmp_path / "sae", tmp_path / "latents", device="cpu")
    latents = LatentStore(tmp_path / "latents")
    assert [n for n, what in enumerate(truncated_images(latents.images)) if what is not None] == [*CUT]
    shown = bridge.pictures(latents)(CUT[0])
    assert not isinstance(shown, str), shown
    np.testing.assert_array_equal(shown[:16], pixels(CUT[0])[:16])


def test_a_shard_at_a_time_gives_the_same_store(folder: Path, tmp_path: Path) -> None:
    extract(folder, tmp_path / "one", ALLOWED)
    for shard in ("0/2", "1/2"):
        done = run(
            *("cache", "extract", folder, tmp_path / "two", "--allow-truncated", "--chunk-images", 2, "--block", 0),
            *("--shard", shard, "--batch-size", 2, "--workers", 1, "--device", "cpu"),
        )
        assert done.exit_code == 0, done.output
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_a_column_of_the_user_called_truncated_stays_his(tmp_path: Path) -> None:
    table = image_table({"path": ["a", "b"], "truncated": ["yes", None]}, source="t", dataset="d")
    made = with_outcome(table, ["0", "1"], [None, None], [None, None])
    assert truncated_images(made) == [None, None]
    assert without_outcome(made).equals(table)
    ours = with_outcome(
        image_table({"path": ["a", "b"]}, source="t", dataset="d"), ["0", "1"], [None, None], [None, "x"]
    )
    assert ours.column_names[-1] == "truncated"
    assert without_outcome(ours).column_names[-1] == "dataset"
    columns = {name: ours[name].to_pylist() for name in ours.column_names}
    assert image_table(columns, source="t", dataset="d").column_names == without_outcome(ours).column_names
    for n in range(2):
        (tmp_path / f"{n}.png").write_bytes(encoded("PNG", n))
    (tmp_path / "t.csv").write_text("path,truncated\n0.png,yes\n1.png,no\n")
    with pytest.raises(BadInput, match=r"has a column 'truncated', which is ours to write; rename it"):
        extract(tmp_path / "t.csv", tmp_path / "acts", ALLOWED)
    extract(tmp_path / "t.csv", tmp_path / "acts", CONFIG)
    assert column(ActivationStore(tmp_path / "acts").images, "truncated") == ["yes", "no"]
