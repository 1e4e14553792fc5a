"""Whether a teacher's logits define a distribution."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental import checkify

_RULE = "must be finite, or -inf for the classes that it excludes, with one class left"
_REMEDY = (
    "Leave such examples out with where=, or run the teacher in a wider dtype: "
    "float16 overflows above 65504."
)


def check_teacher(logits: jax.Array, *, where: jax.Array | None = None) -> jax.Array:
    """The teacher's logits, where they define a distribution; else an error.

    Every loss of logits makes this check by itself where it is called outside `jit`,
    or with logits that `jit` does not trace. A compiled program cannot raise: there,
    call this inside the step and run ``checkify.checkify(step)``, which reports
    the error; without `checkify` the check costs nothing and reports nothing, and NaN
    shows as a NaN loss.

    Args:
      logits: ``float[..., classes]``; -inf excludes a class.
      where: ``bool[...]`` examples to check.

    Returns:
      `logits`.

    Raises:
      ValueError: Outside `jit`, if a counted example has NaN, +inf or no class at all.

    Examples:
      >>> check_teacher(jnp.array([[0.0, -jnp.inf]])).tolist()
      [[0.0, -inf]]
      >>> from jax.experimental import checkify
      >>> step = lambda z: check_teacher(z).sum()
      >>> error, _ = checkify.checkify(jax.jit(step))(jnp.array([[0.0, jnp.inf]]))
      >>> "1 of 1 examples" in error.get()
      True
    """
    who = "distill.check_teacher"
    if not _traced(logits, where):
        require_defined(who, logits, where)
        return logits
    bad = _undefined(logits, where)
    rule = f"{who}: the teacher's logits {_RULE}"
    text = f"{rule}; got {{bad}} of {bad.size} examples that are not. {_REMEDY}"
    checkify.debug_check(~bad.any(), text, bad=bad.sum(dtype=jnp.int32))
    return logits


def require_defined(
    who: str, logits: jax.Array, where: jax.Array | None, what: str = "logits"
) -> None:
    """Raise if logits that are not traced define no distribution."""
    if _traced(logits, where):
        return
    with jax.ensure_compile_time_eval():
        bad = np.asarray(jax.jit(_undefined)(logits, where))
    if bad.any():
        first = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"{who}: the teacher's {what} {_RULE}; got {bad.sum()} of {bad.size} "
            f"examples that are not, the first at {first}. {_REMEDY}"
        )


def _traced(logits: jax.Array, where: jax.Array | None) -> bool:
    return isinstance(logits, Tracer) or isinstance(where, Tracer)


def _undefined(logits: jax.Array, where: jax.Array | None) -> jax.Array:
    # The largest logit is NaN if any is, and -inf if no class is left.
    bad = ~jnp.isfinite(jnp.max(logits, axis=-1))
    return bad if where is None else bad & where
