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
from stores.activation_store import ActivationStore
from stores.barcode_store import BarcodeStore
from stores.latent_store import LatentStore
from stores.runlog import read_runs
from stores.spec import find_header
from stores.verify import verify_activations, verify_latents

GOLDEN = Path(__file__).parent / "golden"
IDENTITIES = {
    "activations-v1.zarr": "78a957d9469e4b455e7200d77d507c452ddf13a44d97ca2303a49f7028594101",
    "sae-v1": "83bb614a4e12b441c5e3b7fdabe658f0b64be1fe9cf14c2f54b9ddd737ad906e",
    "latents-v1.zarr": "72975734525df05d0a0ff94461bc219e60791ac7ac84bbdb69acc857c03c1f28",
    "barcodes-v1": "c3054b46b3865523026a95f23b378b034376a5a17d711c4d531d8ab992a95b44",
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
    assert list(verify_activations(store.root)) == [None, None]


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
    assert list(verify_latents(store.root)) == [None]
    group = zarr.open_group(store.root, mode="r")["X"]
    np.testing.assert_array_equal(anndata.io.read_elem(group).toarray(), expected)
    np.testing.assert_array_equal(anndata.io.sparse_dataset(group)[5:12].toarray(), expected[5:12])  # type: ignore[arg-type]


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


def test_golden_artefacts_are_small_and_not_written_anew() -> None:
    for name in IDENTITIES:
        assert sum(path.stat().st_size for path in (GOLDEN / name).rglob("*") if path.is_file()) < 50_000
    main = runpy.run_path(str(GOLDEN / "make_golden.py"))["main"]
    with pytest.raises(SystemExit, match=r"golden artefacts are never written anew: .*activations-v1"):
        main(GOLDEN)
