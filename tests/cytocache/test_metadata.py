"""Of an image file only what decides its pixels reaches a decoder, and amounts that no honest file has are refused."""

import io
import struct
import zlib

import numpy as np
import pytest
from hostile_images import END, PIXELS, SEEDS, grey_tags, nasty, odd_but_right, png, rle_bmp, tiff, tiled_tiff
from PIL import Image

from cytocache.images import MAX_RLE_PIXELS, MAX_SIDE, UnreadableImage, decode_image
from cytocache.metadata import MAX_CHUNKS, MAX_SEGMENTS, check_scans, without_metadata


def _pixels(raw: bytes) -> bytes:
    with Image.open(io.BytesIO(raw)) as picture:
        return picture.tobytes()


@pytest.mark.parametrize("name", [name for name in SEEDS if name.startswith(("JPEG", "PNG"))])
def test_the_bare_picture_has_the_same_pixels_and_nothing_else(name: str) -> None:
    bare = without_metadata(SEEDS[name] + b"something behind")
    assert _pixels(bare) == _pixels(SEEDS[name])
    with Image.open(io.BytesIO(bare)) as picture:
        assert set(picture.info) <= {
            "jfif",
            "jfif_version",
            "jfif_unit",
            "jfif_density",
            "adobe",
            "adobe_transform",
        } | {
            "progressive",
            "progression",
        } | ({"dpi"} if name.startswith("JPEG") else set())
        assert getattr(picture, "n_frames", 1) == 1
    assert b"something behind" not in bare
    assert without_metadata(bare) == bare


def test_metadata_of_a_jpeg_goes_wherever_it_is() -> None:
    """Before the first scan, between two scans, with fill bytes and rubbish around it."""
    raw = SEEDS["JPEG progressive"]
    note = b"\xff\xff\xff\xfe\x00\x08secret" + b"\xff\xe1\x00\x08secret"
    second = raw.index(b"\xff\xc4", raw.index(b"\xff\xda"))
    bare = without_metadata(raw[:2] + note + b"rubbish" + raw[2:second] + note + raw[second:])
    assert _pixels(bare) == _pixels(raw)
    assert b"secret" not in bare
    assert len(bare) <= len(raw) + 3  # fill bytes behind coded pixels stay with them


@pytest.mark.parametrize("name", ["BMP rgb", "TIFF rgb", "TIFF big", "TIFF of three pages"])
def test_other_files_are_passed_on_as_they_are(name: str) -> None:
    assert without_metadata(SEEDS[name]) is SEEDS[name]


@pytest.mark.parametrize("name", ["JPEG rgb", "PNG palette", "TIFF rgb", "TIFF big"])
def test_every_cut_is_left_to_the_decoder(name: str) -> None:
    raw = SEEDS[name]
    for n in range(len(raw)):
        bare = without_metadata(raw[:n])
        assert len(bare) <= n
        if not name.startswith("TIFF") and n > 40:
            assert bare == without_metadata(raw)[: len(bare)]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("2,000 scans.jpg", "2,006 scans of 9,000,000 pixels"),
        ("a flood of segments.jpg", f"more than {MAX_SEGMENTS:,} segments"),
        ("a flood of tables.jpg", f"more than {MAX_SEGMENTS:,} segments"),
        ("a flood of chunks.png", f"more than {MAX_CHUNKS:,} chunks"),
        ("a flood of pixels chunks.png", f"more than {MAX_CHUNKS:,} chunks"),
        ("2^63 tags.tif", "9,223,372,036,854,775,808 TIFF tags"),
        ("a million tags.tif", "1,000,000 TIFF tags"),
        ("many tags that overlap.tif", "59,999 TIFF tags"),
        ("values that overlap.tif", "TIFF tags claim 943,718,400 bytes of a file of 1,059,498"),
        ("tiles larger than all.tif", "tiles of 1,073,741,824 pixels for a picture of 256"),
        ("compressed tiles of 169 million.tif", "tiles of 169,000,000 pixels for a picture of 256"),
        ("one row of 100 million.png", f"100,000,000 x 1 pixels; a side may have at most {MAX_SIDE:,}"),
        ("one column of 90 million.tif", "1 x 90,000,000 pixels; a side may have"),
        ("jump over 25 GB.bmp", "100,000,000 x 1 pixels; a side may have"),
        ("codes that do nothing.bmp", "1 x 2 pixels in a run-length coded BMP are too many"),
        ("lines of 25 million.bmp", "5,000 x 5,000 pixels in a run-length coded BMP are too many"),
    ],
)
@pytest.mark.stress
def test_what_no_honest_file_has_is_refused_by_name(name: str, words: str) -> None:
    with pytest.raises(UnreadableImage, match=words):
        decode_image(nasty()[name])


@pytest.mark.stress
@pytest.mark.parametrize(
    "name", ["exif of 20 MB.jpg", "exif in circles.jpg", "many pictures.jpg", "profile in 255 parts.jpg"]
)
def test_a_bomb_in_the_metadata_does_not_hurt_the_picture(name: str) -> None:
    assert decode_image(nasty()[name]).tobytes() == decode_image(SEEDS["JPEG rgb"]).tobytes()


@pytest.mark.stress
@pytest.mark.parametrize("name", ["text that inflates.png", "profile that inflates.png", "frames before pixels.png"])
def test_a_bomb_in_the_chunks_does_not_hurt_the_picture(name: str) -> None:
    assert decode_image(nasty()[name]).tobytes() == decode_image(png(PIXELS, END)).tobytes()


def test_the_limits_are_where_they_are_said_to_be() -> None:
    check_scans(b"\xff\xda" * 20, 100_000_000)
    with pytest.raises(ValueError, match="21 scans of 100,000,000 pixels"):
        check_scans(b"\xff\xda" * 21, 100_000_000)
    decode_image(odd_but_right()["20 scans.jpg"])
    row = (b"IDAT", zlib.compress(bytes(1 + (MAX_SIDE + 7) // 8)))
    assert decode_image(png(row, END, width=MAX_SIDE, height=1, colour=0, bits=1)).size == (MAX_SIDE, 1)
    with pytest.raises(UnreadableImage, match="65,536 x 1 pixels; a side may have at most 65,535"):
        decode_image(png(row, END, width=MAX_SIDE + 1, height=1, colour=0, bits=1))
    side = int(MAX_RLE_PIXELS**0.5)
    with pytest.raises(UnreadableImage, match="run-length"):
        decode_image(rle_bmp(side + 1, side, b"\0\1"))
    tags = grey_tags(8, 8, 64)
    many = [*tags, *[(1_000 + n, 4, [0]) for n in range(1_000 - len(tags))]]
    assert decode_image(tiff(bytes(64), many)).size == (8, 8)
    with pytest.raises(UnreadableImage, match="1,001 TIFF tags"):
        decode_image(tiff(bytes(64), [*many, (2_000, 4, [0])]))
    picture = np.zeros((16, 16, 3), np.uint8)
    without_metadata(tiled_tiff(picture, tile=(2_000, 2_000)))
    with pytest.raises(ValueError, match="tiles of 4,002,000 pixels for a picture of 256"):
        without_metadata(tiled_tiff(picture, tile=(2_000, 2_001)))


def test_a_big_endian_directory_is_read_as_one() -> None:
    directory = struct.pack(">HHHI", 1, 40_000, 1, 1_000) + bytes(8)
    with pytest.raises(ValueError, match="claim 1,000 bytes of a file of 26"):
        without_metadata(b"MM\0*" + struct.pack(">I", 8) + directory)
