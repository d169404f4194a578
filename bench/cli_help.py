"""How long does `cyto --help` keep a person waiting, against the interpreter alone (`python -c pass`)?

Target: within 0.3 s of it, so the ratio is 0.3 s / difference. Both run in turns, ten times each; the median counts.
"""

import shutil
import subprocess
import sys
from pathlib import Path

from common import alternate, arguments, emit

ALLOWED_SECONDS = 0.3


def main() -> None:
    """Measure and print one line of JSON."""
    options = arguments(__doc__, rounds=10).parse_args()
    beside = Path(sys.executable).with_name("cyto")
    cyto = str(beside) if beside.exists() else shutil.which("cyto")
    if cyto is None:
        raise SystemExit("no `cyto` command: install the project into this environment (make install)")

    def run(*command: str) -> None:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    ours, baseline = alternate(
        lambda: run(cyto, "--help"), lambda: run(sys.executable, "-c", "pass"), rounds=options.rounds
    )
    difference = ours.seconds - baseline.seconds
    emit(
        "cli_help",
        ratio=ALLOWED_SECONDS / max(difference, 1e-3),
        target=1.0,
        ours={**ours.to_json(1, "calls"), "command": "cyto --help"},
        baseline={**baseline.to_json(1, "calls"), "command": "python -c pass"},
        difference_seconds=difference,
        allowed_seconds=ALLOWED_SECONDS,
        params={"rounds": options.rounds},
    )


if __name__ == "__main__":
    main()
