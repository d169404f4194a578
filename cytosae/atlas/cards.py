"""The picture of each concept's card: its strongest cell, and beside it two more, in one small file.

A card is one file, so that the overview loads what is in view and no more, in whatever order it is sorted.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from .inputs import Inputs
from .pictures import jpeg
from .plan import Ints, Plan
from .site import CARD_SIZE, Site

WIDTH, HEIGHT = CARD_SIZE  # the strongest cell has the left two thirds
CARD_IMAGES = 3  # one large, and two small ones beside it
_SMALL = (194, 94, 95)  # left edge, width and height of the two others
_SMALL_TOPS = (0, 97)
_GROUND = (236, 236, 236)  # around a picture that is no square
_QUALITY = 82
Find = Callable[[int], Image.Image | None]  # image_index -> its picture; None if it cannot be shown


def card_images(plan: Plan) -> list[Ints]:
    """For each latent of the plan the positions in `plan.references` of its three strongest images, strongest first.

    The strongest over all datasets; of equal ones the earlier in the references. An image occurs once.
    """
    references = plan.references
    first = np.searchsorted(references.latent, plan.latents)
    last = np.searchsorted(references.latent, plan.latents, side="right")
    found = []
    for start, stop in zip(first.tolist(), last.tolist(), strict=True):
        order = start + np.argsort(-references.value[start:stop], kind="stable")
        _, once = np.unique(references.image[order], return_index=True)
        found.append(order[np.sort(once)[:CARD_IMAGES]])
    return found


def write_cards(site: Site, plan: Plan, chosen: list[Ints], find: Find, *, most: int | None = None) -> Iterator[int]:
    """Write cards/<latent>.jpg of every latent with a reference image; yields the number of latents done.

    Parameters
    ----------
    chosen : of `card_images`
    find : the picture of an image, at most as large as the atlas shows it
    """
    for n_done, (latent, numbers) in enumerate(zip(plan.latents.tolist(), chosen, strict=True), start=1):
        if most is not None and n_done > most:
            return
        if len(numbers):
            pictures = [find(int(image)) for image in plan.references.image[numbers]]
            site.write(f"cards/{latent}.jpg", jpeg(draw_card(pictures), quality=_QUALITY))
        yield n_done


def draw_card(pictures: Sequence[Image.Image | None]) -> Image.Image:
    """One picture of up to three; what is missing stays ground."""
    card = Image.new("RGB", (WIDTH, HEIGHT), _GROUND)
    boxes = [(0, 0, HEIGHT, HEIGHT), *((_SMALL[0], top, *_SMALL[1:]) for top in _SMALL_TOPS)]
    for picture, (left, top, width, height) in zip(pictures, boxes, strict=False):
        if picture is not None:
            small = _fitted(picture, width, height)
            card.paste(small, (left + (width - small.width) // 2, top + (height - small.height) // 2))
    return card


def _fitted(picture: Image.Image, width: int, height: int) -> Image.Image:
    """The whole picture, as large as fits; enlarged too, since a card shows cells of one size."""
    share = min(width / picture.width, height / picture.height)
    size = max(1, round(picture.width * share)), max(1, round(picture.height * share))
    picture.draft("RGB", (size[0] * 4 // 3, size[1] * 4 // 3))  # decodes a JPEG at half its size, if that is enough
    return picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def written_pictures(root: Path, plan: Plan, unseen: dict[int, str]) -> Find:
    """The pictures that are already in the folder of the atlas."""

    def find(image: int) -> Image.Image | None:
        return None if image in unseen else Image.open(root / "pictures" / f"{plan.number_of[image]}.jpg")

    return find


def original_pictures(inputs: Inputs, pixels: int) -> Find:
    """The images themselves, for an estimate, which has written none."""

    def find(image: int) -> Image.Image | None:
        number, row = inputs.place(image)
        picture: npt.NDArray[np.uint8] | str = inputs.sources.pictures[number](row)
        if isinstance(picture, str):
            return None
        small = Image.fromarray(picture)
        small.thumbnail((pixels, pixels), Image.Resampling.LANCZOS)
        return small

    return find
