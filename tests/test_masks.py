"""Agreement of maps with masks: equal to slow twins, blind to chance, and a texture is found where it was painted."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from cli import cli
from cytocache.datasets import open_images
from cytocache.demo_cells import draw_cell
from cytocache.extract import ExtractConfig, extract
from cytocache.images import read_mask
from cytocache.masks import _shares, find_masks, read_shares
from cytosae.config import TrainConfig
from cytosae.encode import encode
from cytosae.masks import (
    MaskAgreement,
    RankedValues,
    mask_agreement,
    rank,
    read_ranked,
    shuffled_agreement,
    write_mask_agreement,
)
from cytosae.patch_maps import patch_map, read_tokens
from cytosae.train import train
from stores import MASKS, LatentStore, ResultStore
from stores.errors import BadInput
from stores.tables import column

SIDE, PIXELS = 16, 14


# ------------------------------------------------------------------------------------------------ slow twins


def slow_auroc(values: np.ndarray, foreground: np.ndarray) -> float:
    """Every pair of a foreground and a background patch."""
    inside, outside = values[foreground], values[~foreground]
    return sum((a > b) + 0.5 * (a == b) for a in inside for b in outside) / (len(inside) * len(outside))


def slow_iou(values: np.ndarray, foreground: np.ndarray) -> tuple[float, float]:
    """Every value above 0 as a threshold; of equally good ones the largest."""
    best = (-1.0, -1.0)
    for threshold in sorted({float(value) for value in values if value > 0}):
        chosen = values >= threshold
        best = max(best, ((chosen & foreground).sum() / (chosen | foreground).sum(), threshold))
    return best


def adversarial(seed: int, n_latents: int = 9, n_images: int = 5, n_patches: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """((n_images * n_patches, n_latents) values, (n_images, n_patches) masks): ties, a silent and a full latent."""
    rng = np.random.default_rng(seed)
    dense = rng.integers(0, 4, (n_images * n_patches, n_latents)).astype(np.float32) / 2
    dense[rng.random(dense.shape) < 0.5] = 0
    masks = rng.random((n_images, n_patches)) < 0.3
    masks[1] = False
    dense[:, 0] = 0
    dense[:, 1] = 1 + rng.integers(0, 2, len(dense))
    dense[:, 2] = masks.ravel()
    dense[:, 3] = 1 - masks.ravel()
    dense[:, 4] = 0
    dense[7, 4] = 0.25
    return dense, masks


def ranked_of(dense: np.ndarray) -> RankedValues:
    """The entries in a shuffled order, as no reader gives them."""
    rows, columns = np.nonzero(dense)
    order = np.random.default_rng(1).permutation(len(rows))
    patches, latents = rows[order].astype(np.int32), columns[order].astype(np.uint16)
    return rank(latents, dense[patches, latents], patches, n_latents=dense.shape[1], n_patches=len(dense))


@pytest.mark.parametrize("seed", range(6))
def test_agreement_equals_every_pair_and_every_threshold(seed: int) -> None:
    dense, masks = adversarial(seed)
    found = mask_agreement(ranked_of(dense), masks.ravel())
    for latent in range(dense.shape[1]):
        if not dense[:, latent].any():
            assert np.isnan([found.auroc[latent], found.iou[latent], found.threshold[latent]]).all()
            continue
        assert found.auroc[latent] == pytest.approx(slow_auroc(dense[:, latent], masks.ravel()), abs=1e-12)
        iou, threshold = slow_iou(dense[:, latent], masks.ravel())
        assert found.iou[latent] == pytest.approx(iou, abs=1e-12)
        assert found.threshold[latent] == threshold
    assert (found.auroc[2], found.iou[2], found.auroc[3], found.iou[3]) == (1, 1, 0, 0)


@pytest.mark.parametrize("seed", range(3))
def test_null_equals_shuffling_by_hand(seed: int) -> None:
    """Whole masks change places, with the same permutations; p counts the observed among them."""
    dense, masks = adversarial(seed)
    ranked = ranked_of(dense)
    found = mask_agreement(ranked, masks.ravel())
    null = shuffled_agreement(ranked, masks, found, n_shuffles=7, seed=3)
    assert null is not None
    rng = np.random.default_rng(3)
    orders = [rng.permutation(len(masks)) for _ in range(7)]
    latents = [n for n in range(dense.shape[1]) if dense[:, n].any()]
    for slow, observed, mean, p, p_any, ceiling in (
        (slow_auroc, found.auroc, null.mean_auroc, null.p_auroc, null.p_any_auroc, null.expected_max_auroc),
        (lambda *at: slow_iou(*at)[0], found.iou, null.mean_iou, null.p_iou, null.p_any_iou, null.expected_max_iou),
    ):
        chance = np.array([[slow(dense[:, n], masks[order].ravel()) for n in latents] for order in orders])
        assert ceiling == pytest.approx(chance.max(1).mean())
        assert np.isnan(mean[0])
        assert np.isnan(p[0])
        for place, latent in enumerate(latents):
            slack = 1e-12  # the twin adds up in another order
            assert mean[latent] == pytest.approx(chance[:, place].mean())
            assert p[latent] == (1 + (chance[:, place] >= observed[latent] - slack).sum()) / 8
            assert p_any[latent] == (1 + (chance.max(1) >= observed[latent] - slack).sum()) / 8
    assert shuffled_agreement(ranked, masks, found, n_shuffles=0, seed=3) is None
    nothing = MaskAgreement(*(np.full(9, np.nan),) * 3)
    assert shuffled_agreement(ranked, masks, nothing, n_shuffles=5, seed=3) is None


def test_a_latent_of_the_centre_agrees_by_chance_alone() -> None:
    """It fires at the centre of every image, where all cells are: a high AUROC, and the null says so."""
    rng = np.random.default_rng(0)
    masks = np.zeros((20, SIDE, SIDE), bool)
    for mask in masks:
        mask[4:12, 4:12] = rng.random((8, 8)) < 0.8
    centre = np.zeros((SIDE, SIDE))
    centre[4:12, 4:12] = 1
    dense = np.stack([np.tile(centre.ravel(), 20), masks.ravel()], axis=1).astype(np.float32)
    found = mask_agreement(ranked_of(dense), masks.ravel())
    null = shuffled_agreement(ranked_of(dense), masks.reshape(20, -1), found, n_shuffles=99, seed=0)
    assert null is not None
    assert found.auroc[0] > 0.95
    assert null.p_auroc[0] == 1  # whoever gets which mask
    assert (null.p_auroc[1], null.p_any_auroc[1]) == (0.01, 0.01)
    assert null.expected_max_auroc == pytest.approx(found.auroc[0], abs=0.05)


def test_ranked_values_are_the_patches_of_the_store(made: Path) -> None:
    """CLS is left out, images in the order asked for; and too many are refused before they are read."""
    latents = LatentStore(made / "latents.zarr")
    images = [3, 0]
    ranked = read_ranked(latents, images)
    maps = np.concatenate([read_tokens(latents, image).toarray()[1:] for image in images])
    assert ranked.n_patches == len(maps) == 512
    for latent in range(0, 384, 37):
        own = slice(ranked.starts[latent], ranked.starts[latent + 1])
        dense = np.zeros(512, np.float32)
        dense[ranked.patches[own]] = ranked.values[own]
        assert (dense == maps[:, latent]).all()
        assert (np.diff(ranked.values[own]) >= 0).all()


# ------------------------------------------------------------------------------------------------ files


def test_shares_are_exact_areas() -> None:
    """Against masks that were blown up until no pixel lies between two patches."""
    rng = np.random.default_rng(0)
    for height, width in ((7, 5), (16, 16), (33, 100), (1, 1), (224, 200)):
        mask = rng.random((height, width)) < 0.5
        large = np.kron(mask, np.ones((16, 16)))  # 16 h x 16 w: a patch is h x w of these
        expected = large.reshape(16, height, 16, width).mean((1, 3))
        assert np.allclose(_shares(mask, SIDE), expected, atol=1e-12)


def save(path: Path, values: np.ndarray, mode: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(values) if mode is None else Image.fromarray(values).convert(mode)
    picture.save(path)
    return path


def test_any_value_above_zero_is_foreground(tmp_path: Path) -> None:
    """Also 1 of 65,535 and entry 1 of a palette that is painted black; alpha and JPEG are no masks."""
    labels = np.zeros((4, 6), np.uint8)
    labels[1:3, 2:5] = 1
    expected = labels > 0
    palette = Image.fromarray(labels)
    palette.putpalette([0, 0, 0] * 256)
    palette.save(tmp_path / "p.png")
    save(tmp_path / "l.png", labels)
    save(tmp_path / "l.tif", labels)
    save(tmp_path / "i16.png", labels.astype(np.uint16))
    save(tmp_path / "f.tif", labels.astype(np.float32))
    save(tmp_path / "one.png", labels * 255, "1")
    save(tmp_path / "rgb.png", np.stack([labels * 0, labels, labels * 0], axis=2))
    save(tmp_path / "rgba.png", np.stack([labels, labels * 0, labels * 0, labels * 0 + 255], axis=2))
    save(tmp_path / "la.png", np.stack([labels, labels * 0 + 255], axis=2))
    for path in sorted(tmp_path.iterdir()):
        mask, error = read_mask(path)
        assert error is None, path.name
        assert mask is not None
        assert (mask == expected).all(), path.name
    save(tmp_path / "x.jpg", labels * 255)
    (tmp_path / "not.png").write_bytes(b"text")
    assert read_shares(tmp_path / "x.jpg", SIDE) == "a JPEG loses what a mask needs; save it as PNG"
    assert read_shares(tmp_path / "not.png", SIDE) == "not a JPEG, PNG, TIFF or BMP image"
    assert read_shares(tmp_path / "none.png", SIDE) == "no such file"


def images_called(*paths: str) -> pa.Table:
    return pa.table({"image_id": [f"d/{path}" for path in paths], "path": list(paths)})


def test_masks_of_a_folder_are_named_like_the_images(tmp_path: Path) -> None:
    """By the whole path first, then by the name if only one image bears it; what cannot be told apart is refused."""
    images = images_called("a/1.jpg", "b/1.jpg", "b/2.tif", "c.x.png")
    blank = np.zeros((2, 2), np.uint8)
    for name in ("a/1.png", "b/1.PNG", "2.png", "c.x.png", "other.png", ".hidden.png"):
        save(tmp_path / "m" / name, blank)
    (tmp_path / "m" / "notes.txt").write_text("no mask")
    found = find_masks(tmp_path / "m", images)
    assert {index: path.name for index, path in found.paths.items()} == {
        0: "1.png",
        1: "1.PNG",
        2: "2.png",
        3: "c.x.png",
    }
    assert found.unknown == ["other.png"]
    save(tmp_path / "m" / "b" / "2.png", blank)
    with pytest.raises(BadInput, match=r"cannot be assigned: another mask is called '2'; give a table"):
        find_masks(tmp_path / "m", images)
    save(tmp_path / "n" / "1.png", blank)
    with pytest.raises(BadInput, match=r"cannot be assigned: 2 images are called '1'; give a table"):
        find_masks(tmp_path / "n", images)
    save(tmp_path / "o" / "5.png", blank)
    with pytest.raises(BadInput, match=r"none of the 1 masks of .* is of an image here \(5\.png\)"):
        find_masks(tmp_path / "o", images)
    with pytest.raises(BadInput, match="--root belongs to a table of masks"):
        find_masks(tmp_path / "o", images, root=tmp_path)


def test_masks_of_a_table(tmp_path: Path) -> None:
    images = images_called("1.png", "2.png")
    table = tmp_path / "m.csv"
    table.write_text("image_id,mask,by\nd/2.png,sub/x.png,me\nd/9.png,y.png,me\n")
    found = find_masks(table, images)
    assert found.paths == {1: tmp_path / "sub" / "x.png"}
    assert found.unknown == ["d/9.png"]
    assert find_masks(table, images, root=tmp_path / "r").paths == {1: tmp_path / "r" / "sub" / "x.png"}
    pq.write_table(pa.table({"image_id": ["d/1.png"], "mask": ["x.png"]}), tmp_path / "m.parquet")
    assert find_masks(tmp_path / "m.parquet", images).paths == {0: tmp_path / "x.png"}
    for content, words in {
        "image_id,path\nd/1.png,x.png\n": r"has no column 'mask' \(found: image_id, path\)",
        "image_id,mask\nd/1.png,../x.png\n": "does not lie below the images' root",
        "image_id,mask\nd/1.png,/etc/x.png\n": "does not lie below the images' root",
        "image_id,mask\nd/1.png,x.png\nd/1.png,y.png\n": "1 repeated image ids",
        "image_id,mask\nd/1.png,\n": "empty path",
        "image_id,mask\n": "lists no images",
    }.items():
        table.write_text(content)
        with pytest.raises(BadInput, match=words):
            find_masks(table, images)
    with pytest.raises(BadInput, match=r"no masks at .*: expected a folder"):
        find_masks(tmp_path / "nowhere", images)


# ------------------------------------------------------------------------------------------------ the command


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["concept", "masks", *map(str, arguments)])


@pytest.fixture(scope="module")
def painted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight drawn cells with stripes on twelve patches each; masks/ says which. latents.zarr of a small, sparse SAE."""
    root = tmp_path_factory.mktemp("painted")
    stripes = np.zeros((PIXELS, PIXELS, 3), np.uint8)
    stripes[::2], stripes[1::2] = (250, 220, 40), (10, 60, 20)
    rng = np.random.default_rng(0)
    for n in range(8):
        pixels = draw_cell(("lymphocyte", "eosinophil")[n % 2], np.random.default_rng(n), size=224).copy()
        mask = np.zeros((224, 224), np.uint8)
        for patch in rng.choice(SIDE * SIDE, 12, replace=False):
            row, left = int(patch) // SIDE * PIXELS, int(patch) % SIDE * PIXELS
            pixels[row : row + PIXELS, left : left + PIXELS] = stripes
            mask[row : row + PIXELS, left : left + PIXELS] = 1 + n
        save(root / "images" / f"{n:02d}.png", pixels)
        save(root / "masks" / f"{n:02d}.png", mask)
    extract(open_images(root / "images"), root / "acts.zarr", ExtractConfig(batch_size=4))
    settings = {"expansion": 1, "l1": 5e-4, "lr": 2e-3, "warmup_steps": 10, "batch_tokens": 1024, "tokens": 1024 * 50}
    train([root / "acts.zarr"], root / "run", TrainConfig(**settings))  # type: ignore[arg-type]
    encode(root / "acts.zarr", root / "run", root / "latents.zarr")
    return root


def test_a_painted_texture_is_found_where_it_was_painted(painted: Path, tmp_path: Path) -> None:
    """Some latent is active there, and nowhere as active; the table says so, and so does its map, patch by patch."""
    done = run(painted / "latents.zarr", painted / "masks", "-o", tmp_path / "m", "--shuffles", 50, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    best = found["best_by_iou"][0]
    assert (found["n_images"], found["n_patches"], found["n_foreground"]) == (8, 8 * 256, 96)
    assert best["iou"] > 0.95
    assert best["auroc"] > 0.99
    assert best["iou_p_any"] == best["auroc_p_any"] == 1 / 51
    assert found["expected_max_iou"] < 0.2
    latents = LatentStore(painted / "latents.zarr")
    n_right = 0
    for image, name in enumerate(column(latents.images, "path")):
        mask = np.asarray(Image.open(painted / "masks" / str(name)))[7::14, 7::14] > 0
        shown = patch_map(read_tokens(latents, image), best["latent"])
        n_right += int(((shown >= best["threshold"]) == mask).sum())
    assert n_right >= 8 * 256 - 8
    table = ResultStore(tmp_path / "m", MASKS).table("agreement")
    assert table.num_rows == latents.spec.n_latents
    assert (tmp_path / "m" / "agreement.png").exists()
    again = run(painted / "latents.zarr", painted / "masks", "-o", tmp_path / "m", "--shuffles", 50)
    assert "already complete" in again.stderr
    assert f"IoU    latents {best['latent']} ({best['iou']:.3f})" in again.stdout


def test_what_is_left_out_is_named(made: Path, tmp_path: Path) -> None:
    """Of made's ten images, image 4 is unreadable; a mask of nobody, and one that is no image."""
    latents = LatentStore(made / "latents.zarr")
    paths = [str(path) for path in column(latents.images, "path")]
    half = np.zeros((8, 8), np.uint8)
    half[:, :4] = 1
    for n in (0, 1, 4):
        save(tmp_path / "masks" / Path(paths[n]).with_suffix(".png"), half)
    save(tmp_path / "masks" / paths[2], half).write_bytes(b"no image")
    save(tmp_path / "masks" / "nobody.png", half)
    command = (latents.root, tmp_path / "masks", "-o", tmp_path / "m", "--shuffles", 2)
    done = run(*command)
    assert done.exit_code == 0, done.output
    assert "left out: 1 mask of no image here (nobody.png)" in done.stdout
    assert "left out: 1 unreadable mask (02.png: not a JPEG, PNG, TIFF or BMP image)" in done.stdout
    assert "left out: 1 mask of unreadable images (04.png)" in done.stdout
    assert "2 images with masks, 50.0% of the patches are foreground" in done.stdout
    assert "| 4/4 " in done.stderr, "each mask is told of, the last one too, whose image is unreadable"
    null = ResultStore(tmp_path / "m", MASKS).table("agreement")["auroc_p"]
    assert set(null.to_pylist()) <= {1.0, None}  # the two masks are equal: every shuffle is the observed

    other = np.zeros((8, 8), np.uint8)
    other[0, 0] = 1
    save(tmp_path / "masks" / paths[0], other)
    assert run(*command).exit_code == 1  # other masks are other settings
    alone = (latents.root, tmp_path / "one", "-o", tmp_path / "n")
    save(tmp_path / "one" / paths[0], half)
    done = run(*alone)
    assert done.exit_code == 0, done.output
    assert "no null: nothing was shuffled" in done.stdout
    assert ResultStore(tmp_path / "n", MASKS).table("agreement")["auroc_p"].null_count == 384


def test_mistakes(made: Path, tmp_path: Path) -> None:
    latents = LatentStore(made / "latents.zarr")
    for share, words in (
        (1.0, "every patch of 2 masked images is foreg"),
        (0.4, "no patch of 2 masked images is"),
    ):
        shares = {0: np.full((16, 16), share), 1: np.full((16, 16), share)}
        with pytest.raises(BadInput, match=words):
            write_mask_agreement(latents, shares, tmp_path / "out")
    with pytest.raises(BadInput, match="no readable image has a mask"):
        write_mask_agreement(latents, {}, tmp_path / "out")
    with pytest.raises(BadInput, match=r"min_share must be above 0 and at most 1; found 0"):
        write_mask_agreement(latents, {}, tmp_path / "out", min_share=0)
    assert not (tmp_path / "out").exists()


def test_too_many_values_are_refused_before_they_are_read(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    latents = LatentStore(made / "latents.zarr")
    monkeypatch.setattr("cytosae.masks.MAX_NONZEROS", 1000)
    monkeypatch.setattr(LatentStore, "read_images", None)
    with pytest.raises(BadInput, match=r"the 2 masked images hold [\d,]+ values, more than 1,000; take fewer masks"):
        read_ranked(latents, [0, 1])
