"""A call in Python does what its command does, with the same defaults, and shows its result in a notebook.

Each test lets the command write a folder, then makes the call with the same inputs: it finds the folder complete, so
all settings were equal; and its lines are what the command printed.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from atlas_maker import Cohort, make_cohort
from command_line import run
from concept_folders import concepts_of, dense_tokens
from distributed import Client, LocalCluster
from PIL import Image
from review_site import make_site

import cytocache
import cytosae
from cytosae.review.questions import read_review
from cytosae.review.verdicts import default_reviews, new_verdict, save_verdict
from stores import ConceptStore, LatentStore, find_header, read_runs
from stores.errors import BadInput, StoreNotFound
from stores.files import sha256_json
from stores.tables import column
from stores.wording import Report

pytestmark = pytest.mark.stress  # each call makes stores of its own


@pytest.fixture(scope="module")
def concepts(made: Path, tmp_path_factory: pytest.TempPathFactory) -> ConceptStore:
    return concepts_of(LatentStore(made / "latents.zarr"), tmp_path_factory.mktemp("concepts") / "c", fires_above=0.05)


def printed(*words: object) -> str:
    """What a command prints to stdout."""
    done = run(*map(str, words))
    assert done.exit_code == 0, done.output
    return done.stdout.strip()


def says(report: Report, text: str) -> None:
    """The report's lines are `text`, and a notebook shows them."""
    assert "\n".join(report.lines()).strip() == text
    assert report._repr_html_().startswith("<pre>")
    assert text.splitlines()[0].split(":")[0] in str(report)


def busiest(store: LatentStore, image_index: int) -> int:
    return int(dense_tokens(store, image_index)[1:].sum(0).argmax())


def test_maps(made: Path, concepts: ConceptStore, tmp_path: Path) -> None:
    latents, bridge = made / "latents.zarr", cytocache.bridge
    store = LatentStore(latents)
    name, latent = str(column(store.images, "image_id")[1]), busiest(store, 1)
    by_command = printed("concept", "map", latents, "-o", tmp_path / "m", "--image", name, "--latent", latent)
    done = cytosae.write_maps(latents, tmp_path / "m", image_id=name, latents=[latent], stage_one=bridge)
    assert done.was_complete
    says(done, by_command)
    assert "data:image/png;base64," in done._repr_html_()

    patch = int(dense_tokens(store, 1)[1:].sum(1).argmax())
    words: tuple[object, ...] = (
        "--image",
        name,
        "--patch",
        patch,
        "--concepts",
        concepts.root,
        "--noisy",
        9,
        "--dataset",
        "other",
    )
    by_command = printed("concept", "map", latents, "-o", tmp_path / "p", *words)
    query = cytosae.PatchQuery(patch=patch, dataset="other", noisy=9)
    done = cytosae.write_maps(
        str(latents), str(tmp_path / "p"), image_id=name, query=query, concepts=concepts.root, stage_one=bridge
    )
    assert done.was_complete
    says(done, by_command)

    file, sae = made / str(column(store.images, "path")[0]), made / "run"
    words = ("--file", file, "--sae", sae, "--latent", latent)
    by_command = printed("concept", "map", latents, "-o", tmp_path / "n", *words)
    done = cytosae.write_maps(
        [latents], tmp_path / "n", file=str(file), sae=str(sae), latents=[latent], stage_one=bridge
    )
    assert done.was_complete
    says(done, by_command)


def test_paths_as_texts_and_numbers_of_numpy(made: Path, tmp_path: Path) -> None:
    """A notebook gives both: the folder is the same as of a Path and of numbers of Python."""
    latents, bridge = made / "latents.zarr", cytocache.bridge
    store = LatentStore(latents)
    name, latent = str(column(store.images, "image_id")[1]), busiest(store, 1)
    given: list[Any] = [[latent], np.array([latent]), [np.int64(latent)]]
    headers = [
        cytosae.write_maps(latents, tmp_path / str(n), image_id=name, latents=each, roots=[str(made)], stage_one=bridge)
        for n, each in enumerate(given)
    ]
    assert len({(each.out / "maps.json").read_bytes() for each in headers}) == 1
    table = tmp_path / "given.csv"
    table.write_text(f"image_id,label\n{name},else\n")
    with LocalCluster(n_workers=1, processes=False, dashboard_address=None) as cluster, Client(cluster) as client:
        cytosae.write_barcodes(latents, tmp_path / "b", table=table, client=client)
        again = cytosae.write_barcodes(str(latents), str(tmp_path / "b"), table=str(table), client=client)
    assert again.was_complete
    assert cytosae.evaluate(str(made / "acts.zarr"), str(made / "run")).sae == made / "run"
    assert cytosae.training.read_health(str(made / "run")) == cytosae.training.read_health(made / "run")
    assert read_runs(str(latents)) == read_runs(latents)
    assert find_header(str(latents)) == store.header


def test_a_single_path_is_not_read_letter_by_letter(made: Path, tmp_path: Path) -> None:
    """Where several stores may be given, the text of one will do."""
    with pytest.raises(BadInput, match="stability needs two SAEs or more; found 1"):
        cytosae.write_stability(str(made / "run"), tmp_path / "s")
    sources = cytosae.open_sources(str(made / "latents.zarr"), cytocache.bridge, roots=str(made))
    assert sources.roots == [made]


def test_a_single_column_is_not_read_letter_by_letter(made: Path, concepts: ConceptStore, tmp_path: Path) -> None:
    """Where several names may be given, the text of one will do."""
    one: Any = "label"
    assert cytosae.CompareConfig(a="A", b="B", adjust=one).adjust == ("label",)
    assert cytosae.MatchConfig(strata=one).strata == ("label",)
    assert cytosae.UnitConfig(classes=one).classes == ("label",)
    latents, bridge, dataset = made / "latents.zarr", cytocache.bridge, concepts.datasets[0]
    done = cytosae.write_sheets(concepts, latents, tmp_path / "s", latents=[1], datasets=dataset, stage_one=bridge)
    assert done.n_latents == 1


def test_no_reference_image(made: Path, concepts: ConceptStore, tmp_path: Path) -> None:
    """A figure of nothing is refused, as the command refuses it."""
    latents, bridge = made / "latents.zarr", cytocache.bridge
    for n_images in (0, -1):
        with pytest.raises(BadInput, match=f"n_images must be at least 1; found {n_images}"):
            cytosae.write_sheets(concepts, latents, tmp_path / "s", latents=[1], n_images=n_images, stage_one=bridge)


def test_shares_of_another_grid(made: Path, tmp_path: Path) -> None:
    """Four times the patches are not four classes."""
    for shape in ((32, 32), (2, 16, 16), (16,)):
        with pytest.raises(BadInput, match=r"the shares of image 0 have shape .*; expected \(1, 16, 16\)"):
            cytosae.write_mask_agreement(made / "latents.zarr", {0: np.ones(shape)}, tmp_path / "m")


def test_nothing_given_is_said(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no cache is given"):
        cytosae.train([], tmp_path / "sae")
    with pytest.raises(BadInput, match="no concepts are given"):
        cytosae.compare_thresholds([], tmp_path / "thresholds")


def test_what_maps_need(made: Path, tmp_path: Path) -> None:
    latents, out = made / "latents.zarr", tmp_path / "out"
    bridge, query = cytocache.bridge, cytosae.PatchQuery(patch=1)
    with pytest.raises(BadInput, match=r"give stage_one=cytocache\.bridge"):
        cytosae.write_maps(latents, out, image_id="x", latents=[1])
    with pytest.raises(BadInput, match="give latents, or a query"):
        cytosae.write_maps(latents, out, image_id="x", stage_one=bridge)
    with pytest.raises(BadInput, match="give latents, or a query"):
        cytosae.write_maps(latents, out, image_id="x", latents=[1], query=query, stage_one=bridge)
    with pytest.raises(BadInput, match="a query needs concepts"):
        cytosae.write_maps(latents, out, image_id="x", query=query, stage_one=bridge)
    wrong: list[dict[str, Any]] = [{}, {"file": "x"}, {"image_id": "x", "file": "y", "sae": "z"}]
    for given in wrong:
        with pytest.raises(BadInput, match="give image_id; or file and sae"):
            cytosae.write_maps(latents, out, latents=[1], stage_one=bridge, **given)
    with pytest.raises(BadInput, match="once for each store, or none; found 2 for 1"):
        cytosae.write_maps(latents, out, image_id="x", latents=[1], stage_one=bridge, roots=[made, made])
    assert not out.exists()


def test_sheets(made: Path, concepts: ConceptStore, tmp_path: Path) -> None:
    latents = made / "latents.zarr"
    latent = busiest(LatentStore(latents), 0)
    by_command = printed("concept", "sheet", concepts.root, latents, "-o", tmp_path / "s", "--latent", latent)
    done = cytosae.write_sheets(concepts.root, latents, tmp_path / "s", latents=[latent], stage_one=cytocache.bridge)
    assert done.was_complete
    says(done, by_command)
    assert "data:image/png;base64," in done._repr_html_()


def test_masks(made: Path, tmp_path: Path) -> None:
    latents, masks = made / "latents.zarr", tmp_path / "masks"
    half = np.zeros((8, 8), np.uint8)
    half[:, :4] = 1
    for path in column(LatentStore(latents).images, "path")[:3]:
        (masks / str(path)).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(half).save(masks / str(path))
    Image.fromarray(half).save(masks / "nobody.png")
    by_command = printed("concept", "masks", latents, masks, "-o", tmp_path / "m")
    done = cytosae.write_mask_agreement(latents, masks, tmp_path / "m", stage_one=cytocache.bridge)
    assert done.was_complete
    says(done, by_command)
    assert done.left_out["masks of no image here"] == ["nobody.png"]
    with pytest.raises(BadInput, match=r"give stage_one=cytocache\.bridge"):
        cytosae.write_mask_agreement(latents, masks, tmp_path / "m")
    with pytest.raises(BadInput, match="classes must be a text"):
        cytosae.write_mask_agreement(latents, masks, tmp_path / "m", classes=[("mask", ("1",))])
    with pytest.raises(BadInput, match="classes must be a list"):
        cytosae.write_mask_agreement(latents, {0: np.ones((1, 16, 16))}, tmp_path / "m", classes="any")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    return make_cohort(tmp_path_factory.mktemp("cohort"))


def test_atlas(cohort: Cohort, tmp_path: Path) -> None:
    out, root = tmp_path / "atlas", cohort.root
    by_command = printed(*cohort.build, out)
    given: dict[str, Any] = {
        name: str(root / name) for name in ("barcodes", "concepts", "latents", "neighbours", "causes")
    }
    given |= {"comparisons": [root / "compare"], "roots": [root / "images"], "stage_one": cytocache.bridge}
    done = cytosae.build_atlas(out=out, **given)
    assert done.was_complete
    says(done, by_command)
    assert f'<a href="{(out / "index.html").as_uri()}">' in done._repr_html_()
    assert ["1 image could not be shown" in warning for warning in done.warnings] == [True]
    estimate = cytosae.estimate_atlas(**given)
    assert not estimate.is_written
    assert estimate.counts == done.counts
    assert list(estimate.lines())[-1] == "nothing was written"


def test_reviews(made: Path, tmp_path: Path) -> None:
    make_site(made, tmp_path)
    site = tmp_path / "atlas"
    review = read_review(site)
    for reviewer, verdict in (("<b>Ada</b>", "meaningful"), ("Bob", "not")):
        for item in review.questions[0].items:
            said = {"reviewer": reviewer, "item": item.item, "verdict": verdict}
            save_verdict(default_reviews(site), new_verdict(said, review, is_blinded=True))
    by_command = printed("atlas", "export", site, "-o", tmp_path / "out.csv")
    done = cytosae.write_verdicts(site, tmp_path / "out.csv", overwrite=True)
    says(done, by_command)
    assert done.table.num_rows == 2 * len(review.questions[0].items)
    assert "<td>&lt;b&gt;Ada&lt;/b&gt;</td>" in done._repr_html_()
    with pytest.raises(BadInput, match="is there already"):
        cytosae.write_verdicts(site, tmp_path / "out.csv")
    agreement = cytosae.review_agreement(str(site))
    says(agreement, printed("atlas", "agreement", site))
    assert "<b>Ada" not in agreement._repr_html_()
    assert "<th>Cohen&#x27;s kappa (95%)</th>" in agreement._repr_html_()
    with cytosae.open_server(site, config=cytosae.ServeConfig(port=0)) as server:
        assert list(server.lines())[2] == f"verdicts: {default_reviews(site)}"


def test_the_old_name_of_build_atlas(cohort: Cohort, tmp_path: Path) -> None:
    """`write_atlas`, of inputs that are open."""
    root = cohort.root
    sources = cytosae.open_sources([root / "latents"], cytocache.bridge, roots=[root / "images"])
    inputs = cytosae.open_inputs(root / "barcodes", root / "concepts", sources)
    config = cytosae.AtlasConfig(pages="top", top=1, patient_images=0, n_images=1)
    done = cytosae.write_atlas(inputs, tmp_path / "atlas", config)
    assert done.counts["concepts"] == 1


def test_a_path_may_be_a_text(made: Path, concepts: ConceptStore, tmp_path: Path) -> None:
    """Of what is read and of what is written; a report has it as a path."""
    sae, out = str(made / "run"), str(tmp_path / "out")
    assert cytosae.load_sae(sae).root == made / "run"
    exported = cytosae.export_sae(sae, f"{out}.pt", format="cytosae")
    imported = cytosae.import_sae(exported.out.as_posix(), f"{out}.sae")
    encoded = cytosae.encode(str(made / "acts.zarr"), sae, f"{out}.latents")
    neighbours = cytosae.write_neighbours(sae, f"{out}.neighbours", chosen=[1])
    thresholds = cytosae.compare_thresholds(str(concepts.root), f"{out}.thresholds")
    for done in (exported, imported, encoded, neighbours, thresholds):
        assert done.out.exists()
        assert done._repr_html_()
    with pytest.raises(BadInput, match="are the same SAE; give each SAE once"):
        cytosae.write_stability([sae, f"{out}.sae"], f"{out}.stability")
    pair = cytosae.CompareConfig(a="a", b="b")
    calls: list[Callable[[], object]] = [
        lambda: cytosae.compare("no", out, pair),
        lambda: cytosae.probe("no", out),
        lambda: cytosae.apply_model("no", "no", out),
        lambda: cytosae.write_patient_concepts("no", None, out),
        lambda: cytosae.export_h5ad("no", out),
    ]
    for call in calls:
        with pytest.raises(StoreNotFound, match="nothing is there"):
            call()


def test_a_whole_number_is_the_same_setting() -> None:
    """`tau=1` is `--tau 1`, so a folder that the command wrote is complete for the call."""
    pairs: list[tuple[Any, Any]] = [
        (cytosae.SelectionConfig(threshold=1), cytosae.SelectionConfig(threshold=1.0)),
        (cytosae.NeighbourConfig(tau=1), cytosae.NeighbourConfig(tau=1.0)),
        (cytosae.PatientConfig(tau=1), cytosae.PatientConfig(tau=1.0)),
        (cytosae.UnitConfig(tau=1), cytosae.UnitConfig(tau=1.0)),
        (cytosae.AtlasConfig(tau=1), cytosae.AtlasConfig(tau=1.0)),
        (cytosae.PatchQuery(patch=0, noisy=1, shared=2), cytosae.PatchQuery(patch=0, noisy=1.0, shared=2.0)),
        (
            cytosae.CompareConfig(a="a", b="b", tau=1, min_mean=1),
            cytosae.CompareConfig(a="a", b="b", tau=1.0, min_mean=1.0),
        ),
        (
            cytosae.ProbeConfig(c_factors=(1,), thresholds=(0, 1)),
            cytosae.ProbeConfig(c_factors=(1.0,), thresholds=(0.0, 1.0)),
        ),
    ]
    for whole, number in pairs:
        assert sha256_json(dataclasses.asdict(whole)) == sha256_json(dataclasses.asdict(number))
    assert cytosae.UnitConfig().tau is None
