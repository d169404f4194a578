"""Statistics of latents: slow twins on difficult stores, the released numbers, the same bytes whatever the way."""

import json
import math
import re
import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
import reference
from command_line import run
from distributed import Client
from hypothesis import given, settings
from hypothesis import strategies as st
from latent_stores import local_client, write_latents
from places import SHARED

from cytosae.concepts import ConceptConfig, compare_thresholds, concept_statistics, top_images
from cytosae.concepts import statistics as concepts_module
from cytosae.concepts.figures import Panel, latents_above, plot_scatter, plot_thresholds
from cytosae.concepts.label_entropy import label_agreement, label_divergence, label_tests, top_label
from cytosae.concepts.statistics import label_entropy, shuffled_entropy
from cytosae.concepts.tasks import TopImages
from stores import BadInput, ConceptStore, DamagedStore, LatentStore, SpecMismatch, find_header
from stores.concept_store import MEANINGFUL
from stores.files import readable_json, sha256_file, write_json

Float = npt.NDArray[np.float32]
RELEASED = SHARED / "released_mll23" / "feature_data.npz"


def same(found: npt.ArrayLike, wanted: npt.ArrayLike, rtol: float = 1e-12) -> None:
    np.testing.assert_allclose(np.asarray(found, float), np.asarray(wanted, float), rtol=rtol, atol=1e-12)


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than all else here."""
    for name in ("plot_scatter", "plot_thresholds"):
        monkeypatch.setattr(concepts_module, name, lambda panels, path: None)


# ------------------------------------------------------------------------------------------- labels


def test_label_entropy_by_hand() -> None:
    values = [[3.0, 2.0, 1.0], [4.0, 4.0, 0.0], [5.0, 5.0, 5.0], [7.0, 0.0, 0.0], [2.0, 1.0, 1.0], [0.0, 0.0, 0.0]]
    labels = [[0, 1, 0], [2, 7, 7], [1, 1, 1], [0, 0, 0], [3, -1, 4], [1, 2, 3]]
    thirds = -(2 / 3) * math.log(2 / 3) - (1 / 3) * math.log(1 / 3)  # 3 + 1 against 2; and 2 against 1, one unlabelled
    wanted = [thirds, math.log(2), 0, 0, thirds, math.nan]
    same(label_entropy(values, labels), wanted)
    same(label_entropy(values, labels, min_support=2), [*wanted[:3], math.nan, *wanted[4:]])
    same(label_entropy(values, labels, min_support=3), [thirds, math.nan, 0, *[math.nan] * 3])
    assert not np.signbit(label_entropy(values, labels)[2:4]).any()
    assert label_entropy(np.zeros((0, 3)), np.zeros((0, 3), int)).shape == (0,)
    assert np.isnan(label_entropy(np.zeros((2, 0)), np.zeros((2, 0), int))).all()
    assert top_label(values, labels).tolist() == [0, 2, 1, 0, 3, -1]  # of equal ones the smaller number
    # padding in front has no label of its own
    same(label_entropy([[0.0, 1.0, 1.0]], [[5, 5, 6]]), [math.log(2)])
    assert top_label([[0.0, 1.0, 1.0]], [[5, 5, 6]]).tolist() == [5]


small_values = st.sampled_from([0.0, 1e-45, 0.1, 0.25, 0.5, 1.0, 3e38])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.integers(1, 6).flatmap(
        lambda k: st.lists(st.lists(st.tuples(small_values, st.integers(-1, 3)), min_size=k, max_size=k), max_size=5)
    ),
    st.integers(1, 4),
)
def test_label_entropy_equals_the_twin(rows: list[list[tuple[float, int]]], min_support: int) -> None:
    k = len(rows[0]) if rows else 1
    values = np.array([[value for value, _ in row] for row in rows], np.float32).reshape(-1, k)
    labels = np.array([[label for _, label in row] for row in rows], np.int64).reshape(-1, k)
    wanted = [reference.label_entropy(v.astype(float), n, min_support) for v, n in zip(values, labels, strict=True)]
    same(label_entropy(values, labels, min_support=min_support), wanted)


@pytest.mark.parametrize(
    ("values", "labels", "words"),
    [
        ([[1.0, 2.0]], [[1]], r"must both be \(S, k\); found \(1, 2\) and \(1, 1\)"),
        ([1.0], [1], r"found \(1,\)"),
        ([[np.nan]], [[1]], "finite and at least 0"),
        ([[np.inf]], [[1]], "finite and at least 0"),
        ([[-1.0]], [[1]], "finite and at least 0"),
        ([[1.0]], [[1.0]], "whole numbers, -1 for no label; found float64"),
    ],
)
def test_what_label_entropy_refuses(values: Any, labels: Any, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        label_entropy(values, labels)


def test_shuffled_entropy_equals_a_twin_and_what_chance_gives() -> None:
    rng = np.random.default_rng(3)
    labels = rng.integers(-1, 4, 40)
    images = np.array([rng.choice(40, 6, replace=False) for _ in range(9)])
    images[3, 2:], images[4] = -1, -1
    values = np.where(images >= 0, rng.random((9, 6)), 0)
    found = shuffled_entropy(values, images, labels, shuffles=7, seed=11, min_support=2)

    again, total = np.random.default_rng(11), np.zeros(9)
    places = [i for i in range(40) if labels[i] >= 0]
    for _ in range(7):
        drawn = dict(zip(places, again.permutation([labels[i] for i in places]), strict=True))
        for s in range(9):
            total[s] += reference.label_entropy(values[s], [int(drawn.get(i, -1)) for i in images[s]], 2)
    same(found, total / 7)
    assert (
        np.isnan(found).tolist()
        == np.isnan(label_entropy(values, np.where(images >= 0, labels[images], -1), min_support=2)).tolist()
    )
    assert np.isnan(shuffled_entropy(values, images, labels, shuffles=0, seed=0)).all()

    # two images of equal weight out of 2 and 2: the same label with chance 1/3, since none is drawn twice
    pair = shuffled_entropy([[1.0, 1.0]], [[0, 2]], [0, 0, 1, 1], shuffles=4000, seed=0)
    assert pair[0] == pytest.approx(2 / 3 * math.log(2), abs=0.02)
    # the weights are the latent's own: one image outweighs the other, and there is little left to mix
    assert shuffled_entropy([[1.0, 1e-9]], [[0, 2]], [0, 0, 1, 1], shuffles=50, seed=0)[0] < 1e-6


def test_p_of_an_entropy_equals_a_twin() -> None:
    """Patient by patient round the ring, label by label; images without a patient are one each."""
    rng = np.random.default_rng(3)
    labels, patients = rng.integers(-1, 3, 90), np.minimum(rng.integers(-1, 12, 90), 5)  # 5 has half of them
    images = np.array([rng.choice(90, 6, replace=False) for _ in range(9)])
    images[3, 2:], images[4] = -1, -1
    values = np.where(images >= 0, rng.random((9, 6)), 0)
    found = label_tests(values, images, labels, patients, shuffles=30, seed=11, min_support=2)
    share = {label: (labels == label).sum() / (labels >= 0).sum() for label in range(3)}

    def divergence(values: Any, said: list[int]) -> float:
        """From the definition; NaN below two images."""
        weight: dict[int, float] = {}
        for value, label in zip(values, said, strict=True):
            if value > 0 and label >= 0:
                weight[label] = weight.get(label, 0) + value
        if sum(value > 0 and label >= 0 for value, label in zip(values, said, strict=True)) < 2:
            return math.nan
        total = sum(weight.values())
        return sum(one / total * math.log(one / total / share[label]) for label, one in weight.items())

    members: dict[int, list[int]] = {}
    for i in (i for i in range(90) if labels[i] >= 0):
        members.setdefault(int(patients[i]) if patients[i] >= 0 else 100 + i, []).append(i)
    groups = [members[name] for name in sorted(members)]
    labelled = sorted(i for group in groups for i in group)
    again, n_as_small, n_as_large = np.random.default_rng(11), np.zeros(9), np.zeros(9)
    said = [[int(labels[i]) if i >= 0 else -1 for i in images[s]] for s in range(9)]
    same(found.divergence, [divergence(values[s], said[s]) for s in range(9)])
    own = [
        reference.label_entropy(values[s], [int(labels[i]) if i >= 0 else -1 for i in images[s]], 2) for s in range(9)
    ]
    for _ in range(30):
        place, order = again.permutation(len(groups)).tolist(), [labelled[k] for k in again.permutation(len(labelled))]
        ring: list[int] = []
        begins = {}
        for group in sorted(range(len(groups)), key=place.__getitem__):
            begins[group] = len(ring)
            ring += [int(labels[i]) for i in order if i in groups[group]]
        drawn: dict[int, int] = {}
        for own_images, source in zip(groups, again.permutation(len(groups)).tolist(), strict=True):
            for k, i in enumerate(own_images):
                drawn[i] = ring[(begins[source] + k % max(10, len(groups[source]))) % len(ring)]
        for s in range(9):
            shuffled = reference.label_entropy(values[s], [drawn.get(int(i), -1) for i in images[s]], 2)
            n_as_small[s] += shuffled <= own[s] + 1e-9
            other = divergence(values[s], [drawn.get(int(i), -1) for i in images[s]])
            n_as_large[s] += other >= found.divergence[s] - 1e-9
    same(found.entropy_p, np.where(np.isnan(own), np.nan, (1 + n_as_small) / 31))
    same(found.divergence_p, np.where(np.isnan(own), np.nan, (1 + n_as_large) / 31))
    assert np.isnan(found.divergence_p).any()
    assert np.isnan(label_tests(values, images, labels, patients, shuffles=0, seed=0).entropy_p).all()
    # at 90 to 10, ten images of the common label, and of the rare one
    two = label_divergence(np.ones((2, 10)), [[0] * 10, [1] * 10], [0.9, 0.1])
    same(two, [math.log(1 / 0.9), math.log(10)])


def test_p_of_an_entropy_knows_patients_and_rare_labels() -> None:
    """Latents that know no label: 5% at most below 0.05. Those that stand for a patient would be half of them, were
    labels shuffled among images; at 90 to 10 labels a third has an entropy below 0.1. A latent of a label is found.
    """
    low: dict[str, list[list[float]]] = {"patients": [], "images": []}
    for world in range(5):
        rng = np.random.default_rng(world)
        patients = np.repeat(np.arange(40), rng.integers(5, 100, 40))
        diseases = rng.integers(0, 3, 40)[patients]
        activation = rng.exponential(size=(300, len(patients))) * rng.lognormal(0, 1.5, (300, 40))[:, patients]
        images = np.argsort(-activation, axis=1)[:, :10]
        values = np.take_along_axis(activation, images, 1)
        for name, known in (("patients", patients), ("images", np.full(len(patients), -1))):
            tests = label_tests(values, images, diseases, known, shuffles=99, seed=world)
            low[name].append([float((p <= 0.05).mean()) for p in (tests.entropy_p, tests.divergence_p)])
    assert (np.mean(low["patients"], axis=0) <= 0.05).all()
    assert (np.mean(low["images"], axis=0) > 0.3).all()

    mixed = []  # each patient has its own mixture of two labels, and sizes differ much
    for world in range(10):
        rng = np.random.default_rng(world)
        patients = np.repeat(np.arange(40), np.maximum(2, rng.lognormal(2.5, 1, 40).astype(int)))
        kinds = (rng.random(len(patients)) < rng.beta(1, 1, 40)[patients]).astype(int)
        activation = rng.exponential(size=(60, len(patients))) * rng.lognormal(0, 1.5, (60, 40))[:, patients]
        images = np.argsort(-activation, axis=1)[:, :10]
        tests = label_tests(
            np.take_along_axis(activation, images, 1), images, kinds, patients, shuffles=199, seed=world
        )
        mixed.append([(p <= 0.05).mean() for p in (tests.entropy_p, tests.divergence_p)])
    assert (np.mean(mixed, axis=0) <= 0.055).all()

    rng = np.random.default_rng(9)
    patients = np.repeat(np.arange(30), 30)
    labels = (rng.random(900) < 0.1).astype(int)
    activation = rng.exponential(size=(300, 900))
    activation[:20] += 5 * labels  # of the rare label, in whichever patient
    images = np.argsort(-activation, axis=1)[:, :10]
    values = np.take_along_axis(activation, images, 1)
    tests = label_tests(values, images, labels, patients, shuffles=199, seed=0)
    assert (tests.divergence_p[:20] == 1 / 200).all()
    assert (tests.divergence_p[20:] <= 0.05).mean() <= 0.06
    entropy = label_entropy(values, labels[images])
    assert (entropy[20:] < 0.1).mean() > 0.25
    assert (tests.entropy_p > 0.05).all()  # 0 of the rare label is 0 of the common one: see the divergence


def test_agreement_by_hand_and_against_all_shuffles() -> None:
    from itertools import permutations

    first, second = np.array([0, 0, 1, 2, -1, 2]), np.array([0, 1, 1, 2, 2, -1])
    found = label_agreement(first, second, shuffles=500, seed=5)
    assert (found.n_compared, found.n_agreeing, found.share) == (4, 3, 0.75)
    every = [np.mean(np.array(order) == first[:4]) for order in permutations(second[:4])]
    assert found.share_expected == pytest.approx(np.mean(every))
    assert found.share_shuffled_95 == np.quantile(every, 0.95) == 0.75
    nothing = label_agreement([-1, 0], [0, -1], shuffles=5, seed=0)
    assert nothing.n_compared == 0
    assert np.isnan([nothing.share, nothing.share_expected, nothing.share_shuffled_95]).all()


# ------------------------------------------------------------------------------------------- released numbers


@pytest.mark.skipif(not RELEASED.exists(), reason="the released MLL23 statistics are not on this machine")
def test_released_statistics() -> None:
    """docs/reference/paper.md 8: entropies to 1e-4, latents above each threshold, the noisy ones."""
    with np.load(RELEASED) as released:
        values, labels, mean = released["top_values"], released["top_label_indices"], released["mean_activation"]
        entropy, frequency = released["top_entropy"], released["frequency"]
    found = label_entropy(values, labels)
    assert np.abs(found - entropy).max() < 1e-4
    support = (values > 0).sum(axis=1)
    assert (np.isnan(label_entropy(values, labels, min_support=10)) == (support < 10)).all()
    assert (support < 10).sum() == 69
    thresholds = [1e-6, 1e-5, 1e-4, 10**-3.5, 1e-3, 1e-2, 1e-1, 1]
    assert latents_above(mean, thresholds).tolist() == [49152, 49152, 20803, 4321, 3801, 3641, 248, 1]
    assert (mean >= MEANINGFUL).sum() == 3801
    assert frequency.sum() == pytest.approx(1853.1, abs=0.05)


# ------------------------------------------------------------------------------------------- stores


def write_difficult(root: Path, seed: int = 0, *, n_images: int = 60, n_latents: int = 24) -> tuple[Path, Float]:
    """Three datasets, interleaved; values from few numbers, so ties abound; silent, rare and everywhere latents.

    "blank" has one unreadable image only, "plain" no labels, "mixed" some; ids do not follow the order of the images.
    """
    rng = np.random.default_rng(seed)
    dense = np.where(
        rng.random((n_images, 5, n_latents)) < rng.random(n_latents) ** 3,
        rng.choice([0.25, 0.5, 1.0, 2.0], (n_images, 5, n_latents)),
        0,
    ).astype(np.float32)
    dense[:, :, 0] = 0  # silent
    dense[:, :, 1] = 0.5  # the same everywhere
    dense[:, :, 2] = 0
    dense[7, 3, 2] = 4.0  # in one token
    is_readable = rng.random(n_images) < 0.9
    is_readable[[3, 7]] = False, True
    dense[rng.random(n_images) < 0.1] = 0  # images without any latent
    dense[~is_readable] = 0
    names = [["mixed", "plain"][i % 2] for i in range(n_images)]
    names[3] = "blank"
    labels = [None if name == "plain" or rng.random() < 0.2 else f"type {rng.integers(3)}" for name in names]
    further: dict[str, list[str | None]] = {
        "image_id": [f"id-{(37 * i) % n_images:03d}" for i in range(n_images)],
        "dataset": [*names],
        "label": labels,
        "label_common": [None if rng.random() < 0.1 else f"common {rng.integers(2)}" for _ in names],
    }
    rows = [(None, None, bool(ok)) for ok in is_readable]
    return write_latents(root, dense, rows, further=further), dense


def twin(root: Path, dense: Float, config: ConceptConfig) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Both tables, image by image and latent by latent; without the entropy by chance."""
    images = LatentStore(root).images.to_pylist()
    means = reference.image_mean(dense.reshape(-1, dense.shape[2]), 5, config.token_set).astype(np.float32)
    largest = reference.image_max(dense.reshape(-1, dense.shape[2]), 5, config.token_set)
    latents, top = [], []
    for name in sorted({image["dataset"] for image in images}):
        own = [i for i, image in enumerate(images) if image["dataset"] == name and image["status"] == "ok"]
        known = sorted({image[config.label] for image in images if image[config.label]})
        for s in range(dense.shape[2]):
            active = [i for i in own if means[i, s] > 0]
            chosen = [
                own[k] for k in reference.top_images(means[own, s], [images[i]["image_id"] for i in own], config.top_k)
            ]
            given = [images[i][config.label] for i in chosen]
            weights: dict[str, float] = {}
            for i, label in zip(chosen, given, strict=True):
                if label:
                    weights[label] = weights.get(label, 0) + float(means[i, s])
            numbers = [known.index(label) if label else -1 for label in given]
            entropy = reference.label_entropy([float(means[i, s]) for i in chosen], numbers, config.min_support)
            latents.append(
                {
                    "latent": s,
                    "dataset": name,
                    "n_images": len(active),
                    "frequency": len(active) / len(own) if own else 0.0,
                    "mean_activation": sum(float(means[i, s]) for i in active) / len(active) if active else 0.0,
                    "max_activation": max((float(largest[i, s]) for i in own), default=0.0),
                    "n_labelled": sum(label is not None for label in given),
                    "label_entropy": None if math.isnan(entropy) else pytest.approx(entropy, abs=1e-12),
                    "top_label": min(weights, key=lambda label: (-weights[label], label)) if weights else None,
                }
            )
            top += [
                {
                    "latent": s,
                    "dataset": name,
                    "rank": rank,
                    "image_id": images[i]["image_id"],
                    "image_index": i,
                    "value": float(means[i, s]),
                    "label": images[i]["label"],
                    "label_common": images[i]["label_common"],
                }
                for rank, i in enumerate(chosen, start=1)
            ]
    return latents, top


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(
    ("seed", "config"),
    [
        (0, ConceptConfig(min_support=2)),
        (1, ConceptConfig(token_set="patch", top_k=3, min_support=1, label="label_common", partition_images=7)),
        (2, ConceptConfig(token_set="cls", top_k=40, min_support=40, shuffles=0)),
    ],
    ids=["all", "patch", "cls"],
)
def test_every_statistic_equals_its_slow_twin(
    tmp_path: Path, threads: Client, seed: int, config: ConceptConfig
) -> None:
    root, dense = write_difficult(tmp_path / "latents.zarr", seed)
    done = concept_statistics(root, tmp_path / "concepts", config, client=threads)
    store = ConceptStore(tmp_path / "concepts")
    latents, top = twin(root, dense, config)
    found = store.latents().to_pylist()
    for name in latents[0]:
        assert [row[name] for row in found] == [row[name] for row in latents], name
    assert store.all_top_images.to_pylist() == top
    assert store.datasets == ["blank", "mixed", "plain"]
    blank = {row["dataset"]: row for row in done.by_dataset}["blank"]
    assert (blank["n_readable"], blank["n_unreadable"], blank["n_silent"]) == (0, 1, 24)
    assert found[24]["n_images"] == 0  # latent 0 of the second dataset never fires
    assert found[24]["label_entropy_null"] is None
    for row in found:
        assert config.shuffles == 0 or (row["label_entropy_null"] is None) == (row["label_entropy"] is None)
        assert (row["label_entropy_p"] is None) == (row["label_entropy_q"] is None) == (row["label_entropy"] is None)
        assert row["label_entropy"] is None or 0.001 <= row["label_entropy_p"] <= row["label_entropy_q"] <= 1
    # the tie of all ties: latent 1 is the same in every image
    ids = store.top_images(1, "mixed")["image_id"].to_pylist()
    assert ids == sorted(ids)


@pytest.mark.usefixtures("no_figures")
def test_the_entropy_by_chance_is_that_of_the_dataset(tmp_path: Path, threads: Client) -> None:
    """Labels are drawn from the readable images of the same dataset only: each other image could be told."""
    root, _ = write_difficult(tmp_path / "latents.zarr")
    config = ConceptConfig(min_support=2, shuffles=9, seed=4)
    concept_statistics(root, tmp_path / "concepts", config, client=threads)
    store, images = ConceptStore(tmp_path / "concepts"), LatentStore(root).images.to_pylist()
    known = sorted({image["label"] for image in images if image["label"]})
    labels = [
        known.index(image["label"])
        if image["label"] and image["status"] == "ok" and image["dataset"] == "mixed"
        else -1
        for image in images
    ]
    for s in range(24):
        top = store.top_images(s, "mixed")
        if top.num_rows:
            values, index = top["value"].to_numpy()[None], top["image_index"].to_numpy()[None]
            wanted = shuffled_entropy(values, index, labels, shuffles=9, seed=4, min_support=2)[0]
            found = store.latents("mixed")["label_entropy_null"][s].as_py()
            assert found == (None if math.isnan(wanted) else pytest.approx(wanted, abs=1e-12))


def tables(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(root.glob("*")) if path.name != "runs.jsonl"}


@pytest.mark.stress
def test_partitions_workers_a_break_and_several_stores_change_no_byte(
    tmp_path: Path, threads: Client, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Sums in many pieces: what they are follows from the data alone. A broken job goes on from its parts."""
    monkeypatch.setattr(concepts_module, "_GROUP_ENTRIES", 40)
    monkeypatch.setattr(concepts_module, "_WAVE", 3)
    rng = np.random.default_rng(5)
    dense = (rng.random((60, 5, 24)) * (rng.random((60, 5, 24)) < 0.3)).astype(np.float32)  # sums that round
    further: dict[str, list[str | None]] = {"dataset": ["ab"[i % 2] for i in range(60)]}
    rows = [(None, None, True)] * 60
    root = write_latents(tmp_path / "latents.zarr", dense, rows, further=further, value_bits=23)
    concept_statistics(root, tmp_path / "one", ConceptConfig(), client=threads)
    concept_statistics(root, tmp_path / "seven", ConceptConfig(partition_images=7), client=threads)
    one = tables(tmp_path / "one")
    assert tables(tmp_path / "seven") == one
    assert {"latents.parquet", "top_images.parquet", "agreement.parquet", "scatter.png", "thresholds.svg"} <= set(one)
    assert "parts" not in one
    request.getfixturevalue("no_figures")
    with local_client(2, 1, processes=True) as processes:
        concept_statistics(root, tmp_path / "processes", ConceptConfig(partition_images=13), client=processes)

    seen: list[int] = []

    def interrupt(done: int, total: int, state: str) -> None:
        seen.append(done)
        if done >= 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        concept_statistics(
            root, tmp_path / "cut", ConceptConfig(partition_images=5), client=threads, progress=interrupt
        )
    assert list((tmp_path / "cut" / "parts").glob("*.part"))
    seen.clear()
    concept_statistics(
        root, tmp_path / "cut", ConceptConfig(), client=threads, progress=lambda done, *_: seen.append(done)
    )
    assert seen[0] >= 20
    one = {name: content for name, content in one.items() if Path(name).suffix not in (".png", ".svg")}
    header = json.loads(one["concepts.json"])
    header["summary"]["figures"] = {}  # of those that were not drawn
    one["concepts.json"] = readable_json(header)
    for other in ("processes", "cut"):
        assert tables(tmp_path / other) == one, other

    # the same images as two stores: another identity, the same numbers
    halves = []
    for k, part in enumerate((slice(0, 23), slice(23, 60))):
        own: dict[str, Sequence[str | None]] = {
            "dataset": further["dataset"][part],
            "path": [f"{i:04d}.png" for i in range(60)][part],
            "label": [f"type {i % 3}" for i in range(60)][part],
        }
        halves.append(write_latents(tmp_path / f"half{k}.zarr", dense[part], rows[part], further=own, value_bits=23))
    concept_statistics(halves, tmp_path / "halves", ConceptConfig(), client=threads)
    for name in ("latents", "top_images", "agreement"):
        assert pq.read_table(tmp_path / "halves" / f"{name}.parquet").equals(
            pq.read_table(tmp_path / "one" / f"{name}.parquet")
        )


def test_pieces_follow_the_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut where a whole number of 10 entries is full; images without entries go with those before them."""
    monkeypatch.setattr(concepts_module, "_GROUP_ENTRIES", 10)
    lengths, members = np.array([6, 99, 4, 0, 25, 1, 0, 9], np.int32), np.array([0, 2, 3, 4, 5, 6, 7])
    found = [piece.tolist() for piece in concepts_module._pieces(members, lengths)]
    assert found == [[0, 2], [3, 4], [5, 6, 7]]
    assert list(concepts_module._pieces(members[:0], lengths)) == []


def test_top_images_do_not_depend_on_how_images_are_divided() -> None:
    rng = np.random.default_rng(8)
    n, k = 200, 4
    value = rng.choice(np.array([0.5, 1.0, 2.0], np.float32), n)
    numbers = rng.permutation(n)
    counts = {"indptr": np.arange(n + 1), "latent": np.zeros(n, np.uint16), "mean": value}
    wanted = sorted(range(n), key=lambda i: (-value[i], numbers[i]))[:k]
    for cuts in ([0, n], [0, 3, 5, 120, n], [*range(n), n]):
        top, parts = TopImages.zeros(1, k), [np.arange(low, high) for low, high in pairwise(cuts)]
        for part in reversed(parts):
            one = TopImages.zeros(1, k)
            one.add_images(counts, part, numbers[part])
            top.add(one)
        assert top.image[0].tolist() == [numbers[i] for i in wanted]
        assert top.value[0].tolist() == [value[i] for i in wanted]


@pytest.mark.usefixtures("no_figures")
def test_agreement_of_planted_latents(tmp_path: Path, threads: Client) -> None:
    """Latents 0 to 2 answer to one cell type in both datasets, 3 to different ones, 4 fires in one dataset only."""
    dense = np.zeros((60, 2, 5), np.float32)
    names, common = ["ab"[i // 30] for i in range(60)], [f"type {i % 3}" for i in range(60)]
    for i in range(60):
        dense[i, 1, i % 3] = 1
        dense[i, 0, 3] = i % 3 == (0 if names[i] == "a" else 1)
        dense[i, 0, 4] = names[i] == "a"
    further: dict[str, list[str | None]] = {"dataset": [*names], "label": [None] * 60, "label_common": [*common]}
    root = write_latents(tmp_path / "latents.zarr", dense, [(None, None, True)] * 60, further=further)
    done = concept_statistics(root, tmp_path / "concepts", ConceptConfig(), client=threads)
    (pair,) = done.agreement
    assert (pair["dataset_a"], pair["dataset_b"], pair["n_compared"], pair["n_agreeing"]) == ("a", "b", 4, 3)
    assert pair["share_expected"] == pytest.approx((2 * 1 + 1 * 2 + 1 * 1) / 16)  # 0: 2 and 1, 1: 1 and 2, 2: 1 and 1
    found = pq.read_table(tmp_path / "concepts" / "agreement.parquet").to_pylist()
    assert [row["agrees"] for row in found] == [True, True, True, False, None]
    assert [row["label_common"] for row in found] == ["type 0", "type 1", "type 2", None, None]
    assert [row["n_datasets"] for row in found] == [2, 2, 2, 2, 1]
    assert all(row["n_labelled"] == 0 for row in done.by_dataset)
    latents = ConceptStore(tmp_path / "concepts").latents("a")
    assert latents["label_entropy"].null_count == latents["top_label"].null_count == 5


# ------------------------------------------------------------------------------------------- what is refused


def test_what_is_refused(tmp_path: Path, threads: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = np.full((4, 2, 3), 0.5, np.float32)
    rows = [(None, None, True)] * 4
    pruned = write_latents(tmp_path / "pruned.zarr", dense, rows, min_activation=0.1)
    with pytest.raises(
        BadInput, match=r"was pruned below 0.1, 0 values are missing: .* encode without --min-activation"
    ):
        concept_statistics(pruned, tmp_path / "out", ConceptConfig(), client=threads)
    whole = write_latents(tmp_path / "whole.zarr", dense, rows)
    other = write_latents(tmp_path / "other.zarr", dense, rows, sae_sha256="9" * 64, dataset="else")
    with pytest.raises(SpecMismatch, match="hold latents of different SAEs"):
        concept_statistics([whole, other], tmp_path / "out", ConceptConfig(), client=threads)
    with pytest.raises(BadInput, match=r"4 image ids of .* are also in"):
        concept_statistics([whole, whole], tmp_path / "out", ConceptConfig(), client=threads)
    monkeypatch.setattr(concepts_module, "_MOST_DATASETS", 0)
    with pytest.raises(BadInput, match=r"images of 1 to 0 datasets; found 1. Correct the column 'dataset'"):
        concept_statistics(whole, tmp_path / "out", ConceptConfig(), client=threads)
    assert not (tmp_path / "out").exists()
    for setting, words in {
        "top_k=0": "top_k must be 1 to 100; found 0",
        "top_k=3": "min_support must be 1 to top_k, which is 3: no latent has more images; found 5",
        "min_support=0": "min_support must be 1 to top_k, which is 10",
        "shuffles=-1": "shuffles must be at least 0; found -1",
        "partition_images=0": "partition_images must be at least 1",
        "label='patient'": "label must be one of label, label_common; found 'patient'",
        "token_set='no'": "token_set must be one of all, patch, cls",
    }.items():
        with pytest.raises(BadInput, match=words):
            eval(f"ConceptConfig({setting})")


@pytest.mark.usefixtures("no_figures")
def test_a_table_regroups_and_says_what_it_leaves_out(tmp_path: Path, threads: Client) -> None:
    dense = np.full((6, 2, 3), 0.5, np.float32)
    root = write_latents(tmp_path / "latents.zarr", dense, [(None, None, True)] * 6)
    lines = ["image_id,dataset", *(f"drawn/{i:04d}.png,{'xy'[i % 2]}" for i in range(5)), "nobody,x"]
    (tmp_path / "table.csv").write_text("\n".join(lines))
    done = concept_statistics(
        root, tmp_path / "concepts", ConceptConfig(), client=threads, table=tmp_path / "table.csv"
    )
    assert [(found["dataset"], found["n_readable"]) for found in done.by_dataset] == [("x", 3), ("y", 2)]
    assert (done.n_without_dataset, done.n_missing_in_table, done.n_unknown_in_table) == (1, 1, 1)
    assert done.missing_in_table == "drawn/0005.png"


@pytest.mark.usefixtures("no_figures")
def test_a_changed_folder_is_told(tmp_path: Path, threads: Client) -> None:
    """Also one whose maker gave it fitting checksums: fewer rows than latents, a column less, no summary."""
    root = write_latents(tmp_path / "latents.zarr", np.full((4, 2, 3), 0.5, np.float32), [(None, None, True)] * 4)
    concept_statistics(root, tmp_path / "whole", ConceptConfig(), client=threads)
    table = pq.read_table(tmp_path / "whole" / "latents.parquet")
    for name, changed, words in [
        ("short", table.slice(1), "does not have one row for each of 3 latents and 1 datasets"),
        ("turned", table.take([1, 0, 2]), "does not have one row for each"),
        ("less", table.drop_columns(["frequency"]), "lacks frequency"),
    ]:
        copy = Path(shutil.copytree(tmp_path / "whole", tmp_path / name))
        pq.write_table(changed, copy / "latents.parquet")
        header = json.loads((copy / "concepts.json").read_text())
        header["summary"]["files"]["latents.parquet"] = sha256_file(copy / "latents.parquet")
        write_json(copy / "concepts.json", header)
        with pytest.raises(DamagedStore, match=words):
            ConceptStore(copy).latents()
    header["summary"].pop("by_dataset")
    write_json(copy / "concepts.json", header)
    with pytest.raises(DamagedStore, match="does not say which latents and datasets"):
        ConceptStore(copy)


# ------------------------------------------------------------------------------------------- figures


@pytest.mark.stress
def test_figures_of_odd_latents(tmp_path: Path) -> None:
    """None that fires, none with an entropy, more panels than are drawn, a name that looks like mathematics."""
    nothing = Panel("no $latent$ fires", np.zeros(5), np.zeros(5), np.full(5, np.nan))
    single = Panel("one", np.array([0.0, 0.5]), np.array([0.0, 1e-4]), np.array([np.nan, 0.3]))
    for name, panels in {"a": [nothing], "b": [single], "c": [single] * 13}.items():
        plot_scatter(panels, tmp_path / f"{name}-scatter")
        plot_thresholds(panels, tmp_path / f"{name}-thresholds")
    assert "the first 12 of 13" in (tmp_path / "c-scatter.svg").read_text()
    svg = (tmp_path / "a-scatter.svg").read_text()
    assert "5 latents; 5 never fire (not shown)" in svg
    assert "no $latent$ fires" in svg
    rng = np.random.default_rng(0)
    many = Panel("many", rng.random(30_000), rng.random(30_000), rng.random(30_000))
    plot_scatter([many], tmp_path / "many")
    assert (tmp_path / "many.svg").stat().st_size < 1e6  # points as a picture


def test_latents_above_is_strict() -> None:
    assert latents_above([0, 1e-3, 1e-3, 1], [0, 1e-3, 0.5, 1]).tolist() == [3, 1, 1, 0]


# ------------------------------------------------------------------------------------------- commands


@pytest.mark.stress
def test_commands(tmp_path: Path) -> None:
    root, _ = write_difficult(tmp_path / "latents.zarr")
    out = tmp_path / "cells.concepts"
    step = ("concept", "stats", root, "-o", out, "--workers", 1, "--min-support", 2, "--shuffles", 5)
    done = run(*step)
    assert done.exit_code == 0, done.output
    assert f"{out}: 24 latents, token set all" in done.stdout
    assert "blank: 0 images (1 unreadable), 0 with one of 0 labels; 24 latents never active" in done.stdout
    assert re.search(r"mixed: \d+ images \(\d unreadable\), \d+ with one of 3 labels", done.stdout)
    assert "no image has a label: label entropies are null" in done.stdout
    assert re.search(
        r"mixed and plain: \d+ of \d+ latents \(.*%\) have the same top label_common; by chance", done.stdout
    )
    assert "blank and mixed: no latent has enough images with a label_common in both" in done.stdout
    assert re.search(
        r"mixed: .*\n +\d+ latents? whose top images differ in label from the dataset, \d+ with", done.stdout
    )
    assert "warning: a mean activation of 0.001 belongs to the released SAE" in done.stderr
    before = tables(out)
    again = run(*step)
    assert "already complete" in again.stderr
    assert again.stdout == done.stdout
    assert tables(out) == before
    refused = run(*step, "--seed", 1)
    assert refused.exit_code == 1
    assert "with other settings (seed 0 against 1)" in refused.stderr

    page = run("concept", "top", out, 1, "--dataset", "mixed").stdout
    assert "latent 1 in mixed" in page
    assert re.search(r"^    1  0.5 +id-\d+", page, re.MULTILINE)
    assert page.splitlines() == list(top_images(out, 1, dataset="mixed").lines())
    found = json.loads(run("concept", "top", out, 1, "--json").stdout)
    assert [each["dataset"] for each in found["by_dataset"]] == ["blank", "mixed", "plain"]
    assert [row["rank"] for row in found["by_dataset"][1]["top_images"]] == list(range(1, 11))
    assert found["by_dataset"][0]["top_images"] == []
    for words, arguments in {
        "no latent 24 in .*: it has 24 latents, counted from 0; give 0 to 23": (24,),
        "no dataset 'x' in .*; it holds blank, mixed, plain": (1, "--dataset", "x"),
    }.items():
        failed = run("concept", "top", out, *arguments)
        assert failed.exit_code == 1
        assert re.search(words, failed.stderr), failed.stderr

    shutil.copytree(out, tmp_path / "wide.concepts")
    both = (out, tmp_path / "wide.concepts")
    shown = run("concept", "thresholds", *both, "-o", tmp_path / "widths", "--dataset", "mixed")
    assert shown.exit_code == 0, shown.output
    compared = compare_thresholds(both, tmp_path / "widths", dataset="mixed")
    assert compared.was_complete
    assert shown.stdout.splitlines() == list(compared.lines())
    assert "data:image/png;base64," in compared._repr_html_()
    rows = json.loads(
        run("concept", "thresholds", *both, "-o", tmp_path / "widths", "--dataset", "mixed", "--json").stdout
    )
    mean = ConceptStore(out).latents("mixed")["mean_activation"].to_numpy()
    assert rows["counts"][0]["n_above"] == [int((mean > 10.0**at).sum()) for at in rows["log10_thresholds"]]
    table = pq.read_table(tmp_path / "widths" / "thresholds.parquet").to_pylist()
    assert [row["n_latents"] for row in table[:8]] == rows["counts"][0]["n_above"]
    assert {row["concepts"] for row in table} == {"cells.concepts", "wide.concepts"}
    assert (tmp_path / "widths" / "thresholds.svg").exists()
    assert find_header(tmp_path / "widths").kind == "thresholds"  # type: ignore[union-attr]
    twice = run("concept", "thresholds", out, out, "-o", tmp_path / "twice")
    assert "two folders of concepts would both be called" in twice.stderr
