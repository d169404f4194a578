"""Names of latents: which images are shown and kept back, what leaves, who answers, and that planted truth is found."""

import base64
import hashlib
import io
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from command_line import fails, run
from named_cells import N_LATENTS, SECRETS, World, guessing, make_world, seeing
from PIL import Image

from cytosae.maps import Sources, patch_map, read_tokens
from cytosae.names import AskConfig, DescribeConfig, DescribeResult, describe_latents, plan_describe, read_names
from cytosae.names import activations as activations_module
from cytosae.names import items as items_module
from cytosae.names.activations import blocks_of_latents, means_of_images, read_activations
from cytosae.names.answers import Unfit, answer_of, default_answers, one_line, read_answers
from cytosae.names.choose import choose_images, divide_images
from cytosae.names.sheet import draw_sheet
from stores import CONCEPTS, NAMES, BarcodeStore, ResultStore
from stores.errors import BadInput, DamagedStore, SpecMismatch
from stores.verify_any import verify_folder

LATENTS = [*range(N_LATENTS)]
QUICK = AskConfig(n_bootstraps=200, shuffles=1)
TRUE = {0: "red square", 1: "green square", 2: "blue square", 3: "ragged rim"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("names"))


@pytest.fixture(scope="module")
def named(world: World) -> Path:
    """Items, names of two sources, and the scores of two judges; read only."""
    out = world.root / "named"
    describe(world, out, command=knowing(world, out), by="Dr. Who", judge=seeing)
    describe(world, out, judge=guessing(0), judge_by="a guess")
    return out


def describe(world: World, out: Path, **settings: Any) -> DescribeResult:
    settings = {"latents": LATENTS, "ask": QUICK, **settings}
    return describe_latents(*world.inputs, out, **settings)


def knowing(world: World, out: Path) -> Any:
    """Answers with the true name of the latent whose sheet it gets."""

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        latent = next(n for n in TRUE if (out / "items" / f"latent{n}.png").read_bytes() == sheet_of(request))
        return {"name": TRUE[latent], "text": "as it was\npainted", "confidence": 4}

    return answer


def copy_of(named: Path, tmp_path: Path) -> Path:
    """The named items with their answers, to be changed."""
    for source, target in ((named, tmp_path / "copy"), (default_answers(named), default_answers(tmp_path / "copy"))):
        shutil.copytree(source, target)
    return tmp_path / "copy"


def sheet_of(request: dict[str, Any]) -> bytes:
    return base64.b64decode(request["picture"]["base64"])


def images_of(out: Path) -> list[dict[str, Any]]:
    return list(ResultStore(out, NAMES).table("images").to_pylist())


# ------------------------------------------------------------------------------------------- which images


def test_activations_equal_the_dense_means(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = means_of_images(BarcodeStore(world.root / "barcodes"), None)
    for block in (1 << 22, 7):
        monkeypatch.setattr(activations_module, "BLOCK", block)
        for latent, images, values in read_activations(reader, [3, 0, 4]):
            assert images.tolist() == np.flatnonzero(world.means[:, latent]).tolist()
            assert values.tolist() == world.means[images, latent].tolist()
    assert blocks_of_latents([5, 0, 1, 2], np.array([4, 9, 1, 0, 0, 2]), most=6) == [[5, 0], [1], [2]]


def test_no_patient_is_on_both_sides_and_no_shown_image_is_tested(world: World, named: Path) -> None:
    rows = images_of(named)
    split = ResultStore(named, NAMES).table("split").to_pylist()
    side_of = {row["image_id"]: row["side"] for row in split}
    patient_of = dict(zip(world.images.index, world.images["patient"], strict=True))
    by_side = {side: {patient_of[name] for name, on in side_of.items() if on == side} for side in ("shown", "test")}
    assert not by_side["shown"] & by_side["test"]
    assert all(len(patients) >= 8 for patients in by_side.values())
    assert side_of[world.images.index[9]] == ""  # unreadable
    assert side_of[world.images.index[20]] == side_of[world.images.index[21]]  # the same bytes, two patients
    assert all(side_of[row["image_id"]] == row["side"] for row in rows)
    top = {
        (latent, int(image)) for latent in LATENTS for image in np.argsort(-world.means[:, latent], kind="stable")[:4]
    }
    assert not {(row["latent"], row["image_index"]) for row in rows if row["side"] == "test"} & top


@pytest.mark.stress
def test_chosen_images_are_what_they_are_called(world: World, named: Path) -> None:
    """By the dense latents: strong ones are the strongest tenth (or the fewest asked for), the last are not active."""
    rows = images_of(named)
    split = {row["image_id"]: row["side"] for row in ResultStore(named, NAMES).table("split").to_pylist()}
    sides = np.array([split[name] for name in world.images.index])
    for latent in TRUE:
        for side, n_strong, n_weaker, n_inactive in (("shown", 12, 6, 6), ("test", 10, 10, 20)):
            mine = [row for row in rows if (row["latent"], row["side"]) == (latent, side)]
            named_rows = {name: [row["image_index"] for row in mine if row["row"] == name] for name in
                          ("strong", "weaker", "not active")}  # fmt: skip
            strong, weaker, inactive = named_rows.values()
            assert (len(strong), len(weaker), len(inactive)) == (n_strong, n_weaker, n_inactive)
            assert len({*strong, *weaker, *inactive}) == len(mine)
            value = world.means[:, latent]
            assert value[strong].min() >= value[weaker].max() > 0
            assert not value[inactive].any()
            assert (sides[[*strong, *weaker, *inactive]] == side).all()
            patients = [world.images["patient"].iloc[image] for image in strong]
            assert len({*patients}) >= 5
            for row in mine:
                assert row["activation"] == pytest.approx(value[row["image_index"]])
                assert (row["matched_by"] is None) == (row["row"] != "not active")
            known = {world.images["patient"].iloc[image] for image in [*strong, *weaker]}
            by_patient = [row for row in mine if row["matched_by"] == "patient"]
            assert len(by_patient) >= n_inactive / 2
            assert {world.images["patient"].iloc[row["image_index"]] for row in by_patient} <= known
    order = [row["row"] for row in rows if (row["latent"], row["side"]) == (0, "test")]
    assert order != sorted(order)  # the order of a test says nothing
    without = {row["latent"]: row["reason"] for row in ResultStore(named, NAMES).table("latents").to_pylist()}
    assert "0 test images" in without[4] or "only" in without[4]


def test_a_latent_that_is_always_active_is_held_against_the_least_active(world: World) -> None:
    images = divide_images(world.images, DescribeConfig())
    values = np.linspace(1, 2, len(world.images)).astype(np.float32)
    choice = choose_images(images, 0, np.arange(len(values)), values, np.array([], np.int64), DescribeConfig())
    for side, number in (("shown", 0), ("test", 1)):
        mine = [row for row in choice.rows if row["side"] == side]
        members = np.flatnonzero(images.side == number)
        least = {*members[: len(members) // 4].tolist()}
        assert {row["image_index"] for row in mine if row["row"] == "least active"} <= least
        assert {row["row"] for row in mine} == {"strong", "weaker", "least active"}
        upper = {*members[len(members) - len(members) // 2 - 1 :].tolist()}
        assert {row["image_index"] for row in mine if row["row"] != "least active"} <= upper


def test_few_patients_are_divided_by_image_and_that_is_said(world: World) -> None:
    one = world.images.assign(patient="Quentin 00", dataset="ward 0")
    images = divide_images(one, DescribeConfig())
    assert "1 patients are too few" in images.doubts[0]
    assert {*images.side.tolist()} == {-1, 0, 1}
    assert not divide_images(world.images.assign(patient=""), DescribeConfig()).doubts


def test_images_of_few_patients_are_still_theirs(tmp_path: Path) -> None:
    """Three patients, two with an image in common: each image was a patient, in items, pairs and intervals."""
    few, out = make_world(tmp_path, n_patients=3), tmp_path / "n"
    describe(few, out, latents=[0, 1], command=lambda request: {"name": "a square"}, judge=seeing)
    rows = images_of(out)
    assert {row["matched_by"] for row in rows if row["row"] == "not active"} == {"patient"}
    assert len({row["patient_group"] for row in rows}) == 2
    side_of = {row["image_id"]: row["side"] for row in ResultStore(out, NAMES).table("split").to_pylist()}
    assert {*side_of.values()} == {"shown", "test", ""}
    assert side_of[few.images.index[20]] == side_of[few.images.index[21]]  # the same bytes
    item = json.loads((out / "items" / "latent0.json").read_text())
    assert item["statistics"]["n_patients"] == 2
    for row in pq.read_table(out / "detection.parquet").to_pylist():
        assert (row["n_patients"], row["auc_low"], row["difference_low"]) == (2, None, None)


def test_inactive_images_of_the_same_label(world: World, tmp_path: Path) -> None:
    describe(world, tmp_path / "n", config=DescribeConfig(match="label"), latents=[0])
    rows = images_of(tmp_path / "n")
    label = world.images["label"].to_numpy()
    for side in ("shown", "test"):
        mine = [row for row in rows if row["side"] == side]
        inactive = [row for row in mine if row["row"] == "not active"]
        assert {row["matched_by"] for row in inactive} == {"label"}
        active = [row for row in mine if row["row"] != "not active"][: len(inactive)]
        if side == "test":  # in the order of the draw: as many of each label
            active = [row for row in mine if row["row"] != "not active"]
        shares = [np.mean([label[row["image_index"]] == "kind 0" for row in some]) for some in (active, inactive)]
        assert abs(shares[0] - shares[1]) < 0.11


# ------------------------------------------------------------------------------------------- what an item says


@pytest.mark.stress
def test_an_item_says_nothing_that_must_not_leave(world: World, named: Path, tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    def listen(request: dict[str, Any]) -> dict[str, Any]:
        seen.append(request)
        return {"name": ""}

    describe(world, copy_of(named, tmp_path), command=listen, by="listener")
    assert len(seen) == 4
    for request in seen:
        assert request["task"] == "name"
        assert hashlib.sha256(sheet_of(request)).hexdigest() == request["picture"]["sha256"]
        assert Path(request["picture"]["path"]).read_bytes() == sheet_of(request)
        sheet = Image.open(io.BytesIO(sheet_of(request)))
        assert sheet.width <= 1568
        said = json.dumps({**request, "picture": None})
        assert not any(word in said for word in (*SECRETS, "kind 0", "latent"))
        assert request["statistics"]["n_patients"] == pytest.approx(10, abs=1)
        assert [image["number"] for image in request["statistics"]["images"]] == [*range(1, 25)]


def test_statistics_are_those_of_the_pictures(world: World, named: Path) -> None:
    said = json.loads((named / "items" / "latent1.json").read_text())["statistics"]
    rows = {row["number"]: row for row in images_of(named) if (row["latent"], row["side"]) == (1, "shown")}
    store = world.sources.stores[0]
    for image in said["images"]:
        patches = patch_map(read_tokens(store, rows[image["number"]]["image_index"]), 1, store.layout)
        assert image["share_of_patches_active"] == pytest.approx((patches > 0).mean(), rel=1e-3)
        at = image["strongest_patch"]
        assert at is None if not patches.any() else patches[tuple(at)] == patches.max()


def test_items_are_equal_when_made_again_and_after_an_interruption(
    world: World, named: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, drawn = tmp_path / "again", list[bytes]()

    def break_off(*arguments: Any, **settings: Any) -> bytes:
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(draw_sheet(*arguments, **settings))
        return bytes(drawn[-1])

    monkeypatch.setattr(items_module, "draw_sheet", break_off)
    with pytest.raises(KeyboardInterrupt):
        describe(world, out)
    monkeypatch.undo()
    before = {path.name: path.stat().st_mtime_ns for path in (out / "items").iterdir()}
    describe(world, out)
    after = {path.name: path.stat().st_mtime_ns for path in (out / "items").iterdir()}
    assert len(before) == 4  # two sheets, two JSON files
    assert before.items() <= after.items()  # they were not drawn again
    for path in sorted((named / "items").iterdir()):
        assert path.read_bytes() == (out / "items" / path.name).read_bytes()
    assert images_of(named) == images_of(out)


def test_labels_are_told_when_asked_for(world: World, tmp_path: Path) -> None:
    describe(world, tmp_path / "n", config=DescribeConfig(labels=True), latents=[2])
    said = json.loads((tmp_path / "n" / "items" / "latent2.json").read_text())["statistics"]
    shown = [row for row in images_of(tmp_path / "n") if row["side"] == "shown" and row["row"] == "strong"]
    label = world.images["label"].to_numpy()
    for name in ("kind 0", "kind 1"):
        assert said["labels_of_strong"].get(name, 0) == sum(label[row["image_index"]] == name for row in shown)


# ------------------------------------------------------------------------------------------- planted truth


def test_a_judge_that_sees_supports_true_names_alone(named: Path) -> None:
    """True names of visible features score 1 and are supported; that of a random latent, and all others' names, 0.5."""
    names = read_names(named)
    for latent in (0, 1, 2):
        (name,) = names.of(latent)
        assert (name.name, name.given_by, name.source, name.saw) == (TRUE[latent], "Dr. Who", "command", "item")
        assert (name.text, name.confidence) == ("as it was painted", 4)
        seen = next(each for each in name.scores if each.judge == "seeing")
        assert seen.is_supported
        assert seen.auc == 1
        assert 0.7 < (seen.auc_low or 0) < 1
        assert 0.2 < (seen.shuffled or 0) < 0.8
        assert (seen.n_active, seen.n_inactive, seen.n_failed, seen.against) == (20, 20, 0, "not active")
        assert seen.n_patients >= 8
        guess = next(each for each in name.scores if each.judge == "a guess")
        assert not guess.is_supported
        assert (guess.auc_low or 0) < 0.5 < (guess.auc_high or 1)
    (noise,) = names.of(3)
    constant = next(each for each in noise.scores if each.judge == "seeing")
    assert constant.auc == 0.5  # it knows no such thing: one score for all
    assert not constant.is_supported
    sources = {row["judge"]: row for row in names.sources}
    assert sources["seeing"]["n_supported"] == 3
    assert sources["a guess"]["n_supported"] == 0
    assert sources["seeing"]["difference_low"] > 0
    assert sources["seeing"]["shuffled_low"] < 0.5 < sources["seeing"]["shuffled_high"]
    assert sources["a guess"]["difference_low"] < 0 < sources["a guess"]["difference_high"]


def test_exchanged_names_are_not_supported(world: World, tmp_path: Path) -> None:
    """Each latent gets the colour of another one: the judge sees well, and no name fits."""
    wrong = dict(zip(TRUE, [*list(TRUE.values())[1:3], TRUE[0], TRUE[3]], strict=True))
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps([{"latent": n, "name": name, "given_by": "A"} for n, name in wrong.items()]))
    done = describe(world, tmp_path / "n", answers=[path], judge=seeing)
    assert done.sources[0]["n_supported"] == 0
    assert abs(done.sources[0]["auc"] - 0.5) < 0.15


def test_figures_equal_a_loop_over_pairs(world: World, named: Path) -> None:
    """From the journal of the judge that guesses: AUC of all and of strong images, and of the other latent's name."""
    lines = [json.loads(line) for line in (default_answers(named) / "detection.jsonl").read_text().splitlines()]
    kind = {(row["latent"], row["number"]): row["row"] for row in images_of(named) if row["side"] == "test"}
    for row in pq.read_table(named / "detection.parquet").to_pylist():
        if row["judge"] != "a guess":
            continue
        of: dict[str, dict[int, float]] = {}
        for line in lines:
            if (line["judge"], line["latent"]) == ("a guess", row["latent"]):
                of.setdefault(line["name"], {}).update(zip(line["numbers"], line["scores"], strict=True))
        own = of.pop(row["name"])
        (other,) = of.values()  # one shuffled name
        for scores, wanted in ((own, row["auc"]), (other, row["shuffled"])):
            pairs = [
                1.0 if a > b else 0.5 if a == b else 0.0
                for n, a in scores.items()
                for m, b in scores.items()
                if kind[row["latent"], n] in ("strong", "weaker") and kind[row["latent"], m] == "not active"
            ]
            assert wanted == pytest.approx(sum(pairs) / len(pairs))
        assert row["difference"] == pytest.approx(row["auc"] - row["shuffled"])


# ------------------------------------------------------------------------------------------- commands of others

ANSWERS = {
    "good": "print(json.dumps({'name': 'round nucleus', 'text': 'a', 'confidence': 2}))",
    "exit": "sys.stderr.write('no key\\x1b[31m given'); sys.exit(3)",
    "text": "print('It is a nucleus.')",
    "list": "print('[]')",
    "nothing": "print('{}')",
    "control": "print(json.dumps({'name': 'a\\u0007b'}))",
    "turned": "print(json.dumps({'name': 'a\\u202eb'}))",
    "long": "print(json.dumps({'name': 'x' * 201}))",
    "flood": "sys.stdout.write('x' * (3 << 20))",
    "deep": "print('[' * 100000)",
    "confident": "print(json.dumps({'name': 'a', 'confidence': 9}))",
    "digits": "print(json.dumps({'name': 'a', 'confidence': '9' * 5000}))",
    "slow": "time.sleep(60)",
    "unread": "pass",
}
REASONS = {
    "exit": r"exit code 3: no key\\x1b\[31m given",
    "text": "not JSON",
    "list": "not a JSON object",
    "nothing": "no 'name'",
    "control": "control characters",
    "turned": "not printable",
    "long": "201 letters",
    "flood": "longer than 1,048,576 bytes",
    "deep": "not JSON",
    "confident": "confidence is 9",
    "digits": "confidence is '999",
    "slow": "no answer within 0.5 s",
    "unread": "not JSON",
}


def script(folder: Path, name: str, body: str) -> str:
    path = folder / f"{name}.py"
    path.write_text(f"import json, sys, time\n{body}\n")
    return f"{sys.executable} -S -E {path}"


@pytest.mark.stress
def test_every_bad_answer_is_named_and_counted(world: World, named: Path, tmp_path: Path) -> None:
    """One call each: a failing, slow, flooding or hostile command costs its own answer alone."""
    out = tmp_path / "n"
    describe(world, out, latents=[0])
    for name, words in REASONS.items():
        ask = AskConfig(timeout=0.5 if name == "slow" else 60)
        done = describe(world, out, latents=[0], command=script(tmp_path, name, ANSWERS[name]), ask=ask)
        assert (done.asked[0].n_answered, done.asked[0].n_failed) == (0, 1)
        assert re.search(words, done.warnings[0])
        assert done.warnings[0].isprintable()
        assert not done.names
    done = describe(world, out, latents=[0], command=script(tmp_path, "good", ANSWERS["good"]), by="M 1")
    assert done.names == {"M 1": 1}


@pytest.mark.stress
def test_a_command_is_asked_once_and_stops_after_failures_in_a_row(world: World, tmp_path: Path) -> None:
    out, log = tmp_path / "n", tmp_path / "log"
    body = (
        f"open({str(log)!r}, 'a').write('.')\n"
        f"n = len(open({str(log)!r}).read())\n"
        "json.load(sys.stdin) and None\n"
        "print(json.dumps({'name': f'name {n}'}) if n in (1, 4, 5, 6) else 'no')"
    )
    line = script(tmp_path, "namer", body)
    done = describe(world, out, command=line, ask=AskConfig(give_up=2))
    assert len(log.read_text()) == 3  # one answer, two failures in a row
    assert (done.asked[0].n_answered, done.asked[0].n_failed) == (1, 2)
    assert list(done.names.values()) == [1]
    assert "1 answers are kept" in (done.gave_up or "")
    done = describe(world, out, command=line)
    assert len(log.read_text()) == 6  # the three that were left
    assert (done.asked[0].n_answered, done.gave_up) == (3, None)
    describe(world, out, command=line)
    assert len(log.read_text()) == 6


def test_no_shell_unless_asked_for(world: World, tmp_path: Path) -> None:
    out, mark = tmp_path / "n", tmp_path / "mark"
    line = f"{script(tmp_path, 'good', ANSWERS['good'])} ; touch {mark}"
    describe(world, out, latents=[0], command=line, by="a")
    assert not mark.exists()
    describe(world, out, latents=[0], command=line, by="b", ask=AskConfig(use_shell=True))
    assert mark.exists()
    for bad, words in (("no-such-program-here x", "no program"), ("'open", "cannot be split"), ("", "empty")):
        with pytest.raises(BadInput, match=words):
            describe(world, out, command=bad)


@pytest.mark.stress
def test_calls_at_once_give_the_same(world: World, named: Path, tmp_path: Path) -> None:
    out = tmp_path / "n"
    describe(
        world,
        out,
        command=knowing(world, out),
        by="Dr. Who",
        judge=seeing,
        ask=AskConfig(at_once=3, n_bootstraps=200, shuffles=1),
    )
    rows = [row for row in pq.read_table(named / "detection.parquet").to_pylist() if row["judge"] == "seeing"]
    assert pq.read_table(out / "detection.parquet").to_pylist() == rows


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"scores": [0.5]}, "1 scores for 10 pictures"),
        ({"scores": "x"}, "no list"),
        ({"scores": [2] * 10}, "expected 0 to 1"),
        ({"scores": ["a"] * 10}, "expected 0 to 1"),
    ],
)
def test_a_judge_that_does_not_answer_as_asked(
    world: World, named: Path, tmp_path: Path, answer: dict[str, Any], words: str
) -> None:
    out = copy_of(named, tmp_path)
    done = describe(world, out, judge=lambda request: answer, judge_by="bad", ask=AskConfig(give_up=1))
    assert words in done.warnings[0]
    row = next(row for row in done.rows if row["judge"] == "bad")
    assert (row["auc"], row["reason"]) == (None, "not tested yet")


def test_a_judge_may_say_yes_and_no_and_nothing(world: World, tmp_path: Path) -> None:
    """Yes and no give the balanced accuracy; what it cannot say is counted, and not asked again."""
    calls = []

    def judge(request: dict[str, Any]) -> dict[str, Any]:
        calls.append(1)
        scores = seeing(request)["scores"]
        return {"scores": [None, *(score > 0.1 for score in scores[1:])]}

    table = tmp_path / "t.csv"
    table.write_text("latent,name,given_by\n0,red,Ada\n1,green,Ada\n")
    done = describe(world, tmp_path / "n", answers=[table], judge=judge)
    assert [(row["auc"], row["n_failed"]) for row in done.rows] == [(1.0, 4)] * 2
    n_calls = len(calls)
    describe(world, tmp_path / "n", judge=judge)
    assert len(calls) == n_calls


# ------------------------------------------------------------------------------------------- people


def test_names_of_several_sources_stand_side_by_side(world: World, named: Path, tmp_path: Path) -> None:
    """A filled-in template, a JSON list and a review; the last name of a source counts; the rest is counted."""
    out = tmp_path / "n"
    describe(world, out)
    lines = (out / "answers.csv").read_text("utf-8-sig").splitlines()
    assert lines[0] == "latent,sheet,name,text,confidence,given_by,items"
    lines[1] = lines[1].replace(",,,,,", ",'=red() <b>,seen often,5,Ada,")
    assert "Ada" in lines[1]
    (tmp_path / "filled.csv").write_text("\n".join(lines))
    others = [
        {"latent": 0, "name": "Kern", "given_by": "Bob", "given_at": "2026-01-02"},
        {"latent": 0, "name": "kernel", "given_by": "Bob"},
        {"latent": 1, "name": "x" * 300, "given_by": "Bob"},
        {"latent": 4, "name": "of no item", "given_by": "Bob"},
        {"latent": 1, "name": "of nobody"},
    ]
    (tmp_path / "others.json").write_text(json.dumps(others))
    identity = ResultStore(world.root / "concepts", CONCEPTS).header.identity
    header = "reviewer,question,latent,verdict,name,notes,confidence,time,is_current,concepts"
    rows = [
        f"Eve,meaningful,2,meaningful,blue dot,at the rim,3,2026-02-03,True,{identity}",
        f"Eve,meaningful,1,not,,,,2026-02-03,True,{identity}",
        f"Eve,meaningful,2,meaningful,old,,,2026-02-02,False,{identity}",
        "Eve,meaningful,1,meaningful,of others,,,2026-02-03,True,abc",
    ]
    (tmp_path / "reviews.csv").write_text("\n".join([header, *rows]))
    files = [tmp_path / name for name in ("filled.csv", "others.json", "reviews.csv")]
    done = describe(world, out, answers=files)
    assert done.names == {"Ada": 1, "Bob": 1, "Eve": 1}
    assert [each.split(": ", 1)[1].split(";")[0] for each in done.unfit] == [
        "its name has 300 letters, at most 200 are taken",
        "latent 4 is none of these items",
        "it does not say who gave the name: add a column given_by, or give --by",
        "it is about latents of other concepts",
    ]
    names = read_names(out)
    assert [(each.given_by, each.name, each.source, each.saw) for each in names.of(0)] == [
        ("Ada", "=red() <b>", "table", "item"),
        ("Bob", "kernel", "table", "elsewhere"),
    ]
    (eve,) = names.of(2)
    assert (eve.name, eve.text, eve.source, eve.saw) == ("blue dot", "at the rim", "review", "elsewhere")
    assert (eve.given_at, eve.confidence, eve.scores) == ("2026-02-03", 3, ())
    before = (default_answers(out) / "names.jsonl").read_bytes()
    describe(world, out, answers=files)
    found = (default_answers(out) / "names.jsonl").read_bytes()
    assert found.count(b"\n") <= before.count(b"\n") + 2  # Bob's two rows replace each other again; none else is added


def test_answers_outlive_items(world: World, tmp_path: Path) -> None:
    """Items with other images: names stay, marked as given for other pictures, and the command is asked anew."""
    out, asked = tmp_path / "n", []

    def namer(request: dict[str, Any]) -> dict[str, Any]:
        asked.append(1)
        return {"name": f"name {len(asked)}"}

    table = tmp_path / "t.csv"
    table.write_text("latent,name,given_by\n1,green,Ada\n")
    describe(world, out, latents=[0, 1], command=namer, answers=[table], by="M")
    with pytest.raises(SpecMismatch, match="--overwrite"):
        describe(world, out, latents=[0, 1], config=DescribeConfig(seed=1))
    done = describe(world, out, latents=[0, 1], config=DescribeConfig(seed=1), overwrite=True)
    assert done.names == {"Ada": 1, "M": 2}
    assert {each.saw for latent in (0, 1) for each in read_names(out).of(latent)} == {"elsewhere"}
    describe(world, out, latents=[0, 1], config=DescribeConfig(seed=1), command=namer, by="M")
    assert len(asked) == 4
    assert [each.name for each in read_names(out).of(0)] == ["name 3"]
    assert read_names(out).of(0)[0].saw == "item"


@pytest.mark.parametrize("bad", ["a\nb", "a\x00", "a\x1b[31m", "a​b", "x" * 201, "a\ud800", 3])
def test_hostile_names_are_refused(bad: object) -> None:
    with pytest.raises(Unfit):
        one_line("name", bad)
    assert one_line("name", "  Rötliche  Körnung ") == "Rötliche Körnung"


@pytest.mark.parametrize("said", ["9" * 5000, "0", "6", 1.5, True])
def test_a_confidence_that_is_none_is_refused(said: object) -> None:
    """Of more than 4,300 digits int() makes no number: that was a traceback, and the end of all other calls."""
    context: dict[str, Any] = {"given_by": "M", "source": "command", "given_at": None, "saw": "item", "items": "x"}
    with pytest.raises(Unfit, match=r"its confidence is .*, expected 1 to 5"):
        answer_of({"name": "a", "confidence": said}, latent=0, **context)
    assert answer_of({"name": "a", "confidence": " 4 "}, latent=0, **context).confidence == 4


# ------------------------------------------------------------------------------------------- on disk


def test_what_was_changed_is_found(world: World, named: Path, tmp_path: Path) -> None:
    assert verify_folder(named).is_whole
    assert verify_folder(named).unrecorded == []
    copy = copy_of(named, tmp_path)
    table = pq.read_table(copy / "names.parquet")
    rows = table.to_pylist()
    rows[0]["name"] = "another"
    pq.write_table(table.from_pylist(rows, table.schema), copy / "names.parquet")
    assert not verify_folder(copy).is_whole
    with pytest.raises(DamagedStore, match=r"names\.parquet is not the table"):
        read_names(copy)
    (copy / "names.parquet").unlink()
    assert read_names(copy).of(0) == ()
    kept = default_answers(named) / "names.jsonl"
    with (default_answers(copy) / "names.jsonl").open("a") as file:
        file.write('{"version":1,"lat')  # a crash in the middle of a line
    describe(world, copy)
    assert (default_answers(copy) / "names.jsonl").read_bytes() == kept.read_bytes()
    assert read_names(copy).of(0) == read_names(named).of(0)
    journal = tmp_path / "x.answers"
    journal.mkdir()
    (journal / "names.jsonl").write_text('{"version":1,"latent":0,"name":"a\\u0007"}\n')
    with pytest.raises(DamagedStore, match="line 1"):
        read_answers(journal)
    (journal / "names.jsonl").write_text('{"version":2}\n')
    with pytest.raises(SpecMismatch, match="newer"):
        read_answers(journal)


def test_stores_of_different_latents_are_refused(world: World, tmp_path: Path) -> None:
    other = make_world(tmp_path, seed=1)
    with pytest.raises(SpecMismatch, match="other latents"):
        describe_latents(other.root / "barcodes", world.root / "concepts", world.sources, tmp_path / "n", latents=[0])
    with pytest.raises(BadInput, match="no latent to name"):
        describe(world, tmp_path / "n", latents=[])
    lost = Sources(world.sources.stores, [lambda n: "it is gone"])
    with pytest.raises(BadInput, match="none of the images can be shown"):
        describe_latents(world.root / "barcodes", world.root / "concepts", lost, tmp_path / "n", latents=[0])


def test_the_command(world: World, tmp_path: Path) -> None:
    """Says before what it takes; exit code 1 if a command fails again and again; --json."""
    places = [f"--{name}={world.root / name}" for name in ("barcodes", "concepts", "latents", "images")]
    command = ["concept", "describe", *places, "-o", tmp_path / "n", "--latent", "0", "--latent", "4"]
    done = run(
        *command, "--with", script(tmp_path, "good", ANSWERS["good"]), "--by", "M 1", "--judge", "true", "--give-up", 2
    )
    assert done.exit_code == 1
    assert "true failed too often in a row (its answer is not JSON" in done.stderr
    assert "2 latents" in done.stderr
    assert "of at most 120 s each" in done.stderr
    assert "1 name by M 1" in done.stdout
    done = run(*command, "--json")
    assert done.exit_code == 0
    assert json.loads(done.stdout)["names"] == {"M 1": 1}
    assert "nothing to do" in done.stderr
    fails("no latent 99", *command[:-1], "99")
    plan = plan_describe(world.root / "barcodes", world.root / "concepts", latents=[0, 1], judge="x")
    assert (plan.n_latents, plan.n_passes, plan.n_name_calls, plan.n_judge_calls) == (2, 1, 0, 32)
