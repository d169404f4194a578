"""What tests of the atlas share: drawn cells of a cohort with all its stores, and a browser."""

from collections.abc import Iterator
from typing import Any

import pytest
from atlas_maker import Cohort, make_cohort
from browser import chromium


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    return make_cohort(tmp_path_factory.mktemp("cohort"))
