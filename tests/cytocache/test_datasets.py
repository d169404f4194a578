"""From a folder or a manifest to an image table: every image once, in one order, with its label and a stable id."""

import os
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cytocache.datasets import Images, open_images
from stores.errors import BadInput
from stores.tables import MANIFEST_COLUMNS


def _touch(root: Path, *paths: str) -> None:
    for path in random.Random(0).sample(paths, len(paths)):  # the order on the disk must not matter
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"not opened by a listing")


def _column(images: Images, name: str) -> list[str | None]:
    values: list[str | None] = images.table[name].to_pylist()
    return values


def _write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


class TestFolder:
    def test_one_sub_folder_per_class_gives_labels_ids_and_a_sorted_order(self, tmp_path: Path) -> None:
        root = tmp_path / "cells"
        _touch(root, "NGS/10.png", "NGS/9.png", "BAS/2.jpg", "loose.bmp", "a b/ü.jpeg")
        images = open_images(root)
        paths = ["BAS/2.jpg", "NGS/10.png", "NGS/9.png", "a b/ü.jpeg", "loose.bmp"]
        assert images.table.column_names == list(MANIFEST_COLUMNS)
        assert _column(images, "path") == paths
        assert _column(images, "label") == ["BAS", "NGS", "NGS", "a b", None]
        assert _column(images, "image_id") == [f"cells/{path}" for path in paths]
        assert _column(images, "dataset") == ["cells"] * 5
        assert _column(images, "patient") == [None] * 5
        assert (images.root, images.n_skipped) == (root, 0)

    def test_classes_that_are_most_likely_one_are_told_and_stay(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        for name in ("BAS/1.png", "bas/1.png", "EOS/1.png", "top.png"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(b"")
        assert open_images(tmp_path).table["label"].to_pylist() == ["BAS", "EOS", "bas", None]
        assert "folders that differ only in case, blanks or the coding of letters are taken as several" in caplog.text
        assert caplog.text.count("'BAS' and 'bas'") == 1

    def test_two_levels_as_in_bmc_take_the_first_folder_as_label(self, tmp_path: Path) -> None:
        _touch(tmp_path, "BLA/0001-1000/BLA_0001.jpg", "BLA/1001-2000/BLA_1001.jpg", "ART/ART_0001.jpg")
        images = open_images(tmp_path)
        assert _column(images, "label") == ["ART", "BLA", "BLA"]
        assert _column(images, "path")[1] == "BLA/0001-1000/BLA_0001.jpg"

    def test_hidden_files_and_leavings_of_other_programs_are_no_images(self, tmp_path: Path) -> None:
        _touch(tmp_path, "A/1.TIF", "A/2.Png", "A/3.JPG", "A/4.tiff", "A/5.BMP")
        _touch(tmp_path, "A/.1.png", ".hidden/1.png", "__MACOSX/A/._1.TIF", "__MACOSX/A/1.png", "A/.DS_Store")
        _touch(tmp_path, "A/notes.txt", "A/Thumbs.db", "A/6.gif", "A/png")
        images = open_images(tmp_path)
        assert _column(images, "path") == ["A/1.TIF", "A/2.Png", "A/3.JPG", "A/4.tiff", "A/5.BMP"]
        assert images.n_skipped == 6  # those of the shown folders: .1.png .DS_Store notes.txt Thumbs.db 6.gif png

    def test_a_table_beside_the_images_is_named(self, tmp_path: Path) -> None:
        """It may hold the patients, and a folder knows none."""
        _touch(tmp_path, "A/1.png", "cells.CSV", "A/notes.txt")
        (count, table) = open_images(tmp_path).notes
        assert count.startswith("2 files passed over")
        assert "if cells.CSV is a table of these images, with patients or diseases, give that file instead" in table

    def test_a_relative_folder_lists_as_its_absolute_path_does(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        _touch(tmp_path / "cells", "A/1.png")
        monkeypatch.chdir(tmp_path)
        assert open_images(Path("cells")) == open_images(tmp_path / "cells")
        monkeypatch.chdir(tmp_path / "cells")
        assert open_images(Path()) == open_images(tmp_path / "cells")

    def test_links_to_folders_and_files_are_followed(self, tmp_path: Path) -> None:
        _touch(tmp_path / "elsewhere", "1.png", "2.png")
        _touch(tmp_path / "cells", "A/1.png")
        (tmp_path / "cells" / "B").symlink_to(tmp_path / "elsewhere")
        (tmp_path / "cells" / "C").symlink_to(tmp_path / "elsewhere")  # twice is not a loop
        (tmp_path / "cells" / "A" / "link.png").symlink_to(tmp_path / "elsewhere" / "1.png")
        (tmp_path / "shortcut").symlink_to(tmp_path / "cells")
        expected = ["A/1.png", "A/link.png", "B/1.png", "B/2.png", "C/1.png", "C/2.png"]
        assert _column(open_images(tmp_path / "cells"), "path") == expected
        through_a_link = open_images(tmp_path / "shortcut")
        assert _column(through_a_link, "path") == expected
        assert _column(through_a_link, "dataset")[0] == "cells"  # ids do not depend on the way to the folder

    @pytest.mark.parametrize("target", ["cells", "cells/A", ".", "elsewhere"])
    @pytest.mark.parametrize("way", ["cells", "shortcut"])
    def test_a_link_loop_is_named_and_not_listed_forty_times(self, tmp_path: Path, target: str, way: str) -> None:
        _touch(tmp_path / "cells", "A/1.png")
        _touch(tmp_path / "elsewhere", "1.png")
        (tmp_path / "shortcut").symlink_to(tmp_path / "cells")
        if target == "elsewhere":  # the loop lies outside, and is entered through a link
            (tmp_path / "cells" / "A" / "out").symlink_to(tmp_path / "elsewhere")
            (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "elsewhere")
        else:
            (tmp_path / "cells" / "A" / "back").symlink_to(tmp_path / target)
        with pytest.raises(BadInput, match="back links back to a folder that contains it; remove the link"):
            open_images(tmp_path / way)

    def test_no_images_says_what_was_expected_and_found(self, tmp_path: Path) -> None:
        _touch(tmp_path, "a.txt", "b/c.gif")
        with pytest.raises(BadInput, match=r"no images in .*: expected files ending in .bmp, .*; found 2 other files"):
            open_images(tmp_path)
        with pytest.raises(BadInput, match=r"no images at .*nowhere: expected a folder, or a .csv or .parquet"):
            open_images(tmp_path / "nowhere")

    @pytest.mark.skipif(os.name != "posix", reason="names are bytes on POSIX only")
    def test_a_file_name_that_is_not_utf_8_is_named_in_ascii(self, tmp_path: Path) -> None:
        _touch(tmp_path, "1.png")
        try:
            (tmp_path / os.fsdecode(b"Gr\xfc\xdfe.png")).touch()  # Latin-1, from an old archive
        except OSError:
            pytest.skip("this file system refuses such names itself")
        with pytest.raises(BadInput, match=r"1 file names in .* are not UTF-8 \('Gr\\udcfc\\udcdfe.png'\); rename"):
            open_images(tmp_path)

    @pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may list everything")
    def test_a_folder_that_cannot_be_listed_is_not_left_out_in_silence(self, tmp_path: Path) -> None:
        _touch(tmp_path, "A/1.png", "B/2.png")
        (tmp_path / "B").chmod(0o000)
        try:
            with pytest.raises(BadInput, match=r"the folder .*B cannot be listed: Permission denied"):
                open_images(tmp_path)
        finally:
            (tmp_path / "B").chmod(0o700)


class TestManifest:
    def test_the_order_is_the_manifests_and_a_default_id_is_dataset_and_path(self, tmp_path: Path) -> None:
        _touch(tmp_path, "b/1.png", "a/1.png", "a/2.png")
        manifest = _write(
            tmp_path / "aml.csv",
            "path,label,patient,disease,dataset,image_id,batch",
            "b/1.png,MON,P1,AML,,,7",
            "a/1.png,,,,mll23,,",
            "./a//2.png,NGS,P2,control,,my own name,8",
        )
        images = open_images(manifest)
        assert _column(images, "path") == ["b/1.png", "a/1.png", "a/2.png"]
        assert _column(images, "image_id") == ["aml/b/1.png", "mll23/a/1.png", "my own name"]
        assert _column(images, "dataset") == ["aml", "mll23", "aml"]
        assert _column(images, "label") == ["MON", None, "NGS"]
        assert _column(images, "batch") == ["7", None, "8"]  # the user's own columns travel along
        assert images.root == tmp_path

    def test_a_parquet_manifest_gives_the_table_of_the_csv(self, tmp_path: Path) -> None:
        _touch(tmp_path, "1.png", "2.png")
        from_csv = open_images(_write(tmp_path / "m.csv", "path,patient", "1.png,7", "2.png,"))
        pq.write_table(pa.table({"path": ["1.png", "2.png"], "patient": [7.0, None]}), tmp_path / "m.parquet")
        assert open_images(tmp_path / "m.parquet").table.equals(from_csv.table)

    def test_root_says_what_paths_are_relative_to(self, tmp_path: Path) -> None:
        _touch(tmp_path / "images", "1.png")
        (tmp_path / "lists").mkdir()
        manifest = _write(tmp_path / "lists" / "m.csv", "path", "1.png")
        assert open_images(manifest, root=tmp_path / "images").root == tmp_path / "images"

    @pytest.mark.parametrize("root", ["images", "lists/../images", "link"])
    def test_absolute_paths_below_the_root_become_relative_however_the_root_is_given(
        self, tmp_path: Path, root: str
    ) -> None:
        """A cache holds no absolute path: it would break on the next machine, and may name a person."""
        _touch(tmp_path / "images", "a/1.png")
        (tmp_path / "lists").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "images")
        manifest = _write(tmp_path / "lists" / "m.csv", "path", f"{tmp_path.resolve()}/images/a/1.png")
        images = open_images(manifest, root=tmp_path / root)
        assert _column(images, "path") == ["a/1.png"]
        assert _column(images, "image_id") == ["m/a/1.png"]

    def test_a_wrong_root_is_named_with_the_first_files_and_the_option(self, tmp_path: Path) -> None:
        _touch(tmp_path, "1.png", "2.png", "3.png", "4.png")
        (tmp_path / "wrong").mkdir()
        manifest = _write(tmp_path / "m.csv", "path", "1.png", "2.png", "3.png", "4.png")
        words = r"none of the 4 files that .*m.csv lists is below .*wrong \(1.png, .* and 1 more\); .*--root"
        with pytest.raises(BadInput, match=words):
            open_images(manifest, root=tmp_path / "wrong")

    def test_a_table_of_windows_is_told_to_write_slashes_not_to_give_another_root(self, tmp_path: Path) -> None:
        _touch(tmp_path, "BAS/1.png", "BAS/2.png")
        manifest = _write(tmp_path / "m.csv", "path", "gone.png", "BAS\\1.png", "BAS\\2.png")
        words = r"the paths in .*m.csv have \\ between folders, as on Windows \(BAS\\1.png\); write / \(BAS/1.png\)"
        with pytest.raises(BadInput, match=words):
            open_images(manifest)

    def test_one_file_that_is_there_is_enough_the_rest_is_told_at_extraction(self, tmp_path: Path) -> None:
        _touch(tmp_path, "2.png")
        assert open_images(_write(tmp_path / "m.csv", "path", "1.png", "2.png")).table.num_rows == 2

    @pytest.mark.parametrize("path", ["/etc/passwd", "../other/1.png", "a/../../1.png", "C:\\cells\\1.png"])
    def test_a_path_that_leaves_the_root_is_refused_by_row(self, tmp_path: Path, path: str) -> None:
        _touch(tmp_path, "1.png")
        manifest = _write(tmp_path / "m.csv", "path", "1.png", path)
        with pytest.raises(BadInput, match=r"row 2 of .*m.csv: path .* does not lie below the images' root"):
            open_images(manifest)

    @pytest.mark.parametrize(
        ("lines", "words"),
        [
            (["file,label", "1.png,A"], r"has no column 'path' \(found: file, label\)"),
            (["path"], "lists no images"),
            (["path", "1.png", "1.png"], r"1 repeated image ids \(m/1.png\)"),
            (["path,image_id", "1.png,x", "2.png,x"], r"1 repeated image ids \(x\)"),
            (["path,label", ",A"], "row 1 of .*m.csv has an empty path"),
        ],
    )
    def test_a_faulty_manifest_is_refused_in_words(self, tmp_path: Path, lines: list[str], words: str) -> None:
        _touch(tmp_path, "1.png", "2.png")
        with pytest.raises(BadInput, match=words):
            open_images(_write(tmp_path / "m.csv", *lines))

    def test_a_path_may_repeat_under_ids_of_its_own(self, tmp_path: Path) -> None:
        _touch(tmp_path, "1.png")
        images = open_images(_write(tmp_path / "m.csv", "path,image_id", "1.png,once", "1.png,twice"))
        assert _column(images, "path") == ["1.png", "1.png"]

    def test_another_kind_of_file_is_no_manifest(self, tmp_path: Path) -> None:
        with pytest.raises(BadInput, match=r"neither .csv nor .parquet"):
            open_images(_write(tmp_path / "m.xlsx", "path"))
