from .run import MOST_AT_ONCE as MOST_AT_ONCE
from .run import SweepResult as SweepResult
from .run import sweep as sweep
