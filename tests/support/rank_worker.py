"""One of two processes that train together, and what stops it: the program that test_ranks.py starts twice.

python rank_worker.py FOLDER CASE:PORT...        writes FOLDER/outcomes-RANK.json
"""

import dataclasses
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from training_runs import BATCH, SETTINGS

from cytosae.sae import TrainConfig, make_config
from cytosae.training.train import train
from stores.errors import SpecMismatch, StoreUnreachable

STEPS, AT = 10, 6  # steps of a run; the step in which it is stopped, from 1
RANK = int(os.environ.get("RANK", "0"))


def config_of(case: str) -> TrainConfig:
    variants: dict[str, dict[str, Any]] = {
        "nan": {"activation": "batchtopk", "k": 6},
        "resample": {"dead_latents": "resample"},
    }
    more = variants.get(case, {}) | ({"resample_every": 3} if case == "resample" else {})
    return make_config(options={**SETTINGS, "tokens": STEPS * BATCH, "holdout": 0.2, **more})


def unreachable(*given: Any, **more: Any) -> Any:
    raise StoreUnreachable("s3://bucket/cells.acts.zarr cannot be read")


def full(*given: Any, **more: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a total capacity of 1 TiB")


class At:
    """Calls what it replaces, and `stop` instead in the call number `number`, from 1."""

    def __init__(self, real: Callable[..., Any], stop: Callable[..., Any], number: int) -> None:
        self._real, self._stop, self._left = real, stop, number

    def __call__(self, *given: Any, **more: Any) -> Any:
        self._left -= 1
        return (self._real if self._left else self._stop)(*given, **more)


def spoilt(tokens: Iterator[torch.Tensor], stop: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[torch.Tensor]:
    """The batches; the one of step `AT` goes through `stop`."""
    for step, batch in enumerate(tokens, start=1):
        yield stop(batch) if step == AT else batch


def with_nan(batch: torch.Tensor) -> torch.Tensor:
    batch = batch.clone()
    batch[0, 0] = float("nan")
    return batch


def ended(signum: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def end(batch: torch.Tensor) -> torch.Tensor:
        os.kill(os.getpid(), signum)
        return batch

    return end


def with_dead(resample: Callable[..., int]) -> Callable[..., int]:
    def call(model: Any, optimizer: Any, dead_L: torch.Tensor, *given: Any, **more: Any) -> int:
        return resample(model, optimizer, dead_L.index_fill(0, torch.tensor([1, 3]), True), *given, **more)

    return call


def replaced(case: str) -> Any:
    """What is wrong on this rank in the case of this name."""
    at = sys.modules["cytosae.training.train"]
    losses = sys.modules["cytosae.training.losses"]
    batches = {
        "read": unreachable,
        "nan": with_nan,
        "interrupt": ended(signal.SIGTERM),
        "killed": ended(signal.SIGKILL),
    }
    on_device = at.on_device
    if case in batches and RANK == 1:
        return mock.patch.object(at, "on_device", lambda *given: spoilt(on_device(*given), batches[case]))
    if case == "open" and RANK == 1:
        return mock.patch.object(at, "open_data", unreachable)
    if case == "folder" and RANK == 0:
        return mock.patch.object(at, "plan_output", mock.Mock(side_effect=SpecMismatch("it holds another run")))
    if case == "memory" and RANK == 1:
        real = losses.compare_reconstruction
        return mock.patch.object(losses, "compare_reconstruction", At(real, full, AT))
    if case == "resample":  # the weights have changed before; in both processes there is a dead latent
        real = full if RANK == 1 else with_dead(at.resample)
        return mock.patch.object(at, "resample", At(at.resample, real, 2))
    if case == "measure" and RANK == 0:
        return mock.patch.object(at, "measure_held_out", full)
    if case == "finish" and RANK == 1:
        return mock.patch.object(at, "require_unchanged", unreachable)
    return mock.patch.dict({})


def run_case(case: str, folder: Path) -> dict[str, Any]:
    def progress(done: int, total: int, metrics: dict[str, float | None]) -> None:
        if case == "progress" and metrics["step"] == AT:
            raise ConnectionError("the notebook is gone")

    config = config_of(case)
    if case == "settings" and RANK == 1:
        config = dataclasses.replace(config, lr=1e-3)
    try:
        with replaced(case):
            train([folder / "a.zarr"], folder / case, config, device="cpu", checkpoint_every=4, progress=progress)
    except BaseException as error:
        return {"type": type(error).__name__, "said": str(error)}
    return {"type": None, "said": ""}


def main() -> None:
    torch.set_num_threads(1)
    folder, cases = Path(sys.argv[1]), sys.argv[2:]
    outcomes = {}
    for pair in cases:
        case, os.environ["MASTER_PORT"] = pair.split(":")
        outcomes[f"{case} again" if case in outcomes else case] = run_case(case, folder)
        (folder / f"outcomes-{RANK}.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main()
