"""The results of a sweep: `sweep.json`, one row per SAE, and means over seeds as in the paper's tables.

The metrics of a finished SAE come from its own `sae.json`; `sweep.json` has only what is not there (failures, times).
"""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from stores.errors import DamagedStore, SpecMismatch
from stores.files import is_dropping, sha256_file, sha256_json, write_atomic, write_json
from stores.spec import cyto_version, describe_difference, find_header, read_object
from stores.tables import listed, parquet_bytes
from stores.verify_any import sweep_sha256

from .grid import setting_text
from .recommend import recommendation, table_line

Row = dict[str, Any]
FORMAT, VERSION = "sweep", 1
RESULTS = ("members.parquet", "table.parquet", "table.md", "sweep.png", "sweep.svg")
_OF_TRAINING = (  # of the columns of metrics.parquet: `_metrics_row` of training/train.py
    *("loss", "mse", "l1", "gate", "dead_loss", "l0", "explained_variance", "explained_variance_uncentered"),
    "dead_fraction",
)
_HELD_OUT = ("mse", "explained_variance", "explained_variance_uncentered", "l0", "n_meaningful")
# with a prefix, since `l1` and `loss` are also settings
METRICS = (*(f"final_{name}" for name in _OF_TRAINING), *(f"held_out_{name}" for name in _HELD_OUT), "seconds")


@dataclass
class Record:
    """What `sweep.json` says of one member of a sweep."""

    name: str  # name of its folder in `runs/`
    caches: str  # name of the group of caches that it is trained on
    settings: dict[str, Any]  # the settings that vary
    identity: str  # SHA-256 of data and settings, as in its `sae.json`
    status: str = "unfinished"  # "unfinished", "complete" or "failed"
    failed_at_step: int | None = None
    message: str | None = None
    seconds: float = 0.0  # time of its own steps, without reading and without other members


class SweepFolder:
    """The folder of a sweep, and the records of its members."""

    def __init__(self, root: Path, spec: dict[str, Any], grid: dict[str, Any], records: list[Record]) -> None:
        """Read `sweep.json` if it exists; nothing is written.

        Raises
        ------
        SpecMismatch
            If `root` holds something else, or a sweep of other SAEs.
        DamagedStore
            If `sweep.json` was changed by hand.
        """
        self.root, self.records = root, {record.name: record for record in records}
        self._spec, self._grid = spec, grid
        self.is_complete, self.is_whole = False, False  # whole: its tables and figures are what was written
        self._claim()
        for record in records:  # its own header tells whether a run is finished
            header = find_header(self.folder(record)) if record.status == "unfinished" else None
            if header is not None and header.complete and header.identity == record.identity:
                record.status = "complete"

    def folder(self, record: Record) -> Path:
        """The folder of a member's run."""
        return self.root / "runs" / record.name

    def _claim(self) -> None:
        for folder in (self.root, *self.root.absolute().parents):
            found = find_header(folder)
            if found is not None:
                raise SpecMismatch(f"{self.root} is or lies inside another artefact ({folder}); choose another output")
        known = read_object(self.root / "sweep.json")
        if known.get("format") == FORMAT:
            self._continue(known)
        elif self.root.exists() and not (self.root.is_dir() and _is_free(self.root)):
            raise SpecMismatch(f"{self.root} holds something else; give an empty or new folder with -o")

    def _continue(self, known: Row) -> None:
        if known.get("format_version") != VERSION:
            raise SpecMismatch(f"{self.root} was written by another version of cyto; choose another -o")
        if known.get("identity") != sha256_json(self._spec):
            spec = known.get("spec")
            difference = describe_difference(spec if isinstance(spec, dict) else {}, self._spec)
            raise SpecMismatch(
                f"{self.root} holds a sweep of other settings or caches ({difference}); choose another -o"
            )
        if known.get("sha256", sweep_sha256(known)) != sweep_sha256(known):
            raise DamagedStore(f"{self.root}/sweep.json was changed by hand, or is damaged. Choose another -o")
        files = known.get("files")
        self.is_complete = known.get("complete") is True
        self.is_whole = _are_whole(self.root, files)
        try:
            for entry in known["members"]:
                record = self.records[entry["name"]]
                record.seconds = float(entry["seconds"])
                if entry["status"] == "failed":
                    record.status, record.failed_at_step, record.message = (
                        "failed",
                        int(entry["failed_at_step"]),
                        str(entry["message"]),
                    )
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedStore(
                f"{self.root}/sweep.json was changed by hand: its members cannot be read ({error!r}). Choose another -o"
            ) from None

    def save(self, *, complete: bool = False) -> None:
        """Write `sweep.json`."""
        self.root.mkdir(parents=True, exist_ok=True)
        content = {
            "format": FORMAT,
            "format_version": VERSION,
            "identity": sha256_json(self._spec),
            "complete": complete,
            "created_by": f"cyto {cyto_version()}",
            "spec": self._spec,
            "grid": self._grid,
            "members": [{**asdict(record), "folder": f"runs/{record.name}"} for record in self.records.values()],
        }
        if complete:
            content["files"] = {name: sha256_file(self.root / name) for name in RESULTS}
        write_json(self.root / "sweep.json", {**content, "sha256": sweep_sha256(content)})
        self.is_complete = complete

    def rows(self) -> list[Row]:
        """One row per member: the settings that vary, its status, and its metrics (None if it is not finished)."""
        return [self._row(record) for record in self.records.values()]

    def _row(self, record: Record) -> Row:
        header = find_header(self.folder(record)) if record.status == "complete" else None
        summary = (header.summary if header else None) or {}
        final, held_out = summary.get("final") or {}, summary.get("held_out") or {}
        return {
            "name": record.name,
            "caches": record.caches,
            **record.settings,
            "status": record.status,
            "failed_at_step": record.failed_at_step,
            "message": record.message,
            "n_latents": header.spec["n_latents"] if header else None,
            "width": header.spec["width"] if header else None,
            "final_step": summary.get("steps"),
            "final_tokens": summary.get("tokens"),
            **{f"final_{name}": final.get(name) for name in _OF_TRAINING},
            **{f"held_out_{name}": held_out.get(name) for name in _HELD_OUT},
            "seconds": record.seconds,
            "folder": f"runs/{record.name}",
            "identity": record.identity,
        }

    def tables(self, varied: Sequence[str]) -> tuple[list[Row], list[Row], str]:
        """Rows of members.parquet, rows of table.parquet, and the text of table.md."""
        members = self.rows()
        table = means_over_seeds(members, varied)
        return members, table, as_markdown(table, varied) + recommendation(table, varied)

    def write_tables(self, varied: Sequence[str]) -> tuple[list[Row], list[Row], str]:
        """Write members.parquet, table.parquet and table.md; returns the same as `tables`."""
        members, table, text = self.tables(varied)
        write_atomic(self.root / "members.parquet", parquet_bytes(_arrow(members)))
        write_atomic(self.root / "table.parquet", parquet_bytes(_arrow(table)))
        write_atomic(self.root / "table.md", text.encode())
        return members, table, text


def means_over_seeds(members: Sequence[Row], varied: Sequence[str]) -> list[Row]:
    """One row per group of caches and combination of settings except `seed`, in the order of the members.

    `n` is the number of finished SAEs; each metric has a mean (`_mean`) and a standard deviation (`_sd`, divided by
    n - 1; None if n < 2) over them.
    """
    names = [name for name in varied if name != "seed"]
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for member in members:
        groups.setdefault((member["caches"], *(member[name] for name in names)), []).append(member)
    table = []
    for key, group in groups.items():
        done = [member for member in group if member["status"] == "complete"]
        failed = [member for member in group if member["status"] == "failed"]
        row: Row = dict(zip(["caches", *names], key, strict=True))
        row |= {"n": len(done), "n_failed": len(failed), "n_unfinished": len(group) - len(done) - len(failed)}
        row |= {name: next((member.get(name) for member in done), None) for name in ("width", "n_latents")}
        row["failures"] = f"failed at step {listed([_failure(member) for member in failed])}" if failed else None
        for metric in METRICS:
            values = [float(member[metric]) for member in done if member[metric] is not None]
            row[f"{metric}_mean"] = statistics.fmean(values) if values else None
            row[f"{metric}_sd"] = statistics.stdev(values) if len(values) > 1 else None
        table.append(row)
    return table


def metric_prefix(table: Sequence[Row]) -> str:
    """The prefix of the metrics to show: `held_out_` if every row with a finished SAE has them, else `final_`."""
    finished = [row for row in table if row["n"]]
    is_held_out = bool(finished) and all(row["held_out_l0_mean"] is not None for row in finished)
    return "held_out_" if is_held_out else "final_"


def as_markdown(table: Sequence[Row], varied: Sequence[str]) -> str:
    """The table of means in Markdown, with an explanation of its numbers above it."""
    settings = [name for name in varied if name != "seed"]
    if len({row["caches"] for row in table}) > 1:
        settings = ["caches", *settings]
    prefix = metric_prefix(table)
    columns = {
        "explained variance": (f"{prefix}explained_variance", ".3f"),
        "L0": (f"{prefix}l0", ",.1f"),
        "MSE": (f"{prefix}mse", ".4g"),
        "dead share": ("final_dead_fraction", ".2f"),
        **({"latents >= 10^-3": ("held_out_n_meaningful", ",.0f")} if prefix == "held_out_" else {}),
    }
    lines = [
        "Mean ± standard deviation (n - 1) over seeds. Explained variance (centred), L0 and MSE on "
        + ("the held-out images" if prefix == "held_out_" else "the last batch of training")
        + "; dead share: latents that were silent in the last steps of training"
        + (
            "; latents >= 10^-3: those with such a mean activation on the held-out images"
            if prefix == "held_out_"
            else ""
        )
        + ".",
        "",
        table_line([*settings, "SAEs", *columns, "failed"]),
        table_line(["---"] * len(settings) + ["---:"] * (1 + len(columns)) + ["---"]),
    ]
    for row in table:
        n_all = row["n"] + row["n_failed"] + row["n_unfinished"]
        count = str(row["n"]) if row["n"] == n_all else f"{row['n']} of {n_all}"
        numbers = [_with_sd(row[f"{name}_mean"], row[f"{name}_sd"], form) for name, form in columns.values()]
        lines.append(
            table_line([*(setting_text(row[name]) for name in settings), count, *numbers, row["failures"] or ""])
        )
    return "\n".join(lines) + "\n"


def _failure(member: Row) -> str:
    return f"{member['failed_at_step']:,}" + (f" (seed {member['seed']})" if "seed" in member else "")


def _with_sd(mean: float | None, sd: float | None, form: str) -> str:
    if mean is None:
        return "n/a"
    return f"{mean:{form}}" + ("" if sd is None else f" ± {sd:{form}}")


def _arrow(rows: Sequence[Row]) -> pa.Table:
    """Columns of numbers or text; tuples (the shares of a mix) become text."""
    columns = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if any(isinstance(value, tuple | list) for value in values) or (
            name in _MAY_BE_AUTO and any(isinstance(value, str) for value in values)
        ):
            values = [setting_text(value) for value in values]
        is_number = name in METRICS or name.endswith(("_mean", "_sd"))
        columns[name] = pa.array(values, _KINDS.get(name) or (pa.float64() if is_number else None))
    return pa.table(columns)


_MAY_BE_AUTO = ("expansion", "tokens", "target_l0")  # settings that are a number, or the word auto
_KINDS = {
    **{name: pa.int64() for name in ("failed_at_step", "n_latents", "width", "final_step", "final_tokens")},
    **{name: pa.string() for name in ("message", "failures")},
}


def _are_whole(root: Path, files: Any) -> bool:
    """Are tables and figures what was written? If not, they are made again: all that they need is in the SAEs."""
    known = dict.fromkeys(RESULTS) if not isinstance(files, dict) else {**dict.fromkeys(RESULTS, ""), **files}
    return all((root / name).is_file() and sha in (None, sha256_file(root / name)) for name, sha in known.items())


def _is_free(folder: Path) -> bool:
    """True if the folder is empty, except for temporary files of a killed process."""
    return all(path.name.startswith("sweep.json.") or is_dropping(path.name) for path in folder.iterdir())
