"""The saved probe: the fit of all rows, to the bit wherever it is applied; and nothing that it must not know or do.

Slow twin: plain loops and scikit-learn on all columns, sklearn.metrics for the scores.
"""

import hashlib
import json
import runpy
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from click.testing import CliRunner
from cohorts import THRESHOLDS, cohort, kept_latents, one_thread, quick, write_folder
from places import GOLDEN
from safetensors.numpy import load, save
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
    log_loss,
    roc_auc_score,
)
from threadpoolctl import threadpool_limits

from cli import cli
from cytosae.probe import ProbeConfig, UnitConfig, apply_model, assign_folds, logistic_columns, probe
from cytosae.probe import run as probe_run
from cytosae.probe.saved_model import read_model
from cytosae.probe.units import Where
from stores import BARCODES, PROBE, PROBE_TEST, BarcodeStore, ResultStore, read_header, write_header
from stores.errors import BadInput, CytoError, SpecMismatch
from stores.latent_store import LatentStore
from stores.spec import Header
from stores.verify_any import verify

__all__ = ["one_thread"]  # a fixture that every test here uses, too

Array = npt.NDArray[Any]
FACTORS = (1e-3, 0.1, 1.0)
ONE_FIT = quick(repeats=1, thresholds=(0.0,), c_factors=(1.0,))
Made = tuple[pd.DataFrame, Array, Array]


def hospital(name: str, *, seed: int, n_per_class: int = 8, n_classes: int = 2, signal: float = 1.5) -> Made:
    """A cohort whose patients and images are of this hospital alone, every image with a hash of its own."""
    table, counts, means = cohort(seed=seed, n_per_class=n_per_class, n_classes=n_classes, signal=signal)
    table = table.assign(
        patient=name + table["patient"],
        image_id=name + table["image_id"],
        site=name,
        content_hash=[hashlib.sha256(f"{name}{k}".encode()).hexdigest() for k in table["image_id"]],
    )
    return table, counts, means


def both(one: Made, other: Made) -> Made:
    table = pd.concat([one[0], other[0]], ignore_index=True)
    return table, np.concatenate([one[1], other[1]]), np.concatenate([one[2], other[2]])


def predictions_of(root: Path, method: str = "barcode", kind: Any = PROBE) -> pd.DataFrame:
    table = ResultStore(root, kind).table("test_predictions").to_pandas()
    return table[table["method"] == method].set_index("patient")


def of_patients(made: Made) -> tuple[list[str], Array, Array, Array, Array]:
    """Names, diseases, barcodes (n, m), activation sums and active images (m, n): by the definitions."""
    table, counts, means = made
    names = sorted(set(table["patient"]))
    mine = [np.asarray(table["patient"] == name) for name in names]
    values = np.array([counts[rows].mean(0) for rows in mine]).astype(np.float32).astype(float)
    sums = np.array([means[rows].sum(0) for rows in mine]).astype(np.float32).astype(float)
    active = np.array([(means[rows] > 0).sum(0) for rows in mine]).astype(float)
    return names, np.array([table["disease"][rows].iloc[0] for rows in mine]), values, sums.T, active.T


def slow_model(made: Made, new: Array, seed: int, n_inner: int) -> tuple[float, float, Array]:
    """Threshold, C and probabilities of new rows, by plain loops over all that could be chosen."""
    _, diseases, values, sums, active = of_patients(made)
    classes, labels = np.unique(diseases, return_inverse=True)
    everybody = np.ones(len(labels), bool)

    def fit_predict(training: Array, x: Array, threshold: float, c: float) -> Array:
        kept = kept_latents(sums, active, training, threshold)
        model = LogisticRegression(C=c, tol=1e-10, max_iter=1000, solver="newton-cholesky")
        return model.fit((values * kept)[training], labels[training]).predict_proba(x * kept)

    inner_of = assign_folds(labels, np.arange(len(labels)), n_inner, np.random.default_rng([seed, 5]))
    rule = values.shape[1] * len(classes) / 100
    best = (-1.0, 0.0, 0.0)
    for threshold, factor in product(THRESHOLDS, FACTORS):
        predicted = np.zeros(len(labels), int)
        for inner in range(n_inner):
            tested = inner_of == inner
            predicted[tested] = fit_predict(~tested, values[tested], threshold, factor * rule).argmax(1)
        f1 = round(f1_score(labels, predicted, average="weighted", zero_division=0), 12)
        if f1 > best[0]:
            best = (f1, threshold, factor * rule)
    return best[1], best[2], fit_predict(everybody, new, best[1], best[2])


@pytest.fixture(autouse=True)
def no_figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than all else here."""
    if request.node.name != "test_of_the_command":
        forget_figures(monkeypatch)


def forget_figures(patch: pytest.MonkeyPatch) -> None:
    for name in ("plot_curve", "plot_confusion", "plot_methods"):
        patch.setattr(f"cytosae.probe.report.{name}", lambda scores, path: None)
    patch.setattr("cytosae.probe.external.plot_test_confusion", lambda scores, path: None)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a, b: barcodes of two hospitals; out: a probe of a, tried on b. Read-only."""
    root = tmp_path_factory.mktemp("fitted")
    a = write_folder(root / "a", *hospital("A", seed=1))
    b = write_folder(root / "b", *hospital("B", seed=2))
    with pytest.MonkeyPatch.context() as patch, threadpool_limits(1, user_api="blas"):
        forget_figures(patch)
        probe(a, root / "out", quick(repeats=1, permutations=2), test=b)
    return root


# ------------------------------------------------------------------------------------------- fitted, saved, applied


@pytest.mark.stress
@pytest.mark.parametrize(("way", "seed", "n_classes"), [("grams", 3, 3), ("columns", 3, 3), ("grams", 0, 2)])
def test_the_model_is_the_slow_fit_of_all_rows_and_its_scores_sklearns(
    way: str, seed: int, n_classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logistic_columns, "_GAP", 1e-11)
    monkeypatch.setattr(probe_run, "GRAM_ROWS", 4000 if way == "grams" else 1)
    here = hospital("A", seed=seed, n_classes=n_classes, signal=1.0)
    there = hospital("B", seed=seed + 50, n_classes=n_classes, n_per_class=9, signal=1.0)
    a, b = write_folder(tmp_path / "a", *here), write_folder(tmp_path / "b", *there)
    scores = probe(a, tmp_path / "out", quick(repeats=1, seed=seed, c_factors=FACTORS), test=b).to_json()
    names, true, values, *_ = of_patients(there)
    threshold, c, wanted = slow_model(here, values, seed, 3)
    tested = scores["test"]
    assert (tested["model"]["threshold"], tested["model"]["C"]) == (threshold, pytest.approx(c))
    found = predictions_of(tmp_path / "out").loc[names]
    p = np.stack(found["probabilities"])
    np.testing.assert_allclose(p, wanted, atol=1e-5)

    classes = np.unique(true)
    labels = np.searchsorted(classes, true)
    assert found["true"].tolist() == true.tolist()
    assert found["predicted"].tolist() == classes[p.argmax(1)].tolist()
    one_hot, of = labels[:, None] == np.arange(n_classes), tested["methods"]["barcode"]
    assert of["weighted_f1"] == pytest.approx(f1_score(labels, p.argmax(1), average="weighted", zero_division=0))
    assert of["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, p.argmax(1)))
    assert of["auroc"] == pytest.approx(np.mean([roc_auc_score(one_hot[:, k], p[:, k]) for k in range(n_classes)]))
    precision = [average_precision_score(one_hot[:, k], p[:, k]) for k in range(n_classes)]
    assert of["auprc"] == pytest.approx(np.mean(precision))
    assert of["log_loss"] == pytest.approx(log_loss(labels, p))
    assert of["brier"] == pytest.approx(((p - one_hot) ** 2).sum(1).mean())
    assert of["confusion"] == confusion_matrix(labels, p.argmax(1)).tolist()
    for name in ("weighted_f1", "auroc", "auprc", "log_loss", "brier", "balanced_accuracy"):
        assert 0 <= of["interval"][name]["low"] <= of[name] <= of["interval"][name]["high"]
        assert of["interval"][name]["high"] <= (1 if name not in ("log_loss", "brier") else 9)
    assert tested["methods"]["majority"]["auroc"] == 0.5
    assert tested["methods"].keys() == {"barcode", "majority", "n_images"}
    json.dumps(tested, allow_nan=False)


@pytest.mark.stress
def test_applied_later_it_is_the_same_to_the_bit(fitted: Path, tmp_path: Path) -> None:
    """By the four files of the model alone, wherever they lie; whatever other rows are tested beside."""
    needed = tmp_path / "sent"
    needed.mkdir()
    for name in ("probe.json", "model.json", "model.safetensors", "trained_on.parquet"):
        shutil.copy(fitted / "out" / name, needed)
    applied = apply_model(needed, fitted / "b", tmp_path / "later")
    later = applied.scores
    assert not applied.was_complete
    assert apply_model(needed, fitted / "b", tmp_path / "later") == replace(applied, was_complete=True)
    before, now = ResultStore(fitted / "out", PROBE), ResultStore(tmp_path / "later", PROBE_TEST)
    assert later == before.json("test_scores") == now.json("test_scores")
    assert before.table("test_predictions").equals(now.table("test_predictions"))

    there = hospital("B", seed=2)
    first = np.asarray(there[0]["patient"] <= "BP05")
    some = write_folder(tmp_path / "some", there[0][first].reset_index(drop=True), there[1][first], there[2][first])
    apply_model(needed, some, tmp_path / "few")
    few, many = (predictions_of(tmp_path / name, kind=PROBE_TEST) for name in ("few", "later"))
    assert len(few) == 6
    for name, row in few.iterrows():
        assert row["probabilities"].tolist() == many.loc[name, "probabilities"].tolist()
    text = (needed / "model.json").read_text() + (needed / "probe.json").read_text()
    assert "AP0" not in text  # nothing that is sent names a patient


@pytest.mark.stress
@pytest.mark.parametrize("level", ["patient", "image"])
def test_left_out_sites_are_a_cohort_of_their_own(level: str, fitted: Path, tmp_path: Path) -> None:
    """As if they lay in another folder: no fold, no shuffle and no fit has them."""
    there = hospital("B", seed=2)
    together = write_folder(tmp_path / "ab", *both(hospital("A", seed=1), there))
    config = quick(repeats=1, permutations=2, units=UnitConfig(level=level, target="disease"))
    alone = probe(fitted / "a", tmp_path / "alone", config).to_json()
    if level == "patient":
        apart, folder = ResultStore(fitted / "out", PROBE).json("test_scores"), ResultStore(fitted / "out", PROBE)
    else:
        apart = apply_model(tmp_path / "alone", fitted / "b", tmp_path / "apart").scores
        folder = ResultStore(tmp_path / "apart", PROBE_TEST)
    one = probe(together, tmp_path / "one", config, test_where=Where("site", ("B",))).to_json()
    for name, other in {"folds": "alone", "predictions": "alone", "trained_on": "alone"}.items():
        assert ResultStore(tmp_path / other, PROBE).table(name).equals(ResultStore(tmp_path / "one", PROBE).table(name))
    assert ResultStore(tmp_path / "one", PROBE).table("test_predictions").equals(folder.table("test_predictions"))
    tested = one.pop("test")
    assert one == alone  # a test changes nothing of the cross-validation
    assert tested["methods"] == apart["methods"]
    assert tested["model"]["kept_out"] == {"column": "site", "values": ["B"]}
    assert tested["n_units"] == (16 if level == "patient" else len(there[0]))
    with pytest.raises(BadInput, match="images that the model is fitted on"):
        apply_model(tmp_path / "one", together, tmp_path / "again")


def test_without_a_test_the_scores_are_those_of_before(tmp_path: Path) -> None:
    """The golden probe was made before there were models."""
    maker = runpy.run_path(str(GOLDEN / "make_golden.py"))
    maker["write_cohort"](tmp_path / "cohort", LatentStore(GOLDEN / "latents-v1.zarr"))
    few: dict[str, Any] = {"folds": 2, "inner_folds": 2, "repeats": 1, "permutations": 2}
    config = ProbeConfig(units=UnitConfig(target="disease"), **few, thresholds=(0.0, 1.0), c_factors=(1.0,))
    probe(tmp_path / "cohort", tmp_path / "out", config)
    before, now = ResultStore(GOLDEN / "probe-v1", PROBE), ResultStore(tmp_path / "out", PROBE)
    assert before.table("folds").equals(now.table("folds"))
    old, new = (each.table("predictions").to_pandas() for each in (before, now))
    assert old.drop(columns="probabilities").equals(new.drop(columns="probabilities"))
    np.testing.assert_allclose(np.stack(old["probabilities"]), np.stack(new["probabilities"]), atol=1e-12)


# ------------------------------------------------------------------------------------------- what a test must not know


@pytest.mark.stress
def test_images_that_the_model_knows_are_refused(tmp_path: Path) -> None:
    """By content, whatever they are called; named and counted, nothing is written. Others may be."""
    here, there = hospital("A", seed=1), hospital("B", seed=2)
    here[0].loc[here[0]["patient"] == "AP00", "disease"] = ""  # not fitted
    of = {name: here[0].index[here[0]["patient"] == name] for name in ("AP00", "AP01", "AP02")}
    a = write_folder(tmp_path / "a", *here)

    def with_copies(name: str, rows: list[int], upper: bool = False) -> Path:
        table = there[0].copy()
        copied = here[0]["content_hash"].iloc[rows].tolist()
        table.loc[3 : 2 + len(rows), "content_hash"] = [value.upper() if upper else value for value in copied]
        return write_folder(tmp_path / name, table, *there[1:])

    probe(a, tmp_path / "out", ONE_FIT, test=with_copies("fine", [*of["AP00"]]))
    words = rf"2 of {len(there[0])} images of the test \(.*\) are images that the model is fitted on, by their content "
    words += r"\(B\w+, B\w+\): a test must not know them"
    shared = with_copies("shared", [of["AP01"][0], of["AP02"][0]])
    for folder in (shared, with_copies("upper", [of["AP01"][0], of["AP02"][0]], upper=True)):
        with pytest.raises(BadInput, match=words):
            probe(a, tmp_path / "no", ONE_FIT, test=folder)
        with pytest.raises(BadInput, match=words):
            apply_model(tmp_path / "out", folder, tmp_path / "no")
    with pytest.raises(BadInput, match="the very barcodes that the model is fitted on"):
        probe(a, tmp_path / "no", ONE_FIT, test=a)
    with pytest.raises(BadInput, match=rf"{len(here[0]) - len(of['AP00'])} of .* are images that the model is fitted"):
        apply_model(tmp_path / "out", a, tmp_path / "no")
    assert not (tmp_path / "no").exists()

    table = there[0].copy()
    table.loc[:4, "content_hash"] = ""
    unknown = write_folder(tmp_path / "unknown", table, *there[1:])
    scores = apply_model(tmp_path / "out", unknown, tmp_path / "unknown.out").scores
    assert any("(5 of the test): whether training and test share them is not known" in w for w in scores["warnings"])


@pytest.mark.stress
@pytest.mark.parametrize(
    ("change", "where", "words"),
    [
        ({}, Where("site", ("C",)), r"no patient has site C \(--test-where\); there are A, B"),
        ({}, Where("ward", ("B",)), "no column 'ward'"),
        ({}, Where("site", ("A", "B")), "keeps every patient out of the fit"),
        ({"site": "A"}, Where("site", ("B",)), r"1 patients have images in the test and in the training \(BP01\)"),
        ({"content_hash": "copy"}, Where("site", ("B",)), r"1 of 4 images of the test .* fitted on.* \(Bi01_0\)"),
        ({"field": "f0"}, Where("site", ("B",)), r"share a patient or a value of field with the training \(.*BP01"),
    ],
)
def test_nobody_is_on_both_sides(change: dict[str, str], where: Where, words: str, tmp_path: Path) -> None:
    table, counts, means = both(hospital("A", seed=1), hospital("B", seed=2))
    table["field"] = table["site"] + table["field"]
    row = int(table.index[table["image_id"] == "Bi01_0"][0])
    for name, value in change.items():
        table.loc[row, name] = {"copy": table["content_hash"][0], "f0": table["field"][0]}.get(value, value)
    folder = write_folder(tmp_path / "ab", table, counts, means)
    config = quick(repeats=1, units=UnitConfig(group_by="field" if "field" in change else None))
    with pytest.raises(BadInput, match=words):
        probe(folder, tmp_path / "out", config, test_where=where)
    assert not (tmp_path / "out").exists()


@pytest.mark.stress
def test_labels_that_the_model_does_not_know_are_predicted_named_and_not_scored(tmp_path: Path) -> None:
    here, there = hospital("A", seed=1), hospital("B", seed=2)
    plain = write_folder(tmp_path / "plain", *there)
    a = write_folder(tmp_path / "a", *here)
    more = hospital("C", seed=3, n_per_class=2, n_classes=3)
    kinds = {"CP00": "CML", "CP01": "", "CP02": "D9", "CP03": "CML", "CP04": "", "CP05": ""}
    more[0]["disease"] = more[0]["patient"].map(kinds)
    wider = write_folder(tmp_path / "wider", *both(there, more))
    scores = probe(a, tmp_path / "out", ONE_FIT, test=wider).to_json()
    alone = apply_model(tmp_path / "out", plain, tmp_path / "alone").scores
    tested = scores["test"]
    assert tested["methods"] == alone["methods"]
    assert (tested["n_units"], tested["n_scored"]) == (22, 16)
    assert {name: found["n"] for name, found in tested["unknown"].items()} == {"CML": 2, "D9": 1}
    assert tested["without_label"]["n"] == 3
    table = predictions_of(tmp_path / "out")
    assert len(table) == 22
    assert table.loc[[*kinds], "is_scored"].any() == False  # noqa: E712
    assert table["is_scored"].sum() == 16
    assert [table.loc[name, "true"] for name in kinds] == ["CML", None, "D9", "CML", None, None]
    guessed = table.loc[["CP00", "CP03"], "predicted"].value_counts().to_dict()
    assert tested["unknown"]["CML"]["predicted"] == guessed
    said = " ".join(tested["warnings"])
    assert "3 patients have a disease that the model does not know (CML: 2, D9: 1)" in said
    assert "3 patients have no disease" in said

    more[0]["disease"] = "CML"
    none = write_folder(tmp_path / "none", *more)
    with pytest.raises(
        BadInput, match=r"no patient of the test .* has a disease that the model knows \(D0, D1\); .*CML"
    ):
        apply_model(tmp_path / "out", none, tmp_path / "no")
    there[0]["disease"] = "D1"
    scores = apply_model(tmp_path / "out", write_folder(tmp_path / "one", *there), tmp_path / "one.out").scores
    assert scores["methods"]["barcode"]["auroc"] is None
    assert scores["methods"]["barcode"]["interval"]["auroc"] == {"low": None, "high": None}
    assert any("no patient of D0, which the model knows" in warning for warning in scores["warnings"])


# ------------------------------------------------------------------------------------------- what it must not judge


@pytest.mark.stress
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"latents_spec": {"sae_sha256": "t" * 64}}, "its latents are of another SAE .*tttttttttttt.*ssssssssssss"),
        ({"latents_spec": {"cache": {"width": 6, "trained": True, "block": 3}}}, "tokens are of another kind.*block 3"),
        (
            {"tau": 0.3},
            r"it is counted at tau 0.3, the model is of tau 0.2; count it again with cyto barcode --tau 0.2",
        ),
        ({"normalize": "cytosae-release"}, "its normalisation is cytosae-release, the model's is images"),
        ({"token_set": "cls"}, "its token set is cls, the model's is all; .*--token-set all"),
    ],
)
def test_other_barcodes_are_refused_by_name(changes: dict[str, Any], words: str, fitted: Path, tmp_path: Path) -> None:
    b = Path(shutil.copytree(fitted / "b", tmp_path / "b"))
    header = read_header(b, BARCODES)
    spec = {**header.spec, **changes}
    spec["latents_spec"] = {**header.spec["latents_spec"], **changes.get("latents_spec", {})}
    write_header(b, Header(**{**vars(header), "spec": spec, "seal": None}))
    with pytest.raises(SpecMismatch, match=words):
        probe(fitted / "a", tmp_path / "no", quick(repeats=1), test=b)
    with pytest.raises(SpecMismatch, match=words):
        apply_model(fitted / "out", b, tmp_path / "no")
    assert not (tmp_path / "no").exists()


@pytest.mark.stress
def test_fewer_latents_are_refused(fitted: Path, tmp_path: Path) -> None:
    table, counts, means = hospital("B", seed=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("test_probe.N_LATENTS", 39)
        b = write_folder(tmp_path / "b", table, counts[:, :39], means[:, :39])
    with pytest.raises(SpecMismatch, match="it has 39 latents, the model's SAE has 40"):
        probe(fitted / "a", tmp_path / "no", quick(repeats=1), test=b)


# ------------------------------------------------------------------------------------------- damage


def signed(root: Path, **edits: Any) -> Path:
    """A copy of a probe whose model is changed by one who also writes every hash anew."""
    tensors = edits.pop("tensors", {})
    card = json.loads((root / "model.json").read_text())
    arrays = {**load((root / "model.safetensors").read_bytes()), **tensors}
    data = save({name: values for name, values in arrays.items() if values is not None})
    (root / "model.safetensors").write_bytes(data)
    card |= {"weights_sha256": hashlib.sha256(data).hexdigest(), **edits}
    (root / "model.json").write_text(json.dumps(card))
    header = read_header(root, PROBE)
    summary = {**(header.summary or {})}
    hashes = {
        name: hashlib.sha256((root / name).read_bytes()).hexdigest() for name in ("model.json", "model.safetensors")
    }
    summary["files"] = {**summary["files"], "model.json": hashes["model.json"]}
    summary["figures"] = {**summary["figures"], "model.safetensors": hashes["model.safetensors"]}
    write_header(root, Header(**{**vars(header), "summary": summary, "seal": None}))
    return root


@pytest.mark.stress
def test_a_damaged_model_is_one_line(fitted: Path, tmp_path: Path) -> None:
    whole, b = fitted / "out", fitted / "b"
    assert verify(whole).problems == []

    def told(root: Path) -> str:
        done = CliRunner().invoke(cli, ["probe", "--model", str(root), "--test", str(b), "-o", str(tmp_path / "no")])
        assert isinstance(done.exception, SystemExit | CytoError), done.exception
        assert done.exit_code == 1
        assert not (tmp_path / "no").exists()
        text = str(done.exception) if isinstance(done.exception, CytoError) else done.output
        assert "\n" not in text.strip()
        return text

    for number, name in enumerate(("model.json", "model.safetensors", "trained_on.parquet")):
        data = (whole / name).read_bytes()
        damages = {"cut": data[:-9], "flipped": data[:-1] + bytes([data[-1] ^ 1]), "empty": b"", "gone": None}
        for how, content in damages.items():
            root = tmp_path / f"{number}{how}"
            shutil.copytree(whole, root)
            (root / name).unlink() if content is None else (root / name).write_bytes(content)
            assert name in told(root)
            assert [name in problem for problem in verify(root).problems] == [True]

    k = ResultStore(whole, PROBE).json("model")["n_latents_kept"]
    nan = np.full((k, 2), np.nan)
    edits: list[tuple[dict[str, Any], str]] = [
        ({"tensors": {"weights": nan}}, "weights holds what is not finite"),
        ({"tensors": {"weights": np.zeros((3, 2))}}, "weights has the shape"),
        ({"tensors": {"weights": np.zeros((k, 2), np.float32)}}, "weights is of float32"),
        ({"tensors": {"intercept": None}}, "intercept"),
        ({"tensors": {"latents": np.arange(k)[::-1].copy()}}, "latents must rise"),
        ({"tensors": {"latents": np.arange(k) + 41 - k}}, "latents must be those of the SAE"),
        ({"level": "cell"}, "its level is 'cell'"),
        ({"classes": ["D0", "D0"]}, "classes must differ"),
        ({"tau": "0.2"}, "says tau '0.2'; expected float"),
        ({"weights_sha256": "0" * 64}, "its SHA-256 is another"),
        ({"version": 2}, "newer than this cyto"),
        ({"classes": None}, "says classes"),
    ]
    for number, (edit, words) in enumerate(edits):
        root = signed(shutil.copytree(whole, tmp_path / f"edit{number}"), **edit)
        assert words in told(root), edit
    assert "holds no fitted model: an older cyto saved none" in told(GOLDEN / "probe-v1")


@pytest.mark.stress
def test_of_the_command(tmp_path: Path) -> None:
    """The two ways on the command line, and options that have no part in the second."""
    here, there = hospital("A", seed=1), hospital("B", seed=2)
    write_folder(tmp_path / "a", *here)
    there[0].loc[there[0]["patient"] == "BP03", "disease"] = "CML"
    write_folder(tmp_path / "b", *there)

    def run(*words: Any) -> Any:
        return CliRunner().invoke(cli, ["probe", *map(str, words)])

    few = ["--folds", 3, "--repeats", 1, "--permutations", 0, "--threshold", 0, "--c-factor", 1, "--workers", 1]
    done = run(tmp_path / "a", "-o", tmp_path / "out", "--test", tmp_path / "b", *few)
    assert done.exit_code == 0, done.output
    assert f"test ({tmp_path / 'out'}): 15 of 16 patients scored, in 15 groups; disease: D0 8, D1 7" in done.stdout
    assert "warning: test: 1 patients have a disease that the model does not know (CML: 1)" in done.stderr
    later = run("--model", tmp_path / "out", "--test", tmp_path / "b", "-o", tmp_path / "later")
    assert later.exit_code == 0, later.output
    table = done.stdout[done.stdout.index("fitted once on") :]
    assert table == later.stdout[later.stdout.index("fitted once on") :]
    assert "16 patients: 40 latents from a mean activation of 0, C = 0.8" in table
    as_json = run("--model", tmp_path / "out", "--test", tmp_path / "b", "-o", tmp_path / "later", "--json")
    assert json.loads(as_json.stdout) == ResultStore(tmp_path / "later", PROBE_TEST).json("test_scores")
    whole = run(tmp_path / "a", "-o", tmp_path / "out", "--test", tmp_path / "b", *few, "--json")
    assert json.loads(whole.stdout)["test"] == json.loads(as_json.stdout)
    assert verify(tmp_path / "later").problems == []
    for name in ("test_confusion.png", "test_predictions.parquet", "test_scores.json"):
        other = shutil.copytree(tmp_path / "later", tmp_path / f"without {name}")
        (other / name).unlink()
        assert [name in problem for problem in verify(other).problems] == [True]

    wrong_usage: list[tuple[list[Any], str]] = [
        (["--model", tmp_path / "out", "--test", tmp_path / "b", "--folds", 3], "--folds: a saved model"),
        (["--model", tmp_path / "out", "--test", tmp_path / "b", "--test-where", "a=b"], "--test-where: a saved"),
        (["--model", tmp_path / "out"], "is tried on --test BARCODES"),
        ([tmp_path / "a", "--model", tmp_path / "out", "--test", tmp_path / "b"], "and on nothing else"),
        (["--test", tmp_path / "b"], "name the BARCODES to fit on"),
    ]
    wrong: list[tuple[list[Any], str]] = [
        ([tmp_path / "a", "--test", tmp_path / "b", "--test-where", "site=A"], "choose one"),
        ([tmp_path / "a", "--test-where", "site"], "takes COLUMN=VALUE, and one column only; found site"),
        ([tmp_path / "a", "--test-where", "site=A", "--test-where", "label=L0"], "found site and label"),
    ]
    for words, said in wrong_usage + wrong:
        failed = run(*words, "-o", tmp_path / "no")
        assert failed.exit_code == (1 if (words, said) in wrong else 2)
        assert said in str(failed.exception) + failed.output, words
    assert not (tmp_path / "no").exists()


def test_reading_a_model_gives_what_was_saved(fitted: Path, tmp_path: Path) -> None:
    """To the bit, and the same bytes by any number of threads."""
    _, model, seen = read_model(fitted / "out")
    assert seen == set(hospital("A", seed=1)[0]["content_hash"])
    arrays = load((fitted / "out" / "model.safetensors").read_bytes())
    assert arrays["weights"].dtype == np.float64
    np.testing.assert_array_equal(model.fit.weights, arrays["weights"])
    np.testing.assert_array_equal(model.fit.intercept, arrays["intercept"])
    assert model.card.n_of_class == [8, 8]
    assert model.card.barcodes == BarcodeStore(fitted / "a").header.identity
    probe(fitted / "a", tmp_path / "again", quick(repeats=1, permutations=2), workers=2)
    for name in ("model.json", "model.safetensors"):
        assert (fitted / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    one, other = (ResultStore(root, PROBE).table("trained_on") for root in (fitted / "out", tmp_path / "again"))
    assert one.equals(other)
