"""Ablation: equal to a slow twin that decodes twice, finds what was planted, and finds nothing where nothing is.

The later blocks are those of `planted_causes.py`, whose effects can be computed by hand; a real backbone is at the end.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner, Result
from planted_causes import N_LATENTS, PER_IMAGE, PLANTED, dense_latents, planted_rest, rows_of, write_planted
from sklearn.linear_model import LogisticRegression

import cytocache.bridge as bridge
from cli import cli
from cytosae.causes import AblateConfig, AblateResult, ablate_latents
from cytosae.causes import ablate as ablating
from cytosae.causes import measure as measuring
from cytosae.causes import survey as surveying
from cytosae.causes.cls_probe import Labels, fit_probe, read_labels
from cytosae.causes.effects import _spread, holm
from cytosae.causes.matching import matched_latents
from cytosae.causes.measure import cls_moves, embed_edits
from cytosae.causes.places import owners_of, round_the_patients
from cytosae.causes.report import _middle
from cytosae.latents.encode import encode
from cytosae.probe import ProbeModel, saved_model
from cytosae.probe.logistic_columns import ColumnFit
from cytosae.probe.saved_model import Card, write_model
from cytosae.sae import load_sae
from stores import (
    ABLATION,
    PROBE,
    ActivationStore,
    BadInput,
    IncompleteStore,
    LatentStore,
    ResultStore,
    SpecMismatch,
    begin_results,
)
from stores.activation_spec import SAME_TOKENS
from stores.spec import plain

pytestmark = pytest.mark.usefixtures("one_thread")
Float = npt.NDArray[np.float64]
QUICK: dict[str, Any] = {"n_directions": 2, "n_images": 5, "n_controls": 4, "curve": ()}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """acts.zarr, run and latents.zarr of `planted_causes`."""
    root = tmp_path_factory.mktemp("planted")
    write_planted(root)
    encode(root / "acts.zarr", root / "run", root / "latents.zarr", value_bits=23, device="cpu")
    return root


def run(root: Path, out: Path, *, strength: float = 0.0, stage_one: Any = None, **settings: Any) -> AblateResult:
    """An ablation of the planted cache; `settings` of the config, and inputs."""
    names = {field.name for field in dataclasses.fields(AblateConfig)}
    config = AblateConfig(**{name: value for name, value in settings.items() if name in names})
    more = {"latents" if name == "stored" else name: value for name, value in settings.items() if name not in names}
    stage_one = stage_one or planted_rest(root / "run", strength)
    return ablate_latents(root / "run", root / "acts.zarr", out, config, stage_one=stage_one, device="cpu", **more)


# ----------------------------------------------------------------------------------------------------- the slow twin


def new_value(mode: str, value: float, mean: float) -> float:
    """What becomes of one value of a latent that has this mean."""
    return {"zero": 0.0, "mean": mean}[mode] if mode in ("zero", "mean") else float(mode.split(":")[1]) * value


def twin_edit(root: Path, row: dict[str, Any], config: AblateConfig, allowed: list[int], ranked: list[int]) -> Float:
    """(cls_change, cls_norm, cls_cosine, edit_norm) of one row of images.parquet: latents, decode, error, later blocks.

    All in float64, one image and one token at a time.
    """
    store, model = ActivationStore(root / "acts.zarr"), load_sae(root / "run", device="cpu").model
    ids = store.images["image_id"].to_pylist()
    tokens = np.nan_to_num(store.read_images(np.arange(len(ids)))).astype(np.float64)
    z_all = dense_latents(root / "run", tokens)
    w, b = model.W_dec.double().numpy(), model.b_dec.double().numpy()
    x, z = tokens[ids.index(row["image_id"])], z_all[ids.index(row["image_id"])]
    new = z.copy()
    edited = x.copy()
    if row["edit"] in ("chosen", "control"):
        readable = np.flatnonzero(store.readable())
        mean = np.mean([z_all[n, t, row["latent"]] for n in readable for t in allowed])
        for t in allowed:
            new[t, row["latent"]] = new_value(config.mode, z[t, row["latent"]], mean)
    elif row["edit"] in ("remove", "keep"):
        active = [n for n in range(N_LATENTS) if any(z[t, n] > 0 for t in allowed)]
        size = {n: np.linalg.norm(w[n]) * np.sqrt(sum(z[t, n] ** 2 for t in allowed)) for n in active}
        order = {"largest": sorted(active, key=lambda n: -size[n]), "chosen": ranked, "all": active}[row["order"]]
        first = order[: row["number"]] if row["number"] else order
        for t in allowed:
            for n in active:
                if (n in first) == (row["edit"] == "remove"):
                    new[t, n] = 0
    error = x - (z @ w + b)  # what the SAE leaves out
    edited = new @ w + b + error
    rest = planted_rest(root / "run", 2.0)
    before, after = (rest.final_cls(torch.from_numpy(each[None]).float()).double().numpy()[0] for each in (x, edited))
    far = np.linalg.norm(after - before)
    cosine = after @ before / (np.linalg.norm(after) * np.linalg.norm(before))
    return np.array([far / np.linalg.norm(before), far, 1 - cosine, np.linalg.norm(edited - x)])


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize(("mode", "token_set"), [("zero", "all"), ("mean", "patch"), ("scale:-1.5", "cls")])
def test_equals_a_twin_that_decodes_twice(
    planted: Path, tmp_path: Path, mode: str, token_set: str, stored: bool
) -> None:
    latents = planted / "latents.zarr" if stored else None
    allowed = {"all": [*range(PER_IMAGE)], "patch": [*range(1, PER_IMAGE)], "cls": [0]}[token_set]
    store = ActivationStore(planted / "acts.zarr")
    z = dense_latents(planted / "run", store.read_images(np.flatnonzero(store.readable())))
    two = (PLANTED, next(n for n in range(N_LATENTS) if n != PLANTED and (z[:, allowed, n] > 0).any()))
    settings = {**QUICK, "mode": mode, "token_set": token_set, "curve": (1, 3), "curve_images": 2}
    done = run(planted, tmp_path / "out", strength=2.0, stored=latents, latents=two, **settings)
    config = AblateConfig(latents=two, mode=mode)
    effect = {row["latent"]: row["effect"] for row in rows_of(done.effects, quantity="cls_change")}
    ranked = sorted(two, key=lambda n: -effect[n])
    table = pq.read_table(tmp_path / "out" / "images.parquet").to_pylist()
    rows = [row for row in table if row["edit"] != "direction" and row["order"] != "random"]
    assert {row["edit"] for row in rows} == {"chosen", "control", "remove", "keep"}
    assert {row["order"] for row in rows} == {None, "chosen", "largest", "all"}
    for row in rows[:: max(1, len(rows) // 60)]:
        twin = twin_edit(planted, row, config, allowed, ranked)
        found = np.array([row[name] for name in ("cls_change", "cls_norm", "cls_cosine", "edit_norm")])
        np.testing.assert_allclose(found, twin, rtol=2e-4, atol=3e-6)
    assert max(row["cls_change"] for row in rows) > 0.01


def test_the_survey_equals_counting(planted: Path, tmp_path: Path) -> None:
    """Frequencies, norms and sums of every latent, one by one."""
    seen: list[Any] = []
    taken = surveying.take_survey

    def take(*arguments: Any, **settings: Any) -> Any:
        seen.append(taken(*arguments, **settings))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablating, "take_survey", take)
        run(planted, tmp_path / "out", latents=(PLANTED,), token_set="patch", **QUICK)
    survey = seen[0]
    store = ActivationStore(planted / "acts.zarr")
    readable = np.flatnonzero(store.readable())
    z = dense_latents(planted / "run", store.read_images(readable))[:, 1:]
    np.testing.assert_array_equal(survey.n_images_active, (z > 0).any(1).sum(0))
    np.testing.assert_array_equal(survey.n_tokens_active, (z > 0).sum((0, 1)))
    np.testing.assert_allclose(survey.mean, z.mean((0, 1)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(survey.square, (z**2).sum((0, 1)), rtol=1e-4, atol=1e-6)
    order = round_the_patients(readable, owners_of(store.images), [0, 0])
    for latent in range(N_LATENTS):
        active = [n for n in order if (z[np.searchsorted(readable, n), :, latent] > 0).any()]
        assert [n for n in survey.images[latent] if n >= 0] == active[:5]


# --------------------------------------------------------------------------------------------------- planted and null


def test_a_planted_cause_ranks_first(planted: Path, tmp_path: Path) -> None:
    done = run(planted, tmp_path / "out", strength=12.0, latents=(3, PLANTED, 90), n_images=20, n_directions=30)
    (row,) = rows_of(done.effects, latent=PLANTED, quantity="cls_gain")
    assert row["n_controls"] == 100
    assert row["p"] == pytest.approx(1 / 101)
    assert row["p_directions"] == pytest.approx(1 / 31)
    assert row["difference_low"] > 0
    assert row["effect"] > 2 * row["control_high"]
    (first,) = rows_of(done.effects, latent=PLANTED, quantity="cls_change")
    assert first["p"] == pytest.approx(1 / 101)
    assert first["low"] < first["effect"] < first["high"]
    assert all(row["p"] > 0.05 for row in rows_of(done.effects, quantity="cls_gain") if row["latent"] != PLANTED)
    assert f"latent {PLANTED}: the final CLS moves by" in [*done.lines()][1]
    assert done.curves is not None
    table = pq.read_table(tmp_path / "out" / "images.parquet")
    share: dict[str, list[float]] = {"chosen": [], "random": []}
    everything = {row["image_id"]: row["cls_norm"] for row in rows_of(table, edit="remove", order="all")}
    first_of_all = {
        order: {row["image_id"]: row["cls_norm"] for row in rows_of(table, edit="remove", order=order, number=1)}
        for order in share
    }
    for name, moved in first_of_all["chosen"].items():
        if moved > 0:  # images in which the planted one is active: it comes first in the order of effects
            for order, found in share.items():
                found.append(first_of_all[order][name] / everything[name])
    assert len(share["chosen"]) >= 3
    assert np.mean(share["chosen"]) > 2 * np.mean(share["random"])


@pytest.mark.stress
def test_matched_controls_centre_on_zero(planted: Path, tmp_path: Path) -> None:
    """Where the later blocks hear no latent more than another, no latent stands out, up or down."""
    done = run(planted, tmp_path / "out", latents=tuple(range(0, 40)), n_images=40, n_directions=30, curve=())
    rows = [*rows_of(done.effects, quantity="cls_gain")]
    difference = np.array([row["difference"] for row in rows])
    size = np.mean([row["control_mean"] for row in rows])
    assert abs(difference.mean()) < 3 * difference.std(ddof=1) / np.sqrt(len(rows)) + 1e-12
    assert abs(difference.mean()) < 0.1 * size
    p = np.array([row["p"] for row in rows])
    assert 0.3 < p.mean() < 0.7
    assert (p < 0.05).mean() < 0.2
    assert min(row["p_holm"] for row in rows) > 0.05
    assert difference.tolist() == [row["effect"] - row["control_mean"] for row in rows]
    by_lot = np.array([row["effect"] - row["direction_mean"] for row in rows])
    assert abs(by_lot.mean()) < 0.25 * size


def test_a_control_that_matters_moves_the_mean_and_not_the_trimmed_one() -> None:
    values = np.append(np.full(99, 0.001), 5.0)
    spread = _spread(values, "control")
    assert (spread["control_mean"], spread["control_trimmed"]) == pytest.approx((0.051, 0.001), abs=1e-3)
    row = {"control_mean": 0.051}
    assert (_middle(row, "control"), _middle(row | {"control_trimmed": 0.001}, "control")) == (0.051, 0.001)
    assert _spread(np.array([np.nan]), "direction")["direction_trimmed"] is None


def test_editing_nothing_changes_nothing(planted: Path, tmp_path: Path) -> None:
    """Exactly: such an edit is not run. And if it is run, only rounding is left."""
    stage_one: Any = planted_rest(planted / "run", 2.0)
    done = run(planted, tmp_path / "out", stage_one=stage_one, mode="scale:1", latents=(PLANTED,), **QUICK)
    table = pq.read_table(tmp_path / "out" / "images.parquet")
    for name in ("cls_change", "cls_norm", "cls_cosine", "edit_norm"):
        assert not np.any(table[name].to_numpy()), name
    assert all(row["effect"] == 0 for row in done.effects.to_pylist())
    x = torch.randn(PER_IMAGE, 24)
    assert cls_moves(embed_edits(x, torch.zeros(5, PER_IMAGE, 24), stage_one.final_cls)).max() < 1e-6


def test_keeping_all_changes_nothing_and_removing_all_is_the_whole(planted: Path, tmp_path: Path) -> None:
    run(planted, tmp_path / "out", latents=(PLANTED,), **{**QUICK, "curve": (N_LATENTS,), "curve_images": 6})
    table = pq.read_table(tmp_path / "out" / "images.parquet")
    everything = {row["image_id"]: row["cls_norm"] for row in rows_of(table, edit="remove", order="all")}
    assert len(everything) == 6
    for order in ("largest", "random"):
        for row in rows_of(table, order=order, edit="keep"):
            assert row["cls_norm"] == 0
        for row in rows_of(table, order=order, edit="remove"):
            assert row["cls_norm"] == pytest.approx(everything[row["image_id"]], rel=1e-5)


def test_controls_are_the_nearest(planted: Path) -> None:
    """Twin: all distances, sorted."""
    rng = np.random.default_rng(0)
    n_active, norms = rng.integers(0, 50, 300), rng.lognormal(0, 1, 300)
    n_active[7] = 9
    chosen = np.array([7, 20])
    found = matched_latents(7, chosen, n_active, norms, 30, seed=0)
    some = [n for n in range(300) if n_active[n] > 0 and n not in (7, 20)]
    a, b = (np.log10(values.astype(float)) for values in (np.maximum(n_active, 1), norms))
    distance = {n: ((a[n] - a[7]) / a[some].std()) ** 2 + ((b[n] - b[7]) / b[some].std()) ** 2 for n in some}
    assert {*found.tolist()} == {*sorted(some, key=lambda n: distance[n])[:30]}
    with pytest.raises(BadInput, match="every other latent is silent"):
        matched_latents(7, chosen, np.where(np.isin(np.arange(300), chosen), 5, 0), norms, 30, seed=0)


def test_images_go_round_the_patients(planted: Path) -> None:
    images = ActivationStore(planted / "acts.zarr").images
    owners = owners_of(images)
    order = round_the_patients(np.arange(40), owners, [1])
    assert sorted(order.tolist()) == [*range(40)]
    n_owners = len({*owners.of_image.tolist()})
    assert len({*owners.of_image[order[:n_owners]].tolist()}) == n_owners
    assert owners.n_without == 3


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


# ------------------------------------------------------------------------------------------ patches, resume, words


def test_only_the_patches_of_a_table_are_edited(planted: Path, tmp_path: Path) -> None:
    """The same as by hand on these tokens, and no other image is looked at."""
    store = ActivationStore(planted / "acts.zarr")
    z = dense_latents(planted / "run", np.nan_to_num(store.read_images(np.arange(40))))
    places = [(n, t) for n in range(20) for t in range(1, PER_IMAGE) if n != 4 and z[n, t, PLANTED] > 0][:4]
    ids = store.images["image_id"].to_pylist()
    lines = [f"{ids[n]},{t - 1}" for n, t in places] + [f"{ids[30]},2"]
    (tmp_path / "patches.csv").write_text("\n".join(["image_id,patch", *lines]) + "\n")
    done = run(planted, tmp_path / "out", strength=2.0, latents=(PLANTED,), patches=tmp_path / "patches.csv", **QUICK)
    assert done.n_images_surveyed == len({n for n, _ in places}) + 1
    rows = [*rows_of(pq.read_table(tmp_path / "out" / "images.parquet"), edit="chosen")]
    assert {row["image_id"] for row in rows} == {ids[n] for n, _ in places}
    for row in rows:
        allowed = [t for n, t in places if ids[n] == row["image_id"]]
        twin = twin_edit(planted, row, AblateConfig(latents=(PLANTED,)), allowed, [])
        np.testing.assert_allclose([row["cls_change"], row["edit_norm"]], twin[[0, 3]], rtol=2e-4, atol=3e-6)


@pytest.mark.stress
@pytest.mark.parametrize("stop_after", [1, 9, 30])
def test_an_interrupted_ablation_continues(
    planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int
) -> None:
    """To the bit, and what was measured is not measured again."""
    monkeypatch.setattr(measuring, "_IMAGES_PER_PART", 2)
    edited: list[int] = []
    edit = measuring.edit_image

    def count(image: int, *arguments: Any) -> Any:
        edited.append(image)
        return edit(image, *arguments)

    monkeypatch.setattr(measuring, "edit_image", count)
    settings = {**QUICK, "latents": (PLANTED, 5), "curve": (1, 2)}
    run(planted, tmp_path / "whole", strength=2.0, **settings)
    n_whole = len(edited)

    def interrupt(done: int, total: int, state: str) -> None:
        if len(edited) == n_whole + stop_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(planted, tmp_path / "out", strength=2.0, progress=interrupt, **settings)
    with pytest.raises(IncompleteStore):
        ResultStore(tmp_path / "out", ABLATION)
    said: list[str] = []
    run(planted, tmp_path / "out", strength=2.0, say=said.append, **settings)
    assert any("survey of 39 images is there already" in line for line in said)
    assert 2 * n_whole <= len(edited) <= 2 * n_whole + 2  # a part of two images was begun
    for name in ("effects", "controls", "images", "curves"):
        again, once = (pq.read_table(tmp_path / each / f"{name}.parquet") for each in ("out", "whole"))
        assert again.equals(once), name
    assert not (tmp_path / "out" / "parts").exists()
    assert run(planted, tmp_path / "out", strength=2.0, **settings).was_complete


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"latents": ()}, "no latent to change"),
        ({"latents": (3, 3)}, "latent 3 is given twice"),
        ({"latents": (N_LATENTS,)}, f"{N_LATENTS}"),
        ({"latents": (N_LATENTS - 1,)}, "active in none of 39 images"),
        ({"mode": "half"}, "mode must be zero, mean or scale:K"),
        ({"mode": "scale:nan"}, "mode must be zero, mean or scale:K"),
        ({"curve": (2, 1)}, "curve must be rising"),
        ({"n_controls": 0}, "n_controls must be at least 1"),
        ({"token_set": "register"}, "no registers"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(planted: Path, tmp_path: Path, change: dict[str, Any], words: str) -> None:
    settings = {**QUICK, "latents": (PLANTED,), **change}
    with pytest.raises(BadInput, match=words) as raised:
        run(planted, tmp_path / "out", **settings)
    assert "\n" not in str(raised.value)


def test_the_backbone_must_be_given(planted: Path, tmp_path: Path) -> None:
    config = AblateConfig(latents=(PLANTED,))
    with pytest.raises(BadInput, match=r"give stage_one=cytocache\.bridge"):
        ablate_latents(planted / "run", planted / "acts.zarr", tmp_path / "out", config, device="cpu")


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["image,patch", "ID,1"], "must have the columns image_id and patch"),
        (["image_id,patch", "nobody.png,1"], "1 of 1 images in .* are not in the cache: nobody.png"),
        (["image_id,patch", "ID,9"], "patches are numbered 0 to 8; found '9' for "),
        (["image_id,patch", "ID,-1"], "patches are numbered 0 to 8"),
    ],
)
def test_a_table_of_patches_that_does_not_fit(planted: Path, tmp_path: Path, lines: list[str], words: str) -> None:
    first = ActivationStore(planted / "acts.zarr").images["image_id"][0].as_py()
    (tmp_path / "p.csv").write_text("\n".join(lines).replace("ID", first) + "\n")
    with pytest.raises(BadInput, match=words):
        run(planted, tmp_path / "out", latents=(PLANTED,), patches=tmp_path / "p.csv", **QUICK)


def test_other_latents_are_refused(planted: Path, made: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecMismatch, match=r"was not made from the SAE .*leave out --latents"):
        run(planted, tmp_path / "out", latents=(PLANTED,), stored=made / "latents.zarr", **QUICK)


# ----------------------------------------------------------------------------------------------------------- the probe


def write_probe(root: Path, cache: Path, run_folder: Path, latents: list[int], **changes: Any) -> ProbeModel:
    """A finished probe of images whose model reads these latents of this SAE."""
    rng = np.random.default_rng(5)
    fit = ColumnFit(
        np.arange(3), rng.normal(0, 0.3, (len(latents), 3)), rng.normal(0, 1, 3), 3, n_steps=0, converged=True
    )
    shares, sae = np.full(3, 1 / 3), load_sae(run_folder, device="cpu")
    card: dict[str, Any] = {
        **dict.fromkeys(("n_groups", "n_images", "n_images_without_hash"), 9),
        **dict.fromkeys(("threshold", "C", "c_factor"), 1.0),
        **{"version": 1, "level": "image", "target": "label", "classes": ["a", "b", "c"], "n_of_class": [3, 3, 3]},
        **{"regularization": "fixed", "converged": True, "n_latents": N_LATENTS, "n_latents_kept": len(latents)},
        **{"tau": 0.1, "token_set": "patch", "normalize": "images", "sae_sha256": sae.sha256, "trained": False},
        "tokens": {name: plain(ActivationStore(cache).spec.to_dict().get(name)) for name in SAME_TOKENS},
        **{"encoder": {}, "barcodes": "0" * 64, "kept_out": None, "group_by": None, "min_images": 1},
        **changes,
    }
    tensors = saved_model._tensors(np.array(latents), fit, shares, None)
    model = ProbeModel(
        Card(**card, weights_sha256=hashlib.sha256(tensors).hexdigest()), np.array(latents), fit, shares, None
    )
    writer = begin_results(root, PROBE, {"barcodes": "0" * 64, "level": "image", "target": "label", "tau": 0.1})
    write_model(writer, model, [])
    writer.finish({})
    return model


@pytest.mark.stress
@pytest.mark.parametrize("mode", ["zero", "mean", "scale:3"])
def test_what_a_probe_says_equals_counting_again(planted: Path, tmp_path: Path, mode: str) -> None:
    """Barcodes of the changed latents by their definition, times the weights; a latent without weight says nothing."""
    kept = [2, 5, PLANTED, 60, 61, 90]
    model = write_probe(tmp_path / "probe", planted / "acts.zarr", planted / "run", kept)
    settings = {**QUICK, "mode": mode, "curve": (2,), "curve_images": 4, "latents": (PLANTED, 3)}
    done = run(planted, tmp_path / "out", probe=tmp_path / "probe", **settings)
    store = ActivationStore(planted / "acts.zarr")
    z = dense_latents(planted / "run", np.nan_to_num(store.read_images(np.arange(40))))
    mean = z[store.readable()].mean((0, 1))
    ids = store.images["image_id"].to_pylist()

    def said(latents: Float) -> tuple[Float, Float]:
        counts = [sum(1 for t in range(1, PER_IMAGE) if latents[t, n] > 0.1) for n in kept]
        logits = np.array(counts) @ model.fit.weights + model.fit.intercept
        return logits, np.exp(logits) / np.exp(logits).sum()

    rows = pq.read_table(tmp_path / "out" / "images.parquet").to_pylist()
    for row in rows:
        before = z[ids.index(row["image_id"])]
        after = before.copy()
        found = np.array([[row[f"{kind}:{name}"] for name in "abc"] for kind in ("logit", "probability")])
        if row["edit"] == "direction":
            assert set(found.ravel().tolist()) == {None}
            continue
        if row["edit"] in ("chosen", "control"):
            for t in range(PER_IMAGE):
                after[t, row["latent"]] = new_value(mode, before[t, row["latent"]], mean[row["latent"]])
        elif row["order"] == "all":
            after[:] = 0
        else:
            continue
        expected = [new - old for new, old in zip(said(after), said(before), strict=True)]
        np.testing.assert_allclose(found.astype(float), expected, atol=1e-9)
    assert any(row["logit:a"] for row in rows if row["latent"] == PLANTED and row["edit"] == "chosen")
    assert not any(row["logit:a"] for row in rows if row["latent"] == 3 and row["edit"] == "chosen")
    (effect,) = rows_of(done.effects, latent=3, quantity="logit:b")
    assert (effect["effect"], effect["p"], effect["p_directions"]) == (0, 1, None)
    assert "the probe: probability of" in str(done)


def test_a_probe_of_something_else_is_refused(planted: Path, tmp_path: Path) -> None:
    other: dict[str, dict[str, Any]] = {"sae": {"sae_sha256": "0" * 64}, "tokens": {"tokens": {"backbone": "x"}}}
    for name, change in other.items():
        write_probe(tmp_path / name, planted / "acts.zarr", planted / "run", [2], **change)
    with pytest.raises(SpecMismatch, match="reads latents of another SAE"):
        run(planted, tmp_path / "out", latents=(PLANTED,), probe=tmp_path / "sae", **QUICK)
    with pytest.raises(SpecMismatch, match="reads tokens of another kind"):
        run(planted, tmp_path / "out", latents=(PLANTED,), probe=tmp_path / "tokens", **QUICK)


def test_a_probe_of_the_final_cls_is_fitted_without_the_patient(planted: Path) -> None:
    """Against scikit-learn, image by image: the fit that reads an image saw none of its patient."""
    store = ActivationStore(planted / "acts.zarr")
    owners = owners_of(store.images)
    kinds: list[str | None] = ["odd" if n % 3 else "even" for n in range(40)]
    kinds[7] = None
    table = store.images.append_column("kind", pa.array(kinds, pa.string()))
    labels = read_labels(table, "kind", owners)
    images = np.flatnonzero(store.readable() & (labels.of_image >= 0))
    final_cls = planted_rest(planted / "run", 2.0).final_cls
    embedded = final_cls(torch.from_numpy(store.read_images(images)).float()).double().numpy()
    probe = fit_probe(embedded, images, labels, owners, seed=0)
    x = (embedded - embedded.mean(0)) / embedded.std(0)
    folds = probe.fold_of[owners.of_image[images]]
    for n, image in enumerate(images.tolist()):
        training = folds != folds[n]
        assert owners.of_image[image] not in owners.of_image[images[training]]
        twin = LogisticRegression(C=1.0, tol=1e-10, max_iter=1000, solver="newton-cholesky")
        twin.fit(x[training], labels.of_image[images[training]])
        logits = probe.logits(int(owners.of_image[image]), embedded[[n]])[0]
        assert logits[1] - logits[0] == pytest.approx(float(twin.decision_function(x[[n]])[0]), rel=1e-2, abs=1e-2)
    with pytest.raises(BadInput, match="has no column 'nothing'"):
        read_labels(table, "nothing", owners)
    with pytest.raises(BadInput, match="needs two classes with images of two patients each"):
        read_labels(table, "image_id", owners)


def test_classes_are_read_off_the_edited_cls(planted: Path, tmp_path: Path) -> None:
    """`cls_logit` is the change of the fit's logits between the two embeddings, of an edit by hand."""
    seen: list[Any] = []
    edit = measuring.edit_image

    def look(image: int, tokens: Any, subject: Any, plan: Any, bench: Any, ranked: Any) -> Any:
        found = edit(image, tokens, subject, plan, bench, ranked)
        seen.append((image, np.array(tokens, np.float32), plan, bench, found))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "edit_image", look)
        patch.setattr(ablating, "read_labels", lambda images, target, owners: Labels(np.arange(40) % 2, ["a", "b"]))
        said: list[str] = []
        settings = {**QUICK, "target": "any", "say": said.append}
        done = run(planted, tmp_path / "out", strength=2.0, latents=(PLANTED,), **settings)
    assert "and 39 images for the probe of 'any' run through the later blocks, about 1 s" in said[0]
    decoder = load_sae(planted / "run", device="cpu").model.W_dec
    assert done.probe_accuracy is not None
    n_seen = 0
    for image, tokens, plan, bench, found in seen:
        z = dense_latents(planted / "run", tokens[None])[0, :, PLANTED]
        for row, at in enumerate(range(plan.of(image).start, plan.of(image).stop)):
            if plan.role[at] != 0:
                continue
            x = torch.from_numpy(tokens)
            both = torch.stack([x, x - torch.outer(torch.from_numpy(z).float(), decoder[PLANTED])])
            embedded = bench.final_cls(both).double().numpy()
            logits = bench.cls_probe.logits(int(bench.owner_of[image]), embedded)
            shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
            expected = np.concatenate([logits[1] - logits[0], shares[1] - shares[0]])
            np.testing.assert_allclose(found[row, -4:], expected, atol=1e-4)
            n_seen += 1
    assert n_seen == 5
    assert {row["quantity"] for row in done.effects.to_pylist()} >= {"cls_logit:a", "cls_probability:b"}
    assert "the probe of the final CLS: probability of" in str(done)


# ------------------------------------------------------------------------------------------- a real backbone, commands


def cyto(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["concept", "ablate", *map(str, arguments)])


@pytest.fixture(scope="module")
def frequent(made: Path) -> int:
    """A latent of `made` that is active in most images."""
    latents = LatentStore(made / "latents.zarr")
    rows = latents.read_images(0, latents.spec.n_images)
    return int(np.bincount(rows.indices, rows.values).argmax())


@pytest.mark.stress
def test_the_command_with_a_real_backbone(made: Path, tmp_path: Path, frequent: int) -> None:
    """From cached tokens, from images, and by hand through the model's own later blocks."""
    few = ["--latent", frequent, "--controls", 2, "--directions", 1, "--curve-images", 0, "--n-images", 3]
    inputs = [made / "run", made / "acts.zarr", "--latents", made / "latents.zarr"]
    cached = cyto(*inputs, *few, "-o", tmp_path / "cached", "--json")
    assert cached.exit_code == 0, cached.output
    said = json.loads(cached.stdout)
    assert said["n_images_surveyed"] == 9
    assert "images are read from the latents, about" in cached.stderr
    assert "run through the later blocks, about" in cached.stderr
    from_images = cyto(*inputs, *few, "-o", tmp_path / "images", "--images", made, "--workers", 1)
    assert from_images.exit_code == 0, from_images.output
    tables = [pq.read_table(tmp_path / name / "images.parquet").to_pylist() for name in ("cached", "images")]
    for one, other in zip(*tables, strict=True):
        assert one["image_id"] == other["image_id"]
        assert one["cls_norm"] == pytest.approx(other["cls_norm"], rel=0.05, abs=1e-5)

    final_cls, none = bridge.backbone_rest(made / "acts.zarr", device="cpu")
    assert none is None
    store, model = ActivationStore(made / "acts.zarr"), load_sae(made / "run", device="cpu").model
    ids = store.images["image_id"].to_pylist()
    for row in tables[0]:
        if row["edit"] != "chosen":
            continue
        x = torch.from_numpy(store.read_images([ids.index(row["image_id"])])[0]).float()
        with torch.inference_mode():
            z = model.encode(x)
            error = x - model.decode(z)
            z[:, frequent] = 0
            embedded = final_cls(torch.stack([x, model.decode(z) + error])).double()
        assert row["cls_norm"] == pytest.approx(float((embedded[1] - embedded[0]).norm()), rel=2e-2, abs=1e-5)
        assert row["cls_norm"] > 1e-4
        with torch.inference_mode():
            assert cls_moves(embed_edits(x, torch.zeros(3, *x.shape), final_cls)).max() < 1e-5
    again = cyto(*inputs, *few, "-o", tmp_path / "cached")
    assert "already complete" in again.stderr
    other = cyto(*inputs, *few, "-o", tmp_path / "cached", "--mode", "mean")
    assert other.exit_code == 1
    assert other.stderr.count("\n") == 1


def test_rounding_is_not_reported_as_an_effect() -> None:
    """4.6e-08 of the norm is float32; its p of 0.02 would say that a latent matters which changes nothing."""
    moves = {"latent": [7, 8], "quantity": ["cls_change"] * 2, "effect": [4.6e-8, 0.02]}
    matches = [{"latent": n, "n_controls": 40, "frequency_ratio": 1.0, "norm_ratio": 1.0} for n in (7, 8)]
    done = AblateResult(
        out=Path("causes"),
        mode="zero",
        token_set="all",
        n_images_surveyed=9,
        n_images_edited=3,
        n_edits=9,
        n_without_patient=0,
        effects=pa.table(moves),
        curves=None,
        matches=matches,
        assumed_equal=[],
        was_complete=False,
    )
    rounding, few = done.warnings
    assert rounding.startswith("latent 7: the final CLS moves by no more than rounding (1e-06 of its norm)")
    assert few == "2 latents held against fewer than 100 others: p cannot be below 0.024"


@pytest.mark.stress
def test_the_cache_is_encoded_where_no_latents_are_given(made: Path, tmp_path: Path, frequent: int) -> None:
    """The same effects up to the rounding of stored values, also of a sample."""
    few = ["--latent", frequent, "--controls", 2, "--directions", 0, "--curve", "2", "--curve-images", 2]
    inputs = [made / "run", made / "acts.zarr"]
    for name, more in (("encoded", []), ("stored", ["--latents", made / "latents.zarr"])):
        assert cyto(*inputs, *few, *more, "-o", tmp_path / name).exit_code == 0
    tables = [pq.read_table(tmp_path / name / "effects.parquet").to_pylist() for name in ("encoded", "stored")]
    for one, other in zip(*tables, strict=True):
        assert one["n_images_active"] == other["n_images_active"]
        assert one["effect"] == pytest.approx(other["effect"], rel=2e-2, abs=1e-5)
    sampled = cyto(*inputs, *few, "--sample", 4, "-o", tmp_path / "sampled", "--json")
    assert json.loads(sampled.stdout)["n_images_surveyed"] == 4
