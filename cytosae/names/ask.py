"""Ask a command of the user: a request on its stdin as JSON, an answer from its stdout as JSON.

The command may be anything: a local model, a client of a hosted one, a script that opens a window. It is run without a
shell unless that is asked for, in a session of its own, for a bounded time; its answer has a bounded size. Whatever
goes wrong with one call is one line, `NoAnswer`, and no reason to stop.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import IO, Any

from stores.errors import BadInput
from stores.files import parse_json

from .config import AskConfig

MOST_BYTES = 1 << 20  # of an answer
_MOST_SAID = 2_000  # bytes of stderr that are kept, the last ones
_SHOWN = 160  # letters of a reason
_PATIENCE = 2.0  # seconds for the ends of pipes after a command has ended
_INTERPRETERS = ("python", "python3", "bash", "sh", "node", "Rscript", "perl", "ruby", "env")


Function = Callable[[dict[str, Any]], dict[str, Any]]  # a request -> an answer, in a notebook


class NoAnswer(Exception):
    """One call gave no usable answer; the text says why, in one printable line."""


@dataclass
class Command:
    """A command that answers requests. Threads may share it."""

    line: str  # as the user typed it
    config: AskConfig
    words: list[str] = field(init=False)
    _running: set["subprocess.Popen[bytes]"] = field(default_factory=set, init=False)
    _is_stopped: bool = field(default=False, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def __post_init__(self) -> None:
        try:
            self.words = shlex.split(self.line)
        except ValueError as error:
            raise BadInput(f"the command {self.line!r:.80} cannot be split into words ({error}); quote it") from None
        if not self.words:
            raise BadInput("the command is empty; give a program that reads JSON on stdin and prints JSON")
        if not self.config.use_shell and shutil.which(self.words[0]) is None:
            raise BadInput(
                f"there is no program {self.words[0]!r}; give its path, or with --shell a line for the shell"
            )

    @property
    def name(self) -> str:
        """A short name for who answers, without options, which may hold a secret: the program's or the script's."""
        words = [*self.words]
        while len(words) > 1 and PurePath(words[0]).name in _INTERPRETERS and not words[1].startswith("-"):
            words.pop(0)
        return PurePath(words[0]).name

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The JSON object that the command answers.

        Raises
        ------
        NoAnswer
            If it ends with an error, is too slow, says too much, or what it says is no JSON object.
        BadInput
            If there is no such program.
        """
        process = self._start()
        said, complaint, is_too_long = bytearray(), bytearray(), threading.Event()
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        data = json.dumps(request, ensure_ascii=False).encode() + b"\n"
        threads = [
            threading.Thread(target=_write, args=(process.stdin, data), daemon=True),
            threading.Thread(target=self._read, args=(process, said, is_too_long), daemon=True),
            threading.Thread(target=_keep_end, args=(process.stderr, complaint), daemon=True),
        ]
        for thread in threads:
            thread.start()
        try:
            code = process.wait(self.config.timeout)
        except subprocess.TimeoutExpired:
            raise NoAnswer(f"no answer within {self.config.timeout:g} s") from None
        finally:
            _kill(process)  # also what it has started and left behind
            for thread in threads:
                thread.join(_PATIENCE)
            for pipe in (process.stdin, process.stdout, process.stderr):
                with suppress(OSError):
                    pipe.close() if not any(thread.is_alive() for thread in threads) else None
            with self._lock:
                self._running.discard(process)
        if is_too_long.is_set():
            raise NoAnswer(f"its answer is longer than {MOST_BYTES:,} bytes")
        if code != 0:
            last = (bytes(complaint).decode(errors="replace").strip().splitlines() or [""])[-1]
            raise NoAnswer(f"exit code {code}{': ' if last else ''}{reason_of(last)}")
        try:
            answer = parse_json(bytes(said).strip())
        except ValueError as error:
            raise NoAnswer(f"its answer is not JSON ({reason_of(str(error))})") from None
        if not isinstance(answer, dict):
            raise NoAnswer("its answer is not a JSON object")
        return answer

    def stop(self) -> None:
        """End all calls, and let none begin."""
        with self._lock:
            self._is_stopped = True
            running = [*self._running]
        for process in running:
            _kill(process)

    def _start(self) -> "subprocess.Popen[bytes]":
        with self._lock:
            if self._is_stopped:
                raise NoAnswer("stopped")
            try:
                process = subprocess.Popen(
                    self.line if self.config.use_shell else self.words,
                    shell=self.config.use_shell,
                    start_new_session=os.name == "posix",
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                )
            except OSError as error:
                raise BadInput(f"cannot start {self.words[0]!r}: {error.strerror or error}; give a program") from None
            self._running.add(process)
        return process

    def _read(self, process: "subprocess.Popen[bytes]", said: bytearray, is_too_long: threading.Event) -> None:
        assert process.stdout is not None
        with suppress(OSError, ValueError):  # the pipe was closed
            while piece := os.read(process.stdout.fileno(), 1 << 16):
                if len(said) + len(piece) > MOST_BYTES:
                    is_too_long.set()
                    _kill(process)
                    return
                said += piece


@dataclass(frozen=True)
class Called:
    """A function of Python that answers requests, as `Command` does."""

    function: Function

    @property
    def name(self) -> str:
        """The function's name."""
        return str(getattr(self.function, "__name__", type(self.function).__name__))

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """What the function returns.

        Raises
        ------
        NoAnswer
            If it raises, or returns something else than a dict.
        """
        try:
            answer = self.function(request)
        except Exception as error:  # the user's function may raise anything: one answer is lost, not the others
            raise NoAnswer(reason_of(f"{type(error).__name__}: {error}")) from error
        if not isinstance(answer, dict):
            raise NoAnswer(f"it returned {type(answer).__name__}, expected a dict")
        return answer

    def stop(self) -> None:
        """Nothing: a function ends by itself."""


Answerer = Command | Called


def answerer(given: str | Function, config: AskConfig) -> Answerer:
    """Who answers: a command line, or a function.

    Raises
    ------
    BadInput
        If there is no such program.
    """
    return Command(given, config) if isinstance(given, str) else Called(given)


def reason_of(text: str) -> str:
    """A text of others as one short printable line."""
    line = " ".join(text.split())
    line = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)
    return line if len(line) <= _SHOWN else f"{line[: _SHOWN - 1]}…"


def _write(pipe: IO[bytes], data: bytes) -> None:
    with suppress(OSError, ValueError):  # it does not read all: its own affair
        pipe.write(data)
        pipe.close()


def _keep_end(pipe: IO[bytes], kept: bytearray) -> None:
    with suppress(OSError, ValueError):
        while piece := os.read(pipe.fileno(), 1 << 16):
            kept += piece
            del kept[:-_MOST_SAID]


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """End the command and what it has started in its session."""
    with suppress(OSError):  # it is gone
        if os.name == "posix":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    with suppress(subprocess.TimeoutExpired):
        process.wait(_PATIENCE)
