"""cyto run: a repeat does nothing, a changed line redoes its dependants, a kill costs nothing, hands do the same."""

import csv
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click import UsageError
from click.testing import CliRunner
from places import ROOT
from small_runs import DISEASES, FEW, LABELS, contents, draw_cohort, run_small

from cli import cli
from cytosae.commands.run import _settings
from cytosae.maps import write_mask_agreement
from cytosae.pipeline import RunConfig, RunPlan, read_recipe
from cytosae.pipeline.journal import Journal
from cytosae.pipeline.recipe import extract_settings, recipe_text, write_recipe
from cytosae.pipeline.run import _grouped
from cytosae.pipeline.stages import RunContext, Stage, evidence_in
from stores import ActivationStore, begin_results
from stores.errors import BadInput, SpecMismatch
from stores.shards import Shard
from stores.spec import MASKS
from stores.verify_any import verify_folder
from stores.wording import Report

pytestmark = [
    pytest.mark.usefixtures("no_waiting_for_the_disk", "one_thread"),
    pytest.mark.timeout(900),  # seconds of work, on a machine that may be busy
]


def _nothing(context: RunContext, overwrite: bool) -> Report:
    raise NotImplementedError  # the stages of these tests are compared and shown, never run


_STAGE = Stage(name="", out="", inputs=(), settings={}, command=(), do=_nothing)
STORES = ("cells.acts.zarr", "cells.sae", "cells.latents.zarr", "cells.barcodes", "cells.concepts", "atlas")
# what each stage reads, said again: the twin of the journal
READS = {
    "extract": (),
    "train": ("extract",),
    "encode": ("extract", "train"),
    "barcode": ("encode",),
    "concepts": ("encode",),
    "select": ("concepts",),
    "compare": ("barcode",),
    "probe disease": ("barcode", "extract"),
    "probe label": ("barcode", "extract"),
    "train again, seed 1": ("extract", "train"),  # the same settings
    "stability": ("train", "train again, seed 1"),
    "atlas": ("encode", "barcode", "concepts", "select", "compare", "stability"),
}


def dependants(stage: str) -> set[str]:
    """The stage and all that depend on it."""
    found = {stage}
    while more := {name for name, reads in READS.items() if found & {*reads}} - found:
        found |= more
    return found


def kinds(names: tuple[str, ...]) -> set[str]:
    """Names of stages, comparisons without their diseases."""
    return {"compare" if name.startswith("compare") else name for name in names}


def change_line(out: Path, section: str, name: str, value: str) -> None:
    """Change one line of the recipe, as a person would."""
    text = (out / "recipe.toml").read_text()
    before, head, after = text.partition(f"\n{section}\n")
    assert head
    changed, n = re.subn(rf"^{name} = .*$", f"{name} = {value}", after, count=1, flags=re.MULTILINE)
    assert n == 1
    assert changed != after
    (out / "recipe.toml").write_text(before + head + changed)


def test_all_is_there_and_whole(finished: Path) -> None:
    for place in (*(finished / name for name in STORES), *(finished / "compare").iterdir()):
        assert verify_folder(place).problems == []
    for level in ("disease", "label"):
        assert (finished / "probe" / level / "scores.json").is_file()
    recipe = read_recipe(finished / "recipe.toml")
    assert recipe.train_config.expansion == FEW["sae"]["expansion"]
    assert (recipe.compare[0]["a"], recipe.compare[0]["b"]) == tuple(sorted(DISEASES))
    assert recipe.why["sae.expansion"] == "asked for"


@pytest.mark.stress
def test_a_repeat_does_nothing(copied: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("*") if path.is_file()}
    for source, out in ((copied / "recipe.toml", None), (copied / "cells.csv", copied)):
        done = run_small(source, out)
        assert done.was_complete
        assert not done.made
        now = {path: path.stat().st_mtime_ns for path in copied.rglob("*") if path.is_file()}
        pictures = {path for path in now if path.suffix == ".png" and path.parent == copied}  # the report draws them
        assert {path for path in now if now[path] != before.get(path)} <= pictures
        assert now.keys() == before.keys()


@pytest.mark.stress
@pytest.mark.usefixtures("quick_figures")
@pytest.mark.parametrize(
    ("section", "name", "value", "stage"),
    [
        ("[atlas]", "n_images", "3", "atlas"),
        ("[[compare]]", "top", "3", "compare"),
        ("[[probe]]", "permutations", "3", "probe disease"),
        ("[barcode]", "tau", "0.01", "barcode"),
        ("[sae]", "lr", "0.002", "train"),
    ],
)
def test_a_changed_line_redoes_what_depends_on_it(
    copied: Path, section: str, name: str, value: str, stage: str
) -> None:
    """And nothing else, nor is anything else written; the line that is changed back gives what was there before."""
    before = contents(copied)
    change_line(copied, section, name, value)
    plans: list[RunPlan] = []
    done = run_small(copied / "recipe.toml", None, tell_plan=plans.append)
    assert kinds(done.made) == dependants(stage)
    planned = {each.stage.name: each.why for each in plans[0].to_do}
    assert kinds(tuple(planned)) == dependants(stage)
    told = next(why for each, why in planned.items() if kinds((each,)) == {stage})
    assert told.startswith(f"again: {name} ")
    after = contents(copied)
    touched = {path.split("/")[0] for path in before if before[path] != after.get(path)}
    tops = {"train": "cells.sae", "barcode": "cells.barcodes", "select": "cells.concepts"}
    tops |= {"compare": "compare", "atlas": "atlas"}
    assert stage not in tops or tops[stage] in touched
    untouched = {"extract": "cells.acts.zarr", "train": "cells.sae", "encode": "cells.latents.zarr"}
    assert not {untouched[each] for each in untouched.keys() - dependants(stage)} & touched
    shutil.copy(copied / "recipe.toml", copied / "changed")
    recipe = read_recipe(copied / "recipe.toml")
    assert tomllib.loads(recipe_text(recipe)) == tomllib.loads((copied / "recipe.toml").read_text())


@pytest.mark.stress
def test_changed_back_is_as_before(copied: Path) -> None:
    before = contents(copied)
    original = (copied / "recipe.toml").read_bytes()
    change_line(copied, "[barcode]", "tau", "0.01")
    run_small(copied / "recipe.toml", None)
    (copied / "recipe.toml").write_bytes(original)
    run_small(copied / "recipe.toml", None)
    assert contents(copied) == before


@pytest.mark.stress
def test_commands_by_hand_make_the_same(copied: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each line of commands.sh, with names that a shell would take apart, in a folder with images and recipe alone."""
    by_hand = tmp_path / "by hand" / "out"
    shutil.copytree(copied / "cells", by_hand / "cells")
    for name in ("recipe.toml", "commands.sh", "cells.csv"):
        shutil.copy(copied / name, by_hand / name)
    monkeypatch.chdir(by_hand)
    subprocess.run(["sh", "-n", "commands.sh"], check=True)
    lines = (by_hand / "commands.sh").read_text().splitlines()
    commands = [shlex.split(line) for line in lines if line.startswith("cyto ")]
    assert len(commands) == len(kinds_of(copied)) + 1  # and the report
    for command in commands:
        done = CliRunner().invoke(cli, command[1:])
        assert done.exit_code == 0, (command, done.output)
    made, expected = contents(by_hand), contents(copied)
    assert made.keys() == expected.keys()
    assert [name for name in made if made[name] != expected[name]] == []


def kinds_of(out: Path) -> list[str]:
    """The stages that a run has recorded."""
    return list(json.loads((out / "stages.json").read_text())["stages"])


@pytest.mark.stress
def test_killed_and_continued_is_the_same(finished: Path, tmp_path: Path) -> None:
    """SIGKILL in the extraction, in the training and while barcodes are counted."""
    out = tmp_path / "out"
    shutil.copytree(finished / "cells", out / "cells")
    for name in ("recipe.toml", "cells.csv"):
        shutil.copy(finished / name, out / name)
    code = "from cyto_start import start; start()"
    command = [sys.executable, "-c", code, "run", str(out / "recipe.toml"), "--device", "cpu", "--workers", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}  # threads as here, for equal bits
    for sign in ("cells.acts.zarr", "cells.sae", "cells.barcodes", "atlas"):
        process = subprocess.Popen(
            command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        began = time.monotonic()
        while not (out / sign).exists() and process.poll() is None and time.monotonic() - began < 120:
            time.sleep(0.02)
        assert process.poll() is None, f"ended before it was killed at {sign}"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    here, there = contents(out), contents(finished)
    assert here.keys() == there.keys()
    assert [name for name in here if here[name] != there[name]] == []


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    table = draw_cohort(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    done = run_small(table, tmp_path / "out", dry_run=True)
    text = "\n".join(done.plan.lines())
    assert sorted(tmp_path.rglob("*")) == before
    assert "in all about" in text
    assert "40 images" in text
    assert "nothing was written" in str(done)
    assert [each.stage.name for each in done.plan.to_do][:3] == ["extract", "train", "encode"]


@pytest.mark.stress
def test_an_sae_that_is_given_is_used_and_none_is_trained(copied: Path, tmp_path: Path) -> None:
    done = run_small(
        copied / "cells.csv",
        tmp_path / "given",
        config=RunConfig(sae=copied / "cells.sae", settings={key: FEW[key] for key in FEW if key != "sae"}),
    )
    assert "train" not in done.made
    assert not (tmp_path / "given" / "cells.sae").exists()
    made, expected = contents(tmp_path / "given"), contents(copied)
    stores = ("cells.latents.zarr/", "cells.barcodes/", "cells.concepts/")
    assert [name for name in made if name.startswith(stores) and made[name] != expected[name]] == []


@pytest.mark.stress
@pytest.mark.usefixtures("quick_figures")
def test_two_shards_share_the_work(copied: Path, tmp_path: Path) -> None:
    """Each is run until nothing is left; the second never does what cannot be shared."""
    out, table = tmp_path / "shared", copied / "cells.csv"
    first, second = Shard(0, 2), Shard(1, 2)
    told = run_small(table, out, shard=second)
    assert "other shards are not" in told.waits_for
    assert "train" in run_small(table, out, shard=first).made
    again = run_small(table, out, shard=second)
    assert "is for shard 0 of 2" in again.waits_for or again.made == ("encode",)
    done = run_small(table, out, shard=first)
    assert not done.waits_for
    made, expected = contents(out), contents(copied)
    stores = ("cells.acts.zarr/tokens", "cells.barcodes/")
    assert [name for name in made if name.startswith(stores) and made[name] != expected[name]] == []


@pytest.mark.stress
@pytest.mark.parametrize("has_labels", [False, True])
def test_a_folder_of_images_is_enough(tmp_path: Path, has_labels: bool) -> None:
    """No table, hence no patient: everything that does not need one is made, up to atlas and report."""
    table = draw_cohort(tmp_path / "drawn")
    with table.open(newline="") as file:
        paths = [row["path"] for row in csv.DictReader(file)]
    for n, path in enumerate(paths):
        source = table.parent / path
        place = tmp_path / "cells" / (LABELS[n % 3] if has_labels else "") / source.name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, place)
    done = run_small(tmp_path / "cells", tmp_path / "out", config=RunConfig(settings=FEW))
    assert {"extract", "train", "encode", "barcode", "concepts", "select", "atlas"} <= {*done.made}
    assert ("probe label" in done.made) == has_labels
    assert {"comparisons", "probe of disease"} <= done.left_out.keys()
    first = (tmp_path / "out" / "atlas" / "index.html").read_text()
    assert "patients.html" not in first
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000


@pytest.mark.stress
def test_refusals_are_one_line(copied: Path, tmp_path: Path) -> None:
    table = copied / "cells.csv"
    other = {**FEW, "sae": {**FEW["sae"], "expansion": 4}}
    with pytest.raises(SpecMismatch, match=r"recipe.toml has other settings \(sae.expansion 2 against 4\); cyto run"):
        run_small(table, copied, config=RunConfig(settings=other, stability=True))
    with pytest.raises(BadInput, match="lies in the folder of the images"):
        run_small(copied / "cells", copied / "cells" / "out")
    with pytest.raises(BadInput, match=r"no such section; there are extract, sae"):
        run_small(tmp_path / "none.csv", tmp_path / "new", config=RunConfig(settings={"sea": {"k": 3}}))
    with pytest.raises(BadInput, match=r"sets kk, which is no setting"):
        run_small(tmp_path / "none.csv", tmp_path / "new", config=RunConfig(settings={"sae": {"kk": 3}}))
    settings = {"probe": {"image-label": {"seed": "x"}}}
    with pytest.raises(BadInput, match=r"--set: probe.seed must be int; found 'x'"):
        run_small(tmp_path / "none.csv", tmp_path / "new", config=RunConfig(settings=settings))
    settings = {"probe": {"image-label": {"classes": "AML"}}}
    with pytest.raises(BadInput, match=r"--set: probe.classes must be a list, \[...\]; found 'AML'"):
        run_small(tmp_path / "none.csv", tmp_path / "new", config=RunConfig(settings=settings))
    with pytest.raises(BadInput, match=r"--memory-limit must be a size like 2GiB; found 'lots'"):
        run_small(table, tmp_path / "new", memory_limit="lots", dry_run=True)  # not after hours of training
    (tmp_path / "thesis" / "cells.sae").mkdir(parents=True)
    with pytest.raises(SpecMismatch, match=r"holds cells.sae but no recipe.toml"):
        run_small(table, tmp_path / "thesis")
    with pytest.raises(BadInput, match=r"is the folder of a run; go on with cyto run .*recipe.toml"):
        run_small(copied, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    done = CliRunner().invoke(cli, ["run", str(copied / "recipe.toml"), "--backbone", "dinobloom-b"])
    assert done.exit_code == 2
    assert "leave out --backbone" in done.output


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("[sea]\nk = 3", "section sea, which no recipe has"),
        ("[[compare]]\nname = '../../etc'\na = 'x'\nb = 'y'", r"needs a name of its own.*found '../../etc'"),
        ("[stability]\nseed = 'one'", "stability.seed must be int; found 'one'"),
        ("[stability]\nsead = 1", "stability.sead is no setting; there are seed"),
        ("[stability]", r"\[stability\] lacks the seed of the second SAE: seed = 1"),
        ("[stability]\nseed = 0", "stability.seed must be another one than sae.seed.*; found 0 twice"),
        ("[[compare]]\nname = 'mine'\na = 'x'", r"\[\[compare\]\] mine lacks b: a = \"...\", b = \"...\""),
    ],
)
def test_a_recipe_that_cannot_be_used(copied: Path, line: str, words: str) -> None:
    path = copied / "recipe.toml"
    text = path.read_text().replace("[stability]\nseed = 1\n", "")
    path.write_text(f"{text}\n{line}\n")
    with pytest.raises(BadInput, match=words):
        read_recipe(path)


def test_image_files_that_have_changed_since_are_named(copied: Path) -> None:
    """A torn file is copied again, another is replaced, a third is gone: what is there is of none of these."""
    images = ActivationStore(copied / "cells.acts.zarr").images
    paths, errors = images["path"].to_pylist(), images["error"].to_pylist()
    torn = next(path for path, error in zip(paths, errors, strict=True) if error is not None)
    others = [path for path in paths if path != torn]
    assert not plan_of(copied).warnings  # all files were copied, and are the same
    shutil.copy(copied / others[0], copied / torn)
    shutil.copy(copied / others[2], copied / others[1])
    (copied / others[3]).unlink()
    plan = plan_of(copied)
    assert not plan.to_do
    (warning,) = plan.warnings
    named = {path for path in paths if path in warning}
    assert warning.startswith(f"3 of {len(paths)} image files are others than those that were extracted, or gone (")
    assert named == {torn, others[1], others[3]}
    assert warning.endswith(f"For the files of now: cyto run {copied / 'recipe.toml'} -o DIR, a new folder")
    done = run_small(copied / "recipe.toml", copied.parent / "new", dry_run=True)
    assert not done.plan.changed
    assert "extract" in {each.stage.name for each in done.plan.to_do}


def plan_of(out: Path) -> RunPlan:
    """What a run of the recipe would do."""
    return run_small(out / "recipe.toml", None, dry_run=True).plan


def test_recipes_are_read_as_written(finished: Path, tmp_path: Path) -> None:
    """Also texts that TOML must escape."""
    recipe = read_recipe(finished / "recipe.toml")
    strange = 'a "b"\\ \n\t\x7f\x01 \N{RIGHT-TO-LEFT OVERRIDE} $x = [y] # \N{SNOWMAN}'
    changed = replace(recipe, images={"source": strange}, why={strange: strange}, compare=(), probe=())
    write_recipe(changed, tmp_path / "recipe.toml")
    again = read_recipe(tmp_path / "recipe.toml")
    assert again == changed
    assert again.why == {strange: strange}


# ------------------------------------------------------------------------ settings that would only fail hours later


@pytest.mark.stress
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sae": {"use": "x.sae"}}, "--set sae.use is about an SAE that is there; give that SAE with --sae"),
        ({"sae": {"assume_compatible": True}}, "--set sae.assume_compatible is about an SAE that is there"),
        ({"compare": {"name": "../../out"}}, r"\[\[compare\]\] needs a name of its own"),
        ({"probe": {"name": "same"}}, r"\[\[probe\]\] needs a name of its own"),  # for both
        ({"encode": {"value_bits": 99}}, "section encode: value_bits must be one of 10, 23; found 99"),
        ({"encode": {"min_activation": 0.1}}, r"encode.min_activation must be 0 in a run, .* found 0\.1"),
        ({"compare": {"a": "x"}}, r"--set compare.a: each \[\[compare\]\] needs a a of its own"),
        ({"probe": {"disease": {"target": "x"}}}, r"--set probe.target: each \[\[probe\]\] needs a target of its own"),
        ({"probe": {"nobody": {"folds": 3}}}, r"--set probe.nobody: no \[\[probe\]\] .*; there are disease, label"),
    ],
)
def test_settings_are_refused_before_anything_is_written(
    tmp_path: Path, settings: dict[str, dict[str, object]], words: str
) -> None:
    table = draw_cohort(tmp_path)
    with pytest.raises(BadInput, match=words):
        run_small(table, tmp_path / "out", config=RunConfig(settings={**FEW, **settings}), dry_run=True)
    assert not (tmp_path / "out").exists()


def test_a_setting_of_one_comparison_or_probe_leaves_the_others(tmp_path: Path) -> None:
    table = draw_cohort(tmp_path)
    given = _settings(("probe.permutations=4", "probe.label.permutations=3", "probe.disease.folds=4"))
    config = RunConfig(settings={**FEW, **given})
    recipe = run_small(table, tmp_path / "out", config=config, dry_run=True).plan.recipe
    assert {each["name"]: (each["permutations"], each["folds"]) for each in recipe.probe} == {
        "disease": (4, 4),
        "label": (3, recipe.probe[1]["folds"]),
    }
    assert recipe.probe[1]["folds"] != 4
    (name,) = (each["name"] for each in recipe.compare)
    assert _settings((f"compare.{name}.v1.top=5",)) == {"compare": {f"{name}.v1": {"top": 5}}}
    with pytest.raises(UsageError, match="is a setting and cannot be the name of a compare"):
        _settings(("compare.top=5", "compare.top.b=5"))


@pytest.mark.stress
@pytest.mark.usefixtures("quick_figures")
def test_what_was_made_again_by_hand_is_not_replaced_without_a_word(copied: Path) -> None:
    """With other settings; with the same ones it is taken."""
    concepts = copied / "cells.concepts"
    by_hand = ["concept", "select", str(concepts), "--overwrite"]
    done = CliRunner().invoke(cli, [*by_hand, "--clusters", "2", "--per-cluster", "1", "--threshold", "0"])
    assert done.exit_code == 0, done.output
    mine = (concepts / "selection.parquet").read_bytes()
    recipe = copied / "recipe.toml"
    for change in (lambda: None, lambda: change_line(copied, "[select]", "per_cluster", "3")):
        change()
        with pytest.raises(SpecMismatch, match=r"is a selection with other .*was not made by cyto run"):
            run_small(recipe, None)
        assert (concepts / "selection.parquet").read_bytes() == mine
    change_line(copied, "[select]", "clusters", "2")
    change_line(copied, "[select]", "per_cluster", "1")
    assert "atlas" in run_small(recipe, None).made
    assert (concepts / "selection.parquet").read_bytes() == mine
    done = CliRunner().invoke(cli, [*by_hand, "--clusters", "3", "--per-cluster", "1", "--threshold", "0"])
    assert run_small(recipe, None, overwrite=True).made
    assert (concepts / "selection.parquet").read_bytes() == mine


def test_shards_do_not_lose_each_others_records(tmp_path: Path) -> None:
    """Two journals that were read at the same time, and a hundred at once from many processes' worth of threads."""
    first, second = Journal.read(tmp_path), Journal.read(tmp_path)
    stages = [replace(_STAGE, name=f"stage {k}", out=f"{k}.out") for k in range(100)]
    first.record(stages[0], {}, "0", seconds=1)
    first.leave_out(stages[1], "too few")
    first.write()
    second.record(stages[2], {}, "2", seconds=1)
    second.leave_out(stages[3], "too few")
    second.write()
    there = Journal.read(tmp_path)
    assert there.stages.keys() == {"0.out", "2.out"}
    assert there.left_out.keys() == {"stage 1", "stage 3"}
    first.refresh()
    assert first.why_stale(stages[2], {}, "2") == ""
    second.record(stages[1], {}, "1", seconds=1)  # now the data allow it
    second.write()
    first.write()
    assert Journal.read(tmp_path).left_out.keys() == {"stage 3"}

    def record(stage: Stage) -> None:
        journal = Journal.read(tmp_path)
        journal.record(stage, {}, stage.out, seconds=1)
        journal.write()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(record, stages))
    assert Journal.read(tmp_path).stages.keys() == {stage.out for stage in stages}
    assert [path.name for path in tmp_path.iterdir()] == ["stages.json"]


@pytest.mark.stress
def test_a_budget_that_is_given_has_no_reasons_of_another_one(tmp_path: Path) -> None:
    table = draw_cohort(tmp_path)
    whys = []
    for budget in ({"tokens": "auto"}, {"tokens": 20_000}, {"epochs": 2.0}):
        config = RunConfig(settings={**FEW, "sae": {"expansion": 2, **budget}})
        done = run_small(table, tmp_path / "out", config=config, dry_run=True)
        whys.append({name for name in done.plan.recipe.why if name in ("sae.tokens", "sae.epochs", "sae.holdout")})
    assert whys == [{"sae.tokens"}, {"sae.tokens"}, {"sae.epochs"}]
    chosen = run_small(table, tmp_path / "out", config=RunConfig(), dry_run=True).plan.recipe
    assert chosen.why["sae.holdout"].startswith("a share of the images")
    assert chosen.train_config.holdout > 0


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no recipe at .*: expected the recipe.toml of a run"):
        run_small(tmp_path / "recipe.toml", None, dry_run=True)


def test_a_name_that_toml_cannot_hold_is_told(tmp_path: Path) -> None:
    source = tmp_path / os.fsdecode(b"Zelle\xe9")
    shutil.copytree(draw_cohort(tmp_path).parent / "cells", source)
    with pytest.raises(BadInput, match="is not UTF-8, which a recipe cannot hold; rename it"):
        run_small(source, tmp_path / "out", dry_run=True, config=RunConfig())


@pytest.mark.stress
def test_a_file_of_a_recipe_is_looked_for_beside_it(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`weights = "w.pth"` lies in the folder of the run, wherever the command is typed."""
    (copied / "w.pth").write_bytes(b"no weights")
    recipe = read_recipe(copied / "recipe.toml")
    recipe = replace(recipe, extract={**recipe.extract, "weights": "w.pth", "backbone": "dinobloom-s"})
    assert extract_settings(recipe, copied)["weights"] == str(copied / "w.pth")
    assert extract_settings(recipe, copied)["backbone"] == "dinobloom-s"
    write_recipe(recipe, copied / "recipe.toml")
    monkeypatch.chdir("/")
    for out in (None, copied.parent / "other"):
        with pytest.raises(BadInput, match=r"out/w\.pth"):
            run_small(copied / "recipe.toml", out)


@pytest.mark.stress
@pytest.mark.usefixtures("quick_figures")
def test_what_the_data_do_not_allow_any_more_is_shown_nowhere(copied: Path) -> None:
    """A comparison and a draw that were made, and cannot be with new settings: atlas and report do not use the old."""
    change_line(copied, "[select]", "threshold", "1e9")
    change_line(copied, "[[compare]]", "a", '"nobody"')
    change_line(copied, "[barcode]", "tau", "0.01")
    done = run_small(copied / "recipe.toml", None)
    assert {"select", *(name for name in done.left_out if name.startswith("compare nobody"))} <= done.left_out.keys()
    assert any(name.startswith("compare nobody") for name in done.left_out)
    assert not (copied / "cells.concepts" / "selection.parquet").exists()
    report = (copied / "report.html").read_text()
    assert 'id="comparisons"' not in report
    assert "drawn from cluster" not in report
    plans: list[RunPlan] = []
    again = run_small(copied / "recipe.toml", None, tell_plan=plans.append)
    assert again.was_complete


@pytest.mark.stress
@pytest.mark.usefixtures("quick_figures")
def test_the_atlas_shows_what_other_commands_put_into_the_folder(copied: Path) -> None:
    """Masks of these latents: the atlas is built again, and nothing else; a folder of mask files is none of ours."""
    (copied / "masks").mkdir()
    assert evidence_in(copied) == ()
    assert run_small(copied / "recipe.toml", None).was_complete
    half = np.zeros((1, 16, 16))
    half[:, :8] = 1
    write_mask_agreement(copied / "cells.latents.zarr", {0: half, 1: half}, copied / "masks", n_shuffles=0)
    assert evidence_in(copied) == ("masks",)
    done = run_small(copied / "recipe.toml", None)
    assert done.made == ("atlas",)
    assert any("Where in the cell" in path.read_text() for path in (copied / "atlas" / "concepts").iterdir())
    command = next(line for line in (copied / "commands.sh").read_text().splitlines() if "atlas build" in line)
    assert "--masks masks" in command
    assert run_small(copied / "recipe.toml", None).was_complete
    change_line(copied, "[sae]", "lr", "0.002")  # other latents, of which these masks are not
    assert {"encode", "atlas"} <= {*run_small(copied / "recipe.toml", None).made}
    assert "--masks" not in (copied / "commands.sh").read_text()
    assert run_small(copied / "recipe.toml", None).was_complete
    begin_results(copied / "masks", MASKS, {"latents": "0" * 64}, overwrite=True).finish({})
    assert evidence_in(copied) == (), "of other latents"


def test_warnings_that_differ_in_numbers_only_are_told_once() -> None:
    doubts = [
        ("compare a against b", "q <= 0.05 takes 5 latents, or --permutations 45720"),
        ("compare a against c", "q <= 0.05 takes 5 latents, or --permutations 43,500"),
        ("probe disease", "the backbone is UNTRAINED"),
        ("probe label", "the backbone is UNTRAINED"),
        ("probe label", "the backbone is UNTRAINED"),
        ("train", "3 images are left out"),
    ]
    assert [*_grouped(doubts)] == [
        "compare a against b: q <= 0.05 takes 5 latents, or --permutations 45720 (and 1 other stage, with other "
        "numbers)",
        "probe disease, probe label: the backbone is UNTRAINED",
        "train: 3 images are left out",
    ]
