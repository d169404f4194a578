"""Sections of a check: each is tried by itself, and the file is written after each, so that a time-out loses little."""

import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Sections:
    """Results by section, in `file`; a section that raises leaves its error there."""

    def __init__(self, file: Path, tidy: Callable[[], None] = lambda: None) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self._file, self._tidy, self._began = file, tidy, time.perf_counter()
        self._results: dict[str, Any] = {"seconds": {}}

    def run(self, name: str, job: Callable[[], Any]) -> None:
        """Call `job` and keep what it returns, or its error."""
        began = time.perf_counter()
        try:
            self._results[name] = job()
        except Exception as error:
            where = traceback.format_exc(limit=-4)[-1200:]
            self._results[name] = {"error": f"{type(error).__name__}: {error}"[:600], "where": where}
        self._tidy()
        self._results["seconds"][name] = round(time.perf_counter() - began, 2)
        self._file.write_text(json.dumps(self._results, indent=1, default=str))
        shown = json.dumps(self._results[name], default=str)[:1500]
        print(f"[{time.perf_counter() - self._began:6.1f} s] {name}: {shown}", flush=True)
