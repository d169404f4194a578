"""The atlas without a browser: numbers are the stores', names stay names, every link leads somewhere."""

import base64
import csv
import hashlib
import html
import io
import json
import re
import shutil
import stat
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from atlas_maker import DATASETS, DISEASES, IMAGES_PER_PATIENT, N_LATENTS, PATIENTS, SCRIPT, Cohort, data
from command_line import run
from latent_stores import local_client
from PIL import Image

from cytocache.pictures import Pictures
from cytosae.atlas import AtlasConfig
from cytosae.atlas import cohort as atlas_cohort
from cytosae.atlas.build import _of_each_tenth
from cytosae.atlas.cohort import Groups, Row
from cytosae.atlas.examples import BIN_EDGES
from cytosae.atlas.inputs import open_inputs
from cytosae.atlas.latent_lists import n_asked, unusual
from cytosae.atlas.pictures import jpeg
from cytosae.atlas.pseudonyms import hide_order
from cytosae.atlas.site import script_data
from cytosae.barcodes import BarcodeConfig, write_barcodes
from cytosae.concepts import read_selection
from cytosae.maps import Sources
from cytosae.relations.patient_z import as_z, describe_others, prediction_t
from cytosae.review.items import ReviewConfig, _jpeg, estimate_pictures
from cytosae.review.questions import read_review, sent
from cytosae.search import SearchConfig, search_cells
from stores import BadInput, ConceptStore, LatentStore, ResultStore
from stores.csr import CsrRows
from stores.files import sha256_file
from stores.spec import ATLAS, COMPARISON

VOID = {"meta", "link", "img", "br", "input"}


@pytest.fixture(scope="module")
def atlas(cohort: Cohort, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "atlas"
    done = run(*cohort.build, out)
    assert done.exit_code == 0, done.output
    assert "1 image could not be shown" in done.stderr
    return out


class Page(HTMLParser):
    """Elements of a page with their attributes, its text, and that its elements are closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.text = path, ""
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self.feed(path.read_text())
        assert not self._open, f"{path}: {self._open} stay open"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open += [] if tag in VOID else [tag]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"{self.path}: </{tag}>"

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str, css_class: str = "") -> list[dict[str, str | None]]:
        return [found for name, found in self.elements if name == tag and css_class in (found.get("class") or "")]


def pages(atlas: Path) -> list[Page]:
    return [Page(path) for path in sorted(atlas.rglob("*.html"))]


def everything_in(folder: Path) -> str:
    """Every byte of every file as text, and what compressed tables hold."""
    raw = "".join(path.read_bytes().decode("utf-8", "replace") for path in folder.rglob("*") if path.is_file())
    tables = [str(pq.read_table(path).to_pydict()) for path in folder.rglob("*.parquet")]
    return "".join((raw, *tables, *(str(path.relative_to(folder)) for path in folder.rglob("*"))))


def who_is_who(path: Path) -> tuple[str, dict[str, str], dict[str, str]]:
    """The key; pseudonym -> patient; number -> image id."""
    key, *rows = [
        (row["pseudonym"], row["original"].removeprefix("'")) for row in csv.DictReader(path.read_text().splitlines())
    ]
    images = {shown.split()[1]: real for shown, real in rows if shown.startswith("image ")}
    return key[1], {shown: real for shown, real in rows if not shown.startswith("image ")}, images


def section(page: Page, name: str) -> str:
    """The HTML of a section of a page, up to the next one with an id."""
    return re.split(r'<section id="', page.path.read_text().split(f'<section id="{name}">')[1])[0]


def maps_in(text: str) -> list[dict[str, str]]:
    """The frames with a map in a piece of HTML: href, map, share."""
    found = re.findall(r'<a href="([^"]+)" class="frame" data-map="([^"]+)" data-share="([^"]+)"', text)
    return [dict(zip(("href", "map", "share"), one, strict=True)) for one in found]


def headed_rows(page: Page, heading: str) -> list[list[str]]:
    """Cells of the first table behind a heading."""
    html = page.path.read_text()
    body = html.split(f">{heading}<")[1].split("<tbody>")[1].split("</tbody>")[0]
    return [
        [re.sub(r"<[^>]+>", "", cell).strip() for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)]
        for row in body.split("<tr>")[1:]
    ]


# ------------------------------------------------------------------------------------------- the site as a whole


@pytest.mark.stress
def test_every_link_leads_into_the_site(atlas: Path) -> None:
    kinds = {str(page.path.relative_to(atlas).parent) for page in pages(atlas)}
    assert kinds == {".", "concepts", "patients", "diseases", "pairs", "images"}
    assert_links_lead_somewhere(atlas)


def assert_links_lead_somewhere(atlas: Path) -> None:
    for page in pages(atlas):
        links = [value for _, attributes in page.elements for key in ("href", "src") if (value := attributes.get(key))]
        assert len(links) >= 6
        ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
        assert len(ids) == len(set(ids)), page.path
        for link in links:
            assert not re.match(r"[a-z]+:|/", link), f"{page.path}: {link}"
            target = page.path.parent / link.split("#")[0] if not link.startswith("#") else page.path
            assert target.is_file(), f"{page.path} links to {link}"
            assert target.resolve().is_relative_to(atlas.resolve())


@pytest.mark.stress
def test_no_page_runs_what_is_not_the_atlas_own(atlas: Path) -> None:
    """No inline script, style or handler; the policy allows none; nothing is asked of a network."""
    for page in pages(atlas):
        policies = [found["content"] or "" for found in page.all("meta") if found.get("http-equiv")]
        assert policies[0].startswith("default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:;")
        for tag, attributes in page.elements:
            assert not [name for name in attributes if name.startswith("on") or name == "style"], page.path
            assert tag not in ("style", "iframe", "b", "object", "base"), page.path
            assert tag != "script" or attributes["src"], page.path
        assert page.all("html")[0]["lang"] == "en"
    for script in atlas.rglob("*.js"):
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|fetch\(|XMLHttp|innerHTML|eval\(", script.read_text())


def test_names_from_the_data_stay_names(atlas: Path) -> None:
    patient = Page(atlas / "patients" / "0.html")
    names = [Page(path).text for path in sorted((atlas / "patients").glob("*.html"))]
    for name in PATIENTS:
        assert any(f"Patient {name}" in text for text in names)
    assert f"Patient {SCRIPT}" in " ".join(names)
    assert DISEASES[0] in patient.text or DISEASES[1] in patient.text
    for path in (atlas / "data").glob("*.js"):
        assert not {"<", ">", "&", "\u2028", "\u2029"} & {*path.read_text()}
    labels = data(atlas, "latents-1")["labels"]
    assert "<img src=x onerror=alert(2)>" in labels
    assert DATASETS[1] in Page(atlas / "latents.html").text
    assert DATASETS[1] in data(atlas, "gallery")["datasets"]
    assert "<img src=x onerror=alert(2)>" in Page(atlas / "index.html").text


def test_script_data_can_end_nothing() -> None:
    hostile = "</script><!--\u2028\u2029&\\\"'"
    raw = script_data("x", {"name": hostile})
    assert not set(b"<>&") & set(raw)
    assert json.loads(raw.decode().removeprefix('CYTO.add("x",').removesuffix(");\n"))["name"] == hostile


def test_the_file_list_and_the_header_cover_everything(atlas: Path) -> None:
    store = ResultStore(atlas, ATLAS)
    listed = {row["name"]: row for row in store.table("files").to_pylist()}
    there = {str(path.relative_to(atlas)) for path in atlas.rglob("*") if path.is_file()}
    assert there - listed.keys() == {"atlas.json", "files.parquet", "review.json", "runs.jsonl"}
    for name, row in listed.items():
        assert sha256_file(atlas / name) == row["sha256"]
        assert (atlas / name).stat().st_size == row["bytes"]
    summary = store.header.summary or {}
    assert summary["latents"] == sorted(int(path.stem) for path in (atlas / "concepts").glob("*.html"))
    assert set(summary["selection"]) <= set(summary["latents"])


# ------------------------------------------------------------------------------------------- numbers


def shown_latents(atlas: Path) -> list[int]:
    return list((ResultStore(atlas, ATLAS).header.summary or {})["latents"])


def test_pages_of_the_selection_and_of_the_top_lists(atlas: Path, cohort: Cohort) -> None:
    selected = pq.read_table(cohort.root / "concepts" / "selection.parquet")["latent"].to_pylist()
    table = pq.read_table(cohort.root / "compare" / "differential.parquet")
    ranked = [row["latent"] for row in table.to_pylist() if row["rank_a"] is not None or row["rank_b"] is not None]
    assert shown_latents(atlas) == sorted({*selected, *ranked})
    assert 3 in ranked


def test_statistics_are_the_concepts(atlas: Path, cohort: Cohort) -> None:
    concepts = ConceptStore(cohort.root / "concepts")
    for number, dataset in enumerate(concepts.datasets):
        table, found = concepts.latents(dataset), data(atlas, f"latents-{number}")
        for name in ("frequency", "mean_activation", "max_activation", "n_images", "label_entropy"):
            np.testing.assert_array_equal(found[name], table[name].to_numpy().astype(found[name].dtype))
        names = [*found["labels"], None]
        assert [names[code] for code in found["top_label"]] == table["top_label"].to_pylist()
    built = data(atlas, "built")
    assert built["latents"].tolist() == shown_latents(atlas)
    assert built["n_latents"] == N_LATENTS


def test_effects_of_an_ablation_stand_on_the_page(atlas: Path) -> None:
    """Of the latents in its folder; names of classes are text."""
    page = Page(atlas / "concepts" / "3.html")
    for words in (
        "What happens without it",
        "final CLS, share of its norm",
        "0.5",
        "0.0099",
        f"by the probe of barcodes, of {SCRIPT}",
    ):
        assert words in page.text
    assert "logit" not in page.text
    others = [latent for latent in shown_latents(atlas) if latent not in (0, 3)]
    assert "What happens without it" not in (atlas / "concepts" / f"{others[0]}.html").read_text()


def test_reference_images_have_the_maps_of_the_store(atlas: Path, cohort: Cohort) -> None:
    """As shares of the page's largest value, in 256 steps of the image's own largest."""
    concepts, latent = ConceptStore(cohort.root / "concepts"), shown_latents(atlas)[0]
    page = Page(atlas / "concepts" / f"{latent}.html")
    frames = maps_in(section(page, "references"))
    top = [row for name in concepts.datasets for row in concepts.top_images(latent, name).to_pylist()]
    assert [frame["href"] for frame in frames] == [f"../images/{row['image_index']}.html" for row in top]
    more = maps_in(section(page, "deciles"))
    images = [int(Path(frame["href"]).stem) for frame in (*frames, *more)]
    largest = max(cohort.dense[image, 1:, latent].max() for image in images)
    for frame, image in zip([*frames, *more], images, strict=True):
        steps = np.frombuffer(base64.b64decode(frame["map"]), np.uint8)
        shares = steps / 255 * float(frame["share"])
        np.testing.assert_allclose(shares, cohort.dense[image, 1:, latent] / largest, atol=1 / 500)
    assert all(row["label"] is None or row["label"] in page.text for row in top)
    best = max(top, key=lambda row: row["value"])
    assert maps_in(page.path.read_text())[0]["href"] == f"../images/{best['image_index']}.html"


def test_examples_come_from_all_deciles_and_near_misses_lack_the_latent(atlas: Path, cohort: Cohort) -> None:
    activation = cohort.dense.mean(axis=1)
    n_shown = 0
    for latent in shown_latents(atlas):
        page = Page(atlas / "concepts" / f"{latent}.html")
        active = np.sort(activation[activation[:, latent] > 0, latent])
        text = page.path.read_text()
        assert ('<section id="deciles">' in text) == (len(active) >= 20)
        for part in section(page, "deciles").split("<li>")[1:] if len(active) >= 20 else ():
            named = re.findall(r"<h3>(\w+)", part)[0]
            decile = {"strongest": 10, "weakest": 1}.get(named) or int(named)
            for frame in maps_in(part):
                value = activation[int(Path(frame["href"]).stem), latent]
                rank = int(np.searchsorted(active, value * (1 - 1e-6)))
                assert rank * 10 // len(active) + 1 == decile
                n_shown += 1
        if '<section id="near">' in text:
            near = section(page, "near")
            assert "data-map" not in near
            assert not any(activation[int(n), latent] for n in re.findall(r'href="../images/(\d+).html"', near))
    assert n_shown > 100


def test_a_sentence_says_what_the_page_shows(atlas: Path) -> None:
    """Each of its parts leads to a section of the page."""
    page = Page(atlas / "concepts" / "3.html")
    said = re.sub("<[^>]+>", "", page.path.read_text().split('sentence">')[1].split("</p>")[0])
    said = " ".join(html.unescape(said).split())
    assert said.startswith("Active in ")
    for words in ("labelled reference images", "patients", "changing it changes the backbone's output"):
        assert words in said
    assert re.search(r"in AML <.title><b>& co (as|but not) in control \(q 0.0", said)
    for latent in shown_latents(atlas):
        found = Page(atlas / "concepts" / f"{latent}.html")
        ids = {attributes.get("id") for _, attributes in found.elements}
        links = [link["href"] or "" for link in found.all("a") if (link["href"] or "").startswith("#")]
        assert len(links) >= 4
        assert {link[1:] for link in links} <= ids


def test_cells_like_one_are_those_of_a_search(atlas: Path, cohort: Cohort) -> None:
    """Among the images with a page; a second list, of other patients, where the first one has the patient's own."""
    with_page = {int(path.stem) for path in (atlas / "images").glob("*.html")}
    n_lists = 0
    for image in (0, 1, 9, 22, 30):
        found = search_cells(cohort.root / "barcodes", cohort.image_ids[image], SearchConfig(top=100)).images
        rows = [row for row in found if row["by"] == "fingerprint"]
        text = (atlas / "images" / f"{image}.html").read_text()
        lists = [part.split("</ul>")[0] for part in text.split('<ul class="cells alike">')[1:]]
        n_lists += len(lists)
        assert len(lists) == 2 or "All are of other patients." in text
        others = [row for row in rows if not row["is_own_patient"]]
        for part, wanted in zip([lists[0], lists[-1]], (rows, others), strict=True):
            of = {cohort.image_ids.index(row["image_id"]): row["similarity"] for row in wanted}
            best = sorted((value for n, value in of.items() if n in with_page), reverse=True)[:6]
            numbers = [int(n) for n in re.findall(r'<a href="(\d+).html"', part)]
            assert [of[n] for n in numbers] == pytest.approx(best, abs=1e-5)
    assert n_lists >= 5


def test_histograms_count_image_activations(atlas: Path, cohort: Cohort) -> None:
    activation = cohort.dense.mean(axis=1)
    dataset_of = np.array([(n // IMAGES_PER_PATIENT) % 2 for n in range(len(activation))])
    for latent in shown_latents(atlas)[:4]:
        page = Page(atlas / "concepts" / f"{latent}.html")
        counts = [
            int(found.replace(",", "")) for found in re.findall(r"<title>([\d,]+) images, ", page.path.read_text())
        ]
        wanted: list[int] = []
        for number in sorted(set(dataset_of), key=lambda n: DATASETS[n]):
            values = activation[(dataset_of == number) & (activation[:, latent] > 0), latent]
            wanted += [count for count in np.histogram(np.log10(values), BIN_EDGES)[0].tolist() if count]
        assert counts == wanted


def test_tokens_of_an_image_are_those_of_the_store(atlas: Path, cohort: Cohort) -> None:
    images = sorted(int(path.stem) for path in (atlas / "images").glob("*.html"))
    assert 4 not in images  # it could not be read
    for image in images[:3]:
        found, dense = data(atlas, f"image-{image}"), cohort.dense[image]
        again = np.zeros((257, N_LATENTS))
        ends = np.cumsum(found["counts"].astype(int))
        for n, latent in enumerate(found["latents"]):
            for at in range(ends[n] - found["counts"][n], ends[n]):
                again[1 + int(found["patches"][at]), latent] = found["values"][at]
        again[0, found["cls_latents"]] = found["cls_values"]
        np.testing.assert_allclose(again * found["largest"], dense, rtol=2**-10, atol=found["largest"] * 2**-24)
        active = np.flatnonzero(dense.any(axis=0))
        assert found["has_page"].tolist() == sorted({*active.tolist()} & {*shown_latents(atlas)})


def barcodes_of(cohort: Cohort) -> dict[str, np.ndarray]:
    readable = np.array([n != 4 for n in range(len(cohort.dense))])
    counts = (cohort.dense > np.float32(0.2)).sum(axis=1)
    patients = np.array(cohort.patient_of, object)
    return {name: counts[(patients == name) & readable].mean(axis=0) for name in PATIENTS}


def page_of(atlas: Path, name: str) -> Page:
    (found,) = [page for page in map(Page, (atlas / "patients").glob("*.html")) if f"Patient {name}\n" in page.text]
    return found


def test_characteristic_and_unusual_latents_of_a_patient(atlas: Path, cohort: Cohort) -> None:
    barcodes = barcodes_of(cohort)
    name = PATIENTS[2]
    page, mine = page_of(atlas, name), barcodes[name]
    mean = np.mean([*barcodes.values()], axis=0)
    rows = headed_rows(page, "Most characteristic concepts")
    order = sorted(range(N_LATENTS), key=lambda latent: (mean[latent] - mine[latent], latent))
    assert [int(row[0]) for row in rows] == [latent for latent in order[:12] if mine[latent] > mean[latent]]
    assert float(rows[0][3]) == pytest.approx(mine[order[0]] - mean[order[0]], rel=0.01)

    # peers are of one dataset: four others here, too few; the z itself is that of `cyto concept patient`
    assert "5 other patients with it in the dataset; here are 4" in " ".join(page.text.split())
    others = np.array([barcodes[other] for other in PATIENTS[:9] if other != name])
    clumps = np.linspace(1, 3, N_LATENTS)
    z = as_z(prediction_t(mine, describe_others(others, clumps, 3.0), IMAGES_PER_PATIENT), 8)
    everybody = np.vstack([others, mine])
    logs = np.log1p(3 * everybody)
    plain, squared, log_plain, log_squared = (
        values.sum(0)[None] for values in (everybody, everybody**2, logs, logs**2)
    )
    groups = Groups(
        np.array([9]), np.array([3.0]), plain, squared, log_plain, log_squared, clumps[None], np.zeros(N_LATENTS, int)
    )
    found = unusual(mine, groups.others(0, mine), IMAGES_PER_PATIENT)
    largest = sorted(z[z != 0], key=abs, reverse=True)[:12]
    assert [one["z"] for one in found] == pytest.approx(largest, abs=1e-5)
    header: Any = SimpleNamespace(spec={"normalize": "images"})
    alone: Any = SimpleNamespace(barcodes=SimpleNamespace(header=header), groups=groups, n_latents=N_LATENTS)
    alone.peers_of, alone.disease_of = [0], [0]
    row = Row(np.flatnonzero(mine), mine[mine > 0])
    asked = [latent for latent in range(N_LATENTS) if mine[latent] > 0 or any(other[latent] > 0 for other in others)]
    assert n_asked(alone, 0, row) == len(asked) > len(row.latents)  # also what the patient lacks can be unusual
    few = page_of(atlas, PATIENTS[-1])  # of five controls
    assert "it needs a disease and 5 other patients with it in the dataset; here are" in " ".join(few.text.split())


def test_patients_of_a_latent_by_disease(atlas: Path, cohort: Cohort) -> None:
    barcodes = barcodes_of(cohort)
    page = Page(atlas / "concepts" / "3.html")
    titles = re.findall(r"<title>([^<]*): ([\d.]+)</title>", page.path.read_text())
    assert len(titles) == len(PATIENTS)
    best = sorted(PATIENTS, key=lambda name: -barcodes[name][3])
    first = section(page, "patients").split('<ul class="cells people">')[1].split("</li>")[0]
    shown = " ".join(html.unescape(re.sub("<[^>]+>", " ", first)).split())
    assert shown.startswith(" ".join(f"{best[0]} {DISEASES[0]}, ".split()))
    assert float(shown.split()[-1]) == pytest.approx(barcodes[best[0]][3], rel=0.01)

    activation = cohort.dense.mean(axis=1)[:, 3]
    number = int(re.findall(r"patients/(\d+).html", first)[0])
    mine = [n for n, name in enumerate(cohort.patient_of) if name == best[0]]
    own = max(mine, key=lambda n: activation[n])
    points = dict(re.findall(r'data-patient="(\d+)" data-cell="(\d+)"', page.path.read_text()))
    assert points[str(number)] == str(own)
    assert f"../pictures/{own}.jpg" in first
    assert len(points) == len(PATIENTS)


def test_a_patient_s_drawn_cells(atlas: Path, cohort: Cohort) -> None:
    page = page_of(atlas, PATIENTS[0])
    drawn = page.path.read_text().split('class="cells small drawn"')[1].split("</ul>")[0]
    cells = [int(number) for number in re.findall(r'<a href="../images/(\d+)\.html"', drawn)]
    assert cells == [0, 1, 2, 3, 5, 6]  # one is unreadable


# ------------------------------------------------------------------------------------------- choices


@pytest.mark.stress
def test_pseudonyms_hide_every_name(atlas: Path, cohort: Cohort, tmp_path: Path) -> None:
    out = tmp_path / "hidden"
    done = run(*cohort.build, out, "--pseudonyms", "--seed", 5)
    assert done.exit_code == 0, done.output
    text = everything_in(out)
    paths = [f"{n:04d}.png" for n in range(len(cohort.image_ids))]
    for name in (*PATIENTS, *cohort.image_ids, *paths, "Secret", "Quentin", "nobody/", str(cohort.root)):
        in_json = json.dumps(name)[1:-1]
        in_script = re.sub("[<>&]", lambda found: f"\\u{ord(found[0]):04x}", in_json)
        for form in (name, html.escape(name), in_json, in_script):
            assert form not in text, form
    assert "P0014" in text
    assert "Quentin" in everything_in(atlas)  # so the search can find something
    for picture in out.rglob("*.jpg"):
        with Image.open(picture) as opened:
            assert not opened.getexif()
            assert not {"comment", "icc_profile", "xmp", "photoshop"} & opened.info.keys()
    assert "1 image could not be shown" in done.stderr
    assert "image " in done.stderr.split("could not be shown")[1]

    key, patients, images = who_is_who(tmp_path / "hidden.pseudonyms.csv")
    assert stat.S_IMODE((tmp_path / "hidden.pseudonyms.csv").stat().st_mode) == 0o600, "nobody else may read it"
    assert key not in text
    assert [*patients] == [f"P{n:04d}" for n in range(1, 15)]
    assert sorted(patients.values()) == sorted(PATIENTS)
    assert "'=cmd" in (tmp_path / "hidden.pseudonyms.csv").read_text()
    number = [*patients.values()].index(PATIENTS[0])
    drawn = (out / "patients" / f"{number}.html").read_text().split('class="cells small drawn"')[1].split("</ul>")[0]
    shown = {images[cell] for cell in re.findall(r'href="\.\./images/(\d+)\.html"', drawn)}
    assert shown == {cohort.image_ids[n] for n in (0, 1, 2, 3, 5, 6)}  # one is unreadable
    assert sorted(map(int, images)) == [*range(len(cohort.image_ids) - 1)]
    for order in (images, patients):
        assert [*order.values()] != sorted(order.values(), key=[*PATIENTS, *cohort.image_ids].index)  # no table's order


@pytest.mark.stress
def test_with_pseudonyms_images_are_read_in_the_order_of_the_stores(
    atlas: Path, cohort: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some at a time, as without; every file is the same but for its name, and none tells when it was written."""
    out, reads, read = tmp_path / "hidden", [], LatentStore.read_images

    def spy(store: LatentStore, start: int, stop: int) -> CsrRows:
        reads.append((start, stop))
        return read(store, start, stop)

    monkeypatch.setattr(LatentStore, "read_images", spy)
    monkeypatch.setattr("cytosae.atlas.image_pages._NONZEROS_PER_READ", 40_000)
    done = run(*cohort.build, out, "--pseudonyms")
    assert done.exit_code == 0, done.output
    n_images = len(cohort.image_ids)
    of_pages = reads[: [stop for _, stop in reads].index(n_images) + 1]  # the review's come after
    assert of_pages == sorted(of_pages)
    assert 1 < len(of_pages) < n_images / 4
    assert f"who is who, and the key: {tmp_path}/hidden.pseudonyms.csv" in done.stdout

    _, patients, numbers = who_is_who(tmp_path / "hidden.pseudonyms.csv")
    for number, image_id in numbers.items():
        image, script = cohort.image_ids.index(image_id), (out / "data" / f"image-{number}.js").read_text()
        again = script.replace(f'"image-{number}"', f'"image-{image}"', 1)
        assert again == (atlas / "data" / f"image-{image}.js").read_text()
        if image != 7:  # which is lost
            assert (out / f"pictures/{number}.jpg").read_bytes() == (atlas / f"pictures/{image}.jpg").read_bytes()
    for place, name in enumerate(patients):
        assert f"Patient {name}\n" in Page(out / "patients" / f"{place}.html").text

    files = [path for path in out.rglob("*") if path.is_file() and path.name != "atlas.json"]
    assert len({path.stat().st_mtime_ns for path in files}) == 1
    listed = ResultStore(out, ATLAS).table("files")["name"].to_pylist()
    assert listed == sorted(listed)
    assert {path.name for path in out.iterdir()} == {path.name for path in atlas.iterdir()}  # nothing is left over


def test_noise_is_a_picture_too() -> None:
    """More bytes than pixels."""
    noise = np.random.default_rng(0).integers(0, 255, (1024, 1024, 3), np.uint8)
    assert Image.open(io.BytesIO(jpeg(Image.fromarray(noise)))).size == (1024, 1024)


def test_files_lose_the_order_they_were_written_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site, entered, rename = tmp_path / "site", [], Path.rename
    for name in ("images/2.html", "images/0.html", "patients/1.html", "images/1.html", "patients/0.html", "top.html"):
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(name)
    (site / "unsorted.partial").mkdir()
    (site / "unsorted.partial" / "9.html").write_text("of a build that was cut")

    def spy(path: Path, target: Path) -> Path:
        entered.append(str(target.relative_to(site)))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", spy)
    hide_order(site, 10**18)
    files = sorted(str(path.relative_to(site)) for path in site.rglob("*") if path.is_file())
    assert [name for name in entered if name.endswith(".html")] == files[:-1]
    assert all((site / name).read_text() == name for name in files)
    assert len(files) == 6
    assert {(site / name).stat().st_mtime_ns for name in files} == {10**18}
    assert {path.name for path in site.iterdir()} == {"images", "patients", "top.html"}


@pytest.mark.stress
def test_pseudonyms_are_secret_and_stay(cohort: Cohort, tmp_path: Path) -> None:
    """The seed, which everybody sees, does not decide them; the file does, as long as it lies there."""
    out, file = tmp_path / "hidden", tmp_path / "hidden.pseudonyms.csv"
    build = (*cohort.build, out, "--pseudonyms", "--overwrite", "--patient-images", 0)
    assert run(*build, "--dry-run").exit_code == 0
    assert not file.exists()
    found = []
    for n_images in (2, 1):
        done = run(*build, "--n-images", n_images)
        assert done.exit_code == 0, done.output
        found.append(who_is_who(file))
    assert found[0][:2] == found[1][:2]
    file.unlink()
    lost = run(*cohort.build, out, "--pseudonyms", "--patient-images", 0, "--n-images", 1)
    assert lost.exit_code == 1
    assert "with other settings (pseudonyms_key_sha256" in lost.stderr
    assert not file.exists()
    assert run(*build).exit_code == 0
    assert who_is_who(file)[1] != found[0][1]
    file.write_text("my own")
    refused = run(*build)
    assert refused.exit_code == 1
    assert "is in the way of who is who" in refused.stderr
    assert file.read_text() == "my own"


def test_dry_run_says_what_would_be_written(atlas: Path, cohort: Cohort, tmp_path: Path) -> None:
    done = run(*cohort.build, tmp_path / "not", "--dry-run", "--json")
    assert done.exit_code == 0, done.output
    assert not [*tmp_path.iterdir()]
    said, real = json.loads(done.stdout), ResultStore(atlas, ATLAS).header.summary or {}
    assert not said["written"]
    assert said["counts"] == real["result"]["counts"]
    assert said["n_files"] == pytest.approx(real["result"]["n_files"], abs=3)
    assert said["n_bytes"] == pytest.approx(real["result"]["n_bytes"], rel=0.15)


def test_pictures_of_the_review_are_counted_beforehand(cohort: Cohort, atlas: Path) -> None:
    """With all of them looked at, exactly; one file is lost."""
    latents = LatentStore(cohort.root / "latents")
    images = Pictures(latents, cohort.root / "images")
    concepts, sources = ConceptStore(cohort.root / "concepts"), Sources([latents], [images])
    inputs = open_inputs(cohort.root / "barcodes", cohort.root / "concepts", sources)
    patients = atlas_cohort.Cohort(inputs.barcodes, inputs.tau, pseudonyms=None)
    asked: dict[str, Any] = {
        "selection": read_selection(concepts),
        "comparisons": [ResultStore(cohort.root / "compare", COMPARISON)],
        "examples": lambda some: _of_each_tenth(inputs, patients, AtlasConfig(), some),
        "most": 1000,
    }
    found = estimate_pictures(concepts, sources, ReviewConfig(), **asked)
    sizes = [path.stat().st_size for path in (atlas / "review").iterdir()]
    assert found == (len(sizes), sum(sizes))


def test_a_review_shows_the_whole_range_of_a_latent(cohort: Cohort, atlas: Path) -> None:
    """An image of each tenth of its activation, the strongest first, decoys too; and a reviewer is told no dataset."""
    content = json.loads((atlas / "review.json").read_text())
    activation = cohort.dense.mean(axis=1)
    picture_of = {}
    for n in range(len(cohort.dense)):
        with Image.open(cohort.root / "images" / f"{n:04d}.png") if n != 7 else Image.new("RGB", (1, 1)) as image:
            picture_of[hashlib.sha256(_jpeg(np.asarray(image.convert("RGB")))).hexdigest()[:32] + ".jpg"] = n
    n_ranges = 0
    for latent, evidence in content["latents"].items():
        active = np.sort(activation[activation[:, int(latent)] > 0, int(latent)])
        if len(active) < 20:
            assert "range" not in evidence
            continue
        values = [activation[picture_of.get(one["file"], 7), int(latent)] for one in evidence["range"]]
        tenths = [int(10 * np.searchsorted(active, value) / len(active)) for value in values]
        assert tenths == list(range(9, -1, -1))
        n_ranges += 1
    assert n_ranges > 10
    review = read_review(atlas)
    sets = sent(review, review.questions[0], "Ada", seed=0, shows_labels=False)["items"][0]["rows"]
    assert [row.get("is_range", False) for row in sets] == [False] * (len(sets) - 1) + [True]
    assert not any(name in row["title"] for row in sets for name in DATASETS)


@pytest.mark.stress
def test_all_and_top_pages(cohort: Cohort, tmp_path: Path) -> None:
    assert run(*cohort.build, tmp_path / "all", "--pages", "all", "--n-images", 2).exit_code == 0
    assert shown_latents(tmp_path / "all") == list(range(N_LATENTS))
    silent = Page(tmp_path / "all" / "concepts" / "39.html")
    assert "Never active" in silent.text
    assert "No patient has a barcode above 0" in silent.text
    first = Page(tmp_path / "all" / "concepts" / "0.html")
    assert len(maps_in(section(first, "references"))) == 4  # two of each dataset
    assert run(*cohort.build, tmp_path / "top", "--pages", "top", "--top", 4, "--patient-images", 0).exit_code == 0
    means = ConceptStore(cohort.root / "concepts").latents()["mean_activation"].to_numpy().reshape(2, -1).max(axis=0)
    assert shown_latents(tmp_path / "top") == sorted(np.argsort(-means, kind="stable")[:4].tolist())


@pytest.mark.stress
def test_a_number_of_top_pages_without_top_pages_is_refused() -> None:
    with pytest.raises(BadInput, match="top 50 has no effect with pages selected; choose --pages top, too"):
        AtlasConfig(top=50)
    AtlasConfig(top=AtlasConfig.top, pages="all")  # as commands.sh of a run says it


def test_a_repeated_build_is_complete_and_overwrite_replaces(atlas: Path, cohort: Cohort, tmp_path: Path) -> None:
    out = shutil.copytree(atlas, tmp_path / "atlas")
    again = run(*cohort.build, out)
    assert again.exit_code == 0, again.output
    assert "already complete" in again.stderr
    other = run(*cohort.build, out, "--n-images", 1)
    assert other.exit_code == 1
    assert "holds an atlas with other settings (n_images 10 against 1)" in other.stderr
    assert run(*cohort.build, out, "--n-images", 1, "--overwrite").exit_code == 0
    assert len(maps_in(section(Page(out / "concepts" / "3.html"), "references"))) == 2


def test_an_atlas_without_anything_optional(cohort: Cohort, tmp_path: Path) -> None:
    shutil.copytree(cohort.root / "concepts", tmp_path / "concepts")
    (tmp_path / "concepts" / "selection.parquet").unlink()
    base = ["atlas", "build", "--barcodes", cohort.root / "barcodes", "--latents", cohort.root / "latents"]
    none = run(*base, "--concepts", tmp_path / "concepts", "-o", tmp_path / "none")
    assert none.exit_code == 1
    assert "no selection in" in none.stderr
    assert "--pages top" in none.stderr
    done = run(*base, "--concepts", cohort.root / "concepts", "-o", tmp_path / "bare")
    assert done.exit_code == 0, done.output
    assert "where the images lie is not known" in done.stderr
    assert "say where they are with --images" in done.stderr
    page = Page(tmp_path / "bare" / "concepts" / f"{shown_latents(tmp_path / 'bare')[0]}.html")
    assert not page.all("img")
    assert page.all("span", "empty")
    assert "Not looked for" in page.text
    assert "None were compared" in Page(tmp_path / "bare" / "diseases.html").text
    assert not (tmp_path / "bare" / "pairs").exists()


@pytest.mark.parametrize("whose", ["nobody", "one patient", "a patient for each image", "a patient in two datasets"])
def test_an_atlas_of_any_cohort(cohort: Cohort, tmp_path: Path, whose: str) -> None:
    """Without patients, with one, with one image for each: every page is built, the menu offers what there is."""
    n_images = len(cohort.image_ids)
    whose_are: dict[str, list[str | None]] = {
        "nobody": [None] * n_images,
        "one patient": ["A"] * n_images,
        "a patient for each image": [f"P{n}" for n in range(n_images)],
        "a patient in two datasets": [f"P{n % 3}" for n in range(n_images)],
    }
    names = whose_are[whose]
    table = pa.table({"image_id": cohort.image_ids, "patient": pa.array(names, pa.string())})
    has_diseases = whose == "a patient for each image"
    diseases = [DISEASES[n % 2] if has_diseases else None for n in range(n_images)]
    pq.write_table(table.append_column("disease", pa.array(diseases, pa.string())), tmp_path / "table.parquet")
    barcodes, latents = tmp_path / "barcodes", cohort.root / "latents"
    with local_client(1, 2) as client:
        write_barcodes(latents, barcodes, BarcodeConfig(tau=0.2), client=client, table=tmp_path / "table.parquet")
    base = ["atlas", "build", "--barcodes", barcodes, "--latents", latents, "--concepts", cohort.root / "concepts"]
    done = run(*base, "--images", cohort.root / "images", "-o", tmp_path / "atlas")
    assert done.exit_code == 0, done.output
    first = (tmp_path / "atlas" / "index.html").read_text()
    assert ('href="patients.html"' in first) == (whose != "nobody")
    assert ('href="diseases.html"' in first) == has_diseases
    assert_links_lead_somewhere(tmp_path / "atlas")
    n_patients = len({(name, n // IMAGES_PER_PATIENT % 2) for n, name in enumerate(names) if name and n != 4})
    assert len([*(tmp_path / "atlas" / "patients").glob("*.html")]) == n_patients


def test_stores_that_do_not_belong_together_are_refused(cohort: Cohort, tmp_path: Path) -> None:
    root = cohort.root
    twice = run(*cohort.build, tmp_path / "a", "--compare", root / "compare")
    assert "compare the same diseases; give one of them" in twice.stderr
    other = shutil.copytree(root / "neighbours", tmp_path / "neighbours")
    changed = (other / "neighbours.json").read_text().replace("1" * 64, "2" * 64)
    changed = re.sub(r'"identity": "\w+"', f'"identity": "{identity_of(changed)}"', changed)
    (other / "neighbours.json").write_text(changed)
    done = run(*cohort.build, tmp_path / "a", "--neighbours", other)
    assert done.exit_code == 1
    assert "is of another SAE (222222222222…)" in done.stderr
    two = run(*cohort.build, tmp_path / "a", "--latents", root / "latents", "--images", root / "images")
    assert two.exit_code == 1
    assert "was made from other latents" in two.stderr
    inside = run(*cohort.build[:-1], "-o", root / "barcodes" / "atlas")
    assert "lies inside barcodes" in inside.stderr


def identity_of(text: str) -> str:
    from stores.files import sha256_json

    raw = json.loads(text)
    return sha256_json({name: raw[name] for name in ("format", "format_version", "spec")})
