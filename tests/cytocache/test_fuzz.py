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
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import _lively_state, _published
from click.testing import CliRunner
from hostile_images import (
    SEEDS,
    nasty,
    odd_but_right,
)
from pictures import _chunk
from places import GOLDEN, ROOT

from cli import cli
from cytocache.backbones import load_backbone
from cytocache.datasets import open_images
from cytocache.extract import ExtractConfig, extract
from cytocache.images import read_image
from cytocache.preprocess import Preprocess
from cytocache.torchvision_guard import declare_missing_operators
from stores import ActivationStore
from stores.files import sha256_json

pytestmark = pytest.mark.stress

# ------------------------------------------------------------------------------------------ valid files


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
        "import sys; sys.path[:0] = sys.argv[2:]\n"
        "from pathlib import Path; from test_fuzz import read_mutants\n"
        "print(read_mutants(Path(sys.argv[1]), 3000, seed=1)[1])"
    )
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        code,
        str(tmp_path),
        str(Path(__file__).parent),
        str(ROOT / "tests" / "support"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 2000
