"""SAE minus baseline: a planted dictionary beats every one, an untrained SAE none; figures equal their slow twins."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
from planted import WIDTH, planted_cache, planted_config, planted_sae
from token_caches import write_cache

from cytosae.baselines import KINDS, BaselineConfig, VersusConfig, VersusResult, compare_with_baselines, write_baseline
from cytosae.baselines import versus as module
from cytosae.baselines.figures_of_draws import METRICS, figures_of_draws
from cytosae.baselines.measure import ImageSums, measure_images
from cytosae.training.evaluate import evaluate
from cytosae.training.train import train
from stores import read_image_ids
from stores.errors import BadInput
from stores.verify_any import verify_folder

Floats = npt.NDArray[np.float64]
pytestmark = pytest.mark.usefixtures("one_thread")
SEEDS = {"random": (0, 1, 2), "tokens": (0, 1)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A cache, the planted SAE, and every baseline of it, some with several seeds."""
    root = tmp_path_factory.mktemp("versus")
    found = {"cache": planted_cache(root / "acts.zarr")}
    found["sae"] = planted_sae(root / "sae", found["cache"])
    for kind in KINDS:
        for seed in SEEDS.get(kind, (0,)):
            config = BaselineConfig(kind=kind, seed=seed)
            found[f"{kind} {seed}"] = write_baseline(
                [found["cache"]], root / f"{kind}-{seed}", config, like=found["sae"]
            ).out
    return found


def baselines_of(runs: dict[str, Path]) -> list[Path]:
    return [place for name, place in runs.items() if name not in ("cache", "sae")]


def test_a_planted_dictionary_beats_every_baseline(runs: dict[str, Path], tmp_path: Path) -> None:
    found = compare_with_baselines(runs["sae"], runs["cache"], baselines_of(runs), tmp_path / "v")
    for metric in ("explained_variance", "label_purity_above_chance"):
        assert found.beaten(metric) == dict.fromkeys(KINDS, True), metric
    text = str(found)
    assert f"SAE minus baseline, 95% interval over {found.summary['n_groups']} patients" in text
    assert "above 0 for 9 of 9 baselines" in text
    assert {row["n_baselines"] for row in found.differences if row["baseline"] == "random"} == {3}
    for row in found.differences:  # a draw has fewer distinct images, which moves purity: not the interval
        assert row["low"] is None or row["low"] <= row["difference"] <= row["high"], row
    assert verify_folder(tmp_path / "v").is_whole


@pytest.mark.stress
def test_an_untrained_sae_beats_none(runs: dict[str, Path], tmp_path: Path) -> None:
    """Three of them, each against the others and all baselines."""
    for seed in SEEDS["random"]:
        sae = runs[f"random {seed}"]
        others = [place for place in baselines_of(runs) if place != sae]
        found = compare_with_baselines(sae, runs["cache"], others, tmp_path / f"v{seed}")
        for metric in ("explained_variance", "label_purity_above_chance"):
            assert found.beaten(metric) == dict.fromkeys(KINDS, False), (seed, metric)
        assert any("is itself a baseline (random)" in warning for warning in found.warnings)


def test_figures_are_those_of_eval(runs: dict[str, Path], tmp_path: Path) -> None:
    found = compare_with_baselines(runs["sae"], runs["cache"], [runs["kmeans 0"]], tmp_path / "v")
    held_out = read_image_ids(runs["sae"] / "held_out.parquet")
    for row, name in zip(found.saes, ("sae", "kmeans 0"), strict=True):
        twin = evaluate(runs["cache"], runs[name], only=held_out)
        assert row["explained_variance"] == pytest.approx(twin.explained_variance, abs=1e-9)
        assert row["l0"] == pytest.approx(twin.l0, abs=1e-12)
        assert row["dead_share"] == pytest.approx(twin.dead_fraction_whole, abs=1e-12)
    assert found.summary["n_images"] == len(held_out)


def slow_figures(z: Floats, x: Floats, made: Floats, weight: Floats, labels: Any, counted: Any) -> dict[str, float]:
    """All of a draw by repeating its images. z (n, T, L), x and made (n, T, D)."""
    images = np.repeat(np.arange(len(z)), weight.astype(int))
    tokens = x[images].reshape(-1, x.shape[2])
    variance = ((tokens - tokens.mean(0)) ** 2).sum()
    totals, of = z[images].sum(1), labels[images]
    purities = []
    for latent in np.flatnonzero(counted):
        means = np.array([totals[of == label, latent].mean() for label in np.unique(of[of >= 0])])
        if means.sum() > 0:
            purities.append(means.max() / means.sum())
    return {
        "explained_variance": 1 - ((made - x)[images] ** 2).sum() / variance,
        "l0": (z[images] > 0).sum(2).mean(),
        "dead_share": (~(z[images] > 0).any((0, 1))).mean(),
        "label_purity": float(np.mean(purities)),
    }


def test_draws_are_those_of_repeated_images() -> None:
    rng = np.random.default_rng(0)
    n, n_tokens, width, n_latents = 30, 4, 3, 20
    x = rng.normal(5, 1, (n, n_tokens, width))
    made = x + rng.normal(0, 0.5, x.shape)
    z = np.maximum(0, rng.normal(-1, 1, (n, n_tokens, n_latents)))
    z[:, :, 0], z[3:, :, 1] = 0, 0
    labels = rng.integers(-1, 3, n)
    totals = z.sum(1)
    rows = [np.flatnonzero(total) for total in totals]
    sums = ImageSums(
        n_latents=n_latents,
        tokens=np.full(n, float(n_tokens)),
        error=((made - x) ** 2).sum((1, 2)),
        square=((x - x[0, 0]) ** 2).sum((1, 2)),
        shifted=(x - x[0, 0]).sum(1),
        active=(z > 0).sum((1, 2)).astype(float),
        begins=np.concatenate([[0], np.cumsum([len(row) for row in rows])]),
        latents=np.concatenate(rows).astype(np.int32),
        values=np.concatenate([total[row] for total, row in zip(totals, rows, strict=True)]).astype(np.float32),
    )
    weights = np.vstack([np.ones(n), rng.multinomial(n, np.full(n, 1 / n), 40)]).astype(float)
    shuffled = np.stack([rng.permutation(labels) for _ in range(5)])
    found = figures_of_draws(sums, weights, labels, shuffled, least_images=4)
    counted = ((z[labels >= 0] > 0).any(1)).sum(0) >= 4
    assert 0 < counted.sum() < n_latents
    for draw, weight in enumerate(weights):
        twin = slow_figures(z, x, made, weight, labels, counted)
        for name, value in twin.items():
            assert found[name][draw] == pytest.approx(value, rel=1e-6), (draw, name)
        by_chance = slow_figures(z, x, made, weight, shuffled[draw % 5], counted)["label_purity"]
        if draw:
            assert found["label_purity_by_chance"][draw] == pytest.approx(by_chance, rel=1e-6)
    alone = [slow_figures(z, x, made, weights[0], each, counted)["label_purity"] for each in shuffled]
    assert found["label_purity_by_chance"][0] == pytest.approx(np.mean(alone), rel=1e-6)


def test_an_interrupted_comparison_continues(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = [runs["pca 0"], runs["ica 0"]]
    n_measured = 0

    def stop_at_the_third(*args: Any, **settings: Any) -> ImageSums:
        nonlocal n_measured
        n_measured += 1
        if n_measured == 3:
            raise KeyboardInterrupt
        return measure_images(*args, **settings)

    monkeypatch.setattr(module, "measure_images", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        compare_with_baselines(runs["sae"], runs["cache"], others, tmp_path / "v")
    done = compare_with_baselines(runs["sae"], runs["cache"], others, tmp_path / "v")
    assert n_measured == 4
    assert not done.was_complete
    whole = compare_with_baselines(runs["sae"], runs["cache"], others, tmp_path / "w")
    for name in ("differences", "saes", "draws_000", "draws_002"):
        assert pq.read_table(tmp_path / "v" / f"{name}.parquet").equals(
            pq.read_table(tmp_path / "w" / f"{name}.parquet")
        )
    assert compare_with_baselines(runs["sae"], runs["cache"], others, tmp_path / "v").was_complete
    assert str(whole.lines)
    assert replace(whole, out=done.out).differences == done.differences


def test_images_of_an_untrained_backbone_are_the_same_images(runs: dict[str, Path], tmp_path: Path) -> None:
    """Its tokens say nothing of the image here, so its latents keep to no label; explained variance may be anything."""
    import stores

    images = stores.ActivationStore(runs["cache"]).images
    tokens = np.random.default_rng(0).normal(0, 1, (images.num_rows, 8, WIDTH)).astype(np.float16)
    labels, patients = images["label"].to_pylist(), images["patient"].to_pylist()
    blank = write_cache(tmp_path / "u.zarr", tokens, labels=labels, patients=patients, chunk_images=7)
    sae = train([blank], tmp_path / "u.sae", planted_config(tokens=128 * 20)).out
    # by name the same images were held out, since seed and names are the same; by hash of the tokens they are others
    found = compare_with_baselines(runs["sae"], runs["cache"], [], tmp_path / "v", untrained=[(sae, blank)])
    assert found.beaten("label_purity_above_chance") == {"untrained backbone": True}
    with pytest.raises(BadInput, match="nothing to compare with: give --baseline RUN"):
        compare_with_baselines(runs["sae"], runs["cache"], [], tmp_path / "w")


def test_without_held_out_images(runs: dict[str, Path], tmp_path: Path) -> None:
    everything = train([runs["cache"]], tmp_path / "all.sae", planted_config(holdout=0.0, tokens=128 * 5)).out
    with pytest.raises(BadInput, match=r"at least two images are needed known to be held out .* \(--all-images\)"):
        compare_with_baselines(everything, runs["cache"], [runs["pca 0"]], tmp_path / "v")
    config = VersusConfig(all_images=True, most_images=50)
    found = compare_with_baselines(everything, runs["cache"], [runs["pca 0"]], tmp_path / "v", config)
    assert (found.summary["n_images"], found.summary["n_images_in_all"]) == (50, 240)
    assert any("also those that the SAE or a baseline was trained on" in each for each in found.warnings)
    with pytest.raises(BadInput, match="are the same SAE; give each once"):
        compare_with_baselines(runs["sae"], runs["cache"], [runs["sae"]], tmp_path / "w")


def test_results_name_every_metric(runs: dict[str, Path], tmp_path: Path) -> None:
    found: VersusResult = compare_with_baselines(runs["sae"], runs["cache"], [runs["nmf 0"]], tmp_path / "v")
    assert {row["metric"] for row in found.differences} == set(METRICS)
    (dead,) = (row for row in found.differences if row["metric"] == "dead_share")
    assert dead["is_better"] is None
    assert dead["low"] <= dead["difference"] <= dead["high"]
