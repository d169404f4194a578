"""Checks a `zarr.json` before zarr reads it, so that a damaged one can neither hang a reader nor exhaust its memory.

Zarr accepts any layout, allocates what a shape states, and reads a missing chunk as its fill value. The arrays allowed
here have one of a few types and codecs, chunks of bounded size, and chunk files that decode to exactly that size.
"""

import math
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numcodecs import blosc, zstd

from .errors import DamagedStore
from .files import MOST_JSON_BYTES, is_dropping, parse_json, read_json

if not __debug__:  # python -O. Here, since every module of Cyto that uses zarr imports this one
    from .without_asserts import mend_zarr

    mend_zarr()

MOST_CHUNK_BYTES = 1 << 28
_MOST_ENTRIES = 1 << 48  # of an array
_MOST_FILES = 100_000  # below one element of an AnnData store, without chunks
_NUMBERS = ("bool", *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)))
_TYPES = (*_NUMBERS, "float16", "float32", "float64", "string")
_ARRAY_KEYS = {
    *("shape", "data_type", "chunk_grid", "chunk_key_encoding", "fill_value", "codecs", "attributes", "zarr_format"),
    *("node_type", "storage_transformers", "dimension_names"),
}
_GROUP_KEYS = {"attributes", "zarr_format", "node_type", "consolidated_metadata"}
# AnnData's encoding types in the stores that Cyto writes, and their versions
_ENCODINGS = {
    **dict.fromkeys(("anndata", "dict", "csr_matrix"), ("0.1.0",)),
    **dict.fromkeys(("array", "string-array", "string", "numeric-scalar", "categorical"), ("0.2.0",)),
    **dict.fromkeys(("nullable-integer", "nullable-boolean", "nullable-string-array"), ("0.1.0",)),
    "dataframe": ("0.1.0", "0.2.0"),
}


@dataclass(frozen=True)
class ArrayMeta:
    """The layout of one array: shape, chunk shape, type, names of the codecs after the first, attributes."""

    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    data_type: str
    codecs: tuple[str, ...]
    attributes: dict[str, Any]

    @property
    def chunk_bytes(self) -> int:
        """Size of a decoded chunk; 0 for strings, which have no fixed size."""
        return 0 if self.data_type == "string" else math.prod(self.chunks) * np.dtype(self.data_type).itemsize


def read_array(folder: Path) -> ArrayMeta:
    """The layout of the array in a folder. Raises DamagedStore if it is missing or not allowed."""
    return array_meta(_object(folder), folder / "zarr.json")


def read_group(folder: Path) -> dict[str, Any]:
    """The attributes of the group in a folder. Raises DamagedStore if it is no group, or has consolidated metadata."""
    return group_attributes(_object(folder), folder / "zarr.json")


def parse_object(raw: bytes, place: object) -> dict[str, Any]:
    """The JSON object in the bytes of a remote `zarr.json`. Raises DamagedStore."""
    try:
        value = parse_json(raw) if len(raw) <= MOST_JSON_BYTES else None
    except ValueError as error:
        raise DamagedStore(f"{place} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise DamagedStore(f"{place} cannot be read: it is no JSON object of at most {MOST_JSON_BYTES:,} bytes")
    return value


def group_attributes(found: dict[str, Any], place: object) -> dict[str, Any]:
    """The attributes of a group's metadata; otherwise as `read_group`."""
    attributes = found.get("attributes", {})
    _require(found.get("zarr_format") == 3 and found.get("node_type") == "group", place, "a group of Zarr 3", found)
    _require(found.keys() <= _GROUP_KEYS, place, "a group without other keys", [*found])
    _require(found.get("consolidated_metadata") is None, place, "no consolidated metadata", "some")
    _require(isinstance(attributes, dict), place, "attributes in an object", attributes)
    return dict(attributes)


def array_meta(found: dict[str, Any], place: object) -> ArrayMeta:
    """The layout in an array's metadata; otherwise as `read_array`."""
    _require(found.get("zarr_format") == 3 and found.get("node_type") == "array", place, "an array of Zarr 3", found)
    _require(found.keys() <= _ARRAY_KEYS, place, "an array without other keys", [*found])
    _require(found.get("storage_transformers", []) == [], place, "no storage transformers", "some")
    data_type: Any = found.get("data_type")
    shape: Any = found.get("shape")
    _require(data_type in _TYPES, place, f"data_type {', '.join(_TYPES)}", data_type)
    is_shape = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape) and len(shape) <= 4
    _require(is_shape and math.prod(shape) <= _MOST_ENTRIES, place, "a shape of whole numbers", shape)
    grid: Any = found.get("chunk_grid")
    keys: Any = found.get("chunk_key_encoding")
    setting: Any = grid.get("configuration", {}) if _is_named(grid, "regular") else {}
    chunks: Any = setting["chunk_shape"] if setting.keys() == {"chunk_shape"} else None
    is_shape = isinstance(chunks, list) and all(type(n) is int and n > 0 for n in chunks) and len(chunks) == len(shape)
    _require(is_shape, place, "a regular chunk grid of whole numbers above 0", grid)
    # / is Zarr's default separator, and may be left out
    is_default = _is_named(keys, "default") and keys.get("configuration", {}) in ({}, {"separator": "/"})
    _require(is_default, place, "chunk keys with /", keys)
    names = _codecs(found.get("codecs"), data_type, place)
    attributes = found.get("attributes", {})
    _require(isinstance(attributes, dict), place, "attributes in an object", attributes)
    _check_fill(found.get("fill_value"), data_type, place)
    dimensions = found.get("dimension_names")
    is_list = isinstance(dimensions, list) and len(dimensions) == len(shape)
    _require(dimensions is None or is_list, place, "a name for each dimension", dimensions)
    meta = ArrayMeta(tuple(shape), tuple(chunks), data_type, tuple(names), dict(attributes))
    size = math.prod(chunks) * (8 if data_type == "string" else np.dtype(data_type).itemsize)
    # without compression, the file has the same size
    most = 1 << 36 if not names or names == ["crc32c"] else MOST_CHUNK_BYTES
    _require(size <= most, place, f"chunks of at most {most:,} bytes", chunks)
    return meta


def check_chunk_header(path: Path, meta: ArrayMeta) -> None:
    """Raise DamagedStore if a chunk file is missing, or states another decoded size than that of the array's chunks.

    Reads a few bytes. Otherwise a compressed file of some KB could make the reader allocate gigabytes.
    """
    try:
        size = path.stat().st_size  # opened only if it is a file: a pipe would block
        if not path.is_file() or not size:
            raise DamagedStore(f"{path} is missing or empty")
        with path.open("rb", buffering=0) as file:
            head = file.read(18)
    except OSError as error:
        raise DamagedStore(f"{path} is missing or cannot be read ({error.strerror})") from None
    compressors = [name for name in meta.codecs if name != "crc32c"]
    if compressors == ["gzip"]:  # not written by Cyto, and its stated size is not reliable
        if _gzip_bytes(path, most=max(meta.chunk_bytes, MOST_CHUNK_BYTES if not meta.chunk_bytes else 0)) is None:
            raise DamagedStore(f"{path} is damaged: it does not decode to the {meta.chunk_bytes:,} bytes of a chunk")
        return
    found = decoded_bytes(head, compressors[0]) if compressors else size - 4 * len(meta.codecs)
    # strings have no size that is known from the array
    fits = found == meta.chunk_bytes if meta.chunk_bytes else found is not None and found <= MOST_CHUNK_BYTES
    if not fits:
        raise DamagedStore(f"{path} is damaged: it does not decode to the {meta.chunk_bytes:,} bytes of a chunk")


def _gzip_bytes(path: Path, *, most: int) -> int | None:
    """How many bytes a gzip file decodes to; None if it is no gzip file, or has more than `most`."""
    n_bytes, decoder = 0, zlib.decompressobj(31)
    try:
        with path.open("rb") as file:
            while (piece := decoder.unconsumed_tail or file.read(1 << 20)) and n_bytes <= most:
                n_bytes += len(decoder.decompress(piece, 1 << 20))
    except (OSError, zlib.error):
        return None
    return n_bytes if n_bytes <= most and decoder.eof else None


def decoded_bytes(head: bytes, codec: str) -> int | None:
    """The size that the first 18 bytes of a compressed chunk state for its content; None if they state none."""
    if codec == "blosc":
        return int.from_bytes(head[4:8], "little") if len(head) >= 16 else None
    if head[:4] != b"\x28\xb5\x2f\xfd" or len(head) < 6:
        return None
    descriptor = head[4]
    is_single, width = descriptor >> 5 & 1, descriptor >> 6
    at = 5 + (not is_single) + (0, 1, 2, 4)[descriptor & 3]
    n_bytes = (1 if is_single else 0, 2, 4, 8)[width]
    if not n_bytes or at + n_bytes > len(head):
        return None
    return int.from_bytes(head[at : at + n_bytes], "little") + (256 if n_bytes == 2 else 0)


def check_tree(folder: Path) -> None:
    """Raise DamagedStore unless everything below an element of an AnnData store has Cyto's layout and bounded size.

    For the small elements that anndata reads: tables and plain values. A missing chunk is not detected, since Zarr does
    not write chunks with fill values only.
    """
    for n_seen, (place, found) in enumerate(_nodes(folder), start=1):
        if n_seen > _MOST_FILES:
            raise DamagedStore(f"{folder} holds more than {_MOST_FILES:,} groups and arrays")
        file = place / "zarr.json"
        if found.get("node_type") == "group":
            _check_encoding(group_attributes(found, file), place)
            continue
        meta = array_meta(found, file)
        # the group of a sparse matrix has it for its arrays
        if place.name not in ("indices", "data", "indptr") or meta.attributes:
            _check_encoding(meta.attributes, place)
        chunks = [*files_below(place / "c")] if meta.shape else [place / "c"]
        grid = math.prod(-(-n // size) for n, size in zip(meta.shape, meta.chunks, strict=True))
        _require(len(chunks) <= grid, place, f"at most {grid:,} chunk files", len(chunks))
        # the size of an array without chunk files is only stated by its shape
        _require(math.prod(meta.shape) <= 1 << 28, place, "fewer entries", meta.shape)
        for chunk in chunks:
            if meta.shape or chunk.exists():
                check_chunk_header(chunk, meta)
                if meta.data_type == "string":
                    _check_texts(chunk, meta)


def _nodes(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for place, names, _ in os.walk(folder):  # follows no links
        found = _object(Path(place))
        names[:] = [] if found.get("node_type") == "array" else [name for name in names if not is_dropping(name)]
        yield Path(place), found


def files_below(folder: Path) -> Iterator[Path]:
    """Every file below a folder, without following links, and without files of the disk or system."""
    for place, names, files in os.walk(folder):
        names[:] = [name for name in names if not is_dropping(name)]
        yield from (Path(place) / name for name in files if not is_dropping(name))
        yield from (Path(place) / name for name in names if (Path(place) / name).is_symlink())


def _check_encoding(attributes: dict[str, Any], place: Path) -> None:
    kind = attributes.get("encoding-type")
    _require(isinstance(kind, str) and kind in _ENCODINGS, place / "zarr.json", "an encoding-type of AnnData's", kind)
    version = attributes.get("encoding-version")
    _require(version in _ENCODINGS[str(kind)], place / "zarr.json", f"a version of {kind} that AnnData reads", version)
    if kind == "dataframe":
        order = attributes.get("column-order")
        columns = [*order, attributes.get("_index")] if isinstance(order, list) else [None]
        for name in columns:
            is_name = isinstance(name, str) and name not in ("", ".", "..") and not {"/", "\\", "\0"} & {*name}
            _require(is_name, place / "zarr.json", "a list of columns and an _index", name)
            _require((place / str(name) / "zarr.json").is_file(), place, "a folder for each column", f"no {name!r}")


def _check_texts(path: Path, meta: ArrayMeta) -> None:
    """Check the number of strings that a chunk states, for which the reader allocates memory."""
    raw: Any = path.read_bytes()
    try:
        for codec in meta.codecs[::-1]:
            raw = raw[:-4] if codec == "crc32c" else (zstd if codec == "zstd" else blosc).decompress(raw)
    except (ValueError, RuntimeError) as error:
        raise DamagedStore(f"{path} is damaged: {error}") from None
    stated = int.from_bytes(bytes(raw[:4]), "little")
    if stated != math.prod(meta.chunks):
        raise DamagedStore(f"{path} is damaged: it states {stated:,} texts, expected {math.prod(meta.chunks):,}")


def _codecs(codecs: Any, data_type: Any, place: object) -> list[str]:
    """The names of the codecs after the first, which converts values to bytes."""
    is_list = isinstance(codecs, list) and 1 <= len(codecs) <= 3 and all(isinstance(codec, dict) for codec in codecs)
    _require(is_list, place, "a list of one to three codecs", codecs)
    first, names = codecs[0], [codec.get("name") for codec in codecs[1:]]
    settings = [codec.get("configuration", {}) for codec in codecs]
    if data_type == "string":
        fits = first.get("name") == "vlen-utf8" and settings[0] == {}
    else:  # a type of one byte has no order
        fits = first.get("name") == "bytes" and settings[0] in ({"endian": "little"}, {})
        fits = fits and (settings[0] != {} or data_type in ("bool", "int8", "uint8"))
    for name, setting in zip(names, settings[1:], strict=True):
        fits = fits and isinstance(setting, dict) and _fits_codec(name, setting)
    known = ([], ["crc32c"], *([name, *crc] for name in ("zstd", "blosc", "gzip") for crc in ([], ["crc32c"])))
    _require(fits and names in known, place, "the codecs bytes (little-endian), zstd, blosc or gzip, crc32c", names)
    return [str(name) for name in names]


def _fits_codec(name: Any, setting: dict[str, Any]) -> bool:
    if name == "zstd":
        return (
            setting.keys() <= {"level", "checksum"}
            and type(setting.get("level", 0)) is int
            and -(1 << 17) <= setting.get("level", 0) <= 22
            and isinstance(setting.get("checksum", False), bool)
        )
    if name == "blosc":
        numbers = {key: setting.get(key) for key in ("typesize", "clevel", "blocksize")}
        return (
            setting.keys() <= {"typesize", "cname", "clevel", "shuffle", "blocksize"}
            and setting.get("cname") in ("lz4", "lz4hc", "blosclz", "snappy", "zlib", "zstd")
            and setting.get("shuffle") in ("noshuffle", "shuffle", "bitshuffle")
            and all(type(number) is int and 0 <= number < 1 << 31 for number in numbers.values())
            and 1 <= setting["typesize"] <= 255
            and setting["clevel"] <= 9
        )
    if name == "gzip":
        return (
            setting.keys() <= {"level"} and type(setting.get("level", 0)) is int and 0 <= setting.get("level", 0) <= 9
        )
    return name == "crc32c" and setting == {}


def _check_fill(fill: Any, data_type: Any, place: object) -> None:
    if data_type == "string":
        fits = isinstance(fill, str)
    elif data_type == "bool":
        fits = isinstance(fill, bool)
    elif str(data_type).startswith("float"):
        fits = type(fill) in (int, float) or fill in ("NaN", "Infinity", "-Infinity")
    else:
        limits = np.iinfo(data_type)
        fits = type(fill) is int and limits.min <= fill <= limits.max
    _require(fits, place, f"a fill_value of type {data_type}", fill)


def _object(folder: Path) -> dict[str, Any]:
    place = folder / "zarr.json"
    try:
        value = read_json(place)
    except FileNotFoundError:
        raise DamagedStore(f"{place} is missing") from None
    except (OSError, ValueError) as error:
        raise DamagedStore(f"{place} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise DamagedStore(f"{place} cannot be read: it is no JSON object")
    return value


def _is_named(value: Any, name: str) -> bool:
    """Is it exactly {"name": name, "configuration": {...}}?"""
    is_plain = isinstance(value, dict) and value.keys() <= {"name", "configuration"} and value.get("name") == name
    return is_plain and isinstance(value.get("configuration", {}), dict)


def _require(is_so: object, place: object, expected: str, found: object) -> None:
    if not is_so:
        shown = repr(found)
        shown = shown if len(shown) <= 60 else f"{shown[:60]}…"
        raise DamagedStore(f"{place} is damaged: expected {expected}; found {shown}")
