"""Settings of training as options: what `cyto sae train` makes of them is what the recipe has."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cli import cli
from cytosae.commands.sae import sae_train
from cytosae.pipeline.commands_text import OF_TRAINING, training_options
from cytosae.sae import TrainConfig


@pytest.mark.parametrize(
    "given",
    [
        {"activation": "relu", "target_l0": "auto", "tokens": "auto"},  # loss, init and more wait for the number
        {"activation": "relu", "target_l0": "auto", "tokens": "auto", "loss": "mse", "clip_norm": 0.5},
        {"activation": "relu", "target_l0": 64.0, "tokens": 1000},
        {"activation": "topk", "k": 16, "tokens": "auto"},
    ],
)
def test_options_give_the_settings_of_the_recipe(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(**given)
    found: list[TrainConfig] = []

    def told(_stores: Any, _run: Any, config: TrainConfig, **_: Any) -> None:
        found.append(config)
        raise SystemExit(0)

    monkeypatch.setattr("cytosae.train", told)
    is_steered = config.target_l0 is not None or config.takes_k
    section = {
        name: value
        for name, value in dataclasses.asdict(config).items()
        if value is not None and not (is_steered and name == "l1")
    }
    words = training_options(section, "recipe.toml")
    assert "--config" not in words
    outcome = CliRunner().invoke(cli, ["sae", "train", str(tmp_path), "-o", str(tmp_path / "out"), *words])
    assert found == [config], outcome.output


def test_all_settings_with_an_option_are_known() -> None:
    """Others would be read from the recipe, which is right, too, but no command to learn from."""
    settings = {field.name for field in dataclasses.fields(TrainConfig)}
    assert {option.name for option in sae_train.params} & settings == {*OF_TRAINING}
