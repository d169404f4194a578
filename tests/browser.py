"""A headless Chromium for tests, where playwright and a browser are installed; a reason to skip where not.

Which browser: $CYTO_CHROMIUM, or one in the path. The accessibility checker axe-core is not ours to ship: $CYTO_AXE
names axe.min.js (npm pack axe-core); without it that test is skipped.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome")
VIEWPORT = {"width": 1280, "height": 900}


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser of playwright's; skips the test without one."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install playwright"
    )
    found = os.environ.get("CYTO_CHROMIUM") or next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None:
        pytest.skip("no Chromium in the path; name one with CYTO_CHROMIUM")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


def axe() -> str:
    """The source of axe-core; skips the test without it."""
    path = os.environ.get("CYTO_AXE", "")
    if not Path(path).is_file():
        pytest.skip("axe-core is not here: npm pack axe-core, unpack it, and name axe.min.js with CYTO_AXE")
    return Path(path).read_text()


class Watched:
    """A page that keeps what went wrong: console errors, exceptions, failed or foreign requests."""

    def __init__(self, browser: Any, site: Path) -> None:
        self.site = site
        self.tab = browser.new_page(viewport=VIEWPORT)
        self.wrong: list[str] = []
        self.tab.on("console", lambda said: self._keep(said.type in ("error", "warning"), said.text))
        self.tab.on("pageerror", lambda error: self._keep(True, str(error)))
        self.tab.on("requestfailed", lambda request: self._keep(True, f"failed {request.url}"))
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
