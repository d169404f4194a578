"""Where a command may write: new, continued, already complete, or refused. Nothing of the user's is ever lost.

`--overwrite` builds the new artefact beside the old one (`.NAME.new`) and swaps them when the new one is complete. A
crash may cut the swap anywhere; the next command finishes it, or undoes it where no complete new one is left.
"""

import glob
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

from .errors import SpecMismatch
from .files import LOCK_SUFFIX, PARTIAL_SUFFIX, is_dropping, sync_folder
from .spec import FORMATS, Header, describe_difference, find_header


@dataclass(frozen=True)
class Output:
    """A decided place: build at `work`; it is `target` itself, unless an old artefact is to be replaced at the end."""

    target: Path
    work: Path
    is_complete: bool = False  # nothing to do: `target` holds the result of these very settings

    def publish(self) -> None:
        """Put the complete artefact at `target`, then remove the old one."""
        if self.work == self.target:
            return
        old = _old_place(self.target)
        if self.target.exists():
            self.target.rename(old)
        self.work.rename(self.target)
        sync_folder(self.target.parent)
        if old.exists():
            _remove(old, self.target)


def plan_output(target: Path, header: Header, *, overwrite: bool = False, inputs: tuple[Path, ...] = ()) -> Output:
    """Decide where the artefact that `header` describes is built.

    Raises
    ------
    SpecMismatch
        If `target` holds the same kind with other settings, something else, or an input of this command.
    """
    target, a_kind = target.absolute(), FORMATS[header.kind].a_kind
    for given in inputs:
        if _overlap(target, given):
            raise SpecMismatch(f"{target} is or contains an input of this command ({given}); choose another output")
    for folder in target.parents:
        found = find_header(folder)
        if found is not None:
            raise SpecMismatch(f"{target} lies inside {FORMATS[found.kind].a_kind} ({folder}); choose another output")
    if target.is_symlink():
        raise SpecMismatch(f"{target} is a link; give the path that it points to")
    was_swapped = _finish_swap(target, header.kind)
    if _is_free(target, header.kind):
        return Output(target, target)
    if not target.is_dir():
        raise SpecMismatch(f"{target} is a file, and not {a_kind}; choose another output")
    found = find_header(target)
    if found is None or found.kind != header.kind:
        what = FORMATS[found.kind].a_kind if found else "a folder that is not ours"
        raise SpecMismatch(f"{target} is {what}, not {a_kind}; it is left alone. Choose another output")
    if overwrite and not (was_swapped and found.identity == header.identity):
        return _replacement(target, header)
    if found.identity == header.identity:
        return Output(target, target, is_complete=found.complete)
    versions = f"version {found.version} against {header.version}"
    difference = describe_difference(found.spec, header.spec) if found.version == header.version else versions
    raise SpecMismatch(
        f"{target} holds {a_kind} with other settings ({difference}); "
        f"choose another output, or add --overwrite to replace it"
    )


def _replacement(target: Path, header: Header) -> Output:
    """A replacement with the same settings is continued, or just swapped in if complete; any other begins anew."""
    work, old = _new_place(target), _old_place(target)
    if work.is_symlink():
        raise SpecMismatch(f"{work} is a link, and the place where the replacement would be built; remove it")
    if old.exists() or old.is_symlink():  # the swap at the end would fail
        raise SpecMismatch(f"{old} is in the way of replacing {target.name}; move it")
    if _is_free(work, header.kind):
        return Output(target, work)
    found = find_header(work)
    if found is None or found.kind != header.kind:
        raise SpecMismatch(f"{work} is in the way and not ours; move it")
    if found.identity == header.identity:
        return Output(target, work, is_complete=found.complete)
    _remove(work, target)
    return Output(target, work)


def _finish_swap(target: Path, kind: str) -> bool:
    """Finish or undo a swap that was cut, and sweep; True if `target` is what the cut command had built."""
    for left_over in target.parent.glob(f".{glob.escape(target.name)}.{'[0-9a-f]' * 32}.removed"):
        if left_over.is_dir() and not left_over.is_symlink():
            shutil.rmtree(left_over)
    work, old = _new_place(target), _old_place(target)
    if not _holds(old, kind):
        return False
    if not target.exists():
        is_new = _holds(work, kind, complete=True)
        (work if is_new else old).rename(target)
        sync_folder(target.parent)
    if not old.exists() or not _holds(target, kind, complete=True):  # what is not replaced by a whole one stays
        return False
    _remove(old, target)
    return True


def _remove(root: Path, target: Path) -> None:
    """Remove an artefact of ours. It loses its name first: no crash leaves half of one where a whole one counts."""
    doomed = target.with_name(f".{target.name}.{uuid.uuid4().hex}.removed")
    root.rename(doomed)
    shutil.rmtree(doomed)


def _is_free(place: Path, kind: str) -> bool:
    """Nothing is there, or an empty folder, or one whose writers have not come as far as its header."""
    if not place.is_dir() or place.is_symlink():
        return not place.exists()
    header_file = FORMATS[kind].header_file
    return all(
        (path.name.startswith(f"{header_file}.") and path.suffix == PARTIAL_SUFFIX)
        or is_dropping(path.name)
        or (path.name.startswith(("writer-", "finish.")) and path.suffix == LOCK_SUFFIX)
        for path in place.iterdir()
    )


def _holds(root: Path, kind: str, *, complete: bool = False) -> bool:
    """Is an artefact of this kind there, itself and not by a link?"""
    found = None if root.is_symlink() else find_header(root)
    return found is not None and found.kind == kind and (found.complete or not complete)


def _new_place(target: Path) -> Path:
    return target.with_name(f".{target.name}.new")


def _old_place(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _overlap(target: Path, given: Path) -> bool:
    target, given = target.resolve(), given.resolve()
    return target == given or target in given.parents
