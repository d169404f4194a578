"""Stylised Wright-Giemsa single-cell images, drawn from a seed so that nobody has to download any.

Every shape is a union of capsules (a segment with a radius) turned into a smooth distance field, so
one primitive gives round cells, lobes joined by bridges, and kidney-shaped nuclei with soft edges.
Lengths are micrometres: a crop always shows 24 by 24 micrometres, whatever its size in pixels.
"""

import csv
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

_Field = npt.NDArray[np.float32]  # (size, size), or (size, size, 3) for a picture with values 0-255
_Capsules = npt.NDArray[np.float64]  # (n, 5): x and y of one end, x and y of the other end, radius
_Rgb = tuple[int, int, int]


class _Pose(NamedTuple):
    """Where a shape drawn for a cell of radius 1 at the origin goes: micrometres from the crop's centre."""

    x: float
    y: float
    radius: float
    angle: float  # radians


CELL_TYPES: tuple[str, ...] = (
    "neutrophil_segmented",
    "eosinophil",
    "lymphocyte",
    "monocyte",
    "myeloblast",
    "promyelocyte_atypical",
    "erythrocyte",
)
"""Labels that `draw_cell` can draw, in the order used wherever a mixture is a vector."""

_MIXTURES = {
    "control": (0.48, 0.05, 0.26, 0.07, 0.02, 0.02, 0.10),
    "CBFB_MYH11": (0.12, 0.26, 0.08, 0.30, 0.16, 0.02, 0.06),
    "PML_RARA": (0.12, 0.02, 0.12, 0.03, 0.10, 0.55, 0.06),
}
DISEASES: dict[str, dict[str, float]] = {
    disease: dict(zip(CELL_TYPES, shares, strict=True)) for disease, shares in _MIXTURES.items()
}
"""Share of each cell type (0-1, summing to 1) by disease, every type in the order of `CELL_TYPES`.

These mixtures are invented for a demonstration and say nothing about medicine.
"""

_CROP_UM = 24.0
_MELT_UM = 0.3  # width over which neighbouring capsules are blended
_SPOT_SUPERSAMPLING = 4  # granules are about one pixel wide: drawn larger, then averaged down
_SLIDE: _Rgb = (240, 228, 224)
_RED_CELL: _Rgb = (219, 160, 155)
_PALLOR: _Rgb = (236, 206, 199)
_OVAL: _Capsules = np.array([[-0.06, 0.0, 0.06, 0.0, 0.95]])
_CONCENTRATION = 30.0  # of the Dirichlet distribution around a disease's mixture: patients are similar, never equal


@dataclass(frozen=True)
class _Spots:
    """Many small discs of one kind: granules, vacuoles or nucleoli."""

    count: tuple[int, int]  # fewest and most
    radius: tuple[float, float]  # smallest and largest, micrometres
    colour: _Rgb
    on_cytoplasm: float  # opacity there, 0-1
    on_nucleus: float
    reach: float = 0.94  # how far from the centre, as a share of the cell's radius


@dataclass(frozen=True)
class _Look:
    """How one type of leukocyte is painted."""

    radius: float  # micrometres
    cytoplasm: _Rgb
    nucleus: _Rgb
    nucleus_shape: Callable[[np.random.Generator], _Capsules]  # for a cell of radius 1 at the origin
    chromatin: float  # contrast of the nuclear texture, 0-1
    clump: float  # its coarseness, micrometres
    ragged: float  # roughness of the nuclear outline, micrometres
    spots: tuple[_Spots, ...] = ()


def _round_nucleus(rng: np.random.Generator, *, fill: float) -> _Capsules:
    x, y = rng.uniform(-0.5, 0.5, 2) * (1 - fill)
    return np.array([[x - 0.05, y, x + 0.05, y, fill - 0.05]])


def _lobed_nucleus(rng: np.random.Generator, *, lobes: tuple[int, int]) -> _Capsules:
    n = int(rng.integers(*lobes, endpoint=True))
    step = {2: 2.3, 3: 1.6, 4: 1.35, 5: 1.15}[n]
    angle = (np.arange(n) - (n - 1) / 2) * step + rng.normal(0, 0.08, n)
    centre = rng.uniform(0.42, 0.56, (n, 1)) * np.column_stack([np.cos(angle), np.sin(angle)])
    centre -= 0.6 * centre.mean(axis=0)
    tilt = angle + rng.normal(0, 0.5, n)
    half = rng.uniform(0.04, 0.11, (n, 1)) * np.column_stack([np.cos(tilt), np.sin(tilt)])
    radius = {2: 0.29, 3: 0.26, 4: 0.225, 5: 0.195}[n] * rng.uniform(0.92, 1.1, (n, 1))
    bridges = np.hstack([centre[:-1], centre[1:], np.full((n - 1, 1), 0.05)])
    return np.vstack([np.hstack([centre - half, centre + half, radius]), bridges])


def _kidney_nucleus(rng: np.random.Generator) -> _Capsules:
    angle = np.linspace(-1, 1, 6) * rng.uniform(1.25, 1.6)
    bend = 0.46 * np.column_stack([np.cos(angle) - 0.6, np.sin(angle)])
    radius = 0.31 + 0.05 * np.cos(np.linspace(0, 2 * np.pi, 5))[:, None]
    return np.hstack([bend[:-1], bend[1:], radius])


def _folded_nucleus(rng: np.random.Generator) -> _Capsules:
    x = rng.uniform(0.25, 0.38)
    halves = np.array([[-x, 0.12, -x, -0.12, 0.35], [x, 0.18, x, -0.1, 0.35]])
    return halves + rng.normal(0, 0.06, (2, 5))


_LOOKS: dict[str, _Look] = {
    "neutrophil_segmented": _Look(
        radius=6.5,
        cytoplasm=(240, 212, 214),
        nucleus=(96, 54, 134),
        nucleus_shape=partial(_lobed_nucleus, lobes=(3, 5)),
        chromatin=0.22,
        clump=0.9,
        ragged=0.12,
        spots=(_Spots(count=(150, 220), radius=(0.12, 0.2), colour=(206, 142, 172), on_cytoplasm=0.6, on_nucleus=0.0),),
    ),
    "eosinophil": _Look(
        radius=6.8,
        cytoplasm=(241, 196, 180),
        nucleus=(98, 62, 142),
        nucleus_shape=partial(_lobed_nucleus, lobes=(2, 2)),
        chromatin=0.2,
        clump=0.9,
        ragged=0.12,
        spots=(_Spots(count=(240, 300), radius=(0.34, 0.5), colour=(224, 104, 72), on_cytoplasm=0.9, on_nucleus=0.12),),
    ),
    "lymphocyte": _Look(
        radius=4.9,
        cytoplasm=(150, 182, 228),
        nucleus=(82, 48, 130),
        nucleus_shape=partial(_round_nucleus, fill=0.86),
        chromatin=0.24,
        clump=1.2,
        ragged=0.12,
    ),
    "monocyte": _Look(
        radius=8.2,
        cytoplasm=(180, 184, 208),
        nucleus=(126, 92, 160),
        nucleus_shape=_kidney_nucleus,
        chromatin=0.2,
        clump=1.0,
        ragged=0.3,
        spots=(
            _Spots(count=(60, 100), radius=(0.1, 0.16), colour=(160, 120, 170), on_cytoplasm=0.5, on_nucleus=0.0),
            _Spots(count=(3, 8), radius=(0.4, 0.8), colour=(232, 230, 236), on_cytoplasm=0.85, on_nucleus=0.0),
        ),
    ),
    "myeloblast": _Look(
        radius=7.3,
        cytoplasm=(126, 148, 208),
        nucleus=(170, 122, 182),
        nucleus_shape=partial(_round_nucleus, fill=0.87),
        chromatin=0.1,
        clump=0.55,
        ragged=0.2,
        spots=(
            _Spots(
                count=(2, 4), radius=(0.8, 1.2), colour=(150, 146, 214), on_cytoplasm=0.0, on_nucleus=0.95, reach=0.55
            ),
        ),
    ),
    "promyelocyte_atypical": _Look(
        radius=8.2,
        cytoplasm=(196, 158, 206),
        nucleus=(140, 84, 160),
        nucleus_shape=_folded_nucleus,
        chromatin=0.16,
        clump=0.8,
        ragged=0.4,
        spots=(_Spots(count=(200, 300), radius=(0.16, 0.32), colour=(92, 22, 98), on_cytoplasm=0.85, on_nucleus=0.3),),
    ),
}


def _noise(rng: np.random.Generator, size: int, grain: float) -> _Field:
    """Smooth noise of unit scale whose bumps are about `grain` micrometres wide."""
    n = max(2, round(_CROP_UM / grain))
    coarse = Image.fromarray(rng.standard_normal((n, n), dtype=np.float32))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))


def _depth(shape: _Capsules, pose: _Pose, size: int) -> _Field:
    """Distance in micrometres from each pixel to the edge of a union of capsules, positive inside."""
    cos, sin = np.cos(pose.angle), np.sin(pose.angle)
    turn = np.array([[cos, sin], [-sin, cos]])
    ends = (shape[:, :4].reshape(-1, 2) @ turn * pose.radius + [pose.x, pose.y]).reshape(-1, 4)
    x0, y0, x1, y1 = ends.astype(np.float32).T[:, :, None, None]
    radius = (shape[:, 4] * pose.radius).astype(np.float32)[:, None, None]
    axis = ((np.arange(size, dtype=np.float32) + 0.5) / size - 0.5) * np.float32(_CROP_UM)
    x, y, dx, dy = axis - x0, axis[:, None] - y0, x1 - x0, y1 - y0
    along = np.clip((x * dx + y * dy) / (dx * dx + dy * dy + 1e-6), 0, 1)
    inside = radius - np.hypot(x - along * dx, y - along * dy)
    inside = np.maximum(inside, -20)  # farther out does not matter, and exp would underflow
    return np.asarray(_MELT_UM * np.log(np.exp(inside / _MELT_UM).sum(axis=0)), np.float32)


def _rim(depth: _Field) -> _Field:
    """1 on the edge of a shape, falling to 0 within a third of a micrometre: edges are stained more."""
    return np.asarray(np.exp(-np.abs(depth) / 0.35), np.float32)


def _cover(depth: _Field) -> _Field:
    """Opacity 0-1 with an edge about one and a half pixels wide, so that no edge is jagged."""
    return np.asarray(np.clip(depth * (len(depth) / _CROP_UM / 1.5) + 0.5, 0, 1), np.float32)


def _paint(picture: _Field, cover: _Field, colour: _Rgb, shade: _Field | None = None) -> None:
    """Blend `colour`, made lighter or darker by `shade`, into `picture` in place."""
    ink = np.array(colour, np.float32)
    picture += cover[..., None] * ((ink if shade is None else shade[..., None] * ink) - picture)


def _scatter(spots: _Spots, pose: _Pose, size: int, rng: np.random.Generator) -> _Field:
    """Opacity 0-1 of spots spread uniformly over a disc, some fainter than others (out of focus)."""
    n = int(rng.integers(*spots.count, endpoint=True))
    angle, far = rng.uniform(0, 2 * np.pi, n), spots.reach * pose.radius * np.sqrt(rng.random(n))
    x, y, r = pose.x + far * np.cos(angle), pose.y + far * np.sin(angle), rng.uniform(*spots.radius, n)
    scale = size * _SPOT_SUPERSAMPLING / _CROP_UM
    boxes = (np.column_stack([x - r, y - r, x + r, y + r]) + _CROP_UM / 2) * scale
    canvas = Image.new("L", (size * _SPOT_SUPERSAMPLING,) * 2)
    draw = ImageDraw.Draw(canvas)
    for box, strength in zip(boxes.tolist(), rng.integers(130, 256, n).tolist(), strict=True):
        draw.ellipse(box, fill=strength)
    return np.asarray(canvas.reduce(_SPOT_SUPERSAMPLING), np.float32) / np.float32(255)


def _paint_red_cell(picture: _Field, x: float, y: float, rng: np.random.Generator) -> None:
    size = len(picture)
    pose = _Pose(x, y, rng.uniform(3.3, 3.9), rng.uniform(0, np.pi))
    depth = _depth(_OVAL, pose, size) + np.float32(0.12) * _noise(rng, size, 4.0)
    _paint(picture, _cover(depth), _RED_CELL, 1 - np.float32(0.07) * _rim(depth))
    hollow = rng.uniform(0.3, 0.45) * pose.radius  # the disc is thinner, so paler, inside this depth
    _paint(picture, np.clip((depth - hollow) / (0.4 * pose.radius), 0, 0.9), _PALLOR)


def _paint_neighbours(picture: _Field, clearance: float, rng: np.random.Generator) -> None:
    """Red cells near the border, spread around so that they hardly touch each other or the centre."""
    n = int(rng.integers(2, 6))
    angles = rng.uniform(0, 2 * np.pi) + (np.arange(n) + rng.uniform(-0.2, 0.2, n)) * 2 * np.pi / n
    for angle in angles:
        far = max(clearance + 4.3, rng.uniform(9.5, 13.0))
        _paint_red_cell(picture, far * np.cos(angle), far * np.sin(angle), rng)


def _paint_leukocyte(picture: _Field, look: _Look, pose: _Pose, rng: np.random.Generator) -> None:
    noise = partial(_noise, rng, len(picture))
    body = _depth(_OVAL, pose, len(picture)) + np.float32(0.3) * noise(5.0)
    cell = _cover(body)
    _paint(picture, cell, look.cytoplasm, 1 + np.float32(0.025) * noise(1.2) - np.float32(0.09) * _rim(body))
    core = _depth(look.nucleus_shape(rng), pose, len(picture)) + np.float32(look.ragged) * noise(2.5)
    core = np.minimum(core, body - np.float32(0.15))  # the nucleus stays inside the cell
    nucleus = _cover(core)
    texture = np.tanh(noise(look.clump) + np.float32(0.5) * noise(look.clump / 2))
    shade = np.float32(1.04) + np.float32(look.chromatin) * texture - np.float32(0.16) * _rim(core)
    _paint(picture, nucleus, look.nucleus, shade)
    for spots in look.spots:
        opacity = spots.on_cytoplasm + np.float32(spots.on_nucleus - spots.on_cytoplasm) * nucleus
        _paint(picture, cell * opacity * _scatter(spots, pose, len(picture), rng), spots.colour)


def _develop(picture: _Field, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Apply variation between slides and cameras: stain strength and hue, light, sensor noise."""
    size = len(picture)
    stain = rng.uniform(0.85, 1.15) * rng.normal(1, 0.03, 3)  # a power of transmission: optical density
    angle, axis = rng.uniform(0, 2 * np.pi), np.linspace(-1, 1, size)
    light = 1 + 0.035 * (np.cos(angle) * axis + np.sin(angle) * axis[:, None])
    exposed = 255 * (np.clip(picture, 1, 255) / 255) ** stain.astype(np.float32)
    exposed *= light[..., None].astype(np.float32)
    exposed += 2.2 * rng.standard_normal(exposed.shape, dtype=np.float32)
    return np.clip(exposed + 0.5, 0, 255).astype(np.uint8)


def draw_cell(cell_type: str, rng: np.random.Generator, *, size: int = 96) -> npt.NDArray[np.uint8]:
    """Draw one stylised Wright-Giemsa crop with a single cell in the middle.

    Parameters
    ----------
    cell_type : str
        One of `CELL_TYPES`.
    rng : numpy.random.Generator
        Source of all variation (size, position, rotation, shape, stain, noise); it is advanced.
    size : int
        Width and height in pixels, at least 16. The crop shows 24 by 24 micrometres at any size.

    Returns
    -------
    numpy.ndarray
        Shape (size, size, 3), uint8, RGB in 0-255, rows from top to bottom.

    Raises
    ------
    ValueError
        If the cell type is unknown or the size is too small.
    """
    if cell_type not in CELL_TYPES:
        raise ValueError(f"unknown cell type {cell_type!r}; known types: {', '.join(CELL_TYPES)}")
    if size < 16:
        raise ValueError(f"size must be at least 16 pixels, got {size}")
    look = _LOOKS.get(cell_type)  # none for the erythrocyte, which is drawn like its neighbours
    x, y = rng.uniform(-0.8, 0.8, 2)
    radius = look.radius * rng.uniform(0.92, 1.08) if look else 4.0
    picture = np.array(_SLIDE, np.float32) * (1 + np.float32(0.008) * _noise(rng, size, 6.0)[..., None])
    _paint_neighbours(picture, radius, rng)
    if look:
        _paint_leukocyte(picture, look, _Pose(x, y, radius, rng.uniform(0, 2 * np.pi)), rng)
    else:
        _paint_red_cell(picture, x, y, rng)
    return _develop(picture, rng)


def _replace_file(path: Path, content: bytes) -> None:
    """Replace a file atomically: a reader sees the old content or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _png(pixels: npt.NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def _stream(seed: int, *key: int) -> np.random.Generator:
    """Random stream of a patient, or of an image of a patient, independent of all the others."""
    # A spawn key, since a plain list would give (seed, patient) and (seed, patient, 0) one stream.
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def write_demo_images(
    root: Path, *, n_patients: int = 18, images_per_patient: int = 24, size: int = 96, seed: int = 0
) -> Path:
    """Write an invented cohort: PNG crops and the manifest that lists them.

    Diseases go round-robin over patients in the order of `DISEASES`. A patient's mixture of cell types
    is drawn around that of the disease, and patients differ in how many images they have. An image
    depends only on (seed, patient, number of the image), so a larger cohort repeats a smaller one.

    Parameters
    ----------
    root : pathlib.Path
        Folder for `images.csv` and `images/<patient>/<nnn>.png`; made if missing. Files of the same name
        are replaced, other files stay as they are.
    n_patients : int
        Number of patients, at least 1; named P001, P002, ...
    images_per_patient : int
        Typical number of images of a patient, at least 1; the actual one is within about 25 percent.
    size : int
        Width and height of an image in pixels, at least 16.
    seed : int
        Any non-negative integer; the same seed gives byte-identical pixels.

    Returns
    -------
    pathlib.Path
        The manifest `root/images.csv`, columns `path,label,patient,disease` with one row per image in
        order of patient and number; `path` is relative to `root`, with forward slashes.

    Raises
    ------
    ValueError
        If a number is out of range.
    """
    for name, value, least in (
        ("n_patients", n_patients, 1),
        ("images_per_patient", images_per_patient, 1),
        ("size", size, 16),
        ("seed", seed, 0),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    table = io.StringIO()
    manifest = csv.writer(table, lineterminator="\n")
    manifest.writerow(("path", "label", "patient", "disease"))
    for patient in range(n_patients):
        disease = tuple(DISEASES)[patient % len(DISEASES)]
        rng = _stream(seed, patient)
        mixture = rng.dirichlet([_CONCENTRATION * share for share in DISEASES[disease].values()])
        for image in range(max(1, round(images_per_patient * rng.uniform(0.75, 1.25)))):
            rng_image = _stream(seed, patient, image)
            label = CELL_TYPES[rng_image.choice(len(CELL_TYPES), p=mixture)]
            path = f"images/P{patient + 1:03d}/{image:03d}.png"
            _replace_file(Path(root, path), _png(draw_cell(label, rng_image, size=size)))
            manifest.writerow((path, label, f"P{patient + 1:03d}", disease))
    _replace_file(Path(root, "images.csv"), table.getvalue().encode())
    return Path(root, "images.csv")
