"""Mergeable statistics of the rows that enter a weight's matmul."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.lift import _histogram


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Statistics:
    """Sums over the rows that entered a weight's matmul; mergeable.

    The channels are the weight's contracting axes flattened, in the order of its
    `Axes.contract`; scanned layers and experts stack in front. All float32.

    Attributes:
      count: ``[*stack]`` rows seen.
      absmax: ``[*stack, K]`` largest magnitude of each channel.
      total: ``[*stack, K]`` sum.
      total_square: ``[*stack, K]`` sum of squares.
      gram: ``[*stack, K, K]`` sum of ``x x^T``, or None.
      low: ``[*stack]`` lowest entry of all channels, or 0 if none is negative.
      high: ``[*stack]`` highest entry, or 0 if none is positive.
      average_low: ``[*stack]`` moving average of `low` over batches, or None.
      average_high: Likewise of `high`.
      counts: ``[*stack, BINS]`` histogram, of the bins of `histogram_edges`; of a
        sample of the rows where there are many. Or None.
    """

    count: jax.Array
    absmax: jax.Array
    total: jax.Array
    total_square: jax.Array
    gram: jax.Array | None = None
    low: jax.Array | None = None
    high: jax.Array | None = None
    average_low: jax.Array | None = None
    average_high: jax.Array | None = None
    counts: jax.Array | None = None

    @property
    def mean(self) -> jax.Array:
        """Mean of each channel; zero where no row was seen."""
        return self.total / jnp.maximum(self.count, 1.0)[..., None]

    @property
    def second_moment(self) -> jax.Array:
        """Mean square of each channel; zero where no row was seen."""
        return self.total_square / jnp.maximum(self.count, 1.0)[..., None]

    def merge(self, other: Statistics) -> Statistics:
        """Statistics of both sets of rows; the shapes must be equal.

        Commutative and, but for rounding, associative; averages weigh as many rows
        as they are of. What one of the two lacks, the result lacks.
        """
        rows = jnp.maximum(self.count + other.count, 1.0)
        mean = lambda a, b: (a * self.count + b * other.count) / rows
        how = {"absmax": jnp.maximum, "low": jnp.minimum, "high": jnp.maximum}
        how |= {"average_low": mean, "average_high": mean}
        return self._each(lambda name, a, b: how.get(name, jnp.add)(a, b), other)

    def fold(self) -> Statistics:
        """Merge along the first stack axis."""
        rows = jnp.maximum(self.count.sum(0), 1.0)
        mean = lambda a, axis: (a * self.count).sum(axis) / rows
        how = {"absmax": jnp.max, "low": jnp.min, "high": jnp.max}
        how |= {"average_low": mean, "average_high": mean}
        return self._each(lambda name, a: how.get(name, jnp.sum)(a, axis=0))

    def follow(self, batch: Statistics, momentum: float) -> Statistics:
        r"""Merge a batch, :math:`a \leftarrow m a + (1 - m) a_{batch}` of the averages.

        Stack entries that saw no row in the batch, or none before it, do not mix.
        """

        def mix(a: Any, b: Any) -> Any:
            if a is None or b is None:
                return b
            mixed = jnp.where(self.count > 0, momentum * a + (1.0 - momentum) * b, b)
            return jnp.where(batch.count > 0, mixed, a)

        return dataclasses.replace(
            self.merge(batch),
            average_low=mix(self.average_low, batch.low),
            average_high=mix(self.average_high, batch.high),
        )

    def start_averages(self) -> Statistics:
        """The statistics of a first batch, with averages to `follow` others."""
        return dataclasses.replace(self, average_low=self.low, average_high=self.high)

    def _each(self, f: Callable[..., Any], *others: Statistics) -> Statistics:
        """`f(name, *values)` of every field that all have."""
        fields = {}
        for field in dataclasses.fields(self):
            values = [getattr(s, field.name) for s in (self, *others)]
            missing = any(v is None for v in values)
            fields[field.name] = None if missing else f(field.name, *values)
        return Statistics(**fields)


def statistics(
    x: jax.Array,
    *,
    weights: jax.Array | None = None,
    gram: bool = False,
    histogram: bool = False,
) -> Statistics:
    """Statistics of the rows of `x`.

    Args:
      x: ``float[*stack, rows, K]``.
      weights: ``[*stack, rows]`` of 0 and 1: rows to leave out are 0.
      gram: Also ``X^T X``.
      histogram: Also the histogram of all entries.

    Examples:
      >>> s = statistics(jnp.array([[1.0, -2.0], [3.0, 0.0]]), histogram=True)
      >>> float(s.low), float(s.high), s.counts.sum().item()
      (-2.0, 3.0, 4.0)
    """
    x = x.astype(jnp.float32)
    if weights is not None:
        x = x * weights[..., None]
        count = weights.sum(-1)
    else:
        count = jnp.full(x.shape[:-2], x.shape[-2], jnp.float32)
    high, low = x.max(-2, initial=0.0), x.min(-2, initial=0.0)
    return Statistics(
        count=count,
        absmax=jnp.maximum(high, -low),
        total=x.sum(-2),
        total_square=jnp.square(x).sum(-2),
        gram=jnp.matmul(jnp.matrix_transpose(x), x, precision="highest")
        if gram
        else None,
        low=low.min(-1, initial=0.0),
        high=high.max(-1, initial=0.0),
        counts=_histogram.histogram(x, weights) if histogram else None,
    )
