"""The one place where settings are chosen from the data: from the table of images and a first look at tokens."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cytosae.atlas import AtlasConfig
from cytosae.barcodes import BarcodeConfig
from cytosae.compare import CompareConfig
from cytosae.concepts import ConceptConfig, SelectionConfig
from cytosae.probe import ProbeConfig, UnitConfig
from cytosae.sae import TrainConfig, overridden
from cytosae.stage_one import FirstLook
from stores.errors import BadInput
from stores.spec import SAE, find_header
from stores.tables import listed

from .cohort import CohortFacts, possible_comparisons, possible_probes
from .config import RunConfig
from .recipe import Recipe, Section, checked_recipe, checked_section

_MORE_TOKENS = 2  # tokens a latent, times those of `cyto sae train`: sooner done, and fewer latents are dead
_LEAST_HELD_OUT = 20  # images, of which a tenth can be held out
_SETTABLE = ("extract", "sae", "encode", "barcode", "concepts", "select", "atlas", "stability", "compare", "probe")
_FEW = {"c_factors": (1e-4, 1e-2, 1.0), "thresholds": (0.0, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)}
# of a section that may be there several times: what it is about, so that no two have it in common
_IDENTITY = {"compare": ("name", "a", "b"), "probe": ("name", "level", "target")}
_PROBE = {  # fewer draws than `cyto probe` on its own has, for a first answer in a minute
    "patient": {"repeats": 5, "permutations": 39, **_FEW},
    "image": {
        **{"repeats": 1, "permutations": 19, "max_images": 300},
        **_FEW,
        "thresholds": (0.0, 1e-2),
    },
}


def check_asked(config: RunConfig) -> None:
    """That each setting that was asked for exists, and has a value of its type: before anything is read or measured.

    Raises
    ------
    BadInput
        Otherwise.
    """
    for name, values in config.settings.items():
        if name not in _SETTABLE:
            raise BadInput(f"--set {name}.{next(iter(values), '')}: no such section; there are {', '.join(_SETTABLE)}")
        of_all = {key: value for key, value in values.items() if not isinstance(value, Mapping)}
        for each in (of_all, *(value for value in values.values() if isinstance(value, Mapping))):
            checked_section(name, each, "--set")


def resolve(config: RunConfig, source: Path, out: Path, facts: CohortFacts, look: FirstLook) -> Recipe:
    """The recipe for these images: every setting, and why it has this value.

    Raises
    ------
    BadInput
        If a setting that was asked for does not exist or cannot be used.
    """
    why: dict[str, str] = {}
    root = {"root": _relative(Path(config.root), out)} if config.root else {}
    sections: dict[str, Section] = {
        "images": {"source": _relative(source, out), **root},
        "extract": _extract_settings(config, look, why),
        "sae": _given_sae(Path(config.sae), out, why) if config.sae else _sae_settings(config, facts, look, why),
        "encode": {"value_bits": 10, "min_activation": 0.0, "precision": "fp32"},
        "barcode": _barcode_settings(why),
        "concepts": _defaults(ConceptConfig(seed=config.seed), without=("partition_images",)),
        "select": _selection_settings(config, facts, why),
        "atlas": _defaults(AtlasConfig(seed=config.seed), without=("tau",)),
    }
    if config.stability and not config.sae:
        sections["stability"] = {"seed": config.seed + 1}
        why["stability.seed"] = "a second SAE from another seed: latents that both find are no accident of the seed"
    given = {name: dict(values) for name, values in config.settings.items()}
    of_lists = {name: given.pop(name) for name in _IDENTITY if name in given}
    for name, values in given.items():
        if name not in sections:
            raise BadInput(f"--set {name}.{next(iter(values), '')}: no second SAE is trained; add --stability")
        checked = checked_section(name, values, "--set")
        before = sections[name]
        if name == "sae" and {"tokens", "epochs"} & checked.keys():  # the reasons were those of another budget
            for key in ("tokens", "epochs", "holdout"):
                why.pop(f"sae.{key}", None)
        if name == "extract":
            checked |= {key: _weights(checked[key]) for key in ("backbone", "weights") if key in checked}
        sections[name] = _with_training(before, checked) if name == "sae" else {**before, **checked}
        why |= {f"{name}.{key}": "asked for" for key in checked}
        for key in before.keys() - sections[name].keys():
            why.pop(f"{name}.{key}", None)
    compare, left_out = possible_comparisons(facts)
    probe, not_probed = possible_probes(facts)
    lists = {
        "compare": [{**_comparison(each, config.seed)} for each in compare],
        "probe": [{**_probe(each, config.seed)} for each in probe],
    }
    for name, values in of_lists.items():
        lists[name] = [*_with_given(name, lists[name], values)]
    if config.sae and config.stability:
        left_out["stability"] = "the SAE was given, not trained: there is no second seed"
    return checked_recipe(
        **sections,
        compare=tuple(lists["compare"]),
        probe=tuple(lists["probe"]),
        why=why,
        left_out={**left_out, **not_probed},
    )


def _with_given(section: str, found: list[Section], values: Mapping[str, Any]) -> Iterator[Section]:
    """The comparisons or probes with the settings of `--set`: `{setting: value}` for all, `{name: {...}}` for one."""
    of_all = {key: value for key, value in values.items() if not isinstance(value, Mapping)}
    of_one = {key: value for key, value in values.items() if isinstance(value, Mapping)}
    names = [str(each["name"]) for each in found]
    for key in (*of_all, *(key for each in of_one.values() for key in each)):
        if key in _IDENTITY[section]:
            raise BadInput(
                f"--set {section}.{key}: each [[{section}]] needs a {key} of its own, and --set gives none; change "
                f"it in recipe.toml, or add a [[{section}]] there"
            )
    for name in of_one:
        if name not in names:
            raise BadInput(
                f"--set {section}.{name}: no [[{section}]] has this name; there are {listed(names) or 'none'}"
            )
    for each in found:
        given = {**of_all, **of_one.get(str(each["name"]), {})}
        yield {**each, **checked_section(section, given, "--set")}


def _extract_settings(config: RunConfig, look: FirstLook, why: dict[str, str]) -> Section:
    why["extract.precision"] = "bf16 on a GPU, fp32 on the CPU"
    why["extract.backbone"] = "asked for" if look.trained else "UNTRAINED: it shows the machinery, not medicine"
    return {
        "backbone": _weights(config.backbone),
        **({"weights": _weights(config.weights)} if config.weights else {}),
        "block": config.block,
        "crop": "own",
        "precision": look.precision,
        "chunk_images": 256,
        "allow_truncated": False,
    }


def _weights(weights: str) -> str:
    """A file or folder with its whole path, since a recipe is read from another folder; other words as they are."""
    return _written(os.path.abspath(weights)) if Path(weights).exists() else weights  # noqa: PTH100  # links stay


def _given_sae(sae: Path, out: Path, why: dict[str, str]) -> Section:
    """An SAE that is there, or a file of another program."""
    if not sae.exists():
        raise BadInput(f"no SAE at {sae}: expected a folder of cyto sae train or import, or a file of another program")
    header = find_header(sae) if sae.is_dir() else None
    is_ours = header is not None and header.kind == SAE.kind
    is_foreign = not is_ours or "imported" in (header.spec if header else {})
    why["sae.use"] = "given, so none is trained"
    if is_foreign:
        why["sae.assume_compatible"] = "an imported SAE does not say which tokens it was trained on; you vouch for them"
    return {"use": _relative(sae, out), "assume_compatible": is_foreign}


def _sae_settings(config: RunConfig, facts: CohortFacts, look: FirstLook, why: dict[str, str]) -> Section:
    """Width, sparsity and budget of a new SAE, by the rules of `cyto sae train`."""
    from cytosae.training import auto_expansion, auto_l0  # torch

    n_tokens, width = facts.n_images * look.tokens_per_image, look.width
    expansion = auto_expansion(n_tokens // _MORE_TOKENS, width)
    n_latents = expansion * width
    k = min(auto_l0(width), max(1, n_latents // 8))
    why |= {
        "sae.expansion": f"{n_latents:,} latents for {n_tokens:,} tokens of width {width}: "
        f"{n_tokens / n_latents:,.0f} tokens a latent",
        "sae.activation": "a set number of active latents per token: nothing to tune",
        "sae.k": f"active latents per token, from the root of the tokens' width, {width}",
    }
    if facts.n_images >= _LEAST_HELD_OUT:
        why["sae.tokens"] = "until the error and L0 of held-out images have settled, 257 million at most"
        why["sae.holdout"] = "a share of the images is only measured on: by them it is seen when to end"
        budget: dict[str, Any] = {"tokens": "auto"}
    else:
        why["sae.epochs"] = f"{facts.n_images} images are too few to hold some out"
        budget = {"epochs": 50.0, "batch_tokens": 1024, "lr": 1e-3, "warmup_steps": 20}
    return _train_section(TrainConfig(expansion=expansion, activation="topk", k=k, seed=config.seed, **budget))


def _train_section(config: TrainConfig) -> Section:
    """All settings of training but those that another one makes idle."""
    has_no_weight = config.takes_k or config.target_l0 is not None
    return _defaults(config, without=("l1",) if has_no_weight else ())


def _with_training(section: Section, given: Section) -> Section:
    """Settings of training with others in their place; what another setting replaces goes, and defaults follow it."""
    own = [name for name in ("use", "assume_compatible") if name in given]
    if "use" in section and [*given] == ["assume_compatible"]:
        return {**section, **given}
    if "use" not in section and own:
        raise BadInput(f"--set sae.{own[0]} is about an SAE that is there; give that SAE with --sae")
    if "use" in section:
        raise BadInput("an SAE is given, and --set sae.* would train one; leave one of them out")
    is_other = bool({"activation", "target_l0"} & given.keys())
    follows = ("loss", "init", "clip_norm", "dead_latents") if is_other else ()  # these two decide
    budget = (
        ("holdout", "batch_tokens", "lr", "warmup_steps", "schedule") if {"tokens", "epochs"} & given.keys() else ()
    )
    kept = {name: value for name, value in section.items() if name not in (*follows, *budget)}
    if given.get("activation", "topk") not in ("topk", "batchtopk") and "k" in kept and "k" not in given:
        kept["target_l0"] = float(kept.pop("k"))
    return _train_section(TrainConfig(**overridden(kept, given)))


def _barcode_settings(why: dict[str, str]) -> Section:
    why["barcode.tau"] = "a cut that follows from all stored activations, blind to labels; the barcodes say which"
    return _defaults(BarcodeConfig(tau="auto"), without=("partition_images", "block_images"))


def _selection_settings(config: RunConfig, facts: CohortFacts, why: dict[str, str]) -> Section:
    """The draw of latents, from the statistics of the largest dataset."""
    section = _defaults(SelectionConfig(seed=config.seed, threshold=0.0))
    why["select.threshold"] = "all latents that are active anywhere; 0.001 belongs to the released SAE"
    if len(facts.datasets) > 1:
        section["dataset"] = next(iter(facts.datasets))
        why["select.dataset"] = "the largest of the datasets"
    return section


def _comparison(section: Section, seed: int) -> Section:
    """All settings of one comparison."""
    config = CompareConfig(a=section["a"], b=section["b"], seed=seed)
    return {"name": section["name"], **_defaults(config, without=("tau",))}


def _probe(section: Section, seed: int) -> Section:
    """All settings of one probe, with few draws."""
    more = {**_PROBE[section["level"]], **section, "seed": seed}
    units = UnitConfig(**{name: more.pop(name) for name in [*more] if name in UnitConfig.__dataclass_fields__})
    name = more.pop("name")
    return {
        "name": name,
        **_defaults(units, without=("tau",)),
        **_defaults(ProbeConfig(units=units, **more, mil=None), without=("units",)),
    }


def _defaults(config: Any, *, without: tuple[str, ...] = ()) -> Section:
    """The settings of a config, without those that are None."""
    values: Mapping[str, Any] = vars(config)
    return {name: value for name, value in values.items() if value is not None and name not in without}


def _relative(path: Path, out: Path) -> str:
    """A path as the recipe in `out` names it: below `out`, or absolute."""
    whole, base = Path(os.path.abspath(path)), Path(os.path.abspath(out))  # noqa: PTH100  # links stay as they are
    return _written(whole.relative_to(base).as_posix() if whole.is_relative_to(base) else os.fspath(whole))


def _written(path: str) -> str:
    """The path, if a recipe can hold it."""
    try:
        path.encode()
    except UnicodeEncodeError:
        raise BadInput(f"the name of {path!r} is not UTF-8, which a recipe cannot hold; rename it") from None
    return path
