"""Progress lines, as a terminal and as a log get them."""

import io
import re

import pytest

from stores.console import progress_line


class Terminal(io.StringIO):
    """A stderr that is a terminal, or a log."""

    def __init__(self, *, is_terminal: bool) -> None:
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal

    def lines(self) -> list[str]:
        """What is to be seen in the end: what follows the last `clear this line` of each line."""
        return [line.rpartition("\x1b[2K")[2] for line in self.getvalue().split("\n")]


@pytest.mark.parametrize("is_terminal", [True, False], ids=["terminal", "log"])
def test_lines_of_jobs_that_follow_one_another_all_stay(is_terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where both are opened at once, as for reading and comparing masks; and no empty line is left."""
    stderr = Terminal(is_terminal=is_terminal)
    monkeypatch.setattr("sys.stderr", stderr)
    with progress_line("read", "mask") as read, progress_line("unused", "mask"), progress_line("masks", "step") as rank:
        read(0, 2, "")
        read(2, 2, "")
        rank(0, 3, "")
        rank(3, 3, "")
    with progress_line("next", "step") as after:
        after(1, 1, "")
    *shown, end = stderr.lines()
    assert end == ""
    jobs = [re.split(":", line)[0] for line in shown]
    assert jobs == (["read", "masks", "next"] if is_terminal else ["read", "read", "masks", "masks", "next"])


def test_an_error_begins_on_its_own_line(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = Terminal(is_terminal=True)
    monkeypatch.setattr("sys.stderr", stderr)

    def job() -> None:
        with progress_line("extract", "image") as progress:
            progress(1, 2, "")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        job()
    assert stderr.getvalue().endswith("\n")


def test_the_next_part_of_a_job_counts_from_its_own_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """967 images of a probe, then 63 of edits, on one line: no negative rate, nor a negative time that is left."""
    stderr = Terminal(is_terminal=False)
    monkeypatch.setattr("sys.stderr", stderr)
    now = 100.0
    monkeypatch.setattr("stores.console.time.monotonic", lambda: now)
    with progress_line("ablate", "image") as progress:
        progress(0, 967, "probe")
        now += 60
        progress(967, 967, "probe")
        now += 20
        progress(0, 63, "latents")
        now += 30
        progress(30, 63, "latents")
    *_, start, middle, end = stderr.lines()
    assert "0/63 [00:00<?" in start
    assert "30/63 [00:30<00:33,  1.00 images/s, latents]" in middle
    assert end == ""


def test_a_share_of_a_job_has_no_unit_and_no_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = Terminal(is_terminal=False)
    monkeypatch.setattr("sys.stderr", stderr)
    now = 100.0
    monkeypatch.setattr("stores.console.time.monotonic", lambda: now)
    with progress_line("run", None) as progress:
        progress(0, 1000, "")
        now += 30
        progress(250, 1000, "2 of 15 train")
    *_, middle, end = stderr.lines()
    assert re.fullmatch(r"run:  25%\|[^|]+\| \[00:30<01:30, 2 of 15 train\]", middle)
    assert end == ""
