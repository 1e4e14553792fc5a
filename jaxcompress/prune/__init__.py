"""Pruning: masks in training, bitmasks in storage."""

from ._bitmask import BitmaskArray as BitmaskArray
from ._masked import MaskedArray as MaskedArray
from ._pattern import Pattern as Pattern
from ._prune import magnitude as magnitude
from ._prune import random as random
from ._threshold import lowest as lowest
from ._threshold import rank as rank
from ._training import PruneState as PruneState
