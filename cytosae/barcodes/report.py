"""What cyto barcode has counted and left out, as facts and in words."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from stores.wording import Report, counted, left_out_lines


@dataclass(frozen=True, kw_only=True)
class BarcodeResult(Report):
    """What was counted, and what was left out."""

    out: Path  # the folder
    taus: tuple[float, ...]
    n_images: int  # readable
    n_unreadable: int
    n_without_patient: int  # readable, but without a patient: in the image barcodes only
    n_patients: int  # with a readable image
    n_patients_unreadable: int  # without one: left out
    n_patients_without_disease: int  # in the patient store only
    n_diseases: int
    n_latents: int
    n_silent_latents: tuple[int, ...]  # latents that exceed tau nowhere, per tau
    share_above_tau: tuple[float, ...]  # of all stored nonzeros in the token set, per tau
    was_complete: bool
    table: Path | None = None  # that was given beside the stores
    n_unknown_in_table: int = 0  # image ids of --table that no store has
    unknown_in_table: str = ""  # some of them
    n_missing_in_table: int = 0  # images that the table does not have: without a patient
    missing_in_table: str = ""
    differences: str = ""  # between the stores, in how their latents were made

    @property
    def warnings(self) -> tuple[str, ...]:
        """A tau that (almost) nothing exceeds."""
        found = []
        for tau, share, n_silent in zip(self.taus, self.share_above_tau, self.n_silent_latents, strict=True):
            if n_silent == self.n_latents:
                found.append(f"no latent exceeds tau {tau:g} anywhere: every barcode is empty")
            elif share < 0.01:
                found.append(
                    f"almost nothing exceeds tau {tau:g}. 0.2 belongs to the released SAE and means nothing for "
                    f"another: choose a smaller --tau"
                )
        return tuple(found)

    def lines(self) -> Iterator[str]:
        """Counts, what was left out, and how much exceeds tau."""
        yield (
            f"{self.out}: {counted(self.n_images, 'image')}, {counted(self.n_patients, 'patient')}, "
            f"{counted(self.n_diseases, 'disease')}, {self.n_latents:,} latents, "
            f"tau {', '.join(f'{tau:g}' for tau in self.taus)}"
        )
        yield from left_out_lines(
            {
                "unreadable images": self.n_unreadable,
                "images without a patient (image barcodes only)": self.n_without_patient,
                "patients without a readable image": self.n_patients_unreadable,
                "patients without a disease (no disease barcode)": self.n_patients_without_disease,
            }
        )
        yield from join_lines(self)
        for tau, share, n_silent in zip(self.taus, self.share_above_tau, self.n_silent_latents, strict=True):
            which = "tau" if len(self.taus) == 1 else f"tau {tau:g}"
            yield f"{share:.1%} of the nonzeros exceed {which}; {n_silent:,} of {self.n_latents:,} latents never do"


class Joined(Protocol):
    """How several stores, and a table given beside them, fit together."""

    @property
    def table(self) -> Path | None: ...
    @property
    def differences(self) -> str: ...
    @property
    def n_missing_in_table(self) -> int: ...
    @property
    def missing_in_table(self) -> str: ...
    @property
    def n_unknown_in_table(self) -> int: ...
    @property
    def unknown_in_table(self) -> str: ...


def join_lines(done: Joined) -> Iterator[str]:
    """How several stores, and a table given beside them, fit together, in words."""
    if done.differences:
        yield f"the stores were made differently: {done.differences}"
    if done.n_missing_in_table:
        yield f"{counted(done.n_missing_in_table, 'image')} without a row in {done.table}: {done.missing_in_table}"
    if done.n_unknown_in_table:
        yield f"{counted(done.n_unknown_in_table, 'row')} of {done.table} for no image here: {done.unknown_in_table}"
