"""Where things lie, for all tests."""

from pathlib import Path

ROOT = Path(__file__).parents[2]  # of the repository
GOLDEN = ROOT / "tests" / "golden"
SHARED = ROOT.parent / "shared" / "data"  # real cells; tests that need them are skipped where it is not there
