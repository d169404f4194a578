"""Verification names every broken promise by chunk and by image; opening for training finds the cheap ones."""

import json
import random
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
from artefacts import N_IMAGES, UNREADABLE, outcome, write_cache, write_latents

from stores.activation_spec import chunk_path
from stores.activation_store import ActivationStore
from stores.errors import BadInput, DamagedStore
from stores.files import sha256_file
from stores.latent_store import LatentStore
from stores.spec import ACTIVATIONS, LATENTS, Header, read_header, write_header
from stores.tables import read_image_table, table_sha256, write_image_table
from stores.verify import verify_activations, verify_latents

SHAPE = (4, 3, 4)  # of a chunk: images, tokens, channels; the last of the three chunks holds two images and padding


pytestmark = pytest.mark.usefixtures("small_chunks")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Ten images in chunks of 4, 4 and 2; image 5 is unreadable."""
    write_cache(tmp_path / "acts.zarr")
    return tmp_path / "acts.zarr"


@pytest.fixture
def latents(tmp_path: Path) -> Path:
    """The latents of the same images, in many small chunks."""
    write_latents(tmp_path / "latents.zarr")
    return tmp_path / "latents.zarr"


def problems(root: Path) -> list[str]:
    return [str(problem) for problem in verify_activations(root) if problem]


def latent_problems(root: Path) -> list[str]:
    return [str(problem) for problem in verify_latents(root, images_at_once=4) if problem]


def edit_journal(root: Path, edit: Callable[[list[dict[str, object]]], list[dict[str, object]]]) -> None:
    """Pass the records of the journal through `edit`."""
    path = root / "journal.jsonl"
    records = edit([json.loads(line) for line in path.read_text().splitlines()])
    path.write_text("".join(json.dumps(record, sort_keys=True) + "\n" for record in records))


def rewrite(root: Path, chunk: int, change: Callable[[npt.NDArray[np.uint16]], None]) -> None:
    """Change the bits of a chunk's numbers, and make checksum and journal fit again."""
    path = chunk_path(root, chunk)
    bits = np.frombuffer(path.read_bytes()[:-4], "<u2").copy().reshape(SHAPE)
    change(bits)
    crc = google_crc32c.value(bits.tobytes())
    path.write_bytes(bits.tobytes() + crc.to_bytes(4, "little"))

    def edit(records: list[dict[str, object]]) -> list[dict[str, object]]:
        records[chunk]["crc32c"] = f"{crc:08x}"
        return records

    edit_journal(root, edit)


# --------------------------------------------------------------------------------------------- activation cache


def test_whole_stores_have_no_problem(cache: Path, latents: Path, made: Path) -> None:
    """Neither the tiny ones nor those of the real pipeline; one None for each chunk or block shows the progress."""
    assert list(verify_activations(cache)) == [None] * 3
    assert list(verify_latents(latents, images_at_once=4)) == [None] * 3
    assert list(verify_activations(made / "acts.zarr")) == [None] * 3
    assert list(verify_latents(made / "latents.zarr")) == [None]


@pytest.mark.parametrize(("chunk", "images"), [(0, "0 to 3"), (1, "4 to 7"), (2, "8 to 9")])
def test_a_missing_or_misshaped_chunk_is_named(chunk: int, images: str, cache: Path) -> None:
    """By `verify`, and already when the cache is opened or mapped."""
    path, opened = chunk_path(cache, chunk), ActivationStore(cache)
    raw = path.read_bytes()
    assert len(raw) == 100
    for damaged, what, on_opening in [
        (None, "missing", "is missing. cyto cache verify lists every bad chunk"),
        (b"", "0 bytes, expected 100", "has 0 bytes, expected 100. cyto cache verify lists every bad chunk"),
        (raw[:-1], "99 bytes, expected 100", "has 99 bytes, expected 100"),
        (raw[:48], "48 bytes, expected 100", "has 48 bytes, expected 100"),
        (raw + b"\0", "101 bytes, expected 100", "has 101 bytes, expected 100"),
    ]:
        path.unlink()
        if damaged is not None:
            path.write_bytes(damaged)
        assert problems(cache) == [f"chunk {chunk} (images {images}): {what}"]
        with pytest.raises(DamagedStore, match=f"tokens/c/{chunk}/0/0 {on_opening}"):
            ActivationStore(cache)
        with pytest.raises(DamagedStore, match=f"tokens/c/{chunk}/0/0 {on_opening}"):
            opened.read_chunk(chunk)
        path.write_bytes(raw)
    assert problems(cache) == []


@pytest.mark.parametrize(("chunk", "images"), [(1, "4 to 7"), (2, "8 to 9")])
def test_one_flipped_bit_anywhere_is_found(chunk: int, images: str, cache: Path) -> None:
    """Numbers, NaN of an unreadable image, padding of the short last chunk, the checksum itself."""
    path = chunk_path(cache, chunk)
    raw = path.read_bytes()
    expected = [f"chunk {chunk} (images {images}): fails its checksum: bits have changed"]
    for position in range(len(raw)):
        flipped = raw[position] ^ 1 << position * 3 % 8
        path.write_bytes(raw[:position] + bytes([flipped]) + raw[position + 1 :])
        assert problems(cache) == expected, position


def test_random_flips_anywhere_are_found(cache: Path) -> None:
    """One to three bits of any chunk; every bit of a checksum; padding included. The moments differ, on purpose."""
    rng = random.Random()
    for chunk in range(3):
        path = chunk_path(cache, chunk)
        raw = path.read_bytes()
        flips = [[bit] for bit in range(8 * (len(raw) - 4), 8 * len(raw))]
        flips += [rng.sample(range(8 * len(raw)), rng.choice((1, 2, 3))) for _ in range(50)]
        for flip in flips:
            damaged = bytearray(raw)
            for bit in flip:
                damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            (found,) = problems(cache)
            assert found.startswith(f"chunk {chunk} (images "), flip
            assert found.endswith(": fails its checksum: bits have changed"), flip
        path.write_bytes(raw)


def test_a_flipped_bit_in_journal_or_table_is_found_or_changes_nothing(cache: Path) -> None:
    """Never a crash, whatever the damaged file makes of it. Parquet has bytes that mean nothing to us."""
    rng = random.Random()
    table = read_image_table(cache / "images.parquet")
    for name in ("journal.jsonl", "images.parquet"):
        path = cache / name
        raw = path.read_bytes()
        for bit in rng.sample(range(8 * len(raw)), 150):
            damaged = bytearray(raw)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            if not problems(cache):
                assert name == "images.parquet", bit
                assert read_image_table(path).equals(table), bit
        path.write_bytes(raw)


def test_a_table_that_fits_the_header_but_not_the_journal_is_found(cache: Path) -> None:
    """Both were changed, by a program or by hand: only the journal still says which file made which tokens."""
    path, header = cache / "images.parquet", read_header(cache, ACTIVATIONS)
    whole = read_image_table(path)
    for row, name, value in [(9, "content_hash", "0" * 64), (9, "content_hash", None), (9, "error", "was not liked")]:
        values = whole[name].to_pylist()
        values[row] = value
        table = whole.set_column(whole.column_names.index(name), name, pa.array(values, pa.string()))
        write_image_table(table, path)
        summary = {**(header.summary or {}), "images_sha256": table_sha256(table)}
        write_header(cache, Header(**{**vars(header), "summary": summary}))
        what = "the hashes of its images" if name == "content_hash" else "which images could be read"
        assert problems(cache) == [f"chunk 2 (images 8 to 9): the journal and images.parquet disagree about {what}"]


def test_swapped_chunks_are_found(cache: Path) -> None:
    """Each is whole in itself: only the journal knows where it belongs."""
    first, second = chunk_path(cache, 0), chunk_path(cache, 1)
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    second.write_bytes(a)
    what = "is not the chunk that the journal names: it is chunk"
    assert problems(cache) == [f"chunk 0 (images 0 to 3): {what} 1", f"chunk 1 (images 4 to 7): {what} 0"]


def test_a_journal_that_disagrees_is_found(cache: Path) -> None:
    """Any field of a line, a line taken away or added, a line that is no record, no journal at all."""
    rows = "the journal gives it other images, or another size"
    foreign = "is not the chunk that the journal names: written by another run"
    silent = "the journal does not say what became of its images"
    unread = "the journal and images.parquet disagree about which images could be read"
    journal = (cache / "journal.jsonl").read_bytes()
    edits: list[tuple[str, object, str]] = [
        ("crc32c", "00000000", foreign),
        ("crc32c", None, foreign),
        ("size", 99, rows),
        ("n_images", 3, rows),
        ("first_image", 0, rows),
        ("errors", {}, unread),
        ("errors", {"5": "file ends late"}, unread),
        ("errors", None, silent),
        ("content_hash", ["0"] * 4, "the journal and images.parquet disagree about the hashes of its images"),
        ("content_hash", [], silent),
    ]
    for name, value, what in edits:
        edit_journal(cache, lambda records: [records[0], {**records[1], name: value}, records[2]])  # noqa: B023
        assert problems(cache) == [f"chunk 1 (images 4 to 7): {what}"], name
        (cache / "journal.jsonl").write_bytes(journal)

    edit_journal(cache, lambda records: [records[0], records[2]])
    unnamed = "chunk 1 (images 4 to 7): not named in the journal"
    assert problems(cache) == ["store: the journal names 2 chunks in 2 lines, expected 3 in order", unnamed]
    (cache / "journal.jsonl").write_bytes(journal)
    edit_journal(cache, lambda records: [*records, {**records[0], "chunk": 3}])
    assert problems(cache) == ["store: the journal names 4 chunks in 4 lines, expected 3 in order"]
    (cache / "journal.jsonl").write_bytes(journal)
    edit_journal(cache, lambda records: [*records, records[2]])
    assert problems(cache) == ["store: the journal names 3 chunks in 4 lines, expected 3 in order"]
    (cache / "journal.jsonl").write_bytes(journal)
    edit_journal(cache, lambda records: records[::-1])  # the cache's own hash is taken of it
    assert problems(cache) == ["store: the journal names 3 chunks in 3 lines, expected 3 in order"]

    (cache / "journal.jsonl").write_bytes(b"{]\n" + journal)
    found = problems(cache)
    assert len(found) == 1
    assert "line 1 of" in found[0]
    assert "is not a journal record" in found[0]
    (cache / "journal.jsonl").unlink()
    assert problems(cache)[0] == "store: the journal names 0 chunks in 0 lines, expected 3 in order"


@pytest.mark.parametrize("bits", [0x7E00, 0x7C00, 0xFC00, 0xFE01], ids=["NaN", "inf", "-inf", "another NaN"])
@pytest.mark.parametrize(("chunk", "position", "image"), [(0, 0, 0), (1, 2, 6), (2, 1, 9)])
def test_nan_or_infinity_in_a_readable_image_is_found(
    chunk: int, position: int, image: int, bits: int, cache: Path
) -> None:
    """Though checksum and journal fit: a fault of the writer, not of the disk."""
    rewrite(cache, chunk, lambda numbers: numbers[position].__setitem__((2, 3), bits))
    found = problems(cache)
    assert len(found) == 1
    assert found[0].startswith(f"chunk {chunk} (images ")
    assert found[0].endswith(f": NaN or infinity in readable image {image} (tiny/cells/{image}.png)")


def test_numbers_in_an_unreadable_image_are_found(cache: Path) -> None:
    rewrite(cache, 1, lambda numbers: numbers[UNREADABLE - 4].__setitem__((0, 0), 0x3C00))
    what = "numbers instead of NaN in unreadable image 5 (tiny/cells/5.png)"
    assert problems(cache) == [f"chunk 1 (images 4 to 7): {what}"]


def change_cell(table: pa.Table) -> pa.Table:
    """The patient of image 7 becomes another."""
    patients = table["patient"].to_pylist()
    patients[7] = "P3"
    return table.set_column(table.column_names.index("patient"), "patient", pa.array(patients, pa.string()))


def test_a_changed_image_table_is_found(cache: Path) -> None:
    """Another cell, order, column or length; no table at all. The chunks are checked all the same."""
    changed = "store: images.parquet was changed: its hash is not the one in the header"
    path = cache / "images.parquet"
    table = read_image_table(path)
    shuffled, reordered = table.take([1, 0, *range(2, N_IMAGES)]), table.select(table.column_names[::-1])
    for other in (change_cell(table), shuffled, reordered):
        write_image_table(other, path)
        assert problems(cache) == [changed]
    for other in (table.slice(0, 9), table.slice(0, 0), pa.concat_tables([table, table.slice(0, 1)])):
        write_image_table(other, path)
        assert problems(cache) == [changed]
        with pytest.raises(DamagedStore, match=f"images.parquet has {other.num_rows} rows, the cache holds 10 images"):
            ActivationStore(cache)
    chunk_path(cache, 0).unlink()
    for spoil in (lambda: path.write_bytes(b"no table"), path.unlink):
        spoil()
        found = problems(cache)
        assert found[0].startswith("store: ")
        assert "images.parquet" in found[0]
        assert found[1:] == ["chunk 0 (images 0 to 3): missing"]
    chunk_path(cache, 0).write_bytes(bytes(100))
    with pytest.raises(BadInput, match="no image table at"):
        ActivationStore(cache)


def test_a_layout_that_a_map_would_misread_is_found(cache: Path) -> None:
    """Byte order, codecs, chunks, or an array that is not there: neither opened nor passed."""
    path = cache / "tokens" / "zarr.json"
    whole = path.read_text()
    spoiled = [
        whole.replace('"little"', '"big"'),
        whole.replace('"float16"', '"int16"').replace('"NaN"', "0"),
        whole.replace('"chunk_shape": [\n        4,', '"chunk_shape": [\n        2,'),
        json.dumps({**json.loads(whole), "shape": [9, 3, 4]}),
        json.dumps({**json.loads(whole), "codecs": json.loads(whole)["codecs"][:1]}),
        "{",
        None,
    ]
    for text in spoiled:
        assert text != whole
        path.write_text(text) if text is not None else path.unlink()
        with pytest.raises(DamagedStore, match=r"acts\.zarr/tokens does not have the layout that its header states"):
            ActivationStore(cache)
        assert any("does not have the layout that its header states" in found for found in problems(cache)), text


# ------------------------------------------------------------------------------------------------ latent store


@pytest.mark.stress
@pytest.mark.parametrize("name", ["X/indices", "X/data", "X/indptr", "image_indptr"])
def test_a_damaged_chunk_of_latents_is_found(name: str, latents: Path) -> None:
    """Deleted, emptied, cut, longer, or with one bit flipped: a problem that names images or files, never a crash."""
    files = sorted((latents / name / "c").iterdir())
    for path in [files[0], files[-1]]:
        raw = path.read_bytes()
        middle = len(raw) // 2
        flipped = raw[:middle] + bytes([raw[middle] ^ 4]) + raw[middle + 1 :]
        for damaged in [None, b"", raw[:middle], raw[:-1], raw + b"\0", flipped]:
            path.unlink(missing_ok=True)
            if damaged is not None:
                path.write_bytes(damaged)
            found = latent_problems(latents)
            assert found, f"{path}: {damaged!r}"
            assert all(text.startswith(("chunk", "store")) for text in found)
            if not damaged:
                assert len(found) == 1
                assert name in found[0]
                with pytest.raises(DamagedStore, match=name):
                    LatentStore(latents)
        path.write_bytes(raw)
    assert latent_problems(latents) == []


def numbered(latents: Path, name: str) -> list[Path]:
    """The chunk files of one of the three arrays, in order."""
    return sorted((latents / "X" / name / "c").iterdir(), key=lambda path: int(path.name))


def chunk_images(latents: Path, name: str, chunk: int) -> str:
    """The images whose rows a chunk of seven entries holds, from the rows themselves."""
    store = LatentStore(latents)
    n_rows = np.diff(store.read_images(0, N_IMAGES).indptr)
    owners = np.repeat(np.arange(N_IMAGES), 3).repeat(n_rows if name != "indptr" else 1)
    owners = np.append(owners, N_IMAGES - 1) if name == "indptr" else owners
    return f"{owners[chunk * 7]} to {owners[min(chunk * 7 + 6, len(owners) - 1)]}"


@pytest.mark.stress
@pytest.mark.parametrize("name", ["indices", "data", "indptr"])
def test_every_damaged_chunk_is_named_with_its_images(name: str, latents: Path) -> None:
    """Each chunk in turn, with what is wrong with it; and nothing else is called damaged."""
    for chunk, path in enumerate(numbered(latents, name)):
        raw, images = path.read_bytes(), chunk_images(latents, name, chunk)
        for damaged, what in [
            (None, "is missing"),
            (raw[:-3], f"has {len(raw) - 3} bytes, expected {len(raw)}"),
            (raw[:-1] + bytes([raw[-1] ^ 1]), "fails its checksum"),
        ]:
            path.unlink() if damaged is None else path.write_bytes(damaged)
            assert latent_problems(latents) == [f"chunk {chunk} (images {images}): X/{name}/c/{chunk} {what}"]
        path.write_bytes(raw)
    assert latent_problems(latents) == []


@pytest.mark.parametrize("name", ["indices", "data"])
def test_two_chunks_that_were_swapped_are_named(name: str, latents: Path) -> None:
    """Both are whole, and their rows may even keep every rule: only the journal knows."""
    paths, images = numbered(latents, name)[2:4], [chunk_images(latents, name, chunk) for chunk in (2, 3)]
    one, two = (path.read_bytes() for path in paths)
    paths[0].write_bytes(two)
    paths[1].write_bytes(one)
    found = latent_problems(latents)
    assert len(found) == 2
    for text, own, other, place in zip(found, (2, 3), (3, 2), images, strict=True):
        assert text.startswith(f"chunk {own} (images {place}): X/{name}/c/{own} ")
        assert text.endswith(f": it is X/{name}/c/{other}")


def resealed(latents: Path) -> None:
    """Make journal and header fit the chunk files again, as if they had been written so."""
    journal = latents / "journal.jsonl"
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    for name in ("indices", "data", "indptr"):
        files = [[len(raw), f"{zlib.crc32(raw):08x}"] for raw in map(Path.read_bytes, numbered(latents, name))]
        for line in lines:
            line["chunks"][name] = []
        lines[0]["chunks"][name] = files
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    header = read_header(latents, LATENTS)
    summary = {**(header.summary or {}), "journal_sha256": sha256_file(journal)}
    write_header(latents, Header(**{**vars(header), "summary": summary}))


@pytest.mark.parametrize(
    ("name", "change", "what"),
    [
        ("indices", lambda a, p: np.concatenate([a[p[1] :], a[: p[1]]]), "indices out of range or not increasing"),
        ("indices", lambda a, p: a.repeat(2)[: len(a)], "indices out of range or not increasing"),
        ("indices", lambda a, p: np.append(a[:-1], 65_535), "indices out of range or not increasing"),
        ("data", lambda a, p: np.append(0, a[1:]), "a value is zero, NaN or infinite"),
        ("data", lambda a, p: np.append(np.nan, a[1:]), "a value is zero, NaN or infinite"),
        ("data", lambda a, p: -a, "a value lies below 0"),
        ("indptr", lambda a, p: np.concatenate([a[:4], a[4:8][::-1], a[8:]]), "indptr is not monotone or leaves"),
        ("indptr", lambda a, p: np.append(a[:-1], a[-1] - 1), "image_indptr disagrees with indptr"),
        ("indptr", lambda a, p: np.append(a[:-1], a[-1] + 1), "indptr is not monotone or leaves the data"),
        ("indptr", lambda a, p: np.append(1, a[1:]), "disagrees with indptr"),
    ],
)
def test_wrong_rows_with_right_checksums_are_found(name: str, change: Any, what: str, latents: Path) -> None:
    """A writer with a bug: every file is just what it wrote, but no reader may be handed such rows."""
    indptr = np.asarray(zarr.open_array(latents / "X" / "indptr", mode="r")[:])
    with zarr.config.set({"array.write_empty_chunks": True}):
        array = zarr.open_array(latents / "X" / name, mode="r+")
        array[:] = change(np.asarray(array[:]), indptr)
    resealed(latents)
    found = latent_problems(latents)
    assert found
    assert any(what in text for text in found), found


def test_a_journal_that_does_not_fit_is_found(latents: Path) -> None:
    """Changed, gone, too short; and files that no line names. A store without any checksums is an old one."""
    journal, raw = latents / "journal.jsonl", (latents / "journal.jsonl").read_bytes()
    journal.write_bytes(raw.replace(b'"n_images":2', b'"n_images":3'))
    assert latent_problems(latents) == ["store: journal.jsonl was changed: its hash is not the one in the header"]
    journal.unlink()
    assert latent_problems(latents)[0].startswith("store: journal.jsonl cannot be used: ")
    journal.write_bytes(raw)
    (latents / "X" / "data" / "c" / "999").write_bytes(b"")
    assert latent_problems(latents) == ["store: X/data/c holds 1 files that do not belong there (999)"]
    (latents / "X" / "data" / "c" / "999").unlink()
    resealed(latents)
    assert latent_problems(latents) == []
    lines = journal.read_text().splitlines()
    journal.write_text(lines[0].replace('"data": [[', '"data": [[1, "0"], [') + "\n" + "\n".join(lines[1:]) + "\n")
    header = read_header(latents, LATENTS)
    summary = {**(header.summary or {}), "journal_sha256": sha256_file(journal)}
    write_header(latents, Header(**{**vars(header), "summary": summary}))
    assert "chunks of X/data, expected" in latent_problems(latents)[0]
    write_header(latents, Header(**{**vars(header), "summary": {"nnz": LatentStore(latents).nnz}}))
    assert latent_problems(latents) == []


def test_latents_of_an_unreadable_image_are_found(tmp_path: Path) -> None:
    """The table says that image 3 could not be read, but its tokens have latents."""
    write_latents(tmp_path / "latents.zarr", images=outcome(unreadable=(3, 5)))
    what = "an unreadable image has latents"
    assert latent_problems(tmp_path / "latents.zarr") == [f"chunk 0 (images 0 to 3): {what}"]


def test_row_starts_that_disagree_are_found(latents: Path) -> None:
    """`image_indptr` must be every third entry of indptr; its ends are checked on opening, the rest by `verify`."""
    array = zarr.open_array(latents / "image_indptr", mode="r+")
    whole = np.asarray(array[:])
    array[6] = whole[6] + 1
    assert latent_problems(latents) == ["chunk 1 (images 4 to 7): image_indptr disagrees with indptr"]
    for changed in (whole + 1, whole[::-1], np.append(whole[:-1], whole[-1] + 1)):
        array[:] = changed
        with pytest.raises(DamagedStore, match=r"image_indptr disagrees with the .* nonzeros of X"):
            LatentStore(latents)
        assert len(latent_problems(latents)) == 1
    array.resize((5,))
    with pytest.raises(DamagedStore, match="image_indptr disagrees"):
        LatentStore(latents)
    shutil.rmtree(latents / "image_indptr")
    with pytest.raises(DamagedStore, match=r"image_indptr/zarr\.json is missing"):
        LatentStore(latents)


def test_a_changed_image_table_of_latents_is_found(latents: Path) -> None:
    """On opening already: statuses and patients decide what barcodes count."""
    path = latents / "images.parquet"
    table = read_image_table(path)
    for other in (change_cell(table), table.slice(0, 9)):
        write_image_table(other, path)
        with pytest.raises(DamagedStore, match=r"images\.parquet was changed"):
            LatentStore(latents)
        assert len(latent_problems(latents)) == 1
    pq.write_table(pa.table({"a": [1]}), path)
    assert "no image table at" in latent_problems(latents)[0]
