"""The settings of a training run, their defaults, and the presets (docs/reference/paper.md 4, 5)."""

import dataclasses
import itertools
import math
import tomllib
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin

from stores.errors import BadInput
from stores.files import decode_text
from stores.spec import check_choice
from stores.tables import listed
from stores.token_sets import TOKEN_SETS

from .chosen_defaults import BY_ACTIVATION, RELEASED, steered_defaults

ACTIVATIONS = ("relu", "topk", "batchtopk", "jumprelu", "gated")
LOSSES = ("normed", "eq1", "mse")
BACKGROUNDS = ("keep", "first-component")
INITS = ("kaiming", "transpose")
FROZEN = ("none", "encoder", "decoder")
DEAD_LATENTS = ("ghost", "auxk", "resample", "none")
SCHEDULES = ("constant", "cosine", "linear")
TOKEN_SCALES = ("none", "sqrt-width")
HOLDOUT_BY = ("image", "patient")
GHOST_SCALES = ("scalar", "elementwise")
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
B_DEC_INITS = ("geometric-median", "geometric-median-per-position", "mean", "zeros")
ORDERS = ("tokens", "images")
_MOST_BYTES = 1 << 20  # size of a TOML file with settings, at most
MOST_TOKENS = 257_000_000  # the budget of the released run, and the most that tokens "auto" takes
_UNIONS = (Union, UnionType)
Auto = Literal["auto"]
_LEFT_OPEN: Any = None  # a default that __post_init__ fills in; once made, a config has no such value

# How the budget is given decides the defaults of what belongs to it. For `auto` they are measured (docs/log.md).
_WITH_BUDGET = {"batch_tokens": 16_448, "lr": 4e-4, "warmup_steps": 500, "schedule": "constant", "holdout": 0.0}
_WITH_AUTO = {"batch_tokens": 4_096, "lr": 1e-3, "warmup_steps": 100, "schedule": "linear", "holdout": 0.1}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that determines a trained SAE, apart from the data. All of it is written into `sae.json`.

    A new setting joins `RELEASED` (chosen_defaults.py) with the value that runs of before had: else they would have
    another identity, and none of them would be continued or taken as complete.
    Raises BadInput for a value that is out of range, or settings that exclude each other.
    """

    FOLLOWING: ClassVar[frozenset[str]] = frozenset({*BY_ACTIVATION["relu"], *_WITH_AUTO})
    """Settings whose defaults follow the activation, or how the budget is given."""

    expansion: int | Auto = 64
    """n_latents = expansion x width of the tokens; `auto`: from the number of tokens and their width (choices.py)."""
    activation: str = "relu"
    """How latents follow from pre-activations: relu, topk, batchtopk, jumprelu or gated (model.py)."""
    k: int | None = None
    """topk: active latents per token; batchtopk: their mean over a batch. None for the other activations."""
    target_l0: float | Auto | None = None
    """Wanted L0, the mean number of active latents per token. relu, jumprelu and gated: the weight of the sparsity term
    is steered to it (penalty.py), and `l1` is not used; topk and batchtopk: this is `k`. `auto`: from the width."""
    l1: float = 8e-5
    """Weight of the sparsity term, >= 0: L1 norm of the latents (relu) or of the gates (gated), or the number of
    active latents (jumprelu), per token; topk and batchtopk have none."""
    l1_warmup_steps: int = 0
    """Step k, from 0, has l1 x min(1, (k + 1) / l1_warmup_steps)."""
    lr: float = _LEFT_OPEN
    """Learning rate of Adam, > 0; default 4e-4, with tokens `auto` 1e-3."""
    warmup_steps: int = _LEFT_OPEN
    """Step k, from 0, has lr x min(1, (k + 1) / warmup_steps); default 500, with tokens `auto` 100."""
    schedule: str = _LEFT_OPEN
    """Learning rate after the warm-up: constant, or decaying to 0 at the end, as a cosine or linearly; default
    constant, with tokens `auto` linear: the decay begins when the run has settled."""
    decay_steps: int | None = None
    """Number of last steps over which it decays; None: all after the warm-up (cosine), the last fifth (linear, and
    both with tokens `auto`)."""
    batch_tokens: int = _LEFT_OPEN
    """Tokens per step; default 16,448, which is 64 images of 257, with tokens `auto` 4,096."""
    tokens: int | Auto | None = None
    """Budget in tokens; None with `epochs` None: 257,000,000, the released run. `auto`: until the error and L0 of held-
    out images have settled (budget.py), 257,000,000 at most."""
    epochs: float | None = None
    """Budget in passes over the chosen tokens; excludes `tokens`."""
    token_set: str = "all"
    """Tokens of an image that are trained on: `all` (257 for DinoBloom), `patch` (256), `cls`, or `register`."""
    loss: str = "auto"
    """Squared error over the token's norm (`normed`, released), summed over channels (`eq1`, the paper's Eq. 1), or its
    mean over channels (`mse`). `auto`: by activation, and by the L0 that the penalty is steered to
    (chosen_defaults.py); read back, it is the choice."""
    init: str = "auto"
    """Initial matrices: both drawn separately (`kaiming`, released), or the encoder as the decoder's `transpose`.
    `auto`: by activation and `target_l0`."""
    clip_norm: float | None = None
    """Gradients of all weights together are scaled down to this norm, where they are longer; 0: never. None: by
    activation and `target_l0`."""
    nested: tuple[float, ...] | None = None
    """Matryoshka: the loss is the mean over reconstructions from the first share of the latents, for each of these
    shares and for all of them (arXiv 2503.17547). Ascending, above 0, below 1; relu, topk and batchtopk."""
    token_scale: str = "none"
    """`sqrt-width`: in training, scale tokens to mean norm sqrt(width); the factor is folded into the saved weights."""
    dead_latents: str = "auto"
    """Treatment of dead latents: ghost, auxk, resample or none (dead_latents.py). `auto`: by activation and
    `target_l0`; read back, it is the choice."""
    dead_after_steps: int = 64
    """A latent is dead if it was not active on any token for more than this many steps."""
    ghost_scale: str = "scalar"
    """ghost: `scalar`, one factor per batch, or `elementwise`, one per element, as released."""
    auxk: int | None = None
    """auxk: number of dead latents per token that reconstruct the residual; None: half the width."""
    auxk_weight: float = 1 / 32
    """auxk: weight of its loss, >= 0."""
    resample_every: int = 1_000
    """resample: interval in steps; no resampling in the last interval."""
    jump_threshold: float = 1e-3
    """jumprelu: initial threshold, > 0, in the unit of scaled tokens."""
    jump_bandwidth: float = 1e-3
    """jumprelu: width of the window around the threshold in which its gradient is estimated, > 0."""
    b_dec_init: str = "geometric-median"
    """Initial b_dec: `geometric-median` of the first tokens, the same per position (released), `mean`, or `zeros`."""
    order: str = "tokens"
    """`tokens`: tokens shuffled anew in every epoch; `images`: whole images, shuffled once for all epochs."""
    pool_chunks: int = 16
    """Order `tokens`: number of cache chunks that are shuffled together in memory."""
    mix: tuple[float, ...] | None = None
    """Share of tokens from each cache, each > 0; None: in proportion to their tokens, each token once per epoch."""
    holdout: float = _LEFT_OPEN
    """Fraction of the images, 0 to below 1, that is not trained on; the SAE is measured on it at the end. Default 0,
    with tokens `auto` 0.1."""
    holdout_by: str = "image"
    """`image`: images are held out one by one; `patient`: all images of a patient together."""
    background: str = "keep"
    """`first-component`: leave out patch tokens that this rule calls background (training/background.py)."""
    frozen: str = "none"
    """A matrix that keeps its random initial value, as a baseline: `encoder` (W_enc) or `decoder` (W_dec); biases and
    thresholds are trained (cytosae/baselines)."""
    seed: int = 0
    """Seed of the initial weights, the order of the tokens, held-out images and resampling."""
    order_seed: int | None = None
    """Seed of the order of the tokens and of held-out images; None: `seed`. SAEs of a sweep with the same order share
    a pass over the data."""
    precision: str = "fp32"
    """Operands of matrix products: fp32; tf32 or fp16 (both GPU only) or bf16 (GPU, or a processor that has it); what
    each rounds is in training/precision.py. Weights, gradients and sums stay float32."""
    log_every: int = 20
    """Steps between two rows of metrics.parquet."""

    def __post_init__(self) -> None:
        check_choice("activation", self.activation, ACTIVATIONS)
        if self.epochs is not None and self.tokens == "auto":
            object.__setattr__(self, "tokens", None)  # a budget in passes is one that is given
        by_budget = _WITH_AUTO if self.tokens == "auto" else _WITH_BUDGET
        by_sparsity = {} if self.target_l0 is None else steered_defaults(self.activation, self.target_l0)
        for name, value in (BY_ACTIVATION[self.activation] | by_sparsity | by_budget).items():
            if getattr(self, name) in ("auto", None):
                object.__setattr__(self, name, value)  # frozen; nothing is left to choose, but where `is_open`
        for name, choices in (
            ("token_set", TOKEN_SETS),
            ("loss", LOSSES),
            ("init", INITS),
            ("background", BACKGROUNDS),
            ("frozen", FROZEN),
            ("token_scale", TOKEN_SCALES),
            ("dead_latents", DEAD_LATENTS),
            ("ghost_scale", GHOST_SCALES),
            ("schedule", SCHEDULES),
            ("b_dec_init", B_DEC_INITS),
            ("order", ORDERS),
            ("holdout_by", HOLDOUT_BY),
            ("precision", PRECISIONS),
        ):
            if not getattr(self, name) == by_sparsity.get(name) == "auto":  # else it is open
                check_choice(name, getattr(self, name), choices)
        for name in ("expansion", "batch_tokens", "pool_chunks", "dead_after_steps", "log_every", "resample_every"):
            if getattr(self, name) != "auto" or name != "expansion":
                _check_number(name, getattr(self, name), least=1)
        for name in ("warmup_steps", "l1_warmup_steps", "l1", "seed", "holdout", "auxk_weight"):
            _check_number(name, getattr(self, name), least=0)
        if self.clip_norm is not None:  # None: only where `is_open`
            _check_number("clip_norm", self.clip_norm, least=0)
        for name in ("k", "auxk", "decay_steps"):
            if getattr(self, name) is not None:
                _check_number(name, getattr(self, name), least=1)
        if self.order_seed is not None:
            _check_number("order_seed", self.order_seed, least=0)
        for name in ("lr", "tokens", "epochs", "jump_threshold", "jump_bandwidth", "target_l0"):
            value = getattr(self, name)
            if name in ("tokens", "target_l0") and value == "auto":
                continue
            if isinstance(value, str) or (value is not None and not (math.isfinite(value) and value > 0)):
                raise BadInput(f"{name} must be above 0; found {value!r}")
        if not self.holdout < 1:
            raise BadInput(f"holdout is a fraction below 1; found {self.holdout!r}")
        if self.mix is not None and not all(math.isfinite(share) and share > 0 for share in self.mix):
            raise BadInput(f"every share in mix must be above 0; found {list(self.mix)}")
        if (self.k is not None or (self.takes_k and self.target_l0 is not None)) != self.takes_k:
            raise BadInput(
                f"activation {self.activation!r} takes no k; leave it out, or choose topk or batchtopk"
                if self.k is not None
                else f"activation {self.activation!r} needs k, the number of active latents per token (--k 64)"
            )
        if self.k is not None and self.target_l0 is not None:
            raise BadInput("give the number of active latents once: either k or target_l0")
        if self.nested is not None:
            self._check_nested(self.nested)
        if self.tokens == "auto" and not self.holdout:
            raise BadInput(
                "tokens 'auto' ends when held-out images have settled, and holdout 0 leaves none: set holdout "
                "(--holdout 0.1), or the budget (--tokens, --epochs)"
            )
        if self.tokens is not None and self.epochs is not None:
            raise BadInput("give the budget once: either tokens or epochs")
        if self.b_dec_init == "geometric-median-per-position" and self.order != "images":
            raise BadInput(
                "b_dec_init 'geometric-median-per-position' needs whole images: order 'images', preset cytosae"
            )
        if self.order == "images" and (self.token_set != "all" or self.mix is not None):
            raise BadInput("order 'images' trains on whole images, in one order: it needs token_set 'all', and no mix")
        if self.frozen != "none" and self.dead_latents == "resample":
            raise BadInput(
                "dead_latents 'resample' gives both matrices new weights, and one is frozen; choose ghost, auxk or none"
            )
        if self.background != "keep" and (self.order == "images" or self.token_set == "cls"):
            raise BadInput(
                "background is left out of patch tokens: it needs order 'tokens', and token_set all or patch"
            )

    def _check_nested(self, nested: tuple[float, ...]) -> None:
        if self.activation not in ("relu", "topk", "batchtopk"):
            raise BadInput(
                f"nested dictionaries are for relu, topk and batchtopk; found activation {self.activation!r}"
            )
        bounds = (0.0, *nested, 1.0)
        if not nested or not all(low < high for low, high in itertools.pairwise(bounds)):
            raise BadInput(f"nested must be ascending shares of the latents above 0 and below 1; found {list(nested)}")

    def to_spec(self) -> dict[str, Any]:
        """All settings, as `sae.json` keeps them.

        Settings of later versions are left out where they change nothing, so that runs of before keep their identity.
        """
        return {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if name not in RELEASED or value != RELEASED[name]
        }

    @classmethod
    def from_spec(cls, values: dict[str, Any]) -> "TrainConfig":
        """The settings that `to_spec` wrote, also one of an earlier version; lists of JSON become tuples."""
        given: dict[str, Any] = RELEASED | values
        given |= {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
        return cls(**given)

    def n_steps(self, tokens_per_epoch: int) -> int:
        """Number of steps, at least one: the budget rounded to whole batches; with tokens `auto` the largest number.

        tokens_per_epoch : tokens of one pass over the data, for a budget in epochs
        """
        budget = self.tokens if isinstance(self.tokens, int) else MOST_TOKENS
        if self.epochs is not None:
            budget = round(self.epochs * tokens_per_epoch)
        return max(1, round(budget / self.batch_tokens))

    def lr_at(self, step: int, n_steps: int) -> float:
        """Learning rate of step `step`, from 0, of `n_steps`: the lower one of warm-up and schedule."""
        warmup = min(1.0, (step + 1) / max(1, self.warmup_steps))
        if self.schedule == "constant":
            return self.lr * warmup
        left = min(1.0, (n_steps - step) / self._decay(n_steps))  # 1 before the decay, 1 / decay_steps at the last step
        down = left if self.schedule == "linear" else (1 - math.cos(math.pi * left)) / 2
        return self.lr * min(warmup, down)

    def end_after(self, step: int, n_steps: int) -> int:
        """The number of steps of a run that has settled after `step` steps, of at most `n_steps`: with its decay.

        A constant learning rate has no decay: one step follows, the last one.
        """
        if self.schedule == "constant":
            return min(n_steps, step + 1)
        return min(n_steps, step + (self.decay_steps or max(1, math.ceil(step / 4))))  # a fifth of the whole

    @property
    def takes_k(self) -> bool:
        """True for topk and batchtopk, whose L0 is set by `k` and not by a sparsity term."""
        return self.activation in ("topk", "batchtopk")

    @property
    def is_steered(self) -> bool:
        """True if the weight of the sparsity term is steered to `target_l0`."""
        return self.target_l0 is not None and not self.takes_k

    @property
    def is_open(self) -> bool:
        """True while loss, init, clip_norm and dead_latents may wait for the L0 that follows from the data."""
        return self.activation == "relu" and self.target_l0 == "auto"

    @property
    def warning(self) -> str | None:
        """A line on settings that are probably a mistake, or None."""
        if self.loss != "eq1" or self.activation != "relu" or self.l1 >= 1e-3 or self.target_l0 is not None:
            return None
        return (
            f"in Eq. 1 as printed, an L1 weight of {self.l1:g} is about (width x token norm) times weaker than in the "
            f"released loss; scale --l1 up"
        )

    def resolved(self, width: int, n_steps: int) -> dict[str, int]:
        """The values of settings that are None by default, for tokens of this width and a run of `n_steps` steps."""
        return {
            "tokens": n_steps * self.batch_tokens,
            "order_seed": self.seed if self.order_seed is None else self.order_seed,
            "auxk": self.auxk or max(1, width // 2),
            "decay_steps": 0 if self.schedule == "constant" else self._decay(n_steps),
        }

    def _decay(self, n_steps: int) -> int:
        is_whole_run = self.schedule == "cosine" and self.tokens != "auto"
        default = n_steps - self.warmup_steps if is_whole_run else n_steps // 5
        return min(n_steps, max(1, default if self.decay_steps is None else self.decay_steps))

    def l1_at(self, step: int, weight: float | None = None) -> float:
        """Weight of the sparsity term in step `step`, from 0; of `l1`, or of a `weight` that is steered."""
        return (self.l1 if weight is None else weight) * min(1.0, (step + 1) / max(1, self.l1_warmup_steps))


_SIZES: dict[str, Any] = {"expansion": 64, "l1": 8e-5, "lr": 4e-4, "warmup_steps": 500, "batch_tokens": 16_448}
PRESETS: dict[str, dict[str, Any]] = {
    # the released run: with equal weights and batches each step equals the released one
    "cytosae": {
        "order": "images",
        "ghost_scale": "elementwise",
        "b_dec_init": "geometric-median-per-position",
        "tokens": MOST_TOKENS,
        "loss": "normed",
        "dead_latents": "ghost",
        **_SIZES,
        **RELEASED,
    },
    # Eq. 1 as printed; its squared error is about 768 x ||x|| times the released one, so 8e-5 is that much weaker
    "paper": {"loss": "eq1", "dead_latents": "ghost", **_SIZES, **RELEASED},
}


def make_config(
    *,
    preset: str | None = None,
    config_file: Path | str | None = None,
    options: dict[str, Any] | None = None,
    start: dict[str, Any] | None = None,
) -> TrainConfig:
    """Defaults, then the preset, then the TOML file, then single options; later ones win.

    Without a preset, what none of them sets fits the data: tokens, expansion and L0 are `auto`.

    start : settings of an SAE to go on from (`cytosae.training.init_settings`), which are used where neither file nor
        options say otherwise

    Raises
    ------
    BadInput
        For an unknown preset or key, or a value that cannot be used, or one that differs from that of `start`.
    """
    values: dict[str, Any] = dict(start or {})
    if preset is not None:
        check_choice("preset", preset, tuple(PRESETS))
        values = PRESETS[preset] | values  # the number of latents is that of the SAE to go on from
    for given in (_settings_of(Path(config_file)) if config_file else {}, options or {}):
        if {"l1", "target_l0"} <= given.keys():
            raise BadInput("give the sparsity once: either l1, a fixed weight, or target_l0, which it is steered to")
        values = overridden(values, given)
    values = values if preset else _left_to_the_data(values)
    require_same_shape(values, start or {})
    return TrainConfig(**values)


def _left_to_the_data(values: dict[str, Any]) -> dict[str, Any]:
    """`values`, and `auto` for budget, width and sparsity where they say nothing of these."""
    chosen: dict[str, Any] = {"expansion": "auto"}
    if "epochs" not in values:
        chosen["tokens"] = "auto"
    penalty = "k" if values.get("activation") in ("topk", "batchtopk") else "l1"
    if "target_l0" not in values and penalty not in values:
        chosen["target_l0"] = "auto"
    return chosen | values


def require_same_shape(values: dict[str, Any], start: dict[str, Any]) -> None:
    """Raise BadInput if settings ask for another SAE than the one to go on from; k may differ."""
    for name in ("activation", "expansion"):
        if name in start and values[name] != start[name]:
            raise BadInput(
                f"the SAE to go on from has {name} {start[name]}; found {name} {values[name]}. Leave it out, or train "
                f"from the start, without --init-from"
            )


def _settings_of(path: Path) -> dict[str, Any]:
    """Settings from a TOML file; of a recipe of `cyto run` those of its section `sae`."""
    values = read_toml(path)
    if values.get("format") == "cyto recipe":
        section = values.get("sae")
        values = dict(section) if isinstance(section, dict) else {}
        values.pop("assume_compatible", None)
    return checked_settings(values, str(path))


def overridden(values: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """`values` updated by `given`; what in `given` replaces another setting also removes that one.

    A budget in tokens or epochs replaces the other kind; `l1` or `k` a `target_l0`, and `target_l0` a `k`.
    """
    replaces = {"epochs": "tokens", "tokens": "epochs", "l1": "target_l0", "k": "target_l0", "target_l0": "k"}
    replaced = {replaces[name] for name in given if name in replaces}
    return {name: value for name, value in values.items() if name not in replaced} | given


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file of at most 1 MiB.

    Raises
    ------
    BadInput
        If the file cannot be read, is larger, or is not TOML.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise BadInput(f"{path} is larger than {_MOST_BYTES >> 20} MiB; expected a TOML file with settings")
        return tomllib.loads(decode_text(content))
    except (OSError, ValueError) as error:  # also of a number with thousands of digits
        raise BadInput(f"{path} cannot be read as TOML: {error}") from None
    except RecursionError:
        raise BadInput(f"{path} cannot be read as TOML: it is nested too deeply") from None


def checked_settings(values: dict[str, Any], source: str) -> dict[str, Any]:
    """Settings from a TOML table, in the types of `TrainConfig`.

    Raises
    ------
    BadInput
        For an unknown name, or a value of another type; the message begins with `source`.
    """
    types = {field.name: field.type for field in dataclasses.fields(TrainConfig)}
    unknown = [name for name in values if name not in types]
    if unknown:
        raise BadInput(f"{source} sets {listed(unknown)}, which is no setting; there are {', '.join(types)}")
    return {name: _checked(name, value, types[name], source) for name, value in values.items()}


def _checked(name: str, value: Any, kind: Any, source: str) -> Any:
    # of "int | None": int
    kinds = [part for part in get_args(kind) if part is not NoneType] if get_origin(kind) in _UNIONS else [kind]
    takes_auto = Auto in kinds
    if takes_auto and value == "auto":
        return value
    expected = kinds[0].__name__ if get_origin(kinds[0]) is None else str(kinds[0])
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63
    is_number |= isinstance(value, float)  # infinity is refused later, with better words
    if expected == "float" and is_number:
        return float(value)  # 2 and 2.0 are one setting, and one identity
    if expected == "int" and is_number and isinstance(value, int):
        return value
    if expected == "str" and isinstance(value, str):
        return value
    if expected.startswith("tuple") and isinstance(value, list):
        return tuple(_checked(name, item, float, source) for item in value)
    expected = "a list of numbers" if expected.startswith("tuple") else expected
    also = '. It may also be "auto"' if takes_auto else ""
    raise BadInput(f"{source}: {name} must be {expected}; found {value!r}{also}")


def _check_number(name: str, value: float, *, least: float) -> None:
    if isinstance(value, str) or not (math.isfinite(value) and value >= least):
        raise BadInput(f"{name} must be at least {least}; found {value!r}")


def activation_text(spec: dict[str, Any]) -> str:
    """`topk, k 32`, of an SAE's settings."""
    return f"{spec['activation']}, k {spec['k']}" if spec.get("k") else str(spec["activation"])
