"""Weights that share values by hashing: no index is stored."""

from kernels_pallas.hashed_matmul import Hashing as Hashing

from ._array import HashedArray as HashedArray
from ._fit import fit_hashed as fit_hashed
from ._hashed import hash_params as hash_params
from ._hashed import hashed as hashed
