"""The overview's columns and cards against the stores, computed the slow way; and what they cost in bytes."""

import itertools
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import scipy.sparse as ss
from atlas_maker import DATASETS, IMAGES_PER_PATIENT, N_LATENTS, Cohort, data, label_of
from big_gallery import PAIRS, big_gallery
from command_line import run
from PIL import Image

from cytosae.atlas import gallery_files, lies_on
from cytosae.atlas.cards import HEIGHT, WIDTH, draw_card
from cytosae.atlas.gallery import _cells, specificities
from cytosae.atlas.gallery_files import IS_DIFFERENT, MAPS_PER_FILE, NEVER, first_order, write_gallery_data
from cytosae.atlas.sentence import PLACES, place_of
from cytosae.atlas.site import Site
from cytosae.review.opinions import VERDICTS
from cytosae.review.verdicts import Verdict, save_verdict
from stores import ConceptStore

CARD_BYTES = 12_000  # of a card's picture
ROW_BYTES = 28  # of a concept in data/gallery.js
SCREEN = 24  # cards that a large screen shows before it is scrolled, and the rows around


def test_the_browser_counts_words_as_python_does() -> None:
    """gallery.js has the same lists, in the same order: what is written is a place in them."""
    script = (Path(gallery_files.__file__).parent / "static/gallery.js").read_text()
    for name, words in {"VERDICTS": VERDICTS, "PLACES": PLACES, "ON": lies_on.ON, "TURN": lies_on.TURN}.items():
        (found,) = re.findall(rf"\b{name} = (\[.*?\])[,;]", script)
        assert tuple(json.loads(found)) == words
    for name, number in {"MAPS_PER_FILE": MAPS_PER_FILE, "NEVER": NEVER, "IS_DIFFERENT": IS_DIFFERENT}.items():
        assert float(re.findall(rf"const {name} = ([\d.]+);", script)[0]) == number
    assert f"width: {WIDTH}, height: {HEIGHT}" in script
    (turns,) = re.findall(r"const OPEN_FIRST = \{(.*?)\}", script)
    assert {word.strip(' "') for word in re.findall(r'("[^"]+"|\b[a-z]+) ?:', turns)} == {*VERDICTS}


@pytest.fixture(scope="module")
def atlas(cohort: Cohort, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All latents have a page, also the one that is never active."""
    out = tmp_path_factory.mktemp("built") / "atlas"
    done = run(*cohort.build, out, "--pages", "all")
    assert done.exit_code == 0, done.output
    return out


def top_rows(cohort: Cohort, latent: int) -> list[dict[str, Any]]:
    """The reference images of a latent over all datasets, strongest first; ties as the store has them."""
    rows = ConceptStore(cohort.root / "concepts").top_images(latent).to_pylist()
    return sorted(rows, key=lambda row: -row["value"])


@pytest.mark.stress
def test_columns_are_those_of_the_stores(atlas: Path, cohort: Cohort) -> None:
    found, activation = data(atlas, "gallery"), cohort.dense.mean(axis=1)
    readable = [n for n in range(len(cohort.dense)) if n != 4]
    assert found["latents"].tolist() == list(range(N_LATENTS))
    compared = pq.read_table(cohort.root / "compare" / "differential.parquet")
    labels_of_all = [label for label in map(label_of, readable) if label]
    assert sorted(found["labels"]) == found["labels"]
    for latent in range(N_LATENTS):
        active = [n for n in readable if activation[n, latent] > 0]
        assert found["frequency"][latent] == pytest.approx(len(active) / len(readable), rel=1e-3)
        mean = np.mean([activation[n, latent] for n in active]) if active else 0
        assert found["mean"][latent] * found["largest"] == pytest.approx(mean, rel=2e-3)
        rows = top_rows(cohort, latent)
        assert found["has_picture"][latent] == bool(rows)
        if not rows:
            assert found["label"][latent] == found["no_label"]
            continue
        assert found["datasets"][found["dataset"][latent]] == rows[0]["dataset"]
        by_label: dict[str, float] = {}
        for row in rows:
            if row["label"]:
                by_label[row["label"]] = by_label.get(row["label"], 0) + row["value"]
        best = max(by_label, key=by_label.__getitem__)
        assert found["labels"][found["label"][latent]] == best
        assert found["share"][latent] / 254 == pytest.approx(
            by_label[best] / sum(row["value"] for row in rows), abs=1 / 254
        )
        divergence = 0.0
        for label, weight in by_label.items():
            part, base = weight / sum(by_label.values()), labels_of_all.count(label) / len(labels_of_all)
            divergence += part * math.log(part / base)
        assert found["specificity"][latent] == pytest.approx(divergence, abs=2e-3)
        patches = np.array([cohort.dense[each["image_index"], 1:, latent] for each in rows])
        place = place_of(np.round(255 * patches / patches.max(axis=1, keepdims=True)).astype(np.uint8))
        assert place is not None
        if PLACES[found["place"][latent]] != "same patch":
            wanted = "middle" if place.middle >= 0.5 else "border" if place.border >= 0.75 else "here and there"
            assert PLACES[found["place"][latent]] == ("all over" if place.patches >= 0.6 else wanted)
        row = compared.slice(latent, 1).to_pylist()[0]
        if row["q"] is None or math.isnan(row["q"]):
            assert found["pair"][latent] == 255
        else:
            assert found["pair"][latent] == 0
            assert found["q"][latent] == pytest.approx(row["q"], rel=1e-3)
            assert found["g"][latent] / 100 == pytest.approx(row["hedges_g"], abs=0.006)


@pytest.mark.stress
def test_concepts_with_the_same_cells_have_the_same_number(atlas: Path, cohort: Cohort) -> None:
    found = data(atlas, "gallery")["cells"]
    sets = [tuple(row["image_index"] for row in top_rows(cohort, latent)[:3]) for latent in range(N_LATENTS)]
    for one in range(N_LATENTS):
        for other in range(one):
            assert (found[one] == found[other]) == (sets[one] == sets[other] and sets[one] != ())


def test_cells_of_pictures_that_are_the_same() -> None:
    """And concepts without any image are not alike."""
    plan: Any = SimpleNamespace(references=SimpleNamespace(image=np.array([7, 8, 9, 7, 8, 9, 7, 9])))
    images = [np.array(some, np.int64) for some in ([0, 1, 2], [3, 4, 5], [6, 7], [], [], [2, 1, 0])]
    found = _cells(plan, images).tolist()
    assert found[0] == found[1]
    assert len({*found[1:]}) == 5


def test_specificity_is_zero_for_labels_as_everywhere_and_grows_with_rarity() -> None:
    base = np.array([0.7, 0.2, 0.1])
    rows = ss.csr_matrix(np.array([[7, 2, 1], [1, 0, 0], [0, 0, 3], [0, 0, 0]], float))
    found = specificities(rows, base)
    assert found == pytest.approx([0, math.log(1 / 0.7), math.log(10), 0], abs=1e-12)


def test_a_card_shows_the_three_strongest_cells(atlas: Path, cohort: Cohort) -> None:
    for latent in (0, 3, 17):
        rows = top_rows(cohort, latent)[:3]
        pictures = []
        for row in rows:
            path = atlas / "pictures" / f"{row['image_index']}.jpg"
            pictures.append(Image.open(path) if path.is_file() else None)
        wanted = np.asarray(draw_card(pictures), np.float64)
        with Image.open(atlas / "cards" / f"{latent}.jpg") as card:
            assert card.size == (WIDTH, HEIGHT)
            assert np.abs(np.asarray(card, np.float64) - wanted).mean() < 3  # it is a JPEG
    assert not (atlas / "cards" / "39.jpg").exists(), "it is never active"


def test_pictures_of_any_shape_are_whole_on_a_card() -> None:
    wide, tall = Image.new("RGB", (200, 100), (255, 0, 0)), Image.new("RGB", (50, 200), (0, 0, 255))
    card = np.asarray(draw_card([wide, None, tall]))
    red, blue = (np.argwhere((card == color).all(axis=2)) for color in ((255, 0, 0), (0, 0, 255)))
    assert np.ptp(red, axis=0).tolist() == [95, 191]
    assert np.ptp(blue, axis=0).tolist() == [94, 23]
    assert (card[:97, 194:] == 236).all(), "what cannot be shown stays empty"


def test_maps_of_the_cards_are_those_of_their_strongest_cells(atlas: Path, cohort: Cohort) -> None:
    for latent in (0, 3, 17, 38):
        found, place = data(atlas, f"maps-{latent // MAPS_PER_FILE}"), latent % MAPS_PER_FILE
        image = top_rows(cohort, latent)[0]["image_index"]
        steps = found["maps"].reshape(-1, 256)[place]
        patches = cohort.dense[image, 1:, latent]
        np.testing.assert_allclose(steps / 255, patches / patches.max(), atol=1 / 500)
        height = 64 - 8 * (image % 3)
        assert found["aspect"][place] == pytest.approx(64 / height, rel=0.02)


def test_the_first_cards_stand_in_the_page(atlas: Path, cohort: Cohort) -> None:
    """Without a script: on cells first, of each label in turn the strongest that is its own, as the script orders."""
    found = data(atlas, "gallery")
    key = np.where(np.isnan(found["specificity"]), -1, found["specificity"].astype(float) * found["mean"].astype(float))
    turn = [("", "the nucleus", "the cell", "both", "the background", "one place")[code] for code in found["on"]]
    turns = [{"the nucleus": 0, "the cell": 0, "the background": 2, "one place": 3}.get(word, 1) for word in turn]
    labels = [found["labels"][code] if code != found["no_label"] else "" for code in found["label"]]
    common = [*sorted(found["labels"], key=lambda name: -labels.count(name)), ""]
    left = sorted(range(N_LATENTS), key=lambda n: (-key[n], -found["mean"][n], n))
    order: list[int] = []
    for has_picture, its_turn in itertools.product((1, 0), range(4)):
        heaps = [
            [n for n in left if (found["has_picture"][n], turns[n], labels[n]) == (has_picture, its_turn, name)]
            for name in common
        ]
        in_turn = []
        while any(heaps):
            in_turn += [heap.pop(0) for heap in heaps if heap]
        order += sorted(in_turn, key=lambda n: bool(np.isnan(found["specificity"][n])))
    assert sorted(order) == list(range(N_LATENTS))
    assert len({labels[n] for n in order[:2]}) == 2
    page = (atlas / "index.html").read_text()
    shown = [int(latent) for latent in re.findall(r'<h2><a href="concepts/(\d+)\.html">', page)]
    assert len(shown) == 12
    assert shown == order[:12]
    for latent, often in zip(shown, re.findall(r'<p class="often">in (.*?)</p>', page), strict=True):
        n = round(float(found["frequency"][latent]) * (len(cohort.dense) - 1))  # one is unreadable
        assert often == (
            f"{n} image{'s' if n > 1 else ''}" if n < 10 else f"{100 * n / (len(cohort.dense) - 1):.3g}% of images"
        )


def test_a_gallery_costs_little(atlas: Path) -> None:
    """Bytes before anything is scrolled, and bytes per concept: with ten thousand concepts still below a megabyte."""
    names = re.findall(r'(?:href|src)="((?:assets|data)/[^"]+)"', (atlas / "index.html").read_text())
    assert "data/gallery.js" in names
    fixed = sum((atlas / name).stat().st_size for name in ["index.html", *names] if name != "data/gallery.js")
    per_row = len((atlas / "data" / "gallery.js").read_bytes()) - 900  # names of columns, labels, datasets, pairs
    assert per_row / N_LATENTS <= ROW_BYTES
    cards = [path.stat().st_size for path in (atlas / "cards").iterdir()]
    assert np.mean(cards) <= CARD_BYTES
    maps = max(path.stat().st_size for path in (atlas / "data").glob("maps-*.js"))
    seen = fixed + 10_000 * ROW_BYTES + SCREEN * (CARD_BYTES + maps)
    assert seen < 1_000_000, f"{seen:,} bytes before scrolling"


PLACE_OF = (np.arange(49_152) % 7 % 6).astype(np.uint8)
WIDE = 49_152  # latents of an SAE of a large backbone, all with a page


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data of the overview of very many concepts."""
    root = tmp_path_factory.mktemp("wide")
    write_gallery_data(Site(root), big_gallery(WIDE), np.arange(WIDE), WIDE, ["a", "b", "c"], PAIRS, PLACE_OF)
    return root


def test_the_first_page_is_below_a_megabyte_at_any_width(atlas: Path, wide: Path) -> None:
    """With what is read without being asked for: also the points of the plot, and the maps of a screen's cards."""
    names = re.findall(r'(?:href|src)="((?:assets|data)/[^"]+)"', (atlas / "index.html").read_text())
    fixed = sum((atlas / name).stat().st_size for name in ["index.html", *names] if name != "data/gallery.js")
    columns = sum((wide / "data" / f"gallery{part}.js").stat().st_size for part in ("", "-plot"))
    maps = max(path.stat().st_size for path in (atlas / "data").glob("maps-*.js"))
    seen = fixed + columns + SCREEN * (CARD_BYTES + maps)
    assert seen < 1_000_000, f"{seen:,} bytes before scrolling"


def test_columns_in_parts_are_the_whole_ones(wide: Path) -> None:
    """The first rows, what the plot draws, and the rest: every concept once, as in an atlas that keeps all in one."""
    gallery = big_gallery(WIDE)
    first, plot, rest = (data(wide, f"gallery{part}") for part in ("", "-plot", "-rest"))
    whole = {**plot, **rest}
    assert whole["latents"].tolist() == list(range(WIDE))
    np.testing.assert_allclose(whole["frequency"], gallery.frequency, rtol=1e-3)
    assert (whole["label"] == np.where(gallery.label < 0, first["no_label"], gallery.label)).all()
    assert {at: name for at, name in rest["names"]} == gallery.names
    for name, column in whole.items():
        if name != "names":
            np.testing.assert_array_equal(column[first["at"]], first[name])
    order, alike = first_order(gallery)
    assert first["at"].tolist() == order[: len(first["at"])].tolist()
    assert first["n_different"] == len({*gallery.cells.tolist()}) == len(order)
    for at, more in zip(order[:5].tolist(), alike[:5].tolist(), strict=True):
        assert more + 1 == gallery.cells.tolist().count(gallery.cells[at])


def test_counts_of_chips(wide: Path) -> None:
    """As one counts who looks at every concept."""
    found, gallery = dict(data(wide, "gallery")["counts"]), big_gallery(WIDE)
    slow: dict[str, dict[str, int]] = {"label": {}, "in": {}, "place": {}, "dataset": {}, "verdict": {}, "named": {}}

    def one_more(group: str, text: str) -> None:
        slow[group][text] = slow[group].get(text, 0) + 1

    for at in range(WIDE):
        if gallery.label[at] >= 0:
            one_more("label", gallery.labels[gallery.label[at]])
        if gallery.dataset[at] >= 0:
            one_more("dataset", "abc"[gallery.dataset[at]])
        if PLACE_OF[at]:
            one_more("place", PLACES[PLACE_OF[at]])
        if gallery.verdict[at]:
            one_more("verdict", VERDICTS[gallery.verdict[at]])
        if at in gallery.names:
            one_more("named", "yes")
        if gallery.pair[at] >= 0 and np.float16(gallery.q[at]) <= 0.05:
            is_higher = round(100 * gallery.g[at]) > 0
            against = ("higher in control", "lower in AML")[gallery.pair[at]]
            one_more("in", "higher in AML" if is_higher else against)
    assert {group: dict(choices) for group, choices in found.items()} == slow
    assert [n for _, n in found["label"]] == sorted(slow["label"].values(), reverse=True)


def test_counts_of_what_concepts_lie_on(tmp_path: Path) -> None:
    """In the order of the chips; nuclei and cells are among the first."""
    gallery = big_gallery(5_000)
    on = (np.arange(5_000) % 17 % 6).astype(np.uint8)
    write_gallery_data(Site(tmp_path), gallery, np.arange(5_000), 5_000, ["a", "b", "c"], PAIRS, on=on)
    found = data(tmp_path, "gallery")
    names = ("the nucleus", "the cell", "both", "the background", "one place")
    assert dict(found["counts"])["on"] == [[name, int((on == code).sum())] for code, name in enumerate(names, start=1)]
    assert set(on[found["at"]].tolist()) == {1, 2}


def test_of_several_datasets_the_strongest_cell_decides(atlas: Path, cohort: Cohort) -> None:
    found = data(atlas, "gallery")
    assert found["datasets"] == sorted(DATASETS)
    for latent in (1, 2):
        image = top_rows(cohort, latent)[0]["image_index"]
        assert found["datasets"][found["dataset"][latent]] == DATASETS[(image // IMAGES_PER_PATIENT) % 2]


@pytest.mark.stress
def test_verdicts_of_experts_stand_on_the_cards(cohort: Cohort, tmp_path: Path) -> None:
    """Of these concepts only; the name that most gave; another verdict makes another atlas."""
    concepts = ConceptStore(cohort.root / "concepts")
    selected = pq.read_table(cohort.root / "concepts" / "selection.parquet")["latent"].to_pylist()
    first, second, third, fourth = selected[:4]
    build = [*cohort.build, tmp_path / "atlas", "--reviews", tmp_path / "reviews"]
    said = [
        ("Ada", first, "meaningful", "lobes"),
        ("Bob", first, "meaningful", "<i>Lobes"),
        ("Cem", first, "meaningful", "lobes "),
        ("Ada", second, "not", "nothing"),
        ("Ada", third, "meaningful", "granules"),
        ("Bob", third, "unsure", ""),
    ]
    texts = dict.fromkeys(("reviewer", "item", "concepts", "a", "b", "atlas", "verdict", "name", "notes"), "")
    verdict = Verdict(
        time="2026-01-01T00:00:00+00:00",
        question="meaningful",
        latent=0,
        comparison=None,
        is_blinded=True,
        confidence=None,
        **texts,
    )
    for reviewer, latent, answer, name in said:
        line = replace(verdict, reviewer=reviewer, item=f"i{latent}", latent=latent, concepts=concepts.identity)
        save_verdict(tmp_path / "reviews", replace(line, verdict=answer, name=name))
    other = replace(verdict, reviewer="Ada", item="x", latent=fourth, concepts="0" * 64, verdict="not")
    save_verdict(tmp_path / "reviews", other)
    assert run(*build).exit_code == 0
    found = data(tmp_path / "atlas", "gallery")
    shown = {latent: VERDICTS[code] for latent, code in zip(found["latents"].tolist(), found["verdict"], strict=True)}
    wanted = ["meaningful", "not meaningful", "verdicts differ", "not yet reviewed"]
    assert [shown[latent] for latent in selected[:4]] == wanted
    assert all(shown[latent] == "not asked about" for latent in shown if latent not in selected)
    names = {int(found["latents"][at]): name for at, name in found["names"]}
    assert names == {first: "lobes", third: "granules"}
    line = replace(verdict, reviewer="Bob", item=f"i{second}", latent=second, concepts=concepts.identity)
    save_verdict(tmp_path / "reviews", replace(line, verdict="not"))
    again = run(*build)
    assert again.exit_code == 0, "what is shown is the same"
    save_verdict(tmp_path / "reviews", replace(line, verdict="unsure"))
    assert "with other settings (reviews" in run(*build).stderr
