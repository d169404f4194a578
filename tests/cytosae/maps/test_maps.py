"""Maps show the stored values at the right place, for stored and new images; what cannot be shown is said."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as ss
from click.testing import CliRunner, Result
from concept_folders import concepts_of, dense_tokens, make_concepts
from PIL import Image

from cli import cli
from cytocache.pictures import Pictures, to_pixels
from cytosae.concepts import SelectionConfig, select_latents
from cytosae.latents import encode_image
from cytosae.maps import PatchQuery, Sources, patch_map, patch_side, read_tokens
from cytosae.maps.figures import RELEASED_DARK, released_rendering
from cytosae.maps.patch_maps import latents_of_patch, stretched
from cytosae.sae import load_sae
from stores import MAPS, SHEETS, ConceptStore, LatentSpec, LatentStore, ResultStore
from stores.errors import BadInput, SpecMismatch
from stores.tables import column


@pytest.fixture(scope="module")
def latents(made: Path) -> LatentStore:
    return LatentStore(made / "latents.zarr")


@pytest.fixture(scope="module")
def concepts(latents: LatentStore, tmp_path_factory: pytest.TempPathFactory) -> ConceptStore:
    return concepts_of(latents, tmp_path_factory.mktemp("concepts") / "c", fires_above=0.05)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["concept", *map(str, arguments)])


def fails(words: str, *arguments: object, code: int = 1) -> None:
    done = run(*arguments)
    assert done.exit_code == code, done.output
    assert words in done.stderr
    assert "Traceback" not in done.output


def busiest(store: LatentStore, image_index: int) -> list[int]:
    """Latents of an image, the largest sum over its patches first."""
    return [int(latent) for latent in np.argsort(-dense_tokens(store, image_index)[1:].sum(0), kind="stable")]


def is_figure(path: Path) -> bool:
    with Image.open(path.with_suffix(".png")) as picture:
        return "<svg" in path.with_suffix(".svg").read_text()[:1000] and np.asarray(picture.convert("L")).std() > 5


def test_patch_map_is_the_row_of_each_patch(latents: LatentStore) -> None:
    """Patch k sits at row k // 16, column k % 16, and CLS is left out."""
    dense, latent = dense_tokens(latents, 0), busiest(latents, 0)[0]
    shown = patch_map(read_tokens(latents, 0), latent)
    for k in range(256):
        assert shown[k // 16, k % 16] == dense[1 + k, latent]
    assert not patch_map(read_tokens(latents, 4), latent).any()  # image 4 could not be read
    with pytest.raises(BadInput, match="no latent 384 in the SAE of these tokens: it has 384 latents, counted from 0"):
        patch_map(read_tokens(latents, 0), 384)
    for n_tokens in (0, 1, 256, 262):
        with pytest.raises(BadInput, match=f"a square of patches; this store has {n_tokens} tokens"):
            patch_side(n_tokens)


@pytest.mark.parametrize(("height", "width"), [(224, 224), (48, 99), (7, 3)])
def test_stretched_equals_a_slow_twin(height: int, width: int) -> None:
    """Whatever the aspect: nearest is the patch that a pixel's corner lies in, smooth is bilinear between centres."""
    patches = np.random.default_rng(0).random((4, 4)).astype(np.float32)
    nearest, smooth = (stretched(patches, height, width, is_smooth=is_smooth) for is_smooth in (False, True))
    for y in range(height):
        for x in range(width):
            assert nearest[y, x] == patches[int(y * 4 / height), int(x * 4 / width)]
            v, u = (min(max((at + 0.5) * 4 / n - 0.5, 0), 3) for at, n in ((y, height), (x, width)))
            top, left = min(int(v), 2), min(int(u), 2)
            above, below = (
                patches[row, left] * (1 - (u - left)) + patches[row, left + 1] * (u - left) for row in (top, top + 1)
            )
            assert smooth[y, x] == pytest.approx(above * (1 - (v - top)) + below * (v - top), abs=1e-6)


def test_released_rendering_is_binary() -> None:
    """The minimum is dark, whatever else is bright; where all are equal, all are dark."""
    pixels = np.full((6, 4, 3), 200, np.uint8)
    shown = released_rendering(pixels, np.array([[0.5, 9], [0.6, 0.5]], np.float32))
    dark = int(200 * RELEASED_DARK)
    assert shown[:3, :2].tolist() == [[[dark] * 3] * 2] * 3
    assert shown[3:, 2:].tolist() == [[[dark] * 3] * 2] * 3
    assert (shown[:3, 2:] == 200).all()
    assert (shown[3:, :2] == 200).all()
    assert (released_rendering(pixels, np.zeros((2, 2), np.float32)) == dark).all()


def test_latents_of_a_patch_are_ranked_without_shared_and_noisy_ones(tmp_path: Path) -> None:
    """By hand: 0 is shared, 1 noisy, 2 at both limits, 3 and 5 tie, 4 is silent there, 6 is active at CLS only."""
    dense = np.zeros((5, 7), np.float32)
    dense[3] = [9, 8, 7, 2, 0, 2, 0]
    dense[0, 6] = 5
    frequency, mean = [1.0, 0.5, 0.999, 0.1, 0.1, 0.1, 0.1], [0.01, 0.1001, 0.1, 0.01, 0.01, 0.01, 0.01]
    statistics = {"d": {"frequency": frequency, "mean_activation": mean}, "e": {"frequency": [0.0] * 7}}
    statistics["e"]["mean_activation"] = [0.0] * 7
    concepts = make_concepts(tmp_path / "c", statistics)
    found = latents_of_patch(ss.csr_matrix(dense), PatchQuery(patch=2, dataset="d"), concepts)
    assert found["latent"].to_pylist() == [0, 1, 2, 3, 5]
    assert found["value"].to_pylist() == [9, 8, 7, 2, 2]
    assert found["is_shared"].to_pylist() == [True, False, False, False, False]
    assert found["is_noisy"].to_pylist() == [False, True, False, False, False]
    assert found["rank"].to_pylist() == [None, None, 1, 2, 3]
    stricter = PatchQuery(patch=2, dataset="d", shared=0.5, noisy=0.005)
    assert latents_of_patch(ss.csr_matrix(dense), stricter, concepts)["rank"].to_pylist() == [None] * 5
    other = latents_of_patch(ss.csr_matrix(dense), PatchQuery(patch=2, dataset="e"), concepts)
    assert other["rank"].to_pylist() == [1, 2, 3, 4, 5]
    for patch in (-1, 4):
        with pytest.raises(BadInput, match=f"patches are numbered 0 to 3, .*; found {patch}"):
            latents_of_patch(ss.csr_matrix(dense), PatchQuery(patch=patch, dataset="d"), concepts)
    none_shared = PatchQuery(patch=2, dataset="d", shared=1.1)
    assert latents_of_patch(ss.csr_matrix(dense), none_shared, concepts)["rank"].to_pylist() == [1, None, 2, 3, 4]
    with pytest.raises(BadInput, match=r"shared must be a number of at least 0; found -0\.5"):
        PatchQuery(patch=0, dataset="d", shared=-0.5)
    with pytest.raises(BadInput, match="noisy must be a number of at least 0; found inf"):
        PatchQuery(patch=0, dataset="d", noisy=float("inf"))


def test_map_of_latents(made: Path, latents: LatentStore, tmp_path: Path) -> None:
    """The command's table is the stored values; a latent may be named twice."""
    name, (first, *_, last) = column(latents.images, "image_id")[1], busiest(latents, 1)
    command: tuple[object, ...] = ("map", made / "latents.zarr", "-o", tmp_path / "m", "--image", name)
    command += ("--latent", first, "--latent", last, "--latent", first)
    done = run(*command)
    assert done.exit_code == 0, done.output
    dense = dense_tokens(latents, 1)[1:]
    assert f"latent {last}: largest value {dense[:, last].max():.4g}\n" in done.stdout
    expected = [
        (latent, k, k // 16, k % 16, value)
        for latent in (first, last)
        for k, value in enumerate(dense[:, latent].tolist())
        if value
    ]
    table = ResultStore(tmp_path / "m", MAPS).table("patches")
    assert [tuple(row.values()) for row in table.to_pylist()] == expected
    assert len(expected) > 100
    assert is_figure(tmp_path / "m" / "map")
    assert "already complete" in run(*command).stderr
    fails("patch maps with other settings (style.is_released False against True)", *command, "--released")
    before = (tmp_path / "m" / "map.png").read_bytes()
    assert run(*command, "--released", "--overwrite").exit_code == 0
    assert (tmp_path / "m" / "map.png").read_bytes() != before


@pytest.mark.stress
def test_map_of_a_patch_with_reference_images(
    made: Path, latents: LatentStore, concepts: ConceptStore, tmp_path: Path
) -> None:
    name = column(latents.images, "image_id")[0]
    patch = int(dense_tokens(latents, 0)[1:].sum(1).argmax())
    command: tuple[object, ...] = ("map", made / "latents.zarr", "-o", tmp_path / "m", "--image", name)
    command += ("--patch", patch, "--concepts", concepts.root)
    rule = ("--dataset", "other", "--noisy", 1e9)
    done = run(*command, *rule)
    assert done.exit_code == 0, done.output
    store = ResultStore(tmp_path / "m", MAPS)
    active = store.table("active")
    dense = dense_tokens(latents, 0)[1 + patch]
    assert sorted(active["latent"].to_pylist()) == np.flatnonzero(dense).tolist()
    assert 0 < sum(active["is_shared"].to_pylist()) < active.num_rows
    ranked = [row["latent"] for row in active.to_pylist() if row["rank"] is not None]
    frequency = concepts.latents("other")["frequency"].to_numpy()
    assert ranked == sorted(
        (n for n in np.flatnonzero(dense).tolist() if frequency[n] < 1), key=lambda n: (-dense[n], n)
    )
    assert set(store.table("patches")["latent"].to_pylist()) == set(ranked[:2])
    for latent in ranked[:2]:
        assert is_figure(tmp_path / "m" / f"latent{latent}")
    assert store.header.spec["query"] == {
        **{"patch": patch, "dataset": "other", "n_top": 2, "shared": 1.0, "noisy": 1e9}
    }
    fails("no latent is left at patch", *command[:3], tmp_path / "n", *command[4:], "--shared", 0)
    assert not (tmp_path / "n").exists()


@pytest.mark.stress
def test_a_new_image_file_gives_what_was_stored(made: Path, latents: LatentStore, tmp_path: Path) -> None:
    """The file of image 0, as if it were new, moved and renamed: the same map, up to the rounding of values."""
    shutil.copy(made / str(column(latents.images, "path")[0]), tmp_path / "new.png")
    some = [word for latent in busiest(latents, 0)[:3] for word in ("--latent", latent)]
    stored = ("map", made / "latents.zarr", "-o", tmp_path / "a", "--image", column(latents.images, "image_id")[0])
    new = ("map", made / "latents.zarr", "-o", tmp_path / "b", "--file", tmp_path / "new.png", "--sae", made / "run")
    for command in (stored, new):
        done = run(*command, *some)
        assert done.exit_code == 0, done.output
    maps = []
    for folder in ("a", "b"):
        found = {(row["latent"], row["patch"]): row["value"] for row in _patches(tmp_path / folder)}
        maps.append(found)
    assert len(maps[0]) > 50
    for at in maps[0].keys() | maps[1].keys():  # one side only: the value was as good as zero
        assert maps[0].get(at, 0) == pytest.approx(maps[1].get(at, 0), rel=2**-10, abs=1e-4)
    sae = load_sae(made / "run")
    other = LatentSpec(**{**latents.spec.to_dict(), "sae_sha256": "f" * 64})
    with pytest.raises(SpecMismatch, match="the latents were made with the SAE of sha256 ffffffffffff…, found"):
        encode_image(np.zeros((257, 192), np.float16), sae, other)
    fails("cannot be shown: not a JPEG", *new[:4], "--file", made / "images.csv", "--sae", made / "run", *some)


def _patches(root: Path) -> list[dict[str, float]]:
    return list(ResultStore(root, MAPS).table("patches").to_pylist())


@pytest.mark.stress
def test_sheet(made: Path, latents: LatentStore, concepts: ConceptStore, tmp_path: Path) -> None:
    """A figure per latent; the table names each image with its strongest patch; --selected takes the sample."""
    chosen = busiest(latents, 0)[:2]
    command = ("sheet", concepts.root, made / "latents.zarr", "-o", tmp_path / "s", "--n-images", 2)
    options = [word for latent in chosen for word in ("--latent", latent)]
    done = run(*command, *options)
    assert done.exit_code == 0, done.output
    assert "warning" not in done.stderr
    names = column(latents.images, "image_id")
    rows = ResultStore(tmp_path / "s", SHEETS).table("images").to_pylist()
    assert [(row["latent"], row["dataset"], row["rank"]) for row in rows] == [
        (latent, dataset, rank) for latent in chosen for dataset in ("images", "other") for rank in (1, 2)
    ]
    for row in rows:
        top = concepts.top_images(row["latent"], row["dataset"]).to_pylist()[row["rank"] - 1]
        values = dense_tokens(latents, names.index(row["image_id"]))[1:, row["latent"]]
        assert row["image_id"] == top["image_id"]
        assert (row["patch"], row["n_patches"]) == (int(values.argmax()), int((values > 0).sum()))
        assert row["value"] == values.max()
    assert all(is_figure(tmp_path / "s" / f"latent{latent}") for latent in chosen)
    assert "already complete" in run(*command, *options).stderr

    copy = ConceptStore(shutil.copytree(concepts.root, tmp_path / "c"))
    fails("no selection in", "sheet", copy.root, made / "latents.zarr", "-o", tmp_path / "t", "--selected")
    drawn = select_latents(copy, SelectionConfig(dataset="images", clusters=1, per_cluster=2, threshold=0))
    options = ["--selected", "--dataset", "other", "--nearest"]
    done = run("sheet", copy.root, made / "latents.zarr", "-o", tmp_path / "t", *options)
    assert done.exit_code == 0, done.output
    spec = ResultStore(tmp_path / "t", SHEETS).header.spec
    assert (spec["latents"], spec["datasets"], spec["style"]["is_smooth"]) == (drawn.latents, ["other"], False)


def test_a_latent_that_never_fires_has_an_empty_sheet(made: Path, latents: LatentStore, tmp_path: Path) -> None:
    silent = {"frequency": [0.0] * 384, "mean_activation": [0.0] * 384}
    none = make_concepts(tmp_path / "c", {"d": silent}, sae_sha256=latents.spec.sae_sha256)
    done = run("sheet", none.root, made / "latents.zarr", "-o", tmp_path / "s", "--latent", 7)
    assert done.exit_code == 0, done.output
    assert "1 latent, 0 images" in done.stdout
    assert (tmp_path / "s" / "latent7.png").exists()


@pytest.mark.stress
def test_images_that_cannot_be_shown_are_named(
    copied: Path, latents: LatentStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gone, replaced by another, or nobody knows where: an empty frame with words, a warning, exit code 0."""
    store = LatentStore(copied / "latents.zarr")
    pictures, names = Pictures(store, copied), column(store.images, "path")
    assert isinstance(pictures(0), np.ndarray)
    assert str(pictures(4)).startswith("unreadable: ")
    (copied / str(names[0])).unlink()
    shutil.copy(copied / str(names[2]), copied / str(names[1]))
    (copied / str(names[3])).write_bytes(b"no image")
    assert pictures(0) == "no such file"
    assert pictures(1) == "another file than the one that was cached"
    assert pictures(3) == "not a JPEG, PNG, TIFF or BMP image"
    pictures._paths[2] = "../" * 20 + "etc/passwd"
    assert pictures(2) == "its path leaves the folder of the images"

    latent = str(busiest(store, 0)[0])
    ids = column(store.images, "image_id")
    done = run("map", store.root, "-o", tmp_path / "m", "--image", ids[0], "--latent", latent, "--root", copied)
    assert done.exit_code == 0, done.output
    assert (
        f"warning: 1 image could not be shown ({ids[0]}: no such file); say where they are with --root" in done.stderr
    )
    assert is_figure(tmp_path / "m" / "map")
    Path(store.root, "runs.jsonl").unlink()
    (tmp_path / "runs.jsonl").write_text(json.dumps({"images_root": str(copied)}) + "\n")  # somebody else's
    monkeypatch.chdir(tmp_path)
    assert Pictures(store)(5) == "where the images lie is not known"
    concepts = concepts_of(store, tmp_path / "c")
    done = run("sheet", concepts.root, store.root, "-o", tmp_path / "s", "--latent", latent)
    assert done.exit_code == 0, done.output
    assert "images could not be shown" in done.stderr


def test_pictures_keep_their_aspect() -> None:
    assert to_pixels(Image.new("RGB", (2000, 1000))).shape == (256, 512, 3)
    assert to_pixels(Image.new("RGB", (60_000, 2))).shape == (1, 512, 3)
    assert to_pixels(Image.new("RGB", (30, 40))).shape == (40, 30, 3)


def test_mistakes_get_one_line(made: Path, latents: LatentStore, concepts: ConceptStore, tmp_path: Path) -> None:
    store, out, ids = made / "latents.zarr", tmp_path / "out", column(latents.images, "image_id")
    one = ("map", store, "-o", out, "--image", ids[0])
    fails("it has 384 latents, counted from 0; give 0 to 383", *one, "--latent", 384)
    fails("no latent -1 in", *one, "--latent", -1)
    fails("patches are numbered 0 to 255", *one, "--patch", 256, "--concepts", concepts.root, "--dataset", "other")
    fails("no dataset 'skin' in", *one, "--patch", 1, "--concepts", concepts.root, "--dataset", "skin")
    fails("no image 'x' in", "map", store, "-o", out, "--image", "x", "--latent", 1)
    fails(f"image '{ids[4]}' could not be read when", "map", store, "-o", out, "--image", ids[4], "--latent", 1)
    fails("several stores have an image", "map", store, store, "-o", out, "--image", ids[0], "--latent", 1)
    fails("no latent store at", "map", made / "acts.zarr", "-o", out, "--image", ids[0], "--latent", 1)
    fails("input of this command", "map", store, "-o", store, "--image", ids[0], "--latent", 1)
    foreign = make_concepts(tmp_path / "c", {"d": {"frequency": [1.0] * 384, "mean_activation": [1.0] * 384}})
    fails("is of another SAE (sha256 000000000000…) than", "sheet", foreign.root, store, "-o", out, "--latent", 1)
    fails("no latent to draw a sheet of", "sheet", concepts.root, store, "-o", out)
    fails("no latent 400 in ", "sheet", concepts.root, store, "-o", out, "--latent", 400)
    fails("no dataset 'skin'", "sheet", concepts.root, store, "-o", out, "--latent", 1, "--dataset", "skin")
    fails("no concepts at", "sheet", store, store, "-o", out, "--latent", 1)
    fails("give --image; or --file and --sae", "map", store, "-o", out, "--latent", 1, code=2)
    fails("give --image; or --file and --sae", "map", store, "-o", out, "--file", "x", "--latent", 1, code=2)
    fails("give --latent", *one, code=2)
    fails("--patch needs --concepts", *one, "--patch", 1, code=2)
    fails("--top, --noisy: only with --patch", *one, "--latent", 1, "--top", 5, "--noisy", 0.2, code=2)
    fails("--weights is of use only with --file", *one, "--latent", 1, "--weights", "x.pth", code=2)
    fails("give --root once for each of LATENTS", *one, "--latent", 1, "--root", made, "--root", made, code=2)
    assert not out.exists()


def test_stores_of_two_saes_are_not_mixed(copied: Path, latents: LatentStore) -> None:
    path = copied / "latents.zarr" / "zarr.json"
    text = path.read_text().replace(latents.spec.sae_sha256, "a" * 64)
    group = json.loads(text)
    from stores.spec import Header

    cyto = group["attributes"]["cyto"]
    cyto["identity"] = Header(kind=cyto["format"], version=cyto["format_version"], spec=cyto["spec"]).identity
    path.write_text(json.dumps(group))
    with pytest.raises(SpecMismatch, match="hold latents of different SAEs"):
        Sources([latents, LatentStore(copied / "latents.zarr")], [])
