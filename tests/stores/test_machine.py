"""Real machines: other users on them, cores that are only lent, no home, `python -O`, a full disk, the end of a run."""

import asyncio
import os
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import torch
import zarr
from distributed import Client
from distributed.comm.core import connect
from distributed.security import Security
from places import ROOT
from zarr.core.group import GroupMetadata

import stores.machine
from cytosae.cluster import open_client
from cytosae.sae import save_tensors
from stores.errors import BadInput
from stores.machine import cgroup_quota, n_cores

# by another user, with nothing but the standard library: what a Dask process says to a message of its protocol
AS_NOBODY = """
import encodings.idna, os, socket, sys
os.setgid(65534); os.setuid(65534)
for port in map(int, sys.argv[1:]):
    with socket.create_connection(("127.0.0.1", port), timeout=5) as wire:
        for message in (b"GET /metrics HTTP/1.0\\r\\n\\r\\n", (1).to_bytes(8, "little") * 3):
            try:
                wire.sendall(message)
                answer = wire.recv(64)
            except OSError:
                break
            if answer and answer[:1] != b"\\x15":  # a TLS alert
                sys.exit(f"port {port} answers {answer!r}")
"""


def ports() -> list[int]:
    """On which this process and its children listen."""
    me = psutil.Process()
    listening = [one for each in (me, *me.children(recursive=True)) for one in each.net_connections()]
    assert all(one.laddr.ip == "127.0.0.1" for one in listening if one.status == psutil.CONN_LISTEN)
    return [one.laddr.port for one in listening if one.status == psutil.CONN_LISTEN]


@pytest.mark.stress
def test_nobody_else_can_talk_to_the_cluster_of_a_run(tmp_path: Path) -> None:
    """No key, another key, another user, HTTP: none gets an answer from scheduler, nannies or workers."""
    others_before = set(ports())
    with open_client(None, workers=1, memory_limit="1GiB") as client:
        client.wait_for_workers(1)
        ran = client.submit(wait_for, str(tmp_path / "go"))  # a job is under way
        workers = client.scheduler_info()["workers"]
        assert client.scheduler is not None
        addresses = [client.scheduler.address, *workers, *(found["nanny"] for found in workers.values())]
        assert all(address.startswith("tls://127.0.0.1:") for address in addresses)
        assert {int(address.rsplit(":", 1)[1]) for address in addresses} == set(ports()) - others_before  # no others

        for scratch in client.run(lambda dask_worker: dask_worker.local_directory).values():
            ours = Path(tempfile.gettempdir())
            private = next(path for path in Path(scratch).parents if path.parent == ours)
            assert private.stat().st_mode & 0o777 == 0o700
            assert private.stat().st_uid == os.getuid()

        stranger = Security.temporary()
        keys = stranger.get_connection_args("client")["ssl_context"]
        keyless = ssl.create_default_context()
        for context in (keys, keyless):  # whoever attacks does not care whom they talk to
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE

        async def attempt(address: str, context: ssl.SSLContext | None) -> Any:
            comm = await connect(address, timeout=1, ssl_context=context)
            try:
                await comm.write({"op": "identity", "reply": True})
                return await asyncio.wait_for(comm.read(), 2)
            finally:
                comm.abort()

        async def attempts() -> list[Any]:
            plain = [attempt(address.replace("tls://", "tcp://"), None) for address in addresses]
            encrypted = [attempt(address, context) for address in addresses for context in (keys, keyless)]
            return await asyncio.gather(*plain, *encrypted, return_exceptions=True)

        assert ran.status == "pending"
        answers = asyncio.run(attempts())
        assert len(answers) == 9
        assert all(isinstance(answer, OSError) for answer in answers), answers  # distributed's own and time-outs are
        with pytest.raises(OSError, match=r"."):
            Client(addresses[0], security=stranger, timeout="1s", set_as_default=False)
        if hasattr(os, "getuid") and os.getuid() == 0:
            numbers = [address.rsplit(":", 1)[1] for address in addresses]
            subprocess.run(["/usr/bin/env", sys.executable, "-c", AS_NOBODY, *numbers], check=True, cwd="/")
        (tmp_path / "go").touch()
        assert ran.result() == "done"
    assert not private.exists()


def wait_for(path: str) -> str:
    """A task that ends when a file is there."""
    import time

    while not Path(path).exists():
        time.sleep(0.02)
    return "done"


def test_cores_are_those_given(tmp_path: Path) -> None:
    """By affinity, and by the cgroups of version 2 and 1, of which every group above counts."""
    code = "import cli; print([p.default for p in cli.cli.get_command(None, 'barcode').params if p.name == 'workers'])"
    core = min(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, {{{core}}}); {code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "[1]\n"

    own = tmp_path / "cgroup"
    job = tmp_path / "system.slice" / "job"
    job.mkdir(parents=True)
    own.write_text("0::/system.slice/job\n")
    assert cgroup_quota(tmp_path, own) is None
    (job / "cpu.max").write_text("max 100000\n")
    assert cgroup_quota(tmp_path, own) is None
    (job.parent / "cpu.max").write_text("150000 100000\n")
    (job / "cpu.max").write_text("800000 100000\n")
    assert cgroup_quota(tmp_path, own) == 1.5
    own.write_text("0::/\n")  # in a container the group is the root
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert cgroup_quota(tmp_path, own) == 0.5

    first = tmp_path / "v1"
    group = first / "cpu,cpuacct" / "docker" / "abc"
    group.mkdir(parents=True)
    own.write_text("12:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n1:name=systemd:/docker/abc\n")
    (group / "cpu.cfs_quota_us").write_text("-1\n")
    (group / "cpu.cfs_period_us").write_text("100000\n")
    assert cgroup_quota(first, own) is None
    (group / "cpu.cfs_quota_us").write_text("300000\n")
    assert cgroup_quota(first, own) == 3
    assert cgroup_quota(first, tmp_path / "none") is None


def test_cores_are_at_least_one_and_never_above_the_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of a core count as one; what the user has set of threads stays."""
    there = len(os.sched_getaffinity(0))
    for quota, expected in ((0.2, 1), (1.0, 1), (1.5, min(2, there)), (1000.0, there), (None, there)):
        monkeypatch.setattr(stores.machine, "cgroup_quota", lambda quota=quota: quota)
        assert n_cores() == expected
    monkeypatch.setattr(stores.machine, "cgroup_quota", lambda: 1.0)
    names = ("MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
    for name in names:
        monkeypatch.setenv(name, "")  # so that it is as before behind the test
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    stores.machine.bound_threads()
    assert (os.environ["OMP_NUM_THREADS"], os.environ["NUMBA_NUM_THREADS"]) == ("7", "1")
    for name in names:
        del os.environ[name]


@pytest.mark.parametrize(("limit", "advice"), [(400, "give at most 22, or raise"), (100, "raise")])
def test_more_workers_than_files_are_refused_and_the_limit_is_raised_first(limit: int, advice: str) -> None:
    """In one line, before anything is started; where not even one worker fits, only the limit is left."""
    code = (
        f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, {limit}))\n"
        f"from stores.machine import open_files; assert open_files() == {limit}\n"
        "from cytosae.cluster import open_client\n"
        "try:\n with open_client(None, workers=500, memory_limit='1GiB'): pass\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == (
        f"BadInput --workers 500 need more open files than this process may have: {advice} the limit (ulimit -n 6128)\n"
    )
    assert issubclass(BadInput, ValueError)


@contextmanager
def nothing_to_write_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """An install and a home that this user may not write to, whoever this user is: they lie below a file."""
    (tmp_path / "file").touch()
    monkeypatch.setattr(stores.machine, "__file__", str(tmp_path / "file" / "stores" / "machine.py"))
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with monkeypatch.context() as context:
        for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "TRITON_HOME"):
            context.delenv(name, raising=False)
        for name in ("NUMBA_CACHE_DIR", "MPLCONFIGDIR", "TRITON_CACHE_DIR"):
            context.setenv(name, "")  # so that it is as before behind the test
            context.delenv(name)
        context.setattr("numba.config.CACHE_DIR", "")  # as it is behind the test
        yield


def test_caches_find_a_private_place_without_a_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The user's own folder is used again; one of somebody else, a link, or one that others may enter is not."""
    expected = tmp_path / f"cyto-cache-{os.getuid()}"
    with nothing_to_write_to(monkeypatch, tmp_path):
        stores.machine.find_place_for_caches()
        assert os.environ["NUMBA_CACHE_DIR"] == str(expected / "numba")
        assert os.environ["MPLCONFIGDIR"] == str(expected / "matplotlib")
        assert expected.stat().st_mode & 0o777 == 0o700
        assert stores.machine._private() == expected

        expected.chmod(0o770)
        assert stores.machine._private() != expected
        expected.rmdir()
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        expected.symlink_to(tmp_path / "elsewhere")
        assert stores.machine._private() != expected
        expected.unlink()
        expected.touch()
        private = stores.machine._private()
        assert private != expected
        assert private.stat().st_mode & 0o777 == 0o700
        if os.getuid() == 0:
            expected.unlink()
            expected.mkdir(mode=0o700)
            os.chown(expected, 65534, 65534)
            assert stores.machine._private() != expected
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
        with pytest.raises(OSError, match="set TMPDIR"):
            stores.machine._private()


def test_what_the_user_has_set_for_caches_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And no folder is made."""
    with nothing_to_write_to(monkeypatch, tmp_path):
        for name in ("NUMBA_CACHE_DIR", "MPLCONFIGDIR", "TRITON_CACHE_DIR"):
            monkeypatch.setenv(name, "/mine")
        stores.machine.find_place_for_caches()
        assert os.environ["NUMBA_CACHE_DIR"] == os.environ["MPLCONFIGDIR"] == "/mine"
    assert not list(tmp_path.glob("cyto-cache-*"))


@pytest.mark.parametrize("level", ["1", "2"])
def test_groups_are_read_without_asserts(level: str, tmp_path: Path) -> None:
    """`python -O` and -OO: zarr's group metadata, and that other metadata is still refused."""
    zarr.open_group(tmp_path / "g.zarr", mode="w-", zarr_format=3, attributes={"a": 1})
    code = (
        "import cli, sys\n"
        "print('zarr' in sys.modules or 'numpy' in sys.modules)\n"  # threads are bounded before numpy is imported
        "import zarr; from stores import BarcodeStore\n"
        f"print(dict(zarr.open_group({str(tmp_path / 'g.zarr')!r}, mode='r').attrs))\n"
        "from zarr.core.group import GroupMetadata\n"
        "try: GroupMetadata.from_dict({'zarr_format': 3, 'node_type': 'array'})\n"
        "except ValueError as error: print(error)"
    )
    environment = {**os.environ, "PYTHONOPTIMIZE": level}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.stdout == "False\n{'a': 1}\nnot the metadata of a group: 'array'\n", done.stderr
    assert GroupMetadata.from_dict({"zarr_format": 3, "node_type": "group"}).zarr_format == 3


def test_a_disk_that_is_full_is_the_systems_error(tmp_path: Path) -> None:
    """Of safetensors, too, which would say it in an error of its own; nothing half written stays."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))  # Python ignores SIGXFSZ: EFBIG, as of any disk
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            save_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(100_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.filename == str(tmp_path / "a.safetensors")
    assert caught.value.errno == 27
    assert not list(tmp_path.iterdir())


def test_the_end_of_a_command() -> None:
    """The exit code, all output and what is to be done at exit stay, though native threads never see Python go."""
    program = (
        "import atexit, sys, cli, click\n"
        "@cli.cli.command('try')\n@click.argument('how')\ndef attempt(how):\n"
        "    atexit.register(lambda: print('tidied'))\n"
        "    sys.stdout.write('x' * 100_000 + '\\n')\n"
        "    if how == 'bad': raise click.ClickException('bad')\n"
        "    if how == 'bug': raise ZeroDivisionError\n"
        "    if how == 'exit': raise SystemExit('said')\n"
        "cli.main()"
    )
    for how, code, said in (("good", 0, ""), ("bad", 1, "Error: bad\n"), ("bug", 1, "Error\n"), ("exit", 1, "said\n")):
        command = [sys.executable, "-c", program, "try", how]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert (done.returncode, done.stdout) == (code, "x" * 100_000 + "\ntidied\n"), done.stderr
        assert done.stderr.endswith(said)
