"""Weights as entries of a codebook: shared scalars, and vectors."""

from ._additive import additive as additive
from ._aqlm import aqlm as aqlm
from ._aqlm import aqlm_weight as aqlm_weight
from ._array import CodebookArray as CodebookArray
from ._beam import beam_search as beam_search
from ._codes import Codes as Codes
from ._e8 import nearest_e8 as nearest_e8
from ._ema import ema as ema
from ._kmeans import kmeans as kmeans
from ._lattice import E8P as E8P
from ._lattice import lattice as lattice
from ._lattice import lattice_weight as lattice_weight
from ._lattice_array import LatticeArray as LatticeArray
from ._lloyd import Clusters as Clusters
from ._lloyd import cluster as cluster
from ._optimal import optimal_entries as optimal_entries
from ._product import product as product
from ._residual import residual as residual
from ._soft import SoftCodedArray as SoftCodedArray
from ._soft import soft_assignment as soft_assignment
