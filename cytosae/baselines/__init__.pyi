from .build import BaselineReport as BaselineReport
from .build import write_baseline as write_baseline
from .config import KINDS as KINDS
from .config import BaselineConfig as BaselineConfig
from .config import VersusConfig as VersusConfig
from .report import VersusResult as VersusResult
from .report import difference_text as difference_text
from .versus import compare_with_baselines as compare_with_baselines
