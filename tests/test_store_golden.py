"""One tiny artefact of each released format version, written once (tests/golden/make_golden.py): readable for ever.

If a test here fails after a change, the change broke the user's own stores: mend it, or give the format a new version
beside the old one. The files are never written anew.
"""

import runpy
from pathlib import Path

import anndata
import numpy as np
import numpy.typing as npt
import pytest
import torch
import zarr

from cytosae.checkpoint import load_sae
from cytosae.compare import Comparison
from cytosae.selection import read_selection
from stores.activation_store import ActivationStore
from stores.barcode_store import BarcodeStore
from stores.concept_store import ConceptStore
from stores.latent_store import LatentStore
from stores.results import ResultStore
from stores.runlog import read_runs
from stores.spec import (
    COMPARISON,
    CONCEPTS,
    FORMATS,
    NEIGHBOURS,
    PATIENT_CONCEPTS,
    PROBE,
    STABILITY,
    Format,
    find_header,
)
from stores.verify import verify_activations, verify_latents

GOLDEN = Path(__file__).parent / "golden"
IDENTITIES = {
    "activations-v1.zarr": "78a957d9469e4b455e7200d77d507c452ddf13a44d97ca2303a49f7028594101",
    "sae-v1": "83bb614a4e12b441c5e3b7fdabe658f0b64be1fe9cf14c2f54b9ddd737ad906e",
    "latents-v1.zarr": "72975734525df05d0a0ff94461bc219e60791ac7ac84bbdb69acc857c03c1f28",
    "barcodes-v1": "c3054b46b3865523026a95f23b378b034376a5a17d711c4d531d8ab992a95b44",
    "concepts-v1": "6216a1114063790c7ae3684be6d468391db08494d6ac3779603d64fd11234fa7",
    "comparison-v1": "791a8bf38b3f279a107af656a4faf71cf2cd935220b665f47854019040f9aaf6",
    "patient-concepts-v1": "7d186d5fab56619b5972f8e7d7cb6b2631c7f98e5a2def37ade404bcf09b9903",
    "probe-v1": "7a06cce987dc424af8916f1a354c88479d6f614f6bb06369e2fbe327211aa842",
    "neighbours-v1": "5e04a5d184745cccd37f91db82ac9893577cf01ef2359073d022509af75da5e8",
    "stability-v1": "bb593c840d13144a6026559788f691169701e4aa765cf960bc803a4729bd6d4a",
}
RESULTS = {  # those that something of ours reads again
    "concepts-v1": CONCEPTS,
    "comparison-v1": COMPARISON,
    "patient-concepts-v1": PATIENT_CONCEPTS,
    "probe-v1": PROBE,
    "neighbours-v1": NEIGHBOURS,
    "stability-v1": STABILITY,
}
IMAGE_IDS = ["golden/Zellen/größte.png", "golden/torn.tif", "golden/c.png"]


def expected_latents() -> npt.NDArray[np.float32]:
    """(15, 8): latent s of row r is (r + 1) + s / 8 where (3 r + 5 s) mod 4 is 0; the rows of image 1 are empty."""
    dense = np.zeros((15, 8), np.float32)
    for r in [0, 1, 2, 3, 4, 10, 11, 12, 13, 14]:
        for s in range(8):
            if (3 * r + 5 * s) % 4 == 0:
                dense[r, s] = r + 1 + s / 8
    return dense


@pytest.mark.parametrize("name", IDENTITIES)
def test_the_header_still_verifies(name: str) -> None:
    """Its identity is what it was on the day it was written, and so is the way that the identity is computed."""
    header = find_header(GOLDEN / name)
    assert header is not None
    assert header.complete
    assert header.version == 1
    assert header.created_by == "cyto 0.1.0"
    assert header.identity == IDENTITIES[name]
    assert read_runs(GOLDEN / name)[0]["versions"]["cyto"] == "0.1.0"


def test_activation_cache_version_1() -> None:
    store = ActivationStore(GOLDEN / "activations-v1.zarr")
    expected = np.array(
        [[[(100 * i + 10 * t + c) / 8 for c in range(4)] for t in range(5)] for i in range(3)], np.float16
    )
    expected[1] = np.nan
    np.testing.assert_array_equal(store.read_images([0, 1, 2]), expected, strict=True)
    np.testing.assert_array_equal(store.read_chunk(1), expected[2:])
    np.testing.assert_array_equal(zarr.open_group(store.root, mode="r")["tokens"][:], expected)  # type: ignore[index]
    assert store.content_sha256 == "388b3b8b66b924e2ae412521673e351e13df5d761d110ab87c80a41a345cd1ea"
    assert store.readable().tolist() == [True, False, True]
    assert store.images.to_pydict() == {
        "image_id": IMAGE_IDS,
        "path": ["Zellen/größte.png", "torn.tif", "c.png"],
        "label": ["neutrophil", None, "blast"],
        "label_common": [None, None, None],
        "patient": ["P1", "P1", "P2"],
        "disease": ["well", "well", "AML"],
        "dataset": ["golden", "golden", "golden"],
        "hospital": ["H1", None, "H2"],
        "content_hash": ["00" * 32, None, "22" * 32],
        "status": ["ok", "unreadable", "ok"],
        "error": [None, "file ends early", None],
    }
    assert store.header.summary is not None
    assert (store.header.summary["n_readable"], store.header.summary["n_unreadable"]) == (2, 1)
    assert list(verify_activations(Path(store.root))) == [None, None]


def test_sae_version_1() -> None:
    run = load_sae(GOLDEN / "sae-v1")
    w_enc = (torch.arange(32) / 16 - 1).reshape(4, 8)
    assert torch.equal(run.model.W_enc, w_enc)
    assert torch.equal(run.model.W_dec, w_enc.T)
    assert run.model.b_enc.tolist() == [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75]
    assert run.model.b_dec.tolist() == [0, 0.25, 0.5, 0.75]
    assert run.sha256 == "d78f6163403ef4d68fadcdcbe47598835be07813c16f9412dee7d772dfcf2b4d"
    assert run.same_tokens == ActivationStore(GOLDEN / "activations-v1.zarr").spec.same_tokens
    tokens = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    expected = torch.relu((tokens - run.model.b_dec) @ w_enc + run.model.b_enc)
    assert torch.equal(run.model.encode(tokens), expected)


# anndata says that it keeps uint16 indices as they are
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_latent_store_version_1() -> None:
    store, expected = LatentStore(GOLDEN / "latents-v1.zarr"), expected_latents()
    rows = store.read_images(0, 3)
    dense = np.zeros_like(expected)
    dense[np.repeat(np.arange(15), np.diff(rows.indptr)), rows.indices] = rows.values
    np.testing.assert_array_equal(dense, expected, strict=True)
    assert rows.indices.dtype == np.uint16
    assert store.image_indptr.tolist() == [0, 10, 10, 20]
    assert store.nnz == 20
    assert store.images["image_id"].to_pylist() == IMAGE_IDS
    assert store.spec.sae_sha256 == load_sae(GOLDEN / "sae-v1").sha256
    assert store.spec.cache_sha256 == ActivationStore(GOLDEN / "activations-v1.zarr").content_sha256
    assert list(verify_latents(Path(store.root))) == [None]
    group = zarr.open_group(store.root, mode="r")["X"]
    np.testing.assert_array_equal(anndata.io.read_elem(group).toarray(), expected)
    np.testing.assert_array_equal(anndata.io.sparse_dataset(group)[5:12].toarray(), expected[5:12])


def test_barcodes_version_1() -> None:
    barcodes = BarcodeStore(GOLDEN / "barcodes-v1")
    assert barcodes.header.spec["tau"] == 0.2
    assert barcodes.header.spec["latents"] == IDENTITIES["latents-v1.zarr"]
    blocks = expected_latents().reshape(3, 5, 8)
    counts = (blocks > 0.2).sum(1)
    assert counts[0].tolist() == [2, 1, 1, 1, 2, 1, 1, 1]
    image, patient, disease = (barcodes.read(level) for level in ("image", "patient", "disease"))
    np.testing.assert_array_equal(image.X.toarray(), counts)
    np.testing.assert_array_equal(image.layers["max"].toarray(), blocks.max(1))
    np.testing.assert_array_equal(image.layers["mean"].toarray(), blocks.mean(1))
    np.testing.assert_array_equal(patient.X.toarray(), counts[[0, 2]])
    np.testing.assert_array_equal(patient.layers["n_active_images"].toarray(), (counts[[0, 2]] > 0).astype(int))
    np.testing.assert_array_equal(disease.X.toarray(), counts[[2, 0]])
    assert image.X.indices.dtype == np.int32
    assert image.X.dtype == np.float32
    assert image.obs_names.tolist() == IMAGE_IDS
    assert image.obs["status"].tolist() == ["ok", "unreadable", "ok"]
    assert patient.obs_names.tolist() == ["P1", "P2"]
    assert patient.obs[["n_images", "n_unreadable"]].to_numpy().tolist() == [[1, 1], [1, 0]]
    assert disease.obs_names.tolist() == ["AML", "well"]
    assert image.var["latent"].tolist() == list(range(8))
    assert image.uns["cyto"]["identity"] == barcodes.header.identity


# ------------------------------------------------------------------------------------------- folders of results

# twelve patients of four images, six with each of two diseases: tokens above tau, (patients, images, latents)
_p, _i, _s = np.ogrid[:12, :4, :8]
COHORT = (5 * _p + 3 * _i + _s) % 7 + 3 * ((_p < 6) & (_s == 2))


@pytest.mark.parametrize(("name", "format"), RESULTS.items(), ids=RESULTS)
def test_results_version_1_are_whole(name: str, format: Format) -> None:
    """Every file has the checksum that the header names, and every table carries the identity."""
    store = ResultStore(GOLDEN / name, format)
    store.check()
    for path in sorted(store.root.glob("*.parquet")):
        if path.name != "selection.parquet":
            assert store.table(path.stem).schema.metadata[b"cyto"].decode() == IDENTITIES[name]


def test_concepts_version_1() -> None:
    store, blocks = ConceptStore(GOLDEN / "concepts-v1"), expected_latents().reshape(3, 5, 8)[[0, 2]]
    activation = blocks.mean(1)
    assert store.header.spec["latents"] == [IDENTITIES["latents-v1.zarr"]]
    table = store.latents("golden")
    assert table["frequency"].to_pylist() == (activation > 0).mean(0).tolist()
    np.testing.assert_allclose(table["mean_activation"], activation.sum(0) / (activation > 0).sum(0), rtol=1e-6)
    assert table["max_activation"].to_pylist() == blocks.max((0, 1)).tolist()
    top = store.top_images(3)
    assert top["image_id"].to_pylist() == [IMAGE_IDS[2], IMAGE_IDS[0]]  # its later rows have the larger values
    assert top["image_index"].to_pylist() == [2, 0]
    assert top["label"].to_pylist() == ["blast", "neutrophil"]
    np.testing.assert_allclose(top["value"], activation[::-1, 3], rtol=1e-6)
    selection = read_selection(store)
    assert selection.latents == [2, 6, 0, 3, 4, 5, 7]  # all of a cluster of two, five of the other six
    assert selection.cluster_sizes == (2, 6)


def test_comparison_version_1() -> None:
    done = Comparison(ResultStore(GOLDEN / "comparison-v1", COMPARISON), was_complete=True)
    table, mean = done.results.table("differential"), COHORT.mean(1)
    np.testing.assert_allclose(table["mean_a"], mean[:6].mean(0), rtol=1e-6)
    np.testing.assert_allclose(table["mean_b"], mean[6:].mean(0), rtol=1e-6)
    (first,) = done.top(1)["a"]
    assert (first["latent"], first["rank_a"], first["rank_b"]) == (2, 1, None)
    assert 1 / 100 <= first["p"] <= first["p_max_t"] <= 1
    assert done.summary["a"]["n_patients"] == done.summary["b"]["n_patients"] == 6
    rows = done.results.table("patients").to_pylist()
    assert {row["patient"]: row["value"] for row in rows if row["latent"] == 2}["P00"] == mean[0, 2]
    assert done.results.table("correlation").num_rows == 12 * 12


def test_patient_concepts_version_1() -> None:
    store, mean = ResultStore(GOLDEN / "patient-concepts-v1", PATIENT_CONCEPTS), COHORT.mean(1)
    (patient,) = store.table("patients").to_pylist()
    assert (patient["patient"], patient["n_images"], patient["n_others"], patient["skipped"]) == ("P00", 4, 5, None)
    for row in store.table("patient_concepts").to_pylist():
        assert row["barcode"] == mean[0, row["latent"]]
        assert row["others_median"] == np.median(mean[1:6, row["latent"]])


def test_probe_version_1() -> None:
    store = ResultStore(GOLDEN / "probe-v1", PROBE)
    scores = store.json("scores")
    assert scores["classes"] == {"AML": 6, "well": 6}
    assert scores["n_units"] == scores["n_groups"] == 12
    assert 0 <= scores["methods"]["barcode"]["weighted_f1"]["mean"] <= 1
    assert sorted(point["threshold"] for point in scores["curve"]) == [0, 1]
    folds = store.table("folds").to_pylist()
    assert sorted(row["patient"] for row in folds if row["side"] == "test") == [f"P{n:02d}" for n in range(12)]
    assert all(sum(row["probabilities"]) == pytest.approx(1) for row in store.table("predictions").to_pylist())


def test_neighbours_version_1() -> None:
    rows = ResultStore(GOLDEN / "neighbours-v1", NEIGHBOURS).table("neighbours").to_pylist()
    w_dec = (np.arange(32) / 16 - 1).reshape(4, 8).T
    unit = w_dec / np.linalg.norm(w_dec, axis=1, keepdims=True)
    cosines = unit @ unit.T
    assert {row["latent"] for row in rows} == {0, 5}
    for row in rows:
        assert row["cosine"] == pytest.approx(cosines[row["latent"], row["neighbour"]])
    for latent in (0, 5):
        nearest = [row["neighbour"] for row in rows if row["latent"] == latent and row["by"] == "direction"]
        assert nearest == [n for n in np.argsort(-cosines[latent]).tolist() if n != latent][:2]
    is_on = expected_latents() > 0
    for row in rows:
        assert row["n_tokens_both"] == (is_on[:, row["latent"]] & is_on[:, row["neighbour"]]).sum()


def test_stability_version_1() -> None:
    """The second SAE has the decoder of the first, upside down."""
    store = ResultStore(GOLDEN / "stability-v1", STABILITY)
    matches = store.table("matches").to_pylist()
    assert [(row["latent_a"], row["latent_b"]) for row in matches] == [(n, 7 - n) for n in range(8)]
    (pair,) = store.table("pairs").to_pylist()
    assert (pair["n_matched"], pair["is_optimal"], pair["share_above_0.9"]) == (8, True, 1)
    assert pair["mean_cosine"] == pytest.approx(1)
    assert store.table("stability")["mean_matched"].to_pylist() == pytest.approx([1] * 16)


def test_every_format_and_its_version_stand_in_the_docs() -> None:
    versions = (GOLDEN.parents[1] / "docs" / "formats.md").read_text().split("Versions: ")[1].split("\n\n")[0]
    stated = {each.strip() for each in versions.replace("(cyto 0.1.0).", "").split("·")}
    assert {f"{format.kind} {format.version}" for format in FORMATS.values()} == stated - {"reviews 1"}


def test_golden_artefacts_are_small_and_not_written_anew() -> None:
    for name in IDENTITIES:
        assert sum(path.stat().st_size for path in (GOLDEN / name).rglob("*") if path.is_file()) < 50_000
    main = runpy.run_path(str(GOLDEN / "make_golden.py"))["main"]
    with pytest.raises(SystemExit, match=r"golden artefacts are never written anew: .*activations-v1"):
        main(GOLDEN)
