"""What a comparison of two diseases is asked: which patients, which latents, how many permutations."""

import math
from dataclasses import dataclass

from stores.activation_store import one_or_more
from stores.errors import BadInput
from stores.spec import as_floats

REST = "rest"  # as B: all patients with a disease that is not A


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """What to compare."""

    a: str
    b: str  # a disease, or "rest" where none has that name
    tau: float | None = None  # needed only for barcodes at several
    n_permutations: int = 10_000
    seed: int = 0  # of permutations and bootstraps
    top: int = 50  # latents of each list
    min_patients: int = 0  # of both groups together, whose barcode exceeds 0: fewer, and a latent is not tested
    min_mean: float = 0.0  # of a latent's barcode over the patients of both groups: less, and it is not tested
    n_bootstraps: int = 1_000
    images_per_patient: int | str = "auto"  # a number, "all", or "auto"
    strata: str | None = None  # a column of the image table: patients are permuted within its values
    adjust: tuple[str, ...] = ()  # columns of the image table: numbers or categories
    within_label: str | None = None  # only images with this `label` count
    standardize: str | None = None  # a column of the image table: means of its types, with fixed weights

    def __post_init__(self) -> None:
        object.__setattr__(self, "adjust", tuple(one_or_more(self.adjust)))
        least = {"n_permutations": 1, "seed": 0, "top": 1, "min_patients": 0, "n_bootstraps": 0}
        for name, number in least.items():
            if getattr(self, name) < number:
                raise BadInput(f"{name} must be at least {number}; found {getattr(self, name)}")
        if not (math.isfinite(self.min_mean) and self.min_mean >= 0):
            raise BadInput(f"min_mean must be a number of at least 0; found {self.min_mean!r}")
        asked = str(self.images_per_patient)
        if asked.isascii() and asked.isdecimal() and 0 < int(asked) < 1 << 31:
            object.__setattr__(self, "images_per_patient", int(asked))
        elif asked not in ("all", "auto"):
            raise BadInput(f"images per patient must be a number of at least 1, all or auto; found {asked!r}")
        if self.within_label is not None and self.standardize is not None:
            raise BadInput("within one label there is nothing to standardize: give --within-label or --standardize")
        if len({*self.adjust}) < len(self.adjust) or self.strata in self.adjust:
            raise BadInput("a column stands twice in --adjust, or in --adjust and --strata; give each once")
        as_floats(self, "tau", "min_mean")

    @property
    def is_adjusted(self) -> bool:
        """Something else than the plain means of all images is compared."""
        return bool(self.strata or self.adjust or self.within_label is not None or self.standardize)


def describe_left_out(left_out: dict[str, int], config: CompareConfig) -> str:
    """In words: `5,000 equal in all patients, 12 above 0 in fewer than 3 patients`."""
    words = {
        "not_listed": "not in --latents",
        "equal_in_all": "equal in all patients",
        "few_patients": f"above 0 in fewer than {config.min_patients:,} patients",
        "low_mean": f"of a mean below {config.min_mean:g}",
    }
    return ", ".join(f"{number:,} {words[reason]}" for reason, number in left_out.items() if number)
