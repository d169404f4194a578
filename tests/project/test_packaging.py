"""What is installed: one version, a name that is ours, files that an open project has, and a start that looks first."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from places import ROOT
from run_versions import lower_bounds

import cyto_start
from cli import cli
from cyto_start import foreign_packages
from stores.version import DISTRIBUTION, VERSION, missing_package

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
yaml = pytest.importorskip("yaml")  # dask brings it


def test_the_version_is_said_once_and_agrees_everywhere() -> None:
    assert "version" not in PROJECT["project"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "stores.version.VERSION"}
    assert CliRunner().invoke(cli, ["--version"]).output == f"cyto {VERSION}\n"
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == VERSION
    assert re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0] == VERSION
    assert re.findall(r"^## (\S+)", (ROOT / "docs" / "releases.md").read_text(), re.MULTILINE)[0] == VERSION


def test_extras_that_messages_name_exist() -> None:
    assert PROJECT["project"]["name"] == DISTRIBUTION
    for package in ("torch", "timm", "obstore"):
        found = re.fullmatch(
            rf"this command needs the package {package}; install it: pip install '{DISTRIBUTION}\[(\w+)\]'",
            missing_package(f"{package}.nn"),
        )
        assert found
        assert any(given.startswith(package) for given in PROJECT["project"]["optional-dependencies"][found[1]])
    assert missing_package("numpy") == missing_package("") == ""


def test_nobody_is_sent_to_the_package_of_somebody_else() -> None:
    """`pip install cyto` would bring theirs."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    files = [path for folder in ("stores", "cytocache", "cytosae") for path in (ROOT / folder).rglob("*.py")]
    for path in [*pages, *files, ROOT / "cli.py"]:
        if path.name in ("CHANGELOG.md", "log.md", "0003-distribution-name.md") or path.name.startswith("CHANGES."):
            continue  # what was said before stays said
        found = re.search(r"pip install '?cyto(?![\w-])|\bcyto\[\w+\]", path.read_text())
        assert found is None, f"{path.name}: {found and found[0]}"


def test_requirements_have_lower_bounds_and_no_upper_ones() -> None:
    given: list[str] = PROJECT["project"]["dependencies"]
    assert len(lower_bounds(given)) == len(given)
    assert not [each for each in given if "<" in each]
    assert not [each for each in given if re.match("torch|timm", each)]
    with pytest.raises(ValueError, match="expected NAME>=VERSION"):
        lower_bounds(["numpy"])


def test_forms_and_hooks_can_be_read() -> None:
    forms = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    assert [path.stem for path in forms] == ["bug", "config", "feature", "question"]
    for path in forms:
        form = yaml.safe_load(path.read_text())
        if path.stem != "config":
            assert {"name", "description", "body"} <= set(form)
            assert all(part["type"] in ("markdown", "textarea", "checkboxes") for part in form["body"])
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert {hook["id"] for hook in hooks} == {"ruff-format", "ruff-check", "mypy"}


def test_containers_name_no_shared_folder_for_compiled_code() -> None:
    """Apptainer mounts the /tmp of the host: numba would load what another user has put there."""
    for path in (ROOT / "workflows" / "containers").iterdir():
        assert not re.search("(NUMBA_CACHE_DIR|MPLCONFIGDIR)=", path.read_text()), path.name


def test_the_page_of_the_index_leads_nowhere_inside_the_repository() -> None:
    text = (ROOT / PROJECT["project"]["readme"]).read_text()
    assert [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("https://")] == []


# ------------------------------------------------------------------------------- foreign packages of our names


def install(folder: Path) -> Path:
    """As pip would put our modules: the start, and packages that say where they are from."""
    (folder / "stores").mkdir(parents=True)
    (folder / "cyto_start.py").write_bytes(Path(cyto_start.__file__).read_bytes())
    (folder / "stores" / "__init__.py").write_text("# open_door\n")
    (folder / "cli.py").write_text("# cytosae\ndef main(): print('ours')\n")
    return folder


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        ("nothing", ""),
        ("stores overwritten", "stores"),
        ("stores removed", "stores"),
        ("stores emptied", "stores"),
        ("cli overwritten", "cli"),
        ("cli a package", "cli"),
        ("stores elsewhere", "stores"),
        ("both", "cli and stores"),
    ],
)
def test_foreign_packages_are_noticed_before_they_are_imported(tmp_path: Path, damage: str, named: str) -> None:
    folder, first = install(tmp_path / "site"), tmp_path / "first"
    first.mkdir()
    theirs = "raise SystemExit('imported theirs')\n"
    if damage in ("stores overwritten", "both"):
        (folder / "stores" / "__init__.py").write_text(theirs)
    if damage in ("cli overwritten", "both"):
        (folder / "cli.py").write_text(theirs)
    if damage == "stores removed":
        (folder / "stores" / "__init__.py").unlink()
        (folder / "stores").rmdir()
    elif damage == "stores emptied":
        (folder / "stores" / "__init__.py").unlink()
    elif damage == "cli a package":
        (folder / "cli").mkdir()
        (folder / "cli" / "__init__.py").write_text(theirs)
    elif damage == "stores elsewhere":
        (first / "stores.py").write_text(theirs)
    code = f"import sys; sys.path[:0] = [{str(first)!r}, {str(folder)!r}]; import cyto_start; cyto_start.start()"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False)
    if not named:
        assert (done.returncode, done.stdout, done.stderr) == (0, "ours\n", "")
        return
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"Error: another package has taken the place of {named} of cyto in ")
    assert f"python3 -m venv cyto-env && cyto-env/bin/pip install {DISTRIBUTION}" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_no_place_for_caches_is_one_line() -> None:
    """Neither a home nor a folder for temporary files; `stores` is imported before any command."""
    code = (
        "import sys, tempfile; tempfile.tempdir = '/dev/null/tmp'; sys.argv = ['cyto', '--version']; "
        "import cyto_start; cyto_start.start()"
    )
    names = ("MPLCONFIGDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME")
    environment = {name: value for name, value in os.environ.items() if name not in names} | {"HOME": "/dev/null/home"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "Error: cannot use TMPDIR: no folder for temporary files can be written to; set TMPDIR to one\n"
    )


def test_ours_are_ours() -> None:
    assert foreign_packages() == []
    assert PROJECT["project"]["scripts"] == {"cyto": "cyto_start:start"}


# ------------------------------------------------------------------------------------------- archive and wheel


@pytest.mark.slow  # builds both, in environments that pip makes
def test_archive_and_wheel_hold_what_they_must(tmp_path: Path) -> None:
    """No warning; types, templates and licence in the wheel and no test; in the archive all that its tests read."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs the repository")
    command = [sys.executable, "-m", "build", "--outdir", str(tmp_path), str(ROOT)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout + done.stderr
    assert not re.search(r"deprecat|warning: (?!no previously-included)|\*{20}", said, re.IGNORECASE), said
    wheel, archive = next(tmp_path.glob("*.whl")), next(tmp_path.glob("*.tar.gz"))
    assert wheel.name == f"{DISTRIBUTION}-{VERSION}-py3-none-any.whl"
    held = set(zipfile.ZipFile(wheel).namelist())
    assert {"cli.py", "cyto_start.py"} <= held
    assert {f"{name}/py.typed" for name in ("stores", "cytocache", "cytosae")} <= held
    assert "cytosae/atlas/templates/base.html" in held or any(n.startswith("cytosae/atlas/templates/") for n in held)
    assert any(name.endswith("licenses/LICENSE") for name in held)
    assert {name.split("/")[0] for name in held} - {f"{DISTRIBUTION}-{VERSION}.dist-info"} == {
        *("cli.py", "cyto_start.py", "stores", "cytocache", "cytosae")
    }
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    below = {name.partition("/")[2] for name in tarfile.open(archive).getnames()}
    missing = {name for name in tracked if name} - below
    assert not {name for name in missing if not re.match(r"(CHANGES|LOG|BENCH)\.\w+\.md", name)}
