"""Train an SAE on cached activations: one flat loop, from the first batch to the finished run.

A step, in the released order (docs/reference/paper.md 4.2):
decoder rows to norm 1 (done at the end of the step before, so that a
saved state is whole), dead set, loss and gradients, counters, the part of each decoder gradient along its row removed,
Adam, learning rate. Everything random hangs on the seed: an interrupted and continued run equals an uninterrupted one,
bit for bit, on the same device, versions and thread count.
"""

import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cytosae.sae import SparseAutoencoder, TrainConfig, load_sae, save_sae
from stores.content_hashes import write_trained_on
from stores.destination import Output, plan_output
from stores.errors import BadInput, StoreUnreachable
from stores.files import sweep_partials, sync_tree, write_atomic
from stores.runlog import append_run
from stores.spec import SAE, Header, find_header, new_header, require_unchanged, write_header
from stores.tables import parquet_bytes

from .data import TrainingData, first_position, initial_b_dec, open_data, require_start, token_scale
from .dead_latents import resample
from .device_prefetch import on_device
from .distributed import ALONE, Ranks, joined_ranks
from .evaluate import measure_held_out
from .losses import BatchLosses, loss_and_gradients
from .metric_loggers import Logger, open_logger
from .state import Metrics, TrainState, load_state, new_model, new_optimizer, remove_states, save_state, write_metrics

Progress = Callable[[int, int, Metrics], None]  # tokens done, tokens in all, the newest metrics
_THRESHOLD_WEIGHT = (
    0.1  # of the newest batch in batchtopk's running mean: a batch has k x tokens latents, so it hardly varies
)
_MICRO_BATCH = 1_024  # tokens that are looked at together when dead latents start anew


class Diverged(BadInput):
    """The loss or a weight stopped being finite, at step `step`."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


def train(
    caches: Sequence[Path | str],
    run: Path,
    config: TrainConfig,
    *,
    exclude: Collection[str] = (),
    device: str = "cpu",
    checkpoint_every: int = 500,
    keep_states: int = 2,
    overwrite: bool = False,
    inputs: tuple[Path, ...] = (),
    logger: str | None = None,
    progress: Progress = lambda done, total, metrics: None,
) -> Header:
    """Train an SAE on `caches` and write it to the folder `run`; the same call continues an interrupted run.

    A cache is given by its path or its URL. Started by torchrun, all processes train one SAE together: each works on
    its part of every batch, and the first one writes.
    Memory: the model four times (weights, gradients, Adam), one pool of `pool_chunks` chunks, and dense latents of one
    micro-batch (a few times 256 MiB).

    exclude : ids of images that are neither trained on nor held out
    logger : also send the metrics to tensorboard or wandb

    Raises
    ------
    SpecMismatch
        If the caches do not fit together, or `run` holds something else, a run with other settings, or one at work.
    IncompleteStore, DamagedStore
        If a cache is not finished, or lost a chunk.
    StoreUnreachable
        If a URL cannot be read any longer; the state is saved before.
    Diverged
        If the loss or a weight stops being finite; the last saved state is kept.
    """
    with joined_ranks(device) as ranks, ExitStack() as stack:
        data = open_data(caches, config, exclude=exclude)
        training = Training(data, run, config, device=device, ranks=ranks, keep_states=keep_states)
        if not training.begin(stack, overwrite=overwrite, inputs=inputs):
            return load_sae(run).header  # a damaged one is not "already complete"
        training.log_to(stack, logger)
        part = ranks.rank, ranks.size
        batches = on_device(data.stream.batches(config.batch_tokens, position=training.position, part=part), device)
        try:
            while training.step < training.n_steps:
                training.take_step(next(batches), progress)
                if training.step % checkpoint_every == 0 and training.step < training.n_steps:
                    training.save()
        except (KeyboardInterrupt, StoreUnreachable):
            training.save()
            raise
        return training.finish()


class Training:
    """One SAE in training: begun, taken from step to step, finished."""

    def __init__(
        self,
        data: TrainingData,
        run: Path,
        config: TrainConfig,
        *,
        device: str,
        ranks: Ranks = ALONE,
        keep_states: int = 2,
    ) -> None:
        """Nothing is read or written yet. Raises BadInput if the settings do not fit the tokens."""
        require_start(data, config)
        self.data, self.config, self.device, self._ranks, self._keep = data, config, device, ranks, keep_states
        self.n_steps = config.n_steps(data.stream.tokens_per_epoch)
        spec = {
            "width": data.width,
            "n_latents": config.expansion * data.width,
            "activation": config.activation,
            "k": config.k,
            **data.to_spec(),
            "n_steps": self.n_steps,
            "config": dataclasses.asdict(config),
            "resolved": config.resolved(data.width, self.n_steps),
        }
        self._run, self._header, self._auxk = run, new_header(SAE, spec), spec["resolved"]["auxk"]
        self._output: Output
        self._state: TrainState
        self._loggers: list[Logger] = []

    @property
    def step(self) -> int:
        """Steps taken."""
        return self._state.step

    @property
    def identity(self) -> str:
        """SHA-256 of data and settings: that of the finished run."""
        return self._header.identity

    @property
    def newest(self) -> Metrics | None:
        """The last row of metrics so far."""
        return self._state.metrics[-1] if self._state.metrics else None

    @property
    def position(self) -> int:
        """The token of the stream that the next step begins with."""
        return first_position(self.config) + self.step * self.config.batch_tokens

    def begin(self, stack: ExitStack, *, overwrite: bool = False, inputs: tuple[Path, ...] = ()) -> bool:
        """Open the folder of the run and the newest state in it, or a new one. False if the run is complete already.

        The run is this process's alone until `stack` is closed. Raises SpecMismatch as `train` does.
        """
        precision = self.config.precision
        if precision != "fp32" and not self.device.startswith("cuda"):
            raise BadInput(f"precision {precision!r} is for GPUs; found device {self.device!r}. Use precision fp32")
        if self._ranks.is_first:
            self._output = self._prepare(stack, overwrite, inputs)
        self._output = self._ranks.shared(self._output if self._ranks.is_first else None)
        if self._output.is_complete:
            return False
        root = self._output.work
        self._state = load_state(root, self.data.width, self.config, self.device) or self._new_state()
        self._last_logged, self._clock = self.step, time.perf_counter()
        return True

    def _prepare(self, stack: ExitStack, overwrite: bool, inputs: tuple[Path, ...]) -> Output:
        local = [store.root for store in self.data.stores if isinstance(store.root, Path)]
        output = plan_output(self._run, self._header, overwrite=overwrite, inputs=(*local, *inputs))
        stack.callback(output.release)
        if output.is_complete:
            remove_states(output.work)  # a kill behind the header may have left some
            output.publish()
            return output
        root = output.work
        root.mkdir(parents=True, exist_ok=True)
        write_header(root, self._header)
        (root / "state").mkdir(exist_ok=True)
        sweep_partials(root)
        append_run(
            root,
            packages=("torch", "numpy", "numba"),
            caches=[str(store.root) for store in self.data.stores],
            device=torch.cuda.get_device_name(self.device) if self.device.startswith("cuda") else self.device,
            threads=torch.get_num_threads(),
            processes=self._ranks.size,
        )
        return output

    def _new_state(self) -> TrainState:
        """Step 0: seeded weights, and b_dec from the first tokens of the stream."""
        scale = token_scale(self.data, self.config)
        model = new_model(self.data.width, self.config)
        model.init_weights(torch.Generator().manual_seed(self.config.seed), threshold=self.config.jump_threshold)
        with torch.no_grad():
            model.b_dec.copy_(initial_b_dec(self.data, self.config) * scale)
        model.to(self.device)
        silent = torch.zeros(model.n_latents, dtype=torch.int64, device=self.device)
        return TrainState(model, new_optimizer(model, self.config), silent, scale, 0, [])

    def log_to(self, stack: ExitStack, name: str | None) -> None:
        """Also send the metrics to another program (metric_loggers.py)."""
        if name is not None and self._ranks.is_first:
            logger = open_logger(name, self._run, self._header, first_step=self.step)
            self._loggers.append(stack.enter_context(logger))

    def take_step(self, tokens: torch.Tensor, progress: Progress) -> None:
        """One step on this rank's part of a batch, (n, width) float16 on the device."""
        losses = self._compute_gradients(tokens)
        state, config = self._state, self.config
        is_logged = (state.step + 1) % config.log_every == 0 or state.step + 1 == self.n_steps
        with _held_signals():  # Ctrl-C finds a step whole or not begun: what it saves is always a state
            self._update(losses, tokens)
            if is_logged:
                rate = (state.step - self._last_logged) * config.batch_tokens / (time.perf_counter() - self._clock)
                state.metrics.append(self._metrics(losses, rate))
        if is_logged:
            self._last_logged, self._clock = state.step, time.perf_counter()
            if self._ranks.is_first:
                progress(state.step * config.batch_tokens, self.n_steps * config.batch_tokens, state.metrics[-1])
                for logger in self._loggers:
                    logger.log(state.metrics[-1])

    def _compute_gradients(self, tokens: torch.Tensor) -> BatchLosses:
        """First half of a step: sets the gradients. May be broken off and done again: it changes nothing else.

        Raises Diverged if the loss is not finite. On a GPU the host waits for that in every step, so that no weight,
        and no saved state, comes from such a step; the log's numbers come with it.
        """
        state, config = self._state, self.config
        losses = loss_and_gradients(
            state.model,
            tokens,
            loss=config.loss,
            l1=config.l1_at(state.step),
            dead_L=state.steps_since_fired > config.dead_after_steps,
            dead_latents=config.dead_latents,
            ghost_scale=config.ghost_scale,
            auxk=self._auxk,
            auxk_weight=config.auxk_weight,
            bandwidth=config.jump_bandwidth,
            token_scale=state.token_scale,
            ranks=self._ranks,
            precision=config.precision,
        )
        if not math.isfinite(losses.loss):
            raise Diverged(
                f"the loss became {losses.loss} at step {state.step:,} (mse {losses.mse:.4g}, dead latents' part "
                f"{losses.dead:.4g}); lower --lr or lengthen --warmup-steps, and train anew: another -o, or "
                f"--overwrite",
                state.step,
            )
        return losses

    def _update(self, losses: BatchLosses, tokens: torch.Tensor) -> None:
        """Second half of a step: counters, weights, step number; whole or not at all."""
        state, config = self._state, self.config
        state.steps_since_fired += 1
        state.steps_since_fired.masked_fill_(losses.fired, 0)
        if losses.threshold is not None:
            old, weight = state.model.threshold, _THRESHOLD_WEIGHT if state.step else 1.0
            old += weight * (losses.threshold - old)
        for group in state.optimizer.param_groups:
            group["lr"] = config.lr_at(state.step, self.n_steps)
        is_last = state.step + 1 == self.n_steps  # its norms are folded into the encoder, in `finish`
        if state.model.W_dec.is_cuda:
            from . import kernels_gpu  # needs triton

            kernels_gpu.step(state.model, state.optimizer, normalise=not is_last)
        else:
            _remove_parallel_part(state.model)
            state.optimizer.step()
            if not is_last:
                state.model.normalise_decoder()
        state.step += 1
        if (
            config.dead_latents == "resample"
            and state.step % config.resample_every == 0
            and state.step + config.resample_every <= self.n_steps
        ):
            dead = state.steps_since_fired > config.dead_after_steps
            draws = torch.Generator().manual_seed(_seed_of(config.seed, state.step))
            resample(
                state.model,
                state.optimizer,
                dead,
                tokens,
                draws,
                token_scale=state.token_scale,
                ranks=self._ranks,
                micro_batch=_MICRO_BATCH,
            )
            state.steps_since_fired[dead] = 0

    def _metrics(self, losses: BatchLosses, rate: float) -> Metrics:
        """One row of metrics.parquet. Dead: silent for over `dead_after_steps` steps; None while there were fewer."""
        state, config, stream = self._state, self.config, self.data.stream
        tokens = state.step * config.batch_tokens
        n_dead = int((state.steps_since_fired > config.dead_after_steps).sum())
        is_known = state.step > config.dead_after_steps
        row = {
            "step": state.step,
            "tokens": tokens,
            "images": tokens / stream.tokens_per_image,
            "epoch": tokens / stream.tokens_per_epoch,
            "lr": state.optimizer.param_groups[0]["lr"],
            "loss": losses.loss,
            "mse": losses.mse,
            "l1": losses.l1,
            "gate": losses.gate,
            "dead_loss": losses.dead,
            "l0": losses.l0,
            "explained_variance": losses.explained_variance,
            "explained_variance_uncentered": losses.explained_variance_uncentered,
            "n_dead": n_dead if is_known else None,
            "dead_fraction": n_dead / state.model.n_latents if is_known else None,
            "dead_window_tokens": config.dead_after_steps * config.batch_tokens,
            "tokens_per_second": rate,
        }
        return {name: None if value is None or math.isnan(value) else value for name, value in row.items()}

    def save(self) -> None:
        """Write the state, from which `begin` goes on."""
        if self._ranks.is_first:
            save_state(self._output.work, self._state, keep=self._keep)

    def finish(self) -> Header:
        """Fold what can be folded into the weights, measure on what was held out, write the run, and call it complete.

        Raises Diverged if a weight is not finite.
        """
        state, root = self._state, self._output.work
        require_unchanged(*(store.header for store in self.data.stores))
        state.model.fold_decoder_norm()
        if state.token_scale != 1:
            state.model.fold_token_scale(state.token_scale)
        if not all(bool(torch.isfinite(value).all()) for value in state.model.state_dict().values()):
            raise Diverged(
                "a weight became NaN or infinite in the last step; lower --lr, and train anew: --overwrite", state.step
            )
        if self._ranks.is_first:
            write_metrics(root, state.metrics)
            summary: dict[str, Any] = {
                "steps": state.step,
                "tokens": state.step * self.config.batch_tokens,
                "images": round(state.step * self.config.batch_tokens / self.data.stream.tokens_per_image),
                "token_scale": state.token_scale,
                "final": state.metrics[-1],
                "trained_on": write_trained_on(root, self.data.trained_on()),
            }
            if any(mask.any() for mask in self.data.chosen.held_out):
                summary["held_out"] = measure_held_out(state.model, self.data, self.config, device=self.device)
                write_atomic(root / "held_out.parquet", parquet_bytes(self.data.held_out_table()))
            save_sae(root, state.model, self._header, summary)
            sync_tree(root)
            remove_states(root)
            self._output.publish()
        self._ranks.wait()
        header = find_header(self._run)
        assert header is not None
        return header


def _seed_of(*numbers: int) -> int:
    """One seed for several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


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
