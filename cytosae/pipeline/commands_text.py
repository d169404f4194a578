"""`commands.sh`: the same run by hand, one command for each stage."""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from cytosae.sae import TrainConfig

# settings whose option is called otherwise than --name-with-dashes
_OPTION_OF = {
    "n_permutations": "--permutations",
    "n_bootstraps": "--bootstraps",
    "classes": "--class",
    "c_factors": "--c-factor",
    "thresholds": "--threshold",
}
# settings of training that have an option; the others are read from the recipe, with --config
OF_TRAINING = (
    *("expansion", "activation", "k", "target_l0", "l1", "lr", "warmup_steps", "schedule", "batch_tokens", "tokens"),
    *("epochs", "token_set", "mix", "holdout", "holdout_by", "dead_latents", "b_dec_init", "seed", "precision"),
    *("loss", "init", "clip_norm", "nested", "background"),
)
_HEAD = """\
#!/bin/sh
# What `cyto run` does in this folder, by hand: one command for each stage. A command that is complete does nothing.
set -eu
cd "$(dirname "$0")"
"""


def words(command: str, *arguments: object) -> tuple[str, ...]:
    """`cyto`, the words of the command, its arguments."""
    return ("cyto", *command.split(), *map(str, arguments))


def options(settings: Mapping[str, Any]) -> list[str]:
    """Settings as options: a list is repeated, True is a switch, False and None are left out."""
    found: list[str] = []
    for name, value in settings.items():
        option = _OPTION_OF.get(name, f"--{name.replace('_', '-')}")
        if value is None or value is False:
            continue
        if value is True:
            found.append(option)
        elif isinstance(value, tuple | list):
            found += [word for each in value for word in (option, _text(each))]
        else:
            found += [option, _text(value)]
    return found


def training_options(settings: Mapping[str, Any], recipe: str) -> list[str]:
    """Settings of training as options of `cyto sae train`; if some have no option, the file `recipe` gives them.

    What is left open until L0 is known (`TrainConfig.is_open`) is left out.
    """
    usual = {each.name: each.default for each in fields(TrainConfig)}
    settings = {name: value for name, value in settings.items() if not value == usual.get(name) == "auto"}
    has_more = any(name not in OF_TRAINING and value != usual.get(name) for name, value in settings.items())
    given = {name: value for name, value in settings.items() if name in OF_TRAINING}
    return [*(["--config", recipe] if has_more else []), *options(given)]


def script(commands: Iterable[Sequence[str]], left_out: Mapping[str, str]) -> str:
    """The content of `commands.sh`; stages that were left out are comments."""
    lines = [_HEAD]
    for name, reason in left_out.items():
        lines.append(f"# left out: {_one_line(name)}: {_one_line(reason)}")
    return "\n".join([*lines, *map(shlex.join, commands), ""])


def _text(value: object) -> str:
    return repr(value) if isinstance(value, float) else str(value)


def _one_line(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)
