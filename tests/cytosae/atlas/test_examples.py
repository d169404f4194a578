"""Deciles, near misses, best cells and histograms of latents: equal to plain loops over all values, in any blocks."""

import errno
import os
import tempfile
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from search_cells import draw_cells, write_search_barcodes

from cytosae.atlas import examples
from cytosae.atlas.examples import BIN_EDGES, Examples, find_examples
from stores.barcode_store import BarcodeStore

LATENTS = np.array([0, 3, 7, 21, 40, 55, 70, 75, 79])
PER_DECILE, N_NEAR, SEED = 2, 3, 4


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Means (images, latents), the image table, opened inputs, and the reference images of each latent."""
    _, means, counts, images = draw_cells()
    means[:, 40] = np.where(means[:, 40] > 0, np.float32(0.5), 0)  # all equal
    means[:, 55] *= np.arange(240) < 60  # rare
    images.loc["i007", "status"], means[7] = "unreadable", 0
    images.loc["i030", "patient"] = ""
    root = write_search_barcodes(tmp_path_factory.mktemp("examples") / "b", means, means, counts, images)
    names = [f"P{p:02d}" for p in range(12)]
    inputs = SimpleNamespace(
        barcodes=BarcodeStore(root), tau=0.2, n_latents=80, concepts=SimpleNamespace(datasets=["set0", "set1"])
    )
    cohort = SimpleNamespace(
        is_readable=(images["status"] == "ok").to_numpy(bool),
        image_datasets=images["dataset"].tolist(),
        patient_of=np.array([names.index(name) if name else -1 for name in images["patient"]]),
        n_patients=12,
    )
    return means, cohort, inputs, {int(latent): np.argsort(-means[:, latent])[:5].tolist() for latent in LATENTS}


def find(made: Any, **settings: Any) -> Examples:
    _, cohort, inputs, references = made
    pairs = [(latent, image) for latent, images in references.items() for image in images]
    asked = {"per_decile": PER_DECILE, "n_near": N_NEAR, "seed": SEED, **settings}
    return find_examples(inputs, cohort, LATENTS, tuple(np.array(pairs).T), **asked)


@pytest.fixture(params=[(96, 1 << 21, 1 << 24, 1 << 26), (12, 100, 30, 0)])
def sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The sample as it is, larger than what is active here; and a small one, in many blocks, patients in groups."""
    for name, value in zip(("SAMPLE", "_BLOCK", "_CELLS", "_IN_MEMORY"), request.param, strict=True):
        monkeypatch.setattr(examples, name, value)
    return int(request.param[0])


@pytest.mark.stress
def test_deciles_are_those_of_all_active_images(made: Any, sizes: int) -> None:
    means, cohort = made[:2]
    draw, found = np.random.default_rng([SEED, 240]).permutation(240), find(made)
    n_shown = 0
    for n, latent in enumerate(LATENTS):
        active = [image for image in range(240) if cohort.is_readable[image] and means[image, latent] > 0]
        assert found.n_active[n] == len(active)
        in_order = sorted(active, key=lambda image: (means[image, latent], draw[image]))
        sample = sorted(active, key=draw.__getitem__)[:sizes]
        for decile in range(10):
            mine = [image for image in sample if in_order.index(image) * 10 // len(active) == decile]
            mine = sorted(sorted(mine, key=draw.__getitem__)[:PER_DECILE], key=lambda image: -means[image, latent])
            mine = mine if len(active) >= examples.FEWEST else []
            shown = found.deciles[n, decile]
            assert shown[shown >= 0].tolist() == mine or len({means[image, latent] for image in mine}) < len(mine)
            assert {*shown[shown >= 0].tolist()} == {*mine}
            assert found.values[n, decile, : len(mine)].tolist() == [
                means[image, latent] for image in shown[: len(mine)]
            ]
            n_shown += len(mine)
    assert n_shown > 60
    assert found.n_active.min() < examples.FEWEST  # one that is too rare for deciles


@pytest.mark.stress
def test_near_misses_resemble_the_reference_images_and_lack_the_latent(
    made: Any, sizes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examples, "_LATENTS_OF_CENTRE", 10)
    means, cohort, _, references = made
    n_with = (means > 0).sum(0)
    weights = np.log(240 / (n_with + 1)).clip(0)  # 239 readable images
    prints = []
    for image in range(240):
        weighted = means[image] * weights * cohort.is_readable[image]
        kept = np.argsort(-weighted, kind="stable")[:32]
        vector = np.zeros(80)
        vector[kept] = weighted[kept]
        prints.append(vector / (np.linalg.norm(vector) or 1))
    found = find(made)
    for n, latent in enumerate(LATENTS):
        centre = np.sum([prints[image] for image in references[int(latent)]], axis=0)
        centre[latent] = 0
        centre[np.argsort(-centre, kind="stable")[10:]] = 0
        cosines = np.array(prints) @ (centre / np.linalg.norm(centre))
        silent = [image for image in range(240) if cohort.is_readable[image] and means[image, latent] == 0]
        best = sorted(silent, key=lambda image: -cosines[image])[:N_NEAR]
        assert found.near_cosines[n, : len(best)] == pytest.approx(cosines[best], abs=1e-5)
        assert cosines[found.near[n]] == pytest.approx(found.near_cosines[n], abs=1e-5)
        assert {*found.near[n].tolist()} <= {*silent}


@pytest.mark.stress
def test_best_cell_of_each_patient(made: Any, sizes: int) -> None:
    means, cohort = made[:2]
    found = find(made)
    for n, latent in enumerate(LATENTS):
        for patient in range(12):
            mine = [image for image in range(240) if cohort.patient_of[image] == patient and cohort.is_readable[image]]
            best = max(mine, key=lambda image: (means[image, latent], -image))
            assert found.best[n, patient] == (best if means[best, latent] > 0 else -1)


@pytest.mark.stress
def test_histograms(made: Any, sizes: int) -> None:
    means, cohort = made[:2]
    found = find(made)
    for number, name in enumerate(("set0", "set1")):
        members = (np.array(cohort.image_datasets) == name) & cohort.is_readable
        for n, latent in enumerate(LATENTS):
            values = means[members & (means[:, latent] > 0), latent]
            assert found.histograms[number, n].tolist() == np.histogram(np.log10(values), BIN_EDGES)[0].tolist()


def test_a_full_disk_of_temporary_files_ends_in_an_error_not_in_a_signal(
    made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An entry of a mapped file for which there is no space ends the process."""

    def full(descriptor: int, start: int, n_bytes: int) -> None:
        assert (start, n_bytes) == (0, len(LATENTS) * 12 * 4)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(examples, "_IN_MEMORY", 0)
    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(OSError, match="No space left") as error:
        find(made)
    assert error.value.filename == tempfile.gettempdir()


def test_values_outside_the_bins_count_in_the_outermost() -> None:
    values = np.array([1e-30, 10**-6.95, 1.0, 1e9], np.float32)
    assert examples._bins(values).tolist() == [0, 0, 56, len(BIN_EDGES) - 2]


def test_nothing_is_shown_that_was_not_asked_for(made: Any) -> None:
    found = find(made, per_decile=0, n_near=0)
    assert found.deciles.shape == (len(LATENTS), 10, 0)
    assert found.near.shape == (len(LATENTS), 0)
