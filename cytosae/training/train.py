"""Train an SAE on cached activations.

Read from top to bottom: `train` is the loop, `train_step` one step of it, in the order of the released code
(docs/reference/paper.md 4.2); then what comes before the first step and after the last one. `cyto sae sweep` calls
the same functions for its members.

Everything random depends on the seed only: an interrupted and continued run equals an uninterrupted one, bit for bit,
on the same device, versions and thread count.
"""

import dataclasses
import math
import signal
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cytosae.sae import SaeRun, SparseAutoencoder, TrainConfig, load_sae, make_config, save_sae
from stores.content_hashes import write_trained_on
from stores.destination import Output, plan_output
from stores.devices import device_name, is_out_of_memory, memory_told, resolve_device
from stores.errors import BadInput, CytoError, StoreUnreachable
from stores.files import sweep_partials, sync_tree, write_atomic
from stores.progress import Progress
from stores.runlog import append_run
from stores.spec import SAE, Header, find_header, new_header, require_unchanged, write_header
from stores.tables import parquet_bytes

from .budget import Watch, foreseen_steps
from .choices import Choices, StepClock, choose_settings, plan_lines
from .clipping import clip_gradients_
from .data import TrainingData, first_position, first_tokens, initial_b_dec, open_data, require_start, token_scale
from .dead_latents import resample
from .device_prefetch import on_device
from .distributed import ALONE, OtherProcessStopped, Ranks, interrupted_between_steps, joined_ranks
from .frozen import drop_frozen_gradient
from .health_sample import health_of_run
from .held_out import measure_held_out
from .init_from import init_spec, open_init_sae, seen_before, take_weights_, trained_on_before
from .losses import BatchLosses, loss_and_gradients
from .metric_loggers import Logger, open_logger
from .objective import Objective
from .penalty import Penalty, begin_steering
from .precision import check_precision, precision_lines
from .report import TrainReport
from .saving import MOST_STATE_GB, Saver, SaveRule, space_warnings
from .state import (
    Metrics,
    TrainState,
    load_state,
    new_model,
    new_optimizer,
    remove_states,
    state_bytes,
    write_metrics,
)
from .triton_ready import require_triton

TrainProgress = Callable[[int, int, Metrics], None]  # tokens done, tokens in all, the newest metrics

# weight of the newest batch in the running mean of batchtopk's threshold. A batch keeps k x tokens latents, so its
# smallest kept value varies little from batch to batch
_THRESHOLD_WEIGHT = 0.1
_NO_CHECK: Metrics = {"held_out_mse": None, "held_out_l0": None}  # before the first check of tokens "auto"
_RESAMPLE_MICRO_BATCH = 1_024  # tokens reconstructed at a time when dead latents are resampled


class Diverged(BadInput):
    """The loss or a weight stopped being finite, at step `step`."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


@memory_told(
    "Lower --expansion or --batch-tokens, with another -o, or end what else uses this memory: then the same command "
    "continues from the last saved state"
)
def train(
    caches: Sequence[Path | str] | Path | str,
    run: Path | str,
    config: TrainConfig | None = None,
    *,
    exclude: Collection[str] = (),
    init_from: Path | str | None = None,
    assume_compatible: bool = False,
    device: str = "auto",
    save_every: float | None = None,
    checkpoint_every: int | None = None,
    keep_states: int = 2,
    most_state_gb: float = MOST_STATE_GB,
    overwrite: bool = False,
    inputs: tuple[Path, ...] = (),
    logger: str | None = None,
    say: Callable[[str], None] = lambda line: None,
    progress: TrainProgress = lambda done, total, metrics: None,
    measure_progress: Progress = lambda done, total, state: None,
) -> TrainReport:
    """Train an SAE on `caches` and write it to the folder `run`; the same call continues an interrupted run.

    Under torchrun all processes train one SAE together: each works on its slice of every batch, and rank 0 writes.
    Memory: the weights four times (weights, gradients, Adam's two moments), and three times more while a state is
    saved, if there is room (saving.py); one pool of `pool_chunks` chunks, and dense latents of one micro-batch (256 MiB
    to 1 GiB; see `loss_and_gradients`).

    Parameters
    ----------
    caches : finished activation stores of the same kind of tokens, by path or URL; of one, its path will do
    config : default: budget, width and L0 from the data (`make_config`)
    exclude : ids of images that are neither trained on nor held out
    init_from : folder of a finished or imported SAE, whose weights the run begins with (init_from.py)
    assume_compatible : accept an imported SAE there, which does not say on which tokens it was trained
    device : auto, cpu, cuda or cuda:N; auto takes a GPU if there is one
    save_every : seconds between two saved states; default: 120, or not by time if `checkpoint_every` is given
    checkpoint_every : steps between two saved states; default: not by steps
    keep_states : number of saved states that are kept while the run is unfinished
    most_state_gb : 10^9 bytes that they may take; where they are larger, fewer are kept, at least one
    inputs : files that the caller has read, which `run` must not overwrite
    logger : "tensorboard" or "wandb": also send the metrics there
    say : called with lines of text, on rank 0: the plan before the first step, the expected time after a few
    progress : called after every logged step, on rank 0
    measure_progress : images that are measured after the last step, first held-out ones, on rank 0

    Returns
    -------
    The finished run; its summary has the last metrics.

    Raises
    ------
    SpecMismatch
        If the caches do not hold the same kind of tokens, or `run` holds something else, a run with other settings, or
        a run that another process is working on.
    IncompleteStore, DamagedStore
        If a cache is unfinished, or a chunk of it is missing or damaged.
    StoreUnreachable
        If a URL cannot be read any longer; the state is saved before.
    OSError
        If three states in a row, or the finished run, cannot be written, for instance because the disk is full.
    OtherProcessStopped
        If another process of torchrun stops; the state is saved before.
    OutOfMemory
        If the memory of the GPU or of the machine is not enough; the state is saved before.
    Diverged
        If the loss or a weight becomes NaN or infinite; the last saved state is kept.
    BadInput
        If the settings do not fit the tokens or the device.
    """
    rule = SaveRule.of(save_every, checkpoint_every, keep_states, most_state_gb)
    config, device, run = config or make_config(), resolve_device(device), Path(run)
    with joined_ranks(device) as ranks, ExitStack() as stack:
        data = open_data(caches, config, exclude=exclude)
        init_sae: SaeRun | None = None
        warnings: tuple[str, ...] = ()
        if init_from is not None:
            init_from = Path(init_from)
            init_sae = open_init_sae(init_from, data, config, assume_compatible=assume_compatible)
            inputs = (*inputs, init_from)
            if n_seen := seen_before(init_sae, data):
                warnings = (f"{n_seen:,} held-out images were trained on by the SAE that this one goes on from",)
        plan = plan_training(data, run, config, init_sae=init_sae)
        warnings = (*plan.choices.warnings, *warnings)
        n_bytes = [plan.state_bytes]
        saver = Saver(rule.within(n_bytes))
        training = begin_training(
            plan, stack, device=device, ranks=ranks, saver=saver, overwrite=overwrite, inputs=inputs
        )
        if training is None:
            found = load_sae(run, device="cpu").header  # raises DamagedStore if the finished run is damaged
            return _report(plan, found, device, ranks, warnings, was_complete=True, progress=measure_progress)
        if logger is not None and ranks.is_first:
            opened = open_logger(logger, run, plan.header, first_step=training.step)
            training.loggers.append(stack.enter_context(opened))
        say = say if ranks.is_first else lambda line: None
        for line in (*plan.lines(), *precision_lines(plan.config.precision, device)):
            say(line)
        for warning in space_warnings(run, saver.rule, n_bytes):
            say(f"warning: {warning}")
        clock = StepClock(plan.config, training.step, plan.n_steps)
        batches = on_device(
            plan.data.stream.batches(
                plan.config.batch_tokens, position=training.position, part=(ranks.rank, ranks.size)
            ),
            device,
        )
        # torchrun's signals reach its processes at different places of a step: all of them stop behind it
        raise_if_interrupted = stack.enter_context(interrupted_between_steps(ranks))
        try:
            while not training.is_over:
                raise_if_interrupted()
                train_step(training, next(batches), progress)
                for line in clock.lines(training.step):
                    say(line)
                if not training.is_over and is_save_due(training):
                    begin_save(training)
        except BaseException as error:
            if is_worth_saving(error, training):
                save_training(training)
            raise
        header = finish_training(training, measure_progress)
    return _report(plan, header, device, ranks, warnings, was_complete=False, progress=measure_progress)


def train_step(
    training: "Training", tokens: torch.Tensor, progress: TrainProgress = lambda done, total, metrics: None
) -> None:
    """One step of training, on this rank's slice of a batch.

    tokens : (n, D) float16 on the device of the run

    Raises
    ------
    Diverged
        If the loss is NaN or infinite; weights and state are then those of before the step.
    """
    plan, state, ranks = training.plan, training.state, training.ranks
    config, model, optimizer = plan.config, state.model, state.optimizer

    # 0. With tokens "auto", every few steps: the held-out images. Once they have settled, the end of the run is known.
    if training.watch is not None and state.budget.is_due(state.step):
        check = training.watch.check(model, state.step, state.token_scale)
        is_steady = state.penalty is None or state.penalty.is_reached
        variance = training.watch.variance(state.token_scale)
        state.budget = state.budget.after(check, config, variance, most=plan.n_steps, is_steady=is_steady)

    # 1. Loss and gradients. Only `.grad` changes, so that an interrupt up to here leaves the state of the step before.
    # On a GPU the host waits for the loss in every step, so that no weight is updated from one that is not finite.
    losses = loss_and_gradients(
        model,
        tokens,
        training.objective,
        l1=config.l1_at(state.step, None if state.penalty is None else state.penalty.weight),
        dead_L=state.steps_since_fired > config.dead_after_steps,
        n_dead=training.n_dead,
        silence=(state.steps_since_fired, config.dead_after_steps) if _must_wait_for(tokens) else None,
        token_scale=state.token_scale,
        ranks=ranks,
        n_tokens=config.batch_tokens,
    )
    if not math.isfinite(losses.loss):
        raise Diverged(
            f"the loss became {losses.loss} at step {state.step:,} (mse {losses.mse:.4g}, term for dead latents "
            f"{losses.dead:.4g}); lower --lr or lengthen --warmup-steps, and train again with another -o, or with "
            f"--overwrite",
            state.step,
        )
    drop_frozen_gradient(model, config.frozen)

    is_last = state.step + 1 == training.n_steps
    is_logged = is_last or (state.step + 1) % config.log_every == 0
    training.is_between_steps = False
    with _deferred_signals():  # the state changes as a whole: what Ctrl-C saves is the state before or after a step
        # 2. Steps since each latent was active; the running mean of batchtopk's threshold; the penalty for `target_l0`.
        state.steps_since_fired += 1
        state.steps_since_fired.masked_fill_(losses.fired, 0)
        training.n_dead = losses.n_dead_next
        if losses.threshold is not None:
            threshold = model.threshold
            threshold += (_THRESHOLD_WEIGHT if state.step else 1.0) * (losses.threshold - threshold)
        lr = config.lr_at(state.step, training.n_steps)
        if state.penalty is not None:
            state.penalty = state.penalty.after(losses.l0, step=state.step + 1, pace=lr / config.lr)

        # 3. Adam, and decoder rows at norm 1. Thresholds of jumprelu are steered, too: the gradient alone would only
        # raise them (penalty.py).
        _update_weights(model, optimizer, lr=lr, clip_norm=config.clip_norm, is_last=is_last)
        if state.penalty is not None and (shift := state.penalty.threshold_shift(lr)):
            with torch.no_grad():
                model.log_threshold.add_(shift)
        state.step += 1

        # 4. New weights for dead latents, with `dead_latents = "resample"`; not in the last `resample_every` steps.
        is_due = state.step % config.resample_every == 0 and state.step + config.resample_every <= training.n_steps
        if config.dead_latents == "resample" and is_due:
            _resample_dead(training, tokens)

        # 5. A row of metrics.
        if is_logged:
            n_tokens = (state.step - training.logged_step) * config.batch_tokens
            rate = n_tokens / (time.perf_counter() - training.logged_at)
            state.metrics.append(_metrics_row(training, losses, tokens_per_second=rate))
        training.is_between_steps = True

    if is_logged:
        training.logged_step, training.logged_at = state.step, time.perf_counter()
        if ranks.is_first:
            progress(state.step * config.batch_tokens, training.steps_ahead * config.batch_tokens, state.metrics[-1])
            for logger in training.loggers:
                logger.log(state.metrics[-1])


# ------------------------------------------------------------------------------------- before the first step


@dataclass(frozen=True)
class TrainPlan:
    """What is known of a run before anything is written: data, settings, and what follows from them."""

    data: TrainingData
    run: Path  # the folder of the run
    choices: Choices
    objective: Objective
    n_steps: int  # with tokens "auto" the largest number
    header: Header  # of `sae.json`; its identity, a SHA-256 of data and settings, is that of the finished run
    init_sae: SaeRun | None = None  # the SAE that it goes on from

    @property
    def config(self) -> TrainConfig:
        """The settings, with numbers where they were `auto`, except for tokens."""
        return self.choices.config

    @property
    def state_bytes(self) -> int:
        """Bytes of a saved state."""
        return state_bytes(self.data.width, self.config)

    def lines(self) -> Iterator[str]:
        """Tokens, passes and steps, the reasons for what was chosen, and what is doubtful."""
        yield from plan_lines(self.choices, self.data, self.n_steps)
        yield from (f"warning: {warning}" for warning in self.choices.warnings)


@dataclass(eq=False)
class Training:
    """A run at work: what `train_step` reads, and the state that it changes."""

    plan: TrainPlan
    device: str
    ranks: Ranks
    output: Output  # where the run is written
    state: TrainState
    saver: Saver  # writes the states; the SAEs of a sweep share one
    logged_step: int  # the step of the last row of metrics,
    logged_at: float  # and its time.perf_counter(), for tokens per second
    saved_at: float  # `saver.now()` when a state was last saved, or the run was opened
    n_dead: int | None = None  # dead latents before the next step; None: not known (a GPU's host would wait for it)
    watch: Watch | None = None  # tokens "auto": the held-out tokens that decide when to stop
    loggers: list[Logger] = field(default_factory=list)
    is_between_steps: bool = True  # False while a step changes the state

    @property
    def objective(self) -> Objective:
        """What a step minimises; a steered jumprelu has a window of its own."""
        penalty = self.state.penalty
        if penalty is None or penalty.bandwidth is None:
            return self.plan.objective
        return dataclasses.replace(self.plan.objective, jump_bandwidth=penalty.bandwidth)

    @property
    def n_steps(self) -> int:
        """Steps in all; with tokens "auto", until the run has settled, the largest number."""
        return self.plan.n_steps if self.state.budget.end is None else self.state.budget.end

    @property
    def steps_ahead(self) -> int:
        """Steps in all, as far as can be foreseen."""
        state = self.state
        if self.watch is None or state.budget.end is not None:
            return self.n_steps
        variance = self.watch.variance(state.token_scale)
        return foreseen_steps(state.budget.checks, self.plan.config, variance, self.step, self.n_steps)

    @property
    def step(self) -> int:
        """Steps taken."""
        return self.state.step

    @property
    def is_over(self) -> bool:
        """True when all steps are taken."""
        return self.state.step >= self.n_steps

    @property
    def position(self) -> int:
        """The position in the token stream at which the next step begins."""
        return first_position(self.plan.config) + self.step * self.plan.config.batch_tokens

    @property
    def newest(self) -> Metrics | None:
        """The last row of metrics so far."""
        return self.state.metrics[-1] if self.state.metrics else None


def plan_training(data: TrainingData, run: Path, config: TrainConfig, *, init_sae: SaeRun | None = None) -> TrainPlan:
    """The plan of a run in the folder `run`; nothing is read or written.

    init_sae : the SAE that it goes on from, which fits (`open_init_sae`)

    Raises
    ------
    BadInput
        If the settings do not fit the tokens.
    """
    require_start(data, config)
    choices = choose_settings(config, data)
    config = choices.config
    assert config.expansion != "auto"
    n_steps = config.n_steps(data.stream.tokens_per_epoch)
    spec = {
        "width": data.width,
        "n_latents": config.expansion * data.width,
        "activation": config.activation,
        "k": config.k,
        **data.to_spec(),
        "n_steps": n_steps,
        "config": config.to_spec(),
        "resolved": config.resolved(data.width, n_steps),
        **({"init_from": init_spec(init_sae)} if init_sae else {}),
    }
    return TrainPlan(data, run, choices, Objective.from_config(config), n_steps, new_header(SAE, spec), init_sae)


def begin_training(
    plan: TrainPlan,
    stack: ExitStack,
    *,
    device: str,
    ranks: Ranks = ALONE,
    saver: Saver | None = None,
    overwrite: bool = False,
    inputs: tuple[Path, ...] = (),
) -> Training | None:
    """Open the folder of the run and its newest state, or make a new one. None if the run is complete already.

    No other process can open the run until `stack` is closed; then what `saver` was writing is on the disk.

    Raises
    ------
    BadInput
        If the precision is not available on the device.
    SpecMismatch
        As `train`.
    """
    check_precision(plan.config.precision, device)
    if device.startswith("cuda"):
        require_triton(device)
    if plan.config.batch_tokens < ranks.size:
        raise BadInput(f"batch_tokens must be at least one for each process; found {plan.config.batch_tokens} tokens")
    ranks.require_equal(plan.header.identity, "data or settings")
    output: Output = ranks.broadcast(
        _open_folder(plan, stack, device, ranks, overwrite, inputs) if ranks.is_first else None
    )
    if output.is_complete:
        return None
    saved = load_state(output.work, plan.data.width, plan.config, device)
    ranks.require_equal(saved.step if saved else None, "saved states, by their steps")
    state = saved or _initial_state(plan, device, ranks)
    watch = Watch(plan.data, plan.config, device, ranks) if plan.config.tokens == "auto" else None
    saver = saver or Saver()
    stack.callback(saver.close)  # before the folder is released
    return Training(
        plan, device, ranks, output, state, saver, state.step, time.perf_counter(), saver.now(), watch=watch
    )


def _open_folder(
    plan: TrainPlan, stack: ExitStack, device: str, ranks: Ranks, overwrite: bool, inputs: tuple[Path, ...]
) -> Output:
    stores = plan.data.stores
    local = [store.root for store in stores if isinstance(store.root, Path)]
    output = plan_output(plan.run, plan.header, overwrite=overwrite, inputs=(*local, *inputs))
    stack.callback(output.release)
    if output.is_complete:
        remove_states(output.work)  # left by a process that was killed after it had written the header
        output.publish()
        return output
    root = output.work
    root.mkdir(parents=True, exist_ok=True)
    write_header(root, plan.header)
    (root / "state").mkdir(exist_ok=True)
    sweep_partials(root)
    append_run(
        root,
        packages=("torch", "numpy", "numba"),
        caches=[str(store.root) for store in stores],
        device=device_name(device),
        threads=torch.get_num_threads(),
        processes=ranks.size,
    )
    return output


def _initial_state(plan: TrainPlan, device: str, ranks: Ranks) -> TrainState:
    """Step 0: seeded weights and b_dec from the first tokens of the stream, or the SAE that the run goes on from.

    With `target_l0` these tokens also give the first weight of the sparsity term. What follows from tokens is computed
    on rank 0 only, and told to the others.
    """
    data, config = plan.data, plan.config
    scale, b_dec = ranks.broadcast(_from_tokens(plan, device) if ranks.is_first else None)
    with memory_told("Lower --expansion"):  # nothing is saved yet
        model = new_model(data.width, config)
    if plan.init_sae is not None:
        take_weights_(model, plan.init_sae, scale)
    else:
        draws = torch.Generator().manual_seed(config.seed)
        model.init_weights(draws, threshold=config.jump_threshold, init=config.init)
        with torch.no_grad():
            model.b_dec.copy_(b_dec * scale)
    model.to(device)
    penalty = ranks.broadcast(_first_penalty(plan, model, scale, device) if ranks.is_first else None)
    ranks.broadcast_(*model.state_dict().values())  # drawn on each rank, whose processors may round differently
    steps_since_fired = torch.zeros(model.n_latents, dtype=torch.int64, device=device)
    return TrainState(model, new_optimizer(model, config), steps_since_fired, scale, 0, [], penalty)


def _from_tokens(plan: TrainPlan, device: str) -> tuple[float, torch.Tensor | None]:
    """The factor of the tokens, and b_dec unless it comes from another SAE."""
    b_dec = initial_b_dec(plan.data, plan.config, device) if plan.init_sae is None else None
    return token_scale(plan.data, plan.config), b_dec


def _first_penalty(plan: TrainPlan, model: SparseAutoencoder, scale: float, device: str) -> Penalty | None:
    """The penalty of step 0, or None without `target_l0`; jumprelu also gets its first thresholds, in place."""
    if not plan.config.is_steered:
        return None
    tokens_ND = first_tokens(plan.data, plan.config, device) * scale
    return begin_steering(model, plan.config, tokens_ND, goes_on=plan.init_sae is not None)


# -------------------------------------------------------------------------------------- after the last step


def is_save_due(training: Training) -> bool:
    """Is the state to be saved now? Only on rank 0, which needs nothing of the others for it."""
    return training.ranks.is_first and training.saver.is_due(training.step, training.saved_at)


def begin_save(training: Training) -> None:
    """Copy the state, which a thread writes while training goes on.

    Raises
    ------
    OSError
        If several states in a row could not be written.
    """
    if training.ranks.is_first:
        training.saved_at = training.saver.now()
        training.saver.begin(training.output.work, training.state)


def save_training(training: Training) -> None:
    """Write the state, from which `begin_training` continues, before this returns."""
    if training.ranks.is_first:
        training.saver.save_now(training.output.work, training.state)


def is_worth_saving(error: BaseException, training: Training) -> bool:
    """Can the run go on later from the state in memory? Frees the memory of the step.

    Yes after Ctrl-C, an unreachable URL, a stopped rank or out of memory, if the state is that of a finished step. Not
    where the loss is no longer finite: what comes from such a state is not, either.
    """
    if is_out_of_memory(error):
        traceback.clear_frames(error.__traceback__)  # which hold the matrices of the step
        if training.device.startswith("cuda"):
            torch.cuda.empty_cache()
    elif not isinstance(error, KeyboardInterrupt | StoreUnreachable | OtherProcessStopped):
        return False
    return training.is_between_steps


def finish_training(training: Training, progress: Progress = lambda done, total, state: None) -> Header:
    """Fold decoder norms and token scale into the weights, measure on held-out images, and write the finished run.

    progress : images that are measured, on rank 0

    Raises
    ------
    Diverged
        If a weight is NaN or infinite.
    """
    plan, state, root = training.plan, training.state, training.output.work
    data, config, model = plan.data, plan.config, state.model
    training.saver.wait(root)
    require_unchanged(*(store.header for store in data.stores), *([plan.init_sae.header] if plan.init_sae else []))
    model.fold_decoder_norm()
    if state.token_scale != 1:
        model.fold_token_scale(state.token_scale)
    if not all(bool(torch.isfinite(value).all()) for value in model.state_dict().values()):
        raise Diverged(
            "a weight became NaN or infinite in the last step; lower --lr, and train again with --overwrite", state.step
        )
    held_out = None
    if any(mask.any() for mask in data.chosen.held_out):
        ranks = training.ranks
        progress = progress if ranks.is_first else lambda done, total, state: None
        held_out = measure_held_out(model, data, config, device=training.device, ranks=ranks, progress=progress)
    training.ranks.barrier()  # none of them has found a cache changed
    if training.ranks.is_first:
        write_metrics(root, state.metrics)
        n_tokens = state.step * config.batch_tokens
        summary: dict[str, Any] = {
            "steps": state.step,
            "tokens": n_tokens,
            "images": round(n_tokens / data.stream.mean_tokens_per_image),
            "token_scale": state.token_scale,
            "final": state.metrics[-1],
            "trained_on": write_trained_on(
                root, data.trained_on(), before=trained_on_before(plan.init_sae) if plan.init_sae else frozenset()
            ),
        }
        if state.penalty is not None:
            summary["penalty"] = state.penalty.to_summary(state.metrics)
        if training.watch is not None:
            summary["budget"] = state.budget.to_summary()
        if held_out is not None:
            summary["held_out"] = held_out
            write_atomic(root / "held_out.parquet", parquet_bytes(data.held_out_table()))
        save_sae(root, model, plan.header, summary)
        sync_tree(root)
        remove_states(root)
        training.output.publish()
    training.ranks.barrier()
    header = find_header(plan.run)
    assert header is not None
    return header


def _report(
    plan: TrainPlan,
    header: Header,
    device: str,
    ranks: Ranks,
    warnings: tuple[str, ...],
    *,
    was_complete: bool,
    progress: Progress,
) -> TrainReport:
    """The finished run, and on rank 0 the health of its SAE; a health that cannot be measured never fails the run."""
    health, reason = None, ""
    try:
        if ranks.is_first:
            health = health_of_run(
                plan.run, plan.data, plan.config, n_steps=plan.n_steps, device=device, progress=progress
            )
    except (CytoError, OSError) as error:
        reason = str(error)
    return TrainReport(
        out=plan.run,
        header=header,
        was_complete=was_complete,
        warnings=warnings,
        health=health,
        no_health=reason,
    )


# ------------------------------------------------------------------------------------------- used by a step


def _must_wait_for(tokens: torch.Tensor) -> bool:
    """Does the host wait when it reads a number from the device of these tokens?"""
    return tokens.is_cuda


def _update_weights(
    model: SparseAutoencoder, optimizer: torch.optim.Adam, *, lr: float, clip_norm: float | None, is_last: bool
) -> None:
    """Adam. Before it, the part of each decoder row's gradient along the row is removed, then all are clipped, if so
    wanted. After it, decoder rows get norm 1, except at the last step, where `finish_training` folds the norms.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    if clip_norm:
        remove_parallel_gradient(model)
        clip_gradients_(model, clip_norm)
    if model.W_dec.is_cuda:
        from . import kernels_gpu  # needs triton

        kernels_gpu.step(model, optimizer, normalise=not is_last)  # the same three operations in one pass
        return
    if not clip_norm:
        remove_parallel_gradient(model)
    optimizer.step()
    if not is_last:
        model.normalise_decoder()


def _resample_dead(training: Training, tokens: torch.Tensor) -> None:
    """New weights for the latents that are dead now, from tokens of this batch (`dead_latents.resample`)."""
    state, config = training.state, training.plan.config
    dead_L = state.steps_since_fired > config.dead_after_steps
    draws = torch.Generator().manual_seed(_combined_seed(config.seed, state.step))
    resample(
        *(state.model, state.optimizer, dead_L, tokens, draws),
        token_scale=state.token_scale,
        ranks=training.ranks,
        n_tokens=config.batch_tokens,
        micro_batch=_RESAMPLE_MICRO_BATCH,
    )
    state.steps_since_fired[dead_L] = 0
    training.n_dead = None


@torch.no_grad()
def remove_parallel_gradient(model: SparseAutoencoder) -> None:
    """Remove from the gradient of each decoder row its component along the row, which normalisation would undo."""
    assert model.W_dec.grad is not None
    along_L1 = (model.W_dec.grad * model.W_dec).sum(1, keepdim=True)
    model.W_dec.grad -= along_L1 * model.W_dec


def _metrics_row(training: Training, losses: BatchLosses, *, tokens_per_second: float) -> Metrics:
    """One row of metrics.parquet, by its columns; those of sweeps are listed in sweep/record.py.

    A latent is dead if it was not active for more than `dead_after_steps` steps; None while there were fewer steps.
    """
    state, config, stream = training.state, training.plan.config, training.plan.data.stream
    tokens = state.step * config.batch_tokens
    n_dead = int((state.steps_since_fired > config.dead_after_steps).sum())
    is_known = state.step > config.dead_after_steps
    row = {
        "step": state.step,
        "tokens": tokens,
        "images": tokens / stream.mean_tokens_per_image,
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
        "tokens_per_second": tokens_per_second,
    }
    if state.penalty is not None:
        row |= {"l1_weight": state.penalty.weight, "l0_mean": state.penalty.mean}
    if training.watch is not None:
        checks = state.budget.checks
        row |= {"held_out_mse": checks[-1].error, "held_out_l0": checks[-1].l0} if checks else _NO_CHECK
    return {name: None if value is None or math.isnan(value) else value for name, value in row.items()}


def _combined_seed(*numbers: int) -> int:
    """One seed, below 2^63, from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextmanager
def _deferred_signals() -> Iterator[None]:
    """SIGINT (Ctrl-C) and SIGTERM are handled at the end of the block. Other threads than the main one get none."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = {number: handler for number, handler in handlers.items() if handler is not None}  # None: not set in Python
    try:
        for number in before:
            signal.signal(number, lambda number, frame: received.append(number))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for received_number in received:
            signal.raise_signal(received_number)
