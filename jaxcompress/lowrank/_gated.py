"""`gated`: thin factors with trained gates between them, which close."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxcompress.lowrank._array import LowRankArray
from jaxcompress.lowrank._factors import dense
from jaxcompress.lowrank._matrix import AxesOption, Matrix
from jaxcompress.lowrank._rank import Rank, check_rank
from jaxcompress.lowrank._svd import svd_weight
from jaxcompress.straight_through import straight_through
from jaxcompress.transform import Transform
from jaxcompress.values import Site, leaf_key, replace_weights


def gated(
    *,
    rank: Rank | None = None,
    key: jax.Array | None = None,
    axes: AxesOption = None,
) -> Transform:
    r"""Put trained gates between two factors; ranks whose gate closes are dropped.

    .. math:: W = U \operatorname{diag}(c) V, \quad 0 \le c \le 1

    The loss is :math:`L + \lambda\,` `gate_penalty`, of the params. After each step of
    the optimizer, ``update`` projects the gates onto [0, 1]: the penalty's slope is the
    same at every opening, so gates reach an exact zero in finite time, and a closed
    gate opens again if the loss pulls harder than the penalty pushes. (A hard sigmoid
    has no slope where it is closed, so its gates never would.) Decay the factors, but
    not the gates (`weight_decay_mask`), or the factors grow as the gates shrink.

    Args:
      rank: As for `svd`, where the gates start; by default the full rank.
      key: As for `svd`.
      axes: As for `svd`. Static.

    Returns:
      A transform whose ``init`` puts a `LowRankArray` of the best product and gates of
      one in place of each weight. ``compress`` drops the ranks of closed gates: of a
      stack, as many as are closed in all of its matrices, the others keeping a gate of
      zero. Where none is dropped the view equals what is stored bit for bit, else but
      for the order of sums. ``compress`` runs outside jit.

    Raises:
      ValueError: As `svd` does.

    Examples:
      >>> scheme = gated()
      >>> params, state = scheme.init({"w": jnp.diag(jnp.array([3.0, 2.0, 1.0]))})
      >>> gates = jnp.array([1.0, 0.0, 0.5])
      >>> params["w"] = params["w"].replace(gate=gates)
      >>> packed = scheme.compress(params, state)["w"]
      >>> packed, abs(packed.materialize()).round(2).tolist()
      (LowRankArray(rank 2 gated, float32[3, 3]),
       [[3.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.5]])

    References:
      Parikh & Boyd, `Proximal Algorithms <https://doi.org/10.1561/2400000003>`_, 2014,
      section 4.2 (projected steps); Swaminathan et al., `Sparse Low Rank Factorization
      <https://doi.org/10.1016/j.neucom.2020.02.035>`_, 2020 (factors whose ranks are
      dropped by importance).
    """
    by = "lowrank.gated"
    if rank is not None:
        check_rank(rank, by)

    def factored(w: jax.Array, site: Site) -> LowRankArray:
        stated = site.axes if axes is None else axes
        matrix = Matrix.of(w, stated, path=site.path, who=by)
        leaf = svd_weight(
            w,
            matrix.size.most if rank is None else rank,
            key=None if key is None else leaf_key(key, site),
            axes=stated,
            path=site.path,
            who=by,
        )
        return leaf.replace(gate=jnp.ones((*matrix.stack, leaf.rank), jnp.float32))

    def init(params: Any) -> tuple[Any, tuple[()]]:
        ready = lambda x, path: isinstance(x, LowRankArray) and x.gate is not None
        return replace_weights(factored, params, ready=ready, by=by), ()

    def update(params: Any, state: tuple[()], **extra: Any) -> tuple[Any, tuple[()]]:
        del extra
        projected = lambda leaf, gate: leaf.replace(gate=_clip(gate))
        return at_gates(projected, params), state

    def view(params: Any, state: tuple[()]) -> Any:
        del state
        held = lambda gate: straight_through(gate, jax.lax.stop_gradient(_clip(gate)))
        return at_gates(lambda leaf, gate: leaf.replace(gate=held(gate)), params)

    def compress(params: Any, state: tuple[()]) -> Any:
        del state
        return at_gates(lambda leaf, gate: open_ranks(leaf, _clip(gate)), params)

    return Transform(init, view, update, compress)


def gate_penalty(params: Any) -> jax.Array:
    r"""Stored weights, those of a rank counted by its gate.

    .. math:: \sum_l (m_l + n_l) \sum_r c_{l,r}

    Args:
      params: Those that ``gated``'s ``init`` returned.

    Returns:
      ``float32[]``, of gates held to [0, 1]; its gradient in a gate is ``m + n``.

    Raises:
      ValueError: If there are no gates in `params`.

    Examples:
      >>> params, _ = gated(rank=1).init({"w": jnp.ones((4, 2))})
      >>> float(gate_penalty(params))
      6.0
    """
    found: list[jax.Array] = []

    def count(leaf: LowRankArray, gate: jax.Array) -> LowRankArray:
        sides = (leaf.left.size + leaf.right.size) / gate.size
        held = straight_through(gate, jax.lax.stop_gradient(_clip(gate)))
        found.append(sides * held.sum())
        return leaf

    at_gates(count, params)
    if not found:
        raise ValueError(
            "lowrank.gate_penalty: there are no gates in params; pass those that the "
            "init of lowrank.gated returned."
        )
    return jnp.stack(found).sum()


def _clip(gate: jax.Array) -> jax.Array:
    return jnp.clip(gate, 0.0, 1.0)


def at_gates(f: Callable[[LowRankArray, jax.Array], Any], params: Any) -> Any:
    """`f` of every gated leaf and its gates; the rest as it is."""

    def one(x: Any) -> Any:
        if isinstance(x, LowRankArray) and x.gate is not None:
            return f(x, x.gate)
        return x

    return jax.tree.map(one, params, is_leaf=lambda x: isinstance(x, LowRankArray))


def open_ranks(leaf: LowRankArray, gate: jax.Array) -> LowRankArray:
    """The leaf with these gates, without the ranks that are closed in all of a stack.

    Raises:
      jax.errors.ConcretizationTypeError: If the gates are traced.
    """
    if isinstance(gate, Tracer):
        raise jax.errors.ConcretizationTypeError(
            gate,
            "lowrank.gated: how many ranks are kept depends on the gates, which are "
            "traced; call compress outside jit.",
        )
    count = max(int((gate > 0).sum(-1).max()), 1)
    if count == leaf.rank:
        return leaf.replace(gate=gate)
    order = jnp.sort(jnp.argsort(gate <= 0, axis=-1, stable=True)[..., :count], axis=-1)

    def chosen(factor: Any, axis: int) -> jax.Array:
        a = jnp.moveaxis(dense(factor), axis, -1)
        ones = (1,) * (a.ndim - order.ndim)
        index = order.reshape(*order.shape[:-1], *ones, count)
        return jnp.moveaxis(jnp.take_along_axis(a, index, axis=-1), -1, axis)

    return leaf.replace(
        left=chosen(leaf.left, leaf.left.ndim - 1),
        right=chosen(leaf.right, leaf.stack),
        gate=jnp.take_along_axis(gate, order, axis=-1),
    )
