"""SAE minus baseline: a planted dictionary beats every one, an untrained SAE none; figures equal their slow twins.

On the planted tokens untrained directions truly keep to one label more than principal components do, so that they beat
none is a matter of what counts (a lead that `random` has as well does not), not of a wide interval.
"""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
from planted import WIDTH, planted_cache, planted_config, planted_sae
from token_caches import write_cache

from cytosae.baselines import KINDS, BaselineConfig, VersusConfig, VersusResult, compare_with_baselines, write_baseline
from cytosae.baselines import versus as module
from cytosae.baselines.figures_of_draws import METRICS, PURITIES, figures_of_draws
from cytosae.baselines.measure import ImageSums, measure_images
from cytosae.baselines.report import doubts_of
from cytosae.training.evaluate import evaluate
from cytosae.training.train import train
from stores import read_image_ids
from stores.errors import BadInput
from stores.verify_any import verify_folder

Floats = npt.NDArray[np.float64]
pytestmark = pytest.mark.usefixtures("one_thread")
SEEDS = {"random": (0, 1, 2), "tokens": (0, 1)}
JUDGED = ("explained_variance", "label_purity_above_chance")


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


def row_of(found: VersusResult, baseline: str, metric: str) -> dict[str, Any]:
    (row,) = (row for row in found.differences if (row["baseline"], row["metric"]) == (baseline, metric))
    return row


def test_a_planted_dictionary_beats_every_baseline(runs: dict[str, Path], tmp_path: Path) -> None:
    found = compare_with_baselines(runs["sae"], runs["cache"], baselines_of(runs), tmp_path / "v")
    for metric in JUDGED:
        assert found.beaten(metric) == dict.fromkeys(KINDS, True), metric
    text = str(found)
    pca = row_of(found, "pca", "label_purity_above_chance")
    assert 0 < pca["random_lead_low"] < pca["random_lead"] < pca["random_lead_high"] < pca["difference"]
    assert f"random directions are ahead of pca by {pca['random_lead']:+.3f}, too; the SAE is ahead of both by" in text
    for row in (row for row in found.differences if row["metric"] in JUDGED):
        over_random = row_of(found, "random", row["metric"])
        for column, beyond in (("difference", ""), ("low", "_low"), ("high", "_high")):
            assert row[f"beyond_random{beyond}"] == min(row[column], over_random[column]), row
    assert f"SAE minus baseline, 95% interval over {found.summary['n_groups']} patients" in text
    assert "above 0 for 9 of 9 baselines" in text
    assert {row["n_baselines"] for row in found.differences if row["baseline"] == "random"} == {3}
    for row in found.differences:  # a draw has fewer distinct images, which moves purity: not the interval
        assert row["low"] is None or row["low"] <= row["difference"] <= row["high"], row
    assert verify_folder(tmp_path / "v").is_whole


@pytest.mark.stress
def test_an_untrained_sae_beats_none(runs: dict[str, Path], tmp_path: Path) -> None:
    """Three of them, each against the others and all baselines: what is ahead of one is not ahead of `random`."""
    n_ahead = 0
    for seed in SEEDS["random"]:
        sae = runs[f"random {seed}"]
        others = [place for place in baselines_of(runs) if place != sae]
        found = compare_with_baselines(sae, runs["cache"], others, tmp_path / f"v{seed}")
        for metric in JUDGED:
            assert found.beaten(metric) == dict.fromkeys(KINDS, False), (seed, metric)
            assert row_of(found, "random", metric)["low"] <= 0
        assert any("is itself a baseline (random)" in warning for warning in found.warnings)
        ahead = [row for row in found.differences if row["is_ahead"]]
        assert {(row["baseline"], row["metric"]) for row in ahead} <= {("pca", "label_purity_above_chance")}
        for row in ahead:
            assert any(f"the SAE's lead over pca of {row['difference']:+.3f}" in warning for warning in found.warnings)
            assert "above 0 for 0 of 9 baselines; not counted: 1 lead that random directions may have as well" in str(
                found
            )
        n_ahead += len(ahead)
    assert n_ahead  # the interval is narrow enough to see it


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2, 3])
def test_dictionaries_of_other_tokens_beat_every_baseline(tmp_path: Path, number: int) -> None:
    """With 23 held-out patients; 8 are too few to tell k-means' purity from that of the planted dictionary."""
    cache = planted_cache(tmp_path / "acts.zarr", number, n_images=720)
    sae = planted_sae(tmp_path / "sae", cache, number)
    made = [
        write_baseline([cache], tmp_path / f"{kind}{seed}", BaselineConfig(kind=kind, seed=seed), like=sae).out
        for kind in KINDS
        for seed in SEEDS.get(kind, (0,))
    ]
    found = compare_with_baselines(sae, cache, made, tmp_path / "v")
    assert found.summary["n_groups"] == 23
    for metric in JUDGED:
        assert found.beaten(metric) == dict.fromkeys(KINDS, True), metric


@pytest.mark.slow
def test_untrained_saes_of_other_tokens_beat_none(tmp_path: Path) -> None:
    """Ten caches of other planted directions, four untrained SAEs of each: a lead over pca is often real, and said."""
    kinds = [*(("random", seed) for seed in range(4)), ("pca", 0), ("neurons", 0), ("kmeans", 0)]
    n_ahead = n_beaten = 0
    for number in range(1, 11):
        root = tmp_path / str(number)
        root.mkdir()
        cache = planted_cache(root / "acts.zarr", number)
        sae = planted_sae(root / "sae", cache, number)
        made = [
            write_baseline([cache], root / f"{kind}{seed}", BaselineConfig(kind=kind, seed=seed), like=sae).out
            for kind, seed in kinds
        ]
        for seed in range(4):
            others = [place for place in made if place != made[seed]]
            found = compare_with_baselines(made[seed], cache, others, root / f"v{seed}", VersusConfig(draws=100))
            n_ahead += any(row["is_ahead"] for row in found.differences)
            n_beaten += any(any(found.beaten(metric).values()) for metric in JUDGED)
    assert n_ahead >= 4
    assert n_beaten <= 1  # of 40


def test_a_lead_of_untrained_directions_is_said_not_counted(runs: dict[str, Path], tmp_path: Path) -> None:
    sae, others = runs["random 1"], [runs["random 0"], runs["random 2"], runs["pca 0"]]
    found = compare_with_baselines(sae, runs["cache"], others, tmp_path / "v")
    row = row_of(found, "pca", "label_purity_above_chance")
    assert row["low"] > 0
    assert (row["is_ahead"], row["is_better"], row["is_worse"]) == (True, False, False)
    assert row["random_lead"] == pytest.approx(row["difference"], abs=0.03)  # it is untrained directions' own
    by = f"{row['random_lead']:+.3f} ({row['random_lead_low']:+.3f} to {row['random_lead_high']:+.3f})"
    assert (
        f"label purity above chance: random directions are ahead of pca by {by}, too, so the SAE's lead over pca of "
        f"{row['difference']:+.3f} is no sign of learning"
    ) in found.warnings
    alone = compare_with_baselines(sae, runs["cache"], [runs["pca 0"]], tmp_path / "w")
    assert alone.beaten("label_purity_above_chance") == {"pca": False}  # it is held against itself
    assert row_of(alone, "pca", "label_purity_above_chance")["low"] == row["low"]


def test_without_random_directions_it_says_what_to_type(runs: dict[str, Path], tmp_path: Path) -> None:
    found = compare_with_baselines(runs["sae"], runs["cache"], [runs["pca 0"]], tmp_path / "v")
    assert found.beaten() == {"pca": True}
    assert (
        "without a random baseline a lead cannot be told from that of untrained directions; make one with cyto sae "
        "baseline CACHE -o random.sae --kind random --like sae, and add --baseline random.sae"
    ) in found.warnings
    rows = [row for row in found.differences if row["metric"] in JUDGED]
    assert {(row["is_ahead"], row["random_lead"], row["beyond_random_low"]) for row in rows} == {(True, None, None)}
    behind = compare_with_baselines(runs["pca 0"], runs["cache"], [runs["sae"]], tmp_path / "w")
    assert not any("without a random baseline" in warning for warning in behind.warnings)  # no lead to doubt


def test_leads_that_an_earlier_cyto_judged(runs: dict[str, Path], tmp_path: Path) -> None:
    """Its folders lack the columns that came since; they are read, and say so."""
    found = compare_with_baselines(runs["sae"], runs["cache"], [runs["pca 0"]], tmp_path / "v")
    old = [
        {name: value for name, value in row.items() if name != "is_ahead" and "random" not in name}
        for row in found.differences
    ]
    earlier = replace(found, differences=old)
    assert earlier.beaten() == {"pca": True}
    assert "above 0 for 1 of 1 baseline" in str(earlier)
    assert earlier.warnings == (*found.warnings, doubts_of({"warnings": []}, old)[0])
    assert "an earlier cyto judged these leads" in earlier.warnings[-1]
    assert doubts_of({"warnings": []}, found.differences) == []


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


def test_no_limit_lies_beyond_what_a_figure_can_be() -> None:
    """A share of dead latents of 0, larger in the draws, had a lower limit below 0."""
    member: Any = SimpleNamespace(
        run=Path("a"), kind="sae", sha256="0" * 64, header=SimpleNamespace(spec={"n_latents": 4})
    )
    draws = np.array([-0.2, -0.1, 0.1, 0.2])
    observed = {"explained_variance": 0.95, "l0": 0.1, "dead_share": 0.0, "label_purity": 0.95}
    figures = {metric: np.array([value, *(value + draws)]) for metric, value in observed.items()}
    figures |= {metric: np.full(5, 0.5) for metric in METRICS if metric not in observed}
    row = module._row(member, figures, {metric: figures[metric] for metric in PURITIES}, 5)
    assert (row["dead_share_low"], row["l0_low"]) == (0, 0)
    assert (row["explained_variance_high"], row["label_purity_high"]) == (1, 1)
    for metric in METRICS:
        assert row[f"{metric}_low"] <= row[metric] <= row[f"{metric}_high"]
    assert row["dead_share_high"] > 0.2
