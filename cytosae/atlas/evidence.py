"""What other commands have found about each latent: causes, stability, score, masks, names, replications; by latent.

Each comes from the folder of a command, if it was given, and must be of the atlas's SAE, latents or comparisons. Twin:
test_evidence.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cytosae.names import LatentNames, read_names
from stores.errors import DamagedStore, SpecMismatch
from stores.files import sha256_json
from stores.result_folder import ResultStore
from stores.spec import ABLATION, MASKS, REPLICATION, SCORECARD, STABILITY, Header

_CAUSES = {
    "cls_change": "final CLS, share of its norm",
    "cls_gain": "final CLS, per unit of what was changed",
    "probability": "probability, by the probe of barcodes, of",
    "cls_probability": "probability, by the probe of the final CLS, of",
}
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class EvidenceStores:
    """The folders that were given."""

    causes: ResultStore | None = None  # of `cyto concept ablate`
    stability: ResultStore | None = None  # of `cyto concept stability`
    score: ResultStore | None = None  # of `cyto sae score`
    masks: ResultStore | None = None  # of `cyto concept masks`
    names: LatentNames | None = None  # of `cyto concept describe`
    names_root: Path | None = None
    replications: Sequence[ResultStore] = ()  # of `cyto compare replicate`

    @property
    def given(self) -> list[tuple[str, ResultStore]]:
        """(what it is, the folder) of each."""
        one = (("ablation", self.causes), ("stability", self.stability), ("scorecard", self.score))
        found = [(what, store) for what, store in (*one, ("mask agreement", self.masks)) if store is not None]
        return [*found, *(("replication", store) for store in self.replications)]

    @property
    def spec(self) -> Row:
        """Their identities, for the settings of the atlas; what was not given is not named."""
        one = {"causes": self.causes, "stability": self.stability, "score": self.score, "masks": self.masks}
        found: Row = {name: store.header.identity for name, store in one.items() if store is not None}
        if self.names is not None:  # names are added later, so the folder's identity does not tell them
            said = [[name.latent, name.name, repr(name)] for each in self.names.by_latent.values() for name in each]
            found["names"] = sha256_json([self.names.header.identity, sorted(said)])
        more = [store.header.identity for store in self.replications]
        return {**found, **({"replications": more} if more else {})}

    @property
    def headers(self) -> list[tuple[str, Path, Header]]:
        """Of each, for the provenance page."""
        found = [(what, store.root, store.header) for what, store in self.given]
        if self.names is not None and self.names_root is not None:
            found.append(("latent names", self.names_root, self.names.header))
        return found


def open_evidence(
    *,
    sae_sha256: str,
    latents: Sequence[str],
    comparisons: Sequence[str],
    causes: Path | None = None,
    stability: Path | None = None,
    score: Path | None = None,
    masks: Path | None = None,
    names: Path | None = None,
    replications: Sequence[Path] = (),
) -> EvidenceStores:
    """Open the folders that are given.

    Parameters
    ----------
    sae_sha256 : of the atlas's SAE
    latents, comparisons : identities of its latent stores and comparisons

    Raises
    ------
    SpecMismatch
        If one of them is of another SAE, other latents or another comparison.
    """
    found = EvidenceStores(
        causes=None if causes is None else ResultStore(causes, ABLATION),
        stability=None if stability is None else ResultStore(stability, STABILITY),
        score=None if score is None else ResultStore(score, SCORECARD),
        masks=None if masks is None else ResultStore(masks, MASKS),
        names=None if names is None else read_names(names),
        names_root=names,
        replications=[ResultStore(root, REPLICATION) for root in replications],
    )
    of_sae = [("an ablation", store.root, store.header) for store in (found.causes,) if store is not None]
    of_sae += [("a scorecard", store.root, store.header) for store in (found.score,) if store is not None]
    of_sae += [("names", names, found.names.header)] if names is not None and found.names is not None else []
    for what, root, header in of_sae:
        stated = str(header.spec["sae_sha256"])
        if stated != sae_sha256:
            raise SpecMismatch(
                f"{root} is of another SAE ({stated:.12}…) than the latents ({sae_sha256:.12}…); give {what} of the "
                f"SAE that the latents were made with"
            )
    if found.stability is not None and sae_sha256 not in _hashes(found.stability):
        others = ", ".join(f"{each:.12}…" for each in _hashes(found.stability))
        raise SpecMismatch(
            f"{found.stability.root} compares other SAEs ({others}) than that of the latents ({sae_sha256:.12}…); give "
            f"a folder of cyto concept stability with this SAE"
        )
    if found.masks is not None and found.masks.header.spec["latents"] not in latents:
        raise SpecMismatch(
            f"{found.masks.root} was made from other latents; give a folder of cyto concept masks of one of --latents"
        )
    for each in found.replications:
        if each.header.spec["discovery"] not in comparisons:
            raise SpecMismatch(
                f"{each.root} tests the latents of a comparison that the atlas does not have; give that with --compare"
            )
    return found


def _hashes(stability: ResultStore) -> list[str]:
    return [str(sae["sae_sha256"]) for sae in stability.header.spec["saes"]]


class Evidence:
    """By latent, what `EvidenceStores` hold. Memory: the tables of the folders."""

    def __init__(self, stores: EvidenceStores, *, sae_sha256: str, n_latents: int, pairs: Mapping[str, Row]) -> None:
        """`pairs`: identity of a comparison -> its names, for the replications."""
        self.stores = stores
        self._causes = _Rows(stores.causes, "effects", n_latents)
        self._masks = _Rows(stores.masks, "agreement", n_latents)
        self._score = _Rows(stores.score, "latents", n_latents)
        self._labels = _Rows(stores.score, "labels", n_latents)
        self._chance = _score_by_chance(stores.score)
        self._stability = None if stores.stability is None else _Stability(stores.stability, sae_sha256, n_latents)
        self._replications = [
            (pairs[str(each.header.spec["discovery"])], _Rows(each, "replication", n_latents))
            for each in stores.replications
        ]

    def of(self, latent: int) -> Row:
        """causes, masks, replications: rows; stability, score: one row, or None; names: the best tested first."""
        return {
            "causes": [row for row in map(_cause, self._causes.of(latent)) if row is not None],
            "masks": [row for row in self._masks.of(latent) if row["auroc"] is not None],
            "replications": [{"pair": pair, **row} for pair, rows in self._replications for row in rows.of(latent)],
            "stability": None if self._stability is None else self._stability.of(latent),
            "score": self._score_of(latent),
            "names": () if self.stores.names is None else self.stores.names.of(latent),
        }

    def _score_of(self, latent: int) -> Row | None:
        """monosemanticity and morans_i beside their values by chance; the label of the largest average precision."""
        found = next(iter(self._score.of(latent)), None)
        if found is None:
            return None
        known = {name: _number(found.get(name)) for name in ("monosemanticity", "morans_i")}
        labels = [row for row in self._labels.of(latent) if _number(row["average_precision"]) is not None]
        best = max(labels, key=lambda row: (row["average_precision"], row["label"]), default=None)
        return {**known, **self._chance, "n_maps": found.get("n_maps"), "label": best}


class _Rows:
    """A table of a folder, looked up by latent; nothing without the folder or the table."""

    def __init__(self, store: ResultStore | None, name: str, n_latents: int) -> None:
        self._table = None
        if store is None or f"{name}.parquet" not in (store.header.summary or {}).get("files", {}):
            return
        table = store.table(name)
        table = table.take(np.argsort(table["latent"].to_numpy(), kind="stable"))
        self._table, self._latents = table, table["latent"].to_numpy()
        if len(self._latents) and not 0 <= self._latents[0] <= self._latents[-1] < n_latents:
            raise DamagedStore(f"{store.root} names latents that the SAE does not have")

    def of(self, latent: int) -> list[Row]:
        """Its rows, in the order of the table."""
        if self._table is None:
            return []
        first, last = np.searchsorted(self._latents, [latent, latent + 1])
        return list(self._table.slice(first, last - first).to_pylist()) if first < last else []


class _Stability:
    """Of how many other SAEs each latent has a match whose cosine is above 99% of those by chance."""

    def __init__(self, store: ResultStore, sae_sha256: str, n_latents: int) -> None:
        mine = _hashes(store).index(sae_sha256)
        pairs = [row for row in store.table("pairs").to_pylist() if mine in (row["sae_a"], row["sae_b"])]
        table = store.table("stability")
        table = table.filter(np.asarray(table["sae"].to_numpy() == mine))
        if table["latent"].to_pylist() != list(range(n_latents)):
            raise DamagedStore(f"{store.root}: stability.parquet does not have one row for each latent of the SAE")
        self._mean = table["mean_matched"].to_pylist()  # None: it was not compared
        self._n_others, self._n_found = len(pairs), np.zeros(n_latents, np.int64)
        matches = store.table("matches")
        columns = (matches[name].to_numpy() for name in ("sae_a", "sae_b", "latent_a", "latent_b", "cosine"))
        sae_a, sae_b, latent_a, latent_b, cosine = columns
        for pair in pairs:
            is_pair = (sae_a == pair["sae_a"]) & (sae_b == pair["sae_b"]) & (cosine > float(pair["null_p99"]))
            self._n_found[(latent_a if pair["sae_a"] == mine else latent_b)[is_pair]] += 1

    def of(self, latent: int) -> Row | None:
        """n_found of n_others, and the mean cosine of its matches; None if it was not compared."""
        if self._mean[latent] is None:
            return None
        return {
            "n_found": int(self._n_found[latent]),
            "n_others": self._n_others,
            "mean_matched": float(self._mean[latent]),
        }


def _cause(row: Row) -> Row | None:
    """An effect that is shown, with its name in words."""
    kind, _, label = row["quantity"].partition(":")
    return {**row, "name": f"{_CAUSES[kind]} {label}".strip()} if kind in _CAUSES else None


def _score_by_chance(store: ResultStore | None) -> Row:
    """monosemanticity and morans_i over all latents, and by chance."""
    if store is None:
        return {}
    overall = {row["measure"]: row for row in store.table("scorecard").to_pylist() if row["label"] is None}
    return {
        f"{measure}_{key}": overall.get(measure, {}).get(key)
        for measure in ("monosemanticity", "morans_i")
        for key in ("value", "null", "null_high")
    }


def _number(value: float | None) -> float | None:
    """None also for NaN."""
    return None if value is None or value != value else float(value)
