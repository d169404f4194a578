"""What test_shards.py and other tests share."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

KILLED = 9


# before any of these calls a process may die
CALLS = ("fsync", "replace", "rename", "link", "unlink", "mkdir")


def forked(job: Callable[[], object]) -> int:
    """Run `job` in a copy of this process; its process id. The exit code is 0, `KILLED` or 1."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            job()
            code = 0
        finally:
            os._exit(code)
    return process


def exit_code(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def die_at(n_calls: int) -> None:
    """From now on, this process ends at once before one of its calls. Its last journal line may be torn."""
    n_left = n_calls

    def dying(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal n_left
            n_left -= 1
            if n_left < 0:
                if name == "fsync" and (file := Path(f"/proc/self/fd/{args[0]}").readlink()).suffix == ".jsonl":
                    os.truncate(file, max(0, file.stat().st_size - 7))
                os._exit(KILLED)
            return real(*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, dying(name))
