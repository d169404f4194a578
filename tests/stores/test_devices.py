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
