from .config import RunConfig as RunConfig
from .page import ReportResult as ReportResult
from .page import write_run_report as write_run_report
from .plan import RunPlan as RunPlan
from .recipe import Recipe as Recipe
from .recipe import read_recipe as read_recipe
from .run import RunResult as RunResult
from .run import run_pipeline as run_pipeline
