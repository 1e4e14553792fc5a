"""What is removed of every parameter, and a parameter tree without it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import tree
from jaxcompress.lift._trace import Trace, Tracer
from jaxcompress.prune.structure._graph import Graph
from jaxcompress.prune.structure._resize import run
from jaxcompress.prune.structure._sized import Kept, Sized, as_kept


@dataclasses.dataclass(frozen=True, kw_only=True)
class Removal:
    """Which positions of the axes of parameters go.

    Attributes:
      shapes: Of every parameter, by path, as they were.
      kept: By path, then by axis, ``bool[n]``; or ``bool[layers, n]`` where each layer
        of a stack (axis 0) keeps positions of its own, equally many.
    """

    shapes: Mapping[str, tuple[int, ...]]
    kept: Mapping[str, Mapping[int, np.ndarray]]

    @classmethod
    def of(cls, graph: Graph, units: Mapping[int, np.ndarray]) -> Removal:
        """Remove units of groups.

        Args:
          graph: Of the model.
          units: By number of a group, ``bool[units]`` true at those to remove, or
            ``bool[layers, units]`` where layers may differ.

        Raises:
          ValueError: If a group cannot be removed, would lose all its units, or layers
            lose unequal numbers.
        """
        kept: dict[str, dict[int, np.ndarray]] = {}
        for number, gone in units.items():
            group = graph.groups[number]
            gone = np.asarray(gone, bool)
            _check(group, gone)
            if not gone.any():
                continue
            for m in group.members:
                mine = kept.setdefault(m.path, {})
                left = mine.get(m.axis, np.ones(graph.shapes[m.path][m.axis], bool))
                mine[m.axis] = _without(left, m.positions, gone)
        return cls(shapes=graph.shapes, kept=kept)

    def take(self, params: Any) -> Any:
        """What is left of a tree of the params' structure and shapes.

        Args:
          params: The params, or a tree like them: gradients, moments of an optimizer.

        Returns:
          The same tree, of smaller arrays; untouched leaves are the same objects.
        """

        def cut(path: str, w: jax.Array) -> jax.Array:
            self._check_shape(path, w)
            # Layers that keep positions of their own are cut before layers go.
            for axis, left in sorted(self.kept[path].items(), reverse=True):
                w = _take(w, axis, left)
            return w

        return self._map(cut, params)

    def mask(self, params: Any) -> Any:
        """The params with zeros in place of what goes."""

        def hold(path: str, w: jax.Array) -> jax.Array:
            self._check_shape(path, w)
            for axis, left in self.kept[path].items():
                shape = [1] * w.ndim
                shape[axis] = w.shape[axis]
                if left.ndim == 2:
                    shape[0] = w.shape[0]
                w = jnp.where(jnp.asarray(left.reshape(shape)), w, jnp.zeros_like(w))
            return w

        return self._map(hold, params)

    def smaller(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """A function like `fn` for the smaller params.

        It traces `fn` on the old shapes and runs the program on the new ones, so it
        accepts whatever other arguments `fn` does, and gives what `fn` gives on `mask`,
        to rounding, where the groups are exact. Constants of the program stay: a mean
        over channels that are gone still divides by their old number.
        """
        tracer = Tracer(fn, who="remove")

        def resized(params: Any, *args: Any, **kwargs: Any) -> Any:
            flat, structure = tree.flatten(params)
            big = tree.unflatten(
                structure, {path: self._before(path, w) for path, w in flat.items()}
            )
            signature, _ = tracer.signature((big, *args), kwargs)
            trace: Trace = tracer(signature, lambda t: t)
            _, operands = tracer.signature((params, *args), kwargs)
            n = len([w for w in flat.values() if hasattr(w, "shape")])
            paths = [path for path, w in flat.items() if hasattr(w, "shape")]
            sized = [
                Sized(w, self._axes(path, w.ndim))
                for path, w in zip(paths, operands[:n], strict=True)
            ]
            outs = run(trace.jaxpr, [*sized, *map(Sized.whole, operands[n:])])
            return jax.tree.unflatten(trace.out_tree, [o.array for o in outs])

        return resized

    def _map(self, f: Callable[[str, Any], Any], params: Any) -> Any:
        flat, structure = tree.flatten(params)
        return tree.unflatten(
            structure, {p: f(p, w) if p in self.kept else w for p, w in flat.items()}
        )

    def _check_shape(self, path: str, w: Any) -> None:
        if tuple(w.shape) != self.shapes[path]:
            raise ValueError(
                f"remove: {path!r} must have the shape {self.shapes[path]} that it had "
                f"in the dependency graph; got {tuple(w.shape)}. Make the graph of "
                "these params."
            )

    def _before(self, path: str, w: Any) -> Any:
        if path not in self.kept:
            return w
        return jax.ShapeDtypeStruct(self.shapes[path], w.dtype)

    def _axes(self, path: str, ndim: int) -> tuple[Kept, ...]:
        mine = self.kept.get(path, {})
        firsts = {i: left if left.ndim == 1 else left[0] for i, left in mine.items()}
        return tuple(as_kept(firsts[i]) if i in firsts else None for i in range(ndim))


def _check(group: Any, gone: np.ndarray) -> None:
    name = f"group {group.number} ({', '.join(group.paths[:3])})"
    if group.fixed is not None and gone.any():
        raise ValueError(f"remove: {name} cannot be removed: {group.fixed}.")
    if gone.shape not in ((group.size,), (group.layers, group.size)):
        raise ValueError(
            f"remove: units of {name} must be bool[{group.size}], or one row for each "
            f"of {group.layers} layers; got shape {gone.shape}."
        )
    counts = gone.sum(-1)
    if (counts == group.size).any():
        raise ValueError(f"remove: {name} would lose all of its {group.size} units.")
    if np.unique(counts).size > 1:
        raise ValueError(
            f"remove: every layer of {name} must lose as many units; got "
            f"{counts.tolist()}."
        )


def _without(left: np.ndarray, positions: np.ndarray, gone: np.ndarray) -> np.ndarray:
    """Clear the positions of the units that go, for every layer if they differ."""
    if gone.ndim == 1:
        left = left.copy()
        left[..., positions[gone].ravel()] = False
        return left
    left = np.array(np.broadcast_to(left, (len(gone), left.shape[-1])))
    for row, mine in zip(left, gone, strict=True):
        row[positions[mine].ravel()] = False
    return left


def _take(w: jax.Array, axis: int, left: np.ndarray) -> jax.Array:
    if left.ndim == 1:
        return jnp.take(w, jnp.asarray(np.flatnonzero(left), jnp.int32), axis=axis)
    places = np.stack([np.flatnonzero(row) for row in left])
    shape = [1] * w.ndim
    shape[0], shape[axis] = places.shape
    index = jnp.asarray(places.reshape(shape), jnp.int32)
    return jnp.take_along_axis(w, index, axis=axis)
