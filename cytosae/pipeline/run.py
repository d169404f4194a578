"""`cyto run`: images (or a recipe) to an atlas and a report, in one folder. Read from top to bottom.

1. What is asked: a recipe that is there, or one that is chosen from the data (choices.py).
2. What is to be done: stage by stage, by settings and by what each reads (journal.py); what it costs (costs.py).
3. The stages, each of which continues by itself where it was interrupted (stages.py).
4. The page (page.py).
"""

import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cytosae.stage_one import FirstLook, ImageList, StageOne, require_stage_one
from stores.destination import claimed
from stores.errors import BadInput, CytoError, IncompleteStore, OtherSettings, SpecMismatch, StoreNotFound
from stores.files import is_dropping, write_atomic
from stores.machine import n_cores
from stores.progress import Progress
from stores.shards import ONE_WRITER, Shard
from stores.spec import find_header
from stores.tables import listed, table_sha256
from stores.wording import Report, counted, printable

from .choices import check_asked, resolve
from .cohort import CohortFacts, read_cohort
from .commands_text import script, words
from .config import RunConfig
from .journal import FILE as JOURNAL
from .journal import Journal, content_of
from .page import REPORT, write_run_report
from .plan import RunPlan, inputs_of, make_plan
from .recipe import FILE, Recipe, differences, extract_settings, read_recipe, write_recipe
from .stages import ATLAS, CACHE, COMPARE, PROBE, SELECTION, RunContext, Stage, as_now, stages_of

COMMANDS = "commands.sh"
_LOOKED_AT = 32  # images of the first look
_STEPS = 1000  # of the one progress line


@dataclass(frozen=True, kw_only=True)
class RunResult(Report):
    """What a run has done; of a dry run its plan."""

    out: Path
    plan: RunPlan
    is_dry: bool = False
    made: tuple[str, ...] = ()  # stages that were done
    unchanged: tuple[str, ...] = ()  # stages that were done before
    left_out: dict[str, str]  # analysis -> why it was not made
    said: tuple[str, ...] = ()  # a few lines of what the stages found
    doubts: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()  # of the stages, on what they read
    waits_for: str = ""  # what other shards must do first, in words

    @property
    def was_complete(self) -> bool:
        """Nothing had to be done."""
        return not self.is_dry and not self.made and not self.waits_for

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks of the stages that were done now, on what they read."""
        return self.remarks

    @property
    def warnings(self) -> tuple[str, ...]:
        """What makes the results doubtful, of the stages that were done now."""
        return self.doubts

    def lines(self) -> Iterator[str]:
        """What was made, and where it is."""
        if self.is_dry:
            yield "nothing was written"
            return
        yield from self.said
        if self.waits_for:
            yield self.waits_for
            return
        for name, reason in self.left_out.items():
            yield f"left out: {printable(name)}: {printable(reason)}"
        yield f"{self.out / FILE}   every setting; change a line and run cyto run {self.out / FILE}"
        yield f"{self.out / COMMANDS}   the same by hand"
        if find_header(self.out / ATLAS) is not None:
            yield f"atlas: {(self.out / ATLAS / 'index.html').absolute().as_uri()}"
        yield f"report: {(self.out / REPORT).absolute().as_uri()}"


@dataclass(frozen=True)
class _Asked:
    """What a run begins with: a recipe, its images, a first look if one was needed."""

    recipe: Recipe
    images: ImageList
    facts: CohortFacts
    look: FirstLook | None


def run_pipeline(
    source: Path | str,
    out: Path | str | None = None,
    config: RunConfig | None = None,
    *,
    stage_one: StageOne | None = None,
    device: str = "auto",
    workers: int | None = None,
    scheduler: str | None = None,
    memory_limit: str = "2GiB",
    shard: Shard = ONE_WRITER,
    dry_run: bool = False,
    overwrite: bool = False,
    tell_plan: Callable[[RunPlan], None] = lambda plan: None,
    progress: Progress = lambda done, total, state: None,
    download_progress: Progress = lambda done, total, state: None,
    graceful_stop: Callable[[], AbstractContextManager[Callable[[], bool]]] = lambda: nullcontext(lambda: False),
) -> RunResult:
    """From images (or a recipe) to a folder with all stores, results, an atlas and a report; the same call continues.

    A stage is done again if its settings or what it reads have changed, and not otherwise. Memory: that of the stages.

    Parameters
    ----------
    source : as of `cytocache.open_images`; or the `recipe.toml` of a run
    out : the folder; of a recipe None: its own
    config : what is asked; with a recipe None, which says everything
    stage_one : `cytocache.bridge`
    device, workers : of extraction, training and encoding; processes that read images, and of a cluster started here
    scheduler, memory_limit : as of `cytosae.open_client`
    shard : the share of the images that this process extracts and encodes; shard 0 does what cannot be shared
    dry_run : look, choose and plan; write nothing
    overwrite : take new settings for a folder that has a recipe with others, and replace what was made there by hand
    tell_plan : called once, before anything is written
    progress : thousandths of all stages done, 1000
    download_progress : bytes of the weights downloaded, bytes in all
    graceful_stop : a context around the extraction that says whether it is to stop after the chunk in flight

    Raises
    ------
    BadInput
        If images, recipe or a setting cannot be used.
    SpecMismatch
        If `out` holds something else, a run with other settings or stores with other settings that were made by hand
        (and not `overwrite`), or is being written.
    """
    from cytosae.cluster import memory_bytes  # dask
    from stores.devices import resolve_device  # torch: where it is missing, that is told before anything is begun

    bridge, resolved = require_stage_one(stage_one), resolve_device(device)
    memory_bytes(memory_limit)  # the workers that need it start after the training, which may take hours
    place, config_of = _places(Path(source), None if out is None else Path(out), config)
    looking: dict[str, Any] = {"device": device, "workers": workers, "download_progress": download_progress}
    with ExitStack() as stack:
        if not dry_run:
            stack.enter_context(claimed(place, shared=not shard.is_only))
        _refuse_foreign(place)
        asked = (
            _from_recipe(Path(source), place, bridge, overwrite=overwrite)
            if config_of is None
            else _from_data(Path(source), place, config_of, bridge, looking, overwrite=overwrite)
        )
        content = table_sha256(asked.images.table)
        stages = stages_of(asked.recipe, place, device=device)
        journal = Journal.read(place)
        look = asked.look
        if look is None and content_of(place / CACHE) is None:
            look = _look(bridge, asked.images, extract_settings(asked.recipe, place), looking)
        plan = make_plan(
            asked.recipe,
            stages,
            journal,
            asked.facts,
            look,
            out=place,
            device=resolved,
            images_content=content,
            notes=asked.images.notes,
            changed="" if content_of(place / CACHE) is None else bridge.changed_files(asked.images, place / CACHE),
        )
        tell_plan(plan)
        if dry_run:
            return RunResult(out=place, plan=plan, is_dry=True, left_out=dict(asked.recipe.left_out))
        place.mkdir(parents=True, exist_ok=True)
        write_recipe_of(asked.recipe, place, Path(source))
        context = RunContext(
            out=place,
            recipe=asked.recipe,
            images=asked.images,
            stage_one=bridge,
            device=device,
            workers=workers or n_cores(),
            scheduler=scheduler,
            memory_limit=memory_limit,
            shard=shard,
            graceful_stop=graceful_stop,
            download_progress=download_progress,
            resources=stack,
        )
        return _run(plan, context, journal, content, progress, overwrite=overwrite)


# ------------------------------------------------------------------------------------------------ what is asked


def _places(source: Path, out: Path | None, config: RunConfig | None) -> tuple[Path, RunConfig | None]:
    """The folder of the run, and what is asked; None of a recipe, which says everything."""
    if source.suffix == ".toml":
        if config is not None:
            raise BadInput(f"{source} says every setting; change its lines, and leave the options out")
        return out or source.parent, None
    if (source / FILE).is_file():
        raise BadInput(f"{source} is the folder of a run; go on with cyto run {source / FILE}")
    if out is None:
        raise BadInput(f"give the folder of the run: cyto run {source} -o DIR")
    if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        raise BadInput(
            f"{out} lies in the folder of the images, and its pictures would be taken for cells; choose another -o"
        )
    return out, config or RunConfig()


def _refuse_foreign(out: Path) -> None:
    """Nothing that a run would write may be there, unless a run wrote it."""
    if out.exists() and not out.is_dir():
        raise SpecMismatch(f"{out} is a file, and not the folder of a run; choose another -o")
    if find_header(out) is not None:
        raise SpecMismatch(f"{out} is a store of cyto's own; choose another -o")
    if not out.is_dir() or (out / FILE).is_file():
        return
    ours = (CACHE, COMMANDS, REPORT, JOURNAL, ATLAS, COMPARE, PROBE)
    there = [path.name for path in out.iterdir() if path.name in ours or path.name.startswith("cells.")]
    there = [name for name in there if not is_dropping(name) and name != "cells.csv"]
    if there:
        raise SpecMismatch(f"{out} holds {there[0]} but no {FILE}: something else than a run; choose another -o")


def _from_recipe(source: Path, out: Path, bridge: StageOne, *, overwrite: bool) -> _Asked:
    recipe = read_recipe(source)
    if source.parent.resolve() != out.resolve():  # its paths are relative to its own folder
        moved = {name: str((source.parent / value).absolute()) for name, value in recipe.images.items()}
        used = recipe.uses_sae
        sae = recipe.sae if used is None else {**recipe.sae, "use": str((source.parent / used).absolute())}
        recipe = replace(recipe, images=moved, sae=sae, extract=extract_settings(recipe, source.parent))
        _refuse_other(recipe, out, overwrite=overwrite)
    root = recipe.images.get("root")
    images = bridge.open_images(out / recipe.images["source"], root=None if root is None else out / root)
    return _Asked(recipe, images, read_cohort(images.table), None)


def _from_data(
    source: Path, out: Path, config: RunConfig, bridge: StageOne, looking: dict[str, Any], *, overwrite: bool
) -> _Asked:
    """A recipe chosen from the data, which must be that of the folder, if it has one."""
    check_asked(config)
    images = bridge.open_images(source, root=None if config.root is None else Path(config.root))
    facts = read_cohort(images.table)
    extract = {"backbone": config.backbone, "weights": config.weights, "block": config.block}
    extract |= config.settings.get("extract", {})
    look = _look(bridge, images, {name: value for name, value in extract.items() if value is not None}, looking)
    recipe = resolve(config, source, out, facts, look)
    _refuse_other(recipe, out, overwrite=overwrite)
    return _Asked(recipe, images, facts, look)


def _refuse_other(recipe: Recipe, out: Path, *, overwrite: bool) -> None:
    """A folder with a recipe keeps its settings, unless `overwrite` says that new ones are meant."""
    if not (out / FILE).is_file() or overwrite:
        return
    if found := differences(read_recipe(out / FILE), recipe):
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise SpecMismatch(
            f"{out / FILE} has other settings ({', '.join(found[:3])}{more}); cyto run {out / FILE} goes on with "
            f"those, --overwrite takes the new ones, or choose another -o"
        )


def _look(bridge: StageOne, images: ImageList, extract: Mapping[str, Any], looking: dict[str, Any]) -> FirstLook:
    return bridge.first_look(images, extract, n_images=_LOOKED_AT, **looking)


def write_recipe_of(recipe: Recipe, out: Path, source: Path) -> None:
    """Write the recipe into the folder of the run, unless it was read from there."""
    if source.absolute() != (out / FILE).absolute():
        write_recipe(recipe, out / FILE)


# --------------------------------------------------------------------------------------------------- the stages


class _Overall:
    """One progress over all stages, each with its share of the expected time."""

    def __init__(self, plan: RunPlan, progress: Progress) -> None:
        self._progress = progress
        seconds = {each.stage.out: max(0.5, each.cost.seconds) if each.why else 0.0 for each in plan.stages}
        total = sum(seconds.values()) + 2.0  # the report
        self._share = {name: value / total for name, value in seconds.items()}
        self._done = self._shown = 0.0
        self._at, self._n, self._name, self._out = 0, len(plan.to_do), "", ""

    def begin(self, stage: Stage) -> None:
        self._at, self._name, self._out = self._at + 1, stage.name, stage.out
        self.show(0, 1, "")

    def show(self, done: int, total: int, state: str) -> None:
        within = min(1.0, done / total) if total > 0 else 0.0
        share = self._done + within * self._share.get(self._out, 0.0)
        self._shown = share = max(self._shown, share)  # a total that grows on the way does not take back what was shown
        said = f"{self._at} of {max(self._n, self._at)} {printable(self._name)}"
        self._progress(round(_STEPS * min(share, 1.0)), _STEPS, f"{said}, {state}" if state else said)

    def end(self, stage: Stage) -> None:
        self._done += self._share.get(stage.out, 0.0)


@dataclass
class _Found:
    """What comes of the stages, one after the other."""

    made: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    doubts: list[tuple[str, str]] = field(default_factory=list)  # stage, warning
    remarks: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def add(self, stage: Stage, done: Report) -> None:
        """A stage was done."""
        name = printable(stage.name)
        self.made.append(stage.name)
        lines = [] if stage.is_optional else [*done.lines()]
        self.said += [line for at, line in enumerate(lines) if at == 0 or line.startswith("health:")]
        self.doubts += [(name, warning) for warning in done.warnings]
        self.remarks += [f"{name}: {note}" for note in done.notes]

    def result(self, plan: RunPlan, context: RunContext, *, waits_for: str = "") -> RunResult:
        """What the run has done."""
        told = {f"extract: {note}" for note in plan.notes}  # the plan has said these
        return RunResult(
            out=context.out,
            plan=plan,
            made=tuple(self.made),
            unchanged=tuple(self.unchanged),
            left_out={**context.recipe.left_out, **self.left_out},
            said=tuple(self.said),
            doubts=tuple(_grouped(self.doubts)),
            remarks=tuple(note for note in dict.fromkeys(self.remarks) if note not in told),
            waits_for=waits_for,
        )


def _grouped(doubts: list[tuple[str, str]]) -> Iterator[str]:
    """Warnings that differ in their numbers only are told once, of the first stage, with the number of the others."""
    alike: dict[str, list[tuple[str, str]]] = {}
    for stage, warning in doubts:
        alike.setdefault(re.sub(r"[\d.,]*\d", "#", warning), []).append((stage, warning))
    for found in alike.values():
        stages, (first, *others) = (
            [*dict.fromkeys(stage for stage, _ in found)],
            dict.fromkeys(text for _, text in found),
        )
        if not others:
            yield f"{listed(stages)}: {first}"
        else:
            yield f"{stages[0]}: {first} (and {counted(len(others), 'other stage')}, with other numbers)"


def _run(
    plan: RunPlan, context: RunContext, journal: Journal, images_content: str, progress: Progress, *, overwrite: bool
) -> RunResult:
    """All stages in order, then the commands and the report."""
    overall = _Overall(plan, progress)
    context.progress = overall.show
    found = _Found()
    for planned in plan.stages:
        stage = as_now(planned.stage, context.recipe, context.out)
        journal.refresh()  # other shards may have done some
        inputs = inputs_of(stage, context.out, images_content)
        inputs |= dict.fromkeys(inputs.keys() & context.left_out)  # absent, even where an older output lies
        there = content_of(context.out / stage.out)
        if not journal.why_stale(stage, inputs, there):
            found.unchanged.append(stage.name)
            continue
        if waits_for := _must_wait(stage, context, there):
            return found.result(plan, context, waits_for=waits_for)
        overall.begin(stage)
        began = time.perf_counter()
        try:
            done = _run_stage(stage, context, may_replace=overwrite or journal.is_made(stage, there))
        except CytoError as error:
            if not (stage.is_optional and isinstance(error, BadInput | StoreNotFound | IncompleteStore)):
                raise
            found.left_out[stage.name] = str(error)
            _leave_out(stage, context, journal, there, why=str(error))
            overall.end(stage)
            continue
        overall.end(stage)
        if getattr(done, "is_complete", True) is False:  # a shard of a store
            return found.result(plan, context, waits_for=next(iter(done.lines()), "other shards"))
        journal.record(stage, inputs, content_of(context.out / stage.out), seconds=time.perf_counter() - began)
        journal.write()
        found.add(stage, done)
    write_commands(context.out, context.recipe, {**context.recipe.left_out, **found.left_out}, device=context.device)
    progress(_STEPS - 1, _STEPS, "the report")
    write_run_report(context.out, stage_one=context.stage_one)
    progress(_STEPS, _STEPS, "done")
    return found.result(plan, context)


def _leave_out(stage: Stage, context: RunContext, journal: Journal, there: str | None, *, why: str) -> None:
    """The data do not allow an optional stage: whoever reads its output is to take none, and the journal says why."""
    journal.leave_out(stage, why)
    context.left_out.add(stage.out)
    if stage.out == SELECTION and there is not None and journal.is_made(stage, there):
        (context.out / SELECTION).unlink()  # of other settings; whoever reads the concepts would take it
    journal.write()


def _run_stage(stage: Stage, context: RunContext, *, may_replace: bool) -> Report:
    """Do a stage. What a run made with other settings is replaced, once the new output is complete.

    may_replace : a run made what is there, or --overwrite was given; what somebody made by hand is refused else
    """
    try:
        return stage.do(context, False)
    except SpecMismatch as error:
        place = context.out / stage.out
        if not place.exists() or not context.shard.is_only:
            raise
        if may_replace:
            return stage.do(context, True)
        if not isinstance(error, OtherSettings):
            raise
        said = str(error).split("; ")[0]
        raise OtherSettings(
            f"{said}; it was not made by cyto run, which would replace it: write its settings into "
            f"{context.out / FILE}, move it elsewhere, or add --overwrite"
        ) from None


def _must_wait(stage: Stage, context: RunContext, there: str | None) -> str:
    """Of several shards the first does what cannot be shared; the others say so, and end."""
    if stage.is_shared or context.shard.index == 0 or there is not None:
        return ""
    return (
        f"{context.out}: shard {context.shard} has done its share; {stage.name} is for shard 0 of "
        f"{context.shard.count}. Run the same commands again when it is done"
    )


def write_commands(out: Path, recipe: Recipe, left_out: dict[str, str], *, device: str = "auto") -> None:
    """Write `commands.sh`, without the analyses that the data do not allow."""
    missing = {each.out for each in stages_of(recipe, out) if each.name in left_out}
    made = replace(
        recipe,
        compare=tuple(each for each in recipe.compare if f"{COMPARE}/{each['name']}" not in missing),
        probe=tuple(each for each in recipe.probe if f"{PROBE}/{each['name']}" not in missing),
    )
    stages = [each for each in stages_of(made, out, device=device) if each.out not in missing]
    commands = [*(each.command for each in stages), words("report", ".")]
    content = script(commands, left_out).encode()
    path = out / COMMANDS
    if not path.is_file() or path.read_bytes() != content:
        write_atomic(path, content)
