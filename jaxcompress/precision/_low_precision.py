"""`low_precision`: the weight matmuls of any function on 8-bit operands."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxcompress import tree
from jaxcompress.leaf import (
    FROZEN,
    WEIGHT,
    Cast,
    LayoutOp,
    Leaf,
    Ran,
    Traits,
    component,
    leaf_type,
    map_value,
    materialize,
    relayout,
    static,
    traits,
)
from jaxcompress.lift import lift
from jaxcompress.precision._matmul import (
    INT8,
    Element,
    check_formats,
    dot_general,
)
from jaxcompress.quant._elements import E4M3, E5M2
from jaxcompress.values import Site, leaf_key


class Rerouted(Leaf):
    """A trained weight that stays itself and whose matmuls run in low precision."""

    w: Any
    forward: Element
    backward: Element | None

    @property
    def traits(self) -> Traits:
        """Those of the weight, with a matmul of its own."""
        return traits(self.w)._replace(own_matmul=True)

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""
        return tuple(self.w.shape)

    @property
    def dtype(self) -> np.dtype:
        """Logical dtype."""
        return self.w.dtype

    @property
    def method(self) -> str:
        """``"int8 matmul, int8 gradient"``."""
        backward = "full" if self.backward is None else self.backward.label
        return f"{self.forward.label} matmul, {backward} gradient"

    def materialize(self) -> jax.Array:
        """The weight itself, unrounded: what is stored and deployed."""
        return materialize(self.w)

    def values(self) -> tuple[Any, ...]:
        """Those of the weight."""
        return self.w.values() if isinstance(self.w, Leaf) else (self.w,)

    def map_values(self, f: Callable[[jax.Array], jax.Array | Leaf]) -> Leaf:
        """Act on the weight, whose matmuls go on as before."""
        return self.replace(w=map_value(f, self.w))

    def weight_specs(self, spec: Sequence[Any], sizes: dict[Any, int]) -> Any:
        """Partition spec of the weight, or of its components."""
        if isinstance(self.w, Leaf):
            return self.w.component_specs(spec, sizes)
        return PartitionSpec(*spec)


@leaf_type
class LowPrecisionArray(Rerouted):
    """A weight whose matmuls round both operands as they come; see `dot_general`.

    Attributes:
      w: The weight, an array or a leaf.
      key: For stochastic rounding of gradients; one, or one for each stack entry.
      forward: Format of operands in the forward pass.
      backward: Format of incoming gradients, or None for unrounded gradients.
    """

    w: Any = component(role=WEIGHT)
    key: jax.Array | None = component(role=FROZEN, default=None)
    forward: Element = static()
    backward: Element | None = static()

    def relayout(self, op: LayoutOp) -> Leaf:
        """Move the weight; keys of a stack become one."""
        w = relayout(self.w, op)
        if w is NotImplemented:
            return NotImplemented
        return self.replace(
            w=w, key=self.key if isinstance(op, Cast) else self._one_key()
        )

    def stacked(self, ndim: int) -> Leaf:
        """With a key for each stack entry."""
        w = self.w.stacked(ndim) if isinstance(self.w, Leaf) else self.w
        if w is NotImplemented:
            return NotImplemented
        key, one = self.key, self._one_key()
        if one is not None and key is not None and key.ndim < ndim:
            key = jax.random.split(one, self.shape[:ndim])
        return self.replace(w=w, key=key)

    def _one_key(self) -> jax.Array | None:
        return None if self.key is None else self.key.reshape(-1)[0]

    def dot_general(
        self, x: jax.Array, dimension_numbers: Any, *, leaf_is_lhs: bool, **params: Any
    ) -> Ran:
        """Both operands and the incoming gradient rounded to 8 bits."""
        refuse_out_sharding(params)
        operands = (self.materialize(), x) if leaf_is_lhs else (x, self.materialize())
        y = dot_general(
            *operands,
            dimension_numbers,
            preferred_element_type=params.get("preferred_element_type"),
            forward=self.forward,
            backward=self.backward,
            key=self._one_key(),
        )
        return Ran(y, self.method)

    def component_specs(
        self, spec: Sequence[Any], sizes: dict[Any, int]
    ) -> LowPrecisionArray:
        """The weight's own; keys are replicated."""
        key = None if self.key is None else PartitionSpec()
        return self.replace(w=self.weight_specs(spec, sizes), key=key)


def refuse_out_sharding(params: dict[str, Any]) -> None:
    """Refuse what an 8-bit matmul cannot keep.

    Raises:
      NotImplementedError: For an output sharding.
    """
    if params.get("out_sharding") is not None:
        raise NotImplementedError(
            "low_precision: out_sharding is not supported by 8-bit matmuls; constrain "
            "the result instead, or leave the weight out with where=."
        )


def matrices(path: str, leaf: Any) -> bool:
    """Floating arrays and leaves of rank two or more: the default `where`."""
    del path
    return (
        np.ndim(leaf) > 1
        if not isinstance(leaf, Leaf)
        else not isinstance(leaf, Rerouted) and leaf.ndim > 1
    ) and jnp.issubdtype(jnp.dtype(leaf.dtype), jnp.floating)


def low_precision_params(
    params: Any,
    *,
    forward: Element,
    backward: Element | None,
    where: tree.Rule = matrices,
    key: jax.Array | None = None,
) -> Any:
    """Wrap weights in leaves whose matmuls run on 8-bit operands.

    Args:
      params: Parameter pytree; compressed leaves may be among its weights.
      forward: Format of operands; see `dot_general`. Static.
      backward: Format of incoming gradients, or None. Static.
      where: The weights: a glob pattern, `jaxcompress.where` or a predicate.
      key: Typed key for stochastic rounding of gradients; a new one every step.

    Returns:
      Parameters for a lifted function, differentiable in the weights.
      `materialize` unwraps them. Weights that are not used in a matmul (a
      convolution, an embedding, a bias) act as they are.

    Raises:
      ValueError: If a format is none of an 8-bit matmul's, or `where` matches nothing.
    """
    check_formats(forward, backward, who="low_precision")
    chosen = tree.choose({where: True}, params, who="low_precision")
    flat, structure = tree.flatten(params)

    def wrap(path: str, w: Any) -> LowPrecisionArray:
        own = None if key is None else leaf_key(key, Site(path, 0, None))
        return LowPrecisionArray(w=w, key=own, forward=forward, backward=backward)

    return tree.unflatten(
        structure, {p: wrap(p, w) if p in chosen else w for p, w in flat.items()}
    )


def low_precision(
    fn: Callable[..., Any],
    *,
    forward: Element,
    backward: Element | None,
    where: tree.Rule = matrices,
    key: jax.Array | None = None,
    **options: Any,
) -> Callable[..., Any]:
    """Run the weight matmuls of a function, and their gradients, on 8-bit operands.

    For training speed on hardware with 8-bit matrix units; parameters, and all that
    is not a matmul of a parameter, keep their dtypes. Only reverse-mode gradients.

    Args:
      fn: ``(params, *args, **kwargs) -> result``, any traceable function.
      forward: Format of operands; see `dot_general`. Static.
      backward: Format of incoming gradients, or None to leave gradients unrounded.
        Static.
      where: The weights: a glob pattern, `jaxcompress.where` or a predicate.
      key: Typed key for stochastic rounding of gradients. A key stands for one step:
        call `low_precision` inside the jitted step, or lift `fn` once and pass it
        `low_precision_params`.
      **options: As of `lift`.

    Returns:
      A function of `fn`'s signature. Convolutions and ragged dots run unrounded
      (`explain` on `low_precision_params` says so).

    Raises:
      ValueError: If a format is none of an 8-bit matmul's, or, when called, `where`
        matches nothing.

    Examples:
      >>> fn = lambda p, x: x @ p["w"]
      >>> p, x = {"w": jnp.array([[1.0], [-0.3]])}, jnp.array([[1.0, 1.0]])
      >>> matmul_int8(fn)(p, x).round(3).tolist()  # -0.3 is -38/127.
      [[0.7010...]]

    References:
      See `dot_general`.
    """
    check_formats(forward, backward, who="low_precision")
    lifted = lift(fn, **options)

    @functools.wraps(fn)
    def rerouted(params: Any, *args: Any, **kwargs: Any) -> Any:
        params = low_precision_params(
            params, forward=forward, backward=backward, where=where, key=key
        )
        return lifted(params, *args, **kwargs)

    return rerouted


def matmul_int8(fn: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`low_precision` with int8 operands forward and backward, summed in int32.

    Args:
      fn: ``(params, *args, **kwargs) -> result``.
      **options: `where`, `key` and those of `lift`.
    """
    return low_precision(fn, forward=INT8, backward=INT8, **options)


def matmul_fp8(fn: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`low_precision` with e4m3 operands forward and e5m2 gradients.

    Args:
      fn: ``(params, *args, **kwargs) -> result``.
      **options: `where`, `key` and those of `lift`.
    """
    return low_precision(fn, forward=E4M3, backward=E5M2, **options)
