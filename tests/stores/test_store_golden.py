"""One tiny artefact of each released format version, written once (tests/golden/make_golden.py): readable for ever.

If a test here fails after a change, the change broke the user's own stores: mend it, or give the format a new version
beside the old one. The files are never written anew.
"""

import csv
import hashlib
import hmac
import json
import re
import runpy
import shutil
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
import torch
import zarr
from command_line import run
from places import GOLDEN
from review_client import ask, post, running, token_of

from cytosae.atlas import pseudonyms_file
from cytosae.atlas.pseudonyms import read_pseudonyms
from cytosae.causes import read_ablation
from cytosae.compare import Comparison, Replication
from cytosae.concepts import read_selection
from cytosae.maps import MapResult, MaskResult
from cytosae.maps.reference_sheets import SheetResult
from cytosae.names import read_names
from cytosae.names.answers import read_answers
from cytosae.names.detection import Task, read_scores
from cytosae.probe.saved_model import read_model
from cytosae.review import read_review, verdicts
from cytosae.review.items import item_id
from cytosae.sae import load_sae
from cytosae.search.run import read_search
from cytosae.sweep.record import VERSION as SWEEP
from cytosae.sweep.record import Record, SweepFolder
from stores.activation_store import ActivationStore
from stores.barcode_store import BarcodeStore
from stores.concept_store import ConceptStore
from stores.errors import IncompleteStore
from stores.latent_store import LatentStore
from stores.result_folder import ADDED_LATER, ResultStore
from stores.runlog import read_runs
from stores.spec import (
    ABLATION,
    ATLAS,
    COMPARISON,
    CONCEPTS,
    FORMATS,
    MAPS,
    MASKS,
    MATCH,
    NAMES,
    NEIGHBOURS,
    PATIENT_CONCEPTS,
    PROBE,
    PROBE_TEST,
    REPLICATION,
    SCORECARD,
    SEARCH,
    SHEETS,
    STABILITY,
    THRESHOLDS,
    VERSUS,
    Format,
    find_header,
)
from stores.verify import verify_activations, verify_latents

IDENTITIES = {
    "activations-v1.zarr": "78a957d9469e4b455e7200d77d507c452ddf13a44d97ca2303a49f7028594101",
    "sae-v1": "83bb614a4e12b441c5e3b7fdabe658f0b64be1fe9cf14c2f54b9ddd737ad906e",
    "latents-v1.zarr": "72975734525df05d0a0ff94461bc219e60791ac7ac84bbdb69acc857c03c1f28",
    "barcodes-v1": "c3054b46b3865523026a95f23b378b034376a5a17d711c4d531d8ab992a95b44",
    "concepts-v1": "6216a1114063790c7ae3684be6d468391db08494d6ac3779603d64fd11234fa7",
    "comparison-v1": "791a8bf38b3f279a107af656a4faf71cf2cd935220b665f47854019040f9aaf6",
    "patient-concepts-v1": "7d186d5fab56619b5972f8e7d7cb6b2631c7f98e5a2def37ade404bcf09b9903",
    "probe-v1": "7a06cce987dc424af8916f1a354c88479d6f614f6bb06369e2fbe327211aa842",
    "probe-model-v1": "2d66652824599720aaac0a8abea00ef9ef103f215a7d8066b7182819dd699ff6",
    "probe-test-v1": "5c7e6876e28b145791111555d752aa2d5e48673866677629579427d5cc94938e",
    "neighbours-v1": "5e04a5d184745cccd37f91db82ac9893577cf01ef2359073d022509af75da5e8",
    "stability-v1": "bb593c840d13144a6026559788f691169701e4aa765cf960bc803a4729bd6d4a",
    "versus-v1": "0a7efd293bf743cb5bcbc65e625772622fec0eab45e37546ab679fd0ce595779",
    "search-v1": "bdf3a0c23aaf84f83c31735d296e76151e1eb02634d48636ac1a6b827fcb461c",
    "replication-v1": "3dd82f6067abb743e5891d29485ebd3fc0f87004afeed9d3524e5c95e3948fd0",
    "match-v1": "a91e1243ce7c781daa08beb781022339fc2d37bfa165519d7c4817d56998481b",
    "scorecard-v1": "8ae429e6cb4cca5b0b2f281c7a35c3f6ff087082c43a49f92c9421fff3831d97",
    "names-v1": "d75dbf975dcad634991cc6776a013b0fcb6daa4537d4dce615bd58dcf5270934",
    "thresholds-v1": "4e85eabe60bf5a04bc2fa128a97aa0abed7b5c0f158a42934493097bdaa442b9",
    "maps-v1": "d3b51d73581e0a1ff6a0e5153fba2eb6f833c1c9bf44c1c96ec6e0272825c4c3",
    "sheets-v1": "5ef0015e25951af34fe64777820ed835d09f67c8e93743cf78e42503bdad02b3",
    "masks-v1": "fc823af078f10146472e8a035a6c53ee12e47f7b180742821f78f3c08cb583f8",
    "ablation-v1": "acdc9fef20b87d6b4ee25207720b6b34a29500602bb4cf49de9808f7ca0bf36d",
    "atlas-v1": "c3f947fc830e5038f2c948df473923c74a47d02fbcd7dfa60cbf0974b7d05ff7",
}
RESULTS = {
    "concepts-v1": CONCEPTS,
    "comparison-v1": COMPARISON,
    "patient-concepts-v1": PATIENT_CONCEPTS,
    "probe-v1": PROBE,
    "probe-model-v1": PROBE,
    "probe-test-v1": PROBE_TEST,
    "neighbours-v1": NEIGHBOURS,
    "stability-v1": STABILITY,
    "versus-v1": VERSUS,
    "search-v1": SEARCH,
    "replication-v1": REPLICATION,
    "match-v1": MATCH,
    "scorecard-v1": SCORECARD,
    "names-v1": NAMES,
    "thresholds-v1": THRESHOLDS,
    "maps-v1": MAPS,
    "sheets-v1": SHEETS,
    "masks-v1": MASKS,
    "ablation-v1": ABLATION,
    "atlas-v1": ATLAS,
}
HEADERLESS = {  # formats of files that are not stores
    *(f"sweep-v{SWEEP}", "atlas-v1.pseudonyms.csv", "atlas-v1.reviews", "atlas-v1.reviews-v2"),
    "names-v1.answers",
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
    for start, stop in ((-1, 2), (2, 1), (2, 4)):
        with pytest.raises(IndexError, match=rf"images {start} to {stop} outside 0\.\.3"):
            store.read_images(start, stop)
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
        if path.name not in ADDED_LATER:
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
    root = GOLDEN / "comparison-v1"
    done = Comparison(out=root, results=ResultStore(root, COMPARISON), was_complete=True)
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


def test_probe_model_version_1() -> None:
    """The model reads, and gives the rows of the cohort, which repeat in the test, what it gave on that day."""
    store, model, seen = read_model(GOLDEN / "probe-model-v1")
    assert seen == {f"{number:064x}" for number in range(48)}
    assert (model.card.classes, model.card.n_of_class, model.card.tau) == (["AML", "well"], [6, 6], 0.2)
    kept = COHORT.mean(1)[:, model.latents].astype(np.float32)
    p = model.fit.probabilities(kept.astype(np.float64))
    rows = ResultStore(GOLDEN / "probe-test-v1", PROBE_TEST).table("test_predictions").to_pylist()
    barcode = [row for row in rows if row["method"] == "barcode"]
    assert [row["patient"] for row in barcode] == [f"P{n:02d}" for n in range(12)]
    np.testing.assert_allclose(p, [row["probabilities"] for row in barcode], atol=1e-12)
    assert store.header.identity == ResultStore(GOLDEN / "probe-test-v1", PROBE_TEST).header.spec["probe"]


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


def test_versus_version_1() -> None:
    """One encoder, and its decoder upside down: what latents answer to is equal, and not what they explain."""
    store = ResultStore(GOLDEN / "versus-v1", VERSUS)
    ours, theirs = store.table("saes").to_pylist()
    differences = {row["metric"]: row for row in store.table("differences").to_pylist()}
    for metric in ("l0", "dead_share", "label_purity", "label_purity_by_chance", "label_purity_above_chance"):
        assert ours[metric] == theirs[metric]
        assert (differences[metric]["difference"], differences[metric]["low"], differences[metric]["high"]) == (0, 0, 0)
    explained = differences["explained_variance"]
    assert explained["difference"] == pytest.approx(ours["explained_variance"] - theirs["explained_variance"])
    draws = [store.table(f"draws_00{number}") for number in (0, 1)]
    assert draws[0]["explained_variance"][0].as_py() == ours["explained_variance"]
    assert {table.num_rows for table in draws} == {101}


def test_search_version_1() -> None:
    """Image 2 is looked for; of the two others one is unreadable."""
    found = read_search(GOLDEN / "search-v1")
    tokens = expected_latents().reshape(3, 5, 8)
    mean, counts = tokens.mean(1), (tokens > 0.2).sum(1)
    best = np.lexsort((np.arange(8), -mean[2]))[:4]
    assert [row["latent"] for row in found.latents] == best.tolist()
    prints = np.where(np.argsort(np.argsort(-mean[[0, 2]], axis=1, kind="stable"), axis=1) < 4, mean[[0, 2]], 0)
    assert prints[0] @ prints[1] == 0  # their fingerprints have nothing in common, so there is nothing to list
    a, b = np.log1p(counts[[0, 2]])
    (row,) = found.images
    assert row["similarity"] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), rel=1e-5)
    assert (row["by"], row["rank"]) == ("barcode", 1)
    assert (row["image_id"], row["patient"], row["label"]) == (IMAGE_IDS[0], "P1", "neutrophil")
    assert (found.n_images, found.n_copies, {row["patient"] for row in found.patients}) == (2, 0, {"P1"})


def test_replication_version_1() -> None:
    """The other patients have the numbers of the first: each effect is as large as it was."""
    store = ResultStore(GOLDEN / "replication-v1", REPLICATION)
    rows, said = store.table("replication").to_pylist(), store.header.summary or {}
    assert rows[0]["latent"] == 2
    assert said["n_same_sign"] == said["n_latents"] == len(rows)
    assert (said["ratio"], said["correlation"]) == (pytest.approx(1), pytest.approx(1))
    for row in rows:
        assert row["replication_difference"] == pytest.approx(row["discovery_difference"])
        assert 1 / 100 <= row["p_one_sided"] <= row["p_holm"] <= 1
    assert Replication(out=store.root, rows=rows, summary=dict(said)).warnings


def test_match_version_1() -> None:
    """The two are one, so each latent is matched with one of its own values; 0 and 7 are equal."""
    store = ResultStore(GOLDEN / "match-v1", MATCH)
    rows = store.table("matches").to_pylist()
    assert sorted(row["latent_b"] for row in rows) == list(range(8))
    assert all(row["correlation"] == pytest.approx(1, abs=1e-6) for row in rows)
    assert all(row["latent_a"] == row["latent_b"] or {row["latent_a"], row["latent_b"]} <= {0, 7} for row in rows)
    assert store.table("latents").num_rows == 16


def test_scorecard_version_1() -> None:
    """Two readable images of 2 x 2 patches: too few for labels."""
    store = ResultStore(GOLDEN / "scorecard-v1", SCORECARD)
    rows = store.table("scorecard").to_pylist()
    assert rows == store.json("scorecard")["rows"]
    assert [row["measure"] for row in rows] == ["morans_i", "coherent_latents"]
    patches = expected_latents().reshape(3, 5, 8)[[0, 2], 1:]
    assert store.table("latents")["n_images"].to_pylist() == (patches.sum(1) > 0).sum(0).tolist()
    for latent, found in enumerate(store.table("latents")["morans_i"].to_pylist()):
        expected = []
        for a, b, c, d in patches[:, :, latent].astype(np.float64):
            z = np.array([a, b, c, d]) - (a + b + c + d) / 4
            expected.append((z[0] * z[1] + z[2] * z[3] + z[0] * z[2] + z[1] * z[3]) / (z**2).sum())
        assert found == pytest.approx(np.mean(expected))


def test_thresholds_version_1() -> None:
    """All 8 latents of the golden concepts have a mean activation above 1; of the atlas's 6, one is silent."""
    rows = ResultStore(GOLDEN / "thresholds-v1", THRESHOLDS).table("thresholds").to_pylist()
    at = [-6, -5, -4, -3.5, -3, -2, -1, 0]
    assert [tuple(row.values()) for row in rows] == [
        *(("concepts-v1", "golden", exponent, 8) for exponent in at),
        *(("concepts", "golden", exponent, 5) for exponent in at[:-1]),
        ("concepts", "golden", 0, 0),
    ]


def test_maps_version_1() -> None:
    """Latents 2 and 6 speak for the last patch of image 2; 6 is passed over, its mean activation being above 3."""
    store = ResultStore(GOLDEN / "maps-v1", MAPS)
    assert store.table("patches").to_pylist() == [{"latent": 2, "patch": 3, "row": 1, "column": 1, "value": 15.25}]
    six, two = store.table("active").to_pylist()
    assert six == {"latent": 6, "value": 15.75, "frequency": 1, "mean_activation": 3.125} | {
        "is_shared": False,
        "is_noisy": True,
        "rank": None,
    }
    assert (two["latent"], two["value"], two["is_noisy"], two["rank"]) == (2, 15.25, False, 1)
    assert two["mean_activation"] == pytest.approx((3.25 + 11.25 + 15.25) / 5 / 2)
    summary = store.header.summary or {}
    assert summary["image"] == "golden/c.png"
    result = store.result(
        MapResult, out=store.root, name=summary["image"]
    )  # as the command reads it that finds its folder complete
    assert (result.latents, result.largest, result.n_active, result.n_noisy) == ([2], [15.25], 2, 1)


def test_sheets_version_1() -> None:
    store = ResultStore(GOLDEN / "sheets-v1", SHEETS)
    assert [tuple(row.values()) for row in store.table("images").to_pylist()] == [
        (3, "golden", 1, "golden/c.png", 1, 0, 12.375),
        (3, "golden", 2, "golden/Zellen/größte.png", 1, 2, 4.375),
        (0, "golden", 1, "golden/c.png", 1, 1, 13),
        (0, "golden", 2, "golden/Zellen/größte.png", 1, 3, 5),
    ]
    result = store.result(SheetResult, out=store.root, latents=(3, 0))
    assert result == SheetResult(out=store.root, latents=(3, 0), n_latents=2, n_images=4, unseen=[])


def test_masks_version_1() -> None:
    """Of 8 patches 3 are foreground: 0 of image 0, 0 and 1 of image 2; of 4 shuffles one swapped the two masks.

    Latent 0 has 5 at patch 3 of image 0 and 13 at patch 1 of image 2: of 15 pairs with the background 5 are won and 8
    tied; swapped, none is won and 9 are tied.
    """
    store = ResultStore(GOLDEN / "masks-v1", MASKS)
    rows = store.table("agreement").to_pylist()
    assert [row["latent"] for row in rows] == list(range(8))
    assert {row["n_active_patches"] for row in rows} == {2}
    assert rows[0]["auroc"] == pytest.approx((5 + 8 / 2) / 15)
    assert rows[0]["auroc_null"] == pytest.approx((3 * 0.6 + 4.5 / 15) / 4)
    assert (rows[0]["iou"], rows[0]["threshold"], rows[0]["iou_null"]) == (pytest.approx(1 / 3), 13, 0.25)
    assert (rows[0]["auroc_p"], rows[0]["auroc_p_any"]) == (pytest.approx((1 + 3) / (1 + 4)), 1)
    assert [row["auroc"] for row in rows] == pytest.approx([0.6, 8 / 15, 0.3, 0.6] * 2)
    result = store.result(MaskResult, out=store.root, n_latents=8, left_out={})
    assert (result.n_images, result.n_patches, result.n_foreground, result.n_silent) == (2, 8, 3, 0)
    assert [row["latent"] for row in result.best_by_auroc] == [0, 3, 4, 7, 1]


def test_ablation_version_1() -> None:
    """Latent 7 without its value, by hand: the final CLS embedding was the mean token."""
    result = read_ablation(GOLDEN / "ablation-v1")
    cache, model = ActivationStore(GOLDEN / "activations-v1.zarr"), load_sae(GOLDEN / "sae-v1", device="cpu").model
    rows = ResultStore(GOLDEN / "ablation-v1", ABLATION).table("images").to_pylist()
    for row, image in zip([row for row in rows if row["edit"] == "chosen"], (0, 2), strict=True):
        x = cache.read_images([image])[0].astype(np.float64)
        w_enc, b_enc, w_dec, b_dec = (
            getattr(model, name).double().numpy() for name in ("W_enc", "b_enc", "W_dec", "b_dec")
        )
        z = np.maximum((x - b_dec) @ w_enc[:, 7] + b_enc[7], 0)
        moved = np.linalg.norm(z.mean() * w_dec[7])
        assert row["cls_norm"] == pytest.approx(moved, rel=1e-5)
        assert row["cls_change"] == pytest.approx(moved / np.linalg.norm(x.mean(0)), rel=1e-5)
    assert {row["latent"] for row in result.effects.to_pylist()} == {7}
    assert (result.n_images_surveyed, result.n_images_edited, result.mode) == (2, 2, "zero")


def test_names_version_1() -> None:
    """Names of two sources with the scores of a judge that sees red; what was answered, in the journals."""
    names = read_names(GOLDEN / "names-v1")
    told, ada = names.of(0)
    assert (told.name, told.text, told.given_by, told.source, told.saw) == (
        *("red square", "a patch", "a function", "command", "item"),
    )
    assert (ada.name, ada.given_by, ada.source, ada.confidence, ada.saw) == (
        *("rötliches <b>Quadrat</b>", "Ada", "table", 4, "elsewhere"),
    )
    (score,) = told.scores
    assert (score.judge, score.auc, score.shuffled, score.is_supported) == ("colours", 1, 0.5, True)
    assert [each.name for each in names.of(1)] == ["green square"]
    assert names.of(2) == ()
    assert [row["given_by"] for row in names.sources] == ["Ada", "a function"]
    answers = read_answers(GOLDEN / "names-v1.answers")
    assert [each.name for each in answers] == [ada.name, "red square", "green square"]
    scores = read_scores(GOLDEN / "names-v1.answers", IDENTITIES["names-v1"], "colours")
    assert sum(len(each) for each in scores.values()) == 60
    images = ResultStore(GOLDEN / "names-v1", NAMES).table("images").to_pylist()
    kinds = {row["number"]: row["row"] for row in images if (row["latent"], row["side"]) == (0, "test")}
    found = scores[Task(0, "red square")]
    assert {number for number, score in found.items() if score} == {
        number for number, kind in kinds.items() if kind != "not active"
    }


def test_sweep_version_1() -> None:
    """Three SAEs; the last, with a learning rate of 1e30, failed at step 1."""
    root = GOLDEN / "sweep-v1"
    said = json.loads((root / "sweep.json").read_text())
    assert (said["format"], said["format_version"], said["complete"]) == ("sweep", 1, True)
    records = [
        Record(**{name: row[name] for name in ("name", "caches", "settings", "identity")}) for row in said["members"]
    ]
    folder = SweepFolder(root, said["spec"], said["grid"], records)
    assert folder.is_complete
    names = ["lr=0.0004-seed=0", "lr=0.0004-seed=1", "lr=1e+30-seed=0"]
    assert [(record.name, record.status, record.failed_at_step) for record in records] == [
        (names[0], "complete", None),
        (names[1], "complete", None),
        (names[2], "failed", 1),
    ]
    members, table, text = folder.tables(["lr", "seed"])
    assert [row["final_l0"] for row in members] == [pytest.approx(4), pytest.approx(4.6), None]
    assert [(row["lr"], row["n"], row["n_failed"]) for row in table] == [(4e-4, 2, 0), (1e30, 0, 1)]
    assert table[0]["final_l0_mean"] == pytest.approx(4.3)
    assert "| 0.0004 | 2 | -0.403 ± 1.138 | 4.3 ± 0.4 | 6.252 ± 6.147 | n/a |" in text
    for name, rows in (("members", members), ("table", table)):
        for row, stored in zip(rows, pq.read_table(root / f"{name}.parquet").to_pylist(), strict=True):
            assert {column: row[column] for column in stored} == stored
    assert [load_sae(root / "runs" / name).model.W_enc.shape for name in names[:2]] == [(4, 8)] * 2
    with pytest.raises(IncompleteStore):
        load_sae(root / "runs" / names[2])
    (line,) = read_runs(root)
    assert line["versions"]["cyto"] == "0.1.0"


# --------------------------------------------------------------------------------- an atlas and what experts said

SITE = GOLDEN / "atlas-v1"
MUELLER, OKAFOR = "Dr. Zoë Müller", "B. Okafor"
# reviewer, question, latent, cluster, group, verdict, name, confidence, whether it counts: in the order of saving
SAID: list[tuple[Any, ...]] = [
    (OKAFOR, "meaningful", 0, 1, None, "meaningful", "", None, True),
    (OKAFOR, "meaningful", 1, 1, None, "not", "", None, True),
    (OKAFOR, "meaningful", 2, 0, None, "not", "", None, True),
    (OKAFOR, "specific", 0, None, "a", "a", "", None, True),
    (OKAFOR, "meaningful", 5, None, None, "meaningful", "", None, True),  # of an earlier atlas
    (MUELLER, "meaningful", 0, 1, None, "not", "", None, False),
    (MUELLER, "meaningful", 1, 1, None, "meaningful", "Auer-Stäbchen", 5, True),
    (MUELLER, "meaningful", 2, 0, None, "not", "", 1, True),
    (MUELLER, "meaningful", 0, 1, None, "meaningful", "blasts", 4, True),
    (MUELLER, "meaningful", 3, 0, None, "unsure", "", None, True),
    (MUELLER, "specific", 0, None, "a", "a", "", None, True),
    (MUELLER, "specific", 1, None, "a", "neither", "", None, True),
    (MUELLER, "specific", 2, None, "b", "b", "", 3, True),
    (MUELLER, "specific", 3, None, "decoy", "neither", "", None, True),
]
COLUMNS = ("reviewer", "question", "latent", "cluster", "group", "verdict", "name", "confidence", "is_current")
NOTES = "=nuclei, lobed\nnot sure of image 2"  # of Müller on latent 2


def test_atlas_version_1() -> None:
    """Every file is the one that was written, and what is asked can be read."""
    store = ResultStore(SITE, ATLAS)
    listed = {row["name"]: row for row in store.table("files").to_pylist()}
    files = {path.relative_to(SITE).as_posix(): path for path in SITE.rglob("*") if path.is_file()}
    assert files.keys() == listed.keys() | {"atlas.json", "files.parquet", "review.json", "runs.jsonl"}
    for name, row in listed.items():
        content = files[name].read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (row["bytes"], row["sha256"]), name
    assert (store.header.summary or {})["result"]["counts"] == {
        "concepts": 5,
        "images": 4,
        "patients": 4,
        "diseases": 2,
        "pairs": 1,
    }
    review = read_review(SITE)
    meaningful, specific = review.questions
    assert [(item.latent, item.cluster) for item in meaningful.items] == [(2, 0), (3, 0), (4, 0), (0, 1), (1, 1)]
    assert (specific.a, specific.b) == ("AML", "none")
    assert [(item.latent, item.group, item.n_images) for item in specific.items] == [
        (0, "a", 3),
        (1, "a", 3),
        (2, "b", 3),
        (3, "decoy", 4),
        (4, "decoy", 4),
    ]
    assert review.evidence[0]["largest"] == 0.5
    (row,) = review.evidence[0]["rows"]
    assert [image["label"] for image in row["images"]] == ["blast", "blast", "neutrophil"]
    assert [image["patches"] for image in row["images"]] == ["////AA==", "gIAAAA==", "AAAAAA=="]  # 255, 128 or 0
    assert review.evidence[1]["rows"][0]["images"][2]["file"] is None, "the image was lost"


def test_items_of_version_1_are_called_by_what_is_asked() -> None:
    """So a verdict counts in an atlas that a later version builds from the same concepts."""
    for question in read_review(SITE).questions:
        for item in question.items:
            asked = {name: getattr(question, name) for name in ("question", "concepts", "comparison")}
            text = json.dumps([*asked.values(), item.latent], separators=(",", ":"))
            assert item.item == item_id(asked, item.latent) == hashlib.sha256(text.encode()).hexdigest()[:16]


def test_pseudonyms_version_1() -> None:
    """An atlas that a later version builds beside them calls everybody by the same numbers."""
    path = pseudonyms_file(SITE)
    rows = list(csv.reader(path.read_text(encoding="utf-8").splitlines()))
    assert rows[:2] == [["pseudonym", "original"], ["key", "0123456789abcdef" * 4]]
    assert rows[2:] == [
        ["P0001", "'=Müller, J."],
        ["P0002", "C"],
        ["P0003", "B"],
        ["P0004", "D"],
        *([f"image {number}", f"golden/{image}.png"] for number, image in enumerate([1, 0, 2, 3])),
    ]
    found = read_pseudonyms(path)
    for names, expected in (
        (["=Müller, J.", "B", "C", "D"], [0, 2, 1, 3]),
        ([f"golden/{image}.png" for image in range(4)], [1, 0, 2, 3]),
    ):
        hashes = [hmac.new(b"0123456789abcdef" * 4, name.encode(), "sha256").digest() for name in names]
        assert found.order(names).tolist() == np.argsort(np.array(hashes, object)).tolist() == expected
    assert ResultStore(SITE, ATLAS).header.spec["pseudonyms_key_sha256"] == found.fingerprint


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("history", [True, False], ids=["history", "current"])
def test_reviews_version_1_are_exported(suffix: str, history: bool, tmp_path: Path) -> None:
    out = tmp_path / f"reviews{suffix}"
    expected = [row for row in SAID if history or row[-1]]
    done = run("atlas", "export", SITE, "-o", out, *(["--history"] if history else []))
    assert (done.exit_code, done.stdout) == (0, f"{out}: {len(expected)} verdicts of 2 reviewers\n")
    notes = NOTES
    if suffix == ".csv":
        with out.open(newline="", encoding="utf-8-sig") as file:
            rows: list[dict[str, Any]] = list(csv.DictReader(file))
        expected = [tuple("" if value is None else str(value) for value in row) for row in expected]
        notes = f"'{NOTES}"  # no formula
    else:
        rows = pq.read_table(out).to_pylist()
    assert [tuple(row[name] for name in COLUMNS) for row in rows] == expected
    assert [row["notes"] for row in rows if row["notes"]] == [notes]
    assert [row["time"] for row in rows][:2] == ["2026-11-21T12:10:00+00:00", "2026-11-21T12:11:00+00:00"]
    assert [str(row["is_blinded"]) for row in rows].count("False") == 1
    assert [str(row["latent"]) for row in rows if str(row["is_asked"]) == "False"] == ["5"]
    assert {row["atlas"] for row in rows} == {IDENTITIES["atlas-v1"], "4" * 64}


def test_reviews_version_2_count_no_verdict_that_was_taken_back() -> None:
    """Ada judged latents 0 and 1, and took the first verdict back; the lines of verdicts are of version 1."""
    folder = GOLDEN / "atlas-v1.reviews-v2"
    (journal,) = folder.glob("*.jsonl")
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    assert [(line["latent"], line["verdict"], line["version"]) for line in lines] == [
        *((0, "meaningful", 1), (1, "not", 1), (0, "", 2)),
    ]
    counted = verdicts.current(verdicts.read_verdicts(folder))
    assert [(each.reviewer, each.latent, each.verdict) for each in counted.values()] == [("Ada", 1, "not")]


def test_reviews_version_1_agree_as_they_did() -> None:
    """Müller and Okafor judged latents 0, 1 and 2 both: meaningful twice, then once, then never."""
    done = run("atlas", "agreement", SITE, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    counts = [found[name] for name in ("n_verdicts", "n_superseded", "n_not_asked", "n_seen_with_labels")]
    assert counts == [13, 1, 1, 1]
    meaningful, specific = found["questions"]
    (pair,) = meaningful["cohen"]
    # equal in 2 of 3; by chance (2 x 1 + 1 x 2) of 9
    assert (pair["reviewers"], pair["n_items"], pair["agreement"]) == ([OKAFOR, MUELLER], 3, pytest.approx(2 / 3))
    assert pair["kappa"] == pytest.approx((2 / 3 - 4 / 9) / (1 - 4 / 9))
    # of the four items, two thirds equal in the three that both judged; shares of the verdicts over all four: 3/8, 3/8
    # and 1/4 (latent 3, which one of them judged, counts there; Gwet 2014)
    fleiss, by_chance = meaningful["fleiss"], 2 * (3 / 8) ** 2 + (1 / 4) ** 2
    assert (fleiss["n_items"], fleiss["n_left_out"], fleiss["n_by_all"]) == (3, 1, 3)
    assert fleiss["kappa"] == pytest.approx((2 / 3 - by_chance) / (1 - by_chance))
    assert [(row["reviewer"], row["cluster"], row["n_yes"], row["n"]) for row in meaningful["meaningful"]] == [
        *((OKAFOR, 0, 0, 1), (OKAFOR, 1, 1, 2), (OKAFOR, None, 1, 3)),
        *((MUELLER, 0, 0, 2), (MUELLER, 1, 2, 2), (MUELLER, None, 2, 4)),
        *((None, 0, 0, 2), (None, 1, 1, 2), (None, None, 1, 4)),
    ]
    assert specific["median_images"] == {"a": 3, "b": 3, "decoy": 4}
    mueller = specific["specific"][MUELLER]
    assert {group: (row["n_yes"], row["n"]) for group, row in mueller["confirmed"].items()} == {
        "a": (1, 2),
        "b": (1, 1),
    }
    assert {group: row["n"] for group, row in mueller["decoys_called"].items()} == {"a": 1, "b": 1}
    assert (mueller["p_lists"]["a"], mueller["p_sides"]) == (pytest.approx(2 / 3), pytest.approx(1 / 2))
    assert specific["specific"][OKAFOR]["p_sides"] is None


def test_an_expert_goes_on_where_version_1_stopped(tmp_path: Path) -> None:
    """The server shows the golden atlas, knows every verdict of the reviewer, and adds one behind the others."""
    folder = Path(shutil.copytree(GOLDEN / "atlas-v1.reviews", tmp_path / "reviews"))
    before = verdicts.journal(folder, MUELLER).read_bytes()
    item = "68d88b40b5ee180f"  # is latent 0 meaningful?
    with running(SITE, folder) as server:
        port, token = server.server_port, token_of(server.server_port)
        assert ask(port, "GET", "/concepts/0.html")[1] == (SITE / "concepts" / "0.html").read_bytes()
        begun = json.loads(post(port, "/reviews/begin", {"reviewer": MUELLER}, token)[1])
        assert len(begun["verdicts"]) == 8
        assert begun["verdicts"][item] == {"verdict": "meaningful", "name": "blasts", "notes": "", "confidence": 4}
        assert post(port, "/reviews", {"reviewer": MUELLER, "item": item, "verdict": "unsure"}, token)[0] == 200
    assert verdicts.journal(folder, MUELLER).read_bytes().startswith(before)
    found = verdicts.read_verdicts(folder)
    assert len(found) == 15
    assert verdicts.current(found)[MUELLER, item].verdict == "unsure"


# ------------------------------------------------------------------------------------------------- all of them


def test_every_format_has_a_golden_artefact() -> None:
    """Of each version: a new format, or a new version of one, needs a folder here before it is released."""
    there = {path.name for path in GOLDEN.iterdir()} - {"make_golden.py", "__pycache__", ".gitattributes"}
    assert there == IDENTITIES.keys() | HEADERLESS
    headers = [find_header(GOLDEN / name) for name in IDENTITIES]
    assert {(header.kind, header.version) for header in headers if header is not None} == {
        (format.kind, version) for format in FORMATS.values() for version in range(1, format.version + 1)
    }
    journals = [path.read_text() for path in GOLDEN.glob("atlas-v1.reviews*/*.jsonl")]
    versions = {json.loads(line)["version"] for text in journals for line in text.splitlines()}
    assert versions == set(range(1, verdicts.VERSION + 1))


def test_every_format_and_its_version_stand_in_the_docs() -> None:
    versions = (GOLDEN.parents[1] / "docs" / "formats.md").read_text().split("Versions: ")[1].split("\n\n")[0]
    stated = {each.strip() for each in versions.replace("(cyto 0.1.0).", "").split("·")}
    others = {f"reviews {verdicts.VERSION}", f"sweep {SWEEP}"}
    assert {f"{format.kind} {format.version}" for format in FORMATS.values()} | others == stated


def test_golden_artefacts_are_small_and_name_no_place() -> None:
    for name in IDENTITIES.keys() | HEADERLESS:
        files = [path for path in (GOLDEN / name, *(GOLDEN / name).rglob("*")) if path.is_file()]
        assert 0 < sum(path.stat().st_size for path in files) < (150_000 if name == "atlas-v1" else 50_000)
        for path in files:
            if path.suffix in {".json", ".jsonl", ".csv", ".md", ".html", ".js", ".css"}:
                found = re.search(r"/(?:tmp|home|root|work|Users|mnt|var)/|[A-Z]:\\", path.read_text())
                assert not found, f"{path} names {found and found[0]}"


def test_golden_artefacts_are_not_written_anew() -> None:
    main = runpy.run_path(str(GOLDEN / "make_golden.py"))["main"]
    with pytest.raises(SystemExit, match=r"golden artefacts are never written anew: .*activations-v1.*atlas-v1"):
        main(GOLDEN)
