"""What cyto concept stats has found, as facts and in words."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cytosae.barcodes import join_lines
from stores.notebook import figure_html
from stores.wording import Report, counted, left_out_lines, printable


@dataclass(frozen=True, kw_only=True)
class ConceptResult(Report):
    """What was found, and what was left out: the summary of the folder."""

    out: Path  # the folder
    token_set: str
    label: str  # column that entropies are of
    n_latents: int
    by_dataset: list[dict[str, Any]]  # dataset, n_readable, n_unreadable, n_labelled, n_silent, n_meaningful, ...
    agreement: list[dict[str, Any]]  # one for each pair of datasets
    n_without_dataset: int  # readable images that --table gives no dataset: left out
    was_complete: bool
    differences: str = ""  # between the stores, in how their latents were made
    table: Path | None = None  # that was given beside the stores
    n_unknown_in_table: int = 0  # image ids of --table that no store has
    unknown_in_table: str = ""  # some of them
    n_missing_in_table: int = 0  # images that the table does not have
    missing_in_table: str = ""
    warning: str | None = None  # 10^-3 belongs to another SAE

    @property
    def warnings(self) -> tuple[str, ...]:
        """A threshold that belongs to another SAE."""
        return (self.warning,) if self.warning else ()

    def lines(self) -> Iterator[str]:
        """What was found in each dataset, whether datasets agree, what was left out."""
        yield f"{self.out}: {self.n_latents:,} latents, token set {self.token_set}"
        for found in self.by_dataset:
            yield from _dataset_lines(found, self.label)
        for pair in self.agreement:
            yield from _agreement_lines(pair)
        yield from left_out_lines({"images without a dataset": self.n_without_dataset})
        yield from join_lines(self)

    def _repr_html_(self) -> str:
        return super()._repr_html_() + figure_html(self.out / "scatter.png")


def _dataset_lines(found: dict[str, Any], label: str) -> Iterator[str]:
    """What was found in one dataset, and what could not be said."""
    unreadable = f" ({found['n_unreadable']:,} unreadable)" if found["n_unreadable"] else ""
    yield (
        f"  {printable(found['dataset'])}: {found['n_readable']:,} images{unreadable}, "
        f"{found['n_labelled']:,} with one of {found['n_labels']:,} labels; "
        f"{counted(found['n_silent'], 'latent')} never active, "
        f"{found['n_meaningful']:,} have a mean activation of 0.001 or more"
    )
    if not found["n_labelled"]:
        yield f"    no image has a {label}: label entropies are null"
        return
    if "n_divergence_q_05" in found:
        without = found["n_labelled_without_patient"]
        yield (
            f"    {counted(found['n_divergence_q_05'], 'latent')} whose top images differ in {label} from the dataset, "
            f"{found['n_entropy_q_05']:,} with an entropy smaller than by chance (q <= 0.05; {label}s shuffled from "
            f"patient to patient: {counted(found['n_patients'], 'patient')}"
            + (f", {counted(without, 'image')} without a patient counted as one each)" if without else ")")
        )
    if found["n_without_entropy"]:
        yield (
            f"    {counted(found['n_without_entropy'], 'latent')} without an entropy: active, too few labelled images"
        )
    if found["n_top_unlabelled"]:
        yield f"    {found['n_top_unlabelled']:,} top images have no {label}: left out of the entropies"


def _agreement_lines(pair: dict[str, Any]) -> Iterator[str]:
    names = f"{printable(pair['dataset_a'])} and {printable(pair['dataset_b'])}"
    if not pair["n_compared"]:
        yield f"  {names}: no latent has enough images with a label_common in both"
        return
    yield (
        f"  {names}: {pair['n_agreeing']:,} of {pair['n_compared']:,} latents ({pair['share']:.1%}) have the same top "
        f"label_common; by chance {pair['share_expected']:.1%}"
    )
