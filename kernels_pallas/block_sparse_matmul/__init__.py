"""Matmul by a weight of which only some blocks are stored."""

from .api import block_sparse_matmul as block_sparse_matmul
from .api import choose as choose
from .layout import BlockSparse as BlockSparse
from .layout import pack as pack
from .layout import repack as repack
from .layout import restore as restore
from .layout import unpack as unpack
