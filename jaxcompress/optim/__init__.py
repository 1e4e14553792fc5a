"""Compression inside `optax` optimizers."""

from ._attach import AttachState as AttachState
from ._attach import attach as attach
from ._attach import state as state
