"""Model compression for JAX: pure function transforms over parameter pytrees."""

from . import codebook as codebook
from . import distill as distill
from . import hashing as hashing
from . import io as io
from . import lowrank as lowrank
from . import optim as optim
from . import precision as precision
from . import presets as presets
from . import prune as prune
from . import quant as quant
from . import report as report
from . import schedules as schedules
from . import tree as tree
from .layout import Axes as Axes
from .leaf import Leaf as Leaf
from .leaf import OrderError as OrderError
from .leaf import is_leaf as is_leaf
from .leaf import materialize as materialize
from .lift import LiftError as LiftError
from .lift import calibrate as calibrate
from .lift import compress as compress
from .lift import explain as explain
from .lift import lift as lift
from .lift import plan as plan
from .lift import trace_axes as trace_axes
from .lift import wrap as wrap
from .sharding import shardings as shardings
from .straight_through import StraightThrough as StraightThrough
from .transform import Transform as Transform
from .transform import chain as chain
from .transform import identity as identity
from .transform import select as select
from .tree import merge as merge
from .tree import partition as partition
from .tree import weight_decay_mask as weight_decay_mask
from .tree import where as where

__version__ = "0.1.0"
