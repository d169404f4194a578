"""How many latents lie above a mean activation, for several SAEs side by side (CytoSAE, Fig. 2A, bottom right)."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from stores.concept_store import ConceptStore
from stores.errors import BadInput
from stores.notebook import figure_html
from stores.result_folder import begin_results
from stores.spec import THRESHOLDS
from stores.wording import Report, printable

from .figures import Panel, latents_above, plot_scatter, plot_thresholds

LOG10_THRESHOLDS = (-6.0, -5.0, -4.0, -3.5, -3.0, -2.0, -1.0, 0.0)


@dataclass(frozen=True)
class Counts:
    """Latents above each threshold, of one SAE in one dataset."""

    concepts: str  # name of the folder
    dataset: str
    n_latents: int
    n_above: list[int]  # one per threshold


@dataclass(frozen=True, kw_only=True)
class ThresholdResult(Report):
    """Numbers of latents above each threshold, for every folder of concepts and dataset."""

    out: Path  # the folder
    log10_thresholds: tuple[float, ...]
    counts: tuple[Counts, ...]
    was_complete: bool

    def lines(self) -> Iterator[str]:
        """A table: a row for each folder and dataset, a column for each threshold."""
        names = [f"{printable(each.concepts)} {printable(each.dataset)}" for each in self.counts]
        width = max(map(len, names))
        yield "latents with a mean activation above 10 to the"
        yield f"{'':<{width}} " + _cells(self.log10_thresholds)
        for name, each in zip(names, self.counts, strict=True):
            yield f"{name:<{width}} " + _cells(f"{n:,}" for n in each.n_above)
        yield f"table and figures in {self.out}"

    def _repr_html_(self) -> str:
        return super()._repr_html_() + figure_html(self.out / "thresholds.png")


def compare_thresholds(
    concepts: Path | str | Sequence[Path | str], out: Path | str, *, dataset: str | None = None, overwrite: bool = False
) -> ThresholdResult:
    """Count the latents with a mean activation above each of `LOG10_THRESHOLDS`: a table and figures in `out`.

    Parameters
    ----------
    concepts : one or several folders of `cyto concept stats`, such as one for each width
    dataset : only this one; None: every dataset of every folder

    Raises
    ------
    BadInput
        If no folder is given, or one is named twice, or lacks the dataset.
    SpecMismatch
        If `out` holds other settings (and not `overwrite`), or something else.
    """
    concepts, out = [concepts] if isinstance(concepts, Path | str) else concepts, Path(out)
    if not concepts:
        raise BadInput("no concepts are given; give at least one folder of cyto concept stats")
    stores = [ConceptStore(root) for root in concepts]
    names = _names([store.root for store in stores])
    chosen = [
        (name, store, each)
        for name, store in zip(names, stores, strict=True)
        for each in ([dataset] if dataset else store.datasets)
    ]
    panels = [
        Panel.of(store.latents(each), each if len(stores) == 1 else name if dataset else f"{name} · {each}")
        for name, store, each in chosen
    ]
    counts = tuple(
        Counts(name, each, store.n_latents, latents_above(panel.mean_activation, _thresholds()).tolist())
        for (name, store, each), panel in zip(chosen, panels, strict=True)
    )
    spec = {
        "concepts": [{"name": name, "identity": store.identity} for name, store in zip(names, stores, strict=True)],
        "dataset": dataset,
        "log10_thresholds": list(LOG10_THRESHOLDS),
    }
    inputs = [store.root for store in stores]
    writer = begin_results(out, THRESHOLDS, spec, overwrite=overwrite, inputs=inputs, packages=("matplotlib", "numpy"))
    writer.watch(*(store.header for store in stores))
    if writer.is_complete:
        return _result(out, counts, was_complete=True)
    rows = [
        {"concepts": each.concepts, "dataset": each.dataset, "log10_threshold": at, "n_latents": n}
        for each in counts
        for at, n in zip(LOG10_THRESHOLDS, each.n_above, strict=True)
    ]
    writer.write_table("thresholds", pa.Table.from_pylist(rows))
    plot_scatter(panels, writer.root / "scatter")
    plot_thresholds(panels, writer.root / "thresholds")
    writer.finish({"n_curves": len(counts)})
    return _result(out, counts, was_complete=False)


def _result(out: Path, counts: tuple[Counts, ...], *, was_complete: bool) -> ThresholdResult:
    return ThresholdResult(out=out, log10_thresholds=LOG10_THRESHOLDS, counts=counts, was_complete=was_complete)


def _cells(values: Iterable[Any]) -> str:
    return "".join(f"{value:>9}" for value in values)


def _thresholds() -> np.ndarray:
    return 10.0 ** np.array(LOG10_THRESHOLDS)


def _names(roots: Sequence[Path]) -> list[str]:
    """What to call each folder: its name, with that of the folder above it where two have the same one."""
    names = [root.name for root in roots]
    if len(set(names)) < len(names):
        names = [f"{root.parent.name}/{root.name}" for root in roots]
    for name, root in zip(names, roots, strict=True):
        if names.count(name) > 1:
            raise BadInput(
                f"two folders of concepts would both be called {name} ({root}); name each once, or rename one"
            )
    return names
