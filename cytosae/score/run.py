"""The scorecard of an SAE (`cyto sae score`): what its latents hold, beside what chance and baselines give.

    images        readable images with a label; means over their patches of latents and tokens: images.py
    labels        k latents against the dense mean token, on held-out patients: sparse_probing.py
                  every latent for every label: single_latents.py; coarse and fine labels: hierarchy.py
    images        do those of a latent look alike: monosemanticity.py
    places        are its maps in one piece: morans_i.py
    from others   what cyto sae eval --keep and cyto concept stability have recorded

Each value stands beside what chance gives, and beside other scorecards of the same images. No rank is made of them:
arXiv 2602.14111 shows random decoders near trained ones on single figures.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cytosae.training import read_health
from stores.files import sha256_file, sha256_json
from stores.latent_store import LatentStore
from stores.machine import n_cores
from stores.progress import Progress
from stores.result_folder import ResultStore, begin_results
from stores.spec import SAE, SCORECARD, read_header

from .beside import KEYS, Baseline, check_names, open_stability
from .card import Card, Passes
from .config import ScoreConfig
from .images import Chosen, choose_images, open_latents, open_tokens
from .report import MEASURES, ScorePlan, ScoreResult
from .single_latents import SingleLatents

Place = Path | str
# on one core, as bench/score.py measures them: docs/benchmarks.md
_ENTRIES_PER_SECOND = 1.5e7
_BYTES_PER_SECOND = 3e8
_SECONDS_PER_PROBE = 0.95  # of all ks, one label and fold, 10,000 images
_SECONDS_PER_DENSE_PROBE = 6.0
_PRODUCTS_PER_SECOND = 1.3e9  # nonzeros x width, for monosemanticity
_SINGLE_PER_SECOND = 6e6  # nonzeros x labels


def plan_score(run: Place, latents: Sequence[Place], config: ScoreConfig | None = None) -> ScorePlan:
    """What `score_sae` will take, from headers and image tables alone; errors as there."""
    config = config or ScoreConfig()
    stores = open_latents(_listed(latents), _sha256_of(Path(run)))
    return _plan(stores, choose_images(stores, config), config)


def _plan(stores: Sequence[LatentStore], chosen: Chosen, config: ScoreConfig) -> ScorePlan:
    n, n_latents = len(chosen.ids), stores[0].spec.n_latents
    entries, most = 0, 0
    for number, store in enumerate(stores):
        of_image = np.diff(store.image_indptr)[chosen.index[chosen.store == number]]
        entries += int(of_image.sum())
        most += int(np.minimum(of_image, n_latents).sum())
    width = int(stores[0].spec.cache.get("width", 0))
    n_classes = len({label for label in chosen.labels if label is not None})
    n_fits = n_classes * config.folds
    seconds = 2 * entries / _ENTRIES_PER_SECOND + n * stores[0].spec.tokens_per_image * width * 2 / _BYTES_PER_SECOND
    seconds += most * width * (1 + config.shuffles) / _PRODUCTS_PER_SECOND
    seconds += most * n_classes * (1 + config.shuffles) / _SINGLE_PER_SECOND / n_cores()
    per_image = n / 10_000 / n_cores()
    seconds += n_fits * per_image * (_SECONDS_PER_PROBE * (1 + config.shuffles) + 2 * _SECONDS_PER_DENSE_PROBE)
    memory = (
        7e8  # libraries, the rows that are read together, and what monosemanticity works on at once
        + 1000 * sum(store.spec.n_images for store in stores)  # image tables
        + 16 * most  # means by images and by latents; later these, and those of one coarse label
        + 20 * n * width
        + n_cores() * 24 * n * width
        + 40 * n_latents * max(1, n_classes)
    )
    return ScorePlan(
        n_images=n,
        n_candidates=chosen.n_candidates,
        n_latents=n_latents,
        n_entries=entries,
        memory_bytes=int(memory),
        seconds=seconds,
    )


def score_sae(
    run: Place,
    out: Place,
    config: ScoreConfig | None = None,
    *,
    latents: Sequence[Place],
    caches: Sequence[Place] = (),
    embedding: Place | None = None,
    stability: Place | None = None,
    baselines: Sequence[Place] = (),
    overwrite: bool = False,
    progress: Progress = lambda done, total, state: None,
) -> ScoreResult:
    """The scorecard of the SAE in `run`, into the folder `out`.

    Written are scorecard.parquet and scorecard.json (a row for each figure, with its interval over patients, beside its
    null), latents.parquet (a row for each latent) and labels.parquet (a row for each latent and label). The same call
    continues an interrupted one.

    Parameters
    ----------
    latents : latent stores of this SAE
    caches : the caches that they were encoded from, for what the dense mean token does
    embedding : table (Parquet, CSV) of another image encoder, image_id and numbers, for monosemanticity; None: the
        backbone's mean tokens, of which the latents were made
    stability : folder of cyto concept stability with this SAE
    baselines : folders of this command, of other SAEs with latents of the same images and the same settings

    Raises
    ------
    BadInput
        If no image is left, there are too few groups for the folds, or the embedding lacks an image.
    SpecMismatch
        If latents, caches, stability or baselines are not of this SAE or these images; or `out` holds something else.
    """
    run, out, config = Path(run), Path(out), config or ScoreConfig()
    sae_sha256 = _sha256_of(run)
    stores = open_latents(_listed(latents), sae_sha256)
    opened = open_tokens(_listed(caches), stores)
    chosen = choose_images(stores, config)
    others = [Baseline.open(Path(place)) for place in _listed(baselines)]
    check_names(others)
    health = read_health(run, sae_sha256=sae_sha256)
    seeds = None if stability is None else open_stability(Path(stability), sae_sha256)
    sample = sha256_json([chosen.ids, chosen.labels, chosen.parents, chosen.groups.tolist()])
    final_cls = None if health is None else next((r.value for r in health.rows if r.name == "final CLS"), None)
    asked = {**asdict(config), "ks": list(config.ks)}
    spec = {
        "sae_sha256": sae_sha256,
        "latents": [store.identity for store in stores],
        "caches": [cache.content_sha256 for cache in opened],
        "embedding_sha256": None if embedding is None else sha256_file(Path(embedding)),
        "stability": None if seeds is None else seeds.identity,
        "final_cls": final_cls,
        "baselines": [each.identity for each in others],
        "sample_sha256": sample,
        **asked,
    }
    for each in others:
        each.require(spec, asked)
    given = (*_listed(latents), *_listed(caches), embedding, stability)
    inputs = [run, *(Path(each) for each in given if each is not None and "://" not in str(each))]
    inputs += [each.root for each in others]
    writer = begin_results(
        out, SCORECARD, spec, overwrite=overwrite, inputs=inputs, packages=("numpy", "scipy", "scikit-learn", "numba")
    )
    writer.watch(*(store.header for store in stores), *(cache.header for cache in opened))
    if writer.is_complete:
        return _result(out, ResultStore(out, SCORECARD).json("scorecard"), was_complete=True)
    card = Card(config, stores, chosen, Passes(progress), writer.parts)
    card.read(opened, embedding)
    card.label_measures()
    card.look_measures()
    card.place_measures()
    if final_cls is None:
        card.said.append("final CLS: nothing recorded; cyto sae eval RUN CACHE --images ROOT --keep measures it")
    else:
        card.add("final_cls", final_cls, null=0.0)
    if seeds is not None:
        seeds.add_to(card)
    rows = [_with_baselines(row, others) for row in card.rows]
    order = list(MEASURES)
    rows.sort(key=lambda row: order.index(row["measure"]))
    facts = {
        "rows": rows,
        "baselines": [each.name for each in others],
        "n_images": len(chosen.ids),
        "n_candidates": chosen.n_candidates,
        "n_patients": chosen.n_patients,
        "unit": card.blocks.unit,
        "n_blocks": card.blocks.n,
        "classes": card.classes,
        "said": card.said,
        "doubts": card.doubts,
        "sae_sha256": sae_sha256,
        "dense": "mean patch token",
        "embedding": "the given table" if embedding is not None else "mean patch token",
    }
    writer.write_table("scorecard", _score_table(rows, [each.name for each in others]))
    writer.write_table("latents", pa.table(card.latents))
    if card.single is not None:
        writer.write_table("labels", _label_table(card.single, card.classes))
    writer.write_json("scorecard", facts)
    writer.finish({"n_images": len(chosen.ids), "n_rows": len(rows)})
    return _result(out, facts, was_complete=False)


def _result(out: Path, facts: dict[str, Any], *, was_complete: bool) -> ScoreResult:
    return ScoreResult(
        out=out,
        rows=facts["rows"],
        baselines=tuple(facts["baselines"]),
        n_images=facts["n_images"],
        n_patients=facts["n_patients"],
        unit=facts.get("unit", ""),
        classes=tuple(facts["classes"]),
        said=tuple(facts["said"]),
        doubts=tuple(facts["doubts"]),
        was_complete=was_complete,
    )


def _with_baselines(row: dict[str, Any], others: Sequence[Baseline]) -> dict[str, Any]:
    key = tuple(row[name] for name in KEYS)
    return row | {f"baseline_{each.name}": each.values.get(key) for each in others}


def _score_table(rows: list[dict[str, Any]], baselines: Sequence[str]) -> pa.Table:
    kinds = {"measure": pa.string(), "label": pa.string(), "k": pa.int64(), "n": pa.int64()}
    names = (*KEYS, "value", "low", "high", "null", "null_high", "n", *(f"baseline_{name}" for name in baselines))
    return pa.table({n: pa.array([row[n] for row in rows], kinds.get(n, pa.float64())) for n in names})


def _label_table(single: SingleLatents, classes: Sequence[str]) -> pa.Table:
    n_latents = len(single.removed)
    return pa.table(
        {
            "latent": np.repeat(np.arange(n_latents), len(classes)),
            "label": pa.array(list(classes)).take(pa.array(np.tile(np.arange(len(classes)), n_latents))),
            "average_precision": single.average_precision.ravel(),
            "one_latent_probe": single.removed.ravel(),
        }
    )


def _sha256_of(run: Path) -> str:
    return str((read_header(run, SAE).summary or {}).get("sae_sha256", ""))


def _listed(places: Sequence[Place] | Place) -> list[Place]:
    return [places] if isinstance(places, Path | str) else list(places)
