"""What a search is asked: by what images are compared, how many are listed, how an evaluation is made."""

from dataclasses import dataclass

from stores.errors import BadInput
from stores.spec import as_floats, check_choice

FINGERPRINT, BARCODE, REGION, TOKENS, CLS = "fingerprint", "barcode", "region", "tokens", "cls"
OF_LATENTS = (FINGERPRINT, BARCODE)
WEIGH = ("rarity", "none")
LABELS = ("label", "label_common")  # columns of the image table that an evaluation looks at


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """How to look for cells like one.

    Raises
    ------
    BadInput
        If there is no such way or weight, or a number is below 1.
    """

    top: int = 20  # images, and patients, of each list
    k: int = 32  # latents of a fingerprint
    weigh: str = "rarity"  # latents by ln((n + 1) / (images with it + 1)), or none: all count alike
    tau: float | None = None  # needed only for barcodes at several
    patches: tuple[int, ...] = ()  # look for this region of the image instead of the whole
    other_patients: bool = False  # leave out images of the image's own patient

    def __post_init__(self) -> None:
        check_choice("weigh", self.weigh, WEIGH)
        for name in ("top", "k"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} must be at least 1; found {getattr(self, name)}")
        object.__setattr__(self, "patches", tuple(self.patches))
        if len({*self.patches}) < len(self.patches) or min(self.patches, default=0) < 0:
            raise BadInput(f"patches must be different numbers of at least 0; found {list(self.patches)}")
        as_floats(self, "tau")

    @property
    def ways(self) -> tuple[str, ...]:
        """By which latents images are compared: a region, or fingerprints and barcodes."""
        return (REGION,) if self.patches else OF_LATENTS


@dataclass(frozen=True, kw_only=True)
class SearchEvaluationConfig:
    """How to measure whether a search finds cells of the same type.

    Raises
    ------
    BadInput
        If a number is too small.
    """

    k: int = 32  # latents of a fingerprint
    weigh: str = "rarity"
    tau: float | None = None
    n_queries: int = 200  # images that are looked for; drawn at random
    at: tuple[int, ...] = (1, 5, 10, 20)  # precision at these numbers of images
    n_bootstraps: int = 1_000  # of patients, for the intervals
    seed: int = 0  # of the queries and the bootstraps

    def __post_init__(self) -> None:
        SearchConfig(k=self.k, weigh=self.weigh)
        for name, least in {"n_queries": 2, "n_bootstraps": 1, "seed": 0}.items():
            if getattr(self, name) < least:
                raise BadInput(f"{name} must be at least {least}; found {getattr(self, name)}")
        if not self.at or min(self.at) < 1:
            raise BadInput(f"precision is measured at 1 image or more; found {list(self.at)}")
        object.__setattr__(self, "at", tuple(sorted({*self.at})))
        as_floats(self, "tau")
