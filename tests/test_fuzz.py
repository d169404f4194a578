"""What comes from outside, damaged in a thousand ways: a listed error or the right pixels, in bounded time and memory.

Files are made here from a seed and read in a child process under a limit of address space, so that a crash, a hang or
a bomb is a failed test with the file's name and not the end of the test run.
"""

import functools
import io
import json
import math
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from test_backbones import _lively_state, _published
from test_images import _chunk, _file, _picture, _rough

from cli import cli
from cytocache.backbones import load_backbone
from cytocache.datasets import open_images
from cytocache.extract import ExtractConfig, extract
from cytocache.images import read_image
from cytocache.preprocess import Preprocess
from cytocache.torchvision_guard import declare_missing_operators
from stores import ActivationStore
from stores.files import sha256_json

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
        "JPEG by Adobe": adobe_jpeg(_file(picture, "JPEG")),
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


def adobe_jpeg(raw: bytes) -> bytes:
    """The same coded numbers, of which another segment in place of JFIF's says that they are red, green and blue."""
    return raw[:2] + b"\xff\xee\x00\x0eAdobe\x00\x64" + bytes(5) + raw[20:]


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


@functools.cache
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
        "lines without end.bmp": rle_bmp(2_000, 2_000, b"\x01\x01\0\0" * 5_000),
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
MEGABYTES = 1_000  # above what the imports take: the largest picture allowed and its conversion

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
    files = dict(mutants(50))
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


# --------------------------------------------------------------------------------------- weights files

LOADER = """
import json, resource, sys, time
from pathlib import Path
import torch
from cytocache import backbones
from stores.errors import BadInput

torch.set_num_threads(1)
backbones.ARCHITECTURES["tiny"] = backbones.Architecture(
    timm_name="vit_small_patch14_dinov2", options={"embed_dim": 32, "num_heads": 2, "depth": 2}, weights_file="T.pth")
pixels = torch.arange(224 * 224 * 3).reshape(1, 224, 224, 3).remainder(251).to(torch.uint8)

def load(path):
    model = backbones.load_backbone("tiny", weights=str(path), blocks=(-1,))
    with torch.inference_mode():
        return model.tokens(pixels)[0]

def megabytes(what):
    return next(int(line.split()[1]) // 1024 for line in open("/proc/self/status") if line.startswith(what))

right = load(sys.argv[2])
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
limit = used + 600 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for path in sorted(Path(sys.argv[1]).iterdir()):
    print(json.dumps({"reading": path.name}), flush=True)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    before, began, error, told = megabytes("VmRSS"), time.monotonic(), None, {}
    try:
        tokens = load(path)
        told = {"is_right": torch.equal(tokens, right), "is_finite": bool(torch.isfinite(tokens).all())}
    except BadInput as refused:
        error = str(refused)
    told |= {"name": path.name, "error": error, "s": time.monotonic() - began, "grew_mb": megabytes("VmHWM") - before}
    print(json.dumps(told), flush=True)
"""


class _Asks:
    """Pickled as a call of `function`; the value is what it returns when it is loaded without care."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """(a published file, the backbone's weights) of a small model of the DINOv2 family."""
    declare_missing_operators()
    import timm

    options: dict[str, Any] = {"embed_dim": 32, "num_heads": 2, "depth": 2}
    with torch.device("meta"):
        model = timm.create_model("vit_small_patch14_dinov2", img_size=224, num_classes=0, **options)
    state = _lively_state(model)
    path = tmp_path_factory.mktemp("weights") / "T.pth"
    torch.save(_published(state), path)
    return path, state


def saved(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def rezipped(raw: bytes, change: Callable[[dict[str, bytes]], dict[str, bytes] | None], **options: Any) -> bytes:
    """The same archive with other records, every checksum right."""
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    records = change(records) or records
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return file.getvalue()


def repickled(raw: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """The same archive with another pickle."""

    def other(records: dict[str, bytes]) -> None:
        name = next(name for name in records if name.endswith("data.pkl"))
        records[name] = change(records[name])

    return rezipped(raw, other)


def damaged_weights(raw: bytes, n: int) -> Iterator[tuple[str, bytes]]:
    """Damage anywhere in the file, then damage of the pickle and of records that every checksum says is right."""
    rng = np.random.default_rng(20_261_121)
    for number in range(n):
        way = [flipped, set_numbers, cut, spliced, rearranged][number % 5]
        yield f"{number} {way.__name__}", way(raw, rng)
        directory = raw.index(b"PK\x01\x02")  # the end of the file is where an archive begins
        yield f"{number} {way.__name__} directory", raw[:directory] + way(raw[directory:], rng)
        yield f"{number} {way.__name__} pickle", repickled(raw, functools.partial(way, rng=rng))


def hostile_weights(raw: bytes, state: dict[str, torch.Tensor], canary: Path) -> dict[str, bytes]:
    """Files that must be refused: they would execute, take far more than their size, or hold something else."""

    def holding(value: Any, *, name: str = "backbone.norm.bias") -> bytes:
        return saved({"teacher": {**_published(state)["teacher"], name: value}})

    def rebuilt(offset: Any, size: Any, stride: Any) -> bytes:
        storage = torch.zeros(32)._typed_storage()
        arguments: tuple[Any, ...] = (storage, offset, size, stride, False, OrderedDict())
        return holding(_Asks(torch._utils._rebuild_tensor_v2, *arguments))

    def first(records: dict[str, bytes], end: str) -> str:
        return next(name for name in records if name.endswith(end))

    def without(end: str) -> bytes:
        return rezipped(raw, lambda records: {name: records[name] for name in records if name != first(records, end)})

    def renamed(end: str, new: str) -> bytes:
        return rezipped(
            raw, lambda records: {(new if name == first(records, end) else name): records[name] for name in records}
        )

    def with_record(name: str, content: bytes, **options: Any) -> bytes:
        return rezipped(
            raw, lambda records: {**records, f"{next(iter(records)).partition('/')[0]}/{name}": content}, **options
        )

    def resized(n_more: int) -> bytes:
        def change(records: dict[str, bytes]) -> None:
            name = first(records, "data/3")
            records[name] = records[name][:n_more] if n_more < 0 else records[name] + bytes(n_more)

        return rezipped(raw, change)

    nested = b"\x80\x02" + b")" + b"\x85" * 900_000  # a tuple in a tuple in a tuple
    circle: dict[str, Any] = {}
    circle["teacher"] = circle
    big = bytes(1 << 26)
    no_bias = {key: state[key] for key in state if key != "norm.bias"}
    return {
        # would execute
        "calls open": holding(_Asks(open, os.fspath(canary), "w")),
        "calls open by a key": saved(
            {"teacher": {_Asks(str, "x"): 1, "backbone.x": _Asks(open, os.fspath(canary), "w")}}
        ),
        "calls system": holding(_Asks(os.system, f"touch {canary}")),
        "calls eval": holding(_Asks(eval, f"open({os.fspath(canary)!r}, 'w')")),
        "calls import": repickled(raw, lambda pickled: b"\x80\x02cposix\nsystem\nX\5\0\0\0touch\x85R."),
        "stack global": repickled(raw, lambda pickled: b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R."),
        "inst": repickled(raw, lambda pickled: b"(S'true'\nios\nsystem\n."),
        "not zipped": pickle.dumps(_Asks(open, os.fspath(canary), "w")),
        "torchscript": with_record("constants.pkl", b"\x80\x02)."),
        # would take far more than their size
        "bytearray of 100 GB": holding(_Asks(bytearray, 10**11)),
        "tensor of 100 GB": holding(_Asks(torch.FloatTensor, 10**6, 10**5)),
        "counter of a tensor": holding(_Asks(Counter, _Asks(torch.FloatTensor, 10**9))),
        "deflated": rezipped(raw, lambda records: None, compression=zipfile.ZIP_DEFLATED),
        "deflated bomb": with_record("data/999", big, compression=zipfile.ZIP_DEFLATED),
        "deflated pickle bomb": rezipped(
            raw, lambda records: {**records, first(records, "data.pkl"): big}, compression=zipfile.ZIP_DEFLATED
        ),
        "pickle of 20 MB": repickled(raw, lambda pickled: pickled[:-1] + b"N0" * 10_000_000 + b"."),
        "20,000 records": rezipped(raw, lambda records: records | {f"archive/x{n}": b"" for n in range(20_000)}),
        "directory of 20 MB": rezipped(
            raw, lambda records: records | {f"archive/{n}" + "x" * 5_000: b"" for n in range(4_000)}
        ),
        "nested tuples as a key": repickled(raw, lambda pickled: b"\x80\x02}" + nested[2:] + b"Ns."),
        "nested tuples": repickled(raw, lambda pickled: nested + b"."),
        "nested lists": repickled(raw, lambda pickled: b"\x80\x02" + b"]" * 500_000 + b"a" * 499_999 + b"."),
        "size of 2^60": rebuilt(0, (2**60,), (0,)),
        "size of 2^60, strided": rebuilt(0, (2**60,), (1,)),
        "size of 2^30": rebuilt(0, (2**30,), (1,)),
        "stride of 2^40": rebuilt(0, (32,), (2**40,)),
        # lie
        "offset beyond": rebuilt(2**40, (32,), (1,)),
        "offset a little beyond": rebuilt(1, (32,), (1,)),
        "offset negative": rebuilt(-4, (32,), (1,)),
        "size negative": rebuilt(0, (-32,), (1,)),
        "stride negative": rebuilt(0, (32,), (-1,)),
        "size and stride of other lengths": rebuilt(0, (32,), (1, 1)),
        "size a word": rebuilt(0, "32", (1,)),
        "size a fraction": rebuilt(0, (32.5,), (1,)),
        "size without end": rebuilt(0, (1,) * 5_000, (1,) * 5_000),
        "record too short": resized(-4),
        "record too long": resized(4),
        "record gone": without("data/3"),
        "record elsewhere": renamed("data/3", "other/data/3"),
        "record under another name": renamed("data/3", "archive/data/../3"),
        "pickle gone": without("data.pkl"),
        "pickle twice": with_record("DATA.PKL", b"\x80\x02}."),
        "pickle empty": repickled(raw, lambda pickled: b""),
        "pickle cut": repickled(raw, lambda pickled: pickled[: len(pickled) // 2]),
        "storage of another kind": repickled(raw, lambda pickled: pickled.replace(b"FloatStorage", b"DoubleStorage")),
        "something behind": raw + b"\0",
        "comment": raw[:-2] + b"\x09\x00a comment",
        "comment that is not there": raw[:-2] + b"\x09\x00",
        "two archives": raw + raw[-22:],
        # hold something else
        "sparse": holding(torch.zeros(32).to_sparse()),
        "sparse rows": holding(_Asks(torch._utils._rebuild_sparse_tensor, torch.sparse_csr, (0, 0, 0, (2**40, 2**40)))),
        "quantised": holding(_Asks(torch._utils._rebuild_qtensor, None, 0, (32,), (1,), None, False, None)),
        "complex": holding(torch.zeros(32, dtype=torch.complex64)),
        "integers": holding(torch.zeros(32).int()),
        "meta": holding(torch.zeros(32, device="meta")),
        "NaN": holding(torch.full((32,), math.nan)),
        "infinite": holding(torch.full((32,), -math.inf)),
        "too large for float32": holding(torch.full((32,), 1e300, dtype=torch.float64)),
        "another shape": holding(torch.zeros(31)),
        "no tensor": holding("norm"),
        "a name that paints the terminal": holding(torch.zeros(32), name="backbone.\x1b[2J\n\x07"),
        "a long name": holding(torch.zeros(32), name="backbone." + "x" * 100_000),
        "100,000 names": saved({"teacher": {f"backbone.x{n}": None for n in range(50_000)}}),
        "weights missing": saved(_published({**no_bias, "cls_token": state["cls_token"]})),
        "a circle": saved(circle),
        "a circle of lists": repickled(raw, lambda pickled: b"\x80\x02]q\x00h\x00a."),
        "numbers for names": saved({"teacher": {1: torch.zeros(3)}}),
        "names that cannot be shown": saved({("a",) * 9: 1, "\x1b[31m" * 100: 2}),
        "nothing": b"",
        "only an end": b"PK\x05\x06" + bytes(18),
    }


def harmless_weights(raw: bytes, state: dict[str, torch.Tensor]) -> dict[str, bytes]:
    """Files that must load, to the same tokens."""
    published = _published(state)
    parameters = {key: torch.nn.Parameter(value) for key, value in published["teacher"].items()}
    together = torch.cat([value.flatten() for value in state.values()])
    parts = together.split([value.numel() for value in state.values()])
    views = {key: part.view_as(state[key]) for key, part in zip(state, parts, strict=True)}
    ordered = OrderedDict(published["teacher"])
    ordered._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    turned = {key: value.mT.contiguous().mT if value.ndim > 1 else value for key, value in state.items()}
    return {
        "as it was": raw,
        "zipped again": rezipped(raw, lambda records: None),
        "with a record more": rezipped(raw, lambda records: {**records, f"{next(iter(records))}.txt": b"hello"}),
        "parameters": saved({"teacher": parameters}),
        "double precision": saved({"teacher": {key: value.double() for key, value in published["teacher"].items()}}),
        "ordered, with other keys": saved({"teacher": ordered, "epoch": 7, "name": "x"}),
        "views of one storage": saved(_published(views)),
        "other strides": saved(_published(turned)),
        "memo at 2^31": repickled(raw, lambda pickled: pickled[:-1] + b"r\xff\xff\xff\x7f."),
        "storage of another device": repickled(raw, lambda pickled: pickled.replace(b"cpu", b"gpu", 1)),
    }


REFUSED_FOR = {  # by the first of our checks that sees it: none of these reaches PyTorch
    "calls open": "it asks for 'io.open'",
    "calls system": "it asks for 'posix.system'",
    "stack global": "STACK_GLOBAL",
    "torchscript": "is a TorchScript program",
    "bytearray of 100 GB": "it asks for '__builtin__.bytearray'",
    "tensor of 100 GB": "it asks for 'torch.FloatTensor'",
    "deflated bomb": "has a compressed record",
    "pickle of 20 MB": "has a pickle of 20,00",
    "20,000 records": "lists 20,04",
    "directory of 20 MB": "in 20,23",
    "nested tuples as a key": "has far more tuples in its pickle",
    "record too long": "should have 128 bytes in its record '3'; found 132 bytes",
    "pickle twice": "lists the same record twice",
    "comment": "is cut off, or was not written by torch.save",
    "comment that is not there": "is cut off, or was not written by torch.save",
    "too long": "has 3,221,225,472 bytes, more than the 2,147,",
}


def test_hundreds_of_damaged_weights_files_are_refused_in_one_line_or_load_unchanged(
    tiny: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    raw, canary = tiny[0].read_bytes(), tmp_path / "canary"
    damaged, hostile = dict(damaged_weights(raw, 60)), hostile_weights(raw, tiny[1], canary)
    harmless = harmless_weights(raw, tiny[1])
    files = {**damaged, **hostile, **harmless}
    assert len(files) == len(damaged) + len(hostile) + len(harmless) > 250
    (tmp_path / "files").mkdir()
    for name, content in files.items():
        (tmp_path / "files" / name).write_bytes(content)
    files["too long"] = b""  # sparse: takes no space
    with (tmp_path / "files" / "too long").open("wb") as file:
        file.truncate(3 << 30)
    command = [sys.executable, "-c", LOADER, str(tmp_path / "files"), str(tiny[0])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, cwd=tmp_path)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"{lines[-1]}: exit code {done.returncode}\n{done.stderr[-3000:]}"
    told = {line["name"]: line for line in lines if "name" in line}
    assert told.keys() == files.keys()
    for name, one in told.items():
        assert one["s"] < SECONDS, one
        assert one["grew_mb"] < 300, one
        if one["error"] is not None:
            assert "weights_only" not in one["error"], one  # PyTorch's advice to load it all the same
            assert one["error"].isprintable(), one
            assert len(one["error"]) < 700, one
        assert (one["error"] is None) == (name in harmless) or name in damaged, one
        if name.endswith("pickle"):  # no checksum can know what another pickle meant
            assert one["error"] is not None or one["is_finite"]
        elif one["error"] is None:
            assert one["is_right"], one
    for name, words in REFUSED_FOR.items():
        assert words in (told[name]["error"] or ""), told[name]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["files"]  # nothing was executed
    n_loaded = sum(told[name]["error"] is None for name in damaged)
    assert 0 < n_loaded < 0.5 * len(damaged)


# ------------------------------------------------------------------------------------------ through extract


def test_extract_lists_every_bad_file_and_gives_every_good_one_its_own_tokens(tmp_path: Path) -> None:
    """No row is zero, none is another picture's, none is missing, whatever lies between the good files."""
    right = {f"good {name}": raw for name, raw in list(odd_but_right().items())[::4]}
    files = nasty() | right
    (tmp_path / "files").mkdir()
    for name, content in files.items():
        (tmp_path / "files" / name.replace(".img", ".png")).write_bytes(content)
    extract(open_images(tmp_path / "files"), tmp_path / "a.zarr", ExtractConfig(chunk_images=16, batch_size=8))

    store, backbone = ActivationStore(tmp_path / "a.zarr"), load_backbone("random-vit-tiny")
    table = store.images.to_pylist()
    assert {row["path"] for row in table} == {path.name for path in (tmp_path / "files").iterdir()}
    assert len(table) == len(files) >= 60
    read = [read_image(tmp_path / "files" / row["path"]) for row in table]
    good = [index for index, (picture, _, _) in enumerate(read) if picture is not None]
    assert [row["content_hash"] for row in table] == [digest for _, digest, _ in read]
    assert [row["error"] for row in table] == [error for _, _, error in read]
    assert [row["status"] == "ok" for row in table] == [index in good for index in range(len(table))]
    assert {row["path"] for row in table if row["path"].startswith("good")} <= {table[index]["path"] for index in good}

    tokens = store.read_images(range(len(table))).astype(np.float32)
    assert np.isnan(np.delete(tokens, good, axis=0)).all()
    pixels = np.stack([Preprocess().resize(picture) for picture, _, _ in read if picture is not None])
    with torch.inference_mode():
        (alone,) = backbone.tokens(torch.from_numpy(pixels))
    assert np.abs(tokens[good]).max(axis=2).min() > 0  # no token of no image is zero
    assert np.allclose(tokens[good], alone.numpy(), rtol=2**-10, atol=2**-10)


# ------------------------------------------------------------------------------------------- headers of stores

GOLDEN = Path(__file__).parent / "golden"
READERS: dict[str, list[list[str]]] = {
    "activations-v1.zarr": [["cache", "info"], ["cache", "verify"], ["verify"]],
    "sae-v1": [["sae", "info"], ["verify"]],
    "latents-v1.zarr": [["latents", "info"], ["latents", "verify"], ["verify"]],
    "barcodes-v1": [["compare", "-o", "OUT", "--permutations", "5"], ["concept", "patient", "-o", "OUT"], ["verify"]],
    "concepts-v1": [["concept", "top"], ["verify"]],
    **{
        f"{kind}-v1": [["verify"]]
        for kind in ("comparison", "probe", "atlas", "sweep", "stability", "neighbours", "maps", "masks", "sheets")
    },
}
LAST = {"compare": ["A", "B"], "top": ["1"]}  # arguments behind the folder
OTHER_VALUES: list[Any] = [
    *(None, True, 0, -1, 1, 10**18, -(10**18), 2**63, 1.5, 1e308, "", "x", "../../x", "\x1b[31mred", "NaN"),
    *([], {}, [[]], [None], {"a": 1}, "a" * 100_000, [1] * 1000),
]
NO_JSON = [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"a":NaN}', b'{"a":1e999}', b'{"a":1,"a":2}']


def places_in(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield at
    inside = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    for key, inner in inside:
        yield from places_in(inner, (*at, key))


def mutant(raw: bytes, rng: random.Random) -> bytes:
    """One value removed, renamed or replaced; or no JSON at all. Half of the headers keep an identity that fits."""
    if rng.random() < 0.1:
        return rng.choice(NO_JSON)
    value = json.loads(raw)
    at = rng.choice([place for place in places_in(value) if place] or [()])
    if not at:
        return json.dumps(rng.choice(OTHER_VALUES)).encode()
    holder = value
    for key in at[:-1]:
        holder = holder[key]
    how = rng.random()
    if how < 0.2:
        del holder[at[-1]]
    elif how < 0.3 and isinstance(holder, dict):
        holder["extra"] = holder.pop(at[-1])
    else:
        holder[at[-1]] = rng.choice(OTHER_VALUES)
    header = value.get("attributes", {}).get("cyto", value) if isinstance(value.get("attributes", {}), dict) else value
    if rng.random() < 0.5 and isinstance(header, dict) and isinstance(header.get("spec"), dict):
        with suppress(ValueError):
            header["identity"] = sha256_json(
                {"format": header.get("format"), "format_version": header.get("format_version"), "spec": header["spec"]}
            )
    return json.dumps(value).encode()


def read_mutants(root: Path, n: int, seed: int) -> Counter[int]:
    """Give mutants of every JSON file of every kind of folder to the commands that read it; exit codes."""
    rng, codes = random.Random(seed), Counter[int]()
    for name in READERS:
        shutil.copytree(GOLDEN / name, root / name)
    files = {name: sorted((root / name).rglob("*.json")) for name in READERS}
    for _ in range(n):
        name = rng.choice([*READERS])
        file = rng.choice(files[name])
        kept = file.read_bytes()
        file.write_bytes(mutant(kept, rng))
        for command in READERS[name]:
            words = [word for word in command if not word.startswith("-")][:2]
            n_words = 2 if words[0] in ("cache", "sae", "latents", "concept") else 1
            options = [str(root / "out") if word == "OUT" else word for word in command[n_words:]]
            arguments = [*command[:n_words], str(root / name), *LAST.get(command[n_words - 1], []), *options]
            done = CliRunner().invoke(cli, arguments)
            told = f"{arguments} with {file.name}: {file.read_bytes()[:300]!r}: {done.output[-300:]}"
            assert done.exception is None or isinstance(done.exception, SystemExit), f"{told} {done.exception!r}"
            assert "\x1b" not in done.output, told
            if done.exit_code == 1:
                assert sum(line.startswith("Error") for line in done.output.splitlines()) == 1, told
            codes[done.exit_code] += 1
        file.write_bytes(kept)
    return codes


@pytest.mark.timeout(120)
def test_changed_headers_are_refused_in_one_line_or_read(tmp_path: Path) -> None:
    assert read_mutants(tmp_path, 60, seed=0)[1] > 40


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_thousands_of_changed_headers(tmp_path: Path) -> None:
    """Within 12 GiB of addresses: no number in a header makes a reader allocate what is not there."""
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))\n"
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "from pathlib import Path; from test_fuzz import read_mutants\n"
        "print(read_mutants(Path(sys.argv[1]), 3000, seed=1)[1])"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 2000
