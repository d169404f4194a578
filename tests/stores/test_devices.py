"""Which device a name means."""

import pytest
import torch

from stores import devices
from stores.errors import BadInput


@pytest.mark.parametrize(("n_gpus", "expected"), [(0, "cpu"), (2, "cuda")])
def test_auto_is_a_gpu_if_there_is_one(n_gpus: int, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: n_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
    monkeypatch.setattr(devices, "_has_gpu", torch.cuda.is_available)
    assert devices.resolve_device("auto") == expected
    with pytest.raises(BadInput, match="an available cuda device; found 'cuda:2'"):
        devices.resolve_device("cuda:2")


MEMORY_ERRORS = [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has"), "of cuda:0", "2.50 GiB"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "of cuda:0", None),
    (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), "of cuda:0", None),
    (
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes. Err"),
        "of this machine",
        "64 bytes",
    ),
    (MemoryError("Unable to allocate 1.00 TiB for an array with shape (1,)"), "of this machine", "1.00 TiB"),
    (MemoryError(), "of this machine", None),
]


@pytest.mark.parametrize(("error", "where", "asked"), MEMORY_ERRORS)
def test_memory_that_runs_out_is_one_line(error: Exception, where: str, asked: str | None) -> None:
    with pytest.raises(BadInput) as found, devices.memory_errors("cuda:0", "take less"):
        raise error
    wanted = f", where {asked} were asked for" if asked else ""
    assert str(found.value) == f"the memory {where} is not enough{wanted}: take less"


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes"), BadInput("a bad one"), OSError(28, "full")])
def test_another_error_stays_what_it_is(error: Exception) -> None:
    with pytest.raises(type(error)) as found, devices.memory_errors("cuda:0", "take less"):
        raise error
    assert found.value is error
