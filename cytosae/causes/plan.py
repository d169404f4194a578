"""What is to be measured: a list of edits, each of one image, in the order of the images.

chosen      a chosen latent is changed
control     a matched latent is changed in the same way
direction   what a chosen latent's change adds to the tokens, in a random direction: the same norm at every token
remove      the first k latents of an order become 0
keep        all latents but the first k of an order become 0
"""

from dataclasses import dataclass

import numpy as np

from .places import Ints

CHOSEN, CONTROL, DIRECTION, REMOVE, KEEP = range(5)
ROLES = ("chosen", "control", "direction", "remove", "keep")
ORDERS = ("chosen", "largest", "random")  # of the latents of a curve


@dataclass(frozen=True)
class Plan:
    """n edits, sorted by image."""

    image: Ints
    role: Ints
    what: Ints  # the latent; of a curve the order
    number: Ints  # of the direction; of a curve k, and 0 for all latents

    def __len__(self) -> int:
        return len(self.image)

    @property
    def images(self) -> Ints:
        """Each image once."""
        return np.unique(self.image)

    def of(self, image: int) -> slice:
        """The edits of an image."""
        return slice(*np.searchsorted(self.image, [image, image + 1]).tolist())


def _sorted(rows: list[tuple[Ints, int, int, int]]) -> Plan:
    image, role, what, number = (
        np.concatenate([np.broadcast_to(np.asarray(row[column], np.int64), len(row[0])) for row in rows])
        for column in range(4)
    )
    order = np.lexsort((number, what, role, image))
    return Plan(image[order], role[order], what[order], number[order])


def plan_latents(images: Ints, chosen: Ints, controls: Ints, n_directions: int) -> Plan:
    """Edits of single latents.

    images : (L, n) the images of each latent, -1 where there are no more
    """
    rows: list[tuple[Ints, int, int, int]] = []
    for role, latents in ((CHOSEN, chosen), (CONTROL, controls)):
        rows += [(images[latent][images[latent] >= 0], role, int(latent), 0) for latent in latents]
    for latent in chosen:
        of_latent = images[latent][images[latent] >= 0]
        rows += [(of_latent, DIRECTION, int(latent), number) for number in range(n_directions)]
    return _sorted(rows)


def plan_curves(images: Ints, ks: tuple[int, ...], n_chosen: int) -> Plan:
    """Edits of several latents; of the chosen ones only as many as there are.

    images : (n,) each in all curves
    """
    rows: list[tuple[Ints, int, int, int]] = [(images, REMOVE, ORDERS.index("largest"), 0)]
    for number, order in enumerate(ORDERS):
        some = sorted({min(k, n_chosen) for k in ks}) if order == "chosen" else ks
        rows += [(images, role, number, k) for role in (REMOVE, KEEP) for k in some]
    return _sorted(rows)
