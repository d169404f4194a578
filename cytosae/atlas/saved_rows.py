"""Pictures as scripts, so that a page from the disk can save a row of its cells as a picture.

A browser lets no page of file:// read back what it drew from a picture file; what a script brought may be drawn and
saved. They are read when somebody saves a row: pages of pairs and of diseases, whose rows are few. For pages of
patients and concepts they would be as many bytes again as all pictures.
"""

import base64

from .frames import Frames
from .site import Site, script_data


def saved_images(frames: Frames) -> list[int]:
    """Indices of the images in the rows of pages of diseases and pairs that can be shown, by number."""
    rows = [beside for cells in (*frames.choice.diseases, *frames.choice.pairs) for beside in cells.values()]
    images = {image for beside in rows for image in (*beside.mine, *beside.others)}
    return sorted(images - frames.maps.unseen.keys(), key=frames.plan.number_of.__getitem__)


def write_saved_rows(site: Site, frames: Frames) -> None:
    """Write data/picture-<number>.js for each of `saved_images`, from the pictures that are written."""
    assert site.root is not None
    for image in saved_images(frames):
        number = frames.plan.number_of[image]
        content = (site.root / "pictures" / f"{number}.jpg").read_bytes()
        site.data(f"picture-{number}", base64.b64encode(content).decode())


def estimate_saved_rows(frames: Frames, bytes_per_picture: float) -> tuple[int, int]:
    """Files and bytes of `write_saved_rows`, for pictures of so many bytes on average."""
    numbers = [frames.plan.number_of[image] for image in saved_images(frames)]
    around = sum(len(script_data(f"picture-{number}", "")) for number in numbers)
    return len(numbers), around + round(len(numbers) * 4 / 3 * bytes_per_picture)
