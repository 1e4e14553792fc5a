"""Pruning the smallest weights, or any: magnitude and random."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxcompress.prune._pattern import Pattern, Scope, as_pattern
from jaxcompress.prune._training import AxesOption, by_score
from jaxcompress.schedules import Schedule
from jaxcompress.transform import Site, Transform, leaf_key


def magnitude(
    *,
    sparsity: float | Schedule | Pattern,
    scope: Scope = "layer",
    every: int = 1,
    axes: AxesOption = None,
) -> Transform:
    r"""Hold the weights of smallest magnitude at zero.

    Exactly :math:`\lfloor s n + 1/2 \rfloor` of `n` weights are pruned, ties in order
    of position. What is pruned stays pruned.

    Args:
      sparsity: Fraction pruned, in [0, 1); or a schedule of it, from
        `jaxcompress.schedules`; or a `Pattern`.
      scope: ``"layer"``: of every weight (of every layer of a scanned stack);
        ``"global"``: of all weights given to the transform together.
      every: Updates between two changes of the masks.
      axes: Contracting axes of the weights, or `Axes`; needed above rank 2 where no
        function was traced.

    Raises:
      ValueError: If `sparsity`, `scope` or `every` is out of range; from ``init`` if
        a weight is not finite or its axes are unknown.

    Examples:
      >>> scheme = magnitude(sparsity=0.5)
      >>> w = jnp.array([[1.0, -4.0], [3.0, 2.0]])
      >>> scheme.compress(*scheme.init({"w": w}))["w"].materialize().tolist()
      [[0.0, -4.0], [3.0, 0.0]]

    References:
      Han et al., `Learning both Weights and Connections
      <https://arxiv.org/abs/1506.02626>`_, 2015, section 3; Zhu & Gupta, 2017
      (gradual). Differs: pruned weights do not come back.
    """
    by = "prune.magnitude"
    pattern = as_pattern(sparsity, scope, by)
    return by_score(
        lambda w, site: jnp.abs(w.astype(jnp.float32)),
        pattern,
        by=by,
        every=every,
        axes=axes,
    )


def random(
    *,
    sparsity: float | Schedule | Pattern,
    key: jax.Array,
    scope: Scope = "layer",
    every: int = 1,
    axes: AxesOption = None,
) -> Transform:
    """Hold weights chosen at random at zero.

    Args:
      sparsity: As for `magnitude`.
      key: Decides the order in which weights go; the same for the same path.
      scope: As for `magnitude`.
      every: As for `magnitude`.
      axes: As for `magnitude`.

    Raises:
      ValueError: As for `magnitude`.
    """
    by = "prune.random"

    def score(w: jax.Array, site: Site) -> jax.Array:
        return jax.random.uniform(leaf_key(key, site), w.shape, jnp.float32)

    pattern = as_pattern(sparsity, scope, by)
    return by_score(score, pattern, by=by, every=every, axes=axes)
