from .encode import EncodeResult as EncodeResult
from .encode import encode as encode
from .encode import encode_image as encode_image
from .settings import check_encoding as check_encoding
from .sparsify import round_mantissa as round_mantissa
