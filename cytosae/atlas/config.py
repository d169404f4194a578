"""What an atlas shows: which latents have pages, how many images, how large."""

from dataclasses import dataclass

from stores.errors import BadInput
from stores.spec import check_choice

PAGES = ("selected", "top", "all")


@dataclass(frozen=True, kw_only=True)
class AtlasConfig:
    """The choices of an atlas. All of them stand in `atlas.json`."""

    pages: str = "selected"  # latents with a page: those drawn for experts and the comparisons' lists, `top`, or all
    top: int = 200  # with `pages="top"`: so many, the largest mean activation in any dataset first
    n_images: int = 10  # reference images of a latent, in each dataset
    patient_images: int = 12  # of each patient, drawn at random
    pixels: int = 256  # of a picture, along its longer side
    tau: float | None = None  # of barcodes at several
    seed: int = 0  # of the patients' images, and of the review's decoys
    pseudonyms: bool = False

    def __post_init__(self) -> None:
        check_choice("pages", self.pages, PAGES)
        least = {"top": 1, "n_images": 1, "patient_images": 0, "pixels": 32, "seed": 0}
        for name, number in least.items():
            if getattr(self, name) < number:
                raise BadInput(f"{name} must be at least {number}; found {getattr(self, name)}")
