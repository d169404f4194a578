"""CRC32C of arrays: the number of the library, from pieces beside which other threads can run."""

from typing import Any

import google_crc32c
import numpy as np
import pytest

from stores.checksum import crc32c

MIB = 1 << 20


@pytest.mark.parametrize("n", [0, 1, MIB - 1, MIB, MIB + 1, 3 * MIB + 17])
def test_pieces_have_the_checksum_of_the_whole(n: int) -> None:
    raw = np.random.default_rng(n).integers(0, 256, n, dtype=np.uint8)
    assert crc32c(raw) == crc32c(raw.tobytes()) == google_crc32c.value(raw.tobytes())
    assert crc32c(raw, 5) == google_crc32c.extend(5, raw.tobytes())
    assert crc32c(raw[n // 3 :], crc32c(raw[: n // 3])) == crc32c(raw)


def test_the_memory_of_any_array_counts() -> None:
    tokens = np.random.default_rng(0).standard_normal((3, 5, 7)).astype("<f2")
    tokens[1] = np.nan
    assert crc32c(tokens) == google_crc32c.value(tokens.tobytes())
    assert crc32c(tokens[:, ::2]) == google_crc32c.value(tokens[:, ::2].tobytes())


def test_other_threads_can_run_beside_every_whole_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library holds them up for anything but bytes of at least 1 MiB; a shorter rest takes microseconds."""
    given: list[Any] = []
    real = google_crc32c.extend

    def extend(crc: int, piece: Any) -> int:
        given.append(piece)
        return int(real(crc, piece))

    monkeypatch.setattr(google_crc32c, "extend", extend)
    crc32c(np.zeros(5 * MIB + 3, np.uint8))
    assert {type(piece) for piece in given} == {bytes}
    assert [len(piece) for piece in given] == [MIB] * 5 + [3]
