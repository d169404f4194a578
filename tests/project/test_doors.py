"""A notebook equals the command line: each command has its function at a door, and both have the same defaults."""

import dataclasses
import importlib
import inspect
from typing import Any

import click
import pytest
from command_line import commands

# command -> the call behind it, and the configs that the call takes; `demo` is a tour of the others
FUNCTIONS: dict[str, tuple[str, ...]] = {
    "data index": ("cytocache.index_images",),
    "cache extract": ("cytocache.extract", "cytocache.ExtractConfig"),
    "cache merge": ("stores.merge_cache",),
    "cache info": ("stores.cache_info",),
    "cache verify": ("stores.check_cache",),
    "cache repair": ("cytocache.repair",),
    "cache fidelity": ("cytocache.measure_fidelity",),
    "sae train": ("cytosae.train", "cytosae.TrainConfig"),
    "sae sweep": ("cytosae.sweep",),
    "sae info": ("cytosae.sae_info",),
    "sae eval": ("cytosae.evaluate",),
    "sae import": ("cytosae.import_sae",),
    "sae export": ("cytosae.export_sae",),
    "sae encode": ("cytosae.encode",),
    "sae baseline": ("cytosae.write_baseline", "cytosae.BaselineConfig"),
    "sae versus": ("cytosae.compare_with_baselines", "cytosae.VersusConfig"),
    "sae score": ("cytosae.score_sae", "cytosae.ScoreConfig"),
    "latents info": ("stores.latents_info",),
    "latents verify": ("stores.check_latents",),
    "latents merge": ("stores.merge_latents",),
    "barcode": ("cytosae.write_barcodes", "cytosae.BarcodeConfig"),
    "barcode export": ("cytosae.export_h5ad",),
    "concept stats": ("cytosae.concept_statistics", "cytosae.ConceptConfig"),
    "concept top": ("cytosae.top_images",),
    "concept thresholds": ("cytosae.compare_thresholds",),
    "concept select": ("cytosae.select_latents", "cytosae.SelectionConfig"),
    "concept sheet": ("cytosae.write_sheets", "cytosae.Style"),
    "concept map": ("cytosae.write_maps", "cytosae.PatchQuery", "cytosae.Style"),
    "concept masks": ("cytosae.write_mask_agreement",),
    "concept ablate": ("cytosae.ablate_latents", "cytosae.AblateConfig"),
    "concept stability": ("cytosae.write_stability",),
    "concept neighbours": ("cytosae.write_neighbours", "cytosae.NeighbourConfig"),
    "concept patient": ("cytosae.write_patient_concepts", "cytosae.PatientConfig"),
    "concept search": (
        *("cytosae.search_cells", "cytosae.SearchConfig"),
        *("cytosae.evaluate_search", "cytosae.SearchEvaluationConfig"),
    ),
    "concept describe": ("cytosae.describe_latents", "cytosae.DescribeConfig", "cytosae.AskConfig"),
    "concept match": ("cytosae.match_latents", "cytosae.MatchConfig"),
    "compare": ("cytosae.compare", "cytosae.CompareConfig"),
    "compare replicate": ("cytosae.replicate", "cytosae.ReplicateConfig"),
    "probe": ("cytosae.probe", "cytosae.ProbeConfig", "cytosae.UnitConfig"),
    "atlas build": ("cytosae.build_atlas", "cytosae.AtlasConfig"),
    "atlas serve": ("cytosae.open_server", "cytosae.ServeConfig"),
    "atlas export": ("cytosae.write_verdicts",),
    "atlas agreement": ("cytosae.review_agreement",),
    "verify": ("stores.verify_folder",),
    "run": ("cytosae.run_pipeline", "cytosae.RunConfig"),
    "report": ("cytosae.write_run_report",),
}
OTHER_NAMES = {"taus": "tau", "show_labels": "shows_labels", "review_only": "is_review_only"}  # option -> in Python
NOT_COMPARED = {("probe", "mil")}  # a switch on the command line, a config in Python


COMMANDS = dict(commands())


def at_door(name: str) -> Any:
    """The object that a notebook gets: `cytosae.train` after `import cytosae`."""
    package, _, attribute = name.partition(".")
    return getattr(importlib.import_module(package), attribute)


def defaults_of(call: Any) -> dict[str, Any]:
    """Parameter -> default, of a function or of a dataclass; those without a default are left out."""
    if dataclasses.is_dataclass(call):
        made = {
            field.name: field.default_factory() if callable(field.default_factory) else field.default
            for field in dataclasses.fields(call)
        }
        return {name: value for name, value in made.items() if value is not dataclasses.MISSING}
    parameters = inspect.signature(call).parameters.values()
    return {each.name: each.default for each in parameters if each.default is not inspect.Parameter.empty}


def test_each_command_has_its_function() -> None:
    """No command without a function, and none in the table that does not exist (any more)."""
    assert {*COMMANDS} - {"demo"} == {*FUNCTIONS}
    missing = [name for names in FUNCTIONS.values() for name in names if not _is_there(name)]
    assert not missing, missing


def _is_there(name: str) -> bool:
    try:
        return callable(at_door(name))
    except AttributeError:
        return False


@pytest.mark.parametrize("command", FUNCTIONS)
def test_defaults_are_those_of_the_command_line(command: str) -> None:
    """Where an option and a parameter have one name, both have one default."""
    known = {name: value for each in FUNCTIONS[command] for name, value in defaults_of(at_door(each)).items()}
    for option in COMMANDS[command].params:
        name = OTHER_NAMES.get(option.name or "", option.name or "")
        said = option.get_default(click.Context(COMMANDS[command]))
        if name not in known or said is None or type(said).__name__ == "Sentinel":  # no default
            continue
        found = known[name]
        is_computed = isinstance(option, click.Option) and isinstance(option.show_default, str)  # such as: cores
        if (is_computed and found is None) or (command, name) in NOT_COMPARED:
            continue
        if option.multiple:  # one value of several is given alone
            found = tuple(found) if isinstance(found, list | tuple) else () if found is None else (found,)
        assert found == said, f"{command}: {option.opts[0]} is {said!r}, in Python {found!r}"


def test_defaults_are_compared() -> None:
    """The test above has much to compare: most commands share options with their functions."""
    shared = {
        (command, option.name)
        for command, names in FUNCTIONS.items()
        for option in COMMANDS[command].params
        if any(OTHER_NAMES.get(option.name or "", option.name or "") in defaults_of(at_door(name)) for name in names)
    }
    assert len(shared) > 60


@pytest.mark.parametrize("package", ["cytocache", "cytosae"])
def test_every_device_is_chosen_alike(package: str) -> None:
    """Two calls with defaults work on the same device: an SAE is loaded where `measure_fidelity` puts the tokens."""
    door = importlib.import_module(package)
    calls = {name: getattr(door, name) for name in door.__all__ if callable(getattr(door, name))}
    found = {name: defaults_of(call).get("device") for name, call in calls.items() if _has_device(call)}
    assert len(found) > 2
    assert {*found.values()} == {"auto"}, found


def _has_device(call: Any) -> bool:
    return "device" in inspect.signature(call).parameters


def test_results_have_a_name_at_the_door_of_their_room() -> None:
    """What a call returns can be named in a program's types without a path into the room."""
    cytosae = importlib.import_module("cytosae")
    n_found = 0
    for name in cytosae.__all__:
        call = getattr(cytosae, name)
        kind = inspect.signature(call).return_annotation if inspect.isfunction(call) else None
        if inspect.isclass(kind) and kind.__module__.startswith("cytosae."):
            room = importlib.import_module(".".join(kind.__module__.split(".")[:2]))
            assert kind.__name__ in room.__all__, f"{name} returns {kind}"
            n_found += 1
    assert n_found > 20
