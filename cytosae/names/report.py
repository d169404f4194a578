"""What `cyto concept describe` will take, and what it has done, as facts and in words."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stores.notebook import figure_html, table_html
from stores.wording import Report, counted, printable

_MOST_REASONS = 3


@dataclass(frozen=True, kw_only=True)
class DescribePlan(Report):
    """What the items will take, and how many calls follow at most."""

    n_latents: int
    n_nonzeros: int  # of the barcodes, in one pass
    n_passes: int
    seconds: float  # of the items; calls of commands take what they take
    memory_bytes: int
    n_name_calls: int  # 0: no command is asked for names
    n_judge_calls: int  # at most, for names of one source
    timeout: float  # seconds that one call may take

    def lines(self) -> Iterator[str]:
        """One line for the items, and one for the calls."""
        yield (
            f"{counted(self.n_latents, 'latent')}, {self.n_nonzeros / 1e6:,.1f} M nonzeros of barcodes read "
            f"{'once' if self.n_passes == 1 else f'{self.n_passes} times'}: about {max(1, round(self.seconds)):,} s "
            f"and {self.memory_bytes / 2**30:.1f} GiB of memory for the items"
        )
        if self.n_name_calls or self.n_judge_calls:
            yield (
                f"then up to {counted(self.n_name_calls, 'call')} for names and {self.n_judge_calls:,} to test the "
                f"names of each source, of at most {self.timeout:g} s each; what was answered before is not asked again"
            )


@dataclass(frozen=True, kw_only=True)
class Asked:
    """How the calls of one command went."""

    what: str  # names, or scores
    by: str
    n_answered: int
    n_failed: int
    reasons: tuple[tuple[str, int], ...]  # of failures, the most frequent first
    gave_up: bool


@dataclass(frozen=True, kw_only=True)
class DescribeResult(Report):
    """The folder of items, the names in it, and their scores."""

    out: Path
    n_items: int
    n_without_item: int  # latents that are active in no image that could be shown
    n_testable: int
    n_patients: int  # of the images; 0: none is known
    names: dict[str, int]  # given_by -> names
    n_nothing: int  # answers that saw nothing in common
    sources: list[dict[str, Any]]  # rows of sources.parquet
    rows: list[dict[str, Any]]  # rows of detection.parquet
    asked: tuple[Asked, ...] = ()
    unfit: tuple[str, ...] = ()  # rows of tables that were not taken
    doubts: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()  # images that could not be shown
    first_sheet: str | None = None
    was_complete: bool = False  # the items were there

    @property
    def gave_up(self) -> str | None:
        """Which command failed too often in a row, and why; None: none did."""
        for each in self.asked:
            if each.gave_up:
                return (
                    f"{printable(each.by)} failed too often in a row ({each.reasons[0][0]}); {each.n_answered:,} "
                    f"answers are kept: put it right and run the same command again"
                )
        return None

    @property
    def warnings(self) -> tuple[str, ...]:
        """Calls and rows that gave nothing, images that could not be shown, patients that are too few."""
        found = [*self.doubts]
        for each in self.asked:
            if each.n_failed:
                told = "; ".join(f"{n:,} times: {why}" for why, n in each.reasons[:_MOST_REASONS])
                found.append(f"{each.n_failed:,} calls of {each.by} for {each.what} gave no usable answer ({told})")
        if self.unfit:
            told = "; ".join(self.unfit[:_MOST_REASONS])
            found.append(f"{counted(len(self.unfit), 'row')} not taken ({told})")
        if self.unseen:
            found.append(f"{counted(len(self.unseen), 'image')} could not be shown ({self.unseen[0]}); give --images")
        return tuple(found)

    def lines(self) -> Iterator[str]:
        """Items, names by source, and scores by source."""
        without = f"; {counted(self.n_without_item, 'latent')} without: active in no image to show"
        yield (
            f"{self.out}: {counted(self.n_items, 'item')}, {self.n_testable:,} with images kept back for a test"
            f"{without if self.n_without_item else ''}"
        )
        if not self.names and not self.n_nothing:
            yield f"no names yet: --with CMD asks a command; or fill in a copy of {self.out / 'answers.csv'}, --answers"
        for source, number in self.names.items():
            yield f"  {counted(number, 'name')} by {printable(source)}"
        if self.n_nothing:
            yield f"  {counted(self.n_nothing, 'answer')} saw nothing in common"
        for row in self.sources:
            yield (
                f"  {counted(row['n_names'], 'name')} of {printable(row['given_by'])} tested by "
                f"{printable(row['judge'])}: AUC {_limits(row, 'auc')}, other latents' names "
                f"{_limits(row, 'shuffled')}, difference {_limits(row, 'difference', '+.3f')}; supported one by one: "
                f"{row['n_supported']:,}"
            )

    def to_json(self) -> dict[str, Any]:
        """Plain values: what `--json` prints."""
        return {
            "out": str(self.out),
            **{name: getattr(self, name) for name in ("n_items", "n_without_item", "n_testable", "names", "n_nothing")},
            "asked": [{**vars(each), "reasons": dict(each.reasons)} for each in self.asked],
            "unfit": [*self.unfit],
            "sources": self.sources,
            "detection": self.rows,
        }

    def _repr_html_(self) -> str:
        sheet = "" if self.first_sheet is None else figure_html(self.out / self.first_sheet)
        columns = ("latent", "name", "given_by", "judge", "auc", "auc_low", "auc_high", "shuffled", "difference")
        return super()._repr_html_() + table_html(self.rows, columns) + sheet


def _limits(row: dict[str, Any], what: str, form: str = ".3f") -> str:
    if row[what] is None:
        return "n/a"
    low, high = row[f"{what}_low"], row[f"{what}_high"]
    limits = "no interval" if low is None else f"{low:{form}} to {high:{form}}"
    return f"{row[what]:{form}} ({limits})"


def asked_of(what: str, by: str, tally: Any) -> Asked:
    """The outcome of calls, from their tally."""
    return Asked(
        what=what,
        by=by,
        n_answered=tally.n_answered,
        n_failed=tally.n_failed,
        reasons=tuple(tally.reasons.most_common()),
        gave_up=tally.gave_up,
    )


def names_by_source(names: Sequence[Any]) -> dict[str, int]:
    """given_by -> how many names, in the order of the alphabet."""
    found: dict[str, int] = {}
    for each in names:
        found[each.given_by] = found.get(each.given_by, 0) + 1
    return dict(sorted(found.items()))
