"""Low-bit matmul of rows sorted by expert with the weights of their expert."""

from .api import choose as choose
from .api import ragged_quantized_matmul as ragged_quantized_matmul
