"""Weights as entries of a codebook: shared scalars, and vectors."""

from ._additive import additive as additive
from ._aqlm import aqlm as aqlm
from ._aqlm import aqlm_weight as aqlm_weight
from ._array import CodebookArray as CodebookArray
from ._beam import beam_search as beam_search
from ._codes import Codes as Codes
from ._ema import ema as ema
from ._kmeans import kmeans as kmeans
from ._lloyd import Clusters as Clusters
from ._lloyd import cluster as cluster
from ._optimal import optimal_entries as optimal_entries
from ._product import product as product
from ._residual import residual as residual
