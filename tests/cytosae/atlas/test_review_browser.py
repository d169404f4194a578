"""The review page in a real Chromium, by keyboard: save, kill the server, go on; nothing hidden is in the page."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import WIDTHS, axe, keep_photograph
from review_client import start
from review_site import make_site

from cytosae.review import read_verdicts
from cytosae.review.verdicts import current

pytestmark = pytest.mark.browser


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page whose every console error fails the test, and every request that leaves this machine."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    troubles: list[str] = []
    page.on("console", lambda message: troubles.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on(
        "request",
        lambda request: (
            troubles.append(request.url)
            if "//127.0.0.1:" not in request.url and not request.url.startswith("data:")
            else None
        ),
    )
    page.troubles = troubles
    yield page
    context.close()
    assert not troubles


def begin(page: Any, port: int, name: str = "Ada") -> None:
    page.goto(f"http://127.0.0.1:{port}/review.html")
    page.keyboard.press("Tab")
    page.keyboard.type(name)
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="Concept ").wait_for()


def stop(process: Any, page: Any) -> None:
    """End the server when nothing is under way any more: the browser would report what is cut off as an error."""
    try:
        page.wait_for_load_state("networkidle")
    finally:
        process.kill()
        process.communicate()


def status(page: Any) -> str:
    return str(page.locator("#status").inner_text())


def test_review_by_keyboard_survives_a_killed_server(made: Path, tmp_path: Path, page: Any) -> None:
    make_site(made, tmp_path, a="<script>alert(1)</script>")
    site = tmp_path / "atlas"
    process, port = start(site)
    try:
        begin(page, port)
        assert page.get_by_role("heading", name="Concept 1 of ").is_visible()
        page.keyboard.press("Enter")
        assert page.locator("#trouble").inner_text() == "Choose a verdict first."
        for key in "m4w":
            page.keyboard.press(key)
        page.keyboard.type("monocytes")
        page.keyboard.press("Escape")
        page.keyboard.press("o")
        page.keyboard.type("mn = notes")
        assert status(page) == "Not saved yet."
        page.keyboard.press("Control+Enter")
        page.get_by_role("heading", name="Concept 2 of ").wait_for()
        assert status(page) == "Saved."
        (verdict,) = read_verdicts(tmp_path / "atlas.reviews")
        assert (verdict.verdict, verdict.confidence, verdict.name, verdict.notes) == (
            "meaningful",
            4,
            "monocytes",
            "mn = notes",
        )
        assert verdict.is_blinded
        page.keyboard.press("n")
        page.keyboard.press("ArrowLeft")
        assert page.locator("#choice-meaningful").is_checked()
        page.keyboard.press("ArrowRight")
        assert page.locator("#choice-not").is_checked(), "what was entered stays"
        html = page.content()
        for word in ("neutrophil", "lymphocyte", "decoy", ".png", 'alt="Reference image 1 of 2:'):
            assert word not in html
        page.wait_for_load_state("networkidle")  # what is under way would be reported later, too
    finally:
        process.kill()
        process.communicate()
    page.keyboard.press("Enter")
    page.get_by_text("Not saved: the server does not answer").wait_for()
    assert page.locator("#choice-not").is_checked()
    page.troubles.clear()  # the browser reports the refused connection

    process, port = start(site)
    try:
        begin(page, port)
        assert page.get_by_role("heading", name="Concept 2 of ").is_visible()
        assert status(page) == "You go on where you stopped."
        for n_judged in range(2, 7):
            page.keyboard.press("u")
            page.keyboard.press("Enter")
            page.get_by_text(f"{n_judged} of 6", exact=True).wait_for()
        still_open = "<script>alert(1)</script> against well"
        page.get_by_text(f"Saved. All 6 are judged. Still open: {still_open}.").wait_for()
        page.select_option("#question", "1")
        page.locator("#title").focus()
        assert page.get_by_text("Specific to <script>alert(1)</script> a").is_visible()
        page.keyboard.press("a")
        page.keyboard.press("Enter")
        page.get_by_role("heading", name="Concept 2 of ").wait_for()
        page.reload()
        begin(page, port)
        assert page.locator("#asked option:checked").inner_text() == still_open
        assert page.get_by_role("heading", name="Concept 2 of ").is_visible()
        begin(page, port, "Bob")
        assert status(page) == "Nothing has been judged under this name yet."
    finally:
        stop(process, page)
    verdicts = read_verdicts(tmp_path / "atlas.reviews")
    assert [verdict.question for verdict in verdicts] == ["meaningful"] * 6 + ["specific"]
    assert len({verdict.item for verdict in verdicts}) == 7


def test_saved_is_said_when_the_server_said_so(made: Path, tmp_path: Path, page: Any) -> None:
    """An answer that takes its time, and one that says no: nothing is called saved before it is, nothing is lost."""
    make_site(made, tmp_path)
    process, port = start(tmp_path / "atlas")
    held: list[Any] = []
    try:
        begin(page, port, "  Ada   L. ")
        page.route("**/reviews", lambda route: held.append(route))
        page.keyboard.press("m")
        page.keyboard.press("Enter")
        page.get_by_text("Saving…").wait_for()
        page.wait_for_function("() => document.getElementById('review').inert")
        page.keyboard.press("n")
        assert page.locator("#choice-meaningful").is_checked(), "nothing can be entered meanwhile"
        assert page.get_by_role("heading", name="Concept 1 of ", include_hidden=True).count() == 1
        held.pop().fulfill(status=500, body="NOT saved: the disk is full")
        page.get_by_text("Not saved: NOT saved: the disk is full").wait_for()
        assert status(page) == ""
        assert page.locator("#counted").inner_text() == "0 of 6"
        assert page.locator("#choice-meaningful").is_checked()
        page.unroute("**/reviews")
        page.troubles.clear()  # the browser reports the 500
        page.keyboard.press("Enter")
        page.get_by_role("heading", name="Concept 2 of ").wait_for()
        assert status(page) == "Saved."
        page.keyboard.press("ArrowLeft")
        page.get_by_role("heading", name="Concept 1 of ").wait_for()
        assert status(page) == "", "what is saved is no draft"
        assert page.locator("#facts").inner_text() == "Judged. Saving again replaces your verdict."
        page.keyboard.press("g")
        page.get_by_role("heading", name="Concept 2 of ").wait_for()
        page.select_option("#question", "1")
        page.locator("#title").focus()
        for key, choice in (("n", "neither"), ("u", "unsure"), ("b", "b"), ("a", "a")):
            page.keyboard.press(key)
            assert page.locator(f"#choice-{choice}").is_checked()
        page.keyboard.press("5")
        assert page.locator("#sure-5").is_checked()
    finally:
        stop(process, page)
    (verdict,) = read_verdicts(tmp_path / "atlas.reviews")
    assert verdict.reviewer == "Ada L."


def test_maps_pictures_and_labels(made: Path, tmp_path: Path, page: Any) -> None:
    make_site(made, tmp_path)
    process, port = start(tmp_path / "atlas", "--show-labels")
    try:
        begin(page, port)
        page.evaluate("Promise.all([...document.images].map((image) => image.decode()))")
        assert set(page.evaluate("[...document.images].map((image) => image.naturalWidth)")) == {48}
        canvas = page.locator(".frame canvas").first
        assert canvas.evaluate("(canvas) => [canvas.width, canvas.height]") == [16, 16]
        item = page.evaluate("question.items[0].rows[0].images[0]")
        alphas = canvas.evaluate(
            "(c) => [...c.getContext('2d').getImageData(0, 0, 16, 16).data].filter((_, k) => k % 4 === 3)"
        )
        assert alphas == page.evaluate(
            "(text) => [...Uint8ClampedArray.from(atob(text), (one) => 255 * 0.85 * (one.charCodeAt(0) / 255))]",
            item["patches"],
        )
        page.keyboard.press("p")
        assert not canvas.is_visible()
        page.keyboard.press("p")
        assert canvas.is_visible()
        assert page.get_by_alt_text("Reference image 1 of 2: ").first.is_visible()
        assert "latent" in page.locator("#title").inner_text()
        # a page elsewhere cannot write, whatever it sends
        page.goto("about:blank")
        answer = page.evaluate(
            "(url) => fetch(url, {method: 'POST', mode: 'no-cors', body: '{}'}).then((answer) => answer.type, String)",
            f"http://127.0.0.1:{port}/reviews",
        )
        assert answer in ("opaque", "TypeError: Failed to fetch")
        page.troubles.clear()
        assert not list((tmp_path / "atlas.reviews").glob("*.jsonl"))
    finally:
        stop(process, page)


def test_undo_takes_back_what_is_on_the_disk(made: Path, tmp_path: Path, page: Any) -> None:
    """Of a first verdict nothing counts then; of a changed one the verdict before it."""
    make_site(made, tmp_path)
    process, port = start(tmp_path / "atlas")

    def counting() -> list[str]:
        return [verdict.verdict for verdict in current(read_verdicts(tmp_path / "atlas.reviews")).values()]

    try:
        begin(page, port)
        assert page.locator("#undo").is_disabled()
        page.keyboard.press("m")
        page.keyboard.press("Enter")
        page.get_by_role("heading", name="Concept 2 of ").wait_for()
        assert counting() == ["meaningful"]
        page.keyboard.press("z")
        page.get_by_text("Taken back; it is not saved any more.").wait_for()
        assert page.get_by_role("heading", name="Concept 1 of ").is_visible()
        assert page.locator("#choice-meaningful").is_checked(), "it can be changed"
        assert page.locator("#counted").inner_text() == "0 of 6"
        assert counting() == []
        page.keyboard.press("n")
        page.keyboard.press("Enter")
        page.get_by_role("heading", name="Concept 2 of ").wait_for()
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("u")
        page.keyboard.press("Enter")
        page.get_by_role("heading", name="Concept 2 of ").wait_for()
        assert counting() == ["unsure"]
        page.keyboard.press("z")
        page.get_by_text("Taken back; it is not saved any more.").wait_for()
        assert counting() == ["not"]
        page.reload()
        begin(page, port)
        assert page.get_by_role("heading", name="Concept 2 of ").is_visible(), "the first is judged"
    finally:
        stop(process, page)


def test_a_picture_opens_large_beside_its_map(made: Path, tmp_path: Path, page: Any) -> None:
    make_site(made, tmp_path)
    process, port = start(tmp_path / "atlas")
    try:
        begin(page, port)
        page.locator(".images button").first.focus()
        page.keyboard.press("Enter")
        assert page.locator("#large").is_visible()
        assert page.locator("#large-pair canvas").count() == 1
        first = page.get_attribute("#large-pair img >> nth=0", "src")
        page.keyboard.press("ArrowRight")
        assert page.get_attribute("#large-pair img >> nth=0", "src") != first
        assert page.get_by_role("heading", name="Concept 1 of ", include_hidden=True).count() == 1
        page.keyboard.press("m")
        page.keyboard.press("Escape")
        assert not page.locator("#large").is_visible()
        assert not page.locator("#choice-meaningful").is_checked(), "keys of the verdict rest meanwhile"
    finally:
        stop(process, page)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_photographs(made: Path, tmp_path: Path, browser: Any, scheme: str) -> None:
    """At the widths of a phone, a tablet and a desk: nothing is wider, and on a tablet the verdict is in view."""
    make_site(made, tmp_path)
    process, port = start(tmp_path / "atlas")
    try:
        for width in WIDTHS:
            tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            begin(tab, port, f"Ada {width}")
            tab.wait_for_load_state("networkidle")
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            box = tab.locator("#save").bounding_box()
            assert width < 600 or box["y"] + box["height"] <= 900
            keep_photograph(tab.screenshot(), f"review-{width}-{scheme}")
            tab.close()
    finally:
        process.kill()
        process.communicate()


def test_accessibility(made: Path, tmp_path: Path, browser: Any) -> None:
    checker = axe()
    make_site(made, tmp_path)
    process, port = start(tmp_path / "atlas")
    try:
        for scheme in ("light", "dark"):
            page = browser.new_context(
                viewport={"width": 1280, "height": 800}, color_scheme=scheme, bypass_csp=True
            ).new_page()
            for has_begun in (False, True):
                if has_begun:
                    begin(page, port)
                else:
                    page.goto(f"http://127.0.0.1:{port}/review.html")
                page.evaluate(checker)
                found = page.evaluate("axe.run()")["violations"]
                assert not found, json.dumps(
                    [[each["id"], [node["html"] for node in each["nodes"]]] for each in found], indent=1
                )
    finally:
        stop(process, page)
