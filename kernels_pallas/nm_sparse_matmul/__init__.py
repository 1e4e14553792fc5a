"""Matmul by a weight that keeps N of every M inputs."""

from .api import choose as choose
from .api import nm_sparse_matmul as nm_sparse_matmul
from .layout import NMSparse as NMSparse
from .layout import pack as pack
from .layout import repack as repack
from .layout import restore as restore
from .layout import unpack as unpack
