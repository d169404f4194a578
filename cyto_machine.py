"""The start of `cyto`: its version, whether our packages are in place, and what this process may use of the machine.

Only the standard library, so that the command line and every package can ask: `cyto --help` stays quick.
"""

import atexit
import importlib.util
import math
import os
import shutil
import stat
import sys
import tempfile
from pathlib import Path

VERSION = "0.1.0"  # of cyto: pyproject.toml reads it here, tests compare CITATION.cff and CHANGELOG.md with it
DISTRIBUTION = "cytobarcode"  # its name for pip; `cyto` on the package index is somebody else's
_MANY_FILES = 65_536  # no more is asked for: some programs walk through all numbers up to their limit
_CGROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")


def start() -> None:
    """Entry point of the console script: `cli.main`, if `cli` and `stores` are ours; otherwise one line, exit code 1.

    Both are common names. A package of the same name that is installed into the same environment takes the place of
    ours, and its removal deletes ours.
    """
    if foreign := foreign_packages():
        names, place = " and ".join(foreign), Path(sys.prefix)
        sys.exit(
            f"Error: another package has taken the place of {names} of cyto in {place}: expected ours in "
            f"{Path(__file__).parent}. Give cyto an environment of its own: python3 -m venv cyto-env && "
            f"cyto-env/bin/pip install {DISTRIBUTION}"
        )
    from cli import main

    main()


def foreign_packages(here: Path | None = None) -> list[str]:
    """Which of `cli` and `stores` would not be imported from beside this file, or are not ours there; imports neither.

    Ours name this module near their beginning; that tells them from files that were written over them.
    """
    here = (here or Path(__file__).parent).resolve()
    expected = {"cli": here / "cli.py", "stores": here / "stores" / "__init__.py"}
    return [name for name, path in expected.items() if not _is_ours(name, path)]


def _is_ours(name: str, path: Path) -> bool:
    try:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None or Path(found.origin).resolve() != path:
            return False
        return b"cyto_machine" in path.read_bytes()
    except (OSError, ValueError, ImportError):
        return False


def missing_package(name: str, what: str = "this command") -> str:
    """One line for a user about a package of an extra that is not installed; "" if no extra of ours brings it.

    name : of the module that could not be imported
    what : needs it
    """
    package = name.split(".")[0]
    extra = {"torch": "torch", "torchvision": "torch", "timm": "torch", "obstore": "remote"}.get(package)
    if extra is None:
        return ""
    return f"{what} needs the package {package}; install it: pip install '{DISTRIBUTION}[{extra}]'"


def n_cores() -> int:
    """How many processors this process is given: by its affinity (taskset, SLURM) and its cgroups (docker --cpus).

    A quota of one and a half processors counts as two; at least 1.
    """
    given = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup_quota()
    return max(1, given if quota is None else min(given, math.ceil(quota)))


def cgroup_quota(root: Path = _CGROUPS, groups: Path = _OWN_GROUPS) -> float | None:
    """Processors that the cgroups of this process grant (cpu.max; cpu.cfs_quota_us of version 1); None: no limit.

    Every group above its own counts too. In a container the own group is the root that is seen there, whatever
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


def bound_threads() -> None:
    """Let BLAS, OpenMP and numba start no more threads than a cgroup grants; they look at the affinity only.

    To be called before any of them is loaded. What the user has set stays.
    """
    if (quota := cgroup_quota()) is not None:
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
            os.environ.setdefault(name, str(max(1, min(n_cores(), math.ceil(quota)))))


def open_files() -> int:
    """How many files and connections this process may hold open, after asking for as many as it may have."""
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
        except (OSError, ValueError):  # macOS: less than the hard limit says
            pass
    return _MANY_FILES if soft == unlimited else soft


def find_place_for_caches() -> None:
    """Where neither the install nor a home may be written to, libraries keep their caches in a private folder.

    numba keeps compiled code beside ours or in the home, and raises an error where it can do neither; matplotlib and
    triton want a home, too. What the user has set stays. Child processes take it from the environment.

    Raises
    ------
    OSError
        If there is no folder for temporary files either.
    """
    here = Path(__file__).parent
    home = Path(os.path.expanduser("~"))  # noqa: PTH111  # Path.home raises where the user has none
    if "NUMBA_CACHE_DIR" not in os.environ:
        is_installed_for_us = all(_may_write(here / name / "__pycache__") for name in ("stores", "cytosae"))
        if not is_installed_for_us and not _may_write(
            Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache", "numba")
        ):
            os.environ["NUMBA_CACHE_DIR"] = str(_private() / "numba")
            if "numba" in sys.modules:  # it has read its environment before
                sys.modules["numba"].config.CACHE_DIR = os.environ["NUMBA_CACHE_DIR"]
    if "MPLCONFIGDIR" not in os.environ:
        places = [os.environ.get("XDG_CACHE_HOME") or home, os.environ.get("XDG_CONFIG_HOME") or home]
        if not all(_may_write(Path(place)) for place in places):
            os.environ["MPLCONFIGDIR"] = str(_private() / "matplotlib")
    if "TRITON_CACHE_DIR" not in os.environ and not _may_write(Path(os.environ.get("TRITON_HOME") or home)):
        os.environ["TRITON_CACHE_DIR"] = str(_private() / "triton")


def _may_write(folder: Path) -> bool:
    """Whether files can be made in a folder; it is made where it is not there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


def _private() -> Path:
    """A folder for temporary files that belongs to this user and that nobody else can enter.

    It is used again by later runs. Where somebody has put something else in its place, a new one is made for this run:
    compiled code is loaded from there, and who could put it there could run code as this user.
    """
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
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)
