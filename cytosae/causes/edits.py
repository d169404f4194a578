"""The arithmetic of an edit: what is added to the tokens of an image when its latents are changed.

With latents z and decoder W the SAE says x = b_dec + z W + e, where e is its own error. After a change of z to z' the
tokens are b_dec + z' W + e = x + (z' - z) W: the error is added back, so only the change itself is seen. That product
is what is computed here; the twin in the tests decodes twice.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stores.csr import CsrRows

from .config import AblateConfig
from .places import Bools, Ints
from .plan import CHOSEN, CONTROL, DIRECTION, KEEP, ORDERS
from .survey import tokens_of

Rows32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Subject:
    """The latents of one image."""

    rows: CsrRows
    mask: Bools  # (T,) tokens that may be edited
    tokens: Ints  # (nnz,) the token of each nonzero
    may_edit: Bools  # (nnz,)

    @classmethod
    def of(cls, rows: CsrRows, mask: Bools) -> "Subject":
        """The latents of an image, `rows` one per token."""
        tokens = tokens_of(rows)
        return cls(rows, mask, tokens, mask[tokens])


def new_column(subject: Subject, latent: int, config: AblateConfig, mean: float) -> tuple[Rows32, Rows32]:
    """(T,) the values of a latent, and what they become."""
    old = np.zeros(len(subject.mask), np.float32)
    mine = subject.rows.indices == latent
    old[subject.tokens[mine]] = subject.rows.values[mine]
    new = old.copy()
    mask = subject.mask
    new[mask] = config.new_value(old[mask], mean)
    return old, new


def random_direction(latent: int, number: int, norm: float, width: int, seed: int) -> Rows32:
    """(D,) a direction drawn evenly over the sphere, of this norm."""
    drawn = np.random.default_rng([seed, latent, number, 1]).standard_normal(width)
    return (drawn * (norm / np.linalg.norm(drawn))).astype(np.float32)


def is_removed(
    subject: Subject, image: int, role: int, order: int, k: int, ranked: Ints, norms: npt.NDArray[np.float64], seed: int
) -> Bools:
    """(nnz,): which nonzeros of an image a curve sets to 0.

    Parameters
    ----------
    ranked : the chosen latents, the largest effect first
    norms : (L,) of the decoder's rows
    """
    indices = subject.rows.indices.astype(np.int64)
    if role != KEEP and k == 0:
        return subject.may_edit
    first = ranked[:k] if ORDERS[order] == "chosen" else _order(subject, image, ORDERS[order], norms, seed)[:k]
    is_first = np.isin(indices, first)
    return subject.may_edit & (~is_first if role == KEEP else is_first)


def _order(subject: Subject, image: int, order: str, norms: npt.NDArray[np.float64], seed: int) -> Ints:
    """The latents that are active in the image: those that add most to it first, or in a seeded order."""
    indices = subject.rows.indices[subject.may_edit].astype(np.int64)
    active, which = np.unique(indices, return_inverse=True)
    if order == "random":
        return np.random.default_rng([seed, image, 2]).permutation(active)
    square = np.bincount(which, subject.rows.values[subject.may_edit].astype(np.float64) ** 2, len(active))
    return active[np.argsort(-np.sqrt(square) * norms[active], kind="stable")]


def is_single(role: int) -> bool:
    """Is it an edit of one latent, or of a direction in its place?"""
    return role in (CHOSEN, CONTROL, DIRECTION)
