"""Matmul of int8 activations and integer weights, summed in int32."""

from .api import int8_matmul as int8_matmul
from .reference import quantize_rows as quantize_rows
