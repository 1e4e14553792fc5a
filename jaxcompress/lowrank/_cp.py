"""CP: a kernel as a sum of outer products, one vector an axis in each."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.layout import Axes
from jaxcompress.leaf import WEIGHT, Leaf, Ran, component, leaf_type
from jaxcompress.lowrank._factors import (
    CompositeLeaf,
    Way,
    contract,
    factor_specs,
    multiply,
    narrowed,
    product,
    wide,
)
from jaxcompress.lowrank._matrix import AxesOption
from jaxcompress.lowrank._window import Kernel, along_channels, channels_last
from jaxcompress.transform import Transform, identity
from jaxcompress.values import Site, leaf_key, replace_weights

RIDGE = 1e-7
"""Of the normal equations, relative to their trace."""


@leaf_type
class CPArray(CompositeLeaf):
    r"""A kernel as a sum of outer products.

    .. math:: W_{k_1,k_2,i,o} = \sum_r A_{k_1,r}\, B_{k_2,r}\, C_{i,r}\, D_{o,r}

    A convolution runs as a pointwise one, one of the window in each channel alone, and
    another pointwise one.

    Attributes:
      factors: ``float[*stack, n, r]``, or a leaf, for each axis.
    """

    factors: tuple[Any, ...] = component(role=WEIGHT)

    @property
    def stack(self) -> int:
        """How many leading axes stack independent weights."""
        return self.factors[0].ndim - 2

    @property
    def rank(self) -> int:
        """Number of outer products."""
        return self.factors[0].shape[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""
        lead = self.factors[0].shape[: self.stack]
        return (*lead, *(f.shape[-2] for f in self.factors))

    @property
    def method(self) -> str:
        """``"cp 16"``."""
        return f"cp {self.rank}{self.kind}"

    def parts(self) -> tuple[Any, ...]:
        """The factors."""
        return self.factors

    def with_parts(self, parts: Sequence[Any]) -> CPArray:
        """Others."""
        return self.replace(factors=tuple(parts))

    def part_axes(self) -> tuple[Axes, ...]:
        """Axes are contracted, but of the outputs the rank."""
        axes = [Axes(contract=(-2,), stack=self.stack)] * len(self.factors)
        return (*axes[:-1], Axes(contract=(-1,), stack=self.stack))

    def materialize(self) -> jax.Array:
        """The dense kernel."""
        *inner, last = map(wide, self.factors)
        w = product(khatri_rao(inner), jnp.matrix_transpose(last))
        return w.reshape(self.shape).astype(self.dtype)

    def stacked(self, ndim: int) -> Leaf:
        """As it is, where the first axes are stacks."""
        return self if self.stack >= ndim else NotImplemented

    def dot_general(
        self, x: jax.Array, dimension_numbers: Any, *, leaf_is_lhs: bool, **params: Any
    ) -> Ran:
        """Two thin matmuls, if there is no window."""
        n = self.stack
        ways: list[Way] = []
        if self.ndim == n + 2:
            a, b = self.factors
            ways = [Way((-2,), ((a, (n,)), (b, (n + 1,))))]
            ways += [Way((-1,), ((b, (n,)), (a, (n + 1,))))]
        return multiply(
            self,
            x,
            dimension_numbers,
            leaf_is_lhs=leaf_is_lhs,
            stack=n,
            ways=ways,
            **params,
        )

    def conv_general_dilated(self, x: jax.Array, **params: Any) -> Ran:
        """Pointwise, each channel alone, pointwise."""
        if self.stack or not channels_last(params, self.ndim):
            return NotImplemented
        *window, inputs, outputs = self.factors
        numbers = params["dimension_numbers"]
        y = along_channels(x, inputs, numbers.lhs_spec[1], params)
        sizes = tuple(f.shape[-2] for f in window)
        kernel = khatri_rao([wide(f) for f in window]).reshape(*sizes, 1, self.rank)
        alone = params | {
            "feature_group_count": self.rank,
            "preferred_element_type": jnp.float32,
        }
        y = jax.lax.conv_general_dilated(y, kernel, **alone)
        y = jnp.moveaxis(narrowed(y, x.dtype), numbers.out_spec[1], -1)
        ran = contract(
            y,
            outputs,
            (((y.ndim - 1,), (1,)), ((), ())),
            precision=params["precision"],
            preferred_element_type=params["preferred_element_type"],
        )
        out = jnp.moveaxis(ran.out, -1, numbers.out_spec[1])
        return Ran(out, f"{self.method}: three convolutions")

    def component_specs(self, spec: Sequence[Any], sizes: dict[Any, int]) -> CPArray:
        """Each factor as its axis; the rank is not cut."""
        stack = spec[: self.stack]
        own = [[*stack, entry, None] for entry in spec[self.stack :]]
        pairs = zip(self.factors, own, strict=True)
        return self.with_parts([factor_specs(f, s, sizes) for f, s in pairs])


def cp(
    *,
    rank: int,
    key: jax.Array,
    steps: int = 100,
    starts: int = 4,
    axes: AxesOption = None,
) -> Transform:
    r"""Replace each kernel by a sum of `rank` outer products, by alternating fits.

    Each factor in turn is the least-squares fit given the others. Factors start from
    the leading singular vectors of their axis, with normal columns where an axis has
    too few, and again from normal columns alone; the best end is kept.

    Args:
      rank: Number of outer products. Static.
      key: Decides the normal columns.
      steps: Rounds over all factors.
      starts: How often it starts; of a matrix once is enough. Static.
      axes: As for `tucker`. Static.

    Returns:
      A transform whose ``init`` puts a `CPArray` in place of each weight, whose factors
      are trained. No round raises the error; of a matrix it is the least of its rank.

    Raises:
      ValueError: If an option is out of range; from ``init`` if a weight is not finite
        or its axes are others.

    Examples:
      >>> ones = jnp.ones((3, 3, 4, 5))
      >>> scheme = cp(rank=1, key=jax.random.key(0), axes=(-4, -3, -2))
      >>> leaf = scheme.init({"w": ones})[0]["w"]
      >>> leaf, bool(jnp.allclose(leaf.materialize(), ones, atol=1e-5))
      (CPArray(cp 1, float32[3, 3, 4, 5]), True)

    References:
      Kolda & Bader, `Tensor Decompositions and Applications
      <https://doi.org/10.1137/07070111X>`_, 2009, section 3.4; Lebedev et al.,
      `Speeding-up Convolutional Neural Networks Using Fine-tuned CP-Decomposition
      <https://arxiv.org/abs/1412.6553>`_, 2015, section 3.
    """
    by = "lowrank.cp"
    if rank < 1:
        raise ValueError(f"{by}: rank must be positive; got {rank}.")
    if steps < 1 or starts < 1:
        raise ValueError(
            f"{by}: steps and starts must be positive; got {steps} and {starts}."
        )

    def factored(w: jax.Array, site: Site) -> CPArray:
        stated = site.axes if axes is None else axes
        kernel = Kernel.of(w, stated, path=site.path, who=by)
        core = (*kernel.window, kernel.inputs, kernel.outputs)
        draw = leaf_key(key, site)
        fit = lambda a: best_fit(a, rank, draw, steps, starts)
        for _ in kernel.stack:
            fit = jax.vmap(fit)
        factors = fit(jnp.asarray(w).astype(jnp.float32).reshape(*kernel.stack, *core))
        return CPArray(factors=tuple(f.astype(w.dtype) for f in factors))

    def init(params: Any) -> tuple[Any, tuple[()]]:
        ready = lambda x, path: isinstance(x, CPArray)
        return replace_weights(factored, params, ready=ready, by=by), ()

    return identity()._replace(init=init)


@functools.partial(jax.jit, static_argnames=("rank", "starts"))
def best_fit(
    w: jax.Array, rank: int, key: jax.Array, steps: Any, starts: int
) -> tuple[jax.Array, ...]:
    """Factors ``float32[n, rank]`` of each axis, of equal norms."""
    unfolded = [
        jnp.moveaxis(w, axis, 0).reshape(n, -1) for axis, n in enumerate(w.shape)
    ]
    starts = starts if w.ndim > 2 else 1

    def attempt(number: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        keys = jax.random.split(jax.random.fold_in(key, number), w.ndim)
        start = tuple(
            _start(a, rank, k, number == 0) for a, k in zip(unfolded, keys, strict=True)
        )
        factors = _alternate(unfolded, start, steps)
        found = product(factors[0], khatri_rao(factors[1:]).T)
        return jnp.square(found - unfolded[0]).sum(), factors

    errors, factors = jax.lax.map(attempt, jnp.arange(starts, dtype=jnp.int32))
    return tuple(f[errors.argmin()] for f in factors)


def _alternate(
    unfolded: Sequence[jax.Array], start: tuple[jax.Array, ...], steps: Any
) -> tuple[jax.Array, ...]:
    """Factors after so many rounds, of equal norms."""
    count, rank = len(unfolded), start[0].shape[-1]

    def fitted(axis: int, factors: tuple[jax.Array, ...]) -> jax.Array:
        others = [f for i, f in enumerate(factors) if i != axis]
        gram = functools.reduce(jnp.multiply, [product(f.T, f) for f in others])
        ridge = RIDGE * jnp.trace(gram) * jnp.eye(rank, dtype=jnp.float32)
        right = product(unfolded[axis], khatri_rao(others))
        safe = gram + jnp.where(jnp.trace(gram) > 0, ridge, jnp.eye(rank))
        return jax.scipy.linalg.solve(safe, right.T, assume_a="pos").T

    def one_round(_: int, factors: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        for axis in range(count):
            new = fitted(axis, factors)
            if axis < count - 1:  # The last carries the sizes of all.
                new = new / _norms(new)
            factors = (*factors[:axis], new, *factors[axis + 1 :])
        return factors

    factors = jax.lax.fori_loop(0, steps, one_round, start)
    size = _norms(factors[-1], zero=0.0)
    share = size ** (1.0 / count)
    last = factors[-1] / jnp.where(size > 0, size, 1.0)
    return tuple(f * share for f in (*factors[:-1], last))


def khatri_rao(factors: Sequence[jax.Array]) -> jax.Array:
    """``[*stack, n_1 ... n_d, r]``: products of all rows, the first axis slowest."""
    result = factors[0]
    for f in factors[1:]:
        result = result[..., :, None, :] * f[..., None, :, :]
        result = result.reshape(*f.shape[:-2], -1, f.shape[-1])
    return result


def _start(
    unfolded: jax.Array, rank: int, key: jax.Array, first: jax.Array
) -> jax.Array:
    """Normal columns; at first the leading vectors of an axis before them."""
    n = unfolded.shape[0]
    vectors = jnp.linalg.eigh(product(unfolded, unfolded.T))[1][:, ::-1][:, :rank]
    normal = jax.random.normal(key, (n, rank), jnp.float32) / math.sqrt(n)
    led = jnp.concatenate([vectors, normal[:, vectors.shape[1] :]], axis=1)
    return jnp.where(first, led, normal)


def _norms(factor: jax.Array, zero: float = 1.0) -> jax.Array:
    """``[1, r]`` norms of the columns; of a zero column `zero`."""
    norms = jnp.linalg.norm(factor, axis=0, keepdims=True)
    return jnp.where(norms > 0, norms, zero)
