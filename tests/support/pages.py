"""What test_docs.py and other tests share."""

import os
import subprocess
import sys
from pathlib import Path


def shell(script: str, folder: Path) -> str:
    """Run a bash script with this environment's `cyto` and `python` first in the path; everything it printed."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", "-euo", "pipefail", "-c", script]
    environment = {**os.environ, "PATH": path}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr
