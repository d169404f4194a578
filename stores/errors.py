"""The errors that a user can put right. Everything else that is raised is a bug of ours.

A message says what was expected, what was found, where, and what to type next, in one line.
"""


class CytoError(ValueError):
    """Something the user can put right; `cyto` prints it as one line and exits with code 1."""


class BadInput(CytoError):
    """A setting, a table or a file given by the user does not hold what it must."""


class StoreNotFound(CytoError, FileNotFoundError):
    """There is no store of the wanted kind at this path."""


class IncompleteStore(CytoError):
    """The store is there, but the job that writes it has not finished."""


class DamagedStore(CytoError):
    """The store breaks a promise of its own format: a missing, torn or flipped chunk, an index out of range."""


class StoreReplaced(CytoError):
    """Another command exchanged a store while it was read: numbers of two stores would have been mixed."""


class SpecMismatch(CytoError):
    """Two things do not fit: a store and the settings to continue it with, or an SAE and a cache."""


class ClusterLost(CytoError):
    """The Dask cluster that was at the job is gone. What it had finished stays, and the next run goes on from it."""


class StoreUnreachable(CytoError):
    """A store behind a URL cannot be read now: no network, no access, or a server that fails again and again."""
