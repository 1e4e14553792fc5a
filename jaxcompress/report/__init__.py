"""Reports on compressed trees."""

from ._size import SizeReport as SizeReport
from ._size import SizeRow as SizeRow
from ._size import size as size
from ._size import sparsity as sparsity
