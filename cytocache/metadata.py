"""Removes metadata from an encoded image, so that a decoder sees only what decides the pixels.

Malicious files attack decoders through comments, profiles, EXIF, thumbnails and further pages (very many empty
segments, compressed text, overlapping values), and none of these changes a pixel. The rest is checked for sizes that no
ordinary file has. Where a file is too damaged to parse, the remaining bytes are kept: the decoder reports the error.
"""

import re
import struct

MAX_SEGMENTS = 10_000  # of a JPEG; ordinary ones have below 300
MAX_CHUNKS = 250_000  # of a PNG; 100 million pixels in pieces of 8 KiB have below 100,000
MAX_SCANNED_PIXELS = 2_000_000_000  # pixels x scans of a progressive JPEG: 20 scans of the largest allowed image
MAX_TAGS = 1_000  # of a TIFF directory
MAX_PADDING = 16  # largest ratio of a TIFF's tile to its image, in pixels, for tiles above _SMALL
_SMALL = 4_000_000

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_KEPT = {b"IHDR", b"PLTE", b"IDAT", b"IEND"}  # without tRNS: transparency is dropped anyway
_JPEG_DROPPED = {0xFE, *range(0xE0, 0xF0)} - {0xE0, 0xEE}  # JFIF and Adobe say how colours are encoded
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # not an escaped 255, a fill byte or a restart marker
_SCAN, _END, _WITHOUT_CONTENT = 0xDA, 0xD9, (0x01, 0xD8)
_TIFF_UNITS = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_IMAGE_WIDTH, _IMAGE_LENGTH, _TILE_WIDTH, _TILE_LENGTH = 256, 257, 322, 323
_PHOTOMETRIC = {
    **{0: "grey (0 is white)", 1: "grey", 2: "RGB", 3: "palette", 4: "mask", 5: "CMYK", 6: "YCbCr", 8: "CIELAB"},
    **{9: "ICCLAB", 10: "ITULAB", 32803: "colour filter array", 34892: "linear raw"},
}


def without_metadata(raw: bytes) -> bytes:
    """The encoded image without metadata; raises ValueError for sizes that no ordinary file has.

    A TIFF is checked but not changed, since its content may lie anywhere. Memory: a copy of the file.
    """
    if raw.startswith(b"\xff\xd8\xff"):
        return _bare_jpeg(raw)
    if raw.startswith(_PNG_SIGNATURE):
        return _bare_png(raw)
    if raw[:2] in (b"II", b"MM"):
        _check_tiff(raw)
    return raw


def check_scans(raw: bytes, n_pixels: int) -> None:
    """Raise ValueError for a JPEG with too many scans, each of which takes a pass over all pixels."""
    n_scans = raw.count(b"\xff\xda")  # without metadata, these bytes rarely mean anything else
    if n_scans * n_pixels > MAX_SCANNED_PIXELS:
        raise ValueError(f"{n_scans:,} scans of {n_pixels:,} pixels")


def _bare_jpeg(raw: bytes) -> bytes:
    view, at, is_in_scan = memoryview(raw), 2, False
    kept: list[bytes | memoryview] = [raw[:2]]
    for _ in range(MAX_SEGMENTS):
        found = _MARKER.search(raw, at)  # bytes before it are encoded pixels after the start of a scan, else garbage
        if is_in_scan:
            kept.append(view[at : found.start()] if found else view[at:])
        if found is None:
            return b"".join(kept)
        marker, at = raw[found.end() - 1], found.end()
        if marker == _END:
            return b"".join([*kept, found[0]])
        is_in_scan = marker == _SCAN
        if marker not in _WITHOUT_CONTENT:
            at += int.from_bytes(view[at : at + 2], "big")
            if marker not in _JPEG_DROPPED:
                kept.append(view[found.start() : at])
    raise ValueError(f"more than {MAX_SEGMENTS:,} segments")


def _bare_png(raw: bytes) -> bytes:
    view, at = memoryview(raw), len(_PNG_SIGNATURE)
    kept: list[bytes | memoryview] = [_PNG_SIGNATURE]
    for _ in range(MAX_CHUNKS):
        end = at + 12 + int.from_bytes(view[at : at + 4], "big")
        name = raw[at + 4 : at + 8]
        if end > len(raw) or not name.isalpha():
            return b"".join([*kept, view[at:]])
        if name in _PNG_KEPT:
            kept.append(view[at:end])
        if name == b"IEND":
            return b"".join(kept)
        at = end
    raise ValueError(f"more than {MAX_CHUNKS:,} chunks")


def _check_tiff(raw: bytes) -> None:
    """Checks, of the first page, the number of tags, the size of their values, and the size of tiles."""
    n_bytes, values = _tiff_tags(raw)
    if n_bytes > len(raw):
        raise ValueError(f"TIFF tags claim {n_bytes:,} bytes of a file of {len(raw):,}")
    n_pixels = values.get(_IMAGE_WIDTH, 0) * values.get(_IMAGE_LENGTH, 0)
    tile = values.get(_TILE_WIDTH, 0) * values.get(_TILE_LENGTH, 0)
    if tile > max(_SMALL, MAX_PADDING * n_pixels):
        raise ValueError(f"tiles of {tile:,} pixels for a picture of {n_pixels:,}")


def tiff_layout(raw: bytes) -> str | None:
    """The layout of the first page of a TIFF, in words; None if it is no TIFF, or too damaged to parse."""
    if raw[:2] not in (b"II", b"MM"):
        return None
    _, values = _tiff_tags(raw)
    if not values.get(_IMAGE_WIDTH) or not values.get(_IMAGE_LENGTH):
        return None
    samples, bits = values.get(277, 1), values.get(258, 1)
    sign = {1: "unsigned", 2: "signed", 3: "floating-point"}.get(values.get(339, 1), "other")
    colours = _PHOTOMETRIC.get(values.get(262, -1), f"photometric interpretation {values.get(262, 'not stated')}")
    planes = ", planes apart" if values.get(284) == 2 else ""
    big = "BigTIFF with big-endian numbers, " if raw[:4] == b"MM\0+" else ""
    return f"{big}{samples} x {bits}-bit {sign} samples, {colours}{planes}, compression {values.get(259, 1)}"


def _tiff_tags(raw: bytes) -> tuple[int, dict[int, int]]:
    """(bytes that the values claim, the first value of each tag) of the first page; an empty dict if it is cut off."""
    order = "<" if raw[:2] == b"II" else ">"
    is_big = b"+" in raw[2:4]
    entry = struct.Struct(f"{order}HHQ8s" if is_big else f"{order}HHI4s")
    word = f"{order}{'Q' if is_big else 'I'}"
    try:
        (at,) = struct.unpack_from(word, raw, 8 if is_big else 4)
        (n_tags,) = struct.unpack_from(f"{order}{'Q' if is_big else 'H'}", raw, at)
    except struct.error:
        return 0, {}  # cut off
    if n_tags > MAX_TAGS:
        raise ValueError(f"{n_tags:,} TIFF tags")
    at += 8 if is_big else 2
    n_bytes, values = 0, dict[int, int]()
    for start in range(at, min(at + n_tags * entry.size, len(raw) - entry.size + 1), entry.size):
        tag, kind, count, value = entry.unpack_from(raw, start)
        size = _TIFF_UNITS.get(kind, 0) * count
        n_bytes += size if size > len(value) else 0
        if kind == 3:
            short = value
            if size > len(value):
                (where,) = struct.unpack(word, value)
                short = raw[where : where + 2].ljust(2, b"\0")
            values.setdefault(tag, struct.unpack(f"{order}H", short[:2])[0])
        else:
            values.setdefault(tag, struct.unpack(word, value)[0])
    return n_bytes, values
