"""Which device a name means, and what it computes with."""

import os
import subprocess
import sys

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


OF_THE_ENVIRONMENT = """
import torch
from stores.devices import float32_stays_float32

matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn.conv
print(matmul.fp32_precision, convolution.fp32_precision)
float32_stays_float32()
print(matmul.fp32_precision, convolution.fp32_precision == "tf32")
print(matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
"""


def test_float32_is_not_tf32_where_the_environment_says_so() -> None:
    """As in images that set TORCH_ALLOW_TF32_CUBLAS_OVERRIDE; torch's older names are told the same."""
    environment = {**os.environ, "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}
    done = subprocess.run([sys.executable, "-c", OF_THE_ENVIRONMENT], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout.splitlines()) == (0, ["tf32 tf32", "ieee False", "False False"]), done.stderr
