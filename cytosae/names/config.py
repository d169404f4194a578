"""What is asked of `cyto concept describe`: which pictures are shown and kept back, and how others are asked."""

import math
from dataclasses import dataclass

from stores.errors import BadInput
from stores.spec import as_floats, check_choice

PATIENT, LABEL = "patient", "label"
MATCH = (PATIENT, LABEL)  # of which images the inactive ones are
STRONG, WEAKER = "strong", "weaker"  # rows of an item, and kinds of images of a test
INACTIVE, LEAST = (
    "not active",
    "least active",
)  # what these are held against; the second where a latent is nearly always
ACTIVE = (STRONG, WEAKER)


@dataclass(frozen=True, kw_only=True)
class DescribeConfig:
    """How the items of a folder are made: these settings decide which images are shown and which are kept back.

    Raises
    ------
    BadInput
        If a number is too small, or there is no such match.
    """

    n_shown: int = 12  # strongly active images of an item; half as many are weaker, and half as many not active
    n_test: int = 20  # active images that are kept back for the test of a name, and as many that are not active
    min_test: int = 5  # of each, or there is no test
    match: str = PATIENT  # an inactive image is of the same patient as an active one, or of the same label
    labels: bool = False  # the item says which labels the shown images have
    pixels: int = 120  # side of a picture on the sheet
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("match", self.match, MATCH)
        least = {"n_shown": 2, "n_test": 2, "min_test": 2, "pixels": 32, "seed": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise BadInput(f"{name} must be at least {low}; found {getattr(self, name)}")
        if self.n_shown > 60 or self.pixels > 512:
            raise BadInput("a sheet has at most 60 strong images of at most 512 pixels; a larger one nobody can read")
        if self.min_test > self.n_test:
            raise BadInput(f"min_test must be at most n_test ({self.n_test}); found {self.min_test}")


@dataclass(frozen=True, kw_only=True)
class AskConfig:
    """How commands are called, and how a judge's answers become a score. Nothing of it decides the items.

    Raises
    ------
    BadInput
        If a number is too small.
    """

    timeout: float = 120.0  # seconds of one call
    at_once: int = 1  # calls at the same time
    batch: int = 10  # pictures of one call of a judge
    shuffles: int = 3  # other latents' names that are tested on the same images
    n_bootstraps: int = 1_000  # of patients, for the intervals
    give_up: int = 5  # failures in a row after which no further call is made
    use_shell: bool = False  # give the command line to the shell, as it stands
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"at_once": 1, "batch": 1, "shuffles": 0, "n_bootstraps": 1, "give_up": 1, "seed": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise BadInput(f"{name} must be at least {low}; found {getattr(self, name)}")
        if not (math.isfinite(self.timeout) and self.timeout > 0):
            raise BadInput(f"timeout must be a number of seconds above 0; found {self.timeout!r}")
        as_floats(self, "timeout")
