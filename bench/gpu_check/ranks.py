"""Training in several processes, each with its own GPU: does it start, as one process, and end when one is killed?

python ranks.py OUT [--processes 2] [--device cuda]        writes OUT/ranks.json
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench/

from common import WIDTH, chunk_sizes, now, write_cache
from gpu_check.sections import Sections
from sae_run import tokens_of_few_atoms

from cytosae.sae import load_sae

IMAGES, TOKENS, BATCH = 1_024, 400_000, 8_192
KILL_AFTER = 20  # seconds: loading torch and compiling kernels is over


class Ranks:
    """Runs on one cache in a temporary folder."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.o, self.folder = options, folder
        self.cache = folder / "a.acts.zarr"
        sizes = chunk_sizes(IMAGES, 256)
        blocks = (tokens_of_few_atoms(n, WIDTH, seed=number) for number, n in enumerate(sizes))
        write_cache(self.cache, blocks, n_images=IMAGES, width=WIDTH, chunk_images=256)

    def _command(self, name: str, processes: int, tokens: int) -> list[str]:
        project = Path(__file__).resolve().parents[2]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += [str(project / "cli.py"), "sae", "train", str(self.cache), "-o", str(self.folder / name)]
        command += ["--device", self.o.device, "--expansion", "8", "--l1", "1e-3", "--warmup-steps", "10"]
        return [*command, "--batch-tokens", str(BATCH), "--tokens", str(tokens)]

    def compared(self) -> dict[str, Any]:
        """The largest relative difference of a weight between one process and all of them, and the seconds of both."""
        found: dict[str, Any] = {}
        for name, processes in (("one", 1), ("all", self.o.processes)):
            began = now()
            subprocess.run(self._command(name, processes, TOKENS), check=True)
            found[f"{name}, seconds"] = (now() - began).seconds
        one, every = (load_sae(self.folder / name, device="cpu").model.state_dict() for name in ("one", "all"))
        largest = [float((every[key] - value).abs().max() / value.abs().max()) for key, value in one.items()]
        return found | {"largest_relative_difference": max(largest)}

    def killed(self) -> dict[str, Any]:
        """Seconds from the kill of one process until torchrun has ended all, and what is left of the run."""
        with subprocess.Popen(self._command("killed", self.o.processes, 1_000 * TOKENS)) as torchrun:
            time.sleep(KILL_AFTER)
            children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
            os.kill(int(children[-1]), signal.SIGKILL)
            began = time.perf_counter()
            status = torchrun.wait(60)
        states = [path.name for path in self.folder.rglob("state-*.safetensors")]
        return {"seconds": time.perf_counter() - began, "exit": status, "states": states}


def main() -> None:
    """Run both sections."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="cyto-ranks-"))
    try:
        ranks, sections = Ranks(options, folder), Sections(options.out / "ranks.json")
        sections.run("one process and all", partial(ranks.compared))
        sections.run("one is killed", ranks.killed)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
