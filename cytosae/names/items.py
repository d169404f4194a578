"""One self-contained item for each latent: a contact sheet, statistics and a plain question, for whoever answers.

`items/latent17.png` and `items/latent17.json`. Neither says the latent's number, an image's name, a patient, a dataset
or (unless asked for) a label, and nothing in it is of an image that is kept for the test.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cytosae.maps import Map, Sources, patch_map, read_tokens
from stores.errors import BadInput
from stores.files import read_json, readable_json, write_atomic
from stores.progress import Progress

from .choose import SHOWN, SIDES, Images
from .config import INACTIVE, LEAST, STRONG, WEAKER, DescribeConfig
from .sheet import Cell, draw_sheet

FOLDER = "items"
VERSION = 1
TOGETHER = 64  # latents whose images are read together, in the order of the stores
QUESTION = (
    "The sheet shows cells under the microscope. Beside each cell, in colour over grey, is where one feature of a "
    "neural network answers to it. The rows 'strong' and 'weaker' are cells with this feature; the last row ('not "
    "active', or 'least active') are cells without it or with the least of it, of the same patients where possible. "
    "What do the cells with the feature have in common, at the coloured places, that those of the last row lack? Give "
    "a short name, as precise as the cells allow (a structure, a cell type, a stain, an artefact), and one or two "
    "sentences on how to recognise it. If you see nothing in common, give an empty name."
)
ANSWER = {
    "name": "text of at most 200 letters, in one line; empty if there is nothing in common",
    "text": "one or two sentences, at most 2,000 letters",
    "confidence": "1 (a guess) to 5 (certain), or null",
}


def item_files(root: Path, latent: int) -> tuple[Path, Path]:
    """The sheet and the JSON of an item."""
    return root / FOLDER / f"latent{latent}.png", root / FOLDER / f"latent{latent}.json"


def write_items(
    root: Path,
    sources: Sources,
    images: Images,
    rows_of: dict[int, list[dict[str, Any]]],
    facts_of: dict[int, dict[str, Any]],
    config: DescribeConfig,
    progress: Progress,
) -> list[str]:
    """Write the items of some latents; those of an interrupted run stay. Returns the images not shown, and why.

    Memory: the pictures of `TOGETHER` items.
    """
    (root / FOLDER).mkdir(exist_ok=True)
    unseen: list[str] = []
    latents = [*rows_of]
    for start in range(0, len(latents), TOGETHER):
        some = latents[start : start + TOGETHER]
        new = [latent for latent in some if not all(path.is_file() for path in item_files(root, latent))]
        cells, lost = _read_cells(sources, {latent: rows_of[latent] for latent in new})
        if lost and all(cell.picture is None for of in cells.values() for cell in of.values()):
            raise BadInput(f"none of the images can be shown ({lost[0]}); say where they are with --images")
        for latent in new:
            _write_item(root, latent, rows_of[latent], cells[latent], facts_of[latent], images, config)
        unseen += lost + [each for latent in some if latent not in cells for each in _not_shown(root, rows_of[latent])]
        progress(start + len(some), len(latents), "items")
    return unseen


def _read_cells(
    sources: Sources, rows_of: dict[int, list[dict[str, Any]]]
) -> tuple[dict[int, dict[int, Cell]], list[str]]:
    """latent -> number -> picture and map of the images that its item shows; each image is read once."""
    wanted: dict[int, list[tuple[int, int]]] = {}
    for latent, rows in rows_of.items():
        for row in rows:
            if row["side"] == SIDES[SHOWN]:
                wanted.setdefault(row["image_index"], []).append((latent, row["number"]))
    cells: dict[int, dict[int, Cell]] = {latent: {} for latent in rows_of}
    unseen = []
    for image_index, asked in sorted(wanted.items()):
        picture, maps, why = read_picture(sources, image_index, [latent for latent, _ in asked])
        if why is not None:
            unseen.append(why)
        for (latent, number), patches in zip(asked, maps, strict=True):
            cells[latent][number] = Cell(number, picture, patches)
    return cells, unseen


def read_picture(
    sources: Sources, image_index: int, latents: Sequence[int]
) -> tuple[npt.NDArray[np.uint8] | None, list[Map], str | None]:
    """(pixels, map of each latent, why there are no pixels) of an image, by its number over all stores."""
    number, inside = place_of(sources, image_index)
    store = sources.stores[number]
    picture = sources.pictures[number](inside)
    maps = []
    if latents:
        tokens = read_tokens(store, inside)
        maps = [patch_map(tokens, latent, store.layout) for latent in latents]
    if isinstance(picture, str):
        return None, maps, f"{store.images['image_id'][inside].as_py()}: {picture}"
    return picture, maps, None


def place_of(sources: Sources, image_index: int) -> tuple[int, int]:
    """(store, image of it) of an image by its number over all stores."""
    for number, store in enumerate(sources.stores):
        if image_index < store.spec.n_images:
            return number, image_index
        image_index -= store.spec.n_images
    raise AssertionError("no such image")


def _write_item(
    root: Path,
    latent: int,
    rows: Sequence[dict[str, Any]],
    cells: dict[int, Cell],
    facts: dict[str, Any],
    images: Images,
    config: DescribeConfig,
) -> None:
    sheet, about = item_files(root, latent)
    shown = [row for row in rows if row["side"] == SIDES[SHOWN]]
    largest = max((float(cell.patches.max()) for cell in cells.values() if cell.patches is not None), default=0.0)
    by_row = [(name, [cells[row["number"]] for row in shown if row["row"] == name]) for name in _rows(shown)]
    png = draw_sheet(by_row, largest, pixels=config.pixels)
    said = {
        "version": VERSION,
        "question": QUESTION,
        "statistics": {**facts, **_of_shown(shown, cells, images, config)},
        "picture": {"file": sheet.name, "media_type": "image/png", "sha256": hashlib.sha256(png).hexdigest()},
        "answer": ANSWER,
    }
    write_atomic(sheet, png)
    write_atomic(about, readable_json(said))


def _not_shown(root: Path, rows: Sequence[dict[str, Any]]) -> list[str]:
    """The images that an item of an interrupted run could not show."""
    said = read_json(item_files(root, rows[0]["latent"])[1])["statistics"]["images"]
    lost = {each["number"] for each in said if not each["is_shown"]}
    mine = (row for row in rows if row["side"] == SIDES[SHOWN] and row["number"] in lost)
    return [f"{row['image_id']}: it could not be shown" for row in mine]


def _rows(shown: Sequence[dict[str, Any]]) -> Iterator[str]:
    there = {row["row"] for row in shown}
    yield from (name for name in (STRONG, WEAKER, INACTIVE, LEAST) if name in there)


def _of_shown(
    shown: Sequence[dict[str, Any]], cells: dict[int, Cell], images: Images, config: DescribeConfig
) -> dict[str, Any]:
    """Facts about the images that are shown, by their numbers on the sheet."""
    found = []
    for row in shown:
        patches = cells[row["number"]].patches
        assert patches is not None
        n_active = int((patches > 0).sum())
        at = None if not n_active else [int(n) for n in np.unravel_index(int(patches.argmax()), patches.shape)]
        found.append(
            {
                "number": row["number"],
                "row": row["row"],
                "mean_activation": _rounded(row["activation"]),
                "share_of_patches_active": _rounded(n_active / patches.size),
                "strongest_patch": at,  # row and column from the top left, from 0; null: at no patch
                "is_shown": cells[row["number"]].picture is not None,
            }
        )
    side = next((len(cell.patches) for cell in cells.values() if cell.patches is not None), 0)
    facts: dict[str, Any] = {"patches_across": side, "images": found}
    if config.labels:
        strong = [images.labels[row["image_index"]] for row in shown if row["row"] == STRONG]
        base = images.labels[images.side == SHOWN].tolist()
        facts["labels_of_strong"] = dict(Counter(label or "(no label)" for label in strong).most_common())
        facts["labels_of_all"] = dict(Counter(label or "(no label)" for label in base).most_common(20))
    return facts


def _rounded(value: float) -> float:
    return float(f"{float(value):.4g}")
