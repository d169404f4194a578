"""What cyto barcode has counted and left out, as facts and in words."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from stores.wording import Report, counted, left_out_lines, printable


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
    tau_rule: Mapping[str, Any] | None = None  # with tau "auto": the rule in `words`, its parameters, what was counted
    would_keep: tuple[
        tuple[float, int], ...
    ] = ()  # smaller tau, and how many latents exceed it; where tau is too large

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
            elif self.would_keep and 2 * (self.n_latents - n_silent) < self.n_alive:
                found.append(
                    f"only {self.n_latents - n_silent:,} of {self.n_alive:,} latents that are ever active exceed tau "
                    f"{tau:g}: the others are in no barcode"
                )
        if found and self.would_keep:
            kept = ", ".join(f"{n:,} latents exceed tau {tau:g}" for tau, n in self.would_keep)
            found[-1] += f"; {kept}; --tau auto chooses one without looking at labels"
        return tuple(found)

    @property
    def n_alive(self) -> int:
        """Latents with any value, where `would_keep` says so; else all."""
        return max((n for _, n in self.would_keep), default=self.n_latents)

    def lines(self) -> Iterator[str]:
        """Counts, what was left out, and how much exceeds tau."""
        yield (
            f"{self.out}: {counted(self.n_images, 'image')}, {counted(self.n_patients, 'patient')}, "
            f"{counted(self.n_diseases, 'disease')}, {self.n_latents:,} latents, "
            f"tau {', '.join(f'{tau:g}' for tau in self.taus)}"
        )
        if self.tau_rule is not None:
            yield f"tau auto: {printable(str(self.tau_rule.get('words', '')))}"
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
