"""Import paths of before still lead to what lay there."""

import importlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from places import ROOT

import cytosae
from cytosae.old_paths import MOVED


def test_every_old_path_leads_to_a_module() -> None:
    for place in MOVED.values():
        assert (ROOT / "cytosae" / f"{place.replace('.', '/')}.py").is_file(), place


@pytest.mark.parametrize("old", ["plot_sweep", "plot_patient_barcodes", "covariates", "atlas.agreement", "sheets"])
def test_an_old_path_is_the_new_module(old: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, f"cytosae.{old}", raising=False)
    with pytest.warns(DeprecationWarning, match=f"cytosae.{old} has moved to cytosae.{MOVED[old]}"):
        module = importlib.import_module(f"cytosae.{old}")
    new = importlib.import_module(f"cytosae.{MOVED[old]}")
    names = [name for name in vars(new) if name.isidentifier() and not name.startswith("_")]
    assert names
    assert all(getattr(module, name) is getattr(new, name) for name in names)


def test_names_of_old_modules_that_are_packages_now() -> None:
    """As docs/concepts.md has them; a function with the name of its module can be called, whatever was imported."""
    rooms: Any = cytosae
    for _ in range(2):
        assert rooms.concepts.label_entropy([[1.0, 1.0]], [[0, 1]]) == pytest.approx(np.log(2))
        importlib.import_module("cytosae.concepts.label_entropy")
    assert callable(rooms.concepts.shuffled_entropy)
    assert callable(rooms.latents.encode)


@pytest.mark.stress
def test_rooms_are_there_by_their_names_alone() -> None:
    """`import cytosae` is enough for all of it; what has no door is no name of the package."""
    code = "import cytosae; cytosae.relations.LEAST_OTHERS, cytosae.review.EXTREME, cytosae.atlas; cytosae.commands"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr.splitlines()[-1] == "AttributeError: No cytosae attribute commands"
