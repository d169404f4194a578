"""Where a command may write: new, continued, already complete, or refused. Nothing of the user's is ever lost.

`--overwrite` builds the new artefact beside the old one (`.NAME.new`) and swaps them when the new one is complete.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from .errors import SpecMismatch
from .files import sync_folder
from .spec import Header, describe_difference, find_header


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
        old = self.target.with_name(f".{self.target.name}.old")
        if self.target.exists():
            self.target.rename(old)
        self.work.rename(self.target)
        sync_folder(self.target.parent)
        if old.exists():
            shutil.rmtree(old)


def plan_output(target: Path, header: Header, *, overwrite: bool = False, inputs: tuple[Path, ...] = ()) -> Output:
    """Decide where the artefact that `header` describes is built.

    Raises
    ------
    SpecMismatch
        If `target` holds the same kind with other settings, something else, or an input of this command.
    """
    target = target.absolute()
    for given in inputs:
        if _overlap(target, given):
            raise SpecMismatch(f"{target} is or contains an input of this command ({given}); choose another output")
    work = target.with_name(f".{target.name}.new")
    old = target.with_name(f".{target.name}.old")
    if not target.exists() and old.exists():  # a swap was cut between its two renames: finish or undo it
        (work if work.exists() else old).rename(target)
    if old.exists() and not target.is_symlink() and _is_kind(old, header.kind):
        shutil.rmtree(old)
    if target.is_symlink():
        raise SpecMismatch(f"{target} is a link; give the path that it points to")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return Output(target, target)
    if not target.is_dir():
        raise SpecMismatch(f"{target} is a file, and not a {header.kind}; choose another output")
    found = find_header(target)
    if found is None or found.kind != header.kind:
        what = f"a {found.kind}" if found else "a folder that is not ours"
        raise SpecMismatch(f"{target} is {what}, not a {header.kind}; it is left alone. Choose another output")
    if overwrite:
        return _replacement(target, work, header)
    if found.identity == header.identity:
        return Output(target, target, is_complete=found.complete)
    difference = describe_difference(found.spec, header.spec) or f"version {found.version} against {header.version}"
    raise SpecMismatch(
        f"{target} holds a {header.kind} with other settings ({difference}); "
        f"choose another output, or add --overwrite to replace it"
    )


def _replacement(target: Path, work: Path, header: Header) -> Output:
    """A replacement with the same settings is continued, or just swapped in if complete; any other begins anew."""
    if work.is_symlink():
        raise SpecMismatch(f"{work} is a link, and the place where the replacement would be built; remove it")
    if work.exists():
        found = find_header(work)
        if found is None or found.kind != header.kind:
            raise SpecMismatch(f"{work} is in the way and not ours; move it")
        if found.identity == header.identity:
            return Output(target, work, is_complete=found.complete)
        shutil.rmtree(work)
    return Output(target, work)


def _is_kind(root: Path, kind: str) -> bool:
    found = find_header(root)
    return found is not None and found.kind == kind


def _overlap(target: Path, given: Path) -> bool:
    target, given = target.resolve(), given.resolve()
    return target == given or target in given.parents
