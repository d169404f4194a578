"""report.html: one file that loads nothing, says what the stores say, and shows every name as a name."""

import base64
import hashlib
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from archive_maker import pack_folder
from browser import Watched, axe, chromium
from click.testing import CliRunner
from PIL import Image
from small_runs import DISEASES, SHOWN, contents

import cytocache.bridge
from cli import cli
from cytosae.baselines import BaselineConfig, VersusConfig, compare_with_baselines, write_baseline
from cytosae.pipeline import read_recipe, write_run_report
from cytosae.pipeline.journal import Journal
from cytosae.pipeline.page_inputs import open_run
from cytosae.pipeline.page_pictures import figure_picture
from cytosae.pipeline.recipe import write_recipe
from cytosae.pipeline.stages import comparison_stage, stages_of
from cytosae.training import read_health, write_health
from stores.errors import DamagedStore, StoreNotFound
from stores.result_folder import ResultStore
from stores.spec import COMPARISON

pytestmark = [pytest.mark.stress, pytest.mark.timeout(900)]  # seconds of work, on a machine that may be busy


class Page(HTMLParser):
    """What a browser would make of a page: elements with their attributes, and the text."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def page(finished: Path) -> Page:
    return Page((finished / "report.html").read_text())


def test_it_loads_and_runs_nothing(page: Page, finished: Path) -> None:
    content = (finished / "report.html").read_text()
    assert {name for name, _ in page.elements} & {
        "script",
        "iframe",
        "object",
        "embed",
        "link",
        "form",
        "base",
    } == set()
    for _, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
    sources = [str(each["src"]) for each in page.all("img")]
    assert len(sources) > 8
    assert all(re.match(r"data:image/(png|jpeg);base64,", source) for source in sources)
    for link in (str(each["href"]) for each in page.all("a")):
        assert link.startswith("#") or (finished / link).is_file(), link
    (policy,) = [each["content"] for each in page.all("meta") if each.get("http-equiv") == "Content-Security-Policy"]
    style = re.search(r"<style>(.*?)</style>", content, re.DOTALL)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert policy == (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    assert len(content) < 3e6


def test_names_are_shown_as_names(page: Page) -> None:
    text = " ".join(" ".join(page.texts).split())
    shown = [name.replace("\u202e", "\N{REPLACEMENT CHARACTER}") for name in (*DISEASES, *SHOWN)]
    for name in shown:
        assert name in text, name
    assert "49" not in re.sub(r"\d[\d,.]*\d|eosinophil \{\{ 7 \* 7 \}\}", "", text)
    for picture in page.all("img"):
        assert picture["alt"]


def test_its_numbers_are_those_of_the_stores(page: Page, finished: Path) -> None:
    text = " ".join(" ".join(page.texts).split())
    assert "39 read, 1 could not be read" in text
    assert "columns slide of the table: nothing was asked of them" in text
    (place,) = (finished / "compare").iterdir()
    found = ResultStore(place, COMPARISON).header.summary or {}
    assert f"{found['n_tested']:,} latents tested" in text
    assert all(str(warning) in text for warning in found["warnings"])
    assert re.search(r"Another seed finds \d+% of the latents again", text)
    assert "Everything below shows that the machinery works" in text  # an untrained backbone


def test_the_same_stores_give_the_same_page(copied: Path) -> None:
    before = contents(copied)
    assert write_run_report(copied, stage_one=cytocache.bridge).was_complete
    (copied / "report.html").unlink()
    done = CliRunner().invoke(cli, ["report", str(copied)])
    assert done.exit_code == 0, done.output
    assert f"open {(copied / 'report.html').as_uri()}" in done.output
    assert contents(copied) == before


def test_a_run_that_is_not_finished_has_a_page(copied: Path) -> None:
    """What is missing is named; what was changed is refused."""
    for name in ("atlas", "cells.concepts", "probe"):
        shutil.rmtree(copied / name)
    done = write_run_report(copied, stage_one=cytocache.bridge)
    assert {*done.missing} == {"the concepts", "probe disease", "probe label"}
    assert "not in the report: the concepts" in str(done)
    (place,) = (copied / "compare").iterdir()
    (place / "scatter.png").write_bytes(b"another")
    with pytest.raises(DamagedStore, match=r"scatter.png is not the file that was written"):
        write_run_report(copied, stage_one=cytocache.bridge)
    with pytest.raises(StoreNotFound, match=r"no run at .*: it has no recipe.toml. Make one with cyto run"):
        write_run_report(copied.parent)


def test_it_shows_the_comparison_with_baselines(copied: Path) -> None:
    """In the folder `versus` of the run; one of another SAE is named, not shown."""
    sae, cache = copied / "cells.sae", copied / "cells.acts.zarr"
    made = write_baseline([cache], copied / "pca.sae", BaselineConfig(kind="pca"), like=sae)
    config = VersusConfig(all_images=True, draws=100)
    found = compare_with_baselines(sae, cache, [made.out], copied / "versus", config)
    assert not write_run_report(copied, stage_one=cytocache.bridge).missing
    text = " ".join(" ".join(Page((copied / "report.html").read_text()).texts).split())
    (row,) = (row for row in found.differences if row["metric"] == "explained_variance")
    assert "Has the SAE learnt more than a baseline?" in text
    assert f"{row['difference']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f})" in text
    assert f"The SAE explains more variance than {int(row['is_better'])} of 1 baseline." in text
    assert all(warning in text for warning in found.warnings)

    compare_with_baselines(made.out, cache, [sae], copied / "versus", config, overwrite=True)
    done = write_run_report(copied, stage_one=cytocache.bridge)
    assert done.missing == ("the comparison with baselines in versus, which is of another SAE",)


def test_without_the_images_it_says_so(copied: Path) -> None:
    shutil.rmtree(copied / "cells")
    write_run_report(copied, stage_one=cytocache.bridge)
    page = Page((copied / "report.html").read_text())
    assert "no picture" in page.texts
    assert not [each for each in page.all("img") if str(each["src"]).startswith("data:image/jpeg")]


def test_a_large_picture_is_made_smaller() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1800, 3000, 3), np.uint8)
    content = BytesIO()
    Image.fromarray(noise).save(content, "PNG")
    picture = figure_picture(content.getvalue())
    assert len(picture.src) < 620_000
    with Image.open(BytesIO(base64.b64decode(picture.src.partition(",")[2]))) as found:
        assert found.size == (picture.width, picture.height)
    assert abs(picture.width / picture.height - 3000 / 1800) < 0.02


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1200])
def test_in_a_browser(finished: Path, width: int) -> None:
    """No errors, no scrolling to the side, nothing that axe-core finds, also in the dark."""
    source = axe()
    with chromium() as browser:
        watched = Watched(browser, finished)
        watched.tab.set_viewport_size({"width": width, "height": 900})
        tab = watched.open("report.html")
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        for scheme in ("light", "dark"):
            tab.emulate_media(color_scheme=scheme)
            found = tab.evaluate(f"() => {{ {source}; return axe.run() }}")
            assert [(each["id"], [node["html"][:200] for node in each["nodes"]]) for each in found["violations"]] == []
        assert watched.wrong == []


def test_two_comparisons_of_the_same_groups_have_names_of_their_own(copied: Path) -> None:
    """One that is left out does not hide the other; and what the recipe no longer has is not told."""
    recipe = read_recipe(copied / "recipe.toml")
    (only,) = recipe.compare
    both = replace(recipe, compare=(only, {**only, "name": "adjusted"}))
    names = [stage.name for stage in stages_of(both, copied)]
    assert len({*names}) == len(names)
    write_recipe(both, copied / "recipe.toml")
    journal = Journal.read(copied)
    (second,) = (each for each in stages_of(both, copied) if each.name == comparison_stage(both, both.compare[1]))
    journal.leave_out(second, "no ages")
    journal.leave_out(replace(second, name="compare X against Y"), "of before")
    journal.write()
    run = open_run(copied, None)
    assert [section["name"] for section, _ in run.comparisons] == [only["name"]]
    assert {*run.left_out.values()} & {"no ages", "of before"} == {"no ages"}


def test_the_health_on_other_images_is_not_that_on_these(copied: Path) -> None:
    """An SAE that was given has the health of its own training beside it."""
    sae = copied / "cells.sae"
    health = read_health(sae)
    assert health is not None
    write_run_report(copied)
    assert "Is the SAE fit for barcodes?" in (copied / "report.html").read_text()
    (sae / "health.json").unlink()
    write_health(sae, replace(health, cache_sha256="0" * 64))
    write_run_report(copied)
    page = (copied / "report.html").read_text()
    assert "Is the SAE fit for barcodes?" not in page
    assert "Whether it is fit was not measured on these images" in page


def test_images_in_the_one_folder_of_an_archive_are_found(copied: Path) -> None:
    """`x/cells/1.png` in the archive is `cells/1.png` in the table, as when it was extracted."""
    pack_folder(copied / "cells.zip", copied / "cells", under="x/cells/")
    shutil.rmtree(copied / "cells")
    recipe = read_recipe(copied / "recipe.toml")
    write_recipe(replace(recipe, images={"source": "cells.zip"}), copied / "recipe.toml")
    sources = open_run(copied, cytocache.bridge).sources
    assert sources is not None
    picture = sources.pictures[0](1)
    assert not isinstance(picture, str), picture
