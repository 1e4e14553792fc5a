"""Weight-only low-bit matmul."""

from .api import Choice as Choice
from .api import choose as choose
from .api import quantized_matmul as quantized_matmul
from .reference import dequantize as dequantize
