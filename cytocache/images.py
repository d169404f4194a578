"""Read one image file, or say exactly why not. Image files are untrusted: few formats, bounded memory, no guessing."""

import hashlib
import io
import threading
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from stores.errors import UnreadableImage

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff")
FORMATS = ("BMP", "JPEG", "PNG", "TIFF")  # decoders that a file may reach, whatever its name
MAX_PIXELS = 100_000_000  # a cell crop has 0.1 million; more is a mistake or an attack
MAX_FILE_BYTES = 1 << 30


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

    Memory: the file, at most `MAX_FILE_BYTES`, and about 8 bytes for each of at most `MAX_PIXELS` pixels.
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
    try:
        with pillow_silenced:
            picture = Image.open(io.BytesIO(raw), formats=FORMATS)
            if picture.width * picture.height > MAX_PIXELS:
                raise UnreadableImage(
                    f"{picture.width:,} x {picture.height:,} pixels, more than the {MAX_PIXELS:,} that are allowed"
                )
            if picture.mode[0] in "IF" and picture.width * picture.height > MAX_PIXELS // 4:
                raise UnreadableImage(f"{picture.width:,} x {picture.height:,} pixels of 16 or 32 bits are too many")
            picture.load()
            return _to_rgb(picture)
    except UnreadableImage:
        raise
    except UnidentifiedImageError:
        raise UnreadableImage("not a JPEG, PNG, TIFF or BMP image" if raw else "the file is empty") from None
    except Exception as error:  # decoders of untrusted bytes raise almost anything; one file must not end the job
        raise UnreadableImage(f"cannot be decoded: {' '.join(str(error).split()) or type(error).__name__}") from None


def _read_bytes(path: Path) -> bytes:
    try:
        if not path.is_file():  # a pipe or a device would block for ever
            raise UnreadableImage("not a file" if path.exists() else "no such file")
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise UnreadableImage(f"{size:,} bytes, more than the {MAX_FILE_BYTES:,} that are allowed")
        return path.read_bytes()
    except OSError as error:
        raise UnreadableImage(f"cannot be read: {error.strerror or error}") from None


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
