"""Train an SAE on cached activations: one flat loop, from the first batch to the finished run.

A step, in the released order (REFERENCE.md 4.2): decoder rows to norm 1 (done at the end of the step before, so that a
saved state is whole), dead set, loss and gradients, counters, the part of each decoder gradient along its row removed,
Adam, learning rate. Everything random hangs on the seed: an interrupted and continued run equals an uninterrupted one,
bit for bit, on the same device, versions and thread count.
"""

import dataclasses
import json
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from stores.activation_store import ActivationStore, open_caches
from stores.errors import BadInput, DamagedStore, StoreUnreachable
from stores.files import sweep_partials, sync_tree, write_atomic
from stores.output import plan_output
from stores.runlog import append_run
from stores.spec import SAE, Header, new_header, write_header
from stores.token_stream import TokenStream

from .checkpoint import load_sae, load_tensors, save_sae, save_tensors
from .config import TrainConfig
from .losses import BatchLosses, loss_and_gradients
from .model import SparseAutoencoder, geometric_median

_log = logging.getLogger(__name__)
_B_DEC_SAMPLE = 65_536  # tokens that the start of b_dec is computed from

Metrics = dict[str, float | None]  # a row of metrics.parquet; None: cannot be said yet
Progress = Callable[[int, int, Metrics], None]  # tokens done, tokens in all, the newest metrics


@dataclass
class _State:
    """What changes from step to step; saved whole."""

    model: SparseAutoencoder
    optimizer: torch.optim.Adam
    steps_since_fired: torch.Tensor  # (n_latents,) int64
    step: int
    metrics: list[Metrics]


def train(
    caches: Sequence[Path | str],
    run: Path,
    config: TrainConfig,
    *,
    device: str = "cpu",
    checkpoint_every: int = 500,
    keep_states: int = 2,
    overwrite: bool = False,
    inputs: tuple[Path, ...] = (),
    progress: Progress = lambda done, total, metrics: None,
) -> Header:
    """Train an SAE on `caches` and write it to the folder `run`; the same call continues an interrupted run.

    A cache is given by its path or its URL.
    Memory: the model four times (weights, gradients, Adam), one pool of `pool_chunks` chunks, and dense latents of one
    micro-batch (a few times 256 MiB).

    Raises
    ------
    SpecMismatch
        If the caches do not fit together, or `run` holds something else or a run with other settings.
    IncompleteStore, DamagedStore
        If a cache is not finished, or lost a chunk.
    StoreUnreachable
        If a URL cannot be read any longer; the state is saved before.
    BadInput
        If the loss or a weight stops being finite; the last saved state is kept.
    """
    stores = open_caches(caches)
    stream = TokenStream(
        stores, token_set=config.token_set, order=config.order, pool_chunks=config.pool_chunks, seed=config.seed
    )
    n_steps = config.n_steps(stream.tokens_per_epoch)
    header = new_header(SAE, _make_spec(stores, stream, config, n_steps))
    local = [store.root for store in stores if isinstance(store.root, Path)]
    output = plan_output(run, header, overwrite=overwrite, inputs=(*local, *inputs))
    if output.is_complete:
        output.publish()
        return load_sae(run).header  # a damaged one is not "already complete"

    root = output.work
    root.mkdir(parents=True, exist_ok=True)
    write_header(root, header)
    (root / "state").mkdir(exist_ok=True)
    sweep_partials(root)
    append_run(
        root,
        packages=("torch", "numpy"),
        caches=[str(store.root) for store in stores],
        device=torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        threads=torch.get_num_threads(),
    )
    state = _load_state(root, stores, config, device) or _start(stores, stream, config, device)
    skipped = config.batch_tokens if config.b_dec_init == "geometric-median-per-position" else 0
    batches = stream.batches(config.batch_tokens, position=skipped + state.step * config.batch_tokens)
    last_logged, clock = state.step, time.perf_counter()
    try:
        while state.step < n_steps:
            losses = _compute_gradients(state, next(batches), config, device)
            is_logged = (state.step + 1) % config.log_every == 0 or state.step + 1 == n_steps
            with _held_signals():  # Ctrl-C finds a step whole or not begun: what it saves is always a state
                _update(state, losses, config)
                if state.step < n_steps:  # the last norms are folded into the encoder, below
                    state.model.normalise_decoder()
                if is_logged:
                    rate = (state.step - last_logged) * config.batch_tokens / (time.perf_counter() - clock)
                    state.metrics.append(_metrics(state, losses, config, stream, rate))
            if is_logged:
                last_logged, clock = state.step, time.perf_counter()
                progress(state.step * config.batch_tokens, n_steps * config.batch_tokens, state.metrics[-1])
            if state.step % checkpoint_every == 0 and state.step < n_steps:
                _save_state(root, state, keep_states)
    except (KeyboardInterrupt, StoreUnreachable):
        _save_state(root, state, keep_states)
        raise

    state.model.fold_decoder_norm()
    if not all(bool(torch.isfinite(value).all()) for value in state.model.parameters()):
        raise BadInput("a weight became NaN or infinite in the last step; lower --lr, and train anew: --overwrite")
    _write_metrics(root, state.metrics)
    summary = {
        "steps": state.step,
        "tokens": state.step * config.batch_tokens,
        "images": round(state.step * config.batch_tokens / stream.tokens_per_image),
        "final": state.metrics[-1],
    }
    header = save_sae(root, state.model, header, summary)
    for path in _states(root):
        path.unlink()
    sync_tree(root)
    output.publish()
    return header


def _compute_gradients(state: _State, batch: npt.NDArray[np.float16], config: TrainConfig, device: str) -> BatchLosses:
    """First half of a step: sets the gradients. May be broken off and done again: it changes nothing else.

    Raises BadInput if the loss is not finite.
    """
    model = state.model
    tokens = torch.from_numpy(batch).to(device)  # travels as float16, cast where it is used
    dead = state.steps_since_fired > config.dead_after_steps if config.ghost else None
    losses = loss_and_gradients(
        model, tokens, loss=config.loss, l1=config.l1, ghost_scale=config.ghost_scale, dead_L=dead
    )
    if not math.isfinite(losses.loss):
        raise BadInput(
            f"the loss became {losses.loss} at step {state.step:,} (mse {losses.mse:.4g}, ghost {losses.ghost:.4g}); "
            f"lower --lr or lengthen --warmup-steps, and train anew: another -o, or --overwrite"
        )
    return losses


def _update(state: _State, losses: BatchLosses, config: TrainConfig) -> None:
    """Second half of a step: counters, weights, step number; whole or not at all."""
    state.steps_since_fired += 1
    state.steps_since_fired[losses.fired] = 0
    _remove_parallel_part(state.model)
    for group in state.optimizer.param_groups:
        group["lr"] = config.lr * min(1.0, (state.step + 1) / max(1, config.warmup_steps))
    state.optimizer.step()
    state.step += 1


@contextmanager
def _held_signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait until the end of the block (outside the main thread none can arrive)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = {number: handler for number, handler in handlers.items() if handler is not None}  # None: not Python's
    try:
        for number in before:
            signal.signal(number, lambda number, frame: held.append(number))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for held_back in held:
            signal.raise_signal(held_back)


@torch.no_grad()
def _remove_parallel_part(model: SparseAutoencoder) -> None:
    """Take out of each decoder row's gradient its part along the row, which the next normalisation would undo."""
    assert model.W_dec.grad is not None
    along_L1 = (model.W_dec.grad * model.W_dec).sum(1, keepdim=True)
    model.W_dec.grad -= along_L1 * model.W_dec


def _start(stores: list[ActivationStore], stream: TokenStream, config: TrainConfig, device: str) -> _State:
    """Step 0: seeded weights and b_dec from the first tokens of the stream."""
    model = SparseAutoencoder(stores[0].spec.width, config.expansion * stores[0].spec.width)
    model.init_weights(torch.Generator().manual_seed(config.seed))
    with torch.no_grad():
        model.b_dec.copy_(_initial_b_dec(stream, config))
    model.to(device)
    silent = torch.zeros(model.n_latents, dtype=torch.int64, device=device)
    return _State(model, _optimizer(model, config), silent, 0, [])


def _initial_b_dec(stream: TokenStream, config: TrainConfig) -> torch.Tensor:
    """(D,): where b_dec begins: the geometric median is the paper's, per position over one batch the released form."""
    if config.b_dec_init == "zeros":
        return torch.zeros(())
    per_position = config.b_dec_init == "geometric-median-per-position"
    n_tokens = config.batch_tokens if per_position else min(_B_DEC_SAMPLE, stream.tokens_per_epoch)
    sample = torch.from_numpy(next(stream.batches(n_tokens))).float()
    if config.b_dec_init == "mean":
        return sample.mean(0)
    if per_position:
        whole = len(sample) - len(sample) % stream.tokens_per_image
        if not whole:
            raise BadInput(f"b_dec_init {config.b_dec_init!r} needs batches of at least one image")
        return geometric_median(sample[:whole].reshape(-1, stream.tokens_per_image, sample.shape[1])).mean(0)
    return geometric_median(sample)


def _optimizer(model: SparseAutoencoder, config: TrainConfig) -> torch.optim.Adam:
    return torch.optim.Adam(model.parameters(), lr=config.lr, fused=True)


def _metrics(state: _State, losses: BatchLosses, config: TrainConfig, stream: TokenStream, rate: float) -> Metrics:
    """One row of metrics.parquet. Dead: silent for more than `dead_after_steps` steps; None while there were fewer."""
    tokens = state.step * config.batch_tokens
    dead = state.steps_since_fired > config.dead_after_steps
    row = {
        "step": state.step,
        "tokens": tokens,
        "images": tokens / stream.tokens_per_image,
        "epoch": tokens / stream.tokens_per_epoch,
        "lr": state.optimizer.param_groups[0]["lr"],
        "loss": losses.loss,
        "mse": losses.mse,
        "l1": losses.l1,
        "ghost": losses.ghost,
        "l0": losses.l0,
        "explained_variance": losses.explained_variance,
        "explained_variance_uncentered": losses.explained_variance_uncentered,
        "dead_fraction": dead.float().mean().item() if state.step > config.dead_after_steps else math.nan,
        "dead_window_tokens": config.dead_after_steps * config.batch_tokens,
        "tokens_per_second": rate,
    }
    return {name: None if math.isnan(value) else value for name, value in row.items()}  # JSON knows no NaN


def _make_spec(stores: list[ActivationStore], stream: TokenStream, config: TrainConfig, n_steps: int) -> dict[str, Any]:
    return {
        "width": stores[0].spec.width,
        "n_latents": config.expansion * stores[0].spec.width,
        "activation": "relu",
        "tokens": stores[0].spec.same_tokens,
        "trained_backbone": stores[0].spec.trained,
        "caches": [
            {"identity": store.identity, "sha256": store.content_sha256, "precision": store.spec.precision}
            for store in stores
        ],
        "tokens_per_epoch": stream.tokens_per_epoch,
        "n_steps": n_steps,
        "config": dataclasses.asdict(config),
    }


def _states(root: Path) -> list[Path]:
    """The saved states of a run, the newest first."""
    return sorted((root / "state").glob("state-*.safetensors"), reverse=True)


def _save_state(root: Path, state: _State, keep: int) -> None:
    """Everything needed to go on from here; the batch order is a function of the step. The last `keep` states stay."""
    tensors = {f"model.{name}": value.detach() for name, value in state.model.named_parameters()}
    for name, parameter in state.model.named_parameters():
        moments = state.optimizer.state.get(parameter, {})
        tensors |= {f"adam.{key}.{name}": value for key, value in moments.items()}
    tensors["steps_since_fired"] = state.steps_since_fired
    tensors = {name: value.contiguous().cpu() for name, value in tensors.items()}
    _write_metrics(root, state.metrics)
    metadata = {"cyto": json.dumps({"step": state.step, "crc32c": _crc(tensors)})}
    save_tensors(root / "state" / f"state-{state.step:09d}.safetensors", tensors, metadata)
    for path in _states(root)[keep:]:
        path.unlink()


def _newest_state(root: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]] | None:
    """The newest saved state that is whole; a damaged one is named and passed over."""
    for path in _states(root):
        try:
            tensors, metadata = load_tensors(path)
            if json.loads(metadata["cyto"])["crc32c"] == _crc(tensors):
                return tensors, metadata
            reason = "its checksum does not fit"
        except (DamagedStore, KeyError, ValueError) as error:
            reason = str(error)
        _log.warning("%s is damaged (%s); going on from the state before it", path, reason)
    return None


def _crc(tensors: dict[str, torch.Tensor]) -> str:
    """CRC32C over all values, by name."""
    crc = 0
    for name in sorted(tensors):
        crc = google_crc32c.extend(crc, tensors[name].reshape(-1).numpy())
    return f"{crc:08x}"


def _load_state(root: Path, stores: list[ActivationStore], config: TrainConfig, device: str) -> _State | None:
    found = _newest_state(root)
    if found is None:
        return None
    tensors, metadata = found
    step = int(json.loads(metadata["cyto"])["step"])
    model = SparseAutoencoder(stores[0].spec.width, config.expansion * stores[0].spec.width)
    model.load_state_dict({name: tensors[f"model.{name}"] for name, _ in model.named_parameters()})
    model.to(device)
    optimizer = _optimizer(model, config)
    for name, parameter in model.named_parameters():
        keys = [key for key in tensors if key.startswith("adam.") and key.endswith(f".{name}")]
        for key in keys:
            value = tensors[key].to(device)
            if value.shape == parameter.shape:  # the fused step walks through memory: its layout must be the weight's
                value = torch.empty_like(parameter.detach()).copy_(value)
            optimizer.state[parameter][key.split(".")[1]] = value
    metrics = [row for row in _read_metrics(root) if int(row["step"] or 0) <= step]
    return _State(model, optimizer, tensors["steps_since_fired"].to(device), step, metrics)


def _write_metrics(root: Path, metrics: list[Metrics]) -> None:
    sink = pa.BufferOutputStream()
    whole = ("step", "tokens", "dead_window_tokens")
    fields = [(name, pa.int64() if name in whole else pa.float64()) for name in (metrics[0] if metrics else ())]
    pq.write_table(pa.Table.from_pylist(metrics, pa.schema(fields)), sink)
    write_atomic(root / "metrics.parquet", memoryview(sink.getvalue()))


def _read_metrics(root: Path) -> Iterator[Metrics]:
    path = root / "metrics.parquet"
    yield from pq.read_table(path, partitioning=None).to_pylist() if path.exists() else []
