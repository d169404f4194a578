"""Which images are held out or left out: decided by names and the seed alone, by image or by patient."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from token_caches import tagged, taken, write_cache

from stores import ActivationStore, BadInput, Chosen, DamagedStore, TokenStream, chosen_images, read_image_ids
from stores.tables import STATUS_OK, STATUS_UNREADABLE

Row = tuple[str, str, str | None, bool]  # dataset, image_id, patient, readable


class Table:
    """What of a cache the choice may look at."""

    def __init__(self, rows: Sequence[Row], root: str = "a.zarr") -> None:
        datasets, ids, patients, is_readable = zip(*rows, strict=True)
        status = [STATUS_OK if ok else STATUS_UNREADABLE for ok in is_readable]
        columns = {"image_id": ids, "patient": patients, "dataset": datasets, "status": status}
        self.images = pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})
        self.rows, self.root = list(rows), root

    def readable(self) -> np.ndarray:
        return np.array([row[3] for row in self.rows], bool)


def choose(*tables: Sequence[Row], **options: object) -> Chosen:
    return chosen_images([Table(rows) for rows in tables], **options)  # type: ignore[misc, arg-type]


def names(tables: Sequence[Sequence[Row]], masks: Sequence[np.ndarray]) -> list[Row]:
    return sorted(
        (row for rows, mask in zip(tables, masks, strict=True) for row, is_in in zip(rows, mask, strict=True) if is_in),
        key=repr,
    )


def slow_held_out(rows: list[Row], percent: int, by: str, seed: int) -> set[Row]:
    """The rule in a few words, for rows that are all readable: groups by hash, until enough."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        group = ("image", row[0], row[1]) if by == "image" or row[2] is None else ("patient", row[0], row[2])
        groups.setdefault(group, []).append(row)

    def rank(group: tuple[str, ...]) -> str:
        text = json.dumps([seed, *group], separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    held_out: list[Row] = []
    for group in sorted(groups, key=rank)[:-1]:
        if len(held_out) * 100 < percent * len(rows):
            held_out += groups[group]
    return set(held_out)


COHORT: list[Row] = [
    ("hehr" if n % 3 else "bmc", f"i{n:03d}", None if n % 10 == 7 else f"P{n * n % 13}", n % 11 != 5)
    for n in range(120)
]


@pytest.mark.parametrize("by", ["image", "patient"])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data(), seed=st.integers(0, 3), percent=st.integers(1, 99))
def test_the_choice_hangs_on_names_and_the_seed_alone(by: str, data: st.DataObject, seed: int, percent: int) -> None:
    """Any order of the images, cut anywhere into caches in any order; it equals the rule in a few words."""
    rows = data.draw(st.permutations(COHORT))
    cut = data.draw(st.integers(1, len(rows) - 1))
    tables = data.draw(st.permutations([rows[:cut], rows[cut:]]))
    chosen = choose(*tables, holdout=percent / 100, by=by, seed=seed)
    readable = [row for row in COHORT if row[3]]
    held_out = names(tables, chosen.held_out)

    assert set(held_out) == slow_held_out(readable, percent, by, seed)
    assert sorted(names(tables, chosen.train) + held_out, key=repr) == sorted(readable, key=repr)
    assert chosen.n_held_out == len(held_out)
    assert chosen.n_train == len(readable) - len(held_out) > 0
    without = sum(row[2] is None for row in readable)
    assert chosen.n_without_patient == (without if by == "patient" else 0)


def test_no_patient_is_on_both_sides_and_the_fraction_is_reached() -> None:
    for seed in range(5):
        chosen = choose(COHORT[:50], COHORT[50:], holdout=0.2, by="patient", seed=seed)
        tables = [COHORT[:50], COHORT[50:]]
        train, held_out = ({row[:1] + row[2:3] for row in names(tables, masks) if row[2]} for masks in _sides(chosen))
        assert train
        assert held_out
        assert not train & held_out
        assert chosen.n_held_out >= 0.2 * (chosen.n_train + chosen.n_held_out)
        assert 0 < chosen.n_groups_held_out < chosen.n_groups
        assert chosen.n_groups == len({row[:1] + row[2:3] if row[2] else row[:2] for row in COHORT if row[3]})


def _sides(chosen: Chosen) -> tuple[list[np.ndarray], list[np.ndarray]]:
    return chosen.train, chosen.held_out


def test_another_seed_chooses_others() -> None:
    for by in ("image", "patient"):
        found = {choose(COHORT, holdout=0.2, by=by, seed=seed).held_out[0].tobytes() for seed in range(8)}
        assert len(found) > 4


def test_the_same_name_in_two_datasets_is_two_patients() -> None:
    """Else they could only be held out together."""
    rows: list[Row] = [(dataset, f"{dataset}{n}", "P1", True) for dataset in "ab" for n in range(4)]
    for seed in range(4):
        chosen = choose(rows, holdout=0.5, by="patient", seed=seed)
        assert (chosen.n_groups, chosen.n_held_out) == (2, 4)
        assert len({rows[i][0] for i in np.flatnonzero(chosen.held_out[0])}) == 1


def test_names_that_run_together_are_told_apart() -> None:
    rows: list[Row] = [
        ("a", "bc", None, True),
        ("ab", "c", None, True),
        ('a","b', "c", None, True),
        ("", "abc", None, True),
    ]
    found = {choose(rows, holdout=0.25, seed=seed).held_out[0].tobytes() for seed in range(40)}
    assert len(found) == 4
    assert choose(rows, holdout=0.25).n_groups == 4


def test_an_image_in_two_caches_is_held_out_in_both() -> None:
    """It may be readable in one only, and only one may know its patient, be it the one where it is unreadable."""
    first: list[Row] = [("d", f"i{n}", f"P{n // 2}", n != 3) for n in range(20)]
    second: list[Row] = [("d", f"i{n}", None, n != 4) for n in range(10, -1, -1)]
    for by in ("image", "patient"):
        for seed in range(5):
            chosen = choose(first, second, holdout=0.3, by=by, seed=seed)
            held, train = (
                [{rows[i][1] for i in np.flatnonzero(mask)} for rows, mask in zip((first, second), masks, strict=True)]
                for masks in (chosen.held_out, chosen.train)
            )
            assert held[0] | held[1]
            assert not (held[0] | held[1]) & (train[0] | train[1])
            assert chosen.n_without_patient == 0


def test_two_patients_for_one_image_are_refused() -> None:
    first: list[Row] = [("d", "i0", "P1", True), ("d", "i1", "P2", True)]
    second: list[Row] = [("d", "i0", "P7", True)]
    with pytest.raises(BadInput, match="the caches name two patients, 'P1' and 'P7', for image 'i0' of dataset 'd'"):
        choose(first, second, holdout=0.5, by="patient")
    assert choose(first, second, holdout=0.5, by="image").n_groups == 2
    third: list[Row] = [*second, ("d", "i2", None, True)]
    assert choose(first, third, holdout=0.5, by="patient", exclude=["i0"]).n_groups == 2


@pytest.mark.parametrize(
    ("holdout", "n_held_out"), [(0.07, 7), (0.1, 10), (0.29, 29), (0.101, 11), (1e-9, 1), (0.999, 99)]
)
def test_the_fraction_is_what_was_typed(holdout: float, n_held_out: int) -> None:
    """0.07 * 100 is above 7 in floating point; at least one image on each side."""
    rows: list[Row] = [("d", f"i{n}", None, True) for n in range(100)]
    assert choose(rows, holdout=holdout).n_held_out == n_held_out


def test_excluded_images_are_on_neither_side_and_change_nothing_else_by_name() -> None:
    exclude = ["i004", "i005", "i050"]  # i005 could not be read anyway
    chosen = choose(COHORT[:60], COHORT[60:], holdout=0.3, exclude=exclude)
    tables = [COHORT[:60], COHORT[60:]]
    remaining = [row for row in COHORT if row[3] and row[1] not in exclude]
    assert chosen.n_excluded == 2
    assert set(names(tables, chosen.held_out)) == slow_held_out(remaining, 30, "image", 0)
    assert names(tables, chosen.train) == sorted(set(remaining) - set(names(tables, chosen.held_out)), key=repr)

    plain = choose(COHORT, exclude=set(exclude))
    assert names([COHORT], plain.train) == sorted(remaining, key=repr)
    assert (plain.n_held_out, plain.n_groups, plain.n_without_patient) == (0, 0, 0)


def test_what_cannot_be_chosen_is_refused() -> None:
    with pytest.raises(
        BadInput, match=r"4 of 5 images to exclude are in none of the caches: '\\x1b\[2J', 'x', 'y' and 1 m"
    ):
        choose(COHORT, exclude=["x", "i004", "y", "z", "\x1b[2J"])
    with pytest.raises(BadInput, match="no image is left to train on: all 109 readable images are excluded"):
        choose(COHORT, exclude=[row[1] for row in COHORT])
    for holdout in (-0.1, 1.0, float("nan"), float("inf")):
        with pytest.raises(BadInput, match="holdout must be a fraction from 0 to below 1; found"):
            choose(COHORT, holdout=holdout)
    with pytest.raises(BadInput, match="by must be one of image, patient; found 'cell'"):
        choose(COHORT, by="cell")
    one: list[Row] = [("d", "i0", "P1", True), ("d", "i1", "P1", True)]
    with pytest.raises(BadInput, match="all 2 readable images are of one patient, patient 'P1' of dataset 'd'"):
        choose(one, holdout=0.5, by="patient")
    nameless: list[Row] = [*one, ("d", None, "P2", True)]  # type: ignore[list-item]
    with pytest.raises(DamagedStore, match=r"a\.zarr/images\.parquet has a row without image_id"):
        choose(nameless, holdout=0.5)


def test_the_choice_of_the_first_version_stays() -> None:
    """What is held out of a training set must be the same for whoever checks the SAE with a later version."""
    for by, digest in (("image", "bce568dbe02ae614"), ("patient", "7829648aa84bd7ab")):
        held_out = choose(COHORT, holdout=0.2, by=by, seed=3).held_out[0]
        assert hashlib.sha256(held_out.tobytes()).hexdigest()[:16] == digest


def test_held_out_images_never_come_out_of_the_stream(tmp_path: Path) -> None:
    patients: list[str | None] = [f"P{n // 3}" for n in range(20)]
    root = write_cache(tmp_path / "a.zarr", tagged(0, 20, 3), unreadable=(2, 9), patients=patients)
    stores = [ActivationStore(root)]
    chosen = chosen_images(stores, holdout=0.3, by="patient", exclude=["synthetic/019.png"])
    sides = []
    for masks in (chosen.train, chosen.held_out):
        stream = TokenStream(stores, images=masks, pool_chunks=2)
        sides.append({tag[1] for tag in taken(stream, stream.tokens_per_epoch)})
        assert stream.tokens_per_epoch == 3 * len(sides[-1])
    assert sides[0] | sides[1] == set(range(19)) - {2, 9}
    assert not {image // 3 for image in sides[0]} & {image // 3 for image in sides[1]}


@pytest.mark.parametrize(
    "content",
    [
        b"a/1.png\nb 2.png\n",
        b"\xef\xbb\xbfa/1.png\r\n\r\n  b 2.png  \r\n",
        b"\n\na/1.png\rb 2.png",
        b"a/1.png\n\t\nb 2.png",
    ],
    ids=["plain", "windows", "old-mac", "blank"],
)
def test_a_list_of_image_ids_is_read(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "ids.txt").write_bytes(content)
    assert read_image_ids(tmp_path / "ids.txt") == ["a/1.png", "b 2.png"]


def test_an_id_may_hold_what_only_looks_like_the_end_of_a_line(tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("a\u2028b\nc\x0bd\n", encoding="utf-8")
    assert read_image_ids(tmp_path / "ids.txt") == ["a\u2028b", "c\x0bd"]


def test_a_list_that_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ids.txt"
    with pytest.raises(BadInput, match=r"no list of images at .*ids\.txt"):
        read_image_ids(path)
    with pytest.raises(BadInput, match="no list of images at"):
        read_image_ids(tmp_path)
    path.write_bytes(b"PAR1\xff\xfe\x00")
    with pytest.raises(BadInput, match="cannot be read as UTF-8 text"):
        read_image_ids(path)
    path.write_text(" \n\n")
    with pytest.raises(BadInput, match="names no image"):
        read_image_ids(path)
    monkeypatch.setattr("stores.holdout._MOST_BYTES", 1 << 20)
    path.write_bytes(b"a\n" * (1 << 19))
    assert len(read_image_ids(path)) == 1 << 19
    path.write_bytes(b"a\n" * (1 << 19) + b"\n")
    with pytest.raises(BadInput, match="is larger than 1 MiB"):
        read_image_ids(path)
