from .encode import encode_image as encode_image
from .encode import round_mantissa as round_mantissa
from .encode import warn_of_precision as warn_of_precision
