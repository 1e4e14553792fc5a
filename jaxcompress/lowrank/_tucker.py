"""Tucker-2: a convolution as a pointwise, a smaller and another pointwise one."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.layout import Axes
from jaxcompress.leaf import (
    WEIGHT,
    Leaf,
    Ran,
    component,
    dequantize,
    leaf_type,
)
from jaxcompress.lowrank._factors import (
    CompositeLeaf,
    Way,
    contract,
    factor_specs,
    multiply,
    narrowed,
    wide,
)
from jaxcompress.lowrank._matrix import AxesOption
from jaxcompress.lowrank._window import Kernel, along_channels, channels_last
from jaxcompress.transform import Transform, identity
from jaxcompress.values import Site, replace_weights


@leaf_type
class TuckerArray(CompositeLeaf):
    r"""A kernel whose inputs and outputs are projected, and a smaller one between.

    .. math:: W_{k,i,o} = \sum_{p,q} A_{i,p}\, G_{k,p,q}\, B_{q,o}

    A convolution runs as a pointwise one, one of `core`, and another pointwise one; a
    kernel without a window is a matrix, and runs as three matmuls.

    Attributes:
      inward: ``float[*stack, inputs, p]``, or a leaf.
      core: ``float[*stack, *window, p, q]``, or a leaf.
      outward: ``float[*stack, q, outputs]``, or a leaf.
    """

    inward: Any = component(role=WEIGHT)
    core: Any = component(role=WEIGHT)
    outward: Any = component(role=WEIGHT)

    @property
    def stack(self) -> int:
        """How many leading axes stack independent weights."""
        return self.inward.ndim - 2

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""
        lead = self.core.shape[:-2]
        return (*lead, self.inward.shape[-2], self.outward.shape[-1])

    @property
    def method(self) -> str:
        """``"tucker 8x16"``."""
        p, q = self.core.shape[-2:]
        return f"tucker {p}x{q}{self.kind}"

    def parts(self) -> tuple[Any, ...]:
        """Inward, core, outward."""
        return self.inward, self.core, self.outward

    def with_parts(self, parts: Sequence[Any]) -> TuckerArray:
        """Others."""
        inward, core, outward = parts
        return self.replace(inward=inward, core=core, outward=outward)

    def part_axes(self) -> tuple[Axes, ...]:
        """Inputs, then the window and p, then q are contracted."""
        ends = Axes(contract=(-2,), stack=self.stack)
        window = tuple(range(self.stack - self.ndim, -1))
        return ends, Axes(contract=window, stack=self.stack), ends

    def materialize(self) -> jax.Array:
        """The dense kernel."""
        n = self.stack
        window = (1,) * (self.ndim - n - 2)
        wider = lambda a: a.reshape(*a.shape[:n], *window, *a.shape[n:])
        w = jnp.matmul(wider(wide(self.inward)), wide(self.core), precision="highest")
        w = jnp.matmul(w, wider(wide(self.outward)), precision="highest")
        return w.astype(self.dtype)

    def stacked(self, ndim: int) -> Leaf:
        """As it is, where the first axes are stacks."""
        return self if self.stack >= ndim else NotImplemented

    def dot_general(
        self, x: jax.Array, dimension_numbers: Any, *, leaf_is_lhs: bool, **params: Any
    ) -> Ran:
        """Three matmuls, if there is no window."""
        n = self.stack
        there = tuple((part, (n,)) for part in self.parts())
        back = tuple((part, (n + 1,)) for part in reversed(self.parts()))
        return multiply(
            self,
            x,
            dimension_numbers,
            leaf_is_lhs=leaf_is_lhs,
            stack=n,
            ways=[Way((-2,), there), Way((-1,), back)] if self.ndim == n + 2 else [],
            **params,
        )

    def conv_general_dilated(self, x: jax.Array, **params: Any) -> Ran:
        """Pointwise, core, pointwise."""
        if self.stack or not channels_last(params, self.ndim):
            return NotImplemented
        numbers = params["dimension_numbers"]
        y = along_channels(x, self.inward, numbers.lhs_spec[1], params)
        core = self.core
        y = narrowed(y, x.dtype)
        if isinstance(core, Leaf):
            y = core.prepare_activations(y, (numbers.lhs_spec[1],))
            core = dequantize(core)
        middle = params | {"preferred_element_type": jnp.float32}
        y = jax.lax.conv_general_dilated(y, core, **middle)
        y = jnp.moveaxis(narrowed(y, x.dtype), numbers.out_spec[1], -1)
        ran = contract(
            y,
            self.outward,
            (((y.ndim - 1,), (0,)), ((), ())),
            precision=params["precision"],
            preferred_element_type=params["preferred_element_type"],
        )
        out = jnp.moveaxis(ran.out, -1, numbers.out_spec[1])
        return Ran(out, f"{self.method}: three convolutions")

    def component_specs(
        self, spec: Sequence[Any], sizes: dict[Any, int]
    ) -> TuckerArray:
        """Inputs and outputs as the kernel's; the window and the ranks are not cut."""
        stack = list(spec[: self.stack])
        whole = [None] * (self.ndim - self.stack)
        return self.replace(
            inward=factor_specs(self.inward, [*stack, spec[-2], None], sizes),
            core=factor_specs(self.core, [*stack, *whole], sizes),
            outward=factor_specs(self.outward, [*stack, None, spec[-1]], sizes),
        )


def tucker(
    *,
    ranks: tuple[int, int] | None = None,
    ratio: float | None = None,
    steps: int = 10,
    axes: AxesOption = None,
) -> Transform:
    r"""Project the inputs and outputs of each kernel, by higher-order iteration.

    .. math:: W_{k,i,o} \approx \sum_{p,q} A_{i,p}\, G_{k,p,q}\, B_{q,o}

    with orthonormal :math:`A` and :math:`B`: in turn, each is made of the leading
    singular vectors of the kernel projected by the other.

    Args:
      ranks: Of inputs and outputs; or
      ratio: elements of the factors relative to the kernel's, both sides alike. Static.
      steps: Turns of the iteration.
      axes: Contracting axes, or `Axes`; all but the last of each kernel, as of a
        convolution ``[*window, in, out]`` or a matrix. Static.

    Returns:
      A transform whose ``init`` puts a `TuckerArray` in place of each weight, whose
      factors are trained. The error never rises from turn to turn; the first is that of
      the truncated higher-order decomposition, at most :math:`\sqrt 2` of the least.

    Raises:
      ValueError: If neither or both of `ranks` and `ratio` are given, or are out of
        range; from ``init`` if a weight is not finite or its axes are others.

    Examples:
      >>> kernel = jax.random.normal(jax.random.key(0), (3, 3, 8, 16))
      >>> scheme = tucker(ratio=0.25, axes=(-4, -3, -2))
      >>> scheme.init({"w": kernel})[0]["w"]
      TuckerArray(tucker 3x6, float32[3, 3, 8, 16])

    References:
      De Lathauwer et al., `On the Best Rank-1 and Rank-(R1, ..., RN) Approximation
      <https://doi.org/10.1137/S0895479898346995>`_, 2000, section 4; Kim et al.,
      `Compression of Deep Convolutional Neural Networks
      <https://arxiv.org/abs/1511.06530>`_, 2016, section 3 (Tucker-2).
    """
    by = "lowrank.tucker"
    if (ranks is None) == (ratio is None):
        raise ValueError(
            f"{by}: give ranks or ratio, one of them; got {ranks} and {ratio}."
        )
    if ranks is not None and min(ranks) < 1:
        raise ValueError(f"{by}: ranks must be positive; got {ranks}.")
    if ratio is not None and not 0.0 < ratio <= 1.0:
        raise ValueError(f"{by}: ratio must be above 0 and at most 1; got {ratio}.")
    if steps < 0:
        raise ValueError(f"{by}: steps must not be negative; got {steps}.")

    def factored(w: jax.Array, site: Site) -> TuckerArray:
        stated = site.axes if axes is None else axes
        kernel = Kernel.of(w, stated, path=site.path, who=by)
        p, q = _ranks_for(kernel, ratio) if ranks is None else ranks
        if p > kernel.inputs or q > kernel.outputs:
            raise ValueError(
                f"{by}: ranks must be at most {(kernel.inputs, kernel.outputs)}, the "
                f"inputs and outputs of {site.path!r}; got {(p, q)}."
            )
        inward, core, outward = project(kernel.flat(w), p, q, steps)
        core = core.reshape(*kernel.stack, *kernel.window, p, q)
        to = lambda a: a.astype(w.dtype)
        return TuckerArray(inward=to(inward), core=to(core), outward=to(outward))

    def init(params: Any) -> tuple[Any, tuple[()]]:
        ready = lambda x, path: isinstance(x, TuckerArray)
        return replace_weights(factored, params, ready=ready, by=by), ()

    return identity()._replace(init=init)


def _ranks_for(kernel: Kernel, ratio: float | None) -> tuple[int, int]:
    """The same share s of both sides: ``s^2 k i o + s (i^2 + o^2) = ratio k i o``."""
    assert ratio is not None
    i, o = kernel.inputs, kernel.outputs
    a, b = math.prod(kernel.window) * i * o, i * i + o * o
    s = (math.sqrt(b * b + 4 * a * a * ratio) - b) / (2 * a)
    return max(1, min(i, int(s * i))), max(1, min(o, int(s * o)))


@functools.partial(jax.jit, static_argnames=("p", "q"))
def project(
    w: jax.Array, p: int, q: int, steps: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Inward ``[*stack, i, p]``, core ``[*stack, k, p, q]`` and outward.

    Args:
      w: ``float32[*stack, k, i, o]``.
      p: Rank of the inputs. Static.
      q: Rank of the outputs. Static.
      steps: Turns.
    """
    einsum = functools.partial(jnp.einsum, precision="highest")

    def inputs(part: jax.Array) -> jax.Array:
        """Leading vectors of the inputs, of ``[*stack, k, i, *]``."""
        return _vectors(einsum("...kiq,...kjq->...ij", part, part), p)

    def outputs(part: jax.Array) -> jax.Array:
        return _vectors(einsum("...kpo,...kpu->...ou", part, part), q)

    def turn(_: int, b: jax.Array) -> jax.Array:
        a = inputs(einsum("...kio,...oq->...kiq", w, b))
        return outputs(einsum("...kio,...ip->...kpo", w, a))

    b = jax.lax.fori_loop(0, steps, turn, outputs(w))
    a = inputs(einsum("...kio,...oq->...kiq", w, b))
    core = einsum("...kio,...ip,...oq->...kpq", w, a, b)
    return a, core, jnp.matrix_transpose(b)


def _vectors(moment: jax.Array, rank: int) -> jax.Array:
    """Eigenvectors of the largest eigenvalues, ``[*stack, n, rank]``."""
    return jnp.linalg.eigh(moment)[1][..., :, ::-1][..., :rank]
