"""The image table: one row per image, with path, label, patient and disease, and whether it could be read.

The first seven columns are the manifest; extra columns of the user's manifest are kept as strings. The last three are
the outcome of reading the file; a fourth, `truncated`, is there only where images were taken that are cut off. The
position of a row is its `image_index`, in every store.
"""

import csv
import hashlib
import io
import json
import logging
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .errors import BadInput
from .files import decode_text, plain_number, write_atomic

MANIFEST_COLUMNS = ("image_id", "path", "label", "label_common", "patient", "disease", "dataset")
OUTCOME_COLUMNS = ("content_hash", "status", "error")
TRUNCATED = "truncated"  # what is missing of an image that was taken as far as its file goes, else null
STATUS_OK, STATUS_UNREADABLE = "ok", "unreadable"
_FORMULA_SIGNS = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")  # also the full-width forms
_BREAKS = ("\t", "\r", "\n")
_TEXT_SUFFIXES = (".csv", ".tsv", ".tab", ".txt")
_SEPARATORS = ",;\t"
_NAMES_A_FILE = ("image_id", "path", "mask", "latent")  # columns in which "NA" may be a name
_OURS = (*MANIFEST_COLUMNS, *OUTCOME_COLUMNS, "mask")  # known columns, also in other spellings
_NAMES_OF_GROUPS = ("patient", "disease", "label", "label_common", "dataset")
_WHOLE_NUMBERS = ("image_id", "patient", "disease", "label", "label_common", "dataset")
# what R, SPSS, SAS, pandas, SQL and spreadsheets write for a missing value. Not "none", "unknown", "healthy" and "0",
# which may be a disease or a label
MISSING = ("NA", "N/A", "n/a", "#N/A", "#N/A N/A", "<NA>", "NaN", "nan", "-nan", "NULL", "null", "#NULL!", "None")
MISSING_SIGNS = (".", "-", "--", "?")
ALL_MISSING = frozenset({*MISSING, *MISSING_SIGNS})
_INTO_ARCHIVE = re.compile(r"(?<=\.zip)::|(?<=\.tar)::|(?<=\.tar\.gz)::|(?<=\.tgz)::", re.IGNORECASE)
MAX_NAME_BYTES = 255  # of a file name, on usual disks: a column becomes a folder in an AnnData store
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
_log = logging.getLogger(__name__)


def read_table_file(path: Path) -> pa.Table:
    """A CSV or Parquet table of the user, every column as strings; empty cells, NaN and `MISSING` become null.

    The same from both formats: blanks around names and cells are removed; known columns in another spelling (`Patient`,
    `Image ID`) get their name; in columns of names, integers that pandas made floats (7.0) lose the ".0". CSV: fields
    separated by commas, semicolons or tabs, in UTF-8, UTF-16 with a byte order mark, or Windows-1252 (Latin-1), as
    spreadsheets export them. Numbers stay as they are written (007). Empty rows, empty columns at
    the end, and row names of R or pandas in the first column are left out. Changes are reported as warnings.

    Raises
    ------
    BadInput
        If the file is missing, of another format or encoding, a CSV line has a wrong number of fields, or the names of
        two columns differ only in case and blanks.
    """
    if not path.is_file():
        raise BadInput(f"no table at {path}: expected a .csv or .parquet file")
    if path.suffix.lower() in _TEXT_SUFFIXES:
        return _with_our_names(_read_csv(path), path)
    if path.suffix.lower() == ".parquet":
        return _with_our_names(_read_parquet(path, strip=True), path)
    raise BadInput(f"{path} is neither .csv nor .parquet; convert it to one of them")


def folded(name: str) -> str:
    """A column's name in the form for comparison: `Image ID` and `image.id` become `image_id`."""
    return re.sub(r"[\s\-._]+", "_", unicodedata.normalize("NFKC", name).casefold().strip()).strip("_")


def check_column_names(names: Iterable[str], source: str) -> None:
    """Refuse names that AnnData, Zarr or a disk cannot store, before a later stage fails on them.

    Raises
    ------
    BadInput
        For such a name, which the message shows shortened.
    """
    for name in names:
        shown = repr(name if len(name) <= 60 else f"{name[:59]}…")
        n_bytes = len(name.encode(errors="replace"))
        if n_bytes > MAX_NAME_BYTES:
            raise BadInput(
                f"{source} has a column {shown} whose name has {n_bytes:,} bytes; expected at most {MAX_NAME_BYTES}. "
                f"Give it a shorter name, or leave the column out"
            )
        is_reserved = name in ("", ".", "..", "_index", "zarr.json") or name.startswith("__")
        if is_reserved or "/" in name or "\0" in name:
            raise BadInput(f"{source} has a column {shown}, a name that AnnData cannot store; rename it")


def image_table(columns: dict[str, list[str | None]], *, source: str, dataset: str) -> pa.Table:
    """A checked manifest: the seven columns in order, then the user's extra ones; outcome columns are dropped.

    An empty cell of `dataset` becomes the argument `dataset`; an empty `image_id` becomes `dataset/path`.

    Parameters
    ----------
    columns : at least `path`: relative to the images' root, `/` between folders
    source : name of this table in errors

    Raises
    ------
    BadInput
        If there is no `path` or no row, a path is empty or leads out of the root, or an `image_id` is repeated.
    """
    if "path" not in columns:
        found = ", ".join(columns) or "no columns"
        raise BadInput(f"{source} has no column 'path' (found: {found}); name the column of image paths 'path'")
    paths = columns["path"]
    if not paths:
        raise BadInput(f"{source} lists no images; expected one row per image")
    nothing: list[str | None] = [None] * len(paths)
    clean = [_check_path(path, row, source) for row, path in enumerate(paths, start=1)]
    datasets = [value or dataset for value in columns.get("dataset", nothing)]
    given = columns.get("image_id", nothing)
    ids = [value or f"{name}/{path}" for value, name, path in zip(given, datasets, clean, strict=True)]
    _check_unique(ids, source)
    known: dict[str, list[str | None]] = {name: columns.get(name, nothing) for name in MANIFEST_COLUMNS}
    known |= {"image_id": [*ids], "path": [*clean], "dataset": [*datasets]}
    users = _without_truncated([*columns])
    extra = {name: columns[name] for name in users if name not in known and name not in OUTCOME_COLUMNS}
    is_ours = {*OUTCOME_COLUMNS} <= {*columns}  # the image table of a cache was given as the manifest
    for name in columns:
        if name in OUTCOME_COLUMNS and not is_ours:
            raise BadInput(f"{source} has a column {name!r}, which is ours to write; rename it")
    check_column_names(columns, source)
    return pa.table({name: pa.array(values, pa.string()) for name, values in {**known, **extra}.items()})


def with_outcome(
    table: pa.Table,
    content_hash: list[str | None],
    errors: list[str | None],
    truncated: list[str | None] | None = None,
) -> pa.Table:
    """The manifest with its outcome columns: `status` is `ok` where `errors` is None, else `unreadable`.

    truncated : per image what is missing of its file; the column `truncated`, which is left out if nothing is
    """
    table = without_outcome(table)
    status = [STATUS_OK if error is None else STATUS_UNREADABLE for error in errors]
    for name, values in zip(OUTCOME_COLUMNS, (content_hash, status, errors), strict=True):
        table = table.append_column(name, pa.array(values, pa.string()))
    if truncated is not None and any(truncated):
        table = table.append_column(TRUNCATED, pa.array(truncated, pa.string()))
    return table


def without_outcome(table: pa.Table) -> pa.Table:
    """The manifest of an image table, whose hash is part of a cache's identity."""
    return table.select([name for name in _without_truncated(table.column_names) if name not in OUTCOME_COLUMNS])


def truncated_images(table: pa.Table) -> list[str | None]:
    """Per row what is missing of an image that was taken as far as its file goes; None for whole images."""
    is_there = _without_truncated(table.column_names) != table.column_names
    return column(table, TRUNCATED) if is_there else [None] * table.num_rows


def _without_truncated(names: list[str]) -> list[str]:
    """Without our column `truncated`, which comes after all others; a user's own of that name stays."""
    return names[:-1] if names[-2:] == [OUTCOME_COLUMNS[-1], TRUNCATED] else names


def write_image_table(table: pa.Table, path: Path) -> None:
    """Write an image table as Parquet, atomically."""
    write_atomic(path, parquet_bytes(table))


def parquet_bytes(table: pa.Table) -> memoryview:
    """A table as the content of a Parquet file, with a checksum of each page."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return memoryview(sink.getvalue())


def sealed_parquet(table: pa.Table, **said: Any) -> memoryview:
    """The same, with the hash of the cells and the values `said` in the metadata, for files without another record."""
    cyto = {**said, "sha256": table_sha256(table)}
    return parquet_bytes(table.replace_schema_metadata({b"cyto": json.dumps(cyto, default=plain_number).encode()}))


def read_sealed(path: Path) -> tuple[pa.Table, dict[str, Any]]:
    """A file of `sealed_parquet`: (the table, the values `said` and `sha256`); {} for files of an older cyto.

    Raises
    ------
    OSError, ValueError, ArrowException
        If it cannot be read, or its cells have changed.
    """
    table = pq.read_table(path, partitioning=None, page_checksum_verification=True)
    said = json.loads((table.schema.metadata or {}).get(b"cyto", b"{}"))
    table = table.replace_schema_metadata(None)
    if not isinstance(said, dict) or ("sha256" in said and said["sha256"] != table_sha256(table)):
        raise ValueError("its rows are not the ones that were written")
    return table, said


def parquet_table(data: bytes | bytearray) -> pa.Table:
    """The table in the content of a Parquet file.

    Arrow gets a copy in its own memory. Its threads may keep the file for a moment after the table is read; if such a
    thread released a Python object while the interpreter ends, the process would abort (exit code 134).

    Raises
    ------
    OSError, ValueError, ArrowException
        If it is no Parquet file, or a page has changed.
    """
    copy = pa.BufferOutputStream()
    copy.write(data)
    return pq.read_table(pa.BufferReader(copy.getvalue()), page_checksum_verification=True)


def csv_bytes(table: pa.Table) -> bytes:
    """A table as the content of a CSV file, safe for spreadsheets: no text in it is read as a formula.

    An apostrophe is put before a text that begins with `= + - @` (also after blanks), a tab or a line break.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow([not_a_formula(name) for name in table.column_names])
    for row in zip(*(table[name].to_pylist() for name in table.column_names), strict=True):
        writer.writerow([not_a_formula(cell) for cell in row])
    return text.getvalue().encode("utf-8-sig")  # -sig: else Excel does not read it as UTF-8


def not_a_formula(cell: object) -> object:
    """The cell of a table for a spreadsheet, with an apostrophe if it were read as a formula."""
    if isinstance(cell, str) and (cell.startswith(_BREAKS) or cell.lstrip().startswith(_FORMULA_SIGNS)):
        return f"'{cell}"
    return cell


def read_image_table(path: Path) -> pa.Table:
    """Read back a table written by `write_image_table`.

    Raises
    ------
    BadInput
        If the file is missing or is no image table.
    """
    table = _read_parquet(path) if path.is_file() else None
    if table is None or not {*MANIFEST_COLUMNS} <= {*table.column_names}:
        raise BadInput(f"no image table at {path}; expected Parquet with columns {', '.join(MANIFEST_COLUMNS)}")
    return table


def table_sha256(table: pa.Table) -> str:
    """SHA-256 of names, order and values of all columns; independent of Parquet's own version and layout."""
    cells = [[name, table[name].to_pylist()] for name in table.column_names]
    # NaN is allowed for measured numbers; repr: bytes and times, which no table of ours has, unless it is damaged
    text = json.dumps(cells, separators=(",", ":"), ensure_ascii=False, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()


def column(table: pa.Table, name: str) -> list[str | None]:
    """One column as Python strings; all None if the table lacks it."""
    return table[name].to_pylist() if name in table.column_names else [None] * table.num_rows


def readable(table: pa.Table) -> list[bool]:
    """Per row: was the image read? False if the outcome is unknown."""
    return [status == STATUS_OK for status in column(table, "status")]


def listed(items: list[str], limit: int = 3) -> str:
    """`a, b, c and 4 more`: a list in an error message."""
    more = f" and {len(items) - limit:,} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def _with_our_names(table: pa.Table, path: Path) -> pa.Table:
    """The table with standard names for known columns, and null for words that mean a missing value."""
    seen: dict[str, str] = {}
    for name in table.column_names:
        key = folded(name)
        if key and key in seen:
            raise BadInput(
                f"{path} has two columns {seen[key]!r} and {name!r}, equal but for case and blanks; rename one of them"
            )
        seen[key] = name
    ours = {name: folded(name) for name in table.column_names if folded(name) in _OURS and name not in _OURS}
    if ours:
        told = listed([f"{name!r} as {meant!r}" for name, meant in ours.items()], limit=10)
        _log.warning("%s: columns read by another name: %s", path, told)
    columns = {ours.get(name, name): table[name].to_pylist() for name in table.column_names}
    n_missing: dict[str, int] = {}
    for name, cells in columns.items():
        if name not in _NAMES_A_FILE:
            found = [cell in ALL_MISSING for cell in cells]
            if any(found):
                n_missing[name] = sum(found)
                cells[:] = [None if is_missing else cell for cell, is_missing in zip(cells, found, strict=True)]
        if name in _WHOLE_NUMBERS and any(cells) and all(_WHOLE.fullmatch(cell) for cell in cells if cell):
            cells[:] = [cell and cell.split(".")[0] for cell in cells]
    for name in [each for each in _NAMES_OF_GROUPS if each in columns]:
        warn_of_names_alike(columns[name], f"names in {name!r}", path)
    if n_missing:
        told = listed([f"{n:,} in {name!r}" for name, n in n_missing.items()], limit=10)
        _log.warning("%s: cells that say NA, NaN, NULL, None, '.', '-' or the like are empty: %s", path, told)
    return pa.table({name: pa.array(cells, pa.string()) for name, cells in columns.items()})


def warn_of_names_alike(cells: Iterable[str | None], what: str, place: Path) -> None:
    """Say which names are most likely one, such as AML and aml: they stay several."""
    spellings: dict[str, list[str]] = {}
    for name in dict.fromkeys(cells):
        if name is not None:
            spellings.setdefault(" ".join(unicodedata.normalize("NFKC", name).casefold().split()), []).append(name)
    if alike := [" and ".join(map(repr, each)) for each in spellings.values() if len(each) > 1]:
        how = "that differ only in case, blanks or the coding of letters are taken as several"
        _log.warning("%s: %s %s: %s", place, what, how, listed(alike))


_WHOLE = re.compile(r"\d+(\.0+)?")


def _read_csv(path: Path) -> pa.Table:
    try:
        text = _decoded(path)
        separator, text = _separator(text)
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadInput(
            f"{path} cannot be read as a UTF-8 CSV file: {error}; in Excel, save it as 'CSV UTF-8'"
        ) from None
    _tell_of_blanks(rows, path)
    numbered = [(number, row) for number, row in enumerate(rows, start=1) if any(cell.strip() for cell in row)]
    if not numbered:
        raise BadInput(f"{path} is empty; expected a header line with a column 'path'")
    header = [name.strip() for name in numbered[0][1]]
    body = [(number, [cell.strip() or None for cell in row]) for number, row in numbered[1:]]
    while header and not header[-1] and not any(cell for _, row in body for cell in row[len(header) - 1 :]):
        header.pop()  # cleared columns, or a separator at the end of each line
    if body and header and header[0] and all(len(row) == len(header) + 1 for _, row in body):
        if any(row[-1] for _, row in body):  # R's write.table
            header = ["", *header]
    for number, row in body:
        if len(row) < len(header) or any(row[len(header) :]):
            raise BadInput(f"line {number} of {path} has {len(row)} fields, the header has {len(header)}")
    if header and not header[0] and len(header) > 1:  # also R's write.csv, and pandas' index
        _log.warning("%s: the first column has no name and is left out: row names of R or pandas", path)
        header, body = header[1:], [(number, row[1:]) for number, row in body]
    _check_header(header, path)
    values = {name: [row[i] for _, row in body] for i, name in enumerate(header)}
    return pa.table({name: pa.array(cells, pa.string()) for name, cells in values.items()})


def _decoded(path: Path) -> str:
    """The text of a CSV file. What is not UTF-8 is read as Windows-1252, which is Latin-1 but for 0x80 to 0x9F.

    Raises UnicodeDecodeError for what neither is.
    """
    raw = path.read_bytes()
    try:
        return decode_text(raw)
    except UnicodeDecodeError:
        if raw[:2] in _UTF_16 or b"\0" in raw:  # another encoding of two bytes for a letter
            raise
        try:
            text = raw.decode("cp1252")
        except UnicodeDecodeError:
            pass
        else:
            words = dict.fromkeys(each for each in re.findall(r"(?:\w|[^\x00-\x7f])+", text) if not each.isascii())
            told = listed([repr(word) for word in words])
            _log.warning("%s: not UTF-8, read as Windows-1252 (Latin-1); look whether these are right: %s", path, told)
            return text
        raise


def _tell_of_blanks(rows: list[list[str]], path: Path) -> None:
    """Report blanks around names and cells, which are removed: another program may take them for other names."""
    told = [repr(cell) for row in rows for cell in row if cell != cell.strip() and cell.strip()]
    if told:
        names = listed([*dict.fromkeys(told)])
        n = f"{len(told):,} {'cells' if len(told) > 1 else 'cell'}"
        _log.warning("%s: blanks at the ends of %s are removed: %s", path, n, names)


def _separator(text: str) -> tuple[str, str]:
    """(separator, text): the separator with which the header has a known column, else the most frequent one.

    A first line `sep=;`, as of Excel, gives the separator and is removed.
    """
    said = re.match(r'"?sep=([,;\t])"?[,;\t]*(?:\r\n|\r|\n)', text, re.IGNORECASE)
    if said:
        return said[1], text[said.end() :]
    start = text.lstrip("\r\n")
    headers: dict[str, Sequence[str]] = {}
    for separator in _SEPARATORS:
        try:
            headers[separator] = next(csv.reader(io.StringIO(start, newline=""), delimiter=separator, strict=True), [])
        except csv.Error:
            continue
    ours = {*_OURS, *_NAMES_A_FILE}
    best = max(headers, key=lambda each: sum(folded(name) in ours for name in headers[each]), default=",")
    if not any(folded(name) in ours for name in headers.get(best, [])):
        best = max(headers, key=lambda each: len(headers[each]), default=",")
    return best, text


def _read_parquet(path: Path, *, strip: bool = False) -> pa.Table:
    """`strip`: remove blanks around names and cells, for tables of users."""
    try:
        table = pq.read_table(path, partitioning=None, page_checksum_verification=True)
        if strip:
            table = table.rename_columns([name.strip() for name in table.column_names])
            index = [name for name in table.column_names if re.fullmatch(r"__index_level_\d+__", name)]
            if index:
                _log.warning("%s: pandas' index is left out; give it a name if it means something", path)
                table = table.drop_columns(index)
        _check_header(table.column_names, path)
        table = pa.table({name: _as_strings(table[name], strip=strip) for name in table.column_names})
        table.validate(full=True)  # for instance that strings are UTF-8, which a damaged file may violate
        return table
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} cannot be read as a Parquet table of plain columns: {error}") from None


def _as_strings(values: pa.ChunkedArray, *, strip: bool = False) -> pa.Array:
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    if pa.types.is_floating(values.type):  # pandas makes integers with missing values floats: 7.0 was 7
        return pa.array([_from_float(value) for value in values.to_pylist()], pa.string())
    texts = values.cast(pa.string()).combine_chunks()
    texts = pc.utf8_trim_whitespace(texts) if strip else texts
    return pc.if_else(pc.equal(texts, ""), pa.scalar(None, pa.string()), texts)


def _from_float(value: float | None) -> str | None:
    if value is None or value != value:
        return None
    return str(int(value)) if value.is_integer() else repr(value)


def _check_header(names: list[str], path: Path) -> None:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated or "" in names:
        raise BadInput(f"{path} has {'two columns ' + repr(repeated[0]) if repeated else 'a column without name'}")


def _check_path(path: str | None, row: int, source: str) -> str:
    """A relative path with `/` that stays below the root on every operating system."""
    if not path:
        raise BadInput(f"row {row:,} of {source} has an empty path")
    pieces = _INTO_ARCHIVE.split(path)
    # on Windows a backslash separates, too, and `C:` or a leading backslash leaves the root
    leaves = any(each.anchor or ".." in each.parts for each in map(PureWindowsPath, (path, *pieces[1:])))
    if PurePosixPath(path).is_absolute() or leaves or "\0" in path:
        raise BadInput(
            f"row {row:,} of {source}: path {path!r} does not lie below the images' root; "
            f"give paths relative to it (option --root)"
        )
    return "::".join(str(PurePosixPath(piece)) for piece in pieces)  # without `./`, as tar lists its members, and `//`


def _check_unique(ids: list[str], source: str) -> None:
    if len(set(ids)) == len(ids):
        return
    seen: set[str] = set()
    repeated = [value for value in ids if value in seen or seen.add(value)]  # type: ignore[func-returns-value]  # None, so false
    raise BadInput(
        f"{source} has {len(repeated):,} repeated image ids ({listed(sorted(set(repeated)))}); "
        f"give each row its own image_id"
    )
