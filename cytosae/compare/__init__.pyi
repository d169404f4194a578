from .differential import CompareConfig as CompareConfig
from .differential import Comparison as Comparison
from .differential import compare as compare
from .differential import describe_left_out as describe_left_out
from .patient_values import DRAWS as DRAWS
from .patient_values import choose_number as choose_number
from .permutation import combine_draws as combine_draws
from .permutation import permutation_test as permutation_test
