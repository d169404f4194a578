"""What a run will do, why, and what it will cost: told before anything is written."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cytosae.stage_one import FirstLook
from stores.machine import free_on_disk
from stores.wording import Report, printable

from .cohort import CohortFacts
from .costs import Cost, n_latents_of, products_per_second, stage_cost
from .journal import Journal, content_of
from .recipe import FILE, Recipe
from .stages import CACHE, Stage

_ROOM = 1.2  # of the disk, over the estimate


@dataclass(frozen=True, kw_only=True)
class PlannedStage:
    """One stage of a plan."""

    stage: Stage
    why: str  # it is to be done, in words; empty: it is done
    cost: Cost  # of all of it, about


@dataclass(frozen=True, kw_only=True)
class RunPlan(Report):
    """What a run will do; nothing is written yet."""

    out: Path
    recipe: Recipe
    facts: CohortFacts
    look: FirstLook | None  # None: nothing had to be looked at
    device: str
    stages: tuple[PlannedStage, ...]
    n_free: int  # bytes of the disk
    notes: tuple[str, ...] = ()  # on the images
    changed: str = ""  # which image files are others than those that were extracted, in words

    @property
    def to_do(self) -> list[PlannedStage]:
        """The stages that will run, as far as can be known before."""
        return [each for each in self.stages if each.why]

    @property
    def seconds(self) -> float:
        """About."""
        return sum(each.cost.seconds for each in self.to_do)

    @property
    def n_bytes(self) -> float:
        """On disk, about."""
        return sum(each.cost.n_bytes for each in self.to_do)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Images that cannot be read, or have changed since they were extracted; a disk that will not do."""
        found = []
        if self.changed and not any(each.stage.out == CACHE and each.why for each in self.stages):
            found.append(f"{self.changed}. For the files of now: cyto run {self.out / FILE} -o DIR, a new folder")
        if self.look is not None and self.look.unreadable:
            tried = self.look.n_read + len(self.look.unreadable)
            found.append(
                f"{len(self.look.unreadable)} of {tried} images tried cannot be read: {self.look.unreadable[0]}"
            )
        if self.n_bytes * _ROOM > self.n_free:
            found.append(
                f"about {size_text(self.n_bytes)} are needed below {self.out}, {size_text(self.n_free)} are free"
            )
        return tuple(found)

    def lines(self) -> Iterator[str]:
        """What goes in, the settings with their reasons, the stages with their costs, what is left out."""
        first, *more = self.facts.lines()
        yield f"{self.out}: {first} from {self.recipe.images['source']}"
        yield from (f"  {printable(line)}" for line in more)
        if self.facts.other_columns:
            yield f"  columns that are not used: {printable(', '.join(self.facts.other_columns[:8]))}"
        if self.look is not None:
            kind = "" if self.look.trained else ", UNTRAINED (it shows the machinery, not medicine)"
            n_tokens = self.facts.n_images * self.look.tokens_per_image
            yield (
                f"  {n_tokens:,} tokens of width {self.look.width} ({self.look.tokens_per_image} an image), "
                f"{self.look.backbone} block {self.look.block}{kind}, on {self.device} in {self.look.precision}"
            )
        yield "settings that were chosen (all of them: recipe.toml)"
        sections = self.recipe.sections()
        for name, reason in self.recipe.why.items():
            section, _, key = name.partition(".")
            value = sections.get(section, {}).get(key) if isinstance(sections.get(section), dict) else None
            if value is not None:
                yield f"  {name:<22} {printable(short_value(value)):<12} {printable(reason)}"
        wide = max(34, *(len(printable(each.stage.name)) for each in self.stages))
        yield f"stages{'':<{wide}} about"
        for each in self.stages:
            time = time_text(each.cost.seconds) if each.why else ""
            size = size_text(each.cost.n_bytes) if each.why else ""
            name = printable(each.stage.name)
            said = "" if each.why == "to do" else printable(each.why) if each.why else "done"
            if each.why and each.cost.is_open:
                said = f"{said}; or more: until it has settled".removeprefix("; ")
            yield f"  {name:<{wide}} {time:>8} {size:>9}  {said}".rstrip()
        for name, reason in self.recipe.left_out.items():
            yield f"  left out: {printable(name)}: {printable(reason)}"
        if self.to_do:
            or_more = " or more" if any(each.cost.is_open for each in self.to_do) else ""
            yield f"in all about {time_text(self.seconds)}{or_more} and {size_text(self.n_bytes)}"


def make_plan(
    recipe: Recipe,
    stages: list[Stage],
    journal: Journal,
    facts: CohortFacts,
    look: FirstLook | None,
    *,
    out: Path,
    device: str,
    images_content: str,
    notes: tuple[str, ...] = (),
    changed: str = "",
) -> RunPlan:
    """Which stages are to be done, and what they cost.

    images_content : what the image table holds, as a hash
    changed : as of `StageOne.changed_files`
    """
    n_latents = 0 if look is None else n_latents_of(recipe, look.width)
    whys = _why_stale(stages, journal, out, images_content)
    needs_rate = any(whys[each.out] and each.name in ("train", "encode") for each in stages)
    rate = products_per_second(look, n_latents, device=device) if look is not None and needs_rate else None
    planned = tuple(
        PlannedStage(
            stage=each,
            why=whys[each.out],
            cost=_as_before(each, journal) if look is None else stage_cost(each, recipe, facts, look, n_latents, rate),
        )
        for each in stages
    )
    return RunPlan(
        out=out,
        recipe=recipe,
        facts=facts,
        look=look,
        device=device,
        stages=planned,
        n_free=free_on_disk(out),
        notes=notes,
        changed=changed,
    )


def _as_before(stage: Stage, journal: Journal) -> Cost:
    """What a stage cost the last time; its bytes are there."""
    seconds = journal.stages.get(stage.out, {}).get("seconds")
    return Cost(seconds=float(seconds) if isinstance(seconds, int | float) else 5.0, n_bytes=0.0)


def inputs_of(stage: Stage, out: Path, images_content: str) -> dict[str, str | None]:
    """What a stage reads -> its content now."""
    found = {name: content_of(out / name) for name in stage.inputs}
    if stage.out == CACHE:
        found = {"images": images_content}
        for file in (stage.settings.get("weights"), stage.settings.get("backbone")):  # each may be a file of weights
            if isinstance(file, str) and (out / file).is_file():
                found[file] = content_of(out / file)
    return found


def _why_stale(stages: list[Stage], journal: Journal, out: Path, images_content: str) -> dict[str, str]:
    """Output -> why it is to be made, as far as can be known; what depends on something that is to be made, is, too."""
    found: dict[str, str] = {}
    left_out: set[str] = set()  # before, and likely again
    for stage in stages:
        why = journal.why_stale(stage, inputs_of(stage, out, images_content), content_of(out / stage.out))
        above = [name for name in stage.inputs if found.get(name) and name not in left_out]
        if not why and above:
            why = "again: what it reads will have changed"
        if why and stage.name in journal.left_out and not above and content_of(out / stage.out) is None:
            why = f"left out before: {journal.left_out[stage.name]}"
            left_out.add(stage.out)
        found[stage.out] = why
    return found


def time_text(seconds: float) -> str:
    """`40 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def size_text(n_bytes: float) -> str:
    """`1.2 MB`, `3.4 GB`."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if n_bytes >= size:
            return f"{n_bytes / size:,.1f} {unit}" if n_bytes < 100 * size else f"{n_bytes / size:,.0f} {unit}"
    return f"{n_bytes / 1e3:,.0f} kB"


def short_value(value: object) -> str:
    """A setting in a line of the plan."""
    text = f"{value:g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
    return text if len(text) <= 40 else f"{text[:39]}…"
