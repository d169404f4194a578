"""What an ablation has found, as facts and in words."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from stores.notebook import figure_html
from stores.wording import Report, counted, printable

from .config import ENOUGH_CONTROLS

_FAR = 2.0  # factor between a latent and its controls from which on they are no match
_LISTED = 20
_ROUNDING = 1e-6  # of the norm of the final CLS: some float32 roundings (6e-8 each) of the later blocks


@dataclass(frozen=True, kw_only=True)
class AblateResult(Report):
    """The effects of the chosen latents, and what they are held against."""

    out: Path  # the folder
    mode: str
    token_set: str
    n_images_surveyed: int
    n_images_edited: int
    n_edits: int  # runs of the later blocks
    n_without_patient: int  # of the images that were edited
    effects: pa.Table  # effects.parquet
    curves: pa.Table | None  # curves.parquet; None: no curves were asked for
    matches: list[dict[str, Any]]  # latent, n_controls, and how far frequency and norm of the controls' median are off
    assumed_equal: list[str]  # properties of its tokens that an imported SAE does not name
    was_complete: bool
    probe_accuracy: float | None = None  # balanced accuracy of the probe of the final CLS, on patients left out

    @property
    def warnings(self) -> tuple[str, ...]:
        """Effects of nothing but rounding, too few controls, controls that do not match, images without a patient."""
        found = []
        moves = [row for row in self.effects.to_pylist() if row["quantity"] == "cls_change"]
        still = [str(row["latent"]) for row in moves if row["effect"] <= _ROUNDING]
        if still:
            found.append(
                f"latent {', '.join(still[:3])}{', ...' if len(still) > 3 else ''}: the final CLS moves by no more "
                f"than rounding ({_ROUNDING:g} of its norm): no effect was seen, and interval and p are "
                "those of rounding"
            )
        few = [each["n_controls"] for each in self.matches if each["n_controls"] < ENOUGH_CONTROLS]
        if few:
            found.append(
                f"{counted(len(few), 'latent')} held against fewer than {ENOUGH_CONTROLS} others: "
                f"p cannot be below {1 / (1 + min(few)):.2g}"
            )
        far = [
            str(each["latent"])
            for each in self.matches
            if not all(1 / _FAR <= each[name] <= _FAR for name in ("frequency_ratio", "norm_ratio"))
        ]
        if far:
            found.append(
                f"the controls of latent {', '.join(far[:3])}{', ...' if len(far) > 3 else ''} differ from it by more "
                f"than a factor of {_FAR:g} in frequency or norm: compare the effects with care (controls.parquet)"
            )
        if self.n_without_patient:
            found.append(f"{counted(self.n_without_patient, 'image')} without a patient, each counted as a patient")
        if self.assumed_equal:
            found.append(f"assumed, since the imported SAE does not say it: equal {', '.join(self.assumed_equal)}")
        return tuple(found)

    def lines(self) -> Iterator[str]:
        """The change of the final CLS by each latent beside its controls; and the curves."""
        yield (
            f"{self.out}: {self.mode}, token set {self.token_set}; {self.n_edits:,} edits of "
            f"{self.n_images_edited:,} images, of {self.n_images_surveyed:,} looked at"
        )
        if self.probe_accuracy is not None:
            yield f"  the probe of the final CLS: balanced accuracy {self.probe_accuracy:.3g} on patients left out"
        rows = [row for row in self.effects.to_pylist() if row["quantity"] == "cls_change"]
        rows.sort(key=lambda row: -row["effect"])
        for row in rows[:_LISTED]:
            yield (
                f"  latent {row['latent']}: the final CLS moves by {row['effect']:.3g} of its norm{_between(row)}; "
                f"{counted(row['n_controls'], 'matched latent')} {_middle(row, 'control'):.3g} "
                f"({row['control_low']:.3g} to {row['control_high']:.3g}), p {row['p']:.2g}{_directions(row)}"
            )
            yield from self._class_lines(row["latent"])
        if len(rows) > _LISTED:
            yield f"  and {len(rows) - _LISTED:,} more in effects.parquet"
        yield from self._curve_lines()

    def to_json(self) -> dict[str, Any]:
        """What `cyto concept ablate --json` prints."""
        names = ("mode", "token_set", "n_images_surveyed", "n_images_edited", "n_edits", "n_without_patient", "matches")
        return {
            "ablation": str(self.out),
            **{name: getattr(self, name) for name in names},
            "probe_accuracy": self.probe_accuracy,
            "effects": self.effects.to_pylist(),
            "curves": None if self.curves is None else self.curves.to_pylist(),
        }

    def _class_lines(self, latent: int) -> Iterator[str]:
        for before, what in (("", "the probe"), ("cls_", "the probe of the final CLS")):
            rows = [
                row
                for row in self.effects.to_pylist()
                if row["latent"] == latent and row["quantity"].startswith(f"{before}probability:")
            ]
            if rows:
                row = max(rows, key=lambda row: abs(row["effect"]))
                name = printable(row["quantity"].partition(":")[2])
                yield (
                    f"    {what}: probability of {name} {row['effect']:+.3g}{_between(row)}; matched latents "
                    f"{_middle(row, 'control'):+.3g}, p {row['p']:.2g}"
                )

    def _curve_lines(self) -> Iterator[str]:
        if self.curves is None:
            return
        rows = [row for row in self.curves.to_pylist() if row["quantity"] == "share_of_all" and row["k"]]
        for order in dict.fromkeys(row["order"] for row in rows):
            for edit, words in (("remove", "removing"), ("keep", "keeping only")):
                some = [
                    f"{row['k']}: {row['effect']:.2f}" for row in rows if (row["order"], row["edit"]) == (order, edit)
                ]
                if some:
                    yield (
                        f"  {words} the first k, {_ORDERS[order]}; share of the change without any latent: "
                        f"{', '.join(some)}"
                    )

    def _repr_html_(self) -> str:
        return super()._repr_html_() + figure_html(self.out / "effects.png")


_ORDERS = {
    "chosen": "the chosen latents by their effect",
    "largest": "those that add most to the image",
    "random": "its latents in random order",
}


def _between(row: dict[str, Any]) -> str:
    return "" if row["low"] is None else f" ({row['low']:.3g} to {row['high']:.3g})"


def _directions(row: dict[str, Any]) -> str:
    if row["direction_mean"] is None:
        return ""
    return f"; random directions {_middle(row, 'direction'):.3g}, p {row['p_directions']:.2g}"


def _middle(row: dict[str, Any], name: str) -> float:
    """The trimmed mean of controls or directions; of an older cyto, which has none, their mean."""
    return float(row.get(f"{name}_trimmed", row[f"{name}_mean"]))
