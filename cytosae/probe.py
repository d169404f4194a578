"""Can patients be told apart by their barcodes, and would they be by chance? A leakage-safe linear probe (Fig. 4).

    units       patients (or images), their classes, the groups that must stay together: probe_units.py, folds.py
    repeats     folds of whole groups; a fit per threshold; the threshold chosen inside: cross_validation.py
    chance      the first repeat, all of it, on labels shuffled between groups
    beside it   simpler knowledge on the same folds: probe_baselines.py, mil.py

Nothing is standardised and nothing is chosen with the rows that are predicted. No torch here; the attention-MIL head,
if it is wanted, brings it.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from threadpoolctl import threadpool_limits

from stores.activation_store import ActivationStore, open_caches
from stores.barcode_store import BarcodeStore
from stores.errors import BadInput, SpecMismatch
from stores.results import ResultStore, ResultWriter, begin_results
from stores.spec import PROBE, SAE, check_choice, read_header

from . import probe_baselines as baselines
from .cross_validation import Plan, Repeat, Strength, run_repeat
from .folds import check_groups, shuffle_labels
from .probe_figures import plot_confusion, plot_curve, plot_methods
from .probe_units import LEVELS, UnitConfig, Units, read_units, shared_groups
from .scores import METRICS, class_scores, confusion_matrix, score, summarize
from .threshold_grams import ThresholdGrams

Float = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Progress = Callable[[int, int, str], None]  # done, all, a word on the state

REGULARIZATIONS = {  # REFERENCE.md section 7: readings of one sentence of the paper
    "latents": "M c / 100, M features (latents) and c classes: DinoBloom's code",
    "backbone": "W c / 100, W the backbone's width: DinoBloom's code on its own features",
    "samples": "n c / 100, n training rows: the paper's words, as C",
    "samples-inverse": "100 / (n c): the paper's words, as a penalty",
}
THRESHOLDS = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
BARCODE = "barcode"


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """What is asked. The `target` of `units` may be "" for the level's own: disease of patients, label of images."""

    units: UnitConfig = field(default_factory=UnitConfig)
    folds: int = 5
    inner_folds: int = 3
    repeats: int = 10
    permutations: int = 99
    regularization: str = "latents"
    thresholds: tuple[float, ...] = THRESHOLDS  # of mean activation
    mil: bool = True  # at level patient, where caches are given
    mil_repeats: int = 3  # the first so many repeats
    mil_epochs: int = 40
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("level", self.units.level, LEVELS)
        check_choice("regularization", self.regularization, tuple(REGULARIZATIONS))
        least = {"folds": 2, "inner_folds": 2, "repeats": 1, "permutations": 0, "mil_repeats": 1, "mil_epochs": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise BadInput(f"{name} must be at least {low}; found {getattr(self, name)}")
        if not self.thresholds or not all(0 <= t < np.inf for t in self.thresholds):
            raise BadInput(f"thresholds must be numbers of at least 0; found {', '.join(map(str, self.thresholds))}")
        if list(self.thresholds) != sorted(set(self.thresholds)) or len(self.thresholds) > 100:
            raise BadInput("thresholds must differ, rise, and be at most 100")


@dataclass(frozen=True)
class _Method:
    """Predictions of one method: per repeat (n, c) probabilities."""

    name: str
    probabilities: list[Float]
    threshold: float | None = None


def write_probe(
    barcodes: Path | str,
    out: Path,
    config: ProbeConfig,
    *,
    caches: Sequence[Path | str] = (),
    sae: Path | None = None,
    workers: int = 1,
    overwrite: bool = False,
    progress: Progress = lambda done, total, state: None,
) -> tuple[dict[str, Any], bool]:
    """Probe `barcodes` into the folder `out`: folds, predictions, scores, figures; the scores, and were they there?

    The numbers do not depend on `workers` (threads), nor on the order of patients or images.

    Parameters
    ----------
    caches : activation caches of the same images, for the baselines on the backbone's tokens
    sae : folder of the SAE, to know whether it was trained on these very images

    Raises
    ------
    BadInput
        If a column, a class or a group is missing or too small.
    SpecMismatch
        If caches or SAE are not those of the barcodes, or `out` holds something else.
    """
    store = BarcodeStore(barcodes)
    target = config.units.target or {"patient": "disease", "image": "label"}[config.units.level]
    unit_config = UnitConfig(**{**asdict(config.units), "target": target})
    latents_spec = _as_list(store.header.spec["latents_spec"])
    tokens = open_caches(caches) if caches else []
    units = read_units(store, unit_config, seed=config.seed)
    warnings = [*units.warnings]
    warnings += check_groups(units.labels, units.groups, units.classes, n_folds=config.folds, target=target)
    warnings += _provenance(latents_spec, tokens, sae)
    spec = {
        "barcodes": store.header.identity,
        **{k: v for k, v in asdict(config).items() if k != "units"},
        **asdict(unit_config),
        "caches": [cache.content_sha256 for cache in tokens],
        "sae": None if sae is None else latents_spec[0]["sae_sha256"],
    }
    inputs = tuple(p for p in (Path(barcodes), sae, *(cache.root for cache in tokens)) if isinstance(p, Path))
    writer = begin_results(
        out, PROBE, _plain(spec), overwrite=overwrite, inputs=inputs, packages=("numpy", "scipy", "scikit-learn")
    )
    if writer.is_complete:
        return dict(ResultStore(out, PROBE).json("scores")), True
    rule = _Rule(config.regularization, len(units.classes), int(latents_spec[0]["cache"]["width"]))
    plan = Plan(
        n_folds=config.folds,
        n_inner_folds=config.inner_folds,
        n_classes=len(units.classes),
        strength=rule.of(units.n_latents),
    )
    grams = ThresholdGrams(units.values, units.sums, units.counts, config.thresholds)
    with threadpool_limits(1, user_api="blas"):  # threads of our own; and sums in one order
        repeats, shuffled = _run_all(grams, units, plan, config, workers, progress)
        methods = _barcode_methods(repeats, config.thresholds)
        methods += _baselines(units, repeats, config, rule, tokens, progress)
    scores = _scores(units, unit_config, config, rule, repeats, shuffled, methods, warnings)
    _write(writer, units, unit_config.level, repeats, methods, scores)
    return scores, False


@dataclass(frozen=True)
class _Rule:
    """How strongly to regularise."""

    name: str
    n_classes: int
    width: int

    def of(self, n_features: int) -> Strength:
        """scikit-learn's C, by the number of training rows."""
        return partial(self._strength, n_features)

    def _strength(self, n_features: int, n_rows: int) -> float:
        c = self.n_classes
        return {
            "latents": n_features * c / 100,
            "backbone": self.width * c / 100,
            "samples": n_rows * c / 100,
            "samples-inverse": 100 / (n_rows * c),
        }[self.name]


def _run_all(
    grams: ThresholdGrams, units: Units, plan: Plan, config: ProbeConfig, workers: int, progress: Progress
) -> tuple[list[Repeat], list[tuple[Ints, Repeat]]]:
    """All repeats, and the first repeat on shuffled labels, each with these labels."""

    def repeat(number: int, labels: Ints) -> Repeat:
        return run_repeat(grams, labels, units.groups, plan, np.random.default_rng([config.seed, 0, number]))

    all_labels = [units.labels] * config.repeats
    for number in range(config.permutations):
        rng = np.random.default_rng([config.seed, 1, number])
        all_labels.append(shuffle_labels(units.labels, units.groups, rng))
    numbers = [*range(config.repeats), *[0] * config.permutations]
    found: dict[int, Repeat] = {}
    with ThreadPoolExecutor(workers) as pool:
        jobs = {pool.submit(repeat, *job): k for k, job in enumerate(zip(numbers, all_labels, strict=True))}
        try:
            for job in as_completed(jobs):
                found[jobs[job]] = job.result()
                progress(len(found), len(jobs), "repeats and permutations")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    n = config.repeats
    return [found[k] for k in range(n)], [(all_labels[k], found[k]) for k in range(n, len(jobs))]


def _barcode_methods(repeats: list[Repeat], thresholds: tuple[float, ...]) -> list[_Method]:
    """The probe itself, with the threshold chosen inside; then every threshold."""
    by_threshold = [
        _Method(BARCODE, [repeat.probabilities[t] for repeat in repeats], threshold)
        for t, threshold in enumerate(thresholds)
    ]
    return [_Method(BARCODE, [repeat.selected for repeat in repeats]), *by_threshold]


def _baselines(
    units: Units,
    repeats: list[Repeat],
    config: ProbeConfig,
    rule: _Rule,
    caches: list[ActivationStore],
    progress: Progress,
) -> list[_Method]:
    """The baselines on the folds of the repeats."""
    c, patients = len(units.classes), config.units.level == "patient"
    wanted: dict[str, baselines.Predict] = {"majority": baselines.majority(c)}
    if patients:
        wanted["n_images"] = baselines.number_of_images(units.n_images, c)
    methods = []
    if caches:
        ids = [image_id for of_unit in units.image_ids for image_id in of_unit]
        rows_of = np.split(np.arange(len(ids)), np.cumsum(units.n_images)[:-1])
        images = baselines.read_image_tokens(caches, ids, progress=progress)
        strength = rule.of(images.cls.shape[1])
        for name, vectors in (("mean_tokens", images.patches), ("cls_token", images.cls)):
            wanted[name] = baselines.features(baselines.of_units(vectors, rows_of), c, strength)
        if config.mil and patients:
            methods.append(_Method("attention_mil", _mil(images.patches, rows_of, units, repeats, config, progress)))
    for name, predict in wanted.items():
        methods.append(_Method(name, [_over_folds(repeat, units.labels, c, predict) for repeat in repeats]))
    return methods


def _mil(
    images: Float, rows_of: list[Ints], units: Units, repeats: list[Repeat], config: ProbeConfig, progress: Progress
) -> list[Float]:
    from . import mil  # brings torch

    settings = mil.MilConfig(epochs=config.mil_epochs)
    chosen = repeats[: config.mil_repeats]
    found = []
    for number, repeat in enumerate(chosen):
        progress(number, len(chosen), "attention MIL")
        fold = iter(range(config.folds))

        def predict(labels: Ints, training: npt.NDArray[np.bool_], number: int = number, fold: Any = fold) -> Float:
            seed = (config.seed, 3, number, next(fold))
            return mil.fit_predict(images, rows_of, labels, training, len(units.classes), settings, seed=seed)

        found.append(_over_folds(repeat, units.labels, len(units.classes), predict))
    progress(len(chosen), len(chosen), "attention MIL")
    return found


def _over_folds(repeat: Repeat, labels: Ints, n_classes: int, predict: baselines.Predict) -> Float:
    out = np.zeros((len(labels), n_classes))
    for fold in range(repeat.fold_of.max() + 1):
        training = repeat.fold_of != fold
        out[~training] = predict(labels, training)
    return out


# ------------------------------------------------------------------------------------------- what came out


def _scores(
    units: Units,
    unit_config: UnitConfig,
    config: ProbeConfig,
    rule: _Rule,
    repeats: list[Repeat],
    shuffled: list[tuple[Ints, Repeat]],
    methods: list[_Method],
    warnings: list[str],
) -> dict[str, Any]:
    """Everything, by name; no NaN anywhere."""
    n_unconverged = sum(r.n_unconverged for r in repeats) + sum(r.n_unconverged for _, r in shuffled)
    n_unseen = sum(r.n_unseen for r in repeats) + sum(r.n_unseen for _, r in shuffled)
    if n_unconverged:
        warnings.append(f"{n_unconverged:,} fits did not converge; their predictions count as they are")
    if n_unseen:
        warnings.append(f"in {n_unseen:,} fits a class had no training row; it has probability 0 there")
    n_training = round(len(units.labels) * (config.folds - 1) / config.folds)
    sizes = Counter(units.labels.tolist())
    nulls = _null_scores(units, shuffled)
    kept = np.mean([repeat.n_kept.mean(0) for repeat in repeats], axis=0)
    curve = [m for m in methods if m.threshold is not None]
    chosen = Counter(config.thresholds[t] for repeat in repeats for t in repeat.chosen.tolist())
    return {
        "level": unit_config.level,
        "target": unit_config.target,
        "classes": {name: sizes[k] for k, name in enumerate(units.classes)},
        "n_units": len(units.names),
        "n_groups": len(np.unique(units.groups)),
        "n_units_in_shared_groups": shared_groups(units),
        "left_out": units.left_out,
        "warnings": warnings,
        "n_latents": units.n_latents,
        "n_latents_above_tau": len(units.values),
        "folds": config.folds,
        "repeats": config.repeats,
        "seed": config.seed,
        "regularization": {
            "rule": config.regularization,
            "formula": REGULARIZATIONS[config.regularization],
            "C": rule.of(units.n_latents)(n_training),
            "n_training_rows": n_training,
        },
        "methods": {m.name: _method_scores(m, units, repeats) for m in methods if m.threshold is None},
        "curve": [
            {
                "threshold": m.threshold,
                "n_latents": float(kept[t]),
                **{name: summarize(values) for name, values in _by_metric(m, units).items()},
                "null": {name: _band([row[1 + t][name] for row in nulls]) for name in METRICS} if nulls else None,
            }
            for t, m in enumerate(curve)
        ],
        "chosen_thresholds": [{"threshold": t, "n_folds": chosen[t]} for t in config.thresholds],
        "permutation": _permutation(methods[0], units, nulls),
    }


def _by_metric(method: _Method, units: Units) -> dict[str, list[float]]:
    rows = [score(_confusion(p, units.labels, len(units.classes))) for p in method.probabilities]
    return {name: [row[name] for row in rows] for name in METRICS}


def _method_scores(method: _Method, units: Units, repeats: list[Repeat]) -> dict[str, Any]:
    """Over repeats (all rows of one together); the weighted F1 also over single folds, as others report it."""
    c = len(units.classes)
    confusions = [_confusion(p, units.labels, c) for p in method.probabilities]
    folds = [
        score(_confusion(p[tested], units.labels[tested], c))["weighted_f1"]
        for p, repeat in zip(method.probabilities, repeats, strict=False)  # MIL has fewer
        for tested in (repeat.fold_of == fold for fold in range(repeat.fold_of.max() + 1))
    ]
    of_folds = summarize(folds)
    by_class = [class_scores(confusion, units.classes) for confusion in confusions]
    return {
        **{name: summarize(values) for name, values in _by_metric(method, units).items()},
        "weighted_f1_of_folds": {"mean": of_folds["mean"], "sd": of_folds["sd"], "n": len(folds)},
        "per_class": {
            name: {key: float(np.mean([row[name][key] for row in by_class])) for key in by_class[0][name]}
            for name in units.classes
        },
        "confusion": np.mean(confusions, axis=0).tolist(),
    }


def _null_scores(units: Units, shuffled: list[tuple[Ints, Repeat]]) -> list[list[dict[str, float]]]:
    """Of each permutation: the scores with the threshold chosen inside, and those at every threshold."""
    c = len(units.classes)
    return [
        [score(_confusion(p, labels, c)) for p in (repeat.selected, *repeat.probabilities)]
        for labels, repeat in shuffled
    ]


def _permutation(method: _Method, units: Units, nulls: list[list[dict[str, float]]]) -> dict[str, Any] | None:
    """p = (1 + number of shuffles that score no less) / (1 + number of shuffles), for the first repeat."""
    if not nulls:
        return None
    observed = {name: values[0] for name, values in _by_metric(method, units).items()}
    out: dict[str, Any] = {"n": len(nulls), "statistic": "the first repeat, its thresholds chosen inside"}
    for name in METRICS:
        values = [row[0][name] for row in nulls]
        n_reached = sum(value >= observed[name] - 1e-12 for value in values)
        out[name] = {"observed": observed[name], "p": (1 + n_reached) / (1 + len(values)), **_band(values)}
        out[name]["values"] = values
    return out


def _band(values: list[float]) -> dict[str, float]:
    low, high = np.quantile(values, [0.05, 0.95])
    return {"mean": float(np.mean(values)), "q05": float(low), "q95": float(high)}


def _confusion(probabilities: Float, labels: Ints, n_classes: int) -> Ints:
    return confusion_matrix(labels, probabilities.argmax(1), n_classes)


def _write(
    writer: ResultWriter,
    units: Units,
    level: str,
    repeats: list[Repeat],
    methods: list[_Method],
    scores: dict[str, Any],
) -> None:
    names, n = pa.array(units.names), len(units.names)
    n_folds = scores["folds"]
    sides = [
        {
            "repeat": np.full(n, number),
            "fold": np.full(n, fold),
            level: names,
            "group": units.groups,
            "side": np.where(repeat.fold_of == fold, "test", "train"),
        }
        for number, repeat in enumerate(repeats)
        for fold in range(n_folds)
    ]
    writer.write_table("folds", pa.concat_tables([pa.table(side) for side in sides]))
    classes = np.array(units.classes)
    predictions = []
    for method in methods:
        for number, p in enumerate(method.probabilities):
            repeat = repeats[number]
            if method.name == BARCODE and method.threshold is None:
                chosen = [row["threshold"] for row in scores["curve"]]
                threshold = pa.array([chosen[t] for t in repeat.chosen[repeat.fold_of]], pa.float64())
            else:
                threshold = pa.array([method.threshold] * n, pa.float64())
            predictions.append(
                pa.table(
                    {
                        "method": [method.name] * n,
                        "threshold_chosen_inside": [method.name == BARCODE and method.threshold is None] * n,
                        "threshold": threshold,
                        "repeat": np.full(n, number),
                        "fold": repeat.fold_of,
                        level: names,
                        "true": classes[units.labels],
                        "predicted": classes[p.argmax(1)],
                        "probabilities": pa.array(p.tolist(), pa.list_(pa.float64())),
                    }
                )
            )
    writer.write_table("predictions", pa.concat_tables(predictions))
    writer.write_json("scores", scores)
    plot_curve(scores, writer.root / "curve")
    plot_confusion(scores, writer.root / "confusion")
    plot_methods(scores, writer.root / "methods")
    barcode = scores["methods"][BARCODE]["weighted_f1"]
    writer.finish({"n_units": n, "weighted_f1": {"mean": barcode["mean"], "sd": barcode["sd"]}})


# ------------------------------------------------------------------------------------------- where it comes from


def _provenance(latents_spec: list[dict[str, Any]], caches: list[ActivationStore], sae: Path | None) -> list[str]:
    """Warnings on what the scores may owe to the SAE or the caches."""
    of_barcodes = {spec["cache_sha256"] for spec in latents_spec}
    warnings = []
    other = [str(cache.root) for cache in caches if cache.content_sha256 not in of_barcodes]
    if other:
        warnings.append(f"the latents were not encoded from {', '.join(other)}: the baselines are of other tokens")
    if sae is None:
        return [*warnings, "whether the SAE was trained on these images is not known here: name it with --sae"]
    header = read_header(sae, SAE)
    weights = (header.summary or {}).get("sae_sha256")
    if weights != latents_spec[0]["sae_sha256"]:
        raise SpecMismatch(
            f"{sae} is not the SAE of these latents (weights {str(weights)[:12]}…, theirs "
            f"{latents_spec[0]['sae_sha256'][:12]}…); give the one that they were encoded with"
        )
    trained_on = {cache["sha256"] for cache in header.spec.get("caches", [])}
    if not trained_on:
        warnings.append(f"{sae} does not say which images it was trained on")
    elif trained_on & of_barcodes:
        warnings.append(
            "transductive: the SAE was trained on these very images (without labels), those of the test folds included"
        )
    return warnings


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _plain(spec: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in spec.items()}
