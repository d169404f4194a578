"""Decides about an output: new, continued, already complete, or refused. Files that are not Cyto's are never removed.

`--overwrite` builds the new artefact beside the old one (`.NAME.new`) and swaps them when the new one is complete. If a
crash interrupts the swap, the next command finishes it, or undoes it if there is no complete new artefact.

A writer of an artefact holds the lock `.NAME.lock` beside it, from before the first check until the artefact is in
place, so that a second command stops with an error. Shards of one store share the lock; --overwrite does not.
"""

import errno
import glob
import shutil
import threading
import uuid
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from .errors import OtherSettings, SpecMismatch
from .files import LOCK_SUFFIX, PARTIAL_SUFFIX, is_dropping, lock_holder, locked, sync_folder
from .spec import FORMATS, Header, describe_difference, find_header

_LOCK_INSIDE = f".cyto{LOCK_SUFFIX}"  # the lock, if the parent folder is not writable
_NOT_OURS = (errno.EACCES, errno.EPERM, errno.EROFS)
_claims: dict[
    tuple[Path, int], ExitStack
] = {}  # of this process: (artefact, thread) -> the stack that releases its lock


@dataclass(frozen=True)
class Output:
    """The decision: write to `work`, which is `target` itself unless an old artefact is replaced at the end.

    Until it is published or released, or the object is deleted, no other process writes there.
    """

    target: Path
    work: Path
    is_complete: bool = False  # nothing to do: `target` holds the result with the same settings

    def publish(self) -> None:
        """Move the complete artefact to `target`, remove the old one, and release the lock."""
        try:
            if self.work == self.target:
                return
            old = _old_place(self.target)
            if self.target.exists():
                self.target.rename(old)
            self.work.rename(self.target)
            sync_folder(self.target.parent)
            if old.exists():
                _remove(old, self.target)
        finally:
            self.release()

    def release(self) -> None:
        """Release the lock, as also happens when the object is deleted."""
        _release_lock((self.target, threading.get_ident()))


@contextmanager
def claimed(target: Path, *, shared: bool = False) -> Iterator[None]:
    """While this context is open, no other process writes `target` (`shared`: only others that share it).

    Raises
    ------
    SpecMismatch
        If another process is writing it; the message names the process.
    """
    target = target.absolute()
    with ExitStack() as stack:
        for parent in reversed(target.parents):
            if not parent.exists():
                parent.mkdir(exist_ok=True)
                stack.callback(_remove_empty, parent)  # a refused command leaves no folder
        for lock in _locks(target):
            try:
                is_ours = stack.enter_context(locked(lock, shared=shared))
            except OSError as error:
                if error.errno not in (*_NOT_OURS, errno.ENOENT, errno.ENOTDIR):
                    raise
                continue  # not writable: the first write will raise the error
            if not is_ours:
                raise SpecMismatch(
                    f"{target} is being written by another process ({lock_holder(lock)}); wait until it ends, stop it, "
                    f"or choose another output"
                )
            break
        yield


def _locks(target: Path) -> tuple[Path, Path]:
    return target.with_name(f".{target.name}{LOCK_SUFFIX}"), target / _LOCK_INSIDE


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):  # it is not empty
        folder.rmdir()


def plan_output(
    target: Path, header: Header, *, overwrite: bool = False, inputs: tuple[Path, ...] = (), shared: bool = False
) -> Output:
    """Lock the place of the artefact that `header` describes, and decide where it is written.

    shared : writers of other shards may be running, unless the artefact is to be replaced

    Raises
    ------
    SpecMismatch
        If `target` holds the same kind with other settings, something else, or an input of this command, or if another
        process is writing there.
    """
    target = target.absolute()
    _refuse_place(target, FORMATS[header.kind].a_kind, inputs)
    if not any(lock.exists() for lock in _locks(target)):  # no writer: if nothing is to be done, no lock file is made
        settled = _decided_without_writing(target, header, overwrite=overwrite)
        if settled is not None:
            return settled
    key = (target, threading.get_ident())
    _release_lock(key)  # an earlier try of this thread, which failed and is kept alive by its traceback
    with ExitStack() as stack:
        stack.enter_context(claimed(target, shared=shared and not overwrite))
        output = _decide(target, header, overwrite=overwrite)
        if output.is_complete and output.work == target:
            return output  # nothing will be written
        _claims[key] = stack.pop_all()
    weakref.finalize(output, _release_lock, key, _claims[key])
    return output


def _release_lock(key: tuple[Path, int], only: ExitStack | None = None) -> None:
    if key in _claims and only in (None, _claims[key]):
        _claims.pop(key).close()


def _refuse_place(target: Path, a_kind: str, inputs: tuple[Path, ...]) -> None:
    for given in inputs:
        if _overlap(target, given):
            raise SpecMismatch(f"{target} is or contains an input of this command ({given}); choose another output")
    for folder in target.parents:
        found = find_header(folder)
        if found is not None:
            raise SpecMismatch(f"{target} lies inside {FORMATS[found.kind].a_kind} ({folder}); choose another output")
    if target.is_symlink():
        raise SpecMismatch(f"{target} is a link; give the path that it points to")
    if target.exists() and not target.is_dir():
        raise SpecMismatch(f"{target} is a file, and not {a_kind}; choose another output")


def _decide(target: Path, header: Header, *, overwrite: bool) -> Output:
    was_swapped = _finish_swap(target, header.kind)
    if _is_free(target, header.kind):
        return Output(target, target)
    found = _existing_header(target, header.kind)
    if overwrite and not (was_swapped and found.identity == header.identity):
        return _replacement(target, header)
    return _continued(target, found, header)


def _decided_without_writing(target: Path, header: Header, *, overwrite: bool) -> Output | None:
    """The decision if nothing is to be written (complete, or an error is raised); None if something may be."""
    if _old_place(target).exists() or any(_removed(target)) or _is_free(target, header.kind):
        return None
    found = _existing_header(target, header.kind)
    if overwrite:
        return None
    output = _continued(target, found, header)
    return output if output.is_complete else None


def _existing_header(target: Path, kind: str) -> Header:
    """The header at `target`; raises SpecMismatch if something else is there."""
    found = find_header(target)
    if found is None or found.kind != kind:
        what = FORMATS[found.kind].a_kind if found else "a folder that is not ours"
        raise SpecMismatch(f"{target} is {what}, not {FORMATS[kind].a_kind}; it is left alone. Choose another output")
    return found


def _continued(target: Path, found: Header, header: Header) -> Output:
    """The existing artefact, to be continued or complete; raises OtherSettings for other ones."""
    if found.identity == header.identity:
        return Output(target, target, is_complete=found.complete)
    versions = f"version {found.version} against {header.version}"
    difference = describe_difference(found.spec, header.spec) if found.version == header.version else versions
    raise OtherSettings(
        f"{target} holds {FORMATS[header.kind].a_kind} with other settings ({difference}); "
        f"choose another output, or add --overwrite to replace it"
    )


def _replacement(target: Path, header: Header) -> Output:
    """A replacement with the same settings is continued, or swapped in if complete; any other is started again."""
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
    """Finish or undo an interrupted swap, and remove its remains; True if `target` is what that command had written."""
    for left_over in _removed(target):
        if left_over.is_dir() and not left_over.is_symlink():
            shutil.rmtree(left_over)
    work, old = _new_place(target), _old_place(target)
    if not _holds(old, kind):
        return False
    if not target.exists():
        is_new = _holds(work, kind, complete=True)
        (work if is_new else old).rename(target)
        sync_folder(target.parent)
    # the old one stays unless it is replaced by a complete one
    if not old.exists() or not _holds(target, kind, complete=True):
        return False
    _remove(old, target)
    return True


def _remove(root: Path, target: Path) -> None:
    """Remove an artefact. It is renamed first, so that a crash never leaves half of it under its name."""
    doomed = target.with_name(f".{target.name}.{uuid.uuid4().hex}.removed")
    root.rename(doomed)
    shutil.rmtree(doomed)


def _is_free(place: Path, kind: str) -> bool:
    """Is nothing there, or an empty folder, or one whose writers have not written the header yet?"""
    if not place.is_dir() or place.is_symlink():
        return not place.exists()
    header_file = FORMATS[kind].header_file
    return all(
        (path.name.startswith(f"{header_file}.") and path.suffix == PARTIAL_SUFFIX)
        or is_dropping(path.name)
        or (path.name.startswith(("writer-", "finish.")) and path.suffix == LOCK_SUFFIX)
        or path.name == _LOCK_INSIDE
        for path in place.iterdir()
    )


def _holds(root: Path, kind: str, *, complete: bool = False) -> bool:
    """Is there an artefact of this kind, not through a link?"""
    found = None if root.is_symlink() else find_header(root)
    return found is not None and found.kind == kind and (found.complete or not complete)


def _removed(target: Path) -> Iterator[Path]:
    """Artefacts that a killed command had begun to remove."""
    return target.parent.glob(f".{glob.escape(target.name)}.{'[0-9a-f]' * 32}.removed")


def _new_place(target: Path) -> Path:
    return target.with_name(f".{target.name}.new")


def _old_place(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _overlap(target: Path, given: Path) -> bool:
    target, given = target.resolve(), given.resolve()
    return target == given or target in given.parents
