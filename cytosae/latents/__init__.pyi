from .encode import EncodeResult as EncodeResult
from .encode import encode as encode
from .encode import encode_image as encode_image
from .sparsify import round_mantissa as round_mantissa
