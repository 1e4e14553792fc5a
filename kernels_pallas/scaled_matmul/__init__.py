"""Matmul of quantized activations and quantized weights: int8, and fp8."""

from .api import choose as choose
from .api import fp8_matmul as fp8_matmul
from .api import int8_matmul as int8_matmul
from .rows import quantize_rows as quantize_rows
