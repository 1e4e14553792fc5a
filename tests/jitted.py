"""What a test runs once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


def run(fn: Callable[..., Any], *args: Any) -> Any:
    """`fn` of the arguments, jitted: one program in place of one an operation."""
    return jax.jit(fn)(*args)
