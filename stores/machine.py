"""The limits of this process on its machine: cores, open files, a folder for the caches of libraries.

Standard library only, so that it can be imported everywhere and `cyto --help` stays quick.
"""

import atexit
import math
import os
import shutil
import stat
import sys
from pathlib import Path

_MANY_FILES = 65_536  # largest limit to set: some programs loop over all numbers up to their limit
_CGROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")


def n_cores() -> int:
    """How many processors this process may use: by its affinity (taskset, SLURM) and its cgroups (docker --cpus).

    A quota of one and a half processors counts as two; at least 1.
    """
    given = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup_quota()
    return max(1, given if quota is None else min(given, math.ceil(quota)))


def cgroup_quota(root: Path = _CGROUPS, groups: Path = _OWN_GROUPS) -> float | None:
    """Processors that the cgroups of this process grant (cpu.max; cpu.cfs_quota_us of version 1); None: no limit.

    The limits of parent groups count, too. In a container the process's own group is the visible root, whatever
    `groups` says.

    Parameters
    ----------
    root : where the cgroup file systems are mounted
    groups : the process's own, lines of "number:controllers:path"
    """
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        return None
    found: list[float] = []
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if not controllers:
            mounts, read = [root, root / "unified"], _quota_2
        elif "cpu" in controllers.split(","):
            mounts, read = [root / controllers, root / "cpu", root / "cpu,cpuacct"], _quota_1
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for mount in mounts:
            for depth in range(len(parts) + 1):
                quota = read(mount.joinpath(*parts[:depth]))
                found += [quota] if quota else []
    return min(found, default=None)


def _quota_2(group: Path) -> float | None:
    try:
        quota, period = (group / "cpu.max").read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):  # "max": no limit
        return None


def _quota_1(group: Path) -> float | None:
    try:
        quota = int((group / "cpu.cfs_quota_us").read_text())
        period = int((group / "cpu.cfs_period_us").read_text())
        return quota / period if quota > 0 else None  # -1: no limit
    except (OSError, ValueError, ZeroDivisionError):
        return None


def free_on_disk(place: Path) -> int:
    """Free bytes of the disk of `place`, which need not exist yet."""
    there = next(folder for folder in (place.absolute(), *place.absolute().parents) if folder.exists())
    return shutil.disk_usage(there).free


def bound_threads() -> None:
    """Limit the threads of BLAS, OpenMP and numba to the cgroup's quota; they look at the affinity only.

    To be called before any of them is imported. Settings of the user are kept.
    """
    if (quota := cgroup_quota()) is not None:
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
            os.environ.setdefault(name, str(max(1, min(n_cores(), math.ceil(quota)))))


def open_files() -> int:
    """How many files and connections this process may open, after raising its limit as far as allowed."""
    try:
        import resource
    except ImportError:  # not on Windows
        return _MANY_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    wanted = _MANY_FILES if hard == unlimited else min(hard, _MANY_FILES)
    if soft != unlimited and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
        except (OSError, ValueError):  # macOS allows less than its hard limit
            pass
    return _MANY_FILES if soft == unlimited else soft


def find_place_for_caches() -> None:
    """If neither the installation nor a home folder is writable, let libraries keep their caches in a private folder.

    numba caches compiled code beside the package or in the home folder, and raises an error if neither is writable;
    matplotlib and triton need a home folder, too. Settings of the user are kept. Child processes inherit the setting.

    Raises
    ------
    OSError
        If there is no folder for temporary files either.
    """
    here = Path(__file__).parents[1]
    home = Path(os.path.expanduser("~"))  # noqa: PTH111  # Path.home raises if there is none
    if "NUMBA_CACHE_DIR" not in os.environ:
        is_installed_for_us = all(_may_write(here / name / "__pycache__") for name in ("stores", "cytosae"))
        if not is_installed_for_us and not _may_write(
            Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache", "numba")
        ):
            os.environ["NUMBA_CACHE_DIR"] = str(_private() / "numba")
            if "numba" in sys.modules:  # it has already read its environment
                sys.modules["numba"].config.CACHE_DIR = os.environ["NUMBA_CACHE_DIR"]
    if "MPLCONFIGDIR" not in os.environ:
        places = [os.environ.get("XDG_CACHE_HOME") or home, os.environ.get("XDG_CONFIG_HOME") or home]
        if not all(_may_write(Path(place)) for place in places):
            os.environ["MPLCONFIGDIR"] = str(_private() / "matplotlib")
    if "TRITON_CACHE_DIR" not in os.environ and not _may_write(Path(os.environ.get("TRITON_HOME") or home)):
        os.environ["TRITON_CACHE_DIR"] = str(_private() / "triton")


def _may_write(folder: Path) -> bool:
    """Can files be made in this folder? It is made if missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


def _private() -> Path:
    """A folder for temporary files that belongs to this user and that no other user can enter.

    Later runs use it again. If something else has its name, a new folder is made for this run: compiled code is loaded
    from it, so another user who could write there could run code as this user.
    """
    import tempfile  # imported here, since it is slow and rarely needed

    try:
        uid = os.getuid() if hasattr(os, "getuid") else 0
        folder = Path(tempfile.gettempdir()) / f"cyto-cache-{uid}"
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:
            found = folder.lstat()
            is_ours = found.st_uid == uid or not hasattr(os, "getuid")
            if not (stat.S_ISDIR(found.st_mode) and is_ours and not stat.S_IMODE(found.st_mode) & 0o077):
                folder = Path(tempfile.mkdtemp(prefix="cyto-cache-"))
                atexit.register(_remove, folder, os.getpid())
        return folder
    except OSError as error:
        raise OSError(
            error.errno, "no folder for temporary files can be written to; set TMPDIR to one", "TMPDIR"
        ) from None


def _remove(folder: Path, process: int) -> None:
    import shutil

    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)
