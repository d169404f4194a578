"""A latent in one sentence: every part from its numbers, and none without them."""

from dataclasses import astuple
from typing import Any

import numpy as np
import pytest

from cytosae.atlas.lies_on import Share
from cytosae.atlas.sentence import PLACES, Facts, Place, place_of, place_word, same_patch_of, sentence


def row(dataset: str = "cells", frequency: float = 0.12, n: int = 7, q: float | None = None) -> dict[str, Any]:
    return {"dataset": dataset, "n_images": n, "frequency": frequency, "label_divergence_q": q}


SILENT = row("dark", 0.0, 0)


def texts(*statistics: dict[str, Any], labels: list[str] | None = None, **facts: Any) -> list[str]:
    return [part.text for part in sentence(Facts(statistics=statistics or (row(),), labels=labels or [], **facts))]


def compared(q: float | None, a: float = 2.0, b: float = 1.0, *names: str) -> dict[str, Any]:
    a_name, b_name = names or ("CBFB::MYH11", "PML::RARA")
    return {"pair": {"a": a_name, "b": b_name}, "mean_a": a, "mean_b": b, "q": q}


def mixed(q: float, a: float = 2.0, b: float = 1.0) -> dict[str, Any]:
    found = compared(q, a, b)
    return {**found, "pair": {**found["pair"], "mix": "the mix is not looked at"}}


def test_without_artefacts_only_the_activity_is_said() -> None:
    assert texts() == ["Active in 12% of the images"]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([SILENT], "Never active"),
        ([row(), SILENT], "Active in 12% of the images of cells, in none of the other dataset"),
        ([row(), SILENT, SILENT], "Active in 12% of the images of cells, in none of the other 2 datasets"),
        ([row(), row("b", 0.5)], "Active in 12% to 50% of the images in 2 datasets"),
        ([row(), row("b", 0.12)], "Active in 12% of the images in 2 datasets"),
        ([row(), row("b", 0.5), SILENT], "Active in 12% to 50% of the images in 2 datasets, and in none of 1 more"),
    ],
)
def test_activity(rows: list[dict[str, Any]], said: str) -> None:
    assert texts(*rows) == [said]


@pytest.mark.parametrize(
    ("share", "said"),
    [
        (
            Share(0.02, 0.41),
            "on the cell (background: 2% of its strongest patches, 41% of all patches of these images)",
        ),
        (Share(0.5, 0.41), "on cells and background (background: 50% of its strongest patches, 41% of all patches"),
        (Share(0.9, 0.41), "on the background (background: 90% of its strongest patches, 41% of all patches"),
        (Share(0, 0.41, 0.89, 0.55), "on the nucleus (89% of its strongest patches, 55% of all patches on cells in"),
        (
            Share(0, 0.41, 0.6, 0.55),
            "on the cell (background: 0% of its strongest patches, 41% of all patches of these",
        ),
    ],
)
def test_what_it_lies_on(share: Share, said: str) -> None:
    parts = sentence(Facts(statistics=[row()], labels=[], lies_on=share))
    assert parts[1].text.startswith(said)
    assert parts[1].text.endswith("images)")
    assert parts[1].link == "#references"


def test_of_a_silent_latent_nothing_else_is_said() -> None:
    assert texts(SILENT, labels=["a"], n_patients=3, comparisons=[compared(0.001)]) == ["Never active"]


@pytest.mark.parametrize(
    ("labels", "q", "said"),
    [
        (
            ["eosinophil"] * 9 + ["blast", ""],
            None,
            "strongest almost only in eosinophil (9 of 10 labelled reference images)",
        ),
        (
            ["eosinophil"] * 6 + ["blast"] * 4,
            None,
            "strongest mostly in eosinophil (6 of 10 labelled reference images)",
        ),
        (["b", "a", "c", "d", "e"], None, "of several labels, most often a (1 of 5 labelled reference images)"),
        (["b", "a", "c"], 0.2, "a in 1 of the 3 labelled reference images"),  # too few for "mostly"
        (["a", "a", ""], None, "a in all 2 labelled reference images"),
        (["a"], 0.003, "a in the 1 labelled reference image"),
        (["a"] * 9, 0.003, "strongest almost only in a (9 of 9 labelled reference images; q 0.003)"),
        (
            ["a"] * 9,
            0.4,
            "strongest almost only in a (9 of 9 labelled reference images; chance may give this as well, q 0.4)",
        ),
    ],
)
def test_labels(labels: list[str], q: float | None, said: str) -> None:
    assert texts(row(q=q), labels=labels)[1:] == [said]


def test_the_best_q_of_the_datasets_counts() -> None:
    assert "q 0.01" in texts(row(q=0.2), row("b", q=0.01), row("c"), labels=["a"] * 5)[1]


def test_no_known_label_no_claim() -> None:
    assert texts(labels=["", ""]) == texts()


@pytest.mark.parametrize(
    ("place", "said"),
    [
        (Place(0.7, 0.3, 0.4), "all over the image"),
        (Place(0.05, 0.6, 0.1), "at a few patches, mostly in the middle"),
        (Place(0.3, 0.1, 0.8), "at 30% of the patches, mostly at the border"),
        (Place(0.3, 0.3, 0.4), "at 30% of the patches of the image"),
    ],
)
def test_place(place: Place, said: str) -> None:
    assert texts(place=place)[1:] == [said]


def test_the_same_patch_in_every_image() -> None:
    """A mark of a place in the picture: four of five images or more, of five; else nothing is said."""
    rng = np.random.default_rng(0)
    maps = rng.integers(0, 200, (6, 64)).astype(np.uint8)
    maps[np.arange(6), rng.permutation(64)[:6]] = 255
    assert same_patch_of(maps) is None
    maps[:5, 17] = 255
    maps[:5][maps[:5] == 255] = 254
    maps[:5, 17] = 255
    assert same_patch_of(maps) == (5, 6)
    assert same_patch_of(maps[:4]) is None, "too few images"
    assert same_patch_of(np.concatenate([maps, np.zeros((3, 64), np.uint8)])) == (5, 6), "maps of zeros say nothing"
    assert same_patch_of(maps[:, :16]) is None, "too few patches"
    assert same_patch_of(np.full((6, 64), 255, np.uint8)) is None, "equal everywhere: no patch is the strongest"
    maps[1, 40] = 255
    assert same_patch_of(maps) is None, "two patches are the strongest in one of the five"
    assert texts(same_patch=(5, 6))[1:] == [
        "strongest at the same patch in 5 of 6 reference images, so perhaps a place and nothing in the cell"
    ]


def test_the_word_for_a_place() -> None:
    """What the chips of the first page count, of maps of 8 x 8 patches."""
    inner, outer, left = np.zeros((3, 8, 8), np.uint8)
    inner[2:6, 2:6], outer[:], left[:, :4] = 200, 200, 200
    outer[1:7, 1:7] = 0
    maps = {"middle": inner, "border": outer, "here and there": left, "all over": np.full((8, 8), 9, np.uint8)}
    for word, drawn in maps.items():
        assert PLACES[place_word(drawn.ravel()[None])] == word
    for word, drawn in maps.items():
        assert PLACES[place_word(np.tile(drawn.ravel(), (5, 1)))] == word, "no patch is stronger than all others"
    inner[3, 3] = 255
    assert PLACES[place_word(np.tile(inner.ravel(), (5, 1)))] == "same patch"
    assert PLACES[place_word(np.zeros((2, 64), np.uint8))] == ""


def test_place_of_maps() -> None:
    """Of 8 x 8 patches: in the middle, at the border, everywhere; maps of zeros say nothing."""
    middle, border, flat = np.zeros((8, 8), np.uint8), np.full((8, 8), 255, np.uint8), np.full((8, 8), 9, np.uint8)
    middle[3:5, 3:5] = 200
    middle[0, 0] = 20  # below a quarter of the largest
    border[1:7, 1:7] = 0
    assert place_of(np.zeros((2, 64), np.uint8)) is None
    found = place_of(np.stack([middle.ravel(), np.zeros(64, np.uint8)]))
    assert found is not None
    assert found.patches == 4 / 64
    assert found.middle == pytest.approx(800 / 820)
    assert found.border == pytest.approx(20 / 820)
    for drawn, wanted in ((border, (28 / 64, 0.0, 1.0)), (flat, (1.0, 0.25, 28 / 64))):
        place = place_of(drawn.ravel()[None])
        assert place is not None
        assert astuple(place) == pytest.approx(wanted)
    both = place_of(np.stack([middle.ravel(), border.ravel()]))
    assert both is not None
    assert both.patches == (4 + 28) / 128


def test_masks() -> None:
    rows = [
        {"class": "nucleus", "auroc": 0.93, "auroc_p_any": 0.01},
        {"class": "cell", "auroc": 0.99, "auroc_p_any": 0.2},
        {"class": "platelet", "auroc": None, "auroc_p_any": None},
        {"class": "plasma", "auroc": 0.2, "auroc_p_any": 0.01},
    ]
    assert texts(masks=rows)[1:] == ["on nucleus (area under ROC 0.93, p 0.01)"]
    assert texts(masks=rows[1:])[1:] == ["on no masked part more than by chance"]


def test_patients() -> None:
    assert texts(n_patients=1200, n_above=7)[1:] == ["in 7 of 1,200 patients"]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([compared(0.003)], "twice as much in CBFB::MYH11 as in PML::RARA (q 0.003)"),
        ([compared(0.003, 1.0, 2.5)], "2.5 times as much in PML::RARA as in CBFB::MYH11 (q 0.003)"),
        ([compared(0.003, 12.0)], "12 times as much in CBFB::MYH11 as in PML::RARA (q 0.003)"),
        ([compared(0.003, 12.0, 0.0)], "in CBFB::MYH11 but not in PML::RARA (q 0.003)"),
        ([compared(0.2), compared(0.03, 3.0, 1.0, "x", "y")], "3 times as much in x as in y (q 0.03)"),
        ([compared(0.2), compared(0.3)], "no difference between diseases found (smallest q 0.2)"),
        ([mixed(0.003)], "twice as much in CBFB::MYH11 as in PML::RARA (q 0.003, the mix is not looked at)"),
        ([mixed(0.003, 2.0, 0.0)], "in CBFB::MYH11 but not in PML::RARA (q 0.003, the mix is not looked at)"),
        ([compared(None), compared(0.06)], "no difference between diseases found (smallest q 0.06)"),
    ],
)
def test_diseases(rows: list[dict[str, Any]], said: str) -> None:
    assert texts(comparisons=rows)[1:] == [said]


def test_a_latent_that_was_not_tested_makes_no_claim() -> None:
    assert texts(comparisons=[compared(None), compared(float("nan"))]) == texts()


def test_replication() -> None:
    rows = [
        {"p_holm": 0.01, "same_sign": True, "is_replicated": True},
        {"p_holm": 0.2, "same_sign": True, "is_replicated": False},
        {"p_holm": 1.0, "same_sign": False, "is_replicated": False},
    ]
    assert texts(replications=rows)[1:] == [
        "the difference is there in another cohort, too (p 0.01)",
        "in another cohort the difference has the same direction, but chance may give it (p 0.2)",
        "in another cohort the difference has the other direction",
    ]


def test_stability() -> None:
    assert texts(n_found=3, n_others=3)[1:] == ["found again in 3 of 3 other SAEs"]
    assert texts(n_found=0, n_others=1)[1:] == ["found again in 0 of 1 other SAE"]
    assert texts(n_found=None, n_others=3) == texts()  # not compared


def test_cause() -> None:
    clause = "changing it changes the backbone's output {} than changing latents like it does (p {})"
    rows = [{"quantity": "cls_gain", "p": 0.5}, {"quantity": "cls_change", "p": 0.01}]
    assert texts(causes=rows)[1:] == [clause.format("more", "0.01")]
    assert texts(causes=[{"quantity": "cls_change", "p": 0.4}])[1:] == [clause.format("no more", "0.4")]
    assert texts(causes=rows[:1]) == texts(causes=[{"quantity": "cls_change", "p": None}]) == texts()


def test_maps_in_one_piece() -> None:
    assert texts(morans_i=0.4, morans_chance=0.1)[1:] == ["its maps are in one piece (Moran's I 0.4)"]
    assert texts(morans_i=0.1, morans_chance=0.1)[1:] == ["its maps are scattered (Moran's I 0.1)"]


def test_name() -> None:
    name = {"name": "granules", "given_by": "Ann", "is_tested": True, "is_supported": True}
    assert texts(name=name)[1:] == ["called “granules” by Ann: the name tells its images"]
    assert texts(name={**name, "is_supported": False})[1].endswith("the name does not tell its images")
    assert texts(name={**name, "is_tested": False})[1].endswith("the name is not tested")


def test_each_part_links_to_its_evidence_in_the_order_of_reading() -> None:
    facts = Facts(
        statistics=[row(q=0.01)],
        labels=["a"],
        place=Place(0.7, 0.3, 0.4),
        masks=[{"class": "nucleus", "auroc": 0.93, "auroc_p_any": 0.01}],
        n_patients=3,
        comparisons=[compared(0.01)],
        replications=[{"p_holm": 0.01, "same_sign": True, "is_replicated": True}],
        n_found=1,
        n_others=1,
        causes=[{"quantity": "cls_change", "p": 0.01}],
        morans_i=0.5,
        name={"name": "n", "given_by": "g", "is_tested": False, "is_supported": False},
    )
    assert [part.link for part in sentence(facts)] == [
        *("#activation", "#references", "#references", "#masks", "#patients", "#diseases", "#replication"),
        *("#stability", "#causes", "#score", "#names"),
    ]
