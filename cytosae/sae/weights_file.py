"""The weights file of a finished SAE: is it there, whole, and the one that was written? No torch here.

`checkpoint.py` loads all of it for torch, `decoder.py` the decoder's rows for numpy.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from stores.errors import DamagedStore
from stores.files import sha256_file
from stores.spec import SAE, Header, read_header, require_unchanged

WEIGHTS = "sae.safetensors"


@dataclass(frozen=True)
class SaeFile:
    """The weights file of a finished SAE, its header, and the SHA-256 of the file, which is the header's."""

    path: Path
    header: Header
    sha256: str


def find_weights(root: Path) -> SaeFile:
    """The weights file of the finished SAE at `root`, its bytes checked against the header.

    Raises
    ------
    StoreNotFound, IncompleteStore, SpecMismatch
        If there is no finished SAE of a version that this program reads.
    DamagedStore
        If the file is missing or was changed.
    """
    header = read_header(root, SAE)
    path = root / WEIGHTS
    if not path.is_file():
        require_unchanged(header)  # perhaps that is the reason
        again = (
            "import it again with cyto sae import" if "imported" in header.spec else f"train again with {SAE.command}"
        )
        raise DamagedStore(f"{path} is missing; {again} --overwrite")
    sha256 = sha256_file(path)
    if sha256 != (header.summary or {}).get("sae_sha256"):
        require_unchanged(header)
        raise DamagedStore(f"{path} was changed: its SHA-256 is not the one in sae.json")
    return SaeFile(path, header, sha256)


@contextmanager
def open_tensors(path: Path, framework: str) -> Iterator[Any]:
    """A safetensors file as tensors of a framework, "np" or "pt"; nothing in it is executed.

    Raises
    ------
    DamagedStore
        If it is not a whole safetensors file, also where that shows only while it is read.
    """
    try:
        with safe_open(path, framework=framework) as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise DamagedStore(f"{path} is not a whole safetensors file ({error})") from None
