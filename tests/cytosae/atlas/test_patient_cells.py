"""Cells of patients, diseases and pairs in a whole atlas, against plain loops over all images; another atlas beside."""

import base64
import re
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from atlas_maker import DISEASES, IMAGES_PER_PATIENT, LABELS, N_LATENTS, PATIENTS, SCRIPT, Cohort
from command_line import run

from cytosae.atlas import AtlasConfig, Inputs, open_inputs
from cytosae.atlas.cell_choice import SHOWN, CellChoice, choose_cells
from cytosae.atlas.cell_scan import type_sums
from cytosae.atlas.cell_types import cell_types
from cytosae.atlas.cohort import Cohort as Patients
from cytosae.atlas.comparisons import taken_into_account
from cytosae.atlas.latent_lists import higher_on
from cytosae.atlas.matched_concepts import Pairs
from cytosae.atlas.odd_cells import likeness
from cytosae.atlas.patient_pages import z_by_chance
from cytosae.compare import CompareConfig
from cytosae.maps import Sources
from stores import LatentStore, ResultStore, begin_results
from stores.spec import ATLAS, MATCH


@pytest.fixture(scope="module")
def atlas(cohort: Cohort, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "atlas"
    done = run(*cohort.build, out)
    assert done.exit_code == 0, done.output
    return out


@pytest.fixture(scope="module")
def inputs(cohort: Cohort) -> Inputs:
    sources = Sources([LatentStore(cohort.root / "latents")], [lambda row: "not looked at"])
    root = cohort.root
    return open_inputs(root / "barcodes", root / "concepts", sources, comparisons=[root / "compare"])


@pytest.fixture(scope="module")
def patients(inputs: Inputs) -> Patients:
    return Patients(inputs.barcodes, inputs.tau, pseudonyms=None)


@pytest.fixture(scope="module")
def choice(inputs: Inputs, patients: Patients) -> CellChoice:
    return choose_cells(inputs, patients, AtlasConfig(patient_concepts=4))


def readable(cohort: Cohort) -> list[int]:
    return [n for n in range(len(cohort.dense)) if n != 4]


def ranked(cohort: Cohort, latent: int, among: list[int]) -> list[int]:
    """Images by image activation, the largest first."""
    values = cohort.dense[:, :, latent].mean(axis=1)
    return [n for n in sorted(among, key=lambda n: (-values[n], n)) if values[n] > 0]


def one_each(cohort: Cohort, images: list[int]) -> list[int]:
    """The first image of each patient."""
    seen: dict[object, int] = {}
    for image in images:
        seen.setdefault((cohort.patient_of[image], (image // IMAGES_PER_PATIENT) % 2), image)
    return [*seen.values()]


def ordered(images: list[int], values: np.ndarray) -> list[int]:
    """The smallest first; two images alone are as alike to each other, up to rounding."""
    return sorted(images, key=lambda n: (round(float(values[n]), 5), n))


@pytest.mark.stress
def test_own_cells_stand_beside_those_of_other_patients(cohort: Cohort, patients: Patients, choice: CellChoice) -> None:
    for number, name in enumerate(patients.real_names):
        mine = [n for n in readable(cohort) if cohort.patient_of[n] == name]
        others = [n for n in readable(cohort) if cohort.patient_of[n] not in (name, None)]
        cells = choice.patients[number]
        assert [*cells.beside] == [row["latent"] for row in cells.characteristic[:4]]
        for latent, beside in cells.beside.items():
            assert beside.mine == ranked(cohort, latent, mine)[:SHOWN]
            assert beside.others == one_each(cohort, ranked(cohort, latent, others))[:SHOWN]
        assert cells.unusual is None, "four others with the disease in the dataset"
        assert not cells.beside_peers


@pytest.mark.stress
def test_both_sides_of_a_disease_and_of_a_pair(cohort: Cohort, inputs: Inputs, choice: CellChoice) -> None:
    sides = [[n for n in readable(cohort) if cohort.disease_of[n] == disease] for disease in DISEASES]
    for number in (0, 1):
        assert len(choice.diseases[number]) >= 1
        for latent, beside in choice.diseases[number].items():
            assert beside.mine == one_each(cohort, ranked(cohort, latent, sides[number]))[:SHOWN]
            assert beside.others == one_each(cohort, ranked(cohort, latent, sides[1 - number]))[:SHOWN]
    chosen = [latent for side in "ab" for latent in higher_on(inputs.comparison_table(0), side, 12)]
    assert sorted(choice.pairs[0]) == sorted(chosen), "no two are active in the same images"
    for latent, beside in choice.pairs[0].items():
        assert beside.mine == one_each(cohort, ranked(cohort, latent, sides[0]))[:SHOWN]
        assert beside.others == one_each(cohort, ranked(cohort, latent, sides[1]))[:SHOWN]


def test_typical_cells_and_odd_ones_of_a_type(cohort: Cohort, patients: Patients, choice: CellChoice) -> None:
    """Their twins in plain loops: test_odd_cells.py."""
    types = cell_types(patients)
    alike = likeness(patients, types, type_sums(patients, types))
    for number, name in enumerate(patients.real_names):
        mine = [n for n in readable(cohort) if cohort.patient_of[n] == name]
        found = choice.patients[number]
        for kind in found.types:
            of_kind = [n for n in mine if patients.labels[n] == kind.label]
            assert kind.n == len(of_kind)
            ranked_ones = ordered(of_kind, np.nan_to_num(-alike.to_own, nan=1))
            assert [image for image, _ in kind.typical] == ranked_ones[:SHOWN]
        assert sum(kind.n for kind in found.types) == len(mine)
        assert choice.portraits[number] == found.types[0].typical[0][0]
        assert bool(found.atypical) == (name != SCRIPT), "one of its five is unreadable, and four are too few"
        common = LABELS[PATIENTS.index(name) // 2 % 2]
        assert {patients.labels[odd.image] for odd in (*found.atypical, *found.unlike)} <= {common}
        for odd in (*found.atypical, *found.unlike):
            assert {(odd.image, latent) for latent in dict(odd.more)} <= {*choice.marks}
            assert odd.alike < odd.usual


def test_only_blocks_with_an_image_asked_for_are_read(patients: Patients, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cytosae.atlas.cohort._IMAGES", 16)
    blocks = dict(patients.image_blocks("X"))
    assert [*blocks] == [*range(0, 99, 16)]
    of = np.zeros(99, bool)
    of[[17, 80, 95]] = True
    some = dict(patients.image_blocks("X", of=of))
    assert [*some] == [16, 80]
    for first, rows in some.items():
        np.testing.assert_array_equal(rows.values, blocks[first].values)
    of[:] = False
    assert not [*patients.image_blocks("X", of=of)]


def test_the_order_has_every_active_latent_once(choice: CellChoice) -> None:
    assert sorted(choice.order.order) == list(range(N_LATENTS - 1)), "the last is never active"
    assert choice.order.n_families == 8


# ------------------------------------------------------------------------------------------- pages


def frames_of(text: str) -> list[tuple[int, np.ndarray, float]]:
    """(page of the image, its map in 0 to 255, share) of every frame with a map."""
    found = re.findall(r'href="\.\./images/(\d+)\.html" class="frame" data-map="([^"]+)" data-share="([^"]+)"', text)
    return [(int(n), np.frombuffer(base64.b64decode(steps), np.uint8), float(share)) for n, steps, share in found]


@pytest.mark.stress
def test_maps_of_a_concept_are_on_one_scale_on_both_sides(atlas: Path, cohort: Cohort, patients: Patients) -> None:
    number = patients.real_names.index("Quentin 03")
    text = (atlas / "patients" / f"{number}.html").read_text()
    rows = text.split('<article class="sides"')[1:]
    assert len(rows) == 6, "there are too few others with the disease for unusual ones"
    for row in rows:
        latent = int(re.findall(r'data-latent="(\d+)"', row)[0])
        frames = frames_of(row)
        assert len(frames) > SHOWN
        largest = max(cohort.dense[image, 1:, latent].max() for image, _, _ in frames)
        for image, steps, share in frames:
            np.testing.assert_allclose(
                steps / 255 * share * largest, cohort.dense[image, 1:, latent], atol=largest / 400
            )


def test_pages_of_pairs_have_both_sides_and_their_numbers(atlas: Path, inputs: Inputs) -> None:
    (path,) = (atlas / "pairs").glob("*.html")
    text = path.read_text()
    rows = text.split('<article class="sides')[1:]
    table = inputs.comparison_table(0).to_pylist()
    found = [row for row in table if row["q"] is not None and row["q"] <= 0.05]
    assert 0 < len(found) < len(rows)
    top = []
    for side in "ab":  # twelve of each side: those with q of at most 0.05 come first
        listed = sorted((row for row in table if row[f"rank_{side}"]), key=lambda row: row[f"rank_{side}"])
        top += sorted(listed, key=lambda row: row not in found)[:12]
    at_a_place = {int(re.findall(r'data-latent="(\d+)"', row)[0]) for row in rows if "at the same patch" in row}
    top.sort(key=lambda row: (row not in found, row["latent"] in at_a_place))
    assert [int(re.findall(r'data-latent="(\d+)"', row)[0]) for row in rows] == [row["latent"] for row in top]
    assert f'q of at most 0.05 only <span class="n">{len(found)}</span>' in text
    for row, expected in zip(rows, top, strict=True):
        numbers = re.findall(r"<dd>([^<]*)</dd>", row)
        assert float(numbers[2]) == pytest.approx(expected["difference"], rel=0.01)
        assert float(numbers[3]) == pytest.approx(expected["q"], rel=0.01)


def test_shares_of_types_are_of_labelled_images(atlas: Path, cohort: Cohort, patients: Patients) -> None:
    number = patients.real_names.index(SCRIPT)
    text = (atlas / "patients" / f"{number}.html").read_text().split('class="shares"')[1].split("</svg>")[0]
    shown = re.findall(r"<title>([^<]*): (\d+) images</title>", text)
    assert sorted(shown) == [("&lt;img src=x onerror=alert(2)&gt;", "1"), ("neutrophil", "4")], "one is unreadable"


@pytest.mark.parametrize(
    ("asked", "words", "is_of_one_mix"),
    [
        ({}, "", False),
        ({"adjust": ("age", "site"), "strata": "sex"}, "sex, age, site", False),  # the mix of cells stays
        ({"within_label": "blast", "adjust": ("age",)}, "images labelled blast only, age", True),
        ({"standardize": "label"}, "the mix of label", True),
    ],
)
def test_what_a_comparison_takes_into_account(asked: dict[str, Any], words: str, is_of_one_mix: bool) -> None:
    spec = asdict(CompareConfig(a="A", b="B", **asked))
    assert taken_into_account(spec) == (words, is_of_one_mix)


def test_pages_stay_small(atlas: Path) -> None:
    """7 kB for each concept with its cells on two sides, 40 kB for all else."""
    for folder in ("patients", "diseases", "pairs"):
        for path in (atlas / folder).glob("*.html"):
            assert path.stat().st_size <= 40_000 + 7_000 * path.read_text().count('<article class="sides')


def test_families_have_all_active_latents(atlas: Path) -> None:
    text = (atlas / "families.html").read_text()
    assert sum(map(int, re.findall(r"(\d+) latents, \d+ with a page", text))) == N_LATENTS - 1
    assert "1 latent never active belongs to none" in text
    letters = re.findall(r'class="of-family" id="(\w+)"', text)
    assert letters == ["I", "II", "III", "IV", "V", "VI", "VII", "VIII"]
    names = re.findall(r"</span> (.*?) <span", text)
    assert len({*names}) == len(names) == 8, "no two are called the same"
    linked = re.findall(r'families\.html#(\w+)"', (atlas / "patients" / "0.html").read_text())
    assert linked == letters


# ------------------------------------------------------------------------------------------- another atlas


def match_of(a: str, b: str, out: Path, rows: list[dict[str, object]]) -> Path:
    import pyarrow as pa

    writer = begin_results(out, MATCH, {"a": [a], "b": [b]})
    writer.write_table("matches", pa.Table.from_pylist(rows))
    writer.finish({"names": ["<one>", "<other>"], "n_counterparts": 1, "null_p99": 0.25})
    return out


def first_but(atlas: Path, latent: int) -> int:
    return next(n for n in (ResultStore(atlas, ATLAS).header.summary or {})["latents"] if n != latent)


def test_pairs_beyond_those_shown_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more pairs than are shown, a page says so, and has neither a link nor a picture."""
    monkeypatch.setattr("cytosae.atlas.matched_concepts._MOST", 2)
    theirs = {"latent": 8, "images": [4], "labels": [None], "maps": [b"\1"], "largest": [1.0]}
    rows = [{"latent": latent, "other": theirs, "match": None} for latent in (5, 3, 9)]
    other: Any = SimpleNamespace(has_picture=lambda image: image == 4)
    pairs = Pairs(other, rows, {"names": ["a", "b"], "is_matched": True})
    assert [row["latent"] for row in pairs.shown] == [5, 3]
    first, last, none = (pairs.of(latent)["match"] for latent in (5, 9, 1))
    assert first["link"] == "beside.html#latent-5"
    assert first["cell"] == {"image": 4, "label": "", "map": "AQ==", "largest": 1.0, "is_seen": True}
    assert last["link"] is last["cell"] is None
    assert none is None


@pytest.mark.stress
def test_another_atlas_stands_beside(cohort: Cohort, atlas: Path, tmp_path: Path) -> None:
    """By a match, latent 3 of this one is a latent of the other; pictures and maps are the other's own."""
    barcodes = ResultStore(atlas, ATLAS).header.spec["barcodes"]
    shown = ResultStore(atlas, ATLAS).table("concepts").to_pylist()
    theirs = next(row for row in shown if row["latent"] != 3 and len(row["images"]) == 3)
    row = {"latent_a": 3, "latent_b": theirs["latent"], "correlation": 0.75, "within_correlation": 0.5, "q": 0.01}
    lost = {**row, "latent_a": 39, "is_counterpart": False, "cosine": None}
    match = match_of(barcodes, barcodes, tmp_path / "match", [{**row, "is_counterpart": True, "cosine": None}, lost])
    out = tmp_path / "both"
    done = run(*cohort.build, out, "--beside", atlas, "--match", match)
    assert done.exit_code == 0, done.output
    text = (out / "beside.html").read_text()
    (article,) = text.split('<article class="sides"')[1:]
    assert "0.75" in article
    assert "counterpart" in article
    assert "&lt;other&gt;" in article
    for image, steps in zip(theirs["images"], theirs["maps"], strict=True):
        assert f'src="beside/{image}.jpg"' in article
        assert base64.b64encode(steps).decode() in article
        assert (out / "beside" / f"{image}.jpg").read_bytes() == (atlas / "pictures" / f"{image}.jpg").read_bytes()
    own, unmatched = ((out / "concepts" / f"{latent}.html").read_text() for latent in (3, first_but(out, 3)))
    section = own.split('<section id="beside">')[1].split("</section>")[0]
    assert 'href="../beside.html#latent-3"' in section
    assert 'id="latent-3"' in article
    assert f"Latent {theirs['latent']} of &lt;other&gt; answers to the same images: correlation 0.75" in section
    assert f'src="../beside/{theirs["images"][0]}.jpg"' in section
    assert base64.b64encode(theirs["maps"][0]).decode() in section
    assert "Its match has no page in the atlas of &lt;other&gt;." in unmatched
    assert '<a href="beside.html"' in (out / "index.html").read_text()
    assert "beside.html" not in (atlas / "index.html").read_text()

    wrong = match_of(barcodes, "9" * 64, tmp_path / "wrong", [lost])
    refused = run(*cohort.build, tmp_path / "not", "--beside", atlas, "--match", wrong)
    assert refused.exit_code == 1
    assert "does not match the barcodes of this atlas with those of" in refused.stderr
    alone = run(*cohort.build, tmp_path / "not", "--match", match)
    assert "give it with --beside" in alone.stderr


@pytest.mark.stress
def test_without_a_match_the_other_atlas_is_of_the_same_sae(cohort: Cohort, atlas: Path, tmp_path: Path) -> None:
    done = run(*cohort.build, tmp_path / "both", "--beside", atlas, "--pages", "top", "--top", 5)
    assert done.exit_code == 0, done.output
    text = (tmp_path / "both" / "beside.html").read_text()
    rows = [int(number) for number in re.findall(r'<article class="sides" data-latent="(\d+)"', text)]
    here, there = (
        set((ResultStore(each, ATLAS).header.summary or {})["latents"]) for each in (tmp_path / "both", atlas)
    )
    assert set(rows) == here & there
    (atlas / "pictures").mkdir(exist_ok=True)
    (picture,) = [
        path for path in sorted((atlas / "pictures").iterdir()) if path.stem in re.findall(r"beside/(\d+)", text)
    ][:1]
    before = picture.read_bytes()
    picture.write_bytes(before + b"more")
    damaged = run(*cohort.build, tmp_path / "not", "--beside", atlas)
    picture.write_bytes(before)
    assert damaged.exit_code == 1
    assert "is not the file that was written" in damaged.stderr


def test_the_z_that_chance_gives() -> None:
    """Of so many normal numbers one is beyond it, on average."""
    rng = np.random.default_rng(0)
    for n in (10, 800):
        beyond = (np.abs(rng.normal(size=(2000, n))) > z_by_chance(n)).sum(axis=1)
        assert beyond.mean() == pytest.approx(1, abs=0.1)
    assert z_by_chance(0) == 0
