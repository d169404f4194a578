"""The decoder rows of an SAE at unit norm: the directions of its latents. numpy only, no torch."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stores.errors import DamagedStore, SpecMismatch
from stores.spec import Header, check_latent, describe_difference, require_unchanged

from .weights_file import find_weights, open_tensors

_ROWS = 8192  # rows that are processed together


@dataclass(frozen=True, eq=False)
class Decoder:
    """The decoder directions of one SAE."""

    root: Path
    sae_sha256: str
    tokens: dict[str, Any]  # kind of the tokens it was trained on; a value None: not known (imported SAE)
    rows: npt.NDArray[np.float32]  # (L, D) of norm 1; a row that was zero stays zero
    has_direction: npt.NDArray[np.bool_]  # (L,): False where the row is zero
    seed: int | None  # of its initial weights; None: not known (imported SAE)
    header: Header

    @property
    def n_latents(self) -> int:
        """L."""
        return len(self.rows)

    def check_latent(self, latent: int) -> None:
        """Raise BadInput if there is no such latent."""
        check_latent(latent, self.n_latents, self.root)


def read_decoder(root: Path | str) -> Decoder:
    """The decoder of the finished SAE at `root`. Memory: its rows once.

    Raises
    ------
    StoreNotFound, IncompleteStore, SpecMismatch
        If there is no finished SAE of a version that this program reads.
    DamagedStore
        If the weights are missing, were changed, have other shapes, or are NaN or infinite.
    """
    root = Path(root)
    weights = find_weights(root)
    spec = weights.header.spec
    shape = (spec["n_latents"], spec["width"])
    with open_tensors(weights.path, "np") as file:
        found = file.get_slice("W_dec")
        if (tuple(found.get_shape()), found.get_dtype()) != (shape, "F32"):
            raise DamagedStore(
                f"{weights.path} holds W_dec {tuple(found.get_shape())} of {found.get_dtype()}, expected {shape} of F32"
            )
        rows = np.array(file.get_tensor("W_dec"))
    if not all(np.isfinite(part).all() for part in _parts(rows)):
        raise DamagedStore(f"{weights.path} holds weights that are NaN or infinite")
    seed = spec.get("config", {}).get("seed")
    require_unchanged(weights.header)
    return Decoder(root, weights.sha256, dict(spec["tokens"]), rows, _to_unit_norm(rows), seed, weights.header)


def require_comparable(a: Decoder, b: Decoder, *, assume_compatible: bool = False) -> list[str]:
    """Refuse to compare SAEs of different kinds of tokens; returns the properties that had to be assumed.

    Raises
    ------
    SpecMismatch
        If a property differs, or is not known and not to be assumed; the message names it.
    """
    names = [name for name in a.tokens if None in (a.tokens[name], b.tokens.get(name))]
    theirs, ours = ({name: value for name, value in each.tokens.items() if name not in names} for each in (a, b))
    if theirs != ours:
        raise SpecMismatch(
            f"{a.root} and {b.root} were not trained on the same kind of tokens: {describe_difference(theirs, ours)}. "
            f"Their directions cannot be compared; cyto sae info shows both"
        )
    if names and not assume_compatible:
        raise SpecMismatch(
            f"{a.root} or {b.root} does not say on which tokens it was trained ({', '.join(names)}); if they fit "
            f"(cyto sae info shows what an imported SAE claims), add --assume-compatible"
        )
    return names


def pair_cosines(
    a: npt.NDArray[np.float32], b: npt.NDArray[np.float32], of_a: npt.NDArray[Any], of_b: npt.NDArray[Any]
) -> npt.NDArray[np.float64]:
    """(n,) float64 cosines, in [-1, 1], of pairs of rows. The result does not depend on how pairs are batched.

    a, b : rows of norm 1, (L, D) with the same D
    of_a, of_b : (n,) row numbers
    """
    cosines = [
        np.einsum("nd,nd->n", a[of_a[at : at + _ROWS]].astype(np.float64), b[of_b[at : at + _ROWS]].astype(np.float64))
        for at in range(0, len(of_a), _ROWS)
    ]
    return np.clip(np.concatenate([np.empty(0), *cosines]), -1, 1)


def _to_unit_norm(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """Scale rows to norm 1 in place; returns which rows are not zero."""
    has_direction = []
    for part in _parts(rows):
        largest = np.abs(part).max(1, initial=0)
        has_direction.append(largest > 0)
        part /= np.where(largest > 0, largest, 1)[:, None]  # first, so that no square over- or underflows
        norms = np.sqrt(np.einsum("ld,ld->l", part, part, dtype=np.float64))
        part /= np.where(norms > 0, norms, 1)[:, None]
    return np.concatenate([np.empty(0, bool), *has_direction])


def _parts(rows: npt.NDArray[np.float32]) -> Iterator[npt.NDArray[np.float32]]:
    return (rows[at : at + _ROWS] for at in range(0, len(rows), _ROWS))
