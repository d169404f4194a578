"""What can be asked of a training run, and the three named ways of asking (REFERENCE.md sections 4 and 5)."""

import dataclasses
import math
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stores.errors import BadInput
from stores.spec import check_choice
from stores.tables import listed

TOKEN_SETS = ("all", "patch", "cls")
LOSSES = ("normed", "eq1")
GHOST_SCALES = ("scalar", "elementwise")
B_DEC_INITS = ("geometric-median", "geometric-median-per-position", "mean", "zeros")
ORDERS = ("tokens", "images")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides a trained SAE, apart from the data. Written whole into `sae.json`."""

    expansion: int = 64
    """n_latents = expansion x width of the tokens."""
    l1: float = 8e-5
    """Weight of the L1 penalty, in the unit of the chosen loss."""
    lr: float = 4e-4
    warmup_steps: int = 500
    """Step k, from 0, runs at lr x min(1, (k + 1) / warmup_steps); constant afterwards."""
    batch_tokens: int = 16_448
    """Tokens per step: 64 images of 257."""
    tokens: int | None = None
    """Budget in tokens; None with `epochs` None: 257,000,000, the released run."""
    epochs: float | None = None
    """Budget in passes over the chosen tokens; excludes `tokens`."""
    token_set: str = "all"
    """Which tokens of an image are trained on: all 257, the 256 patches, or CLS."""
    loss: str = "normed"
    """`normed`: squared error over the token's norm (released); `eq1`: plain squared error (the paper's Eq. 1)."""
    ghost: bool = True
    """Ghost gradients for latents that have been silent for more than `dead_after_steps` steps."""
    ghost_scale: str = "scalar"
    """One factor per batch, or one per element as released."""
    dead_after_steps: int = 64
    b_dec_init: str = "geometric-median"
    order: str = "tokens"
    """`tokens`: shuffled tokens, new every epoch; `images`: whole images, shuffled once, the same in every pass."""
    pool_chunks: int = 16
    """Chunks of the cache that are shuffled together in memory (order `tokens`)."""
    seed: int = 0
    precision: str = "fp32"
    log_every: int = 20
    """Steps between two rows of metrics.parquet."""

    def __post_init__(self) -> None:
        check_choice("token_set", self.token_set, TOKEN_SETS)
        check_choice("loss", self.loss, LOSSES)
        check_choice("ghost_scale", self.ghost_scale, GHOST_SCALES)
        check_choice("b_dec_init", self.b_dec_init, B_DEC_INITS)
        check_choice("order", self.order, ORDERS)
        check_choice("precision", self.precision, ("fp32",))
        for name in ("expansion", "batch_tokens", "pool_chunks", "dead_after_steps", "log_every"):
            _check_number(name, getattr(self, name), least=1)
        _check_number("warmup_steps", self.warmup_steps, least=0)
        _check_number("l1", self.l1, least=0)
        _check_number("seed", self.seed, least=0)
        for name in ("lr", "tokens", "epochs"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise BadInput(f"{name} must be above 0; found {value!r}")
        if self.tokens is not None and self.epochs is not None:
            raise BadInput("give the budget once: either tokens or epochs")
        if self.b_dec_init == "geometric-median-per-position" and self.order != "images":
            raise BadInput(
                "b_dec_init 'geometric-median-per-position' needs whole images: order 'images', preset cytosae"
            )
        if self.order == "images" and self.token_set != "all":
            raise BadInput("order 'images' trains on whole images: it needs token_set 'all'")

    def n_steps(self, tokens_per_epoch: int) -> int:
        """Number of steps: the budget rounded to whole batches, at least one."""
        budget = self.tokens if self.tokens is not None else 257_000_000
        if self.epochs is not None:
            budget = round(self.epochs * tokens_per_epoch)
        return max(1, round(budget / self.batch_tokens))


PRESETS: dict[str, dict[str, Any]] = {
    # the released run: with equal weights and batches each step equals the released one
    "cytosae": {
        "order": "images",
        "ghost_scale": "elementwise",
        "b_dec_init": "geometric-median-per-position",
        "tokens": 257_000_000,
    },
    # Eq. 1 as printed; its squared error is about 768 x ||x|| times the released one, so 8e-5 is that much weaker
    "paper": {"loss": "eq1"},
}


def make_config(
    *, preset: str | None = None, config_file: Path | None = None, options: dict[str, Any] | None = None
) -> TrainConfig:
    """Defaults, then the preset, then the TOML file, then single options; later ones win.

    Raises
    ------
    BadInput
        For an unknown preset or key, or a value that cannot be used.
    """
    values: dict[str, Any] = {}
    if preset is not None:
        check_choice("preset", preset, tuple(PRESETS))
        values |= PRESETS[preset]
    for given in (_read_toml(config_file) if config_file else {}, options or {}):
        if "epochs" in given:
            values.pop("tokens", None)  # a budget given later replaces the other kind
        if "tokens" in given:
            values.pop("epochs", None)
        values |= given
    return TrainConfig(**values)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadInput(f"{path} cannot be read as TOML: {error}") from None
    fields = {field.name: field for field in dataclasses.fields(TrainConfig)}
    unknown = [name for name in values if name not in fields]
    if unknown:
        raise BadInput(f"{path} sets {listed(unknown)}, which is no setting; there are {', '.join(fields)}")
    for name, value in values.items():
        expected = str(fields[name].type)
        fits = {"bool": isinstance(value, bool), "str": isinstance(value, str)}
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        whole = is_number and "float" not in expected and not isinstance(value, int)
        base = "bool" if fields[name].type is bool else "str" if fields[name].type is str else "number"
        if not fits.get(base, is_number) or whole:
            raise BadInput(
                f"{path}: {name} must be {getattr(fields[name].type, '__name__', expected)}; found {value!r}"
            )
        if is_number and "float" in expected:
            values[name] = float(value)  # 2 and 2.0 are one setting, and one identity
    return values


def _check_number(name: str, value: float, *, least: float) -> None:
    if not (math.isfinite(value) and value >= least):
        raise BadInput(f"{name} must be at least {least}; found {value!r}")
