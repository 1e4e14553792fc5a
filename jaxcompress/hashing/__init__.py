"""Weights that share values by hashing: no index is stored."""

from kernels_pallas.hashed_matmul import Hashing as Hashing

from ._array import HashedArray as HashedArray
from ._embeddings import ComposedEmbedding as ComposedEmbedding
from ._embeddings import HashEmbedding as HashEmbedding
from ._embeddings import compositional_embedding as compositional_embedding
from ._embeddings import hash_embedding as hash_embedding
from ._embeddings import quotient_remainder_embedding as quotient_remainder_embedding
from ._features import hash_features as hash_features
from ._fit import fit_hashed as fit_hashed
from ._grow import grow as grow
from ._hashed import hash_params as hash_params
from ._hashed import hashed as hashed
from ._shared import shared as shared
