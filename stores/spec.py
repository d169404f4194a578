"""The header of every artefact: kind, version, identity, settings, whether it is complete.

The header is one JSON object. A Zarr store keeps it as the attribute `cyto` of its root group (file `zarr.json`), a
folder artefact as a separate file (`sae.json`, `barcodes.json`). The identity is the SHA-256 of the spec, so that a
store can be continued only with the settings that it was started with.
"""

from collections.abc import Collection
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from .errors import BadInput, DamagedStore, IncompleteStore, SpecMismatch, StoreNotFound
from .files import read_json, readable_json, sha256_json, write_json, write_new
from .header_kinds import SPEC_KINDS, SUMMARY_KINDS, check_kinds, fits_hint
from .seal import Seal
from .version import VERSION

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class Format:
    """One kind of artefact: its name, the version this program writes, its header file, the command that makes it."""

    kind: str
    a_kind: str  # with article, for sentences
    version: int
    header_file: str
    command: str


ACTIVATIONS = Format(
    kind="activation cache",
    a_kind="an activation cache",
    version=1,
    header_file="zarr.json",
    command="cyto cache extract",
)
LATENTS = Format(
    kind="latent store", a_kind="a latent store", version=1, header_file="zarr.json", command="cyto sae encode"
)
SAE = Format(kind="SAE", a_kind="an SAE", version=1, header_file="sae.json", command="cyto sae train")
BARCODES = Format(kind="barcodes", a_kind="barcodes", version=1, header_file="barcodes.json", command="cyto barcode")
CONCEPTS = Format(
    kind="concepts", a_kind="concepts", version=1, header_file="concepts.json", command="cyto concept stats"
)
THRESHOLDS = Format(
    kind="thresholds", a_kind="thresholds", version=1, header_file="thresholds.json", command="cyto concept thresholds"
)
COMPARISON = Format(
    kind="comparison", a_kind="a comparison", version=1, header_file="comparison.json", command="cyto compare"
)
PROBE = Format(kind="probe", a_kind="a probe", version=1, header_file="probe.json", command="cyto probe")
PROBE_TEST = Format(
    kind="probe test",
    a_kind="a saved probe's test",
    version=1,
    header_file="probe_test.json",
    command="cyto probe --model",
)
STABILITY = Format(
    kind="stability",
    a_kind="a comparison of SAEs",
    version=1,
    header_file="stability.json",
    command="cyto concept stability",
)
NEIGHBOURS = Format(
    kind="neighbours", a_kind="neighbours", version=1, header_file="neighbours.json", command="cyto concept neighbours"
)
PATIENT_CONCEPTS = Format(
    kind="patient concepts",
    a_kind="patient concepts",
    version=1,
    header_file="patient_concepts.json",
    command="cyto concept patient",
)
SEARCH = Format(kind="search", a_kind="a search", version=1, header_file="search.json", command="cyto concept search")
REPLICATION = Format(
    kind="replication",
    a_kind="a replication",
    version=1,
    header_file="replication.json",
    command="cyto compare replicate",
)
MATCH = Format(
    kind="latent match",
    a_kind="a match of latents",
    version=1,
    header_file="match.json",
    command="cyto concept match",
)
SCORECARD = Format(
    kind="scorecard", a_kind="a scorecard", version=1, header_file="score.json", command="cyto sae score"
)
MAPS = Format(kind="patch maps", a_kind="patch maps", version=1, header_file="maps.json", command="cyto concept map")
SHEETS = Format(
    kind="reference sheets",
    a_kind="reference sheets",
    version=1,
    header_file="sheets.json",
    command="cyto concept sheet",
)
MASKS = Format(
    kind="mask agreement",
    a_kind="a mask agreement",
    version=1,
    header_file="masks.json",
    command="cyto concept masks",
)
VERSUS = Format(
    kind="comparison with baselines",
    a_kind="a comparison with baselines",
    version=1,
    header_file="versus.json",
    command="cyto sae versus",
)
ABLATION = Format(
    kind="ablation", a_kind="an ablation", version=1, header_file="ablation.json", command="cyto concept ablate"
)
NAMES = Format(
    kind="latent names", a_kind="names of latents", version=1, header_file="names.json", command="cyto concept describe"
)
ATLAS = Format(kind="atlas", a_kind="an atlas", version=1, header_file="atlas.json", command="cyto atlas build")
FORMATS = {
    format.kind: format
    for format in (
        *(ACTIVATIONS, LATENTS, SAE, BARCODES),
        *(CONCEPTS, THRESHOLDS, MAPS, SHEETS, MASKS),  # these and below: folders of results, stores/result_folder.py
        *(COMPARISON, PROBE, PROBE_TEST, STABILITY, NEIGHBOURS, PATIENT_CONCEPTS, VERSUS, ABLATION, ATLAS),
        *(SEARCH, REPLICATION, MATCH, SCORECARD, NAMES),
    )
}


@dataclass(frozen=True, kw_only=True)
class Header:
    """The header of one artefact, as read from disk or about to be written."""

    kind: str
    version: int
    spec: dict[str, Any]
    complete: bool = False
    summary: dict[str, Any] | None = None  # known at the end: counts, hashes of files
    created_by: str = ""
    seal: Seal | None = field(default=None, compare=False, repr=False)  # of the file it was read from

    @property
    def identity(self) -> str:
        """SHA-256 (hex) of kind, version and spec; two stores with equal identity hold the same numbers."""
        return sha256_json({"format": self.kind, "format_version": self.version, "spec": self.spec})

    def to_json(self) -> dict[str, Any]:
        """The header as written to disk."""
        return {
            "format": self.kind,
            "format_version": self.version,
            "identity": self.identity,
            "complete": self.complete,
            "created_by": self.created_by,
            "spec": self.spec,
            "summary": self.summary,
        }


def new_header(format: Format, spec: dict[str, Any]) -> Header:
    """The header of a new artefact."""
    return Header(kind=format.kind, version=format.version, spec=spec, created_by=f"cyto {cyto_version()}")


def cyto_version() -> str:
    """The version of this program."""
    return VERSION


def find_header(root: Path | str) -> Header | None:
    """The header of the artefact at `root`, of any kind; None if there is none.

    Raises
    ------
    DamagedStore
        If the identity in the header is not that of its spec.
    """
    root = Path(root)
    for name in dict.fromkeys(format.header_file for format in FORMATS.values()):
        raw = read_object(root / name)
        if name == "zarr.json":
            attributes = raw.get("attributes")
            raw = attributes.get("cyto", {}) if isinstance(attributes, dict) else {}
        if isinstance(raw, dict) and isinstance(raw.get("format"), str) and raw["format"] in FORMATS:
            return _parse_header(raw, root)
    return None


def read_header(root: Path, format: Format, *, complete: bool = True) -> Header:
    """The header of the artefact of this kind at `root`.

    Raises
    ------
    StoreNotFound
        If nothing is there, or something of another kind.
    SpecMismatch
        If it was written by a newer program.
    IncompleteStore
        If `complete` and the job has not finished.
    """
    if not root.exists():
        raise StoreNotFound(f"no {format.kind} at {root}: nothing is there. Make one with {format.command}")
    seal = Seal.of(root / format.header_file)  # before the header is read, so that a later change is noticed
    header = find_header(root)
    if header is None and (reason := _why_unreadable(root / format.header_file)):
        raise DamagedStore(f"{root / format.header_file} cannot be read: {reason}. Make it again with {format.command}")
    if header is None:
        inside = [path.name for path in sorted(root.glob("*.zarr")) if root.is_dir() and find_header(path) is not None]
        if inside:
            raise StoreNotFound(f"no {format.kind} at {root}, but in it: {', '.join(inside)}; name one of them")
        raise StoreNotFound(f"no {format.kind} at {root}: it is not a store of ours. Make one with {format.command}")
    if header.kind != format.kind:
        raise StoreNotFound(
            f"no {format.kind} at {root}: it holds {FORMATS[header.kind].a_kind}, version {header.version}"
        )
    if header.version > format.version:
        raise SpecMismatch(
            f"{root}: {format.kind} version {header.version} is newer than this cyto, which reads up to "
            f"{format.version}; upgrade cyto"
        )
    if complete and not header.complete:
        if header.summary is not None and format is ACTIVATIONS:
            raise IncompleteStore(
                f"{root} is incomplete: a cyto cache repair has not finished. Run the same command again to continue"
            )
        command = "cyto sae import" if "imported" in header.spec else format.command
        raise IncompleteStore(
            f"{root} is incomplete: the {command} that writes it has not finished. "
            f"Run the same {command} command again to continue"
        )
    return replace(header, seal=seal)


def require_unchanged(*headers: Header) -> None:
    """Raise StoreReplaced if one of the stores with these headers was replaced or changed."""
    for header in headers:
        if header.seal is not None:
            header.seal.check()


def seal_of(root: Path) -> Seal | None:
    """The present seal of the artefact at `root`, of any kind; None if there is none."""
    found = find_header(root) if root.is_dir() else None
    return None if found is None else Seal.of(root / FORMATS[found.kind].header_file)


def begin_header(root: Path, header: Header) -> None:
    """Write the header of a new artefact, unless another writer has."""
    write_new(root / FORMATS[header.kind].header_file, readable_json(_header_content(root, header)))


def write_header(root: Path, header: Header) -> None:
    """Write or replace the header of a folder artefact or of an existing Zarr group, atomically and durably."""
    write_json(root / FORMATS[header.kind].header_file, _header_content(root, header))


def describe_difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The settings that differ between two specs, in words: `block 10 against 9, ...` (three, then a count)."""
    flat_old, flat_new = _flatten(old), _flatten(new)
    names = [name for name in {**flat_old, **flat_new} if flat_old.get(name) != flat_new.get(name)]
    shown = [f"{name} {_short(flat_old.get(name))} against {_short(flat_new.get(name))}" for name in names[:3]]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def check_choice(name: str, value: object, allowed: Collection[object]) -> None:
    """Raise BadInput if a value is not one of the allowed ones."""
    if value not in allowed:
        raise BadInput(f"{name} must be one of {', '.join(map(str, allowed))}; found {value!r}")


def as_floats(config: object, *names: str) -> None:
    """Turn settings of a frozen dataclass into floats, except None: 1 and 1.0 are the same settings."""
    for name in names:
        if getattr(config, name) is not None:
            object.__setattr__(config, name, float(getattr(config, name)))


def check_latent(latent: int, n_latents: int, place: object) -> None:
    """Raise BadInput if there is no latent of this number; `place`: the artefact with these latents."""
    if not 0 <= latent < n_latents:
        numbers = f"{n_latents:,} latents, counted from 0; give 0 to {n_latents - 1:,}"
        raise BadInput(f"no latent {latent:,} in {place}: it has {numbers}")


class HeaderObject(dict[str, Any]):
    """An object of a header as read. A missing key raises DamagedStore in one line, not a KeyError."""

    place: str = ""

    @classmethod
    def of(cls, value: Any, place: object) -> Any:
        """The same value with every object in it converted."""
        if isinstance(value, dict):
            said = cls({name: cls.of(inner, place) for name, inner in value.items()})
            said.place = str(place)
            return said
        return [cls.of(inner, place) for inner in value] if isinstance(value, list) else value

    def __missing__(self, name: str) -> Any:
        raise DamagedStore(
            f"{self.place}: its header does not say {name!r}: it is damaged, or of another version of cyto; "
            f"run the command that made it again, with --overwrite"
        )


def plain(value: Any) -> Any:
    """The same value with every `HeaderObject` converted to a dict, for files that other programs unpickle."""
    if isinstance(value, dict):
        return {name: plain(inner) for name, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list) else value


def stated(cls: type[_T], said: Any, place: object, *, positive: Collection[str] = (), **more: Any) -> _T:
    """The dataclass `cls` from an object in a header, with a check of types; `more`: fields that are not in it.

    Raises
    ------
    DamagedStore
        If a field is missing, unknown, of another type, or (in `positive`) below 1; the message names it.
    """
    hints = {name: hint for name, hint in get_type_hints(cls).items() if name not in more}
    known = {field.name: field for field in fields(cls)}  # type: ignore[arg-type]  # a dataclass
    if not isinstance(said, dict):
        raise DamagedStore(f"{place}: its header says {_short(said)!r}; expected an object with {', '.join(known)}")
    for name in [*said, *known]:
        field = known.get(name)
        is_optional = field is not None and (field.default is not MISSING or field.default_factory is not MISSING)
        if field is None or (name not in said and name not in more and not is_optional):
            what = "knows" if field is None else "lacks"
            raise DamagedStore(
                f"{place}: its header cannot be read: it {what} {name!r}, which "
                f"{'this version does not' if field is None else 'this version needs'}; make it again, or upgrade cyto"
            )
        if name in said and name in hints and not fits_hint(said[name], hints[name]):
            raise DamagedStore(
                f"{place}: its header says {name} {_short(said[name])!r}; expected {_hint(hints[name])}; make it again"
            )
        if name in positive and said[name] < 1:
            raise DamagedStore(
                f"{place}: the header says {name} {said[name]!r}; expected a whole number above 0; make it again"
            )
    return cls(**said, **more)


def _hint(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def _parse_header(raw: dict[str, Any], root: Path) -> Header:
    try:
        format_version = int(raw["format_version"])
        if format_version > FORMATS[raw["format"]].version:  # only a newer program knows the rest of the format
            return Header(kind=raw["format"], version=format_version, spec={})
        spec, summary = raw["spec"], raw.get("summary")
        if not isinstance(spec, dict) or not isinstance(summary, dict | None):
            raise TypeError("spec and summary are no objects")
        header = Header(
            kind=raw["format"],
            version=format_version,
            spec=HeaderObject.of(spec, root),
            complete=raw["complete"] is True,
            summary=None if summary is None else HeaderObject.of(summary, root),
            created_by=str(raw.get("created_by", "")),
        )
        identity = header.identity
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedStore(f"{root}: the header of this {raw['format']} cannot be read ({error!r})") from None
    if raw.get("identity") != identity:
        raise DamagedStore(f"{root}: the header was changed by hand: its identity does not fit its settings")
    check_kinds(header.spec, SPEC_KINDS[header.kind], "spec", root)
    check_kinds(header.summary or {}, SUMMARY_KINDS[header.kind], "summary", root)
    return header


def _header_content(root: Path, header: Header) -> dict[str, Any]:
    if FORMATS[header.kind].header_file != "zarr.json":
        return header.to_json()
    group = read_object(root / "zarr.json") or {"zarr_format": 3, "node_type": "group", "attributes": {}}
    group["attributes"] = {**group.get("attributes", {}), "cyto": header.to_json()}
    return group


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of at most 16 MiB; {} where there is none."""
    try:
        value = read_json(path)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _why_unreadable(path: Path) -> str | None:
    """Why a header file cannot be read; None if there is no file, or it holds JSON."""
    try:
        value = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        return str(error)
    return None if isinstance(value, dict) else "it is no JSON object"


def _flatten(spec: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in spec.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _short(value: object) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 24 else text[:12] + "…"
