"""Cells like this one: equal to plain loops over all images, planted types are found, chance is chance, bad input."""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from artefacts import write_cache
from command_line import fails, run
from latent_stores import local_client
from PIL import Image
from search_cells import draw_cells, write_search_barcodes

import cytocache.bridge
from cytosae.barcodes import BarcodeConfig, write_barcodes
from cytosae.search import (
    Fingerprints,
    SearchConfig,
    SearchEvaluationConfig,
    SearchResult,
    evaluate_search,
    nearest_among,
    rarity,
    search_cells,
    token_index,
)
from cytosae.search import scan as scanning
from cytosae.search.scan import blocks_of
from stores import SEARCH, ActivationStore, ResultStore
from stores.barcode_store import BarcodeStore
from stores.errors import BadInput, DamagedStore, SpecMismatch
from stores.verify_any import verify_folder

Array = npt.NDArray[Any]
Cells = tuple[Array, Array, Array, pd.DataFrame]


@pytest.fixture(scope="module")
def cells() -> Cells:
    maxima, means, counts, images = draw_cells()
    images.loc["i007", "status"] = "unreadable"
    for values in (maxima, means, counts):
        values[7] = 0
    images.loc["i020", "content_hash"] = images.loc["i000", "content_hash"]  # a copy of another image
    images.loc["i030", "patient"] = ""
    return maxima, means, counts, images


@pytest.fixture(scope="module")
def barcodes(cells: Cells, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_search_barcodes(tmp_path_factory.mktemp("search") / "cells.barcodes", *cells)


# ------------------------------------------------------------------------------------------- slow twins


def weights_of(maxima: Array, n_readable: int) -> list[float]:
    return [math.log((n_readable + 1) / (sum(value > 0 for value in column) + 1)) for column in maxima.T]


def list_of(means: Array, weights: list[float], k: int) -> dict[int, float]:
    """The fingerprint of one image in plain Python."""
    weighted = [float(np.float32(value) * np.float32(w)) for value, w in zip(means, weights, strict=True)]
    best = sorted((-value, latent) for latent, value in enumerate(weighted) if value > 0)[:k]
    return {latent: -value for value, latent in best}


def cosine(a: dict[int, float], b: dict[int, float]) -> float:
    norms = [math.sqrt(sum(value * value for value in each.values())) for each in (a, b)]
    return sum(value * b.get(latent, 0) for latent, value in a.items()) / (norms[0] * norms[1]) if all(norms) else 0.0


def vectors(cells: Cells, k: int, weighs: bool) -> dict[str, list[dict[int, float]]]:
    """What is compared, of every image: latent -> number."""
    maxima, means, counts, images = cells
    w = weights_of(maxima, int((images["status"] == "ok").sum())) if weighs else [1.0] * maxima.shape[1]
    return {
        "fingerprint": [list_of(row, w, k) for row in means],
        "barcode": [{s: math.log1p(value) * w[s] for s, value in enumerate(row) if value} for row in counts],
    }


def similarities(cells: Cells, query: int, k: int, weighs: bool) -> dict[str, list[float]]:
    return {way: [cosine(of[query], each) for each in of] for way, of in vectors(cells, k, weighs).items()}


@pytest.mark.parametrize(("k", "weigh"), [(4, "rarity"), (32, "none"), (500, "rarity")])
def test_a_search_equals_plain_loops(cells: Cells, barcodes: Path, k: int, weigh: str) -> None:
    """Images and patients, in order, and who is left out."""
    images = cells[3]
    found = search_cells(barcodes, "i000", SearchConfig(top=50, k=k, weigh=weigh))
    expected = similarities(cells, 0, k, weigh == "rarity")
    listed = [n for n in range(240) if n not in (0, 7, 20)]
    for way in ("fingerprint", "barcode"):
        rows = [row for row in found.images if row["by"] == way]
        values = expected[way]
        order = sorted((n for n in listed if values[n] > 0), key=lambda n: (-round(values[n], 5), n))
        assert [row["similarity"] for row in rows] == pytest.approx([values[n] for n in order[:50]], abs=1e-5)
        assert {row["image_id"] for row in rows[:20]} == {f"i{n:03d}" for n in order[:20]}
        assert rows[0]["label"] == images["label"].iloc[order[0]]
        own = vectors(cells, k, weigh == "rarity")[way]
        parts = {latent: value * own[0].get(latent, 0) for latent, value in own[order[0]].items()}
        reasons = sorted((-part, latent) for latent, part in parts.items() if part > 0)
        assert rows[0]["latents"] == [latent for _, latent in reasons][:8]
        means = {
            patient: np.mean([values[n] for n in listed if images["patient"].iloc[n] == patient])
            for patient in sorted({*images["patient"]} - {""})
        }
        patients = [row for row in found.patients if row["by"] == way]
        assert {row["patient"]: row["similarity"] for row in patients} == pytest.approx(means, abs=1e-5)
        assert patients[0]["similarity"] == pytest.approx(max(means.values()))
        assert sum(row["is_own_patient"] for row in patients) == 1
    w = weights_of(cells[0], 239) if weigh == "rarity" else [1.0] * 80
    assert (found.n_images, found.n_copies) == (239, 1)
    assert [row["latent"] for row in found.latents] == [*list_of(cells[1][0], w, k)]


@pytest.mark.parametrize("at_once", [7, 1024])
def test_all_images_at_once_find_what_each_finds_alone(
    cells: Cells, barcodes: Path, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among some of the images: of any patient, and of other patients; copies are not listed for each other."""
    monkeypatch.setattr("cytosae.search.together._AT_ONCE", at_once)
    images, store = cells[3], BarcodeStore(barcodes)
    weights = rarity(store, None, 239)
    assert weights == pytest.approx(weights_of(cells[0], 239))
    fingerprints = Fingerprints.empty(240, 6)
    reader = store.matrix("image", None, "mean")
    for first, last in ((0, 100), (100, 240)):
        fingerprints.fill(first, reader.read_rows(first, last), weights)
    some = np.random.default_rng(1).permutation(240)[:150]
    patients = images["patient"].to_numpy(object)[some]
    owner = np.array([-1 if name == "" else int(name[1:]) for name in patients])
    content = np.unique(images["content_hash"].to_numpy(str)[some], return_inverse=True)[1]
    found, scores = nearest_among(fingerprints.take(some), owner, content, top=5)
    lists = vectors(cells, 6, True)["fingerprint"]
    for place, image in enumerate(some):
        values = [cosine(lists[image], lists[other]) for other in some]
        for kind in range(2):
            known = [
                at for at in range(150)
                if at != place and content[at] != content[place] and values[at] > 1e-9
                and not (kind and owner[at] == owner[place] >= 0)
            ]  # fmt: skip
            known.sort(key=lambda at: (-round(values[at], 6), at))
            n = int((found[place, kind] >= 0).sum())
            assert n == min(5, len(known))
            assert scores[place, kind, :n] == pytest.approx([values[at] for at in known[:n]], abs=1e-5)
            assert (np.diff(scores[place, kind]) <= 0).all()
            assert [values[at] for at in found[place, kind, :n]] == pytest.approx(scores[place, kind, :n], abs=1e-5)
            assert {*found[place, kind, :n]} <= {*known}
    of_two = nearest_among(fingerprints.take(some), owner, content, top=5, queries=np.array([8, 3]))
    assert (of_two[0] == found[[8, 3]]).all()
    assert (of_two[1] == scores[[8, 3]]).all()
    assert nearest_among(fingerprints.take(some), owner, content, top=0)[0].shape == (150, 2, 0)


@pytest.mark.stress
def test_blocks_have_no_effect(barcodes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = search_cells(barcodes, "i003")
    reader = scanning.reader_of(scanning.open_collection(barcodes, None, "rarity"), "barcode")
    bounds = blocks_of(reader, 50)
    assert [bounds[0][0], bounds[-1][1]] == [0, 240]
    assert all(first < last == after for (first, last), (after, _) in pairwise(bounds))
    monkeypatch.setattr(scanning, "blocks_of", lambda reader, block: blocks_of(reader, 50))
    assert search_cells(barcodes, "i003") == whole


def test_the_planted_type_is_found(cells: Cells, barcodes: Path) -> None:
    """Of the nearest images nearly all are of the query's type, and for a reason that is one of its latents."""
    images = cells[3]
    for query in (1, 2, 3):
        kind = images["label_common"].iloc[query]
        found = search_cells(barcodes, f"i{query:03d}", SearchConfig(other_patients=True))
        for way in ("fingerprint", "barcode"):
            rows = [row for row in found.images if row["by"] == way]
            assert len(rows) == 20
            assert sum(row["label_common"] == kind for row in rows) >= 18
            own = {5 * int(kind[-1]) + s for s in range(5)}
            assert sum(bool({*row["latents"][:3]} & own) for row in rows) >= 15
            assert not any(row["is_own_patient"] for row in rows)


# ------------------------------------------------------------------------------------------- how well it works


@pytest.mark.stress
def test_precision_equals_a_sort_of_all_similarities(cells: Cells, barcodes: Path, tmp_path: Path) -> None:
    images = cells[3]
    config = SearchEvaluationConfig(n_queries=12, at=(1, 7), n_bootstraps=50, seed=3)  # draws i020, a copy of i000
    done = evaluate_search(barcodes, tmp_path / "out", config)
    assert "1 image with the same bytes as a query, which do not count for it" in done.notes
    queries = ResultStore(tmp_path / "out", SEARCH).table("queries").to_pylist()
    assert len({row["image_id"] for row in queries}) == done.n_queries == 12
    names, labels = [*images.index], images["label_common"].tolist()
    owners = {
        "other patients": [patient or name for patient, name in zip(images["patient"], names, strict=True)],
        "other datasets": images["dataset"].tolist(),
    }
    chance: dict[str, list[float]] = {scope: [] for scope in owners}
    for row in queries:
        if row["column"] != "label_common":
            continue
        query = names.index(row["image_id"])
        values = similarities(cells, query, 32, True)[row["by"]]
        owner = owners[row["scope"]]
        content = images["content_hash"].tolist()
        others = [n for n in range(240) if n != 7 and owner[n] != owner[query] and content[n] != content[query]]
        order = sorted((n for n in others if values[n] > 0), key=lambda n: -values[n])
        assert row["n_same_at_7"] == sum(labels[n] == labels[query] for n in order[:7])
        if row["by"] == "barcode":
            chance[row["scope"]].append(np.mean([labels[n] == labels[query] for n in others]))
    for row in done.rows:
        if row["column"] == "label_common":
            said, at = [row[name] for name in ("column", "scope", "by")], f"n_same_at_{row['at']}"
            mine = [each[at] for each in queries if [each[name] for name in ("column", "scope", "by")] == said]
            assert row["precision"] == pytest.approx(np.mean(mine) / row["at"])
            assert row["chance"] == pytest.approx(np.mean(chance[row["scope"]]))
            assert row["low"] <= row["precision"] <= row["high"]
            assert row["difference"] is None


def test_where_fewer_images_exist_than_k_precision_is_that_of_all_of_them(tmp_path: Path) -> None:
    """12 images of one label, ten of other patients: at 20 all are right, as chance says; before, a half."""
    maxima, means, counts, images = draw_cells(n_images=12)
    images["patient"] = [f"P{n // 2}" for n in range(12)]
    images["label"], images["dataset"] = "blast", "set0"
    images["label_common"] = ["type 0"] * 9 + ["type 1"] * 3
    folder = write_search_barcodes(tmp_path / "few.barcodes", maxima + 0.1, means + 0.1, counts + 1, images)
    done = evaluate_search(folder, tmp_path / "out", SearchEvaluationConfig(weigh="none", n_bootstraps=50))
    rows = {
        (row["column"], row["by"], row["at"]): row["precision"] for row in done.rows if row["scope"] == "other patients"
    }
    for way in ("fingerprint", "barcode"):
        assert [rows["label", way, at] for at in (1, 5, 10, 20)] == [1, 1, 1, 1]
        chance = next(row["chance"] for row in done.rows if row["column"] == "label_common")
        assert rows["label_common", way, 20] == pytest.approx(chance)  # all that there are, in whatever order
        assert rows["label_common", way, 10] == pytest.approx(chance)


def test_a_copy_under_another_patient_is_no_hit(tmp_path: Path) -> None:
    """Each cell stands in the table twice, under two patients: all are found at once, and it says nothing."""
    maxima, means, counts, images = draw_cells(n_images=40)
    images["label"] = images["label_common"] = [f"type {n % 20}" for n in range(40)]  # only the copy has its label
    images["dataset"], images["patient"] = "set0", [f"P{n}" for n in range(40)]
    images["content_hash"] = [f"{n % 20:064x}" for n in range(40)]
    maxima, means, counts = (np.vstack([each[:20], each[:20]]) for each in (maxima, means, counts))
    folder = write_search_barcodes(tmp_path / "twice.barcodes", maxima, means, counts, images)
    with pytest.raises(BadInput, match="no image that was drawn has a type that another patient's image has, too"):
        evaluate_search(folder, tmp_path / "out", SearchEvaluationConfig(n_bootstraps=50))
    images["label"] = images["label_common"] = [f"type {n % 10}" for n in range(40)]
    folder = write_search_barcodes(tmp_path / "again.barcodes", maxima, means, counts, images)
    done = evaluate_search(folder, tmp_path / "again", SearchEvaluationConfig(n_bootstraps=50, at=(1,)))
    assert done.notes[0] == "40 images with the same bytes as a query, which do not count for it"
    assert [row["chance"] for row in done.rows] == pytest.approx([2 / 38] * len(done.rows))
    barcode = next(row for row in done.rows if row["by"] == "barcode" and row["column"] == "label")
    assert barcode["precision"] < 1


@pytest.mark.stress
def test_types_are_found_across_datasets_and_labels_that_mean_nothing_are_not(cells: Cells, tmp_path: Path) -> None:
    """`label` differs by dataset, so no image of another has it; shuffled types are found as often as by chance."""
    maxima, means, counts, images = draw_cells(n_images=600, seed=5)
    rng = np.random.default_rng(0)
    shuffled = images.assign(label_common=rng.permutation(images["label_common"]))
    found = {}
    for name, table in {"true": images, "shuffled": shuffled}.items():
        root = write_search_barcodes(tmp_path / f"{name}.barcodes", maxima, means, counts, table)
        done = evaluate_search(root, tmp_path / name, SearchEvaluationConfig(n_queries=300))
        rows = {(row["by"], row["column"], row["scope"], row["at"]): row for row in done.rows}
        assert not any(key[1:3] == ("label", "other datasets") for key in rows)
        found[name] = rows["fingerprint", "label_common", "other datasets", 10]
    assert found["true"]["precision"] > 0.9
    assert found["shuffled"]["low"] < found["shuffled"]["chance"] < found["shuffled"]["high"]
    assert abs(found["shuffled"]["precision"] - found["shuffled"]["chance"]) < 0.04


# ------------------------------------------------------------------------------------------- a real small store


@pytest.fixture(scope="module")
def counted(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("counted") / "cells.barcodes"
    with local_client(1, 1) as client:
        write_barcodes(made / "latents.zarr", root, BarcodeConfig(tau=0.01), client=client)
    return root


def image_id(made: Path, number: int) -> str:
    return str(ActivationStore(made / "acts.zarr").images["image_id"][number])


@pytest.mark.stress
def test_a_file_is_found_as_its_own_image(made: Path, counted: Path, tmp_path: Path) -> None:
    """The file of a stored image gives the same similarities, by latents and by tokens, and is not listed itself."""
    name = image_id(made, 0)
    path = made / "images" / "neutrophil_segmented" / "00.png"
    given: dict[str, Any] = {"caches": [made / "acts.zarr"], "keep": tmp_path / "kept"}
    config = SearchConfig(weigh="none")  # these latents are in all images
    stored = search_cells(counted, name, config, **given)
    assert stored.ways == ("fingerprint", "barcode", "tokens", "cls")
    new = search_cells(
        counted, path, config, latents=[made / "latents.zarr"], sae=made / "run", stage_one=cytocache.bridge, **given
    )
    assert (stored.n_copies, new.n_copies) == (0, 1)
    for a, b in zip(stored.images, new.images, strict=True):
        assert (a["by"], a["image_id"]) == (b["by"], b["image_id"]) or abs(a["similarity"] - b["similarity"]) < 1e-3
        assert a["similarity"] == pytest.approx(b["similarity"], abs=2e-3)
    with pytest.raises(BadInput, match="give --latents and --sae"):
        search_cells(counted, path)
    with pytest.raises(BadInput, match=r"is an image of the barcodes: --sae and --weights are for a file"):
        search_cells(counted, name, config, sae=made / "run")
    with pytest.raises(BadInput, match=r"is of no patient of the barcodes: leave --other-patients out"):
        search_cells(counted, path, SearchConfig(other_patients=True))
    search_cells(
        counted, name, config, out=tmp_path / "out", latents=[made / "latents.zarr"], stage_one=cytocache.bridge
    )
    with Image.open(tmp_path / "out" / "found.png") as figure:
        colours = np.asarray(figure.convert("RGB")).reshape(-1, 3)
    assert (np.ptp(colours, axis=1) > 60).mean() > 0.05  # cells are stained, all else is grey
    assert not verify_folder(tmp_path / "out").problems


@pytest.mark.stress
def test_tokens_are_compared_by_centred_cosines(made: Path, counted: Path, tmp_path: Path) -> None:
    cache = ActivationStore(made / "acts.zarr")
    readable = np.flatnonzero(cache.readable())
    tokens = np.stack([cache.read_images([n])[0].astype(np.float64) for n in range(10)])
    found = search_cells(counted, image_id(made, 0), SearchConfig(weigh="none"), caches=[made / "acts.zarr"])
    for way, vectors in {"tokens": tokens[:, 1:].mean(1), "cls": tokens[:, 0]}.items():
        centred = vectors - vectors[readable].mean(0)
        centred /= np.linalg.norm(centred, axis=1, keepdims=True)
        expected = {image_id(made, n): float(centred[0] @ centred[n]) for n in readable.tolist() if n}
        rows = {row["image_id"]: row["similarity"] for row in found.images if row["by"] == way}
        assert rows == pytest.approx({name: value for name, value in expected.items() if value > 0}, abs=1e-4)


def test_means_are_kept_and_mended(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second call reads no token; a damaged part is made again; an interrupted pass goes on."""
    monkeypatch.setattr(token_index, "PART_IMAGES", 4)
    caches = [ActivationStore(made / "acts.zarr")]
    first = token_index.build_index(caches, tmp_path)
    centers = {way: center.copy() for way, center in first.centers.items()}
    read, original = [], token_index._read

    def reading(store: Any, first: int, last: int, tell: Any) -> Any:
        read.append(first)
        return original(store, first, last, tell)

    monkeypatch.setattr(token_index, "_read", reading)
    token_index.build_index(caches, tmp_path)
    assert read == []
    part = tmp_path / "0-4-8.part"
    part.write_bytes(part.read_bytes()[:-40] + b"\1" * 40)
    (tmp_path / "0-8-10.part").unlink()
    again = token_index.build_index(caches, tmp_path)
    assert read == [4, 8]
    assert all(np.array_equal(again.centers[way], centers[way]) for way in centers)


def test_a_region_is_the_share_of_it_that_an_image_has(made: Path, counted: Path) -> None:
    from stores import BarcodeStore, LatentStore

    store = LatentStore(made / "latents.zarr")
    dense = store.read_images(0, 10).to_scipy(store.spec.n_latents).toarray().reshape(10, -1, store.spec.n_latents)
    patches, k = (17, 18, 40), 6
    found = search_cells(
        counted, image_id(made, 0), SearchConfig(patches=patches, k=k, weigh="none"), latents=[made / "latents.zarr"]
    )
    readable = np.flatnonzero(store.readable()).tolist()
    maxima = BarcodeStore(counted).read("image").layers["max"].toarray()
    weights = np.ones(maxima.shape[1])
    region = dense[0, [1 + patch for patch in patches]].max(0)
    best = sorted(range(len(region)), key=lambda s: (-np.float32(region[s]) * np.float32(weights[s]), s))[:k]
    best = [s for s in best if region[s] * weights[s] > 0]
    assert [row["latent"] for row in found.latents] == best
    whole = sum(weights[s] * region[s] for s in best)
    expected = {
        image_id(made, n): sum(weights[s] * min(region[s], maxima[n, s]) for s in best) / whole for n in readable if n
    }
    rows = {row["image_id"]: row["similarity"] for row in found.images}
    assert rows == pytest.approx({name: value for name, value in expected.items() if value > 0}, abs=1e-5)
    with pytest.raises(BadInput, match="patches are numbered 0 to 255"):
        search_cells(counted, image_id(made, 0), SearchConfig(patches=(256,)), latents=[made / "latents.zarr"])
    with pytest.raises(BadInput, match="and none was given: give --latents"):
        search_cells(counted, image_id(made, 0), SearchConfig(patches=(2,)))


# ------------------------------------------------------------------------------------------- folders and bad input


def test_a_folder_is_complete_and_read_again(barcodes: Path, tmp_path: Path) -> None:
    out = tmp_path / "found"
    first = search_cells(barcodes, "i005", SearchConfig(top=5), out=out)
    again = search_cells(barcodes, "i005", SearchConfig(top=5), out=out)
    assert isinstance(again, SearchResult)
    assert (first.images, first.patients, first.latents) == (again.images, again.patients, again.latents)
    assert again.was_complete
    assert not verify_folder(out).problems
    with pytest.raises(SpecMismatch, match="top 5 against 6"):
        search_cells(barcodes, "i005", SearchConfig(top=6), out=out)


def test_what_cannot_be_looked_for(barcodes: Path, cells: Cells, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no image 'x' in .* and no file of this name"):
        search_cells(barcodes, "x")
    with pytest.raises(BadInput, match="could not be read when its latents were made"):
        search_cells(barcodes, "i007")
    with pytest.raises(BadInput, match="compared by latents alone"):
        search_cells(barcodes, "i001", SearchConfig(patches=(1,)), caches=[tmp_path])
    maxima, means, counts, images = draw_cells(n_images=20)
    counts[3] = 0
    empty = write_search_barcodes(tmp_path / "b", maxima, means, counts, images.assign(label="", label_common=""))
    with pytest.raises(BadInput, match=r"no latent of i003 is above tau .* --weigh none"):
        search_cells(empty, "i003")
    with pytest.raises(BadInput, match="0 readable images have a label"):
        evaluate_search(empty, tmp_path / "out")
    write_cache(tmp_path / "other.zarr")
    with pytest.raises(BadInput, match="images of the barcodes are not readable in --cache"):
        search_cells(barcodes, "i001", caches=[tmp_path / "other.zarr"])
    (tmp_path / "b" / "image.zarr" / "layers" / "mean" / "data" / "c" / "0").write_bytes(b"")
    with pytest.raises(DamagedStore):
        search_cells(empty, "i001")


def test_the_command(barcodes: Path, tmp_path: Path) -> None:
    done = run("concept", "search", barcodes, "i002", "--top", "3", "--json")
    assert done.exit_code == 0, done.output
    assert "240 images, " in done.stderr
    assert "of memory" in done.stderr
    said = json.loads(done.stdout)
    assert len(said["images"]) == 6
    told = run("concept", "search", barcodes, "i002", "--top", "3", "-o", tmp_path / "out")
    assert "by fingerprint (most active latents)" in told.stdout
    assert "patients, by the mean over all their images" in told.stdout
    told = run("concept", "search", barcodes, "--evaluate", "-o", tmp_path / "measured", "--queries", "20")
    assert told.exit_code == 0, told.output
    assert "share with the same label_common among the nearest images in other datasets" in told.stdout
    assert (tmp_path / "measured" / "precision.png").is_file()
    fails("no image 'nothing'", "concept", "search", barcodes, "nothing")
    assert run("concept", "search", barcodes, "i002", "--patches", "3-x").exit_code == 2
    assert run("concept", "search", barcodes).exit_code == 2


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("i002", "--patches", "5-2"), "'5-2' is no patch and no range of patches"),  # was a search by the whole image
        (("i002", "--patches", "9" * 5000), "is no patch and no range of patches"),
        (("i002", "--queries", 9, "--seed", 1), "--queries, --seed: only with --evaluate"),
        (
            ("--evaluate", "-o", "x", "--patches", "1", "--other-patients"),
            "--patches, --other-patients: only for an IMAGE",
        ),
        (("--evaluate", "-o", "x", "--top", 3), "--top: only for an IMAGE, not with --evaluate"),
        (("i002", "--keep", "x"), "--keep holds what is read of --cache; give --cache, too"),
    ],
)
def test_options_that_would_change_nothing_are_refused(
    barcodes: Path, given: tuple[str | int, ...], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("concept", "search", barcodes, *given)
    assert done.exit_code == 2
    assert words in done.stderr
    assert not [*tmp_path.iterdir()]
