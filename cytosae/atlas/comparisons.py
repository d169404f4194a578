"""What pages call a comparison of two diseases, and what they say it takes into account."""

from collections.abc import Mapping
from typing import Any

from stores.errors import DamagedStore

from .cohort import Cohort
from .inputs import Inputs

MIX = "the mix of cells is not taken into account"


def pair_of(inputs: Inputs, cohort: Cohort, number: int) -> dict[str, str]:
    """Of a comparison: a and b, the names of its groups; file, the name of its page; mix, what is to be said of it."""
    spec = inputs.comparisons[number].header.spec
    sides = [str(spec["a"]), "rest" if spec["b_is_rest"] else str(spec["b"])]
    known = [str(cohort.diseases.index(name)) if name in cohort.diseases else "" for name in sides]
    if spec["b_is_rest"]:
        known[1] = "rest"
    if not all(known):
        raise DamagedStore(f"{inputs.comparisons[number].root} compares a disease that the barcodes do not have")
    return {"a": sides[0], "b": "all others" if spec["b_is_rest"] else sides[1], "file": "-".join(known)} | {
        "mix": "" if taken_into_account(spec)[1] else MIX
    }


def taken_into_account(spec: Mapping[str, Any]) -> tuple[str, bool]:
    """What a comparison takes into account besides the disease, in words ("" of a plain one); and the mix of cells?"""
    words = [f"images labelled {spec['within_label']} only"] if spec.get("within_label") is not None else []
    words += [f"the mix of {spec['standardize']}"] if spec.get("standardize") else []
    is_of_one_mix = bool(words)
    words += [str(name) for name in (spec.get("strata"), *spec.get("adjust", ())) if name]
    return ", ".join(words), is_of_one_mix
