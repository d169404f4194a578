"""A fitted probe, tried once on rows that it has not seen: another cohort, or sites that were left out of all fitting.

    read      the rows; refused if they share an image with the training, or are barcodes of another kind
    predict   every row, including those without a class that the model knows
    score     rows with a known class: all scores of the cross-validation, with intervals over whole groups

The model is fixed here: the intervals are over other patients of the test alone. So they are widened less than those of
a cross-validation, where other patients would also change the fits.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stores.barcode_store import BarcodeStore
from stores.content_hashes import find_trained_on
from stores.errors import SpecMismatch
from stores.result_folder import ResultStore, ResultWriter, begin_results
from stores.spec import PROBE_TEST, SAE, read_header
from stores.tables import listed

from .figures import plot_test_confusion
from .folds import FEW_GROUPS
from .intervals import (
    N_DRAWS,
    calibration,
    calibration_error,
    draw_groups,
    faultless,
    interval,
    possible,
    scores_of_draws,
)
from .result import ProbeTest
from .saved_model import Card, ProbeModel, check_barcodes, check_unseen, image_hashes, read_model, units_config
from .scores import METRICS, class_scores, confusion_matrix, finite_or_none, score
from .units import NewUnits, UnitConfig, Where, read_test_units

Float = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
WIDER = 1.1  # intervals of a bootstrap of few groups are too narrow by this factor: docs/benchmarks.md


@dataclass(frozen=True)
class Rows:
    """The rows of a test, and warnings about them."""

    store: BarcodeStore
    units: NewUnits
    config: UnitConfig
    warnings: list[str]


def read_rows(
    store: BarcodeStore,
    config: UnitConfig,
    model: dict[str, Any],
    latents: Ints,
    seen: frozenset[str],
    *,
    where: Where | None = None,
    sae: Path | None = None,
) -> Rows:
    """The rows of a test, checked against the model.

    Parameters
    ----------
    model : fields of its card: `classes`, `n_images_without_hash`, and those of `check_barcodes`
    latents : (k,) latents whose barcodes are read
    seen : content hashes of the images that the model is fitted on
    where : the rows of the training's own barcodes that were kept out

    Raises
    ------
    SpecMismatch, BadInput
        If the barcodes are of another kind, share an image with the training, or have no class of the model.
    """
    warnings = check_barcodes(model, store)
    units = read_test_units(store, config, model["classes"], latents, where=where)
    hashes = image_hashes(store, model["tau"], units.image_ids)
    warnings += check_unseen(seen, model["n_images_without_hash"], hashes, units.image_ids, store.root)
    warnings += [*units.warnings, *_of_labels(units, config, model["classes"])]
    warnings += sae_warnings(store, model["tau"], units.image_ids, sae, "of the test")
    return Rows(store, units, config, warnings)


def apply_model(
    model: Path | str,
    test: Path | str,
    out: Path | str,
    *,
    target: str | None = None,
    group_by: str | None = None,
    min_images: int | None = None,
    sae: Path | str | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> ProbeTest:
    """Try the model that a probe saved in the folder `model` on the barcodes `test`; scores into the folder `out`.

    Nothing is fitted. The same numbers, to the bit, as when the probe itself was given these barcodes as its test.

    Parameters
    ----------
    target : the column of the test with the classes; None: the model's
    group_by : the column of the test's images whose values keep units together; "": none; None: the model's
    min_images : patients of the test with fewer readable images are left out; None: the model's number
    sae : folder of the SAE, to know whether it was trained on images of the test
    seed : of the bootstrap draws behind the intervals

    Raises
    ------
    StoreNotFound, IncompleteStore, SpecMismatch, DamagedStore
        If one of them is missing, unfinished or damaged, they do not fit each other, or `out` holds something else.
    BadInput
        If the test shares an image with the training, or has no class of the model.
    """
    model, out, sae = Path(model), Path(out), None if sae is None else Path(sae)
    probe, fitted, seen = read_model(model)
    store, card = BarcodeStore(test), fitted.card
    store.check()
    changes = {"target": target or None, "min_images": min_images}
    changes = {name: value for name, value in changes.items() if value is not None}
    if group_by is not None:
        changes["group_by"] = group_by or None
    config = units_config(card, **changes)
    rows = read_rows(store, config, vars(card), fitted.latents, seen, sae=sae)
    spec = {
        "model": card.weights_sha256,
        "probe": probe.header.identity,
        "barcodes": store.header.identity,
        "tau": card.tau,
        "level": card.level,
        "target": config.target,
        "group_by": config.group_by,
        "min_images": config.min_images,
        "seed": seed,
        "sae": None if sae is None else card.sae_sha256,
    }
    inputs = tuple(path for path in (model, Path(test), sae) if path is not None)
    writer = begin_results(out, PROBE_TEST, spec, overwrite=overwrite, inputs=inputs)
    writer.watch(probe.header, store.header)
    if writer.is_complete:
        return ProbeTest(out=out, scores=ResultStore(out, PROBE_TEST).json("test_scores"), was_complete=True)
    scores = write_test(writer, fitted, rows, seed=seed)
    barcode = scores["methods"]["barcode"]
    writer.finish({"n_scored": scores["n_scored"], "weighted_f1": barcode["weighted_f1"]})
    return ProbeTest(out=out, scores=scores, was_complete=False)


def write_test(writer: ResultWriter, model: ProbeModel, rows: Rows, *, seed: int) -> dict[str, Any]:
    """Predict and score: test_predictions.parquet, test_scores.json, a figure; gives the scores."""
    predictions = model.predict(rows.units)
    scores = _scores(predictions, model.card, rows, seed)
    writer.write_table("test_predictions", _predictions_table(predictions, model.card, rows.units))
    writer.write_json("test_scores", scores)
    plot_test_confusion(scores, writer.root / "test_confusion")
    return scores


def kept_latents(rows: Rows, kept: npt.NDArray[np.bool_]) -> Rows:
    """The same rows with the barcodes of some latents alone."""
    values = rows.units.values[:, np.flatnonzero(kept)]
    values.sort_indices()
    return replace(rows, units=replace(rows.units, values=values))


def names_in_both(training: BarcodeStore, store: BarcodeStore, tau: float, ids: Sequence[list[list[str]]]) -> list[str]:
    """A warning where patients of the test have a name and dataset that patients of the training have."""
    owners = []
    for each, of_units in zip((training, store), ids, strict=True):
        images = each.read_obs("image", tau, needed=("patient", "dataset"))
        images = images.loc[[image_id for of_unit in of_units for image_id in of_unit]]
        owners.append({pair for pair in zip(images["patient"], images["dataset"], strict=True) if pair[0]})
    both = sorted(str(patient) for patient, _ in owners[0] & owners[1])
    if not both:
        return []
    return [
        f"{len(both):,} patients of the test have the name and dataset of a patient of the training ({listed(both)}): "
        f"if they are the same people, the scores are too good"
    ]


def sae_warnings(
    store: BarcodeStore, tau: float | None, image_ids: list[list[str]], sae: Path | None, whose: str
) -> list[str]:
    """Warnings on whether the SAE was trained on the images of these units, by content hash.

    Raises
    ------
    SpecMismatch
        If it is not the SAE of the barcodes.
    """
    if sae is None:
        return ["whether the SAE was trained on these images is not known here: name it with --sae"]
    latents_spec = store.header.spec["latents_spec"]
    latents_spec = latents_spec if isinstance(latents_spec, list) else [latents_spec]
    header = read_header(sae, SAE)
    weights = (header.summary or {}).get("sae_sha256")
    if weights != latents_spec[0]["sae_sha256"]:
        raise SpecMismatch(
            f"{sae} is not the SAE of these latents (weights {str(weights)[:12]}…, theirs "
            f"{latents_spec[0]['sae_sha256'][:12]}…); give the one that they were encoded with"
        )
    images = store.read_obs("image", tau, needed=("content_hash", "status", "dataset"))
    images = images.reset_index(names="image_id")
    images = images[images["image_id"].isin([image_id for ids in image_ids for image_id in ids])]
    table = pa.table({name: [*map(str, images[name])] for name in ("image_id", "dataset", "content_hash", "status")})
    cache_sha256 = latents_spec[0]["cache_sha256"] if len(latents_spec) == 1 else ""  # of several: by content alone
    found = find_trained_on(sae, header, table, cache_sha256=cache_sha256)
    known = f"{found.n_known:,} of the {len(images):,} images are known: {found.n_trained_on:,} trained on"
    if found.n_trained_on:
        return [f"transductive: the SAE has seen images {whose}, without labels ({known})"]
    if found.n_known < len(images):
        return [f"{sae} does not say of all these images whether it was trained on them ({known})"]
    return []


def _of_labels(units: NewUnits, config: UnitConfig, classes: list[str]) -> list[str]:
    """Warnings on classes: unknown ones, missing ones, rare ones."""
    unknown = Counter(true for true, label in zip(units.true, units.labels.tolist(), strict=True) if label < 0)
    n_without, what = unknown.pop("", 0), f"{config.level}s"
    warnings = []
    if unknown:
        named = listed([f"{name}: {n}" for name, n in sorted(unknown.items())], 12)
        warnings.append(
            f"{sum(unknown.values()):,} {what} have a {config.target} that the model does not know ({named}): they are "
            f"predicted, and counted in no score"
        )
    if n_without:
        warnings.append(f"{n_without:,} {what} have no {config.target}: they are predicted, and counted in no score")
    n_groups = [len(np.unique(units.groups[units.labels == k])) for k in range(len(classes))]
    absent = [name for name, n in zip(classes, n_groups, strict=True) if not n]
    if absent:
        warnings.append(
            f"the test has no {config.level} of {listed(absent, 12)}, which the model knows: scores are of the others"
        )
    few = [f"{name}: {n}" for name, n in zip(classes, n_groups, strict=True) if 0 < n < FEW_GROUPS]
    if few:
        warnings.append(f"few independent groups in the test ({listed(few, 12)}): intervals are rough")
    return warnings


def _scores(predictions: dict[str, Float], card: Card, rows: Rows, seed: int) -> dict[str, Any]:
    """test_scores.json: all scores, by name; None instead of NaN."""
    units = rows.units
    is_scored = units.labels >= 0
    labels, groups = units.labels[is_scored], np.unique(units.groups[is_scored], return_inverse=True)[1]
    draws = draw_groups(groups, [seed, 6])
    together = [np.zeros(len(labels), np.int64)]  # one fit has one scale: AUROC compares all pairs of rows
    drawn = {name: scores_of_draws([p[is_scored]], labels, draws, together) for name, p in predictions.items()}
    methods = {}
    for name, p in predictions.items():
        methods[name] = _of_method(p[is_scored], labels, card.classes, drawn[name])
        if name != "barcode":
            differences = {key: drawn["barcode"][key] - values for key, values in drawn[name].items()}
            methods[name]["barcode_minus_this"] = {
                key: {"difference": finite_or_none(values[0]), **interval(values, WIDER)}
                for key, values in differences.items()
            }
    sizes, times = np.bincount(labels, minlength=len(card.classes)), Counter(groups.tolist())
    of_true: dict[str, Counter[str]] = {}
    guessed = predictions["barcode"].argmax(1)
    for k in np.flatnonzero(~is_scored).tolist():
        of_true.setdefault(units.true[k], Counter())[card.classes[guessed[k]]] += 1
    of_model = []
    if not card.trained:
        of_model.append("the backbone is UNTRAINED: the scores say nothing about its published weights")
    if not card.converged:
        of_model.append("the fit of the model did not converge; its predictions count as they are")
    if card.normalize != "images" and card.level == "patient":
        of_model.append(f"barcodes are normalised as {card.normalize}: the number of images is in every score")
    of_model += faultless([predictions["barcode"][is_scored]], labels, groups)
    return {
        "level": card.level,
        "target": rows.config.target,
        "seed": seed,
        "barcodes": rows.store.header.identity,
        "model": {
            "barcodes": card.barcodes,
            "kept_out": card.kept_out,
            "weights_sha256": card.weights_sha256,
            "n_training": dict(zip(card.classes, card.n_of_class, strict=True)),
            "n_training_groups": card.n_groups,
            "threshold": card.threshold,
            "C": card.C,
            "n_latents_kept": card.n_latents_kept,
        },
        "classes": {name: int(n) for name, n in zip(card.classes, sizes, strict=True)},
        "n_units": len(units.names),
        "n_scored": len(labels),
        "n_groups": len(times),
        "n_units_in_shared_groups": sum(n for n in times.values() if n > 1),
        "unknown": {
            name: {"n": sum(found.values()), "predicted": dict(sorted(found.items()))}
            for name, found in sorted(of_true.items())
            if name
        },
        "without_label": {
            "n": sum(of_true.get("", Counter()).values()),
            "predicted": dict(sorted(of_true.get("", Counter()).items())),
        },
        "left_out": units.left_out,
        "warnings": [*of_model, *rows.warnings],
        "n_draws": N_DRAWS,
        "methods": methods,
    }


def _of_method(p: Float, labels: Ints, classes: list[str], drawn: dict[str, Float]) -> dict[str, Any]:
    confusion, bins = confusion_matrix(labels, p.argmax(1), len(classes)), calibration([p], labels)
    scores = score(confusion)
    return {
        **{name: scores[name] for name in METRICS},
        **{key: finite_or_none(drawn[key][0]) for key in ("auroc", "auprc", "log_loss", "brier")},
        "calibration_error": calibration_error(bins),
        "calibration": bins,
        "interval": {key: possible(key, interval(values, WIDER)) for key, values in drawn.items()},
        "per_class": class_scores(confusion, classes),
        "confusion": confusion.tolist(),
    }


def _predictions_table(predictions: dict[str, Float], card: Card, units: NewUnits) -> pa.Table:
    """A row per method and unit; `probabilities` in the order of the classes in model.json."""
    classes, n = np.array(card.classes), len(units.names)
    return pa.concat_tables(
        pa.table(
            {
                "method": [name] * n,
                card.level: pa.array(units.names),
                "group": units.groups,
                "n_images": units.n_images,
                "true": pa.array([true or None for true in units.true], pa.string()),
                "is_scored": units.labels >= 0,
                "predicted": classes[p.argmax(1)],
                "probabilities": pa.ListArray.from_arrays(np.arange(n + 1, dtype=np.int32) * p.shape[1], p.ravel()),
            }
        )
        for name, p in predictions.items()
    )
