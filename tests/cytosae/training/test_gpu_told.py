"""What a GPU machine says, on a machine without one: memory that is not enough, what Triton lacks, waits that count."""

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from gpu_waits import waits_of_the_host
from token_caches import write_cache
from training_runs import SETTINGS, tokens_of_cells

from cli import cli
from cytosae.sae import make_config
from cytosae.sweep import sweep
from cytosae.training import triton_ready
from cytosae.training.train import train
from stores.devices import is_out_of_memory, memory_told
from stores.errors import BadInput, OutOfMemory

pytestmark = pytest.mark.usefixtures("one_thread")
losses: Any = sys.modules["cytosae.training.losses"]

# as torch 2.13, numpy 2.3, cuBLAS and the CUDA driver say it
OF_TORCH = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 512.00 MiB is "
    "free. Including non-PyTorch memory, this process has 78.60 GiB memory in use.\nSee documentation (...)"
)
SAID = {
    OF_TORCH: "out of memory: 20.00 GiB more were asked for, of 79.11 GiB of the GPU 512.00 MiB are free. Lower it",
    "CUDA error: out of memory\nCUDA kernel errors might be reported later": "out of memory on the GPU. Lower it",
    "CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`": "out of memory. Lower it",
    "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "64 bytes. Error code 12": "out of memory: 64 bytes more were asked for. Lower it",
    "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "14745600000000 bytes. Error code 12": "out of memory: 13,732.91 GiB more were asked for. Lower it",
}


@pytest.mark.parametrize("text", SAID)
def test_out_of_memory_is_one_line(text: str) -> None:
    @memory_told("Lower it")
    def full() -> None:
        raise torch.OutOfMemoryError(text) if text == OF_TORCH else RuntimeError(text)

    with pytest.raises(OutOfMemory) as told:
        full()
    assert str(told.value) == SAID[text]
    assert told.value.__suppress_context__


def test_what_numpy_and_torch_really_say_here() -> None:
    """And that other errors stay what they are."""
    for ask in (lambda: np.empty(1 << 50, np.float64), lambda: torch.empty(1 << 50)):
        with pytest.raises(OutOfMemory, match=r"^out of memory: \d[\d.,]* ?\w+ more were asked for\. Lower it$"):
            with memory_told("Lower it"):
                ask()
    with pytest.raises(RuntimeError, match="sizes") as other, memory_told("Lower it"):
        raise RuntimeError("sizes differ")
    assert not is_out_of_memory(other.value)


def test_an_sae_that_no_machine_holds(tmp_path: Path) -> None:
    """Before the first step there is no state that a run could go on from: the line does not speak of one."""
    cache = write_cache(tmp_path / "a.zarr", tokens_of_cells(3))
    config = make_config(options={**SETTINGS, "expansion": 1 << 42})
    with pytest.raises(OutOfMemory, match=r"^out of memory: [\d,]+\.\d\d GiB more were asked for\. Lower --expansion$"):
        train([cache], tmp_path / "a.sae", config)


def test_the_state_before_is_saved_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of step 6: one line of the command, exit code 1; continued, the bits of a run never stopped."""
    cache = write_cache(tmp_path / "a.zarr", tokens_of_cells(3))
    config = make_config(options={**SETTINGS, "tokens": 100})
    train([cache], tmp_path / "whole", config)
    command = ["sae", "train", str(cache), "-o", str(tmp_path / "cut"), "--config", str(tmp_path / "c.toml")]
    (tmp_path / "c.toml").write_text("".join(f"{key} = {value}\n" for key, value in SETTINGS.items()))
    command += ["--tokens", "100", "--device", "cpu"]
    real, calls = losses.compare_reconstruction, []

    def full(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:
            raise torch.OutOfMemoryError(OF_TORCH)
        return real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(losses, "compare_reconstruction", full)
        done = CliRunner().invoke(cli, command)
    assert done.exit_code == 1
    last = done.stderr.rstrip("\n").split("\n")[-1]
    assert last.startswith("Error: out of memory: 20.00 GiB more were asked for, of 79.11 GiB of the GPU 512.00 MiB")
    assert "Lower --expansion or --batch-tokens, with another -o" in last
    assert [path.name for path in tmp_path.rglob("state-*")] == ["state-000000005.safetensors"]
    assert CliRunner().invoke(cli, command).exit_code == 0
    assert (tmp_path / "cut" / "sae.safetensors").read_bytes() == (tmp_path / "whole" / "sae.safetensors").read_bytes()


def test_the_matrices_of_the_step_are_gone_when_the_state_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error holds the frames that hold them: saving needs the room."""
    import gc
    import weakref

    module = sys.modules["cytosae.training.train"]
    cache, held = write_cache(tmp_path / "a.zarr", tokens_of_cells(3)), []

    def full(x_hat_BD: torch.Tensor, *given: Any) -> Any:
        held.append(weakref.ref(x_hat_BD))
        raise torch.OutOfMemoryError(OF_TORCH)

    save = module.save_training
    alive: list[bool] = []

    def saved(training: Any) -> None:
        alive.extend(one() is not None for one in held)
        save(training)

    monkeypatch.setattr(losses, "compare_reconstruction", full)
    monkeypatch.setattr(module, "save_training", saved)
    gc.disable()
    try:
        with pytest.raises(OutOfMemory):
            train([cache], tmp_path / "run", make_config(options={**SETTINGS, "tokens": 100}))
    finally:
        gc.enable()
    assert alive == [False]


def test_a_sweep_says_what_to_lower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = write_cache(tmp_path / "a.zarr", tokens_of_cells(3))
    lines = [f"{name} = {value}" for name, value in (SETTINGS | {"tokens": 100}).items()]
    (tmp_path / "grid.toml").write_text("\n".join(["[base]", *lines, "[grid]", "lr = [1e-3, 2e-3]", ""]))
    real, calls = losses.compare_reconstruction, []

    def full(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:  # the second SAE, in its third step
            raise torch.OutOfMemoryError(OF_TORCH)
        return real(*given)

    monkeypatch.setattr(losses, "compare_reconstruction", full)
    with pytest.raises(OutOfMemory, match="Lower --at-once, or end what else uses this memory, and run the same"):
        sweep(tmp_path / "grid.toml", [cache], tmp_path / "sweep")
    steps = sorted(int(path.stem.split("-")[1]) for path in (tmp_path / "sweep").rglob("state-*"))
    assert steps == [2, 3]


# ------------------------------------------------------------------------------------------------------- triton


NO_COMPILER = """
import os, sys
from triton.runtime import build
os.environ.pop("CC", None)
if sys.argv[1] == "none":
    os.environ["PATH"] = "/nowhere"
else:
    os.environ["CC"] = sys.argv[1]
from cytosae.training import triton_ready
try:
    build.compile_module_from_src("int main(void) { return 0; }" if sys.argv[1] != "false" else "x", "nothing_17")
except Exception as error:
    print(triton_ready._what_is_missing(error))
"""


@pytest.mark.parametrize(
    ("compiler", "words"),
    [
        ("none", "no C compiler is there; install gcc or clang"),
        ("/nowhere/cc", "the C compiler that CC names, '/nowhere/cc', is not there"),
        ("false", "the C compiler false failed"),
    ],
)
def test_what_triton_really_says_without_a_compiler(compiler: str, words: str, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton is not installed (it comes with torch's CUDA builds)")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", NO_COMPILER, compiler], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(words), done.stdout


ERRORS = {
    "no C compiler is there; install gcc or clang": RuntimeError(
        "Failed to find C compiler. Please specify via CC environment variable or set triton.knobs.build.impl."
    ),
    "the C compiler /usr/bin/gcc failed .*apt install python3-dev": subprocess.CalledProcessError(
        1, ["/usr/bin/gcc", "/tmp/x.c"]
    ),
    r"libcuda\.so of the GPU's driver is not found": AssertionError("libcuda.so cannot found!\nPossible files"),
    "name a folder in TRITON_CACHE_DIR": PermissionError(13, "Permission denied", "/var/cache/triton"),
    "ValueError: something new": ValueError("something\nnew"),
}


@pytest.mark.parametrize("words", ERRORS)
def test_a_run_is_refused_before_it_writes(words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel of the question fails; the folder of the run is not made."""

    class Kernels:
        @staticmethod
        def mark_active(p_BL: torch.Tensor) -> None:
            raise ERRORS[words]

    import cytosae.training as room

    module = sys.modules["cytosae.training.train"]
    monkeypatch.setitem(sys.modules, "cytosae.training.kernels_gpu", Kernels)
    monkeypatch.setattr(room, "kernels_gpu", Kernels, raising=False)
    monkeypatch.setattr(triton_ready, "torch", type("Fake", (), {"zeros": staticmethod(lambda *a, **k: None)}))
    monkeypatch.setattr(module, "resolve_device", lambda device: "cuda")
    cache = write_cache(tmp_path / "a.zarr", tokens_of_cells(3))
    with pytest.raises(
        BadInput, match=f"^training on a GPU needs triton to build its kernels: .*{words}.*gpu.md"
    ) as told:
        train([cache], tmp_path / "run", make_config(options={**SETTINGS, "tokens": 100}))
    assert "\n" not in str(told.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zarr"]


# -------------------------------------------------------------------------------------------------------- waits


def test_waits_are_counted_where_warnings_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch does it: switching the mode on warns, too. The mode is off afterwards, whatever happens."""
    modes = []

    def set_mode(mode: str) -> None:
        modes.append(mode)
        if mode == "warn":
            warnings.warn(
                "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing "
                "operations",
                stacklevel=1,
            )

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with waits_of_the_host() as said:
            for _ in range(3):
                warnings.warn("called a synchronizing CUDA operation (Triggered internally at ...)", stacklevel=1)
        assert len(said) == 3
        with pytest.raises(ZeroDivisionError), waits_of_the_host():
            raise ZeroDivisionError
    assert modes == ["warn", "default"] * 2
