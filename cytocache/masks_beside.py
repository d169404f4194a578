"""Finds masks that lie beside the images of a folder, by their names: `a.png` and `a_mask.png`, or `masks/a.png`.

By names only: whether a file is a mask is seen when it is read. Each mask has exactly one image, else it is not named.
"""

import re
from collections.abc import Iterable

from .archives import as_unpacked

_MASK_WORDS = "mask|masks|seg|segs|segmentation|segmentations|annotation|annotations|gt|groundtruth|label|labels"
_AT_END = re.compile(rf"(?:[_\-. ](?:{_MASK_WORDS}))+$", re.IGNORECASE)
_MASK_FOLDERS = frozenset(_MASK_WORDS.split("|")) | {"ground_truth", "ground-truth"}
_IMAGE_FOLDERS = frozenset({"image", "images", "img", "imgs"})
_IMAGE_AT_END = re.compile(r"[_\-. ](?:image|img|rgb|raw)$", re.IGNORECASE)

_Key = tuple[tuple[str, ...], str]


def find_masks_beside(paths: Iterable[str]) -> dict[str, str]:
    """Mask -> its image, both as given, for the relative paths of image files; in the order of `paths`."""
    images: dict[_Key, list[str]] = {}
    masks: list[tuple[str, _Key]] = []
    for path in paths:
        key, is_mask = _key(path)
        if is_mask:
            masks.append((path, key))
        else:
            images.setdefault(key, []).append(path)
    return {mask: images[key][0] for mask, key in masks if len(images.get(key, ())) == 1}


def _key(path: str) -> tuple[_Key, bool]:
    """(what a mask and its image have in common, is the name that of a mask?)"""
    *folders, file = as_unpacked(path).split("/")
    words = [folder.casefold() for folder in folders]
    stem = file.rpartition(".")[0]
    bare = _AT_END.sub("", stem)
    is_mask = (bare != stem and bare != "") or any(word in _MASK_FOLDERS for word in words)
    kept = tuple(word for word in words if word not in _MASK_FOLDERS and word not in _IMAGE_FOLDERS)
    return (kept, _IMAGE_AT_END.sub("", bare or stem)), is_mask
