from .config import CompareConfig as CompareConfig
from .config import describe_left_out as describe_left_out
from .differential import compare as compare
from .patient_values import DRAWS as DRAWS
from .patient_values import choose_number as choose_number
from .permutation import combine_draws as combine_draws
from .permutation import permutation_test as permutation_test
from .report import Comparison as Comparison
