"""The atlas in a real headless Chromium, from file://: no errors, filters find what they should, keys suffice."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from atlas_maker import DATASETS, N_LATENTS, Cohort
from browser import VIEWPORT, Watched, axe, photograph
from command_line import run as cyto
from PIL import Image
from places import ROOT

from stores import ConceptStore, ResultStore
from stores.spec import ATLAS, COMPARISON

pytestmark = pytest.mark.browser
FIRST_POINT = """() => {
    const plot = document.querySelector("#scatter"), [width, height] = [plot.width - 76, plot.height - 54];
    const { data } = plot.getContext("2d").getImageData(63, 9, width, height);
    const n = [...Array(width * height).keys()].find((at) => data[4 * at + 3] > 150);
    return [64 + n % width, 10 + Math.floor(n / width)];
}"""
PICTURE = """async () => {
    await new Promise(requestAnimationFrame);
    return document.querySelector("#scatter").toDataURL();
}"""
WRITTEN = """
    const write = CanvasRenderingContext2D.prototype.fillText;
    CanvasRenderingContext2D.prototype.fillText = function (text, x, y) {
        (window.written ??= []).push([text, x]);
        write.call(this, text, x, y);
    };
"""
AXIS = """async (title) => { // the numbers below the axis that were written last, and their places in pixels
    for (let n = 0; n < 2; n++) await new Promise(requestAnimationFrame);
    const titles = window.written.map(([text], n) => (text.startsWith(title) ? n : -1)).filter((n) => n >= 0);
    const all = window.written.slice(0, titles.at(-1)), isNumber = ([text]) => Number.isFinite(Number(text));
    return all.slice(1 + all.findLastIndex((one) => !isNumber(one)));
}"""
OPACITY = """() => {
    const { data } = document.querySelector(".frame canvas").getContext("2d").getImageData(0, 0, 16, 16);
    return [...data].filter((_, n) => n % 4 === 3);
}"""

PATCHES = """() => {
    const { data } = document.querySelector("#patches").getContext("2d").getImageData(0, 0, 256, 256);
    return [...Array(256).keys()].map((n) => data[4 * ((Math.floor(n / 16) * 16 + 8) * 256 + (n % 16) * 16 + 8) + 3]);
}"""


@pytest.fixture(scope="module")
def atlas(cohort: Cohort, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "atlas"
    assert cyto(*cohort.build, out).exit_code == 0
    return out


@pytest.fixture
def page(browser: Any, atlas: Path) -> Iterator[Watched]:
    watched = Watched(browser, atlas)
    yield watched
    assert watched.wrong == []
    watched.tab.close()


def kinds(atlas: Path) -> list[str]:
    """A page of every kind, and all of the first level."""
    firsts = [min((atlas / name).glob("*.html")) for name in ("concepts", "patients", "diseases", "pairs", "images")]
    return [str(path.relative_to(atlas)) for path in (*sorted(atlas.glob("*.html")), *firsts)]


def shown(tab: Any) -> list[int]:
    """Latents of the table's page."""
    return [int(text) for text in tab.locator("#latents tbody th").all_inner_texts()]


def statistics(cohort: Cohort, dataset: str, name: str) -> np.ndarray:
    return (
        ConceptStore(cohort.root / "concepts").latents(dataset)[name].to_numpy(zero_copy_only=False).astype(np.float32)
    )


def test_every_kind_of_page_opens_without_a_complaint(page: Watched, atlas: Path) -> None:
    """Hostile names ran nothing: the title is the page's own, and no dialog opened."""
    page.tab.on("dialog", lambda dialog: page.wrong.append(f"dialog {dialog.message}"))
    names = [*kinds(atlas), *(f"patients/{n}.html" for n in range(4)), *(f"images/{n}.html" for n in (0, 1, 7))]
    for name in names:
        tab = page.open(name)
        tab.wait_for_load_state()
        assert tab.title().endswith("· atlas")
        assert "owned" != tab.title()
        assert tab.locator("h1").count() == 1
        assert not tab.evaluate("[...document.images].some((image) => image.complete && !image.naturalWidth)")
        width = tab.evaluate("document.documentElement.scrollWidth")
        assert width <= 1280, f"{name} is {width} wide"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_photographs(page: Watched, atlas: Path, scheme: str) -> None:
    """Every kind of page at the widths of a phone, a tablet and a desk; $CYTO_PHOTOS keeps them, to be looked at."""
    for name in kinds(atlas):
        photograph(page, name, scheme=scheme)


def test_filters_search_and_sorting_give_the_right_rows(page: Watched, cohort: Cohort, atlas: Path) -> None:
    tab = page.open("latents.html")
    mean, frequency = (statistics(cohort, DATASETS[0], name) for name in ("mean_activation", "frequency"))
    tab.select_option("[name=dataset]", label=DATASETS[0])
    tab.wait_for_selector("#latents[aria-busy=false]")
    order = np.lexsort((np.arange(N_LATENTS), -mean)).tolist()
    assert shown(tab) == order[:25]
    tab.click("#after")
    assert shown(tab) == order[25:]
    tab.click("th[data-key=frequency] button")
    assert shown(tab) == np.lexsort((np.arange(N_LATENTS), -frequency)).tolist()[:25]
    assert tab.get_attribute("th[data-key=frequency]", "aria-sort") == "descending"
    tab.click("th[data-key=latent] button")
    assert shown(tab) == list(range(25))
    bound = float(np.median(mean))
    tab.fill("[name=mean_min]", repr(bound))
    assert shown(tab) == np.flatnonzero(mean >= bound).tolist()
    tab.fill("[name=search]", "1")
    assert shown(tab) == [n for n in np.flatnonzero(mean >= bound) if str(n).startswith("1")]
    tab.click("button[type=reset]")
    tab.wait_for_selector("#latents[aria-busy=false]")

    first = ConceptStore(cohort.root / "concepts").datasets[0]
    labels = ConceptStore(cohort.root / "concepts").latents(first)["top_label"].to_pylist()
    entropy = statistics(cohort, first, "label_entropy")
    tab.fill("[name=search]", "ONERROR")
    wanted = [n for n, label in enumerate(labels) if label and "onerror" in label]
    assert shown(tab) == wanted[:25]
    tab.fill("[name=search]", "")
    tab.select_option("[name=label]", label="neutrophil")
    assert shown(tab) == [n for n, label in enumerate(labels) if label == "neutrophil"][:25]
    tab.select_option("[name=label]", value="")
    tab.fill("[name=entropy_max]", "0.3")
    assert tab.inner_text("#count").startswith(f"{int((entropy <= 0.3).sum())} of 40")  # none is not below
    tab.fill("[name=entropy_max]", "")
    q = ResultStore(cohort.root / "compare", COMPARISON).table("differential")["q"].to_numpy(zero_copy_only=False)
    tab.select_option("[name=pair]", index=1)
    tab.wait_for_selector("#latents tbody td:last-child:text-matches('[0-9]')")
    tab.fill("[name=q_max]", "0.2")
    assert 0 < (q <= 0.2).sum() < N_LATENTS
    assert shown(tab) == np.flatnonzero(q.astype(np.float32) <= 0.2).tolist()[:25]
    tab.fill("[name=q_max]", "")
    tab.check("[name=built]")
    assert shown(tab) == (ResultStore(atlas, ATLAS).header.summary or {})["latents"][:25]


def test_scatter_shows_and_opens_what_is_under_the_pointer(page: Watched, cohort: Cohort, atlas: Path) -> None:
    tab = page.open("latents.html")
    tab.wait_for_selector(".legend li")
    built = (ResultStore(atlas, ATLAS).header.summary or {})["latents"]
    tab.check("[name=built]")
    tab.fill("[name=search]", str(built[-1]))
    tab.evaluate(PICTURE)
    x, y = tab.evaluate(FIRST_POINT)
    tab.hover("#scatter", position={"x": x, "y": y})
    assert tab.inner_text(".tip").startswith(f"latent {built[-1]}")
    assert tab.locator(".tip img").count() == 1
    before = tab.evaluate(PICTURE)
    tab.click("[data-zoom=in]")
    assert tab.evaluate(PICTURE) != before
    tab.click("[data-zoom=all]")
    assert tab.evaluate(PICTURE) == before
    tab.click("#scatter", position={"x": x, "y": y})
    tab.wait_for_url(f"**/concepts/{built[-1]}.html")


@pytest.mark.parametrize(
    ("name", "title", "scale"), [("latents", "frequency", np.log10), ("pairs", "mean in B, ", np.sqrt)]
)
@pytest.mark.parametrize("button", ["in", "out"])
def test_axes_have_round_numbers_at_their_places_at_every_zoom(
    page: Watched, atlas: Path, name: str, title: str, scale: Callable[[np.ndarray], np.ndarray], button: str
) -> None:
    page.tab.add_init_script(WRITTEN)
    where = "latents.html" if name == "latents" else f"pairs/{next((atlas / 'pairs').glob('*.html')).name}"
    tab = page.open(where)
    tab.wait_for_selector(".legend li")
    spans = []
    for _ in range(8):
        texts, places = zip(*tab.evaluate(AXIS, title), strict=True)
        assert 2 <= len(set(texts)) == len(texts) <= 12, texts
        values = scale(np.array(texts, float))
        line = np.polynomial.Polynomial.fit(values, places, 1)
        np.testing.assert_allclose(line(values), places, atol=0.5)  # pixels
        spans.append(line.deriv()(0))
        tab.click(f"figure:has(#scatter, #pair) [data-zoom={button}]")
    growth = np.divide(spans[1:], spans[:-1])
    np.testing.assert_allclose(growth, 1 / 0.6 if button == "in" else 0.6, rtol=0.01)


def test_maps_switch_on_and_off(page: Watched, cohort: Cohort) -> None:
    tab = page.open("concepts/3.html")
    frames, canvases = tab.locator(".frame[data-map]").count(), tab.locator(".frame canvas").count()
    assert frames == canvases > 0
    assert tab.get_attribute("#maps", "aria-pressed") == "true"
    image = int(str(tab.get_attribute(".frame", "href")).split("/")[-1].split(".")[0])
    opacity, values = np.array(tab.evaluate(OPACITY)), cohort.dense[image, 1:, 3]
    assert not opacity[values == 0].any()
    assert np.corrcoef(opacity, values)[0, 1] > 0.99
    tab.keyboard.press("m")
    assert tab.locator(".frame canvas").count() == 0
    assert tab.locator(".key").is_hidden()


def test_the_slider_moves_between_picture_and_map(page: Watched) -> None:
    tab = page.open("concepts/3.html")
    assert tab.evaluate("getComputedStyle(document.querySelector('.best .map')).clipPath").endswith("0%)")
    tab.focus(".best .wipe")
    for _ in range(40):
        tab.keyboard.press("ArrowRight")
    assert tab.evaluate("document.querySelector('.best .frame[data-map]').style.getPropertyValue('--wipe')") == "40%"
    assert tab.evaluate("getComputedStyle(document.querySelector('.best .map')).clipPath").endswith("40%)")


def test_a_point_of_the_strip_shows_the_patients_own_best_cell(page: Watched) -> None:
    tab = page.open("concepts/3.html")
    point = tab.locator(".strip circle[data-cell]").last
    point.scroll_into_view_if_needed()
    assert tab.locator(".strips .tip").is_hidden()
    point.hover(force=True)
    assert tab.locator(".strips .tip").is_visible()
    assert tab.get_attribute(".strips .tip img", "src") == f"../pictures/{point.get_attribute('data-cell')}.jpg"
    assert tab.inner_text(".strips .tip") == point.locator("title").text_content()
    patient = point.get_attribute("data-patient")
    point.click(force=True)
    tab.wait_for_url(f"**/patients/{patient}.html")


def test_every_token_of_an_image_tells_its_latents(page: Watched, cohort: Cohort) -> None:
    tab, dense = page.open("images/0.html"), cohort.dense[0]
    tab.wait_for_selector("#list tbody tr")
    box = tab.locator("#patches").bounding_box()
    tab.mouse.click(box["x"] + box["width"] * 5.5 / 16, box["y"] + box["height"] * 9.5 / 16)
    patch = 9 * 16 + 5
    assert tab.inner_text("#what") == f"Patch {patch}, row 9, column 5: {(dense[1 + patch] > 0).sum()} latents"
    values = dense[1 + patch]
    found = [int(text) for text in tab.locator("#list tbody th").all_inner_texts()]
    assert values[found].tolist() == sorted(values[values > 0].tolist(), reverse=True)
    tab.locator("#list tbody button").first.click()
    assert tab.locator("#tokens.mapped").count() == 1
    assert f"(latent {found[0]})" in tab.inner_text("#largest")
    tab.click("#cls")
    assert tab.locator("#list tbody tr").count() == (dense[0] > 0).sum()


def test_keys_alone_are_enough(page: Watched) -> None:
    """From the overview to a concept by its number, to its maps, to an image and through its patches."""
    tab = page.open("index.html")
    tab.wait_for_selector("#cards .map")
    press_until(tab, "document.activeElement.name === 'search'")
    tab.keyboard.type("3")
    press_until(tab, "document.activeElement.textContent === 'Latent 3'")
    assert tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    tab.keyboard.press("Enter")
    tab.wait_for_url("**/concepts/3.html")
    assert tab.locator(".frame canvas").count() > 0
    press_until(tab, "document.activeElement.id === 'maps'")
    tab.keyboard.press("Enter")
    assert tab.locator(".frame canvas").count() == 0
    press_until(tab, "document.activeElement.classList.contains('frame')")
    tab.keyboard.press("Enter")
    tab.wait_for_url("**/images/*.html")
    press_until(tab, "document.activeElement.id === 'patches'")
    tab.keyboard.press("ArrowRight")
    assert tab.inner_text("#what").startswith("Patch 136, row 8, column 8")
    tab.keyboard.press("ArrowUp")
    assert tab.inner_text("#what").startswith("Patch 120, row 7, column 8")
    press_until(tab, "document.activeElement.matches('#list button')")
    tab.keyboard.press("Space")
    assert tab.locator("#tokens.mapped").count() == 1


def place_of(x: np.ndarray, y: np.ndarray, number: int, size: dict[str, float]) -> tuple[float, float]:
    """Where a scatter that shows everything has one point, in pixels of its canvas."""
    is_drawn = np.isfinite(x) & np.isfinite(y)
    shares = []
    for values in (x, y):
        low, high = values[is_drawn].min(), values[is_drawn].max()
        margin = 0.04 * (high - low or 1)
        shares.append(float((values[number] - low + margin) / (high - low + 2 * margin)))
    return 62 + shares[0] * (size["width"] - 2 - 74), 8 + (1 - shares[1]) * (size["height"] - 2 - 52)


def test_a_pair_lies_where_its_means_say(page: Watched, cohort: Cohort) -> None:
    """B to the right, A upwards; the tip's numbers and the colour are those of the table."""
    tab = page.open(f"pairs/{next((page.site / 'pairs').glob('*.html')).name}")
    tab.wait_for_selector(".legend li")
    table = ResultStore(cohort.root / "compare", COMPARISON).table("differential")
    a, b, q = (table[name].to_numpy(zero_copy_only=False).astype(float) for name in ("mean_a", "mean_b", "q"))
    assert q[3] <= 0.05
    assert a[3] > b[3]
    x, y = place_of(np.sqrt(b), np.sqrt(a), 3, tab.locator("#pair").bounding_box())
    tab.hover("#pair", position={"x": x + 1, "y": y + 1})
    told = tab.inner_text(".plot:has(#pair) .tip").splitlines()
    assert told[0] == "latent 3"
    assert [float(number) for number in told[1].replace("A ", "").replace("B ", "").split(", ")] == pytest.approx(
        [a[3], b[3]], rel=0.01
    )
    at = "([x, y]) => [...document.querySelector('#pair').getContext('2d').getImageData(x, y, 1, 1).data]"
    assert tab.evaluate(at, [round(x), round(y)])[:3] == pytest.approx([0, 114, 178], abs=2), "higher in A"


def test_the_scatter_shows_a_latent_where_it_is_with_its_own_picture(page: Watched, cohort: Cohort) -> None:
    tab = page.open("latents.html")
    tab.wait_for_selector(".legend li")
    first = ConceptStore(cohort.root / "concepts").datasets[0]
    with np.errstate(divide="ignore"):  # one is never active
        x, y = (np.log10(statistics(cohort, first, name)) for name in ("frequency", "mean_activation"))
    at = place_of(x, y, 3, tab.locator("#scatter").bounding_box())
    tab.hover("#scatter", position={"x": at[0] + 1, "y": at[1] + 1})
    assert tab.inner_text(".tip").startswith("latent 3\n")
    assert str(tab.get_attribute(".tip img", "src")).endswith("cards/3.jpg")


def test_undefined_values_come_last_and_clear_clears(page: Watched, cohort: Cohort) -> None:
    q = ResultStore(cohort.root / "compare", COMPARISON).table("differential")["q"].to_numpy(zero_copy_only=False)
    assert np.isnan(q).any()
    tab = page.open("latents.html")
    tab.wait_for_selector("#latents[aria-busy=false]")
    tab.select_option("[name=pair]", index=1)
    tab.wait_for_selector("#latents tbody td:last-child:text-matches('[0-9]')")
    for sign in (1, -1):
        tab.click("th[data-key=q] button")
        order = np.lexsort((np.arange(N_LATENTS), sign * q.astype(np.float32), np.isnan(q)))
        assert shown(tab) == order[:25].tolist()
    assert tab.is_disabled("#before")
    tab.click("#after")
    assert shown(tab) == order[25:].tolist()
    assert tab.is_disabled("#after")
    least = float(np.nanmin(q.astype(np.float32)))
    tab.fill("[name=q_max]", repr(least))
    assert shown(tab) == np.flatnonzero(q.astype(np.float32) == np.float32(least)).tolist(), "at most is not below"
    tab.fill("[name=q_max]", "1")
    assert tab.inner_text("#count").startswith(f"{int((~np.isnan(q)).sum())} of 40"), "not tested is not at most 1"
    tab.click("button[type=reset]")
    tab.locator("#count", has_text="40 of 40").wait_for()
    assert tab.locator("#latents tbody td:last-child").all_inner_texts() == ["\N{EN DASH}"] * 25
    mean = statistics(cohort, ConceptStore(cohort.root / "concepts").datasets[0], "mean_activation")
    for name in ("mean_min", "mean_max"):
        tab.fill(f"[name={name}]", repr(float(mean[7])))
    assert shown(tab) == [7], "both ends are in"


def test_an_image_shows_sums_cls_and_the_map_of_the_latent(page: Watched, cohort: Cohort) -> None:
    """Every number against the latents as they were made; the map patch by patch."""
    tab, dense = page.open("images/1.html"), cohort.dense[1]
    tab.wait_for_selector("#list tbody tr")
    for what, values, button in (("Whole image", dense[1:].sum(axis=0), "#whole"), ("CLS token", dense[0], "#cls")):
        tab.click(button)
        assert tab.inner_text("#what") == f"{what}: {(values > 0).sum()} latents"
        latents = [int(text) for text in tab.locator("#list tbody th").all_inner_texts()]
        numbers = [float(text) for text in tab.locator("#list tbody td:nth-child(2)").all_inner_texts()]
        assert numbers == pytest.approx(values[latents].tolist(), rel=0.01)
        assert numbers == sorted(numbers, reverse=True)
        button = tab.locator("#list tbody button").nth(2)
        button.click()
        latent = int(str(button.get_attribute("aria-label")).split()[-1])
        assert latent == latents[2]
        assert tab.locator("#list button[aria-pressed=true]").count() == 1
        assert button.get_attribute("aria-pressed") == "true"
        drawn = np.array(tab.evaluate(PATCHES))
        np.testing.assert_allclose(drawn / drawn.max(), dense[1:, latent] / dense[1:, latent].max(), atol=0.02)
        button.click()
        assert tab.locator("#tokens.mapped").count() == 0, "a second time takes it away"
    tab.focus("#patches")
    for key in ("ArrowUp", *["ArrowUp"] * 9, *["ArrowLeft"] * 9):
        tab.keyboard.press(key)
    assert tab.inner_text("#what").startswith("Patch 0, row 0, column 0:"), "the border stops"
    for key in ("ArrowRight", "ArrowDown"):
        tab.keyboard.press(key)
    assert tab.inner_text("#what").startswith("Patch 17, row 1, column 1:")


def test_maps_of_one_page_are_on_one_scale(page: Watched, cohort: Cohort) -> None:
    tab = page.open("concepts/3.html")
    found = tab.evaluate(
        """() => [...document.querySelectorAll(".frame canvas")].map((canvas) => {
            const { data } = canvas.getContext("2d").getImageData(0, 0, 16, 16);
            return Math.max(...data.filter((_, n) => n % 4 === 3));
        })"""
    )
    frames = tab.locator(".frame[data-map]").all()
    images = [int(str(frame.get_attribute("href")).split("/")[-1][:-5]) for frame in frames]
    largest = cohort.dense[images, 1:, 3].max(axis=1)
    np.testing.assert_allclose(np.array(found) / max(found), largest / largest.max(), atol=0.02)


def press_until(tab: Any, condition: str) -> None:
    for _ in range(80):
        tab.keyboard.press("Tab")
        if tab.evaluate(condition):
            return
    raise AssertionError(f"no key leads to {condition}")


def test_an_accessibility_checker_finds_nothing(page: Watched, browser: Any, atlas: Path) -> None:
    """axe-core, WCAG 2 A and AA and its best practices, on a page of every kind, maps shown."""
    source = axe()
    for name in kinds(atlas):
        context = browser.new_context(bypass_csp=True)  # the checker is not the atlas's own script
        tab = context.new_page()
        tab.goto(f"{atlas.as_uri()}/{name}")
        tab.wait_for_timeout(200)
        tab.evaluate(source)
        found = tab.evaluate("axe.run()")["violations"]
        said = [f"{name}: {rule['id']}: {rule['nodes'][0]['html'][:200]}" for rule in found]
        context.close()
        assert said == []


def test_screenshots(browser: Any, atlas: Path, tmp_path: Path) -> None:
    """The two pictures of the docs. $CYTO_SHOW names another atlas, that of cyto demo: then they go into docs/img."""
    shown = os.environ.get("CYTO_SHOW")
    site, folder = (Path(shown), ROOT / "docs" / "img") if shown else (atlas, tmp_path)
    concept = (ResultStore(site, ATLAS).header.summary or {})["selection"][0]
    watched = Watched(browser, site)
    tab = watched.open("index.html")
    tab.wait_for_selector("#cards .map")
    tab.wait_for_load_state("networkidle")
    tab.screenshot(path=tmp_path / "atlas-overview.png")
    tab = watched.open(f"concepts/{concept}.html")
    tab.wait_for_load_state("networkidle")
    tab.screenshot(path=tmp_path / "atlas-concept.png")
    for name in ("atlas-overview.png", "atlas-concept.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.size == (VIEWPORT["width"], VIEWPORT["height"])
            assert np.asarray(picture.convert("L")).std() > 15
            picture.convert("RGB").quantize(255).save(folder / name, optimize=True)
    assert watched.wrong == []
    tab.close()
