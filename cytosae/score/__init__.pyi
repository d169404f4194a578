from .config import ScoreConfig as ScoreConfig
from .report import ScorePlan as ScorePlan
from .report import ScoreResult as ScoreResult
from .run import plan_score as plan_score
from .run import score_sae as score_sae
