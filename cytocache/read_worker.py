"""The program of a reader process: image paths come on stdin; pixels go to shared memory, outcomes to stdout.

It is a process of its own because image files are untrusted: if a decoder crashes or hangs, one image is lost and not
the job. It does not import torch or zarr, so it starts in a tenth of a second. A request is one line of JSON; the
answer is one line for each image:

    [offset in the shared memory, [place, ...]]   ->   [SHA-256 of the file, error, what is cut off; each may be null]

A place is a path; or, for a file inside an archive, which the parent has listed, the values of `Member`; or
{"error": why there is none}.

Run by `cytocache/readers.py` as `python -m cytocache.read_worker DESCRIPTOR PREPROCESS SECONDS TRUNCATED` (PREPROCESS
is JSON; TRUNCATED is 1 to take images that are cut off); ends when stdin ends, or when an image takes longer than
SECONDS, so that a hung process does not outlive a killed parent.
"""

import json
import mmap
import os
import signal
import sys
from pathlib import Path

import numpy as np

from .archive_member import Member
from .images import ReadImage, read_image_file
from .preprocess import Preprocess


def main() -> None:
    """Answer requests until there are no more."""
    for signum in (signal.SIGINT, signal.SIGTERM):  # the parent reacts to a signal to the process group
        signal.signal(signum, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # SIGALRM ends the process, even inside a decoder in C
    descriptor, seconds = int(sys.argv[1]), float(sys.argv[3])
    preprocess = Preprocess.from_dict(json.loads(sys.argv[2]))
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not be read as an answer
    image_bytes, allow_truncated = preprocess.size**2 * 3, sys.argv[4:5] == ["1"]
    with answers, mmap.mmap(descriptor, 0) as shared:
        answers.write(b"ready\n")
        answers.flush()
        for request in sys.stdin.buffer:
            offset, places = json.loads(request)
            for number, said in enumerate(places):
                place = said if not isinstance(said, list) else Member(said[0], tuple(said[1]), *said[2:])
                more = place.seconds_to_reach if isinstance(place, Member) else 0.0
                signal.setitimer(signal.ITIMER_REAL, seconds + more)
                pixels, found = read_and_resize(place, preprocess, allow_truncated=allow_truncated)
                signal.setitimer(signal.ITIMER_REAL, 0)
                at = offset + number * image_bytes
                shared[at : at + image_bytes] = pixels.tobytes() if pixels is not None else bytes(image_bytes)
                answers.write(json.dumps([found.content_hash, found.error, found.truncated]).encode() + b"\n")
                answers.flush()


def read_and_resize(
    place: str | Member | dict[str, str], preprocess: Preprocess, *, allow_truncated: bool = False
) -> tuple[np.ndarray | None, ReadImage]:
    """((size, size, 3) uint8, or None if it cannot be read; what was read)."""
    if isinstance(place, dict):
        return None, ReadImage(None, None, place["error"])
    found = read_image_file(Path(place) if isinstance(place, str) else place, allow_truncated=allow_truncated)
    return (None if found.picture is None else preprocess.resize(found.picture)), found


if __name__ == "__main__":
    main()
