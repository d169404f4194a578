"""Errors that a user can correct. Any other exception is a bug.

A message says in one line what was expected, what was found, where, and what to do next.
"""


class CytoError(ValueError):
    """An error that the user can correct; `cyto` prints it as one line and exits with code 1."""


class BadInput(CytoError):
    """A setting, table or file given by the user is invalid."""


class StoreNotFound(CytoError, FileNotFoundError):
    """There is no store of the wanted kind at this path."""


class IncompleteStore(CytoError):
    """The store is there, but the job that writes it has not finished."""


class DamagedStore(CytoError):
    """A store violates its format: a missing, truncated or changed chunk, an index out of range."""


class StoreReplaced(CytoError):
    """Another command replaced a store while it was read: numbers of two stores would have been mixed."""


class SpecMismatch(CytoError):
    """Two things do not fit: a store and the settings to continue it with, or an SAE and a cache."""


class OtherSettings(SpecMismatch):
    """An output is there that was made with other settings; --overwrite would replace it."""


class ClusterLost(CytoError):
    """The Dask cluster was lost during the job. Finished work is kept, and the next run continues from it."""


class OutOfMemory(CytoError):
    """The memory of the GPU or of the machine is not enough for the settings."""


class StoreUnreachable(CytoError):
    """A store behind a URL cannot be read now: no network, no access, or a server that fails again and again."""
