"""The state of a training run between two steps, in memory and on disk: all that is needed to continue it."""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import google_crc32c
import pyarrow as pa
import torch

from cytosae.sae import SparseAutoencoder, TrainConfig, load_tensors, save_tensors
from stores.errors import DamagedStore
from stores.files import write_atomic
from stores.tables import read_sealed, sealed_parquet

from .budget import Budget
from .penalty import Penalty

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


def states(root: Path) -> list[Path]:
    """The saved states of a run, the newest first."""
    return sorted((root / "state").glob("state-*.safetensors"), reverse=True)


def save_state(root: Path, state: TrainState, *, keep: int) -> None:
    """Write a state, atomically and with a checksum, and remove all but the newest `keep` states."""
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
    tensors = {name: value.contiguous().cpu() for name, value in tensors.items()}
    write_metrics(root, state.metrics)
    metadata = {"cyto": json.dumps({"step": state.step, "crc32c": _crc(tensors)})}
    save_tensors(root / "state" / f"state-{state.step:09d}.safetensors", tensors, metadata)
    for path in states(root)[keep:]:
        path.unlink()


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
            if json.loads(metadata["cyto"])["crc32c"] == _crc(tensors):
                return tensors, metadata
            reason = "its checksum does not fit"
        except (DamagedStore, KeyError, ValueError) as error:
            reason = str(error)
        _log.warning("%s is damaged (%s); continuing from the state before it", path, reason)
    return None


def _crc(tensors: dict[str, torch.Tensor]) -> str:
    """CRC32C over all values, by name."""
    crc = 0
    for name in sorted(tensors):
        crc = google_crc32c.extend(crc, tensors[name].reshape(-1).numpy())
    return f"{crc:08x}"


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
