"""Optional: send the metrics also to TensorBoard or Weights & Biases, if these are installed."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from stores.errors import BadInput
from stores.spec import Header, check_choice

from .state import Metrics

LOGGERS = ("tensorboard", "wandb")


class Logger(Protocol):
    """Something that takes rows of metrics.parquet."""

    def log(self, metrics: Metrics) -> None: ...


@contextmanager
def open_logger(name: str, run: Path, header: Header, *, first_step: int) -> Iterator[Logger]:
    """A logger as a context manager. TensorBoard's files are beside the run, in `NAME.tensorboard`.

    A continued run logs to the same place; TensorBoard drops what was logged after `first_step`.

    Raises
    ------
    BadInput
        If the name is unknown, or the package is not installed.
    """
    check_choice("logger", name, LOGGERS)
    if name == "tensorboard":
        writer = _imported("torch.utils.tensorboard", "tensorboard").SummaryWriter(
            log_dir=str(run.with_name(f"{run.name}.tensorboard")), purge_step=first_step + 1
        )
        try:
            yield _TensorBoard(writer)
        finally:
            writer.close()
        return
    wandb = _imported("wandb", "wandb")
    with wandb.init(
        project="cyto", name=run.name, id=header.identity[:16], resume="allow", config=header.spec["config"]
    ) as job:
        yield _Wandb(job)


class _TensorBoard:
    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def log(self, metrics: Metrics) -> None:
        for name, value in metrics.items():
            if value is not None and name != "step":
                self._writer.add_scalar(name, value, int(metrics["step"] or 0))


class _Wandb:
    def __init__(self, job: Any) -> None:
        self._job = job

    def log(self, metrics: Metrics) -> None:
        known = {name: value for name, value in metrics.items() if value is not None}
        self._job.log(known, step=int(metrics["step"] or 0))


def _imported(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise BadInput(f"the logger {package} is not installed; pip install {package}, or leave --logger out") from None
