"""Where a command may write. Nothing of the user's is touched, and no crash loses both the old and the new artefact."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from stores.destination import Output, plan_output
from stores.errors import DamagedStore, SpecMismatch
from stores.spec import BARCODES, SAE, Header, find_header, new_header, write_header


def header(l1: float = 0.1, **more: Any) -> Header:
    return new_header(SAE, {"width": 4, "config": {"l1": l1, "seed": 0, **more}})


def build(root: Path, made: Header, *, complete: bool = True) -> Path:
    """An artefact with a few files, whose content names its settings."""
    (root / "state").mkdir(parents=True, exist_ok=True)
    for name in ("a.bin", "state/b.bin", "z.bin"):
        (root / name).write_text(made.identity)
    write_header(root, Header(**{**vars(made), "complete": complete}))
    return root


def is_whole(root: Path, made: Header) -> bool:
    """A complete artefact of these settings with every file that `build` writes."""
    found = find_header(root) if root.is_dir() else None
    files = [root / name for name in ("a.bin", "state/b.bin", "z.bin")]
    return (
        found is not None
        and found.complete
        and found.identity == made.identity
        and all(file.is_file() and file.read_text() == made.identity for file in files)
    )


def tree(root: Path) -> dict[str, bytes | str | None]:
    """Everything below `root`: content of files, target of links, None for folders."""
    found: dict[str, bytes | str | None] = {}
    for path in root.rglob("*"):
        what = str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(root))] = what
    return found


# -------------------------------------------------------------------------------- new, continued, complete, refused


def test_a_free_place_is_used_as_it_is(tmp_path: Path) -> None:
    """Nothing there, an empty folder, a folder whose writer was killed over its first header; relative paths too."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / f"sae.json.{'0' * 32}.partial").write_bytes(b"{")
    for overwrite in (False, True):
        for name in ("new", "no/such/folder/new", "empty", "torn"):
            target = tmp_path / name
            assert plan_output(target, header(), overwrite=overwrite) == Output(target, target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "torn"]


def test_a_relative_path_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert plan_output(Path("run"), header()).work == tmp_path / "run"


def test_the_same_settings_continue_or_are_complete(tmp_path: Path) -> None:
    run = build(tmp_path / "run", header(), complete=False)
    assert plan_output(run, header()) == Output(run, run, is_complete=False)
    build(run, header())
    output = plan_output(run, header())
    assert output == Output(run, run, is_complete=True)
    output.publish()
    assert is_whole(run, header())


@pytest.mark.parametrize("complete", [True, False])
def test_other_settings_are_refused_with_the_difference(complete: bool, tmp_path: Path) -> None:
    build(tmp_path / "run", header(), complete=complete)
    before = tree(tmp_path)
    words = (
        r"run holds an SAE with other settings \(config.l1 0.1 against 0.2\); "
        r"choose another output, or add --overwrite to replace it"
    )
    with pytest.raises(SpecMismatch, match=words):
        plan_output(tmp_path / "run", header(0.2))
    with pytest.raises(SpecMismatch, match=r"\(config.l1 0.1 against 0.2, config.a nothing against 1, .* and 2 more\)"):
        plan_output(tmp_path / "run", header(0.2, a=1, b=2, c=3, d="x" * 30))
    newer = Header(kind="SAE", version=2, spec={})
    write_header(tmp_path / "run", newer)
    with pytest.raises(SpecMismatch, match=r"other settings \(version 2 against 1\)"):
        plan_output(tmp_path / "run", header())
    build(tmp_path / "run", header(), complete=complete)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_not_ours_is_never_touched(overwrite: bool, tmp_path: Path) -> None:
    """A folder of somebody else's, another kind of ours, a file, a link, even a link to the very artefact."""
    build(tmp_path / "real", header())
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"dear to me")
    (tmp_path / "photos" / "x.partial").write_bytes(b"not ours either")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "x.partial").write_bytes(b"a download")
    (tmp_path / "barcodes").mkdir()
    write_header(tmp_path / "barcodes", new_header(BARCODES, {}))
    (tmp_path / "notes.txt").write_text("dear to me")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "nowhere").symlink_to("gone")
    before = tree(tmp_path)
    for name, words in [
        ("photos", "photos is a folder that is not ours, not an SAE; it is left alone. Choose another output"),
        ("half", "half is a folder that is not ours, not an SAE"),
        ("barcodes", "barcodes is barcodes, not an SAE; it is left alone. Choose another output"),
        ("notes.txt", "notes.txt is a file, and not an SAE; choose another output"),
        ("link", "link is a link; give the path that it points to"),
        ("nowhere", "nowhere is a link; give the path that it points to"),
    ]:
        with pytest.raises(SpecMismatch, match=words):
            plan_output(tmp_path / name, header(0.2), overwrite=overwrite)
    build(tmp_path / "edited", header())
    text = (tmp_path / "edited" / "sae.json").read_text()
    (tmp_path / "edited" / "sae.json").write_text(text.replace("0.1", "0.2"))
    with pytest.raises(DamagedStore, match="changed by hand"):
        plan_output(tmp_path / "edited", header(0.2), overwrite=overwrite)
    shutil.rmtree(tmp_path / "edited")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_input_of_the_same_command_is_no_output(overwrite: bool, tmp_path: Path) -> None:
    """Nor is a folder that contains one, by whatever name."""
    run = build(tmp_path / "all" / "run", header())
    (tmp_path / "link").symlink_to("all")
    before = tree(tmp_path)
    for target in (run, tmp_path / "all", tmp_path / "link" / "run", tmp_path / "all" / ".." / "all" / "run"):
        for given in (run, tmp_path / "link" / "run"):
            with pytest.raises(SpecMismatch, match=r"is or contains an input of this command \(.*\); choose another"):
                plan_output(target, header(), overwrite=overwrite, inputs=(tmp_path, given)[1:])
    assert plan_output(tmp_path / "all" / "run2", header(), inputs=(run,)).work == tmp_path / "all" / "run2"
    assert tree(tmp_path) == before


# ---------------------------------------------------------------------------------------------------- overwrite


def test_overwrite_builds_beside_and_swaps_at_the_end(tmp_path: Path) -> None:
    """Until then the old one stands; afterwards nothing else is left."""
    for old in (header(0.1), header(0.2)):  # also the same settings: then it is simply made again
        for complete in (True, False):
            run = build(tmp_path / "run", old, complete=complete)
            output = plan_output(run, header(0.2), overwrite=True)
            assert output == Output(run, tmp_path / ".run.new")
            build(output.work, header(0.2))
            assert is_whole(run, old) is complete
            output.publish()
            assert is_whole(run, header(0.2))
            assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_interrupted_replacement_is_continued_or_begun_anew(tmp_path: Path) -> None:
    run, work = build(tmp_path / "run", header(0.1)), tmp_path / ".run.new"
    build(work, header(0.2), complete=False)
    assert plan_output(run, header(0.2), overwrite=True) == Output(run, work)
    assert (work / "a.bin").exists()
    build(work, header(0.2))
    assert plan_output(run, header(0.2), overwrite=True) == Output(run, work, is_complete=True)
    assert is_whole(work, header(0.2))
    assert plan_output(run, header(0.3), overwrite=True) == Output(run, work)
    assert not work.exists()
    work.mkdir()
    (work / f"sae.json.{'0' * 32}.partial").write_bytes(b"{")
    assert plan_output(run, header(0.3), overwrite=True) == Output(run, work)
    assert is_whole(run, header(0.1))


def test_without_overwrite_a_replacement_that_waits_is_left_alone(tmp_path: Path) -> None:
    run, work = build(tmp_path / "run", header(0.1)), build(tmp_path / ".run.new", header(0.2))
    assert plan_output(run, header(0.1)) == Output(run, run, is_complete=True)
    with pytest.raises(SpecMismatch, match="other settings"):
        plan_output(run, header(0.2))
    assert is_whole(work, header(0.2))


@pytest.mark.parametrize("name", [".run.new", ".run.old"])
@pytest.mark.parametrize("what", ["folder", "file", "other kind", "link", "broken link"])
def test_something_else_at_our_working_places_is_never_touched(name: str, what: str, tmp_path: Path) -> None:
    """It is refused before the work begins, not after hours; and without --overwrite it disturbs nobody."""
    place, real = tmp_path / name, build(tmp_path / "real", header(0.3))
    if what == "folder":
        place.mkdir()
        (place / "mine.txt").write_text("dear to me")
    elif what == "file":
        place.write_text("dear to me")
    elif what == "other kind":
        place.mkdir()
        write_header(place, new_header(BARCODES, {}))
    else:
        place.symlink_to(real if what == "link" else tmp_path / "gone")
    before = tree(tmp_path)
    assert plan_output(tmp_path / "run", header()).work == tmp_path / "run"
    assert tree(tmp_path) == before
    build(tmp_path / "run", header())
    before = tree(tmp_path)
    assert plan_output(tmp_path / "run", header()).is_complete
    with pytest.raises(SpecMismatch, match=rf"\{name} is (in the way .*; move it|a link, and .*; remove it)"):
        plan_output(tmp_path / "run", header(0.2), overwrite=True)
    assert tree(tmp_path) == before


# ---------------------------------------------------------------------------------------- crashes during the swap

OLD, NEW = header(0.1), header(0.2)


def test_a_swap_cut_between_its_renames_is_finished(tmp_path: Path) -> None:
    """The new one is complete: it takes its place, for any command that comes next, and is not made a second time."""
    for overwrite in (True, False):
        build(tmp_path / ".run.old", OLD)
        build(tmp_path / ".run.new", NEW)
        output = plan_output(tmp_path / "run", NEW, overwrite=overwrite)
        assert output == Output(tmp_path / "run", tmp_path / "run", is_complete=True)
        assert is_whole(tmp_path / "run", NEW)
        assert [path.name for path in tmp_path.iterdir()] == ["run"]
        shutil.rmtree(tmp_path / "run")


@pytest.mark.parametrize("work", ["none", "begun", "empty"])
def test_without_a_complete_new_one_the_old_one_comes_back(work: str, tmp_path: Path) -> None:
    build(tmp_path / ".run.old", OLD)
    if work == "begun":
        build(tmp_path / ".run.new", NEW, complete=False)
    elif work == "empty":
        (tmp_path / ".run.new").mkdir()
    with pytest.raises(SpecMismatch, match="other settings"):
        plan_output(tmp_path / "run", NEW)
    assert is_whole(tmp_path / "run", OLD)
    assert not (tmp_path / ".run.old").exists()
    assert plan_output(tmp_path / "run", NEW, overwrite=True) == Output(tmp_path / "run", tmp_path / ".run.new")


def test_a_swap_cut_before_the_old_one_is_removed_is_finished(tmp_path: Path) -> None:
    """Another command's settings are compared with the new one; the same command is told that it is complete."""
    build(tmp_path / "run", NEW)
    build(tmp_path / ".run.old", OLD)
    assert plan_output(tmp_path / "run", NEW, overwrite=True).is_complete
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    build(tmp_path / ".run.old", OLD)
    with pytest.raises(SpecMismatch, match=r"other settings \(config.l1 0.2 against 0.1\)"):
        plan_output(tmp_path / "run", OLD)
    assert is_whole(tmp_path / "run", NEW)


def test_the_old_one_is_kept_while_no_complete_one_is_in_its_place(tmp_path: Path) -> None:
    """Somebody began another run at the free name: `.run.old` may be the only whole artefact left."""
    build(tmp_path / "run", NEW, complete=False)
    build(tmp_path / ".run.old", OLD)
    assert plan_output(tmp_path / "run", NEW) == Output(tmp_path / "run", tmp_path / "run")
    assert is_whole(tmp_path / ".run.old", OLD)
    with pytest.raises(SpecMismatch, match=r"\.run\.old is in the way"):
        plan_output(tmp_path / "run", NEW, overwrite=True)
    assert is_whole(tmp_path / ".run.old", OLD)


class Crash(BaseException):
    """The power goes."""


@pytest.mark.stress
def test_a_crash_at_any_point_of_a_replacement_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rename and every deletion in turn is the last thing that happens, twice in a row.

    One whole artefact is always there, and the same command then ends with the new one in place and nothing beside it.
    """
    n_left = 0

    def crashing(name: str) -> Any:
        real = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal n_left
            n_left -= 1
            if n_left < 0:
                raise Crash
            return real(*args, **kwargs)

        return call

    def command() -> None:
        output = plan_output(tmp_path / "run", NEW, overwrite=True)
        if not output.is_complete:
            build(output.work, NEW)
        output.publish()

    def crash_after(n_calls: int) -> bool:
        nonlocal n_left
        n_left = n_calls
        with monkeypatch.context() as patch:
            for name in ("rename", "unlink", "rmdir"):
                patch.setattr(os, name, crashing(name))
            try:
                command()
            except Crash:
                return True
        return False

    for waiting in (False, True):  # a replacement with yet other settings waits, and must first be removed
        for first in range(1000):
            for second in (0, 2, 5):
                build(tmp_path / "run", OLD)
                if waiting:
                    build(tmp_path / ".run.new", header(0.3))
                has_crashed = crash_after(first)
                crash_after(second)
                places = [tmp_path / "run", tmp_path / ".run.old", tmp_path / ".run.new"]
                assert any(is_whole(place, made) for place in places for made in (OLD, NEW))
                command()
                assert is_whole(tmp_path / "run", NEW)
                assert [path.name for path in tmp_path.iterdir()] == ["run"], (waiting, first, second)
                shutil.rmtree(tmp_path / "run")
            if not has_crashed:
                break
        assert first > 8
