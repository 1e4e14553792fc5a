"""Mixed precision training: policies, loss scaling, low-precision matmuls."""

from ._delayed import DelayedScalingArray as DelayedScalingArray
from ._delayed import delayed_scaling as delayed_scaling
from ._loss_scale import LossScale as LossScale
from ._loss_scale import LossScalingState as LossScalingState
from ._loss_scale import loss_scale as loss_scale
from ._loss_scale import loss_scaling as loss_scaling
from ._low_precision import LowPrecisionArray as LowPrecisionArray
from ._low_precision import low_precision as low_precision
from ._low_precision import low_precision_params as low_precision_params
from ._low_precision import matmul_fp8 as matmul_fp8
from ._low_precision import matmul_int8 as matmul_int8
from ._matmul import dot_general as dot_general
from ._observe import observe as observe
from ._policy import FULL as FULL
from ._policy import MIXED_BF16 as MIXED_BF16
from ._policy import MIXED_F16 as MIXED_F16
from ._policy import Policy as Policy
from ._policy import apply as apply
from ._policy import cast as cast
