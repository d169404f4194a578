"""What a baseline takes from the SAE that it is to be like: data, held-out images, number of latents, L0."""

import dataclasses
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cytosae.sae import SaeRun, TrainConfig, load_sae, make_config
from cytosae.training import TrainingData, choose_settings, open_data
from stores.errors import BadInput, SpecMismatch
from stores.spec import Header, describe_difference

_OF_DATA = ("tokens", "caches", "tokens_per_epoch", "images", "background")  # fields of sae.json that must be equal
_MEASURED = 4096  # tokens on which the L0 of an imported SAE is measured


@dataclass(frozen=True, eq=False)
class Reference:
    """An SAE, or the settings of one, and its data."""

    config: TrainConfig  # with numbers for width and L0
    data: TrainingData
    n_latents: int
    l0: float  # mean number of active latents per token
    sae: SaeRun | None  # None: only its settings are known
    sae_place: Path | None = None

    @property
    def k(self) -> int:
        """L0 as a whole number, at least 1."""
        return max(1, round(self.l0))

    @property
    def is_imported(self) -> bool:
        """The SAE is another program's, and does not say how it was trained."""
        return self.sae is not None and "imported" in self.sae.header.spec

    @property
    def n_tokens(self) -> int | None:
        """Tokens that the SAE was trained on, over all passes; None: not known."""
        return None if self.sae is None else (self.sae.header.summary or {}).get("tokens")


def open_reference(
    caches: Sequence[Path | str],
    like: Path | None,
    settings: TrainConfig | None,
    *,
    exclude: Collection[str] = (),
    assume_compatible: bool = False,
) -> Reference:
    """The SAE in `like` with its data, which must be `caches`; or the one that `settings` would train on them.

    Raises
    ------
    SpecMismatch
        If the caches, or what is left out of them, are not those that the SAE was trained on.
    BadInput
        If an L0 cannot be known.
    """
    if like is None:
        config = settings or make_config()
        data = open_data(caches, config, exclude=exclude)
        config = choose_settings(config, data).config
        l0 = config.k or config.target_l0
        if not isinstance(l0, int | float):
            raise BadInput(
                "a baseline has the L0 of the SAE that it is compared with, which a fixed l1 does not tell; give that "
                "SAE (--like RUN), or settings with target_l0 or k"
            )
        assert config.expansion != "auto"
        return Reference(config, data, config.expansion * data.width, float(l0), None)
    sae = load_sae(like, device="cpu")
    spec = sae.header.spec
    if "imported" in spec:
        config = TrainConfig(
            expansion=max(1, spec["n_latents"] // spec["width"]), activation=sae.model.activation, k=sae.model.k
        )
        data = open_data(caches, config, exclude=exclude)
        sae.require_tokens(data.stores[0].spec, f"the cache {caches[0]}", assume_compatible=assume_compatible)
        return Reference(config, data, spec["n_latents"], _measured_l0(sae, data), sae, like)
    if (kind := kind_of(sae.header)) != "trained":
        raise BadInput(f"{like} is itself a baseline ({kind}); give the SAE that it is like")
    config = TrainConfig.from_spec(spec["config"])
    data = open_data(caches, config, exclude=exclude)
    _require_same_data(spec, data.to_spec(), like)
    return Reference(config, data, spec["n_latents"], _known_l0(sae.header) or _measured_l0(sae, data), sae, like)


def kind_of(header: Header) -> str:
    """What an SAE is: the kind of its baseline, `imported`, or `trained`."""
    spec = header.spec
    if "baseline" in spec:
        return str(spec["baseline"]["kind"])
    frozen = spec.get("config", {}).get("frozen", "none")
    if frozen != "none":
        return f"frozen-{frozen}"
    return "imported" if "imported" in spec else "trained"


def frozen_settings(reference: Reference, frozen: str, seed: int | None) -> TrainConfig:
    """The settings of the reference with one matrix frozen: the same tokens in the same order, L0 and budget.

    Raises BadInput for an imported SAE, whose settings are not known.
    """
    if reference.is_imported:
        raise BadInput(
            f"{reference.sae_place} is imported and does not say how it was trained, so no SAE can be trained like it "
            f"with a frozen {frozen}; give settings (--config), or choose another --kind"
        )
    config = reference.config
    changes: dict[str, Any] = {
        "frozen": frozen,
        "seed": config.seed if seed is None else seed,
        "order_seed": config.seed if config.order_seed is None else config.order_seed,
    }
    if not config.takes_k:
        changes |= {"target_l0": reference.l0}
    if config.dead_latents == "resample":
        changes |= {"dead_latents": "ghost"}
    if reference.n_tokens is not None:
        changes |= {"tokens": reference.n_tokens, "epochs": None}
    return dataclasses.replace(config, **changes)


def _require_same_data(wanted: dict[str, Any], found: dict[str, Any], like: Path) -> None:
    ours, theirs = ({name: spec.get(name) for name in _OF_DATA} for spec in (found, wanted))
    if ours != theirs:
        raise SpecMismatch(
            f"{like} was trained on other data ({describe_difference(theirs, ours)}); give the caches that it was "
            f"trained on, in the same order, and the same --exclude"
        )


def _known_l0(header: Header) -> float | None:
    """L0 on held-out images, or of the last batch."""
    summary = header.summary or {}
    for measured in (summary.get("held_out"), summary.get("final")):
        if measured and measured.get("l0"):
            return float(measured["l0"])
    return None


@torch.inference_mode()
def _measured_l0(sae: SaeRun, data: TrainingData) -> float:
    tokens = next(data.stream.batches(min(_MEASURED, data.stream.tokens_per_epoch)))
    parts = torch.from_numpy(tokens).float().split(max(1, (128 << 20) // (4 * sae.model.n_latents)))
    l0 = sum(int((sae.model.encode(part) > 0).sum()) for part in parts) / len(tokens)
    if not math.isfinite(l0) or l0 == 0:
        raise BadInput(f"no latent of {sae.root} is active on these tokens: it has no L0 to be like")
    return l0
