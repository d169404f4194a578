"""Barcodes: numbers worked out by hand, equality with slow twins, and the same bytes whoever counts them."""

import json
import shutil
import subprocess
import sys
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
import reference
import zarr
from artefacts import contents
from click.testing import CliRunner
from distributed import Client
from hypothesis import given, settings
from hypothesis import strategies as st
from latent_stores import Row, local_client, random_latents, write_latents
from places import GOLDEN
from zarr.codecs import GzipCodec

from cli import cli
from cytosae.barcodes import BarcodeConfig, BarcodeResult, write_barcodes
from cytosae.barcodes import build as barcodes_module
from cytosae.barcodes import partitions as partitions_module
from cytosae.barcodes import tasks as barcode_tasks
from cytosae.barcodes.count_kernels import ImageCounter
from cytosae.barcodes.partitions import plan_partitions
from cytosae.barcodes.patients import group_images
from stores import (
    BadInput,
    BarcodeStore,
    DamagedStore,
    IncompleteStore,
    LatentSpec,
    LatentStore,
    LatentWriter,
    SpecMismatch,
    csr_bulk,
    read_runs,
)
from stores.tables import image_table, with_outcome
from stores.verify import verify_barcodes
from stores.verify_any import verify

LEVELS = ("image", "patient", "disease")


def layers_of(table: anndata.AnnData) -> dict[Any, Any]:
    """Its layers by name; newer versions of anndata list X among them, as None."""
    return {name: matrix for name, matrix in table.layers.items() if name is not None}


def read_levels(root: Path) -> dict[str, anndata.AnnData]:
    """The three stores, opened as anybody would."""
    return {level: anndata.read_zarr(root / f"{level}.zarr") for level in LEVELS}


# ------------------------------------------------------------------------------------------- by hand

JUST_ABOVE = 0.5 + 2**-11  # the next number after 0.5 with ten mantissa bits

# tokens of an image (CLS first) -> {latent: value}; tau will be 0.5
HAND: list[tuple[Row, list[dict[int, float]]]] = [
    (("P1", "A", True), [{0: 0.75}, {0: 1.0, 2: 0.5}, {0: 0.25, 3: 2.0}, {3: 0.75}, {}]),
    (("P1", "A", True), [{}, {}, {}, {}, {}]),  # fires nothing, and counts as an image
    (("P1", "A", False), [{}, {}, {}, {}, {}]),  # unreadable: counts nowhere
    (("P2", "B", True), [{1: 1.0, 2: 0.75}, {1: 0.625}, {1: 0.5}, {4: 0.5}, {1: 3.0}]),
    ((None, None, True), [{5: 4.0}, {5: 1.0}, {}, {}, {}]),  # nobody's
    (("P1", "A", True), [{2: 8.0}, {0: 0.75}, {3: 1.0}, {}, {}]),
    (("P3", "A", True), [{0: 1.0}, {0: 1.0}, {0: 1.0}, {0: 1.0}, {0: 1.0}]),
    (("P4", "B", False), [{}, {}, {}, {}, {}]),  # P4 has no other image
    (("P5", None, True), [{}, {4: JUST_ABOVE}, {}, {}, {}]),  # of unknown disease
]


@pytest.fixture(scope="module")
def hand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dense = np.zeros((len(HAND), 5, 6), np.float32)
    for i, (_, tokens) in enumerate(HAND):
        for t, latents in enumerate(tokens):
            for latent, value in latents.items():
                dense[i, t, latent] = value
    return write_latents(tmp_path_factory.mktemp("hand") / "latents.zarr", dense, [row for row, _ in HAND])


# above 0.5, strictly, per image and latent; 0.5 itself never counts (latent 2 of image 0, latents 1 and 4 of image 3)
COUNTS = {
    "all": [
        [2, 0, 0, 2, 0, 0],  # 0.75 and 1.0, not 0.25; 2.0 and 0.75
        [0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [0, 3, 1, 0, 0, 0],  # 1.0, 0.625 and 3.0; 0.75
        [0, 0, 0, 0, 0, 2],  # 4.0 and 1.0
        [1, 0, 1, 1, 0, 0],  # 0.75; 8.0; 1.0
        [5, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 1, 0],  # 0.50048828125
    ],
    "patch": [  # without the first token
        [1, 0, 0, 2, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [0, 2, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 1],
        [1, 0, 0, 1, 0, 0],
        [4, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 1, 0],
    ],
    "cls": [  # the first token only
        [1, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 1],
        [0, 0, 1, 0, 0, 0],
        [1, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
    ],
}
# P1: images 0, 1 and 5, so a third of their sum; P2, P3, P5: one image each
PATIENTS = {
    "all": [[3 / 3, 0, 1 / 3, 3 / 3, 0, 0], [0, 3, 1, 0, 0, 0], [5, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 0]],
    "patch": [[2 / 3, 0, 0, 3 / 3, 0, 0], [0, 2, 0, 0, 0, 0], [4, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 0]],
    "cls": [[1 / 3, 0, 1 / 3, 0, 0, 0], [0, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]],
}
# A: P1 and P3, a half of their sum, whatever their numbers of images; B: P2 (P4 has no barcode)
DISEASES = {
    "all": [[(1 + 5) / 2, 0, 1 / 6, 1 / 2, 0, 0], [0, 3, 1, 0, 0, 0]],
    "patch": [[(2 / 3 + 4) / 2, 0, 0, 1 / 2, 0, 0], [0, 2, 0, 0, 0, 0]],
    "cls": [[(1 / 3 + 1) / 2, 0, 1 / 6, 0, 0, 0], [0, 1, 1, 0, 0, 0]],
}


@pytest.fixture(scope="module")
def counted(hand: Path, threads: Client) -> Callable[[str], tuple[Path, BarcodeResult]]:
    """Token set -> where its barcodes at tau 0.5 lie, and what was said about them; each written once."""

    @cache
    def write(token_set: str) -> tuple[Path, BarcodeResult]:
        root = hand.with_name(token_set)
        return root, write_barcodes(hand, root, BarcodeConfig(tau=0.5, token_set=token_set), client=threads)

    return write


@pytest.mark.parametrize("token_set", ["all", "patch", "cls"])
def test_counts_and_means_are_those_worked_out_by_hand(
    counted: Callable[[str], tuple[Path, BarcodeResult]], token_set: str
) -> None:
    found = read_levels(counted(token_set)[0])
    assert found["image"].X.toarray().tolist() == COUNTS[token_set]
    assert found["patient"].X.toarray().tolist() == np.array(PATIENTS[token_set], np.float32).tolist()
    assert found["disease"].X.toarray().tolist() == np.array(DISEASES[token_set], np.float32).tolist()


def test_the_released_divisor_is_the_number_of_latents(hand: Path, tmp_path: Path, threads: Client) -> None:
    """Quirk 19: sums over a patient's images divided by 6, the length of the vector; diseases average that."""
    config = BarcodeConfig(tau=0.5, normalize="cytosae-release")
    write_barcodes(hand, tmp_path / "barcodes", config, client=threads)
    found = read_levels(tmp_path / "barcodes")
    patients = [
        [3 / 6, 0, 1 / 6, 3 / 6, 0, 0],
        [0, 3 / 6, 1 / 6, 0, 0, 0],
        [5 / 6, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 1 / 6, 0],
    ]
    # A: (3/6 + 5/6) / 2 = 2/3, (1/6 + 0) / 2 = 1/12, (3/6 + 0) / 2 = 1/4
    diseases = [[2 / 3, 0, 1 / 12, 1 / 4, 0, 0], [0, 3 / 6, 1 / 6, 0, 0, 0]]
    assert found["image"].X.toarray().tolist() == COUNTS["all"]
    assert found["patient"].X.toarray().tolist() == np.array(patients, np.float32).tolist()
    assert found["disease"].X.toarray().tolist() == np.array(diseases, np.float32).tolist()
    assert found["patient"].uns["cyto"]["normalize"] == "cytosae-release"
    assert found["patient"].uns["cyto"]["unit_patient"] == "tokens above tau / n_latents"


def test_layers_and_tables_are_those_worked_out_by_hand(
    counted: Callable[[str], tuple[Path, BarcodeResult]],
) -> None:
    root, result = counted("all")
    found = read_levels(root)
    image, patient, disease = found["image"], found["patient"], found["disease"]

    largest, mean = image.layers["max"].toarray(), image.layers["mean"].toarray()
    assert largest[0].tolist() == [1.0, 0, 0.5, 2.0, 0, 0]
    assert largest[3].tolist() == [0, 3.0, 0.75, 0, 0.5, 0]
    # means over all five tokens: (0.75 + 1 + 0.25) / 5, 0.5 / 5, (2 + 0.75) / 5
    assert mean[0].tolist() == np.array([0.4, 0, 0.1, 0.55, 0, 0], np.float32).tolist()
    # (1 + 0.625 + 0.5 + 3) / 5, 0.75 / 5, 0.5 / 5
    assert mean[3].tolist() == np.array([0, 1.025, 0.15, 0, 0.1, 0], np.float32).tolist()
    assert not mean[[1, 2, 7]].any()

    # P1: images 0 and 5, 0.4 + 0.75 / 5, 0.5 / 5 + 8 / 5, 0.55 + 1 / 5; a value at tau is activity all the same
    assert patient.layers["activation_sum"][0].toarray().ravel() == pytest.approx([0.55, 0, 1.7, 0.75, 0, 0])
    assert patient.layers["n_active_images"].toarray().tolist() == [
        [2, 0, 2, 2, 0, 0],
        [0, 1, 1, 0, 1, 0],
        [1, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 1, 0],
    ]

    assert list(patient.obs_names) == ["P1", "P2", "P3", "P5"]  # P4 has no readable image
    assert patient.obs["disease"].tolist() == ["A", "B", "A", ""]
    assert patient.obs["n_images"].tolist() == [3, 1, 1, 1]
    assert patient.obs["n_unreadable"].tolist() == [1, 0, 0, 0]
    assert list(disease.obs_names) == ["A", "B"]
    assert disease.obs["n_patients"].tolist() == [2, 1]
    assert disease.obs["n_images"].tolist() == [4, 1]
    assert list(image.obs_names) == [f"drawn/{i:04d}.png" for i in range(9)]
    assert image.obs["status"].tolist() == ["unreadable" if i in (2, 7) else "ok" for i in range(9)]
    assert image.obs["patient"].tolist() == ["P1", "P1", "P1", "P2", "", "P1", "P3", "P4", "P5"]
    assert image.obs["stain"].tolist() == ["pale"] * 9  # the user's own column travels along

    var = image.var
    assert var["latent"].tolist() == [0, 1, 2, 3, 4, 5]
    assert var["n_active_images"].tolist() == [3, 1, 3, 2, 2, 1]  # of 7 readable ones, nobody's included
    assert var["frequency"].tolist() == pytest.approx([3 / 7, 1 / 7, 3 / 7, 2 / 7, 2 / 7, 1 / 7])
    # over the images where it is active: (0.4 + 0.15 + 1) / 3, 1.025, (0.1 + 0.15 + 1.6) / 3, (0.55 + 0.2) / 2,
    # (0.1 + 0.50048828125 / 5) / 2, (4 + 1) / 5
    activation = [1.55 / 3, 1.025, 1.85 / 3, 0.375, 0.100048828125, 1.0]
    assert var["mean_activation"].tolist() == pytest.approx(activation)
    assert var["max_activation"].tolist() == [1.0, 3.0, 8.0, 2.0, JUST_ABOVE, 4.0]
    assert var["n_tokens_above_tau"].tolist() == [8, 3, 2, 3, 1, 2]

    # nonzeros of the images: 6 + 6 + 2 + 3 + 5 + 1 = 23; above tau, by latent: 8 + 3 + 2 + 3 + 1 + 2 = 19
    assert result == BarcodeResult(
        out=root,
        taus=(0.5,),
        n_images=7,
        n_unreadable=2,
        n_without_patient=1,
        n_patients=4,
        n_patients_unreadable=1,
        n_patients_without_disease=1,
        n_diseases=2,
        n_latents=6,
        n_silent_latents=(0,),
        share_above_tau=(19 / 23,),
        was_complete=False,
    )


def test_each_store_is_a_whole_anndata_with_its_provenance(
    counted: Callable[[str], tuple[Path, BarcodeResult]],
) -> None:
    """int32 indices and float32 values, as scanpy takes them; tau, token set and unit travel with the numbers."""
    root, _ = counted("patch")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = read_levels(root)
    layers = {"image": {"max", "mean"}, "patient": {"activation_sum", "n_active_images"}, "disease": set()}
    for level, table in found.items():
        mine = layers_of(table)
        assert set(mine) == layers[level]
        for matrix in (table.X, *mine.values()):
            assert matrix.format == "csr"
            assert matrix.dtype == np.float32
            assert matrix.indices.dtype == matrix.indptr.dtype == np.int32  # else scipy cannot work in place
            assert matrix.has_canonical_format
            assert (matrix.data != 0).all()
        cyto = table.uns["cyto"]
        assert (cyto["tau"], cyto["token_set"], cyto["normalize"]) == (0.5, "patch", "images")
        assert (cyto["sae_sha256"], cyto["cache_sha256"]) == ("1" * 64, "2" * 64)
        assert (cyto["unit_image"], cyto["value_bits"]) == ("tokens above tau", 10)
        assert not cyto["backbone_trained"]
        assert list(table.var_names) == [str(i) for i in range(6)]
    store = BarcodeStore(root)
    assert np.array_equal(store.read("patient").X.toarray(), found["patient"].X.toarray())
    with pytest.raises(BadInput, match="has no 'cell' barcodes; it holds image, patient, disease"):
        store.read("cell")
    images = store.read("image").X.toarray()
    assert np.array_equal(store.read_rows("image", [0, 2, 2]).toarray(), images[[0, 2, 2]])
    assert store.read_rows("image", []).shape == (0, 6)
    for not_whole in (np.ones(len(images), bool), [1.0], 1):
        with pytest.raises(TypeError, match="rows must be a list of whole numbers"):
            store.read_rows("image", not_whole)
    for rows in ([-1], [len(images)], np.array([2**63], np.uint64), [1, 0]):
        with pytest.raises(IndexError, match=r"outside 0\.\.|in ascending order"):
            store.read_rows("image", rows)


def test_a_larger_tau_counts_less_and_says_what_never_exceeds_it(hand: Path, tmp_path: Path, threads: Client) -> None:
    """At tau 2: 8.0, 3.0 and 4.0 remain (2.0 itself does not count): latents 0, 3 and 4 are silent."""
    result = write_barcodes(hand, tmp_path / "barcodes", BarcodeConfig(tau=2), client=threads)
    assert result.n_silent_latents == (3,)
    assert result.share_above_tau == (3 / 23,)
    counts = read_levels(tmp_path / "barcodes")["image"].X.toarray()
    assert np.argwhere(counts).tolist() == [[3, 1], [4, 5], [5, 2]]


# ------------------------------------------------------------------------------------------- twins


DISEASE_OF = {"Zoe": "flu", "Abe": "cold", "Mia": "flu"}  # Bo's is unknown
rows_of_images = st.lists(
    st.tuples(st.sampled_from([None, "Zoe", "Abe", "Mia", "Bo"]), st.booleans()), min_size=1, max_size=12
).map(lambda drawn: [(patient, DISEASE_OF.get(patient or ""), ok) for patient, ok in drawn])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    shape=st.tuples(st.integers(0, 8), st.integers(2, 7), st.integers(1, 12) | st.sampled_from([63, 64, 65, 130])),
    share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    taus=st.sampled_from([(0.0,), (0.2,), (0.1, 0.2, 1.0)]),
    token_set=st.sampled_from(["all", "patch", "cls"]),
    piece=st.integers(1, 40),
)
def test_counting_tokens_equals_the_twins(
    seed: int, shape: tuple[int, int, int], share: float, taus: tuple[float, ...], token_set: str, piece: int
) -> None:
    """Image by image and latent by latent: counts, largest and mean; entries given in pieces that cut rows anywhere."""
    n_images, n_tokens, n_latents = shape
    dense = random_latents(seed, shape, [("P", "D", True)] * n_images, share=share).reshape(-1, n_latents)
    indptr = 1000 + np.concatenate([[0], np.cumsum((dense != 0).sum(axis=1))])
    indices, values = np.nonzero(dense)[1].astype(np.uint16), dense[dense != 0]
    counter = ImageCounter(
        indptr, n_latents=n_latents, tokens_per_image=n_tokens, taus=taus, token_set=token_set, place="here"
    )
    for at in range(0, len(values), piece):
        counter.add(1000 + at, indices[at : at + piece], values[at : at + piece])
    found = counter.finish()
    assert len(found.indptr) == n_images + 1
    image_of = np.repeat(np.arange(n_images), np.diff(found.indptr))

    def table(entries: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        whole = np.zeros((n_images, n_latents))
        whole[image_of, found.latent] = entries
        return whole

    if n_images:
        for t, tau in enumerate(taus):
            counts = reference.image_counts(dense, tau, n_tokens, token_set)
            assert np.array_equal(table(found.count[t]), counts)
            assert np.array_equal(found.n_above[t], (counts > 0).sum(axis=1))
        assert np.array_equal(table(found.max), reference.image_max(dense, n_tokens, token_set))
        mean = reference.image_mean(dense, n_tokens, token_set)
        np.testing.assert_allclose(table(found.mean), mean, rtol=1e-7)
        assert np.array_equal(table(found.mean) > 0, mean > 0)
    in_row = image_of[1:] == image_of[:-1]
    assert (np.diff(found.latent.astype(int))[in_row] > 0).all()
    assert found.n_values == sum((image != 0).sum() for image in reference.images_of(dense, n_tokens, token_set))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.lists(st.integers(0, 6), max_size=3), min_size=1, max_size=6),
    bad=st.none() | st.tuples(st.integers(0, 17), st.sampled_from([0.0, -1.0, np.nan, np.inf])),
    piece=st.integers(1, 18),
)
def test_rows_that_break_a_promise_are_never_counted(
    rows: list[list[int]], bad: tuple[int, float] | None, piece: int
) -> None:
    """Indices that do not rise in their row or are no latent, values that no latent has; wherever pieces are cut."""
    values = np.ones(sum(map(len, rows)), np.float32)
    is_sound = all(a < b for row in rows for a, b in pairwise(row)) and all(index < 6 for row in rows for index in row)
    if bad is not None and bad[0] < len(values):
        values[bad[0]], is_sound = bad[1], False
    indptr = np.cumsum([7, *map(len, rows)])
    counter = ImageCounter(indptr, n_latents=6, tokens_per_image=1, taus=(0.5,), token_set="all", place="here")
    indices = np.array([index for row in rows for index in row], np.uint16)

    def count() -> list[int]:
        for at in range(0, len(values), piece):
            counter.add(7 + at, indices[at : at + piece], values[at : at + piece])
        return counter.finish().latent.tolist()

    if is_sound:
        assert count() == indices.tolist()
    else:
        with pytest.raises(DamagedStore, match="here: "):
            count()


@pytest.mark.parametrize("indices", [[-1], [-5, 2], [3, -1], [-(2**31)]])
def test_an_index_below_zero_is_never_counted(indices: list[int]) -> None:
    """Of a store whose indices have a sign; the compiled code would write outside of its arrays."""
    counter = ImageCounter(
        np.array([0, len(indices)]), n_latents=6, tokens_per_image=1, taus=(0.5,), token_set="all", place="here"
    )
    with pytest.raises(DamagedStore, match="here: indices out of range or not increasing"):
        counter.add(0, np.array(indices, np.int32), np.ones(len(indices), np.float32))


@settings(max_examples=4, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    rows=rows_of_images,
    n_tokens=st.integers(1, 6),
    n_latents=st.integers(1, 9),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    tau=st.sampled_from([0.0, 0.2, 1.0]),
    token_set=st.sampled_from(["all", "patch", "cls"]),
    partition_images=st.integers(1, 13),
)
def test_barcodes_equal_the_twins(
    tmp_path_factory: pytest.TempPathFactory,
    threads: Client,
    seed: int,
    rows: list[Row],
    n_tokens: int,
    n_latents: int,
    share: float,
    tau: float,
    token_set: str,
    partition_images: int,
) -> None:
    """Any store, whatever is empty in it: counts, largest and mean activations, patients, diseases."""
    n_tokens += token_set == "patch"
    dense = random_latents(seed, (len(rows), n_tokens, n_latents), rows, share=share)
    root = tmp_path_factory.mktemp("twin")
    write_latents(root / "latents.zarr", dense, rows)
    config = BarcodeConfig(tau=tau, token_set=token_set, partition_images=partition_images)
    write_barcodes(root / "latents.zarr", root / "barcodes", config, client=threads)
    found = read_levels(root / "barcodes")

    flat = dense.reshape(-1, n_latents)
    counts = reference.image_counts(flat, tau, n_tokens, token_set)
    assert np.array_equal(found["image"].X.toarray(), counts)
    largest = reference.image_max(flat, n_tokens, token_set)
    assert np.array_equal(found["image"].layers["max"].toarray(), largest)
    mean = reference.image_mean(flat, n_tokens, token_set)
    np.testing.assert_allclose(found["image"].layers["mean"].toarray(), mean, rtol=1e-6)

    readable = np.array([ok for _, _, ok in rows])
    patients = [patient for patient, _, _ in rows]
    names, patient_means, n_images = reference.patient_barcodes(counts, readable, patients)
    assert list(found["patient"].obs_names) == names
    assert found["patient"].obs["n_images"].tolist() == n_images.tolist()
    assert np.array_equal(found["patient"].X.toarray(), patient_means.astype(np.float32))
    _, activation, _ = reference.patient_barcodes(mean, readable, patients)
    sums = activation * n_images[:, None]
    np.testing.assert_allclose(found["patient"].layers["activation_sum"].toarray(), sums, rtol=1e-6)
    _, active, _ = reference.patient_barcodes(largest > 0, readable, patients)
    active_images = found["patient"].layers["n_active_images"].toarray()
    assert np.array_equal(active_images, np.round(active * n_images[:, None]))

    diseases, disease_means = reference.disease_barcodes(patient_means, [DISEASE_OF.get(name) for name in names])
    assert list(found["disease"].obs_names) == diseases
    np.testing.assert_allclose(found["disease"].X.toarray(), disease_means, rtol=1e-6)


def test_denormal_latents_stay_active(tmp_path: Path, threads: Client) -> None:
    """With all 23 bits kept a mean over the tokens can be zero in float32: it is kept as the least number there is."""
    dense = np.zeros((2, 5, 3), np.float32)
    dense[0, 1, 1] = 2.0**-149
    dense[1, :, 2] = 1
    write_latents(tmp_path / "latents.zarr", dense, [("P", "D", True)] * 2, value_bits=23)
    write_barcodes(tmp_path / "latents.zarr", tmp_path / "barcodes", BarcodeConfig(), client=threads)
    image = read_levels(tmp_path / "barcodes")["image"]
    assert image.layers["max"].toarray()[0].tolist() == [0, 2.0**-149, 0]
    assert image.layers["mean"].toarray().tolist() == [[0, 2.0**-149, 0], [0, 0, 1]]
    assert image.var["n_active_images"].tolist() == [0, 1, 1]


# ------------------------------------------------------------------------------------------- the same bytes


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory, threads: Client) -> Path:
    """latents.zarr: 260 images (more than are added up at a time), 9 patients; barcodes: what one partition gives."""
    root = tmp_path_factory.mktemp("many")
    rng = np.random.default_rng(0)
    rows: list[Row] = []
    for i in range(260):
        patient = int(rng.integers(10))
        rows.append((f"P{patient}" if patient else None, f"D{patient % 3}" if patient else None, i % 41 != 0))
    write_latents(root / "latents.zarr", random_latents(1, (260, 5, 30), rows), rows)
    write_barcodes(root / "latents.zarr", root / "barcodes", BarcodeConfig(partition_images=260), client=threads)
    return root


@pytest.mark.stress
@pytest.mark.parametrize(
    ("workers", "partition_images"),
    [("processes", 7), ("threads", 4), ("one thread", 256)],
)
def test_every_byte_is_the_same_whoever_counts(
    many: Path, tmp_path: Path, request: pytest.FixtureRequest, workers: str, partition_images: int
) -> None:
    """Blocks of any size, one or two workers, processes or threads: integers, and sums in a fixed order."""
    config = BarcodeConfig(partition_images=partition_images)
    if workers == "one thread":
        with local_client(1, 1) as client:
            write_barcodes(many / "latents.zarr", tmp_path / "barcodes", config, client=client)
    else:
        client = request.getfixturevalue(workers)
        write_barcodes(many / "latents.zarr", tmp_path / "barcodes", config, client=client)
    assert contents(tmp_path / "barcodes") == contents(many / "barcodes")


@pytest.mark.stress
@pytest.mark.parametrize("workers", ["threads", "processes"])
def test_a_killed_job_continues_from_its_parts(
    many: Path, tmp_path: Path, request: pytest.FixtureRequest, workers: str
) -> None:
    """Broken off, at once repeated on the same cluster, and again; cancelled tasks may still run."""
    client, seen = request.getfixturevalue(workers), []

    def interrupt(done: int, total: int, state: str) -> None:
        seen.append(done)
        if len(seen) > 2 or state == "joining":  # by the third time all may be there
            raise KeyboardInterrupt

    config = BarcodeConfig(partition_images=10)
    for _ in range(3):
        seen.clear()
        with pytest.raises(KeyboardInterrupt):
            write_barcodes(many / "latents.zarr", tmp_path / "barcodes", config, client=client, progress=interrupt)
        with pytest.raises(IncompleteStore, match="Run the same cyto barcode command again"):
            BarcodeStore(tmp_path / "barcodes")
    assert seen[0] >= 40  # two partitions in each of the runs before
    seen.clear()
    write_barcodes(
        many / "latents.zarr",
        tmp_path / "barcodes",
        config,
        client=client,
        progress=lambda done, total, state: seen.append(done),
    )
    assert seen[0] >= 60
    assert seen[-1] == 260
    assert contents(tmp_path / "barcodes") == contents(many / "barcodes")
    assert len(read_runs(tmp_path / "barcodes")) == 4


def interrupted(many: Path, barcodes: Path, client: Client, partition_images: int, n_partitions: int) -> Path:
    """A job that was broken off after so many partitions of its parts; where they lie."""
    seen: list[int] = []

    def interrupt(done: int, total: int, state: str) -> None:
        seen.append(done)
        if len(seen) > n_partitions:
            raise KeyboardInterrupt

    config = BarcodeConfig(partition_images=partition_images)
    with pytest.raises(KeyboardInterrupt):
        write_barcodes(many / "latents.zarr", barcodes, config, client=client, progress=interrupt)
    return barcodes / "parts"


def counted_partitions(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """A list that fills with the images of every partition that is counted from here on, in this process."""
    counted: list[tuple[int, int]] = []

    def noted(path: Path, *, shape: tuple[int, int], start: int, stop: int) -> csr_bulk.EntryReader:
        counted.append((start // 5, stop // 5))
        return csr_bulk.EntryReader(path, shape=shape, start=start, stop=stop)

    monkeypatch.setattr(barcode_tasks, "EntryReader", noted)
    return counted


@pytest.mark.stress
def test_parts_of_any_size_are_used_and_gaps_are_filled(
    many: Path, tmp_path: Path, threads: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job may go on with other partitions (more memory, say): what is counted stays counted."""
    parts = interrupted(many, tmp_path / "barcodes", threads, partition_images=10, n_partitions=5)
    time.sleep(0.2)  # cancelled tasks may still be at it
    there = sorted(path.name for path in parts.glob("*.part"))
    assert len(there) >= 5
    (parts / there[2]).unlink()
    n_there = len(list(parts.glob("*.part")))
    counted = counted_partitions(monkeypatch)
    config = BarcodeConfig(partition_images=64)
    write_barcodes(many / "latents.zarr", tmp_path / "barcodes", config, client=threads)
    assert sum(stop - start for start, stop in counted) == 260 - 10 * n_there
    assert (20, 30) in counted
    assert contents(tmp_path / "barcodes") == contents(many / "barcodes")


@pytest.mark.stress
def test_damaged_parts_are_counted_anew(
    many: Path, tmp_path: Path, threads: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torn, empty, flipped, of another job, without a header, of a shape that no memory holds: a partition each."""
    for name, tau in {"barcodes": 0.2, "other": 0.5}.items():
        config = BarcodeConfig(tau=tau, partition_images=40)
        with pytest.raises(KeyboardInterrupt):
            write_barcodes(many / "latents.zarr", tmp_path / name, config, client=threads, progress=stop_when_counted)
    parts = sorted((tmp_path / "barcodes" / "parts").glob("*.part"))
    assert len(parts) == 7
    raw = [path.read_bytes() for path in parts]
    parts[0].write_bytes(raw[0][:-5])
    parts[1].write_bytes(b"")
    middle = len(raw[2]) // 2
    parts[2].write_bytes(raw[2][:middle] + bytes([raw[2][middle] ^ 1]) + raw[2][middle + 1 :])
    shutil.copy(tmp_path / "other" / "parts" / parts[3].name, parts[3])
    parts[4].write_bytes(b"x" * len(raw[4]))
    parts[5].write_bytes(raw[5].replace(b"[41]", b"[9e9]", 1))
    counted = counted_partitions(monkeypatch)
    write_barcodes(many / "latents.zarr", tmp_path / "barcodes", BarcodeConfig(), client=threads)
    assert sorted(counted) == [(start, start + 40) for start in range(0, 240, 40)]
    assert contents(tmp_path / "barcodes") == contents(many / "barcodes")


def stop_when_counted(done: int, total: int, state: str) -> None:
    if state == "joining":
        raise KeyboardInterrupt


@pytest.mark.stress
def test_many_small_pieces_give_the_same_numbers(
    many: Path, tmp_path: Path, threads: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of seven entries, tasks of few groups, waves, a tree of many levels: partitions still change no byte."""
    monkeypatch.setattr(csr_bulk, "CHUNK_ENTRIES", 7 * 512)
    monkeypatch.setattr(barcodes_module, "_FILL_CHUNKS", 1)
    for name, value in {"_GROUP_ENTRIES": 300, "_WAVE": 5, "_FAN_IN": 2}.items():
        monkeypatch.setattr(barcodes_module, name, value)
    for partition in (7, 260):
        config = BarcodeConfig(partition_images=partition)
        write_barcodes(many / "latents.zarr", tmp_path / f"{partition}", config, client=threads)
    assert contents(tmp_path / "7") == contents(tmp_path / "260")
    found, expected = read_levels(tmp_path / "7"), read_levels(many / "barcodes")
    for level in LEVELS:
        for name in (None, *layers_of(expected[level])):
            ours, theirs = (each[level].layers[name] if name else each[level].X for each in (found, expected))
            assert np.array_equal(ours.indptr, theirs.indptr)
            assert np.array_equal(ours.indices, theirs.indices)
            np.testing.assert_allclose(ours.data, theirs.data, rtol=1e-6)
    assert found["image"].var["n_active_images"].equals(expected["image"].var["n_active_images"])
    np.testing.assert_allclose(found["image"].var["mean_activation"], expected["image"].var["mean_activation"])


@pytest.mark.stress
def test_many_patients_cost_what_they_have(tmp_path: Path, threads: Client) -> None:
    """3,000 patients of one image and 49,152 latents: 1.2 GB if any step held a number for each pair."""
    n, n_latents = 3000, 49_152
    people: list[Row] = [(f"{(7 * i) % n:04d}", "ABC"[i % 3], True) for i in range(n)]
    rng = np.random.default_rng(0)
    latent = np.sort(rng.choice(n_latents, (n, 2), replace=True) // 2 * 2 + [0, 1], axis=1)
    root = write_latents(tmp_path / "few.zarr", np.zeros((n, 1, 1), np.float32), people)  # for its image table
    spec = LatentSpec(**{**LatentStore(root).header.spec, "n_latents": n_latents})
    writer = LatentWriter(tmp_path / "latents.zarr", spec, LatentStore(root).images)
    writer.append_tokens(latent.ravel(), np.ones(2 * n, np.float32), np.full(n, 2))
    writer.commit(n)
    writer.finish()
    tracemalloc.start()
    write_barcodes(tmp_path / "latents.zarr", tmp_path / "barcodes", BarcodeConfig(), client=threads)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    found = anndata.read_zarr(tmp_path / "barcodes" / "patient.zarr")
    assert found.obs_names.tolist() == [f"{i:04d}" for i in range(n)]
    order = np.argsort([str(name) for name, _, _ in people])
    assert np.array_equal(found.X.indices.reshape(n, 2), latent[order])
    assert peak < 200e6


def test_partitions_follow_the_memory_of_the_workers(many: Path, tmp_path: Path) -> None:
    """A partition's result has at most an entry per nonzero: half the memory, half the partition."""
    sizes = {}
    for limit in (1 << 16, 1 << 15, 0):

        class Cluster:
            def scheduler_info(self) -> dict[str, Any]:
                return {"workers": {"a": {"memory_limit": limit, "nthreads": 1}}}  # noqa: B023

        cluster: Any = Cluster()
        partitions = list(plan_partitions([LatentStore(many / "latents.zarr")], tmp_path, cluster, n_taus=1))
        assert [partition.start for partition in partitions[1:]] == [partition.stop for partition in partitions[:-1]]
        assert (partitions[0].start, partitions[-1].stop) == (0, 260)
        sizes[limit] = partitions[0].stop
    assert sizes[0] == 260  # no limit
    assert 1 <= sizes[1 << 15] < sizes[1 << 16] < 260


def test_partitions_become_smaller_to_the_end(many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that all threads end together; every image in one partition, whatever their number."""
    monkeypatch.setattr(partitions_module, "_LAST_ENTRIES", 500)
    for n_threads in (1, 2, 1000):

        class Cluster:
            def scheduler_info(self) -> dict[str, Any]:
                return {"workers": {"a": {"memory_limit": 0, "nthreads": n_threads}}}  # noqa: B023

        cluster: Any = Cluster()
        partitions = list(plan_partitions([LatentStore(many / "latents.zarr")], tmp_path, cluster, n_taus=1))
        assert [partition.start for partition in partitions[1:]] == [partition.stop for partition in partitions[:-1]]
        assert (partitions[0].start, partitions[-1].stop) == (0, 260)
        sizes = [partition.stop - partition.start for partition in partitions]
        assert sizes[:-1] == sorted(sizes[:-1], reverse=True)
        assert sizes[-1] <= 260 * 500 // LatentStore(many / "latents.zarr").nnz + 1
        assert len(partitions) >= min(3 * n_threads, 20)
        if n_threads == 1:
            assert 80 <= sizes[0] <= 90  # a third


def test_row_starts_are_never_those_of_a_store_that_was_there_before(tmp_path: Path) -> None:
    """A worker keeps some of them, and lives longer than a store."""
    for n_nonzero in (1, 3):
        dense = np.zeros((4, 2, 5), np.float32)
        dense[:, :, :n_nonzero] = 1
        shutil.rmtree(tmp_path / "l.zarr", ignore_errors=True)
        write_latents(tmp_path / "l.zarr", dense, [("P", "D", True)] * 4)
        for _ in range(2):
            reader = csr_bulk.EntryReader(tmp_path / "l.zarr" / "X", shape=(8, 5), start=2, stop=8)
            assert reader.row_starts.tolist() == [n_nonzero * row for row in range(2, 9)]


def test_a_store_with_other_codecs_counts_the_same(many: Path, tmp_path: Path, threads: Client) -> None:
    """What we do not decode ourselves goes through zarr."""
    latents = Path(shutil.copytree(many / "latents.zarr", tmp_path / "latents.zarr"))
    for name, codec in {"indices": GzipCodec(), "data": None}.items():
        array = zarr.open_array(latents / "X" / name, mode="r")
        values, fill = np.asarray(array[:]), array.fill_value
        zarr.create_array(
            latents / "X",
            name=name,
            shape=values.shape,
            dtype=values.dtype,
            chunks=(1000,),
            compressors=codec,
            fill_value=fill,
            overwrite=True,
        )[:] = values
    write_barcodes(latents, tmp_path / "barcodes", BarcodeConfig(), client=threads)
    assert contents(tmp_path / "barcodes") == contents(many / "barcodes")
    (latents / "X" / "data" / "c" / "1").unlink()
    with pytest.raises(DamagedStore, match=r"X/data/c/1 is missing"):
        list(csr_bulk.EntryReader(latents / "X", shape=(1300, 30), start=0, stop=1300).entries())


@pytest.mark.stress
def test_complete_barcodes_are_not_counted_again(hand: Path, tmp_path: Path, threads: Client) -> None:
    barcodes = tmp_path / "barcodes"
    first = write_barcodes(hand, barcodes, BarcodeConfig(), client=threads)
    again = write_barcodes(
        hand,
        barcodes,
        BarcodeConfig(partition_images=5),  # decides speed only: the same settings
        client=threads,
        progress=lambda *_: pytest.fail("it counted"),
    )
    assert again.was_complete
    assert {**vars(again), "was_complete": False} == vars(first)
    with pytest.raises(SpecMismatch, match=r"with other settings \(tau 0.2 against 0.3\).*--overwrite"):
        write_barcodes(hand, barcodes, BarcodeConfig(tau=0.3), client=threads)
    write_barcodes(hand, barcodes, BarcodeConfig(tau=0.3), client=threads, overwrite=True)
    assert BarcodeStore(barcodes).header.spec["tau"] == 0.3


# ----------------------------------------------------------------------------- several taus, stores, tables


@pytest.mark.stress
def test_several_taus_in_one_pass_equal_single_ones(many: Path, tmp_path: Path, threads: Client) -> None:
    """Each tau has whole stores of its own, the very bytes (but for the hash) that a job of its own would give."""
    result = write_barcodes(many / "latents.zarr", tmp_path / "all", BarcodeConfig(tau=(1.0, 0.2)), client=threads)
    names = {path.name for path in (tmp_path / "all").iterdir()}
    assert {"image_tau0.2.zarr", "image_tau1.zarr", "patient_tau1.parquet"} <= names
    assert "image.zarr" not in names
    store = BarcodeStore(tmp_path / "all")
    store.check()
    assert store.taus == (0.2, 1.0)
    for number, tau in enumerate((0.2, 1.0)):
        single = write_barcodes(
            many / "latents.zarr", tmp_path / f"{tau}", BarcodeConfig(tau=tau), client=threads, overwrite=True
        )
        assert result.n_silent_latents[number] == single.n_silent_latents[0]
        assert result.share_above_tau[number] == single.share_above_tau[0]
        for level in LEVELS:
            ours, theirs = store.path(level, tau), tmp_path / f"{tau}" / f"{level}.zarr"
            found, expected = contents(ours), contents(theirs)
            differ = [name for name in expected if found.get(name) != expected[name]]
            assert all(name.startswith("uns/cyto/identity/") for name in differ)
            assert store.read(level, tau).uns["cyto"]["tau"] == tau
            if level != "image":
                exported = pq.read_table(ours.with_suffix(".parquet"))
                assert exported.equals(pq.read_table(theirs.with_suffix(".parquet")))
    with pytest.raises(BadInput, match=r"several tau: choose one of 0.2, 1$"):
        store.read("image")
    with pytest.raises(BadInput, match=r"no barcodes at tau 0.5; it holds 0.2, 1$"):
        store.path("image", 0.5)


def test_parquet_beside_the_stores_says_the_same(counted: Callable[[str], tuple[Path, BarcodeResult]]) -> None:
    root, _ = counted("all")
    found = read_levels(root)
    for level, layers in {"patient": ["activation_sum", "n_active_images"], "disease": []}.items():
        table = pq.read_table(root / f"{level}.parquet").to_pandas()
        assert list(table.columns) == [level, "latent", "value", *layers]
        for column, matrix in {"value": found[level].X, **layers_of(found[level])}.items():
            dense = np.zeros(matrix.shape)
            dense[found[level].obs_names.get_indexer(table[level]), table["latent"]] = table[column]
            np.testing.assert_array_equal(dense.astype(np.float32), matrix.toarray())


def test_damaged_exports_are_not_already_complete(many: Path, tmp_path: Path, threads: Client) -> None:
    """Missing, torn, or another file in their place."""
    barcodes = Path(shutil.copytree(many / "barcodes", tmp_path / "barcodes"))
    export = barcodes / "patient.parquet"
    raw = export.read_bytes()
    for wrong, words in {
        None: "missing",
        raw[:-9]: "damaged",
        (barcodes / "disease.parquet").read_bytes(): "damaged",
    }.items():
        export.unlink()
        if wrong is not None:
            export.write_bytes(wrong)
        with pytest.raises(
            DamagedStore, match=rf"patient.parquet is {words}.*; count again with cyto barcode --overwrite"
        ):
            write_barcodes(many / "latents.zarr", barcodes, BarcodeConfig(), client=threads)
        export.write_bytes(raw)
    assert write_barcodes(many / "latents.zarr", barcodes, BarcodeConfig(), client=threads).was_complete


@pytest.fixture(scope="module")
def two_datasets(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """North and south, with a patient "1" each, a patient of the same name in one only, and one disease in both."""
    root = tmp_path_factory.mktemp("datasets")
    rows: dict[str, list[Row]] = {
        "north": [("1", "flu", True), ("1", "flu", True), ("7", "cold", True)],
        "south": [("1", "cold", True), ("8", "flu", True), (None, None, True)],
    }
    dense = np.zeros((3, 2, 4), np.float32)
    dense[:, 0, :] = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0]]
    for scale, (name, drawn) in enumerate(rows.items()):
        write_latents(root / f"{name}.zarr", dense + dense * scale * [0, 0, 0, 1], drawn, dataset=name)
    return [root / "north.zarr", root / "south.zarr"]


@pytest.mark.stress
def test_two_datasets_side_by_side(two_datasets: list[Path], tmp_path: Path, threads: Client) -> None:
    """Rows one after the other; a "1" here and a "1" there are two people; a disease is the same everywhere."""
    result = write_barcodes(two_datasets, tmp_path / "barcodes", BarcodeConfig(partition_images=2), client=threads)
    assert (result.n_images, result.n_patients, result.n_diseases, result.n_without_patient) == (6, 4, 2, 1)
    found = read_levels(tmp_path / "barcodes")
    assert found["image"].obs_names.tolist() == [f"{d}/{i:04d}.png" for d in ("north", "south") for i in range(3)]
    assert found["image"].X.toarray().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0]] * 2
    patients = found["patient"]
    assert patients.obs_names.tolist() == ["north/1", "south/1", "7", "8"]
    assert patients.obs["patient_id"].tolist() == ["1", "1", "7", "8"]
    assert patients.obs["dataset"].tolist() == ["north", "south", "north", "south"]
    assert patients.X.toarray().tolist() == [[1, 0.5, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [1, 1, 0, 0]]
    # cold: 7 and south/1; flu: north/1 and 8
    assert found["disease"].X.toarray().tolist() == [[0.5, 0, 0.5, 0], [1, 0.75, 0, 0]]
    assert found["disease"].obs["n_patients"].tolist() == [2, 2]
    assert len(found["patient"].uns["cyto"]["latents"]) == 2
    alone = write_barcodes([two_datasets[0]], tmp_path / "alone", BarcodeConfig(), client=threads)
    assert alone.n_patients == 2
    assert read_levels(tmp_path / "alone")["patient"].obs_names.tolist() == ["1", "7"]


def test_stores_that_do_not_go_together_are_refused(two_datasets: list[Path], tmp_path: Path, threads: Client) -> None:
    north = two_datasets[0]
    with pytest.raises(BadInput, match=r"3 image ids of .*north.zarr are also in .*north.zarr \(north/0000.png, "):
        write_barcodes([north, north], tmp_path / "barcodes", BarcodeConfig(), client=threads)
    dense = np.ones((1, 2, 4), np.float32)
    other = write_latents(tmp_path / "o.zarr", dense, [("P", "D", True)], dataset="east", sae_sha256="3" * 64)
    with pytest.raises(SpecMismatch, match=r"o.zarr and .*north.zarr hold latents of different SAEs \(sae_sha256 333"):
        write_barcodes([north, other], tmp_path / "barcodes", BarcodeConfig(), client=threads)
    assert not (tmp_path / "barcodes").exists()


def test_latents_of_other_tokens_are_refused(two_datasets: list[Path], tmp_path: Path, threads: Client) -> None:
    """One SAE encodes any cache of its width with --assume-compatible; their barcodes are still not comparable."""
    dense, one = np.ones((1, 2, 4), np.float32), [("P", "D", True)]
    kinds: list[tuple[dict[str, Any], str]] = [
        ({"block": 9}, "block 9 against 10"),
        ({"weights_sha256": "f" * 64}, "weights_sha256 ffffffffffff… against nothing"),
        ({"transform": {"size": 98}}, "transform.size 98 against nothing"),
    ]
    for number, (kind, words) in enumerate(kinds):
        other = write_latents(tmp_path / f"{number}.zarr", dense, one, dataset="east", **kind)
        with pytest.raises(SpecMismatch, match=rf"{number}.zarr and .*north.zarr hold .* kinds of tokens \({words}"):
            write_barcodes([two_datasets[0], other], tmp_path / "barcodes", BarcodeConfig(), client=threads)
        assert not (tmp_path / "barcodes").exists()


@pytest.mark.stress
def test_stores_that_were_made_differently_are_told(
    two_datasets: list[Path], tmp_path: Path, threads: Client, scheduler: str
) -> None:
    """Precision, value bits, pruning, versions and device: counted together, and said, then and of the finished job."""
    dense, one = np.ones((1, 2, 4), np.float32), [("P", "D", True)]
    settings: dict[str, Any] = {"value_bits": 23, "min_activation": 0.1, "precision": "bf16"}
    other = write_latents(tmp_path / "o.zarr", dense, one, dataset="east", **settings)
    for store, torch in ((two_datasets[1], "2.1"), (other, "2.2")):
        line = {"time": "2026", "versions": {"torch": torch}, "device": "cpu"}
        (store / "runs.jsonl").write_text(json.dumps(line) + "\n")
    same = write_barcodes(two_datasets, tmp_path / "same", BarcodeConfig(), client=threads)
    assert same.differences == ""
    arguments = ["barcode", str(two_datasets[1]), str(other), "-o", str(tmp_path / "b"), "--scheduler", scheduler]
    for _ in range(2):
        result = CliRunner().invoke(cli, arguments)
        assert result.exit_code == 0, result.output
        assert (
            "the stores were made differently: precision of the encoder fp32 against bf16; value bits 10 against 23; "
            "values below dropped 0.0 against 0.1; torch 2.1 against 2.2" in result.stdout
        )


@pytest.mark.stress
def test_a_table_groups_the_images_anew(two_datasets: list[Path], tmp_path: Path, threads: Client) -> None:
    """Its columns replace the store's; what does not fit is counted and named; `dataset` can make two names one."""
    table = tmp_path / "table.csv"
    lines = ["image_id,patient,disease,dataset,age"]
    lines += ["north/0000.png,ann,flu,all,40", "south/0000.png,ann,flu,all,40", "south/0001.png,bob,cold,all,"]
    lines += ["north/0002.png,,,,", "east/1.png,eve,flu,all,"]
    table.write_text("\n".join(lines) + "\n")
    result = write_barcodes(two_datasets, tmp_path / "barcodes", BarcodeConfig(), client=threads, table=table)
    assert (result.n_patients, result.n_without_patient) == (2, 3)
    assert (result.n_unknown_in_table, result.unknown_in_table) == (1, "east/1.png")
    assert (result.n_missing_in_table, result.missing_in_table) == (2, "north/0001.png, south/0002.png")
    found = read_levels(tmp_path / "barcodes")
    assert found["patient"].obs_names.tolist() == ["ann", "bob"]
    assert found["patient"].X.toarray().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0]]
    assert found["image"].obs["patient"].tolist() == ["ann", "", "", "ann", "bob", ""]
    assert found["image"].obs["age"].tolist() == ["40", "", "", "40", "", ""]
    assert found["image"].obs["status"].tolist() == ["ok"] * 6
    again = write_barcodes(two_datasets, tmp_path / "barcodes", BarcodeConfig(), client=threads, table=table)
    assert again.was_complete
    with pytest.raises(SpecMismatch, match="other settings"):
        write_barcodes(two_datasets, tmp_path / "barcodes", BarcodeConfig(), client=threads)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("patient\nann\n", r"must have a column 'image_id' and one of patient, .*found: patient"),
        ("image_id,path\nnorth/0000.png,x\n", r"and one of patient, disease, label"),
        ("image_id,patient\na,ann\na,bob\n", r"1 image ids that are empty or repeated \(a\)"),
        ("image_id,patient\n0000.png,ann\n", r"knows none of the 6 images \(its ids: 0000.png; the images': north/0"),
        ("image_id,a/b\nnorth/0000.png,x\n", r"a column 'a/b', a name that AnnData cannot store"),
        (
            "image_id,patient,disease,dataset\nnorth/0000.png,a,flu,x\nsouth/0000.png,a,cold,x\n",
            r"1 patient with images of two diseases \(a: cold and flu\); .*--table",
        ),
    ],
)
def test_a_table_that_cannot_be_used_is_refused(
    two_datasets: list[Path], tmp_path: Path, threads: Client, text: str, words: str
) -> None:
    (tmp_path / "table.csv").write_text(text)
    with pytest.raises(BadInput, match=words):
        write_barcodes(two_datasets, tmp_path / "b", BarcodeConfig(), client=threads, table=tmp_path / "table.csv")


def test_names_of_patients_are_unique_or_refused(tmp_path: Path) -> None:
    def names(*people: tuple[str, str]) -> list[str]:
        columns: dict[str, list[str | None]] = {
            "path": [f"{i}.png" for i in range(len(people))],
            "patient": [patient for patient, _ in people],
            "dataset": [dataset for _, dataset in people],
        }
        n = len(people)
        return group_images(
            with_outcome(image_table(columns, source="test", dataset=""), ["0" * 64] * n, [None] * n)
        ).names

    assert names(("2", "a"), ("1", "a"), ("1", "b")) == ["a/1", "b/1", "2"]
    assert names(("1", "a"), ("1", "b"), ("a/1", "c")) == ["a/1", "b/1", "c/a/1"]
    with pytest.raises(BadInput, match="would both be called 'a/b/c'"):
        names(("b/c", "a"), ("c", "a/b"), ("c", "z"), ("b/c", "z"))


@pytest.mark.stress
def test_the_command_takes_all_of_it(two_datasets: list[Path], tmp_path: Path, scheduler: str) -> None:
    """Two taus, two stores and a table, on a running scheduler; what is left out stands in what is printed."""
    (tmp_path / "table.csv").write_text("image_id,patient\nnorth/0000.png,ann\nx,eve\n")
    arguments = ["barcode", *map(str, two_datasets), "-o", str(tmp_path / "barcodes"), "--tau", "0.2", "--tau", "5"]
    arguments += ["--table", str(tmp_path / "table.csv"), "--scheduler", scheduler]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    assert "6 images, 1 patient, 1 disease, 4 latents, tau 0.2, 5" in result.stdout
    assert "left out: 5 images without a patient" in result.stdout
    assert "5 images without a row in" in result.stdout
    assert "1 row of" in result.stdout
    assert "100.0% of the nonzeros exceed tau 0.2; 1 of 4 latents never do" in result.stdout
    assert "warning: no latent exceeds tau 5 anywhere: every barcode is empty" in result.stderr


# ------------------------------------------------------------------------------------------- what is refused


def test_a_patient_with_two_diseases_is_refused(tmp_path: Path, threads: Client) -> None:
    """Also where one of the images is unreadable: the table is wrong, whatever can be read."""
    rows: list[Row] = [("P1", "A", True), ("P2", "B", True), ("P1", "B", False)]
    write_latents(tmp_path / "latents.zarr", np.ones((3, 2, 2), np.float32) * [[[1]], [[1]], [[0]]], rows)
    with pytest.raises(BadInput, match=r"1 patient with images of two diseases \(P1: A and B\)"):
        write_barcodes(tmp_path / "latents.zarr", tmp_path / "barcodes", BarcodeConfig(), client=threads)
    assert not (tmp_path / "barcodes").exists()


def test_tau_below_the_pruning_is_refused(tmp_path: Path, threads: Client) -> None:
    """What was dropped cannot be counted."""
    one = np.full((1, 5, 6), 0.5, np.float32)
    latents = write_latents(tmp_path / "l.zarr", one, [("P", "x", True)], min_activation=0.3)
    with pytest.raises(BadInput, match=r"was pruned below 0.3: tau 0.2 would count too few"):
        write_barcodes(latents, tmp_path / "b", BarcodeConfig(tau=0.2), client=threads)
    assert not (tmp_path / "b").exists()


def test_a_sum_that_float32_cannot_hold_is_an_error(tmp_path: Path, threads: Client) -> None:
    """Never an infinity in a store; here two images of 3e38 each."""
    dense = np.full((2, 1, 1), 3e38, np.float32)
    latents = write_latents(tmp_path / "l.zarr", dense, [("P", "x", True)] * 2, value_bits=23)
    with pytest.raises(BadInput, match=r"activation_sum of the barcodes has a value that is .* too large for float32"):
        write_barcodes(latents, tmp_path / "b", BarcodeConfig(), client=threads)
    with pytest.raises(IncompleteStore):
        BarcodeStore(tmp_path / "b")


@pytest.mark.stress
@pytest.mark.parametrize("array", ["data", "indices", "indptr"])
def test_a_damaged_chunk_gives_an_error_and_no_result(
    many: Path, tmp_path: Path, processes: Client, array: str
) -> None:
    """One flipped bit: the worker's error arrives here as it is, and what lies there is not called complete."""
    latents = tmp_path / "latents.zarr"
    subprocess.run(["cp", "-r", many / "latents.zarr", latents], check=True)
    chunk = latents / "X" / array / "c" / "0"
    raw = bytearray(chunk.read_bytes())
    raw[len(raw) // 2] ^= 1
    chunk.write_bytes(raw)
    with pytest.raises(DamagedStore, match=r"rows [\d,]+ to [\d,]+ of .*latents\.zarr/X"):
        write_barcodes(latents, tmp_path / "barcodes", BarcodeConfig(), client=processes)
    with pytest.raises(IncompleteStore):
        BarcodeStore(tmp_path / "barcodes")
    assert not (tmp_path / "barcodes" / "image.zarr" / "var").exists()  # nobody can take it for whole


def test_a_missing_chunk_is_noticed_before_anything_is_counted(many: Path, tmp_path: Path, threads: Client) -> None:
    latents = tmp_path / "latents.zarr"
    subprocess.run(["cp", "-r", many / "latents.zarr", latents], check=True)
    (latents / "X" / "data" / "c" / "0").unlink()
    with pytest.raises(DamagedStore, match=r"1 missing or empty chunk files \(X/data/c/0\)"):
        write_barcodes(latents, tmp_path / "barcodes", BarcodeConfig(), client=threads)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tau": -0.1}, "tau must be a number of at least 0; found -0.1"),
        ({"tau": float("nan")}, "tau must be a number of at least 0; found nan"),
        ({"token_set": "patches"}, "token_set must be one of all, patch, cls, register; found 'patches'"),
        ({"normalize": "none"}, "normalize must be one of images, cytosae-release; found 'none'"),
        ({"partition_images": 0}, "partition_images must be at least 1; found 0"),
        ({"block_images": 0}, "partition_images must be at least 1; found 0"),
        ({"tau": (0.2, 0.5, 0.2)}, "several tau must differ, as float32 too; found 0.2, 0.2, 0.5"),
        ({"tau": (0.2, 0.2 + 1e-12)}, "several tau must differ"),
    ],
)
def test_a_setting_that_cannot_be_used_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        BarcodeConfig(**settings)


# ------------------------------------------------------------------------------------------- a real scheduler


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a `dask scheduler` with one `dask worker`, each a process of its own, on the loopback."""
    root = tmp_path_factory.mktemp("scheduler")
    file = root / "scheduler.json"
    dask = [sys.executable, "-m", "dask"]
    options = ["--host", "127.0.0.1", "--no-dashboard", "--dashboard-address", "127.0.0.1:0"]
    log = (root / "log").open("w")
    processes = [
        subprocess.Popen(
            [*dask, "scheduler", *options, "--port", "0", "--scheduler-file", str(file)], stdout=log, stderr=log
        )
    ]
    try:
        while not file.exists() or not file.read_text():
            assert processes[0].poll() is None, (root / "log").read_text()
            time.sleep(0.02)
        address = json.loads(file.read_text())["address"]
        worker = [*dask, "worker", address, *options, "--no-nanny", "--nthreads", "1", "--local-directory", str(root)]
        processes.append(subprocess.Popen(worker, stdout=log, stderr=log))
        yield address
    finally:
        for process in processes:
            process.kill()
            process.wait()
        log.close()


@pytest.mark.stress
def test_a_running_scheduler_gives_the_same_bytes_as_the_local_run(many: Path, tmp_path: Path, scheduler: str) -> None:
    result = CliRunner().invoke(
        cli, ["barcode", str(many / "latents.zarr"), "-o", str(tmp_path / "barcodes"), "--scheduler", scheduler]
    )
    assert result.exit_code == 0, result.output
    assert contents(tmp_path / "barcodes") == contents(many / "barcodes")


@pytest.mark.stress
def test_no_scheduler_there_is_one_clear_line(many: Path, tmp_path: Path) -> None:
    arguments = ["barcode", str(many / "latents.zarr"), "-o", str(tmp_path / "barcodes")]
    result = CliRunner().invoke(cli, [*arguments, "--scheduler", "tcp://127.0.0.1:9"])
    assert result.exit_code == 1
    (line,) = result.stderr.strip().split("\n")
    assert line.startswith("Error: no Dask scheduler answers at tcp://127.0.0.1:9")
    assert line.endswith("start one: dask scheduler")
    assert not (tmp_path / "barcodes").exists()


# ------------------------------------------------------------------------------------------------- single damages


def _damages(root: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every file of a level gone, a bit flipped (beginning, middle, end by turns), longer, or another level's."""
    files = sorted(path for store in root.glob("*.zarr") for path in store.rglob("*") if path.is_file())
    for number, path in enumerate(files):
        raw, name = path.read_bytes(), str(path.relative_to(root))
        yield f"{name} gone", path.unlink
        at = (0, len(raw) // 2, len(raw) - 1)[number % 3]
        yield f"{name} flipped at {at}", partial(path.write_bytes, raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        yield f"{name} longer", partial(path.write_bytes, raw + b" ")
        for other in ("patient", "disease", "image"):
            twin = root / f"{other}.zarr" / path.relative_to(root / name.split("/")[0])
            if twin.is_file() and twin.read_bytes() != raw:
                yield f"{name} is {other}'s", partial(path.write_bytes, twin.read_bytes())
        path.write_bytes(raw)


@pytest.mark.stress
def test_every_single_damage_of_barcodes_is_found(hand: Path, threads: Client, tmp_path: Path) -> None:
    """By the files' own check always; whole verification and the readers of a level are tried on every eleventh."""
    root = tmp_path / "barcodes"
    write_barcodes(hand, root, BarcodeConfig(tau=0.5), client=threads)
    assert verify_barcodes(root) == []
    assert BarcodeStore(root).records_files
    assert (verify(root).problems, verify(root).unrecorded) == ([], [])
    n_damages = 0
    for what, damage in _damages(root):
        damage()
        level, inside = what.split(" ")[0].split(".zarr/")
        place = f"{level}.zarr/{inside}"
        folder = place.rpartition("/")[0] if n_damages % 11 else f"{level}.zarr"
        problems = list(BarcodeStore(root).file_problems(folder, all_bytes=True))
        assert [line.split(" ")[0] for line in problems] == [place], what
        n_damages += 1
        if n_damages % 11 != 1:
            continue
        assert verify_barcodes(root)[: len(problems)] == problems or level != "image"
        store = BarcodeStore(root)
        # a chunk's middle is compared with its end when it is decoded
        with pytest.raises(DamagedStore):
            store.read(level)
        if inside.startswith(("X/", "zarr.json")):
            with pytest.raises(DamagedStore):
                store.read_element(level, "X")
        if inside.startswith(("obs/", "zarr.json")):
            with pytest.raises(DamagedStore):
                store.read_obs(level)
    assert n_damages > 300
    assert verify_barcodes(root) == []
    export = next(root.glob("*.parquet"))
    export.write_bytes(export.read_bytes()[:-1])
    assert verify_barcodes(root) == [f"{export.name} is damaged: its hash is not the one in the header"]


def test_barcodes_that_do_not_say_what_was_written_are_read(tmp_path: Path) -> None:
    """An older cyto's: no checksums; a lost chunk of a matrix is found all the same."""
    golden = GOLDEN / "barcodes-v1"
    root = Path(shutil.copytree(golden, tmp_path / "b"))
    assert not BarcodeStore(root).records_files
    assert verify_barcodes(root) == []
    assert verify(root).unrecorded == ["disease.zarr", "image.zarr", "patient.zarr"]
    for name in ("indices", "data", "indptr"):
        path = root / "patient.zarr" / "X" / name / "c" / "0"
        raw = path.read_bytes()
        path.unlink()
        assert verify_barcodes(root), name
        with pytest.raises(DamagedStore):
            BarcodeStore(root).read_element("patient", "X")
        path.write_bytes(raw)
