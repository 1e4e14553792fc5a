"""Distillation losses."""

from ._soft_targets import mix as mix
from ._soft_targets import soft_targets as soft_targets
