"""How much each unit of a group matters: what of it the parameters tell."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import tree
from jaxcompress.prune.structure._graph import Graph, Group, Member

Importance = Callable[[Graph, Group, Mapping[str, Any]], np.ndarray]
"""``(graph, group, params by path) -> float[units]``, or ``[layers, units]``."""

Normalization = Literal["mean", "none"]


def group_norm(*, order: int = 2, normalize: Normalization = "mean") -> Importance:
    r"""The norm of all weights that a unit's removal takes away.

    .. math:: I_u = \sum_{w \in u} |w|^p

    Args:
      order: p.
      normalize: ``"mean"``: relative to the mean over the group, so that groups of
        unlike size can be ranked together.

    References:
      Fang et al., `DepGraph <https://arxiv.org/abs/2301.12900>`_, 2023, section 3.3
      (the group importance without sparse learning).
    """

    def importance(graph: Graph, group: Group, params: Mapping[str, Any]) -> np.ndarray:
        total = _sum(group, {p: _power(params[p], order) for p in group.paths})
        return _normalized(total, normalize)

    return importance


def filter_norm(*, order: int = 1, normalize: Normalization = "mean") -> Importance:
    """The norm of the filters that produce a unit: of kernels, along their last axis.

    Args:
      order: As for `group_norm`.
      normalize: As for `group_norm`.

    References:
      Li et al., `Pruning Filters for Efficient ConvNets
      <https://arxiv.org/abs/1608.08710>`_, 2017, section 3.1. Differs: of coupled
      filters the sum counts, relative to the group's mean where groups are ranked
      together.
    """

    def importance(graph: Graph, group: Group, params: Mapping[str, Any]) -> np.ndarray:
        stack = 1 if group.layers > 1 else 0
        made = [
            m
            for m in group.members
            if (ndim := len(graph.shapes[m.path])) - stack >= 2 and m.axis == ndim - 1
        ]
        members = tuple(made) or group.members
        chosen = {m.path: _power(params[m.path], order) for m in members}
        return _normalized(_sum(group, chosen, members), normalize)

    return importance


def saliency_sum(scores: Any, *, normalize: Normalization = "none") -> Importance:
    """The sum of given scores over all weights that a unit's removal takes away.

    Args:
      scores: Pytree of the params' structure: Taylor scores ``(g w)**2``, Fisher
        information, ....
      normalize: As for `group_norm`.
    """
    flat, _ = tree.flatten(scores)

    def importance(graph: Graph, group: Group, params: Mapping[str, Any]) -> np.ndarray:
        given = {}
        for path in group.paths:
            if path not in flat or flat[path].shape != graph.shapes[path]:
                found = flat[path].shape if path in flat else "nothing"
                raise ValueError(
                    f"saliency_sum: scores must have the shape {graph.shapes[path]} of "
                    f"{path!r}; got {found}. Pass a tree like the params."
                )
            given[path] = jnp.asarray(flat[path], jnp.float32)
        return _normalized(_sum(group, given), normalize)

    return importance


def member_score(
    score: Callable[[jax.Array, int], jax.Array],
    where: tree.Rule = "**",
    *,
    normalize: Normalization = "mean",
) -> Importance:
    """The sum, over parameters that a rule chooses, of a score of each position.

    Args:
      score: ``(w, axis) -> float[n]``, of one parameter along one of its axes:
        distances between filters, ``lambda w, axis: scores.geometric_median(w,
        axis=axis)``; or of a norm, ``lambda w, axis: scores.batch_norm_scale(w)``.
      where: Rule for its path: ``"**/kernel"``, ``"**/scale"``. Of a kernel of several
        axes the last counts, which makes the unit.
      normalize: As for `group_norm`.

    References:
      He et al., `Filter Pruning via Geometric Median
      <https://arxiv.org/abs/1811.00250>`_, 2019; Liu et al., `Network Slimming
      <https://arxiv.org/abs/1708.06519>`_, 2017.
    """
    one = lambda w, axis: jnp.asarray(score(w, axis), jnp.float32)

    def importance(graph: Graph, group: Group, params: Mapping[str, Any]) -> np.ndarray:
        stack = 1 if group.layers > 1 else 0
        total: Any = 0.0
        chosen = tree.choose(
            {where: True}, {p: params[p] for p in group.paths}, who=_WHO
        )
        for m in group.members:
            last = len(graph.shapes[m.path]) - stack - 1
            if m.path not in chosen or m.axis - stack != last:
                continue
            along = functools.partial(one, axis=last)
            values = jax.vmap(along) if stack else along
            total = total + np.asarray(values(params[m.path]))[..., m.positions].sum(-1)
        if np.ndim(total) == 0:
            raise ValueError(
                f"{_WHO}: where={where!r} chooses no parameter that makes the units of "
                f"group {group.number} ({', '.join(group.paths[:3])}). Widen the rule, "
                "or leave the group out with groups=."
            )
        return _normalized(total, normalize)

    return importance


_WHO = "prune.member_score"


def random_importance(key: jax.Array) -> Importance:
    """Any order, the same for the same key."""

    def importance(graph: Graph, group: Group, params: Mapping[str, Any]) -> np.ndarray:
        del graph, params
        shape = (group.layers, group.size) if group.layers > 1 else (group.size,)
        return np.asarray(
            jax.random.uniform(jax.random.fold_in(key, group.number), shape)
        )

    return importance


def _power(w: Any, order: int) -> jax.Array:
    return jnp.abs(jnp.asarray(w, jnp.float32)) ** order


def _sum(
    group: Group,
    values: Mapping[str, jax.Array],
    members: tuple[Member, ...] | None = None,
) -> np.ndarray:
    """Sum over the positions of every unit, layer by layer where layers differ."""
    total: Any = 0.0
    for m in group.members if members is None else members:
        a = np.asarray(values[m.path])
        kept = (0, m.axis) if group.layers > 1 else (m.axis,)
        along = a.sum(tuple(i for i in range(a.ndim) if i not in kept))
        total = total + along[..., m.positions].sum(-1)
    return np.asarray(total)


def _normalized(total: np.ndarray, normalize: Normalization) -> np.ndarray:
    if normalize == "none":
        return total
    if normalize != "mean":
        raise ValueError(f"normalize must be 'mean' or 'none'; got {normalize!r}.")
    mean = total.mean(-1, keepdims=True)
    return total / np.where(mean > 0, mean, 1.0)
