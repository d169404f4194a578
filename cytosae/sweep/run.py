"""Several SAEs from one pass over the data: those that read the same tokens in the same order step on the same batch.

Each member is a run of its own (train.py), in a folder of its own, and equals bit for bit the one that `cyto sae train`
makes with its settings: what is shared is a batch, gathered and sent to the device once.
"""

import os
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cytosae.sae import TrainConfig
from cytosae.training import Diverged, Training, TrainingData, choose_data, first_position, new_model, on_device
from stores.activation_store import ActivationStore, used_together
from stores.destination import claimed
from stores.errors import BadInput, StoreUnreachable
from stores.files import sha256_json, sweep_partials
from stores.progress import Progress
from stores.runlog import append_run

from .figures import plot_sweep
from .grid import Grid, read_grid
from .record import Record, Row, SweepFolder, metric_prefix

MOST_AT_ONCE = 256  # each holds a lock file open
_MEMORY_SHARE = 0.5  # of what is free; batches, pools and dense latents need the rest
_FREE_IF_UNKNOWN = 4 << 30
_OF_DATA = ("token_set", "order", "pool_chunks", "mix", "holdout", "holdout_by")  # and the seed of the order


@dataclass(frozen=True)
class SweepResult:
    """A finished sweep."""

    root: Path
    members: list[Row]  # as in members.parquet
    table: list[Row]  # as in table.parquet
    markdown: str
    was_complete: bool

    @property
    def failed(self) -> list[Row]:
        """Members whose loss or weights stopped being finite."""
        return [row for row in self.members if row["status"] == "failed"]


@dataclass(frozen=True)
class _Planned:
    """A member before it is opened."""

    record: Record
    config: TrainConfig
    data: TrainingData
    n_bytes: int  # weights, gradients and moments

    @property
    def pass_key(self) -> tuple[int, int, int]:
        """Members that are equal here can share a pass: the same stream, in batches at the same positions."""
        return id(self.data), self.config.batch_tokens, first_position(self.config)


def sweep(
    grid_file: Path,
    caches: Sequence[Path | str],
    out: Path,
    *,
    exclude: Collection[str] = (),
    device: str = "cpu",
    at_once: int | None = None,
    checkpoint_every: int = 500,
    keep_states: int = 2,
    say: Callable[[str], None] = lambda line: None,
    progress: Progress = lambda done, total, state: None,
) -> SweepResult:
    """Train every SAE of the grid on `caches` (paths or URLs), and write tables of what came out to the folder `out`.

    Caches of the same kind of tokens are trained on together; of each kind the whole grid is trained. The same call
    continues an interrupted sweep. A member whose loss stops being finite has failed, for good; the others go on.
    Memory: as `train`, with four times the weights of every member of a pass.

    at_once : members in one pass; default: as many as fit in half of the free memory, at least one
    say : told in words what is about to happen
    progress : tokens of the passes, done and in all

    Raises
    ------
    BadInput
        If the grid cannot be used, or was started by torchrun.
    SpecMismatch
        If `out` holds anything but this sweep, or another process is at work there.
    IncompleteStore, DamagedStore, StoreUnreachable
        As `train`.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise BadInput("a sweep runs in one process; start it without torchrun, or one sweep per GPU (--device cuda:N)")
    if at_once is not None and not 1 <= at_once <= MOST_AT_ONCE:
        raise BadInput(f"at_once must be from 1 to {MOST_AT_ONCE}; found {at_once}")
    grid = read_grid(grid_file)
    planned = _plan(grid, _grouped(caches), out, frozenset(exclude), grid_file)
    with claimed(out):
        folder = SweepFolder(out, _spec(planned), grid.tables, [member.record for member in planned])
        waiting = [member for member in planned if member.record.status == "unfinished"]
        if folder.is_complete and folder.is_whole and not waiting:
            return _result(folder, grid, was_complete=True)
        folder.save()
        sweep_partials(out)
        threads = torch.get_num_threads()
        append_run(
            out, packages=("torch", "numpy"), caches=[str(cache) for cache in caches], device=device, threads=threads
        )
        passes = _passes(waiting, at_once, _MEMORY_SHARE * _free_bytes(device))
        for warning in dict.fromkeys(member.config.warning for member in waiting):
            if warning:
                say(f"warning: {warning}")
        if waiting:
            say(_announced(planned, waiting, passes))
        totals = [_last_position(members) for members in passes]
        for number, members in enumerate(passes):
            tell = partial(_tell, progress, sum(totals[:number]), sum(totals))
            _Pass(folder, members, device, checkpoint_every, keep_states).run(tell)
            folder.write_tables(grid.varied)
        return _result(folder, grid, was_complete=False)


def _grouped(caches: Sequence[Path | str]) -> dict[str, list[ActivationStore]]:
    """Caches that hold the same kind of tokens, by a short name that says which: `block10`."""
    stores = [ActivationStore(cache) for cache in caches]
    if len({store.content_sha256 for store in stores}) < len(stores):
        raise BadInput("the same cache is given twice; its tokens would count double")
    groups: dict[str, list[ActivationStore]] = {}
    for store in stores:
        groups.setdefault(sha256_json(store.spec.same_tokens), []).append(store)
    blocks = [group[0].spec.block for group in groups.values()]
    is_told = len(set(blocks)) == len(blocks)
    return {
        f"block{group[0].spec.block}" + ("" if is_told else f"-{identity[:8]}"): used_together(group)
        for identity, group in groups.items()
    }


def _plan(
    grid: Grid, groups: dict[str, list[ActivationStore]], out: Path, exclude: frozenset[str], source: Path
) -> list[_Planned]:
    """Every member of the grid for every group of caches; what cannot be trained is found before anything is."""
    chosen: dict[tuple[Any, ...], TrainingData] = {}
    planned = []
    for label, stores in groups.items():
        for member in grid.members:
            config = member.config
            key = (label, config.order_seed, *(getattr(config, name) for name in _OF_DATA))
            name = f"{label}-{member.name}" if len(groups) > 1 else member.name
            try:
                if key not in chosen:
                    chosen[key] = choose_data(stores, config, exclude=exclude)
                training = Training(chosen[key], out / "runs" / name, config, device="cpu")
                with torch.device("meta"):  # shapes without memory
                    n_bytes = sum(
                        4 * 4 * weight.numel() for weight in new_model(training.data.width, config).parameters()
                    )
            except BadInput as error:
                raise BadInput(f"{source}: the member {name} cannot be trained: {error}") from None
            settings = {setting: getattr(config, setting) for setting in grid.varied}
            record = Record(name=name, caches=label, settings=settings, identity=training.identity)
            planned.append(_Planned(record, config, chosen[key], n_bytes))
    return planned


def _spec(planned: list[_Planned]) -> dict[str, Any]:
    """What decides the numbers of a sweep."""
    caches: dict[str, Any] = {}
    for member in planned:
        if member.record.caches not in caches:
            spec = member.data.to_spec()
            caches[member.record.caches] = {name: spec[name] for name in ("tokens", "trained_backbone", "caches")}
    return {
        "caches": caches,
        "excluded_sha256": planned[0].data.excluded_sha256,
        "members": {member.record.name: member.record.identity for member in planned},
    }


def _passes(waiting: list[_Planned], at_once: int | None, n_bytes: float) -> list[list[_Planned]]:
    """Who is trained together: in the order of the grid, as many as may be and, where that is not said, as fit."""
    by_key: dict[tuple[int, int, int], list[list[_Planned]]] = {}
    for member in waiting:
        passes = by_key.setdefault(member.pass_key, [[]])
        together = passes[-1]
        fits = sum(other.n_bytes for other in together) + member.n_bytes <= n_bytes or not together
        if len(together) < (at_once or MOST_AT_ONCE) and (fits or at_once is not None):
            together.append(member)
        else:
            passes.append([member])
    return [together for passes in by_key.values() for together in passes]


def _last_position(members: list[_Planned]) -> int:
    """Tokens that a pass gathers from its beginning on."""
    return max(member.config.n_steps(member.data.stream.tokens_per_epoch) for member in members) * (
        members[0].config.batch_tokens
    )


def _announced(planned: list[_Planned], waiting: list[_Planned], passes: list[list[_Planned]]) -> str:
    most = max((len(members) for members in passes), default=0)
    done = f" ({len(planned) - len(waiting):,} are finished)" if len(waiting) < len(planned) else ""
    n_bytes = max((sum(member.n_bytes for member in members) for members in passes), default=0)
    return (
        f"{len(planned):,} SAEs{done}: {len(passes):,} {'pass' if len(passes) == 1 else 'passes'} over the data with "
        f"up to {most:,} at once, {n_bytes / 1e9:.1f} GB for weights and moments"
    )


def _tell(progress: Progress, before: int, total: int, done: int, state: str) -> None:
    progress(before + done, total, state)


def _free_bytes(device: str) -> int:
    """Memory that is free where the members are to live."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    free = _FREE_IF_UNKNOWN
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) << 10
    except OSError:  # not Linux
        pass
    try:
        return min(free, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no container, or "max": without a limit
        return free


class _Pass:
    """Members that share one pass over the data."""

    def __init__(
        self, folder: SweepFolder, members: list[_Planned], device: str, checkpoint_every: int, keep_states: int
    ) -> None:
        self._folder, self._members, self._device = folder, members, device
        self._checkpoint_every, self._keep = checkpoint_every, keep_states
        self._live: list[tuple[Record, Training]] = []
        self._is_to_save, self._best = False, ("", float("-inf"))

    def run(self, progress: Callable[[int, str], None]) -> None:
        """Train them all to their ends; `progress` is told of tokens gathered.

        On Ctrl-C, and if a cache cannot be reached any longer, all states are saved.
        """
        first = self._members[0]
        stream, batch_tokens = first.data.stream, first.config.batch_tokens
        with ExitStack() as stack:
            self._begin(stack)
            try:
                for record, training in list(self._live):
                    self._end_if_done(record, training)
                while self._live:
                    position = min(training.position for _, training in self._live)
                    batches = on_device(stream.batches(batch_tokens, position=position), self._device)
                    while due := [member for member in self._live if member[1].position == position]:
                        tokens = next(batches)
                        for record, training in due:
                            self._step(record, training, tokens)
                        if self._is_to_save:
                            self._folder.save()
                            self._is_to_save = False
                        position += batch_tokens
                        progress(position - first_position(first.config), self._state())
            except (KeyboardInterrupt, StoreUnreachable):
                for _, training in self._live:
                    training.save()
                raise
            finally:
                self._folder.save()

    def _begin(self, stack: ExitStack) -> None:
        for member in self._members:
            folder = self._folder.folder(member.record)
            training = Training(member.data, folder, member.config, device=self._device, keep_states=self._keep)
            if training.begin(stack):
                self._live.append((member.record, training))
            else:
                member.record.status = "complete"

    def _step(self, record: Record, training: Training, tokens: torch.Tensor) -> None:
        began = time.perf_counter()
        try:
            training.take_step(tokens, lambda done, total, metrics: None)
        except Diverged as error:
            self._fail(record, training, error)
            return
        finally:
            record.seconds += time.perf_counter() - began
        self._end_if_done(record, training)
        if training.step < training.n_steps and training.step % self._checkpoint_every == 0:
            training.save()
            self._is_to_save = True

    def _end_if_done(self, record: Record, training: Training) -> None:
        if training.step < training.n_steps:
            return
        self._live.remove((record, training))  # from now on its weights are no state to go on from
        try:
            training.finish()
        except Diverged as error:
            self._fail(record, training, error)
            return
        record.status = "complete"
        self._is_to_save = True

    def _fail(self, record: Record, training: Training, error: Diverged) -> None:
        if (record, training) in self._live:
            self._live.remove((record, training))
        record.status, record.failed_at_step, record.message = "failed", error.step, str(error)
        self._is_to_save = True

    def _state(self) -> str:
        for record, training in self._live:
            variance = (training.newest or {}).get("explained_variance")
            if variance is not None and variance > self._best[1]:
                self._best = record.name, variance
        best = f", best explained variance {self._best[1]:.3f} ({self._best[0][:40]})" if self._best[0] else ""
        return f"{len(self._live)} SAEs{best}"


def _result(folder: SweepFolder, grid: Grid, *, was_complete: bool) -> SweepResult:
    """Write what is missing; the sweep is complete when all else is on the disk."""
    if was_complete:
        members, table, text = folder.tables(grid.varied)
        return SweepResult(folder.root, members, table, text, was_complete)
    members, table, text = folder.write_tables(grid.varied)
    settings = [name for name in ("caches", *grid.varied) if name != "seed" and len({str(r[name]) for r in table}) > 1]
    prefix = metric_prefix(table)
    paths = [folder.root / f"sweep.{kind}" for kind in ("png", "svg")]
    plot_sweep(table, settings, paths, x=f"{prefix}l0", y=f"{prefix}explained_variance")
    folder.save(complete=True)
    return SweepResult(folder.root, members, table, text, was_complete)
