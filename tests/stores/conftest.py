"""What tests of stores share."""

from collections.abc import Iterator

import pytest

from stores import csr


@pytest.fixture(scope="module")
def small_chunks() -> Iterator[None]:
    """Seven entries a chunk of the sparse rows, so that commits lie amid chunks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(csr, "CHUNK_ENTRIES", 7)
        yield
