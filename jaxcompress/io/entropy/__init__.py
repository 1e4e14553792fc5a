"""Entropy coding of arrays of small integers, decoded without loss."""

from ._coder import CODERS as CODERS
from ._coder import Coder as Coder
from ._coder import decode as decode
from ._coder import encode as encode
