"""The recipe of a run: every setting of every stage, as a TOML file that a person can read and change.

A section holds the settings of one command. `why` and `left_out` are words for the reader, and decide nothing.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints

from cytosae.atlas import AtlasConfig
from cytosae.barcodes import BarcodeConfig
from cytosae.compare import CompareConfig
from cytosae.concepts import ConceptConfig, SelectionConfig
from cytosae.latents import check_encoding
from cytosae.probe import ProbeConfig, UnitConfig
from cytosae.sae import TrainConfig, checked_settings, read_toml
from stores.errors import BadInput, SpecMismatch
from stores.files import write_atomic
from stores.header_kinds import fits_hint
from stores.spec import cyto_version
from stores.tables import listed

FILE = "recipe.toml"
_VERSION = 1
_IDLE = ("partition_images", "block_images", "tau")  # decide no number, or are the barcodes' own
_PROBE_IDLE = ("units", "mil")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")
_HEAD = """\
# What `cyto run` did in this folder, and does again: cyto run {here}
# A changed line redoes what depends on it, and nothing else. The names are those of the commands' own settings.
"""
Section = dict[str, Any]
Types = dict[str, Any]


def _types_of(cls: Any, *, without: Sequence[str] = ()) -> Types:
    """Name -> type of the fields of a dataclass."""
    hints = get_type_hints(cls)
    return {each.name: hints[each.name] for each in dataclasses.fields(cls) if each.name not in without}


def _known_types() -> dict[str, Types]:
    """Section -> its settings and their types; those of `sae` are checked by `checked_settings`."""
    barcode = _types_of(BarcodeConfig, without=("partition_images", "block_images"))
    probe = _types_of(UnitConfig, without=_IDLE) | _types_of(ProbeConfig, without=_PROBE_IDLE)
    return {
        "images": {"source": str, "root": str},
        "extract": {
            **{"backbone": str, "weights": str, "block": int, "image_size": int, "crop": str, "precision": str},
            **{"chunk_images": int, "allow_truncated": bool},
        },
        "encode": {"value_bits": int, "min_activation": float, "precision": str},
        "barcode": barcode,
        "concepts": _types_of(ConceptConfig, without=_IDLE),
        "select": _types_of(SelectionConfig),
        "compare": {"name": str, **_types_of(CompareConfig, without=_IDLE)},
        "probe": {"name": str, **probe},
        "stability": {"seed": int},
        "atlas": _types_of(AtlasConfig, without=_IDLE),
        "why": {},
        "left_out": {},
    }


_LISTS = ("compare", "probe")
_OPTIONAL = ("stability", "why", "left_out", *_LISTS)
_OF_SAE: Types = {"use": str, "assume_compatible": bool}  # beside the settings of training


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Every resolved setting of a run, by the sections of `recipe.toml`; a setting that is not there is None.

    `images.source` and other paths are as they are in the file: below its folder, or absolute.
    """

    images: Section
    extract: Section
    sae: Section  # `use` (an SAE that is there) and `assume_compatible`; or the settings of `TrainConfig`
    encode: Section
    barcode: Section
    concepts: Section
    select: Section
    atlas: Section
    compare: tuple[Section, ...] = ()
    probe: tuple[Section, ...] = ()
    stability: Section | None = None
    why: dict[str, str] = field(default_factory=dict, compare=False)  # setting -> the reason
    left_out: dict[str, str] = field(default_factory=dict, compare=False)  # analysis -> why it is not made

    @property
    def uses_sae(self) -> str | None:
        """The SAE that is given; None: one is trained."""
        return self.sae.get("use")

    @property
    def train_config(self) -> TrainConfig:
        """The settings of training."""
        return TrainConfig(**{name: value for name, value in self.sae.items() if name not in _OF_SAE})

    @property
    def barcode_config(self) -> BarcodeConfig:
        """The settings of the barcodes."""
        return BarcodeConfig(**self.barcode)

    @property
    def concept_config(self) -> ConceptConfig:
        """The settings of the statistics of latents."""
        return ConceptConfig(**self.concepts)

    @property
    def selection_config(self) -> SelectionConfig:
        """The settings of the draw of latents."""
        return SelectionConfig(**self.select)

    @property
    def atlas_config(self) -> AtlasConfig:
        """The settings of the atlas."""
        return AtlasConfig(**self.atlas)

    def sections(self) -> dict[str, Any]:
        """All sections that hold something, as plain values."""
        return {
            each.name: [*value] if isinstance(value, tuple) else value
            for each in dataclasses.fields(self)
            if (value := getattr(self, each.name)) or each.name not in _OPTIONAL
        }


def extract_settings(recipe: Recipe, folder: Path) -> Section:
    """The settings of the extraction; files that the recipe in `folder` names as below it, with their whole paths."""
    found = {name: value for name, value in recipe.extract.items() if value is not None}
    for name in ("backbone", "weights"):
        if name in found and (folder / found[name]).exists():
            found[name] = str((folder / found[name]).absolute())
    return found


def compare_config(section: Section) -> CompareConfig:
    """The settings of one comparison."""
    return CompareConfig(**{name: value for name, value in section.items() if name != "name"})


def probe_config(section: Section) -> ProbeConfig:
    """The settings of one probe, which has no attention-MIL head."""
    units = _types_of(UnitConfig)
    given = {name: value for name, value in section.items() if name != "name"}
    return ProbeConfig(
        units=UnitConfig(**{name: value for name, value in given.items() if name in units}),
        **{name: value for name, value in given.items() if name not in units},
        mil=None,
    )


def parse_recipe(raw: Mapping[str, Any], source: str) -> Recipe:
    """A recipe from the values of a TOML file; `source` names it in errors.

    Raises
    ------
    BadInput
        For an unknown section or setting, a value of another type or out of range, or a section that is missing.
    """
    known = {**_known_types(), "sae": _OF_SAE}
    sections = {name: value for name, value in raw.items() if name not in ("format", "version", "written_by")}
    unknown = [name for name in sections if name not in known]
    if unknown:
        raise BadInput(f"{source} has a section {listed(unknown)}, which no recipe has; there are {', '.join(known)}")
    missing = [name for name in known if name not in sections and name not in _OPTIONAL]
    if missing:
        raise BadInput(
            f"{source} is no recipe of cyto run: it lacks {listed(missing)}; cyto run IMAGES -o DIR writes one"
        )
    read: dict[str, Any] = {}
    for name, value in sections.items():
        if name in _LISTS:
            if not (isinstance(value, list) and all(isinstance(each, dict) for each in value)):
                raise BadInput(f"{source}: {name} must be written as [[{name}]], once for each")
            read[name] = tuple(checked_section(name, each, source) for each in value)
        else:
            if not isinstance(value, dict):
                raise BadInput(f"{source}: {name} must be a section, [{name}]; found {value!r}")
            read[name] = checked_section(name, value, source)
    return checked_recipe(source, **read)


def checked_recipe(source: str = "the recipe", /, **sections: Any) -> Recipe:
    """A recipe whose sections are taken by the settings of their commands; `source` names it in errors.

    Raises
    ------
    BadInput
        For a value out of range, or settings that exclude each other.
    """
    recipe = Recipe(**sections)
    _check_values(recipe, source)
    return recipe


def checked_section(name: str, values: Mapping[str, Any], source: str) -> Section:
    """The settings of one section in the types that they have in Python.

    Raises
    ------
    BadInput
        For an unknown name, or a value of another type.
    """
    if name in ("why", "left_out"):
        wrong = [key for key, value in values.items() if not isinstance(value, str)]
        if wrong:
            raise BadInput(f"{source}: {name}.{wrong[0]} must be a text; found {values[wrong[0]]!r}")
        return dict(values)
    if name == "sae":
        own = {key: _typed(f"sae.{key}", values[key], _OF_SAE[key], source) for key in _OF_SAE if key in values}
        rest = {key: value for key, value in values.items() if key not in _OF_SAE}
        if own.get("use") and rest:
            raise BadInput(
                f"{source}: sae.use names an SAE that is there, so sae.{next(iter(rest))} says nothing; drop one"
            )
        return {**checked_settings(rest, f"{source}, section sae"), **own}
    types = _known_types()[name]
    unknown = [key for key in values if key not in types]
    if unknown:
        raise BadInput(f"{source}: {name}.{listed(unknown)} is no setting; there are {', '.join(types)}")
    return {key: _typed(f"{name}.{key}", value, types[key], source) for key, value in values.items()}


def _typed(name: str, value: Any, hint: Any, source: str) -> Any:
    if not fits_hint(value, hint):
        words = getattr(hint, "__name__", str(hint)).replace(" | None", "").replace("tuple", "a list, [...]")
        raise BadInput(f"{source}: {name} must be {words}; found {value!r}")
    if isinstance(value, list):
        return tuple(float(each) if isinstance(each, int) and "float" in str(hint) else each for each in value)
    takes = {hint, *get_args(hint)}
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if is_whole and float in takes and int not in takes else value


def _check_names(section: str, found: Sequence[Section], source: str) -> None:
    """A name is a folder's: short, of plain letters, each once."""
    seen: set[str] = set()
    for each in found:
        name = each.get("name", "")
        if not _NAME.fullmatch(name) or name.casefold() in seen:
            raise BadInput(
                f"{source}: [[{section}]] needs a name of its own, of letters, digits, '.', '_' and '-'; found {name!r}"
            )
        seen.add(name.casefold())


def _check_second_seed(recipe: Recipe, source: str) -> None:
    """A second SAE needs a seed, and another one than the first: else it would be the first again."""
    if recipe.stability is None:
        return
    seed = recipe.stability.get("seed")
    if seed is None:
        raise BadInput(f"{source}: [stability] lacks the seed of the second SAE: seed = 1")
    if not recipe.uses_sae and seed == recipe.train_config.seed:
        raise BadInput(
            f"{source}: stability.seed must be another one than sae.seed, or both SAEs are the same; found {seed} twice"
        )


def _check_values(recipe: Recipe, source: str) -> None:
    """Every section is taken by the settings of its command."""
    for name, found in (("compare", recipe.compare), ("probe", recipe.probe)):
        _check_names(name, found, source)
    for name in ("source",):
        if not recipe.images.get(name):
            raise BadInput(f"{source}: images.{name} must say where the images lie")
    for each in recipe.compare:
        if missing := [name for name in ("a", "b") if name not in each]:
            raise BadInput(f'{source}: [[compare]] {each["name"]} lacks {listed(missing)}: a = "...", b = "..."')
    _check_second_seed(recipe, source)
    makers: list[tuple[str, Any]] = [
        *([] if recipe.uses_sae else [("sae", lambda: recipe.train_config)]),
        ("encode", lambda: check_encoding(**recipe.encode)),
        ("barcode", lambda: recipe.barcode_config),
        ("concepts", lambda: recipe.concept_config),
        ("select", lambda: recipe.selection_config),
        ("atlas", lambda: recipe.atlas_config),
        *(("compare", lambda each=each: compare_config(each)) for each in recipe.compare),
        *(("probe", lambda each=each: probe_config(each)) for each in recipe.probe),
    ]
    for name, make in makers:
        try:
            make()
        except BadInput as error:
            raise BadInput(f"{source}, section {name}: {error}") from None
        except TypeError as error:
            raise BadInput(f"{source}, section {name} lacks a setting: {error}") from None
    if recipe.encode.get("min_activation"):
        raise BadInput(
            f"{source}: encode.min_activation must be 0 in a run, since tau auto and the statistics of latents look at "
            f"all values; found {recipe.encode['min_activation']:g}. For a smaller store afterwards: cyto sae encode "
            f"--min-activation, into another one"
        )


def read_recipe(path: Path) -> Recipe:
    """The recipe in a file.

    Raises
    ------
    BadInput
        If it cannot be read, or a setting cannot be used; the message names it.
    SpecMismatch
        If a newer cyto wrote it.
    """
    if not path.exists():
        raise BadInput(f"no recipe at {path}: expected the recipe.toml of a run; cyto run IMAGES -o DIR writes one")
    raw = read_toml(path)
    if raw.get("format") != "cyto recipe":
        raise BadInput(
            f'{path} is no recipe of cyto run: expected format = "cyto recipe"; cyto run IMAGES -o DIR writes one'
        )
    version = raw.get("version")
    if not isinstance(version, int) or version > _VERSION:
        raise SpecMismatch(f"{path} is a recipe of version {version!r}, this cyto reads up to {_VERSION}; upgrade cyto")
    return parse_recipe(raw, str(path))


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Write the recipe, unless the file says the same."""
    content = recipe_text(recipe).encode()
    if not path.is_file() or path.read_bytes() != content:
        write_atomic(path, content)


def recipe_text(recipe: Recipe) -> str:
    """The recipe as TOML."""
    lines = [_HEAD.format(here=FILE), 'format = "cyto recipe"', f"version = {_VERSION}"]
    lines.append(f"written_by = {toml_value(f'cyto {cyto_version()}')}")
    for name, section in recipe.sections().items():
        for each in section if isinstance(section, list) else [section]:
            lines += ["", f"[[{name}]]" if isinstance(section, list) else f"[{name}]"]
            lines += [f"{_key(key)} = {toml_value(value)}" for key, value in each.items() if value is not None]
    return "\n".join(lines) + "\n"


def toml_value(value: Any) -> str:
    """A value in TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        text = repr(value)
        return text if any(letter in text for letter in ".einf") else f"{text}.0"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return f"[{', '.join(map(toml_value, value))}]"


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else toml_value(name)


def differences(old: Recipe, new: Recipe) -> list[str]:
    """What two recipes set differently, in words: `sae.expansion 8 against 4`."""
    found = []
    before, after = old.sections(), new.sections()
    for name in dict.fromkeys([*before, *after]):
        if name in ("why", "left_out") or before.get(name) == after.get(name):
            continue
        a, b = before.get(name), after.get(name)
        if not (isinstance(a, dict) and isinstance(b, dict)):
            n = [len(each or ()) if not isinstance(each, dict) else 1 for each in (a, b)]
            found.append(f"{n[0]} [[{name}]] against {n[1]}" if n[0] != n[1] else f"other [[{name}]]")
            continue
        keys = [key for key in dict.fromkeys([*a, *b]) if a.get(key) != b.get(key)]
        found += [f"{name}.{key} {a.get(key)} against {b.get(key)}" for key in keys]
    return found


def plain_values(section: Mapping[str, Any]) -> dict[str, Any]:
    """A section as JSON has it, for hashes."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in section.items()}
