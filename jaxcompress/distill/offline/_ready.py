"""What is asked of teacher outputs before they are written."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._top_k import TopK


def ready(who: str, value: Any, examples: np.ndarray, dtype: Any) -> Any:
    """An output as it goes to the file, or the error of what cannot."""
    value = jax.tree.map(np.asarray, value)
    check_examples(who, value, len(examples))
    if dtype is not None and not isinstance(value, TopK) and _is_float(value):
        value = _cast(who, value, jnp.dtype(dtype))
    for a in jax.tree.leaves(value):
        bad = np.isnan(a) if _is_float(a) else np.zeros(a.shape, np.bool_)
        if bad.any():
            first = examples[np.argwhere(bad)[0, 0]]
            raise ValueError(
                f"{who}: outputs must not be NaN; got {bad.sum()} of {a.size}, the "
                f"first at example {first}. Run the teacher in a wider dtype, or put "
                "zeros where positions do not count."
            )
    return value


def _cast(who: str, a: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = a.astype(dtype)
    lost = int((np.isinf(cast) & ~np.isinf(a)).sum())
    if lost:
        raise ValueError(
            f"{who}: outputs must fit in dtype; {lost} of {a.size} overflow {dtype}. "
            "Choose bfloat16 or float32, or subtract the largest logit first."
        )
    return cast


def check_examples(who: str, value: Any, examples: int) -> None:
    """Refuse arrays that have not one entry an example."""
    for a in jax.tree.leaves(value):
        if a.ndim == 0 or a.shape[0] != examples:
            raise ValueError(
                f"{who}: the first axis must be {examples} examples; got shape "
                f"{a.shape}. A teacher answers for every example it is given."
            )


def _is_float(a: np.ndarray) -> bool:
    return bool(jnp.issubdtype(a.dtype, jnp.floating))
