"""Settings of a training run: presets, which of several values wins, and what is refused with which words."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from places import GOLDEN

from cytosae.sae import TrainConfig, make_config
from stores import BadInput


def _toml(folder: Path, text: str) -> Path:
    path = folder / "settings.toml"
    path.write_text(text)
    return path


def test_runs_of_before_keep_their_settings_and_so_their_identity() -> None:
    """A new setting joins `RELEASED` in chosen_defaults.py, so that it is not written where it changes nothing."""
    before = json.loads((GOLDEN / "sweep-v1" / "runs" / "lr=0.0004-seed=0" / "sae.json").read_text())["spec"]["config"]
    assert TrainConfig.from_spec(before).to_spec() == before


def test_a_config_by_itself_is_the_released_loss_on_shuffled_tokens() -> None:
    """docs/reference/design.md 4: released loss, token median, scalar ghost; paper.md 4.1: the released numbers."""
    config = TrainConfig()
    assert (config.loss, config.dead_latents, config.ghost_scale) == ("normed", "ghost", "scalar")
    assert (config.order, config.b_dec_init) == ("tokens", "geometric-median")
    assert (config.expansion, config.l1, config.lr, config.warmup_steps) == (64, 8e-5, 4e-4, 500)
    assert (config.batch_tokens, config.dead_after_steps) == (64 * 257, 64)
    assert config.n_steps(tokens_per_epoch=41_621 * 257) == 15_625


def test_without_a_preset_budget_width_and_l0_are_left_to_the_data() -> None:
    """And everything that goes with such a budget; all else is as it was."""
    left_open: dict[str, Any] = {"tokens": "auto", "expansion": "auto", "target_l0": "auto"}
    left_open |= {"loss": "auto", "init": "auto", "clip_norm": None, "dead_latents": "auto"}  # they follow the L0
    with_it: dict[str, Any] = {
        "batch_tokens": 4096,
        "lr": 1e-3,
        "warmup_steps": 100,
        "schedule": "linear",
        "holdout": 0.1,
    }
    assert make_config() == dataclasses.replace(TrainConfig(), **left_open, **with_it)
    assert make_config() == TrainConfig(**left_open)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"tokens": 100}, {"tokens": 100, "batch_tokens": 16_448, "lr": 4e-4, "warmup_steps": 500, "holdout": 0.0}),
        ({"epochs": 2.0}, {"tokens": None, "schedule": "constant", "expansion": "auto"}),
        ({"expansion": 4}, {"expansion": 4, "tokens": "auto", "target_l0": "auto"}),
        ({"l1": 1e-3}, {"target_l0": None, "l1": 1e-3}),
        ({"target_l0": 20.0}, {"target_l0": 20.0}),
        ({"activation": "topk"}, {"target_l0": "auto", "k": None}),
        ({"activation": "topk", "k": 5}, {"target_l0": None, "k": 5}),
        ({"lr": 3e-3, "holdout": 0.3, "schedule": "cosine"}, {"lr": 3e-3, "holdout": 0.3, "schedule": "cosine"}),
    ],
)
def test_what_is_given_is_taken_as_it_is(given: dict[str, Any], expected: dict[str, Any]) -> None:
    config = make_config(options=given)
    assert {name: getattr(config, name) for name in expected} == expected


def test_what_relu_learns_with_follows_the_wanted_l0() -> None:
    """From 32 on what topk has, below the released settings; open while L0 is, and what is given stays."""
    names = ("loss", "init", "clip_norm", "dead_latents")

    def of(**options: Any) -> tuple[Any, ...]:
        config = make_config(options=options)
        return tuple(getattr(config, name) for name in names)

    released, as_top_k = ("normed", "kaiming", 0.0, "ghost"), ("eq1", "transpose", 1.0, "auxk")
    assert of(activation="topk", k=8) == as_top_k
    assert of(l1=1e-3) == of(target_l0=31.0) == released
    assert of(target_l0=32.0) == of(target_l0=128.0) == as_top_k
    assert of(target_l0=32.0, loss="normed", clip_norm=0.0) == ("normed", "transpose", 0.0, "auxk")
    open_config = make_config(options={"init": "kaiming"})
    assert open_config.is_open
    assert dataclasses.replace(open_config, target_l0=32.0) == make_config(
        options={"init": "kaiming", "target_l0": 32.0}
    )
    assert of(target_l0="auto", l1_warmup_steps=0) == ("auto", "auto", None, "auto")
    with pytest.raises(BadInput, match="loss"):
        TrainConfig(loss="mae", target_l0="auto")
    with pytest.raises(BadInput, match="clip_norm"):
        TrainConfig(clip_norm=-1.0, target_l0="auto")
    for name in ("token_set", "order", "precision", "frozen"):
        wrong: dict[str, Any] = {name: "auto"}
        with pytest.raises(BadInput, match=f"{name} must be .*found 'auto'"):
            TrainConfig(target_l0="auto", **wrong)


def test_l1_and_a_wanted_l0_replace_each_other(tmp_path: Path) -> None:
    file = _toml(tmp_path, "target_l0 = 20\n")
    assert make_config(config_file=file).target_l0 == 20.0
    later = make_config(config_file=file, options={"l1": 1e-3})
    assert (later.l1, later.target_l0) == (1e-3, None)
    assert make_config(preset="cytosae", options={"target_l0": "auto"}).target_l0 == "auto"
    topk = make_config(config_file=file, options={"activation": "topk", "k": 4})
    assert (topk.k, topk.target_l0) == (4, None)
    with pytest.raises(BadInput, match="either l1, a fixed weight, or target_l0"):
        make_config(config_file=_toml(tmp_path, "target_l0 = 20\nl1 = 1e-3"))
    with pytest.raises(BadInput, match="either k or target_l0"):
        TrainConfig(activation="topk", k=3, target_l0=3.0)
    assert make_config(config_file=_toml(tmp_path, 'tokens = "auto"\ntarget_l0 = "auto"')) == make_config()
    with pytest.raises(BadInput, match=r'target_l0 must be float; found \'some\'. It may also be "auto"'):
        make_config(config_file=_toml(tmp_path, 'target_l0 = "some"'))


@pytest.mark.parametrize("preset", [None, "cytosae", "paper"])
def test_the_presets_are_what_they_were(preset: str | None) -> None:
    """Every setting that existed before `auto` did, by hand, of the presets and of a config by itself."""
    config = TrainConfig() if preset is None else make_config(preset=preset)
    before = {
        **{"expansion": 64, "activation": "relu", "k": None, "l1": 8e-5, "l1_warmup_steps": 0, "lr": 4e-4},
        **{"warmup_steps": 500, "schedule": "constant", "decay_steps": None, "batch_tokens": 16_448, "tokens": None},
        **{"epochs": None, "token_set": "all", "loss": "normed", "token_scale": "none", "dead_latents": "ghost"},
        **{"dead_after_steps": 64, "ghost_scale": "scalar", "auxk": None, "auxk_weight": 1 / 32},
        **{"resample_every": 1000, "jump_threshold": 1e-3, "jump_bandwidth": 1e-3, "b_dec_init": "geometric-median"},
        **{"order": "tokens", "pool_chunks": 16, "mix": None, "holdout": 0.0, "holdout_by": "image", "seed": 0},
        **{"order_seed": None, "precision": "fp32", "log_every": 20, "target_l0": None},
    }
    released = {"order": "images", "ghost_scale": "elementwise", "b_dec_init": "geometric-median-per-position"}
    changes: dict[str | None, dict[str, Any]] = {
        None: {},
        "cytosae": released | {"tokens": 257_000_000},
        "paper": {"loss": "eq1"},
    }
    assert {name: getattr(config, name) for name in before} == before | changes[preset]
    assert config.n_steps(tokens_per_epoch=1) == 15_625


def test_the_preset_cytosae_is_the_released_run() -> None:
    config = make_config(preset="cytosae")
    assert (config.loss, config.dead_latents, config.ghost_scale) == ("normed", "ghost", "elementwise")
    assert (config.order, config.b_dec_init) == ("images", "geometric-median-per-position")
    assert (config.tokens, config.n_steps(tokens_per_epoch=1)) == (257_000_000, 15_625)


@pytest.mark.parametrize(("activation", "init"), [("jumprelu", "transpose"), ("gated", "kaiming")])
def test_a_steered_penalty_has_its_own_loss_and_clipping(activation: str, init: str) -> None:
    """No L1 weight is given, whose unit the loss would decide; presets, a weight, and what is said stay as they are."""
    steered = TrainConfig(activation=activation, target_l0=20.0)
    assert (steered.loss, steered.clip_norm, steered.init) == ("eq1", 1.0, init)
    assert TrainConfig.from_spec(steered.to_spec()) == steered
    weight = TrainConfig(activation=activation, l1=1e-3)
    assert (weight.loss, weight.clip_norm) == ("normed", 0.0)
    said = TrainConfig(activation=activation, target_l0=20.0, loss="normed", clip_norm=0.0)
    assert (said.loss, said.clip_norm) == ("normed", 0.0)
    assert TrainConfig.from_spec(said.to_spec()) == said  # as in runs of before
    relu = TrainConfig(target_l0=20.0)  # not better at every L0
    assert (relu.loss, relu.clip_norm) == ("normed", 0.0)
    preset = make_config(preset="cytosae", options={"activation": activation, "target_l0": 20.0})
    assert (preset.loss, preset.clip_norm) == ("normed", 0.0)


def test_the_preset_paper_is_equation_1_as_printed() -> None:
    assert make_config(preset="paper") == TrainConfig(loss="eq1")


def test_options_win_over_the_file_the_file_over_the_preset_the_preset_over_defaults(tmp_path: Path) -> None:
    file = _toml(tmp_path, 'order = "tokens"\nb_dec_init = "mean"\nseed = 5\nlr = 1e-3\n')
    config = make_config(preset="cytosae", config_file=file, options={"lr": 2e-3})
    assert config.ghost_scale == "elementwise"  # preset
    assert (config.order, config.seed) == ("tokens", 5)  # file
    assert config.lr == 2e-3  # option
    assert config.l1 == 8e-5  # default


@pytest.mark.parametrize(
    ("in_file", "options", "budget"),
    [
        ("", {"epochs": 2.0}, (None, 2.0)),  # replaces the preset's tokens
        ("epochs = 3", {}, (None, 3.0)),
        ("epochs = 3", {"tokens": 100}, (100, None)),
        ("tokens = 50", {"epochs": 0.5}, (None, 0.5)),
        ("tokens = 50", {}, (50, None)),
    ],
)
def test_a_budget_given_later_replaces_the_other_kind(
    tmp_path: Path, in_file: str, options: dict[str, Any], budget: tuple[int | None, float | None]
) -> None:
    config = make_config(preset="cytosae", config_file=_toml(tmp_path, in_file), options=options)
    assert (config.tokens, config.epochs) == budget


def test_two_budgets_at_once_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="the budget once: either tokens or epochs"):
        make_config(options={"tokens": 100, "epochs": 1.0})
    with pytest.raises(BadInput, match="the budget once"):
        make_config(config_file=_toml(tmp_path, "tokens = 100\nepochs = 1"))


def test_the_budget_is_rounded_to_whole_batches_and_is_at_least_one() -> None:
    assert TrainConfig(batch_tokens=100, epochs=1.5).n_steps(tokens_per_epoch=1000) == 15
    assert TrainConfig(batch_tokens=100, tokens=260).n_steps(tokens_per_epoch=1000) == 3
    assert TrainConfig(batch_tokens=100, tokens=1).n_steps(tokens_per_epoch=1000) == 1


def test_whole_numbers_in_a_file_are_the_same_settings_as_decimal_ones(tmp_path: Path) -> None:
    """`epochs = 2` in TOML and `--epochs 2` are one run: a resumed one must not be called another."""
    from_file = make_config(config_file=_toml(tmp_path, "epochs = 2\nl1 = 0"))
    from_options = make_config(options={"epochs": 2.0, "l1": 0.0})
    assert repr(from_file) == repr(from_options)  # repr, as in sae.json: 2 is not 2.0 there


def test_an_unknown_key_is_named_beside_those_that_exist(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"settings\.toml sets learning_rate, which is no setting; there are .*lr,"):
        make_config(config_file=_toml(tmp_path, "learning_rate = 1e-3"))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('lr = "fast"', "lr must be float; found 'fast'"),
        ("lr = true", "lr must be float; found True"),
        ("seed = 1.5", "seed must be int; found 1.5"),
        ('mix = [1, "a"]', "mix must be float; found 'a'"),
        ("mix = 1", "mix must be a list of numbers; found 1"),
        ("loss = 3", "loss must be str; found 3"),
        ("tokens = 1.5", "tokens must be int; found 1.5"),
        ('epochs = "2"', "epochs must be float; found '2'"),
        ("l1 = [1]", r"l1 must be float; found \[1\]"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(tmp_path: Path, line: str, words: str) -> None:
    with pytest.raises(BadInput, match=rf"settings\.toml: {words}"):
        make_config(config_file=_toml(tmp_path, line))


def test_a_file_that_is_missing_or_no_toml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"none\.toml cannot be read as TOML: .*No such file"):
        make_config(config_file=tmp_path / "none.toml")
    with pytest.raises(BadInput, match="cannot be read as TOML"):
        make_config(config_file=_toml(tmp_path, "lr: 3"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"token_set": "cells"}, "token_set must be one of all, patch, cls, register; found 'cells'"),
        ({"loss": "l2"}, "loss must be one of normed, eq1, mse; found 'l2'"),
        ({"ghost_scale": "none"}, "ghost_scale must be one of scalar, elementwise; found 'none'"),
        ({"b_dec_init": "median"}, "b_dec_init must be one of geometric-median, .*; found 'median'"),
        ({"order": "random"}, "order must be one of tokens, images; found 'random'"),
        ({"precision": "fp8"}, "precision must be one of .*; found 'fp8'"),
        ({"expansion": 0}, "expansion must be at least 1; found 0"),
        ({"batch_tokens": 0}, "batch_tokens must be at least 1; found 0"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0; found -1"),
        ({"l1": -1.0}, "l1 must be at least 0; found -1.0"),
        ({"l1": float("nan")}, "l1 must be at least 0; found nan"),
        ({"lr": 0.0}, "lr must be above 0; found 0.0"),
        ({"lr": float("inf")}, "lr must be above 0; found inf"),
        ({"tokens": 0}, "tokens must be above 0; found 0"),
        ({"expansion": "some"}, "expansion must be at least 1; found 'some'"),
        ({"target_l0": float("inf")}, "target_l0 must be above 0; found inf"),
        ({"seed": -1}, "seed must be at least 0; found -1"),
        ({"order": "images", "token_set": "patch"}, "'images' trains on whole images, .*: it needs token_set 'all'"),
        ({"order": "images", "mix": (1.0, 1.0)}, "'images' trains on whole images, .* and no mix"),
        ({"activation": "topk"}, "activation 'topk' needs k, .*--k 64"),
        ({"k": 8}, "activation 'relu' takes no k; .* choose topk or batchtopk"),
        ({"k": 8, "target_l0": "auto"}, "activation 'relu' takes no k; .* choose topk or batchtopk"),
        ({"activation": "batchtopk", "k": 0}, "k must be at least 1; found 0"),
        ({"holdout": 1.0}, "holdout is a fraction below 1; found 1.0"),
        ({"holdout": -0.1}, "holdout must be at least 0; found -0.1"),
        ({"mix": (1.0, 0.0)}, r"every share in mix must be above 0; found \[1.0, 0.0\]"),
        ({"dead_latents": "ghosts"}, "dead_latents must be one of ghost, auxk, resample, none; found 'ghosts'"),
        ({"jump_bandwidth": 0.0}, "jump_bandwidth must be above 0; found 0.0"),
    ],
)
def test_a_value_that_cannot_be_used_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        TrainConfig(**settings)


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(BadInput, match="preset must be one of cytosae, paper; found 'released'"):
        make_config(preset="released")


def test_the_median_per_position_needs_whole_images() -> None:
    """Over shuffled tokens it would be the median of 257 random ones, and mean nothing."""
    with pytest.raises(BadInput, match="needs whole images: order 'images', preset cytosae"):
        make_config(options={"b_dec_init": "geometric-median-per-position"})


# ---------------------------------------------------------------------------------------------------- schedules


def test_the_learning_rate_at_every_step() -> None:
    """Hand-made values: warm-up from the first step, then constant, a cosine, or a line that ends just above 0."""
    settings = {"lr": 1.0, "warmup_steps": 2}
    rates = {
        "constant": [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        "linear": [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 0.5],
        "cosine": [0.5, 1, 1, *[(1 + math.cos(math.pi * done / 8)) / 2 for done in range(1, 8)]],
    }
    for schedule, wanted in rates.items():
        config = TrainConfig(schedule=schedule, **settings)  # type: ignore[arg-type]
        assert [config.lr_at(step, 10) for step in range(10)] == pytest.approx(wanted)
    late = TrainConfig(schedule="linear", decay_steps=4, **settings)  # type: ignore[arg-type]
    assert [late.lr_at(step, 10) for step in range(10)] == pytest.approx([0.5, *[1] * 6, 0.75, 0.5, 0.25])
    all_along = TrainConfig(schedule="linear", decay_steps=99, **settings)  # type: ignore[arg-type]
    assert all_along.lr_at(9, 10) == pytest.approx(0.1)


def test_the_penalty_warms_up() -> None:
    config = TrainConfig(l1=2.0, l1_warmup_steps=4)
    assert [config.l1_at(step) for step in range(6)] == [0.5, 1, 1.5, 2, 2, 2]
    assert TrainConfig(l1=2.0).l1_at(0) == 2.0


def test_what_is_left_open_is_resolved() -> None:
    """Hand-made values; what a run uses, `sae.json` says."""
    config = TrainConfig(seed=3, batch_tokens=100, schedule="linear", warmup_steps=2)
    assert config.resolved(768, 50) == {"tokens": 5_000, "order_seed": 3, "auxk": 384, "decay_steps": 10}
    given = TrainConfig(seed=3, order_seed=0, batch_tokens=100, auxk=7, schedule="cosine", decay_steps=9)
    assert given.resolved(768, 50) == {"tokens": 5_000, "order_seed": 0, "auxk": 7, "decay_steps": 9}
    assert TrainConfig().resolved(1, 1)["decay_steps"] == 0
