"""Extraction: the right tokens in the right rows, whatever happens on the way: bad files, interruption, a kill."""

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from artefacts import contents
from click.testing import CliRunner, Result
from PIL import Image

from cli import cli
from cytocache.backbones import load_backbone
from cytocache.datasets import Images, open_images
from cytocache.demo_cells import draw_cell
from cytocache.extract import ExtractConfig, ExtractResult, extract
from cytocache.preprocess import Preprocess
from cytocache.torchvision_guard import declare_missing_operators
from stores import ActivationStore, activation_writer, files, verify_activations
from stores.errors import BadInput, IncompleteStore, SpecMismatch
from stores.spec import ACTIVATIONS, LATENTS, Header, new_header, read_header, write_header
from stores.tables import MANIFEST_COLUMNS, OUTCOME_COLUMNS

N_IMAGES, TORN = 11, 4  # the torn file's row
Contents = dict[str, bytes]


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven drawn cells in two classes, of several formats and sizes; one is a truncated JPEG."""
    root = tmp_path_factory.mktemp("data") / "cells"
    for n in range(N_IMAGES):
        label = "eosinophil" if n < 6 else "lymphocyte"
        path = root / label / f"{n:02d}.{('png', 'tif', 'jpg', 'bmp')[n % 4] if n != TORN else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw_cell(label, np.random.default_rng(n), size=40 + n)).save(path)
    torn = root / "eosinophil" / f"{TORN:02d}.jpg"
    torn.write_bytes(torn.read_bytes()[:700])
    return root


@pytest.fixture(scope="module")
def whole(cells: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of `cells`, made in one go; read-only."""
    store = tmp_path_factory.mktemp("whole") / "whole.zarr"
    extract(open_images(cells), store, config())
    return store


def config(**changes: Any) -> ExtractConfig:
    """Four chunks, the last one short, one transformer block: a second."""
    settings: dict[str, Any] = {"blocks": (0,), "chunk_images": 3, "batch_size": 2, "workers": 2, **changes}
    return ExtractConfig(**settings)


def times(root: Path) -> dict[str, int]:
    """When each file and folder was last written."""
    return {path.relative_to(root).as_posix(): path.stat().st_mtime_ns for path in [root, *root.rglob("*")]}


KILLED_EXTRACTIONS = """
import json, os, random, signal, sys
from pathlib import Path
import torch
from cytocache.datasets import Images, open_images
from cytocache.extract import ExtractConfig, extract
from cytocache.torchvision_guard import declare_missing_operators

declare_missing_operators()
import timm, torchvision  # once, and not in each child

cells, root, n_moments = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
images, config = open_images(cells), ExtractConfig(blocks=(0, 1), chunk_images=2, batch_size=2, workers=1)
images = Images(images.table.slice(0, 5), images.root)
torch.set_num_threads(1)

def forked(store, at=None):
    counted = root / "calls"
    process = os.fork()
    if process == 0:
        n_calls = 0
        def counting(real):
            def call(*args, **kwargs):
                nonlocal n_calls
                if n_calls == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                n_calls += 1
                return real(*args, **kwargs)
            return call
        for name in ("fsync", "replace", "rename", "link", "unlink", "mkdir"):
            setattr(os, name, counting(getattr(os, name)))
        try:
            extract(images, store, config)
            counted.write_text(str(n_calls))
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return code, int(counted.read_text())

def durable(store):
    found = {}
    for journal in store.glob("block*.zarr/journal*.jsonl"):
        for line in journal.read_text().splitlines():
            path = journal.parent / "tokens" / "c" / str(json.loads(line)["chunk"]) / "0" / "0"
            found[path] = path.stat().st_mtime_ns
    return found

_, n_calls = forked(root / "whole")
for moment in sorted(random.sample(range(n_calls), min(n_moments, n_calls))):
    store = root / str(moment)
    code, _ = forked(store, moment)
    before = durable(store)
    again, _ = forked(store)
    n_redone = sum(path.stat().st_mtime_ns != when for path, when in before.items())
    print(json.dumps([moment, code, again, len(before), n_redone]))
"""


class Interrupted(BaseException):
    """Like Ctrl-C, it is no `Exception`."""


def interrupt_at(n_images: int) -> Callable[[int, int, str], None]:
    """A progress callback that ends the job once so many images are written (three in a chunk)."""

    def progress(done: int, total: int, state: str) -> None:
        if done >= n_images:
            raise Interrupted

    return progress


class TestTokens:
    def test_they_equal_one_plain_forward_per_image(self, cells: Path, whole: Path) -> None:
        """No image gets the tokens of another, whatever the chunks and batches."""
        backbone, store = load_backbone("random-vit-tiny", blocks=(0,)), ActivationStore(whole)
        paths = store.images["path"].to_pylist()
        assert paths == sorted(path.relative_to(cells).as_posix() for path in cells.rglob("*.*"))
        tokens = store.read_images(range(N_IMAGES)).astype(np.float32)
        plain = {}
        for row, path in enumerate(paths):
            if row != TORN:
                pixels = Preprocess().resize(Image.open(cells / path).convert("RGB"))
                with torch.inference_mode():
                    plain[row] = backbone.tokens(torch.from_numpy(pixels.copy())[None])[0][0].numpy()
                np.testing.assert_allclose(tokens[row], plain[row], rtol=2**-10, atol=2**-14)
        apart = min(np.abs(plain[a] - plain[b]).max() for a in plain for b in plain if a < b)
        assert apart > 0.1  # so a swapped pair would show

    def test_the_batch_size_changes_the_last_bits_at_most_and_not_the_identity(
        self, cells: Path, whole: Path, tmp_path: Path
    ) -> None:
        extract(open_images(cells), tmp_path / "a.zarr", config(batch_size=1))
        one, two = ActivationStore(tmp_path / "a.zarr"), ActivationStore(whole)
        assert one.identity == two.identity
        tokens = [store.read_images(range(N_IMAGES)).astype(np.float32) for store in (one, two)]
        np.testing.assert_allclose(tokens[0], tokens[1], rtol=2**-9, atol=2**-14)

    def test_low_precision_is_part_of_the_identity_and_near_full(
        self, cells: Path, whole: Path, tmp_path: Path
    ) -> None:
        extract(open_images(cells), tmp_path / "a.zarr", config(precision="bf16"))
        low, full = ActivationStore(tmp_path / "a.zarr"), ActivationStore(whole)
        assert (low.spec.precision, full.spec.precision) == ("bf16", "fp32")
        assert low.identity != full.identity
        tokens = [store.read_images([0, 5]).astype(np.float32) for store in (low, full)]
        np.testing.assert_allclose(tokens[0], tokens[1], atol=0.05)

    def test_tokens_beyond_float16_name_the_image_and_what_to_do(self, tmp_path: Path) -> None:
        """Here a token is 100 times the sum of its patch's pixels: mean grey fits, white is 10^5."""
        declare_missing_operators()
        import timm

        with torch.device("meta"):
            model = timm.create_model("vit_small_patch14_dinov2", img_size=224, num_classes=0)
        state = {f"backbone.{key}": torch.zeros(()).expand(value.shape) for key, value in model.state_dict().items()}
        state["backbone.patch_embed.proj.weight"] = torch.full((), 100.0).expand(384, 3, 14, 14)
        torch.save({"teacher": state}, tmp_path / "steep.pth")
        rows = []
        for n in range(5):
            colour = (255, 255, 255) if n == 3 else (124, 116, 104)
            Image.new("RGB", (32, 32), colour).save(tmp_path / f"{n}.png")
            rows.append(f"{n}.png,cell {n}")
        (tmp_path / "m.csv").write_text("\n".join(["path,image_id", *rows]) + "\n")
        settings = config(backbone="dinobloom-s", weights=str(tmp_path / "steep.pth"), chunk_images=2)
        words = (
            r"the tokens of image cell 3 do not fit float16: largest magnitude 1\.\d+e\+05 after block 0, .* --block"
        )
        with pytest.raises(BadInput, match=words):
            extract(open_images(tmp_path / "m.csv"), tmp_path / "a.zarr", settings)
        with pytest.raises(IncompleteStore):
            ActivationStore(tmp_path / "a.zarr")


class TestUnreadable:
    def test_a_torn_image_is_listed_and_counted_and_the_rest_goes_on(self, cells: Path, whole: Path) -> None:
        store = ActivationStore(whole)
        assert store.images.column_names == [*MANIFEST_COLUMNS, *OUTCOME_COLUMNS]
        rows = store.images.to_pylist()
        for index, row in enumerate(rows):
            file = cells / row["path"]
            assert row["image_id"] == f"cells/{row['path']}"
            assert row["label"] == file.parent.name
            assert row["content_hash"] == hashlib.sha256(file.read_bytes()).hexdigest()
            assert row["status"] == ("unreadable" if index == TORN else "ok")
            assert (row["error"] is None) == (index != TORN)
        assert rows[TORN]["error"].startswith("cannot be decoded: image file is truncated")
        assert (store.header.summary or {})["n_unreadable"] == 1
        tokens = store.read_images(range(N_IMAGES))
        assert np.isnan(tokens[TORN]).all()
        assert np.isfinite(np.delete(tokens, TORN, 0)).all()
        assert [problem for problem in verify_activations(whole) if problem] == []

    def test_a_manifest_keeps_a_row_for_every_image_missing_or_not(self, cells: Path, tmp_path: Path) -> None:
        lines = [
            "path,patient,scanner",
            "eosinophil/00.png,P1,x",
            "gone.png,P2,y",
            "eosinophil,,",
            "lymphocyte/08.png,,",
        ]
        (tmp_path / "m.csv").write_text("\n".join(lines) + "\n")
        calls: list[tuple[int, int, str]] = []
        done = extract(
            open_images(tmp_path / "m.csv", root=cells),
            tmp_path / "a.zarr",
            config(),
            progress=lambda *call: calls.append(call),
        )
        assert (done.n_readable, done.n_unreadable, done.was_complete) == (2, 2, False)
        assert calls[-1] == (4, 4, "2 unreadable")
        images = ActivationStore(tmp_path / "a.zarr").images.to_pydict()
        assert images["error"] == [None, "no such file", "not a file", None]
        assert [value is None for value in images["content_hash"]] == [False, True, True, False]
        assert images["patient"] == ["P1", "P2", None, None]
        assert images["scanner"] == ["x", "y", None, None]
        assert str(cells) not in json.dumps(images)  # no absolute path in the table

    def test_if_no_image_can_be_read_the_cache_is_not_complete(self, tmp_path: Path) -> None:
        for n in range(4):
            (tmp_path / f"{n}.png").write_bytes(b"no image")
        words = r"none of the 4 images could be read \(0.png: not a JPEG, PNG, TIFF or BMP image\); put the files"
        for _ in range(2):  # nor is it the second time
            with pytest.raises(BadInput, match=words):
                extract(open_images(tmp_path), tmp_path / "a.zarr", config())
            with pytest.raises(IncompleteStore):
                ActivationStore(tmp_path / "a.zarr")

    def test_files_put_into_place_are_read_by_the_same_command(self, tmp_path: Path) -> None:
        """A share that was not mounted, a copy that was cut: once the file is another one, it is tried again."""
        (tmp_path / "cells").mkdir()
        for n in range(4):
            (tmp_path / "cells" / f"{n}.png").write_bytes(b"half a file")
        (tmp_path / "m.csv").write_text("path\n" + "".join(f"{n}.png\n" for n in range(5)))  # and one not there at all
        images = open_images(tmp_path / "m.csv", root=tmp_path / "cells")
        with pytest.raises(BadInput, match="put the files into place and run the same command again"):
            extract(images, tmp_path / "a.zarr", config())
        for n in range(5):
            Image.fromarray(draw_cell("monocyte", np.random.default_rng(n), size=32)).save(
                tmp_path / "cells" / f"{n}.png"
            )
        done = extract(images, tmp_path / "a.zarr", config())
        assert (done.n_readable, done.n_unreadable) == (5, 0)
        assert not [problem for problem in verify_activations(tmp_path / "a.zarr") if problem]

    def test_another_unreadable_file_is_listed_as_it_is_now(self, tmp_path: Path) -> None:
        """Its tokens are NaN as before, so the chunk's checksum does not tell which of two journal lines counts."""
        (tmp_path / "cells").mkdir()
        Image.new("RGB", (9, 9)).save(tmp_path / "cells" / "0.png")
        for content in (b"half a file", b""):
            (tmp_path / "cells" / "1.png").write_bytes(content)
            if content:
                stop = iter([False, False, True]).__next__
                with pytest.raises(KeyboardInterrupt):
                    extract(_twice(tmp_path / "cells"), tmp_path / "a.zarr", config(chunk_images=1), stop=stop)
        extract(_twice(tmp_path / "cells"), tmp_path / "a.zarr", config(chunk_images=1))
        extract(_twice(tmp_path / "cells"), tmp_path / "fresh.zarr", config(chunk_images=1))
        assert contents(tmp_path / "a.zarr") == contents(tmp_path / "fresh.zarr")
        images = ActivationStore(tmp_path / "a.zarr").images.to_pydict()
        assert images["error"] == [None, "the file is empty", None, "the file is empty"]
        assert images["content_hash"][1] == hashlib.sha256(b"").hexdigest()


def _twice(root: Path) -> Images:
    """0.png and 1.png below `root`, each of them two times."""
    table = root.parent / "m.csv"
    table.write_text("path,image_id\n0.png,a\n1.png,b\n0.png,c\n1.png,d\n")
    return open_images(table, root=root)


class TestResuming:
    @pytest.mark.stress
    @pytest.mark.parametrize("workers", [1, 7])
    def test_the_number_of_workers_does_not_change_a_byte(
        self, cells: Path, whole: Path, tmp_path: Path, workers: int
    ) -> None:
        extract(open_images(cells), tmp_path / "elsewhere.zarr", config(workers=workers))
        assert contents(tmp_path / "elsewhere.zarr") == contents(whole)

    @pytest.mark.stress
    @pytest.mark.parametrize("n_images", [0, 3, 6, 9, 11])
    def test_interrupted_at_any_chunk_and_continued_equals_uninterrupted(
        self, cells: Path, whole: Path, tmp_path: Path, n_images: int
    ) -> None:
        store = tmp_path / "a.zarr"
        with pytest.raises(Interrupted):
            extract(open_images(cells), store, config(), progress=interrupt_at(n_images))
        with pytest.raises(IncompleteStore, match=r"incomplete: .* Run the same cyto cache extract command again"):
            ActivationStore(store)
        before = {name: time for name, time in times(store).items() if name.endswith("/0/0")}
        assert len(before) >= n_images / 3 - 1  # one chunk may have been in flight
        done = extract(open_images(cells), store, config(workers=3))
        assert done == ExtractResult(
            out=store, stores=(store,), n_readable=10, n_unreadable=1, is_complete=True, was_complete=False
        )
        assert contents(store) == contents(whole)
        assert before.items() <= times(store).items()  # what was there is not done again

    @pytest.mark.stress
    def test_interrupted_at_every_chunk_in_turn_equals_uninterrupted(
        self, cells: Path, whole: Path, tmp_path: Path
    ) -> None:
        for n_images in (1, 4, 7, 10):
            with pytest.raises(Interrupted):
                extract(open_images(cells), tmp_path / "a.zarr", config(), progress=interrupt_at(n_images))
        extract(open_images(cells), tmp_path / "a.zarr", config())
        assert contents(tmp_path / "a.zarr") == contents(whole)

    @pytest.mark.stress
    def test_chunks_that_were_damaged_meanwhile_are_made_again(self, cells: Path, whole: Path, tmp_path: Path) -> None:
        """A missing file, a torn one, one of another checksum, a torn journal line, a killed writer's leavings."""
        store = tmp_path / "a.zarr"
        with pytest.raises(Interrupted):
            extract(open_images(cells), store, config(), progress=interrupt_at(11))
        chunk = [store / "tokens" / "c" / str(n) / "0" / "0" for n in range(4)]
        chunk[0].unlink()
        chunk[1].write_bytes(chunk[1].read_bytes()[:-1])
        chunk[2].write_bytes(chunk[2].read_bytes()[:-4] + b"\0\0\0\0")
        chunk[2].with_name("0.0123abcd.partial").write_bytes(b"half a chunk")
        journal = store / "journal-0-of-1.jsonl"
        journal.write_bytes(journal.read_bytes()[:-20])
        extract(open_images(cells), store, config())
        assert contents(store) == contents(whole)

    def test_a_crash_between_the_last_chunk_and_the_completion_mark_costs_no_chunk(
        self, cells: Path, whole: Path, tmp_path: Path
    ) -> None:
        store = Path(shutil.copytree(whole, tmp_path / "a.zarr"))
        header = read_header(store, ACTIVATIONS)
        write_header(store, Header(**{**vars(header), "complete": False, "summary": None}))
        before = times(store / "tokens")
        assert not extract(open_images(cells), store, config()).was_complete
        assert times(store / "tokens") == before
        assert contents(store) == contents(whole)

    @pytest.mark.stress
    def test_a_real_process_killed_at_random_moments_and_repeated_equals_uninterrupted(self, tmp_path: Path) -> None:
        """SIGKILL, and once SIGTERM, which says how to go on. The moments differ from run to run, on purpose."""
        for n in range(24):
            path = tmp_path / "cells" / f"{n:02d}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(draw_cell("eosinophil", np.random.default_rng(n), size=64)).save(path)
        options = ["--chunk-images", "1", "--batch-size", "1", "--workers", "2"]
        store = tmp_path / "killed.zarr"
        command = [sys.executable, "-c", "import cli; cli.main()", "cache", "extract"]
        killed = 0
        # while the store is begun; inside the loop (a signal during the imports would be Python's own matter); anywhere
        environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}  # else the last bits may differ
        moments = [("zarr.json", 0.02), ("journal-0-of-1.jsonl", 0.0), ("runs.jsonl", 0.3)]
        for how, watch in zip((signal.SIGKILL, signal.SIGTERM, signal.SIGKILL), moments, strict=True):
            process = subprocess.Popen(
                [*command, str(tmp_path / "cells"), str(store), *options],
                stderr=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
            grows, until = watch
            size = _size(store / grows)
            while process.poll() is None and _size(store / grows) == size:
                time.sleep(0.002)
            time.sleep(random.uniform(0, until))
            process.send_signal(how)
            stderr = process.communicate(timeout=60)[1]
            killed += process.returncode != 0
            if how == signal.SIGTERM and process.returncode != 0:
                assert process.returncode == 130
                assert stderr.endswith("interrupted; run the same command again to continue\n")
                assert "Traceback" not in stderr
        assert killed >= 1
        for folder, repetitions in ((store, 2), (tmp_path / "whole.zarr", 1)):
            for _ in range(repetitions):
                result = CliRunner().invoke(cli, ["cache", "extract", str(tmp_path / "cells"), str(folder), *options])
                assert result.exit_code == 0, result.output
        assert contents(store) == contents(tmp_path / "whole.zarr")
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []

    @pytest.mark.stress
    @pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks into Linux's /proc")
    @pytest.mark.parametrize("n_moments", [6, pytest.param(70, marks=pytest.mark.slow)])
    def test_killed_before_any_system_call_and_continued_equals_uninterrupted(
        self, cells: Path, tmp_path: Path, n_moments: int
    ) -> None:
        """SIGKILL before a sync, a rename, a new folder, a removal, in any thread; two blocks in one pass.

        A process that has imported everything forks one child for each moment, and another that continues.
        """
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        ran = subprocess.run(
            [sys.executable, "-c", KILLED_EXTRACTIONS, str(cells), str(tmp_path), str(n_moments)],
            capture_output=True,
            text=True,
            env=environment,
        )
        assert ran.returncode == 0, ran.stderr
        expected = contents(tmp_path / "whole")
        assert {"block0.zarr/zarr.json", "block1.zarr/journal.jsonl", "block1.zarr/tokens/c/2/0/0"} <= {*expected}
        lines = [json.loads(line) for line in ran.stdout.splitlines()]
        assert len(lines) == n_moments
        for moment, code, again, n_durable, n_redone in lines:
            assert (code, again) == (-signal.SIGKILL, 0), moment
            assert n_redone == 0, f"killed at call {moment}: {n_redone} of {n_durable} durable chunks were made again"
            assert contents(tmp_path / str(moment)) == expected, moment

    def test_a_full_disk_is_one_line_and_the_same_command_continues(
        self, cells: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The chunks that were saved beside it, in other threads, are kept."""
        real = files.write_atomic

        def write_atomic(path: Path, *pieces: Any) -> None:
            if path.parts[-3:] == ("1", "0", "0"):
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            real(path, *pieces)

        store = tmp_path / "a.zarr"
        arguments = ["cache", "extract", str(cells), str(store), "--block", "0", "--chunk-images", "3"]
        arguments += ["--batch-size", "2", "--workers", "2"]
        with monkeypatch.context() as patch:
            patch.setattr(activation_writer, "write_atomic", write_atomic)
            result = CliRunner().invoke(cli, arguments)
        assert result.exit_code == 1
        assert isinstance(result.exception, SystemExit)
        said = result.stderr.splitlines()[-1]
        assert said.startswith("Error: cannot use ")
        assert "tokens/c/1/0/0: No space left on device; free some space" in said
        assert "Traceback" not in result.stderr
        assert [*store.rglob("*.partial"), *store.rglob("*.lock")] == []
        assert CliRunner().invoke(cli, arguments).exit_code == 0
        assert contents(store) == contents(whole)

    @pytest.mark.stress
    def test_a_damaged_journal_line_costs_its_chunk(self, cells: Path, whole: Path, tmp_path: Path) -> None:
        """What a crash of the machine may leave: zeros, half a line amid others; or somebody's editor."""
        store = tmp_path / "a.zarr"
        with pytest.raises(KeyboardInterrupt):
            extract(open_images(cells), store, config(), stop=iter([False, False, False, True]).__next__)
        journal = store / "journal-0-of-1.jsonl"
        first, second, third = journal.read_bytes().splitlines()
        damage = [b"\0" * 20, b'{"chunk": 1}', b"{}", b"[1]", b'{"chunk": [0]}', b"\xff\xfe", second[:-9]]
        other = {**json.loads(second), "content_hash": None}, {**json.loads(second), "errors": {"99": "x"}}
        lines = [first, *damage, *(json.dumps(record).encode() for record in other), third, b""]
        journal.write_bytes(b"\n".join(lines))
        (store / "runs.jsonl").write_bytes(b"\0\0\n{}\n[]\n")
        extract(open_images(cells), store, config())
        assert contents(store) == contents(whole)

    def test_a_decoder_that_crashes_costs_one_image(
        self, cells: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It is listed as unreadable, and every other image has the tokens that it would have had."""
        (tmp_path / "sitecustomize.py").write_text(
            "import hashlib, os, sys\n"
            "if 'cytocache.read_worker' in sys.orig_argv:\n"
            "    from PIL import Image\n"
            "    real = Image.open\n"
            "    def open(file, *args, **kwargs):\n"
            f"        if file.getvalue() == {(cells / 'lymphocyte' / '07.bmp').read_bytes()!r}:\n"
            "            os.abort()\n"
            "        return real(file, *args, **kwargs)\n"
            "    Image.open = open\n"
        )
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
        done = extract(open_images(cells), tmp_path / "a.zarr", config())
        assert (done.n_readable, done.n_unreadable) == (9, 2)
        store, expected = ActivationStore(tmp_path / "a.zarr"), ActivationStore(whole)
        assert store.images["error"].to_pylist()[7] == "cannot be decoded: the decoder crashed (SIGABRT)"
        tokens, others = store.read_images(range(N_IMAGES)), expected.read_images(range(N_IMAGES))
        others[7] = np.nan
        np.testing.assert_array_equal(tokens, others)
        assert not [problem for problem in verify_activations(tmp_path / "a.zarr") if problem]

    def test_already_complete_writes_nothing(self, cells: Path, whole: Path, tmp_path: Path) -> None:
        store = Path(shutil.copytree(whole, tmp_path / "a.zarr"))
        before = times(tmp_path)
        calls: list[object] = []
        done = extract(
            open_images(cells),
            store,
            config(workers=1, batch_size=5),  # neither is part of the identity
            progress=lambda *call: calls.append(call),
        )
        assert done == ExtractResult(
            out=store, stores=(store,), n_readable=10, n_unreadable=1, is_complete=True, was_complete=True
        )
        assert times(tmp_path) == before
        assert calls == []


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


class TestOutput:
    @pytest.mark.parametrize("is_complete", [True, False])
    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"blocks": (1,)}, "block 0 against 1"),
            ({"chunk_images": 4}, "chunk_images 3 against 4"),
            ({"precision": "bf16"}, "precision fp32 against bf16"),
            ({"backbone": "dinobloom-s", "weights": "random"}, "backbone random-vit-tiny against dinobloom-s"),
        ],
    )
    def test_other_settings_are_refused_and_named(
        self, cells: Path, whole: Path, tmp_path: Path, is_complete: bool, changes: dict[str, Any], words: str
    ) -> None:
        store = tmp_path / "a.zarr"
        if is_complete:
            shutil.copytree(whole, store)
        else:
            with pytest.raises(Interrupted):
                extract(open_images(cells), store, config(), progress=interrupt_at(3))
        before = times(tmp_path)
        with pytest.raises(SpecMismatch, match=rf"other settings \({words}.*; choose another output, or add --overw"):
            extract(open_images(cells), store, config(**changes))
        assert times(tmp_path) == before

    def test_another_manifest_is_another_setting(self, cells: Path, whole: Path, tmp_path: Path) -> None:
        store = Path(shutil.copytree(whole, tmp_path / "a.zarr"))
        images = open_images(cells)
        relabelled = images.table.set_column(2, "label", images.table["path"])
        with pytest.raises(SpecMismatch, match="manifest_sha256"):
            extract(Images(relabelled, images.root), store, config())

    def test_overwrite_never_touches_what_is_not_an_activation_cache(self, cells: Path, tmp_path: Path) -> None:
        foreign, latents, file = tmp_path / "thesis", tmp_path / "latents.zarr", tmp_path / "file.zarr"
        foreign.mkdir()
        (foreign / "chapter1.txt").write_text("irreplaceable")
        latents.mkdir()
        write_header(latents, new_header(LATENTS, {}))
        file.write_text("irreplaceable")
        (tmp_path / "link.zarr").symlink_to(foreign)
        before = times(tmp_path)
        for name, words in {
            "thesis": "a folder that is not ours, not an activation cache; it is left alone",
            "latents.zarr": "a latent store, not an activation cache; it is left alone",
            "file.zarr": "is a file",
            "link.zarr": "is a link",
        }.items():
            with pytest.raises(SpecMismatch, match=words):
                extract(open_images(cells), tmp_path / name, config(), overwrite=True)
        assert times(tmp_path) == before

    def test_an_input_is_never_the_output(self, cells: Path) -> None:
        before = times(cells.parent)
        for target in (cells, cells.parent):
            with pytest.raises(SpecMismatch, match="is or contains an input of this command"):
                extract(open_images(cells), target, config(), overwrite=True, inputs=(cells,))
        assert times(cells.parent) == before

    @pytest.mark.stress
    def test_overwrite_keeps_the_old_cache_until_the_new_one_is_complete(
        self, cells: Path, whole: Path, tmp_path: Path
    ) -> None:
        store = Path(shutil.copytree(whole, tmp_path / "a.zarr"))
        old = contents(store)
        new = config(blocks=(1,))
        for n_images in (3, 6):  # the replacement, too, is continued
            with pytest.raises(Interrupted):
                extract(open_images(cells), store, new, overwrite=True, progress=interrupt_at(n_images))
            assert contents(store) == old
            assert ActivationStore(store).spec.block == 0

        done: list[int] = []

        def watch(n_done: int, total: int, state: str) -> None:
            done.append(n_done)
            assert contents(store) == old

        extract(open_images(cells), store, new, overwrite=True, progress=watch)
        assert done[0] >= 3  # images; what the interrupted runs wrote was kept, but for the chunk in flight
        extract(open_images(cells), tmp_path / "fresh.zarr", new)
        assert contents(store) == contents(tmp_path / "fresh.zarr")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zarr", "fresh.zarr"]

    def test_a_store_inside_the_images_folder_is_not_taken_for_images(self, cells: Path, tmp_path: Path) -> None:
        root = Path(shutil.copytree(cells, tmp_path / "cells"))
        extract(open_images(root), root / "acts.zarr", config(), inputs=(root,))
        with pytest.raises(Interrupted):
            extract(open_images(root), root / "more.zarr", config(), inputs=(root,), progress=interrupt_at(6))
        assert open_images(root).table.num_rows == N_IMAGES
        assert extract(open_images(root), root / "acts.zarr", config(), inputs=(root,)).was_complete

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"precision": "fp8"}, "precision must be one of auto, fp32, bf16, fp16; found 'fp8'"),
            ({"chunk_images": 0}, "chunk_images must be at least 1; found 0"),
            ({"batch_size": -1}, "batch_size must be at least 1; found -1"),
            ({"workers": 0}, "workers must be at least 1; found 0"),
        ],
    )
    def test_settings_that_mean_nothing_are_refused(self, changes: dict[str, Any], words: str) -> None:
        with pytest.raises(BadInput, match=words):
            config(**changes)


@pytest.mark.stress
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads peak memory from Linux's /proc")
def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    """Beyond what fills all buffers: kept in memory, 512 more images' tokens would be 51 MB, their pixels 77 MB."""
    Image.fromarray(draw_cell("eosinophil", np.random.default_rng(0), size=48)).save(tmp_path / "cell.png")
    for n_images in (256, 768):
        rows = [f"cell.png,{n}" for n in range(n_images)]
        (tmp_path / f"{n_images}.csv").write_text("\n".join(["path,image_id", *rows]) + "\n")
    code = """
import re, sys
from pathlib import Path
from cytocache.datasets import open_images
from cytocache.extract import ExtractConfig, extract
root, config = Path(sys.argv[1]), ExtractConfig(blocks=(0,), chunk_images=8)
for n_images in (256, 768):
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    extract(open_images(root / f"{n_images}.csv"), root / f"{n_images}.zarr", config)
    print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""
    environment = {**os.environ, "MALLOC_ARENA_MAX": "2"}  # else every thread's own heap is a matter of luck
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True, env=environment
    )
    few, many = (int(line) / 1e3 for line in ran.stdout.split())
    assert many - few < 25  # MB


class TestCommand:
    """`cyto cache extract`: what can be put right is one line on stderr and exit code 1."""

    def run(self, *arguments: object) -> Result:
        return CliRunner().invoke(cli, ["cache", "extract", *map(str, arguments)])

    def test_it_says_what_was_made_and_what_could_not_be_read(
        self, cells: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)  # places are called as they were typed
        arguments = (cells, "a.zarr", "--block", 0, "--chunk-images", 3, "--workers", 2)
        first = self.run(*arguments)
        assert first.exit_code == 0
        made = "a.zarr: 11 images x 257 tokens x 192 channels, block 0 of random-vit-tiny (UNTRAINED)"
        assert first.stdout.startswith(made)
        assert "warning: 1 of 11 images could not be read (eosinophil/04.jpg: cannot be decoded" in first.stderr
        assert "they are listed in a.zarr/images.parquet" in first.stderr
        second = self.run(*arguments)
        assert second.exit_code == 0
        assert second.stdout == first.stdout
        assert "is already complete with these settings; nothing to do" in second.stderr

    @pytest.mark.parametrize(
        ("lines", "options", "words"),
        [
            (None, [], "no images in "),
            (["file", "0.png"], [], "has no column 'path' (found: file)"),
            (["path,image_id", "0.png,a", "1.png,a"], [], "has 1 repeated image ids (a)"),
            (["path", "0.png"], ["--block", "1"], "with other settings (block 0 against 1)"),
            (["path", "0.png"], ["--backbone", "dinobloom-b"], "dinobloom-b needs weights: get DinoBloom-B.pth from"),
            (["path", "0.png"], ["--backbone", "dinobloom-s", "--weights", "m.csv"], "m.csv is cut off, or was not"),
            (["path", "0.png"], ["--backbone", "dinobloom-s", "--weights", "no.pth"], "no weights at no.pth."),
            (["path", "0.png"], ["--backbone", "resnet50"], "no backbone 'resnet50'; there are"),
            (["path", "0.png"], ["--block", "12"], "has 4 blocks: --block must be -4 to 3; found 12"),
            (["path", "0.png"], ["--root", "empty"], "say where they are with --root"),
        ],
    )
    def test_a_mistake_is_one_line_and_exit_code_1(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        lines: list[str] | None,
        options: list[str],
        words: str,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        for n in range(2):
            Image.new("RGB", (20, 20), (n, 90, 90)).save(tmp_path / f"{n}.png")
        (tmp_path / "empty").mkdir()
        (tmp_path / "m.csv").write_text("\n".join(lines or []) + "\n")
        if "other settings" in words:
            assert self.run("m.csv", "a.zarr", "--block", 0).exit_code == 0
        result = self.run("m.csv" if lines else "empty", "a.zarr", *options)
        assert result.exit_code == 1
        assert isinstance(result.exception, SystemExit)  # handled, not escaped
        assert result.stdout == ""
        assert result.stderr.startswith("Error: ")
        assert words in result.stderr
        assert result.stderr.count("\n") == 1
