"""Small archives for tests: ordinary ones by Python's own modules, hostile ones by changing their bytes."""

import io
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

KINDS = ("cells.zip", "cells.tar", "cells.tar.gz", "cells.tgz")


def pack(archive: Path, files: dict[str, bytes], *, tar_format: int = tarfile.PAX_FORMAT) -> Path:
    """An archive with these files, in this order; the kind by its name. Every other member of a zip is deflated."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as packed:
            for n, (name, content) in enumerate(files.items()):
                packed.writestr(name, content, zipfile.ZIP_DEFLATED if n % 2 else zipfile.ZIP_STORED)
        return archive
    with tarfile.open(archive, "w" if archive.suffix == ".tar" else "w:gz", format=tar_format) as packed_tar:
        for name, content in files.items():
            add(packed_tar, name, content)
    return archive


def pack_folder(archive: Path, folder: Path, *, under: str = "") -> Path:
    """An archive of all files of a folder, their names behind `under`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return pack(archive, {under + path.relative_to(folder).as_posix(): path.read_bytes() for path in files})


def add(packed: tarfile.TarFile, name: str, content: bytes = b"", **fields: object) -> None:
    """One member of a tar, with fields of its header set."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for field, value in fields.items():
        setattr(member, field, value)
    packed.addfile(member, io.BytesIO(content))


def central_entry(raw: bytes, name: str) -> int:
    """Where in a zip the entry of its directory for `name` begins."""
    at = raw.index(b"PK\x01\x02")
    while True:
        n_name, n_extra, n_comment = struct.unpack_from("<3H", raw, at + 28)
        if raw[at + 46 : at + 46 + n_name] == name.encode():
            return at
        at += 46 + n_name + n_extra + n_comment


def zip_stating(archive: Path, name: str, packed: bytes, *, size: int, crc: int = 0) -> Path:
    """A zip of one deflated member whose headers state any size and checksum."""
    raw_name = name.encode()
    common = (20, 0, 8, 0, 33, crc, len(packed), size, len(raw_name), 0)
    local = struct.pack("<4s5H3L2H", b"PK\x03\x04", *common) + raw_name + packed
    entry = struct.pack("<4sH5H3L5H2L", b"PK\x01\x02", 20, *common, 0, 0, 0, 0, 0) + raw_name
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, len(entry), len(local), 0)
    archive.write_bytes(local + entry + end)
    return archive


def deflated(content: bytes) -> bytes:
    """Raw deflate, as in a zip."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(content) + packer.flush()


def zeros_deflated(n_bytes: int) -> bytes:
    """The same for zeros, without holding them."""
    packer, pieces, piece = zlib.compressobj(9, zlib.DEFLATED, -15), list[bytes](), bytes(1 << 20)
    for _ in range(n_bytes >> 20):
        pieces.append(packer.compress(piece))
    return b"".join([*pieces, packer.flush()])
