"""Every layout of TIFF, PNG and JPEG is read right or refused by name, never misread; most files are tifffile's.

Expected pixels are the values that were written, or what tifffile and imagecodecs read; never what Pillow reads.
"""

import io
import itertools
import re
import struct
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt
import pytest
import tifffile

from cytocache.images import UnreadableImage, decode_image

HEIGHT, WIDTH = 24, 36
_NAMED = re.compile(r"TIFF of|pixels outside")
_ORIENTED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[:, ::-1],
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a.swapaxes(0, 1)[::-1],
}


def _drawn(*shape: int, high: int = 256) -> npt.NDArray[Any]:
    return np.random.default_rng(0).integers(0, high, shape).astype(np.uint8)


def _written(values: npt.NDArray[Any], **options: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, values, metadata=None, **options)
    return file.getvalue()


def _read(raw: bytes) -> npt.NDArray[np.int64] | None:
    """Pixels; None if the file is refused by name."""
    try:
        return np.asarray(decode_image(raw)).astype(np.int64)
    except UnreadableImage as error:
        if _NAMED.search(str(error)) is None:
            raise
        return None


def _with_tag(raw: bytes, tag: int, value: int) -> bytes:
    """Another short value for a tag that the first page of a little-endian TIFF has, or that replaces its Software."""
    at = struct.unpack_from("<I", raw, 4)[0]
    for entry in range(at + 2, at + 2 + 12 * struct.unpack_from("<H", raw, at)[0], 12):
        if struct.unpack_from("<H", raw, entry)[0] == tag:
            return raw[:entry] + struct.pack("<HHIHH", tag, 3, 1, value, 0) + raw[entry + 12 :]
    raise AssertionError(f"no tag {tag}")


@pytest.mark.stress
@pytest.mark.parametrize("kind", ["u1", "u2", "u4", "i1", "i2", "i4", "f2", "f4", "f8"])
def test_a_tiff_is_read_right_or_refused_by_name(kind: str) -> None:
    """Number type x colours x planes x compression x predictor x strips or tiles x byte order x BigTIFF x alpha."""
    n_read, dtype = 0, np.dtype(kind)
    for colours, planar, compression, predictor, tile, order, big, extra in itertools.product(
        ["minisblack", "miniswhite", "rgb"],
        [False, True],
        [None, "zlib", "lzw", "packbits", "zstd"],
        [False, True],
        [None, (16, 16)],
        "<>",
        [False, True],
        [None, "unassalpha", "assocalpha", "unspecified"],
    ):
        n_colours = 3 if colours == "rgb" else 1
        n = n_colours + (extra is not None)
        if (planar and n == 1) or (big and (compression, predictor) != ("zlib", False)):
            continue
        if predictor and compression not in ("zlib", "lzw"):
            continue
        wanted = _drawn(HEIGHT, WIDTH, n)
        stored = wanted.copy()
        if extra == "assocalpha":  # opaque enough that the colours survive a multiplication
            stored[..., -1] = 128 + stored[..., -1] // 2
            stored[..., :-1] = np.rint(wanted[..., :-1] * (stored[..., -1:] / 255.0))
        if dtype.kind == "f":
            values = (stored / 255).astype(dtype)
        elif kind == "u1":
            values = stored
        elif kind in ("u2", "u4"):
            values = stored.astype(dtype) * dtype.type(257)
        else:
            values = stored.astype(np.int64).__mul__(1 if kind == "i1" else 64).astype(dtype)
        expected = wanted[..., :n_colours].astype(np.int64)
        if kind in ("i2", "i4"):  # without a negative number, signed grey is what it is as unsigned grey
            expected = (values[..., :n_colours].astype(np.int64) + 128) // 257
        values = np.moveaxis(values, 2, 0).copy() if planar else values if n > 1 else values[..., 0]
        options: dict[str, Any] = {"tile": tile} if tile else {"rowsperstrip": 10}
        if n > 1:
            options |= {"planarconfig": "separate" if planar else "contig"}
        if predictor:
            options |= {"predictor": 3 if dtype.kind == "f" else 2}
        try:
            raw = _written(
                values,
                photometric=colours,
                compression=compression,
                byteorder=order,
                bigtiff=big,
                extrasamples=[extra] if extra else None,
                **options,
            )
        except ValueError:  # tifffile has no such predictor for this number type
            continue
        found = _read(raw)
        if found is not None:
            n_read += 1
            expected = 255 - expected if colours == "miniswhite" else expected
            difference = np.abs(found - expected).max()
            # dividing by alpha costs up to 1 of 128, and 16-bit colours lose their low byte before
            assert difference <= (4 if extra == "assocalpha" else 0), (kind, colours, planar, options, order, extra)
    least = {"u1": 450, "u2": 300, "u4": 30, "f4": 40, "i2": 40, "i4": 40}
    assert n_read >= least.get(kind, 0)
    assert n_read == 0 or kind in least  # of f2, f8 and i1 nothing is read


def test_16_bit_colours_with_planes_apart_are_not_mistaken_for_8_bits() -> None:
    """As Bio-Formats writes them: uncompressed, PlanarConfiguration 2."""
    wanted = _drawn(HEIGHT, WIDTH, 3)
    for order, low in itertools.product("<>", [0, 255]):
        values = np.moveaxis(wanted.astype(np.uint16) * 256 + np.uint16(low), 2, 0).copy()
        raw = _written(values, photometric="rgb", planarconfig="separate", byteorder=order)
        np.testing.assert_array_equal(np.asarray(decode_image(raw)), wanted)


@pytest.mark.parametrize("bits", [1, 2, 4, 12])
def test_grey_of_other_bits_takes_the_whole_range(bits: int) -> None:
    """12 bits are no dark 16 bits. Packed by hand: most significant bit first, rows begin at a byte."""
    top = 2**bits - 1
    values = np.random.default_rng(1).integers(0, top + 1, (HEIGHT, WIDTH))
    values[0, :2] = 0, top
    places = (values[..., None] >> np.arange(bits)[::-1]) & 1
    packed = np.packbits(places.reshape(HEIGHT, -1).astype(np.uint8), axis=1).tobytes()
    for is_inverted in (False, True):
        if bits == 12 and is_inverted:
            continue
        raw = _grey_tiff(packed, bits, photometric=0 if is_inverted else 1)
        found = _read(raw)
        assert found is not None
        expected = np.rint((top - values if is_inverted else values) * 255 / top)
        np.testing.assert_array_equal(found, np.repeat(expected[..., None], 3, 2))


def _grey_tiff(data: bytes, bits: int, *, photometric: int, **more: int) -> bytes:
    tags = {256: WIDTH, 257: HEIGHT, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: HEIGHT, 279: len(data)}
    tags |= {int(name[1:]): value for name, value in more.items()}
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, tags[tag]) for tag in sorted(tags))
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize("bits", [1, 4, 8, 16])
def test_one_plane_said_to_be_apart_is_read_right_or_refused(bits: int) -> None:
    top = 2**bits - 1
    values = np.random.default_rng(1).integers(0, top + 1, (HEIGHT, WIDTH))
    if bits == 16:
        packed = values.astype("<u2").tobytes()
    else:
        places = (values[..., None] >> np.arange(bits)[::-1]) & 1
        packed = np.packbits(places.reshape(HEIGHT, -1).astype(np.uint8), axis=1).tobytes()
    for photometric in (0, 1):
        found = _read(_grey_tiff(packed, bits, photometric=photometric, t284=2))
        if found is not None:
            expected = np.rint((values if photometric else top - values) * 255 / top)
            np.testing.assert_array_equal(found[..., 0], expected)
        else:
            assert (bits, photometric) not in {(8, 1), (16, 1)}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_the_orientation_of_a_tiff_is_applied(orientation: int, compression: str | None) -> None:
    wanted = _drawn(HEIGHT, WIDTH, 3)
    raw = _written(wanted, photometric="rgb", compression=compression, extratags=[(274, 3, 1, orientation, True)])
    np.testing.assert_array_equal(np.asarray(decode_image(raw)), _ORIENTED[orientation](wanted))


def test_a_palette_is_applied_and_one_of_8_bit_numbers_refused() -> None:
    palette, places = _drawn(3, 256), _drawn(HEIGHT, WIDTH)
    raw = _written(places, photometric="palette", colormap=palette.astype(np.uint16) * 257)
    np.testing.assert_array_equal(np.asarray(decode_image(raw)), palette.T[places])
    raw = _written(places, photometric="palette", colormap=palette.astype(np.uint16))
    with pytest.raises(UnreadableImage, match="a palette of 8-bit numbers"):
        decode_image(raw)


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("kind", ["u1", "u2"])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_cmyk_is_read_right_or_refused(planar: bool, kind: str, compression: str | None) -> None:
    inks = _drawn(HEIGHT, WIDTH, 4, high=128)
    values = inks if kind == "u1" else inks.astype(np.uint16) * 257
    values = np.moveaxis(values, 2, 0).copy() if planar else values
    options = {"planarconfig": "separate" if planar else "contig", "compression": compression}
    found = _read(_written(values, photometric="separated", **options))
    if found is not None:
        without_ink = 255 - inks.astype(np.float64)
        expected = without_ink[..., :3] * without_ink[..., 3:] / 255
        assert np.abs(found - expected).max() <= 2
    assert found is not None or (planar and kind == "u2")


def test_ycbcr_without_compression_is_read_where_every_pixel_has_its_colours() -> None:
    wanted = np.full((HEIGHT, WIDTH, 3), (120, 128, 128), np.uint8)
    raw = _written(wanted, photometric="ycbcr", subsampling=(1, 1))
    found = _read(raw)
    assert found is None or np.abs(found - 120).max() <= 1
    with pytest.raises(UnreadableImage, match="YCbCr with fewer colours than pixels"):
        decode_image(_written(wanted, photometric="rgb").replace(*_photometric(2, 6)))


def _photometric(old: int, new: int) -> tuple[bytes, bytes]:
    return struct.pack("<HHIHH", 262, 3, 1, old, 0), struct.pack("<HHIHH", 262, 3, 1, new, 0)


@pytest.mark.parametrize("photometric", ["rgb", "ycbcr", "minisblack"])
@pytest.mark.parametrize("tile", [None, (16, 16)])
def test_jpeg_in_tiff_is_what_tifffile_reads(photometric: str, tile: tuple[int, int] | None) -> None:
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    wanted = np.stack([x * 7, y * 10, 255 - x * 7], -1).clip(0, 255).astype(np.uint8)
    wanted = wanted[..., 0] if photometric == "minisblack" else wanted
    options: dict[str, Any] = {"tile": tile} if tile else {}
    raw = _written(wanted, photometric=photometric, compression="jpeg", compressionargs={"level": 95}, **options)
    expected = tifffile.imread(io.BytesIO(raw)).astype(np.int64)
    found = _read(raw)
    assert found is not None
    assert np.abs(found - (expected if expected.ndim == 3 else expected[..., None])).max() <= 4


def test_the_first_page_counts() -> None:
    pages = _drawn(3, HEIGHT, WIDTH)
    raw = _written(pages, photometric="minisblack")
    np.testing.assert_array_equal(np.asarray(decode_image(raw))[..., 0], pages[0])


@pytest.mark.parametrize("kind", ["u1", "u2"])
@pytest.mark.parametrize("n_samples", [1, 2, 3, 4])
def test_a_png_is_what_imagecodecs_wrote(kind: str, n_samples: int) -> None:
    wanted = _drawn(HEIGHT, WIDTH, n_samples)
    values = wanted if kind == "u1" else wanted.astype(np.uint16) * 257
    found = _read(bytes(imagecodecs.png_encode(values if n_samples > 1 else values[..., 0])))
    assert found is not None
    expected = wanted[..., : 3 if n_samples > 2 else 1]
    np.testing.assert_array_equal(found, np.broadcast_to(expected, found.shape))


@pytest.mark.parametrize("options", [{}, {"subsampling": "420"}, {"colorspace": "CMYK", "outcolorspace": "CMYK"}])
def test_a_jpeg_is_what_imagecodecs_reads(options: dict[str, Any]) -> None:
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    wanted = np.stack([x * 7, y * 10, 255 - x * 7, 255 - y], -1).clip(0, 255).astype(np.uint8)
    n = 4 if options.get("colorspace") == "CMYK" else 3
    raw = bytes(imagecodecs.jpeg8_encode(np.ascontiguousarray(wanted[..., :n]), level=95, **options))
    found = _read(raw)
    assert found is not None
    if n == 3:
        assert np.abs(found - imagecodecs.jpeg8_decode(raw).astype(np.int64)).max() <= 2


def test_a_jpeg_of_12_bits_is_refused() -> None:
    raw = bytes(imagecodecs.jpeg_encode(_drawn(HEIGHT, WIDTH).astype(np.uint16) * 16, bitspersample=12))
    with pytest.raises(UnreadableImage):
        decode_image(raw)
