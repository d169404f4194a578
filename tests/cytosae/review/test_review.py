"""Reviews without a server: what is asked and shown, verdicts on disk, export, agreement."""

import base64
import csv
import io
import json
import math
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_line import fails, run
from concept_folders import concepts_of, dense_tokens, make_concepts
from PIL import Image
from review_site import CONFIG, differential, make_comparison, make_site
from sklearn.metrics import cohen_kappa_score

from cytocache.pictures import Pictures
from cytosae.maps import Sources
from cytosae.review import read_review, read_verdicts, verdict_table
from cytosae.review.items import ReviewConfig, choose_decoys, make_review
from cytosae.review.questions import Item, Question, Review, sent
from cytosae.review.reviewer_agreement import (
    agreement,
    cohen_kappa,
    fisher,
    fleiss_kappa,
    gwet_ac1,
    pair_agreement,
    weighted_share,
    wilson,
)
from cytosae.review.verdicts import (
    Verdict,
    current,
    journal,
    new_verdict,
    save_verdict,
    withdrawal,
    write_verdict_table,
)
from stores import BadInput, ConceptStore, DamagedStore, LatentStore, SpecMismatch
from stores.tables import csv_bytes


@pytest.fixture(scope="module")
def site(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small atlas; read-only."""
    folder = tmp_path_factory.mktemp("site")
    make_site(made, folder)
    return folder / "atlas"


@pytest.fixture
def review(site: Path) -> Review:
    return read_review(site)


def say(review: Review, reviewer: str, item: str, verdict: str, **more: Any) -> Verdict:
    return new_verdict({"reviewer": reviewer, "item": item, "verdict": verdict, **more}, review, is_blinded=True)


# ------------------------------------------------------------------------------------------------ what is asked


@pytest.mark.stress
def test_evidence_is_what_the_stores_hold(made: Path, site: Path) -> None:
    """Every map, label and picture of review.json, against the store read value by value."""
    content = json.loads((site / "review.json").read_text())
    store, concepts = LatentStore(made / "latents.zarr"), ConceptStore(site.parent / "concepts")
    asked = {item["latent"] for question in content["questions"] for item in question["items"]}
    assert asked == {int(latent) for latent, found in content["latents"].items() if found["rows"]}
    assert len(asked) >= 6
    for latent, found in ((int(latent), found) for latent, found in content["latents"].items()):
        shown = [(row["dataset"], image) for row in found["rows"] for image in row["images"]]
        top = [
            (dataset, row)
            for dataset in concepts.datasets
            for row in concepts.top_images(latent, dataset).slice(0, CONFIG.n_images).to_pylist()
        ]
        assert [dataset for dataset, _ in shown] == [dataset for dataset, _ in top]
        maps = [dense_tokens(store, row["image_index"])[1:, latent] for _, row in top]
        largest = max((float(patches.max()) for patches in maps), default=0.0)
        assert found.get("largest", 0.0) == pytest.approx(largest)
        for (_, image), (_, row), patches in zip(shown, top, maps, strict=True):
            bytes_ = np.frombuffer(base64.b64decode(image["patches"]), np.uint8)
            assert ((bytes_ > 0) == (patches > 0)).all()
            np.testing.assert_allclose(bytes_ / 255 * largest, patches, atol=1.01 * largest / 255)
            assert image["label"] == row["label"]
            with Image.open(site / "review" / image["file"]) as picture:
                assert picture.size == (48, 48)
                assert not picture.getexif()
            original = Image.open(made / store.images["path"][row["image_index"]].as_py()).convert("RGB")
            difference = np.asarray(Image.open(site / "review" / image["file"]), float) - original
            assert abs(difference).mean() < 6, "JPEG of another image"


def test_an_image_that_cannot_be_shown_is_named_and_keeps_its_map(made: Path, tmp_path: Path) -> None:
    store = LatentStore(made / "latents.zarr")
    concepts = concepts_of(store, tmp_path / "concepts")
    comparison = make_comparison(tmp_path / "compared", differential(concepts.n_latents))
    sources = Sources([store], [Pictures(store, tmp_path / "nowhere")])
    found = make_review(concepts, sources, tmp_path, CONFIG, comparisons=[comparison])
    images = [image for each in found.content["latents"].values() for row in each["rows"] for image in row["images"]]
    assert images
    assert {image["file"] for image in images} == {None}
    assert any(any(base64.b64decode(image["patches"])) for image in images)
    assert len(found.unseen) == len(set(found.unseen)) >= 2
    assert "images/" in found.unseen[0]


def test_a_comparison_of_another_sae_is_refused(made: Path, tmp_path: Path) -> None:
    store = LatentStore(made / "latents.zarr")
    concepts = concepts_of(store, tmp_path / "concepts")
    comparison = make_comparison(tmp_path / "compared", differential(12))
    with pytest.raises(SpecMismatch, match=r"compares 12 latents, .* has 384; give a comparison of the same SAE"):
        make_review(concepts, Sources([store], [Pictures(store)]), tmp_path, CONFIG, comparisons=[comparison])
    with pytest.raises(BadInput, match="n_top must be at least 1; found 0"):
        ReviewConfig(n_top=0)


def test_decoys_by_hand() -> None:
    """Near in frequency, near zero in difference, on no list, active somewhere; each once; fewer if there are few."""
    table = pa.table(
        {
            "difference": [5.0, -5.0, 0.1, 0.1, 3.0, 0.0, 2.0, 0.1, 0.1],
            "hedges_g": pa.array([0.15, -2.0, 0.1, -0.1, 0.9, None, None, 0.0, 0.0]),
        }
    )
    n_images = np.array([1000, 10, 900, 12, 11, 8, 1000, 0, 100])
    listed = np.array([0, 1])
    found = [choose_decoys(table, n_images, listed, 2, seed=seed).tolist() for seed in range(10)]
    assert found == [[2, 3]] * 10, "0 is listed, 4 differs, 6 differs without a g, 7 is never active"
    assert choose_decoys(table, n_images, listed, 50, seed=0).tolist() == [2, 3, 5, 8]
    assert choose_decoys(table, n_images, listed, 0, seed=0).tolist() == []
    assert choose_decoys(table, n_images, np.array([], np.int64), 5, seed=0).tolist() == []


def test_lists_and_decoys_in_the_file(site: Path) -> None:
    question = json.loads((site / "review.json").read_text())["questions"][1]
    table = differential(384)
    groups = Counter(item["group"] for item in question["items"])
    without = question["n_without_images"]
    assert groups["a"] + groups["b"] + groups["decoy"] + without == 4 + 4 + 3
    assert groups["decoy"] == 3, "a decoy always has images"
    for item in question["items"]:
        if item["group"] != "decoy":
            assert table[f"rank_{item['group']}"][item["latent"]].as_py() <= 4
        else:
            assert abs(table["hedges_g"][item["latent"]].as_py()) < 0.2


# ---------------------------------------------------------------------------------------------- what may be seen


def test_what_is_sent_blinded_does_not_depend_on_what_is_hidden(site: Path, tmp_path: Path) -> None:
    """Other labels, datasets, latents, clusters and lists: the same bytes go out. With labels shown, others do."""
    review = read_review(site)

    def changed(question: Question) -> Question:
        items = tuple(
            replace(item, latent=item.latent + 1000, cluster=item.cluster and 9, group="decoy" if item.group else "")
            for item in question.items
        )
        return replace(question, items=items)

    evidence: dict[int, dict[str, Any]] = {}
    for latent, found in review.evidence.items():
        rows = json.loads(json.dumps(found["rows"]))
        for number, row in enumerate(rows):
            row["dataset"] = f"secret {number}"
            for image in row["images"]:
                image["label"] = "blast"
        evidence[latent + 1000] = {**found, "rows": rows}
    other = Review(review.atlas, tuple(map(changed, review.questions)), evidence)
    for one, two in zip(review.questions, other.questions, strict=True):
        for shows, is_equal in ((False, True), (True, False)):
            texts = [
                json.dumps(sent(of, q, "Ada", seed=1, shows_labels=shows)) for of, q in ((review, one), (other, two))
            ]
            assert (texts[0] == texts[1]) == is_equal


def test_order_is_each_reviewers_own_and_stays() -> None:
    def order(n: int, reviewer: str, seed: int = 0) -> list[str]:
        items = tuple(Item(item=f"i{k}", latent=0) for k in range(n))
        question = Question(question="meaningful", concepts="c", items=items)
        found = sent(
            Review("", (question,), {0: {"largest": 1, "rows": []}}), question, reviewer, seed=seed, shows_labels=False
        )
        return [item["item"] for item in found["items"]]

    assert order(50, "Ada") == order(50, "Ada")
    assert len({tuple(order(50, who, seed)) for who in ("Ada", "Bob") for seed in (0, 1)}) == 4
    assert sorted(order(50, "Ada")) == sorted(order(50, "Bob"))
    assert [item for item in order(60, "Ada") if int(item[1:]) < 50] == order(50, "Ada"), "new items move no other"


def test_an_atlas_without_a_review_asks_nothing_and_a_changed_one_is_refused(site: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(site, tmp_path / "atlas"))
    header = json.loads((copy / "atlas.json").read_text())
    digest = header["summary"]["files"].pop("review.json")
    (copy / "atlas.json").write_text(json.dumps(header))
    assert read_review(copy).questions == ()
    header["summary"]["files"]["review.json"] = digest
    (copy / "atlas.json").write_text(json.dumps(header))
    assert len(read_review(copy).questions) == 2
    (copy / "review.json").write_text("{}")
    with pytest.raises(
        DamagedStore, match=r"review\.json is not the file that was written; cyto atlas build --overwrite"
    ):
        read_review(copy)


@pytest.mark.parametrize(
    "break_it",
    [
        lambda content: content.pop("latents"),
        lambda content: content["questions"][0].update(question="why"),
        lambda content: content["questions"][1]["items"][0].update(latent="x"),
        lambda content: content["latents"].popitem(),
        lambda content: content.update(questions=7),
    ],
)
def test_a_file_that_is_no_review_is_one_line(break_it: Any, site: Path, tmp_path: Path) -> None:
    """Even where its hash is right: an atlas may come from anywhere."""
    from stores.files import sha256_file

    root = Path(shutil.copytree(site, tmp_path / "atlas"))
    content, header = (json.loads((root / name).read_text()) for name in ("review.json", "atlas.json"))
    break_it(content)
    (root / "review.json").write_text(json.dumps(content))
    header["summary"]["files"]["review.json"] = sha256_file(root / "review.json")
    (root / "atlas.json").write_text(json.dumps(header))
    with pytest.raises(DamagedStore, match=r"review\.json is not a review \(.*cyto atlas build --overwrite"):
        read_review(root)


# ---------------------------------------------------------------------------------------------- verdicts on disk


def test_journal_round_trip(review: Review, tmp_path: Path) -> None:
    """Kept apart by reviewer, the last verdict counts, the earlier ones stay; a name is no file name."""
    names = ["Ada", "../../etc/passwd", "Zoë\u0301 <script>", "a" * 80]
    items = [item.item for item in review.questions[0].items]
    for number, name in enumerate(names):
        for item in items:
            save_verdict(tmp_path / "r", say(review, name, item, "unsure"))
        save_verdict(
            tmp_path / "r",
            say(review, name, items[0], "meaningful", name=f"n{number}", notes="two\nlines", confidence=5),
        )
    assert {path.parent for path in tmp_path.rglob("*.jsonl")} == {tmp_path / "r"}
    found = read_verdicts(tmp_path / "r")
    assert len(found) == len(names) * (len(items) + 1)
    counting = current(found)
    assert len(counting) == len(names) * len(items)
    assert {verdict.reviewer for verdict in found} == {*names[:2], "Zo\u00eb\u0301 <script>", names[3]}
    last = counting["../../etc/passwd", items[0]]
    assert (last.verdict, last.name, last.notes, last.confidence) == ("meaningful", "n1", "two\nlines", 5)


def test_a_withdrawn_verdict_counts_nowhere_and_stays_in_the_journal(review: Review, tmp_path: Path) -> None:
    """An older program refuses the journal, since it would count the withdrawal as a verdict."""
    first, second = (item.item for item in review.questions[0].items[:2])
    save_verdict(tmp_path, say(review, "Ada", first, "meaningful", name="monocytes"))
    save_verdict(tmp_path, say(review, "Ada", second, "not"))
    save_verdict(tmp_path, withdrawal({"reviewer": "Ada", "item": first}, review, is_blinded=True))
    found = read_verdicts(tmp_path)
    assert [verdict.verdict for verdict in found] == ["meaningful", "not", ""]
    assert {item for _, item in current(found)} == {second}
    lines = [json.loads(line) for line in journal(tmp_path, "Ada").read_text().splitlines()]
    assert [line["version"] for line in lines] == [1, 1, 2]
    assert verdict_table(found, review)["item"].to_pylist() == [second]
    history = verdict_table(found, review, history=True).to_pylist()
    assert [(row["verdict"], row["is_current"]) for row in history] == [
        ("meaningful", False),
        ("not", True),
        ("", False),
    ]
    save_verdict(tmp_path, say(review, "Ada", first, "unsure"))
    assert current(read_verdicts(tmp_path))["Ada", first].verdict == "unsure"
    with pytest.raises(BadInput, match="does not ask about that item"):
        withdrawal({"reviewer": "Ada", "item": "0" * 16}, review, is_blinded=True)


def test_a_verdict_is_synced_before_it_counts_as_saved(review: Review, tmp_path: Path, monkeypatch: Any) -> None:
    """The line is in the file when it is synced, and so are the names of file and folder."""
    import os

    synced: list[tuple[str, int]] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append((str(Path(f"/proc/self/fd/{descriptor}").readlink()), os.fstat(descriptor).st_size))
        real(descriptor)

    monkeypatch.setattr("os.fsync", fsync)
    save_verdict(tmp_path / "r", say(review, "Ada", review.questions[0].items[0].item, "not"))
    path = journal(tmp_path / "r", "Ada")
    assert (str(path), path.stat().st_size) in synced
    assert {str(tmp_path), str(tmp_path / "r")} <= {name for name, _ in synced}


def test_a_torn_line_costs_itself_only(review: Review, tmp_path: Path) -> None:
    items = [item.item for item in review.questions[0].items]
    for item in items[:2]:
        save_verdict(tmp_path, say(review, "Ada", item, "not"))
    path = journal(tmp_path, "Ada")
    path.write_bytes(path.read_bytes()[:-9])
    assert [verdict.item for verdict in read_verdicts(tmp_path)] == items[:1]
    save_verdict(tmp_path, say(review, "Ada", items[2], "not"))
    assert [verdict.item for verdict in read_verdicts(tmp_path)] == [items[0], items[2]]


def test_journals_that_no_server_wrote(review: Review, tmp_path: Path) -> None:
    item = review.questions[0].items[0].item
    save_verdict(tmp_path, say(review, "Ada", item, "not"))
    path = journal(tmp_path, "Ada")
    good = path.read_text()
    record = json.loads(good)
    bad = {
        r"line 2 of .* is not a journal record": "nonsense",
        r"line 2 of .* is not a review: its latent is '7'; repair or remove that line": {**record, "latent": "7"},
        r"its confidence is \[1\]": {**record, "confidence": [1]},
        r"its verdict is None": {name: record[name] for name in record if name != "verdict"},
        r"its verdict is 'artefact', not one of meaningful, not, unsure; repair or": {**record, "verdict": "artefact"},
        r"is by 'Bob', whose reviews are in another file": {**record, "reviewer": "Bob"},
    }
    for words, line in bad.items():
        path.write_text(good + (line if isinstance(line, str) else json.dumps(line)) + "\n")
        with pytest.raises(DamagedStore, match=words):
            read_verdicts(tmp_path)
    path.write_text(good + json.dumps({**record, "version": 3}) + "\n")
    with pytest.raises(SpecMismatch, match=r"reviews version 3 are newer than this cyto; upgrade cyto"):
        read_verdicts(tmp_path)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"item": "../x"}, "does not ask about that item"),
        ({"item": ["x"]}, "does not ask about that item"),
        ({"verdict": "a"}, "verdict must be one of meaningful, not, unsure; found 'a'"),
        ({"verdict": None}, "verdict must be one of"),
        ({"verdict": {"$ne": 1}}, "verdict must be one of"),
        ({"reviewer": "  "}, "reviewer must be a name of printable letters"),
        ({"reviewer": "A\u202eB"}, "reviewer must be a name of printable letters"),
        ({"reviewer": "A\x1b[2J"}, "reviewer must be a name of printable letters"),
        ({"reviewer": "x" * 81}, "reviewer must be a text of at most 80 letters; found 81 letters"),
        ({"reviewer": 7}, "reviewer must be a text"),
        ({"name": None}, "name must be a text of at most 200 letters; found None"),
        ({"notes": "x" * 10_001}, "notes must be a text of at most 10,000 letters; found 10,001 letters"),
        ({"notes": "\ud800"}, "half of a surrogate pair"),
        ({"confidence": 6}, "confidence must be a whole number from 1 to 5, or null; found '6'"),
        ({"confidence": True}, "confidence must be a whole number"),
        ({"confidence": 3.0}, "confidence must be a whole number"),
    ],
)
def test_what_is_no_verdict(wrong: dict[str, Any], words: str, review: Review) -> None:
    good = {"reviewer": "Ada", "item": review.questions[0].items[0].item, "verdict": "not", "name": "", "notes": ""}
    new_verdict(good, review, is_blinded=True)
    with pytest.raises(BadInput, match=words):
        new_verdict({**good, **wrong}, review, is_blinded=True)


# -------------------------------------------------------------------------------------------------------- export


def test_export(review: Review, tmp_path: Path) -> None:
    """Parquet gives back what was said, beside the key; CSV is the same, and no cell of it is a formula."""
    first, pair = review.questions
    texts = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "  =1", "\uff1d1", "fine", "1=1", ""]
    said = [say(review, "=Ada", first.items[0].item, "unsure", name="replaced")]
    said += [say(review, "=Ada", item.item, "not", notes=text) for item, text in zip(first.items, texts, strict=False)]
    said += [say(review, "Bob", item.item, "a", name=text) for item, text in zip(pair.items, texts[::-1], strict=False)]
    said.append(replace(said[-1], item="gone"))
    table = verdict_table(said, review)
    write_verdict_table(table, tmp_path / "r.parquet")
    rows = pq.read_table(tmp_path / "r.parquet").to_pylist()
    assert len(rows) == len(said) - 1 == verdict_table(said, review, history=True).num_rows - 1
    assert all(row["is_current"] for row in rows)
    asked = {item.item: item for question in review.questions for item in question.items}
    for row in rows:
        item = asked.get(row["item"])
        assert row["is_asked"] == (item is not None)
        if item is not None:
            assert (row["cluster"], row["group"] or "", row["latent"]) == (item.cluster, item.group, item.latent)
    assert [row["notes"] for row in rows if row["reviewer"] == "=Ada"] == [
        text.strip() for text in texts[: len(first.items)]
    ]
    write_verdict_table(table, tmp_path / "r.csv")
    cells = list(csv.reader(io.StringIO((tmp_path / "r.csv").read_text("utf-8-sig"))))
    assert cells[0] == table.column_names
    assert len(cells) == len(rows) + 1
    assert not [cell for row in cells for cell in row if cell.lstrip()[:1] in {"=", "+", "-", "@", "\uff1d"} and cell]
    assert {row[0] for row in cells[1:]} == {"'=Ada", "Bob"}
    with pytest.raises(BadInput, match=r"r\.csv is there already; choose another output, or add --overwrite"):
        write_verdict_table(table, tmp_path / "r.csv")
    with pytest.raises(BadInput, match=r"r\.xlsx must end with \.csv or \.parquet"):
        write_verdict_table(table, tmp_path / "r.xlsx")


def test_csv_cells() -> None:
    """Numbers stay numbers, a minus of theirs too; text that begins a formula does not, whatever hides the sign."""
    table = pa.table({"=head": [-1, 2, None], "text": ["\r=1", '=HYPERLINK("x"),1', "  =1"]})
    assert csv_bytes(table).decode("utf-8-sig") == (
        '\'=head,text\r\n-1,"\'\r=1"\r\n2,"\'=HYPERLINK(""x""),1"\r\n,\'  =1\r\n'
    )


# ----------------------------------------------------------------------------------------------------- agreement


def test_cohen_by_hand_and_against_sklearn() -> None:
    """20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no: p_o 0.7, p_e 0.5, kappa 0.4."""
    pairs = [("y", "y")] * 20 + [("y", "n")] * 5 + [("n", "y")] * 10 + [("n", "n")] * 15
    assert cohen_kappa(pairs) == pytest.approx(0.4)
    rng = np.random.default_rng(0)
    for n in (2, 5, 30, 200):
        a, b = rng.choice(["m", "n", "u"], (2, n)).tolist()
        assert cohen_kappa(list(zip(a, b, strict=True))) == pytest.approx(cohen_kappa_score(a, b))
    assert cohen_kappa([("y", "n")] * 3) == 0
    assert cohen_kappa([("y", "y")] * 3) is None
    assert cohen_kappa([]) is None


def test_fleiss_by_hand() -> None:
    """Fleiss' own worked table of 14 raters, 10 items, 5 categories: 0.210. And the definition, pair by pair."""
    table = """0 0 0 0 14 / 0 2 6 4 2 / 0 0 3 5 6 / 0 3 9 2 0 / 2 2 8 1 1 /
               7 7 0 0 0 / 3 2 6 3 0 / 2 5 3 2 2 / 6 5 2 1 0 / 0 2 2 3 7"""
    counts = np.array([[int(cell) for cell in row.split()] for row in table.split("/")])
    assert fleiss_kappa(counts) == pytest.approx(0.210, abs=5e-4)
    rng = np.random.default_rng(1)
    said = rng.choice(3, (20, 4))
    equal = [a == b for row in said for i, a in enumerate(row) for j, b in enumerate(row) if i != j]
    chance = sum((said == k).mean() ** 2 for k in range(3))
    counts = np.array([[(row == k).sum() for k in range(3)] for row in said])
    assert fleiss_kappa(counts) == pytest.approx((np.mean(equal) - chance) / (1 - chance))
    assert fleiss_kappa(np.array([[3, 0], [3, 0]])) is None
    assert fleiss_kappa(np.empty((0, 3), np.int64)) is None


def test_published_values_with_missing_ratings() -> None:
    """Gwet's example of 4 raters and 12 units, seven ratings missing: irrCAC (R) prints 0.77544 and 0.76117."""
    said = """1 1 . 1 / 2 2 3 2 / 3 3 3 3 / 3 3 3 3 / 2 2 2 2 / 1 2 3 4 / 4 4 4 4 / 1 1 2 1 / 2 2 2 2 / . 5 5 5 /
              . . 1 1 / . . 3 ."""
    counts = np.array([[row.split().count(str(k)) for k in range(1, 6)] for row in said.split("/")])
    assert counts.sum() == 41
    assert gwet_ac1(counts) == pytest.approx(0.77544, abs=5e-6)
    assert fleiss_kappa(counts) == pytest.approx(0.76117, abs=5e-6)
    assert fleiss_kappa(np.array([[1, 0], [0, 1]])) is None  # nobody judged what another judged
    assert gwet_ac1(np.array([[1, 0], [0, 1]])) is None


def test_ac1_by_hand_where_kappa_fails() -> None:
    """118 of 125 both say yes, 5 and 2 differ (Gwet 2008): kappa is below 0, and AC1 0.94. And pair by pair."""
    pairs = [("y", "y")] * 118 + [("y", "n")] * 5 + [("n", "y")] * 2
    counts = np.array([[pair.count("y"), pair.count("n")] for pair in pairs])
    assert cohen_kappa(pairs) == pytest.approx(-0.0234, abs=5e-5)
    assert gwet_ac1(counts) == pytest.approx(0.9408, abs=5e-5)
    rng = np.random.default_rng(1)
    said = rng.choice(3, (20, 4), p=[0.8, 0.15, 0.05])
    equal = [a == b for row in said for i, a in enumerate(row) for j, b in enumerate(row) if i != j]
    chance = sum((said == k).mean() * (1 - (said == k).mean()) for k in range(4)) / 3  # four to choose from
    counts = np.array([[(row == k).sum() for k in range(4)] for row in said])
    assert gwet_ac1(counts) == pytest.approx((np.mean(equal) - chance) / (1 - chance))
    assert gwet_ac1(np.empty((0, 3), np.int64)) is None


def test_intervals_are_those_of_items_drawn_again() -> None:
    """Of kappa and AC1, against a slow bootstrap with sklearn; and they hold the truth in about 95% of reviews."""
    choices = ("meaningful", "not", "unsure")
    true, truth = np.array([[0.45, 0.1, 0], [0.05, 0.3, 0], [0.02, 0.03, 0.05]]), []
    chance = (true.sum(0) * true.sum(1)).sum()
    kappa = (np.trace(true) - chance) / (1 - chance)
    for seed in range(50):
        rng = np.random.default_rng(seed)
        cells = rng.choice(9, 80, p=true.ravel())
        answers = {
            name: {f"m{k}": choices[at] for k, at in enumerate(said)}
            for name, said in (("Ada", cells // 3), ("Bob", cells % 3))
        }
        found = pair_agreement(answers, "Ada", "Bob", choices)
        assert found["kappa"] == pytest.approx(cohen_kappa_score(cells // 3, cells % 3))
        truth.append(found["kappa_low"] <= kappa <= found["kappa_high"])
    assert np.mean(truth) >= 0.88
    slow = [cohen_kappa_score(some // 3, some % 3) for some in (rng.choice(cells, 80) for _ in range(300))]
    assert [found["kappa_low"], found["kappa_high"]] == pytest.approx(np.quantile(slow, [0.025, 0.975]), abs=0.03)
    drawn = [rng.choice(cells, 80) for _ in range(300)]
    ac1 = [
        gwet_ac1(
            np.array([[int(a == k) + int(b == k) for k in range(3)] for a, b in zip(some // 3, some % 3, strict=True)])
        )
        for some in drawn
    ]
    assert [found["ac1_low"], found["ac1_high"]] == pytest.approx(
        np.quantile([value for value in ac1 if value is not None], [0.025, 0.975]), abs=0.03
    )
    same = {name: {f"m{k}": "not" for k in range(9)} for name in ("Ada", "Bob")}
    found = pair_agreement(same, "Ada", "Bob", choices)
    assert (found["kappa"], found["kappa_low"], found["ac1"], found["ac1_low"]) == (None, None, 1, None)
    assert found["largest_share"] == 1


def test_shares_of_all_latents_hold_the_truth() -> None:
    """Five of each cluster, whatever its size: weighted, the interval holds the population's share; plain, it fails."""
    sizes, true = (2000, 300, 200, 100, 50), (0.9, 0.2, 0.1, 0.3, 0.5)
    population = float(np.dot(sizes, true) / sum(sizes))
    held, plain = [], []
    for seed in range(300):
        yes = np.random.default_rng(seed).binomial(5, true)
        rows = [{"cluster": c, **wilson(int(n), 5)} for c, n in enumerate(yes)]
        found = weighted_share(rows, sizes)
        held.append(found["low"] <= population <= found["high"])
        whole = wilson(int(yes.sum()), 25)
        plain.append(whole["low"] <= population <= whole["high"])
    assert np.mean(held) >= 0.93
    assert np.mean(plain) < 0.5


def test_shares_and_tests_by_hand() -> None:
    """Wilson's formula written out for 8 of 10; Fisher's tea: 3 of 4 right has p 17/70."""
    z, n, p = 1.959963984540054, 10, 0.8
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    found = wilson(8, 10)
    assert (found["low"], found["high"]) == pytest.approx(
        ((middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n))
    )
    assert wilson(0, 0)["share"] is None
    assert fisher(3, 1, 1, 3) == pytest.approx(17 / 70)
    assert fisher(0, 0, 1, 3) is None


def hand_made() -> Review:
    """Four selected latents in two clusters; lists of 3 and 2, and 3 decoys."""
    first = tuple(Item(item=f"m{k}", latent=k, cluster=k // 2) for k in range(4))
    groups = ("a", "a", "a", "b", "b", "decoy", "decoy", "decoy")
    second = tuple(Item(item=f"s{k}", latent=k, group=group, n_images=10 * k) for k, group in enumerate(groups))
    return Review(
        "atlas",
        (
            Question(question="meaningful", concepts="c", items=first, cluster_sizes=(30, 10)),
            Question(question="specific", concepts="c", comparison="x", a="CBFB", b="PML", items=second),
        ),
        {},
    )


def answered(review: Review, reviewer: str, prefix: str, letters: str) -> list[Verdict]:
    """`m.n`: verdicts on the items 0, 2, ... of a question by first letter; a dot is none."""
    names = {"m": "meaningful", "n": "not" if prefix == "m" else "neither", "u": "unsure", "a": "a", "b": "b"}
    return [say(review, reviewer, f"{prefix}{k}", names[letter]) for k, letter in enumerate(letters) if letter != "."]


def test_agreement_of_reviewers_who_skipped_some() -> None:
    review = hand_made()
    said = (
        answered(review, "Ada", "m", "mmnu")
        + answered(review, "Bob", "m", "mnn.")
        + answered(review, "Cem", "m", ".mnm")
    )
    said += answered(review, "Ada", "m", "n") + answered(review, "Ada", "m", "m")  # thought again, twice
    said.append(replace(said[0], item="gone"))
    found = agreement(said, review)
    assert (found["n_verdicts"], found["n_superseded"], found["n_not_asked"]) == (11, 2, 1)
    question = found["questions"][0]
    assert question["reviewers"]["Ada"] == {"n": 4, "verdicts": {"meaningful": 2, "not": 1, "unsure": 1}}
    pairs = {tuple(pair["reviewers"]): pair for pair in question["cohen"]}
    assert pairs["Ada", "Bob"]["n_items"] == 3
    assert pairs["Ada", "Bob"]["agreement"] == pytest.approx(2 / 3)
    assert pairs["Ada", "Bob"]["kappa"] == pytest.approx((2 / 3 - 4 / 9) / (1 - 4 / 9))
    assert pairs["Bob", "Cem"]["n_items"] == 2
    # mm., mnm, nnn, u.m: of the pairs of an item, all, one in three, all and none are equal
    observed = (1 + 1 / 3 + 1 + 0) / 4
    shares_of = (1 + 2 / 3 + 0 + 1 / 2) / 4, (1 / 3 + 1) / 4, (1 / 2) / 4
    chance, by_ac1 = sum(p * p for p in shares_of), sum(p * (1 - p) for p in shares_of) / 2
    whole = question["fleiss"]
    assert {name: whole[name] for name in ("n_reviewers", "n_items", "n_left_out", "n_by_all", "kappa", "ac1")} == {
        "n_reviewers": 3,
        "n_items": 4,
        "n_left_out": 0,
        "n_by_all": 2,
        "kappa": pytest.approx((observed - chance) / (1 - chance)),
        "ac1": pytest.approx((observed - by_ac1) / (1 - by_ac1)),
    }
    assert whole["largest_share"] == pytest.approx(5 / 10)
    assert -1 <= whole["kappa_low"] < whole["kappa"] < whole["kappa_high"] == 1
    assert -1 <= whole["ac1_low"] < whole["ac1"] < whole["ac1_high"] == 1
    shares = {(row["reviewer"], row["cluster"]): row for row in question["meaningful"]}
    assert [shares["Ada", c]["share"] for c in (0, 1, None)] == [1.0, 0.0, 0.5], "unsure is not meaningful"
    assert (shares["Bob", 1]["n"], shares["Bob", 1]["n_items"]) == (1, 2)
    # cluster 0 has 30 latents, cluster 1 has 10: three quarters of all, not half
    weighted = shares["Ada", None]["of_all_latents"]
    assert (weighted["share"], weighted["covers"]) == (0.75, 1)
    assert weighted["n_effective"] == pytest.approx(1 / (0.75**2 / 2 + 0.25**2 / 2))
    z, n, p = 1.959963984540054, weighted["n_effective"], 0.75
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    assert weighted["low"] == pytest.approx((p + z * z / (2 * n)) / (1 + z * z / n) - half)
    assert "of_all_latents" not in shares["Ada", 0]
    # of most: item 0 m m, 1 m n m, 2 n n n, 3 u m: half is not most
    assert [shares[None, c]["n_yes"] for c in (0, 1, None)] == [2, 0, 2]
    assert found["questions"][1]["reviewers"] == {}


def test_answers_against_decoys() -> None:
    review = hand_made()
    question = agreement(answered(review, "Ada", "s", "aabbunna"), review)["questions"][1]
    assert question["median_images"] == {"a": 10, "b": 35, "decoy": 60}
    found = question["specific"]["Ada"]
    assert found["said"]["a"] == {"a": 2, "b": 1, "neither": 0, "unsure": 0}
    assert found["said"]["b"] == {"a": 0, "b": 1, "neither": 0, "unsure": 1}
    assert found["said"]["decoy"] == {"a": 1, "b": 0, "neither": 2, "unsure": 0}
    assert found["confirmed"]["a"]["share"] == pytest.approx(2 / 3)
    assert found["decoys_called"]["a"]["share"] == pytest.approx(1 / 3)
    # 2 of 3 against 1 of 3: P(X >= 2), X hypergeometric of 3 named a among 6, 3 drawn: 9/20 + 1/20
    assert found["p_lists"]["a"] == pytest.approx(0.5)
    # a: 2 right, 1 wrong; b: 1 right of 1. P(X >= 2) of 2 called a among 4, 3 drawn: 3/6
    assert found["p_sides"] == pytest.approx(0.5)
    assert agreement([], review)["questions"][1]["specific"] == {}


# ------------------------------------------------------------------------------------------------ command line


def test_commands(site: Path, review: Review, tmp_path: Path) -> None:
    reviews = tmp_path / "reviews"
    for reviewer, letter in (("Ada", "meaningful"), ("Bob", "not"), ("Eve", "not")):
        for item in review.questions[0].items:
            save_verdict(reviews, say(review, reviewer, item.item, letter))
    for item in review.questions[1].items:
        save_verdict(reviews, say(review, "Ada", item.item, "a"))
    n = len(review.questions[0].items)
    done = run("atlas", "export", site, "--reviews", reviews, "-o", tmp_path / "out.csv")
    assert done.exit_code == 0, done.output
    assert f"{3 * n + len(review.questions[1].items)} verdicts of 3 reviewers" in done.stdout
    fails("out.csv is there already", "atlas", "export", site, "--reviews", reviews, "-o", tmp_path / "out.csv")
    again = run("atlas", "export", site, "--reviews", reviews, "-o", tmp_path / "out.csv", "--overwrite")
    assert again.exit_code == 0
    page = run("atlas", "agreement", site, "--reviews", reviews)
    assert page.exit_code == 0, page.output
    assert f"Ada and Bob: Cohen's kappa 0.000 over {n} concepts, 0.0% equal, Gwet's AC1 -0.333" in page.stdout
    assert f"Bob and Eve: Cohen's kappa n/a over {n} concepts, 100.0% equal, Gwet's AC1 1.000" in page.stdout
    assert "all 3: Fleiss' kappa" in page.stdout
    assert "80% or more of the verdicts are one and the same: a kappa says little there" in page.stdout
    assert "Bob, of all latents (clusters weighted by size): meaningful 0.0% (0.0 to" in page.stdout
    assert f"most reviewers, all: meaningful 0 of {n} (0.0%, 0.0 to" in page.stdout
    assert "Ada: called specific to sick" in page.stdout
    found = json.loads(run("atlas", "agreement", site, "--reviews", reviews, "--json").stdout)
    assert found == agreement(read_verdicts(reviews), review)
    fails("no atlas at .*: nothing is there. Make one with cyto atlas build", "atlas", "serve", tmp_path / "none")
    fails(
        "no atlas at .*it holds concepts",
        "atlas",
        "agreement",
        make_concepts(tmp_path / "c", {"x": {"frequency": [1.0]}}).root,
    )
    fails("no reviews at .*atlas.reviews; cyto atlas serve takes some", "atlas", "agreement", site)
