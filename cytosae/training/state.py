"""The state of a training run between two steps, in memory and on disk: all that is needed to continue it.

When a state is written, and by whom, is said in saving.py.
"""

import errno
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from cytosae.sae import SparseAutoencoder, TrainConfig, load_tensors
from stores.errors import DamagedStore
from stores.files import write_atomic
from stores.tables import read_sealed, sealed_parquet

from .budget import Budget
from .penalty import Penalty
from .state_file import crc_of, n_bytes_of, write_tensors

Metrics = dict[str, float | None]  # a row of metrics.parquet; None: not known yet
_WHOLE = ("step", "tokens", "dead_window_tokens", "n_dead")
_log = logging.getLogger(__name__)


@dataclass
class TrainState:
    """Weights, optimizer and counters. The order of the tokens is not in it: it is a function of the step."""

    model: SparseAutoencoder
    optimizer: torch.optim.Adam
    steps_since_fired: torch.Tensor  # (n_latents,) int64: steps since each latent was active
    token_scale: float  # factor of the tokens, above 0 (data.py)
    step: int  # steps taken
    metrics: list[Metrics]  # rows of metrics.parquet so far
    penalty: Penalty | None = None  # the steered weight of the sparsity term; None: it is given
    budget: Budget = field(default_factory=Budget)  # tokens "auto": what is known of the end


def new_model(width: int, config: TrainConfig) -> SparseAutoencoder:
    """An SAE with the shape and activation of `config`; its weights are not initialised."""
    assert config.expansion != "auto"  # choices.py
    return SparseAutoencoder(width, config.expansion * width, config.activation, config.k)


def new_optimizer(model: SparseAutoencoder, config: TrainConfig) -> torch.optim.Adam:
    """Adam over all weights, in one fused step."""
    return torch.optim.Adam(model.parameters(), lr=config.lr, fused=True)


def state_bytes(width: int, config: TrainConfig) -> int:
    """Bytes of a saved state: weights and Adam's two moments, and the counters."""
    with torch.device("meta"):  # shapes without memory
        model = new_model(width, config)
    return sum(3 * 4 * weight.numel() for weight in model.parameters()) + 8 * model.n_latents


def states(root: Path) -> list[Path]:
    """The saved states of a run, the newest first."""
    return sorted((root / "state").glob("state-*.safetensors"), reverse=True)


@dataclass(frozen=True)
class Snapshot:
    """A state at one step, as it is written."""

    step: int
    tensors: dict[str, torch.Tensor]  # by their names in the file; on any device
    metrics: list[Metrics]
    ready: Any = None  # on a GPU the torch.cuda.Event behind which the tensors may be read

    @property
    def n_bytes(self) -> int:
        """Bytes of all values."""
        return n_bytes_of(self.tensors)


def look_at(state: TrainState) -> Snapshot:
    """The state without a copy: the next step changes what is seen."""
    tensors = {f"model.{name}": value.detach() for name, value in state.model.state_dict().items()}
    for name, parameter in state.model.named_parameters():
        moments = state.optimizer.state.get(parameter, {})
        tensors |= {f"adam.{key}.{name}": value for key, value in moments.items()}
    tensors["steps_since_fired"] = state.steps_since_fired
    tensors["token_scale"] = torch.tensor(state.token_scale, dtype=torch.float64)
    if state.penalty is not None:
        tensors["penalty"] = state.penalty.to_tensor()
    if state.budget.checks:
        tensors["budget"] = state.budget.to_tensor()
    return Snapshot(state.step, tensors, list(state.metrics))


def save_state(root: Path, state: TrainState, *, keep: int) -> None:
    """Write a state, atomically and with a checksum, and remove all but the newest `keep` states."""
    write_state(root, look_at(state), keep=keep)


def write_state(root: Path, found: Snapshot, *, keep: int) -> None:
    """Write a snapshot as the newest state, atomically and with a checksum, and remove all but the newest `keep`.

    Where the disk is full, all but the newest of the older states go first.

    Raises
    ------
    OSError
        If it cannot be written; the newest state before it is still there.
    """
    path = root / "state" / f"state-{found.step:09d}.safetensors"
    for later in (other for other in states(root) if other.name > path.name):
        later.unlink(missing_ok=True)  # damaged: `load_state` went back behind it
    try:
        _write(root, path, found)
    except OSError as error:
        spare = [other for other in states(root) if other != path][1:]
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not spare:
            raise
        for other in spare:
            other.unlink(missing_ok=True)
        _write(root, path, found)
    trim_states(root, keep=keep)


def _write(root: Path, path: Path, found: Snapshot) -> None:
    write_metrics(root, found.metrics)  # first: a state has all rows up to its step
    write_tensors(path, found.tensors, {"step": found.step}, found.ready)


def trim_states(root: Path, *, keep: int) -> None:
    """Remove all but the newest `keep` states."""
    for path in states(root)[keep:]:
        path.unlink(missing_ok=True)


def remove_states(root: Path) -> None:
    """Remove all saved states, of which a finished run needs none. Can be repeated after a kill anywhere."""
    for path in states(root):
        path.unlink(missing_ok=True)


def load_state(root: Path, width: int, config: TrainConfig, device: str) -> TrainState | None:
    """The newest saved state that is undamaged, on `device`, or None. Damaged ones are skipped with a warning."""
    found = _newest(root)
    if found is None:
        return None
    tensors, metadata = found
    step = int(json.loads(metadata["cyto"])["step"])
    model = new_model(width, config)
    model.load_state_dict({name: tensors[f"model.{name}"] for name in model.state_dict()})
    model.to(device)
    optimizer = new_optimizer(model, config)
    for name, parameter in model.named_parameters():
        keys = [key for key in tensors if key.startswith("adam.") and key.endswith(f".{name}")]
        for key in keys:
            value = tensors[key].to(device)
            if value.shape == parameter.shape:  # the fused step walks through memory: its layout must be the weight's
                value = torch.empty_like(parameter.detach()).copy_(value)
            optimizer.state[parameter][key.split(".")[1]] = value
    metrics = [row for row in _read_metrics(root) if int(row["step"] or 0) <= step]
    silent = tensors["steps_since_fired"].to(device)
    penalty = Penalty.from_tensor(tensors["penalty"]) if "penalty" in tensors else None
    budget = Budget.from_tensor(tensors["budget"]) if "budget" in tensors else Budget()
    return TrainState(model, optimizer, silent, float(tensors["token_scale"]), step, metrics, penalty, budget)


def write_metrics(root: Path, metrics: list[Metrics]) -> None:
    """`metrics.parquet`: one row per logged step. It holds times, so its hash stands in it, not in the header."""
    fields = [(name, pa.int64() if name in _WHOLE else pa.float64()) for name in (metrics[0] if metrics else ())]
    write_atomic(root / "metrics.parquet", sealed_parquet(pa.Table.from_pylist(metrics, pa.schema(fields))))


def _newest(root: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]] | None:
    for path in states(root):
        try:
            tensors, metadata = load_tensors(path)
            if json.loads(metadata["cyto"])["crc32c"] == crc_of(tensors):
                return tensors, metadata
            reason = "its checksum does not fit"
        except (DamagedStore, KeyError, ValueError) as error:
            reason = str(error)
        _log.warning("%s is damaged (%s); continuing from the state before it", path, reason)
    return None


def _read_metrics(root: Path) -> Iterator[Metrics]:
    path = root / "metrics.parquet"
    if not path.exists():
        return
    try:
        yield from read_sealed(path)[0].to_pylist()
    except (OSError, ValueError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:160]
        raise DamagedStore(
            f"{path} cannot be read ({reason}); remove it to go on without the rows that it held"
        ) from None
