"""Where a command may write: new, continued, already complete, or refused. Nothing of the user's is ever lost.

`--overwrite` builds the new artefact beside the old one (`.NAME.new`) and swaps them when the new one is complete. A
crash may cut the swap anywhere; the next command finishes it, or undoes it where no complete new one is left.

Whoever writes an artefact holds `.NAME.lock` beside it from before anything is looked at until it is in its place, so
that a second command is told and touches nothing. Several shards of one store share that lock; --overwrite does not.
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

from .errors import SpecMismatch
from .files import LOCK_SUFFIX, PARTIAL_SUFFIX, is_dropping, lock_holder, locked, sync_folder
from .spec import FORMATS, Header, describe_difference, find_header

_LOCK_INSIDE = f".cyto{LOCK_SUFFIX}"  # where the folder that holds the artefact belongs to somebody else
_NOT_OURS = (errno.EACCES, errno.EPERM, errno.EROFS)
_claims: dict[tuple[Path, int], ExitStack] = {}  # of this process: (artefact, thread) -> what lets its lock go


@dataclass(frozen=True)
class Output:
    """A decided place: build at `work`; it is `target` itself, unless an old artefact is to be replaced at the end.

    While it exists, and until it is published or released, no other process writes there.
    """

    target: Path
    work: Path
    is_complete: bool = False  # nothing to do: `target` holds the result of these very settings

    def publish(self) -> None:
        """Put the complete artefact at `target`, remove the old one, and let others write there again."""
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
        """Let others write there again. Happens by itself when the object goes."""
        _let_go((self.target, threading.get_ident()))


@contextmanager
def claimed(target: Path, *, shared: bool = False) -> Iterator[None]:
    """Inside, no other process writes `target` (or, shared, none but those that share it).

    Raises
    ------
    SpecMismatch
        If another process does, naming it.
    """
    target = target.absolute()
    with ExitStack() as stack:
        for parent in reversed(target.parents):
            if not parent.exists():
                parent.mkdir(exist_ok=True)
                stack.callback(_remove_empty, parent)  # a command that was refused leaves nothing behind
        for lock in _locks(target):
            try:
                is_ours = stack.enter_context(locked(lock, shared=shared))
            except OSError as error:
                if error.errno not in (*_NOT_OURS, errno.ENOENT, errno.ENOTDIR):
                    raise
                continue  # a place where nothing can be written: what tries to will say so
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
    """Claim the place of the artefact that `header` describes, and decide where it is built.

    shared : writers of other parts of it may be at work, unless it is to be replaced

    Raises
    ------
    SpecMismatch
        If `target` holds the same kind with other settings, something else, or an input of this command, or if another
        process is writing there.
    """
    target = target.absolute()
    _refuse_place(target, FORMATS[header.kind].a_kind, inputs)
    if not any(lock.exists() for lock in _locks(target)):  # nobody writes: what needs no writing touches nothing
        settled = _settled(target, header, overwrite=overwrite)
        if settled is not None:
            return settled
    key = (target, threading.get_ident())
    _let_go(key)  # an earlier try of this very thread that ended with an error, and is kept by its traceback
    with ExitStack() as stack:
        stack.enter_context(claimed(target, shared=shared and not overwrite))
        output = _decide(target, header, overwrite=overwrite)
        if output.is_complete and output.work == target:
            return output  # nothing will be written
        _claims[key] = stack.pop_all()
    weakref.finalize(output, _let_go, key, _claims[key])
    return output


def _let_go(key: tuple[Path, int], only: ExitStack | None = None) -> None:
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
    found = _ours(target, header.kind)
    if overwrite and not (was_swapped and found.identity == header.identity):
        return _replacement(target, header)
    return _continued(target, found, header)


def _settled(target: Path, header: Header, *, overwrite: bool) -> Output | None:
    """The result if it is complete already, or the refusal, raised; None where something may have to be written."""
    if _old_place(target).exists() or any(_removed(target)) or _is_free(target, header.kind):
        return None
    found = _ours(target, header.kind)
    if overwrite:
        return None
    output = _continued(target, found, header)
    return output if output.is_complete else None


def _ours(target: Path, kind: str) -> Header:
    """The header of what lies there; refused if that is something else."""
    found = find_header(target)
    if found is None or found.kind != kind:
        what = FORMATS[found.kind].a_kind if found else "a folder that is not ours"
        raise SpecMismatch(f"{target} is {what}, not {FORMATS[kind].a_kind}; it is left alone. Choose another output")
    return found


def _continued(target: Path, found: Header, header: Header) -> Output:
    """What lies there, continued or complete; refused if it has other settings."""
    if found.identity == header.identity:
        return Output(target, target, is_complete=found.complete)
    versions = f"version {found.version} against {header.version}"
    difference = describe_difference(found.spec, header.spec) if found.version == header.version else versions
    raise SpecMismatch(
        f"{target} holds {FORMATS[header.kind].a_kind} with other settings ({difference}); "
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
        or path.name == _LOCK_INSIDE
        for path in place.iterdir()
    )


def _holds(root: Path, kind: str, *, complete: bool = False) -> bool:
    """Is an artefact of this kind there, itself and not by a link?"""
    found = None if root.is_symlink() else find_header(root)
    return found is not None and found.kind == kind and (found.complete or not complete)


def _removed(target: Path) -> Iterator[Path]:
    """What a killed command had begun to remove."""
    return target.parent.glob(f".{glob.escape(target.name)}.{'[0-9a-f]' * 32}.removed")


def _new_place(target: Path) -> Path:
    return target.with_name(f".{target.name}.new")


def _old_place(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _overlap(target: Path, given: Path) -> bool:
    target, given = target.resolve(), given.resolve()
    return target == given or target in given.parents
