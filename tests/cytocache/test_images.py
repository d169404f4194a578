"""Reading image files: every pixel format becomes the RGB one expects, and every bad file a short reason.

Expected pixels are worked out by hand here, never by Pillow's own conversion.
"""

import hashlib
import io
import os
import struct
import sys
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import _chunk, _file, _picture, _rough
from PIL import Image

from cytocache.images import FORMATS, MAX_FILE_BYTES, UnreadableImage, decode_image, read_image

HEIGHT, WIDTH = 20, 28
Rgb = npt.NDArray[np.uint8]
Case = tuple[bytes, npt.NDArray[Any], float]  # file, expected RGB, largest difference allowed


def _smooth(channels: int) -> npt.NDArray[np.uint8]:
    """(HEIGHT, WIDTH, channels) without hard edges, so that JPEG loses little; no two channels are alike."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    waves = [np.sin(x * (0.05 + 0.03 * c) + y * (0.16 - 0.04 * c) + 2 * c) for c in range(channels)]
    return np.rint(127 + 110 * np.stack(waves, -1)).astype(np.uint8)


def _grey(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.repeat(np.asarray(values)[..., None], 3, axis=-1)


def _png(samples: npt.NDArray[Any], *, bits: int, colour: int) -> bytes:
    """A PNG written by hand, for what Pillow reads but does not write: big-endian samples in 16 bits, or packed."""
    if bits == 16:
        rows = [row.astype(">u2").tobytes() for row in samples]
    else:
        per_byte = 8 // bits
        places = 2 ** (bits * np.arange(per_byte)[::-1])
        rows = [bytes((row.reshape(-1, per_byte) * places).sum(1).tolist()) for row in samples]
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, bits, colour, 0, 0, 0)
    packed = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", packed) + _chunk(b"IEND", b"")


def _tiff(samples: npt.NDArray[Any], *, photometric: int, byte_order: str = "<") -> bytes:
    """A TIFF of one strip written by hand: (height, width, samples per pixel) of any unsigned type."""
    height, width, n_samples = samples.shape
    data = samples.astype(f"{byte_order}u{samples.dtype.itemsize}").tobytes()
    bits = struct.pack(f"{byte_order}{n_samples}H", *[samples.dtype.itemsize * 8] * n_samples)
    tags = {256: width, 257: height, 259: 1, 262: photometric, 273: 8, 277: n_samples, 278: height, 279: len(data)}
    entries = [(tag, struct.pack(f"{byte_order}HHII", tag, 4, 1, value)) for tag, value in tags.items()]
    where = bits.ljust(4, b"\0") if len(bits) <= 4 else struct.pack(f"{byte_order}I", 8 + len(data))
    entries.append((258, struct.pack(f"{byte_order}HHI", 258, 3, n_samples) + where))
    directory = b"".join(entry for _, entry in sorted(entries))
    magic = b"II*\0" if byte_order == "<" else b"MM\0*"
    begin = struct.pack(f"{byte_order}I", 8 + len(data) + len(bits))
    return magic + begin + data + bits + struct.pack(f"{byte_order}H", len(entries)) + directory + bytes(4)


def _one_bit(format: str, **options: Any) -> Case:
    values = _rough(HEIGHT, WIDTH, high=2).astype(bool)
    return _file(Image.fromarray(values), format, **options), _grey(values * 255), 0


def _grey_8(format: str, tolerance: float = 0, **options: Any) -> Case:
    values = _smooth(1)[..., 0]
    return _file(_picture(values, "L"), format, **options), _grey(values), tolerance


def _palette(format: str, **options: Any) -> Case:
    colours, indices = _rough(16, 3, seed=1), _rough(HEIGHT, WIDTH, high=16)
    picture = _picture(indices, "P")
    picture.putpalette(colours.astype(np.uint8).tobytes())
    return _file(picture, format, **options), colours[indices], 0


def _palette_alpha() -> Case:
    colours, indices = _rough(16, 3, seed=1), _rough(HEIGHT, WIDTH, high=16)
    picture = _picture(np.stack([indices, _rough(HEIGHT, WIDTH, seed=2)], -1), "PA")
    picture.putpalette(colours.astype(np.uint8).tobytes())
    return _file(picture, "TIFF"), colours[indices], 0


def _alpha(mode: str, format: str) -> Case:
    values = _rough(HEIGHT, WIDTH, len(mode))
    values[: HEIGHT // 2, :, -1] = 0  # fully transparent: a blend would lose the colours here
    expected = values[..., :3] if mode == "RGBA" else _grey(values[..., 0])
    return _file(_picture(values, mode), format), expected, 0


def _rgb(format: str, tolerance: float = 0, **options: Any) -> Case:
    values = _smooth(3)
    return _file(_picture(values, "RGB"), format, **options), values, tolerance


def _cmyk(format: str, tolerance: float, **options: Any) -> Case:
    values = _smooth(4)
    inks, black = values[..., :3].astype(float), values[..., 3:].astype(float)
    return _file(_picture(values, "CMYK"), format, **options), (255 - inks) * (255 - black) / 255, tolerance


def _ycbcr(format: str, tolerance: float, **options: Any) -> Case:
    values = _smooth(3)
    luma, blue, red = np.moveaxis(values.astype(float), -1, 0)
    blue, red = blue - 128, red - 128
    rgb = np.stack([luma + 1.402 * red, luma - 0.344136 * blue - 0.714136 * red, luma + 1.772 * blue], -1)
    return _file(_picture(values, "YCbCr"), format, **options), rgb.clip(0, 255), tolerance


def _lab() -> Case:
    """CIELAB as TIFF stores it: L in 0..255 for 0..100, a and b as signed bytes, white point D50."""
    values = np.stack([_rough(HEIGHT, WIDTH, high=90) + 90, *_rough(2, HEIGHT, WIDTH, high=30) - 15], -1)
    lightness, a, b = np.moveaxis(values.astype(float), -1, 0)
    middle = (lightness / 255 * 100 + 16) / 116
    cubes = np.stack([middle + a / 500, middle, middle - b / 200], -1)
    xyz = np.where(cubes > 6 / 29, cubes**3, 3 * (6 / 29) ** 2 * (cubes - 4 / 29)) * [0.9642, 1.0, 0.8249]
    to_srgb = [[3.1339, -1.6169, -0.4906], [-0.9788, 1.9161, 0.0335], [0.0719, -0.2290, 1.4052]]  # from D50
    linear = (xyz @ np.array(to_srgb).T).clip(0, 1)
    rgb = np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear) * 255
    return _file(_picture(values, "LAB"), "TIFF"), rgb, 4


def _grey_16(format: str) -> Case:
    values = _rough(HEIGHT, WIDTH, high=65_536)
    return _file(Image.fromarray(values.astype(np.uint16)), format), np.rint(_grey(values) / 257), 0


def _png_16(colour: int, channels: int) -> Case:
    values = _rough(HEIGHT, WIDTH, channels, high=65_536)
    expected = values[..., :3] if channels >= 3 else _grey(values[..., 0])
    return _png(values.reshape(HEIGHT, -1), bits=16, colour=colour), expected / 257, 1


def _png_packed(bits: int) -> Case:
    values = _rough(HEIGHT, WIDTH, high=2**bits)
    return _png(values, bits=bits, colour=0), _grey(values * 255 / (2**bits - 1)), 0


def _tiff_16(channels: int, byte_order: str) -> Case:
    values = _rough(HEIGHT, WIDTH, channels, high=65_536)
    photometric = 2 if channels == 3 else 1
    expected = values / 257 if channels == 3 else np.rint(_grey(values[..., 0]) / 257)
    return _tiff(values.astype(np.uint16), photometric=photometric, byte_order=byte_order), expected, channels == 3


def _grey_32() -> Case:
    values = _rough(HEIGHT, WIDTH, high=65_536)
    return _file(Image.fromarray(values.astype(np.int32)), "TIFF"), np.rint(_grey(values) / 257), 0


def _floating() -> Case:
    values = np.linspace(0, 1, HEIGHT * WIDTH, dtype=np.float32).reshape(HEIGHT, WIDTH)
    return _file(Image.fromarray(values), "TIFF"), np.rint(_grey(values) * 255), 0


def _frames() -> Case:
    first, second = _rough(HEIGHT, WIDTH, 3), _rough(HEIGHT * 2, WIDTH, 3, seed=1)
    return _file(_picture(first, "RGB"), "TIFF", save_all=True, append_images=[_picture(second, "RGB")]), first, 0


def _turned() -> Case:
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me right"; the released code did not
    return _rgb("JPEG", 8, quality=95, subsampling=0, exif=exif)


CASES: dict[str, Callable[[], Case]] = {
    **{f"1 {format}": partial(_one_bit, format) for format in ("PNG", "TIFF", "BMP")},
    "1 PNG, black transparent": lambda: _one_bit("PNG", transparency=0),
    **{f"L {format}": partial(_grey_8, format) for format in ("PNG", "TIFF", "BMP")},
    "L JPEG": lambda: _grey_8("JPEG", 4, quality=95),
    "L PNG, one grey transparent": lambda: _grey_8("PNG", transparency=127),
    "L TIFF, white is zero": lambda: (_tiff(255 - _smooth(1), photometric=0), _grey(_smooth(1)[..., 0]), 0),
    **{f"{bits}-bit grey PNG": partial(_png_packed, bits) for bits in (2, 4)},
    **{f"LA {format}": partial(_alpha, "LA", format) for format in ("PNG", "TIFF")},
    **{f"P {format}": partial(_palette, format) for format in ("PNG", "TIFF", "BMP")},
    "P PNG, one colour transparent": lambda: _palette("PNG", transparency=3),
    "P PNG, an alpha for each colour": lambda: _palette("PNG", transparency=bytes(range(0, 256, 16))),
    "PA TIFF": _palette_alpha,
    **{f"RGB {format}": partial(_rgb, format) for format in ("PNG", "TIFF", "BMP")},
    "RGB PNG, one colour transparent": lambda: _rgb("PNG", transparency=tuple(_smooth(3)[0, 0].tolist())),
    "RGB TIFF, LZW": lambda: _rgb("TIFF", compression="tiff_lzw"),
    "RGB TIFF, deflate": lambda: _rgb("TIFF", compression="tiff_adobe_deflate"),
    "RGB TIFF, JPEG": lambda: _rgb("TIFF", 8, compression="jpeg", quality=95),
    "RGB JPEG": lambda: _rgb("JPEG", 16, quality=95),  # colour at half resolution
    "RGB JPEG, progressive": lambda: _rgb("JPEG", 8, quality=95, subsampling=0, progressive=True),
    "RGB JPEG, EXIF orientation": _turned,
    **{f"RGBA {format}": partial(_alpha, "RGBA", format) for format in ("PNG", "TIFF", "BMP")},
    "CMYK TIFF": lambda: _cmyk("TIFF", 1),
    "CMYK JPEG": lambda: _cmyk("JPEG", 8, quality=95),
    "YCbCr TIFF": lambda: _ycbcr("TIFF", 2),
    "YCbCr JPEG": lambda: _ycbcr("JPEG", 8, quality=95, subsampling=0),
    "LAB TIFF": _lab,
    "I;16 PNG": lambda: _grey_16("PNG"),
    "I;16 TIFF": lambda: _grey_16("TIFF"),
    "16-bit grey TIFF, big-endian": lambda: _tiff_16(1, ">"),
    "16-bit RGB TIFF, little-endian": lambda: _tiff_16(3, "<"),
    "16-bit RGB TIFF, big-endian": lambda: _tiff_16(3, ">"),
    "16-bit LA PNG": lambda: _png_16(4, 2),
    "16-bit RGB PNG": lambda: _png_16(2, 3),
    "16-bit RGBA PNG": lambda: _png_16(6, 4),
    "I TIFF": _grey_32,
    "F TIFF": _floating,
    "TIFF of two frames": _frames,
}


@pytest.mark.parametrize("name", CASES)
def test_every_pixel_format_becomes_the_expected_rgb(name: str, tmp_path: Path) -> None:
    """Alpha is dropped and not blended, palettes and colour spaces are resolved, 16 bits are scaled to 8."""
    raw, expected, tolerance = CASES[name]()
    path = tmp_path / "cell.img"  # the name plays no part
    path.write_bytes(raw)
    picture, content_hash, error = read_image(path)
    assert error is None
    assert picture is not None
    assert picture.mode == "RGB"
    assert picture.size == (WIDTH, HEIGHT)
    assert content_hash == hashlib.sha256(raw).hexdigest()
    difference = np.abs(np.asarray(picture, float) - expected)
    assert difference.max() <= tolerance


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.full((4, 4), -1, np.int32), "32-bit pixels outside 0..65,535"),
        (np.full((4, 4), 65_536, np.int32), "32-bit pixels outside 0..65,535"),
        (np.full((4, 4), 1.5, np.float32), r"floating-point pixels outside \[0, 1\]"),
        (np.full((4, 4), np.nan, np.float32), r"floating-point pixels outside \[0, 1\]"),
    ],
)
def test_values_without_a_known_scale_are_refused_and_not_guessed(values: npt.NDArray[Any], words: str) -> None:
    with pytest.raises(UnreadableImage, match=words):
        decode_image(_file(Image.fromarray(values), "TIFF"))


def _reason(path: Path, content: bytes | None = None) -> str:
    """Why `path` cannot be read: one short printable line; with the hash if there is `content` to read."""
    picture, content_hash, reason = read_image(path)
    assert picture is None
    assert reason is not None
    assert 0 < len(reason) <= 200
    assert reason.isprintable()
    assert content_hash == (None if content is None else hashlib.sha256(content).hexdigest())
    return reason


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kept", [0.02, 0.5, 0.9])
def test_a_truncated_file_is_unreadable_and_not_half_a_picture(format: str, kept: float, tmp_path: Path) -> None:
    raw = _file(_picture(_rough(60, 80, 3), "RGB"), format)
    path = tmp_path / f"cell.{format.lower()}"
    path.write_bytes(raw[: int(len(raw) * kept)])
    assert _reason(path, path.read_bytes()).startswith(("cannot be decoded: ", "not a JPEG, PNG, TIFF or BMP image"))


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PPM", "ICO", "TGA"])
def test_other_decoders_are_never_reached_whatever_the_name(format: str, tmp_path: Path) -> None:
    path = tmp_path / "cell.png"
    path.write_bytes(_file(_picture(_rough(20, 20, 3), "RGB"), format))
    assert _reason(path, path.read_bytes()) == "not a JPEG, PNG, TIFF or BMP image"


def test_what_is_no_image_file_gives_its_reason_and_never_blocks(tmp_path: Path) -> None:
    contents = {"empty.png": b"", "text.png": b"I am not an image\n"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)  # sparse: takes no space
    expected = {
        "empty.png": "the file is empty",
        "text.png": "not a JPEG, PNG, TIFF or BMP image",
        "folder.png": "not a file",
        "missing.png": "no such file",
        "loop.png": "no such file",
        "huge.png": "1,073,741,825 bytes, more than the 1,073,741,824 that are allowed",
        "x" * 300 + ".png": "cannot be read: File name too long",
    }
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "fifo.png")  # opening it would wait for a writer, for ever
        expected["fifo.png"] = "not a file"
    assert {name: _reason(tmp_path / name, contents.get(name)) for name in expected} == expected


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a file of /proc that fails on reading")
def test_an_error_of_the_disk_while_reading_is_a_reason() -> None:
    assert _reason(Path("/proc/self/mem")) == "cannot be read: Input/output error"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_a_reason(tmp_path: Path) -> None:
    (tmp_path / "secret.png").touch(mode=0o000)
    assert _reason(tmp_path / "secret.png") == "cannot be read: Permission denied"


def _claiming(format: str, width: int, height: int) -> bytes:
    """A few bytes whose header claims a picture of this size."""
    raw = _file(_picture(_rough(8, 8, 3), "RGB"), format)
    if format == "PNG":
        return raw[:8] + _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + raw[33:]
    if format == "BMP":
        return raw[:18] + struct.pack("<ii", width, height) + raw[26:]
    if format == "JPEG":
        at = raw.index(b"\xff\xc0") + 5
        return raw[:at] + struct.pack(">HH", height, width) + raw[at + 4 :]
    for tag, value in ((256, width), (257, height)):
        at = raw.index(struct.pack("<HHI", tag, 4, 1)) + 8
        raw = raw[:at] + struct.pack("<I", value) + raw[at + 4 :]
    return raw


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("size", "words"),
    [
        ((50_000, 50_000), r"2500000000 pixels\) exceeds limit"),
        ((12_000, 9_000), "12,000 x 9,000 pixels, more than the 100,000,000 that are allowed"),
    ],
)
def test_a_decompression_bomb_is_refused_by_its_header(format: str, size: tuple[int, int], words: str) -> None:
    with pytest.raises(UnreadableImage, match=words):
        decode_image(_claiming(format, *size))


def _real_files() -> list[bytes]:
    picture = _picture(_rough(24, 32, 3), "RGB")
    ways: list[tuple[str, dict[str, Any]]] = [(format, {}) for format in FORMATS]
    ways += [("TIFF", {"compression": name}) for name in ("tiff_lzw", "jpeg", "tiff_adobe_deflate", "packbits")]
    ways += [("JPEG", {"progressive": True})]
    files = [_file(picture, format, **options) for format, options in ways]
    files += [_file(picture.quantize(16), format) for format in ("PNG", "TIFF", "BMP")]
    return files + [CASES[name]()[0] for name in ("CMYK JPEG", "LAB TIFF", "I;16 PNG", "F TIFF", "1 TIFF", "PA TIFF")]


REAL_FILES = _real_files()
MAGIC = [b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"II*\0", b"MM\0*", b"II+\0\x08\0\0\0", b"BM"]


def _decodes_or_says_why_not(raw: bytes) -> None:
    try:
        mode, reason = decode_image(raw).mode, ""
    except UnreadableImage as error:
        mode, reason = "", str(error)
    assert mode == "RGB" or 0 < len(reason) <= 200
    assert reason.isprintable()


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(MAGIC), st.binary(max_size=300))
def test_random_bytes_raise_nothing_but_unreadable_image(magic: bytes, rest: bytes) -> None:
    _decodes_or_says_why_not(magic + rest)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(REAL_FILES), st.data())
def test_corrupted_images_raise_nothing_but_unreadable_image(raw: bytes, data: st.DataObject) -> None:
    """Overwritten bytes, most of them in the header where they do harm; a cut; a piece taken out."""
    damaged = bytearray(raw)
    for _ in range(data.draw(st.integers(1, 6), label="bytes")):
        reach = data.draw(st.sampled_from([64, 256, len(raw)]), label="reach")
        at = data.draw(st.integers(0, min(reach, len(raw)) - 1), label="at")
        damaged[at] = data.draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFE, 0xFF]) | st.integers(0, 255), label="value")
    start = data.draw(st.integers(0, len(raw)), label="cut from")
    length = data.draw(st.sampled_from([0, 0, 1, 7, len(raw)]), label="cut bytes")
    _decodes_or_says_why_not(bytes(damaged[:start] + damaged[start + length :]))


def test_pillows_warnings_neither_decide_what_is_readable_nor_change_the_filters_of_the_process() -> None:
    """Reader threads share one list of warning filters; with "error" in force, a warning would end the decoding."""
    raw, expected, _ = CASES["P PNG, an alpha for each colour"]()
    with Image.open(io.BytesIO(raw)) as picture, pytest.warns(UserWarning, match="Transparency"):
        picture.convert("RGB")  # so it does warn
    filters, interval = list(warnings.filters), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            pictures = list(threads.map(decode_image, [raw] * 1_000))
    finally:
        sys.setswitchinterval(interval)
    assert list(warnings.filters) == filters
    assert all(np.array_equal(np.asarray(picture), expected) for picture in pictures)
