"""Which pages an atlas has: latents, their reference images, the cells of patients, and all these images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cytosae.concepts import FILE, read_selection
from stores.errors import DamagedStore, StoreNotFound

from .cohort import Cohort
from .config import AtlasConfig
from .examples import Examples, find_examples
from .inputs import Inputs
from .pseudonyms import Pseudonyms

_ROWS = 4096  # latents
LISTED = 50  # of each top list of a comparison: Fig. 5 of the paper
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class References:
    """The reference images of all latents with a page, ordered by latent, dataset and rank; arrays of equal length."""

    latent: Ints
    dataset: Ints  # number in the order of the concepts
    rank: Ints
    image: Ints  # image_index
    value: npt.NDArray[np.float64]  # image activation
    label: Sequence[str]  # "" without a label


@dataclass(frozen=True, eq=False)
class Plan:
    """The latents and images that have pages, and their order."""

    latents: Ints  # with a page, increasing
    selection: Sequence[int]  # latents of `select_latents`, in its order; empty without a selection
    clusters: dict[int, int]  # latent -> its cluster, of the selection
    references: References
    cells: Sequence[Sequence[int]]  # per patient: image indices
    examples: Examples  # of the latents with a page
    images: Ints  # image indices with a page (shown by concepts or patients), in the order of their numbers
    pictured: Ints  # image indices with a picture alone: patients' best cells
    numbers: (
        Ints  # number in the name of the page of each, then of those with a picture alone: the index or a pseudonym
    )

    @cached_property
    def place_of(self) -> dict[int, int]:
        """Image index -> its place in `images`."""
        return {image: number for number, image in enumerate(self.images.tolist())}

    @cached_property
    def number_of(self) -> dict[int, int]:
        """Image index -> number in the name of its page, or of its picture."""
        return dict(zip([*self.images.tolist(), *self.pictured.tolist()], self.numbers.tolist(), strict=True))

    @cached_property
    def decile_maps(self) -> Ints:
        """(latents, 10, each) the number of the map of each example, after those of the reference images; -1: none."""
        is_shown = self.examples.deciles >= 0
        numbers = len(self.references.image) + np.cumsum(is_shown, dtype=np.int64).reshape(is_shown.shape) - 1
        return np.where(is_shown, numbers, -1)

    @cached_property
    def mapped(self) -> tuple[Ints, Ints]:
        """Latent and image index of every map."""
        is_shown = self.examples.deciles >= 0
        latents = np.repeat(self.latents, is_shown.sum(axis=(1, 2)))
        images = self.examples.deciles[is_shown].astype(np.int64)
        return np.concatenate([self.references.latent, latents]), np.concatenate([self.references.image, images])

    @cached_property
    def has_page(self) -> Callable[[int], bool]:
        """Does a latent have a page?"""
        return frozenset(self.latents.tolist()).__contains__


def make_plan(
    inputs: Inputs, cohort: Cohort, config: AtlasConfig, pseudonyms: Pseudonyms | None, *, further: Sequence[Ints] = ()
) -> Plan:
    """Choose latents and images. Without pseudonyms, images keep the order of the stores.

    further : indices of images that other pages show

    Raises
    ------
    StoreNotFound
        If the pages of the selected latents are asked for, and there is neither a selection nor a comparison.
    DamagedStore
        If the concepts name images that the latent stores do not have.
    """
    selection, clusters = _selection(inputs)
    latents = _latents(inputs, config, selection)
    references = _references(inputs, latents, config.n_images)
    cells = cohort.cells(config.patient_images, seed=config.seed)
    of_patients = np.array([image for of_patient in cells for image in of_patient], np.int64)
    examples = find_examples(
        inputs,
        cohort,
        latents,
        (references.latent, references.image),
        per_decile=config.decile_images,
        n_near=config.near_misses,
        seed=config.seed,
    )
    shown = [_known(examples.deciles), _known(examples.near)]
    images = np.unique(np.concatenate([references.image, of_patients, *shown, *further]))
    pictured = np.setdiff1d(_known(examples.best), images)
    if pseudonyms is not None:
        images, pictured = (
            some[pseudonyms.order([inputs.image_ids[image] for image in some])] for some in (images, pictured)
        )
    return Plan(
        latents=latents,
        selection=selection,
        clusters=clusters,
        references=references,
        cells=cells,
        examples=examples,
        images=images,
        pictured=pictured,
        numbers=np.concatenate([images, pictured]) if pseudonyms is None else np.arange(len(images) + len(pictured)),
    )


def _known(images: npt.NDArray[np.int32]) -> Ints:
    """The different image indices, without -1; row by row, as there may be more of them than fit the memory."""
    found = np.zeros(0, np.int64)
    for first in range(0, len(images), _ROWS):
        found = np.union1d(found, images[first : first + _ROWS].ravel())
    return found[found >= 0].astype(np.int64)


def _selection(inputs: Inputs) -> tuple[list[int], dict[int, int]]:
    if not (inputs.concepts.root / FILE).exists():
        return [], {}
    found = read_selection(inputs.concepts)
    return found.latents, dict(zip(found.latents, found.table["cluster"].to_pylist(), strict=True))


def _latents(inputs: Inputs, config: AtlasConfig, selection: Sequence[int]) -> Ints:
    if config.pages == "all":
        return np.arange(inputs.n_latents)
    if config.pages == "top":
        means = inputs.concepts.latents()["mean_activation"].to_numpy().reshape(-1, inputs.n_latents).max(axis=0)
        order = np.argsort(-means, kind="stable")[: config.top]  # ties: the lower number first
        return np.sort(order[means[order] > 0])
    chosen = set(selection)
    for number in range(len(inputs.comparisons)):
        table = inputs.comparison_table(number)
        for name in ("rank_a", "rank_b"):
            ranks = table[name].to_numpy(zero_copy_only=False)
            chosen |= set(np.flatnonzero(ranks <= LISTED).tolist())  # NaN is not
    if not chosen:
        raise StoreNotFound(
            f"no selection in {inputs.concepts.root} and no comparison, so no latent is selected; make a selection "
            f"with cyto concept select {inputs.concepts.root}, or choose --pages top"
        )
    return np.array(sorted(chosen), np.int64)


def _references(inputs: Inputs, latents: Ints, n_images: int) -> References:
    table = inputs.concepts.all_top_images
    numbers = table["latent"].to_numpy(), table["rank"].to_numpy(), table["image_index"].to_numpy()
    chosen = np.flatnonzero(np.isin(numbers[0], latents) & (numbers[1] <= n_images))
    table = table.take(pa.array(chosen))
    latent, rank, image = (array[chosen] for array in numbers)
    codes = {name: number for number, name in enumerate(inputs.concepts.datasets)}
    dataset = np.array([codes.get(name, -1) for name in table["dataset"].to_pylist()], np.int64)
    known = (dataset >= 0) & (image >= 0) & (image < inputs.first_images[-1])
    ids = table["image_id"].to_pylist()
    if not known.all() or any(inputs.image_ids[at] != name for at, name in zip(image.tolist(), ids, strict=True)):
        raise DamagedStore(
            f"{inputs.concepts.root}/top_images.parquet names images that the latent stores do not have at that place; "
            f"cyto concept stats --overwrite makes it again"
        )
    order = np.lexsort((rank, dataset, latent))
    labels = table["label"].to_pylist()
    return References(
        latent=latent[order],
        dataset=dataset[order],
        rank=rank[order],
        image=image[order],
        value=table["value"].to_numpy()[order].astype(np.float64),
        label=[labels[at] or "" for at in order],
    )
