"""The docs run, the reference is fresh, links lead somewhere, and what the README says is what the program does."""

import ast
import dataclasses
import importlib
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import pyarrow.parquet as pq
import pytest
from barcode_maker import write_patient_barcodes
from pages import shell
from places import ROOT
from small_runs import FEW

from cli import cli
from cytocache.demo_cells import write_demo_images
from cytosae.sae import TrainConfig
from stores.errors import CytoError

PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of every fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.docs
def test_quickstart_runs(tmp_path: Path) -> None:
    """Every bash and python block, in order, in one folder."""
    n_run = 0
    for language, text in blocks(ROOT / "docs" / "quickstart.md"):
        if language == "python":
            (tmp_path / "block.py").write_text(text)
            shell("python block.py", tmp_path)
        elif language == "bash":
            shell(text, tmp_path)
        n_run += language in ("python", "bash")
    assert n_run >= 6
    assert (tmp_path / "cells.barcodes" / "disease.zarr").is_dir()


@pytest.mark.docs
def test_training_page(made: Path, tmp_path: Path) -> None:
    """Its blocks run, on a small cache, and its table names every setting."""
    shutil.copytree(made / "acts.zarr", tmp_path / "cells.acts.zarr")
    page = ROOT / "docs" / "training.md"
    marked = r"^<!-- executed by tests/project/test_docs.py -->\n```bash\n(.*?)^```$"
    scripts = re.findall(marked, page.read_text(), re.MULTILINE | re.DOTALL)
    printed = [shell(f"export OMP_NUM_THREADS=1\n{script}", tmp_path) for script in scripts]
    assert len(printed) >= 3
    assert "held out" in printed[1]
    named = set(re.findall(r"`(\w+)`", page.read_text()))
    assert not {field.name for field in dataclasses.fields(TrainConfig)} - named


@pytest.mark.docs
def test_other_backbones_page(tmp_path: Path) -> None:
    """Its block of Python runs, without weights and without a network."""
    (text,) = (text for language, text in blocks(ROOT / "docs/howto/other-backbones.md") if language == "python")
    (tmp_path / "block.py").write_text(text)
    assert shell("python block.py", tmp_path).strip() == "timm:test_vit 1 CLS + 6x6 patches, row-major 0.95"


@pytest.mark.docs
def test_concepts_page(made: Path, tmp_path: Path) -> None:
    """Its blocks run, in order, on a small latent store."""
    shutil.copytree(made / "latents.zarr", tmp_path / "cells.latents.zarr")
    page = ROOT / "docs" / "concepts.md"
    marked = r"^<!-- executed by tests/project/test_docs.py -->\n```(bash|python)\n(.*?)^```$"
    found = re.findall(marked, page.read_text(), re.MULTILINE | re.DOTALL)
    assert len(found) >= 3
    for language, text in found:
        if language == "python":
            (tmp_path / "block.py").write_text(text)
        shell("python block.py" if language == "python" else text, tmp_path)


@pytest.mark.docs
def test_tau_page(made: Path, tmp_path: Path) -> None:
    """Its block runs, on a small latent store, and says which tau came of it."""
    shutil.copytree(made / "latents.zarr", tmp_path / "cells.latents.zarr")
    page = (ROOT / "docs" / "barcode_tau.md").read_text()
    marked = r"^<!-- executed by tests/project/test_docs.py -->\n```bash\n(.*?)^```$"
    (script,) = re.findall(marked, page, re.MULTILINE | re.DOTALL)
    assert "tau auto: " in shell(script, tmp_path)


@pytest.mark.docs
def test_comparison_page(tmp_path: Path) -> None:
    """Its blocks run, on made-up barcodes, and its table names every column."""
    rng = np.random.default_rng(0)
    diseases = ["CBFB::MYH11"] * 8 + ["PML::RARA"] * 7 + ["control"] * 5
    values = rng.gamma(2, 10 ** rng.uniform(-2, 2, 150), (20, 150)).astype(np.float32)
    values[:8, 5] += 200
    write_patient_barcodes(tmp_path / "cells.barcodes", values, diseases)
    others = [f"other {number}" for number in range(20)]
    write_patient_barcodes(tmp_path / "others.barcodes", values[:, ::-1].copy(), diseases, names=others)
    page = ROOT / "docs" / "compare.md"
    printed = ""
    for language, text in re.findall(
        r"^<!-- executed by tests/project/test_docs.py -->\n```(\w+)\n(.*?)^```$",
        page.read_text(),
        re.MULTILINE | re.DOTALL,
    ):
        (tmp_path / "block.py").write_text(text)
        printed += shell("python block.py" if language == "python" else text, tmp_path)
    assert "B: rest, 12 patients" in printed
    assert re.search(r"^\s+5 .*CBFB::MYH11$", printed, re.MULTILINE), printed
    table = pq.read_table(tmp_path / "cbfb_against_pml" / "differential.parquet")
    assert not {*table.column_names} - {*re.findall(r"`(\w+)`", page.read_text())}


@pytest.mark.docs
def test_relations_page(made: Path, tmp_path: Path) -> None:
    """Its blocks run, on small stores."""
    for name, here in (("acts.zarr", "cells.acts.zarr"), ("run", "seed0.sae"), ("latents.zarr", "cells.latents.zarr")):
        shutil.copytree(made / name, tmp_path / here)
    marked = r"^<!-- executed by tests/project/test_docs.py -->\n```bash\n(.*?)^```$"
    scripts = re.findall(marked, (ROOT / "docs" / "relations.md").read_text(), re.MULTILINE | re.DOTALL)
    printed = [shell(f"export OMP_NUM_THREADS=1\n{script}", tmp_path) for script in scripts]
    assert "latents matched, mean cosine" in printed[0]  # the best matching: else the line says how far from it
    assert "active at the same tokens" in printed[1]


@pytest.mark.docs
def test_probe_page(tmp_path: Path) -> None:
    """Its blocks run, on made-up barcodes, and its table names every rule."""
    from cohorts import cohort, write_folder

    from cytosae.probe.run import REGULARIZATIONS

    for name, seed in (("cells.barcodes", 0), ("other.barcodes", 1)):
        table, *more = cohort(seed=seed)
        table["site"] = ["Munich" if patient < "P04" else "Basel" for patient in table["patient"]]
        write_folder(tmp_path / name, table, *more)
    page = (ROOT / "docs" / "probe.md").read_text()
    probed, tested = re.findall(
        r"^<!-- executed by tests/project/test_docs.py -->\n```bash\n(.*?)^```$", page, re.MULTILINE | re.DOTALL
    )
    assert shell(probed, tmp_path).count("on the same folds") == 2
    assert shell(tested, tmp_path).count("on the test ") == 3
    assert set(REGULARIZATIONS) <= set(re.findall(r"^\| `([a-z-]+)`", page, re.MULTILINE))


@pytest.mark.docs
def test_atlas_page(made: Path, tmp_path: Path) -> None:
    """Its block runs, on small stores."""
    shutil.copytree(made / "latents.zarr", tmp_path / "cells.latents.zarr")
    shell("cyto barcode cells.latents.zarr -o cells.barcodes", tmp_path)
    page = (ROOT / "docs" / "atlas.md").read_text()
    (script,) = re.findall(
        r"^<!-- executed by tests/project/test_docs.py -->\n```bash\n(.*?)^```$", page, re.MULTILINE | re.DOTALL
    )
    printed = shell(script, tmp_path)
    assert printed.count("nothing was written") == 1
    assert (tmp_path / "atlas" / "index.html").as_uri() in printed


@pytest.mark.docs
def test_review_page(tmp_path: Path) -> None:
    """Its blocks run, on an invented cohort: the server is started, reviewed at by two, and stopped."""
    from atlas_maker import without_figures
    from latent_stores import local_client, write_latents
    from review_client import post, token_of

    from cytosae.barcodes import BarcodeConfig, write_barcodes
    from cytosae.compare import CompareConfig, compare
    from cytosae.concepts import ConceptConfig, concept_statistics

    rng = np.random.default_rng(0)
    dense = rng.gamma(1, 0.5, (20, 257, 40)) * (rng.random((20, 257, 40)) < 0.2)
    dense[:10, :, :5] += 1
    dense = dense.astype(np.float16).astype(np.float32)
    of_patients = [(f"P{n // 2}", "CBFB" if n < 10 else "PML", True) for n in range(20)]
    latents, barcodes = tmp_path / "cells.latents.zarr", tmp_path / "cells.barcodes"
    write_latents(latents, dense, of_patients)
    with local_client(1, 1) as client, without_figures():
        write_barcodes(latents, barcodes, BarcodeConfig(tau=0.2), client=client)
        concept_statistics(latents, tmp_path / "cells.concepts", ConceptConfig(min_support=1), client=client)
        compare(barcodes, tmp_path / "a_against_b", CompareConfig(a="CBFB", b="PML", top=5))
    build, serve, say = (text for _, text in blocks(ROOT / "docs" / "review.md"))
    assert "index.html" in shell(build, tmp_path)
    command = [sys.executable, "-m", "cli", *shlex.split(serve)[1:], "--port", "0"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            (port,) = map(int, re.findall(r"http://127\.0\.0\.1:(\d+)/ ", server.stdout.readline()))
            for reviewer in ("Ada", "Bob"):
                begun = json.loads(post(port, "/reviews/begin", {"reviewer": reviewer}, token_of(port))[1])
                for question in begun["questions"]:
                    for item in question["items"]:
                        said = {"reviewer": reviewer, "item": item["item"], "verdict": question["choices"][0]}
                        assert post(port, "/reviews", said, token_of(port))[0] == 200
        finally:
            server.send_signal(signal.SIGINT)
            server.communicate(timeout=20)
    assert server.returncode == 0
    printed = shell(say, tmp_path)
    assert re.search(r"reviews.csv: \d+ verdicts of 2 reviewers", printed)
    assert re.search(r"Ada and Bob: Cohen's kappa n/a over \d+ concepts, 100.0% equal", printed), printed
    columns = (tmp_path / "reviews.csv").read_text("utf-8-sig").splitlines()[0].split(",")
    assert not {*columns} - {*re.findall(r"\w+", (ROOT / "docs" / "review.md").read_text())}


def test_every_block_runs_or_says_why_not() -> None:
    """A block that no test runs is output, a picture, or bears a reason."""
    for page in PAGES:
        for match in re.finditer(r"(?P<before>[^\n]*)\n```(?P<language>bash|python)\n", page.read_text()):
            says = "executed by" in match["before"] or "not executed:" in match["before"]
            assert says or page.name == "quickstart.md", f"{page.name}: {match[0]}"


@pytest.mark.docs
def test_readme_transcript(tmp_path: Path) -> None:
    """The command of the README's transcript runs on a few drawn cells, and prints lines of the shape shown.

    Only what is measured may differ: numbers, and the verdict on an SAE of 54 drawn cells.
    """
    text = next(text for language, text in blocks(ROOT / "README.md") if language == "console")
    command, *shown = text.splitlines()
    write_demo_images(tmp_path, n_patients=18, images_per_patient=3, size=48)
    head, *rows = (tmp_path / "images.csv").read_text().splitlines()
    assert head == "path,label,patient,disease"
    kinds, diseases = (
        ("wbc", "wbc", "wbc", "rbc", "rbc", "platelets"),
        ("control", "leukocytosis-like", "thrombocytosis-like"),
    )
    table = [head]
    for number, row in enumerate(rows):
        path, _, patient, _ = row.split(",")
        table.append(f"{path},{kinds[number % 6]},{patient},{diseases[int(patient[1:]) % 3]}")
    (tmp_path / "simulated_cohort.csv").write_text("\n".join(table))
    command = command.removeprefix("$ ")
    few = [
        ("--set", f"{section}.{name}={json.dumps(value)}") for section in FEW for name, value in FEW[section].items()
    ]
    quick = shlex.join(word for pair in few if pair[1] != "barcode.tau=0.0" for word in pair)
    printed = shell(f"{command} --dry-run && {command} {quick}", tmp_path)  # as shown, and with few of everything
    printed = printed.replace(f"{tmp_path}/", "")
    printed = re.sub(r"health: (NOT )?fit for barcodes[^(]*", "health: fit for barcodes ", printed)
    lines = [line for line in shown if line != "..."]
    assert len(lines) >= 15
    for line in lines:
        shape = re.sub(r"\\?\d[\d\\,.e-]*", r"[\\d,.e-]+", re.escape(line))
        shape = re.sub(r"(\\ ){2,}", r"\\s+", shape)
        assert re.search(rf"^{shape}", printed, re.MULTILINE), f"shows: {line}\nprinted: {printed}"


@pytest.mark.parametrize(
    ("page", "maker"),
    [
        ("cli.md", "make_cli_reference.cli_reference"),
        ("notebook.md", "make_notebook_page.notebook_page"),
    ],
)
def test_made_pages_are_fresh(page: str, maker: str) -> None:
    module, name = maker.split(".")
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        made = getattr(importlib.import_module(module), name)()
    finally:
        sys.path.pop(0)
    assert (ROOT / "docs" / page).read_text() == made, "run: make docs"


def test_api_pages_have_all_that_is_public() -> None:
    """Each name of the three doors, and each class of ours that such a function returns, has its entry."""
    griffe = pytest.importorskip("griffe", reason="needs the extra [docs]")
    entries = [
        name
        for page in sorted((ROOT / "docs" / "api").glob("*.md"))
        for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)
    ]
    assert len(entries) == len(set(entries))
    loader = griffe.GriffeLoader(search_paths=[ROOT])
    doors = {package: loader.load(package) for package in ("stores", "cytocache", "cytosae")}
    has_entry = {loader.modules_collection[name].canonical_path for name in entries}
    for package, door in doors.items():
        for line in (ROOT / package / "__init__.pyi").read_text().splitlines():
            name = line.rpartition(" as ")[2]
            found = door[name]
            if found.is_module and name in found.members:  # a room with the name of its function: cytosae.compare
                found = found[name]
            assert found.canonical_path in has_entry, f"add `::: {package}.{name}` to a page of docs/api"
            for part in found.returns if found.is_function and found.returns is not None else ():
                path = getattr(part, "canonical_path", "")
                if path.startswith(tuple(doors)) and loader.modules_collection[path].is_class:
                    path = loader.modules_collection[path].canonical_path
                    assert path in has_entry, f"{package}.{name} returns {path}: add it to a page of docs/api"


def test_every_column_of_the_golden_tables_is_explained() -> None:
    """By its name on a page of the docs; its limits, means and spread, and what stands before it, go with it."""
    pages = (page for page in (ROOT / "docs").rglob("*.md") if page.name not in ("cli.md", "log.md"))
    words = {*re.findall(r"[\w.]+", " ".join(page.read_text() for page in pages))}
    tables = [path for path in (ROOT / "tests" / "golden").rglob("*.parquet") if ".zarr" not in str(path)]
    assert len(tables) > 20
    for table in tables:
        for name in pq.read_schema(table).names:
            bare = re.sub(r"^(final|held_out|discovery|replication)_|(_(low|high|mean|sd))+$", "", name)
            assert {name, bare} & words, f"{table.relative_to(ROOT)}: say in docs/ what {name} is"


def test_the_barcode_job_is_told_by_the_names_that_it_has() -> None:
    """The page for developers names only classes and functions that are there, and all that tasks and client share."""
    page = (ROOT / "docs" / "barcode_job.md").read_text()
    folder, parts = ROOT / "cytosae" / "barcodes", ROOT / "stores" / "part_files.py"
    there = {
        node.name
        for path in [*folder.glob("*.py"), parts]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef | ast.FunctionDef)
    }
    named = set(re.findall(r"(?:tasks|partitions)\.(?!py)(\w+)|^\| `(\w+)` \|", page, re.MULTILINE))
    names = {name for pair in named for name in pair if name}
    assert len(names) > 12
    assert names <= there, names - there
    of_tasks = ast.parse((folder / "tasks.py").read_text()).body
    public = {node.name for node in of_tasks if isinstance(node, ast.ClassDef) and not node.name.startswith("_")}
    assert public <= names


def test_every_page_says_what_to_read_next_and_has_short_lines() -> None:
    """The last line begins with "Next:"; a line of prose has at most 300 letters. Made pages and the log apart."""
    for page in (ROOT / "docs").rglob("*.md"):
        lines = page.read_text().rstrip().splitlines()
        if page.name in ("cli.md", "log.md", "notebook.md", "package-index.md", "template.md"):
            continue
        if re.match(r"\d{4}-", page.name):  # a record of a decision has a form of its own
            continue
        assert lines[-1].startswith("Next: "), page.name
        assert re.match(r"\n\w", "\n".join(lines[1:3])), f"{page.name} does not begin with what it is for"
        long = [line for line in lines if len(line) > 300 and not line.startswith("|")]
        assert not long, f"{page.name}: {long[0][:80]}"


def test_citations_of_the_reference_lead_to_a_heading() -> None:
    """`docs/reference/paper.md 4.2` in code: the page has a heading of this number."""
    pages = {page.name: page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md")}
    n_found = 0
    for folder in ("stores", "cytocache", "cytosae", "tests", "bench"):
        for path in (ROOT / folder).rglob("*.py"):
            for page, number in re.findall(r"docs/reference/(\w+\.md) (\d+(?:\.\d+)?)", path.read_text()):
                n_found += 1
                assert re.search(rf"^#+ {re.escape(number)}\.? ", pages[page], re.MULTILINE), f"{path}: {page} {number}"
    assert n_found > 15


@pytest.mark.stress
def test_messages_of_the_troubleshooting_page_are_real() -> None:
    """Each quoted message is printed by the code: its words are in one text of the source, in this order."""
    texts: list[str] = []
    modules = [path for name in ("stores", "cytocache", "cytosae") for path in (ROOT / name).rglob("*.py")]
    for path in (ROOT / "cli.py", ROOT / "cyto_start.py", *modules):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                texts.append(
                    "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(messages) > 35
    for message in messages:
        words = ".*".join(re.escape(piece.strip()) for piece in message.split("…"))
        assert any(re.search(words, text, re.DOTALL) for text in texts), message


def commands(script: str) -> Iterator[list[str]]:
    """The words of every call of cyto in a script; a variable is taken for a number."""
    for line in re.findall(r"^.*\bcyto .*$", script.replace("\\\n", " "), re.MULTILINE):
        lexer = shlex.shlex(re.sub(r"\$\w+", "1", line), posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words = [*lexer]
        while "cyto" in words:
            words = words[words.index("cyto") + 1 :]
            end = next((n for n, word in enumerate(words) if re.fullmatch(r"[;&|<>()]+", word)), len(words))
            yield words[:end]
            words = words[end:]


def refused(words: list[str]) -> str:
    """Why this call of cyto cannot be read by its own command line; empty if it can."""
    command: click.Command = cli
    while isinstance(command, click.Group) and words:
        found = command.get_command(click.Context(command), words[0])
        if found is None:
            break
        command, words = found, words[1:]
    if isinstance(command, click.Group) and not {*words} <= {"--help", "--version"}:
        return f"no such command: {words}"
    try:
        # click keeps a command's help option as it is first made: with the names that the command line gives it
        command.make_context("cyto", [*words], resilient_parsing="--help" in words, help_option_names=["-h", "--help"])
    except click.exceptions.Exit:
        return ""
    except (click.ClickException, CytoError) as error:
        return str(error)
    return ""


def test_commands_in_the_docs_can_be_read() -> None:
    """Also of blocks that nobody can execute here: each command and each of its options exists."""
    n_read = 0
    for page in PAGES:
        for language, text in blocks(page):
            script = "\n".join(re.findall(r"^\$ (.*)$", text, re.MULTILINE)) if language == "console" else text
            for words in commands(script) if language in ("bash", "console") else ():
                n_read += 1
                assert not refused(words), f"{page.name}: cyto {shlex.join(words)}: {refused(words)}"
    assert n_read > 60
    assert refused(["sae", "train", "a.zarr", "-o", "b", "--expanssion", "4"])  # so the test can fail
    assert refused(["sae", "trian", "a.zarr"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_make_targets_named_in_the_readme_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        named = set(re.findall(r"(?:^|`|\$ )make ([a-z-]+)", page.read_text(), re.MULTILINE))
        assert named <= targets, f"{page.name}: {named - targets}"


def test_dependencies_are_justified_and_pinned() -> None:
    """Every dependency has its line in docs/dependencies.md and its exact version in constraints.txt."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [re.split(r"[<>=!~\[ ]", given)[0] for given in project["dependencies"]]
    optional = [given for extra in project["optional-dependencies"].values() for given in extra]
    names += [re.split(r"[<>=!~\[ ]", given)[0] for given in optional]
    pins = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    page = (ROOT / "docs" / "dependencies.md").read_text()
    for name in names:
        assert name.lower() in pins, name
        assert re.search(rf"\b{re.escape(name)}\b", page), name


def tracked_files() -> list[str]:
    """Of the repository; in an unpacked source archive, which is none, of its list."""
    if (ROOT / ".git").exists():
        return subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    return (ROOT / "cytobarcode.egg-info" / "SOURCES.txt").read_text().splitlines()


def test_no_machine_path_and_no_registry_host() -> None:
    """Nothing in the project names the place where it was written."""
    hosts = "|".join(("pypi" + r"\.org", "python" + r"hosted\.org", "npm" + r"js\.(?:org|com)"))
    places = "|".join(("/wo" + "rk/", "/ro" + "ot/", "/ho" + "me/"))
    for name in tracked_files():
        path = ROOT / name
        if path.is_file() and path.suffix in {".py", ".md", ".toml", ".txt", ".json", ".yml", ""}:
            found = re.search(f"{hosts}|{places}", path.read_text(errors="replace"))
            assert not found, f"{name} names {found and found[0]}"


def test_the_four_questions_of_contributing_are_answered() -> None:
    """Every answer names a file and a piece of a line that stands in it exactly once."""
    page = (ROOT / "CONTRIBUTING.md").read_text().split("### Find your way")[1].split("\n## ")[0]
    answers = re.findall(r"`([\w/]+\.py)`: `([^`]+)`", page)
    assert len(answers) == 4
    for name, piece in answers:
        assert (ROOT / name).read_text().count(piece) == 1, (name, piece)
    (who,) = re.findall(r"`(CLICK = [^`]+)`", page)
    assert who in (ROOT / "tests" / "project" / "test_imports.py").read_text()
