"""The stages of a run: each is one call of another room's public function, and one command that does the same.

A stage is a step of `cyto run`, from extraction to atlas; `stage_one` below is what the steps need of cytocache.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from cytosae.stage_one import ImageList, StageOne
from stores.progress import Progress
from stores.shards import ONE_WRITER, Shard
from stores.spec import ABLATION, MASKS, NAMES, NEIGHBOURS, SAE, SCORECARD, find_header
from stores.wording import Report

from .commands_text import options, training_options, words
from .recipe import FILE, Recipe, Section, compare_config, extract_settings, plain_values, probe_config

# names below the folder of a run
CACHE, SAE_FOLDER, LATENTS = "cells.acts.zarr", "cells.sae", "cells.latents.zarr"
BARCODES, CONCEPTS, ATLAS = "cells.barcodes", "cells.concepts", "atlas"
SELECTION = f"{CONCEPTS}/selection.parquet"
COMPARE, PROBE, SECOND_SAE, STABILITY = "compare", "probe", "second_seed.sae", "stability"
VERSUS = "versus"  # no stage: cyto sae versus may write it there, and the report shows it
# no stages: other commands may write these there, and the atlas shows those of this run's SAE and latents; name of the
# folder, of the argument of `build_atlas`, and of the option of cyto atlas build
EVIDENCE = {"neighbours": NEIGHBOURS, "causes": ABLATION, "score": SCORECARD, "masks": MASKS, "names": NAMES}


def _silent(done: int, total: int, state: str) -> None:
    pass


@dataclass(kw_only=True)
class RunContext:
    """What the stages of a run share: folder, images, machine."""

    out: Path
    recipe: Recipe
    images: ImageList
    stage_one: StageOne
    device: str = "auto"
    workers: int = 1
    scheduler: str | None = None
    memory_limit: str = "2GiB"
    shard: Shard = ONE_WRITER
    # around the extraction: a context that says whether it is to stop after the chunk in flight
    graceful_stop: Callable[[], AbstractContextManager[Callable[[], bool]]] = lambda: nullcontext(lambda: False)
    download_progress: Progress = _silent
    progress: Progress = _silent  # of the stage at work
    resources: ExitStack = field(default_factory=ExitStack)
    # outputs of stages that the data do not allow; old ones may lie there
    left_out: set[str] = field(default_factory=set)

    @cached_property
    def client(self) -> Any:
        """A Dask client, opened when the first stage needs it and closed with `resources`."""
        from cytosae.cluster import open_client

        return self.resources.enter_context(
            open_client(self.scheduler, workers=self.workers, memory_limit=self.memory_limit)
        )

    def path(self, name: str) -> Path:
        """The place of an output or input; absolute names stay."""
        return self.out / name


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of a run.

    Attributes
    ----------
    name : as plans and errors call it
    out : its output, below the folder of the run
    inputs : outputs of other stages, or absolute paths, that it reads
    settings : what decides its numbers, in plain values
    command : the words of the command line that does the same, in the folder of the run
    do : makes the output; the second argument says whether one with other settings is replaced
    is_optional : the data may not allow it: then it is left out, and the rest goes on
    is_shared : several shards may work at it at the same time
    """

    name: str
    out: str
    inputs: tuple[str, ...]
    settings: Mapping[str, Any]
    command: tuple[str, ...]
    do: Callable[[RunContext, bool], Report]
    is_optional: bool = False
    is_shared: bool = False


def stages_of(recipe: Recipe, out: Path, *, device: str = "auto") -> list[Stage]:
    """The stages of a recipe, in the order in which they run; the report is not among them.

    device : of the commands, if it is not auto
    """
    on = () if device == "auto" else ("--device", device)
    return [*_to_latents(recipe, out, on), *_counts(recipe), *_analyses(recipe, on), _atlas(recipe, out)]


def as_now(stage: Stage, recipe: Recipe, out: Path) -> Stage:
    """A stage as it is when its turn comes: which evidence an atlas shows depends on the latents, which may be new."""
    return _atlas(recipe, out) if stage.out == ATLAS else stage


def sae_place(recipe: Recipe, out: Path) -> str:
    """Where the SAE of a run lies: below its folder, or an absolute path if a folder of one was given."""
    given = recipe.uses_sae
    if given is None:
        return SAE_FOLDER
    header = find_header(out / given) if (out / given).is_dir() else None
    return given if header is not None and header.kind == SAE.kind else SAE_FOLDER


def _to_latents(recipe: Recipe, out: Path, on: tuple[str, ...]) -> Iterator[Stage]:
    source, sae = str(recipe.images["source"]), sae_place(recipe, out)
    root = recipe.images.get("root")
    yield Stage(
        name="extract",
        out=CACHE,
        inputs=(),
        settings=plain_values(recipe.extract),
        command=words(
            "cache extract", source, CACHE, *options(recipe.extract), *(("--root", root) if root else ()), *on
        ),
        do=_extract,
        is_shared=True,
    )
    if recipe.uses_sae is None:
        settings = {name: value for name, value in recipe.sae.items() if name != "assume_compatible"}
        yield Stage(
            name="train",
            out=SAE_FOLDER,
            inputs=(CACHE,),
            settings=plain_values(settings),
            command=_train_command(settings, SAE_FOLDER, on),
            do=lambda context, overwrite: _train(context, SAE_FOLDER, overwrite=overwrite),
        )
    elif sae == SAE_FOLDER:
        given = recipe.uses_sae
        yield Stage(
            name="import",
            out=SAE_FOLDER,
            inputs=(given,),
            settings={},
            command=words("sae import", given, "-o", SAE_FOLDER),
            do=lambda context, overwrite: _import_sae(context, given, overwrite=overwrite),
        )
    assume = bool(recipe.sae.get("assume_compatible"))
    yield Stage(
        name="encode",
        out=LATENTS,
        inputs=(CACHE, sae),
        settings={**plain_values(recipe.encode), "assume_compatible": assume},
        command=words(
            "sae encode", CACHE, sae, "-o", LATENTS, *options({**recipe.encode, "assume_compatible": assume}), *on
        ),
        do=lambda context, overwrite: _encode(context, sae, assume=assume, overwrite=overwrite),
        is_shared=True,
    )


def comparison_stage(recipe: Recipe, section: Section) -> str:
    """The name of the stage of a comparison; of two with the same groups each has its own name behind it."""
    n_alike = sum((each["a"], each["b"]) == (section["a"], section["b"]) for each in recipe.compare)
    own = f" ({section['name']})" if n_alike > 1 else ""
    return f"compare {section['a']} against {section['b']}{own}"


def _counts(recipe: Recipe) -> Iterator[Stage]:
    yield Stage(
        name="barcode",
        out=BARCODES,
        inputs=(LATENTS,),
        settings=plain_values(recipe.barcode),
        command=words("barcode", LATENTS, "-o", BARCODES, *options(recipe.barcode)),
        do=_barcode,
    )
    yield Stage(
        name="concepts",
        out=CONCEPTS,
        inputs=(LATENTS,),
        settings=plain_values(recipe.concepts),
        command=words("concept stats", LATENTS, "-o", CONCEPTS, *options(recipe.concepts)),
        do=_concepts,
    )
    yield Stage(
        name="select",
        out=SELECTION,
        inputs=(CONCEPTS,),
        settings=plain_values(recipe.select),
        command=words("concept select", CONCEPTS, *options(recipe.select)),
        do=_select,
        is_optional=True,
    )


def _analyses(recipe: Recipe, on: tuple[str, ...]) -> Iterator[Stage]:
    for section in recipe.compare:
        place = f"{COMPARE}/{section['name']}"
        given = {name: value for name, value in section.items() if name not in ("name", "a", "b")}
        names = [BARCODES, str(section["a"]), str(section["b"])]
        yield Stage(
            name=comparison_stage(recipe, section),
            out=place,
            inputs=(BARCODES,),
            settings=plain_values(section),
            command=words("compare", "-o", place, *options(given), *_names(names)),
            do=partial(_compare, section, place),
            is_optional=True,
        )
    for section in recipe.probe:
        place = f"{PROBE}/{section['name']}"
        given = {name: value for name, value in section.items() if name != "name"}
        more = ("--cache", CACHE, "--no-mil", *(() if recipe.uses_sae else ("--sae", SAE_FOLDER)))
        yield Stage(
            name=f"probe {section['name']}",
            out=place,
            inputs=(BARCODES, CACHE),
            settings=plain_values(section),
            command=words("probe", BARCODES, "-o", place, *options(given), *more),
            do=partial(_probe, section, place),
            is_optional=True,
        )
    if recipe.stability is not None and _has_second_seed(recipe):
        seed = recipe.stability["seed"]
        settings = {name: value for name, value in recipe.sae.items() if name != "assume_compatible"} | {"seed": seed}
        yield Stage(
            name=f"train again, seed {seed}",
            out=SECOND_SAE,
            inputs=(CACHE,),
            settings=plain_values(settings),
            command=_train_command(settings, SECOND_SAE, on),
            do=lambda context, overwrite: _train(context, SECOND_SAE, seed=seed, overwrite=overwrite),
        )
        yield Stage(
            name="stability",
            out=STABILITY,
            inputs=(SAE_FOLDER, SECOND_SAE),
            settings={},
            command=words("concept stability", SAE_FOLDER, SECOND_SAE, "-o", STABILITY),
            do=_stability,
            is_optional=True,
        )


def _has_second_seed(recipe: Recipe) -> bool:
    return recipe.stability is not None and recipe.uses_sae is None


def evidence_in(out: Path) -> tuple[str, ...]:
    """Names of the folders in a run's folder that its atlas shows besides what the run makes: see `EVIDENCE`."""
    latents = find_header(out / LATENTS)
    if latents is None:
        return ()
    found = []
    for name, kind in EVIDENCE.items():
        header = find_header(out / name) if (out / name).is_dir() else None
        if header is None or not header.complete or header.kind != kind.kind:
            continue  # a folder of mask files may have the name as well
        own = ("latents", latents.identity) if kind is MASKS else ("sae_sha256", latents.spec["sae_sha256"])
        if header.spec.get(own[0]) == own[1]:
            found.append(name)
    return tuple(found)


def _added_names(out: Path, evidence: tuple[str, ...]) -> list[str]:
    """The tables of names, which are added to their folder later: its header does not tell them."""
    tables = [f"names/{name}.parquet" for name in ("names", "detection", "sources")] if "names" in evidence else []
    return [place for place in tables if (out / place).is_file()]


def _atlas(recipe: Recipe, out: Path) -> Stage:
    places = [f"{COMPARE}/{section['name']}" for section in recipe.compare]
    stability = (STABILITY,) if _has_second_seed(recipe) else ()
    evidence = evidence_in(out)
    return Stage(
        name="atlas",
        out=ATLAS,
        inputs=(LATENTS, BARCODES, CONCEPTS, SELECTION, *places, *stability, *evidence, *_added_names(out, evidence)),
        settings=plain_values(recipe.atlas),
        command=words(
            *("atlas build", "--barcodes", BARCODES, "--concepts", CONCEPTS, "--latents", LATENTS),
            *(word for place in places for word in ("--compare", place)),
            *(word for place in stability for word in ("--stability", place)),
            *(word for name in evidence for word in (f"--{name}", name)),
            *("-o", ATLAS, *options(recipe.atlas)),
        ),
        do=_build_atlas,
        is_optional=True,
    )


def _names(names: list[str]) -> list[str]:
    """Arguments; after `--` if one of them looks like an option."""
    return ["--", *names] if any(name.startswith("-") for name in names) else names


# --------------------------------------------------------------------------------------------------- the calls


def _extract(context: RunContext, overwrite: bool) -> Report:
    with context.graceful_stop() as stop:
        done: Any = context.stage_one.extract(
            context.images,
            context.path(CACHE),
            extract_settings(context.recipe, context.out),
            device=context.device,
            workers=context.workers,
            shard=context.shard,
            overwrite=overwrite,
            progress=context.progress,
            download_progress=context.download_progress,
            stop=stop,
        )
    found: Report = done
    return found


def _train_command(settings: Section, place: str, on: tuple[str, ...]) -> tuple[str, ...]:
    return words("sae train", CACHE, "-o", place, *training_options(settings, FILE), *on)


def _train(context: RunContext, place: str, *, overwrite: bool, seed: int | None = None) -> Report:
    from cytosae import train
    from cytosae.training import training_line

    config = context.recipe.train_config
    return train(
        [context.path(CACHE)],
        context.path(place),
        config if seed is None else replace(config, seed=seed),
        device=context.device,
        overwrite=overwrite,
        progress=lambda done, total, metrics: context.progress(done, total, training_line(metrics)),
        measure_progress=lambda done, total, state: context.progress(1, 1, f"{state}: {done:,} of {total:,}"),
    )


def _import_sae(context: RunContext, given: str, *, overwrite: bool) -> Report:
    from cytosae.sae import import_sae

    return import_sae(context.path(given), context.path(SAE_FOLDER), overwrite=overwrite)


def _encode(context: RunContext, sae: str, *, assume: bool, overwrite: bool) -> Report:
    from cytosae import encode

    return encode(
        context.path(CACHE),
        context.path(sae),
        context.path(LATENTS),
        **context.recipe.encode,
        assume_compatible=assume,
        device=context.device,
        shard=context.shard,
        overwrite=overwrite,
        progress=context.progress,
    )


def _barcode(context: RunContext, overwrite: bool) -> Report:
    from cytosae.barcodes import write_barcodes

    return write_barcodes(
        context.path(LATENTS),
        context.path(BARCODES),
        context.recipe.barcode_config,
        client=context.client,
        overwrite=overwrite,
        progress=context.progress,
    )


def _concepts(context: RunContext, overwrite: bool) -> Report:
    from cytosae.concepts import concept_statistics

    done = concept_statistics(
        context.path(LATENTS),
        context.path(CONCEPTS),
        context.recipe.concept_config,
        client=context.client,
        overwrite=overwrite,
        progress=context.progress,
    )
    return replace(done, warning=None)  # "choose a threshold for the selection": the recipe has one


def _select(context: RunContext, overwrite: bool) -> Report:
    from cytosae.concepts import select_latents

    return select_latents(context.path(CONCEPTS), context.recipe.selection_config, overwrite=overwrite)


def _compare(section: Section, place: str, context: RunContext, overwrite: bool) -> Report:
    from cytosae.compare import compare

    return compare(
        context.path(BARCODES),
        context.path(place),
        compare_config(section),
        overwrite=overwrite,
        progress=context.progress,
    )


def _probe(section: Section, place: str, context: RunContext, overwrite: bool) -> Report:
    from cytosae.probe import probe

    return probe(
        context.path(BARCODES),
        context.path(place),
        probe_config(section),
        caches=[context.path(CACHE)],
        sae=None if context.recipe.uses_sae else context.path(SAE_FOLDER),
        workers=context.workers,
        overwrite=overwrite,
        progress=context.progress,
        token_progress=context.progress,
    )


def _stability(context: RunContext, overwrite: bool) -> Report:
    from cytosae.relations import write_stability

    runs = [context.path(SAE_FOLDER), context.path(SECOND_SAE)]
    return write_stability(runs, context.path(STABILITY), overwrite=overwrite, progress=context.progress)


def _build_atlas(context: RunContext, overwrite: bool) -> Report:
    from cytosae.atlas import build_atlas

    names = [f"{COMPARE}/{section['name']}" for section in context.recipe.compare]
    places = [context.path(name) for name in names if name not in context.left_out]
    has_stability = _has_second_seed(context.recipe) and STABILITY not in context.left_out
    stability = context.path(STABILITY) if has_stability else None
    evidence: dict[str, Any] = {name: context.path(name) for name in evidence_in(context.out)}
    return build_atlas(
        context.path(BARCODES),
        context.path(CONCEPTS),
        [context.path(LATENTS)],
        context.path(ATLAS),
        context.recipe.atlas_config,
        comparisons=[place for place in places if find_header(place) is not None],
        stability=None if stability is None or find_header(stability) is None else stability,
        **evidence,
        stage_one=context.stage_one,
        overwrite=overwrite,
        progress=context.progress,
    )
