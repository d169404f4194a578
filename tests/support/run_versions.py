"""`make test-versions`: tests of what needs no torch, with several sets of packages and on several Pythons.

    lowest   the lower bounds of pyproject.toml, on the lowest Python that is supported
    locked   constraints.txt
    newest   whatever the package index has today; once for each Python from 3.11 on that is installed

Each set gets an environment of its own below the folder that is given; it is used again, and brought up to date. A
Python that is not installed is named and passed over. Needs a package index, some minutes and 1 GB for each set.
With `uv`, where it is installed, the environments are made in seconds; without it by `venv` and `pip`.
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
TOOLS = ("hypothesis", "imagecodecs", "obstore", "pytest", "pytest-timeout", "tifffile")
TESTS = (
    *("project/test_base_install", "cytosae/barcodes/test_barcodes", "stores/test_csr", "stores/test_tables"),
    "cytosae/compare/test_compare",
)


def requirements() -> list[str]:
    """Of the base install, as pyproject.toml has them."""
    found: list[str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    return found


def lower_bounds(given: list[str]) -> list[str]:
    """`name>=1.2,!=1.3` -> `name==1.2`."""
    found = [re.match(r"([\w.-]+)>=([\w.]+)", each) for each in given]
    if missing := [each for each, match in zip(given, found, strict=True) if match is None]:
        raise ValueError(f"expected NAME>=VERSION for each requirement; found {missing}")
    return [f"{match[1]}=={match[2]}" for match in found if match]


def python_of(version: str) -> str | None:
    """An interpreter of this version that runs, if there is one."""
    if version == ".".join(map(str, sys.version_info[:2])):
        return sys.executable
    pyenv = [
        str(path) for path in sorted(Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser().glob("versions/*"))
    ]
    places = [f"{path}/bin/python{version}" for path in pyenv] + [shutil.which(f"python{version}") or ""]
    for place in places:
        if (
            Path(place).is_file()
            and subprocess.run([place, "-c", ""], capture_output=True, check=False).returncode == 0
        ):
            return place
    return None


def install(folder: Path, python: str, packages: list[str], *options: str) -> bool:
    """Make the environment, where it is not there yet, and bring its packages to what is asked for."""
    interpreter, uv = str(folder / "bin" / "python"), shutil.which("uv")
    make = [uv, "venv", "--quiet", "--python", python] if uv else [python, "-m", "venv"]
    add = [uv, "pip", "install", "--python", interpreter] if uv else [interpreter, "-m", "pip", "install"]
    if not Path(interpreter).exists():
        subprocess.run([*make, str(folder)], check=True)
    # the installer says why it failed
    return not subprocess.run([*add, "--quiet", "--upgrade", *options, *packages, *TOOLS], check=False).returncode


def run_set(folder: Path, python: str, packages: list[str], *options: str) -> bool:
    """Run the tests with these packages; False: no such set, or tests failed."""
    if not install(folder, python, packages, *options):
        return False  # the other sets are still run
    tests = [f"tests/{name}.py" for name in TESTS]
    command = [str(folder / "bin" / "python"), "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    return subprocess.run(command, cwd=ROOT, check=False).returncode == 0


def main() -> int:
    """1 if a set failed, or none could be run."""
    root = Path(sys.argv[1]).absolute()
    base, passed = requirements(), {}
    for version in PYTHONS:
        python = python_of(version)
        if python is None:
            sys.stderr.write(f"Python {version} is not installed: passed over\n")
            continue
        if version == PYTHONS[0]:
            passed["lowest"] = run_set(root / "lowest", python, lower_bounds(base))
            passed["locked"] = run_set(root / "locked", python, base, "--constraint", str(ROOT / "constraints.txt"))
        passed[f"newest {version}"] = run_set(root / f"newest-{version}", python, base)
    for name, has_passed in passed.items():
        sys.stderr.write(f"{name}: {'passed' if has_passed else 'FAILED'}\n")
    return 0 if passed and all(passed.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
