"""Reads one image file, or says why it cannot be read. Files are untrusted: few formats, bounded memory, no guessing.

Quick to import: the processes that read images import this, `metadata` and `preprocess`, but not torch or zarr.
"""

import hashlib
import io
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, UnidentifiedImageError

from .archive_member import Member
from .image_files import MAX_FILE_BYTES as MAX_FILE_BYTES
from .image_files import UnreadableImage as UnreadableImage
from .image_files import read_file
from .metadata import check_scans, tiff_layout, without_metadata

FORMATS = ("BMP", "JPEG", "PNG", "TIFF")  # Pillow's decoders that may be used, whatever a file's name
MAX_PIXELS = 100_000_000  # a cell crop has 0.1 million
MAX_SIDE = 65_535  # JPEG's limit; to resize a row of 100 million pixels would take gigabytes of coefficients
MAX_RLE_PIXELS = 16_000_000  # Pillow unpacks a run-length coded BMP in Python, byte by byte
_CUT_OFF = "image file is truncated"  # how Pillow's error begins
_FILLED_IN = (0, 128)  # by decoders, where pixels are missing: black, in a JPEG grey
# Pillow's raw modes: byte order of the file -> byte order of this machine
_NATIVE = {
    **{"I;16S": "I;16NS", "I;16BS": "I;16NS", "I;32S": "I;32NS", "I;32BS": "I;32NS", "I;32B": "I;32N"},
    **{"F;32F": "F;32NF", "F;32BF": "F;32NF"},
}
_ONE_PLANE = {"I;16": ("I;16", "I;16"), "I;16B": ("I;16B", "I;16B"), "F": ("F;32F", "F;32BF")}  # in II, in MM files
_Decoded = TypeVar("_Decoded")


@dataclass(frozen=True)
class ReadImage:
    """An image file that was read, or why not."""

    picture: Image.Image | None  # RGB
    content_hash: str | None  # SHA-256 of the file, if its bytes could be read
    error: str | None = None
    truncated: str | None = None  # what is missing of a file that ends too early; see `read_image_file`


class _PillowSilenced:
    """Hides Pillow's warnings about unusual metadata while any thread is inside.

    Python has one list of warning filters for all threads. If each reader thread used `warnings.catch_warnings`, one
    would restore what another had set, and the process would keep the wrong filters.
    """

    def __init__(self) -> None:
        self._lock, self._n_inside = threading.Condition(), 0

    def __enter__(self) -> None:
        with self._lock:
            if self._n_inside == 0:
                self._before = warnings.catch_warnings()
                self._before.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")
            self._n_inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._n_inside -= 1
            if self._n_inside == 0:
                self._before.__exit__(None, None, None)
                self._lock.notify_all()

    @contextmanager
    def accepting_truncated(self) -> Iterator[None]:
        """Pillow accepts files that end too early; no other thread is inside meanwhile, since the setting is global."""
        with self._lock:
            self._lock.wait_for(lambda: self._n_inside == 0)
            ImageFile.LOAD_TRUNCATED_IMAGES = True
            try:
                with self:  # the lock can be taken again by this thread
                    yield
            finally:
                ImageFile.LOAD_TRUNCATED_IMAGES = False


pillow_silenced = _PillowSilenced()


def read_image(path: Path) -> tuple[Image.Image | None, str | None, str | None]:
    """(RGB picture, SHA-256 of the file, None), or (None, hash if the bytes could be read, reason).

    Memory: twice the file, at most `MAX_FILE_BYTES`, and about 8 bytes for each of at most `MAX_PIXELS` pixels.
    """
    found = read_image_file(path)
    return found.picture, found.content_hash, found.error


def read_image_file(place: Path | Member, *, allow_truncated: bool = False) -> ReadImage:
    """Read an image file, in a folder or an archive. Memory: as `read_image`.

    allow_truncated : take a file that ends too early as far as it goes, if a row of pixels is left; the rest is black,
        in a JPEG grey, and `truncated` says how much
    """
    content_hash = None
    try:
        raw = read_file(place)
        content_hash = hashlib.sha256(raw).hexdigest()
        try:
            return ReadImage(decode_image(raw), content_hash)
        except UnreadableImage as error:
            if not (allow_truncated and str(error).startswith(f"cannot be decoded: {_CUT_OFF}")):
                raise
            picture = _decode(raw, _to_rgb, is_truncated=True)
            return ReadImage(picture, content_hash, truncated=_what_is_missing(picture))
    except UnreadableImage as error:
        return ReadImage(None, content_hash, str(error))


def _what_is_missing(picture: Image.Image) -> str:
    """How many rows, from an edge on, have only the colour that decoders fill in.

    Raises UnreadableImage if these are all.
    """
    pixels = np.asarray(picture)
    n_rows = 0
    for rows in (pixels, pixels[::-1]):  # a BMP is stored from below
        colour = rows[0, 0]
        if any((colour == filled).all() for filled in _FILLED_IN):
            is_left = (rows != colour).any((1, 2))
            if not is_left.any():
                raise UnreadableImage("cannot be decoded: it is cut off, and no row of pixels is left")
            n_rows = max(n_rows, int(is_left.argmax()))
    return f"its end is missing: {n_rows:,} of {len(pixels):,} rows are empty" if n_rows else "its end is missing"


def decode_image(raw: bytes) -> Image.Image:
    """The first frame of an encoded image as 8-bit RGB.

    Alpha is dropped, not blended (colours multiplied by it are divided again); palettes, grey, CMYK, YCbCr and LAB are
    converted; grey of 12 or 16 bits is scaled to 0..255 and rounded, of 16-bit colours the high byte is taken;
    floating-point grey must lie in [0, 1]. The orientation tag of a TIFF is applied; that in the EXIF of
    other files is not (both as in the released code). Colour profiles and gamma are ignored. Layouts that Pillow
    would misread are refused.

    Raises
    ------
    UnreadableImage
        With the reason in a few words.
    """
    return _decode(raw, _to_rgb)


def read_labels(path: Path) -> tuple[npt.NDArray[np.int64], bool] | str:
    """For a mask file: ((height, width) value of each pixel, are these colours?); or the reason if it cannot be read.

    Values are as stored: 1 in a 16-bit file or a palette is 1. Colours are 65536 R + 256 G + B; alpha is dropped.
    JPEG is refused, since lossy compression changes the values.
    """
    try:
        return _decode(read_file(path), _to_labels)
    except UnreadableImage as error:
        return str(error)


def _decode(raw: bytes, convert: Callable[[Image.Image], _Decoded], *, is_truncated: bool = False) -> _Decoded:
    """The result of `convert` on the decoded image; every error becomes an `UnreadableImage`."""
    try:
        with pillow_silenced.accepting_truncated() if is_truncated else pillow_silenced:
            bare = without_metadata(raw)
            picture = Image.open(io.BytesIO(bare), formats=FORMATS)
            _check_size(picture, bare)
            if picture.format == "TIFF":
                _check_tiff(picture)
            picture.load()
            return convert(picture)
    except UnreadableImage:
        raise
    except UnidentifiedImageError:
        layout = tiff_layout(raw)
        if layout:
            raise UnreadableImage(f"a TIFF of a kind that is not read ({layout}); save it as 8-bit RGB") from None
        raise UnreadableImage("not a JPEG, PNG, TIFF or BMP image" if raw else "the file is empty") from None
    except Exception as error:  # decoders of untrusted bytes raise almost anything; one file must not end the job
        raise UnreadableImage(f"cannot be decoded: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    """A decoder's error message, which may quote the file, safe for a table and a terminal."""
    text = " ".join(str(error).split())[:160] or type(error).__name__
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _check_size(picture: Image.Image, raw: bytes) -> None:
    """Raise `UnreadableImage` for an image that would take too much memory or time, by its headers alone."""
    width, height, n_pixels = picture.width, picture.height, picture.width * picture.height
    if n_pixels > MAX_PIXELS:
        raise UnreadableImage(f"{width:,} x {height:,} pixels, more than the {MAX_PIXELS:,} that are allowed")
    if max(width, height) > MAX_SIDE:
        raise UnreadableImage(f"{width:,} x {height:,} pixels; a side may have at most {MAX_SIDE:,}")
    if picture.mode[0] in "IF" and n_pixels > MAX_PIXELS // 4:
        raise UnreadableImage(f"{width:,} x {height:,} pixels of 16 or 32 bits are too many")
    if picture.format == "JPEG":
        check_scans(raw, n_pixels)
    is_rle = any(tile[0] == "bmp_rle" for tile in getattr(picture, "tile", []))
    if is_rle and max(n_pixels, len(raw) // 2) > MAX_RLE_PIXELS:
        raise UnreadableImage(f"{width:,} x {height:,} pixels in a run-length coded BMP are too many")


def _check_tiff(picture: Image.Image) -> None:
    """Refuse the TIFF layouts that Pillow misreads, and correct the raw mode of those where that is enough."""
    tags = picture.tag_v2  # type: ignore[attr-defined]  # of a TIFF
    bits, photometric, n_samples = tags.get(258, (1,)), tags.get(262, 0), tags.get(277, 1)
    signs, is_planar = tags.get(339, (1,)), tags.get(284, 1) == 2
    if 2 in signs and max(bits) == 8:
        raise UnreadableImage("a TIFF of signed 8-bit samples; save it as unsigned 8-bit")
    if photometric == 0 and picture.mode in ("I", "F"):
        raise UnreadableImage(f"a TIFF of {max(bits)}-bit samples in which 0 is white; save it as 8-bit grey")
    if picture.mode in ("P", "PA") and max(tags.get(320, (0,))) < 256:
        raise UnreadableImage("a TIFF with a palette of 8-bit numbers (16-bit expected); save it as 8-bit RGB")
    if is_planar and picture.mode == "La":
        raise UnreadableImage("a TIFF of grey multiplied by alpha, planes apart; save it as 8-bit grey")
    tiles = getattr(picture, "tile", [])
    if is_planar and picture.mode in ("LA", "PA", "YCbCr") and all(tile[0] != "libtiff" for tile in tiles):
        raise UnreadableImage(f"an uncompressed TIFF of {n_samples} planes apart; save it as 8-bit RGB")
    if any(tile[0] == "libtiff" for tile in tiles):  # which gives numbers in this machine's byte order
        tiles = [_with_raw_mode(tile, _NATIVE.get(tile[3][0], tile[3][0])) for tile in tiles]
    elif photometric == 6 and n_samples == 3 and tuple(tags.get(530, (2, 2))) != (1, 1):
        raise UnreadableImage("an uncompressed TIFF of YCbCr with fewer colours than pixels; save it as 8-bit RGB")
    elif is_planar and (max(bits) != 8 or photometric == 0 or tags.get(266, 1) == 2 or 1 in tags.get(338, ())):
        order = "L" if tags.prefix == b"II" else "B"
        if n_samples == 1 and picture.mode in _ONE_PLANE:
            tiles = [_with_raw_mode(tile, _ONE_PLANE[picture.mode][order == "B"]) for tile in tiles]
        elif set(bits) == {16} and picture.mode in ("RGB", "RGBA") and all(tile[3][0] in "RGBA" for tile in tiles):
            tiles = [_with_raw_mode(tile, f"{tile[3][0]};16{order}") for tile in tiles]
        else:
            raise UnreadableImage(
                f"an uncompressed TIFF of {n_samples} planes of {max(bits)} bits apart; save it as 8-bit RGB"
            )
    picture.tile = tiles  # type: ignore[attr-defined]  # of a file


def _with_raw_mode(tile: ImageFile._Tile, mode: str) -> ImageFile._Tile:
    return ImageFile._Tile(tile[0], tile[1], tile[2], (mode, *tile[3][1:]))  # type: ignore[index]  # never a bare name


def _to_labels(picture: Image.Image) -> tuple[npt.NDArray[np.int64], bool]:
    if picture.format == "JPEG":
        raise UnreadableImage("a JPEG loses what a mask needs; save it as PNG")
    if picture.mode in ("LA", "La", "PA"):
        picture = picture.getchannel(0)
    elif picture.mode not in ("1", "L", "P", "F", "RGB") and picture.mode[0] != "I":  # RGBA, CMYK, LAB, ...
        picture = picture.convert("RGB")
    values = np.asarray(picture)
    if values.dtype.kind == "f" and not (np.isfinite(values).all() and (values == np.rint(values)).all()):
        raise UnreadableImage("its values are no whole numbers: probabilities? Save one number for each class")
    labels = values.astype(np.int64)
    if labels.ndim == 3:
        return labels @ np.array([1 << 16, 1 << 8, 1]), True
    if labels.min(initial=0) < 0:
        raise UnreadableImage("values below 0")
    return labels, False


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "RGB":
        return picture
    if picture.mode.startswith("I"):  # 16-bit grey, in Pillow's several spellings; convert("RGB") would clip it
        values = np.asarray(picture).astype(np.int32)
        if values.min() < 0 or values.max() > 65_535:
            raise UnreadableImage("32-bit pixels outside 0..65,535; convert the image to 8 bits per channel")
        top, is_inverted = _tiff_range(picture)
        values = top - values if is_inverted else values
        return Image.fromarray(((values * 255 + top // 2) // top).astype(np.uint8)).convert("RGB")
    if picture.mode == "F":
        floats = np.asarray(picture)
        if not (np.isfinite(floats).all() and floats.min() >= 0 and floats.max() <= 1):
            raise UnreadableImage("floating-point pixels outside [0, 1]; convert the image to 8 bits per channel")
        return Image.fromarray(np.rint(floats * 255).astype(np.uint8)).convert("RGB")
    if picture.mode == "La":
        picture = picture.convert("LA")
    if picture.mode in ("LA", "PA"):
        picture = picture.convert("RGBA")
    return picture.convert("RGB")


def _tiff_range(picture: Image.Image) -> tuple[int, bool]:
    """(largest value, is 0 white?) of integer grey: 12 bits and white zeros come from TIFFs only."""
    tags = getattr(picture, "tag_v2", {})
    return (4095 if tuple(tags.get(258, ())) == (12,) else 65_535), tags.get(262, 1) == 0
