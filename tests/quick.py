"""Compilation without optimizations: for tests whose time is that of XLA."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}

quick = functools.partial(jax.jit, compiler_options=QUICK)
"""`jax.jit`, for what a test calls directly: it does not nest."""


def run(fn: Callable[..., Any], *args: Any) -> Any:
    """`fn` of the arguments, jitted."""
    return jax.jit(fn).lower(*args).compile(compiler_options=QUICK)(*args)
