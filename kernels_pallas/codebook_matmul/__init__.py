"""Matmul by a vector-quantized weight."""

from .api import choose as choose
from .api import codebook_matmul as codebook_matmul
from .decode import decode as decode
from .layout import CodebookWeight as CodebookWeight
from .layout import repack as repack
from .layout import unpack as unpack
from .reference import dequantize as dequantize
