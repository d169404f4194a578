"""Which names of files and folders are those of images, and which a system has made."""

from collections.abc import Sequence

from stores.files import is_dropping

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff")


def is_image_name(name: str, suffixes: Sequence[str] = ()) -> bool:
    """Is this the name of an image, and not hidden? suffixes : what names must end in, case does not count."""
    endings = tuple(each.lower() for each in suffixes) or IMAGE_SUFFIXES
    return name.lower().endswith(endings) and not name.startswith(".")


def is_hidden_or_system(name: str) -> bool:
    """Is this a hidden folder, or one that a system, a network disk or another program has made?"""
    return name.startswith(".") or is_dropping(name)
