"""The arrows of the architecture: stores <- cytocache, cytosae <- cli; rooms with doors, no circle; what stays light.

By paths: a room is a folder of `cytosae/`, its door the `__init__.pyi`.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from places import ROOT

ALLOWED = {
    "stores": {"stores"},
    "cytocache": {"stores", "cytocache"},
    "cytosae": {"stores", "cytosae"},
    "cli.py": {"stores", "cytocache", "cytosae", "cli"},
}
ROOMS = sorted(path.parent.name for path in (ROOT / "cytosae").glob("*/__init__.pyi"))
TORCH = {  # files that name torch (or timm), or rooms; a laptop without torch runs all else
    *("cytocache/backbones.py", "cytocache/bridge.py", "cytocache/extract.py", "cytocache/fidelity.py"),
    *("cytocache/sample.py", "cytocache/torchvision_guard.py", "cytocache/weights_file.py"),
    *("cytocache/checkpoint_state.py", "cytocache/file_architecture.py", "cytocache/model_config.py"),
    *("cytocache/model_options.py", "cytocache/random_weights.py", "cytocache/vit.py"),
    *("cytocache/device_copies.py", "cytocache/first_look.py", "cytosae/pipeline/costs.py"),
    *("cytosae/baselines", "cytosae/sae", "cytosae/training", "cytosae/sweep", "cytosae/latents"),
    *("cytosae/probe/attention_mil.py", "cytosae/causes/ablate.py", "cytosae/causes/encoded.py"),
    "cytosae/causes/measure.py",
    *("cytosae/stage_one.py", "stores/devices.py"),
}
DASK = {"cytosae/cluster", "cytosae/barcodes", "cytosae/concepts", "cytosae/relations", "cytosae/commands"}
CLICK = {"cli.py", "stores/console.py", "cytocache/commands", "cytosae/commands"}


def files(package: str) -> list[Path]:
    """The modules of a package, or cli.py."""
    found = [ROOT / package] if package.endswith(".py") else sorted((ROOT / package).rglob("*.py"))
    assert found
    return found


@cache
def imports(path: Path) -> list[str]:
    """Every import in a file, also inside functions and under TYPE_CHECKING; `from a import b` gives a.b."""
    tree = ast.parse(path.read_text())
    package = list(path.relative_to(ROOT).parts[:-1])
    found = list[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found += [f"{module}.{alias.name}" for alias in node.names]
    return found


def top(module: str) -> str:
    return module.split(".")[0]


def is_of(path: Path, places: set[str]) -> bool:
    name = path.relative_to(ROOT).as_posix()
    return any(name == place or name.startswith(f"{place}/") for place in places)


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_arrows(package: str) -> None:
    """No file imports a package of ours that it must not know, and nobody imports what the tests are made of."""
    for path in files(package):
        wrong = {top(module) for module in imports(path)} & {
            "stores",
            "cytocache",
            "cytosae",
            "cli",
            "bench",
            "tests",
        }
        assert wrong <= ALLOWED[package], f"{path} imports {wrong}"


@pytest.mark.parametrize("package", ["stores", "cytocache", "cytosae", "cli.py"])
def test_heavy_libraries_stay_where_they_are_needed(package: str) -> None:
    for path in files(package):
        names = {top(module) for module in imports(path)}
        assert is_of(path, TORCH) or not names & {"torch", "timm", "torchvision"}, path
        assert is_of(path, DASK) or not names & {"dask", "distributed"}, path
        assert is_of(path, CLICK) or "click" not in names, path


def test_only_commands_import_the_console() -> None:
    for package in ALLOWED:
        for path in files(package):
            if any(module.startswith("stores.console") for module in imports(path)):
                assert is_of(path, CLICK), path


def room_of(path: Path) -> str:
    """The room of a file of `cytosae/`; "" of those that lie in none."""
    parts = path.relative_to(ROOT / "cytosae").parts
    return parts[0] if len(parts) > 1 else ""


def rooms_imported(path: Path) -> Iterator[tuple[str, str]]:
    """(room, what is imported of it) of the other rooms that a file imports."""
    for module in imports(path):
        words = module.split(".")
        if words[0] == "cytosae" and len(words) > 1 and words[1] in ROOMS and words[1] != room_of(path):
            yield words[1], ".".join(words[2:])


def test_rooms_are_entered_through_their_doors() -> None:
    """Other rooms import from `cytosae.ROOM`, and only what its door names."""
    assert len(ROOMS) > 10
    for path in files("cytosae"):
        for room, name in rooms_imported(path):
            door = (ROOT / "cytosae" / room / "__init__.pyi").read_text()
            assert f" import {name} as {name}\n" in door, f"{path} imports {name} of {room}, not through its door"


def test_doors_lead_somewhere() -> None:
    """Every name of every door is defined where the door says, and is no submodule's name, which would hide it."""
    for stub in [ROOT / package / "__init__.pyi" for package in ("stores", "cytocache")] + [
        ROOT / "cytosae" / room / "__init__.pyi" for room in ROOMS
    ]:
        for node in ast.walk(ast.parse(stub.read_text())):
            if not isinstance(node, ast.ImportFrom) or node.module is None:
                continue
            source = stub.parent.joinpath(*node.module.split(".")).with_suffix(".py")
            defined = {
                name
                for each in ast.parse(source.read_text()).body
                for name in (
                    [each.name]
                    if isinstance(each, ast.FunctionDef | ast.ClassDef)
                    else [ast.unparse(target) for target in each.targets]
                    if isinstance(each, ast.Assign)
                    else [ast.unparse(each.target)]
                    if isinstance(each, ast.AnnAssign)
                    else []
                )
            }
            for alias in node.names:
                assert alias.name in defined, f"{stub}: {alias.name} is not defined in {source.name}"
                is_callable = f'make_callable(__name__, "{alias.name}")' in source.read_text()
                assert is_callable or not (stub.parent / f"{alias.name}.py").exists(), f"{stub}: {alias.name}"


def test_there_is_no_circle() -> None:
    """Neither between rooms nor between the files of a package; imports inside functions and of types count, too."""
    rooms: dict[str, set[str]] = {}
    for path in files("cytosae"):
        if room_of(path) in ROOMS:
            rooms.setdefault(room_of(path), set()).update(room for room, _ in rooms_imported(path))
    assert [*TopologicalSorter(rooms).static_order()]
    for package in ("stores", "cytocache", "cytosae"):
        graph = {}
        for path in files(package):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            known = {".".join(other.relative_to(ROOT).with_suffix("").parts) for other in files(package)}
            graph[module] = {
                name
                for imported in imports(path)
                for name in (imported, imported.rpartition(".")[0])
                if name in known and name != module
            }
        assert [*TopologicalSorter(graph).static_order()]


def test_every_file_is_named_where_newcomers_look() -> None:
    """In the tables of CONTRIBUTING.md, by its name: those of a room in its row, or, as each has them, below."""
    page = (ROOT / "CONTRIBUTING.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)/` (\|.*)$", page, re.MULTILINE))
    (below,) = re.findall(r"^Where a room has them,.*", page, re.MULTILINE)
    for package in ("stores", "cytocache", "cytosae"):
        for path in files(package):
            if not path.name.startswith("__") and "commands" not in path.parts:
                where = rows[room_of(path)] + below if package == "cytosae" and room_of(path) else page
                named = re.findall(r"[`/]([a-z0-9_]+\.py)`", where)
                assert path.name in named, f"{path.relative_to(ROOT)}: say in CONTRIBUTING.md what it answers"


def test_no_file_goes_out_and_in_again_by_its_own_door() -> None:
    """A name that a file takes from the door of its own room would hide a circle."""
    doors = {"stores", "cytocache", *(f"cytosae.{room}" for room in ROOMS)}
    for path in [*files("stores"), *files("cytocache"), *files("cytosae")]:
        own = ".".join(path.relative_to(ROOT).parts[:-1])
        inside = {other.stem for other in path.parent.glob("*.py")} | {other.name for other in path.parent.iterdir()}
        for module in imports(path):
            package, _, name = module.rpartition(".")
            is_own = package == own or (package in doors and own.startswith(f"{package}."))
            assert not (is_own and package in doors and name not in inside), f"{path} imports {name} of {package}"


@pytest.mark.stress
@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("cli", {"torch", "zarr", "dask", "numpy", "pyarrow"}),
        ("cytocache, cytosae", {"torch", "zarr", "dask", "numpy", "pyarrow", "click"}),
        ("cytosae.barcodes.build, cytosae.barcodes.tasks", {"torch", "timm", "cytocache"}),
        ("cytosae.concepts.statistics, cytosae.concepts.thresholds", {"torch", "timm", "cytocache", "matplotlib"}),
        ("cytosae.barcodes.figures, cytosae.sweep.figures", {"torch", "cytocache"}),
        ("cytosae.compare.differential", {"torch", "cytocache", "dask", "matplotlib"}),
        (
            "cytosae.relations.stability, cytosae.relations.neighbours, cytosae.relations.patient_concepts",
            {"torch", "timm", "cytocache", "anndata"},
        ),
        (
            "cytosae.maps.image_maps, cytosae.maps.reference_sheets, cytosae.maps.mask_agreement",
            {"torch", "cytocache", "dask", "sklearn"},
        ),
        ("cytosae.probe.run", {"torch", "cytocache", "dask"}),
        ("cytosae.search.run, cytosae.search.scale", {"torch", "timm", "cytocache", "matplotlib", "anndata"}),
        ("cytosae.names.run", {"torch", "timm", "cytocache", "dask", "sklearn", "anndata"}),
        ("cytosae.compare.replication", {"torch", "cytocache", "dask", "matplotlib"}),
        (
            "cytosae.pipeline.run, cytosae.pipeline.page",
            {"torch", "timm", "cytocache", "anndata", "matplotlib"},
        ),
        ("cytosae.atlas.build", {"torch", "cytocache", "dask", "anndata", "matplotlib", "sklearn"}),
        (
            "cytosae.atlas.review_server, cytosae.review.reviewer_agreement",
            {"torch", "cytocache", "dask", "matplotlib"},
        ),
        ("stores.latent_store, stores.verify_any", {"torch", "dask", "click", "cytocache", "cytosae", "anndata"}),
        ("cytocache.images, cytocache.preprocess", {"torch", "zarr", "pyarrow", "dask", "click"}),
        ("cytosae.training.train", {"timm", "torchvision", "cytocache", "dask"}),
    ],
)
def test_import_brings_in_no_more(module: str, absent: set[str]) -> None:
    """Checked in a fresh interpreter, where nothing else has been imported before."""
    code = f"import sys, {module}; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert not loaded & absent


@pytest.mark.stress
def test_a_missing_triton_is_told_as_such() -> None:
    """In one line that says what to do, where the kernels of the GPU are imported and nowhere else."""
    code = (
        "import sys; sys.modules['triton'] = None; import cytosae.training.train; import cytosae.training.kernels_gpu"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr.splitlines()[-1].startswith(
        "stores.errors.BadInput: training on a GPU needs triton, which comes with torch's CUDA builds; none is"
    )
    assert done.stderr.endswith("install a CUDA build of torch, or train with --device cpu\n")
