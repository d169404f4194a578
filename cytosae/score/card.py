"""The figures of a scorecard, as they are measured one after the other."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy.sparse import csc_matrix, csr_matrix

from cytosae.probe import assign_folds
from stores.activation_store import ActivationStore
from stores.errors import BadInput
from stores.latent_store import LatentStore
from stores.progress import Progress
from stores.tables import listed

from .config import ScoreConfig
from .hierarchy import lineages, shuffled_labels
from .images import Chosen, csc, iter_maps, read_embedding, read_means, read_tokens
from .monosemanticity import mean_cosine, monosemanticity, unit_rows
from .morans_i import morans_i, shuffled
from .single_latents import SingleLatents, single_latents
from .sparse_probing import sparse_probing

Ints = npt.NDArray[np.int64]
_LEAST_ABOVE_CHANCE = 0.02  # of the dense tokens' area under ROC, to speak of a share of it


class Passes:
    """Progress in steps over all passes so far; the number of passes is not known before. A pass has its own state."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._n_before, self._n_done, self._state = progress, 0, 0, ""

    def __call__(self, done: int, total: int, state: str) -> None:
        if state != self._state:
            self._n_before, self._state = self._n_before + self._n_done, state
        self._n_done = done
        self._progress(self._n_before + done, self._n_before + total, state)


@dataclass
class Card:
    """The figures, as they are found."""

    config: ScoreConfig
    stores: Sequence[LatentStore]
    chosen: Chosen
    progress: Progress
    rows: list[dict[str, Any]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    latents: dict[str, Any] = field(default_factory=dict)
    single: SingleLatents | None = None

    def read(self, caches: Sequence[ActivationStore], embedding: Path | str | None) -> None:
        """Means of latents and tokens, and the embedding."""
        self.means: csr_matrix = read_means(self.stores, self.chosen, self.progress)
        self.by_latent: csc_matrix = csc(self.means)
        self.tokens = read_tokens(caches, self.stores, self.chosen, self.progress) if caches else None
        self.embedding = self.tokens if embedding is None else read_embedding(Path(embedding), self.chosen)
        self.n_active: Ints = np.asarray(self.by_latent.getnnz(0), np.int64)
        sums = np.asarray(self.by_latent.sum(0, dtype=np.float64)).ravel()
        self.latents = {
            "latent": np.arange(len(self.n_active)),
            "n_images": self.n_active,
            "mean_activation": sums / np.maximum(1, self.n_active),
        }

    def add(
        self,
        measure: str,
        value: float,
        *,
        null: float | None = None,
        null_high: float | None = None,
        label: str | None = None,
        k: int | None = None,
        n: int | None = None,
    ) -> None:
        """One row; `n`: images of the label, or latents that count."""
        numbers = {"value": value, "null": null, "null_high": null_high}
        plain = {name: None if v is None or math.isnan(v) else float(v) for name, v in numbers.items()}
        self.rows.append({"measure": measure, "label": label, "k": k, **plain, "n": n})

    def label_measures(self) -> None:
        """Sparse probing, every latent for every label, absorption and splitting."""
        config, chosen = self.config, self.chosen
        labels = self._numbered(chosen.labels)
        if len(self.classes) < 2:
            self.said.append(
                f"labels: fewer than two {config.label}s have {config.folds} independent groups of images; nothing "
                f"about labels is measured. Name another column with --label"
            )
            return
        n_classes = len(self.classes)
        sizes = np.bincount(labels[labels >= 0], minlength=n_classes)
        folds = np.where(labels >= 0, labels, n_classes)
        fold_of = assign_folds(folds, chosen.groups, config.folds, np.random.default_rng((config.seed, 0)))
        null_labels = shuffled_labels(labels, chosen.groups, config.shuffles, config.seed)
        found = sparse_probing(
            self.means, labels, fold_of, n_classes, config.ks, dense=self.tokens, progress=self.progress
        )
        nulls = [
            sparse_probing(
                self.means,
                shuffled,
                fold_of,
                n_classes,
                config.ks,
                dense=self.tokens if number == 0 else None,
                progress=self._named(f"null {number + 1} of {config.shuffles}"),
            )
            for number, shuffled in enumerate(null_labels)
        ]
        by_chance = np.stack([null.latents for null in nulls])  # (shuffles, ks, classes)
        dense = None if found.dense is None else nanmean(found.dense)
        for number, k in enumerate(config.ks):
            mean = nanmean(found.latents[number])
            of_null = [nanmean(each) for each in by_chance[:, number]]
            null, high = nanmean(of_null), nanmax(of_null)
            self.add("sparse_probe_auroc", mean, null=null, null_high=high, k=k, n=n_classes)
            for c, name in enumerate(self.classes):
                chance = by_chance[:, number, c]
                self.add(
                    "sparse_probe_auroc",
                    found.latents[number, c],
                    null=nanmean(chance),
                    null_high=nanmax(chance),
                    label=name,
                    k=k,
                    n=int(sizes[c]),
                )
            if dense is not None and dense - 0.5 >= _LEAST_ABOVE_CHANCE:
                share = [(each - 0.5) / (dense - 0.5) for each in (mean, null, high)]
                self.add("share_of_dense", share[0], null=share[1], null_high=share[2], k=k, n=n_classes)
        if found.dense is None:
            self.said.append("the dense tokens' performance needs the caches: --cache")
        else:
            dense_null = nulls[0].dense
            assert dense_null is not None
            self.add("dense_probe_auroc", nanmean(found.dense), null=nanmean(dense_null), n=n_classes)
            for c, name in enumerate(self.classes):
                self.add("dense_probe_auroc", found.dense[c], null=dense_null[c], label=name, n=int(sizes[c]))
            if dense is not None and dense - 0.5 < _LEAST_ABOVE_CHANCE:
                self.said.append("the mean token tells no label from others, so there is no share of it to recover")
        self.single = single_latents(self.by_latent, labels, n_classes)
        null_single = [single_latents(self.by_latent, shuffled, n_classes) for shuffled in null_labels]
        for measure, name in (("best_average_precision", "average_precision"), ("best_one_latent_probe", "removed")):
            best = getattr(self.single, name).max(0)
            best_null = np.stack([getattr(null, name).max(0) for null in null_single])  # (shuffles, classes)
            of_null = [nanmean(each) for each in best_null]
            self.add(measure, best.mean(), null=nanmean(of_null), null_high=nanmax(of_null), n=n_classes)
            for c, label in enumerate(self.classes):
                null, high = nanmean(best_null[:, c]), nanmax(best_null[:, c])
                self.add(measure, best[c], null=null, null_high=high, label=label, n=int(sizes[c]))
        self._hierarchy(labels)

    def _hierarchy(self, labels: Ints) -> None:
        assert self.single is not None
        known = sorted({name for name in self.chosen.parents if name is not None})
        if not known:
            self.said.append(f"absorption and splitting need a coarser label; no image has a {self.config.parent}")
            return
        number = {name: i for i, name in enumerate(known)}
        parents = np.array([-1 if name is None else number[name] for name in self.chosen.parents], np.int64)
        found = lineages(
            self.by_latent,
            labels,
            parents,
            self.chosen.groups,
            len(self.classes),
            len(known),
            of_labels=self.single.average_precision,
            of_parents=single_latents(self.by_latent, parents, len(known)).average_precision,
            shuffles=self.config.shuffles,
            seed=self.config.seed,
        )
        if not found:
            self.said.append(f"absorption and splitting: no {self.config.parent} has two {self.config.label}s")
            return
        n = sum(each.n_images for each in found)
        weights = np.array([each.n_images / n for each in found])
        absorbed = float(weights @ np.array([each.absorbed for each in found]))
        absorbed_null = float(weights @ np.array([each.absorbed_null for each in found]))
        self.add("absorption", absorbed, null=absorbed_null, n=n)
        of_null = weights @ np.array([each.split_null for each in found])
        split = float(weights @ np.array([each.split for each in found]))
        self.add("splitting", split, null=of_null.mean(), null_high=of_null.max(), n=n)
        for each in found:
            name, size = known[each.parent], each.n_images
            self.add("absorption", each.absorbed, null=each.absorbed_null, label=name, n=size)
            null = np.array(each.split_null)
            self.add("splitting", each.split, null=null.mean(), null_high=null.max(), label=name, n=size)

    def look_measures(self) -> None:
        """Monosemanticity."""
        if self.embedding is None:
            self.said.append("monosemanticity needs an image encoder: --embedding TABLE, or --cache for the backbone's")
            return
        units = unit_rows(self.embedding)
        found = monosemanticity(self.by_latent, units)
        counts = (self.n_active >= self.config.min_images) & ~np.isnan(found)
        self.latents["monosemanticity"] = pa.array(found, mask=np.isnan(found))
        n = int(counts.sum())
        if not n:
            self.said.append(f"monosemanticity: no latent is active, and varies, in {self.config.min_images} images")
            return
        rng = np.random.default_rng((self.config.seed, 3))
        means, is_above = [], np.ones(len(found), bool)
        for number in range(self.config.shuffles):
            by_chance = monosemanticity(self.by_latent, units[rng.permutation(len(units))])
            means.append(by_chance[counts].mean())
            is_above &= found > by_chance
            self.progress(number + 1, self.config.shuffles, "embeddings shuffled")
        self.add("monosemanticity", found[counts].mean(), null=mean_cosine(units), null_high=max(means), n=n)
        self.add("monosemantic_latents", is_above[counts].mean(), null=1 / (1 + self.config.shuffles), n=n)

    def place_measures(self) -> None:
        """Moran's I of the maps of each latent's first images."""
        try:
            sides = {store.layout.side for store in self.stores}
        except BadInput:
            sides = {1}
        if min(sides) < 2:
            self.said.append("Moran's I needs a square of patches of 2 x 2 or more")
            return
        most = self.config.map_images
        lists: dict[int, list[int]] = {}
        for latent in np.flatnonzero(self.n_active >= self.config.min_images).tolist():
            low, high = self.by_latent.indptr[latent : latent + 2]
            top = np.argsort(-self.by_latent.data[low:high], kind="stable")[:most]
            for image in self.by_latent.indices[low:high][top].tolist():
                lists.setdefault(image, []).append(latent)
        sums, n_maps = np.zeros((2, len(self.n_active))), np.zeros(len(self.n_active), np.int64)
        latents_of = {image: np.array(some, np.int64) for image, some in lists.items()}
        for image, some, maps in iter_maps(self.stores, self.chosen, latents_of, self.progress):
            value = morans_i(maps)
            by_chance = morans_i(shuffled(maps, np.random.default_rng((self.config.seed, 4, image))))
            known = ~np.isnan(value)
            sums[:, some[known]] += value[known], by_chance[known]
            n_maps[some[known]] += 1
        has_one = n_maps > 0
        n = int(has_one.sum())
        if not n:
            self.said.append("Moran's I: no map of a latent varies")
            return
        found, null = sums / np.maximum(1, n_maps)
        self.latents |= {"morans_i": pa.array(found, mask=~has_one), "n_maps": n_maps}
        high = float(np.quantile(null[has_one], 0.95))
        self.add("morans_i", found[has_one].mean(), null=null[has_one].mean(), null_high=high, n=n)
        self.add("coherent_latents", (found[has_one] > high).mean(), null=0.05, n=n)

    def _numbered(self, labels: Sequence[str | None]) -> Ints:
        """(n,) numbers of the labels with enough groups; -1 of others, which are still told apart from."""
        groups_of: dict[str, set[int]] = {}
        for label, group in zip(labels, self.chosen.groups.tolist(), strict=True):
            if label is not None:
                groups_of.setdefault(label, set()).add(group)
        few = sorted(name for name, groups in groups_of.items() if len(groups) < self.config.folds)
        self.classes = sorted(set(groups_of) - set(few))
        if few and self.classes:
            self.doubts.append(
                f"{len(few):,} labels have images of fewer than {self.config.folds} patients or other independent "
                f"groups ({listed(few)}): they are only among the others"
            )
        if not self.chosen.n_patients:
            self.doubts.append(
                "no image has a patient: images of one patient may be in both sides of a fold, and scores too good"
            )
        number = {name: i for i, name in enumerate(self.classes)}
        return np.array([number.get(label or "", -1) for label in labels], np.int64)

    def _named(self, name: str) -> Progress:
        return lambda done, total, state: self.progress(done, total, f"{state}, {name}")


def nanmean(values: Any) -> float:
    known = [float(v) for v in values if not math.isnan(v)]
    return float(np.mean(known)) if known else float("nan")


def nanmax(values: Any) -> float:
    known = [float(v) for v in values if not math.isnan(v)]
    return max(known) if known else float("nan")
