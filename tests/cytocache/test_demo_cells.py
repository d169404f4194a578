"""Drawn demo cells: reproducible, listed faithfully, and different enough to be told apart."""

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from cytocache.demo_cells import CELL_TYPES, DISEASES, draw_cell, write_demo_images


def _contents(root: Path) -> dict[str, bytes]:
    files = (file for file in root.rglob("*") if file.is_file())
    return {file.relative_to(root).as_posix(): file.read_bytes() for file in files}


def _rows(manifest: Path) -> list[dict[str, str]]:
    with manifest.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def _colour_features(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """Means of R, G, B and shares of dark purple, orange and blue, over the middle half of the crop."""
    quarter = len(pixels) // 4
    middle = pixels[quarter:-quarter, quarter:-quarter].reshape(-1, 3) / 255
    r, g, b = middle.T
    shares = (g < 0.35) & (b > r), (r > 0.8) & (b < 0.6), b > r + 0.08
    return np.array([*middle.mean(axis=0), *(share.mean() for share in shares)])


@pytest.mark.parametrize("cell_type", CELL_TYPES)
@pytest.mark.parametrize("size", [16, 97])
def test_a_cell_depends_on_the_seed_alone(cell_type: str, size: int) -> None:
    first, again, other = (draw_cell(cell_type, np.random.default_rng(s), size=size) for s in (5, 5, 6))
    assert first.shape == (size, size, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_colours_alone_tell_the_types_apart() -> None:
    features = np.array(
        [
            [_colour_features(draw_cell(cell_type, np.random.default_rng([kind, i]))) for i in range(24)]
            for kind, cell_type in enumerate(CELL_TYPES)
        ]
    )
    features /= features.std(axis=(0, 1))
    centroids = features[:, :12].mean(axis=1)
    held_out = features[:, 12:, None]
    guess = np.linalg.norm(held_out - centroids, axis=-1).argmin(axis=-1)
    recall = (guess == np.arange(len(CELL_TYPES))[:, None]).mean(axis=1)
    assert recall.mean() > 0.85, dict(zip(CELL_TYPES, recall, strict=True))
    assert recall.min() > 0.5, dict(zip(CELL_TYPES, recall, strict=True))  # chance is one in seven


def test_mixtures_are_complete_and_clearly_different() -> None:
    assert list(DISEASES) == ["control", "CBFB_MYH11", "PML_RARA"]
    for mixture in DISEASES.values():
        assert tuple(mixture) == CELL_TYPES
        assert min(mixture.values()) > 0
        assert sum(mixture.values()) == pytest.approx(1)
    control, cbfb, pml = DISEASES.values()
    assert cbfb["monocyte"] > 3 * control["monocyte"]
    assert cbfb["eosinophil"] > 3 * control["eosinophil"]
    assert pml["promyelocyte_atypical"] > 3 * control["promyelocyte_atypical"]


def test_manifest_lists_exactly_the_files(tmp_path: Path) -> None:
    manifest = write_demo_images(tmp_path / "new" / "root", n_patients=6, images_per_patient=12, size=32)
    assert manifest == tmp_path / "new" / "root" / "images.csv"
    rows = _rows(manifest)
    assert list(rows[0]) == ["path", "label", "patient", "disease"]
    assert sorted(row["path"] for row in rows) == sorted(_contents(manifest.parent).keys() - {"images.csv"})
    for row in rows:
        assert Path(row["path"]).parent.as_posix() == f"images/{row['patient']}"
        assert row["label"] in CELL_TYPES
        with Image.open(manifest.parent / row["path"]) as image:
            assert (image.format, image.mode, image.size) == ("PNG", "RGB", (32, 32))


def test_patients_differ_in_size_and_diseases_are_balanced(tmp_path: Path) -> None:
    rows = _rows(write_demo_images(tmp_path, n_patients=9, images_per_patient=20, size=16))
    per_patient = Counter(row["patient"] for row in rows)
    assert list(per_patient) == [f"P{i:03d}" for i in range(1, 10)]
    assert len(set(per_patient.values())) > 3
    assert all(15 <= n <= 25 for n in per_patient.values())
    patients = {(row["patient"], row["disease"]) for row in rows}
    assert Counter(disease for _, disease in patients) == dict.fromkeys(DISEASES, 3)


def test_images_repeat_in_any_cohort_of_the_same_seed(tmp_path: Path) -> None:
    small, large, other = tmp_path / "small", tmp_path / "large", tmp_path / "other"
    write_demo_images(small, n_patients=2, images_per_patient=4, size=32, seed=3)
    write_demo_images(large, n_patients=4, images_per_patient=9, size=32, seed=3)
    write_demo_images(other, n_patients=2, images_per_patient=4, size=32, seed=4)
    once, more, elsewhere = _contents(small), _contents(large), _contents(other)
    images = once.keys() - {"images.csv"}
    assert len(images) >= 6
    assert all(once[path] == more[path] for path in images)
    assert all(once[path] != elsewhere[path] for path in images & elsewhere.keys())
    assert len(set(more.values())) == len(more)  # no two images share a random stream
    (small / sorted(images)[0]).unlink()
    write_demo_images(small, n_patients=2, images_per_patient=4, size=32, seed=3)
    assert _contents(small) == once


def test_a_failed_write_leaves_no_manifest_and_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = Path.replace

    def disk_full_at_the_third(self: Path, target: Path) -> Path:
        if target.name == "002.png":
            raise OSError("disk full")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", disk_full_at_the_third)
    with pytest.raises(OSError, match="disk full"):
        write_demo_images(tmp_path, n_patients=1, images_per_patient=8, size=16)
    assert _contents(tmp_path).keys() == {"images/P001/000.png", "images/P001/001.png"}


def test_unusable_requests_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="unknown cell type 'basophil'; known types: neutrophil_segmented, "):
        draw_cell("basophil", rng)
    with pytest.raises(ValueError, match="size must be at least 16 pixels, got 8"):
        draw_cell("monocyte", rng, size=8)
    with pytest.raises(ValueError, match="n_patients must be at least 1, got 0"):
        write_demo_images(tmp_path, n_patients=0)
    with pytest.raises(ValueError, match="images_per_patient must be at least 1, got 0"):
        write_demo_images(tmp_path, images_per_patient=0)
    with pytest.raises(ValueError, match="size must be at least 16, got 8"):
        write_demo_images(tmp_path, size=8)
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        write_demo_images(tmp_path, seed=-1)
    assert not any(tmp_path.iterdir())
