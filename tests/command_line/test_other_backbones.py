"""A tiny model of each family goes through the whole chain: extract, train, encode, barcode, concepts, maps, atlas.

Every number that depends on which token is what is computed again from dense tokens, with positions written out here.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
from atlas_maker import without_figures
from concept_folders import dense_tokens
from dask.distributed import Client
from latent_stores import local_client
from PIL import Image
from tiny_models import FAMILIES
from tiny_runs import tiny_config

from cytocache import bridge
from cytocache.demo_cells import draw_cell
from cytocache.extract import ExtractConfig, extract
from cytocache.fidelity import measure_fidelity
from cytocache.repair import repair
from cytosae.atlas import AtlasConfig, build_atlas
from cytosae.barcodes import BarcodeConfig, write_barcodes
from cytosae.concepts import ConceptConfig, concept_statistics
from cytosae.latents.encode import encode
from cytosae.maps import PatchQuery, write_maps, write_mask_agreement, write_sheets
from cytosae.probe.baselines import read_image_tokens
from cytosae.relations import NeighbourConfig, find_neighbours
from cytosae.training.evaluate import evaluate
from cytosae.training.substitution import BackboneSample
from cytosae.training.train import train
from stores import ActivationStore, BarcodeStore, LatentStore
from stores.activation_spec import chunk_path
from stores.errors import BadInput
from stores.tables import column
from stores.verify_any import verify_folder

pytestmark = pytest.mark.stress  # at the size of a chain for every family

# positions of CLS, registers and patches in an image's tokens
POSITIONS = {
    "ViT/16, 197 tokens": ([0], [], range(1, 197)),
    "ViT/16, 448 pixels": ([0], [], range(1, 785)),
    "DINOv2 with registers": ([0], [1, 2, 3, 4], range(5, 21)),
    "DINOv3": ([0], [1, 2, 3, 4], range(5, 21)),
    "SigLIP, no CLS": ([], [], range(16)),
    "registers, no CLS": ([], [0, 1, 2, 3], range(4, 20)),
    "DeiT, distilled": ([0], [], range(2, 18)),
}
DRAWN = "DINOv2 with registers"  # the family whose figures are drawn: drawing takes longer than all else
SIZES = [(64, 64), (64, 64), (96, 60), (60, 110), (64, 64), (64, 64)]  # height, width
TAU = 0.1


@dataclass(frozen=True)
class Chain:
    """One family's stores, and where its tokens are."""

    root: Path
    model: Path
    cls: list[int]
    registers: list[int]
    patches: list[int]
    n_tokens: int

    @property
    def latents(self) -> LatentStore:
        return LatentStore(self.root / "latents")

    def positions(self, token_set: str) -> list[int]:
        found = {"cls": self.cls, "register": self.registers, "patch": self.patches}
        return found.get(token_set, list(range(self.n_tokens)))

    @property
    def token_sets(self) -> list[str]:
        return [name for name in ("all", "patch", "cls", "register") if self.positions(name)]


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with local_client(1, 1) as client:
        yield client


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six cells of two patients; masks: the left half of each image."""
    root = tmp_path_factory.mktemp("images")
    lines = ["path,label,patient,disease"]
    for folder in ("cells", "masks"):
        (root / folder).mkdir()
    for n, (height, width) in enumerate(SIZES):
        label = ("lymphocyte", "eosinophil")[n % 2]
        cell = Image.fromarray(draw_cell(label, np.random.default_rng(n), size=64)).resize((width, height))
        cell.save(root / "cells" / f"{n}.png")
        mask = np.zeros((height, width), np.uint8)
        mask[:, : width // 2] = 1
        Image.fromarray(mask).save(root / "masks" / f"{n}.png")
        lines.append(f"cells/{n}.png,{label},P{n // 3},{'sick' if n < 3 else 'well'}")
    (root / "images.csv").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture(
    scope="module",
    params=FAMILIES,
)
def chain(
    request: pytest.FixtureRequest, images: Path, client: Client, tmp_path_factory: pytest.TempPathFactory
) -> Chain:
    """From images to barcodes and concepts."""
    family, root = FAMILIES[request.param], tmp_path_factory.mktemp("chain")
    cls, registers, patches = POSITIONS[request.param]
    model = family.write(root / "model")
    config = ExtractConfig(backbone=str(model), chunk_images=4, batch_size=3, device="cpu", workers=1)
    extract(images / "images.csv", root / "acts", config)
    train([root / "acts"], root / "sae", tiny_config(batch_tokens=128, tokens=128 * 12))
    encode(root / "acts", root / "sae", root / "latents", device="cpu")
    with without_figures():
        write_barcodes(root / "latents", root / "barcodes", BarcodeConfig(tau=TAU), client=client)
        concept_statistics(root / "latents", root / "concepts", ConceptConfig(min_support=1), client=client)
    return Chain(root, model, cls, registers, [*patches], family.layout.tokens_per_image)


@pytest.fixture(autouse=True)
def few_figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if DRAWN not in request.node.name:
        for name in ("image_maps.plot_maps", "image_maps.plot_rows", "reference_sheets.plot_rows"):
            monkeypatch.setattr(f"cytosae.maps.{name}", lambda *arguments, **settings: None)
        monkeypatch.setattr("cytosae.maps.mask_agreement.plot_agreement", lambda *arguments, **settings: None)


def test_barcodes_of_every_token_set_count_its_tokens_and_no_others(
    chain: Chain, client: Client, tmp_path: Path
) -> None:
    dense = [dense_tokens(chain.latents, image) for image in range(len(SIZES))]
    assert any(each.any() for each in dense)
    for token_set in chain.token_sets:
        config = BarcodeConfig(tau=TAU, token_set=token_set)
        write_barcodes(chain.root / "latents", tmp_path / token_set, config, client=client)
        counts = BarcodeStore(tmp_path / token_set).read("image").X.toarray()
        at = chain.positions(token_set)
        for image, tokens in enumerate(dense):
            assert np.array_equal(counts[image], (tokens[at] > np.float32(TAU)).sum(0))


def test_what_the_backbone_does_not_have_is_refused_only_where_it_is_asked_for(
    chain: Chain, client: Client, images: Path, tmp_path: Path
) -> None:
    for token_set, words in (("cls", "no CLS token"), ("register", "no registers")):
        if chain.positions(token_set):
            train(
                [chain.root / "acts"], tmp_path / token_set, tiny_config(batch_tokens=4, tokens=16, token_set=token_set)
            )
            continue
        match = rf"{words}: their backbone has none; give --token-set all or patch"
        with pytest.raises(BadInput, match=match):
            write_barcodes(chain.root / "latents", tmp_path / "b", BarcodeConfig(token_set=token_set), client=client)
        with pytest.raises(BadInput, match=match):
            concept_statistics(
                chain.root / "latents", tmp_path / "c", ConceptConfig(token_set=token_set), client=client
            )
        with pytest.raises(BadInput, match=match):
            train([chain.root / "acts"], tmp_path / "t", tiny_config(token_set=token_set))
        with pytest.raises(BadInput, match=match):
            evaluate(chain.root / "acts", chain.root / "sae", token_set=token_set, device="cpu")
        assert not (tmp_path / "b").exists()
    sample: dict[str, Any] = {"weights": str(chain.model), "device": "cpu", "n_images": 2, "workers": 1}
    if not chain.cls:
        with pytest.raises(
            BadInput, match=r"has no CLS token .* so there is no final CLS embedding; leave out --images"
        ):
            bridge.backbone_sample(chain.root / "acts", images, **sample)
        return
    outputs, final_cls = bridge.backbone_sample(chain.root / "acts", images, **sample)
    done = evaluate(
        chain.root / "acts",
        chain.root / "sae",
        token_set="patch",
        device="cpu",
        sample=BackboneSample(outputs=outputs, final_cls=final_cls, seed=0),
    )
    assert done.n_tokens == len(SIZES) * len(chain.patches)
    assert done.substitution is not None
    assert 0 < done.substitution.zeros.relative_l2


def test_maps_and_sheets_follow_the_patches(chain: Chain, images: Path, tmp_path: Path) -> None:
    """Of a stored image and of a new file, with the patch that is asked about."""
    latents, ids = chain.latents, column(chain.latents.images, "image_id")
    dense, side = dense_tokens(latents, 0), round(len(chain.patches) ** 0.5)
    latent = int(dense[chain.patches].sum(0).argmax())
    out = [tmp_path / name for name in ("stored", "new", "query")]
    common: dict[str, Any] = {"stage_one": bridge, "roots": [images]}
    write_maps(latents.root, out[0], image_id=ids[0], latents=[latent], **common)
    write_maps(
        latents.root,
        out[1],
        file=images / "cells" / "0.png",
        sae=chain.root / "sae",
        weights=str(chain.model),
        latents=[latent],
        device="cpu",
        **common,
    )
    for folder in out[:2]:
        shown = np.zeros((side, side), np.float32)
        for row in pq.read_table(folder / "patches.parquet").to_pylist():
            shown[row["row"], row["column"]] = row["value"]
        assert np.allclose(shown.ravel(), dense[chain.patches, latent], rtol=2e-3)
    patch = int(dense[chain.patches].max(1).argmax())
    asked = PatchQuery(patch=patch, noisy=1e9, shared=2)
    done = write_maps(
        latents.root,
        out[2],
        image_id=ids[0],
        query=asked,
        concepts=chain.root / "concepts",
        n_images=2,
        **common,
    )
    assert done.latents[0] == int(dense[chain.patches[patch]].argmax())
    asked = PatchQuery(patch=side * side)
    with pytest.raises(BadInput, match=f"patches are numbered 0 to {side * side - 1:,}"):
        write_maps(
            latents.root, tmp_path / "no", image_id=ids[0], query=asked, concepts=chain.root / "concepts", **common
        )
    write_sheets(chain.root / "concepts", latents.root, tmp_path / "sheets", latents=[latent], n_images=3, **common)
    rows = pq.read_table(tmp_path / "sheets" / "images.parquet").to_pylist()
    assert rows
    for row in rows:
        of_image = dense_tokens(latents, ids.index(row["image_id"]))[chain.patches, latent]
        assert row["n_patches"] == (of_image > 0).sum()
        assert row["patch"] == (int(of_image.argmax()) if of_image.any() else None)


def test_masks_are_compared_with_the_patches_that_the_backbone_saw(chain: Chain, images: Path, tmp_path: Path) -> None:
    """A mask of the left half covers the left half of the patches, whatever the aspect, since crops are centred."""
    side = round(len(chain.patches) ** 0.5)
    shares, classes, _ = bridge.read_masks(images / "masks", chain.latents, side)
    for share in shares.values():
        mask = share[[name for name, _ in classes].index("mask")]
        assert mask[:, : side // 2].min() > 0.99 - 1 / side
        assert mask[:, -(side // 2) :].max() < 0.01 + 1 / side
    done = write_mask_agreement(chain.latents, images / "masks", tmp_path / "masks", n_shuffles=0, stage_one=bridge)
    assert (done.n_images, done.n_patches) == (len(SIZES), len(SIZES) * len(chain.patches))
    table = pq.read_table(tmp_path / "masks" / "agreement.parquet").to_pylist()
    assert {row["class"] for row in table} >= {"mask"}


def test_the_atlas_has_this_grid_and_these_kinds_of_tokens(chain: Chain, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "atlas"
    build_atlas(
        chain.root / "barcodes",
        chain.root / "concepts",
        chain.root / "latents",
        out,
        AtlasConfig(pages="top", top=3, n_images=2),
        stage_one=bridge,
        roots=[images],
    )
    side = round(len(chain.patches) ** 0.5)
    page = next((out / "images").glob("*.html")).read_text()
    assert f'data-side="{side}"' in page
    assert ('id="cls"' in page, 'id="registers"' in page) == (bool(chain.cls), bool(chain.registers))
    assert ("CLS" in page) == bool(chain.cls)
    words = (out / "words.html").read_text()
    assert f"cut into {side} \N{MULTIPLICATION SIGN} {side} squares" in words
    assert ("(CLS)" in words, "the registers" in words) == (bool(chain.cls), bool(chain.registers))
    data = next((out / "data").glob("image-*.js")).read_text()
    assert ("register_latents" in data) == bool(chain.registers)
    assert not verify_folder(out).problems
    maps = re.findall(r'data-map="([^"]+)"', next((out / "concepts").glob("*.html")).read_text())
    assert {len(each) * 3 // 4 - each.count("=") for each in maps} == {side * side}


def test_relations_and_baselines_take_their_tokens_by_name(chain: Chain) -> None:
    latents, dense = chain.latents, [dense_tokens(chain.latents, image) for image in range(len(SIZES))]
    for token_set in chain.token_sets:
        found = find_neighbours(
            chain.root / "sae", NeighbourConfig(token_set=token_set, tau=TAU), latents=[latents.root], chosen=[0]
        )
        assert found.n_tokens == len(SIZES) * len(chain.positions(token_set))
        at = chain.positions(token_set)
        row = next(row for row in found.table.to_pylist() if row["n_tokens"] is not None)
        active = np.concatenate([tokens[at] for tokens in dense]) > np.float32(TAU)
        assert row["n_tokens"] == active[:, 0].sum()
    cache = ActivationStore(chain.root / "acts")
    tokens: npt.NDArray[np.float64] = cache.read_images(range(len(SIZES))).astype(np.float64)
    means = read_image_tokens(
        [cache], [str(name) for name in column(cache.images, "image_id")], progress=lambda done, total, state: None
    )
    assert np.allclose(means.patches, tokens[:, chain.patches].mean(1))
    assert means.cls.shape == (len(SIZES), tokens.shape[2] * len(chain.cls))
    assert not chain.cls or np.array_equal(means.cls, tokens[:, 0])


def test_a_damaged_cache_is_repaired_and_measured_with_the_same_model(
    chain: Chain, images: Path, tmp_path: Path
) -> None:
    cache = chain.root / "acts"
    done = measure_fidelity(cache, weights=str(chain.model), root=images, device="cpu", workers=1, n_images=3)
    assert done.fvu < 1e-5
    assert (done.has_cls, "the backbone has none" in done.rows()["FVU"]) == (bool(chain.cls), not chain.cls)
    place = chunk_path(cache, 0)
    whole = place.read_bytes()
    place.write_bytes(bytes(len(whole)))
    assert repair(cache, weights=str(chain.model), root=images, device="cpu", workers=1).chunks == [0]
    assert place.read_bytes() == whole
