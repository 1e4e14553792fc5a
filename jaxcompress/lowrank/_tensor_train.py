"""Tensor trains: a matrix as a chain of small cores, indexed digit by digit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.layout import Axes
from jaxcompress.leaf import (
    WEIGHT,
    LayoutOp,
    Leaf,
    Ran,
    Transpose,
    component,
    dense_dot_general,
    leaf_type,
    relayout,
    result_dtype,
    static,
)
from jaxcompress.lowrank._decompose import truncated_svd
from jaxcompress.lowrank._factors import (
    CompositeLeaf,
    contract,
    factor_specs,
    narrowed,
    product,
    wide,
)
from jaxcompress.lowrank._matrix import AxesOption, Matrix
from jaxcompress.transform import Transform, identity
from jaxcompress.values import Site, replace_weights


@leaf_type
class TensorTrainArray(CompositeLeaf):
    r"""A matrix whose rows and columns are numbers of several digits.

    .. math:: W_{(i_1 \ldots i_d), (j_1 \ldots j_d)} =
        G^1_{i_1,j_1} G^2_{i_2,j_2} \cdots G^d_{i_d,j_d}

    a product of matrices, the first a row and the last a column. A look-up reads one
    slice of each core; a matmul contracts one core after another.

    Attributes:
      cores: ``float[*stack, a, rows, columns, b]``, or a leaf, for each digit.
      height: Rows of the matrix; those of the cores beyond them are padding.
      width: Columns, likewise.
    """

    cores: tuple[Any, ...] = component(role=WEIGHT)
    height: int = static()
    width: int = static()

    @property
    def stack(self) -> int:
        """How many leading axes stack independent weights."""
        return self.cores[0].ndim - 4

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""
        return (*self.cores[0].shape[: self.stack], self.height, self.width)

    @property
    def method(self) -> str:
        """``"tensor train 8"``: its largest rank."""
        return f"tensor train {max(c.shape[-1] for c in self.cores)}{self.kind}"

    def parts(self) -> tuple[Any, ...]:
        """The cores."""
        return self.cores

    def with_parts(self, parts: Sequence[Any]) -> TensorTrainArray:
        """Others."""
        return self.replace(cores=tuple(parts))

    def part_axes(self) -> tuple[Axes, ...]:
        """The rank that comes in and the rows are contracted."""
        axes = Axes(contract=(-4, -3), stack=self.stack)
        return (axes,) * len(self.cores)

    def materialize(self) -> jax.Array:
        """The dense matrix."""
        stack = self.cores[0].shape[: self.stack]
        w = jnp.ones((*stack, 1, 1, 1), jnp.float32)  # [rows, columns, b] so far.
        for core in map(wide, self.cores):
            *_, rows, columns, b = w.shape
            *_, n, m, rank = core.shape
            w = product(
                w.reshape(*stack, rows * columns, b),
                core.reshape(*stack, b, n * m * rank),
            )
            w = w.reshape(*stack, rows, columns, n, m, rank)
            w = jnp.swapaxes(w, -4, -3)
            w = w.reshape(*stack, rows * n, columns * m, rank)
        w = w.reshape(*w.shape[:-1])[..., : self.height, : self.width]
        return w.astype(self.dtype)

    def relayout(self, op: LayoutOp) -> Leaf:
        """Casts, and the transpose of the matrix."""
        if not isinstance(op, Transpose):
            return super().relayout(op)
        n = self.stack
        if op.permutation != (*range(n), n + 1, n):
            return NotImplemented
        swap = Transpose(permutation=(*range(n + 1), n + 2, n + 1, n + 3))
        cores = [relayout(core, swap) for core in self.cores]
        if any(core is NotImplemented for core in cores):
            return NotImplemented
        return self.replace(cores=tuple(cores), height=self.width, width=self.height)

    def stacked(self, ndim: int) -> Leaf:
        """As it is, where the first axes are stacks."""
        return self if self.stack >= ndim else NotImplemented

    def dot_general(
        self, x: jax.Array, dimension_numbers: Any, *, leaf_is_lhs: bool, **params: Any
    ) -> Ran:
        """Core by core, where a single matrix is contracted along one axis."""
        contracts, batches = dimension_numbers
        i, j = (0, 1) if leaf_is_lhs else (1, 0)
        turned: Any = self
        if not self.stack and tuple(contracts[i]) == (1,):
            turned = self.relayout(Transpose(permutation=(1, 0)))
        whole = len(contracts[i]) == 1 and not batches[0]
        if not whole or self.stack or turned is NotImplemented:
            return dense_dot_general(
                self, x, dimension_numbers, leaf_is_lhs=leaf_is_lhs, **params
            )
        rows = jnp.moveaxis(x, contracts[j][0], -1)
        precision = params.get("precision")
        dtype = result_dtype(x, self, params)
        y = narrowed(_through(turned, rows, precision), dtype)
        return Ran(
            jnp.moveaxis(y, -1, 0) if leaf_is_lhs else y, f"{self.method}: chain"
        )

    def take(self, index: jax.Array) -> jax.Array:
        """A slice of each core for each digit of the rows."""
        if self.stack:
            return NotImplemented
        y = jnp.ones((*index.shape, 1, 1), jnp.float32)  # [columns so far, b].
        place = math.prod(c.shape[-3] for c in self.cores)
        for core in self.cores:
            n, m, rank = core.shape[-3:]
            place //= n
            # Digits first: rows of a table of slices.
            slices = jnp.moveaxis(wide(core), 1, 0)[(index // place) % n]
            slices = slices.reshape(*index.shape, slices.shape[-3], m * rank)
            y = product(y, slices)
            y = y.reshape(*index.shape, -1, rank)
        return y.reshape(*index.shape, -1)[..., : self.width].astype(self.dtype)

    def component_specs(
        self, spec: Sequence[Any], sizes: dict[Any, int]
    ) -> TensorTrainArray:
        """Whole on every device: the cores are small, and no axis is a core's own."""
        own = [*spec[: self.stack], None, None, None, None]
        return self.with_parts([factor_specs(c, own, sizes) for c in self.cores])


def _through(leaf: TensorTrainArray, rows: jax.Array, precision: Any) -> jax.Array:
    """``float32[..., width]`` of rows ``[..., height]`` and a single matrix."""
    *lead, height = rows.shape
    digits = [c.shape[-3] for c in leaf.cores]
    full = math.prod(digits)
    y = rows.reshape(-1, height)
    y = jnp.pad(y, ((0, 0), (0, full - height))).reshape(y.shape[0], 1, 1, full)
    rest = full
    for core in leaf.cores:
        n, b = core.shape[1], core.shape[-1]
        rest //= n
        # [x, columns so far, a, rows]: this digit's rows and the rank come last.
        y = y.reshape(*y.shape[:3], n, rest)
        y = jnp.transpose(y, (0, 1, 4, 2, 3))
        numbers = (((3, 4), (0, 1)), ((), ()))
        ran = contract(
            narrowed(y, rows.dtype),
            core,
            numbers,
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        y = jnp.transpose(ran.out, (0, 1, 3, 4, 2))  # [x, columns, m, b, rest]
        y = y.reshape(y.shape[0], -1, b, rest)
    return y.reshape(*lead, -1)[..., : leaf.width]


def tensor_train(
    *,
    rows: Sequence[int],
    columns: Sequence[int],
    rank: int,
    axes: AxesOption = None,
) -> Transform:
    r"""Replace each matrix by a tensor train, one digit of rows and columns a core.

    The cores come from one truncated decomposition after another, digit by digit.

    Args:
      rows: Sizes of the digits of the rows; their product is at least the rows there
        are, and what is beyond them is padding. Static.
      columns: Of the columns, as many. Static.
      rank: The largest rank between two cores. Static.
      axes: As for `svd`; the first axis that does not stack has the rows. Static.

    Returns:
      A transform whose ``init`` puts a `TensorTrainArray` in place of each weight; its
      cores are trained. The error is at most :math:`\sqrt{d - 1}` of the least of the
      ranks, and none where the ranks do not truncate.

    Raises:
      ValueError: If digits or rank are out of range; from ``init`` if a weight is not a
        matrix or has more rows or columns than the digits.

    Examples:
      >>> table = jnp.ones((10, 6))
      >>> scheme = tensor_train(rows=(3, 4), columns=(3, 2), rank=4)
      >>> leaf = scheme.init({"w": table})[0]["w"]
      >>> leaf, [core.shape for core in leaf.cores]
      (TensorTrainArray(tensor train 4, float32[10, 6]), [(1, 3, 3, 4), (4, 4, 2, 1)])

    References:
      Oseledets, `Tensor-Train Decomposition <https://doi.org/10.1137/090752286>`_,
      2011, Algorithm 1 and Theorem 2.2; Novikov et al., `Tensorizing Neural Networks
      <https://arxiv.org/abs/1509.06569>`_, 2015, section 3; Hrinchuk et al.,
      `Tensorized Embedding Layers <https://arxiv.org/abs/1901.10787>`_, 2020.
    """
    by = "lowrank.tensor_train"
    digits = tuple(zip(rows, columns, strict=False))
    if len(rows) != len(columns) or len(rows) < 2 or min(*rows, *columns) < 1:
        raise ValueError(
            f"{by}: rows and columns must have as many digits, at least 2, all "
            f"positive; got {tuple(rows)} and {tuple(columns)}."
        )
    if rank < 1:
        raise ValueError(f"{by}: rank must be positive; got {rank}.")

    def factored(w: jax.Array, site: Site) -> TensorTrainArray:
        stated = site.axes if axes is None else axes
        matrix = Matrix.of(w, stated, path=site.path, who=by)
        if len(matrix.left) > 1 or len(matrix.right) > 1:
            raise ValueError(
                f"{by}: a weight must be a matrix; {site.path!r} has shape {w.shape} "
                f"and {matrix.roles}. Leave it out of the rule."
            )
        height, width = w.shape[-2:]
        if math.prod(rows) < height or math.prod(columns) < width:
            raise ValueError(
                f"{by}: digits must hold {(height, width)}, the rows and columns of "
                f"{site.path!r}; {tuple(rows)} and {tuple(columns)} hold "
                f"{(math.prod(rows), math.prod(columns))}."
            )
        cores = decompose(matrix.of_weight(w), digits, rank)
        return TensorTrainArray(
            cores=tuple(c.astype(w.dtype) for c in cores), height=height, width=width
        )

    def init(params: Any) -> tuple[Any, tuple[()]]:
        ready = lambda x, path: isinstance(x, TensorTrainArray)
        return replace_weights(factored, params, ready=ready, by=by), ()

    return identity()._replace(init=init)


def decompose(
    w: jax.Array, digits: Sequence[tuple[int, int]], rank: int
) -> list[jax.Array]:
    """Cores ``[*stack, a, n, m, b]`` of matrices ``float32[*stack, rows, columns]``."""
    *stack, height, width = w.shape
    rows, columns = zip(*digits, strict=True)
    extra = math.prod(rows) - height, math.prod(columns) - width
    w = jnp.pad(w, [(0, 0)] * len(stack) + [(0, extra[0]), (0, extra[1])])
    w = w.reshape(*stack, *rows, *columns)
    s, d = len(stack), len(digits)
    pairs = [axis for i in range(d) for axis in (s + i, s + d + i)]
    rest = jnp.transpose(w, (*range(s), *pairs)).reshape(*stack, 1, -1)
    cores, a = [], 1
    for n, m in digits[:-1]:
        rest = rest.reshape(*stack, a * n * m, -1)
        b = min(rank, *rest.shape[-2:])
        u, sizes, vt = truncated_svd(rest, b)
        rest = sizes[..., :, None] * vt  # What is left to fit, in its true size.
        cores.append(u.reshape(*stack, a, n, m, b))
        a = b
    return _even([*cores, rest.reshape(*stack, a, *digits[-1], 1)])


def _even(cores: list[jax.Array]) -> list[jax.Array]:
    """The same train by cores of equal norms."""
    axes = (-4, -3, -2, -1)
    norms = [jnp.sqrt(jnp.square(c).sum(axes, keepdims=True)) for c in cores]
    safe = [jnp.where(n > 0, n, 1.0) for n in norms]
    share = math.prod(safe) ** (1.0 / len(cores))
    return [c * (share / n) for c, n in zip(cores, safe, strict=True)]
