"""The SLURM chain of workflows/ on drawn cells: the steps, their order and what they are called with; and that both
container files do the same.

`sbatch` is one of ours here, which runs a job when it is submitted. With SLURM itself: docs/log.md.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pages import shell
from places import ROOT
from small_runs import draw_cohort

from stores import verify_folder

# As SLURM does: a job runs from a copy of its script, once for each task of an array; it is told what it may have, and
# the number is printed. A job whose dependency did not end well is never run.
SBATCH = """#!{python}
import os, pathlib, re, shutil, subprocess, sys
given = {{name: value for name, _, value in (word[2:].partition("=") for word in sys.argv[1:] if word[:2] == "--")}}
script, *words = [word for word in sys.argv[1:] if word[:2] != "--"]
spool = pathlib.Path(os.environ["SPOOL"])
number = len(list(spool.glob("job-*"))) + 1
state = spool / f"job-{{number}}"
assert not given.get("dependency") or (spool / f"job-{{given['dependency'].split(':')[1]}}").read_text() == "ended well"
shutil.copy(script, spool / "script.sh")
codes = []
first, _, last = given.get("array", "0-0").partition("-")
for task in range(int(first), int(last) + 1):
    told = {{"SLURM_CPUS_PER_TASK": given["cpus-per-task"]}}
    told |= {{"SLURM_ARRAY_TASK_ID": str(task)}} if "array" in given else {{}}
    log = given["output"].replace("%A", str(number)).replace("%j", str(number)).replace("%a", str(task))
    with open(log, "w") as file:
        command = ["bash", str(spool / "script.sh"), *words]
        codes.append(subprocess.run(command, env=os.environ | told, stdout=file, stderr=file).returncode)
state.write_text("failed" if any(codes) else "ended well")
print(number)
"""


@pytest.mark.docs
def test_the_chain_of_slurm(tmp_path: Path) -> None:
    """From images to barcodes and concepts; the second time everything is found complete."""
    draw_cohort(tmp_path, n_patients=3)
    place, out = tmp_path / "bin", tmp_path / "a run"
    place.mkdir()
    (place / "sbatch").write_text(SBATCH.format(python=sys.executable))
    (place / "sbatch").chmod(0o755)
    (place / "activate").write_text(f'PATH="{Path(sys.executable).parent}:$PATH"\n')
    text = (ROOT / "workflows" / "slurm" / "settings.sh").read_text()
    for name, value in {
        "ENVIRONMENT": str(tmp_path),
        "IMAGES": str(tmp_path / "cells.csv"),
        "OUT": f"'{out}'",
        "SHARDS": "2",
        "EXTRACT": "(--backbone random-vit-tiny --device cpu --chunk-images 4)",
        "TRAIN": "(--expansion 2 --k 4 --activation topk --tokens 2000 --batch-tokens 500 --device cpu)",
        "ENCODE": "(--device cpu)",
        "BARCODE": "(--tau 0)",
        "SBATCH_GPU": "(--cpus-per-task=1)",
        "SBATCH_CPU": "(--cpus-per-task=1)",
    }.items():
        text, n = re.subn(rf"^{name}=(\(.*?\)|\S+)", f"{name}={value}", text, flags=re.MULTILINE)
        assert n == 1, name
    (tmp_path / "my.sh").write_text(text)
    submit = f"PATH='{place}:'$PATH bash '{ROOT}/workflows/slurm/submit.sh' my.sh"
    for again in (False, True):
        spool = tmp_path / f"spool-{again}"
        spool.mkdir()
        printed = shell(f"SPOOL='{spool}' {submit}", tmp_path)
        logs = {path.name.split("-")[0]: path.read_text() for path in sorted((out / "logs").iterdir())}
        assert [path.read_text() for path in sorted(spool.glob("job-*"))] == ["ended well"] * 5, logs
        assert printed.startswith("submitted: extract 1, train 2, encode 3, barcode 4, concepts 5; logs in ")
        assert ["already complete" in text for text in logs.values()] == [again] * 5, logs
    for name in ("acts.zarr", "sae", "latents.zarr", "barcodes", "concepts"):
        assert not verify_folder(out / f"cells.{name}").problems
    done = subprocess.run(
        ["bash", str(ROOT / "workflows" / "slurm" / "job.sh"), "count", str(tmp_path / "my.sh")],
        env=os.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (2, "expected extract, train, encode, barcode or concepts; found count\n")


def steps(text: str) -> list[str]:
    """Commands of a container file that put something into the image, in their order; both write options their way."""
    text = re.sub(r"\\\n\s*", "", text).replace("TORCH_INDEX", "index").replace(" --no-cache-dir", "")
    words = re.sub(r"^\s*(RUN )?", "", text, flags=re.MULTILINE).replace("&&", "\n").splitlines()
    return [line.strip() for line in words if re.match(r"\s*(apt-get|rm -rf /var\S+|python|cyto)( |$)", line)]


def test_docker_and_apptainer_take_the_same_steps() -> None:
    """Packages, versions, files and base are those of the other."""
    containers = ROOT / "workflows" / "containers"
    docker, apptainer = (containers / "Dockerfile").read_text(), (containers / "cyto.def").read_text()
    assert len(steps(docker)) == 6
    assert steps(docker) == steps(apptainer)
    copies = re.findall(r"^COPY (.+) \S+$", docker, flags=re.MULTILINE)
    files = re.findall(r"^    (\S+) /src/(\S+)$", apptainer, flags=re.MULTILINE)
    assert [source for source, _ in files] == [target for _, target in files]
    assert {source for source, _ in files} == {name for line in copies for name in line.split()}
    assert all((ROOT / source).exists() for source, _ in files)
    assert re.findall(r"^ARG BASE=(.+)$", docker, re.MULTILINE) == re.findall(
        r"^    base=(.+)$", apptainer, re.MULTILINE
    )
