"""The latents that experts are asked about and the pictures they see: review.json and review/*.jpg of an atlas.

`review.json` also contains the answers (cluster, list, labels); questions.py decides which fields a reviewer may see.
Pictures are named by the hash of their content, so a name reveals no label.
"""

import base64
import hashlib
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cytosae.concepts import Selection
from cytosae.maps import Map, Pixels, Sources, patch_map, read_tokens, require_same_sae
from stores.concept_store import ConceptStore
from stores.errors import BadInput, SpecMismatch
from stores.files import sha256_json
from stores.progress import Progress
from stores.result_folder import ResultStore
from stores.tables import column

REVIEW_FILE = "review"  # .json in the folder of the atlas
REVIEW_PICTURES = "review"  # folder of pictures there
NEGLIGIBLE = 0.2  # |Hedges' g| below which a difference counts as near zero (Cohen's bound of a small effect)
_LONGEST = 360  # pixels along the longer side of a picture
_QUALITY = 90  # of JPEG
Examples = Callable[[Sequence[int]], Mapping[int, Sequence[int]]]
Evidence = dict[str, Any]  # of one latent, as it stands in review.json
Int = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class ReviewConfig:
    """The number of images, listed latents and decoys of a review."""

    n_images: int = 6  # reference images per latent and dataset
    n_top: int = 50  # latents of each top list of a comparison
    n_decoys: int = 50  # latents that are in neither top list, mixed with them
    seed: int = 0  # of the draw of decoys

    def __post_init__(self) -> None:
        for name, least in (("n_images", 1), ("n_top", 1), ("n_decoys", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise BadInput(f"{name} must be at least {least}; found {getattr(self, name)}")


@dataclass(frozen=True)
class ReviewFile:
    """The content of review.json, and the images that cannot be shown, each with the reason."""

    content: dict[str, Any]
    unseen: list[str]


def make_review(
    concepts: ConceptStore,
    sources: Sources,
    folder: Path,
    config: ReviewConfig,
    *,
    selection: Selection | None = None,
    comparisons: Sequence[ResultStore] = (),
    examples: Examples | None = None,
    progress: Progress = lambda done, total, state: None,
) -> ReviewFile:
    """The questions of a review: is a selected latent a meaningful concept; for which disease is a latent specific?

    Writes the pictures to `folder`/review; the caller writes the content to `folder`/review.json. Each image is read
    once, even if it is a reference image of several latents.

    Parameters
    ----------
    folder : the folder of the atlas
    comparisons : folders of `cyto compare`, of the same SAE
    examples : finds images from the whole range of the activation of some latents (increasing numbers): latent -> image
        indices through all latent stores, the strongest first; None: only reference images are shown

    Raises
    ------
    SpecMismatch
        If the concepts are of another SAE than the latents, or a comparison has another number of latents.
    """
    require_same_sae(concepts, sources)
    questions = _questions(concepts, config, selection, comparisons)
    latents = _latents(questions)
    weaker = {} if examples is None else examples(latents)
    evidence, unseen = _evidence(
        concepts, sources, latents, weaker, folder / REVIEW_PICTURES, config.n_images, progress
    )
    for question in questions:
        shown = [item for item in question["items"] if evidence[str(item["latent"])]["rows"]]
        question["n_without_images"] = len(question["items"]) - len(shown)
        question["items"] = shown
    return ReviewFile({"questions": questions, "latents": evidence}, unseen)


def estimate_pictures(
    concepts: ConceptStore,
    sources: Sources,
    config: ReviewConfig,
    *,
    selection: Selection | None = None,
    comparisons: Sequence[ResultStore] = (),
    examples: Examples | None = None,
    most: int,
) -> tuple[int, int]:
    """(number, bytes) of the pictures that `make_review` would write, estimated from `most` of them."""
    latents = _latents(_questions(concepts, config, selection, comparisons))
    weaker = {} if examples is None else examples(latents)
    top = {sources.find(row["image_id"]) for row in _top_images(concepts, latents, config.n_images)}
    images = sorted(top | {place for place, _ in _weaker_images(sources, weaker)})
    if not images:
        return 0, 0
    few = [images[at] for at in np.unique(np.linspace(0, len(images) - 1, most).astype(int))]
    pictures = [sources.pictures[number](image_index) for number, image_index in few]
    sizes = [len(_jpeg(picture)) for picture in pictures if not isinstance(picture, str)]
    return round(len(images) * len(sizes) / len(few)), round(len(images) * sum(sizes) / len(few))


# --------------------------------------------------------------------------------------------------- the questions


def _questions(
    concepts: ConceptStore, config: ReviewConfig, selection: Selection | None, comparisons: Sequence[ResultStore]
) -> list[dict[str, Any]]:
    questions = [] if selection is None else [_meaningful(concepts, selection)]
    return questions + [_specific(concepts, comparison, config) for comparison in comparisons]


def _latents(questions: Sequence[dict[str, Any]]) -> list[int]:
    """The latents of all questions, increasing."""
    return sorted({item["latent"] for question in questions for item in question["items"]})


def _meaningful(concepts: ConceptStore, selection: Selection) -> dict[str, Any]:
    columns = ("latent", "cluster", "frequency", "mean_activation")
    question = {"question": "meaningful", "concepts": concepts.identity, "comparison": None}
    items = [
        {"item": item_id(question, row["latent"]), **{name: row[name] for name in columns}}
        for row in selection.table.to_pylist()
    ]
    return {**question, "cluster_sizes": list(selection.cluster_sizes), "items": items}


def _specific(concepts: ConceptStore, comparison: ResultStore, config: ReviewConfig) -> dict[str, Any]:
    table = comparison.table("differential")
    if table.num_rows != concepts.n_latents:
        raise SpecMismatch(
            f"{comparison.root} compares {table.num_rows:,} latents, {concepts.root} has {concepts.n_latents:,}; give "
            f"a comparison of the same SAE"
        )
    n_images = _images_by_latent(concepts)
    listed = {group: _top(table, f"rank_{group}", config.n_top) for group in ("a", "b")}
    decoys = choose_decoys(table, n_images, np.concatenate(list(listed.values())), config.n_decoys, seed=config.seed)
    question = {"question": "specific", "concepts": concepts.identity, "comparison": comparison.header.identity}
    items = [
        {
            "item": item_id(question, int(latent)),
            "latent": int(latent),
            "group": group,
            "n_images": int(n_images[latent]),
        }
        for group, latents in (*listed.items(), ("decoy", decoys))
        for latent in latents
    ]
    names = {name: str(comparison.header.spec[name]) for name in ("a", "b")}
    return {**question, **names, "n_decoys_wanted": config.n_decoys, "items": items}


def item_id(question: dict[str, Any], latent: int) -> str:
    """The id of a latent in a question: equal when the atlas is built again, and independent of the answer."""
    asked = [question[name] for name in ("question", "concepts", "comparison")]
    return sha256_json([*asked, latent])[:16]


def choose_decoys(table: pa.Table, n_images: Int, listed: Int, n_decoys: int, *, seed: int) -> Int:
    """Latents of neither top list, matched to the listed ones in frequency, with a difference near zero.

    For each of `n_decoys` listed latents, in random order, the nearest latent in log10 of the number of images is drawn
    without replacement; ties are broken at random. Fewer decoys if there are not enough latents.

    Parameters
    ----------
    table : differential.parquet, row i latent i
    n_images : shape (n_latents,): images in which each is active; a latent with 0 is no decoy

    Returns
    -------
    The latents, increasing.
    """
    g = table["hedges_g"].to_numpy(zero_copy_only=False).astype(np.float64)  # NaN: equal within each group
    is_near_zero = np.where(np.isnan(g), table["difference"].to_numpy() == 0, np.abs(g) < NEGLIGIBLE)
    is_near_zero[listed] = False
    rng = np.random.default_rng(seed)
    free = rng.permutation(np.flatnonzero(is_near_zero & (n_images > 0)))
    chosen: list[int] = []
    for latent in np.resize(rng.permutation(listed), n_decoys if len(listed) else 0)[: len(free)]:
        nearest = int(np.abs(np.log10(n_images[free]) - math.log10(max(1, n_images[latent]))).argmin())
        chosen.append(int(free[nearest]))
        free = np.delete(free, nearest)
    return np.array(sorted(chosen), np.int64)


def _images_by_latent(concepts: ConceptStore) -> Int:
    """(n_latents,) number of images in which each latent is active, over all datasets."""
    found = concepts.latents()["n_images"].to_numpy()
    return np.asarray(found.reshape(-1, concepts.n_latents).sum(0), np.int64)


def _top(table: pa.Table, rank: str, n_top: int) -> Int:
    """The latents with ranks 1 to `n_top`, in this order."""
    ranks = table[rank].to_numpy(zero_copy_only=False).astype(np.float64)  # NaN where there is none
    chosen = np.flatnonzero(ranks <= n_top)
    return chosen[np.argsort(ranks[chosen])]


# ---------------------------------------------------------------------------------------------------- the evidence


def _evidence(
    concepts: ConceptStore,
    sources: Sources,
    latents: Sequence[int],
    weaker: Mapping[int, Sequence[int]],
    folder: Path,
    n_images: int,
    progress: Progress,
) -> tuple[dict[str, Evidence], list[str]]:
    """Reference images and weaker ones with maps, by latent; and the images that cannot be shown, with reasons."""
    top = _top_images(concepts, latents, n_images)
    by_image: dict[tuple[int, int], list[dict[str, Any]]] = {}  # (store, image_index): rows of `top`
    for row in top:
        by_image.setdefault(sources.find(row["image_id"]), []).append(row)
    for place, row in _weaker_images(sources, weaker):
        by_image.setdefault(place, []).append(row)
        top.append(row)
    folder.mkdir(parents=True, exist_ok=True)
    unseen: list[str] = []
    for n_done, (number, image_index) in enumerate(sorted(by_image)):
        progress(n_done, len(by_image), "")
        rows = by_image[number, image_index]
        picture = sources.pictures[number](image_index)
        file = None if isinstance(picture, str) else write_picture(picture, folder)
        if isinstance(picture, str):
            unseen.append(f"{rows[0]['image_id']}: {picture}")
        tokens, layout = read_tokens(sources.stores[number], image_index), sources.stores[number].layout
        for row in rows:
            row |= {"file": file, "map": patch_map(tokens, row["latent"], layout)}
    progress(len(by_image), len(by_image), "")

    of_latent: dict[int, list[dict[str, Any]]] = {latent: [] for latent in latents}
    for row in top:
        of_latent[row["latent"]].append(row)
    return {str(latent): _as_json(rows) for latent, rows in of_latent.items()}, unseen


def _top_images(concepts: ConceptStore, latents: Sequence[int], n_images: int) -> list[dict[str, Any]]:
    """Rows of top_images.parquet: the first `n_images` of each latent in each dataset."""
    table = concepts.all_top_images
    is_asked = pc.is_in(table["latent"], pa.array(latents, pa.int64()))
    return list(table.filter(pc.and_(is_asked, pc.less_equal(table["rank"], n_images))).to_pylist())


def _weaker_images(
    sources: Sources, weaker: Mapping[int, Sequence[int]]
) -> Iterator[tuple[tuple[int, int], dict[str, Any]]]:
    """((store, row in it), image) of each example, by latent, the strongest first."""
    firsts = np.cumsum([0, *(store.spec.n_images for store in sources.stores)])
    columns = [[column(store.images, name) for name in ("image_id", "label")] for store in sources.stores]
    for latent, images in weaker.items():
        for image in images:
            number = int(np.searchsorted(firsts, image, side="right")) - 1
            row = int(image - firsts[number])
            ids, labels = columns[number]
            found = {"latent": latent, "dataset": None, "image_id": str(ids[row]), "label": labels[row] or None}
            yield (number, row), found


def _as_json(top: list[dict[str, Any]]) -> Evidence:
    """The top images of one latent, by dataset, their maps on one scale."""
    largest = max((float(row["map"].max()) for row in top), default=0.0)
    by_dataset: dict[str | None, list[dict[str, Any]]] = {}
    for row in top:
        image = {"file": row["file"], "patches": encode_map(row["map"], largest), "label": row["label"]}
        by_dataset.setdefault(row["dataset"], []).append(image)
    weaker = by_dataset.pop(None, [])
    return {
        "largest": largest,
        "rows": [{"dataset": dataset, "images": images} for dataset, images in by_dataset.items()],
        **({"range": weaker} if weaker else {}),
    }


def write_picture(pixels: Pixels, folder: Path) -> str:
    """Write a JPEG with a longer side of at most 360 pixels; returns its name, a hash of its content."""
    data = _jpeg(pixels)
    name = f"{hashlib.sha256(data).hexdigest()[:32]}.jpg"
    (folder / name).write_bytes(data)
    return name


def _jpeg(pixels: Pixels) -> bytes:
    from PIL import Image

    picture = Image.fromarray(pixels)
    picture.thumbnail((_LONGEST, _LONGEST), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=_QUALITY)
    return data.getvalue()


def encode_map(patches: Map, largest: float) -> str:
    """Base64 of one byte per patch, row by row: 255 is `largest`; 0 only if the latent is inactive (rounded up)."""
    shares = patches.ravel() / largest if largest > 0 else np.zeros(patches.size)
    return base64.b64encode(np.ceil(np.clip(shares, 0, 1) * 255).astype(np.uint8).tobytes()).decode()
