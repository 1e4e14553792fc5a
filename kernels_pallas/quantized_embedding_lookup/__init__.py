"""Rows of a table of few bits."""

from .api import choose as choose
from .api import quantized_embedding_lookup as quantized_embedding_lookup
