"""Miniature look-alikes of the five published datasets, with their traps, become image tables; what is odd is named."""

import json
import os
import random
import shlex
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from command_line import run
from PIL import Image
from places import ROOT

from cytocache import published_datasets
from cytocache.datasets import open_images
from cytocache.demo_cells import draw_cell
from cytocache.duplicates import find_duplicates
from cytocache.index import DUPLICATE_OF, index_dataset, index_images, mark_duplicates
from cytocache.published_classes import ACEVEDO, AML_HEHR, BMC, CLASS_SETS, MATEK19, MLL23
from cytocache.published_datasets import INDEXERS, Index
from stores.activation_store import ActivationStore
from stores.errors import BadInput
from stores.tables import MANIFEST_COLUMNS, column

CLASSES = {"mll23": MLL23, "acevedo": ACEVEDO, "matek19": MATEK19, "bmc": BMC}


def write(root: Path, *paths: str) -> Path:
    """Files of different bytes and equal size, in an order on the disk that must not matter."""
    for path in random.Random(0).sample(paths, len(paths)):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(f"{path:>120}".encode())
    return root


def values(index: Index, name: str) -> list[str | None]:
    return column(index.images.table, name)


def rows(index: Index, *names: str) -> dict[str, tuple[str | None, ...]]:
    """path -> the values of some columns."""
    columns = [values(index, name) for name in ("path", *names)]
    return {str(path): tuple(rest) for path, *rest in zip(*columns, strict=True)}


def finding(index: Index, words: str) -> tuple[str, ...]:
    """The names under the one finding with these words; () if there is none."""
    found = [finding.names for finding in index.findings if words in finding.what]
    assert len(found) <= 1, [finding.what for finding in index.findings]
    return found[0] if found else ()


def found(index: Index) -> dict[str, int]:
    return {count.name: count.found for count in index.counts if count.found}


class TestWhatWasPublished:
    @pytest.mark.parametrize(
        ("dataset", "class_set", "total"),
        [
            ("mll23", "18", 41_621),
            ("acevedo", "13", 17_092),
            ("acevedo", "11", 16_891),
            ("acevedo", "10", 14_543),
            ("matek19", "15", 18_365),
            ("bmc", "21", 171_374),
        ],
    )
    def test_class_sets_have_their_size_and_sum(self, dataset: str, class_set: str, total: int) -> None:
        left_out = CLASS_SETS[dataset][class_set]
        kept = [cell for cell in CLASSES[dataset] if cell.code not in left_out]
        assert (len(kept), sum(cell.published for cell in kept)) == (int(class_set), total)
        assert len({cell.code for cell in kept}) == len({cell.label for cell in kept}) == len(kept)

    def test_patients_of_aml_hehr(self) -> None:
        assert sum(disease.published for disease in AML_HEHR) == 189

    def test_a_common_name_is_shared_by_two_datasets_at_least(self) -> None:
        shared = Counter(name for cells in CLASSES.values() for name in {cell.common for cell in cells})
        assert {name for name, n in shared.items() if n < 2} == set()

    def test_the_page_says_what_the_code_does(self) -> None:
        page = (ROOT / "docs" / "datasets.md").read_text()
        common = sorted({cell.common or "" for cells in CLASSES.values() for cell in cells})
        lines = []
        for name in [*common[1:], ""]:
            cells = [[c.label for c in CLASSES[key] if (c.common or "") == name] for key in CLASSES]
            lines.append(f"| {f'`{name}`' if name else '(null)'} | {' | '.join(', '.join(cell) for cell in cells)} |")
        table = "\n".join(lines)
        assert table in page, f"docs/datasets.md should hold:\n{table}"
        assert all(name in page for name in [*INDEXERS, *(cell.code for cell in ACEVEDO)])


class TestMll23:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        root = tmp_path / "downloads" / "mll23"
        write(root, "basophil/basophil_0001.TIF", "basophil/basophil_0002.TIF", "Hairy Cell/hairy_cell_0001.tif")
        write(root, "lymphocyte_large_granular/lymphocyte_large_granular_0001.TIF", "normoblast/normoblast_0001.TIF")
        write(root, "__MACOSX/basophil/._basophil_0001.TIF", "basophil/._basophil_0001.TIF", "basophil/.DS_Store")
        write(root, "<script>/1.TIF", "..hidden/1.TIF", "loose.TIF", "README.txt")
        return root

    def test_labels_common_labels_and_counts(self, root: Path) -> None:
        index = index_dataset(root, "mll23")
        assert rows(index, "label", "label_common", "dataset", "image_id") == {
            f"{folder}/{name}": (label, common, "mll23", f"mll23/{folder}/{name}")
            for folder, name, label, common in [
                ("Hairy Cell", "hairy_cell_0001.tif", "hairy_cell", "hairy_cell"),
                ("basophil", "basophil_0001.TIF", "basophil", "basophil"),
                ("basophil", "basophil_0002.TIF", "basophil", "basophil"),
                *[
                    (label, f"{label}_0001.TIF", label, common)
                    for label, common in [("lymphocyte_large_granular", "lymphocyte"), ("normoblast", "erythroblast")]
                ],
            ]
        }
        assert values(index, "path") == sorted(str(path) for path in values(index, "path"))
        counts = {count.name: (count.found, count.published) for count in index.counts}
        assert counts["basophil"] == (2, 616)
        assert counts["smudge_cell"] == (0, 988)
        assert len(counts) == 18
        assert finding(index, "images of no class") == ("<script>/1.TIF", "loose.TIF")
        assert finding(index, "no images by their name") == (
            *("README.txt", "basophil/.DS_Store", "basophil/._basophil_0001.TIF"),
        )
        assert index.images.n_skipped == 3

    @pytest.mark.parametrize("level", [".", "..", "../.."])
    def test_ids_do_not_depend_on_the_level_of_the_folder(self, root: Path, level: str) -> None:
        index = index_dataset(root / level, "mll23")
        assert index.images.root.resolve() == root
        assert index.images.table.equals(index_dataset(root, "mll23").images.table)


class TestAcevedo:
    PATHS = (
        *("basophil/BA_1.jpg", "eosinophil/EO_1.jpg", "erythroblast/odd name.jpg", "lymphocyte/LY_1.jpg"),
        *("monocyte/MO_1.jpg", "platelet/PLATELET_1.jpg", "platelet/PLATELET_2.jpg"),
        *("ig/MMY_1.jpg", "ig/MY_1.jpg", "ig/PMY_1.jpg", "ig/IG_1.jpg", "ig/my_2.JPG", "ig/MYX_1.jpg"),
        *("neutrophil/BNE_1.jpg", "neutrophil/SNE_1.jpg", "neutrophil/NEUTROPHIL_1.jpg", "neutrophil/IG_9.jpg"),
        *("neutrophil/.DS_169665.jpg", "neutrophil/BNE.jpg"),
    )

    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        return write(tmp_path / "PBC_dataset_normal_DIB", *self.PATHS)

    def test_the_whole_prefix_tells_the_class(self, root: Path) -> None:
        index = index_dataset(root, "acevedo")
        labels = {path: label for path, (label,) in rows(index, "label").items()}
        assert labels == {
            "basophil/BA_1.jpg": "basophil",
            "eosinophil/EO_1.jpg": "eosinophil",
            "erythroblast/odd name.jpg": "erythroblast",  # a folder of one class needs no prefix
            "ig/IG_1.jpg": "immature_granulocyte",
            "ig/MMY_1.jpg": "metamyelocyte",
            "ig/MY_1.jpg": "myelocyte",
            "ig/PMY_1.jpg": "promyelocyte",
            "ig/my_2.JPG": "myelocyte",
            "lymphocyte/LY_1.jpg": "lymphocyte",
            "monocyte/MO_1.jpg": "monocyte",
            "neutrophil/BNE_1.jpg": "neutrophil_band",
            "neutrophil/NEUTROPHIL_1.jpg": "neutrophil",
            "neutrophil/SNE_1.jpg": "neutrophil_segmented",
            "platelet/PLATELET_1.jpg": "platelet",
            "platelet/PLATELET_2.jpg": "platelet",
        }
        assert finding(index, "images of no class") == ("ig/MYX_1.jpg", "neutrophil/BNE.jpg", "neutrophil/IG_9.jpg")
        assert finding(index, "no images by their name") == ("neutrophil/.DS_169665.jpg",)
        assert rows(index, "label_common")["ig/IG_1.jpg"] == (None,)

    @pytest.mark.parametrize(("class_set", "gone"), [("11", 2), ("10", 4)])
    def test_what_a_class_set_leaves_out_is_counted_by_class(self, root: Path, class_set: str, gone: int) -> None:
        index = index_dataset(root, "acevedo", class_set)
        assert index.images.table.num_rows == 15 - gone
        assert len(index.counts) == int(class_set)
        named = [finding.names for finding in index.findings if f"not in class set {class_set}" in finding.what]
        assert sorted(name for names in named for name in names) == sorted(
            ["ig/IG_1.jpg", "neutrophil/NEUTROPHIL_1.jpg", "platelet/PLATELET_1.jpg", "platelet/PLATELET_2.jpg"][:gone]
        )
        assert len(named) == int(gone / 2) + 1

    def test_the_arrangement_of_the_released_code_gives_the_same_labels(self, root: Path, tmp_path: Path) -> None:
        """Its arrange_dataset.py moves five prefixes into folders of their own."""
        moved = {"MMY": "metamyelocyte", "MY": "myelocyte", "PMY": "promyelocyte"}
        moved |= {"BNE": "neutrophil_band", "SNE": "neutrophil_segmented"}
        published = index_dataset(root, "acevedo")
        paths = [str(path) for path in values(published, "path")]
        by_prefix = [(moved.get(Path(path).name.split("_")[0]), path) for path in paths]
        write(tmp_path / "arranged", *(f"{new}/{Path(path).name}" if new else path for new, path in by_prefix))
        assert found(index_dataset(tmp_path / "arranged", "acevedo")) == found(published)


class TestMatek19:
    PATHS = ("BAS/BAS_0001.tiff", "lyt/LYT_0001_20180412T101500.tiff", "MOB/MOB_0001.tiff", "PMB/PMB_0001.tiff")

    @pytest.mark.parametrize("inner", ["AML-Cytomorphology_LMU", "data/data", "AML-Cytomorphology/data/data"])
    def test_copies_nest_and_augment_and_stamp(self, tmp_path: Path, inner: str) -> None:
        root = tmp_path / "matek"
        write(root / inner, *self.PATHS, "augmented/BAS/BAS_0001_flip.tiff", "annotations.dat")
        write(root / "augmented", "BAS/BAS_0001_turned.tiff")
        write(root, "abbreviations.txt")
        index = index_dataset(root, "matek19")
        assert index.images.root == root / inner
        assert rows(index, "label", "label_common") == {
            "BAS/BAS_0001.tiff": ("basophil", "basophil"),
            "MOB/MOB_0001.tiff": ("monoblast", "blast"),
            "PMB/PMB_0001.tiff": ("promyelocyte (bilobed)", "promyelocyte_atypical"),
            "lyt/LYT_0001_20180412T101500.tiff": ("lymphocyte (typical)", "lymphocyte"),
        }
        assert finding(index, "images of no class") == ("augmented/BAS/BAS_0001_flip.tiff",)
        assert finding(index, "augmented copies") == ("augmented",)
        assert finding(index, "no images by their name") == ("annotations.dat",)


class TestBmc:
    def test_two_levels_and_the_broken_stay_rows(self, tmp_path: Path) -> None:
        root = tmp_path / "bone_marrow_cell_dataset"
        write(root, "BLA/0001-1000/BLA_00001.jpg", "BLA/1001-2000/BLA_01001.jpg", "ABE/ABE_00001.jpg")
        write(root, "MYB/5001-6000/MYB_05527.jpg", "NGS/18001-19000/NGS_18642.jpg", "ART/0001-1000/ART_00001.jpg")
        index = index_dataset(tmp_path, "bmc")
        assert rows(index, "label", "label_common", "image_id")["MYB/5001-6000/MYB_05527.jpg"] == (
            *("myelocyte", "myelocyte", "bmc/MYB/5001-6000/MYB_05527.jpg"),
        )
        assert rows(index, "label", "label_common")["ART/0001-1000/ART_00001.jpg"] == ("artefact", None)
        assert found(index) == {
            **{"abnormal eosinophil": 1, "artefact": 1, "blast": 2, "myelocyte": 1, "neutrophil (segmented)": 1}
        }
        here = ("MYB/5001-6000/MYB_05527.jpg", "NGS/18001-19000/NGS_18642.jpg")
        assert finding(index, "reported as broken by others; kept") == here
        assert len(finding(index, "reported as broken by others, and not here")) == 8

    def test_the_flat_arrangement_of_the_released_code(self, tmp_path: Path) -> None:
        write(tmp_path / "bmc", "BLA/BLA_00001.jpg", "MYB/MYB_00001.jpg")
        index = index_dataset(tmp_path / "bmc", "bmc")
        assert found(index) == {"blast": 1, "myelocyte": 1}
        assert "MYB_05527" in finding(index, "and not here")


HEHR_HEADER = "patient_id,sex_1f_2m,age,bag_label,instance_count,leucocytes_per_µl,pb_myeloblast,pb_other"
HEHR_LINES = (
    "ABC,1,48,PML_RARA,2,12300,71.5,0",
    "DEF,2,,control,1,,,",
    "GHI,3,60.5,NPM1,7,900,12,1.5",
    "JKL,1,30,NPM1,4,1,2,3",
)


class TestAmlHehr:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        """GHI: count and disease differ from the metadata; JKL has no folder; XYZ is not in the metadata."""
        inner = tmp_path / "PKG - AML-Cytomorphology_MLL_Helmholtz_v1"
        write(inner / "data", "PML_RARA/ABC/103.TIF", "PML_RARA/ABC/image_0.tif", "control/DEF/image_0.tif")
        write(inner / "data", "cbfb-myh11/GHI/1.tif", "RUNX1_RUNX1T1/XYZ/1.tif", "NPM1/loose.tif", "other/QQQ/1.tif")
        (inner / "metadata.csv").write_text("\n".join([HEHR_HEADER, *HEHR_LINES]), encoding="utf-8")
        return inner

    def test_patients_diseases_and_what_is_known_of_them(self, root: Path) -> None:
        index = index_dataset(root, "aml-hehr")
        known = ("patient", "disease", "patient_sex", "patient_age", "patient_leucocytes_per_ul")
        assert rows(index, *known, "patient_pb_myeloblast", "patient_pb_other") == {
            "NPM1/loose.tif": (None, "NPM1", None, None, None, None, None),
            "PML_RARA/ABC/103.TIF": ("ABC", "PML::RARA", "female", "48", "12300", "71.5", "0"),
            "PML_RARA/ABC/image_0.tif": ("ABC", "PML::RARA", "female", "48", "12300", "71.5", "0"),
            "RUNX1_RUNX1T1/XYZ/1.tif": ("XYZ", "RUNX1::RUNX1T1", None, None, None, None, None),
            "cbfb-myh11/GHI/1.tif": ("GHI", "CBFB::MYH11", "3", "60.5", "900", "12", "1.5"),
            "control/DEF/image_0.tif": ("DEF", "control", "male", None, None, None, None),
        }
        assert {*values(index, "label"), *values(index, "label_common")} == {None}
        assert values(index, "image_id")[0] == "aml-hehr/NPM1/loose.tif"
        counts = {count.name: (count.found, count.published) for count in index.counts}
        assert counts == {
            "CBFB::MYH11": (1, 37),
            "NPM1": (0, 36),
            "PML::RARA": (1, 24),
            "RUNX1::RUNX1T1": (1, 32),
            "control": (1, 60),
        }
        assert index.unit == "patients"

    def test_where_folders_and_metadata_differ(self, root: Path) -> None:
        index = index_dataset(root, "aml-hehr")
        assert finding(index, "in metadata.csv without an image") == ("JKL",)
        assert finding(index, "who are not in metadata.csv") == ("XYZ",)
        assert finding(index, "differ in number from instance_count") == ("GHI: 1 here, 7 stated",)
        assert finding(index, "disease differs") == ("GHI: CBFB::MYH11 by folder, NPM1 stated",)
        assert finding(index, "in no patient's") == ("NPM1/loose.tif",)
        assert finding(index, "images of no class") == ("other/QQQ/1.tif",)
        write(root / "data", "NPM1/ABC/1.tif")
        assert finding(index_dataset(root, "aml-hehr"), "two diseases") == ("ABC",)

    @pytest.mark.parametrize("level", ["..", ".", "data"])
    def test_any_level_finds_the_metadata(self, root: Path, level: str) -> None:
        index = index_dataset(root / level, "aml-hehr")
        assert index.images.root.resolve() == root / "data"
        assert index.images.table.equals(index_dataset(root, "aml-hehr").images.table)

    @pytest.mark.parametrize(
        "raw",
        [
            HEHR_HEADER.encode(),
            HEHR_HEADER.encode("utf-8-sig"),
            HEHR_HEADER.encode("latin-1"),
            HEHR_HEADER.encode("cp1252"),
            HEHR_HEADER.replace("µ", "μ").encode(),  # the Greek letter instead of the sign
            HEHR_HEADER.replace("µ", "¬µ").encode(),  # UTF-8, once read as something else
            HEHR_HEADER.replace("µ", "\ufffd").encode(),
            HEHR_HEADER.encode().replace(b"\xb5", b""),  # half of it lost
        ],
    )
    def test_the_micro_sign_in_any_encoding(self, root: Path, raw: bytes) -> None:
        expected = index_dataset(root, "aml-hehr").images.table
        (root / "metadata.csv").write_bytes(b"\r\n".join([raw, *(line.encode() for line in HEHR_LINES), b""]))
        assert index_dataset(root, "aml-hehr").images.table.equals(expected)

    def test_without_metadata_the_folders_are_enough(self, root: Path) -> None:
        (root / "metadata.csv").unlink()
        index = index_dataset(root, "aml-hehr")
        assert index.images.table.column_names == list(MANIFEST_COLUMNS)
        assert finding(index, "expected beside") == ("metadata.csv",)

    @pytest.mark.parametrize(
        ("raw", "words"),
        [
            (b"", r"not AML Hehr's by its columns .none.: without bag_label, instance_count, patient_id"),
            (b"PK\x03\x04\x00\xff" * 9, r"not AML Hehr's by its columns"),
            (f"{HEHR_HEADER},age".encode(), "two of one name, or too many"),
            ((HEHR_HEADER + "".join(f",pb_{i}" for i in range(99))).encode(), "two of one name, or too many"),
            (f"{HEHR_HEADER}\nABC,1".encode(), "row 2 of .*metadata.csv has 2 fields, the header has 8"),
            ("\n".join([HEHR_HEADER, *HEHR_LINES, HEHR_LINES[0]]).encode(), "row 6 of .*metadata.csv has ABC again"),
            (f"{HEHR_HEADER}\n,1,2,control,1,,,".encode(), "row 2 of .* has no patient_id"),
            (f'{HEHR_HEADER}\n"ABC'.encode(), "cannot be read as CSV"),
            (b"x" * (published_datasets.MAX_METADATA_BYTES + 1), "more than 16,777,216 bytes"),
        ],
        ids=["empty", "binary", "twice", "wide", "short", "again", "nobody", "open", "huge"],
    )
    def test_a_metadata_file_that_is_not_the_published_one_is_refused(self, root: Path, raw: bytes, words: str) -> None:
        (root / "metadata.csv").write_bytes(raw)
        with pytest.raises(BadInput, match=words):
            index_dataset(root, "aml-hehr")


@pytest.mark.parametrize(
    ("dataset", "right", "wrong"),
    [
        ("mll23", "lymphocyte_reactive/lymphocyte_reactive_1.TIF", "lymphocyte/lymphocyte_reactive_2.TIF"),
        ("acevedo", "neutrophil/SNE_1.jpg", "basophil/EO_1.jpg"),
        ("matek19", "PMO/PMO_0001.tiff", "PMB/pmo_0002.tiff"),
        ("bmc", "NGS/1-1000/NGS_00001.jpg", "NGB/NGS_00002.jpg"),
    ],
)
def test_a_file_in_the_folder_of_another_class_is_named(tmp_path: Path, dataset: str, right: str, wrong: str) -> None:
    write(tmp_path, right, wrong, f"{Path(right).parent}/any other name.tiff")
    index = index_dataset(tmp_path, dataset)
    assert finding(index, "begins with another class") == (wrong,)
    assert index.images.table.num_rows == 3 - (dataset == "acevedo")  # SNE needs its prefix


class TestFindingTheFolder:
    def test_nothing_of_the_dataset_there(self, tmp_path: Path) -> None:
        write(tmp_path / "cats", "tabby/1.jpg")
        words = r"no class folders of bmc in .*cats or 4 levels .*: expected ABE, ART, BAS and 18 more; found 'tabby'$"
        with pytest.raises(BadInput, match=words):
            index_dataset(tmp_path / "cats", "bmc")
        with pytest.raises(BadInput, match=r"no folder at .*mll23.zip: expected mll23, unpacked"):
            index_dataset(tmp_path / "mll23.zip", "mll23")

    def test_one_class_is_not_the_dataset(self, tmp_path: Path) -> None:
        write(tmp_path, "BAS/BAS_0001.tiff")
        with pytest.raises(BadInput, match="looks like one class: give the folder above"):
            index_dataset(tmp_path / "BAS", "matek19")

    def test_two_copies_are_not_mixed(self, tmp_path: Path) -> None:
        write(tmp_path, "a/BAS/BAS_0001.tiff", "b/c/BAS/BAS_0001.tiff")
        with pytest.raises(BadInput, match=r"in 2 places \(.*a, .*c\); give one of them"):
            index_dataset(tmp_path, "matek19")

    def test_class_folders_without_images(self, tmp_path: Path) -> None:
        write(tmp_path, "BAS/notes.txt", "other/1.tiff")
        with pytest.raises(BadInput, match=r"no images in the class folders of .*; found 1 images outside"):
            index_dataset(tmp_path, "matek19")

    def test_somebodys_whole_disk_is_not_searched(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write(tmp_path, *(f"{i}/1.txt" for i in range(6)), "0/BAS/BAS_0001.tiff")
        monkeypatch.setattr(published_datasets, "MAX_FOLDERS", 5)
        with pytest.raises(BadInput, match="more than 5 folders; give the folder of matek19 itself"):
            index_dataset(tmp_path, "matek19")

    @pytest.mark.parametrize("place", ["", "BAS", "junk"])
    def test_a_link_that_loops_is_named(self, tmp_path: Path, place: str) -> None:
        root = write(tmp_path / "matek", "BAS/BAS_0001.tiff", "junk/1.txt")
        (root / place / "back").symlink_to(root)
        with pytest.raises(BadInput, match="back links back to a folder that contains it"):
            index_dataset(root, "matek19")

    def test_a_link_to_a_dataset_elsewhere_is_followed(self, tmp_path: Path) -> None:
        write(tmp_path / "store", "BAS/BAS_0001.tiff")
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "matek").symlink_to(tmp_path / "store")
        assert values(index_dataset(tmp_path / "mine", "matek19"), "image_id") == ["matek19/BAS/BAS_0001.tiff"]

    @pytest.mark.skipif(os.name != "posix", reason="names are bytes on POSIX only")
    @pytest.mark.parametrize("raw", [b"BAS/Gr\xfc\xdfe.tiff", b"Gr\xfc\xdfe/1.tiff"])
    def test_names_that_are_not_utf_8_are_refused_in_ascii(self, tmp_path: Path, raw: bytes) -> None:
        write(tmp_path, "BAS/BAS_0001.tiff")
        try:
            write(tmp_path, "x").joinpath("x").unlink()
            bad = tmp_path / os.fsdecode(raw)
            bad.parent.mkdir(exist_ok=True)
            bad.touch()
        except OSError:
            pytest.skip("this file system refuses such names itself")
        with pytest.raises(BadInput, match=r"1 file names in .* are not UTF-8 \('.*Gr\\udcfc\\udcdfe.*'\); rename"):
            index_dataset(tmp_path, "matek19")

    def test_unknown_names_list_the_known_ones(self, tmp_path: Path) -> None:
        write(tmp_path, "basophil/BA_1.jpg")
        with pytest.raises(BadInput, match="acevedo has no class set '12'; known: 13, 11, 10"):
            index_dataset(tmp_path, "acevedo", "12")
        with pytest.raises(BadInput, match="mll23 has no class set '11'; known: 18"):
            index_dataset(tmp_path, "mll23", "11")
        with pytest.raises(BadInput, match=r"a class set belongs to a published dataset .*; found '11'"):
            index_dataset(tmp_path, "folder", "11")
        with pytest.raises(BadInput, match=r"unknown dataset 'imagenet'; known: mll23, .*, folder"):
            index_dataset(tmp_path, "imagenet")


class TestDuplicates:
    def test_the_first_of_equal_bytes_is_named_and_two_labels_are_told(self, tmp_path: Path) -> None:
        root = write(tmp_path, "eosinophil/EO_1.jpg", "eosinophil/EO_225902.jpg", "neutrophil/BNE_191112.jpg")
        (root / "neutrophil/BNE_191112.jpg").write_bytes((root / "eosinophil/EO_225902.jpg").read_bytes())
        (root / "neutrophil/SNE_1.jpg").write_bytes((root / "eosinophil/EO_225902.jpg").read_bytes())
        index = mark_duplicates(index_dataset(root, "acevedo"))
        assert rows(index, DUPLICATE_OF) == {
            "eosinophil/EO_1.jpg": (None,),
            "eosinophil/EO_225902.jpg": (None,),
            "neutrophil/BNE_191112.jpg": ("acevedo/eosinophil/EO_225902.jpg",),
            "neutrophil/SNE_1.jpg": ("acevedo/eosinophil/EO_225902.jpg",),
        }
        pair = "neutrophil/BNE_191112.jpg = eosinophil/EO_225902.jpg"
        assert finding(index, "byte-identical to an earlier image (1 groups; others report 17)")[0] == pair
        assert finding(index, "under two labels")[0] == (
            "neutrophil/BNE_191112.jpg neutrophil_band = eosinophil/EO_225902.jpg eosinophil"
        )

    def test_one_image_under_two_patients_is_told(self, tmp_path: Path) -> None:
        root = write(tmp_path, "control/ABC/1.tif", "control/DEF/1.tif", "control/DEF/2.tif")
        (root / "control/DEF/1.tif").write_bytes((root / "control/ABC/1.tif").read_bytes())
        index = mark_duplicates(index_dataset(root, "aml-hehr"))
        assert finding(index, "under two patients") == ("control/DEF/1.tif DEF = control/ABC/1.tif ABC",)
        assert not finding(index, "under two diseases")
        assert not finding(index, "under two labels")

    def test_equals_the_slow_comparison_of_all_pairs(self, tmp_path: Path) -> None:
        random_bytes = random.Random(3)
        contents = [bytes(random_bytes.choices(b"ab", k=random_bytes.randint(1, 4))) for _ in range(150)]
        paths = [f"{i:03}.png" for i in range(len(contents))]
        for path, content in zip(paths, contents, strict=True):
            (tmp_path / path).write_bytes(content)
        slow = [contents.index(content) if contents.index(content) != i else None for i, content in enumerate(contents)]
        steps: list[tuple[int, int, str]] = []
        done = find_duplicates(tmp_path, paths, progress=lambda *step: steps.append(step))
        assert done.first == slow
        assert done.not_compared == {}
        assert steps[-1][0] == steps[-1][1] > 0

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
    def test_what_is_no_file_is_not_waited_for(self, tmp_path: Path) -> None:
        write(tmp_path, "c.png", "d.png")
        for name in ("a.png", "b.png"):
            os.mkfifo(tmp_path / name)
        (tmp_path / "empty1.png").touch()
        (tmp_path / "empty2.png").touch()
        (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
        with (tmp_path / "huge.png").open("wb") as file:
            file.truncate(2 << 30)  # takes no room on the disk
        names = sorted(path.name for path in tmp_path.iterdir())
        done = find_duplicates(tmp_path, names)
        assert done.first == [None] * len(names)
        assert {names[i]: why.split(" 1,")[0] for i, why in done.not_compared.items()} == {
            "a.png": "no file",
            "b.png": "no file",
            "empty1.png": "empty",
            "empty2.png": "empty",
            "gone.png": "no file",
            "huge.png": "more than",
        }


def fails(words: str, *arguments: object) -> None:
    done = run(*arguments)
    assert (done.exit_code, done.stdout) == (1, ""), done.output
    assert words in done.stderr.splitlines()[-1]


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


class TestCommand:
    @pytest.fixture
    def acevedo(self, tmp_path: Path) -> Path:
        """Real pictures: 2 EO of which one is torn, one BNE with the bytes of the other EO, one IG, one PMY."""
        root = tmp_path / "my data" / "PBC_dataset_normal_DIB"
        names = ("eosinophil/EO_1.jpg", "eosinophil/EO_2.jpg", "ig/IG_1.jpg", "ig/PMY_1.jpg", "neutrophil/BNE_1.jpg")
        for n, name in enumerate(names):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw_cell("eosinophil", np.random.default_rng(n), size=48)).save(root / name)
        (root / names[4]).write_bytes((root / names[0]).read_bytes())
        (root / names[1]).write_bytes((root / names[1]).read_bytes()[:200])
        (root / "neutrophil" / ".DS_169665.jpg").write_bytes(b"not a picture")
        return root

    def test_from_the_published_folder_to_a_cache_by_the_printed_command(
        self, acevedo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        before = snapshot(acevedo)
        options = ("--dataset", "acevedo", "--class-set", 11)
        done = run("data", "index", "my data", "-o", "tables/acevedo.parquet", *options)
        assert done.exit_code == 0, done.output
        for line in [
            "acevedo, class set 11: 4 images in my data/PBC_dataset_normal_DIB",
            "  eosinophil                    2      3,117  <- 3,115 fewer",
            "  total                         4     16,891  <- 16,887 fewer",
            "  immature_granulocyte: not in class set 11, left out: 1 (ig/IG_1.jpg)",
            "  files that are no images by their name, left out: 1 (neutrophil/.DS_169665.jpg)",
            "  of these, under two labels: 1 (neutrophil/BNE_1.jpg neutrophil_band = eosinophil/EO_1.jpg eosinophil)",
            "tables/acevedo.parquet: 4 images, 3 classes",
        ]:
            assert line in done.stdout.splitlines()
        last = done.stdout.splitlines()[-1]
        assert last.startswith("next: cyto cache extract tables/acevedo.parquet tables/acevedo.acts.zarr --root 'my ")
        step = shlex.split(last.removeprefix("next: "))
        assert step[0] == "cyto"
        extracted = run(*step[1:], "--workers", 2)
        assert extracted.exit_code == 0, extracted.output
        images = ActivationStore(tmp_path / "tables" / "acevedo.acts.zarr").images
        assert column(images, "status") == ["ok", "unreadable", "ok", "ok"]
        assert column(images, "label_common") == ["eosinophil", "eosinophil", "promyelocyte", "neutrophil_band"]
        assert column(images, DUPLICATE_OF) == [None, None, None, "acevedo/eosinophil/EO_1.jpg"]
        manifest = open_images(Path("tables/acevedo.parquet"), root=acevedo)
        assert manifest.table.equals(mark_duplicates(index_dataset(acevedo, "acevedo", "11")).images.table)
        assert snapshot(acevedo) == before

    def test_an_index_beside_the_images_needs_no_root(self, acevedo: Path) -> None:
        out = acevedo / "images.parquet"
        for _ in range(2):  # the second time the index itself lies among the images
            done = run("data", "index", acevedo, "-o", out, "--dataset", "acevedo")
            assert done.stdout.splitlines()[-1] == f"next: cyto cache extract {shlex.quote(str(out))} " + shlex.quote(
                str(out.with_suffix(".acts.zarr"))
            )
        assert "already complete" in done.stderr

    def test_json_is_the_same_as_data(self, acevedo: Path, tmp_path: Path) -> None:
        out = tmp_path / "a.parquet"
        page = json.loads(run("data", "index", acevedo, "-o", out, "--dataset", "acevedo", "--json").stdout)
        assert (page["dataset"], page["class_set"], page["n_images"], page["unit"]) == ("acevedo", "13", 5, "images")
        assert {"name": "eosinophil", "found": 2, "published": 3117} in page["counts"]
        assert {"n": 17_092, "source": "all 13 classes; the CytoSAE paper"} in page["stated"]
        assert any(names["names"] == ["neutrophil/.DS_169665.jpg"] for names in page["findings"])
        assert page["next"].endswith(f"--root '{acevedo}'")

    def test_patients_are_counted_as_patients(self, tmp_path: Path) -> None:
        write(tmp_path / "data", "control/ABC/1.tif", "control/ABC/2.tif", "control/DEF/1.tif", "NPM1/GHI/1.tif")
        done = run("data", "index", tmp_path, "-o", tmp_path / "h.parquet", "--dataset", "aml-hehr").stdout
        assert "  control                 2         60  <- 58 fewer" in done.splitlines()
        assert "  total                   3        189  <- 186 fewer" in done.splitlines()
        assert f"{tmp_path / 'h.parquet'}: 4 images, 3 patients, 2 diseases" in done.splitlines()
        assert "stated elsewhere: 101,949 (images: DinoBloom's README)" in done

    def test_a_plain_folder_and_hostile_names(self, tmp_path: Path) -> None:
        root = write(
            tmp_path / "cells", "<script>/1.png", "\x1b[2Jred/2.png", "loose.png", *(f"notes{i}.txt" for i in range(4))
        )
        done = run("data", "index", root, "-o", tmp_path / "cells.parquet", "--no-hash")
        assert done.exit_code == 0, done.output
        assert "\x1b" not in done.output
        assert "  <script>                 1" in done.stdout.splitlines()
        assert "  '\\x1b[2Jred'             1" in done.stdout.splitlines()
        assert (
            "left out: 4 (notes0.txt, notes1.txt, notes2.txt and 1 more)\n  (--json names all of them)" in done.stdout
        )
        assert "published" not in done.stdout
        metadata = pq.read_schema(tmp_path / "cells.parquet").metadata
        assert json.loads(metadata[b"cyto"]) == {"made_by": "cyto data index", "dataset": "folder", "class_set": None}
        table = open_images(tmp_path / "cells.parquet", root=root).table
        assert table.equals(open_images(root).table)  # not compared: no column that would say so

    def test_only_an_index_of_ours_is_replaced_and_only_when_asked(self, acevedo: Path, tmp_path: Path) -> None:
        out = tmp_path / "a.parquet"
        index = ("data", "index", acevedo, "-o", out, "--dataset", "acevedo")
        assert run(*index).exit_code == 0
        before = snapshot(tmp_path)
        again = run(*index)
        assert "already complete" in again.stderr
        fails("holds another index: 5 images against 4; choose", *index, "--class-set", 11)
        fails("holds another index: other values in duplicate_of; choose", *index, "--no-hash")
        assert snapshot(tmp_path) == before
        assert run(*index, "--class-set", 11, "--overwrite").exit_code == 0
        assert pq.read_table(out).num_rows == 4

    def test_anything_else_is_left_alone(self, acevedo: Path, tmp_path: Path, made: Path) -> None:
        """Also with --overwrite, and before the images are read."""
        table = pq.read_table(made / "acts.zarr" / "images.parquet")
        pq.write_table(table, tmp_path / "mine.parquet")  # somebody's own, with all our columns
        other = table.replace_schema_metadata({"cyto": json.dumps({"made_by": "another program"})})
        pq.write_table(other, tmp_path / "other.parquet")
        (tmp_path / "thesis.parquet").write_text("do not touch")
        (tmp_path / "folder.parquet").mkdir()
        (tmp_path / "link.parquet").symlink_to(tmp_path / "mine.parquet")
        (tmp_path / "store").symlink_to(made / "acts.zarr")
        before = snapshot(tmp_path)
        for name, words in {
            "mine.parquet": "was not made by cyto data index; it is left alone",
            "other.parquet": "was not made by cyto data index; it is left alone",
            "thesis.parquet": "was not made by cyto data index; it is left alone",
            "folder.parquet": "was not made by cyto data index; it is left alone",
            "link.parquet": "is a link; give the path that it points to",
            "store/images.parquet": "lies inside an activation cache",
            "a.csv": "an image table is a .parquet file",
        }.items():
            fails(words, "data", "index", acevedo, "-o", tmp_path / name, "--dataset", "acevedo", "--overwrite")
        assert snapshot(tmp_path) == before

    def test_a_failed_write_leaves_the_old_index(
        self, acevedo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "a.parquet"
        index_images(acevedo, out, dataset="acevedo")
        before = snapshot(tmp_path)

        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            index_images(acevedo, out, dataset="acevedo", class_set="11", overwrite=True)
        assert snapshot(tmp_path) == before

    def test_common_mistakes(self, tmp_path: Path) -> None:
        out = tmp_path / "x.parquet"
        fails("no folder at", "data", "index", tmp_path / "nowhere", "-o", out)
        fails("no class folders of mll23 in", "data", "index", tmp_path, "-o", out, "--dataset", "mll23")
        assert run("data", "index", tmp_path, "-o", out, "--dataset", "imagenet").exit_code == 2
