"""The walker: runs any function on compressed leaves, and looks inside it."""

from ._algorithm import Algorithm as Algorithm
from ._algorithm import Layer as Layer
from ._calibrate import calibrate as calibrate
from ._compress import compress as compress
from ._explain import Explanation as Explanation
from ._explain import UseSite as UseSite
from ._explain import explain as explain
from ._explain import trace_axes as trace_axes
from ._histogram import histogram_edges as histogram_edges
from ._lift import lift as lift
from ._lift import wrap as wrap
from ._plan import Plan as Plan
from ._plan import Planned as Planned
from ._plan import plan as plan
from ._statistics import Statistics as Statistics
from ._statistics import statistics as statistics
from ._sweep import sweep as sweep
from ._tracked import LiftError as LiftError
