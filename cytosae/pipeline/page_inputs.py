"""The stores and results of a run, as far as they are there, for the report."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from cytosae.compare import Comparison
from cytosae.maps import Sources, open_sources
from cytosae.stage_one import StageOne
from stores.activation_store import ActivationStore
from stores.barcode_store import BarcodeStore
from stores.concept_store import ConceptStore
from stores.errors import BadInput, IncompleteStore, StoreNotFound
from stores.latent_store import LatentStore
from stores.result_folder import ResultStore
from stores.spec import ATLAS, COMPARISON, PROBE, SAE, STABILITY, VERSUS, Header, read_header

from . import stages
from .cohort import read_cohort
from .journal import Journal
from .recipe import FILE, Recipe, Section, read_recipe

_T = TypeVar("_T")


@dataclass(eq=False)
class RunFolder:
    """A run, open for reading. What is missing is None, and named in `missing`."""

    root: Path
    recipe: Recipe
    stage_one: StageOne | None
    left_out: dict[str, str]  # analyses that the data do not allow: planned and found
    missing: list[str] = field(default_factory=list)
    short: list[str] = field(default_factory=list)  # the run in a few sentences
    numbers: list[tuple[str, str]] = field(default_factory=list)  # for the head of the page

    def _open(self, what: str, place: str, make: Callable[[Path], _T]) -> _T | None:
        try:
            return make(self.root / place)
        except (StoreNotFound, IncompleteStore):
            self.missing.append(what)
            return None

    @cached_property
    def cache(self) -> ActivationStore | None:
        """The activation cache."""
        return self._open("the activation cache", stages.CACHE, ActivationStore)

    @cached_property
    def sae(self) -> Header | None:
        """The header of the SAE."""
        place = stages.sae_place(self.recipe, self.root)
        return self._open("the SAE", place, lambda path: read_header(path, SAE))

    @property
    def sae_folder(self) -> Path:
        """Where the SAE lies."""
        return self.root / stages.sae_place(self.recipe, self.root)

    @cached_property
    def latents(self) -> LatentStore | None:
        """The latents of every token."""
        return self._open("the latents", stages.LATENTS, LatentStore)

    @cached_property
    def barcodes(self) -> BarcodeStore | None:
        """The barcodes."""
        return self._open("the barcodes", stages.BARCODES, BarcodeStore)

    @cached_property
    def concepts(self) -> ConceptStore | None:
        """The statistics of latents."""
        return self._open("the concepts", stages.CONCEPTS, ConceptStore)

    @cached_property
    def comparisons(self) -> list[tuple[Section, Comparison]]:
        """The comparisons that were made, in the order of the recipe."""
        found = []
        for section in self.recipe.compare:
            name = stages.comparison_stage(self.recipe, section)
            if name in self.left_out:
                continue
            place = self.root / stages.COMPARE / section["name"]
            store = self._open(name, f"{stages.COMPARE}/{section['name']}", lambda path: ResultStore(path, COMPARISON))
            if store is not None:
                found.append((section, Comparison(out=place, results=store, was_complete=True)))
        return found

    @cached_property
    def probes(self) -> list[tuple[Section, ResultStore, dict[str, Any]]]:
        """The probes that were made, with their scores."""
        found = []
        for section in self.recipe.probe:
            name = f"probe {section['name']}"
            if name in self.left_out:
                continue
            store = self._open(name, f"{stages.PROBE}/{section['name']}", lambda path: ResultStore(path, PROBE))
            if store is not None:
                found.append((section, store, dict(store.json("scores"))))
        return found

    @cached_property
    def stability(self) -> ResultStore | None:
        """The comparison of two seeds; None if it was not asked for."""
        if self.recipe.stability is None or "stability" in self.left_out:
            return None
        return self._open("stability", stages.STABILITY, lambda path: ResultStore(path, STABILITY))

    @cached_property
    def versus(self) -> ResultStore | None:
        """The SAE beside its baselines; None if nobody made it: no run asks for it."""
        if not (self.root / stages.VERSUS).is_dir():
            return None
        store = self._open("the comparison with baselines", stages.VERSUS, lambda path: ResultStore(path, VERSUS))
        sae = (self.sae.summary or {}).get("sae_sha256") if self.sae is not None else None
        if store is not None and store.header.spec["sae"] != sae:
            self.missing.append(f"the comparison with baselines in {stages.VERSUS}, which is of another SAE")
            return None
        return store

    @cached_property
    def atlas(self) -> Header | None:
        """The header of the atlas."""
        if "atlas" in self.left_out:
            return None
        return self._open("the atlas", stages.ATLAS, lambda path: read_header(path, ATLAS))

    @cached_property
    def sources(self) -> Sources | None:
        """Latents with the pixels of their images; None without stage one."""
        if self.stage_one is None or self.latents is None:
            return None
        folder = self._images_folder()
        return open_sources([self.root / stages.LATENTS], self.stage_one, roots=[] if folder is None else [folder])

    def _images_folder(self) -> Path | None:
        """The folder of the images by the recipe, so that a run that was moved finds them; None: as recorded."""
        source = self.root / self.recipe.images["source"]
        is_table = source.suffix.lower() in (".csv", ".tsv", ".txt", ".parquet")
        if is_table:
            source = self.root / self.recipe.images.get("root", source.parent)
        if is_table or source.is_dir() or self.stage_one is None:
            return source if source.exists() else None
        try:  # an archive, of which one folder may hold all images: their paths are below that
            return self.stage_one.open_images(source, root=None).root
        except BadInput:
            return None

    @property
    def has_patients(self) -> bool:
        """False if no image says whose it is."""
        return self.cache is not None and read_cohort(self.cache.images).n_patients > 0

    @property
    def is_trained(self) -> bool:
        """False if a backbone with random weights made the tokens."""
        return self.cache is None or self.cache.spec.trained


def open_run(root: Path, stage_one: StageOne | None) -> RunFolder:
    """The run in a folder.

    Raises
    ------
    BadInput
        If its recipe cannot be used.
    """
    recipe = read_recipe(root / FILE)
    names = {stage.name for stage in stages.stages_of(recipe, root)}  # the journal may know of others, of before
    found = {name: why for name, why in Journal.read(root).left_out.items() if name in names}
    return RunFolder(root, recipe, stage_one, {**recipe.left_out, **found})
