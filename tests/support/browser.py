"""A headless Chromium for tests, and axe-core, an accessibility checker; where one is missing, the reason to skip.

`make browser` brings what is missing into `.browser`: install_browser.py. $CYTO_CHROMIUM, $CYTO_AXE name others.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import pytest
from places import ROOT

FOLDER = ROOT / ".browser"
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
