"""Convolutions that are matmuls: a window of one, channels last."""

from __future__ import annotations

from typing import Any

import jax

from jaxcompress.leaf import Leaf, Ran, Reshape


def pointwise_dot(eqn: Any, leaf: Leaf, x: jax.Array) -> Ran | None:
    """A convolution as the leaf's own matmul; None where it is not one.

    Strides skip inputs first, as they do in the convolution.

    Args:
      eqn: A ``conv_general_dilated`` whose right operand is `leaf`.
      leaf: ``[1, ..., 1, in, out]``.
      x: ``[batch, ..., in]``.
    """
    if not leaf.traits.own_matmul or not _is_pointwise(eqn, leaf):
        return None
    matrix = leaf.relayout(Reshape(shape=leaf.shape[-2:]))
    if matrix is NotImplemented:
        return None
    strides = (1, *eqn.params["window_strides"], 1)
    x = jax.lax.slice(x, (0,) * x.ndim, x.shape, strides)
    ran = matrix.dot_general(
        x,
        (((x.ndim - 1,), (0,)), ((), ())),
        leaf_is_lhs=False,
        precision=eqn.params["precision"],
        preferred_element_type=eqn.params["preferred_element_type"],
    )
    return Ran(ran.out, f"{ran.how} (1x1)")


def _is_pointwise(eqn: Any, leaf: Leaf) -> bool:
    p, ndim = eqn.params, leaf.ndim
    last = (0, ndim - 1, *range(1, ndim - 1))
    numbers = p["dimension_numbers"]
    return (
        all(n == 1 for n in leaf.shape[:-2])
        and tuple(numbers.lhs_spec) == tuple(numbers.out_spec) == last
        and tuple(numbers.rhs_spec) == (ndim - 1, ndim - 2, *range(ndim - 2))
        and all(tuple(pad) == (0, 0) for pad in p["padding"])
        and set(p["lhs_dilation"]) == {1}
        and p["feature_group_count"] == p["batch_group_count"] == 1
    )
