"""What a table of images allows, against every way to count it."""

from itertools import combinations
from math import comb

import pyarrow as pa
import pytest

from cytosae.pipeline.cohort import (
    MOST_COMPARISONS,
    CohortFacts,
    folder_name,
    possible_comparisons,
    possible_probes,
    read_cohort,
)
from stores.errors import BadInput
from stores.tables import image_table


def table(rows: list[tuple[str | None, str | None, str | None]]) -> pa.Table:
    """An image for each (label, patient, disease)."""
    columns = {name: [row[at] for row in rows] for at, name in enumerate(("label", "patient", "disease"))}
    paths: list[str | None] = [f"{number}.png" for number in range(len(rows))]
    return image_table({"path": paths, **columns}, source="a test", dataset="d")


def cohort(**patients: int) -> CohortFacts:
    """So many patients of each disease, an image each."""
    return read_cohort(table([(None, f"{name} {n}", name) for name, number in patients.items() for n in range(number)]))


def test_facts() -> None:
    facts = read_cohort(table([("a", "P1", "AML"), ("a", "P1", None), ("b", "P2", None), (None, None, None)]))
    assert facts.labels == {"a": 2, "b": 1}
    assert facts.label_groups == {"a": 1, "b": 1}
    assert (facts.n_images, facts.n_patients, facts.n_with_patient, facts.n_without_disease) == (4, 2, 3, 1)
    assert facts.diseases == {"AML": 1}
    assert any("1 image without one" in line for line in facts.lines())
    with pytest.raises(BadInput, match="1 patient with images of two diseases"):
        read_cohort(table([("a", "P1", "AML"), ("a", "P1", "well")]))


@pytest.mark.parametrize("n_a", range(1, 8))
@pytest.mark.parametrize("n_b", range(1, 8))
def test_a_comparison_is_made_where_p_can_be_small(n_a: int, n_b: int) -> None:
    """Each way to share out the patients is counted; the largest difference is one of them."""
    found, left_out = possible_comparisons(cohort(A=n_a, B=n_b))
    n_ways = len([*combinations(range(n_a + n_b), n_a)])
    assert n_ways == comb(n_a + n_b, n_a)
    is_possible = min(n_a, n_b) >= 2 and 1 / n_ways <= 0.05
    assert bool(found) == is_possible
    assert ("A against B" in left_out) == (not is_possible)


def test_many_diseases_are_compared_with_the_rest() -> None:
    found, left_out = possible_comparisons(cohort(A=6, B=6, C=6))
    assert [(each["a"], each["b"]) for each in found] == [
        *(("A", "rest"), ("B", "rest"), ("C", "rest")),
        *(("A", "B"), ("A", "C"), ("B", "C")),
    ]
    assert not left_out
    found, left_out = possible_comparisons(cohort(**{name: 6 for name in "ABCDEFG"}))
    assert {each["b"] for each in found} == {"rest"}
    assert len(found) == 7 <= MOST_COMPARISONS
    assert "21 pairs" in left_out["single pairs of diseases"]
    assert possible_comparisons(cohort(A=9))[1] == {"comparisons": "all patients with a disease have A"}


def test_probes_leave_out_small_classes_and_say_so() -> None:
    found, left_out = possible_probes(cohort(A=9, B=5, C=4))
    assert [(each["name"], each["folds"], each["classes"]) for each in found] == [("disease", 5, ("A", "B"))]
    assert left_out["probe of disease: C"] == "4 patients: fewer than the 5 folds"
    (only,), left_out = possible_probes(cohort(A=4, B=3))
    assert (only["folds"], only["inner_folds"]) == (3, 2)
    assert "fewer than two classes" in left_out["probe of label"]
    assert not possible_probes(cohort(A=9, B=2))[0]


def test_folder_names_are_plain_and_differ() -> None:
    taken: set[str] = set()
    names = [folder_name(text, taken) for text in ("a/../b", "A/../B", "<script>", "\u202e", "", "..", "x" * 500)]
    assert names[0] == "a-..-b"
    assert len({name.casefold() for name in names}) == len(names)
    assert all(name and "/" not in name and len(name) <= 70 and not name.startswith(".") for name in names)
