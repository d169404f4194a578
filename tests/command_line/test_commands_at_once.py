"""Every command of the command line, twice at once, and with what it reads exchanged under it: one line, nothing torn.

A command that writes belongs into WRITING, one that reads a store into READING; a new one that is in no list fails.
"""

import gc
import importlib
import re
import shlex
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from atlas_maker import DATASETS, DISEASES, OF_NOBODY, make_cohort
from barcode_maker import write_image_barcodes
from click.testing import CliRunner, Result
from command_line import commands
from exchanges import exchange
from latent_stores import local_client
from PIL import Image
from tiny_runs import tiny_config

import cli
from cytosae.concepts import selection
from cytosae.pipeline.recipe import parse_recipe, recipe_text
from cytosae.training.train import train
from stores import console, files
from stores import destination as output
from stores.spec import BARCODES, read_header, write_header
from stores.verify_any import verify

pytestmark = [pytest.mark.stress, pytest.mark.usefixtures("one_thread")]

LONG = ("demo ", "run ")
GRID = "[base]\nexpansion = 2\nbatch_tokens = 256\ntokens = 512\nwarmup_steps = 1\n[grid]\nseed = [1]\n"
TRAIN = "--expansion 2 --batch-tokens 256 --tokens 512 --warmup-steps 1"
COMPARE = f"compare cohort/barcodes '{DISEASES[0]}' {DISEASES[1]} -o new --permutations 19 --bootstraps 5"
PROBE = "probe cohort/probed -o new --folds 2 --inner-folds 2 --repeats 1 --permutations 0 --threshold 0 --c-factor 1"
ATLAS = "atlas build --barcodes cohort/barcodes --concepts cohort/concepts --latents cohort/latents --images "
ATLAS += "cohort/images --neighbours cohort/neighbours --compare cohort/compare --pages top --top 2 -o new"
MAP = f"concept map cohort/latents -o new --image {OF_NOBODY} --latent 3 --concepts cohort/concepts"
SHEET = "concept sheet cohort/concepts cohort/latents -o new --latent 3"
ABLATE = (
    "concept ablate run acts.zarr --latents latents.zarr --latent 1 --controls 1 --directions 1 --n-images 1 -o new"
)
ABLATE += " --curve-images 0"
BASELINE = "sae baseline acts.zarr -o new --kind random --like run"
VERSUS = "sae versus run acts.zarr --baseline run2 -o new --all-images --draws 100"
SCORE = "sae score run --latents latents.zarr --cache acts.zarr -o new"
SEARCH = f"concept search cohort/barcodes {OF_NOBODY} -o new --weigh none"
DESCRIBE = "concept describe --barcodes cohort/barcodes --concepts cohort/concepts --latents cohort/latents "
DESCRIBE += "--images cohort/images --latent 3 -o new"
NEIGHBOURS = "concept neighbours run -o new --latents latents.zarr --latent 1 --workers 1"
# a command line -> when the first one is held up, so that the second can try: as it claims its place; or, where others
# may write parts of the same, as the writer of its part, or as who completes it
WRITING = {
    "data index images -o new.parquet": "claim",
    "cache extract images.csv new.zarr --workers 1": "writer",
    "cache merge acts.zarr": "finish",
    "cache repair damaged.zarr --root . --workers 1": "writer",
    f"sae train acts.zarr -o new {TRAIN}": "claim",
    "sae sweep grid.toml acts.zarr -o new": "claim",
    "sae import released.pt -o new": "claim",
    "sae export run --format cytosae -o new.pt": "claim",
    "sae export run --format saelens -o new": "claim",
    "sae encode acts.zarr run -o new.zarr": "writer",
    "latents merge latents.zarr": "finish",
    "barcode latents.zarr -o new": "claim",
    "concept stats latents.zarr -o new": "claim",
    "concept thresholds cohort/concepts -o new": "claim",
    "concept stability run run2 -o new": "claim",
    "concept patient patients P000 -o new": "claim",
    f"concept select cohort/concepts --dataset {DATASETS[0]} --threshold 0 --overwrite": "claim",
    "concept masks latents.zarr masks -o new --shuffles 3": "claim",
    "atlas export cohort/atlas -o new.csv --reviews reviews": "claim",
    "demo --out new": "claim",
    "run images -o new": "claim",
    "report begun": "claim",
    **dict.fromkeys((COMPARE, PROBE, ATLAS, MAP, SHEET, NEIGHBOURS, ABLATE), "claim"),
    **dict.fromkeys((BASELINE, VERSUS, SCORE, SEARCH, DESCRIBE), "claim"),
}
# a command line -> the stores that it reads, each of which is exchanged once
READING = {
    f"sae train acts.zarr -o new {TRAIN}": ["acts.zarr"],
    "sae sweep grid.toml acts.zarr -o new": ["acts.zarr"],
    "sae encode acts.zarr run -o new.zarr": ["acts.zarr", "run"],
    "sae eval run acts.zarr": ["acts.zarr", "run"],
    "cache fidelity acts.zarr --root . --workers 1": ["acts.zarr"],
    "barcode latents.zarr -o new": ["latents.zarr"],
    "concept stats latents.zarr -o new": ["latents.zarr"],
    "concept thresholds cohort/concepts -o new": ["cohort/concepts"],
    "concept stability run run2 -o new": ["run", "run2"],
    "concept patient patients P000 -o new": ["patients"],
    f"concept select cohort/concepts --dataset {DATASETS[0]} --threshold 0 --overwrite": ["cohort/concepts"],
    "concept masks latents.zarr masks -o new --shuffles 3": ["latents.zarr"],
    COMPARE: ["cohort/barcodes"],
    PROBE: ["cohort/probed"],
    ATLAS: [f"cohort/{name}" for name in ("barcodes", "concepts", "latents", "neighbours", "compare")],
    MAP: ["cohort/latents", "cohort/concepts"],
    SHEET: ["cohort/latents", "cohort/concepts"],
    DESCRIBE: [f"cohort/{name}" for name in ("barcodes", "concepts", "latents")],
    NEIGHBOURS: ["latents.zarr", "run"],
    ABLATE: ["latents.zarr", "run", "acts.zarr"],
    BASELINE: ["acts.zarr", "run"],
    VERSUS: ["acts.zarr", "run", "run2"],
    SCORE: ["acts.zarr", "latents.zarr"],  # of the SAE only the hash
    SEARCH: ["cohort/barcodes"],
    "verify acts.zarr": ["acts.zarr"],
    "verify run": ["run"],
    "cache verify acts.zarr": ["acts.zarr"],
    "latents verify latents.zarr": ["latents.zarr"],
}
# one look at a header or at tables that it vouches for; and what tests of its own are for (test_review_server.py,
# test_match.py)
NEITHER = {"cache info", "sae info", "latents info", "concept top", "atlas agreement", "atlas serve", "concept match"}
NEITHER |= {"barcode export", "compare replicate"}  # nobody has tried these


@pytest.fixture(scope="module")
def chain(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands above are given; read-only: each test has a copy."""
    root = Path(shutil.copytree(made, tmp_path_factory.mktemp("chain") / "all"))
    train([root / "acts.zarr"], root / "run2", tiny_config(seed=1))
    (root / "grid.toml").write_text(GRID)
    rng = np.random.default_rng(0)
    values = rng.gamma(1, 1, (72, 30)).astype(np.float32)
    write_image_barcodes(root / "patients", values, np.repeat(np.arange(12), 6), ["AML"] * 8 + ["control"] * 4)
    for path in (root / "images").rglob("*.png"):
        mask = root / "masks" / path.relative_to(root / "images")
        mask.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.pad(np.full((24, 24), 255, np.uint8), 12)).save(mask)
    shutil.copytree(root / "acts.zarr", root / "damaged.zarr")
    (root / "damaged.zarr" / "tokens" / "c" / "0" / "0" / "0").write_bytes(b"")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert cyto("sae export run --format cytosae -o released.pt").exit_code == 0
    (root / "reviews").mkdir()
    (root / "begun").mkdir()
    (root / "begun" / "recipe.toml").write_text(recipe_of(root / "images"))
    return root


def recipe_of(images: Path) -> str:
    """Of a run that has only begun."""
    sections: dict[str, dict[str, Any]] = {
        key: {} for key in ("extract", "sae", "encode", "barcode", "concepts", "select", "atlas")
    }
    return recipe_text(parse_recipe({"images": {"source": str(images)}, **sections}, "a test"))


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of many patients; read-only."""
    root = tmp_path_factory.mktemp("cohort")
    make_cohort(root / "cohort")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert cyto(ATLAS.replace("-o new", "-o cohort/atlas")).exit_code == 0
    probed = Path(shutil.copytree(root / "cohort" / "barcodes", root / "cohort" / "probed"))
    header = read_header(probed, BARCODES)
    of_latents = {**header.spec["latents_spec"], "cache": {"width": 6, "trained": True}}
    write_header(probed, replace(header, spec={**header.spec, "latents_spec": of_latents}))
    return root / "cohort"


@pytest.fixture
def here(
    chain: Path, line: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """A copy to work in; Dask's jobs run in this process, and nothing is drawn."""
    root = Path(shutil.copytree(chain, tmp_path / "all"))
    if "cohort" in line:
        shutil.copytree(request.getfixturevalue("cohort"), root / "cohort")
    monkeypatch.chdir(root)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **more: Path(path).write_bytes(b"x"))
    [*commands()]  # all modules of commands are imported now
    gently = console.stopping_gently
    replace_everywhere(monkeypatch, gently, lambda what: nullcontext(lambda: False))  # signals: main thread only
    with local_client(1, 1) as client:
        monkeypatch.setattr("cytosae.cluster.open_client", lambda *given, **more: nullcontext(client))
        yield root


def cyto(line: str) -> Result:
    return CliRunner().invoke(cli.cli, shlex.split(line))


def contents(root: Path) -> dict[str, bytes]:
    """But for locks: who waits looks at them, and whoever may share one writes its name in."""
    paths = [path for path in root.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {str(path.relative_to(root)): path.read_bytes() for path in paths}


def replace_everywhere(patch: pytest.MonkeyPatch, before: Any, after: Any) -> None:
    """A function of ours, in every module that has it."""
    for module in [each for name, each in sys.modules.items() if name.startswith(("stores", "cyto", "cli"))]:
        for name, value in list(vars(module).items()):
            if value is before:
                patch.setattr(module, name, after)


def test_no_command_is_forgotten() -> None:
    listed = [*WRITING, *READING, *NEITHER]
    assert [name for name, _ in commands() if not any(f"{line} ".startswith(f"{name} ") for line in listed)] == []


@pytest.mark.parametrize("line", WRITING)
def test_the_second_of_two_is_told(line: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one line, and exits with 1; it changes nothing, and the first ends as if it were alone."""
    place = {"claim": r"\..*\.lock|\.cyto\.lock", "writer": r"writer-.*\.lock", "finish": r"finish\.lock"}[
        WRITING[line]
    ]
    told: list[tuple[int, str]] = []
    torn: list[str] = []
    real = files.locked

    def try_too() -> None:
        found = cyto(line)
        assert isinstance(found.exception, SystemExit), found.exception
        told.append((found.exit_code, found.stderr))  # no more: a kept traceback keeps what its command holds

    @contextmanager
    def held_up(path: Path, *, shared: bool = False) -> Iterator[bool]:
        with real(path, shared=shared) as is_ours:
            if is_ours and not told and re.fullmatch(place, path.name) and threading.current_thread() is main:
                before = contents(here)
                thread = threading.Thread(target=try_too)
                thread.start()
                thread.join()
                after = contents(here)
                torn.extend(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
                if line.startswith(LONG):
                    raise KeyboardInterrupt  # it would take a minute
            yield is_ours

    main = threading.current_thread()
    for module in (
        "cytocache.extract",
        "cytocache.repair",
        "cytosae.latents.encode",
        "stores.latent_shards",
        "stores.destination",
    ):
        importlib.import_module(module)
    replace_everywhere(monkeypatch, real, held_up)
    first = cyto(line)
    assert first.exit_code == (130 if line.startswith(LONG) else 0), first.output
    ((code, said),) = told
    assert code == 1
    (error,) = [each for each in said.splitlines() if each.startswith("Error")]
    assert re.search(r"being (written|completed) by another process|another process is writing", error)
    assert torn == []
    gc.collect()
    assert not [*here.rglob("*.lock")]
    made = here / next(word for word in ("damaged.zarr", "new.zarr", "new") if word in line.split() or word == "new")
    if made.is_dir() and not re.match("demo|run|sae export", line):
        assert verify(made).problems == []


@pytest.mark.parametrize(("line", "store"), [(line, store) for line, stores in READING.items() for store in stores])
def test_a_store_is_exchanged_under_its_reader(
    line: str, store: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After it was opened, and before anything was begun from it; or, where nothing is written, while it is read."""
    done: list[Path] = []

    def exchange_once(*given: Any) -> bool:
        if not done:
            done.append(here / store)
            exchange(here / store)
        return True

    if "-o new" in line or "select" in line:
        refuse, draw = output._refuse_place, selection.draw
        monkeypatch.setattr(output, "_refuse_place", lambda *given: exchange_once() and refuse(*given))
        monkeypatch.setattr(selection, "draw", lambda *given: exchange_once() and draw(*given))
    else:
        replace_everywhere(monkeypatch, console.progress_line, lambda *given: nullcontext(exchange_once))
    found = cyto(line)
    assert done
    assert found.exit_code == 1, found.output
    assert isinstance(found.exception, SystemExit), found.exception
    (error,) = [each for each in found.stderr.splitlines() if each.startswith("Error")]
    assert f"{Path(store).name} was replaced or changed by another command while it was read" in error
    for made in ("new", "new.zarr"):
        if (here / made).is_dir() and "sweep" not in line:
            with pytest.raises(ValueError, match="is incomplete"):
                verify(here / made)
