"""Pseudonyms of patients and images, from a secret key that is kept beside the atlas.

Numbers in the order of a table, or shuffled with a published seed, could be reversed by anybody who has the list of
names. So the order is that of keyed hashes (HMAC-SHA256) of the names: fixed for a given key, unpredictable without
it. Files are written in the order of the stores, so their times must not reveal it (`hide_order`).
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
from stores.tables import not_a_formula

_HEAD = re.compile(rb"pseudonym,original\r\nkey,([0-9a-f]{64})\r\n")


@dataclass(frozen=True)
class Pseudonyms:
    """The key of an atlas's pseudonyms."""

    key: str  # 64 hex digits

    def order(self, names: Sequence[str]) -> npt.NDArray[np.int64]:
        """(n,) indices of the names, in the order of their pseudonyms."""
        hashes = [hmac.digest(self.key.encode(), name.encode("utf-8", "replace"), "sha256") for name in names]
        return np.array(sorted(range(len(names)), key=hashes.__getitem__), np.int64)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the key, which the atlas records."""
        return hashlib.sha256(self.key.encode()).hexdigest()


def pseudonyms_file(site: Path) -> Path:
    """The file that maps pseudonyms to names: beside the atlas at `site`, never in it."""
    return site.absolute().with_name(f"{site.absolute().name}.pseudonyms.csv")


def read_pseudonyms(path: Path) -> Pseudonyms:
    """The pseudonyms of an earlier build, or new ones if there is no such file.

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
    """Write the key and all (pseudonym, original) pairs as CSV; no cell is taken for a formula by a spreadsheet."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerows([("pseudonym", "original"), ("key", pseudonyms.key)])
    writer.writerows((shown, not_a_formula(real)) for shown, real in rows)
    write_atomic(path, text.getvalue().encode())
    path.chmod(0o600)  # readable by the owner only


def hide_order(site: Path, time_ns: int) -> None:
    """Remove what reveals the order in which the files of a site were written, also from copies and archives of it.

    All files get the modification time `time_ns` and are moved to a new folder in the order of their names, since many
    file systems list a folder in order of creation. Inode change times, which cannot be set, then follow the names.
    """
    old = site / f"unsorted{PARTIAL_SUFFIX}"
    if old.exists():  # left by an interrupted build
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
