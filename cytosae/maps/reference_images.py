"""Reference images: the top images of a latent in each dataset, with its map over patches and the pixels.

Three inputs are combined: concepts (which images), latent stores (which patches), and functions from stage one that
read the pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from cytosae.barcodes import check_one_sae
from cytosae.stage_one import Picture, StageOne, require_stage_one
from stores.activation_store import one_or_more
from stores.concept_store import ConceptStore
from stores.errors import BadInput, SpecMismatch
from stores.latent_store import LatentStore
from stores.spec import Header, check_latent
from stores.tables import column, listed
from stores.wording import counted, printable

from .patch_maps import Map, Pixels, patch_map, read_tokens

Places = Path | str | Sequence[Path | str]


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One image of a figure."""

    caption: str
    picture: Pixels | str  # a str is the reason why it cannot be shown
    patches: Map
    image_id: str = ""


@dataclass(frozen=True, kw_only=True)
class FrameRow:
    """One row of images with a heading; `largest` is the upper end of their common colour scale."""

    heading: Sequence[str]  # lines
    frames: Sequence[Frame]
    largest: float
    dataset: str = ""


@dataclass(frozen=True)
class Sources:
    """Latent stores of one SAE and the pixels of their images; an image is found by its `image_id`."""

    stores: Sequence[LatentStore]
    pictures: Sequence[Picture]  # one per store
    roots: Sequence[Path] = ()  # folder of the images of each store; none: as recorded when the caches were made

    def __post_init__(self) -> None:
        check_one_sae(self.stores)

    @property
    def n_latents(self) -> int:
        """Latents of the SAE."""
        return self.stores[0].spec.n_latents

    @property
    def identities(self) -> list[str]:
        """Of the stores, in order."""
        return [store.identity for store in self.stores]

    @property
    def headers(self) -> list[Header]:
        """Of the stores, in order."""
        return [store.header for store in self.stores]

    @property
    def places(self) -> list[Path]:
        """The folders that are read, which an output must not contain."""
        return [*(Path(store.root) for store in self.stores), *self.roots]

    def find(self, image_id: str) -> tuple[int, int]:
        """(store, image_index) of an image.

        Raises
        ------
        BadInput
            If no store has it, or two have.
        """
        found = self._places.get(image_id, [])
        if len(found) != 1:
            where = listed([str(store.root) for store in self.stores])
            none = f"no image {image_id!r} in {where}; expected a value of the column image_id"
            raise BadInput(f"several stores have an image {image_id!r}; give one of {where}" if found else none)
        return found[0]

    def frame(self, at: tuple[int, int], latent: int, caption: str) -> Frame:
        """An image of a store, with the map of a latent."""
        number, image_index = at
        return Frame(
            caption=caption,
            picture=self.pictures[number](image_index),
            patches=patch_map(read_tokens(self.stores[number], image_index), latent, self.stores[number].layout),
            image_id=str(column(self.stores[number].images, "image_id")[image_index]),
        )

    @cached_property
    def _places(self) -> dict[str, list[tuple[int, int]]]:
        places: dict[str, list[tuple[int, int]]] = {}
        for number, store in enumerate(self.stores):
            for image_index, name in enumerate(column(store.images, "image_id")):
                places.setdefault(str(name), []).append((number, image_index))
        return places


def reference_rows(
    concepts: ConceptStore, sources: Sources, latent: int, *, n_images: int, datasets: Sequence[str] = ()
) -> list[FrameRow]:
    """A row for each dataset (default: all of `concepts`): the top images of a latent, all on one scale.

    Raises
    ------
    BadInput
        If there is no such latent or dataset, or an image is in none of the stores.
    """
    check_latent(latent, sources.n_latents, sources.stores[0].root)
    found: dict[str, list[Frame]] = {}
    for dataset in datasets or concepts.datasets:
        top = concepts.top_images(latent, dataset).slice(0, n_images).to_pylist()
        found[dataset] = [
            sources.frame(sources.find(row["image_id"]), latent, row["label"] or "(no label)") for row in top
        ]
    largest = max((float(frame.patches.max()) for frames in found.values() for frame in frames), default=0.0)
    return [
        FrameRow(heading=_heading(concepts, latent, dataset), frames=frames, largest=largest, dataset=dataset)
        for dataset, frames in found.items()
    ]


def check_n_images(n_images: int) -> None:
    """Raises BadInput if so many reference images cannot be shown."""
    if n_images < 1:
        raise BadInput(f"n_images must be at least 1; found {n_images}")


def unseen(rows: Sequence[FrameRow]) -> list[str]:
    """The images of a figure that cannot be shown, each with the reason."""
    return [
        f"{frame.image_id}: {frame.picture}" for row in rows for frame in row.frames if isinstance(frame.picture, str)
    ]


def open_sources(stores: Places, stage_one: StageOne, *, roots: Places = ()) -> Sources:
    """Open latent stores together with the pictures of their images.

    Parameters
    ----------
    stores : the path of one latent store, or of several
    stage_one : `cytocache.bridge`
    roots : folder of the images of each store; none: as recorded when the caches were made

    Raises
    ------
    BadInput
        If `roots` are neither none nor one for each store.
    SpecMismatch
        If the stores are not of one SAE.
    """
    paths = [stores] if isinstance(stores, Path | str) else list(stores)
    folders = [Path(root) for root in one_or_more(roots)]
    if folders and len(folders) != len(paths):
        raise BadInput(f"give a folder of images once for each store, or none; found {len(folders)} for {len(paths)}")
    opened = [LatentStore(path) for path in paths]
    pictures = [
        stage_one.pictures(store, root) for store, root in zip(opened, folders or (None,) * len(opened), strict=True)
    ]
    return Sources(opened, pictures, folders)


def as_sources(stores: Sources | Places, stage_one: StageOne | None, roots: Places = ()) -> Sources:
    """`Sources` as they are, or opened from paths, which needs `stage_one`.

    Raises
    ------
    BadInput, SpecMismatch
        As `open_sources`; also if there is no `stage_one`.
    """
    if isinstance(stores, Sources):
        return stores
    return open_sources(stores, require_stage_one(stage_one), roots=roots)


def as_concepts(concepts: ConceptStore | Path | str) -> ConceptStore:
    """The store as it is, or opened from its path."""
    return concepts if isinstance(concepts, ConceptStore) else ConceptStore(Path(concepts))


def unseen_warnings(unseen: Sequence[str], option: str) -> tuple[str, ...]:
    """That images could not be shown, and which option says where they are."""
    if not unseen:
        return ()
    names = listed([printable(name) for name in unseen])
    return (
        f"{counted(len(unseen), 'image')} could not be shown ({names}); say where they are with {option}, "
        f"and add --overwrite",
    )


def require_same_sae(concepts: ConceptStore, sources: Sources) -> None:
    """Refuse concepts of another SAE than that of the latents: equal latent numbers would be different latents.

    Raises
    ------
    SpecMismatch
        Naming both.
    """
    stated = {spec["sae_sha256"] for spec in concepts.header.spec["latents_spec"]}
    held = sources.stores[0].spec.sae_sha256
    if stated != {held}:
        raise SpecMismatch(
            f"{concepts.root} is of another SAE (sha256 {', '.join(sorted(stated)):.12}…) than "
            f"{sources.stores[0].root} ({held:.12}…); give the latents that it was made from"
        )


def _heading(concepts: ConceptStore, latent: int, dataset: str) -> list[str]:
    table = concepts.latents(dataset)
    facts = {name: table[name][latent].as_py() for name in ("frequency", "mean_activation", "label_entropy")}
    if not facts["frequency"]:
        return [dataset, "never active"]
    lines = [
        dataset,
        f"in {facts['frequency']:.2%} of images",
        f"mean activation {facts['mean_activation']:.3g}",
    ]
    return lines if facts["label_entropy"] is None else [*lines, f"label entropy {facts['label_entropy']:.2f}"]
