"""Saved states: a thread writes a copy while training goes on, and whatever happens meanwhile leaves no trace."""

import contextlib
import errno
import itertools
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from token_caches import write_cache
from training_runs import BATCH, SETTINGS, _what_was_trained, tokens_of_cells

from cli import cli
from cytosae.sae import TrainConfig, load_tensors, make_config
from cytosae.sweep import sweep
from cytosae.training import saving, state, state_file
from cytosae.training.saving import Saver, SaveRule, snapshot, space_warnings
from cytosae.training.state import TrainState, look_at, new_model, new_optimizer
from cytosae.training.state_file import crc_of, write_tensors
from cytosae.training.train import plan_training, train
from stores import BadInput, checksum

pytestmark = pytest.mark.usefixtures("one_thread")


def small(*, steps: int = 12, **changes: Any) -> TrainConfig:
    return make_config(options={**SETTINGS, "tokens": steps * BATCH, "b_dec_init": "zeros", **changes})


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images of 5 tokens of width 8, 4 a chunk, image 3 unreadable; read-only."""
    return write_cache(tmp_path_factory.mktemp("saving") / "acts.zarr", tokens_of_cells(3), unreadable=(3,))


@pytest.fixture(scope="module")
def never_stopped(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    run = tmp_path_factory.mktemp("never") / "run"
    train([cache], run, small())
    return _what_was_trained(run)


def interrupt_at(stop_at: int) -> Callable[[int, int, dict[str, float | None]], None]:
    def interrupt(done: int, total: int, metrics: dict[str, float | None]) -> None:
        if metrics["step"] == stop_at:
            raise KeyboardInterrupt

    return interrupt


def steps_saved(run: Path) -> list[int]:
    return sorted(int(path.stem[6:]) for path in (run / "state").glob("state-*.safetensors"))


def state_of(n_latents_per_channel: int = 8, width: int = 6) -> TrainState:
    """Some weights and moments."""
    config = small(expansion=n_latents_per_channel)
    model = new_model(width, config)
    model.init_weights(torch.Generator().manual_seed(1))
    optimizer = new_optimizer(model, config)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return TrainState(model, optimizer, torch.arange(model.n_latents), 1.5, 7, [{"step": 7.0, "loss": 1.0}])


# ------------------------------------------------------------------------------------------- the file


@pytest.mark.parametrize("piece", [1, 100, 4 << 20])
def test_a_file_in_pieces_is_the_one_that_safetensors_writes(
    tmp_path: Path, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the byte, for tensors of all layouts; and its checksum is over the values by name."""
    monkeypatch.setattr(state_file, "_PIECE", piece)
    monkeypatch.setattr(checksum, "_PIECE", max(1, piece // 2))
    tensors = {
        "by latent": torch.randn(5, 7).T,
        "number": torch.tensor(3.5, dtype=torch.float64),
        "counts": torch.arange(3),
        "a": torch.randn(3),
        "empty": torch.zeros(0, 4),
        "step": torch.tensor(2.0),
    }
    write_tensors(tmp_path / "pieces", tensors, {"step": 7})
    contiguous = {name: value.contiguous() for name, value in tensors.items()}
    _, metadata = load_tensors(tmp_path / "pieces")
    by_name = b"".join(contiguous[name].numpy().tobytes() for name in sorted(contiguous))
    assert json.loads(metadata["cyto"]) == {"step": 7, "crc32c": f"{google_crc32c.value(by_name):08x}"}
    assert crc_of(contiguous) == f"{google_crc32c.value(by_name):08x}"
    save_file(contiguous, tmp_path / "whole", metadata)
    assert (tmp_path / "pieces").read_bytes() == (tmp_path / "whole").read_bytes()
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_a_saved_state_has_the_size_that_is_planned_with(cache: Path, tmp_path: Path) -> None:
    """To 1%: the header and Adam's counters come on top."""
    config = small(expansion=64)
    with pytest.raises(KeyboardInterrupt):
        train([cache], tmp_path / "run", config, progress=interrupt_at(2))
    from cytosae.training.data import open_data

    planned = plan_training(open_data([cache], config), tmp_path / "other", config).state_bytes
    (path,) = (tmp_path / "run" / "state").iterdir()
    assert planned <= path.stat().st_size <= 1.05 * planned


# ------------------------------------------------------------------------------------------- when


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_by_time_a_state_is_due_when_its_time_is_over_and_the_thread_has_rested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never two at a time; a disk that takes 50 s for a state is left alone for 150 s."""
    clock, may_end = Clock(), threading.Event()

    def slow_write(root: Path, found: Any, *, keep: int) -> None:
        assert may_end.wait(60)

    monkeypatch.setattr(saving, "write_state", slow_write)
    saver = Saver(SaveRule(seconds=120), clock=clock)
    assert [saver.is_due(1, 0.0) for clock.now in (0, 119, 120)] == [False, False, True]
    saver.begin(tmp_path, state_of())
    clock.now = 400  # it is still being written
    assert not saver.is_due(2, 120.0)
    clock.now = 170
    may_end.set()
    saver.wait()
    assert [saver.is_due(3, 120.0) for clock.now in (240, 319, 321)] == [False, False, True]
    saver.close()


def test_the_steps_of_before_can_still_be_said(cache: Path, tmp_path: Path) -> None:
    """checkpoint_every alone: not by time; each multiple is on the disk, however fast the steps are."""
    seen = set[int]()

    def look(done: int, total: int, metrics: dict[str, float | None]) -> None:
        seen.update(steps_saved(tmp_path / "run"))

    train([cache], tmp_path / "run", small(), checkpoint_every=3, keep_states=9, progress=look)
    assert {3, 6} <= seen <= {3, 6, 9}
    assert SaveRule.of(None, 500, 2, 32) == SaveRule(seconds=None, steps=500)
    assert SaveRule.of(None, None, 2, 32) == SaveRule(seconds=120, steps=None)
    assert SaveRule.of(5, 500, 2, 32) == SaveRule(seconds=5, steps=500)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seconds": 0}, "more than 0 seconds between two saved states; found 0"),
        ({"steps": 0}, "at least 1 step between two saved states; found 0"),
        ({"keep": 0}, "at least 1 saved state to keep; found 0"),
        ({"most_gb": 0}, "more than 0 GB for saved states; found 0"),
    ],
)
def test_a_rule_that_saves_nothing_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        SaveRule(**changes)


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("2min", 120), ("1.5h", 5400), ("1 m", 60)])
def test_the_command_takes_a_time_with_its_unit(text: str, seconds: float) -> None:
    from cytosae.commands.sae import Duration

    assert Duration().convert(text, None, None) == seconds


@pytest.mark.parametrize("text", ["2", "min", "0s", "-1min", "2 days"])
def test_a_time_without_a_unit_is_one_clear_error(text: str, cache: Path, tmp_path: Path) -> None:
    arguments = ["sae", "train", str(cache), "-o", str(tmp_path / "run"), f"--save-every={text}"]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 2
    assert "expected a time with its unit, such as 90s, 2min or 1h; found" in done.stderr


# ------------------------------------------------------------------------------------------- meanwhile


def test_steps_that_are_taken_while_a_state_is_written_do_not_change_it(
    cache: Path, tmp_path: Path, never_stopped: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread is held until four more steps are over; a run that goes on from its file equals one never stopped."""
    taken, real = threading.Event(), state._write

    def held(root: Path, path: Path, found: Any) -> None:
        if found.step == 3:
            assert taken.wait(60)
        real(root, path, found)

    def progress(done: int, total: int, metrics: dict[str, float | None]) -> None:
        if metrics["step"] == 7:
            taken.set()
            raise RuntimeError("the machine is gone")  # no state is saved after this

    monkeypatch.setattr(state, "_write", held)
    monkeypatch.setattr(Saver, "is_due", lambda saver, step, saved_at: step == 3)
    with pytest.raises(RuntimeError, match="the machine is gone"):
        train([cache], tmp_path / "run", small(), progress=progress)
    monkeypatch.undo()
    assert steps_saved(tmp_path / "run") == [3]
    train([cache], tmp_path / "run", small())
    assert _what_was_trained(tmp_path / "run") == never_stopped


def test_an_interrupt_while_a_state_is_written_leaves_both(
    cache: Path, tmp_path: Path, never_stopped: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = state._write

    def slow(root: Path, path: Path, found: Any) -> None:
        time.sleep(0.3)
        real(root, path, found)

    monkeypatch.setattr(state, "_write", slow)
    with pytest.raises(KeyboardInterrupt):
        train([cache], tmp_path / "run", small(), checkpoint_every=5, progress=interrupt_at(6))
    assert steps_saved(tmp_path / "run") == [5, 6]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("save state")]
    train([cache], tmp_path / "run", small())
    assert _what_was_trained(tmp_path / "run") == never_stopped


def test_the_end_waits_for_the_thread_and_leaves_no_state(
    cache: Path, tmp_path: Path, never_stopped: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A state that arrives behind the finished SAE would be continued from."""
    real = state._write

    def slow(root: Path, path: Path, found: Any) -> None:
        time.sleep(0.3)
        real(root, path, found)

    monkeypatch.setattr(state, "_write", slow)
    train([cache], tmp_path / "run", small(), checkpoint_every=11)
    assert steps_saved(tmp_path / "run") == []
    assert _what_was_trained(tmp_path / "run") == never_stopped


def test_without_memory_for_a_copy_the_state_is_written_on_the_spot(
    cache: Path, tmp_path: Path, never_stopped: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    writers = set[str]()
    real = state._write

    def watched(root: Path, path: Path, found: Any) -> None:
        writers.add(threading.current_thread().name)
        real(root, path, found)

    monkeypatch.setattr(state, "_write", watched)
    monkeypatch.setattr(saving, "free_memory", lambda device: 0)
    with pytest.raises(KeyboardInterrupt):
        train([cache], tmp_path / "run", small(), checkpoint_every=2, progress=interrupt_at(5))
    assert writers == {threading.main_thread().name}
    assert steps_saved(tmp_path / "run") == [4, 5]
    train([cache], tmp_path / "run", small())
    assert _what_was_trained(tmp_path / "run") == never_stopped


# ------------------------------------------------------------------------------------------- what goes wrong


def failing(monkeypatch: pytest.MonkeyPatch, fails: Callable[[int], bool], error: Exception) -> list[int]:
    """Writing the n-th file of a state, from 1, fails where `fails(n)`; the steps that were tried."""
    tried, real = list[int](), write_tensors

    def write(path: Path, tensors: Any, facts: dict[str, Any], ready: Any = None) -> None:
        tried.append(facts["step"])
        if fails(len(tried)):
            raise error
        real(path, tensors, facts, ready)

    monkeypatch.setattr(state, "write_tensors", write)
    return tried


def test_a_state_that_cannot_be_written_is_a_warning(
    cache: Path,
    tmp_path: Path,
    never_stopped: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    failing(monkeypatch, lambda n: n in (2, 3), OSError(errno.EIO, os.strerror(errno.EIO)))
    with pytest.raises(KeyboardInterrupt):
        train([cache], tmp_path / "run", small(), checkpoint_every=2, progress=interrupt_at(7))
    words = "run: the state of step 4 could not be saved (Input/output error); the states before it stay"
    assert words in caplog.text
    assert steps_saved(tmp_path / "run") == [2, 7]
    train([cache], tmp_path / "run", small())
    assert _what_was_trained(tmp_path / "run") == never_stopped


@pytest.mark.usefixtures("caplog")
def test_three_in_a_row_are_one_clear_error_and_the_state_before_stays(
    cache: Path, tmp_path: Path, never_stopped: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = failing(monkeypatch, lambda n: n > 1, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "state"))
    command = ["sae", "train", str(cache), "-o", str(tmp_path / "run"), "--checkpoint-every", "2", "--device", "cpu"]
    file = tmp_path / "settings.toml"
    lines = [f"{name} = {value}" for name, value in {**SETTINGS, "tokens": 12 * BATCH}.items()]
    file.write_text("\n".join([*lines, 'b_dec_init = "zeros"']))
    done = CliRunner().invoke(cli, [*command, "--config", str(file)])
    assert done.exit_code == 1
    said = "Error: cannot use state: No space left on device; free some space, and run the same command again: "
    assert done.stderr.splitlines()[-1].startswith(said)
    assert tried == [2, 4, 6, 8]
    assert steps_saved(tmp_path / "run") == [2]
    monkeypatch.undo()
    assert CliRunner().invoke(cli, [*command, "--config", str(file)]).exit_code == 0
    assert _what_was_trained(tmp_path / "run") == never_stopped


def test_on_a_full_disk_the_oldest_state_makes_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But never the newest one."""
    (tmp_path / "state").mkdir()
    found = state_of()
    for found.step in (1, 2, 3):
        state.save_state(tmp_path, found, keep=3)
    real, most = write_tensors, 2

    def write(path: Path, *rest: Any) -> None:
        if len(steps_saved(tmp_path)) >= most:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, *rest)

    monkeypatch.setattr(state, "write_tensors", write)
    found.step = 4
    state.save_state(tmp_path, found, keep=3)
    assert steps_saved(tmp_path) == [3, 4]
    most, found.step = 1, 5
    with pytest.raises(OSError, match="No space left"):
        state.save_state(tmp_path, found, keep=3)
    assert steps_saved(tmp_path) == [4]


def test_a_bug_in_the_thread_is_not_hidden(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, lambda n: n == 1, RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        train([cache], tmp_path / "run", small(), checkpoint_every=2)


def test_a_state_behind_a_damaged_one_replaces_it(tmp_path: Path) -> None:
    """With one state kept, a damaged one of a later step would otherwise be the one that stays."""
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "state-000000009.safetensors").write_bytes(b"damaged")
    state.save_state(tmp_path, state_of(), keep=1)
    assert steps_saved(tmp_path) == [7]


@pytest.mark.stress
@pytest.mark.parametrize("n_kills", [3])
def test_a_process_that_is_killed_while_it_writes_goes_on(cache: Path, tmp_path: Path, n_kills: int) -> None:
    """Real processes, killed when a half-written state is seen; the last one ends, and equals one never stopped."""
    file, run = tmp_path / "settings.toml", tmp_path / "run"
    lines = [f"{name} = {value}" for name, value in {**SETTINGS, "log_every": 50, "tokens": 300 * BATCH}.items()]
    file.write_text("\n".join([*lines, 'b_dec_init = "zeros"']))
    settings = ["sae", "train", str(cache), "--config", str(file), "--device", "cpu", "--checkpoint-every", "3"]
    code = (  # every write takes long enough to be seen
        "import sys, time; from cytosae.training import state_file; import cli; real = state_file._write_values\n"
        "def slow(*given):\n    time.sleep(0.01)\n    return real(*given)\n"
        "state_file._write_values = slow; sys.argv[0] = 'cyto'; cli.main()"
    )
    torn = 0
    for _ in range(n_kills):
        process = subprocess.Popen(
            [sys.executable, "-c", code, *settings, "-o", str(run)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        before = max(steps_saved(run), default=0) if (run / "state").exists() else 0
        while not (any((run / "state").glob("*.partial")) and max(steps_saved(run), default=0) > before):
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        torn += any((run / "state").glob("*.partial"))
        assert len(steps_saved(run)) <= 3
    assert torn
    done = CliRunner().invoke(cli, [*settings, "-o", str(run)])
    assert done.exit_code == 0, done.output
    assert not any(run.rglob("*.partial"))
    done = CliRunner().invoke(cli, [*settings, "-o", str(tmp_path / "never")])
    assert _what_was_trained(run) == _what_was_trained(tmp_path / "never")


# ------------------------------------------------------------------------------------------- bounds


def test_states_are_bounded_in_number_and_bytes() -> None:
    """30 SAEs at 768 -> 49,152, 0.9 GB a state: 54 GB with two each; one each, and one on its way, is 28."""
    n_bytes = 906_000_000
    assert SaveRule().within([n_bytes]).keep == 2
    assert SaveRule().within([n_bytes] * 10).keep == 2
    of_thirty = SaveRule().within([n_bytes] * 30)
    assert (of_thirty.keep, of_thirty.most_bytes([n_bytes] * 30)) == (1, 31 * n_bytes)
    assert of_thirty.most_bytes([n_bytes] * 30) <= 32e9
    assert SaveRule(keep=5).within([n_bytes]).keep == 5
    assert SaveRule(keep=5, most_gb=3).within([n_bytes]).keep == 2
    assert SaveRule(most_gb=0.1).within([n_bytes]).keep == 1  # without one nothing could be continued


def test_a_disk_that_is_too_small_is_said_before(tmp_path: Path) -> None:
    (line,) = space_warnings(tmp_path / "new" / "run", SaveRule(), [10**18])
    assert line.startswith("saved states take up to 3000000000.0 GB in ")
    assert "GB are free" in line
    assert space_warnings(tmp_path / "run", SaveRule(), [1]) == ()


@pytest.mark.stress
def test_a_sweep_stays_within_its_bytes(cache: Path, tmp_path: Path) -> None:
    """Six members: two passes of three, with one state each; what is there at any time is counted after each batch."""
    grid, most = tmp_path / "grid.toml", 0
    base = "".join(f"{name} = {value}\n" for name, value in {**SETTINGS, "tokens": 12 * BATCH}.items())
    grid.write_text(f'[base]\n{base}b_dec_init = "zeros"\n[grid]\nseed = [0, 1, 2]\nlr = [1e-3, 2e-3]\n')
    said, numbers, out = list[str](), list[int](), tmp_path / "out"

    def size(path: Path) -> int:
        with contextlib.suppress(FileNotFoundError):  # a thread has given it its name meanwhile
            return path.stat().st_size
        return 0

    def look(done: int, total: int, text: str) -> None:
        nonlocal most
        most = max(most, sum(size(path) for path in [*out.glob("runs/*/state/*")]))
        numbers.extend(len(steps_saved(run)) for run in (out / "runs").iterdir() if (run / "state").exists())

    one = 3 * 4 * (2 * 8 * 64 + 64 + 8) + 8 * 64
    sweep(grid, [cache], out, checkpoint_every=2, most_state_gb=4.1 * one / 1e9, say=said.append, progress=look)
    assert any(line.startswith("6 SAEs: 2 passes over the data with up to 3 at once") for line in said)
    assert max(numbers) <= 2  # the one that stays and, for a moment, the one that replaces it
    assert one < most <= 4.1 * one + 4 * 2_000  # with the headers of the files
    sweep(grid, [cache], tmp_path / "never")
    for run in (out / "runs").iterdir():
        assert _what_was_trained(run) == _what_was_trained(tmp_path / "never" / "runs" / run.name)


@pytest.mark.stress
def test_a_sweep_that_is_saved_by_time_goes_on(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One member at a time; after a crash each goes on from its own step, and those behind catch up."""
    grid = tmp_path / "grid.toml"
    base = "".join(f"{name} = {value}\n" for name, value in {**SETTINGS, "tokens": 40 * BATCH}.items())
    grid.write_text(f'[base]\n{base}b_dec_init = "zeros"\n[grid]\nseed = [0, 1, 2]\n')
    ticks = itertools.count()
    real = Saver.__init__
    monkeypatch.setattr(Saver, "__init__", lambda saver, rule: real(saver, rule, clock=lambda: float(next(ticks))))
    monkeypatch.setattr(saving, "_REST", 0.0)

    def progress(done: int, total: int, text: str) -> None:
        if done == 30 * BATCH:
            raise RuntimeError("the machine is gone")

    with pytest.raises(RuntimeError, match="the machine is gone"):
        sweep(grid, [cache], tmp_path / "out", save_every=20.0, progress=progress)
    saved = [steps_saved(run) for run in sorted((tmp_path / "out" / "runs").iterdir())]
    assert all(saved)
    assert len({steps[-1] for steps in saved}) > 1
    monkeypatch.undo()
    sweep(grid, [cache], tmp_path / "out")
    sweep(grid, [cache], tmp_path / "never")
    for run in (tmp_path / "out" / "runs").iterdir():
        assert _what_was_trained(run) == _what_was_trained(tmp_path / "never" / "runs" / run.name)


# ------------------------------------------------------------------------------------------- a GPU, played


class PlayedCuda:
    """As much of torch.cuda as a file of a state uses. A copy that was begun is there when its event is waited for."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.pending: list[Callable[[], None]] = []

    def install(self, patch: pytest.MonkeyPatch) -> None:
        played = self

        class Event:
            def record(self, stream: Any) -> None:
                played.log.append("record")

            def synchronize(self) -> None:
                played.log.append("wait")
                for copy in played.pending:
                    copy()
                played.pending.clear()

        class Stream:
            def __init__(self, device: Any = None) -> None:
                pass

            def __enter__(self) -> None:
                pass

            def __exit__(self, *error: object) -> None:
                pass

            def wait_event(self, event: Any) -> None:
                played.log.append(f"behind {event}")

        real_empty, real_copy = torch.empty, torch.Tensor.copy_

        def empty(*shape: Any, pin_memory: bool = False, **more: Any) -> torch.Tensor:
            if pin_memory:
                played.log.append("pin")
            return real_empty(*shape, **more)

        def copy_(to: torch.Tensor, given: torch.Tensor, *, non_blocking: bool = False) -> torch.Tensor:
            assert non_blocking
            to.fill_(-1)
            played.pending.append(lambda: (real_copy(to, given), None)[1])
            return to

        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "Stream", Stream)
        patch.setattr(torch.cuda, "stream", lambda stream: stream)
        patch.setattr(torch, "empty", empty)
        patch.setattr(torch.Tensor, "copy_", copy_)


def test_what_lies_on_a_gpu_comes_through_one_pinned_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the event of the copy, each piece waited for before it is written; one buffer for pieces of one size."""
    values = torch.randn(6, 10).T  # as a weight that is stored by latent
    cuda = PlayedCuda()
    with monkeypatch.context() as patch:
        cuda.install(patch)
        fetch = state_file._FromGpu(torch.device("cuda"), "the copy")
        patch.setattr(state_file, "_PIECE", 2 * 6 * 4)
        found = b"".join(piece.tobytes() for piece in state_file._pieces(values, fetch))
    assert found == values.contiguous().numpy().tobytes()
    assert cuda.log == ["behind the copy", "pin", *["record", "wait"] * 5]


@pytest.mark.parametrize("is_roomy", [True, False])
def test_a_copy_stays_on_the_gpu_only_if_there_is_room_for_it_twice(
    is_roomy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On fake CUDA tensors; without room it lies on the host, in the layout of the weights."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    class Stream:
        def record_event(self) -> str:
            return "recorded"

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    with FakeTensorMode(allow_non_fake_inputs=True):
        found = TrainState(*_on_fake_gpu(), 1.0, 3, [])
        n_bytes = look_at(found).n_bytes
        monkeypatch.setattr(
            saving, "free_memory", lambda device: 2 * n_bytes - (device.startswith("cuda") and not is_roomy)
        )
        copy = snapshot(found)
    assert copy is not None
    assert copy.tensors["model.W_enc"].device.type == ("cuda" if is_roomy else "cpu")
    assert copy.tensors["model.W_enc"].stride() == found.model.W_enc.stride()
    assert copy.ready == ("recorded" if is_roomy else None)
    assert {name: value.shape for name, value in copy.tensors.items()} == {
        name: value.shape for name, value in look_at(found).tensors.items()
    }


def _on_fake_gpu() -> tuple[Any, Any, torch.Tensor]:
    config = small()
    with torch.device("cuda"):
        model = new_model(8, config)
        return model, torch.optim.Adam(model.parameters()), torch.zeros(model.n_latents, dtype=torch.int64)


@pytest.fixture(autouse=True)
def _warnings_are_seen(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
