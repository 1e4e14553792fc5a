"""Pruning: masks in training, bitmasks in storage."""

from ._bitmask import BitmaskArray as BitmaskArray
from ._masked import MaskedArray as MaskedArray
from ._pattern import Pattern as Pattern
from ._prune import magnitude as magnitude
from ._prune import random as random
from ._threshold import lowest as lowest
from ._threshold import rank as rank
from ._training import PruneState as PruneState
from .structure._choose import choose_units as choose_units
from .structure._cost import Cost as Cost
from .structure._depth import layer_influence as layer_influence
from .structure._depth import merge_layers as merge_layers
from .structure._depth import remove_layers as remove_layers
from .structure._graph import Graph as Graph
from .structure._graph import dependency_graph as dependency_graph
from .structure._importance import filter_norm as filter_norm
from .structure._importance import group_norm as group_norm
from .structure._importance import random_importance as random_importance
from .structure._importance import saliency_sum as saliency_sum
from .structure._removal import Removal as Removal
from .structure._structured import Smaller as Smaller
from .structure._structured import structured as structured
