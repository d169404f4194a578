"""Changes latents inside the backbone and writes what follows: survey, matched latents, edits, effects, curves.

    survey     one pass over the latents: frequencies, norms, the first active images of each latent
    match      for each chosen latent the others of the nearest frequency and norm
    edit       only images in which a latent is active: its own ones, round the patients
    curves     the first k latents of an order removed, or alone kept
    tables     effects over patients with intervals, beside controls

What was surveyed and measured lies in part files until the tables are written, so an interrupted command continues.
"""

import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cytosae.sae import SaeRun, load_sae
from cytosae.stage_one import StageOne, require_stage_one
from stores.activation_store import ActivationStore
from stores.devices import resolve_device
from stores.errors import BadInput, DamagedStore, SpecMismatch
from stores.files import sha256_file
from stores.latent_store import LatentStore
from stores.part_files import open_part, write_part
from stores.progress import Progress
from stores.result_folder import ResultStore, ResultWriter, begin_results
from stores.spec import ABLATION, check_choice, check_latent
from stores.tables import listed
from stores.token_sets import TOKEN_SETS, chosen_tokens
from stores.wording import counted

from .cls_probe import ClsProbe, Labels, fit_probe, read_labels
from .config import AblateConfig
from .effects import control_table, curve_table, effect_table, image_table, rank_latents
from .encoded import EncodedLatents, cached_tokens
from .figures import plot_curves, plot_effects
from .matching import matched_latents
from .measure import Bench, embed_images, measure, seconds_per_edit
from .places import Bools, Ints, Owners, Places, owners_of, read_patches, round_the_patients
from .plan import CHOSEN, Plan, plan_curves, plan_latents
from .readout import ProbeReadout, open_probe
from .report import AblateResult
from .survey import LatentSource, StoredLatents, Survey, take_survey

_PARTS = "parts"  # folder of the part files, removed at the end
_TRIED = 8  # images that are timed before the survey


def _silent(done: int, total: int, state: str) -> None:
    pass


def ablate_latents(
    run: Path | str,
    cache: Path | str,
    out: Path | str,
    config: AblateConfig,
    *,
    latents: Path | str | None = None,
    images: Path | str | None = None,
    weights: str | None = None,
    probe: Path | str | None = None,
    patches: Path | str | None = None,
    stage_one: StageOne | None = None,
    device: str = "auto",
    workers: int | None = None,
    assume_compatible: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
    download_progress: Progress = _silent,
    survey_progress: Progress = _silent,
    progress: Progress = _silent,
) -> AblateResult:
    """Change latents of the SAE `run` at the tokens of `cache`, run the later blocks, and write the effects to `out`.

    For each chosen latent: the change of the final CLS embedding (and of a probe) in images in which it is active,
    averaged over patients with 95% intervals, beside latents of the nearest frequency and norm that are changed in the
    same way in their own images, and beside random directions of the same norm at the same tokens. The SAE's own error
    is added back, so that a latent that is not changed changes nothing.

    Memory: the SAE, the backbone, one chunk of the cache, a batch of edited tokens, and for each of the SAE's latents
    `config.n_images` numbers.

    Parameters
    ----------
    latents : a latent store of this cache and SAE, read instead of encoding the cache; None: the cache is encoded
    images : folder of the images: blocks before the cache's are run again, in float32; None: the cached tokens, float16
    weights : the file of the trained backbone; an untrained one needs none
    probe : a folder of `probe` whose saved model reads barcodes of this SAE
    patches : a table with image_id and patch: only these patches are edited, and only these images are looked at
    stage_one : `cytocache.bridge`, which runs the backbone
    workers : with `images`, processes that read them; None: one for each core
    assume_compatible : accept an imported SAE, which does not say which tokens it was trained on
    say : called with a line that says time and memory, before the survey and before the edits
    survey_progress, progress : called with images, done and in all

    Raises
    ------
    SpecMismatch
        If cache, SAE, latents, probe or weights do not belong together, or `out` holds something else.
    BadInput
        If a latent does not exist or is active in no image, the backbone has no CLS token, `stage_one` is missing, or
        the backbone's numbers become NaN or infinite.
    DamagedStore
        If an input is damaged.
    """
    stage_one, device, out = require_stage_one(stage_one), resolve_device(device), Path(out)
    store, sae = ActivationStore(cache), load_sae(run, device=device)
    assumed = sae.require_tokens(store.spec, f"the cache {cache}", assume_compatible=assume_compatible)
    if not store.spec.layout.n_cls:
        raise BadInput(f"the backbone {store.spec.backbone} has no CLS token, so no edit can be seen in its final CLS")
    for latent in config.latents:
        check_latent(latent, sae.model.n_latents, run)
    stored = None if latents is None else _open_latents(latents, store, sae)
    token_set = config.token_set or str(sae.header.spec.get("config", {}).get("token_set", "all"))
    check_choice("token_set", token_set, TOKEN_SETS)
    places = _places(store, token_set, None if patches is None else Path(patches), f"the tokens of {cache}")
    least = stored.spec.min_activation if stored else 0.0
    readout = None if probe is None else open_probe(Path(probe), store, sae.sha256, sae.model.n_latents, least)

    owners = owners_of(store.images)
    labels = read_labels(store.images, config.target, owners) if config.target else None

    spec = {
        **asdict(config),
        "latents": list(config.latents),
        "curve": list(config.curve),
        "token_set": token_set,
        "cache_sha256": store.content_sha256,
        "sae_sha256": sae.sha256,
        "latent_store": None if stored is None else stored.identity,
        "from_images": images is not None,
        "probe": None if readout is None else readout.header.identity,
        "patches_sha256": None if patches is None else sha256_file(Path(patches)),
    }
    inputs = [Path(each) for each in (run, cache, latents, probe) if each is not None and "://" not in str(each)]
    writer = begin_results(out, ABLATION, spec, overwrite=overwrite, inputs=inputs, packages=("torch", "numpy"))
    headers = [store.header, sae.header, *([stored.header] if stored else []), *([readout.header] if readout else [])]
    writer.watch(*headers)
    if writer.is_complete:
        return read_ablation(out, was_complete=True)

    final_cls, from_images = stage_one.backbone_rest(
        cache,
        root=None if images is None else Path(images),
        weights=weights,
        device=device,
        workers=workers,
        download_progress=download_progress,
    )
    job = _Job(config, store, sae, stored, places, owners, readout, final_cls, from_images, device, token_set, labels)
    return _run(job, writer, out, assumed, say, survey_progress, progress)


def read_ablation(root: Path | str, *, was_complete: bool = False) -> AblateResult:
    """The result in a folder of `ablate_latents`.

    Raises
    ------
    StoreNotFound, IncompleteStore, SpecMismatch, DamagedStore
        If there is no finished ablation, or a file was changed.
    """
    store = ResultStore(root, ABLATION)
    has_curves = "curves.parquet" in (store.header.summary or {}).get("files", {})
    return store.result(
        AblateResult,
        out=Path(root),
        effects=store.table("effects"),
        curves=store.table("curves") if has_curves else None,
        was_complete=was_complete,
    )


@dataclass(frozen=True)
class _Job:
    config: AblateConfig
    store: ActivationStore
    sae: SaeRun
    stored: LatentStore | None
    places: Places
    owners: Owners
    probe: ProbeReadout | None
    final_cls: Callable[[torch.Tensor], torch.Tensor]  # of tokens behind the later blocks
    from_images: (
        Callable[[Ints], Iterator[torch.Tensor]] | None
    )  # tokens of images, in their order; None: the cached ones
    device: str
    token_set: str
    labels: Labels | None

    @property
    def source(self) -> LatentSource:
        return EncodedLatents(self.store, self.sae.model) if self.stored is None else StoredLatents(self.stored)

    def outputs(self, images: Ints) -> Iterator[tuple[int, npt.NDArray[np.floating]]]:
        """(image index, its tokens at the block)."""
        if self.from_images is None:
            yield from cached_tokens(self.store, images)
        elif len(images):
            for image, tokens in zip(images.tolist(), self.from_images(images), strict=True):
                yield image, tokens.cpu().numpy()


def _run(
    job: _Job,
    writer: ResultWriter,
    out: Path,
    assumed: Sequence[str],
    say: Callable[[str], None],
    survey_progress: Progress,
    progress: Progress,
) -> AblateResult:
    config, parts = job.config, writer.root / _PARTS
    identity = writer.header.identity
    parts.mkdir(exist_ok=True)
    images, order = _images(job)
    survey = _survey(job, images, order, parts, identity, say, survey_progress)
    chosen = np.array(config.latents, np.int64)
    silent = [f"{latent:,}" for latent in config.latents if not survey.n_images_active[latent]]
    if silent:
        raise BadInput(
            f"{len(silent):,} of {len(chosen):,} latents are active in none of {len(images):,} images "
            f"({listed(silent)}): a change of them changes nothing; leave them out"
        )
    decoder = job.sae.model.W_dec.detach()
    decoder_norms = decoder.double().norm(dim=1).cpu().numpy()
    norms = survey.norms(decoder_norms)
    empty = [f"{latent:,}" for latent in config.latents if not norms[latent]]
    if empty:
        raise BadInput(f"the decoder row of latent {listed(empty)} is zero: it adds nothing to a token; leave it out")
    controls_of = {
        latent: matched_latents(latent, chosen, survey.n_images_active, norms, config.n_controls, config.seed)
        for latent in config.latents
    }
    controls = np.unique(np.concatenate(list(controls_of.values())))
    bench = Bench(
        source=job.source,
        outputs=job.outputs,
        final_cls=job.final_cls,
        decoder=decoder,
        norms=decoder_norms,
        places=job.places,
        survey=survey,
        config=config,
        probe=job.probe,
        device=job.device,
        owner_of=job.owners.of_image,
    )
    if job.labels is not None:
        bench = replace(bench, cls_probe=_cls_probe(job, bench, images, order, parts, identity, progress))
    singles = plan_latents(survey.images, chosen, controls, config.n_directions)
    of_curves = np.sort(images[np.argsort(order[images])][: config.curve_images])
    curves = plan_curves(of_curves, config.curve, len(chosen)) if config.curve and config.curve_images else None
    say(_cost(job, bench, singles, curves))
    plans = [plan for plan in (singles, curves) if plan is not None]
    n_all, n_before = sum(len(plan.images) for plan in plans), 0
    values, ranked = [], chosen
    for number, plan in enumerate(plans):
        folder = parts / ("singles", "curves")[number]
        folder.mkdir(exist_ok=True)

        def tell(
            done: int, total: int, state: str, before: int = n_before, what: str = ("latents", "curves")[number]
        ) -> None:
            progress(before + done, n_all, what)

        values.append(measure(plan, bench, ranked, folder, identity, progress=tell))
        n_before += len(plan.images)
        if number == 0:
            ranked = rank_latents(plan, values[0], job.owners, chosen)

    effects = effect_table(singles, values[0], bench.quantities, job.owners, survey, norms, controls_of, config)
    writer.write_table("effects", effects)
    plot_effects(effects, writer.root / "effects")
    held = control_table(singles, values[0], bench.quantities, job.owners, survey, norms, controls_of)
    writer.write_table("controls", held)
    table = None
    if curves is not None:
        table = curve_table(curves, values[1], bench.quantities, job.owners, config)
        writer.write_table("curves", table)
        plot_curves(table, writer.root / "curves")
    writer.write_table("images", image_table(plans, values, bench.quantities, job.store.images, job.owners))
    shutil.rmtree(parts)
    edited = np.unique(np.concatenate([plan.image for plan in plans]))
    without = np.array([not job.owners.names[owner] for owner in job.owners.of_image[edited]], bool)
    result: dict[str, Any] = {
        "mode": config.mode,
        "token_set": job.token_set,
        "n_images_surveyed": survey.n_images,
        "n_images_edited": len(edited),
        "n_edits": sum(len(plan) for plan in plans),
        "n_without_patient": int(without.sum()),
        "matches": [_match(latent, controls, survey, norms) for latent, controls in controls_of.items()],
        "assumed_equal": list(assumed),
        "probe_accuracy": None if bench.cls_probe is None else bench.cls_probe.balanced_accuracy,
    }
    writer.finish({"result": result})
    return AblateResult(out=out, effects=effects, curves=table, was_complete=False, **result)


def _images(job: _Job) -> tuple[Ints, Ints]:
    """The images to look at, rising; and the place of every image of the cache in the order round the patients."""
    may = job.places.images(job.store.readable())
    if not len(may):
        raise BadInput(f"no readable image of {job.store.root} has a token that may be edited")
    drawn = round_the_patients(may, job.owners, [job.config.seed, 0])
    order = np.empty(job.store.spec.n_images, np.int64)
    others = np.setdiff1d(np.arange(len(order)), may)
    order[drawn], order[others] = np.arange(len(drawn)), len(drawn) + np.arange(len(others))
    some = drawn[: job.config.sample] if job.config.sample else drawn
    return np.sort(some), order


def _cls_probe(
    job: _Job, bench: Bench, images: Ints, order: Ints, parts: Path, tag: str, progress: Progress
) -> ClsProbe:
    """The probe of the final CLS embedding; the embeddings are kept until the tables are written."""
    assert job.labels is not None
    labelled = images[job.labels.of_image[images] >= 0]
    some = np.sort(labelled[np.argsort(order[labelled])][: job.config.probe_images])
    path = parts / "cls.part"
    try:
        embedded = np.array(open_part(path, tag, verify=True)["embedded"])
    except DamagedStore:
        embedded = embed_images(some, bench, progress)
        write_part(path, tag, {"embedded": embedded})
    return fit_probe(embedded, some, job.labels, job.owners, job.config.seed)


def _survey(
    job: _Job, images: Ints, order: Ints, parts: Path, tag: str, say: Callable[[str], None], progress: Progress
) -> Survey:
    path, n_latents = parts / "survey.part", job.sae.model.n_latents
    try:
        found = {name: np.array(array) for name, array in open_part(path, tag, verify=True).arrays.items()}
        n_images, n_tokens = found.pop("sizes").tolist()
        say(f"the survey of {counted(n_images, 'image')} is there already")
        return Survey(n_images, n_tokens, **found)
    except DamagedStore:
        pass
    say(_survey_cost(job, images))
    survey = take_survey(
        job.source,
        images,
        job.places,
        order,
        n_latents=n_latents,
        n_kept=job.config.n_images,
        progress=progress,
    )
    write_part(path, tag, survey.arrays())
    return survey


def _survey_cost(job: _Job, images: Ints) -> str:
    some = images[:_TRIED]
    for _ in range(2):  # the first round also reads files for the first time
        began = time.perf_counter()
        for _ in job.source.rows(some):
            pass
        seconds = time.perf_counter() - began
    how = "read from the latents" if job.stored is not None else "encoded"
    probe = ""
    if job.labels is not None:
        n = min(job.config.probe_images, int((job.labels.of_image[images] >= 0).sum()))
        probe = (
            f", and {counted(n, 'image')} for the probe of {job.config.target!r} run through the later blocks, "
            f"{_duration(n * _seconds_per_image(job, some[:2]))}"
        )
    return (
        f"{counted(len(images), 'image')} are {how}, {_duration(seconds / len(some) * len(images))}{probe}; memory "
        f"about {_memory(job) / 1e9:.1f} GB; the edits are timed after that"
    )


@torch.inference_mode()
def _seconds_per_image(job: _Job, images: Ints) -> float:
    """To read an image and run it through the later blocks without an edit: the last one counts."""
    seconds, began = 0.0, time.perf_counter()
    for _, tokens in job.outputs(images):
        x_TD = torch.as_tensor(np.asarray(tokens, np.float32), device=job.device)
        float(job.final_cls(x_TD[None]).sum())
        seconds, began = time.perf_counter() - began, time.perf_counter()
    return seconds


def _memory(job: _Job) -> int:
    """Bytes: weights, the survey, a chunk of the cache, the dense latents of an image, a batch, Python and torch."""
    model, spec = job.sae.model, job.store.spec
    weights = sum(each.numel() * each.element_size() for each in model.state_dict().values())
    survey = model.n_latents * 8 * (4 + 2 * job.config.n_images)
    image = 4 * spec.tokens_per_image * model.n_latents * 2
    backbone = 4 * 12 * spec.width**2 * spec.n_blocks  # all blocks are loaded, also where only the later ones run
    return weights + survey + spec.chunk_bytes + image + backbone + (700 << 20)


def _cost(job: _Job, bench: Bench, singles: Plan, curves: Plan | None) -> str:
    n_edits = len(singles) + (len(curves) if curves is not None else 0)
    images = np.unique(np.concatenate([singles.image, *([curves.image] if curves is not None else [])]))
    _, tokens = next(iter(cached_tokens(job.store, images[:1])))
    x_TD = torch.from_numpy(tokens.astype(np.float32)).to(job.device)
    seconds = seconds_per_edit(x_TD, bench.final_cls, job.device)
    return (
        f"{n_edits:,} edits of {counted(len(images), 'image')} ({int((singles.role == CHOSEN).sum()):,} of the chosen "
        f"latents, the others are what they are held against) run through the later blocks, "
        f"{_duration(n_edits * seconds)} and the reading of the images"
    )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"about {math.ceil(seconds)} s"
    return f"about {math.ceil(seconds / 60):,} min" if seconds < 5400 else f"about {seconds / 3600:,.1f} h"


def _open_latents(latents: Path | str, store: ActivationStore, sae: SaeRun) -> LatentStore:
    """The latent store, which must be of this SAE and this cache."""
    found = LatentStore(latents)
    for name, stated, ours, what in (
        ("sae_sha256", found.spec.sae_sha256, sae.sha256, f"the SAE {sae.root}"),
        ("cache_sha256", found.spec.cache_sha256, store.content_sha256, f"the cache {store.root}"),
    ):
        if stated != ours:
            raise SpecMismatch(
                f"{latents} was not made from {what} ({name} {stated:.12}…, found {ours:.12}…); give the latents of "
                f"both, or leave out --latents"
            )
    return found


def _places(store: ActivationStore, token_set: str, patches: Path | None, place: str) -> Places:
    layout = store.spec.layout
    tokens: Bools = np.zeros(layout.tokens_per_image, bool)
    tokens[chosen_tokens(token_set, layout, place)] = True
    return Places(tokens) if patches is None else read_patches(patches, store.images, layout, tokens)


def _match(latent: int, controls: Ints, survey: Survey, norms: npt.NDArray[np.float64]) -> dict[str, Any]:
    """How far the controls' medians are from the latent's own frequency and norm, as factors."""
    return {
        "latent": latent,
        "n_controls": len(controls),
        "frequency_ratio": float(np.median(survey.n_images_active[controls]) / survey.n_images_active[latent]),
        "norm_ratio": float(np.median(norms[controls]) / norms[latent]),
    }
