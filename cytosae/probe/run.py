"""How well do barcodes predict a patient's disease, and how well by chance? A leakage-safe linear probe (Fig. 4).

    units       patients (or images), their classes, and the groups that folds must not split: units.py, folds.py
    repeats     grouped cross-validation, a fit per threshold, threshold and C chosen inside: cross_validation.py
    chance      the whole first repeat on shuffled labels
    baselines   simpler methods on the same folds: baselines.py, attention_mil.py
    model       one fit on all rows, saved: saved_model.py; applied to another cohort or to left-out sites: external.py

Barcodes are not standardised; the baselines' tokens are scaled by one number of the training rows (baselines.py).
Nothing is chosen with rows that are predicted. Only the attention-MIL head imports torch.
"""

import warnings
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits

from stores.activation_store import ActivationStore, open_caches
from stores.barcode_store import BarcodeStore
from stores.errors import BadInput
from stores.machine import n_cores
from stores.progress import Progress
from stores.result_folder import ResultStore, begin_results
from stores.spec import PROBE, SAE, check_choice, read_header
from stores.version import missing_package

from . import baselines
from .baselines import MilConfig
from .cross_validation import Division, Fold, Plan, Repeat, RuleOfC, Thresholds, divide, fit_all, join_folds, run_fold
from .external import Rows, kept_latents, names_in_both, read_rows, sae_warnings, write_test
from .folds import NULLS, check_groups, choose_null, shuffle_labels
from .report import BARCODE, Found, Method, Shuffle, keep_shuffle, scores_of, write_report
from .result import ProbeResult, ProbeTest
from .saved_model import ProbeModel, image_hashes, make_model, said_of_barcodes, write_model
from .threshold_columns import ThresholdColumns
from .threshold_grams import ThresholdGrams
from .units import BY_LOT, UnitConfig, Units, Where, read_units

Float = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

REGULARIZATIONS = {  # docs/reference/paper.md 7: readings of one sentence of the paper
    "latents": "M c / 100, M features (latents) and c classes: DinoBloom's code",
    "backbone": "W c / 100, W the backbone's width: DinoBloom's code on its own features",
    "samples": "n c / 100, n training rows: the paper's words, as C",
    "samples-inverse": "100 / (n c): the paper's words, as a penalty",
}
REPETITIONS = {"patient": (10, 99), "image": (3, 19)}  # repeats and permutations, unless their numbers are given
GRAM_ROWS = 4000  # up to here fits use Gram matrices (n x n for every threshold); beyond, sparse columns
_DENSE_BYTES = 512 << 20
C_FACTORS = (1e-6, 1e-4, 1e-2, 1.0, 100.0)
THRESHOLDS = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """What is asked: which units are classified, how often folds are drawn, how strongly fits are regularised.

    Raises
    ------
    BadInput
        If a number is too small, thresholds or factors do not rise, or a rule has no such name.
    """

    units: UnitConfig = field(default_factory=UnitConfig)
    folds: int = 5
    inner_folds: int = 3
    repeats: int | None = None  # times that folds are drawn; None: 10, at level image 3
    permutations: int | None = None  # shuffles of the labels, 0 for none; None: 99, at level image 19
    null: str = "auto"  # how labels are shuffled: a key of folds.NULLS, or chosen by rule (folds.choose_null)
    regularization: str = "latents"
    c_factors: tuple[float, ...] = C_FACTORS  # multiples of the rule's C: one is chosen within each training side
    thresholds: tuple[float, ...] = THRESHOLDS  # of mean activation
    mil: MilConfig | None = field(default_factory=MilConfig)  # used at level patient, if caches are given
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("regularization", self.regularization, tuple(REGULARIZATIONS))
        check_choice("null", self.null, ("auto", *NULLS))
        factors = self.c_factors
        if not factors or list(factors) != sorted(set(factors)) or not all(0 < f < np.inf for f in factors):
            raise BadInput(f"factors of C must be positive, differ and rise; found {', '.join(map(str, factors))}")
        numbers = {"folds": self.folds, "inner_folds": self.inner_folds}
        numbers |= {"repeats": self.n_repeats, "permutations": self.n_permutations}
        for name, low in {"folds": 2, "inner_folds": 2, "repeats": 1, "permutations": 0}.items():
            if numbers[name] < low:
                raise BadInput(f"{name} must be at least {low}; found {numbers[name]}")
        if not self.thresholds or not all(0 <= t < np.inf for t in self.thresholds):
            raise BadInput(f"thresholds must be numbers of at least 0; found {', '.join(map(str, self.thresholds))}")
        if list(self.thresholds) != sorted(set(self.thresholds)) or len(self.thresholds) > 100:
            raise BadInput("thresholds must differ, rise, and be at most 100")
        for name in ("c_factors", "thresholds"):  # 1 and 1.0 are the same settings
            object.__setattr__(self, name, tuple(map(float, getattr(self, name))))

    @property
    def n_repeats(self) -> int:
        """`repeats`, or those of the level."""
        return REPETITIONS[self.units.level][0] if self.repeats is None else self.repeats

    @property
    def n_permutations(self) -> int:
        """`permutations`, or those of the level."""
        return REPETITIONS[self.units.level][1] if self.permutations is None else self.permutations


def probe(
    barcodes: Path | str,
    out: Path | str,
    config: ProbeConfig = ProbeConfig(),
    *,
    caches: Sequence[Path | str] = (),
    sae: Path | str | None = None,
    test: Path | str | None = None,
    test_where: Where | Sequence[str] | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Progress = lambda done, total, state: None,
    token_progress: Progress = lambda done, total, state: None,
) -> ProbeResult:
    """Classify `barcodes` in a grouped cross-validation, into the folder `out`.

    Written are folds, predictions, scores, figures, and the model that is fitted on all rows. The numbers do not depend
    on `workers`, nor on the order of patients or images.

    Parameters
    ----------
    caches : activation caches of the same images, for the baselines on the backbone's tokens
    sae : folder of the SAE, to know whether it was trained on these very images
    test : barcodes of another cohort, on which the fitted model is tried once
    test_where : or rows of `barcodes` that are kept out of all fitting, and tried once; also as `["site=Munich"]`
    workers : threads; None: one per core

    Raises
    ------
    BadInput
        If a column, a class or a group is missing or too small; or if the test shares an image with the training.
    SpecMismatch
        If caches or SAE are not those of the barcodes, or `out` holds something else.
    DamagedStore
        If the barcodes lack a chunk or a column, or hold what is not finite.
    """
    out, sae = Path(out), None if sae is None else Path(sae)
    store = BarcodeStore(barcodes)
    store.check()
    where = test_where if isinstance(test_where, Where) else Where.parse(test_where or ())
    target = config.units.target
    tau = config.units.tau if config.units.tau is not None or len(store.taus) > 1 else store.taus[0]
    unit_config = replace(config.units, tau=tau)
    latents_spec = _as_list(store.header.spec["latents_spec"])
    tokens = open_caches(caches) if caches else []
    if test is not None and where is not None:
        raise BadInput("a test is of other barcodes (--test) or of left-out rows (--test-where), not both; choose one")
    units = read_units(store, unit_config, seed=config.seed, without=where)
    doubts = [*units.warnings]
    doubts += check_groups(
        units.labels,
        units.groups,
        units.classes,
        n_folds=config.folds,
        target=target,
        were_drawn=BY_LOT in units.left_out,
    )
    normalize = store.header.spec["normalize"]
    if normalize != "images" and unit_config.level == "patient":
        doubts.append(
            f"these barcodes are normalised as {normalize}: patients with more images have larger values, so the "
            f"number of images is in every score; cyto barcode without --normalize divides by each patient's own number"
        )
    sae_headers = [] if sae is None else [read_header(sae, SAE)]
    doubts += _provenance(store, units, unit_config, latents_spec, tokens, sae)
    card, hashes, rows = _test_rows(store, units, unit_config, test, where, sae)
    spec = {
        "barcodes": store.header.identity,
        **{k: v for k, v in asdict(config).items() if k != "units"},
        "repeats": config.n_repeats,
        "permutations": config.n_permutations,
        **asdict(unit_config),
        "caches": [cache.content_sha256 for cache in tokens],
        **({"tokens_scaled": True} if tokens else {}),  # the baselines of before were not: results of another probe
        "sae": None if sae is None else latents_spec[0]["sae_sha256"],
    }
    if rows is not None:
        spec["test"] = card["kept_out"] or {"barcodes": rows.store.header.identity}
    read = (Path(barcodes), sae, *(cache.root for cache in tokens), None if test is None else Path(test))
    inputs = tuple(path for path in read if isinstance(path, Path))
    writer = begin_results(
        out, PROBE, _plain(spec), overwrite=overwrite, inputs=inputs, packages=("numpy", "scipy", "scikit-learn")
    )
    test_headers = [] if rows is None else [rows.store.header]
    writer.watch(store.header, *(cache.header for cache in tokens), *sae_headers, *test_headers)
    if writer.is_complete:
        there = ResultStore(out, PROBE)
        return _result(out, there.json("scores"), None if rows is None else there.json("test_scores"), True)
    null = choose_null(units.labels, units.groups, config.null)
    rule = _Rule(config.regularization, len(units.classes), int(latents_spec[0]["cache"]["width"]))
    has_mil = config.mil is not None and bool(tokens) and unit_config.level == "patient"
    config = config if has_mil else replace(config, mil=None)
    if has_mil and find_spec("torch") is None:  # told before the work begins
        raise BadInput(f"{missing_package('torch', 'the attention-MIL head')}, or leave it out: --no-mil")
    # one BLAS thread: folds have threads of their own, and sums keep one order. Warning filters are put back at the
    # end, since scikit-learn changes them inside threads; fits that do not converge are counted here.
    with threadpool_limits(1, user_api="blas"), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        repeats, shuffles = _run_all(units, rule, config, null, workers or n_cores(), progress)
        methods = _barcode_methods(repeats, config.thresholds)
        methods += _baselines(units, repeats, config, rule, tokens, progress, token_progress)
        model, kept = _fit_model(units, rule, config, card)
        progress(_n_steps(config), _n_steps(config), "the model")
    found = Found(units, config.thresholds, repeats, shuffles, methods)
    scores = scores_of(found, _about(units, config, null, rule, repeats), doubts)
    write_report(writer, found, scores)
    write_model(writer, model, hashes)
    tested = None if rows is None else write_test(writer, model, kept_latents(rows, kept), seed=config.seed)
    f1 = scores["methods"][BARCODE]["weighted_f1"]
    writer.finish({"n_units": scores["n_units"], "weighted_f1": {"mean": f1["mean"], "sd": f1["sd"]}})
    return _result(out, scores, tested, False)


write_probe = probe  # its name in earlier versions


def _result(out: Path, scores: dict[str, Any], tested: dict[str, Any] | None, was_complete: bool) -> ProbeResult:
    test = None if tested is None else ProbeTest(out=out, scores=tested, was_complete=was_complete)
    return ProbeResult(out=out, scores=scores, was_complete=was_complete, test=test)


def _about(units: Units, config: ProbeConfig, null: str, rule: "_Rule", repeats: list[Repeat]) -> dict[str, Any]:
    """What scores.json says of the settings, and of what was chosen."""
    n_training = round(len(units.labels) * (config.folds - 1) / config.folds)
    return {
        "level": config.units.level,
        "target": config.units.target,
        "folds": config.folds,
        "repeats": config.n_repeats,
        "seed": config.seed,
        "null": {"used": null, "asked": config.null, "what": NULLS[null]},
        "regularization": {
            "rule": config.regularization,
            "formula": REGULARIZATIONS[config.regularization],
            "C": rule.of(units.n_latents)(n_training),
            "c_factors": list(config.c_factors),
            "C_chosen": _geometric_mean([r.c_factors[np.arange(len(r.chosen)), r.chosen] for r in repeats])
            * rule.of(units.n_latents)(n_training),
            "n_training_rows": n_training,
        },
    }


def _test_rows(
    store: BarcodeStore,
    units: Units,
    config: UnitConfig,
    test: Path | str | None,
    where: Where | None,
    sae: Path | None,
) -> tuple[dict[str, Any], list[str | None], Rows | None]:
    """What the model card says before the fit, content hashes of the training images, and the rows of the test."""
    tau = float(config.tau if config.tau is not None else store.taus[0])
    hashes = image_hashes(store, tau, units.image_ids)
    latents_spec = _as_list(store.header.spec["latents_spec"])
    card = {
        **said_of_barcodes(store),
        "tau": tau,
        "level": config.level,
        "target": config.target,
        "group_by": config.group_by,
        "min_images": config.min_images,
        "trained": all(spec["cache"]["trained"] for spec in latents_spec),
        "barcodes": store.header.identity,
        "kept_out": None if where is None else {"column": where.column, "values": sorted(where.values)},
        "n_images_without_hash": sum(value is None for value in hashes),
    }
    if test is None and where is None:
        return card, hashes, None
    other = store if test is None else BarcodeStore(test)
    if test is not None:
        other.check()
        if other.root.resolve() == store.root.resolve():
            raise BadInput(
                f"{test} are the very barcodes that the model is fitted on; name those of another cohort, or rows to "
                f"be left out with --test-where COLUMN=VALUE"
            )
    model = {**card, "classes": units.classes, "n_latents": units.n_latents}
    seen = frozenset(value for value in hashes if value is not None)
    rows = read_rows(other, config, model, units.latents, seen, where=where, sae=sae)
    if test is not None:
        rows.warnings.extend(names_in_both(store, other, tau, [units.image_ids, rows.units.image_ids]))
    return card, hashes, rows


@dataclass(frozen=True)
class _Rule:
    """A rule of REGULARIZATIONS: scikit-learn's C."""

    name: str
    n_classes: int
    width: int

    def of(self, n_features: int) -> RuleOfC:
        """C as a function of the number of training rows, for a fit on `n_features` columns."""
        return partial(self._C, n_features)

    def _C(self, n_features: int, n_rows: int) -> float:
        c = self.n_classes
        return {
            "latents": n_features * c / 100,
            "backbone": self.width * c / 100,
            "samples": n_rows * c / 100,
            "samples-inverse": 100 / (max(1, n_rows) * c),  # max: without a row there is no fit
        }[self.name]


def _geometric_mean(factors: list[Float]) -> float:
    return float(np.exp(np.log(np.concatenate(factors)).mean()))


def _run_all(
    units: Units, rule: _Rule, config: ProbeConfig, null: str, workers: int, progress: Progress
) -> tuple[list[Repeat], list[Shuffle]]:
    """All repeats, and the first repeat on shuffled labels."""
    n_classes, plan = len(units.classes), _plan(units, rule, config)
    barcodes = along_thresholds(units.values, units.sums, units.counts, config.thresholds)

    def begin(pool: ThreadPoolExecutor, number: int, labels: Ints) -> tuple[Division, list[Future[Fold]]]:
        division = divide(labels, units.groups, plan, np.random.default_rng([config.seed, 0, number]))
        folds = range(config.folds)
        return division, [pool.submit(run_fold, barcodes, labels, division, fold, plan) for fold in folds]

    shuffled = [
        shuffle_labels(units.labels, units.groups, np.random.default_rng([config.seed, 1, number]), null)
        for number in range(config.n_permutations)
    ]
    repeats, shuffles = list[Repeat](), list[Shuffle]()
    with ThreadPoolExecutor(workers) as pool:
        begun = deque(begin(pool, number, units.labels) for number in range(config.n_repeats))
        begun.extend(begin(pool, 0, labels) for labels in shuffled)
        try:
            for number in range(len(begun)):
                division, folds = begun.popleft()
                found = []
                for fold in folds:
                    found.append(fold.result())  # raises what it raised
                    progress(number * config.folds + len(found), _n_steps(config), "folds of repeats and permutations")
                repeat = join_folds(division, found)
                if number < config.n_repeats:
                    repeats.append(repeat)
                else:
                    labels = shuffled[number - config.n_repeats]
                    shuffles.append(keep_shuffle(repeat, labels, units.labels, n_classes))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return repeats, shuffles


def _plan(units: Units, rule: _Rule, config: ProbeConfig) -> Plan:
    return Plan(
        n_folds=config.folds,
        n_inner_folds=config.inner_folds,
        n_classes=len(units.classes),
        C_of=rule.of(units.n_latents),
        c_factors=config.c_factors,
    )


def _fit_model(
    units: Units, rule: _Rule, config: ProbeConfig, card: dict[str, Any]
) -> tuple[ProbeModel, npt.NDArray[np.bool_]]:
    """The model of all rows, and which of their latents it keeps."""
    n_classes = len(units.classes)
    barcodes = along_thresholds(units.values, units.sums, units.counts, config.thresholds)
    rng = np.random.default_rng([config.seed, 5])
    final = fit_all(barcodes, units.labels, units.groups, _plan(units, rule, config), rng)
    counts = None
    if config.units.level == "patient":
        counts = baselines.fit_number_of_images(
            units.n_images, units.labels, final.inner_of, n_classes, config.c_factors
        )
    more = {**card, "threshold": config.thresholds[final.threshold], "regularization": config.regularization}
    return make_model(final, units, counts, **more), final.kept


def along_thresholds(values: Any, sums: Any, counts: Any, thresholds: tuple[float, ...]) -> Thresholds:
    """Barcodes, CSR (n, m) as in `Units`, prepared for fits: by Gram matrices for few rows, by columns for many."""
    if values.shape[0] > GRAM_ROWS:
        return ThresholdColumns(values, sums, counts, thresholds)
    is_small = 3 * 8 * values.shape[0] * values.shape[1] <= _DENSE_BYTES

    def by_latent(matrix: Any) -> Any:
        return np.ascontiguousarray(matrix.toarray().T) if is_small else matrix.T.tocsr()

    return ThresholdGrams(by_latent(values), by_latent(sums), by_latent(counts), thresholds)


def _barcode_methods(repeats: list[Repeat], thresholds: tuple[float, ...]) -> list[Method]:
    """Predictions with the threshold chosen inside, then those at each threshold."""
    by_threshold = [
        Method(BARCODE, [repeat.probabilities[t] for repeat in repeats], threshold)
        for t, threshold in enumerate(thresholds)
    ]
    return [Method(BARCODE, [repeat.selected for repeat in repeats]), *by_threshold]


def _baselines(
    units: Units,
    repeats: list[Repeat],
    config: ProbeConfig,
    rule: _Rule,
    caches: list[ActivationStore],
    progress: Progress,
    token_progress: Progress,
) -> list[Method]:
    """The baselines on the folds of the repeats."""
    c, patients = len(units.classes), config.units.level == "patient"
    wanted: dict[str, baselines.Predict] = {"majority": baselines.majority(c)}
    if patients:
        wanted["n_images"] = baselines.number_of_images(units.n_images, c, config.c_factors)
    methods = []
    if caches:
        ids = [image_id for of_unit in units.image_ids for image_id in of_unit]
        rows_of = np.split(np.arange(len(ids)), np.cumsum(units.n_images)[:-1])
        images = baselines.read_image_tokens(caches, ids, progress=token_progress)
        C_of = rule.of(images.patches.shape[1])
        for name, vectors in (("mean_tokens", images.patches), ("cls_token", images.cls)):
            if not vectors.shape[1]:  # the backbone has no CLS token
                continue
            wanted[name] = baselines.features(baselines.of_units(vectors, rows_of), c, C_of, config.c_factors)
        if config.mil is not None:
            methods.append(Method("attention_mil", _mil(images.patches, rows_of, units, repeats, config, progress)))
    for name, predict in wanted.items():
        methods.append(Method(name, [_over_folds(repeat, units.labels, c, predict) for repeat in repeats]))
    return methods


def _mil(
    images: Float, rows_of: list[Ints], units: Units, repeats: list[Repeat], config: ProbeConfig, progress: Progress
) -> list[Float]:
    """(n, c) probabilities of the attention-MIL head in each of its repeats."""
    from . import attention_mil as mil  # brings torch

    assert config.mil is not None
    n_classes, found = len(units.classes), []
    for number, repeat in enumerate(repeats[: config.mil.repeats or None]):
        out = np.zeros((len(units.labels), n_classes))
        for fold in range(config.folds):
            training, seed = repeat.fold_of != fold, (config.seed, 3, number, fold)
            out[~training] = mil.fit_predict(images, rows_of, units.labels, training, n_classes, config.mil, seed=seed)
        found.append(out)
        n_before = config.folds * (config.n_repeats + config.n_permutations)
        progress(n_before + number + 1, _n_steps(config), "attention MIL")
    return found


def _over_folds(repeat: Repeat, labels: Ints, n_classes: int, predict: baselines.Predict) -> Float:
    out = np.zeros((len(labels), n_classes))
    for fold in range(repeat.fold_of.max() + 1):
        training = repeat.fold_of != fold
        out[~training] = predict(labels, training, repeat.inner_of[fold])
    return out


def _n_steps(config: ProbeConfig) -> int:
    """Steps of the progress line: folds of repeats and permutations, repeats of the MIL head, the model."""
    n_folds = config.folds * (config.n_repeats + config.n_permutations)
    return 1 + n_folds + (min(config.mil.repeats or config.n_repeats, config.n_repeats) if config.mil else 0)


def _provenance(
    store: BarcodeStore,
    units: Units,
    config: UnitConfig,
    latents_spec: list[dict[str, Any]],
    caches: list[ActivationStore],
    sae: Path | None,
) -> list[str]:
    """Warnings: an untrained backbone, caches of other tokens, an SAE that was trained on these images."""
    of_barcodes = {spec["cache_sha256"] for spec in latents_spec}
    doubts = []
    if not all(spec["cache"]["trained"] for spec in latents_spec):
        doubts.append("the backbone is UNTRAINED: the scores say nothing about its published weights")
    other = [str(cache.root) for cache in caches if cache.content_sha256 not in of_barcodes]
    if other:
        doubts.append(f"the latents were not encoded from {', '.join(other)}: the baselines are of other tokens")
    return [*doubts, *sae_warnings(store, config.tau, units.image_ids, sae, "of the test folds")]


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _plain(spec: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in spec.items()}
