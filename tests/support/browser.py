"""A headless Chromium for tests, and axe-core, an accessibility checker; where one is missing, the reason to skip.

`make browser` brings what is missing into `.browser`: install_browser.py. $CYTO_CHROMIUM, $CYTO_AXE name others.
"""

import io
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from PIL import Image
from places import ROOT

FOLDER = ROOT / ".browser"
WIDTHS = (390, 1000, 1600)  # a phone, a tablet, a desk
VIEWPORT = {"width": 1280, "height": 900}
_NAMES = ("chromium", "chromium-browser", "google-chrome")  # in the path
_BAD = ("error", "warning")
_TESTS_OWN = "Multiple readback operations using getImageData"  # pages do not read what they drew
_OURS = ("chrome", "chrome-headless-shell", "headless_shell")  # of `playwright install`


@lru_cache(maxsize=1)
def find_chromium() -> str | None:
    """A Chromium that starts: the named one, one in the path, one that playwright brought."""
    named = os.environ.get("CYTO_CHROMIUM")
    ours = sorted(path for name in _OURS for path in FOLDER.glob(f"chromium*/*/{name}"))
    return next(
        filter(_starts, [named] if named else [*filter(None, map(shutil.which, _NAMES)), *map(str, ours)]), None
    )


def find_axe() -> Path | None:
    """axe.min.js."""
    path = Path(os.environ.get("CYTO_AXE") or FOLDER / "axe.min.js")
    return path if path.is_file() else None


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser of playwright's; skips the test without one."""
    if find_spec("playwright") is None:
        _skip("playwright")
    found = find_chromium()
    if found is None:
        _skip("Chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


def axe() -> str:
    """The source of axe-core; skips the test without it."""
    path = find_axe()
    return path.read_text() if path else _skip("axe-core")


def _skip(missing: str) -> NoReturn:
    pytest.skip(f"no {missing} here; make browser installs it")


def _starts(path: str) -> bool:
    """Libraries of the system may be missing."""
    try:
        done = subprocess.run([path, "--version", "--no-sandbox"], capture_output=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


class Watched:
    """A page that keeps what went wrong: console errors, exceptions, failed or foreign requests."""

    def __init__(self, browser: Any, site: Path) -> None:
        self.site = site
        self.tab = browser.new_page(viewport=VIEWPORT)
        self.wrong: list[str] = []
        self.tab.on("console", lambda said: self._keep(said.type in _BAD and _TESTS_OWN not in said.text, said.text))
        self.tab.on("pageerror", lambda error: self._keep(True, str(error)))
        # what is not loaded yet when the next page opens is broken off, which is no mistake
        self.tab.on("requestfailed", lambda request: self._keep(request.failure != "net::ERR_ABORTED", request.url))
        self.tab.on("request", lambda request: self._keep(not self._is_ours(request.url), f"asked for {request.url}"))

    def open(self, name: str) -> Any:
        """Open a page of the site from the disk; the tab."""
        self.tab.goto(f"{self.site.as_uri()}/{name}")
        return self.tab

    def _is_ours(self, url: str) -> bool:
        return url.startswith((self.site.as_uri(), "data:"))

    def _keep(self, is_wrong: bool, text: str) -> None:
        if is_wrong:
            self.wrong.append(text)


def photograph(page: Watched, name: str, *, scheme: str = "light", widths: tuple[int, ...] = WIDTHS) -> None:
    """Photograph a page of the site at some widths; it must be as wide as the screen, and not blank.

    A folder named by $CYTO_PHOTOS keeps the photographs, since no test sees what an eye sees.
    """
    page.tab.emulate_media(color_scheme=scheme)
    for width in widths:
        page.tab.set_viewport_size({"width": width, "height": 900})
        tab = page.open(name)
        tab.wait_for_load_state("networkidle")
        assert tab.evaluate("document.documentElement.scrollWidth") <= width, f"{name} at {width}"
        raw = tab.screenshot(full_page=True)
        pixels = np.asarray(Image.open(io.BytesIO(raw)).convert("L"))
        assert pixels.std() > 5, f"{name} at {width} is blank"
        assert (pixels.mean() < 110) == (scheme == "dark"), f"{name} at {width} is not {scheme}"
        keep_photograph(raw, f"{name.removesuffix('.html').replace('/', '-')}-{width}-{scheme}")


def keep_photograph(raw: bytes, name: str) -> None:
    """Write a photograph into the folder named by $CYTO_PHOTOS; nothing without one."""
    folder = os.environ.get("CYTO_PHOTOS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / f"{name}.png").write_bytes(raw)
