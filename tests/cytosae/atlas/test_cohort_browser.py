"""Pages of patients, diseases, pairs and of another atlas in a real browser: barcode, boxes, address, three widths."""

import base64
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from atlas_maker import Cohort
from browser import Watched, axe
from command_line import run as cyto
from PIL import Image

from stores import ResultStore
from stores.spec import ATLAS, COMPARISON

pytestmark = pytest.mark.browser
WIDTHS = (390, 1000, 1600)
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def atlas(cohort: Cohort, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With another atlas beside it."""
    root = tmp_path_factory.mktemp("built")
    few = ("--pages", "top", "--top", 4, "--patient-images", 0)
    assert cyto(*cohort.build, root / "other", *few).exit_code == 0
    assert cyto(*cohort.build, root / "atlas", "--beside", root / "other").exit_code == 0
    return root / "atlas"


@pytest.fixture
def page(browser: Any, atlas: Path) -> Iterator[Watched]:
    watched = Watched(browser, atlas)
    yield watched
    assert watched.wrong == []
    watched.tab.close()


def kinds(atlas: Path) -> list[str]:
    pair = next((atlas / "pairs").glob("*.html")).name
    lists = ["patients.html", "diseases.html", "families.html", "beside.html"]
    return ["patients/0.html", "diseases/0.html", f"pairs/{pair}", *lists]


def test_pages_fit_and_are_photographed_at_three_widths(page: Watched, atlas: Path, tmp_path: Path) -> None:
    """$CYTO_PHOTOS keeps the photographs there, to be looked at."""
    folder = Path(os.environ.get("CYTO_PHOTOS") or tmp_path)
    for name in kinds(atlas):
        for width in WIDTHS:
            page.tab.set_viewport_size({"width": width, "height": 1000})
            tab = page.open(name)
            tab.wait_for_load_state("networkidle")
            assert tab.evaluate("document.documentElement.scrollWidth") <= width, f"{name} at {width}"
            picture = folder / f"{name.replace('/', '-').removesuffix('.html')}-{width}.png"
            tab.screenshot(path=picture)
            with Image.open(picture) as shown:
                assert np.asarray(shown.convert("L")).std() > 8, f"{name} at {width} is empty"


def test_what_cannot_be_saved_is_told(browser: Any, atlas: Path, tmp_path: Path) -> None:
    """A row of cells whose picture is missing from the atlas."""
    copied = Path(shutil.copytree(atlas, tmp_path / "atlas"))
    for script in (copied / "data").glob("picture-*.js"):
        script.unlink()
    tab = browser.new_page()
    tab.goto(f"{copied.as_uri()}/{kinds(copied)[2]}")
    button = tab.locator("[data-row=svg]").first
    button.click()
    said = tab.locator(".not-saved")
    said.wait_for()
    assert re.fullmatch(r"Not saved: data/picture-\d+\.js is missing from this atlas; .*", said.inner_text())
    button.click()
    tab.wait_for_timeout(200)
    assert said.count() == 1
    tab.close()


def test_cells_of_both_lists_say_so(page: Watched) -> None:
    """Those least typical of their patient and those unlike other patients' cells are often the same."""
    n_both = 0
    for patient in sorted((page.site / "patients").glob("*.html"))[:6]:
        tab = page.open(f"patients/{patient.name}")
        lists = [
            {cell.locator(".hash").first.inner_text(): "in both lists" in cell.inner_text() for cell in each.all()}
            for each in (tab.locator(f"section.odd:has(#{place}) .odds > li") for place in ("least-typical", "unlike"))
        ]
        both = lists[0].keys() & lists[1].keys()
        for cells in lists:
            assert {name for name, is_marked in cells.items() if is_marked} == both
        n_both += len(both)
    assert n_both > 0


def test_reasons_of_unlike_cells_keep_their_room(page: Watched) -> None:
    """At no width do the words of one lie over the pictures of the next."""
    tab = page.open("patients/0.html")
    assert tab.locator(".reasons .card-shot").count()
    too_wide = "[...document.querySelectorAll('.reasons > li')].filter((each) => each.scrollWidth > each.clientWidth)"
    for media in ("screen", "print"):
        tab.emulate_media(media=media)
        for width in range(320, 1400, 40):
            tab.set_viewport_size({"width": width, "height": 1000})
            assert tab.evaluate(f"{too_wide}.length") == 0, f"{media}, {width} pixels"


def test_an_accessibility_checker_finds_nothing(browser: Any, atlas: Path) -> None:
    source = axe()
    for name in kinds(atlas):
        for scheme in ("light", "dark"):
            context = browser.new_context(bypass_csp=True, color_scheme=scheme)
            tab = context.new_page()
            tab.goto(f"{atlas.as_uri()}/{name}")
            tab.wait_for_timeout(200)
            tab.evaluate(source)
            found = tab.evaluate("axe.run()")["violations"]
            said = [f"{name}, {scheme}: {rule['id']}: {rule['nodes'][0]['html'][:200]}" for rule in found]
            context.close()
            assert said == []


def test_the_barcode_says_and_opens_what_it_shows(page: Watched, cohort: Cohort) -> None:
    tab = page.open("patients/0.html")
    bars = tab.locator("#barcode")
    steps = [
        np.frombuffer(base64.b64decode(bars.get_attribute(f"data-{name}")), np.uint8) for name in ("mine", "others")
    ]
    latents = np.frombuffer(base64.b64decode(bars.get_attribute("data-latents")), "<u4")
    largest = float(bars.get_attribute("data-largest"))
    bars.focus()
    there = np.flatnonzero((steps[0] > 0) | (steps[1] > 0))
    for column in there[:3].tolist():
        tab.keyboard.press("ArrowRight")
        tab.wait_for_function(
            "start => document.querySelector('#barcode-said').textContent.startsWith(start)",
            arg=f"latent {latents[column]}, family ",
        )
        said = tab.inner_text("#barcode-said")
        k = float(bars.get_attribute("data-k"))
        value = np.expm1(steps[0][column] / 255 * np.log1p(k * largest)) / k
        assert float(said.split("here ")[1].split(",")[0]) == pytest.approx(value, rel=0.01)
    built = set((ResultStore(page.site, ATLAS).header.summary or {})["latents"])
    wanted = next(n for n in np.argsort(-steps[0].astype(int)).tolist() if int(latents[n]) in built)
    box = bars.bounding_box()
    tab.mouse.click(box["x"] + (wanted + 0.5) * box["width"] / len(latents), box["y"] + box["height"] / 2)
    tab.wait_for_url(f"**/concepts/{latents[wanted]}.html")


def test_a_box_in_a_plot_chooses_the_concepts_and_stands_in_the_address(page: Watched, cohort: Cohort) -> None:
    pair = next((page.site / "pairs").glob("*.html")).name
    table = ResultStore(cohort.root / "compare", COMPARISON).table("differential").to_pylist()
    tab = page.open(f"pairs/{pair}")
    tab.wait_for_function(
        "() => document.querySelectorAll('#volcano').length && document.querySelector('#volcano').asSvg"
    )
    shown = [int(row.get_attribute("data-latent")) for row in tab.locator("#beside .sides").all()]
    low, high = 0.0, 100.0
    tab.goto(f"{page.site.as_uri()}/pairs/{pair}#box=volcano,{low},{high},0,100")
    tab.reload()
    tab.wait_for_selector("#everything:not([hidden])")
    inside = [row["latent"] for row in table if row["hedges_g"] is not None and low <= row["hedges_g"] <= high]
    visible = [int(row.get_attribute("data-latent")) for row in tab.locator("#beside .sides:visible").all()]
    assert visible == [latent for latent in shown if latent in inside]
    assert 0 < len(visible) < len(shown)
    built = set((ResultStore(page.site, ATLAS).header.summary or {})["latents"])
    cards = [int(link.inner_text()) for link in tab.locator("#others h3 a").all()]
    assert sorted(cards) == sorted((built & set(inside)) - set(shown))
    assert tab.inner_text("#chosen").startswith(f"{len(inside)} latents in the box")
    tab.click("[data-group=side][data-value=b]")
    assert "side=b" in tab.evaluate("location.hash")
    assert tab.locator("#beside .sides:visible").count() == 0, "g above 0 is higher in A"
    tab.click("#everything")
    assert "box" not in tab.evaluate("location.hash")
    assert tab.locator("#beside .sides:visible").count() == 0
    assert "The others are shown where" in tab.inner_text("#chosen"), "none of B is clear"
    tab.click("#clear")
    visible = [int(row.get_attribute("data-latent")) for row in tab.locator("#beside .sides:visible").all()]
    of_b = sorted(
        (row for row in table if row["rank_b"]), key=lambda row: (row["q"] is None or row["q"] > 0.05, row["rank_b"])
    )
    assert visible == [row["latent"] for row in of_b][: len(visible)]
    assert len(visible) == 12

    tab.click("[data-group=side][data-value='']")
    tab.locator("#pair").scroll_into_view_if_needed()
    box = tab.locator("#pair").bounding_box()
    tab.mouse.move(box["x"] + 70, box["y"] + 12)
    tab.mouse.down()
    tab.mouse.move(box["x"] + box["width"] - 14, box["y"] + box["height"] - 50, steps=4)
    tab.mouse.up()
    assert "box=means" in tab.evaluate("location.hash")
    tab.focus("#pair")
    tab.keyboard.press("Escape")
    assert "box" not in tab.evaluate("location.hash")


def test_figures_are_saved_and_pages_are_printed_whole(page: Watched) -> None:
    tab = page.open("patients/0.html")
    for kind in ("svg", "png"):
        with tab.expect_download() as waiting:
            tab.locator("figure[data-file=barcode-of-patient-0]").locator(f"[data-save={kind}]").click()
        assert waiting.value.suggested_filename == f"barcode-of-patient-0.{kind}"
    tab.evaluate("window.print = () => { window.printed = document.images.length; }")
    tab.click("[data-print]")
    tab.wait_for_function("() => window.printed")
    assert tab.evaluate("[...document.querySelectorAll('details')].every((each) => each.open)")
    assert tab.evaluate("[...document.images].every((each) => each.complete && each.naturalWidth)")


def test_a_row_of_cells_is_saved_as_a_picture(page: Watched, tmp_path: Path) -> None:
    """PNG and SVG hold the cells themselves, where the drawing says, with the words of the row; from the disk."""
    pair = next((page.site / "pairs").glob("*.html")).name
    for name in (f"pairs/{pair}", "diseases/0.html"):
        tab = page.open(name)
        tab.wait_for_selector(".sides .frame .map canvas")
        warning = tab.inner_text("header .warning")
        about = " ".join(tab.locator("main [data-in-picture]").all_text_contents())
        assert "patients" in about
        assert "above" in about, "the unit"
        row = tab.locator(".sides").filter(has=tab.locator(".frame img")).first
        latent = row.get_attribute("data-latent")
        numbers = row.locator(".frame > img").evaluate_all("some => some.map((one) => one.getAttribute('src'))")
        said = row.inner_text()
        saved = {}
        for maps in (True, False):
            for kind in ("svg", "png"):
                with tab.expect_download() as waiting:
                    row.locator(f"[data-row={kind}]").click()
                assert waiting.value.suggested_filename == f"cells-of-latent-{latent}.{kind}"
                saved[maps, kind] = tmp_path / f"{maps}.{kind}"
                waiting.value.save_as(saved[maps, kind])
            tab.click("#maps")
        for maps in (True, False):
            drawing = ElementTree.parse(saved[maps, "svg"]).getroot()
            cells = [
                one
                for one in drawing.iter(f"{SVG}image")
                if float(one.get("width", 0)) > 20 < float(one.get("height", 0))
            ]
            assert len(cells) == len(numbers) > 0
            assert all(one.get("href", "").startswith("data:image/jpeg;base64,") for one in cells)
            words = [one.text or "" for one in drawing.iter(f"{SVG}text")]
            whole = " ".join(words)
            assert warning in whole
            assert " ".join(about.split()) in whole
            assert all(doubt in whole for doubt in row.locator(".said .doubt").all_inner_texts())
            assert "resampled" not in whole, "how stable a rank is reads like a test"
            assert any(str(latent) in text for text in words)
            labels = {text.split("\n")[0] for text in row.locator("figcaption").all_inner_texts()}
            cut = [text[:-1] for text in words if text.endswith("…")]
            assert all(label in words or any(label.startswith(text) for text in cut) for label in labels)
            with Image.open(saved[maps, "png"]) as opened:
                png = opened.convert("RGB")
            scale = png.width / float(drawing.get("width", 0))
            for one, source in zip(cells, numbers, strict=True):
                x, y, wide, high = (float(one.get(key, 0)) * scale for key in ("x", "y", "width", "height"))
                place = png.crop((round(x), round(y), round(x + wide), round(y + high))).resize((48, 48))
                with Image.open((page.site / "pairs" / source).resolve()) as picture:
                    wanted = np.asarray(picture.convert("RGB").resize((48, 48)), np.float64)
                found = np.asarray(place, np.float64)
                assert found.std() > 10, "it is not blank"
                if maps:  # the cell, grey, shines through where the map is not
                    assert np.corrcoef(found.min(axis=2).ravel(), wanted.min(axis=2).ravel())[0, 1] > 0.2
                else:
                    assert np.abs(found - wanted).mean() < 6
        if name.startswith("pairs"):
            assert "resampled cohorts, no test" in said
            assert f"q {said.split('q')[1].split()[0]}" in " ".join(words)


BROKEN = """() => [...document.querySelectorAll(".cell figcaption span, .portrait span")].flatMap((one) => {
    const walk = document.createTreeWalker(one, NodeFilter.SHOW_TEXT), found = [];
    while (walk.nextNode()) {
        for (const word of walk.currentNode.data.matchAll(/[^\\s/_:-]+/g)) {
            const range = document.createRange();
            range.setStart(walk.currentNode, word.index);
            range.setEnd(walk.currentNode, word.index + word[0].length);
            if (new Set([...range.getClientRects()].map((box) => Math.round(box.top))).size > 1) found.push(word[0]);
        }
    }
    return found;
})"""


def test_no_label_is_broken_inside_a_word(page: Watched) -> None:
    """Also one of seventy letters, which is cut, with its whole text under the pointer; others break at their marks."""
    long, marked = "x" * 70, "promyelocyte_bilobed/atypical::second-opinion"
    for width in (390, 1000):
        page.tab.set_viewport_size({"width": width, "height": 1000})
        tab = page.open("patients/0.html")
        assert tab.evaluate(BROKEN) == []
        tab.evaluate(
            """([long, marked]) => {
                const [first, second] = document.querySelectorAll(".kinds .cell figcaption span:first-child");
                first.textContent = long;
                second.textContent = marked;
                letBreak(second);
            }""",
            [long, marked],
        )
        assert tab.evaluate(BROKEN) == []
        first, second = (tab.locator(".kinds .cell figcaption span:first-child").nth(n) for n in (0, 1))
        assert (
            second.bounding_box()["height"]
            > 1.5 * tab.locator(".kinds .cell figcaption .number").first.bounding_box()["height"]
        )
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        for text in (long, "y" * 70):  # as a card that shows another concept
            first.evaluate("(one, text) => { one.textContent = text; }", text)
            tab.mouse.move(0, 0)
            first.hover()
            assert first.get_attribute("title") == text


def test_what_may_be_chance_is_not_told_as_a_finding(page: Watched, cohort: Cohort) -> None:
    """Rows with q above 0.05 say so; a chip leaves the others, and stands in the address; the mix of cells is there."""
    pair = next((page.site / "pairs").glob("*.html")).name
    table = ResultStore(cohort.root / "compare", COMPARISON).table("differential").to_pylist()
    tab = page.open(f"pairs/{pair}")
    tab.wait_for_function("() => document.querySelector('#volcano').asSvg")
    clear = {row["latent"] for row in table if row["q"] is not None and row["q"] <= 0.05}
    rows = tab.locator("#beside .sides").all()
    shown = [int(str(row.get_attribute("data-latent"))) for row in rows]
    assert {*shown} & clear
    assert {*shown} - clear

    def visible() -> list[int]:
        return [int(str(row.get_attribute("data-latent"))) for row in tab.locator("#beside .sides:visible").all()]

    assert visible() == [latent for latent in shown if latent in clear], "the others wait behind a chip"
    tab.click("#clear")
    assert "clear=0" in tab.evaluate("location.hash")
    tab.reload()
    tab.wait_for_function("() => document.querySelector('#clear').getAttribute('aria-pressed') === 'false'")
    assert visible() == shown
    for row, latent in zip(rows, shown, strict=True):
        said = row.locator(".said").inner_text()
        assert ("no clear difference" in said) == ("resampled" not in said) == (latent not in clear)
    assert "The mix of cells is not taken into account" in tab.inner_text("main")
    shares = tab.locator(".shares text").all_text_contents()
    assert sum(text.startswith("A ") for text in shares) == sum(text.startswith("B ") for text in shares) > 0
    tab.emulate_media(media="print")
    assert tab.locator(".ramp").is_visible(), "maps without their scale say nothing"
    assert not tab.get_by_text("Under the pointer").is_visible()
    tab.emulate_media(media="screen")

    tab.goto(f"{page.site.as_uri()}/latents.html#pair={pair.removesuffix('.html')}&q_max=0.05")
    tab.wait_for_function("() => document.querySelector('#latents tbody td:last-child')?.textContent.match(/\\d/)")
    assert tab.inner_text("#count").startswith(f"{len(clear)} of {len(table)} latents")
    listed = [int(text) for text in tab.locator("#latents tbody th").all_inner_texts()]
    by_q = sorted(
        (row for row in table if row["latent"] in clear), key=lambda row: (np.float32(row["q"]), row["latent"])
    )
    assert listed == [row["latent"] for row in by_q][:25]
