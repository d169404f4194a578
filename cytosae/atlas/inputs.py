"""The stores that an atlas is made from, and the checks that they belong together."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cytosae.maps import Sources
from cytosae.review import Opinion, read_opinions
from stores.barcode_store import BarcodeStore
from stores.concept_store import ConceptStore
from stores.errors import BadInput, SpecMismatch
from stores.latent_store import LatentStore
from stores.result_folder import ResultStore
from stores.spec import COMPARISON, NEIGHBOURS, Header
from stores.tables import column

from .evidence import EvidenceStores, open_evidence
from .other_atlas import OtherAtlas, open_other


@dataclass(frozen=True, eq=False)
class Inputs:
    """The inputs of all pages. The index of an image counts through all latent stores, in their order."""

    concepts: ConceptStore
    barcodes: BarcodeStore
    tau: float
    sources: Sources
    comparisons: Sequence[ResultStore]
    neighbours: ResultStore | None
    evidence: EvidenceStores = field(default_factory=EvidenceStores)
    other: OtherAtlas | None = None  # an atlas that is shown beside this one
    opinions: dict[int, Opinion] | None = None  # of a review, by latent; None: not given

    @property
    def n_latents(self) -> int:
        """Latents of the SAE."""
        return self.concepts.n_latents

    @property
    def stores(self) -> Sequence[LatentStore]:
        """The latent stores, in the order of the image indices."""
        return self.sources.stores

    @cached_property
    def first_images(self) -> npt.NDArray[np.int64]:
        """(stores + 1,): image_index at which each store begins, and the number of all images."""
        return np.cumsum([0, *(store.spec.n_images for store in self.stores)])

    def place(self, image_index: int) -> tuple[int, int]:
        """(store, row in it) of an image."""
        number = int(np.searchsorted(self.first_images, image_index, side="right")) - 1
        return number, image_index - int(self.first_images[number])

    @cached_property
    def image_ids(self) -> list[str]:
        """Of all images."""
        return [str(name) for store in self.stores for name in column(store.images, "image_id")]

    @property
    def is_trained(self) -> bool:
        """False if a backbone with random weights made the tokens."""
        return all(bool(store.spec.cache.get("trained", True)) for store in self.stores)

    @property
    def headers(self) -> list[tuple[str, str, Header]]:
        """(what it is, the name of its folder, header) of every input, for the provenance page."""
        found = [("barcodes", self.barcodes.root, self.barcodes.header)]
        found += [("concepts", self.concepts.root, self.concepts.header)]
        found += [("latents", Path(store.root), store.header) for store in self.stores]
        found += [("comparison", each.root, each.header) for each in self.comparisons]
        found += [] if self.neighbours is None else [("neighbours", self.neighbours.root, self.neighbours.header)]
        found += self.evidence.headers
        if self.other is not None:
            found += [("atlas beside", self.other.store.root, self.other.store.header)]
        if self.other is not None and self.other.match is not None:
            found += [("match", self.other.match.root, self.other.match.header)]
        return [(what, root.name, header) for what, root, header in found]

    def comparison_table(self, number: int) -> pa.Table:
        """`differential.parquet` of a comparison: row i is latent i.

        Raises
        ------
        DamagedStore, SpecMismatch
            If it was changed, or has another number of rows.
        """
        table = self.comparisons[number].table("differential")
        if table.num_rows != self.n_latents:
            raise SpecMismatch(
                f"{self.comparisons[number].root} compares {table.num_rows:,} latents, the atlas has {self.n_latents:,}"
            )
        return table


def open_inputs(
    barcodes: Path,
    concepts: Path,
    sources: Sources,
    *,
    comparisons: Sequence[Path] = (),
    neighbours: Path | None = None,
    beside: Path | None = None,
    match: Path | None = None,
    tau: float | None = None,
    causes: Path | None = None,
    stability: Path | None = None,
    score: Path | None = None,
    masks: Path | None = None,
    names: Path | None = None,
    replications: Sequence[Path] = (),
    reviews: Path | None = None,
) -> Inputs:
    """Open the stores of an atlas; `build_atlas` says what each of them is.

    Raises
    ------
    SpecMismatch
        If one of them was not made from the same latents as the others.
    BadInput
        If the barcodes hold several tau and none was chosen, or two comparisons are of the same diseases.
    """
    compared = [ResultStore(root, COMPARISON) for root in comparisons]
    inputs = Inputs(
        concepts=ConceptStore(concepts),
        barcodes=BarcodeStore(barcodes),
        tau=_tau(BarcodeStore(barcodes), tau),
        sources=sources,
        comparisons=compared,
        neighbours=None if neighbours is None else ResultStore(neighbours, NEIGHBOURS),
        evidence=open_evidence(
            sae_sha256=sources.stores[0].spec.sae_sha256,
            latents=sources.identities,
            comparisons=[each.header.identity for each in compared],
            causes=causes,
            stability=stability,
            score=score,
            masks=masks,
            names=names,
            replications=replications,
        ),
        other=_other(BarcodeStore(barcodes), sources, beside, match),
        opinions=None if reviews is None else read_opinions(reviews, ConceptStore(concepts).identity),
    )
    _check_latents(inputs)
    _check_comparisons(inputs)
    for store in inputs.stores:
        _ = store.layout.side  # raises where maps cannot be drawn
    folder = inputs.neighbours
    if folder is not None and folder.header.spec["sae_sha256"] != inputs.stores[0].spec.sae_sha256:
        raise SpecMismatch(
            f"{folder.root} is of another SAE ({folder.header.spec['sae_sha256']:.12}…) than {inputs.stores[0].root} "
            f"({inputs.stores[0].spec.sae_sha256:.12}…); give neighbours of the SAE that the latents were made with"
        )
    return inputs


def _other(barcodes: BarcodeStore, sources: Sources, beside: Path | None, match: Path | None) -> OtherAtlas | None:
    if beside is None:
        if match is not None:
            raise BadInput("a match needs the atlas of its second side: give it with --beside")
        return None
    sae = sources.stores[0].spec.sae_sha256
    return open_other(beside, match, barcodes=barcodes.header.identity, sae_sha256=sae)


def _tau(barcodes: BarcodeStore, tau: float | None) -> float:
    barcodes.path("patient", tau)  # raises, and names those that exist
    return barcodes.taus[0] if tau is None else tau


def _check_latents(inputs: Inputs) -> None:
    """All inputs must have the same latent stores in the same order, since image indices depend on it."""
    given = inputs.sources.identities
    for root, header in (
        (inputs.concepts.root, inputs.concepts.header),
        (inputs.barcodes.root, inputs.barcodes.header),
    ):
        stated = header.spec.get("latents")
        stated = [stated] if isinstance(stated, str) else stated
        if stated != given:
            raise SpecMismatch(
                f"{root} was made from other latents than {', '.join(str(store.root) for store in inputs.stores)}; "
                f"give --latents once for each store that it was made from, in the same order"
            )
    sets = [str(header.spec["token_set"]) for header in (inputs.concepts.header, inputs.barcodes.header)]
    if sets[0] != sets[1]:
        raise SpecMismatch(
            f"{inputs.concepts.root} speaks of the token set {sets[0]}, {inputs.barcodes.root} of {sets[1]}; "
            f"make one of them again with --token-set of the other"
        )


def _check_comparisons(inputs: Inputs) -> None:
    seen: dict[tuple[str, str], Path] = {}
    for each in inputs.comparisons:
        spec = each.header.spec
        if spec["barcodes"] != inputs.barcodes.header.identity or spec["tau"] != inputs.tau:
            raise SpecMismatch(
                f"{each.root} compares other barcodes, or at another tau ({spec['tau']:g}), than "
                f"{inputs.barcodes.root} at {inputs.tau:g}; compare these with cyto compare"
            )
        pair = (str(spec["a"]), "rest" if spec["b_is_rest"] else str(spec["b"]))
        if pair in seen:
            raise BadInput(f"{seen[pair]} and {each.root} compare the same diseases; give one of them")
        seen[pair] = each.root
