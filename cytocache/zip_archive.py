"""Lists and reads a .zip: its directory by its own numbers, checked against the file; members stored or deflated.

Python's `zipfile` is not used: it takes about a kilobyte for each member, and reads some damaged archives differently
from others. Format: PKWARE's APPNOTE.TXT 6.3.10, sections 4.3 (layout) and 4.5.3 (ZIP64).
"""

import stat
import struct
import zlib

from .archive_member import LINK, BadArchive, Listing, Member, NamesSoFar, OpenFile, check_size

MAX_DIRECTORY_BYTES = 512 << 20
_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR_64 = struct.Struct("<4sLQL")
_LONGEST_COMMENT = 65_535
_STORED, _DEFLATED = 0, 8
_ENCRYPTED = 0x1 | 0x40 | 0x2000
_MADE_ON_UNIX = 3
_FULL_2, _FULL_4 = 0xFFFF, 0xFFFFFFFF
_CUT = "it is cut off or damaged: its directory is not where its end says; get it again"


def list_zip(path: str) -> Listing:
    """The members of a zip archive. Memory: its directory, at most `MAX_DIRECTORY_BYTES`, and the listing.

    Refused are members that are links or devices, encrypted, compressed in another way than by deflate, called like
    another member or out of the archive, or that share bytes with another member.

    Raises
    ------
    BadArchive
        If it has no directory, or one that does not fit the file.
    """
    file = OpenFile(path)
    start, n_bytes, n_members = _find_directory(file)
    directory = file.read_at(start, n_bytes)
    if len(directory) != n_bytes:
        raise BadArchive(_CUT)
    found, at, spans = NamesSoFar(), 0, list[tuple[int, int, str]]()
    for _ in range(n_members):
        if len(directory) - at < _CENTRAL.size:
            raise BadArchive(_CUT)
        entry = _CENTRAL.unpack_from(directory, at)
        signature, made_by, _, flags, method, _, _, crc, packed, size, *rest = entry
        name_bytes, extra_bytes, comment_bytes, disk, _, attributes, offset = rest
        at += _CENTRAL.size
        end = at + name_bytes + extra_bytes + comment_bytes
        if signature != b"PK\x01\x02" or end > len(directory):
            raise BadArchive(_CUT)
        raw, extra = directory[at : at + name_bytes], directory[at + name_bytes : at + name_bytes + extra_bytes]
        at = end
        size, packed, offset, disk = _widened(extra, size, packed, offset, disk)
        name = _decoded(raw)
        if name.endswith(("/", "\\")) and size == 0:
            continue  # a folder
        kind = stat.S_IFMT(attributes >> 16) if made_by >> 8 == _MADE_ON_UNIX else 0
        if disk:
            raise BadArchive("it is one of several parts; join them (zip -s 0 PART --out WHOLE)")
        if offset + _LOCAL.size + name_bytes + packed > start:
            raise BadArchive(_CUT)
        refusal = _why_not(kind, flags, method, packed, size)
        place = Member(path, file.stamp, "zip", offset, size, packed, crc, method == _DEFLATED)
        spans.append((offset, offset + _LOCAL.size + name_bytes + packed, found.add(name, refusal or place)))
    if at != n_bytes:
        raise BadArchive(_CUT)
    furthest, before = 0, ""
    for begin, end, name in sorted(spans):
        if begin < furthest:
            for each in (before, name):
                found.refuse(each, "it shares its bytes with another member")
        if end > furthest:
            furthest, before = end, name
    return found.listing()


def read_zip(file: OpenFile, member: Member, most: int) -> bytes:
    """The bytes of a member. Memory: packed and unpacked, never more than its listing states, at most `most`.

    Raises
    ------
    BadArchive
        If they are not what the directory says: another size, a wrong checksum, cut off.
    """
    check_size(member.size, member.packed, most)
    check_size(member.packed, member.packed, most)
    head = file.read_at(member.offset, _LOCAL.size)
    if len(head) < _LOCAL.size or not head.startswith(b"PK\x03\x04"):
        raise BadArchive("the archive is damaged at this member")
    _, _, flags, method, _, _, _, _, _, name_bytes, extra_bytes = _LOCAL.unpack(head)
    if flags & _ENCRYPTED or method != (_DEFLATED if member.is_deflated else _STORED):
        raise BadArchive("the archive says two things about this member")
    raw = file.read_at(member.offset + _LOCAL.size + name_bytes + extra_bytes, member.packed)
    if len(raw) != member.packed:
        raise BadArchive("the archive is cut off at this member")
    if member.is_deflated:
        try:
            unpacker = zlib.decompressobj(-15)
            raw = unpacker.decompress(raw, member.size + 1)
        except zlib.error:
            raise BadArchive("the archive is damaged at this member") from None
        if len(raw) > member.size:
            raise BadArchive(f"it unpacks to more than the {member.size:,} bytes that the archive states: a bomb")
    if len(raw) != member.size or zlib.crc32(raw) != member.crc:
        raise BadArchive("the archive is damaged at this member: its checksum is wrong")
    return raw


def _find_directory(file: OpenFile) -> tuple[int, int, int]:
    """(offset, bytes, entries) of the directory, which must end where the record of the archive's end begins."""
    tail_at = max(0, file.size - _END.size - _LONGEST_COMMENT)
    tail = file.read_at(tail_at, file.size - tail_at)
    at = tail.rfind(b"PK\x05\x06")
    while at >= 0:  # the bytes may also occur in a comment
        if len(tail) - at >= _END.size and at + _END.size + _END.unpack_from(tail, at)[7] == len(tail):
            break
        at = tail.rfind(b"PK\x05\x06", 0, at)
    if at < 0:
        raise BadArchive("it is no zip archive, or cut off: it has no directory at its end; get it again")
    _, disk, first_disk, n_here, n_members, n_bytes, start, _ = _END.unpack_from(tail, at)
    end = tail_at + at
    if _FULL_2 in (n_here, n_members, disk) or _FULL_4 in (n_bytes, start):
        locator = file.read_at(max(0, end - _LOCATOR_64.size), _LOCATOR_64.size)
        if end >= _LOCATOR_64.size and locator.startswith(b"PK\x06\x07"):
            _, disk, end, n_disks = _LOCATOR_64.unpack(locator)
            wide = file.read_at(end, _END_64.size) if end <= file.size else b""
            if len(wide) < _END_64.size or not wide.startswith(b"PK\x06\x06") or n_disks > 1:
                raise BadArchive(_CUT)
            _, _, _, _, disk, first_disk, n_here, n_members, n_bytes, start = _END_64.unpack(wide)
    if disk or first_disk or n_here != n_members:
        raise BadArchive("it is one of several parts; join them (zip -s 0 PART --out WHOLE)")
    if n_bytes > MAX_DIRECTORY_BYTES:
        raise BadArchive(f"its directory has {n_bytes:,} bytes, more than the {MAX_DIRECTORY_BYTES:,} that are allowed")
    if start + n_bytes != end or n_members * _CENTRAL.size > n_bytes:
        raise BadArchive(_CUT)
    return start, n_bytes, n_members


def _widened(extra: bytes, size: int, packed: int, offset: int, disk: int) -> tuple[int, int, int, int]:
    """The numbers that do not fit 4 bytes, from the ZIP64 field."""
    if _FULL_4 not in (size, packed, offset) and disk != _FULL_2:
        return size, packed, offset, disk
    at = 0
    while at + 4 <= len(extra):
        tag, length = struct.unpack_from("<HH", extra, at)
        body = extra[at + 4 : at + 4 + length]
        at += 4 + length
        if tag != 1:
            continue
        n_wide = [size, packed, offset].count(_FULL_4)
        if len(body) < 8 * n_wide + (4 if disk == _FULL_2 else 0):
            raise BadArchive(_CUT)
        numbers = iter(struct.unpack_from(f"<{n_wide}Q", body))
        size, packed, offset = (next(numbers) if each == _FULL_4 else each for each in (size, packed, offset))
        disk = struct.unpack_from("<L", body, 8 * n_wide)[0] if disk == _FULL_2 else disk
        return size, packed, offset, disk
    return size, packed, offset, disk


def _decoded(raw: bytes) -> str:
    """A name: UTF-8, also where the flag for it is missing (macOS); else the code page of DOS, where all bytes mean
    something. Old programs of Windows separate folders with backslashes."""
    try:
        name = raw.decode()
    except UnicodeDecodeError:
        name = raw.decode("cp437")
    return name.replace("\\", "/") if "\\" in name and "/" not in name else name


def _why_not(kind: int, flags: int, method: int, packed: int, size: int) -> str:
    if kind == stat.S_IFLNK:
        return LINK
    if kind not in (0, stat.S_IFREG):
        return "no regular file"
    if flags & _ENCRYPTED:
        return "encrypted"
    if method not in (_STORED, _DEFLATED):
        return f"compressed by a method that is not read (number {method}); zip it again with deflate"
    if method == _STORED and packed != size:
        return "the archive says two sizes of it"
    return ""
