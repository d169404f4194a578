"""The parts of a latent store that several writers make: which are finished, and which images are missing."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import read_lines
from .latent_spec import LatentSpec, part_folder, shard_images
from .shards import Shard


@dataclass(frozen=True)
class LatentPart:
    """The finished rows of some consecutive images."""

    folder: Path
    images: range
    records: list[dict[str, Any]]  # the journal's, one per commit


def finished_parts(root: Path, spec: LatentSpec) -> list[LatentPart]:
    """The parts whose writers have finished, in the order of their images."""
    parts = []
    for journal in root.glob("part-*-of-*/journal.jsonl"):
        records = read_lines(journal, skip_damaged=True)
        images = _images_of(journal.parent, spec)
        if images and records and "tail" in records[-1] and records[-1]["tail"] is None:
            parts.append(LatentPart(journal.parent, images, records))
    return sorted(parts, key=lambda part: (part.images.start, -part.images.stop))


def committed_images(root: Path) -> int:
    """How many images, counted from the first, have their rows in the whole store."""
    records = read_lines(root / "journal.jsonl", skip_damaged=True)
    return int(records[-1]["n_images"]) if records else 0


def missing_images(root: Path, spec: LatentSpec) -> list[range]:
    """Images whose rows are neither in the whole store nor in a finished part."""
    done, missing = committed_images(root), []
    for part in finished_parts(root, spec):
        if part.images.start > done:
            missing.append(range(done, part.images.start))
        done = max(done, part.images.stop)
    return missing + ([range(done, spec.n_images)] if done < spec.n_images else [])


def _images_of(folder: Path, spec: LatentSpec) -> range | None:
    """The images of a part, by its folder name; None if it is not the folder of a part."""
    try:
        index, count = folder.name.removeprefix("part-").split("-of-")
        shard = Shard.parse(f"{index}/{count}")
    except ValueError:
        return None
    return shard_images(spec, shard) if part_folder(folder.parent, shard) == folder else None
