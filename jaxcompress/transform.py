"""The contract of a transform, and how transforms combine.

A transform is four pure functions over parameter pytrees. `chain` runs several on
the same leaves, `select` runs each on the leaves its rule chooses; both return a
transform again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress import tree
from jaxcompress.layout import Axes
from jaxcompress.leaf import (
    OrderError,
)
from jaxcompress.values import (
    Oriented,
    Site,
    bare,
    check_weights,
    for_values,
    map_values,
)

Params = Any
State = Any


class Transform(NamedTuple):
    """Four pure functions that compress a parameter pytree, in training and at its end.

    Attributes:
      init: ``params -> (params, state)``. Checks the weights; the returned params
        may have gained trainable leaves.
      view: ``(params, state) -> params`` as the forward pass sees them, some of
        them compressed leaves; differentiable.
      update: ``(params, state, *, grads=None, **extra) -> (params, state)``, after
        an optimizer step: schedules, masks, ranges.
      compress: ``(params, state) -> params`` in stored form. The forward pass on it
        equals that on the view bit for bit.
    """

    init: Callable[[Params], tuple[Params, State]]
    view: Callable[[Params, State], Params]
    update: Callable[..., tuple[Params, State]]
    compress: Callable[[Params, State], Params]


def as_transform(rule: Any) -> Transform:
    """A transform as itself; a number format or preset as its weight transform.

    Raises:
      TypeError: If `rule` is neither.
    """
    if isinstance(rule, Transform):
        return rule
    if hasattr(rule, "as_transform"):
        return rule.as_transform()
    raise TypeError(
        "as_transform: expected a Transform, a number format or a preset; got "
        f"{rule!r}. Write jc.quant.int4() or jc.prune.magnitude(sparsity=0.5)."
    )


def _keep(params: Params, state: State, **extra: Any) -> tuple[Params, State]:
    del extra
    return params, state


def stateless(
    f: Callable[[Any, Site], Any],
    g: Callable[[Any, Site], Any],
    *,
    by: str,
    check: Callable[[Any, Site], None] = lambda value, site: None,
) -> Transform:
    """A transform with nothing to remember, from functions of one value.

    Args:
      f: View of a value.
      g: Stored form of a value.
      by: Name of the transform, for errors.
      check: Raises if a value cannot be transformed; called by ``init``.
    """

    def init(params: Params) -> tuple[Params, State]:
        check_weights(params, who=by)
        for_values(check, params)
        return params, ()

    return Transform(
        init=init,
        view=lambda params, state: map_values(f, params, by=by),
        update=_keep,
        compress=lambda params, state: map_values(g, params, by=by),
    )


def identity() -> Transform:
    """The transform that changes nothing; as a rule, it marks leaves as kept."""
    return Transform(
        init=lambda params: (params, ()),
        view=lambda params, state: params,
        update=_keep,
        compress=lambda params, state: params,
    )


def chain(*transforms: Any) -> Transform:
    """Run several transforms on the same leaves, each on the values left by the last.

    Args:
      *transforms: Transforms or number formats, in order: structure first (low
        rank, hashing), then masks, then clusters or grids.

    Returns:
      A transform whose result satisfies every constraint of its parts.

    Raises:
      OrderError: From ``init``, if a later transform would undo an earlier one.
    """
    parts = tuple(as_transform(t) for t in transforms)

    def init(params: Params) -> tuple[Params, State]:
        states: list[State] = []
        for part in parts:
            before = params
            params, state = part.init(params)
            _check_order(zip(parts, states, strict=False), before, params)
            states.append(state)
        jax.eval_shape(view, params, tuple(states))  # Refuse a wrong order now.
        return params, tuple(states)

    def view(params: Params, state: State) -> Params:
        for part, s in zip(parts, state, strict=True):
            params = part.view(params, s)
        return params

    def update(params: Params, state: State, **extra: Any) -> tuple[Params, State]:
        states = []
        for part, s in zip(parts, state, strict=True):
            params, s = part.update(params, s, **extra)
            states.append(s)
        return params, tuple(states)

    def compress(params: Params, state: State) -> Params:
        for part, s in zip(parts, state, strict=True):
            params = part.compress(params, s)
        return params

    return Transform(init, view, update, compress)


def _check_order(
    earlier: Iterable[tuple[Transform, State]], before: Params, after: Params
) -> None:
    """Refuse new values in place of those on which earlier transforms act.

    Raises:
      OrderError: If an ``init`` made other values, and an earlier transform has a view.
    """
    shapes = lambda params: for_values(lambda v, site: jnp.shape(v), params)
    old, new = shapes(before), shapes(after)
    changed = [p for p in old if p in new and new[p] and new[p] != old[p]]
    if not changed:
        return
    for part, state in earlier:
        seen = jax.eval_shape(part.view, before, state)
        if jax.tree.structure(seen) != jax.tree.structure(before):
            raise OrderError(
                f"chain: a later transform puts other values in place of "
                f"{changed[0]!r}, so what an earlier one established would be undone; "
                "chain structure first (low rank, hashing), then masks, then clusters "
                "or grids."
            )


def select(
    rules: Mapping[Any, Any], *, axes: Mapping[str, Axes] | None = None
) -> Transform:
    """Run each transform on the leaves its rule chooses; other leaves pass untouched.

    Args:
      rules: From glob patterns, `where(...)` or predicates ``(path, leaf) -> bool``
        to transforms or number formats. The choice is made once, by ``init``.
      axes: Roles of the axes of each weight by path, as `trace_axes` reads them
        off a function; a rule's own ``axes=`` goes before them.

    Raises:
      ValueError: From ``init``, if a rule matches nothing or two match one leaf.
    """
    parts = tuple(as_transform(t) for t in rules.values())
    known = dict(axes or {})

    def groups(params: Params) -> list[dict[str, Any]]:
        numbered = {rule: i for i, rule in enumerate(rules)}
        chosen = tree.choose(numbered, params, who="select")
        flat, _ = tree.flatten(params)
        return [
            {path: flat[path] for path, i in chosen.items() if i == n}
            for n in range(len(parts))
        ]

    def run(
        f: Callable[..., Any], params: Params, states: Any
    ) -> tuple[Any, list[Any]]:
        """Apply `f(part, group, state) -> (group, state)` to every group."""
        flat, structure = tree.flatten(params)
        results = []
        for part, chosen in zip(parts, states, strict=True):
            if missing := [path for path in chosen.paths if path not in flat]:
                raise ValueError(
                    f"select: params have no leaf {missing[0]!r}, which init chose; "
                    "pass params of the structure that init returned."
                )
            group = {
                path: Oriented(value=flat[path], axes=known[path])
                if path in known
                else flat[path]
                for path in chosen.paths
            }
            group, result = f(part, group, chosen.state)
            flat.update((path, bare(leaf)) for path, leaf in group.items())
            results.append(Selected(paths=chosen.paths, state=result))
        return tree.unflatten(structure, flat), results

    def init(params: Params) -> tuple[Params, State]:
        states = [Selected(paths=tuple(g), state=()) for g in groups(params)]
        params, states = run(lambda part, group, _: part.init(group), params, states)
        return params, tuple(states)

    def view(params: Params, state: State) -> Params:
        return run(lambda part, g, s: (part.view(g, s), s), params, state)[0]

    def update(
        params: Params, state: State, *, grads: Any = None, **extra: Any
    ) -> tuple[Params, State]:
        flat_grads = None if grads is None else tree.flatten(grads)[0]

        def step(part: Transform, group: Any, s: Any) -> tuple[Any, Any]:
            g = None if flat_grads is None else {p: flat_grads.get(p) for p in group}
            return part.update(group, s, grads=g, **extra)

        params, states = run(step, params, state)
        return params, tuple(states)

    def compress(params: Params, state: State) -> Params:
        return run(lambda part, g, s: (part.compress(g, s), s), params, state)[0]

    return Transform(init, view, update, compress)


class Selected(NamedTuple):
    """State of one rule of `select`: the paths it chose, and its transform's state."""

    paths: tuple[str, ...]
    state: State


jax.tree_util.register_pytree_with_keys(
    Selected,
    lambda s: (((jax.tree_util.GetAttrKey("state"), s.state),), s.paths),
    lambda paths, children: Selected(paths, *children),
)
