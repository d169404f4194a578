"""What the browser tests need, brought where it is missing: `make browser`. What fails says why; then exit 1.

Chromium comes as the system's package where we may install one, else from playwright; axe-core from npm.
"""

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
from importlib.util import find_spec

from browser import FOLDER, find_axe, find_chromium

_AXE = "axe-core@4.14.1"
_AXE_SHA256 = "29348999450cdf2849a8e70b7912fc2da85a849da39c0d0d5394f51d4a9ed95c"  # of axe.min.js
_LONGEST = 600  # seconds of one command


def main() -> int:
    FOLDER.mkdir(exist_ok=True)
    if find_spec("playwright") is None:
        _say("no playwright; install this project with the extra: pip install --editable '.[browser]'")
    if find_chromium() is None:
        _install_chromium()
    if find_axe() is None:
        _install_axe()
    there = {"playwright": find_spec("playwright"), "Chromium": find_chromium(), "axe-core": find_axe()}
    for name, found in there.items():
        _say(f"{name}: {getattr(found, 'origin', found) if found else 'MISSING, its tests will be skipped'}")
    return 0 if all(there.values()) else 1


def _install_chromium() -> None:
    if shutil.which("apt-get") and os.geteuid() == 0:
        apt = ["apt-get", "-o", "DPkg::Lock::Timeout=60"]
        if _run(*apt, "update", "-q") and _run(*apt, "install", "-q", "-y", "--no-install-recommends", "chromium"):
            find_chromium.cache_clear()
            return
    if find_spec("playwright") is not None:
        _run(sys.executable, "-m", "playwright", "install", "--only-shell", "chromium")
        find_chromium.cache_clear()


def _install_axe() -> None:
    npm = shutil.which("npm")
    if npm is None:
        _say("axe-core comes by npm, which is not here")
        return
    if not _run(npm, "pack", _AXE, "--silent", "--pack-destination", str(FOLDER)):
        return
    with tarfile.open(FOLDER / f"{_AXE.replace('@', '-')}.tgz") as archive:
        found = (archive.extractfile("package/axe.min.js") or io.BytesIO()).read()
    if hashlib.sha256(found).hexdigest() != _AXE_SHA256:
        _say(f"{_AXE} is not the one that we know; it is not used")
        return
    (FOLDER / "axe.min.js").write_bytes(found)


def _run(*command: str) -> bool:
    """Does it work? If not, what it said last."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "PLAYWRIGHT_BROWSERS_PATH": str(FOLDER)}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=_LONGEST, check=False, errors="replace"
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        _say(f"{command[0]}: {error}")
        return False
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()[-3:]
        _say(f"{' '.join(command)}: {' / '.join(said)}")
    return done.returncode == 0


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")


if __name__ == "__main__":
    sys.exit(main())
