"""Archives are read as Python's own modules read them, and hostile ones give a reason instead of harm."""

import gzip
import hashlib
import io
import os
import random
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from archive_maker import KINDS, add, central_entry, deflated, pack, zeros_deflated, zip_stating
from hypothesis import given, settings
from hypothesis import strategies as st
from places import ROOT

from cytocache import archive_member, tar_archive
from cytocache.archive_member import LINK, TWICE, BadArchive, clean_name
from cytocache.archives import as_unpacked, list_archive, locate, split_path
from cytocache.image_files import UnreadableImage, hash_of, is_there, read_file, size_of
from cytocache.tar_archive import Unpacked

LONG = "folder with a long name/" * 12


def some_files(n: int = 60, *, seed: int = 0) -> dict[str, bytes]:
    """Files of very different sizes, also empty, with long names and names that are not ASCII."""
    rng = random.Random(seed)
    sizes = (0, 1, 511, 512, 513, 5_000, 70_000)
    names = [f"cells/{rng.choice('ABC')}/{n:03}.png" for n in range(n)] + [f"{LONG}Zelle größe.png", "loose.png"]
    rng.shuffle(names)
    return {name: rng.randbytes(rng.choice(sizes)) for name in names}


def zip_twin(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}


def tar_twin(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as archive:
        files = {member.name: archive.extractfile(member) for member in archive if member.isreg()}
        return {name: file.read() for name, file in files.items() if file is not None}


# ------------------------------------------------------------------------------------------------ what is read


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_every_member_is_read_as_pythons_own_modules_read_it(kind: str, tar_format: int, tmp_path: Path) -> None:
    files = some_files()
    archive = pack(tmp_path / kind, files, tar_format=tar_format)
    assert (zip_twin if kind.endswith(".zip") else tar_twin)(archive) == files
    listing = list_archive(archive)
    assert {*listing.members} == {*files}
    assert listing.refused == {}
    for name in random.Random(1).sample([*files], len(files)):  # in any order
        for path in (tmp_path / f"{kind}::{name}", tmp_path / kind / name):
            assert read_file(path) == files[name]
            assert hash_of(path) == hashlib.sha256(files[name]).hexdigest()
            assert size_of(path) == len(files[name])
            assert is_there(path)


@pytest.mark.parametrize("kind", KINDS)
def test_threads_may_read_one_archive(kind: str, tmp_path: Path) -> None:
    files = some_files(seed=2)
    archive = pack(tmp_path / kind, files)
    names = random.Random(3).choices([*files], k=300)
    with ThreadPoolExecutor(4) as threads:
        assert [*threads.map(lambda name: read_file(archive / name), names)] == [files[name] for name in names]


def test_folders_dots_and_old_windows_names(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.mkdir("NGS")
        archive.writestr("./NGS//1.png", b"1")
        archive.writestr("BAS\\2.png", b"2")
    raw = (tmp_path / "a.zip").read_bytes()  # zipfile writes a backslash as it is on this system
    assert {*list_archive(tmp_path / "a.zip").members} == {"NGS/1.png", "BAS/2.png"}, raw
    with tarfile.open(tmp_path / "a.tar", "w") as packed:
        add(packed, ".", type=tarfile.DIRTYPE)
        add(packed, "./NGS", type=tarfile.DIRTYPE)
        add(packed, "./NGS/1.png", b"1")
    assert {*list_archive(tmp_path / "a.tar").members} == {"NGS/1.png"}


def test_names_of_a_zip_without_the_flag_for_utf_8(tmp_path: Path) -> None:
    """macOS writes UTF-8 without saying so; DOS wrote its code page."""
    for raw_name, name in (("große.png".encode(), "große.png"), ("große.png".encode("cp437"), "große.png")):
        archive = pack(tmp_path / f"{len(raw_name)}.zip", {"x" * len(raw_name): b"1"})
        archive.write_bytes(archive.read_bytes().replace(b"x" * len(raw_name), raw_name))
        assert [*list_archive(archive).members] == [name]


@pytest.mark.stress
def test_zip64_and_a_comment(tmp_path: Path) -> None:
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        packed.comment = b"made by PK\x05\x06 somebody"
        with packed.open("a.png", "w", force_zip64=True) as member:
            member.write(b"abc")
    assert read_file(archive / "a.png") == b"abc"
    with zipfile.ZipFile(archive, "w") as packed:
        for n in range(66_000):  # more than the 2 bytes of the ordinary end record
            packed.writestr(f"{n}.png", b"")
    assert len(list_archive(archive).members) == 66_000


def test_a_gzip_file_may_have_several_parts_and_zeros_behind(tmp_path: Path) -> None:
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as packed:
        for name, content in some_files(20).items():
            add(packed, name, content)
    raw = plain.getvalue()
    parts = [gzip.compress(raw[: len(raw) // 3]), gzip.compress(raw[len(raw) // 3 :])]
    (tmp_path / "a.tar.gz").write_bytes(b"".join(parts) + bytes(1024))
    for name, content in some_files(20).items():
        assert read_file(tmp_path / "a.tar.gz" / name) == content


def test_a_compressed_tar_is_read_at_any_place_from_states_that_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a slice of the whole; the number of states stays bounded, and reading back does not start anew."""
    monkeypatch.setattr(tar_archive, "_LEAST_APART", 4_096)
    monkeypatch.setattr(tar_archive, "_PIECE", 1_024)
    rng = random.Random(0)
    content = b"".join(rng.choice([rng.randbytes(9_000), bytes(9_000)]) for _ in range(60))
    (tmp_path / "a.gz").write_bytes(gzip.compress(content))
    unpacked = Unpacked(archive_member.OpenFile(tmp_path / "a.gz"))
    for _ in range(200):
        at, n = rng.randrange(len(content) + 2_000), rng.choice([0, 1, 700, 30_000])
        assert unpacked.read_at(at, n) == content[at : at + n]
    n_points = len(unpacked._points)
    assert 20 < n_points < 100
    unpacked.read_at(len(content) - 1, 1)
    unpacked.read_at(len(content) // 2, 1)
    assert unpacked._packed > len((tmp_path / "a.gz").read_bytes()) // 3
    assert len(unpacked._points) == n_points


def test_time_to_come_to_a_member_counts_in_a_compressed_tar_only(tmp_path: Path) -> None:
    """Else a reader process would be ended while it unpacks what comes before."""
    for kind, seconds in (("cells.zip", 0.0), ("cells.tar", 0.0), ("cells.tar.gz", (3 << 20) / 20e6)):
        archive = pack(tmp_path / kind, {"before.png": bytes((3 << 20) - 1024), "1.png": b"1"})
        member = locate(archive / "1.png")
        assert member is not None
        assert member.seconds_to_reach == pytest.approx(seconds, rel=0.01)


def test_a_path_into_an_archive_and_one_that_only_looks_so(tmp_path: Path) -> None:
    pack(tmp_path / "a.zip", {"b/1.png": b"1"})
    assert split_path(tmp_path / "a.zip::b/1.png") == (tmp_path / "a.zip", "b/1.png")
    assert split_path(tmp_path / "a.zip" / "b" / "1.png") == (tmp_path / "a.zip", "b/1.png")
    assert split_path(tmp_path / "a.zip") == (tmp_path / "a.zip", "")
    assert split_path(tmp_path / "other.zip::b/1.png") is None
    (tmp_path / "x.zip").mkdir()
    (tmp_path / "x.zip" / "1.png").write_bytes(b"of a folder")
    (tmp_path / "a.zip::1.png").write_bytes(b"of a file that is called so")
    assert locate(tmp_path / "x.zip" / "1.png") is None
    assert read_file(tmp_path / "x.zip" / "1.png") == b"of a folder"
    assert read_file(tmp_path / "a.zip::1.png") == b"of a file that is called so"
    assert as_unpacked("x/a.tar.gz::b/1.png") == "x/a/b/1.png"
    assert as_unpacked("x/a.zip/b::1.png") == "x/a.zip/b::1.png"


def test_an_archive_that_was_replaced_is_listed_again(tmp_path: Path) -> None:
    archive = pack(tmp_path / "a.zip", {"1.png": b"old"})
    member = locate(archive / "1.png")
    assert member is not None
    pack(tmp_path / "new.zip", {"1.png": b"newer", "2.png": b""}).replace(archive)
    assert read_file(archive / "1.png") == b"newer"
    with pytest.raises(UnreadableImage, match="its archive has changed since it was listed"):
        read_file(member)


# ----------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "name",
    ["../1.png", "a/../../1.png", "/etc/1.png", "C:/1.png", "a/C:/1.png", "..\\1.png", "\\1.png", "a\\..\\1.png"],
)
def test_a_name_that_leads_out_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(BadArchive, match="a name that leads out of the archive"):
        clean_name(name)
    for archive in (tmp_path / "a.zip", tmp_path / "a.tar"):
        pack(archive, {name: b"x", "b/1.png": b"good"})
        listing = list_archive(archive)
        assert [*listing.members] == ["b/1.png"]
        assert [*listing.refused.values()] == ["a name that leads out of the archive"]
        assert not is_there(archive / name)
    assert [path.name for path in tmp_path.iterdir()] != []
    assert {path.name for path in tmp_path.iterdir()} == {"a.zip", "a.tar"}  # nothing is ever written


def test_links_devices_and_sparse_files_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as packed:
        add(packed, "good.png", b"1")
        add(packed, "soft.png", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(packed, "hard.png", type=tarfile.LNKTYPE, linkname="good.png")
        add(packed, "pipe.png", type=tarfile.FIFOTYPE)
        add(packed, "disk.png", type=tarfile.BLKTYPE)
        add(packed, "holes.png", b"1", pax_headers={"GNU.sparse.major": "1"})
        add(packed, "last.png", b"2")
    listing = list_archive(tmp_path / "a.tar")
    assert [*listing.members] == ["good.png", "last.png"]
    assert listing.refused == {
        **{"soft.png": LINK, "hard.png": LINK, "pipe.png": "no regular file", "disk.png": "no regular file"},
        "holes.png": "a sparse file",
    }
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        link = zipfile.ZipInfo("soft.png")
        link.create_system, link.external_attr = 3, 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
        archive.writestr("good.png", b"1")
    assert list_archive(tmp_path / "a.zip").refused == {"soft.png": LINK}
    with pytest.raises(UnreadableImage, match="not read from its archive: a link"):
        read_file(tmp_path / "a.zip::soft.png")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_twice_is_refused_whichever_was_meant(tmp_path: Path) -> None:
    for archive in (tmp_path / "a.zip", tmp_path / "a.tar"):
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive, "w") as packed:
                for name in ("a/1.png", "a/./1.png", "b/1.png"):
                    packed.writestr(name, name)
        else:
            with tarfile.open(archive, "w") as packed_tar:
                for name in ("a/1.png", "a//1.png", "b/1.png", "a/1.png"):
                    add(packed_tar, name, name.encode())
        assert [*list_archive(archive).members] == ["b/1.png"]
        assert list_archive(archive).refused == {"a/1.png": TWICE}


def test_encrypted_members_and_other_methods_are_refused(tmp_path: Path) -> None:
    archive = pack(tmp_path / "a.zip", {"secret.png": b"12345", "good.png": b"1"})
    raw = bytearray(archive.read_bytes())
    raw[central_entry(bytes(raw), "secret.png") + 8] |= 1
    archive.write_bytes(raw)
    assert list_archive(archive).refused == {"secret.png": "encrypted"}
    assert read_file(archive / "good.png") == b"1"
    with zipfile.ZipFile(tmp_path / "b.zip", "w", zipfile.ZIP_LZMA) as packed:
        packed.writestr("1.png", b"1")
    assert "number 14" in list_archive(tmp_path / "b.zip").refused["1.png"]


def test_members_that_share_their_bytes_are_refused(tmp_path: Path) -> None:
    """A quoted zip bomb: many entries of the directory point to one packed kernel."""
    archive = pack(tmp_path / "a.zip", {"1.png": b"kernel", "2.png": b"kernel", "3.png": b"x"})
    raw = bytearray(archive.read_bytes())
    first = struct.unpack_from("<L", raw, central_entry(bytes(raw), "1.png") + 42)[0]
    struct.pack_into("<L", raw, central_entry(bytes(raw), "2.png") + 42, first)
    archive.write_bytes(raw)
    listing = list_archive(archive)
    assert [*listing.members] == ["3.png"]
    assert {*listing.refused.values()} == {"it shares its bytes with another member"}


def test_a_bomb_is_refused_by_what_it_states_and_by_what_it_does(tmp_path: Path) -> None:
    packed = zeros_deflated(64 << 20)
    honest = zip_stating(tmp_path / "honest.zip", "1.png", packed, size=64 << 20)
    with pytest.raises(UnreadableImage, match=r"would unpack to 67,108,864 bytes from .*more than 200 times.*a bomb"):
        read_file(honest / "1.png")
    liar = zip_stating(tmp_path / "liar.zip", "1.png", packed, size=1_000)
    with pytest.raises(UnreadableImage, match="unpacks to more than the 1,000 bytes that the archive states: a bomb"):
        read_file(liar / "1.png")
    huge = zip_stating(tmp_path / "huge.zip", "1.png", packed, size=(1 << 30) + 1)
    with pytest.raises(UnreadableImage, match=r"1,073,741,825 bytes, more than the 1,073,741,824 that are allowed"):
        read_file(huge / "1.png")


def test_a_compressed_tar_that_is_a_bomb_is_refused_while_it_is_listed(tmp_path: Path) -> None:
    header = tarfile.TarInfo("1.png")
    header.size = 1 << 33
    with gzip.open(tmp_path / "a.tar.gz", "wb", compresslevel=9) as file:
        file.write(header.tobuf())
        for _ in range(64):
            file.write(bytes(1 << 20))
    with pytest.raises(BadArchive, match=r"unpacks to more than 200 times its size: a bomb"):
        list_archive(tmp_path / "a.tar.gz")


def test_an_extended_header_of_gigabytes_is_refused_unread(tmp_path: Path) -> None:
    """Where Python's own module would read it whole."""
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 3 << 30
    with (tmp_path / "a.tar").open("wb") as file:
        file.write(header.tobuf(tarfile.GNU_FORMAT))
        file.truncate(4 << 30)  # sparse: takes no space
    with pytest.raises(BadArchive, match=r"a header of it has 3,221,225,472 bytes, more than the 1,048,576 allowed"):
        list_archive(tmp_path / "a.tar")


@pytest.mark.stress
@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_bombs_take_little_memory(tmp_path: Path) -> None:
    """Both bombs of above, in a process that may take 1 GB in all: a member of 1 GiB, and a header of 1 GiB."""
    packed = zeros_deflated(1 << 30)
    zip_stating(tmp_path / "a.zip", "1.png", packed, size=2_000_000)
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 1 << 30
    with gzip.open(tmp_path / "a.tar.gz", "wb") as file:
        file.write(header.tobuf(tarfile.GNU_FORMAT) + bytes(1 << 20))
    code = (
        "import resource, sys; from pathlib import Path; from cytocache.image_files import read_file\n"
        "now = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (now + 60_000_000,) * 2)\n"
        "for name in ('a.zip', 'a.tar.gz'):\n"
        "    try: read_file(Path(sys.argv[1], name, '1.png'))\n"
        "    except ValueError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        check=True,
    )
    assert [line.split(" ")[0] for line in done.stdout.splitlines()] == ["it", "a"], done.stdout


def test_too_many_members_and_too_long_names_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadArchive, match="a name that is too long"):
        clean_name("a" * 5_000)
    monkeypatch.setattr(archive_member, "MAX_MEMBERS", 5)
    for kind in KINDS:
        with pytest.raises(BadArchive, match="lists more than 5 files"):
            list_archive(pack(tmp_path / kind, some_files(10)))


# ------------------------------------------------------------------------------------------------ what is damaged


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: b"", "it is no zip archive, or cut off: it has no directory at its end"),
        (lambda raw: raw[: len(raw) // 2], "it is no zip archive, or cut off"),
        (lambda raw: b"junk" + raw, "its directory is not where its end says"),
        (lambda raw: raw.replace(b"PK\x01\x02", b"PK\x01\x03", 1), "its directory is not where its end says"),
        (lambda raw: raw[:-12] + b"\xff\xff" + raw[-10:], "one of several parts"),
        (lambda raw: raw[:-14] + b"\xfe\xff\xfe\xff" + raw[-10:], "its directory is not where its end says"),
        (lambda raw: raw[:-10] + b"\xf0\xff\xff\x7f" + raw[-6:], "its directory has 2,147,483,632 bytes, more than"),
        (lambda raw: raw[:-6] + b"\0\0\0\0" + raw[-2:], "its directory is not where its end says"),
    ],
)
def test_a_damaged_directory_of_a_zip_is_told(change: object, message: str, tmp_path: Path) -> None:
    archive = pack(tmp_path / "a.zip", some_files(5))
    archive.write_bytes(change(archive.read_bytes()))  # type: ignore[operator]  # one of the above
    with pytest.raises(BadArchive, match=message):
        list_archive(archive)
    with pytest.raises(UnreadableImage, match=message):
        read_file(archive / "1.png")


def test_a_damaged_member_is_told_and_the_others_are_read(tmp_path: Path) -> None:
    content = random.Random(0).randbytes(3_000)
    files = {"a.png": content, "b.png": content[::-1], "c.png": content}
    archive = pack(tmp_path / "a.zip", files)
    raw = bytearray(archive.read_bytes())
    raw[raw.index(content[:50]) + 5] ^= 1  # a, stored
    raw[raw.index(b"b.png") + 40] ^= 255  # b, deflated
    archive.write_bytes(raw)
    for name in ("a.png", "b.png"):
        with pytest.raises(UnreadableImage, match=r"the archive is damaged at this member|it unpacks to more"):
            read_file(archive / name)
        assert hash_of(archive / name) is None
    assert read_file(archive / "c.png") == content


def test_a_tar_that_is_cut_off_or_damaged_is_told(tmp_path: Path) -> None:
    files = {f"{n}.png": random.Random(n).randbytes(3_000) for n in range(9)}
    whole = pack(tmp_path / "a.tar", files).read_bytes()
    for raw, message in (
        (whole[:8_000], "cut off: a member ends after the end"),
        (whole[:300], "no tar archive, or cut off"),
        (b"\x01" + whole[1:], "the checksum of a header is wrong"),
        (b"x" * 2_000, "it is no tar archive, or damaged"),
        (b"", "it is no tar archive, or cut off"),
    ):
        (tmp_path / "b.tar").write_bytes(raw)
        with pytest.raises(BadArchive, match=message):
            list_archive(tmp_path / "b.tar")
    packed = gzip.compress(whole)
    for raw, message in ((packed[:9_000], "it is cut off"), (packed[:50] + b"\0" * 99 + packed[149:], "damaged")):
        (tmp_path / "b.tar.gz").write_bytes(raw)
        with pytest.raises(BadArchive, match=message):
            list_archive(tmp_path / "b.tar.gz")


@pytest.mark.parametrize("size", [2**63 - 512, 2**63 + 5, 2**80])
def test_a_size_that_no_file_can_have_is_told(size: int, tmp_path: Path) -> None:
    head = bytearray(tarfile.TarInfo("a.png").tobuf(tarfile.GNU_FORMAT))
    head[124:136] = b"\x80" + size.to_bytes(11, "big")
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    (tmp_path / "huge.tar").write_bytes(bytes(head) + bytes(1024))
    with pytest.raises(BadArchive, match="it is cut off"):
        list_archive(tmp_path / "huge.tar")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_damage_gives_the_bytes_or_a_reason(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Bytes changed anywhere: what a zip still gives has its checksum, and nothing else is raised."""
    files = {f"{n}.png": random.Random(n).randbytes(200) for n in range(4)}
    kind = data.draw(st.sampled_from(KINDS))
    archive = pack(tmp_path_factory.mktemp("fuzz") / kind, files)
    raw = bytearray(archive.read_bytes())
    for at in data.draw(st.lists(st.integers(0, len(raw) - 1), min_size=1, max_size=4)):
        raw[at] = data.draw(st.integers(0, 255))
    archive.write_bytes(raw)
    try:
        listing = list_archive(archive)
    except BadArchive:
        return
    for name in listing.members:
        try:
            found = read_file(archive / name)
        except UnreadableImage:
            continue
        assert kind != "cells.zip" or found in files.values() or zlib.crc32(found) == listing.members[name].crc


def test_deflate_of_a_member_that_lacks_its_end_is_told(tmp_path: Path) -> None:
    content = b"abc" * 1_000
    archive = zip_stating(tmp_path / "a.zip", "1.png", deflated(content)[:-3], size=3_000, crc=zlib.crc32(content))
    with pytest.raises(UnreadableImage, match="its checksum is wrong"):
        read_file(archive / "1.png")
