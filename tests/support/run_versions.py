"""`make test-versions`: tests of what needs no torch, with several sets of packages and on several Pythons.

    lowest   the lower bounds of pyproject.toml, on the lowest Python that is supported
    locked   constraints.txt
    newest   whatever the package index has today; once for each Python from 3.11 on that is installed: newest-3.12, ...

`make test-versions SETS="lowest newest-3.13"` runs these two alone.
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
TOOLS = ("hypothesis", "imagecodecs", "obstore", "pytest", "pytest-timeout", "pytest-xdist", "tifffile")
# matplotlib 3.10.0 calls what pyparsing 3.3 deprecates: a warning that no user sees, and that stops a test
BESIDE_THE_LOWEST = ("pyparsing<3.3",)
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


def install(folder: Path, python: str, packages: list[str]) -> bool:
    """Make the environment, where it is not there yet, and bring its packages to what is asked for."""
    interpreter, uv = str(folder / "bin" / "python"), shutil.which("uv")
    make = [uv, "venv", "--quiet", "--python", python] if uv else [python, "-m", "venv"]
    add = [uv, "pip", "install", "--python", interpreter] if uv else [interpreter, "-m", "pip", "install"]
    if not Path(interpreter).exists():
        subprocess.run([*make, str(folder)], check=True)
    # the installer says why it failed
    return not subprocess.run([*add, "--quiet", "--upgrade", *packages, *TOOLS], check=False).returncode


def run_set(folder: Path, python: str, packages: list[str]) -> bool:
    """Run the tests with these packages; False: no such set, or tests failed."""
    if not install(folder, python, packages):
        return False  # the other sets are still run
    tests = [f"tests/{name}.py" for name in TESTS]
    command = [str(folder / "bin" / "python"), "-m", "pytest", "-q", "-n", "auto", "--dist", "worksteal"]
    # the time of a test is no matter here, and a first run compiles: a limit only for what hangs
    command += ["-p", "no:cacheprovider", "-o", "timeout=1800", *tests]
    return subprocess.run(command, cwd=ROOT, check=False).returncode == 0


def sets_of_packages() -> dict[str, tuple[str, list[str]]]:
    """Name of a set -> the Python it is tried on, and what is asked of the installer."""
    base, found = requirements(), {}
    for version in PYTHONS:
        python = python_of(version)
        if python is None:
            sys.stderr.write(f"Python {version} is not installed: passed over\n")
            continue
        if version == PYTHONS[0]:
            found["lowest"] = (python, [*lower_bounds(base), *BESIDE_THE_LOWEST])
            found["locked"] = (python, [*base, "--constraint", str(ROOT / "constraints.txt")])
        found[f"newest-{version}"] = (python, base)
    return found


def main() -> int:
    """`run_versions.py FOLDER [SET...]`; 1 if a set failed, or none could be run."""
    root, wanted = Path(sys.argv[1]).absolute(), sys.argv[2:]
    found = sets_of_packages()
    if unknown := [name for name in wanted if name not in found]:
        sys.exit(f"expected sets among {', '.join(found)}; found {', '.join(unknown)}")
    passed = {name: run_set(root / name, *found[name]) for name in wanted or found}
    for name, has_passed in passed.items():
        sys.stderr.write(f"{name}: {'passed' if has_passed else 'FAILED'}\n")
    return 0 if passed and all(passed.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
