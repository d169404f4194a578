"""What a run has made, from what, with which settings: `stages.json`. By it the next run knows what is to be done.

It saves looking: a stage whose record is lost is asked again, and its store knows the answer. And it knows which
outputs a run has made: those it may replace when settings change, and what hands have made it may not.
Shards of a run share the file: what is written are the records of this process, put into what the others wrote.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stores.files import locked, read_json, sha256_file, sha256_json, write_json
from stores.spec import describe_difference, find_header

from .stages import Stage

FILE = "stages.json"
_FORMAT = {"format": "cyto run", "version": 1}
_PATIENCE = 30.0  # seconds that another shard's writing, of milliseconds, is waited for


@dataclass
class Journal:
    """The records of the stages, by their outputs, and which were left out."""

    path: Path
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)  # name of a stage -> what the data lack
    _own_stages: set[str] = field(default_factory=set)  # outputs whose records are this process's, not yet written
    _own_left_out: set[str] = field(default_factory=set)  # names likewise, also of those that are no longer left out

    @classmethod
    def read(cls, out: Path) -> "Journal":
        """The journal of a folder; an empty one where there is none, or none that can be read."""
        path = out / FILE
        try:
            raw = read_json(path)
        except (OSError, ValueError):
            return cls(path)
        if not isinstance(raw, dict) or {name: raw.get(name) for name in _FORMAT} != _FORMAT:
            return cls(path)
        stages, left_out = raw.get("stages"), raw.get("left_out")
        return cls(
            path,
            {name: each for name, each in stages.items() if isinstance(each, dict)} if isinstance(stages, dict) else {},
            {name: str(each) for name, each in left_out.items()} if isinstance(left_out, dict) else {},
        )

    def refresh(self) -> None:
        """Take what other shards have written; what this process has not written yet stays."""
        there = Journal.read(self.path.parent)
        self.stages = {**there.stages, **{out: self.stages[out] for out in self._own_stages}}
        kept = {name: reason for name, reason in there.left_out.items() if name not in self._own_left_out}
        self.left_out = {**kept, **{name: self.left_out[name] for name in self._own_left_out & self.left_out.keys()}}

    def write(self) -> None:
        """Put the new records into the file, atomically, and into it as it is now: other shards write it, too."""
        with _alone(self.path):
            self.refresh()
            write_json(self.path, {**_FORMAT, "stages": self.stages, "left_out": self.left_out})
        self._own_stages.clear()
        self._own_left_out.clear()

    def leave_out(self, stage: Stage, reason: str) -> None:
        """The data do not allow this stage."""
        self.left_out[stage.name] = reason
        self._own_left_out.add(stage.name)

    def record(self, stage: Stage, inputs: Mapping[str, str | None], made: str | None, *, seconds: float) -> None:
        """A stage is done, and so it is not left out."""
        self.left_out.pop(stage.name, None)
        self._own_left_out.add(stage.name)
        self._own_stages.add(stage.out)
        self.stages[stage.out] = {
            "name": stage.name,
            "settings": dict(stage.settings),
            "inputs": dict(inputs),
            "made": made,
            "seconds": round(seconds, 1),
        }

    def is_made(self, stage: Stage, there: str | None) -> bool:
        """Is the output as a run made it (or not complete: then nothing of worth is there)?"""
        return there is None or self.stages.get(stage.out, {}).get("made") == there

    def why_stale(self, stage: Stage, inputs: Mapping[str, str | None], there: str | None) -> str:
        """Why a stage is to be done, in words; empty: it is done.

        Parameters
        ----------
        inputs : what it reads -> its content now
        there : the content of its output now; None: nothing complete is there
        """
        known = self.stages.get(stage.out)
        if there is None:
            return "to do"
        if known is None:
            return "to be looked at: it was not made by cyto run"
        settings = known.get("settings")
        if settings != dict(stage.settings):
            words = describe_difference(settings if isinstance(settings, dict) else {}, dict(stage.settings))
            return f"again: {words}"
        if known.get("inputs") != dict(inputs):
            return "again: what it reads has changed"
        return "" if known.get("made") == there else "to be looked at: it has changed since"


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """No other process of this kind writes `path` meanwhile; after `_PATIENCE` it is written all the same."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        with locked(path.with_name(f".{path.name}.lock")) as is_held:
            if is_held or time.monotonic() > deadline:
                yield
                return
        time.sleep(0.02)


def content_of(place: Path) -> str | None:
    """What says whether the content of an output or input is the same; None: it is missing or not complete.

    Of a store or folder of results the hash of its header, which names the hashes of its content or decides it; of
    other files small ones' SHA-256, of large ones size and time.
    """
    if place.is_dir():
        header = find_header(place)
        if header is None or not header.complete:
            return None
        return sha256_json({"identity": header.identity, "summary": header.summary})
    if not place.is_file():
        return None
    state = place.stat()
    return sha256_file(place) if state.st_size < 1 << 22 else f"{state.st_size} {state.st_mtime_ns}"
