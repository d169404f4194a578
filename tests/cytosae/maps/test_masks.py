"""Agreement of maps with masks: equal to slow twins, right about chance with patients, and masks are read by value."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from PIL import Image, ImageDraw

from cli import cli
from cytocache.datasets import open_images
from cytocache.demo_cells import draw_cell
from cytocache.extract import ExtractConfig, extract
from cytocache.masks import MaskFiles, MaskShares, _shares, find_masks, read_all_shares
from cytosae.latents.encode import encode
from cytosae.maps import patch_map, read_tokens, write_mask_agreement
from cytosae.maps.mask_chance import chance_agreement, exchanged_masks
from cytosae.maps.mask_ranks import RankedValues, halves, mask_agreement, rank, read_ranked
from cytosae.sae import TrainConfig
from cytosae.training.train import train
from stores import MASKS, LatentStore, ResultStore
from stores.errors import BadInput
from stores.tables import column

SIDE, PIXELS = 16, 14


# ------------------------------------------------------------------------------------------------ slow twins


def slow_auroc(values: np.ndarray, foreground: np.ndarray, unit_of: np.ndarray) -> float:
    """Every pair within an image; images summed within a unit, units averaged. All (n_images, ...)."""
    scores = []
    for unit in np.unique(unit_of):
        won = pairs = 0.0
        for image in np.flatnonzero((unit_of == unit) & values.any(axis=1)):
            inside, outside = values[image][foreground[image]], values[image][~foreground[image]]
            won += sum((a > b) + 0.5 * (a == b) for a in inside for b in outside)
            pairs += len(inside) * len(outside)
        if pairs:
            scores.append(won / pairs)
    return float(np.mean(scores)) if scores else np.nan


def slow_threshold(values: np.ndarray, foreground: np.ndarray) -> float:
    """Of every value above 0 the best; of equally good ones the largest; inf where none overlaps."""
    best = (0.0, np.inf)
    for threshold in sorted({float(value) for value in values.ravel() if value > 0}, reverse=True):
        chosen = values >= threshold
        overlap = (chosen & foreground).sum() / (chosen | foreground).sum()
        best = (overlap, threshold) if overlap > best[0] else best
    return best[1]


def slow_iou(values: np.ndarray, foreground: np.ndarray, is_second: np.ndarray) -> float:
    """Each image by the threshold of the half in which it is not."""
    chosen = np.zeros(values.shape, bool)
    for side in (True, False):
        chosen[is_second == side] = values[is_second == side] >= slow_threshold(
            values[is_second != side], foreground[is_second != side]
        )
    return float((chosen & foreground).sum() / (chosen | foreground).sum())


UNITS = np.array([0, 0, 1, 2, 2, 2, 3])


def adversarial(seed: int, n_latents: int = 9, n_patches: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """((n_images, n_patches, n_latents) values, (n_images, n_patches) masks): ties, a silent and a full latent."""
    rng = np.random.default_rng(seed)
    dense = rng.integers(0, 4, (len(UNITS), n_patches, n_latents)).astype(np.float32) / 2
    dense[rng.random(dense.shape) < 0.5] = 0
    masks = rng.random((len(UNITS), n_patches)) < 0.3
    masks[1], masks[3] = False, True
    dense[:, :, 0] = 0
    dense[:, :, 1] = 1 + rng.integers(0, 2, masks.shape)
    dense[:, :, 2] = masks
    dense[:, :, 3] = 1 - masks
    dense[:, :, 4] = 0
    dense[0, 7, 4] = 0.25
    return dense, masks


def ranked_of(dense: np.ndarray, unit_of: np.ndarray) -> RankedValues:
    """The entries in a shuffled order, as no reader gives them."""
    flat = dense.reshape(-1, dense.shape[2])
    rows, columns = np.nonzero(flat)
    order = np.random.default_rng(1).permutation(len(rows))
    patches, latents = rows[order].astype(np.int32), columns[order].astype(np.uint16)
    return rank(
        latents,
        flat[patches, latents],
        patches,
        n_latents=dense.shape[2],
        n_per_image=dense.shape[1],
        unit_of=unit_of,
    )


@pytest.mark.parametrize("seed", range(5))
def test_agreement_equals_every_pair_and_every_threshold(seed: int) -> None:
    dense, masks = adversarial(seed)
    half = halves(4, seed)
    assert half.sum() == 2
    found = mask_agreement(ranked_of(dense, UNITS), masks, half)
    for latent in range(dense.shape[2]):
        values = dense[:, :, latent]
        if not values.any():
            assert np.isnan([found.auroc[latent], found.iou[latent], found.threshold[latent]]).all()
            continue
        assert found.auroc[latent] == pytest.approx(slow_auroc(values, masks, UNITS), abs=1e-6, nan_ok=True)
        assert found.iou[latent] == pytest.approx(slow_iou(values, masks, half[UNITS] == 1), abs=1e-12)
        best = slow_threshold(values, masks)
        assert found.threshold[latent] == (best if np.isfinite(best) else values.max())
    assert (found.auroc[2], found.iou[2], found.auroc[3], found.iou[3]) == (1, 1, 0, 0)
    assert np.isnan(mask_agreement(ranked_of(dense, UNITS), masks, half * 0).iou).all()


def test_chance_equals_exchanging_by_hand() -> None:
    """Patients exchange masks, with the same permutations; p is the place of the observed, scaled, on both sides."""
    dense, masks = adversarial(2)
    masks[1, :4], masks[3, 5:] = True, False
    ranked, both, half = ranked_of(dense, UNITS), np.stack([masks, ~masks]), halves(4, 3)
    found = [mask_agreement(ranked, mask, half) for mask in both]
    chance = chance_agreement(ranked, both, found, n_shuffles=19, seed=3)
    assert chance is not None
    rng, members = np.random.default_rng(3), [np.flatnonzero(UNITS == unit) for unit in range(4)]
    orders = [np.arange(4), *(rng.permutation(4) for _ in range(19))]
    tested = [s for s in range(9) if (dense[:, :, s].any(axis=1)).sum() >= 5]
    assert 4 not in tested  # one image
    z = np.zeros((20, 2, len(tested)))
    raw = np.zeros_like(z)
    for row, order in enumerate(orders):
        given = np.concatenate([np.resize(members[order[unit]], len(members[unit])) for unit in range(4)])
        assert (exchanged_masks(masks, UNITS, order) == masks[given]).all()
        for place, s in enumerate(tested):
            raw[row, :, place] = [slow_auroc(dense[:, :, s], mask[given], UNITS) for mask in both]
    z = np.abs(raw - raw.mean(0)) / raw.std(0)
    n = (z >= z[0] - 1e-4).sum(0)
    assert chance.p_auroc[:, tested] == pytest.approx(n / 20)
    assert chance.p_any_auroc[:, tested] == pytest.approx((z.max((1, 2))[:, None, None] >= z[0] - 1e-4).sum(0) / 20)
    assert chance.mean_auroc[:, tested] == pytest.approx(raw[1:].mean(0), abs=1e-6)
    # the value from which on p_any is 1 of 20: above all but one of the largest distances, in this latent's own unit
    from_here = raw.mean(0) + raw.std(0) * np.sort(z.max((1, 2)))[-2]
    from_here[from_here > 1] = np.nan
    assert chance.needed_auroc[:, tested] == pytest.approx(from_here, abs=1e-4, nan_ok=True)
    assert chance.p_auroc[0] == pytest.approx(chance.p_auroc[1], nan_ok=True)  # a class and its complement
    assert np.isnan(chance.p_place[0, 4])
    signs = np.random.default_rng([3, 2]).choice(np.array([-1.0, 1.0]), (19, 4))
    steps = np.random.default_rng([3, 3]).integers(12, size=(19, 4))
    moved = np.zeros((20, 2, len(tested)))
    for row in range(20):
        where = (
            masks if not row else np.stack([np.roll(m, steps[row - 1][u]) for m, u in zip(masks, UNITS, strict=True)])
        )
        for place, s in enumerate(tested):
            moved[row, :, place] = [slow_auroc(dense[:, :, s], each, UNITS) for each in (where, ~where)]
    far = np.abs(moved - moved.mean(0)) / np.maximum(moved.std(0), 1e-6)
    p_moved = (far >= far[0] - 1e-4).sum(0) / 20
    for place, s in enumerate(tested):
        d = [slow_auroc(dense[UNITS == u][:, :, s], masks[UNITS == u], UNITS[UNITS == u]) - 0.5 for u in range(4)]
        d = np.nan_to_num(d).tolist()  # a unit where it is silent says nothing
        beyond = (np.abs(signs @ np.array(d)) >= abs(sum(d)) - 1e-6).sum()
        assert chance.p_place[0, s] == pytest.approx(max((1 + beyond) / 20, p_moved[0, place])), place
    assert chance_agreement(ranked, both, found, n_shuffles=0, seed=3) is None
    silent = ranked_of(dense * 0, UNITS)
    assert chance_agreement(silent, both, found, n_shuffles=5, seed=3) is None


N_PATIENTS, PER_PATIENT, WIDE = 12, 4, 8


def cells(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """((n_images,) patients, (n_images, 64) masks): a disk per cell, whose place and size depend on the patient."""
    unit_of = np.repeat(np.arange(N_PATIENTS), PER_PATIENT)
    middle = rng.normal(3.5, 1, (N_PATIENTS, 2))[unit_of] + rng.normal(0, 0.3, (len(unit_of), 2))
    radius = rng.uniform(1.5, 3.5, N_PATIENTS)[unit_of]
    y, x = np.mgrid[:WIDE, :WIDE]
    far = np.hypot(y - middle[:, 0, None, None], x - middle[:, 1, None, None])
    return unit_of, (far < radius[:, None, None]).reshape(len(unit_of), -1)


def blobs(rng: np.random.Generator, unit_of: np.ndarray, n_latents: int) -> np.ndarray:
    """(n_images, 64, n_latents) smooth maps whose place depends on the patient, and on nothing else."""
    middle = rng.uniform(0, WIDE - 1, (N_PATIENTS, n_latents, 2))[unit_of]
    y, x = (axis[None, :, :, None] for axis in np.mgrid[:WIDE, :WIDE])
    far = np.hypot(y - middle[:, None, None, :, 0], x - middle[:, None, None, :, 1])
    values = np.maximum(0, 2.5 - far) * rng.uniform(0.5, 1.5, (len(unit_of), 1, 1, n_latents))
    return values.reshape(len(unit_of), WIDE * WIDE, n_latents).astype(np.float32)


def agreement_of(dense: np.ndarray, masks: np.ndarray, unit_of: np.ndarray, n_shuffles: int = 99, seed: int = 0) -> Any:
    ranked = ranked_of(dense, unit_of)
    found = mask_agreement(ranked, masks, halves(int(unit_of[-1]) + 1, seed))
    chance = chance_agreement(ranked, masks[None], [found], n_shuffles=n_shuffles, seed=seed)
    assert chance is not None
    return found, chance


def test_what_is_true_and_what_is_not() -> None:
    """Nucleus, its complement, the middle, and a latent that is everywhere, more so where the nucleus is large."""
    rng = np.random.default_rng(0)
    unit_of, masks = cells(rng)
    y, x = np.mgrid[:WIDE, :WIDE]
    middle = np.tile((np.hypot(y - 3.5, x - 3.5) < 2).ravel(), (len(masks), 1))
    noise = rng.random((*masks.shape, 20)) * masks.sum(axis=1)[:, None, None] ** 2
    dense = np.concatenate([np.stack([masks, ~masks, middle], axis=2), noise], axis=2).astype(np.float32)
    found, chance = agreement_of(dense, masks, unit_of)
    is_enough = np.nan_to_num(found.auroc, nan=-1) >= np.nan_to_num(chance.needed_auroc[0], nan=2)
    above = found.auroc > chance.mean_auroc[0]
    assert is_enough.tolist() == ((chance.p_any_auroc[0] <= 0.05) & above).tolist()  # one scale
    assert 0 < is_enough.sum() < len(is_enough)
    assert found.auroc[:2].tolist() == [1, 0]
    assert found.iou[:2].tolist() == [1, 0]
    flat = dense[:, :, 3].ravel()
    pooled = np.mean(rng.choice(flat[masks.ravel()], 4000) > rng.choice(flat[~masks.ravel()], 4000))
    assert pooled > 0.6  # what the size of the cells makes of all patches together
    assert found.auroc[3:] == pytest.approx(np.full(20, 0.5), abs=0.06)
    assert abs(found.auroc[3:].mean() - 0.5) < 0.02
    assert (chance.p_auroc[0, :2] == 0.01).all()
    assert (chance.p_any_auroc[0, :2] <= 0.02).all()
    assert (chance.p_place[0, :3] == 0.01).all()  # the middle is the nucleus more often than not
    assert chance.p_auroc[0, 2] > 0.05 or chance.mean_auroc[0, 2] < found.auroc[2]
    assert (chance.p_auroc[0, 3:] <= 0.05).sum() <= 4
    assert (chance.p_place[0, 3:] <= 0.05).sum() <= 4
    assert min(chance.p_any_auroc[0, 3:].min(), chance.p_any_place[0, 3:].min()) > 0.02


@pytest.mark.slow
def test_false_finds_with_patients() -> None:
    """Maps and masks that have nothing to do with each other, both alike within a patient: 4 to 6% at 5%."""
    n_runs, n_latents = 200, 30
    below, any_below = np.zeros((n_runs, 2)), np.zeros((n_runs, 2))
    for run_number in range(n_runs):
        rng = np.random.default_rng(run_number)
        unit_of, masks = cells(rng)
        _, chance = agreement_of(blobs(rng, unit_of, n_latents), masks, unit_of, seed=run_number)
        below[run_number] = (chance.p_auroc <= 0.05).mean(), (chance.p_iou <= 0.05).mean()
        any_below[run_number] = (chance.p_any_auroc <= 0.05).any(), (chance.p_any_iou <= 0.05).any()
    assert (below.mean(0) > 0.04).all()
    assert (below.mean(0) < 0.06).all()
    assert (any_below.mean(0) <= 0.07).all()


def test_place_of_small_classes_and_rare_patches() -> None:
    """Few patches make skewed distances from 0.5: by signs alone 11 to 21% had p <= 0.05, and 93% of runs some.

    Random patches, a patient with 1 to 15 images. What is always inside, and what is always outside, is still found.
    """
    below, families = [], []
    for run_number in range(25):
        rng = np.random.default_rng(run_number)
        unit_of = np.repeat(np.arange(12), np.clip(np.exp(rng.normal(1, 1, 12)).astype(int), 1, 15))
        order = rng.random((len(unit_of), 64)).argsort(axis=1)
        masks = order < 4
        dense = (rng.random((len(unit_of), 64, 12)).argsort(axis=1) < 1).astype(np.float32)
        dense[:, :, 0] = order == 0
        dense[:, :, 1] = order > 40
        _, chance = agreement_of(dense, masks, unit_of, seed=run_number)
        assert (chance.p_place[0, :2] <= 0.02).all()
        below.append((chance.p_place[0, 2:] <= 0.05).mean())
        families.append((chance.p_any_place[0, 2:] <= 0.05).any())
    assert np.mean(below) <= 0.05
    assert np.mean(families) <= 0.1


def test_ranked_values_are_the_patches_of_the_store(made: Path) -> None:
    """CLS is left out, images in the order asked for; and too many are refused before they are read."""
    latents = LatentStore(made / "latents.zarr")
    images = [3, 0]
    ranked = read_ranked(latents, images, np.array([0, 1]))
    maps = np.stack([read_tokens(latents, image).toarray()[1:] for image in images])
    assert (ranked.n_images, ranked.n_units, ranked.n_per_image) == (2, 2, 256)
    for latent in range(0, 384, 37):
        own = slice(ranked.starts[latent], ranked.starts[latent + 1])
        dense = np.zeros(512, np.float32)
        dense[ranked.patches_by_value[own]] = ranked.by_value[own]
        assert (dense.reshape(2, 256) == maps[:, :, latent]).all()
        assert (np.diff(ranked.by_value[own]) >= 0).all()
        assert sorted(ranked.patches[own]) == sorted(ranked.patches_by_value[own])


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


def read(folder: Path, classes: str | None = None) -> MaskShares:
    paths = dict(enumerate(sorted(folder.iterdir())))
    return read_all_shares(MaskFiles(paths, []), np.ones(len(paths), bool), SIDE, classes)


def saved_in_every_way(folder: Path, labels: np.ndarray) -> None:
    """Values as they are, whatever the file: palettes painted black, 16 bits, floats, greys as colours, alpha."""
    folder.mkdir(exist_ok=True)
    palette = Image.fromarray(labels)
    palette.putpalette([0, 0, 0] * 256)
    palette.save(folder / "p.png")
    save(folder / "l.png", labels)
    save(folder / "l.tif", labels)
    save(folder / "i16.png", labels.astype(np.uint16))
    save(folder / "f.tif", labels.astype(np.float32))
    save(folder / "rgb.png", np.stack([labels] * 3, axis=2))
    save(folder / "la.png", np.stack([labels, labels * 0 + 255], axis=2))


def test_masks_are_read_by_value(tmp_path: Path) -> None:
    labels = np.zeros((32, 32), np.uint8)
    labels[4:28, 4:28], labels[8:20, 8:20] = 1, 2  # cytoplasm around a nucleus
    saved_in_every_way(tmp_path / "m", labels)
    found = read(tmp_path / "m")
    assert [(one.name, one.values) for one in found.classes] == [
        ("1", ("1",)),
        ("2", ("2",)),
        ("background", ("0",)),
    ]
    expected = np.stack([_shares(labels == value, SIDE) for value in (1, 2, 0)])
    assert not found.unreadable
    assert all(np.allclose(shares, expected) for shares in found.shares.values())
    assert len(found.shares) == 7
    named = read(tmp_path / "m", "2=nucleus,1=cytoplasm")
    assert [one.name for one in named.classes] == ["nucleus", "cytoplasm"]
    assert np.allclose(named.shares[0], expected[[1, 0]])
    for text in ("1=cell,2=cell", "any"):
        assert np.allclose(read(tmp_path / "m", text).shares[0], expected[:2].sum(0)[None])

    colors = np.zeros((32, 32, 3), np.uint8)
    colors[labels == 1], colors[labels == 2] = (0, 255, 0), (255, 255, 255)
    save(tmp_path / "c" / "a.png", colors)
    save(
        tmp_path / "c" / "b.png", np.where(labels[:, :, None] == 2, 255, np.zeros((1, 1, 3), np.uint8)).astype(np.uint8)
    )
    found = read(tmp_path / "c")
    assert [one.values for one in found.classes] == [("#00ff00",), ("#ffffff",), ("#000000",)]
    assert np.allclose(found.shares[0], expected)
    assert np.allclose(found.shares[1][1], expected[1])
    assert np.allclose(read(tmp_path / "c", "#FFFFFF=nucleus").shares[0], expected[[1]])

    saved_in_every_way(tmp_path / "b", (labels == 2).astype(np.uint8) * 255)
    save(tmp_path / "b" / "empty.png", labels * 0)
    assert [(one.name, one.values) for one in read(tmp_path / "b").classes] == [("mask", ("255",))]


def test_what_values_mean_is_not_guessed(tmp_path: Path) -> None:
    disk = Image.new("L", (256, 256))
    ImageDraw.Draw(disk).ellipse((40, 40, 200, 200), fill=255)
    labels = np.zeros((32, 32), np.uint8)
    labels[4:28, 4:28], labels[8:20, 8:20] = 1, 2
    (tmp_path / "smooth").mkdir()
    disk.resize((100, 100), Image.Resampling.BILINEAR).save(tmp_path / "smooth" / "a.png")
    soft = np.zeros((40, 40), np.uint8)
    soft[10:30, 10:30], soft[11:29, 11:29] = 128, 255
    save(tmp_path / "soft" / "a.png", soft)
    save(tmp_path / "objects" / "a.png", np.arange(400, dtype=np.uint8).reshape(20, 20) % 40)
    save(tmp_path / "two" / "a.png", (labels > 0).astype(np.uint8))
    save(tmp_path / "two" / "b.png", (labels > 0).astype(np.uint8) * 255)
    save(tmp_path / "mixed" / "a.png", labels)
    save(tmp_path / "mixed" / "b.png", np.stack([labels * 90, labels, labels], axis=2))
    save(tmp_path / "empty" / "a.png", labels * 0)
    for name, words in {
        "smooth": r"values above 0 .*smoothed edges, single objects or an image.*--classes VALUE=NAME",
        "soft": r"the value 128 .*lies only at the edges of others.*--classes any",
        "objects": r"the masks have 39 values above 0 \(1, 2, 3 and 36 more\)",
        "two": r"each mask has one value above 0, but not all the same \(1, 255\)",
        "mixed": r"a.png has numbers and b.png has colours",
        "empty": r"all 1 masks are 0 everywhere",
    }.items():
        with pytest.raises(BadInput, match=words):
            read(tmp_path / name)
        if name != "empty":
            assert read(tmp_path / name, "any").shares[0].max() == 1
    assert len(read(tmp_path / "two", "1=mask,255=mask").classes) == 1
    for text in ("1", "x=y", "1=", "=a", "#12=a", "1=a,1=b", "-1=a", ""):
        with pytest.raises(BadInput, match="--classes: "):
            read(tmp_path / "two", text)
    with pytest.raises(BadInput, match=r"no mask has the value 7 \(a\); found 0, 1, 255"):
        read(tmp_path / "two", "7=a")
    save(tmp_path / "bad" / "x.jpg", labels * 100)
    save(tmp_path / "bad" / "y.tif", labels.astype(np.float32) / 2)
    (tmp_path / "bad" / "z.png").write_bytes(b"text")
    assert read(tmp_path / "bad").unreadable == [
        "x.jpg: a JPEG loses what a mask needs; save it as PNG",
        "y.tif: its values are no whole numbers: probabilities? Save one number for each class",
        "z.png: not a JPEG, PNG, TIFF or BMP image",
    ]


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


@pytest.mark.stress
def test_a_painted_texture_is_found_where_it_was_painted(painted: Path, tmp_path: Path) -> None:
    """Some latent is active there, and nowhere as active; the table says so, and so does its map, patch by patch."""
    done = run(
        painted / "latents.zarr",
        painted / "masks",
        "-o",
        tmp_path / "m",
        "--classes",
        "any",
        "--shuffles",
        50,
        "--json",
    )
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    best = found["best_by_iou"][0]
    assert (found["n_images"], found["n_patches"], found["n_foreground"]) == (8, 8 * 256, 96)
    assert best["iou"] > 0.95
    assert best["auroc"] > 0.99
    assert best["iou_p"] <= 2 / 51
    assert best["place_p"] <= 3 / 51  # all eight signs alike: one in 128
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
    again = run(painted / "latents.zarr", painted / "masks", "-o", tmp_path / "m", "--classes", "any", "--shuffles", 50)
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
    assert "no p-values: nothing was shuffled" in done.stdout
    assert ResultStore(tmp_path / "n", MASKS).table("agreement")["auroc_p"].null_count == 384


def test_mistakes(made: Path, tmp_path: Path) -> None:
    latents = LatentStore(made / "latents.zarr")
    for share, words in (
        (1.0, "every patch of 2 masked images is of class 'mask'"),
        (0.4, "no patch of 2 masked images is of class"),
    ):
        shares = {0: np.full((1, 16, 16), share), 1: np.full((1, 16, 16), share)}
        with pytest.raises(BadInput, match=words):
            write_mask_agreement(latents, shares, tmp_path / "out")
    with pytest.raises(BadInput, match="no readable image has a mask"):
        write_mask_agreement(latents, {}, tmp_path / "out")
    with pytest.raises(BadInput, match=r"min_share must be above 0 and at most 1; found 0"):
        write_mask_agreement(latents, {}, tmp_path / "out", min_share=0)
    assert not (tmp_path / "out").exists()


def test_too_many_values_are_refused_before_they_are_read(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    latents = LatentStore(made / "latents.zarr")
    monkeypatch.setattr("cytosae.maps.mask_ranks.MAX_NONZEROS", 1000)
    monkeypatch.setattr(LatentStore, "read_images", None)
    with pytest.raises(BadInput, match=r"the 2 masked images hold [\d,]+ values, more than 1,000; take fewer masks"):
        read_ranked(latents, [0, 1], np.array([0, 1]))
