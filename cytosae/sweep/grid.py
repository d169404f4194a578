"""The members of a sweep: read GRID.toml, form all combinations, check them, and name each by the settings that vary.

[base]     settings of all members; also preset = "paper"
[grid]     setting = [values]: all combinations of the lists
[[runs]]   settings that belong together; each such table is combined with every combination of [grid]
"""

import dataclasses
import hashlib
import itertools
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cytosae.sae import PRESETS, TrainConfig, checked_settings, overridden, read_toml
from stores.errors import BadInput
from stores.spec import check_choice
from stores.tables import listed

MOST_MEMBERS = 10_000
_MOST_NAME = 100  # characters; a file name has at most 255, including suffixes for states and locks
_Settings = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Member:
    """One SAE of a grid."""

    name: str  # `expansion=16-seed=0`: the settings that vary, in the order of `TrainConfig`
    config: TrainConfig


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The content of a grid file."""

    varied: tuple[str, ...]  # settings that differ between members, in the order of `TrainConfig`
    members: tuple[Member, ...]  # in the order of the file: [[runs]] slowest, the last list of [grid] fastest
    tables: dict[str, Any]  # the TOML file as read


def read_grid(path: Path) -> Grid:
    """The members that a TOML file describes. `order_seed` is 0 where it is not set, so that seeds share a pass.

    Raises
    ------
    BadInput
        If the file cannot be read, has an unknown setting, or describes no SAE, the same SAE twice, settings that
        exclude each other, or more than 10,000 SAEs.
    """
    tables = read_toml(path)
    unknown = [name for name in tables if name not in ("base", "grid", "runs")]
    if unknown:
        raise BadInput(
            f"{path} has {listed(unknown)} at its top level; expected the tables [base], [grid] and [[runs]]"
        )
    base = _base(tables.get("base", {}), path)
    grid = _lists(tables.get("grid", {}), path)
    runs = _runs(tables.get("runs", [{}]), set(grid), path)
    n_members = len(runs) * math.prod(len(values) for values in grid.values())
    if n_members > MOST_MEMBERS:
        raise BadInput(f"{path} asks for {n_members:,} SAEs; a sweep has at most {MOST_MEMBERS:,}")
    asked = [
        run | dict(zip(grid, point, strict=True)) for run, point in itertools.product(runs, _product(*grid.values()))
    ]
    configs = [_config(base, settings, path) for settings in asked]
    given = {name for settings in asked for name in settings}
    varied = tuple(
        field.name
        for field in dataclasses.fields(TrainConfig)
        if (field.name in given or field.name not in TrainConfig.FOLLOWING)
        and any(getattr(config, field.name) != getattr(configs[0], field.name) for config in configs)
    )
    _check_distinct(configs, asked, path)
    members = tuple(Member(name=_name(config, varied), config=config) for config in configs)
    return Grid(varied=varied, members=members, tables=tables)


def setting_text(value: Any) -> str:
    """The value of a setting as text, for names and tables."""
    if isinstance(value, tuple):
        return "+".join(setting_text(item) for item in value)
    return "none" if value is None else str(value)


def _base(table: Any, path: Path) -> _Settings:
    source = f"{path}, [base]"
    if not isinstance(table, dict):
        raise BadInput(f"{path}: base must be a table of settings, [base]; found {_short(table)}")
    settings = checked_settings({name: value for name, value in table.items() if name != "preset"}, source)
    preset: _Settings = {}
    if "preset" in table:
        check_choice(f"{source}: preset", table["preset"], tuple(PRESETS))
        preset = PRESETS[table["preset"]]
    return {"order_seed": 0} | overridden(preset, settings)


def _lists(table: Any, path: Path) -> dict[str, list[Any]]:
    source = f"{path}, [grid]"
    if not isinstance(table, dict):
        raise BadInput(f"{path}: grid must be a table of lists, [grid]; found {_short(table)}")
    _refuse_preset(table, source)
    for name, values in table.items():
        if not isinstance(values, list) or not values:
            raise BadInput(f"{source}: {name} must be a list of values, as in seed = [0, 1, 2]; found {_short(values)}")
    return {name: [checked_settings({name: value}, source)[name] for value in values] for name, values in table.items()}


def _runs(tables: Any, in_grid: set[str], path: Path) -> list[_Settings]:
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise BadInput(f"{path}: runs must be tables of settings, each begun by [[runs]]; found {_short(tables)}")
    runs = []
    for number, table in enumerate(tables, start=1):
        source = f"{path}, [[runs]] number {number}"
        _refuse_preset(table, source)
        twice = sorted(in_grid & set(table))
        if twice:
            raise BadInput(f"{source} sets {listed(twice)}, which [grid] sets, too; keep it in one of them")
        runs.append(checked_settings(table, source))
    return runs


def _refuse_preset(table: _Settings, source: str) -> None:
    if "preset" in table:
        raise BadInput(f"{source} sets preset, which is for all members; it belongs into [base]")


def _product(*lists: list[Any]) -> list[tuple[Any, ...]]:
    return list(itertools.product(*lists))


def _config(base: _Settings, asked: _Settings, path: Path) -> TrainConfig:
    try:
        return TrainConfig(**overridden(base, asked))
    except BadInput as error:
        raise BadInput(
            f"{path}: the member {_described(asked)} cannot be trained: {error}. Settings that need each other belong "
            f"into one [[runs]]"
        ) from None


def _check_distinct(configs: list[TrainConfig], asked: list[_Settings], path: Path) -> None:
    seen: dict[TrainConfig, _Settings] = {}
    for config, settings in zip(configs, asked, strict=True):
        if config in seen:
            raise BadInput(
                f"{path} asks twice for one SAE: {_described(seen[config])}, and {_described(settings)}; leave one out"
            )
        seen[config] = settings


def _name(config: TrainConfig, varied: tuple[str, ...]) -> str:
    name = "-".join(f"{setting}={setting_text(getattr(config, setting))}" for setting in varied) or "all"
    safe = re.sub(r"[^A-Za-z0-9._=+-]", "_", name)
    if len(safe) <= _MOST_NAME:
        return safe
    return f"{safe[: _MOST_NAME - 17]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"


def _described(settings: _Settings) -> str:
    return ", ".join(f"{name} {setting_text(value)}" for name, value in settings.items()) or "with the settings of all"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"
