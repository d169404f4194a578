"""Several SAEs from one pass over the data: members that read the same tokens in the same order share each batch.

Each member is a run of its own (training/train.py) in its own folder, and equals bit for bit the SAE that `cyto sae
train` makes with its settings. Only the batches are shared: each is read and sent to the device once.
"""

import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cytosae.sae import TrainConfig
from cytosae.training import (
    MOST_STATE_GB,
    OF_DATA,
    Diverged,
    Saver,
    SaveRule,
    Training,
    TrainingData,
    TrainPlan,
    begin_save,
    begin_training,
    choose_data,
    finish_training,
    first_position,
    free_memory,
    is_save_due,
    is_worth_saving,
    new_model,
    on_device,
    plan_training,
    save_training,
    space_warnings,
    train_step,
    trim_states,
)
from stores.activation_store import ActivationStore, one_or_more, used_together
from stores.destination import claimed
from stores.devices import memory_told, resolve_device
from stores.errors import BadInput
from stores.files import sha256_json, sweep_partials
from stores.progress import Progress
from stores.runlog import append_run
from stores.tables import listed
from stores.wording import Report

from .figures import plot_sweep
from .grid import Grid, read_grid
from .recommend import Band, bands_of
from .record import Record, Row, SweepFolder, metric_prefix

MOST_AT_ONCE = 256  # members in one pass; each keeps a lock file open
_MEMORY_SHARE = 0.5  # of free memory, for weights; batches, pools and dense latents need the rest


@dataclass(frozen=True)
class SweepResult(Report):
    """A finished sweep; rows are dicts of plain values."""

    root: Path
    members: list[Row]  # as in members.parquet
    table: list[Row]  # as in table.parquet
    markdown: str  # as in table.md
    was_complete: bool  # True: nothing had to be trained

    @property
    def warnings(self) -> tuple[str, ...]:
        """SAEs that failed."""
        if not self.failed:
            return ()
        names = listed([f"{row['name']} at step {row['failed_at_step']:,}" for row in self.failed])
        return (f"{len(self.failed):,} of {len(self.members):,} SAEs failed: {names}",)

    def lines(self) -> Iterator[str]:
        """The table, a row for each setting."""
        yield from self.markdown.rstrip("\n").split("\n")

    @property
    def bands(self) -> list[Band]:
        """Rows of the table by comparable L0, the least held-out error first; empty without held-out images."""
        return bands_of(self.table)

    @property
    def recommended(self) -> list[Row]:
        """The row of the table to take for barcodes, one for each kind of caches; none if none is healthy."""
        return [band.best for band in self.bands if band.is_recommended]

    @property
    def failed(self) -> list[Row]:
        """Members whose loss or weights stopped being finite."""
        return [row for row in self.members if row["status"] == "failed"]


@dataclass(frozen=True)
class _Planned:
    """A member before its folder is opened."""

    record: Record
    plan: TrainPlan
    n_bytes: int  # memory of weights, gradients and Adam's moments

    @property
    def config(self) -> TrainConfig:
        """Its settings."""
        return self.plan.config

    @property
    def data(self) -> TrainingData:
        """Its tokens."""
        return self.plan.data

    @property
    def pass_key(self) -> tuple[int, int, int]:
        """Members with the same key can share a pass: the same stream, cut into batches at the same positions."""
        return id(self.data), self.config.batch_tokens, first_position(self.config)


@memory_told(
    "Lower --at-once, or end what else uses this memory, and run the same command again: it continues from the last "
    "saved states"
)
def sweep(
    grid_file: Path | str,
    caches: Sequence[Path | str] | Path | str,
    out: Path | str,
    *,
    exclude: Collection[str] = (),
    device: str = "auto",
    at_once: int | None = None,
    save_every: float | None = None,
    checkpoint_every: int | None = None,
    keep_states: int = 2,
    most_state_gb: float = MOST_STATE_GB,
    say: Callable[[str], None] = lambda line: None,
    progress: Progress = lambda done, total, state: None,
) -> SweepResult:
    """Train every SAE of the grid on `caches` (paths or URLs), and write tables of the results to the folder `out`.

    Caches of the same kind of tokens are trained on together; the whole grid is trained for each kind. The same call
    continues an interrupted sweep. A member whose loss becomes NaN or infinite has failed and is not tried again; the
    others continue.
    Memory: as `train`, with four times the weights of every member of a pass.

    Parameters
    ----------
    grid_file : TOML file (grid.py)
    exclude : ids of images that are neither trained on nor held out
    at_once : members in one pass, 1 to 256; default: as many as fit in half of the free memory, and have their states
        within `most_state_gb`, at least one
    save_every : seconds between two saved states of a member; default: 120, or not by time if `checkpoint_every` is
        given. The members are saved one after the other, each when it is due
    checkpoint_every : steps of a member between two saved states; default: not by steps
    keep_states : number of saved states that are kept for each unfinished member
    most_state_gb : 10^9 bytes that the saved states of a pass may take; where two for each member are more, one is
        kept. A member that has failed keeps one
    say : called with a line of text before the work begins
    progress : called with tokens read by the passes, done and in all

    Raises
    ------
    BadInput
        If the grid cannot be used, or the sweep was started by torchrun.
    SpecMismatch
        If `out` holds something else or another sweep, or another process is working on it.
    IncompleteStore, DamagedStore, StoreUnreachable
        As `train`.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise BadInput("a sweep runs in one process; start it without torchrun, or one sweep per GPU (--device cuda:N)")
    if at_once is not None and not 1 <= at_once <= MOST_AT_ONCE:
        raise BadInput(f"at_once must be from 1 to {MOST_AT_ONCE}; found {at_once}")
    rule = SaveRule.of(save_every, checkpoint_every, keep_states, most_state_gb)
    device, grid_file, out, caches = resolve_device(device), Path(grid_file), Path(out), one_or_more(caches)
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
        passes = _passes(waiting, at_once, _MEMORY_SHARE * free_memory(device), 1e9 * most_state_gb)
        for warning in dict.fromkeys(warning for member in waiting for warning in member.plan.choices.warnings):
            say(f"warning: {warning}")
        if waiting:
            say(_summary_line(planned, waiting, passes))
            sizes = [[member.plan.state_bytes for member in members] for members in passes]
            largest = max(sizes, key=lambda n_bytes: rule.within(n_bytes).most_bytes(n_bytes))
            for warning in space_warnings(out, rule.within(largest), largest):
                say(f"warning: {warning}")
        totals = [_last_position(members) for members in passes]
        for number, members in enumerate(passes):
            tell = partial(_tell, progress, sum(totals[:number]), sum(totals))
            _Pass(folder, members, device, rule).run(tell)
            folder.write_tables(grid.varied)
        return _result(folder, grid, was_complete=False)


def _grouped(caches: Sequence[Path | str]) -> dict[str, list[ActivationStore]]:
    """Groups of caches with the same kind of tokens, by a short name: `block10` (a transformer block)."""
    stores = [ActivationStore(cache) for cache in caches]
    if len({store.content_sha256 for store in stores}) < len(stores):
        raise BadInput("the same cache is given twice; its tokens would count double")
    groups: dict[str, list[ActivationStore]] = {}
    for store in stores:
        groups.setdefault(sha256_json(store.spec.same_tokens), []).append(store)
    blocks = [group[0].spec.block for group in groups.values()]
    is_unique = len(set(blocks)) == len(blocks)
    return {
        f"block{group[0].spec.block}" + ("" if is_unique else f"-{identity[:8]}"): used_together(group)
        for identity, group in groups.items()
    }


def _plan(
    grid: Grid, groups: dict[str, list[ActivationStore]], out: Path, exclude: frozenset[str], source: Path
) -> list[_Planned]:
    """Every member of the grid for every group of caches. Raises BadInput before any of them is trained."""
    chosen: dict[tuple[Any, ...], TrainingData] = {}
    planned = []
    for label, stores in groups.items():
        for member in grid.members:
            config = member.config
            key = (label, *(getattr(config, name) for name in OF_DATA))
            name = f"{label}-{member.name}" if len(groups) > 1 else member.name
            try:
                if key not in chosen:
                    chosen[key] = choose_data(stores, config, exclude=exclude)
                plan = plan_training(chosen[key], out / "runs" / name, config)
                with torch.device("meta"):  # shapes without memory
                    model = new_model(plan.data.width, plan.config)
                    n_bytes = sum(4 * 4 * weight.numel() for weight in model.parameters())
            except BadInput as error:
                raise BadInput(f"{source}: the member {name} cannot be trained: {error}") from None
            settings = {setting: getattr(config, setting) for setting in grid.varied}
            record = Record(name=name, caches=label, settings=settings, identity=plan.header.identity)
            planned.append(_Planned(record, plan, n_bytes))
    return planned


def _spec(planned: list[_Planned]) -> dict[str, Any]:
    """Everything that decides the numbers of a sweep; its hash is the identity of the sweep."""
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


def _passes(waiting: list[_Planned], at_once: int | None, n_bytes: float, state_bytes: float) -> list[list[_Planned]]:
    """Members by pass, in the order of the grid.

    at_once : most members of a pass; None: as many as have weights of at most `n_bytes` together, and saved states of
        at most `state_bytes` with the one that is being written; at least one
    """
    by_key: dict[tuple[int, int, int], list[list[_Planned]]] = {}
    for member in waiting:
        passes = by_key.setdefault(member.pass_key, [[]])
        together = passes[-1]
        sizes = [other.plan.state_bytes for other in (*together, member)]
        fits = sum(other.n_bytes for other in together) + member.n_bytes <= n_bytes
        fits = (fits and sum(sizes) + max(sizes) <= state_bytes) or not together
        if len(together) < (at_once or MOST_AT_ONCE) and (fits or at_once is not None):
            together.append(member)
        else:
            passes.append([member])
    return [together for passes in by_key.values() for together in passes]


def _last_position(members: list[_Planned]) -> int:
    """Tokens that a pass reads if it starts at the beginning."""
    return max(member.config.n_steps(member.data.stream.tokens_per_epoch) for member in members) * (
        members[0].config.batch_tokens
    )


def _summary_line(planned: list[_Planned], waiting: list[_Planned], passes: list[list[_Planned]]) -> str:
    most = max((len(members) for members in passes), default=0)
    done = f" ({len(planned) - len(waiting):,} are finished)" if len(waiting) < len(planned) else ""
    n_bytes = max((sum(member.n_bytes for member in members) for members in passes), default=0)
    return (
        f"{len(planned):,} SAEs{done}: {len(passes):,} {'pass' if len(passes) == 1 else 'passes'} over the data with "
        f"up to {most:,} at once, {n_bytes / 1e9:.1f} GB for weights and moments"
    )


def _tell(progress: Progress, before: int, total: int, done: int, state: str) -> None:
    progress(before + done, total, state)


class _Pass:
    """Members that share one pass over the data."""

    def __init__(self, folder: SweepFolder, members: list[_Planned], device: str, rule: SaveRule) -> None:
        self._folder, self._members, self._device = folder, members, device
        self._saver = Saver(rule.within([member.plan.state_bytes for member in members]))  # one state at a time
        self._live: list[tuple[Record, Training]] = []
        self._is_to_save = False
        self._n_read = 0  # tokens

    def run(self, progress: Callable[[int, str], None]) -> None:
        """Train all of them to their ends; `progress` is called with the tokens read so far.

        On Ctrl-C, if a cache cannot be read any longer and if memory is not enough, all states are saved.
        """
        first = self._members[0]
        stream, batch_tokens = first.data.stream, first.config.batch_tokens
        with ExitStack() as stack:
            self._begin(stack)
            try:
                for record, training in list(self._live):
                    self._finish_if_over(record, training, progress)
                while self._live:  # members that are behind catch up first: then all share each batch
                    position = min(training.position for _, training in self._live)
                    batches = on_device(stream.batches(batch_tokens, position=position), self._device)
                    while due := [member for member in self._live if member[1].position == position]:
                        tokens = next(batches)
                        for record, training in due:
                            self._step(record, training, tokens, progress)
                        self._save_due([member for member in due if member in self._live])
                        if self._is_to_save:
                            self._folder.save()
                            self._is_to_save = False
                        position += batch_tokens
                        self._n_read = position - first_position(first.config)
                        progress(self._n_read, self._state())
            except BaseException as error:
                for _, training in self._live:
                    if is_worth_saving(error, training):
                        save_training(training)
                raise
            finally:
                self._folder.save()

    def _begin(self, stack: ExitStack) -> None:
        for member in self._members:
            training = begin_training(member.plan, stack, device=self._device, saver=self._saver)
            if training is None:
                member.record.status = "complete"
            else:
                self._live.append((member.record, training))

    def _step(
        self, record: Record, training: Training, tokens: torch.Tensor, progress: Callable[[int, str], None]
    ) -> None:
        began = time.perf_counter()
        try:
            train_step(training, tokens)
        except Diverged as error:
            self._fail(record, training, error)
            return
        finally:
            record.seconds += time.perf_counter() - began
        self._finish_if_over(record, training, progress)

    def _save_due(self, stepped: list[tuple[Record, Training]]) -> None:
        """Save which is due of those that took a step: by steps all, by time the one that has waited longest."""
        for _, training in sorted(stepped, key=lambda member: member[1].saved_at):
            if is_save_due(training):
                begin_save(training)
                self._is_to_save = True

    def _finish_if_over(self, record: Record, training: Training, progress: Callable[[int, str], None]) -> None:
        if not training.is_over:
            return
        # removed first: `finish_training` changes the weights, so they must not be saved as a state any more
        self._live.remove((record, training))
        try:
            finish_training(
                training, lambda done, total, state: progress(self._n_read, f"{state}: {done:,} of {total:,}")
            )
        except Diverged as error:
            self._fail(record, training, error)
            return
        record.status = "complete"
        self._is_to_save = True

    def _fail(self, record: Record, training: Training, error: Diverged) -> None:
        if (record, training) in self._live:
            self._live.remove((record, training))
        self._saver.wait(training.output.work)
        trim_states(training.output.work, keep=1)
        record.status, record.failed_at_step, record.message = "failed", error.step, str(error)
        self._is_to_save = True

    def _state(self) -> str:
        """Where the SAEs are between sparse and dense; which is best, only held-out images at comparable L0 can say."""
        newest = [training.newest for _, training in self._live if training.newest]
        l0s = [float(metrics["l0"]) for metrics in newest if metrics["l0"] is not None]
        said = f", L0 {min(l0s):.1f} to {max(l0s):.1f}" if l0s else ""
        return f"{len(self._live)} SAEs{said}"


def _result(folder: SweepFolder, grid: Grid, *, was_complete: bool) -> SweepResult:
    """Write tables and figure; the sweep is marked complete when everything else is on disk."""
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
