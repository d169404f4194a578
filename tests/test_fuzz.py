"""What comes from outside, damaged in a thousand ways: a listed error or the right pixels, in bounded time and memory.

Files are made here from a seed and read in a child process under a limit of address space, so that a crash, a hang or
a bomb is a failed test with the file's name and not the end of the test run.
"""

import json
import math
import pickle
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from test_images import _chunk, _file, _picture, _rough

# ------------------------------------------------------------------------------------------ valid files


def _seeds() -> dict[str, bytes]:
    """Small valid files of every format, mode and compression that is read."""
    rgb, grey = _rough(24, 32, 3), _rough(24, 32)
    picture = _picture(rgb, "RGB")
    modes = {
        "rgb": picture,
        "grey": _picture(grey, "L"),
        "one bit": Image.fromarray(grey > 128),
        "palette": picture.quantize(16),
        "16 bit": Image.fromarray((grey * 257).astype(np.uint16)),
        "rgba": _picture(_rough(24, 32, 4), "RGBA"),
        "cmyk": _picture(_rough(24, 32, 4), "CMYK"),
        "grey alpha": _picture(_rough(24, 32, 2), "LA"),
        "float": Image.fromarray((grey / 255).astype(np.float32)),
        "32 bit": Image.fromarray(grey.astype(np.int32)),
    }
    formats = {
        "JPEG": ("rgb", "grey", "cmyk"),
        "PNG": ("rgb", "grey", "one bit", "palette", "16 bit", "rgba", "grey alpha"),
        "BMP": ("rgb", "grey", "one bit", "palette", "rgba"),
        "TIFF": tuple(modes),
    }
    files = {f"{format} {mode}": _file(modes[mode], format) for format in formats for mode in formats[format]}
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits", "zstd", "lzma"):
        files[f"TIFF {compression}"] = _file(picture, "TIFF", compression=compression)
    for compression in ("group3", "group4", "tiff_ccitt"):
        files[f"TIFF {compression}"] = _file(modes["one bit"], "TIFF", compression=compression)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    files |= {
        "JPEG progressive": _file(picture, "JPEG", progressive=True),
        "JPEG with metadata": _file(picture, "JPEG", exif=exif, icc_profile=bytes(300), comment=b"hello"),
        "JPEG with restarts": _file(picture, "JPEG", restart_marker_rows=1),
        "PNG with metadata": _file(picture, "PNG", exif=exif, icc_profile=bytes(300), dpi=(96, 96)),
        "PNG animated": _file(picture, "PNG", save_all=True, append_images=[_picture(255 - rgb, "RGB")]),
        "TIFF turned": _file(picture, "TIFF", exif=exif),
        "TIFF of three pages": _file(picture, "TIFF", save_all=True, append_images=[picture, picture]),
        "TIFF big": _file(picture, "TIFF", big_tiff=True),
        "TIFF tiled": tiled_tiff(rgb),
        "BMP run-length": rle_bmp(
            8, 4, bytes([8, 7, 0, 0, 8, 6, 0, 0, 3, 5, 0, 5, 1, 2, 3, 4, 5, 0, 0, 0, 8, 9, 0, 1])
        ),
    }
    return files


def tiled_tiff(rgb: np.ndarray, *, tile: tuple[int, int] = (16, 16)) -> bytes:
    """Written by hand, uncompressed: Pillow writes strips only. `tile` may lie about the tiles' size."""
    height, width, _ = rgb.shape
    padded = np.zeros((math.ceil(height / 16) * 16, math.ceil(width / 16) * 16, 3), np.uint8)
    padded[:height, :width] = rgb
    tiles = [padded[y : y + 16, x : x + 16].tobytes() for y in range(0, height, 16) for x in range(0, width, 16)]
    data = b"".join(tiles)
    at = [8 + len(tiles[0]) * n for n in range(len(tiles))]
    entries = [
        (256, 4, [width]),
        (257, 4, [height]),
        (258, 3, [8, 8, 8]),
        (259, 3, [1]),
        (262, 3, [2]),
        (277, 3, [3]),
        (284, 3, [1]),
        (322, 4, [tile[0]]),
        (323, 4, [tile[1]]),
        (324, 4, at),
        (325, 4, [len(tiles[0])] * len(tiles)),
    ]
    return tiff(data, entries)


def tiff(data: bytes, entries: list[tuple[int, int, list[int]]], *, following: int | None = 0) -> bytes:
    """A little-endian TIFF: header, `data` at 8, the directory. `following`: the next page, None for this one again."""
    directory, outside = 8 + len(data), b""
    after = directory + 2 + 12 * len(entries) + 4
    packed = struct.pack("<H", len(entries))
    for tag, kind, values in entries:
        raw = struct.pack(f"<{len(values)}{'H' if kind == 3 else 'I'}", *values)
        if len(raw) > 4:
            packed += struct.pack("<HHII", tag, kind, len(values), after + len(outside))
            outside += raw
        else:
            packed += struct.pack("<HHI", tag, kind, len(values)) + raw.ljust(4, b"\0")
    packed += struct.pack("<I", directory if following is None else following)
    return b"II*\0" + struct.pack("<I", directory) + data + packed + outside


def grey_tags(width: int, height: int, n_bytes: int, **changes: int) -> list[tuple[int, int, list[int]]]:
    """The directory of an 8-bit grey TIFF of one strip at 8; `t259=5` changes tag 259 (LZW)."""
    tags = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: n_bytes}
    tags |= {int(name[1:]): value for name, value in changes.items()}
    return [(tag, 4, [value]) for tag, value in sorted(tags.items())]


def rle_bmp(width: int, height: int, codes: bytes) -> bytes:
    palette = bytes(range(256)) * 4
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(codes), 0, 0, 256, 0)
    at = 14 + len(header) + len(palette)
    return b"BM" + struct.pack("<IHHI", at + len(codes), 0, 0, at) + header + palette + codes


def png(*chunks: tuple[bytes, bytes], width: int = 8, height: int = 8, colour: int = 2, bits: int = 8) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in ((b"IHDR", header), *chunks))


PIXELS = (b"IDAT", zlib.compress((b"\0" + bytes(range(24))) * 8))
END = (b"IEND", b"")
SEEDS = _seeds()


# ---------------------------------------------------------------------------------------- damaged files


def flipped(raw: bytes, rng: np.random.Generator) -> bytes:
    """Some bits are other bits, mostly in the first part, where the headers are."""
    damaged = bytearray(raw)
    reach = int(rng.choice([32, 128, len(raw)]))
    for at in rng.integers(0, min(reach, len(raw)), rng.integers(1, 9)):
        damaged[at] ^= 1 << rng.integers(8)
    return bytes(damaged)


def set_numbers(raw: bytes, rng: np.random.Generator) -> bytes:
    """Some 2 or 4 byte numbers are extremes."""
    damaged = bytearray(raw)
    for _ in range(rng.integers(1, 4)):
        size = int(rng.choice([2, 4]))
        at = int(rng.integers(0, min(int(rng.choice([64, 256, len(raw)])), len(raw))))
        extremes = [0, 1, 2**15, 2**16 - 1, 20_000] + [2**31 - 1, 2**31, 2**32 - 1, 100_000] * (size == 4)
        value = extremes[rng.integers(len(extremes))]
        damaged[at : at + size] = value.to_bytes(size, "little" if rng.integers(2) else "big")
    return bytes(damaged)


def cut(raw: bytes, rng: np.random.Generator) -> bytes:
    return raw[: rng.integers(0, len(raw))]


def spliced(raw: bytes, rng: np.random.Generator) -> bytes:
    """Goes on as another file, from anywhere to anywhere."""
    other = list(SEEDS.values())[rng.integers(len(SEEDS))]
    return raw[: rng.integers(0, len(raw))] + other[rng.integers(0, len(other)) :]


def rearranged(raw: bytes, rng: np.random.Generator) -> bytes:
    """A piece is missing, or there twice, or elsewhere."""
    start, stop, at = sorted(rng.integers(0, len(raw), 3).tolist())
    piece = raw[start:stop]
    rest = raw[:start] + raw[stop:]
    return [rest, raw[:at] + piece * int(rng.integers(1, 20)) + raw[at:], rest[:at] + piece + rest[at:]][
        rng.integers(3)
    ]


def with_other_fields(raw: bytes, rng: np.random.Generator) -> bytes:
    """Damage that its container does not notice: PNG chunks with a right CRC, TIFF tags, JPEG segments."""
    if raw.startswith(b"\x89PNG"):
        return _other_chunks(raw, rng)
    if raw[:2] in (b"II", b"MM"):
        return _other_tags(raw, rng)
    if raw.startswith(b"\xff\xd8"):
        return _other_segments(raw, rng)
    return set_numbers(raw, rng)


def _other_chunks(raw: bytes, rng: np.random.Generator) -> bytes:
    chunks, at = [], 8
    while at < len(raw):
        n = int.from_bytes(raw[at : at + 4], "big")
        chunks.append((raw[at + 4 : at + 8], raw[at + 8 : at + 8 + n]))
        at += 12 + n
    place = int(rng.integers(len(chunks)))
    name, content = chunks[place]
    way = rng.integers(5)
    if way == 0 and content:
        chunks[place] = (name, flipped(content, rng))
    elif way == 1 and content:
        chunks[place] = (name, set_numbers(content, rng))
    elif way == 2:
        chunks[place] = (
            [b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"acTL", b"fcTL", b"fdAT", b"iCCP"][rng.integers(8)],
            content,
        )
    elif way == 3:
        chunks.insert(int(rng.integers(len(chunks) + 1)), (name, content))
    else:
        del chunks[place]
    return raw[:8] + b"".join(_chunk(*chunk) for chunk in chunks)


def _other_tags(raw: bytes, rng: np.random.Generator) -> bytes:
    order = "<" if raw[:2] == b"II" else ">"
    (at,) = struct.unpack_from(f"{order}I", raw, 4)
    if raw[2] == 43 or at + 2 > len(raw):
        return set_numbers(raw, rng)
    (n,) = struct.unpack_from(f"{order}H", raw, at)
    damaged = bytearray(raw)
    for _ in range(rng.integers(1, 3)):
        entry = at + 2 + 12 * int(rng.integers(n))
        field = int(rng.integers(4))
        if field == 0:
            tags = [254, 256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 317, 320, 322, 323, 324, 325, 330]
            tags += [338, 339, 347, 512, 513, 530, 532, 34665, 34675, 34853, 40965]
            struct.pack_into(f"{order}H", damaged, entry, tags[rng.integers(len(tags))])
        elif field == 1:
            struct.pack_into(f"{order}H", damaged, entry + 2, int(rng.integers(0, 20)))
        else:
            extremes = [0, 1, 2, 3, 5, 7, 8, 16, 32, len(raw), 1000, 65_535, 2**20, 2**31 - 1, 2**32 - 1, at]
            struct.pack_into(f"{order}I", damaged, entry + 4 * (field - 1), extremes[rng.integers(len(extremes))])
    if rng.integers(4) == 0:
        struct.pack_into(f"{order}I", damaged, at + 2 + 12 * n, int(rng.choice([at, 8, len(raw) - 2, 0])))
    return bytes(damaged)


def _other_segments(raw: bytes, rng: np.random.Generator) -> bytes:
    segments, at = [], 2
    while raw[at + 1] != 0xDA:
        n = int.from_bytes(raw[at + 2 : at + 4], "big")
        segments.append((raw[at + 1], raw[at + 4 : at + 2 + n]))
        at += 2 + n
    rest = raw[at:]
    place = int(rng.integers(len(segments)))
    marker, content = segments[place]
    way = rng.integers(5)
    if way == 0:
        segments[place] = (marker, flipped(content, rng))
    elif way == 1:
        segments[place] = (int(rng.choice([0xC0, 0xC1, 0xC2, 0xC4, 0xC9, 0xDB, 0xDD, 0xE0, 0xE1, 0xEE, 0xFE])), content)
    elif way == 2:
        segments.insert(int(rng.integers(len(segments) + 1)), (marker, content))
    elif way == 3:
        del segments[place]
    else:
        segments[place] = (marker, set_numbers(content, rng))
    made = [bytes([0xFF, marker]) + (len(content) + 2).to_bytes(2, "big") + content for marker, content in segments]
    return b"\xff\xd8" + b"".join(made) + (flipped(rest, rng) if rng.integers(3) == 0 else rest)


WAYS: list[Callable[[bytes, np.random.Generator], bytes]] = [
    flipped,
    set_numbers,
    cut,
    spliced,
    rearranged,
    with_other_fields,
    with_other_fields,
    with_other_fields,
]
SUFFIXES = (".jpg", ".png", ".tif", ".bmp", ".jpeg", ".tiff")


def mutants(n_per_seed: int) -> Iterator[tuple[str, bytes]]:
    """(file name, content): each seed damaged in every way in turn, under any image suffix."""
    rng = np.random.default_rng(20_261_121)
    for name, raw in SEEDS.items():
        for n in range(n_per_seed):
            way = WAYS[n % len(WAYS)]
            yield f"{name} {n} {way.__name__}{SUFFIXES[rng.integers(6)]}", way(raw, rng)


# ----------------------------------------------------------------------------------------- nasty on purpose


def _many_scans(width: int, height: int, n_scans: int) -> bytes:
    """A progressive JPEG whose last scan is there again and again: 31 bytes each, a whole pass over the picture."""
    raw = _file(Image.new("L", (width, height), 128), "JPEG", progressive=True)
    last = raw[raw.rfind(b"\xff\xda") : -2]
    return raw[:-2] + last * n_scans + b"\xff\xd9"


def _segments(marker: int, content: bytes, n: int) -> bytes:
    return (bytes([0xFF, marker]) + (len(content) + 2).to_bytes(2, "big") + content) * n


def _exif(*entries: tuple[int, int, int, int], following: int = 0) -> bytes:
    packed = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + packed + struct.pack("<I", following)


def _big_tiff(n_tags: int, entries: bytes = b"") -> bytes:
    return b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, n_tags) + entries


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("executed",)


def nasty() -> dict[str, bytes]:
    """Files made to hurt: bombs, loops, floods, lies, and other formats under an image's name. None is a picture
    of more than a few million pixels, if it is one at all."""
    jpeg, zeros = SEEDS["JPEG rgb"], bytes(64 << 20)
    inflating = zlib.compress(zeros, 9)  # 64 MB in 64 KB
    other = {f"{format}.png": _file(_picture(_rough(20, 20, 3), "RGB"), format) for format in ("GIF", "WEBP", "ICO")}
    animation = [Image.new("L", (9, 9), level) for level in range(0, 250, 50)]
    exif_loop = _exif((0x8769, 4, 1, 8), (0x8825, 4, 1, 8), (0xA005, 4, 1, 8), following=8)
    overlapping = _exif(*[(1 + n, 7, 60_000, 0) for n in range(5_000)])[:65_500]
    pages = b"".join(
        struct.pack("<HHHIII", 1, 256, 4, 1, 5, 8 + 18 * (n + 1) if n < 49_999 else 0) for n in range(50_000)
    )
    return other | {
        "empty.png": b"",
        "one byte.jpg": b"\xff",
        "nothing but 255.jpg": b"\xff" * (2 << 20),
        "nothing but 0.tif": bytes(1 << 20),
        "html.png": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "svg.png": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "postscript.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(executed) print\n",
        "pickle.png": pickle.dumps(_Evil()),
        "elf.bmp": b"\x7fELF" + bytes(range(256)) * 4,
        "zip.tif": b"PK\x03\x04" + bytes(200),
        "animated gif.png": _file(animation[0], "GIF", save_all=True, append_images=animation[1:]),
        "animated webp.jpg": _file(animation[0], "WEBP", save_all=True, append_images=animation[1:]),
        # PNG
        "text that inflates.png": png(
            (b"zTXt", b"k\0\0" + inflating), *[(b"iTXt", b"k\0\1\0\0\0" + inflating)] * 30, PIXELS, END
        ),
        "profile that inflates.png": png((b"iCCP", b"k\0\0" + inflating), PIXELS, END),
        "pixels that inflate.png": png((b"IDAT", zlib.compress(zeros * 4, 9)), END),
        "too few pixels.png": png((b"IDAT", zlib.compress(bytes(30))), END),
        "no pixels at all.png": png((b"IDAT", b""), END, width=9_000, height=9_000),
        "a flood of chunks.png": png(*[(b"tEXt", b"")] * 300_000, PIXELS, END),
        "a flood of pixels chunks.png": png(*[(b"IDAT", b"")] * 300_000, PIXELS, END),
        "a chunk of 4 GB.png": png() + b"\xff\xff\xff\xffIDAT" + PIXELS[1],
        "no width.png": png(PIXELS, END, width=0),
        "negative width.png": png(PIXELS, END, width=2**32 - 8),
        "two headers.png": png((b"IHDR", struct.pack(">IIBBBBB", 30_000, 3_000, 16, 6, 0, 0, 1)), PIXELS, END),
        "palette without colours.png": png((b"IDAT", zlib.compress((b"\0" + bytes(range(8))) * 8)), END, colour=3),
        "17 bits.png": png(PIXELS, END, bits=17),
        "animation without frames.png": png((b"acTL", struct.pack(">II", 2**31 - 1, 0)), PIXELS, END),
        "frames before pixels.png": png(
            (b"acTL", struct.pack(">II", 2, 0)),
            (b"fcTL", struct.pack(">IIIIIHHBB", 0, 2**31 - 1, 2**31 - 1, 0, 0, 1, 1, 0, 0)),
            PIXELS,
            (b"fdAT", struct.pack(">I", 9) + PIXELS[1]),
            END,
        ),
        "one row of 100 million.png": png(
            (b"IDAT", zlib.compress(bytes(12_500_001), 9)), END, width=100_000_000, height=1, colour=0, bits=1
        ),
        # JPEG
        "2,000 scans.jpg": _many_scans(3_000, 3_000, 2_000),
        "9,000 scans of a point.jpg": _many_scans(1, 1, 9_000),
        "a flood of segments.jpg": jpeg[:2] + _segments(0xE5, b"", 500_000) + jpeg[2:],
        "a flood of tables.jpg": jpeg[:2] + _segments(0xDB, b"\0" + bytes(range(1, 65)), 12_000) + jpeg[2:],
        "exif of 20 MB.jpg": jpeg[:2] + _segments(0xE1, b"Exif\0\0" + bytes(65_000), 300) + jpeg[2:],
        "exif in circles.jpg": jpeg[:2] + _segments(0xE1, exif_loop, 1) + jpeg[2:],
        "exif that overlaps.jpg": jpeg[:2] + _segments(0xE1, overlapping, 1) + jpeg[2:],
        "exif that overlaps, long.jpg": jpeg[:2] + _segments(0xE1, overlapping, 100) + jpeg[2:],
        "profile in 255 parts.jpg": jpeg[:2] + _segments(0xE2, b"ICC_PROFILE\0\1\xff" + bytes(9), 255) + jpeg[2:],
        "many pictures.jpg": jpeg[:2] + _segments(0xE2, b"MPF\0" + _exif((0xB001, 4, 1, 2**31))[6:], 1) + jpeg[2:],
        "no end.jpg": jpeg[:-2],
        "end at once.jpg": b"\xff\xd8\xff\xd9",
        "largest of all.jpg": jpeg.replace(struct.pack(">HH", 24, 32), b"\xff\xff\xff\xff"),
        "no height.jpg": jpeg.replace(struct.pack(">HH", 24, 32), b"\0\0\0\x20"),
        # TIFF
        "next page is this page.tif": tiff(bytes(64), grey_tags(8, 8, 64), following=None),
        "50,000 pages.tif": tiff(pages, grey_tags(8, 8, 64), following=8),
        "many tags that overlap.tif": tiff(bytes(60_000), [(n, 1, [0]) for n in range(1, 60_000)]).replace(
            struct.pack("<HI", 1, 1), struct.pack("<HI", 1, 500_000)
        ),
        "values that overlap.tif": tiff(
            bytes(1 << 20), [*grey_tags(8, 8, 64), *[(40_000 + n, 1, [0]) for n in range(900)]]
        ).replace(struct.pack("<HI", 1, 1), struct.pack("<HI", 1, 1 << 20)),
        "2^63 tags.tif": _big_tiff(2**63),
        "a million tags.tif": _big_tiff(1_000_000, struct.pack("<HHQQ", 256, 4, 1, 1) * 1_000_000),
        "tiles larger than all.tif": tiled_tiff(_rough(16, 16, 3), tile=(2**15, 2**15)),
        "tiles of 169 million.tif": tiled_tiff(_rough(16, 16, 3), tile=(13_000, 13_000)),
        "compressed tiles of 169 million.tif": tiff(
            zlib.compress(zeros), grey_tags(16, 16, 60_000, t259=8, t322=13_000, t323=13_000, t324=8, t325=60_000)
        ),
        "strip that inflates.tif": tiff(inflating, grey_tags(8, 8, len(inflating), t259=8)),
        "strip beyond the end.tif": tiff(bytes(64), grey_tags(8, 8, 2**31, t273=2**31)),
        "strip in the header.tif": tiff(bytes(64), grey_tags(8, 8, 64, t273=0)),
        "65,535 bits.tif": tiff(bytes(64), grey_tags(8, 8, 64, t258=65_535)),
        "60,000 samples.tif": tiff(bytes(64), grey_tags(8, 8, 64, t277=60_000)),
        "a packed bomb.tif": tiff(b"\x81\0" * 100_000, grey_tags(3_000, 3_000, 200_000, t259=32_773)),
        "an LZW bomb.tif": tiff(b"\x80\x3f\xff" + b"\xff" * 60_000, grey_tags(3_000, 3_000, 60_003, t259=5)),
        "2,000 scans in a strip.tif": tiff(
            _many_scans(2_000, 2_000, 2_000), grey_tags(2_000, 2_000, len(_many_scans(2_000, 2_000, 2_000)), t259=7)
        ),
        "exif is this page.tif": tiff(bytes(64), grey_tags(8, 8, 64, t34665=72, t34853=72, t40965=72, t330=72)),
        "one column of 90 million.tif": tiff(bytes(64), grey_tags(1, 90_000_000, 90_000_000)),
        # BMP
        "jump over 25 GB.bmp": rle_bmp(100_000_000, 1, b"\0\x02\xff\xff" * 9),
        "jumps.bmp": rle_bmp(60_000, 100, b"\0\x02\xff\xff" * 900 + b"\0\1"),
        "lines without end.bmp": rle_bmp(4_000, 4_000, b"\x01\x01\0\0" * 5_000),
        "codes that do nothing.bmp": rle_bmp(1, 2, b"\x01\x01" * 20_000_000),
        "lines of 25 million.bmp": rle_bmp(5_000, 5_000, b"\0\0" * 5_000),
        "upside down, highest of all.bmp": rle_bmp(1, -(2**31), b"\0\1"),
        "pixels before the file.bmp": SEEDS["BMP rgb"][:10] + bytes(4) + SEEDS["BMP rgb"][14:],
        "a palette of 4 billion.bmp": SEEDS["BMP palette"][:46] + b"\xff" * 4 + SEEDS["BMP palette"][50:],
    }


def odd_but_right() -> dict[str, bytes]:
    """Unusual pictures that must be read: a point, a long line, 20,000 pixels wide, deep, inked, see-through."""
    wide = Image.fromarray(_rough(40, 20_000).astype(np.uint8))
    point = Image.new("RGB", (1, 1), (200, 100, 50))
    files = {f"a point.{format}": _file(point, format) for format in ("PNG", "JPEG", "BMP", "TIFF")}
    files |= {f"wide.{format}": _file(wide, format) for format in ("PNG", "JPEG", "BMP", "TIFF")}
    files |= {"long line.png": _file(Image.new("L", (1, 60_000), 7), "PNG"), "20 scans.jpg": _many_scans(700, 700, 20)}
    return files | {name.replace("/", " ") + ".img": raw for name, raw in SEEDS.items()}


# ---------------------------------------------------------------------------------------- reading them

SECONDS = 30.0  # for one image, on a busy machine; the worst takes about two
MEGABYTES = 1_500  # above what the imports take: the largest picture allowed and its conversion

READER = """
import hashlib, io, json, resource, sys, time, warnings
from pathlib import Path
from PIL import Image
from cytocache.images import _to_rgb, read_image
from cytocache.preprocess import Preprocess

def megabytes(what):
    return next(int(line.split()[1]) // 1024 for line in open("/proc/self/status") if line.startswith(what))

Image.init()
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
limit = used + int(sys.argv[2]) * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
warnings.simplefilter("error")
for path in sorted(Path(sys.argv[1]).iterdir()):
    print(json.dumps({"reading": path.name}), flush=True)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    before, began = megabytes("VmRSS"), time.monotonic()
    picture, digest, error = read_image(path)
    if picture is not None:
        Preprocess().resize(picture)
    told = {"name": path.name, "error": error, "s": time.monotonic() - began, "grew_mb": megabytes("VmHWM") - before,
            "hash_fits": digest == hashlib.sha256(path.read_bytes()).hexdigest()}
    if picture is not None:
        told |= {"mode": picture.mode, "size": picture.size}
        try:
            with warnings.catch_warnings(action="ignore"):
                plain = _to_rgb(Image.open(io.BytesIO(path.read_bytes()), formats=("BMP", "JPEG", "PNG", "TIFF")))
            told["as_plain"] = plain.size == picture.size and plain.tobytes() == picture.tobytes()
        except Exception as reason:
            told["as_plain"] = None
    print(json.dumps(told), flush=True)
"""


def read_all(files: dict[str, bytes], folder: Path) -> dict[str, dict[str, Any]]:
    """What a child process under limits says about every file."""
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    command = [sys.executable, "-c", READER, str(folder), str(MEGABYTES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"{lines[-1]}: exit code {done.returncode}\n{done.stderr}"
    told = {line["name"]: line for line in lines if "name" in line}
    assert told.keys() == files.keys()
    return told


def assert_listed(told: dict[str, Any]) -> None:
    """A picture of sane size, or one printable line; quickly, and not because memory ran out."""
    assert told["s"] < SECONDS, told
    assert told["grew_mb"] < MEGABYTES, told
    assert told["hash_fits"], told
    if told["error"] is None:
        assert told["mode"] == "RGB"
        assert 0 < told["size"][0] * told["size"][1] <= 100_000_000, told
        assert told["as_plain"] is not False, told
    else:
        assert 0 < len(told["error"]) <= 200, told
        assert told["error"].isprintable()
        assert "MemoryError" not in told["error"], told


def test_a_thousand_damaged_images_end_in_a_listed_error_or_in_the_pixels_that_pillow_reads(tmp_path: Path) -> None:
    files = dict(mutants(24))
    assert len(files) >= 1_000
    told = read_all(files, tmp_path / "files")
    for one in told.values():
        assert_listed(one)
    n_read = sum(one["error"] is None for one in told.values())
    assert 200 < n_read < len(files) - 400  # the damage does something, and not always the same
    assert sum(one.get("as_plain") is True for one in told.values()) > 0.9 * n_read


def test_files_made_to_hurt_end_in_a_listed_error_or_in_a_picture(tmp_path: Path) -> None:
    told = read_all(nasty(), tmp_path / "files")
    for one in told.values():
        assert_listed(one)


def test_unusual_pictures_are_read_as_pillow_reads_them(tmp_path: Path) -> None:
    told = read_all(odd_but_right(), tmp_path / "files")
    for one in told.values():
        assert_listed(one)
        assert (one["error"], one["as_plain"]) == (None, True), one
