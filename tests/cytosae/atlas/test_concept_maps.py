"""Maps of images, in a file while an atlas is built."""

import os
from pathlib import Path

import numpy as np
import pytest

from cytosae.atlas.concept_maps import Maps


def test_a_map_that_fits_the_disk_in_part_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system says how much it wrote; the rest would stay 0."""
    maps, real = Maps(2, 9, tmp_path), os.pwrite
    maps.set(0, np.arange(9, dtype=np.float32))
    monkeypatch.setattr(os, "pwrite", lambda descriptor, raw, at: real(descriptor, raw[:4], at))
    with pytest.raises(OSError, match="No space left") as error:
        maps.set(1, np.arange(9, dtype=np.float32))
    assert error.value.filename == str(tmp_path)
    assert maps.read(0, 1)[0].argmax() == 8
