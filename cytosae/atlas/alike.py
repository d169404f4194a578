"""Cells like this one: for each image of the atlas those most like it, by the fingerprints of `cyto concept search`."""

from typing import Any

import numpy as np

from cytosae.search import nearest_among

from .cohort import Cohort
from .plan import Ints, Plan


class Alike:
    """The images with a page most like each of some images: of any patient, and of other patients."""

    def __init__(self, cohort: Cohort, plan: Plan, images: Ints, *, top: int) -> None:
        """Memory: the fingerprints of the images with a page, and `top` images for each."""
        self._cohort, self._plan = cohort, plan
        self._place = {image: place for place, image in enumerate(images.tolist())}
        self._found, self._cosines = nearest_among(
            plan.examples.fingerprints.take(plan.images),
            cohort.patient_of[plan.images],
            cohort.contents[plan.images],
            top=top,
            queries=np.array([plan.place_of[image] for image in images.tolist()], np.int64),
        )

    def of(self, image: int, unseen: dict[int, str]) -> list[list[dict[str, Any]]]:
        """The two lists of an image: image (number of its page), label, cosine, is_own: same patient, is_seen."""
        at, patients = self._place[image], self._cohort.patient_of
        found = []
        for places, cosines in zip(self._found[at].tolist(), self._cosines[at].tolist(), strict=True):
            rows = []
            for place, cosine in zip(places, cosines, strict=True):
                other = int(self._plan.images[place])
                if place >= 0:
                    rows.append(
                        {"image": int(self._plan.numbers[place]), "label": self._cohort.labels[other]}
                        | {"cosine": cosine, "is_own": bool(patients[other] == patients[image] >= 0)}
                        | {"is_seen": other not in unseen}
                    )
            found.append(rows)
        return found
