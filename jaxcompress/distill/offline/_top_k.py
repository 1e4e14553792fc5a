"""A teacher's largest logits, and how much probability the others have."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxcompress.distill._logits import check_float, check_positive, require_defined

MAX_SHORT = 2**16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TopK:
    r"""A teacher's distribution over its k likeliest classes and "any other".

    .. math:: p_j = (1 - e^{r}) \, \sigma(v / T)_j, \quad p_{rest} = e^{r}

    Attributes:
      indices: ``uint16[..., k]`` classes by falling logit; ``uint32`` for more
        than 65,536 classes.
      values: ``float16[..., k]`` logits less the largest one, so at most zero.
      residual: ``float32[..., temperatures]``, for each temperature the logarithm
        of the probability of all other classes; ``-inf`` if there are none.
      temperatures: What `residual` was taken at. Static.
      classes: Size of the vocabulary. Static.
    """

    indices: jax.Array
    values: jax.Array
    residual: jax.Array
    temperatures: tuple[float, ...] = dataclasses.field(metadata={"static": True})
    classes: int = dataclasses.field(metadata={"static": True})


def top_k(
    logits: jax.Array, k: int, temperature: float | Sequence[float] = 1.0
) -> TopK:
    r"""Keep a teacher's k largest logits and the probability of the rest.

    .. math::
        v_j = z_j - \max z, \quad
        r_T = \log \sum_{j \notin top} e^{z_j / T} - \log \sum_j e^{z_j / T}

    The values serve every temperature, since they are only divided by it. The residual
    at one temperature says nothing about another, so it is taken at each that a loss
    will ask for.

    Args:
      logits: ``float[..., classes]``.
      k: How many to keep, up to `classes`. Static.
      temperature: One or several. Static.

    Returns:
      6 k bytes an example, or 4 k up to 65,536 classes, and 4 a temperature. A value
      is off by at most ``2**-11`` of itself (``float16``; ``bfloat16`` would be off
      by ``2**-8``, and its range is not needed). For k of all classes nothing is
      left out.

    Raises:
      ValueError: If `k` or a temperature is out of range, or, outside `jit`, the
        logits define no distribution.

    Examples:
      >>> kept = top_k(jnp.log(jnp.array([0.125, 0.5, 0.125, 0.25])), 2)
      >>> kept.indices.tolist(), jnp.exp(kept.residual).round(5).tolist()
      ([1, 3], [0.25])
    """
    who = "distill.top_k"
    check_float(who, "logits", logits)
    classes, temperatures = logits.shape[-1], _temperatures(who, temperature)
    if not 1 <= k <= classes:
        raise ValueError(
            f"{who}: k must be between 1 and the number of classes, {classes}; got {k}."
        )
    require_defined(who, logits, None)
    z = jax.lax.stop_gradient(jnp.asarray(logits)).astype(jnp.float32)
    values, indices = jax.lax.top_k(z - z.max(-1, keepdims=True), k)
    residuals = [_residual(z, values, indices, t) for t in temperatures]
    return TopK(
        indices=indices.astype(jnp.uint16 if classes <= MAX_SHORT else jnp.uint32),
        values=values.astype(jnp.float16),
        residual=jnp.stack(residuals, -1),
        temperatures=temperatures,
        classes=classes,
    )


def _temperatures(who: str, temperature: float | Sequence[float]) -> tuple[float, ...]:
    given = temperature if isinstance(temperature, Sequence) else (temperature,)
    if not given:
        raise ValueError(f"{who}: temperature must be one or several; got none.")
    for t in given:
        if isinstance(t, Tracer):
            raise ValueError(
                f"{who}: temperature must be a number, not a traced value, since it "
                "is stored with the residual; take the residual at several."
            )
        check_positive(who, "temperature", t)
    return tuple(float(t) for t in given)


def _residual(
    z: jax.Array, values: jax.Array, indices: jax.Array, temperature: float
) -> jax.Array:
    """The logarithm of the others' probability: never of a small difference."""
    others = without(z - z.max(-1, keepdims=True), indices) / temperature
    rest = jax.nn.logsumexp(others, axis=-1)
    top = jax.nn.logsumexp(values / temperature, axis=-1)
    return jax.nn.log_sigmoid(rest - top)


def without(z: jax.Array, indices: jax.Array) -> jax.Array:
    """Logits with ``-inf`` in place of the top classes."""
    return jnp.put_along_axis(z, indices, -jnp.inf, axis=-1, inplace=False)
