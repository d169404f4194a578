"""How fast are images read from an archive, beside the same files in a folder?

Ours: the reader processes of `cyto cache extract` on a zip (members stored, as JPEG and PNG should be, or deflated), a
tar and a tar.gz. Against: the same processes on the folder. Decoding and resizing is in both; the listing of the
archive is in ours. Target: 0.95 of the folder's images/s for the zip. The others are in the line, too.

Full size: python bench/archives.py --images 20000 --workers 8
"""

import tarfile
import zipfile
from pathlib import Path

from common import add_folder, alternate, arguments, emit, say, scratch
from extract import draw_images

from cytocache import archives
from cytocache.readers import ImageReaders
from stores.machine import n_cores

KINDS = ("stored.zip", "deflated.zip", "plain.tar", "packed.tar.gz")


def main() -> None:
    """Measure and print one line of JSON."""
    parser = arguments(__doc__)
    add_folder(parser)
    parser.add_argument("--images", type=int, default=3_000, help="(%(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="(%(default)s)")
    parser.add_argument("--workers", type=int, default=n_cores(), help="processes that read (%(default)s)")
    options = parser.parse_args()
    with scratch(options.folder) as folder:
        say(f"drawing {options.images:,} images")
        draw_images(folder / "images", options.images)
        names = sorted(path.name for path in (folder / "images").iterdir())
        for kind in KINDS:
            pack(folder / kind, folder / "images", names)

        def read(root: Path) -> None:
            archives._listings._kept.clear()  # a job lists its archive once
            paths = [root / name for name in names]
            batches = [paths[at : at + options.batch_size] for at in range(0, len(paths), options.batch_size)]
            n_read = 0
            for pictures in readers.read(batches):
                n_read += sum(error is None for error in pictures.errors)
            if n_read != len(names):
                raise SystemExit(f"{root}: {n_read} of {len(names)} images were read")

        with ImageReaders(options.workers, batch_size=options.batch_size, size=224) as readers:
            plain, *packed = alternate(
                lambda: read(folder / "images"),
                *(lambda kind=kind: read(folder / kind) for kind in KINDS),  # bound now
                rounds=options.rounds,
            )
    n = options.images
    rates = {kind: n / each.seconds for kind, each in zip(KINDS, packed, strict=True)}
    emit(
        "archives",
        ratio=rates["stored.zip"] / (n / plain.seconds),
        target=0.95,
        ours={**packed[0].to_json(n, "images"), "what": "a zip of stored members", "images_per_second": rates},
        baseline={**plain.to_json(n, "images"), "what": "the same files in a folder"},
        params={**vars(options), "folder": str(options.folder or "temporary")},
        device="cpu",
    )


def pack(archive: Path, folder: Path, names: list[str]) -> None:
    """All files of a folder in an archive; the kind by its name."""
    if archive.suffix == ".zip":
        method = zipfile.ZIP_DEFLATED if archive.name.startswith("deflated") else zipfile.ZIP_STORED
        with zipfile.ZipFile(archive, "w", method) as packed:
            for name in names:
                packed.write(folder / name, name)
        return
    with tarfile.open(archive, "w:gz" if archive.suffix == ".gz" else "w") as packed_tar:
        for name in names:
            packed_tar.add(folder / name, name)


if __name__ == "__main__":
    main()
