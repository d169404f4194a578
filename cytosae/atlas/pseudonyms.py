"""What patients and images are called where no name may be shown; a secret key, kept beside the atlas, decides.

Numbers that follow the order of a table, or that a stated seed shuffles, tell who is who to anybody with the list of
names. So the order is that of the names' keyed hashes: with the key always the same, without it any. Files are written
in the order of the stores all the same, so none may tell when it was written.
"""

import csv
import hashlib
import hmac
import io
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from stores.errors import SpecMismatch
from stores.files import PARTIAL_SUFFIX, write_atomic

_HEAD = re.compile(rb"pseudonym,original\r\nkey,([0-9a-f]{64})\r\n")


@dataclass(frozen=True)
class Pseudonyms:
    """The key of an atlas's pseudonyms."""

    key: str  # 64 hex digits

    def order(self, names: Sequence[str]) -> npt.NDArray[np.int64]:
        """(n,) places of the names, in the order in which they are numbered."""
        hashes = [hmac.digest(self.key.encode(), name.encode("utf-8", "replace"), "sha256") for name in names]
        return np.array(sorted(range(len(names)), key=hashes.__getitem__), np.int64)

    @property
    def fingerprint(self) -> str:
        """What the atlas may state of the key."""
        return hashlib.sha256(self.key.encode()).hexdigest()


def pseudonyms_file(site: Path) -> Path:
    """Who is who in the atlas at `site`: beside it, never in it."""
    return site.absolute().with_name(f"{site.absolute().name}.pseudonyms.csv")


def read_pseudonyms(path: Path) -> Pseudonyms:
    """Those of an earlier build; new ones where there is no such file.

    Raises
    ------
    SpecMismatch
        If the file is something else, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            found = _HEAD.match(file.read(200))
    except FileNotFoundError:
        return Pseudonyms(secrets.token_hex(32))
    except OSError:
        found = None
    if found is None:
        raise SpecMismatch(f"{path} is in the way of who is who, and not ours; move it")
    return Pseudonyms(found[1].decode())


def write_pseudonyms(path: Path, pseudonyms: Pseudonyms, rows: Iterable[tuple[str, str]]) -> None:
    """Write the key and (pseudonym, original) of everybody, as CSV that a spreadsheet does not execute."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerows([("pseudonym", "original"), ("key", pseudonyms.key)])
    writer.writerows((shown, f"'{real}" if real[:1] in "=+-@\t\r" else real) for shown, real in rows)
    write_atomic(path, text.getvalue().encode())
    path.chmod(0o600)  # for who made the atlas alone


def hide_order(site: Path, time_ns: int) -> None:
    """Take from the files of a site what tells in which order they were written, and an archive or a copy would keep.

    Each gets the time `time_ns`, and enters a new folder, by name: many file systems list a folder by order of entry.
    The time of change, which nobody can set, follows the names as well.
    """
    old = site / f"unsorted{PARTIAL_SUFFIX}"
    if old.exists():  # left by a build that was cut here
        shutil.rmtree(old)
    for path in sorted(site.iterdir()):
        if path.is_dir():
            path.rename(old)
            path.mkdir()
            for file in sorted(old.iterdir()):
                os.utime(file.rename(path / file.name), ns=(time_ns, time_ns))
            old.rmdir()
        else:
            os.utime(path, ns=(time_ns, time_ns))
