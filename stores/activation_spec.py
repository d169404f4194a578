"""The settings of an activation cache and the names of its files: what its reader, its writer and its checks share.

Format "activation cache", version 1: docs/formats.md.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .checksum import CRC_BYTES
from .errors import DamagedStore, SpecMismatch
from .files import read_lines
from .spec import Header, describe_difference, stated
from .token_layout import TokenLayout, read_layout

Float16 = npt.NDArray[np.float16]
SAME_TOKENS = ("backbone", "weights_sha256", "block", "transform", "token_layout", "tokens_per_image", "width")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ActivationSpec:
    """All settings that decide the numbers in a cache; its identity is their hash. See also `same_tokens`."""

    backbone: str
    weights_sha256: str
    trained: bool  # False: seeded random weights, which every output says
    block: int  # index from 0 of the transformer block whose output is stored
    n_blocks: int  # of the backbone
    transform: dict[str, Any]  # from pixels to the backbone's input
    precision: str  # of the forward pass: fp32, bf16, fp16
    token_layout: str  # order of the tokens of an image
    n_images: int
    tokens_per_image: int
    width: int
    chunk_images: int
    manifest_sha256: str  # of the manifest columns of the image table
    allow_truncated: bool = False  # are images taken that are cut off?

    def to_dict(self) -> dict[str, Any]:
        """The spec as plain JSON values; without settings that older versions do not know, unless they are used."""
        return {name: value for name, value in vars(self).items() if name != "allow_truncated" or value}

    @property
    def same_tokens(self) -> dict[str, Any]:
        """The settings that must be equal for an SAE of one cache to fit another (docs/reference/design.md 4)."""
        return {name: getattr(self, name) for name in SAME_TOKENS}

    @property
    def layout(self) -> TokenLayout:
        """Which token is what, by `token_layout`. Raises DamagedStore if that does not fit `tokens_per_image`."""
        return read_layout(self.token_layout, self.tokens_per_image, f"a cache of {self.backbone}")

    @property
    def n_chunks(self) -> int:
        """Number of chunk files, the short last one included."""
        return -(-self.n_images // self.chunk_images)

    @property
    def image_bytes(self) -> int:
        """Size of the tokens of an image."""
        return self.tokens_per_image * self.width * 2

    @property
    def chunk_bytes(self) -> int:
        """Size of every chunk file, the padded last one included, with the checksum."""
        return self.chunk_images * self.image_bytes + CRC_BYTES

    def chunk_rows(self, chunk: int) -> range:
        """The image indices that chunk `chunk` holds."""
        return range(chunk * self.chunk_images, min((chunk + 1) * self.chunk_images, self.n_images))


def read_spec(header: Header, root: Path) -> ActivationSpec:
    """The spec in a header. Raises DamagedStore if it has other fields, or impossible sizes."""
    return stated(ActivationSpec, header.spec, root, positive=("n_images", "tokens_per_image", "width", "chunk_images"))


def require_same_tokens(
    first: dict[str, Any],
    second: dict[str, Any],
    first_name: str,
    second_name: str,
    *,
    assume_compatible: bool = False,
) -> list[str]:
    """Refuse to mix two kinds of tokens (`ActivationSpec.same_tokens` of each); returns the names of assumed settings.

    The first may be an imported SAE, of which some settings are unknown (None). With `assume_compatible` these are
    assumed to be equal, with a warning that names them; known settings must be equal in any case.

    Raises
    ------
    SpecMismatch
        If settings differ or are unknown; the message names them.
    """
    unknown = [name for name, value in first.items() if value is None]
    known, held = ({name: spec[name] for name in spec if name not in unknown} for spec in (first, second))
    if known != held:
        raise SpecMismatch(
            f"{first_name} and {second_name} do not hold the same kind of tokens: {describe_difference(known, held)}. "
            f"Compare: cyto sae info, cyto cache info"
        )
    if unknown:
        tokens = f"{second_name} holds tokens of {second['backbone']}, block {second['block']}"
        if not assume_compatible:
            raise SpecMismatch(
                f"{first_name} does not say on which tokens it was trained ({', '.join(unknown)}), and {tokens}; "
                f"if they fit (cyto sae info shows what it claims), add --assume-compatible"
            )
        _log.warning("%s does not say %s; %s, assumed to fit", first_name, ", ".join(unknown), tokens)
    return unknown


def journals_of(root: Path) -> list[Path]:
    """The existing journals of a cache: first that of the finished cache, then those of its writers (newer)."""
    return sorted(root.glob("journal*.jsonl"), key=lambda path: (path.name != "journal.jsonl", path.name))


def records_of(root: Path, *, skip_damaged: bool = False) -> list[dict[str, Any]]:
    """All journal records of a cache, complete or not; a chunk may have several while it is written.

    Raises
    ------
    DamagedStore
        If a line is not a record (and not `skip_damaged`).
    """
    return [record for path in journals_of(root) for record in read_lines(path, skip_damaged=skip_damaged)]


def chunks_written(root: Path, spec: ActivationSpec) -> list[int]:
    """The written chunks of a cache, complete or not, by its journals; damaged lines are skipped."""
    named = [record.get("chunk") for record in records_of(root, skip_damaged=True) if record.get("crc32c")]
    return sorted({chunk for chunk in named if isinstance(chunk, int) and 0 <= chunk < spec.n_chunks})


def chunk_path(root: Path, chunk: int) -> Path:
    """The file of chunk `chunk` (Zarr's default chunk key, split on axis 0 only)."""
    return root / "tokens" / "c" / str(chunk) / "0" / "0"


def file_crc(path: Path, size: int) -> str:
    """The checksum at the end of a chunk file (hex), after a check of presence and size.

    Raises
    ------
    DamagedStore
        If the file is missing or its size is not `size`.
    """
    try:
        found = path.stat().st_size
        if found == size:
            with path.open("rb") as file:
                file.seek(size - CRC_BYTES)
                return f"{int.from_bytes(file.read(CRC_BYTES), 'little'):08x}"
    except FileNotFoundError:
        raise DamagedStore(f"{path} is missing. cyto cache verify lists every bad chunk") from None
    raise DamagedStore(f"{path} has {found:,} bytes, expected {size:,}. cyto cache verify lists every bad chunk")
