"""Images in archives give what the same images in a folder give: table, tokens, store; and are found again later."""

import gzip
import io
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from archive_maker import KINDS, add, pack, pack_folder
from artefacts import contents
from command_line import run
from latent_stores import local_client
from PIL import Image

from cytocache import bridge
from cytocache.datasets import Images, open_images
from cytocache.duplicates import find_duplicates
from cytocache.extract import ExtractConfig, extract
from cytocache.index import DUPLICATE_OF, index_images
from cytocache.masks import find_masks
from cytocache.readers import ImageReaders
from cytocache.repair import repair
from cytosae.barcodes import BarcodeConfig, write_barcodes
from cytosae.concepts import ConceptConfig, concept_statistics
from cytosae.latents.encode import encode
from cytosae.sae import TrainConfig
from cytosae.training.train import train
from stores import ActivationStore, LatentStore
from stores.activation_spec import chunk_path
from stores.errors import BadInput
from stores.runlog import read_runs
from stores.tables import column

CONFIG = ExtractConfig(blocks=(0,), chunk_images=4, batch_size=2, workers=2, device="cpu")
NAMES = [f"{label}/{n}.png" for label in ("BAS", "NGS") for n in range(4)] + ["BAS/deep/9.png"]

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


def draw(path: Path, seed: int, side: int = 24) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """cells/: nine pictures in two classes; read-only."""
    root = tmp_path_factory.mktemp("made") / "cells"
    for n, name in enumerate(NAMES):
        draw(root / name, n)
    return root


@pytest.fixture(scope="module")
def store(folder: Path) -> Path:
    """The cache of the folder; read-only."""
    extract(folder, folder.parent / "cells.acts.zarr", CONFIG)
    return folder.parent / "cells.acts.zarr"


def labels_of(images: Images) -> dict[str | None, str | None]:
    return dict(zip(column(images.table, "path"), column(images.table, "label"), strict=True))


# ---------------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("under", ["", "cells/", "data/cells/"])
def test_an_archive_has_the_table_of_its_folder(kind: str, under: str, folder: Path, tmp_path: Path) -> None:
    archive = pack_folder(tmp_path / kind, folder, under=under)
    found, expected = open_images(archive), open_images(folder)
    assert found.table.equals(expected.table)
    assert found.root == Path(archive, *under.split("/"))
    assert bool(found.remarks) == bool(under)


def test_a_relative_archive_and_a_folder_inside_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack_folder(tmp_path / "all.zip", folder, under="x/cells/")
    monkeypatch.chdir(tmp_path)
    for way in ("all.zip/x/cells", "all.zip::x/cells", "all.zip"):
        images = open_images(way)
        assert images.root == tmp_path / "all.zip" / "x" / "cells"
        assert images.table.equals(open_images(folder).table)
    assert [*labels_of(open_images("all.zip/x/cells/BAS"))] == ["0.png", "1.png", "2.png", "3.png", "deep/9.png"]
    with pytest.raises(BadInput, match=r"all.zip holds no folder elsewhere"):
        open_images("all.zip/elsewhere")


def test_one_archive_for_each_class(folder: Path, tmp_path: Path) -> None:
    """As MLL23 comes: the class is the archive, whatever folder lies inside."""
    pack_folder(tmp_path / "zips" / "BAS.zip", folder / "BAS", under="BAS/")
    pack_folder(tmp_path / "zips" / "NGS.tar.gz", folder / "NGS")
    images = open_images(tmp_path / "zips")
    assert labels_of(images) == {
        **{f"BAS.zip::BAS/{n}.png": "BAS" for n in range(4)},
        "BAS.zip::BAS/deep/9.png": "BAS",
        **{f"NGS.tar.gz::{n}.png": "NGS" for n in range(4)},
    }
    assert images.root == tmp_path / "zips"
    assert images.remarks == ("each of the 2 archives is a class",)


def test_archives_that_hold_several_classes(folder: Path, tmp_path: Path) -> None:
    for n, kept in enumerate((NAMES[:3], NAMES[3:])):
        pack(tmp_path / "parts" / f"part{n}.zip", {f"cells/{name}": (folder / name).read_bytes() for name in kept})
    found = labels_of(open_images(tmp_path / "parts"))
    assert {str(path).rpartition("::")[2][6:]: label for path, label in found.items()} == labels_of(open_images(folder))


def test_archives_in_folders_have_the_label_of_the_folder(folder: Path, tmp_path: Path) -> None:
    for n, label in enumerate(("BAS", "NGS")):
        pack_folder(tmp_path / "x" / label / f"{n}.zip", folder / label)
    assert {*labels_of(open_images(tmp_path / "x")).values()} == {"BAS", "NGS"}


def test_a_folder_with_images_is_listed_as_before(folder: Path, tmp_path: Path) -> None:
    """A download that lies beside its own content must not count double."""
    copied = Path(shutil.copytree(folder, tmp_path / "cells"))
    pack_folder(copied / "download.zip", folder)
    images = open_images(copied)
    assert images.table.equals(open_images(folder).table)
    assert images.n_skipped == 1
    assert "1 archive (download.zip)" in images.notes[-1]


def test_what_a_system_put_into_an_archive_is_no_image(tmp_path: Path) -> None:
    names = ["cells/A/1.png", "__MACOSX/cells/A/._1.png", "cells/.hidden/2.png", "cells/A/.3.png", "cells/notes.txt"]
    images = open_images(pack(tmp_path / "a.zip", dict.fromkeys(names, b"x")))
    assert column(images.table, "path") == ["A/1.png"]
    assert images.n_skipped == 2
    assert set(images.passed_over) == {"__MACOSX", "cells/.hidden"}


def test_refused_members_are_named_and_the_rest_is_taken(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as packed:
        add(packed, "A/1.png", b"1")
        add(packed, "A/2.png", type=tarfile.SYMTYPE, linkname="1.png")
        add(packed, "../3.png", b"3")
    images = open_images(tmp_path / "a.tar")
    assert column(images.table, "path") == ["A/1.png"]
    told = "2 files of the archives not read: ../3.png (a name that leads out of the archive), A/2.png (a link)"
    assert told in images.notes


def test_faulty_archives_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"PK no")
    with pytest.raises(BadInput, match=r"a.zip cannot be read: it is no zip archive, or cut off"):
        open_images(tmp_path / "a.zip")
    with pytest.raises(BadInput, match=r"no images in .*b.zip: found 1 other files"):
        open_images(pack(tmp_path / "b.zip", {"a.txt": b""}))
    with pytest.raises(BadInput, match=r"a.zip is an archive, and its own root"):
        open_images(tmp_path / "a.zip", root=tmp_path)
    done = run("cache", "extract", tmp_path / "a.zip", tmp_path / "out.zarr")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: ")
    assert len(done.stderr.splitlines()) == 1


def test_a_table_may_point_into_archives(folder: Path, tmp_path: Path) -> None:
    pack_folder(tmp_path / "BAS.zip", folder / "BAS")
    (tmp_path / "t.csv").write_text("path,label\nBAS.zip::0.png,BAS\nBAS.zip::deep/9.png,BAS\nBAS.zip::none.png,BAS\n")
    images = open_images(tmp_path / "t.csv")
    extract(images, tmp_path / "acts.zarr", CONFIG)
    found = ActivationStore(tmp_path / "acts.zarr").images
    assert column(found, "error") == [None, None, "no such file in BAS.zip"]
    (tmp_path / "t.csv").write_text("path\nBAS.zip::../0.png\n")
    with pytest.raises(BadInput, match=r"row 1 of .*t.csv: path 'BAS.zip::../0.png' does not lie below"):
        open_images(tmp_path / "t.csv")
    (tmp_path / "t.csv").write_text("path\nBAS.zip::gone.png\n")
    with pytest.raises(BadInput, match="none of the 1 files"):
        open_images(tmp_path / "t.csv")


def test_a_table_may_name_members_as_tar_lists_them(folder: Path, tmp_path: Path) -> None:
    """`tar cf cells.tar .` writes, and `tar tf` lists, `./BAS/0.png`."""
    pack(tmp_path / "cells.tar", {f"./{name}": (folder / name).read_bytes() for name in NAMES})
    (tmp_path / "t.csv").write_text("path\ncells.tar::./BAS/0.png\ncells.tar::BAS//1.png\n./cells.tar::NGS/./2.png\n")
    images = open_images(tmp_path / "t.csv")
    assert column(images.table, "path") == ["cells.tar::BAS/0.png", "cells.tar::BAS/1.png", "cells.tar::NGS/2.png"]
    extract(images, tmp_path / "acts.zarr", CONFIG)
    assert column(ActivationStore(tmp_path / "acts.zarr").images, "error") == [None] * 3
    (tmp_path / "t.csv").write_text("path\ncells.tar::BAS/0.png\ncells.tar::./BAS/0.png\n")
    with pytest.raises(BadInput, match="1 repeated image ids"):
        open_images(tmp_path / "t.csv")


def test_an_archive_with_nothing_inside_is_named(folder: Path, tmp_path: Path) -> None:
    for label in ("BAS", "NGS"):
        pack_folder(tmp_path / "zips" / f"{label}.zip", folder / label)
    pack(tmp_path / "zips" / "MON.zip", {})
    images = open_images(tmp_path / "zips")
    assert images.remarks == ("each of the 2 archives is a class; 1 archive (MON.zip) with nothing inside",)


def test_an_image_that_has_changed_in_its_archive_is_named(folder: Path, tmp_path: Path) -> None:
    files = {name: (folder / name).read_bytes() for name in NAMES}
    archive = pack(tmp_path / "cells.zip", files)
    assert extract(archive, tmp_path / "acts.zarr", CONFIG).changed == ""
    pack(archive, files)  # the same content in another file
    assert extract(archive, tmp_path / "acts.zarr", CONFIG).changed == ""
    pack(archive, {**files, NAMES[3]: files[NAMES[0]]})
    done = extract(archive, tmp_path / "acts.zarr", CONFIG)
    assert done.was_complete
    words = (
        f"1 of {len(NAMES)} image files are others than those that were extracted, or gone ({NAMES[3]}); all results"
    )
    assert done.warnings[0].startswith(words)


# ---------------------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("kind", ["cells.zip", "cells.tar", "cells.tar.gz"])
def test_the_store_of_an_archive_is_that_of_its_folder_byte_for_byte(
    kind: str, folder: Path, store: Path, tmp_path: Path
) -> None:
    archive = pack_folder(tmp_path / kind, folder, under="cells/")
    done = extract(archive, tmp_path / "acts.zarr", CONFIG)
    assert done.n_readable == len(NAMES)
    assert contents(tmp_path / "acts.zarr") == contents(store)
    assert ActivationStore(tmp_path / "acts.zarr").identity == ActivationStore(store).identity
    assert read_runs(tmp_path / "acts.zarr")[-1]["images_root"] == str(archive / "cells")


def test_a_folder_of_archives_has_the_same_tokens(folder: Path, store: Path, tmp_path: Path) -> None:
    for label in ("BAS", "NGS"):
        pack_folder(tmp_path / "zips" / f"{label}.zip", folder / label)
    extract(tmp_path / "zips", tmp_path / "acts.zarr", CONFIG)
    found, expected = ActivationStore(tmp_path / "acts.zarr"), ActivationStore(store)
    assert column(found.images, "content_hash") == column(expected.images, "content_hash")
    for chunk in range(expected.spec.n_chunks):
        assert chunk_path(found.root, chunk).read_bytes() == chunk_path(expected.root, chunk).read_bytes()  # type: ignore[arg-type]  # local


def test_a_damaged_member_is_listed_and_does_not_end_the_job(folder: Path, tmp_path: Path) -> None:
    archive = pack_folder(tmp_path / "cells.zip", folder)
    raw, content = bytearray(archive.read_bytes()), (folder / NAMES[0]).read_bytes()
    with zipfile.ZipFile(archive) as packed:
        first = packed.infolist()[0]
        assert first.compress_type == zipfile.ZIP_STORED
    raw[raw.index(content) + 90] ^= 1
    archive.write_bytes(raw)
    done = extract(archive, tmp_path / "acts.zarr", CONFIG)
    assert (done.n_readable, done.n_unreadable) == (len(NAMES) - 1, 1)
    assert "damaged at this member" in done.warnings[0]


def test_readers_in_processes_read_members_of_many_archives(folder: Path, tmp_path: Path) -> None:
    for n, kind in enumerate(KINDS):
        pack_folder(tmp_path / str(n) / kind, folder)
    paths = [tmp_path / str(n % 4) / KINDS[n % 4] / NAMES[n % len(NAMES)] for n in range(40)] + [
        tmp_path / "0" / "cells.zip::gone"
    ]
    plain = [folder / NAMES[n % len(NAMES)] for n in range(40)]
    with ImageReaders(3, batch_size=7, size=8) as readers:
        batches = [paths[start : start + 7] for start in range(0, 41, 7)]
        found = [(each.pixels.copy(), each.content_hash, each.errors) for each in readers.read(batches)]
        pixels = np.concatenate([each for each, _, _ in found])
        hashes = [value for _, each, _ in found for value in each]
        errors = [value for _, _, each in found for value in each]
        expected = next((each.pixels.copy(), each.content_hash) for each in readers.read([plain[:7]]))
    assert errors == [None] * 40 + ["no such file in cells.zip"]
    np.testing.assert_array_equal(pixels[:7], expected[0])
    assert hashes[:7] == expected[1]
    assert hashes[:36] == (hashes[:9] * 4)


# ------------------------------------------------------------------------------------------- finding them again


@pytest.mark.stress
@pytest.mark.parametrize("kind", ["cells.zip", "cells.tar.gz"])
def test_a_cache_is_repaired_from_the_archive(kind: str, folder: Path, store: Path, tmp_path: Path) -> None:
    archive = pack_folder(tmp_path / kind, folder)
    extract(archive, tmp_path / "acts.zarr", CONFIG)
    chunk_path(tmp_path / "acts.zarr", 1).write_bytes(b"damage")
    assert repair(tmp_path / "acts.zarr", device="cpu").chunks == [1]
    assert contents(tmp_path / "acts.zarr") == contents(store)
    chunk_path(tmp_path / "acts.zarr", 0).unlink()
    (tmp_path / kind).unlink()
    with pytest.raises(BadInput, match="4 image files of the damaged chunks are missing below"):
        repair(tmp_path / "acts.zarr", device="cpu")
    assert repair(tmp_path / "acts.zarr", device="cpu", root=folder).chunks == [0]  # unpacked since
    assert contents(tmp_path / "acts.zarr") == contents(store)


def test_another_archive_in_its_place_is_refused(folder: Path, tmp_path: Path) -> None:
    archive = pack_folder(tmp_path / "cells.zip", folder)
    extract(archive, tmp_path / "acts.zarr", CONFIG)
    chunk_path(tmp_path / "acts.zarr", 0).unlink()
    changed = {name: (folder / name).read_bytes() for name in NAMES} | {NAMES[0]: (folder / NAMES[1]).read_bytes()}
    pack(archive, changed)
    with pytest.raises(BadInput, match="1 image files of the damaged chunks"):
        repair(tmp_path / "acts.zarr", device="cpu")


@pytest.mark.stress
def test_from_an_archive_to_an_atlas_with_its_pictures(folder: Path, tmp_path: Path) -> None:
    """The pictures of the atlas are those of the unpacked folder, found by what the stores recorded."""
    archive = pack_folder(tmp_path / "cells.zip", folder, under="cells/")
    index_images(archive, tmp_path / "t.parquet", patient_from="*/{patient}.png")
    done = run("cache", "extract", tmp_path / "t.parquet", tmp_path / "acts", "--root", archive / "cells")
    assert done.exit_code == 0, done.output
    config = TrainConfig(expansion=1, batch_tokens=256, tokens=2_560, l1=1e-4)
    train([tmp_path / "acts"], tmp_path / "sae", config)
    encode(tmp_path / "acts", tmp_path / "sae", tmp_path / "latents", device="cpu")
    with local_client(1, 1) as client:
        write_barcodes(tmp_path / "latents", tmp_path / "barcodes", BarcodeConfig(tau=0.0), client=client)
        concept_statistics(tmp_path / "latents", tmp_path / "concepts", ConceptConfig(min_support=1), client=client)
    stores = [word for name in ("barcodes", "concepts", "latents") for word in (f"--{name}", tmp_path / name)]
    built = run("atlas", "build", *stores, "--pages", "top", "-o", tmp_path / "atlas")
    assert built.exit_code == 0, built.output
    assert "could not be shown" not in built.output
    latents = LatentStore(tmp_path / "latents")
    packed, plain = bridge.pictures(latents), bridge.pictures(latents, folder)
    for n, name in enumerate(column(latents.images, "path")):
        shown = packed(n)
        assert not isinstance(shown, str), shown
        np.testing.assert_array_equal(shown, plain(n))
        np.testing.assert_array_equal(shown, np.asarray(Image.open(folder / str(name))))
    pack(archive, {f"cells/{name}": (folder / NAMES[0]).read_bytes() for name in NAMES})
    assert bridge.pictures(latents)(1) == "another file than the one that was cached"


# --------------------------------------------------------------------------------------- index, duplicates, masks


def test_an_index_of_archives_marks_duplicates_across_them(folder: Path, tmp_path: Path) -> None:
    pack_folder(tmp_path / "zips" / "BAS.zip", folder / "BAS")
    pack(
        tmp_path / "zips" / "NGS.tar.gz",
        {"1.png": (folder / "NGS/1.png").read_bytes(), "copy.png": (folder / "BAS/0.png").read_bytes()},
    )
    index = index_images(tmp_path / "zips", tmp_path / "t.parquet")
    marks = dict(zip(column(index.images.table, "path"), column(index.images.table, DUPLICATE_OF), strict=True))
    assert marks["NGS.tar.gz::copy.png"] == "zips/BAS.zip::0.png"
    assert sum(mark is not None for mark in marks.values()) == 1
    assert find_duplicates(tmp_path / "zips", ["BAS.zip::gone"]).not_compared == {0: "no file"}
    assert "next: cyto cache extract" in [*index.lines()][-1]


def test_masks_may_lie_in_an_archive(folder: Path, tmp_path: Path) -> None:
    images = open_images(folder)
    archive = pack_folder(tmp_path / "masks.zip", folder, under="masks/")
    found = find_masks(archive, images.table)
    assert {n: path.relative_to(archive / "masks").as_posix() for n, path in found.paths.items()} == dict(
        enumerate(column(images.table, "path"))
    )
    (tmp_path / "m.csv").write_text("image_id,mask\ncells/BAS/0.png,masks.zip::masks/BAS/0.png\ncells/BAS/1.png,\n")
    assert find_masks(tmp_path / "m.csv", images.table).paths == {0: tmp_path / "masks.zip::masks/BAS/0.png"}


def test_a_published_dataset_in_archives(tmp_path: Path) -> None:
    """MLL23 as Zenodo gives it, an archive for each class; and Acevedo as one archive."""
    for code in ("basophil", "eosinophil"):
        pack(
            tmp_path / "mll" / "down" / f"{code}.zip",
            {f"{code}/{code}_{n}.TIF": f"{code}{n}".encode() for n in range(3)},
        )
    (tmp_path / "mll" / "down" / "README.txt").touch()
    index = index_images(tmp_path / "mll", dataset="mll23")
    assert index.images.root == tmp_path / "mll" / "down"
    assert {count.name: count.found for count in index.counts if count.found} == {"basophil": 3, "eosinophil": 3}
    assert column(index.images.table, "path")[0] == "basophil.zip::basophil/basophil_0.TIF"
    names = ["PBC/x/basophil/BA_1.jpg", "PBC/x/ig/MY_1.jpg", "PBC/x/other/1.jpg", "PBC/readme.jpg"]
    pack(tmp_path / "PBC.zip", {name: name.encode() for name in names})
    index = index_images(tmp_path / "PBC.zip", dataset="acevedo", class_set="13")
    assert index.images.root == tmp_path / "PBC.zip" / "PBC" / "x"
    assert column(index.images.table, "path") == ["basophil/BA_1.jpg", "ig/MY_1.jpg"]
    with pytest.raises(BadInput, match="no class folders of bmc in"):
        index_images(tmp_path / "PBC.zip", dataset="bmc")


def test_gzip_that_is_no_tar_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(io.BytesIO(b"not a tar" * 200).getvalue()))
    with pytest.raises(BadInput, match="it is no tar archive, or damaged"):
        open_images(tmp_path / "a.tar.gz")
