"""The figures of a scorecard, as they are measured one after the other."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
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
from stores.part_files import Arrays, Keep, computed
from stores.progress import Progress
from stores.tables import listed

from .config import ScoreConfig
from .hierarchy import lineages
from .images import Chosen, csc, iter_maps, read_embedding, read_means, read_tokens
from .intervals import blocks_of, limits
from .label_null import exchanged_labels
from .monosemanticity import mean_cosine, monosemanticity, monosemanticity_without, unit_rows
from .morans_i import means_without, morans_i, shuffled
from .single_latents import SingleLatents, single_latents, single_without
from .sparse_probing import sparse_probing

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
_MAPS_TOGETHER = 512  # images whose maps are kept together
_LATENTS_TOGETHER = 2048  # that are looked at without each block of images
_LEAST_ABOVE_CHANCE = 0.02  # of the dense tokens' area under ROC, to speak of a share of it


_SINGLE = {"best_average_precision": "average_precision", "best_one_latent_probe": "removed"}
_OF_BLOCKS = ("taken_of_block", "images_of_block")


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
    keep: Keep = computed
    rows: list[dict[str, Any]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    latents: dict[str, Any] = field(default_factory=dict)
    single: SingleLatents | None = None

    def read(self, caches: Sequence[ActivationStore], embedding: Path | str | None) -> None:
        """Means of latents and tokens, and the embedding."""
        unit = "patient" if self.chosen.n_patients else "image"
        self.blocks = blocks_of(self.chosen.groups, unit, self.config.seed)
        self.means: csr_matrix = read_means(self.stores, self.chosen, self.progress, self.keep)
        self.by_latent: csc_matrix = csc(self.means)
        self.tokens = read_tokens(caches, self.stores, self.chosen, self.progress, self.keep) if caches else None
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
        without: Floats | None = None,
        n_blocks: int | None = None,
        bounded: bool = True,
    ) -> None:
        """One row.

        n : images of the label, or latents that count
        without : the value without each block of images, for its interval
        n_blocks : that it rests on, where these are not all
        bounded : the value lies from 0 to 1
        """
        low, high = None, None
        if without is not None:
            low, high = limits(value, without, n_blocks or self.blocks.n, bounded=bounded)
        numbers = {"value": value, "low": low, "high": high, "null": null, "null_high": null_high}
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
        n_latents = self.means.shape[1]
        if more := [k for k in config.ks if k > n_latents]:
            self.doubts.append(
                f"k {', '.join(map(str, more))}: the SAE has {n_latents:,} latents, so these rows are of all of them"
            )
        null_labels = exchanged_labels(labels, chosen.groups, config.shuffles, config.seed)
        self._sparse_probes(labels, null_labels)
        del self.means  # all that follows goes by latents
        self._best_latents(labels, null_labels)
        self._hierarchy(labels)

    def _sparse_probes(self, labels: Ints, null_labels: Sequence[Ints]) -> None:
        """Labels told apart by k latents, by the dense token, and the share of the one in the other."""
        config, n_classes = self.config, len(self.classes)
        strata = np.where(labels >= 0, labels, n_classes)
        fold_of = assign_folds(strata, self.chosen.groups, config.folds, np.random.default_rng((config.seed, 0)))
        shared: dict[str, Any] = {"fold_of": fold_of, "n_classes": n_classes, "ks": config.ks}
        found = sparse_probing(
            self.means,
            labels,
            **shared,
            dense=self.tokens,
            block_of=self.blocks.of_image,
            keep=self._kept("probes"),
            progress=self.progress,
        )
        nulls = [
            sparse_probing(
                self.means,
                shuffled,
                **shared,
                dense=self.tokens if number == 0 else None,
                keep=self._kept(f"probes_null_{number}"),
                progress=self._named(f"null {number + 1} of {config.shuffles}"),
            )
            for number, shuffled in enumerate(null_labels)
        ]
        by_chance = np.stack([null.latents for null in nulls])  # (shuffles, ks, classes)
        assert found.latents_without is not None
        dense = None if found.dense is None else nanmean(found.dense)
        for number, k in enumerate(config.ks):
            without = found.latents_without[number]
            of_k = self._add_labels(
                "sparse_probe_auroc", found.latents[number], by_chance[:, number], without, labels, k=k
            )
            if dense is not None and dense - 0.5 >= _LEAST_ABOVE_CHANCE:
                assert found.dense_without is not None
                dense_without = over_classes(found.dense_without)
                share, null, high = ((each - 0.5) / (dense - 0.5) for each in of_k)
                ratio = (over_classes(without) - 0.5) / np.where(dense_without > 0.5, dense_without - 0.5, np.nan)
                about: dict[str, Any] = {"k": k, "n": n_classes, "without": ratio, "bounded": False}
                self.add("share_of_dense", share, null=null, null_high=high, **about)
        if found.dense is None or dense is None:
            self.said.append("the dense tokens' performance needs the caches: --cache")
            return
        of_null = nulls[0].dense
        assert of_null is not None
        assert found.dense_without is not None
        self._add_labels("dense_probe_auroc", found.dense, of_null[None], found.dense_without, labels, has_high=False)
        if dense - 0.5 < _LEAST_ABOVE_CHANCE:
            self.said.append("the mean token tells no label from others, so there is no share of it to recover")

    def _best_latents(self, labels: Ints, null_labels: Sequence[Ints]) -> None:
        """The best latent for each label, beside the best for shuffled ones."""
        self.single, best_null = self._single(labels, null_labels)
        for number, (measure, name) in enumerate(_SINGLE.items()):
            values = getattr(self.single, name)
            parts = (self.by_latent, labels, self.blocks.of_image, self.blocks.n, values.argmax(0))
            self._add_labels(measure, values.max(0), best_null[name], single_without(*parts)[number], labels)

    def _add_labels(
        self,
        measure: str,
        found: Floats,
        chance: Floats,
        without: Floats,
        labels: Ints,
        *,
        k: int | None = None,
        has_high: bool = True,
    ) -> tuple[float, float, float]:
        """A row of all labels together and one of each; the mean, its null, and the highest of the null.

        Parameters
        ----------
        found, chance, without : (classes,), (shuffles, classes) and (classes, blocks)
        labels : (n,) of the images
        has_high : there are enough shuffles for a highest null
        """
        of_null = [nanmean(each) for each in chance]
        mean, null, high = nanmean(found), nanmean(of_null), nanmax(of_null)
        shown = high if has_high else None
        self.add(measure, mean, null=null, null_high=shown, k=k, n=len(self.classes), without=over_classes(without))
        for c, name in enumerate(self.classes):
            has = labels == c
            self.add(
                measure,
                found[c],
                null=nanmean(chance[:, c]),
                null_high=nanmax(chance[:, c]) if has_high else None,
                label=name,
                k=k,
                n=int(has.sum()),
                without=without[c],
                n_blocks=min(self.blocks.having(has), self.blocks.having(~has)),
            )
        return mean, null, high

    def _single(self, labels: Ints, null_labels: Sequence[Ints]) -> tuple[SingleLatents, dict[str, Floats]]:
        """Every latent for every label; and of shuffled labels the best for each, (shuffles, classes)."""
        n_classes = len(self.classes)

        def one(of_images: Ints) -> Arrays:
            found = single_latents(self.by_latent, of_images, n_classes)
            return {name: getattr(found, name) for name in _SINGLE.values()}

        def best_of(of_images: Ints) -> Arrays:
            return {name: values.max(0) for name, values in one(of_images).items()}

        found = self.keep("single", lambda: one(labels))
        nulls = []
        for number, exchanged in enumerate(null_labels):
            nulls.append(self.keep(f"single_null_{number}", partial(best_of, exchanged)))
            self.progress(number + 1, len(null_labels), "single latents, shuffled")
        return SingleLatents(**found), {name: np.stack([null[name] for null in nulls]) for name in _SINGLE.values()}

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
            blocks=self.blocks,
            keep=self.keep,
        )
        if not found:
            self.said.append(f"absorption and splitting: no {self.config.parent} has two {self.config.label}s")
            return
        n = sum(each.n_images for each in found)
        weights = np.array([each.n_images / n for each in found])
        absorbed = float(weights @ np.array([each.absorbed for each in found]))
        absorbed_null = float(weights @ np.array([each.absorbed_null for each in found]))
        without = share_without(*(np.sum([getattr(each, name) for each in found], axis=0) for name in _OF_BLOCKS))
        self.add("absorption", absorbed, null=absorbed_null, n=n, without=without)
        of_null = weights @ np.array([each.split_null for each in found])
        split = float(weights @ np.array([each.split for each in found]))
        without = weights @ np.array([each.split_without for each in found])
        self.add("splitting", split, null=of_null.mean(), null_high=of_null.max(), n=n, without=without)
        for each in found:
            of_label: dict[str, Any] = {
                "label": known[each.parent],
                "n": each.n_images,
                "n_blocks": each.n_blocks,
            }
            without = share_without(*(getattr(each, name) for name in _OF_BLOCKS))
            self.add("absorption", each.absorbed, null=each.absorbed_null, without=without, **of_label)
            null = np.array(each.split_null)
            self.add(
                "splitting",
                each.split,
                null=null.mean(),
                null_high=null.max(),
                without=each.split_without,
                **of_label,
            )

    def look_measures(self) -> None:
        """Monosemanticity."""
        if self.embedding is None:
            self.said.append("monosemanticity needs an image encoder: --embedding TABLE, or --cache for the backbone's")
            return
        units = unit_rows(self.embedding)
        found = self.keep("looks", lambda: {"value": monosemanticity(self.by_latent, units)})["value"]
        counts = (self.n_active >= self.config.min_images) & ~np.isnan(found)
        self.latents["monosemanticity"] = pa.array(found, mask=np.isnan(found))
        n = int(counts.sum())
        if not n:
            self.said.append(f"monosemanticity: no latent is active, and varies, in {self.config.min_images} images")
            return
        rng = np.random.default_rng((self.config.seed, 3))
        means, largest = [], np.full(len(found), -np.inf)
        for number in range(self.config.shuffles):
            order = rng.permutation(len(units))
            by_chance = self.keep(f"looks_null_{number}", partial(self._looks, units, order))["value"]
            means.append(by_chance[counts].mean())
            largest = np.fmax(largest, by_chance)
            self.progress(number + 1, self.config.shuffles, "embeddings shuffled")
        without = self.keep("looks_without", partial(self._looks_without, units, counts, largest))
        self.add(
            "monosemanticity",
            found[counts].mean(),
            null=mean_cosine(units),
            null_high=max(means),
            n=n,
            without=without["mean"],
            bounded=False,
        )
        share = (found > largest)[counts].mean()
        self.add("monosemantic_latents", share, null=1 / (1 + self.config.shuffles), n=n, without=without["share"])

    def _looks(self, units: Floats, order: Ints) -> Arrays:
        return {"value": monosemanticity(self.by_latent, units[order])}

    def _looks_without(self, units: Floats, counts: npt.NDArray[np.bool_], largest: Floats) -> Arrays:
        """Mean over the latents that count, and share of those above all shuffles, without each block of images."""
        sums, n_above, n_known = np.zeros((3, self.blocks.n))
        latents = np.flatnonzero(counts)
        for first in range(0, len(latents), _LATENTS_TOGETHER):
            some = latents[first : first + _LATENTS_TOGETHER]
            found = monosemanticity_without(self.by_latent[:, some], units, self.blocks.of_image, self.blocks.n)
            known = np.isfinite(found)
            sums += np.where(known, found, 0).sum(0)
            n_above += (known & (found > largest[some, None])).sum(0)
            n_known += known.sum(0)
        n_known[n_known == 0] = np.nan
        return {"mean": sums / n_known, "share": n_above / n_known}

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
        images = sorted(lists)
        measured = []
        for first in range(0, len(images), _MAPS_TOGETHER):
            some = {image: np.array(lists[image], np.int64) for image in images[first : first + _MAPS_TOGETHER]}
            measured.append(self.keep(f"maps_{first}", partial(self._maps, some, first, len(images))))
        names = ("image", "latent", "value", "by_chance")
        of_image, of_latent, value, by_chance = (
            np.concatenate([np.zeros(0), *(m[name] for m in measured)]) for name in names
        )
        known = ~np.isnan(value)
        of_image, of_latent = of_image[known].astype(np.int64), of_latent[known].astype(np.int64)
        n_latents = len(self.n_active)
        n_maps = np.bincount(of_latent, minlength=n_latents)
        has_one = n_maps > 0
        n = int(has_one.sum())
        if not n:
            self.said.append("Moran's I: no map of a latent varies")
            return
        found, null = (
            np.bincount(of_latent, each[known], n_latents) / np.maximum(1, n_maps) for each in (value, by_chance)
        )
        self.latents |= {"morans_i": pa.array(found, mask=~has_one), "n_maps": n_maps}
        high = float(np.quantile(null[has_one], 0.95))
        without, above = means_without(
            value[known], of_latent, self.blocks.of_image[of_image], n_latents, self.blocks.n, high
        )
        means: dict[str, Any] = {"null": null[has_one].mean(), "null_high": high, "n": n}
        self.add("morans_i", found[has_one].mean(), **means, without=without, bounded=False)
        self.add("coherent_latents", (found[has_one] > high).mean(), null=0.05, n=n, without=above)

    def _maps(self, latents_of: dict[int, Ints], n_before: int, n_in_all: int) -> Arrays:
        """Moran's I of maps, and of their shuffled patches: (maps,) each, with their image and latent."""

        def tell(done: int, total: int, state: str) -> None:
            self.progress(n_before + done, n_in_all, state)

        images, latents, values, nulls = [], [], [], []
        for image, some, maps in iter_maps(self.stores, self.chosen, latents_of, tell):
            images.append(np.full(len(some), image))
            latents.append(some)
            values.append(morans_i(maps))
            nulls.append(morans_i(shuffled(maps, np.random.default_rng((self.config.seed, 4, image)))))
        return {
            "image": np.concatenate(images),
            "latent": np.concatenate(latents),
            "value": np.concatenate(values),
            "by_chance": np.concatenate(nulls),
        }

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

    def _kept(self, before: str) -> Keep:
        return lambda name, compute: self.keep(f"{before}_{name}", compute)

    def _named(self, name: str) -> Progress:
        return lambda done, total, state: self.progress(done, total, f"{state}, {name}")


def over_classes(values: Floats) -> Floats:
    """(blocks,) means over the classes, (classes, blocks), that are known."""
    known = np.isfinite(values)
    return np.where(known.any(0), np.where(known, values, 0).sum(0) / np.maximum(1, known.sum(0)), np.nan)


def share_without(counted: Floats, of: Floats) -> Floats:
    """(blocks,) the share without each block, of what is counted in each, and of how many."""
    left = of.sum() - of
    return np.where(left > 0, (counted.sum() - counted) / np.maximum(1, left), np.nan)


def nanmean(values: Any) -> float:
    known = [float(v) for v in values if not math.isnan(v)]
    return float(np.mean(known)) if known else float("nan")


def nanmax(values: Any) -> float:
    known = [float(v) for v in values if not math.isnan(v)]
    return max(known) if known else float("nan")
