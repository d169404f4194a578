"""The program of a reader process: image paths come on stdin; pixels go to shared memory, outcomes to stdout.

It is a process of its own because image files are untrusted: if a decoder crashes or hangs, one image is lost and not
the job. It does not import torch or zarr, so it starts in a tenth of a second. A request is one line of JSON; the
answer is one line for each image:

    [offset in the shared memory, [path, ...]]   ->   [SHA-256 of the file or null, error or null]

Run by `cytocache/readers.py` as `python -m cytocache.read_worker DESCRIPTOR PREPROCESS SECONDS` (PREPROCESS is JSON);
ends when stdin ends, or when an image takes longer than SECONDS, so that a hung process does not outlive a killed
parent.
"""

import json
import mmap
import os
import signal
import sys
from pathlib import Path

import numpy as np

from .images import read_image
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
    image_bytes = preprocess.size**2 * 3
    with answers, mmap.mmap(descriptor, 0) as shared:
        answers.write(b"ready\n")
        answers.flush()
        for request in sys.stdin.buffer:
            offset, paths = json.loads(request)
            for number, path in enumerate(paths):
                signal.setitimer(signal.ITIMER_REAL, seconds)
                pixels, content_hash, error = read_and_resize(Path(path), preprocess)
                signal.setitimer(signal.ITIMER_REAL, 0)
                at = offset + number * image_bytes
                shared[at : at + image_bytes] = pixels.tobytes() if pixels is not None else bytes(image_bytes)
                answers.write(json.dumps([content_hash, error]).encode() + b"\n")
                answers.flush()


def read_and_resize(path: Path, preprocess: Preprocess) -> tuple[np.ndarray | None, str | None, str | None]:
    """((size, size, 3) uint8 or None, SHA-256 of the file or None, None or why there are no pixels)."""
    picture, content_hash, error = read_image(path)
    return (None if picture is None else preprocess.resize(picture)), content_hash, error


if __name__ == "__main__":
    main()
