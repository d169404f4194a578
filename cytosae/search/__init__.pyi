from .config import SearchConfig as SearchConfig
from .config import SearchEvaluationConfig as SearchEvaluationConfig
from .evaluate import evaluate_search as evaluate_search
from .report import SearchEvaluation as SearchEvaluation
from .report import SearchResult as SearchResult
from .run import search_cells as search_cells
from .scale import search_scale as search_scale
