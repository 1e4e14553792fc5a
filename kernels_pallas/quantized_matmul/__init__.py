"""Weight-only low-bit matmul."""

from .api import choose as choose
from .api import quantized_matmul as quantized_matmul
from .reference import dequantize as dequantize
