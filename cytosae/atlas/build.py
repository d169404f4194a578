"""From stores to a folder of web pages; or an estimate of its pages and bytes without writing."""

import html
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cytosae.concepts import read_selection
from cytosae.maps import Pixels, Places, Sources, as_sources, unseen_warnings
from cytosae.review import (
    REVIEW_FILE,
    REVIEW_PICTURES,
    ReviewConfig,
    estimate_pictures,
    make_review,
    opinions_identity,
)
from cytosae.stage_one import StageOne
from stores.activation_store import one_or_more
from stores.errors import SpecMismatch
from stores.files import sha256_json
from stores.progress import Progress
from stores.result_folder import ResultStore, begin_results
from stores.spec import ATLAS, cyto_version
from stores.tables import parquet_bytes
from stores.wording import Report, counted

from .beside_pages import find_pairs, write_beside_pages
from .cards import original_pictures, write_cards, written_pictures
from .cell_choice import CellChoice, choose_cells
from .cell_maps import Marks
from .cohort import Cohort
from .concept_maps import Maps
from .concept_pages import write_concept_pages
from .concept_table import concept_table
from .config import AtlasConfig
from .disease_pages import write_disease_pages, write_families
from .examples import find_examples
from .frames import Frames
from .gallery import Gallery, make_gallery
from .image_pages import write_images, write_pictured
from .inputs import Inputs, open_inputs
from .lies_on import PatchKinds, rules_of
from .matched_concepts import Pairs
from .other_atlas import NAME as CONCEPTS
from .overview_pages import write_overview
from .pair_pages import write_pair_pages
from .patient_pages import write_patient_list, write_patient_pages
from .plan import Plan, make_plan
from .pseudonyms import Pseudonyms, hide_order, pseudonyms_file, read_pseudonyms, write_pseudonyms
from .saved_rows import estimate_saved_rows, write_saved_rows
from .site import Site, copy_static

_SAMPLE = 8  # pages of each kind that an estimate renders in memory
_EMPTY_IMAGE = 310  # bytes of data/image-<n>.js of an image without any active latent


@dataclass(frozen=True, kw_only=True)
class AtlasResult(Report):
    """What was built, or would be."""

    out: Path | None  # the folder; of an estimate perhaps None
    is_written: bool  # False of an estimate
    pseudonyms: bool  # are patients called by pseudonyms?
    counts: dict[str, int]  # pages by kind
    n_files: int
    n_bytes: int  # an estimate, if nothing was written
    unseen: list[str]  # images that could not be shown, and why
    was_complete: bool = False

    def to_json(self) -> dict[str, Any]:
        """What `cyto atlas build --json` prints."""
        return {
            "atlas": str(self.out),
            "written": self.is_written,
            **self.stored(),
            "was_complete": self.was_complete,
        }

    def stored(self) -> dict[str, Any]:
        """What the header of the folder says of the result."""
        return {name: getattr(self, name) for name in ("counts", "n_files", "n_bytes", "unseen")}

    @property
    def warnings(self) -> tuple[str, ...]:
        """Images that could not be shown."""
        return unseen_warnings(self.unseen, "--images")

    def lines(self) -> Iterator[str]:
        """Pages, files and bytes; where the key of the pseudonyms is, and what to open."""
        counts = ", ".join(counted(number, kind.removesuffix("s")) for kind, number in self.counts.items())
        about = "" if self.is_written else "about "
        size = f"{about}{self.n_files:,} files, {about}{self.n_bytes / 1e6:,.1f} MB"
        yield f"{self.out or 'atlas'}: pages of {counts}; {size}"
        if not self.is_written or self.out is None:
            yield "nothing was written"
            return
        if self.pseudonyms:
            key = pseudonyms_file(self.out)
            yield f"who is who, and the key: {key}; keep it, and never give it away with the atlas"
        yield f"open {self.address}"

    @property
    def address(self) -> str:
        """Of the first page, for a browser; empty of an estimate."""
        return (self.out / "index.html").absolute().as_uri() if self.is_written and self.out is not None else ""

    def _repr_html_(self) -> str:
        link = html.escape(self.address)
        return super()._repr_html_() + (f'<p><a href="{link}">{link}</a></p>' if link else "")


def build_atlas(
    barcodes: Path | str,
    concepts: Path | str,
    latents: Sources | Places,
    out: Path | str,
    config: AtlasConfig | None = None,
    *,
    comparisons: Path | str | Sequence[Path | str] = (),
    neighbours: Path | str | None = None,
    causes: Path | str | None = None,
    reviews: Path | str | None = None,
    stability: Path | str | None = None,
    score: Path | str | None = None,
    masks: Path | str | None = None,
    names: Path | str | None = None,
    replications: Path | str | Sequence[Path | str] = (),
    beside: Path | str | None = None,
    match: Path | str | None = None,
    stage_one: StageOne | None = None,
    roots: Path | str | Sequence[Path | str] = (),
    overwrite: bool = False,
    progress: Progress = lambda done, total, state: None,
) -> AtlasResult:
    """Write the atlas to the folder `out`: web pages of concepts, images, patients and diseases, read without a server.

    With pseudonyms, `out`.pseudonyms.csv beside it says who is who. If that file exists already, it decides the
    pseudonyms: an atlas that is built again keeps them.

    Memory: statistics of all latents, examples of those with a page (examples.py), one image, a thousand latents of all
    patients. Maps of images lie in an unnamed temporary file in `out`.

    Parameters
    ----------
    barcodes : a folder of `write_barcodes`
    concepts : a folder of `concept_statistics`
    latents : the latent stores that both were made from, in the same order: paths (then with `stage_one`), or opened
        by `open_sources`
    config : which latents have pages, how many images, pseudonyms; None: `AtlasConfig()`
    comparisons : folders of `compare`
    neighbours : a folder of `write_neighbours`
    causes : a folder of `ablate_latents`
    reviews : a folder of verdicts (`open_server`), which the cards of the overview then show
    stability : a folder of `write_stability`, of this SAE and others
    score : a folder of `score_sae`
    masks : a folder of `write_mask_agreement`
    names : a folder of `describe_latents`; they are free text of others, shown also with pseudonyms
    replications : folders of `replicate`, of the given comparisons
    beside : another atlas, whose concepts are shown beside those of this one: of another SAE or layer with `match`, or
        of the same SAE in other images
    match : a folder of `match_latents`, from the barcodes of this atlas to those of the other
    stage_one : `cytocache.bridge`, which reads the images
    roots : folder of the images of each latent store; none: as recorded when the caches were made
    progress : steps done, steps in all: two for each image and each latent with a page, one for each patient

    Raises
    ------
    StoreNotFound
        If an input does not exist, or the pages of selected latents are wanted and none were selected.
    SpecMismatch
        If the inputs were not made from the same latents; if `out` holds another atlas (and not `overwrite`), or
        something else; or `out`.pseudonyms.csv is not ours.
    BadInput
        If the barcodes hold several tau and none was chosen, or two comparisons are of the same diseases.
    DamagedStore
        If an input is damaged.
    """
    config = config or AtlasConfig()
    sources = as_sources(latents, stage_one, roots)
    one = {"neighbours": neighbours, "causes": causes, "stability": stability, "score": score, "masks": masks}
    one |= {"reviews": reviews, "beside": beside, "match": match, "names": names}
    comparisons, replications = one_or_more(comparisons), one_or_more(replications)
    inputs = _open(barcodes, concepts, sources, config, comparisons, replications, one)
    more = [each for each in one.values() if each is not None]
    given = [barcodes, concepts, *sources.places, *comparisons, *replications, *more]
    return write_atlas(
        inputs, Path(out), config, overwrite=overwrite, given=[Path(each) for each in given], progress=progress
    )


def _open(
    barcodes: Path | str,
    concepts: Path | str,
    sources: Sources,
    config: AtlasConfig,
    comparisons: Sequence[Path | str],
    replications: Sequence[Path | str],
    one: Mapping[str, Path | str | None],
) -> Inputs:
    return open_inputs(
        Path(barcodes),
        Path(concepts),
        sources,
        tau=config.tau,
        comparisons=[Path(each) for each in comparisons],
        replications=[Path(each) for each in replications],
        **{name: None if path is None else Path(path) for name, path in one.items()},
    )


def write_atlas(
    inputs: Inputs,
    out: Path,
    config: AtlasConfig | None = None,
    *,
    overwrite: bool = False,
    given: Sequence[Path] = (),
    progress: Progress = lambda done, total, state: None,
) -> AtlasResult:
    """Write the atlas of inputs that are open; `build_atlas` opens them from paths, and says more.

    Parameters
    ----------
    given : the paths that `inputs` were read from, which `out` must not contain

    Raises
    ------
    StoreNotFound, SpecMismatch, DamagedStore
        As `build_atlas`.
    """
    config = config or AtlasConfig()
    pseudonyms = read_pseudonyms(pseudonyms_file(out)) if config.pseudonyms else None
    cohort, choice, plan = _prepare(inputs, config, pseudonyms)
    writer = begin_results(
        out,
        ATLAS,
        _spec(inputs, config, plan, pseudonyms),
        overwrite=overwrite,
        inputs=given,
        packages=("numpy", "jinja2", "pillow"),
    )
    writer.watch(*(header for _, _, header in inputs.headers))
    if pseudonyms is not None:
        images = sorted((number, image) for image, number in plan.number_of.items())
        called = [(f"image {number}", inputs.image_ids[image]) for number, image in images]
        patients = zip(cohort.names, cohort.real_names, strict=True)
        write_pseudonyms(pseudonyms_file(out), pseudonyms, [*patients, *called])
    if writer.is_complete:
        return ResultStore(out, ATLAS).result(
            AtlasResult, out=out, is_written=True, pseudonyms=config.pseudonyms, was_complete=True
        )

    began = time.time_ns()
    site = Site(writer.root)
    frames, gallery = _frames(inputs, config, cohort, choice, plan, site.root), make_gallery(inputs, cohort, plan)
    pairs = _pairs(frames)
    n_steps = 2 * len(plan.images) + len(plan.pictured) + 2 * len(plan.latents) + cohort.n_patients
    n_before = 0
    unseen = frames.maps.unseen
    pictures = written_pictures(writer.root, plan, unseen)
    for n_all, steps in (
        (2 * len(plan.images), write_images(site, frames)),
        (len(plan.pictured), write_pictured(site, frames)),
        (len(plan.latents), write_cards(site, plan, gallery.images, pictures)),  # of the pictures above
        (len(plan.latents), write_concept_pages(site, frames, pairs=pairs)),
        (cohort.n_patients, write_patient_pages(site, frames)),
    ):
        for done in steps:
            progress(n_before + done, n_steps, "")
        n_before += n_all
    _write_other_pages(site, frames, gallery, pairs)
    write_saved_rows(site, frames)
    _write_provenance(site, frames, writer.header.spec, identity=writer.header.identity)
    copy_static(site)

    writer.write_table(CONCEPTS, concept_table(frames))
    site.take_in_file(f"{CONCEPTS}.parquet")
    writer.write_json(REVIEW_FILE, _review(frames, writer.root))
    site.take_in(REVIEW_PICTURES)
    writer.write_table("files", site.table())
    if pseudonyms is not None:
        hide_order(writer.root, began)
    result = AtlasResult(
        out=out,
        is_written=True,
        pseudonyms=config.pseudonyms,
        counts=_counts(frames),
        n_files=site.n_files(),
        n_bytes=site.n_bytes(),
        unseen=[
            f"{frames.image_name(image)}: {unseen[image]}" for image in sorted(unseen, key=plan.number_of.__getitem__)
        ],
    )
    sae = inputs.stores[0].spec.sae_sha256
    latents = plan.latents.tolist()
    writer.finish({"result": result.stored(), "latents": latents, "selection": list(plan.selection), "sae_sha256": sae})
    return result


def estimate_atlas(
    barcodes: Path | str,
    concepts: Path | str,
    latents: Sources | Places,
    out: Path | str | None = None,
    config: AtlasConfig | None = None,
    *,
    comparisons: Path | str | Sequence[Path | str] = (),
    neighbours: Path | str | None = None,
    causes: Path | str | None = None,
    reviews: Path | str | None = None,
    stability: Path | str | None = None,
    score: Path | str | None = None,
    masks: Path | str | None = None,
    names: Path | str | None = None,
    replications: Path | str | Sequence[Path | str] = (),
    beside: Path | str | None = None,
    match: Path | str | None = None,
    stage_one: StageOne | None = None,
    roots: Path | str | Sequence[Path | str] = (),
) -> AtlasResult:
    """What `build_atlas` would write: pages are counted, bytes extrapolated from a few pages that are made in memory.

    The latents of the images' tokens, which are most of an atlas with many images, are counted exactly. Arguments and
    errors are those of `build_atlas`; `out` is only named in the result.
    """
    config = config or AtlasConfig()
    sources = as_sources(latents, stage_one, roots)
    one = {"neighbours": neighbours, "causes": causes, "stability": stability, "score": score, "masks": masks}
    one |= {"reviews": reviews, "beside": beside, "match": match, "names": names}
    comparisons, replications = one_or_more(comparisons), one_or_more(replications)
    inputs = _open(barcodes, concepts, sources, config, comparisons, replications, one)
    return _estimate(inputs, None if out is None else Path(out), config)


def _estimate(inputs: Inputs, out: Path | None, config: AtlasConfig) -> AtlasResult:
    cohort, choice, plan = _prepare(inputs, config, Pseudonyms("any") if config.pseudonyms else None)
    site = Site(None)
    few = (
        plan.images[np.unique(np.linspace(0, len(plan.images) - 1, _SAMPLE).astype(int))] if len(plan.images) else None
    )
    frames, gallery = _frames(inputs, config, cohort, choice, plan, None), make_gallery(inputs, cohort, plan)
    if few is not None:
        _run(write_images(site, frames, chosen=few))
    n_pictured = sum(1 for _ in write_pictured(site, frames, most=_SAMPLE))
    _run(write_cards(site, plan, gallery.images, original_pictures(inputs, config.pixels), most=_SAMPLE))
    pairs = _pairs(frames)
    _run(write_concept_pages(site, frames, pairs=pairs, most=_SAMPLE))
    _run(write_patient_pages(site, frames, most=_SAMPLE))
    _write_other_pages(site, frames, gallery, pairs)
    _write_provenance(site, frames, _spec(inputs, config, plan, None), identity="")
    copy_static(site)
    site.write(f"{CONCEPTS}.parquet", bytes(parquet_bytes(concept_table(frames))))  # most of its maps are still empty
    wanted = {
        "images/": len(plan.images),
        "pictures/": (len(plan.images) + len(plan.pictured))
        * site.n_files("pictures/")
        // max(1, site.n_files("images/") + n_pictured),
        "cards/": sum(len(numbers) > 0 for numbers in gallery.images),
        "concepts/": len(plan.latents),
        "patients/": cohort.n_patients,
    }
    n_bytes, n_files = site.n_bytes(), site.n_files()
    of_rows = estimate_saved_rows(frames, site.n_bytes("pictures/") / max(1, site.n_files("pictures/")))
    for folder, n_wanted in wanted.items():
        n_there = site.n_files(folder)
        n_bytes += round(site.n_bytes(folder) * (n_wanted / n_there - 1)) if n_there else 0
        n_files += n_wanted - n_there if n_there else 0
    if few is not None:  # token data scale with the number of nonzeros
        of_few, n_in_few = site.n_bytes("data/image-"), _n_values(inputs, few)
        per_value = (of_few - _EMPTY_IMAGE * len(few)) / n_in_few if n_in_few else 4.0
        n_bytes += round(_EMPTY_IMAGE * len(plan.images) + per_value * _n_values(inputs, plan.images)) - of_few
        n_files += len(plan.images) - len(few)
    of_review = estimate_pictures(inputs.concepts, inputs.sources, **_asked(frames), most=_SAMPLE)
    return AtlasResult(
        out=out,
        is_written=False,
        pseudonyms=config.pseudonyms,
        counts=_counts(frames),
        n_files=n_files + of_rows[0] + of_review[0],
        n_bytes=n_bytes + of_rows[1] + of_review[1],
        unseen=[],
    )


def _n_values(inputs: Inputs, images: Any) -> int:
    """Nonzeros of all tokens of some images."""
    n_values = 0
    for image in images.tolist():
        number, row = inputs.place(image)
        starts = inputs.stores[number].image_indptr
        n_values += int(starts[row + 1] - starts[row])
    return n_values


def _prepare(inputs: Inputs, config: AtlasConfig, pseudonyms: Pseudonyms | None) -> tuple[Cohort, CellChoice, Plan]:
    cohort = Cohort(inputs.barcodes, inputs.tau, pseudonyms=pseudonyms)
    if len(cohort.patient_of) != inputs.first_images[-1] or cohort.n_latents != inputs.n_latents:
        raise SpecMismatch(
            f"{inputs.barcodes.root} has {len(cohort.patient_of):,} images and {cohort.n_latents:,} latents, "
            f"the latent stores {inputs.first_images[-1]:,} and {inputs.n_latents:,}"
        )
    choice = choose_cells(inputs, cohort, config)
    return cohort, choice, make_plan(inputs, cohort, config, pseudonyms, further=[choice.images])


def _spec(inputs: Inputs, config: AtlasConfig, plan: Plan, pseudonyms: Pseudonyms | None) -> dict[str, Any]:
    return {
        "barcodes": inputs.barcodes.header.identity,
        "concepts": inputs.concepts.identity,
        "latents": inputs.sources.identities,
        "comparisons": [each.header.identity for each in inputs.comparisons],
        "neighbours": None if inputs.neighbours is None else inputs.neighbours.header.identity,
        **inputs.evidence.spec,
        **({} if inputs.other is None else {"beside": inputs.other.identities}),
        **({} if inputs.opinions is None else {"reviews": opinions_identity(inputs.opinions)}),
        "selection": sha256_json(list(plan.selection)),
        **asdict(replace(config, tau=inputs.tau)),
        **({} if pseudonyms is None else {"pseudonyms_key_sha256": pseudonyms.fingerprint}),
    }


def _frames(
    inputs: Inputs, config: AtlasConfig, cohort: Cohort, choice: CellChoice, plan: Plan, folder: Path | None
) -> Frames:
    """All that pages are drawn from; maps and marks are still empty. folder : that of an atlas that is written."""
    maps = _maps(inputs, plan, folder)
    return Frames(
        inputs=inputs,
        config=config,
        cohort=cohort,
        plan=plan,
        choice=choice,
        marks=Marks(choice.marks, inputs.stores[0].layout.n_patches),
        maps=maps,
        shared=_shared(inputs, cohort, config, maps),
    )


def _shared(inputs: Inputs, cohort: Cohort, config: AtlasConfig, maps: Maps) -> dict[str, Any]:
    """Template variables of all pages."""
    return {
        "sizes": maps.sizes,  # all are known when the pages of concepts and patients are written
        "is_trained": inputs.is_trained,
        "pseudonyms": config.pseudonyms,
        "has_patients": cohort.n_patients > 0,
        "has_diseases": bool(cohort.diseases),
        "has_other": inputs.other is not None,
        "unit": _unit(inputs),
        "version": cyto_version(),
        "atlas_of": _atlas_of(inputs),
    }


def _atlas_of(inputs: Inputs) -> str:
    """What every page and every saved picture calls the atlas: its datasets and sizes."""
    names = [*inputs.concepts.datasets]
    named = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{named}: {counted(int(inputs.first_images[-1]), 'image')}, {counted(inputs.n_latents, 'latent')}"


def _unit(inputs: Inputs) -> str:
    words = {"all": "tokens", "patch": "patches", "cls": "CLS tokens", "register": "registers"}
    tokens = words[inputs.barcodes.header.spec["token_set"]]
    per = "image" if inputs.barcodes.header.spec["normalize"] == "images" else "latent (as released)"
    return f"{tokens} above {inputs.tau:g} per {per}"


def _maps(inputs: Inputs, plan: Plan, folder: Path | None) -> Maps:
    """Empty maps, and of an atlas that is written (`folder`) what tells ground and nuclei, from some pictures."""
    layout = inputs.stores[0].layout

    def find(image: int) -> Pixels | str:
        number, row = inputs.place(image)
        return inputs.sources.pictures[number](row)

    rules = None if folder is None else rules_of(plan.images, find, layout.side)
    kinds = PatchKinds(len(plan.images), layout.side, rules)
    return Maps(len(plan.mapped[0]), layout.n_patches, folder, kinds=kinds)


def _pairs(frames: Frames) -> Pairs | None:
    return None if frames.inputs.other is None else find_pairs(frames, frames.inputs.other)


def _write_other_pages(site: Site, frames: Frames, gallery: Gallery, pairs: Pairs | None) -> None:
    """The pages whose number does not grow with images or patients."""
    write_overview(site, frames, gallery)
    write_patient_list(site, frames)
    write_disease_pages(site, frames)
    write_families(site, frames)
    write_pair_pages(site, frames)
    if pairs is not None:
        write_beside_pages(site, frames, pairs)
    site.page(
        "words.html",
        "words.html",
        **frames.shared,
        layout=frames.inputs.stores[0].layout,
        rules=frames.maps.kinds.rules,
    )


def _write_provenance(site: Site, frames: Frames, spec: dict[str, Any], *, identity: str) -> None:
    stores = [
        {
            "what": what,
            "name": "" if frames.config.pseudonyms else name,  # a folder name may contain a patient's name
            "identity": header.identity,
            "created_by": header.created_by,
            "spec": header.spec,
            "hashes": _hashes(header.summary or {}),
        }
        for what, name, header in frames.inputs.headers
    ]
    site.page("provenance.html", "provenance.html", **frames.shared, identity=identity, spec=spec, stores=stores)


def _review(frames: Frames, folder: Path) -> dict[str, Any]:
    """The questions of `cyto atlas serve` and their pictures; no patient and no image is named in them."""
    return make_review(
        frames.inputs.concepts,
        frames.inputs.sources,
        folder,
        **_asked(frames),
    ).content  # images that cannot be shown are already listed for the pages


def _asked(frames: Frames) -> dict[str, Any]:
    """The arguments that the review and its estimate share."""
    return {
        "config": ReviewConfig(seed=frames.config.seed),
        "selection": read_selection(frames.inputs.concepts) if frames.plan.selection else None,
        "comparisons": frames.inputs.comparisons,
        "examples": lambda latents: _of_each_tenth(frames.inputs, frames.cohort, frames.config, latents),
    }


def _of_each_tenth(inputs: Inputs, cohort: Cohort, config: AtlasConfig, latents: Sequence[int]) -> dict[int, list[int]]:
    """Latent -> an image of each tenth of its activation, the strongest first; decoys have theirs, too."""
    if not latents:
        return {}
    nothing = np.zeros(0, np.int64), np.zeros(0, np.int64)
    rows = np.array(latents, np.int64)
    found = find_examples(inputs, cohort, rows, nothing, per_decile=1, n_near=0, seed=config.seed)
    images = found.deciles[:, ::-1, 0].tolist()
    return {latent: [image for image in some if image >= 0] for latent, some in zip(latents, images, strict=True)}


def _hashes(summary: dict[str, Any]) -> dict[str, str]:
    """File -> SHA-256, as recorded in a header."""
    found = {
        str(name): str(sha256) for key in ("files", "exports") for name, sha256 in (summary.get(key) or {}).items()
    }
    if summary.get("journal_sha256"):
        found["journal.jsonl"] = str(summary["journal_sha256"])
    return found


def _counts(frames: Frames) -> dict[str, int]:
    return {
        "concepts": len(frames.plan.latents),
        "images": len(frames.plan.images),
        "patients": frames.cohort.n_patients,
        "diseases": len(frames.cohort.diseases),
        "pairs": len(frames.inputs.comparisons),
    }


def _run(steps: Iterable[int]) -> None:
    """Exhaust a generator of progress steps."""
    for _ in steps:
        pass
