"""Weights as products of thin factors."""

from ._array import LowRankArray as LowRankArray
from ._decompose import Triplets as Triplets
from ._decompose import randomized_svd as randomized_svd
from ._decompose import truncated_svd as truncated_svd
from ._rank import RankRule as RankRule
from ._rank import by_bytes as by_bytes
from ._rank import by_energy as by_energy
from ._rank import by_error as by_error
from ._rank import by_ratio as by_ratio
from ._svd import rank_of as rank_of
from ._svd import svd as svd
from ._svd import svd_weight as svd_weight
