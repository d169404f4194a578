"""What an atlas shows: which latents have pages, how many images, in which size."""

from dataclasses import dataclass

from stores.errors import BadInput
from stores.spec import as_floats, check_choice

PAGES = ("selected", "top", "all")


@dataclass(frozen=True, kw_only=True)
class AtlasConfig:
    """The settings of an atlas; `atlas.json` records all of them."""

    pages: str = "selected"  # latents with a page: selected (selection and top lists of the comparisons), top, or all
    top: int = 200  # with `pages="top"`: how many, by the largest mean activation in any dataset
    n_images: int = 10  # reference images of a latent, in each dataset
    decile_images: int = 2  # examples from each tenth of a latent's activation
    near_misses: int = 6  # images that resemble a latent's reference images and lack it
    alike: int = 6  # images most like an image, and as many of other patients
    patient_images: int = 12  # of each patient, drawn at random
    patient_concepts: int = 6  # characteristic ones of a patient, and unusual ones, with the patient's strongest cells
    pair_concepts: int = 12  # of each side of a comparison, with the strongest cells of both
    pixels: int = 256  # longer side of a picture
    tau: float | None = None  # which barcodes; needed if they were counted at several tau
    seed: int = 0  # of the random draws: patients' images, decoys of the review
    pseudonyms: bool = False  # patients and images are numbered instead of named

    def __post_init__(self) -> None:
        check_choice("pages", self.pages, PAGES)
        least = {"top": 1, "n_images": 1, "pixels": 32}
        least |= dict.fromkeys(("decile_images", "near_misses", "alike", "patient_images", "seed"), 0)
        least |= dict.fromkeys(("patient_concepts", "pair_concepts"), 0)
        for name, number in least.items():
            if getattr(self, name) < number:
                raise BadInput(f"{name} must be at least {number}; found {getattr(self, name)}")
        if self.top != AtlasConfig.top and self.pages != "top":
            raise BadInput(f"top {self.top} has no effect with pages {self.pages}; choose --pages top, too")
        as_floats(self, "tau")
