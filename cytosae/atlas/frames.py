"""What a template needs to draw cells: the number of an image's page, its words, its map; concepts with their cells."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from .cell_choice import Beside, CellChoice
from .cell_maps import Marks
from .cohort import Cohort
from .composition import Composition, compositions
from .concept_maps import Maps, packed_map, share_of
from .config import AtlasConfig
from .inputs import Inputs
from .lies_on import ON, on
from .plan import Plan
from .sentence import same_patch_of

_OWN = 1.3  # times the share of all families, from which on a label is a family's own


@dataclass(frozen=True, eq=False, kw_only=True)
class Frames:
    """All that pages are drawn from."""

    inputs: Inputs
    config: AtlasConfig
    cohort: Cohort
    plan: Plan
    choice: CellChoice
    marks: Marks
    maps: Maps  # says which images cannot be shown
    shared: dict[str, Any]  # template variables of all pages

    def image_name(self, image: int) -> str:
        """The name of an image on a page; its id often contains the patient's name, so pseudonyms hide it."""
        return f"image {self.plan.number_of[image]}" if self.config.pseudonyms else self.inputs.image_ids[image]

    def plain(self, image: int) -> dict[str, Any]:
        """A cell without a map: its page, name, label, patient, and why it cannot be shown."""
        patient = int(self.cohort.patient_of[image])
        return {
            "image": self.plan.number_of[image],
            "name": self.image_name(image),
            "label": self.cohort.labels[image],
            "unseen": self.maps.unseen.get(image),
            "patient": None if patient < 0 else {"number": patient, "name": self.cohort.names[patient]},
            "disease": "" if patient < 0 else self.cohort.disease_name(patient),
        }

    def mapped(self, image: int, latent: int) -> dict[str, Any]:
        """A cell with the map of a latent, one of the pairs of `marks`."""
        found = self.plain(image)
        return found | {"map": self.marks.packed(image, latent), "largest": self.marks.largest(image, latent)}

    def beside(self, latent: int, cells: Beside) -> dict[str, Any]:
        """A concept's cells on two sides, on one scale: `mine`, `others`, `scale`, and `also`, concepts left to it."""
        mine, others = ([self.mapped(image, latent) for image in side] for side in (cells.mine, cells.others))
        scale = max((each["largest"] for each in (*mine, *others)), default=0.0)
        also = [self.concept(other) for other in cells.also]
        return {"mine": mine, "others": others, "scale": scale, "also": also}

    def concept(self, latent: int) -> dict[str, Any]:
        """A concept as rows of lists name it: its number, page, name and who gave it, label, family."""
        family = int(self.choice.order.family_of[latent])
        name, named_by = self._name(latent)
        return {
            "name": name,
            "named_by": named_by,
            "latent": latent,
            "has_page": self.plan.has_page(latent),
            "label": self._labels[latent],
            "family": "" if family < 0 else numeral(family),
            "family_number": family,
        }

    def _name(self, latent: int) -> tuple[str, str]:
        """The name that experts gave, or the best of `cyto concept describe`, and who gave it; "" without one."""
        opinion = (self.inputs.opinions or {}).get(latent)
        if opinion is not None and opinion.name:
            return opinion.name, "experts"
        given = self.inputs.evidence.names
        names = () if given is None else given.of(latent)
        return (names[0].name, names[0].given_by) if names else ("", "")

    def numbers(self, latent: int) -> dict[str, float]:
        """Largest frequency and largest mean activation of a latent in any dataset."""
        return {"frequency": float(self._frequencies[latent]), "mean_activation": float(self._means[latent])}

    def references(self, latent: int, most: int) -> list[dict[str, Any]]:
        """The strongest reference images of a latent in all datasets, with their maps."""
        references = self.plan.references
        first, last = np.searchsorted(references.latent, [latent, latent + 1]).tolist()
        some = sorted(range(first, last), key=lambda at: (-references.value[at], references.image[at]))[:most]
        return [
            self.plain(int(references.image[at]))
            | {"map": packed_map(self.maps.read(at, 1)), "largest": float(self.maps.largest[at])}
            for at in some
        ]

    def portrait(self, patient: int) -> dict[str, Any] | None:
        """The most typical cell of a patient."""
        image = self.choice.portraits[patient]
        return None if image < 0 else self.plain(image)

    def families(self, most: int = 6) -> list[dict[str, Any]]:
        """The families of latents: numeral, name, number of latents, top labels, and the strongest with a page."""
        order, found = self.choice.order, []
        names = family_names(self._family_labels, [self._family_latent(number) for number in range(order.n_families)])
        references = self.plan.references
        for number in range(order.n_families):
            members = order.order[order.starts[number] : order.starts[number + 1]]
            labels, counts = np.unique([self._labels[latent] for latent in members.tolist()], return_counts=True)
            named = sorted(
                ((str(label), int(n)) for label, n in zip(labels, counts, strict=True) if label),
                key=lambda pair: (-pair[1], pair[0]),
            )
            built = members[np.isin(members, self.plan.latents)]
            best = built[np.argsort(-self._means[built], kind="stable")][:most].tolist()
            firsts = [int(np.searchsorted(references.latent, latent)) for latent in best]
            found.append(
                {"number": number, "numeral": numeral(number), "n": len(members), "n_pages": len(built)}
                | {"name": names[number]}
                | {"labels": [{"label": label, "share": n / len(members)} for label, n in named[:3]]}
                | {
                    "concepts": [
                        self.concept(latent) | {"cell": self.plain(int(references.image[at]))}
                        for latent, at in zip(best, firsts, strict=True)
                        if at < len(references.latent) and references.latent[at] == latent
                    ]
                }
            )
        return found

    def same_patch(self, latent: int) -> tuple[int, int] | None:
        """As `same_patch_of`, of a latent's reference images; None without a page."""
        first, last = np.searchsorted(self.plan.references.latent, [latent, latent + 1]).tolist()
        return same_patch_of(self.maps.read(first, last - first)) if last > first else None

    @cached_property
    def composition(self) -> Composition:
        """The labels of each patient's images."""
        return compositions(self.cohort)

    @cached_property
    def _family_labels(self) -> list[dict[str, int]]:
        """Of each family the top labels of its latents, with the number of latents."""
        order, found = self.choice.order, []
        for first, last in pairwise(order.starts.tolist()):
            labels = [self._labels[latent] for latent in order.order[first:last].tolist()]
            found.append(dict(Counter(label for label in labels if label)))
        return found

    def _family_latent(self, number: int) -> str:
        """The name of a family's strongest latent: of those with a name, else with a page, else of all."""
        order = self.choice.order
        members = order.order[order.starts[number] : order.starts[number + 1]]
        strongest = members[np.argsort(-self._means[members], kind="stable")].tolist()
        named = next((name for name in (self._name(latent)[0] for latent in strongest) if name), "")
        return named or f"latent {next(filter(self.plan.has_page, strongest), strongest[0])}"

    def has_card(self, latent: int) -> bool:
        """Is there a picture cards/<latent>.jpg?"""
        first, last = np.searchsorted(self.plan.references.latent, [latent, latent + 1]).tolist()
        return self.plan.has_page(latent) and last > first

    def doubts(self, latent: int) -> dict[str, Any]:
        """What speaks against a concept: `same_patch`, and `background`, its share there if it lies there, or None."""
        found = share_of(self.plan, self.maps, latent)
        is_beside = ON[on(found)] == "the background"
        return {"same_patch": self.same_patch(latent), "background": found if is_beside else None}

    @cached_property
    def _frequencies(self) -> Any:
        """(n_latents,) the largest frequency in any dataset."""
        return self._statistics("frequency").max(axis=0)

    @cached_property
    def _means(self) -> Any:
        """(n_latents,) the largest mean activation in any dataset."""
        return self._statistics("mean_activation").max(axis=0)

    @cached_property
    def _labels(self) -> Sequence[str]:
        """(n_latents,) top label in the dataset with the largest mean activation; "" without one."""
        best = self._statistics("mean_activation").argmax(axis=0).tolist()
        columns = [
            self.inputs.concepts.latents(name)["top_label"].to_pylist() for name in self.inputs.concepts.datasets
        ]
        return [columns[at][latent] or "" for latent, at in enumerate(best)]

    def _statistics(self, name: str) -> Any:
        columns = [self.inputs.concepts.latents(each)[name].to_numpy() for each in self.inputs.concepts.datasets]
        return np.nan_to_num(np.stack(columns).astype(np.float64))


def numeral(family: int) -> str:
    """I, II, ... from left to right: A and B are the diseases of a comparison, and latents have numbers."""
    return ("I", "II", "III", "IV", "V", "VI", "VII", "VIII")[family]


def family_names(labels: Sequence[Mapping[str, int]], latents: Sequence[str]) -> list[str]:
    """Names of families, no two the same: by a label that is the family's own, else by its strongest latent.

    A label is a family's own if its share of the family's latents is larger there than in any other family, and at
    least `_OWN` times that of all families together. Of several own labels the one with the largest ratio.

    Parameters
    ----------
    labels : of each family the top labels of its latents, with the number of latents
    latents : of each family the name of its strongest latent
    """
    sizes = [max(1, sum(each.values())) for each in labels]
    total = {label: sum(each.get(label, 0) for each in labels) for each in labels for label in each}
    own: dict[int, tuple[float, str]] = {}
    for label, n in sorted(total.items()):
        shares = [each.get(label, 0) / size for each, size in zip(labels, sizes, strict=True)]
        best, ratio = int(np.argmax(shares)), max(shares) * sum(sizes) / n
        if ratio >= _OWN and shares.count(shares[best]) == 1:
            own[best] = max(own.get(best, (0.0, "")), (ratio, label))
    names = [own[at][1] if at in own else f"like {latent}" for at, latent in enumerate(latents)]
    return [name if names.count(name) == 1 else f"{name} ({numeral(at)})" for at, name in enumerate(names)]
