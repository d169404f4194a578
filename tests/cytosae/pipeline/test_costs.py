"""What a plan says of time holds where other programs compute, too."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cytosae.pipeline import costs


class Clock:
    """Every look at it costs a second; between the looks of one product, once, an hour goes by."""

    def __init__(self) -> None:
        self.now, self.n_looks = 0.0, 0

    def perf_counter(self) -> float:
        self.n_looks += 1
        self.now += 3600.0 if self.n_looks == 4 else 1.0
        return self.now


def test_one_product_that_waits_for_an_hour_changes_no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    look: Any = SimpleNamespace(tokens=np.ones((4, 17, 8), np.float32), width=8)
    monkeypatch.setattr(costs, "time", Clock())
    assert costs.products_per_second(look, 16, device="cpu") == 4 * 17
    monkeypatch.setattr(costs, "time", Clock())
    many = 4 * 8192  # no more than 8,192 latents are measured
    assert costs.products_per_second(look, many, device="cpu") == 4 * 17 / 4
