"""Matmul by a weight whose values are shared by hashing."""

from .api import choose as choose
from .api import hashed_matmul as hashed_matmul
from .look_up import look_up as look_up
from .reference import Hashing as Hashing
from .reference import dequantize as dequantize
from .reference import places as places
from .sums import exact_sums as exact_sums
