"""`Policy`: which dtypes parameters, computation and results have."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.leaf import Cast, Leaf, is_leaf
from jaxcompress.tree import Rule, choose, flatten, unflatten


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """The dtypes of a mixed precision program; static.

    Attributes:
      params: Of the parameters that the optimizer updates.
      compute: Of the parameters and inputs that the program works with.
      output: Of its results.

    Raises:
      TypeError: If one of them is not a floating dtype (``jnp.bfloat16``, not a
        string).

    References:
      Micikevicius et al., `Mixed Precision Training
      <https://arxiv.org/abs/1710.03740>`_, 2018, section 3.1 (float32 master weights).
    """

    params: Any = jnp.float32
    compute: Any = jnp.float32
    output: Any = jnp.float32

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, str) or not jnp.issubdtype(value, jnp.floating):
                raise TypeError(
                    f"Policy: {field.name} must be a floating dtype such as "
                    f"jnp.bfloat16; got {value!r}."
                )
            # One form, so that policies compare and hash by value.
            object.__setattr__(self, field.name, jnp.dtype(value))

    def store(self, params: Any, *, where: Rule | None = None) -> Any:
        """Parameters in the dtype the optimizer updates; see `cast`."""
        return cast(params, self.params, where=where)

    def apply(
        self, fn: Callable[..., Any], *, where: Rule | None = None
    ) -> Callable[..., Any]:
        """`fn` under this policy; see `apply`."""
        return apply(fn, self, where=where)


FULL = Policy()
"""Float32 throughout."""

MIXED_BF16 = Policy(compute=jnp.bfloat16)
"""Float32 parameters and results, bfloat16 between; needs no loss scaling."""

MIXED_F16 = Policy(compute=jnp.float16)
"""Float32 parameters and results, float16 between; wants `loss_scaling`."""


def cast(tree: Any, dtype: Any, *, where: Rule | None = None) -> Any:
    """Cast the floating arrays and compressed leaves of a pytree.

    Args:
      tree: Any pytree.
      dtype: A floating dtype.
      where: A glob pattern, `jaxcompress.where` or a predicate ``(path, leaf)`` for
        what is cast; None casts everything that floats.

    Returns:
      The same tree. A compressed leaf keeps its codes and *materializes* in `dtype`,
      where its `relayout` can do that; integers, typed keys, Python numbers, what
      already has the dtype and what `where` leaves out are the same objects.

    Raises:
      ValueError: If `where` matches nothing.

    Examples:
      >>> tree = {"ids": jnp.arange(2), "scale": jnp.ones(2), "w": jnp.ones(2)}
      >>> {k: str(v.dtype) for k, v in cast(tree, jnp.bfloat16, where="w").items()}
      {'ids': 'int32', 'scale': 'float32', 'w': 'bfloat16'}
    """
    dtype = jnp.dtype(dtype)
    if where is None:
        return jax.tree.map(functools.partial(_cast, dtype), tree, is_leaf=is_leaf)
    flat, structure = flatten(tree)
    chosen = choose({where: True}, tree, who="precision.cast")
    return unflatten(
        structure, {p: _cast(dtype, x) if p in chosen else x for p, x in flat.items()}
    )


def _cast(dtype: np.dtype, x: Any) -> Any:
    own = getattr(x, "dtype", None)
    if own is None or own == dtype or not jnp.issubdtype(own, jnp.floating):
        return x
    if isinstance(x, Leaf):
        moved = x.relayout(Cast(dtype=dtype))
        return x if moved is NotImplemented else moved
    return x.astype(dtype)


def apply(
    fn: Callable[..., Any], policy: Policy, *, where: Rule | None = None
) -> Callable[..., Any]:
    """Run a function of a parameter pytree under a policy.

    Parameters and inputs are cast to ``policy.compute``, results to ``policy.output``.
    The casts are differentiable, so gradients have the dtypes of the parameters as
    passed. It nests with `jaxcompress.lift` either way round.

    Args:
      fn: ``(params, *args, **kwargs) -> result``.
      policy: The dtypes.
      where: The parameters to cast, as in `cast`; the rest enter as they are stored.
        For float32 normalization and running averages:
        ``where("**", exclude=("**/scale", "batch_stats/**"))``. What `fn` makes of
        two dtypes is up to `fn`: a float32 scale may turn all that follows float32.

    Returns:
      A function of `fn`'s signature.

    Raises:
      ValueError: When called, if `where` matches nothing.

    Examples:
      >>> fn = apply(lambda p, x: {"y": x @ p, "dtype": x.dtype.name}, MIXED_BF16)
      >>> out = fn(jnp.ones((2, 2)), jnp.ones((1, 2)))
      >>> out["dtype"], out["y"].dtype.name
      ('bfloat16', 'float32')
    """

    @functools.wraps(fn)
    def applied(params: Any, *args: Any, **kwargs: Any) -> Any:
        params = cast(params, policy.compute, where=where)
        args, kwargs = cast((args, kwargs), policy.compute)
        return cast(fn(params, *args, **kwargs), policy.output)

    return applied
