"""The image table: one row per image, what it is, whose it is, and whether it could be read.

The first seven columns are the manifest; extra columns of the user's manifest travel along as strings. The last
three are the outcome of reading the file. A row's position is its `image_index`, in every store.
"""

import csv
import io
from pathlib import Path, PurePosixPath, PureWindowsPath

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .errors import BadInput
from .files import sha256_json, write_atomic

MANIFEST_COLUMNS = ("image_id", "path", "label", "label_common", "patient", "disease", "dataset")
OUTCOME_COLUMNS = ("content_hash", "status", "error")
STATUS_OK, STATUS_UNREADABLE = "ok", "unreadable"
_FORMULA_SIGNS = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")  # full-width ones too
_BREAKS = ("\t", "\r", "\n")


def read_table_file(path: Path) -> pa.Table:
    """A user's CSV or Parquet table, every column as strings; empty cells and NaN become null.

    Raises
    ------
    BadInput
        If the file is missing, of another format, or a CSV line has a wrong number of fields.
    """
    if not path.is_file():
        raise BadInput(f"no table at {path}: expected a .csv or .parquet file")
    if path.suffix.lower() == ".csv":
        return _read_csv(path)
    if path.suffix.lower() == ".parquet":
        return _read_parquet(path)
    raise BadInput(f"{path} is neither .csv nor .parquet; convert it to one of them")


def image_table(columns: dict[str, list[str | None]], *, source: str, dataset: str) -> pa.Table:
    """A checked manifest: the seven columns in order, then the user's extra ones; outcome columns are dropped.

    Where `dataset` is empty it becomes the argument `dataset`, an empty `image_id` becomes `dataset/path`.

    Parameters
    ----------
    columns : at least `path`: relative to the images' root, `/` between folders
    source : what to call this table in an error

    Raises
    ------
    BadInput
        Without `path`, without rows, or with an empty or escaping path or a repeated `image_id`.
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
    extra = {name: columns[name] for name in columns if name not in known and name not in OUTCOME_COLUMNS}
    is_ours = {*OUTCOME_COLUMNS} <= {*columns}  # the image table of a cache, given as a manifest
    for name in columns:
        if name in OUTCOME_COLUMNS and not is_ours:
            raise BadInput(f"{source} has a column {name!r}, which is ours to write; rename it")
        if "/" in name or "\0" in name or name in (".", "..", "_index"):
            raise BadInput(f"{source} has a column {name!r}, a name that AnnData cannot store; rename it")
    return pa.table({name: pa.array(values, pa.string()) for name, values in {**known, **extra}.items()})


def with_outcome(table: pa.Table, content_hash: list[str | None], errors: list[str | None]) -> pa.Table:
    """The manifest with its outcome columns: `status` is `ok` where `errors` is None, else `unreadable`."""
    table = without_outcome(table)
    status = [STATUS_OK if error is None else STATUS_UNREADABLE for error in errors]
    for name, values in zip(OUTCOME_COLUMNS, (content_hash, status, errors), strict=True):
        table = table.append_column(name, pa.array(values, pa.string()))
    return table


def without_outcome(table: pa.Table) -> pa.Table:
    """The manifest of an image table: what is hashed into a cache's identity."""
    return table.select([name for name in table.column_names if name not in OUTCOME_COLUMNS])


def write_image_table(table: pa.Table, path: Path) -> None:
    """Write an image table as Parquet, atomically."""
    write_atomic(path, parquet_bytes(table))


def parquet_bytes(table: pa.Table) -> memoryview:
    """A table as the content of a Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return memoryview(sink.getvalue())


def csv_bytes(table: pa.Table) -> bytes:
    """A table as the content of a CSV file that a spreadsheet may open: no text in it is taken for a formula.

    A text that begins with one of `= + - @` (blanks before it aside), a tab or a line break gets an apostrophe first.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow([_not_a_formula(name) for name in table.column_names])
    for row in zip(*(table[name].to_pylist() for name in table.column_names), strict=True):
        writer.writerow([_not_a_formula(cell) for cell in row])
    return text.getvalue().encode("utf-8-sig")  # -sig: else Excel takes UTF-8 for something else


def _not_a_formula(cell: object) -> object:
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
    return sha256_json([[name, table[name].to_pylist()] for name in table.column_names])


def column(table: pa.Table, name: str) -> list[str | None]:
    """One column as Python strings; all None where the table does not have it."""
    return table[name].to_pylist() if name in table.column_names else [None] * table.num_rows


def readable(table: pa.Table) -> list[bool]:
    """Per row: was the image read? False as long as the outcome is unknown."""
    return [status == STATUS_OK for status in column(table, "status")]


def listed(items: list[str], limit: int = 3) -> str:
    """`a, b, c and 4 more`: a list in an error message."""
    more = f" and {len(items) - limit:,} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def _read_csv(path: Path) -> pa.Table:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # -sig: Excel writes a byte order mark
            rows = list(csv.reader(file, strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"{path} cannot be read as a UTF-8 CSV file: {error}") from None
    if not rows:
        raise BadInput(f"{path} is empty; expected a header line with a column 'path'")
    header = [name.strip() for name in rows[0]]
    _check_header(header, path)
    body = [(number, row) for number, row in enumerate(rows[1:], start=2) if row]
    for number, row in body:
        if len(row) != len(header):
            raise BadInput(f"row {number} of {path} has {len(row)} fields, the header has {len(header)}")
    values = {name: [row[i].strip() or None for _, row in body] for i, name in enumerate(header)}
    return pa.table({name: pa.array(cells, pa.string()) for name, cells in values.items()})


def _read_parquet(path: Path) -> pa.Table:
    try:
        table = pq.read_table(path, partitioning=None)
        _check_header(table.column_names, path)
        table = pa.table({name: _as_strings(table[name]) for name in table.column_names})
        table.validate(full=True)  # that texts are UTF-8, for one: a damaged file may hold anything
        return table
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} cannot be read as a Parquet table of plain columns: {error}") from None


def _as_strings(values: pa.ChunkedArray) -> pa.Array:
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    if pa.types.is_floating(values.type):  # pandas turns whole numbers with gaps into floats: 7.0 was 7
        return pa.array([_from_float(value) for value in values.to_pylist()], pa.string())
    texts = values.cast(pa.string()).combine_chunks()
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
    """A relative path with `/`, that stays below the root whatever the system that reads it."""
    if not path:
        raise BadInput(f"row {row:,} of {source} has an empty path")
    posix, windows = PurePosixPath(path), PureWindowsPath(path)
    # for Windows a backslash separates too, and `C:` or a leading backslash leaves the root
    if posix.is_absolute() or windows.anchor or ".." in windows.parts or "\0" in path:
        raise BadInput(
            f"row {row:,} of {source}: path {path!r} does not lie below the images' root; "
            f"give paths relative to it (option --root)"
        )
    return str(posix)


def _check_unique(ids: list[str], source: str) -> None:
    if len(set(ids)) == len(ids):
        return
    seen: set[str] = set()
    repeated = [value for value in ids if value in seen or seen.add(value)]  # type: ignore[func-returns-value]  # None, so false
    raise BadInput(
        f"{source} has {len(repeated):,} repeated image ids ({listed(sorted(set(repeated)))}); "
        f"give each row its own image_id"
    )
