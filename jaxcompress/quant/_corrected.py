"""`CorrectedArray` and `low_rank_correction_weight`: a leaf plus a low-rank product."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxcompress.layout import Axes, Layout
from jaxcompress.leaf import (
    FROZEN,
    WEIGHT,
    Leaf,
    OrderError,
    component,
    leaf_type,
    static,
)
from jaxcompress.lift import Statistics
from jaxcompress.quant._format import NumberFormat
from jaxcompress.quant._frame import Base, Frame, round_weight
from jaxcompress.quant._matmul import Site
from jaxcompress.quant._quantize import quantize
from jaxcompress.quant._wrapped import WrappedArray, shared_spec, side_dot


@leaf_type
class CorrectedArray(WrappedArray):
    """``w[o, k] = inner[o, k] + scaling * sum_r up[o, r] down[r, k]``.

    The product runs beside the inner leaf's matmul and is never formed. The inner leaf
    is frozen; the factors can be trained. Activations are quantized for the inner leaf
    only (in a convolution, for both).

    Attributes:
      inner: The frozen leaf.
      down: ``float[*stack, *1, R, K]``, or a leaf: from inputs to the rank.
      up: ``float[*stack, *out, R]``, or a leaf: from the rank to outputs.
      scaling: Of the product.
      layout: How the axes lie in storage.
    """

    inner: Leaf = component(role=FROZEN)
    down: Any = component(role=WEIGHT)
    up: Any = component(role=WEIGHT)
    scaling: float = static(default=1.0)
    layout: Layout = static()

    @property
    def method(self) -> str:
        """``"int4 g128 + rank 16"``."""
        return f"{self.inner.method} + rank {self.up.shape[-1]}"

    def map_values(self, f: Any) -> Leaf:
        """Refused.

        Raises:
          OrderError: Always: the sum has no values of its own.
        """
        raise OrderError(
            f"{self.method} is the sum of a frozen weight and a product, on which "
            "another transform has nothing to act; merge_lora it first."
        )

    def _weight(self, inner: jax.Array) -> jax.Array:
        down, up = dense(self.down), dense(self.up)
        sizes = down.shape[: self._outputs]
        stack = max((i + 1 for i, n in enumerate(sizes) if n > 1), default=0)
        product = jnp.matmul(
            up.astype(jnp.float32).reshape(*up.shape[:stack], -1, up.shape[-1]),
            down.astype(jnp.float32).reshape(*down.shape[:stack], *down.shape[-2:]),
            precision="highest",
        )
        return inner + self.scaling * product.reshape(inner.shape)

    def _shared(self) -> tuple[Any, ...]:
        return (self.down,)

    def _beside(self, rows: jax.Array, site: Site, precision: Any) -> jax.Array:
        n = len(site.batch)
        down = self._for_rows(dense(self.down), site)
        down = jnp.broadcast_to(
            down.reshape(*down.shape[:n], *down.shape[-2:]),
            (*rows.shape[:n], *down.shape[-2:]),
        )
        inside = side_dot(rows, down, range(n), precision).astype(rows.dtype)
        batch = [s for _, s in site.batch]
        return self.scaling * side_dot(inside, dense(self.up), batch, precision)

    def prepare_activations(
        self, x: jax.Array, axes: tuple[int, ...] = (-1,)
    ) -> jax.Array:
        """As the inner leaf does."""
        return self.inner.prepare_activations(x, axes)

    def _side_specs(
        self, out: list[Any], major: Any, sizes: dict[Any, int]
    ) -> dict[str, Any]:
        down = shared_spec(self.down, [*out, None, major])
        up = PartitionSpec(*out, None)
        return {
            name: factor.component_specs(tuple(spec), sizes)
            if isinstance(factor, Leaf)
            else spec
            for name, factor, spec in (("down", self.down, down), ("up", self.up, up))
        }


def dense(factor: Any) -> jax.Array:
    """A factor as an array."""
    return factor.materialize() if isinstance(factor, Leaf) else factor


def low_rank_correction_weight(
    w: jax.Array,
    fmt: NumberFormat,
    stats: Statistics | None,
    *,
    rank: int,
    axes: Any = None,
    path: str = "w",
    dtype: Any = jnp.bfloat16,
    factors: NumberFormat | None = None,
    base: Base = round_weight,
) -> Leaf:
    r"""Quantize a weight and add the best low-rank approximation of the error.

    With :math:`E = W - Q`, one row an output, and the gram :math:`G = L L^T`, the
    product is

    .. math:: U_r U_r^T E, \quad U S V^T = E L,

    which of all products of rank `r` has the least error of the outputs,
    :math:`\operatorname{tr}((E - BA) G (E - BA)^T)`.

    Args:
      w: ``float[*stack, *core]`` weight.
      fmt: The number format of the inner weight. Static.
      stats: Of the rows that entered the matmul. Without a gram its diagonal stands for
        it; without data, the error of the weight is approximated.
      rank: Columns of the factors, at most the inputs or the outputs. Static.
      axes: As for `quantize`. Static.
      path: Named in errors. Static.
      dtype: Of the factors. Static.
      factors: Number format of the factors instead, along the inputs of ``A`` and the
        rank of ``B``. Static.
      base: How the weight is quantized. Static.

    Returns:
      A leaf whose output error falls with the rank, up to the rounding of the factors,
      and is never above the base's by more than that.

    Raises:
      ValueError: As `quantize` does; if `rank` is out of range.

    Examples:
      >>> import jaxcompress as jc
      >>> w = jnp.array([[0.4, -0.4], [7.0, 7.0], [0.2, -0.2]])
      >>> @jax.jit
      ... def correct(w):
      ...     leaf = low_rank_correction_weight(w, jc.quant.int4(), None, rank=1)
      ...     return leaf, jnp.abs(leaf.materialize() - w).max()
      >>> leaf, error = correct(w)
      >>> leaf, error.item() < 0.01
      (CorrectedArray(int4 + rank 1, float32[3, 2]), True)

    References:
      Zhang et al., `QERA <https://arxiv.org/abs/2410.06040>`_, 2024, theorem 1; Yao et
      al., `ZeroQuant-V2 <https://arxiv.org/abs/2303.08302>`_, 2023, section 4 (without
      data). Differs: written with the left singular vectors alone, so that a singular
      gram needs no inverse and any square root of it will do.
    """
    who = f"low_rank_correction_weight to {fmt.name}"
    frame = Frame.of(w, fmt, axes=axes, path=path, who=who)
    a = frame.storage(w)
    frame.check_rank(rank, path, who)
    inner = frame.quantized(base, frame.weight(a), fmt, stats, path)
    error = a - frame.storage(inner.materialize())
    error = error.reshape(*frame.stack, -1, frame.inputs)
    u = jnp.linalg.svd(_whitened(error, stats), full_matrices=False)[0][..., :rank]
    down = jnp.matmul(jnp.matrix_transpose(u), error, precision="highest")
    up = u.reshape(*a.shape[:-1], rank)
    down = frame.shared(down, trailing=2)
    if factors is not None:
        last = Axes(contract=(-1,), stack=len(frame.stack))
        fmt = factors.replace(axes=None)
        down, up = (
            quantize(f.astype(dtype), fmt, axes=last, path=path) for f in (down, up)
        )
    else:
        down, up = down.astype(dtype), up.astype(dtype)
    return CorrectedArray(inner=inner, down=down, up=up, layout=frame.layout)


def _whitened(error: jax.Array, stats: Statistics | None) -> jax.Array:
    """``E L`` for a root of the gram; ``E`` itself where there are no data."""
    if stats is None:
        return error
    if stats.gram is None:
        root = jnp.sqrt(stats.total_square)[..., None, :]
        moved = error * root
    else:
        values, vectors = jnp.linalg.eigh(stats.gram)
        root = jnp.sqrt(jnp.maximum(values, 0.0))[..., None, :]
        moved = jnp.matmul(error, vectors, precision="highest") * root
    return jnp.where((stats.count > 0)[..., None, None], moved, error)
