"""What `cyto run` is asked; all that is not said here is chosen from the data (choices.py)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stores.errors import BadInput


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What is asked of a run. Everything else is chosen from the data, and the recipe says why.

    Raises
    ------
    BadInput
        If the seed is below 0.
    """

    backbone: str = "random-vit-tiny"
    weights: str | None = None  # as `cyto cache extract`
    block: int = -2  # transformer block whose output is used
    root: Path | str | None = None  # folder that paths in a table are relative to; None: the table's
    sae: Path | str | None = None  # to use: a folder of an SAE, or a file for `cyto sae import`; None: train one
    stability: bool = False  # also train a second SAE from another seed, and compare the two
    seed: int = 0  # of the SAE, the draws and the folds
    # settings by section of the recipe, in place of those that would be chosen: {"sae": {"expansion": 16}};
    # of all comparisons {"compare": {"top": 5}}, of one {"compare": {"AML-against-control": {"top": 5}}}
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise BadInput(f"seed must be at least 0; found {self.seed}")
