"""What stands beside a scorecard: other scorecards, and how well another seed finds the same latents."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stores.errors import BadInput, SpecMismatch
from stores.result_folder import ResultStore
from stores.spec import SCORECARD, STABILITY
from stores.tables import listed

from .card import Card

KEYS = ("measure", "label", "k")  # of a row


@dataclass(frozen=True)
class Stability:
    """What cyto concept stability found for one SAE."""

    identity: str
    pairs: list[dict[str, Any]]

    def add_to(self, card: Card) -> None:
        """Means over the pairs with this SAE."""
        means = {
            name: float(np.mean([pair[name] for pair in self.pairs]))
            for name in ("share_above_null_p99", "mean_cosine", "null_mean_cosine")
        }
        n = min(pair["n_latents_a"] for pair in self.pairs)
        card.add("matched_over_seeds", means["share_above_null_p99"], null=0.01, n=n)
        card.add("cosine_over_seeds", means["mean_cosine"], null=means["null_mean_cosine"], n=n)


def open_stability(root: Path, sae_sha256: str) -> Stability:
    store = ResultStore(root, STABILITY)
    numbers = [i for i, each in enumerate(store.header.spec["saes"]) if each["sae_sha256"] == sae_sha256]
    if not numbers:
        raise SpecMismatch(f"{root} does not compare this SAE; make it with cyto concept stability RUN OTHER_RUN")
    pairs = [pair for pair in store.table("pairs").to_pylist() if numbers[0] in (pair["sae_a"], pair["sae_b"])]
    return Stability(store.header.identity, pairs)


@dataclass(frozen=True)
class Baseline:
    """Another scorecard."""

    root: Path
    identity: str
    spec: dict[str, Any]
    values: dict[tuple[Any, ...], float | None]

    @staticmethod
    def open(root: Path) -> "Baseline":
        store = ResultStore(root, SCORECARD)
        rows = store.json("scorecard")["rows"]
        values = {tuple(row[name] for name in KEYS): row["value"] for row in rows}
        return Baseline(root, store.header.identity, store.header.spec, values)

    @property
    def name(self) -> str:
        """Name of its folder."""
        return self.root.resolve().name

    def require(self, spec: dict[str, Any], settings: dict[str, Any]) -> None:
        """Refuse what cannot stand beside: other images, or other settings."""
        names = ["sample_sha256", "embedding_sha256", *settings]
        if differ := [name for name in names if self.spec.get(name) != spec[name]]:
            raise SpecMismatch(
                f"the baseline {self.root} was scored with other {listed(differ)}; score it again with the images and "
                f"settings of this one: cyto sae score"
            )


def check_names(others: Sequence[Baseline]) -> None:
    """Raise BadInput if two have one name, which is that of their column."""
    names = [each.name for each in others]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise BadInput(f"two baselines are called {listed(twice)}; each needs a folder of another name")
