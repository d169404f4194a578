"""What test_fuzz.py and other tests share."""

import functools
import math
import pickle
import struct
import zlib
from typing import Any

import numpy as np
from pictures import _chunk, _file, _picture, _rough
from PIL import Image


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
