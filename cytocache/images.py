"""Read one image file, or say exactly why not. Image files are untrusted: few formats, bounded memory, no guessing.

Light to import: the processes that read images load this, `metadata` and `preprocess`, and neither torch nor zarr.
"""

import hashlib
import io
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from .metadata import check_scans, without_metadata

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff")
FORMATS = ("BMP", "JPEG", "PNG", "TIFF")  # decoders that a file may reach, whatever its name
MAX_PIXELS = 100_000_000  # a cell crop has 0.1 million; more is a mistake or an attack
MAX_SIDE = 65_535  # JPEG's own limit; resizing a row of 100 million pixels would take gigabytes for its coefficients
MAX_RLE_PIXELS = 16_000_000  # Pillow unpacks a run-length coded BMP in Python, byte by byte
MAX_FILE_BYTES = 1 << 30
_Decoded = TypeVar("_Decoded")


class UnreadableImage(ValueError):
    """One image file cannot be turned into pixels; the text says why. Never leaves `read_image`."""


class _PillowSilenced:
    """Hides Pillow's warnings about odd metadata while any thread is inside; pixels or an error are what counts.

    Python keeps one list of filters for all threads: with a `warnings.catch_warnings` of its own, each reader thread
    would put back what another had set, and the process would end up with the wrong filters for good.
    """

    def __init__(self) -> None:
        self._lock, self._n_inside = threading.Lock(), 0

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


pillow_silenced = _PillowSilenced()


def read_image(path: Path) -> tuple[Image.Image | None, str | None, str | None]:
    """(RGB picture, SHA-256 of the file, None), or (None, hash if the bytes could be read, why not).

    Memory: twice the file, at most `MAX_FILE_BYTES`, and about 8 bytes for each of at most `MAX_PIXELS` pixels.
    """
    content_hash = None
    try:
        raw = _read_bytes(path)
        content_hash = hashlib.sha256(raw).hexdigest()
        return decode_image(raw), content_hash, None
    except UnreadableImage as error:
        return None, content_hash, str(error)


def decode_image(raw: bytes) -> Image.Image:
    """The first frame of an encoded image as 8-bit RGB.

    Alpha is dropped, not blended; palettes, grey, CMYK, YCbCr and LAB are converted; 16-bit grey is divided by 257;
    floating-point grey must lie in [0, 1]. The EXIF orientation is not applied, as in the released code.

    Raises
    ------
    UnreadableImage
        With the reason in a few words.
    """
    return _decode(raw, _to_rgb)


def read_labels(path: Path) -> tuple[npt.NDArray[np.int64], bool] | str:
    """((height, width) value of each pixel of a mask file, whether these are colours); or why it cannot be read.

    Values are as they are stored, so 1 in a 16-bit file or a palette is 1; colours are 65536 R + 256 G + B; alpha is
    dropped. JPEG is refused: its losses would make values that nobody drew.
    """
    try:
        return _decode(_read_bytes(path), _to_labels)
    except UnreadableImage as error:
        return str(error)


def _decode(raw: bytes, convert: Callable[[Image.Image], _Decoded]) -> _Decoded:
    """What `convert` makes of the loaded picture; whatever goes wrong is an `UnreadableImage`."""
    try:
        with pillow_silenced:
            bare = without_metadata(raw)
            picture = Image.open(io.BytesIO(bare), formats=FORMATS)
            _check_size(picture, bare)
            picture.load()
            return convert(picture)
    except UnreadableImage:
        raise
    except UnidentifiedImageError:
        raise UnreadableImage("not a JPEG, PNG, TIFF or BMP image" if raw else "the file is empty") from None
    except Exception as error:  # decoders of untrusted bytes raise almost anything; one file must not end the job
        raise UnreadableImage(f"cannot be decoded: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    """What a decoder says, which may quote the file, fit for a table and a terminal."""
    text = " ".join(str(error).split())[:160] or type(error).__name__
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _check_size(picture: Image.Image, raw: bytes) -> None:
    """Raise `UnreadableImage` for what would take too much memory or time, told by the headers alone."""
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


def _read_bytes(path: Path) -> bytes:
    try:
        if not path.is_file():  # a pipe or a device would block for ever
            raise UnreadableImage("not a file" if path.exists() else "no such file")
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise UnreadableImage(f"{size:,} bytes, more than the {MAX_FILE_BYTES:,} that are allowed")
        with path.open("rb") as file:
            raw = file.read(size + 1)
        if len(raw) > size:
            raise UnreadableImage("grew while it was read")
        return raw
    except OSError as error:
        raise UnreadableImage(f"cannot be read: {error.strerror or error}") from None


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
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if picture.mode == "F":
        floats = np.asarray(picture)
        if not (np.isfinite(floats).all() and floats.min() >= 0 and floats.max() <= 1):
            raise UnreadableImage("floating-point pixels outside [0, 1]; convert the image to 8 bits per channel")
        return Image.fromarray(np.rint(floats * 255).astype(np.uint8)).convert("RGB")
    if picture.mode in ("LA", "La", "PA"):
        picture = picture.convert("RGBA")
    return picture.convert("RGB")
