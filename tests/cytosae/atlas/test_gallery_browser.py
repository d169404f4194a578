"""The overview in a real Chromium: orders, chips, search, box and address find the right cards; thousands are few."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from atlas_maker import Cohort
from big_gallery import PAIRS, big_gallery
from browser import Watched
from command_line import run

from cytosae.atlas.gallery_files import first_order, write_gallery_data
from cytosae.atlas.site import Site, packed, script_data
from stores import ConceptStore, ResultStore
from stores.spec import ATLAS, COMPARISON

pytestmark = pytest.mark.browser
MANY = 10_000
WIDE = 49_152
CARD_BYTES = 12_000  # as test_gallery.py
IN_VIEW = """[...document.querySelectorAll("#cards > li")].filter((card) => {
    const box = card.getBoundingClientRect();
    return box.bottom > 0 && box.top < innerHeight;
}).length"""

DEEP = """() => {
    const card = document.querySelector("#cards > li:not(.coming)");
    return card && Number(card.ariaPosInSet) > 1000 && card.querySelector(".often").textContent;
}"""


@pytest.fixture(scope="module")
def atlas(cohort: Cohort, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "atlas"
    assert run(*cohort.build, out).exit_code == 0
    return out


@pytest.fixture
def page(browser: Any, atlas: Path) -> Iterator[Watched]:
    watched = Watched(browser, atlas)
    watched.tab.set_viewport_size({"width": 1600, "height": 1000})
    yield watched
    assert watched.wrong == []
    watched.tab.close()


def opened(page: Watched, address: str = "") -> Any:
    tab = page.open(f"index.html{address}")
    tab.wait_for_selector("#cards .map")
    return tab


def shown(tab: Any) -> list[int]:
    """Latents of the cards in the page, which are all of them in a small atlas."""
    tab.set_viewport_size({"width": 1600, "height": 9000})
    n_cards = "document.querySelectorAll('#cards > li').length"
    n = "parseInt(document.querySelector('#count').textContent)"
    tab.wait_for_function(f"() => document.querySelector('#cards').hidden || {n_cards} === {n}")
    return [int(text.removeprefix("Latent ")) for text in tab.locator("#cards h2 a").all_inner_texts()]


def built(page: Watched) -> list[int]:
    return list((ResultStore(page.site, ATLAS).header.summary or {})["latents"])


def pooled(cohort: Cohort, latents: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Frequency and mean activation over both datasets, from the values as they were made."""
    activation = np.delete(cohort.dense.mean(axis=1), 4, axis=0)[:, latents]  # image 4 is unreadable
    n_active = (activation > 0).sum(axis=0)
    return n_active / len(activation), activation.sum(axis=0) / np.maximum(1, n_active)


def test_orders(page: Watched, cohort: Cohort) -> None:
    tab, latents = opened(page), built(page)
    frequency, mean = pooled(cohort, latents)
    for name, wanted in (
        ("mean", [latents[n] for n in np.argsort(-mean)]),
        ("latent", latents),
    ):
        tab.select_option("[name=sort]", name)
        assert shown(tab) == wanted
    tab.select_option("[name=sort]", "frequency")
    place = {latent: n for n, latent in enumerate(latents)}
    found = [frequency[place[latent]] for latent in shown(tab)]
    assert found == sorted(found, reverse=True)
    table = ResultStore(cohort.root / "compare", COMPARISON).table("differential")
    q = table["q"].to_numpy(zero_copy_only=False)
    tab.select_option("[name=sort]", "pair-0")
    tab.wait_for_function("() => location.hash.includes('pair-0')")
    values = [q[latent] for latent in shown(tab)]
    tested = [value for value in values if not np.isnan(value)]
    assert tested == pytest.approx(sorted(tested), abs=2e-3)
    assert not np.isnan(values[: len(tested)]).any(), "what was not tested comes last"


def test_chips_count_and_choose(page: Watched, browser: Any, cohort: Cohort) -> None:
    """Within a group any, across groups all; counts are what a press would leave."""
    tab, latents = opened(page), built(page)
    concepts = ConceptStore(cohort.root / "concepts")
    chips = tab.locator("ul[data-of=label] button[data-value]")
    counts = {chip.get_attribute("data-value"): int(chip.locator(".n").inner_text()) for chip in chips.all()}
    assert sum(counts.values()) <= len(latents)
    names = sorted(counts)
    tab.click(f'ul[data-of=label] button:has-text("{names[-1]}")')
    first = shown(tab)
    assert len(first) == counts[names[-1]]
    for latent in first:
        rows = [row for row in concepts.top_images(latent).to_pylist() if row["label"]]
        by_label = {name: sum(row["value"] for row in rows if row["label"] == name) for name in counts}
        assert max(by_label, key=by_label.__getitem__) == names[-1]
    assert f"{len(first)} of {len(latents)}" in tab.inner_text("#count")
    other = tab.locator("ul[data-of=label] button[data-value]").first
    assert int(other.locator(".n").inner_text()) == counts[str(other.get_attribute("data-value"))], "of its own group"
    open_ones = tab.locator('ul[data-of=verdict] button:has-text("not yet reviewed")')
    n_open = int(open_ones.locator(".n").inner_text())
    open_ones.click()
    assert len(shown(tab)) == n_open
    address = tab.evaluate("location.hash")
    again = browser.new_page()
    again.goto(f"{page.site.as_uri()}/index.html{address}")
    again.wait_for_selector("#cards h2 a")
    again.wait_for_function(f"() => document.querySelector('#count').textContent.startsWith('{n_open} of')")
    again.close()
    tab.click("#clear")
    tab.locator("#count", has_text=re.compile(f"^{len(latents)} concepts")).wait_for()
    assert tab.evaluate("location.hash") == ""


def test_on_a_phone_the_chips_are_behind_a_button(page: Watched) -> None:
    """Cells come first; the button says how many chips and cards are chosen; nothing is cut or scrolled sideways."""
    tab = opened(page)
    assert not tab.locator("#filters").is_visible(), "there is room for the chips"
    tab.set_viewport_size({"width": 390, "height": 844})
    tab.reload()
    tab.wait_for_selector("#cards h2 a")
    assert not tab.locator("#chips").is_visible()
    assert tab.locator("#cards").bounding_box()["y"] < 844 / 2
    tab.click("#filters")
    assert tab.get_attribute("#filters", "aria-expanded") == "true"
    groups = tab.locator("#chips .chip-group")
    assert groups.count() >= 3
    for group in groups.all():
        box = group.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 390
    tab.locator("#chips button[data-value]").first.click()
    shown = tab.inner_text("#count").split(" concepts")[0]
    assert tab.inner_text("#filters") == f"Filters, 1 chosen: {shown}"
    order = tab.locator("[name=sort]").bounding_box()
    assert order["width"] > 300, "names of comparisons are long"


def test_search_numbers_and_nothing(page: Watched, cohort: Cohort) -> None:
    tab, latents = opened(page), built(page)
    tab.fill("[name=search]", "3")
    assert sorted(shown(tab)) == [latent for latent in latents if str(latent).startswith("3")]
    tab.fill("[name=search]", "ONERROR")
    assert 0 < len(shown(tab)) < len(latents)
    assert all("onerror" in text for text in tab.locator("#cards .label").all_inner_texts())
    tab.fill("[name=search]", "no such word")
    assert tab.locator("#none").is_visible()
    tab.click("#again")
    tab.locator("#none").wait_for(state="hidden")
    _, mean = pooled(cohort, latents)
    tab.click(".numbers summary")
    order = np.argsort(mean)
    bound = float(mean[order[4:6]].mean())  # between two of them
    tab.fill("[name=mean_min]", repr(bound))
    assert sorted(shown(tab)) == sorted(latents[n] for n in order[5:])
    tab.fill("[name=mean_max]", repr(bound))
    tab.fill("[name=mean_min]", "")
    assert sorted(shown(tab)) == sorted(latents[n] for n in order[:5])


def test_a_box_in_the_plot_chooses_cards(page: Watched, cohort: Cohort) -> None:
    """And the plot shows what the cards are; a link brings the box back."""
    tab, latents = opened(page), built(page)
    box = tab.locator("#scatter").bounding_box()
    tab.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 12)
    tab.mouse.down()
    tab.mouse.move(box["x"] + box["width"] - 14, box["y"] + box["height"] * 0.5, steps=4)
    tab.mouse.up()
    tab.wait_for_function("() => location.hash.includes('box=')")
    left, right, bottom, top = (float(word) for word in tab.evaluate("ADDRESS.read().get('box')").split(","))
    frequency, mean = pooled(cohort, latents)
    x, y = np.log10(frequency), np.log10(mean)
    near = 2e-3  # the page has half precision
    inside = {latents[n] for n in np.flatnonzero((x > left + near) & (x < right) & (y > bottom + near) & (y < top))}
    outside = {latents[n] for n in np.flatnonzero((x < left - near) | (y < bottom - near))}
    found = {*shown(tab)}
    assert inside <= found
    assert not found & outside
    assert 0 < len(found) < len(latents)
    tab.focus("#scatter")
    tab.keyboard.press("Escape")
    tab.locator("#count", has_text=re.compile(f"^{len(latents)} concepts")).wait_for()


def test_maps_lie_on_the_strongest_cell_and_hide(page: Watched, cohort: Cohort) -> None:
    tab = opened(page)
    tab.select_option("[name=sort]", "latent")
    tab.fill("[name=search]", "3")
    tab.wait_for_selector("#cards .map canvas")
    tab.wait_for_timeout(200)
    card = tab.locator('#cards li:has(a[href="concepts/3.html"])')
    drawn = card.locator("canvas").evaluate(
        "(c) => [...c.getContext('2d').getImageData(0, 0, 16, 16).data].filter((_, n) => n % 4 === 3)"
    )
    rows = ConceptStore(cohort.root / "concepts").top_images(3).to_pylist()
    image = max(rows, key=lambda row: row["value"])["image_index"]
    patches = cohort.dense[image, 1:, 3]
    np.testing.assert_allclose(np.array(drawn) / 255, 0.85 * patches / patches.max(), atol=0.01)
    shot, map_ = card.locator(".shot img").bounding_box(), card.locator(".map").bounding_box()
    height = 64 - 8 * (image % 3)  # a picture that is no square lies in the middle of its square
    assert map_["width"] == pytest.approx(shot["width"] * 2 / 3, abs=1.5)
    assert map_["height"] == pytest.approx(shot["height"] * height / 64, abs=2)
    tab.keyboard.press("Escape")
    tab.locator("#maps").click()
    assert tab.locator("#cards .map").count() == 0


def test_ten_thousand_cards_are_few_in_the_page(browser: Any, atlas: Path, tmp_path: Path) -> None:
    """Wherever one is, the right cards are there, and never more than a few rows of them."""
    site = Path(shutil.copytree(atlas, tmp_path / "atlas"))
    latents = np.array((ResultStore(site, ATLAS).header.summary or {})["latents"])
    which = np.arange(MANY) % len(latents)
    rng = np.random.default_rng(0)
    frequency = rng.permutation(np.linspace(0.01, 1, MANY)).astype(np.float32)
    many = {
        "latents": packed(latents[which].astype(np.uint16)),
        "frequency": packed(frequency),
        "mean": packed(np.ones(MANY, np.float16)),
        "has_picture": packed(np.ones(MANY, np.uint8)),
        "verdict": packed(np.ones(MANY, np.uint8)),
        **{"largest": 1.0, "labels": [], "no_label": 255, "datasets": ["cells"], "pairs": [], "names": []},
    }
    (site / "data" / "gallery.js").write_bytes(script_data("gallery", many))
    for n in range(MANY // 16 + 1):
        maps = {"maps": packed(np.zeros(16 * 256, np.uint8)), "aspect": packed(np.ones(16, np.float32))}
        (site / "data" / f"maps-{n}.js").write_bytes(script_data(f"maps-{n}", maps))
    watched = Watched(browser, site)
    tab = watched.open("index.html#sort=frequency")
    tab.locator("#count", has_text="10,000 concepts").wait_for()
    order = np.argsort(-frequency, kind="stable")
    height = tab.evaluate("document.documentElement.scrollHeight")
    for part in (0, 0.37, 0.9, 0.2, 1):
        tab.evaluate(f"scrollTo(0, {part} * document.documentElement.scrollHeight)")
        tab.wait_for_timeout(120)
        cards = tab.locator("#cards > li")
        assert 0 < cards.count() <= 60
        places = [int(str(card.get_attribute("aria-posinset"))) for card in (cards.first, cards.last)]
        assert places[1] - places[0] == cards.count() - 1
        for card, place in ((cards.first, places[0]), (cards.last, places[1])):
            assert str(card.locator("a").get_attribute("href")) == f"concepts/{latents[which[order[place - 1]]]}.html"
        assert tab.evaluate("document.documentElement.scrollHeight") == pytest.approx(height, abs=2)
        in_view = tab.evaluate(IN_VIEW)
        assert in_view > 0
    assert int(str(tab.locator("#cards > li").last.get_attribute("aria-posinset"))) == MANY
    assert watched.wrong == []
    tab.close()


def test_chips_of_what_concepts_lie_on(browser: Any, atlas: Path, tmp_path: Path) -> None:
    """A chip for each value that is there, with its number; each finds its concepts, nuclei and cells first."""
    site, n = Path(shutil.copytree(atlas, tmp_path / "atlas")), 40
    codes = np.resize(np.array([0, 1, 2, 2, 3, 4, 5, 5], np.uint8), n)
    columns = {
        "latents": packed(np.arange(n).astype(np.uint16)),
        "frequency": packed(np.ones(n, np.float16)),
        "mean": packed(np.linspace(0.5, 1, n).astype(np.float16)),
        "has_picture": packed(np.zeros(n, np.uint8)),
        "verdict": packed(np.ones(n, np.uint8)),
        "on": packed(codes),
        **{"largest": 1.0, "labels": [], "no_label": 255, "datasets": ["cells"], "pairs": [], "names": []},
    }
    (site / "data" / "gallery.js").write_bytes(script_data("gallery", columns))
    watched = Watched(browser, site)
    tab = watched.open("index.html")
    tab.wait_for_selector("ul[data-of=on]")
    texts = ["the nucleus", "the cell", "cell and background", "the background", "one place"]
    chips = tab.locator("ul[data-of=on] button[data-value]")
    counts = [int(text) for text in chips.locator(".n").all_inner_texts()]
    assert counts == [np.sum(codes == code) for code in range(1, 6)]
    for text, count, chip in zip(texts, counts, chips.all_inner_texts(), strict=True):
        assert chip.split() == [*text.split(), str(count)]
    turn = np.array([1, 0, 0, 1, 2, 3])[codes]
    assert (np.diff(turn[shown(tab)]) >= 0).all()
    for code, value in enumerate(["the nucleus", "the cell", "both", "the background", "one place"], start=1):
        tab = watched.open(f"index.html#on={value.replace(' ', '%20')}")
        tab.wait_for_selector('ul[data-of=on] [aria-pressed="true"]')
        assert sorted(shown(tab)) == np.flatnonzero(codes == code).tolist()
    assert watched.wrong == []
    tab.close()


@pytest.fixture(scope="module")
def wide(atlas: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The overview of 49,152 concepts; their pages and pictures are those of the small atlas."""
    site = Path(shutil.copytree(atlas, tmp_path_factory.mktemp("wide") / "atlas"))
    for name in ("gallery", *(path.stem for path in (site / "data").glob("maps-*.js"))):
        (site / "data" / f"{name}.js").unlink()
    index = site / "index.html"
    index.write_text(re.sub(r'data-images="\d+"', 'data-images="171373"', index.read_text()))
    latents = np.array((ResultStore(site, ATLAS).header.summary or {})["latents"])[np.arange(WIDE) % 9]
    write_gallery_data(Site(site), big_gallery(WIDE), latents, 1 << 16, ["a", "b", "c"], PAIRS)
    for n in range(WIDE // 16):
        maps = {"maps": packed(np.zeros(16 * 256, np.uint8)), "aspect": packed(np.ones(16, np.float32))}
        (site / "data" / f"maps-{n}.js").write_bytes(script_data(f"maps-{n}", maps))
    return site


def titles(tab: Any) -> dict[int, str]:
    """Place of each card in the page, and what it says."""
    return {
        int(str(card.get_attribute("aria-posinset"))): card.locator(".often").evaluate(
            "(line) => line.firstChild.textContent"
        )
        for card in tab.locator("#cards > li").all()
    }


def said_of(at: int, frequency: np.ndarray) -> str:
    return f"in {float(f'{100 * float(np.float16(frequency[at])):.3g}'):g}% of images"


def test_the_first_page_of_very_many_reads_little(browser: Any, wide: Path) -> None:
    """All that the browser reads, before anybody touches it, with the plot open; the cards and chips are right."""
    watched, read = Watched(browser, wide), set()
    watched.tab.set_viewport_size({"width": 1600, "height": 1000})
    watched.tab.on("request", lambda request: read.add(request.url.split("#")[0]))
    tab = watched.open("index.html")
    tab.wait_for_selector("#cards .map")
    tab.wait_for_selector("#scatter")
    tab.wait_for_load_state("networkidle")
    tab.wait_for_timeout(300)
    files = [Path(url.removeprefix("file://")) for url in read if url.startswith("file:")]
    others = sum(path.stat().st_size for path in files if path.parent.name != "cards")
    n_cards = tab.locator("#cards > li img").count()
    assert others + n_cards * CARD_BYTES < 1_000_000, f"{others:,} bytes and {n_cards} cards"
    assert "gallery-rest.js" not in {path.name for path in files}
    assert "gallery-plot.js" in {path.name for path in files}
    gallery = big_gallery(WIDE)
    order, alike = first_order(gallery)
    assert tab.inner_text("#count").startswith(f"{len(order):,} of 49,152 concepts")
    shown = titles(tab)
    assert len(shown) > 8
    for place, text in shown.items():
        assert text == said_of(order[place - 1], gallery.frequency)
    counts = tab.locator("ul[data-of=label] button[data-value] .n").all_inner_texts()
    assert [int(text.replace(",", "")) for text in counts][:3] == sorted(
        np.bincount(gallery.label[gallery.label >= 0]).tolist(), reverse=True
    )[:3]
    more = tab.locator("#cards > li").first.locator(".of").inner_text()
    assert more == (f"{alike[0]} more alike" if alike[0] else "")
    assert watched.wrong == []
    tab.close()


def test_all_of_very_many_can_be_reached(browser: Any, wide: Path) -> None:
    """By scrolling, a filter, another order, and a link; each from the first page anew."""
    gallery = big_gallery(WIDE)
    order, _ = first_order(gallery)
    watched = Watched(browser, wide)
    tab = watched.open("index.html")
    tab.wait_for_selector("#cards .map")
    tab.evaluate("scrollTo(0, 0.6 * document.documentElement.scrollHeight)")
    tab.wait_for_function(DEEP)
    tab.wait_for_timeout(200)
    shown = titles(tab)
    assert len(shown) > 4
    for place, text in shown.items():
        assert text == said_of(order[place - 1], gallery.frequency)
    tab.close()
    watched = Watched(browser, wide)
    tab = watched.open("index.html")
    tab.wait_for_selector("#cards .map")
    tab.focus("#cards > li:first-child h2 a")
    tab.click("ul[data-of=label] button >> nth=0")
    label = tab.locator("ul[data-of=label] button[aria-pressed=true]").get_attribute("data-value")
    number = gallery.labels.index(str(label))
    tab.locator("#count", has_text="more show the same cells").wait_for()
    n_shown = len({*gallery.cells[gallery.label == number].tolist()})
    assert tab.inner_text("#count").startswith(f"{n_shown:,} of 49,152 concepts")
    address = tab.evaluate("location.hash")
    tab.click("#clear")
    tab.locator("#count", has_text=f"{len(order):,} of").wait_for()
    tab.close()
    watched = Watched(browser, wide)
    tab = watched.open(f"index.html{address}")
    tab.locator("#count", has_text=f"{n_shown:,} of").wait_for()
    tab.select_option("[name=sort]", "frequency")
    chosen = np.flatnonzero(gallery.label == number)
    best = chosen[np.argmax(np.where([len(gallery.images[at]) > 0 for at in chosen], gallery.frequency[chosen], 0))]
    tab.wait_for_function(
        f"() => document.querySelector('#cards .often').textContent.startsWith({said_of(best, gallery.frequency)!r})"
    )
    assert watched.wrong == []
    tab.close()
