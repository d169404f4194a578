"""The scorecard from stores: what is planted stands out from its null, a random SAE does not; refusals; repeats."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_line import fails, run
from decoders import directions, write_sae
from latent_stores import write_latents
from token_caches import write_cache

from cytosae import ScoreConfig, plan_score, score_sae
from cytosae.relations import write_stability
from cytosae.score import ScoreResult
from stores import SCORECARD, STABILITY, ActivationStore, LatentStore, ResultStore, verify_folder
from stores.errors import BadInput, SpecMismatch
from stores.files import sha256_file

N, SIDE, N_LATENTS, WIDTH = 120, 4, 24, 8
CONFIG = ScoreConfig(ks=(1, 2, 5), folds=4, shuffles=4)
LABELS = ["neutrophil", "lymphocyte", "monocyte", "blast"]
COMMON = {"neutrophil": "myeloid", "monocyte": "myeloid", "lymphocyte": "lymphoid", "blast": "lymphoid"}


class World:
    """120 images of 12 patients: an SAE with a latent for each label in one quarter of the cell, and one of noise."""

    def __init__(self, root: Path) -> None:
        rng = np.random.default_rng(0)
        self.root = root
        self.labels = [LABELS[n % 4] for n in range(N)]
        self.patients = [f"P{n // 10:02d}" for n in range(N)]
        tokens = 0.5 * rng.normal(size=(N, SIDE**2 + 1, WIDTH))
        for n, label in enumerate(self.labels):
            tokens[n, :, LABELS.index(label)] += 2
        self.cache = write_cache(root / "acts", tokens.astype(np.float16))
        noise = np.where(rng.random((N, SIDE**2 + 1, N_LATENTS)) < 0.2, rng.random((N, SIDE**2 + 1, N_LATENTS)), 0)
        noise[3] = 0
        planted = noise.copy()
        planted[:, :, :4] = 0
        corner = [1 + SIDE * row + column for row in range(2) for column in range(2)]
        for n, label in enumerate(self.labels):
            if n != 3:
                planted[n, corner, LABELS.index(label)] = 1 + rng.random(4)
        self.sae, self.random = (
            write_sae(root / f"{name}.sae", directions(N_LATENTS, WIDTH, seed), seed=seed)
            for seed, name in enumerate(("planted", "random"))
        )
        self.latents = self.write("planted", planted, self.sae)
        self.noise = self.write("noise", noise, self.random)

    def write(self, name: str, dense: npt.NDArray[np.floating], sae: Path) -> Path:
        """A latent store by an SAE; image 3 is unreadable."""
        return write_latents(
            self.root / f"{name}.latents",
            dense.astype(np.float32),
            [(patient, "AML", n != 3) for n, patient in enumerate(self.patients)],
            sae_sha256=sha256_file(sae / "sae.safetensors"),
            cache_sha256=ActivationStore(self.cache).content_sha256,
            hashes=[f"{n:064x}" for n in range(N)],
            further={
                "label": list(self.labels),
                "label_common": [COMMON[label] for label in self.labels],
                "image_id": [f"cell {n}" for n in range(N)],
            },
            width=WIDTH,
        )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def scored(world: World) -> ScoreResult:
    """The random SAE first: it is a baseline of the planted one."""
    score_sae(world.random, world.root / "random", CONFIG, latents=[world.noise], caches=[world.cache])
    return score_sae(
        world.sae,
        world.root / "planted",
        CONFIG,
        latents=[world.latents],
        caches=[world.cache],
        baselines=[world.root / "random"],
    )


def of_all(rows: list[dict[str, Any]], measure: str, k: int | None = None) -> dict[str, Any]:
    """The row over all labels."""
    (row,) = [each for each in rows if (each["measure"], each["label"], each["k"]) == (measure, None, k)]
    return row


def test_the_planted_latents_score_and_those_of_noise_do_not(world: World, scored: ScoreResult) -> None:
    noise = ResultStore(world.root / "random", SCORECARD).json("scorecard")["rows"]
    for measure, k, least in [
        ("sparse_probe_auroc", 1, 0.99),
        ("best_average_precision", None, 0.99),
        ("best_one_latent_probe", None, 0.8),
    ]:
        row, by_noise = of_all(scored.rows, measure, k), of_all(noise, measure, k)
        assert row["value"] > least
        assert row["value"] > row["null_high"] + 0.2
        assert by_noise["value"] < by_noise["null_high"] + 0.1
        assert row["baseline_random"] == by_noise["value"]
    assert of_all(scored.rows, "share_of_dense", 1)["value"] == pytest.approx(1, abs=0.02)
    assert of_all(scored.rows, "dense_probe_auroc")["value"] > 0.99
    latents = ResultStore(world.root / "planted", SCORECARD).table("latents")
    looks, coherent = (latents[name].to_numpy(zero_copy_only=False) for name in ("monosemanticity", "morans_i"))
    assert looks[:4].min() > 0.9
    assert looks[4:].max() < 0.2
    assert coherent[:4].min() > 0.3
    assert coherent[4:].max() < 0.25
    assert of_all(noise, "monosemantic_latents")["value"] < 0.5
    for measure in ("morans_i", "monosemanticity"):
        assert of_all(noise, measure)["value"] == pytest.approx(of_all(noise, measure)["null"], abs=0.05)
    assert of_all(scored.rows, "splitting")["value"] > 0.99
    assert of_all(noise, "splitting")["value"] < of_all(noise, "splitting")["null_high"] + 0.1


def test_the_unreadable_image_has_no_part_and_labels_are_all_there(world: World, scored: ScoreResult) -> None:
    assert (scored.n_images, scored.n_patients, scored.classes) == (N - 1, 12, tuple(sorted(LABELS)))
    labels = ResultStore(world.root / "planted", SCORECARD).table("labels").to_pylist()
    assert len(labels) == N_LATENTS * 4
    best = max((row for row in labels if row["label"] == "blast"), key=lambda row: row["average_precision"])
    assert best["latent"] == LABELS.index("blast")
    assert not verify_folder(world.root / "planted").problems


def test_values_lie_in_their_intervals(world: World, scored: ScoreResult) -> None:
    """All that is measured on images has one, over the 12 patients; it is as wide as its few patients make it."""
    assert scored.unit == "patient"
    of_others = {"final_cls", "matched_over_seeds", "cosine_over_seeds"}
    rows = [row for row in scored.rows if row["measure"] not in of_others]
    assert all(row["low"] <= row["value"] <= row["high"] for row in rows)
    probe = of_all(scored.rows, "sparse_probe_auroc", 1)
    assert 0.6 < probe["low"] < 0.95
    noise = ResultStore(world.root / "random", SCORECARD).json("scorecard")["rows"]
    row = of_all(noise, "sparse_probe_auroc", 5)
    assert row["low"] < 0.5 < row["high"]
    table = ResultStore(world.root / "planted", SCORECARD).table("scorecard")
    assert table["low"].to_pylist() == [row["low"] for row in scored.rows]
    assert f"{probe['low']:.3f} to {probe['high']:.3f}" in "\n".join(scored.lines())


class _StoppedError(Exception):
    pass


@pytest.mark.stress
def test_an_interrupted_scorecard_goes_on(world: World, scored: ScoreResult, tmp_path: Path) -> None:
    """Stopped after every twelve parts: what is kept is not computed again, and the result is the same."""
    parts = tmp_path / "out" / "parts"
    kept: dict[str, int] = {}
    stores: dict[str, Any] = {
        "latents": [world.latents],
        "caches": [world.cache],
        "baselines": [world.root / "random"],
    }
    n_stops = 0
    for most in range(12, 1000, 12):

        def stop(done: int, total: int, state: str, most: int = most) -> None:
            if len([*parts.glob("*.part")]) >= most:
                raise _StoppedError

        try:
            done = score_sae(world.sae, tmp_path / "out", CONFIG, **stores, progress=stop)
            break
        except _StoppedError:
            n_stops += 1
            written = {path.name: path.stat().st_mtime_ns for path in parts.glob("*.part")}
            assert {name: written[name] for name in kept} == kept
            kept = written
    assert n_stops >= 2
    assert done.rows == scored.rows
    assert not done.was_complete
    assert not parts.exists()
    for name in ("latents.parquet", "labels.parquet"):
        assert pq.read_table(tmp_path / "out" / name).equals(pq.read_table(world.root / "planted" / name))


@pytest.mark.stress
def test_another_encoder_and_another_seed(world: World, tmp_path: Path) -> None:
    """An embedding from a table is taken in place of the tokens; a stability folder adds its rows."""
    rng = np.random.default_rng(0)
    embedding = rng.normal(size=(N, 3)).astype(np.float32)
    order = rng.permutation(N)
    table = {"image_id": [f"cell {n}" for n in order]} | {f"x{i}": embedding[order, i] for i in range(3)}
    pq.write_table(pa.table(table), tmp_path / "other.parquet")
    write_stability([world.sae, world.random], tmp_path / "stability")
    done = score_sae(
        world.sae,
        tmp_path / "out",
        CONFIG,
        latents=[world.latents],
        embedding=tmp_path / "other.parquet",
        stability=tmp_path / "stability",
    )
    assert abs(of_all(done.rows, "monosemanticity")["value"]) < 0.1  # the planted latents, too: it is noise
    pair = ResultStore(tmp_path / "stability", STABILITY).table("pairs").to_pylist()[0]
    assert of_all(done.rows, "cosine_over_seeds")["value"] == pair["mean_cosine"]
    assert of_all(done.rows, "matched_over_seeds")["value"] == pair["share_above_null_p99"]
    assert any("--cache" in note for note in done.said)
    assert any("--keep" in note for note in done.said)
    pq.write_table(pa.table(table).slice(0, N - 2), tmp_path / "short.parquet")
    with pytest.raises(BadInput, match=r"lacks [12] of 119 images"):
        score_sae(world.sae, tmp_path / "no", CONFIG, latents=[world.latents], embedding=tmp_path / "short.parquet")


def test_a_sample_is_drawn_by_its_seed(world: World, tmp_path: Path) -> None:
    config = ScoreConfig(ks=(1,), folds=3, shuffles=1, max_images=60)
    plan = plan_score(world.sae, [world.latents], config)
    assert (plan.n_images, plan.n_candidates) == (60, N - 1)
    steps: list[int] = []
    first = score_sae(
        world.sae,
        tmp_path / "a",
        config,
        latents=[world.latents],
        progress=lambda done, total, state: steps.append(done) if done <= total else steps.append(-1),
    )
    assert steps == sorted(steps)  # passes follow one another, and none begins anew
    assert first.n_images == 60
    assert score_sae(world.sae, tmp_path / "a", config, latents=[world.latents]).was_complete
    assert score_sae(world.sae, tmp_path / "b", config, latents=[world.latents]).rows == first.rows


def test_more_latents_than_there_are_is_said(world: World, tmp_path: Path) -> None:
    n = LatentStore(world.latents).spec.n_latents
    config = ScoreConfig(ks=(1, n, n + 1), folds=3, shuffles=1, max_images=60)
    done = score_sae(world.sae, tmp_path / "out", config, latents=[world.latents])
    assert f"k {n + 1}: the SAE has {n:,} latents, so these rows are of all of them" in done.warnings
    all_of_them, more = (of_all(done.rows, "sparse_probe_auroc", k) for k in (n, n + 1))
    assert {**all_of_them, "k": None} == {**more, "k": None}


def test_what_does_not_belong_is_refused(world: World, scored: ScoreResult, tmp_path: Path) -> None:
    with pytest.raises(SpecMismatch, match="are of another SAE"):
        score_sae(world.random, tmp_path / "out", CONFIG, latents=[world.latents])
    with pytest.raises(BadInput, match="give each image once"):
        score_sae(world.sae, tmp_path / "out", CONFIG, latents=[world.latents, world.latents])
    changed = ScoreConfig(ks=(1, 2, 5), folds=3, shuffles=4)
    with pytest.raises(SpecMismatch, match="scored with other folds"):
        score_sae(world.sae, tmp_path / "out", changed, latents=[world.latents], baselines=[world.root / "random"])
    twice = [world.root / "random"] * 2
    with pytest.raises(BadInput, match="each needs a folder of another name"):
        score_sae(world.sae, tmp_path / "out", CONFIG, latents=[world.latents], baselines=twice)
    with pytest.raises(BadInput, match="differ and rise"):
        ScoreConfig(ks=(2, 1))
    for option, config in {"label": ScoreConfig(label="lable"), "parent": ScoreConfig(parent="lable")}.items():
        with pytest.raises(BadInput, match=rf"has the column 'lable' of --{option}; there are .*label, label_common"):
            # a typing error was scored as a table without labels
            score_sae(world.sae, tmp_path / "out", config, latents=[world.latents])
    assert not (tmp_path / "out").exists()


def test_the_command(world: World, tmp_path: Path) -> None:
    out = tmp_path / "score"
    settings = ["-k", 1, "--folds", 3, "--shuffles", 1, "-o", out]
    done = run("sae", "score", world.sae, "--latents", world.latents, "--cache", world.cache, *settings)
    assert "119 of 119 images" in done.stderr
    assert "there is no overall rank" in done.stdout
    again = run("sae", "score", world.sae, "--latents", world.latents, "--cache", world.cache, *settings, "--json")
    assert {row["measure"] for row in json.loads(again.stdout)["rows"]} >= {"sparse_probe_auroc", "morans_i"}
    fails("cyto sae encode", "sae", "score", world.random, "--latents", world.latents, "-o", tmp_path / "no")
