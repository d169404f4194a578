"""Runs every benchmark in turn and prints their JSON lines: `make bench`.

A benchmark that fails does not stop the others; the exit code is 1 then, and the last line on stderr names it.
`--full` takes the sizes of the table of targets (hours on two cores; a GPU where there is one).
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
FULL = {
    "cli_help": [],
    "archives": ["--images", "20000"],
    "loader": ["--images", "16384"],
    "compare": ["--permutations", "1000000", "--rounds", "1"],
    "calibration": ["--runs", "400", "--even-runs", "1500", "--coverage-runs", "40"],
    "barcode": ["--share", "1", "--rounds", "1"],
    "search": ["--share", "1", "--rounds", "3", "--evaluate", "200"],
    "describe": ["--share", "1", "--items", "200"],
    "atlas": ["--share", "1"],
    "encode": ["--images", "256", "--chunk-images", "256"],
    "extract": ["--images", "512", "--batch-size", "32", "--chunk-images", "128"],
    "sae_step": ["--tokens", "16448", "--sweep"],
    "measure": ["--images", "96"],
    "sae_run": ["--steps", "400"],
    "baselines": [],
    "sae_step_gpu": ["--run"],
    "probe": [],
    "score": ["--images", "10000"],
    "probe_intervals": ["--runs", "150"],
    "purity_intervals": ["--runs", "300"],
    "patients": [],
    "tau": [],
    "steering": [],
    "background": ["--cells", "1000"],
    "ablate": ["--images", "171373", "--tokens", "17", "--width", "64", "--latents", "49152"],
    "frontier": ["--steps", "2000"],
}
ON_REQUEST = ("frontier", "steering")  # hours, and libraries in an environment of their own: run_all.py frontier


def main() -> int:
    """Run them; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"only these: {', '.join(FULL)}")
    parser.add_argument("--full", action="store_true", help="the sizes of the table, instead of small ones")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in FULL]
    if unknown:
        parser.error(f"no benchmark {unknown[0]!r}; there are {', '.join(FULL)}")
    failed = []
    for name in options.names or [name for name in FULL if name not in ON_REQUEST]:
        print(f"{name} ...", file=sys.stderr, flush=True)
        began = time.monotonic()
        command = [sys.executable, str(HERE / f"{name}.py"), *(FULL[name] if options.full else [])]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        is_fine = done.returncode == 0 and _is_one_line(done.stdout)
        print(done.stdout, end="", flush=True)
        print(
            f"{name}: {'done' if is_fine else 'FAILED'}, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True
        )
        if not is_fine:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _is_one_line(output: str) -> bool:
    try:
        return len(output.splitlines()) == 1 and isinstance(json.loads(output), dict)
    except ValueError:
        return False


if __name__ == "__main__":
    sys.exit(main())
