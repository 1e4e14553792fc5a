"""Which layer of a teacher goes with each layer of a smaller student."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from jaxcompress.leaf import Leaf, is_leaf

MapKind = Literal["uniform", "skip", "last", "first", "spaced"]

NUMBER = "{}"


def layer_map(
    student_layers: int, teacher_layers: int, *, kind: MapKind = "uniform"
) -> tuple[int, ...]:
    r"""The layer of the teacher that each layer of the student learns from.

    With :math:`M` layers of the student, :math:`N` of the teacher, both counted from 1:

    .. math::
       uniform:\; \lfloor m N / M \rfloor \quad
       skip:\; m \lfloor N / M \rfloor \quad
       last:\; N - M + m \quad
       first:\; m \quad
       spaced:\; 1 + \Big\lfloor \tfrac{(m - 1)(N - 1)}{M - 1} + \tfrac12 \Big\rfloor

    Args:
      student_layers: :math:`M`, at most `teacher_layers`.
      teacher_layers: :math:`N`.
      kind: ``"uniform"`` ends at the teacher's last layer; ``"skip"`` takes every k-th;
        ``"spaced"`` keeps the first and the last (the last alone if :math:`M = 1`).

    Returns:
      Rising numbers from 0, one for each layer of the student: to index values of
      `features` that a scan stacked, or for `take_layers`.

    Raises:
      ValueError: If a count is no positive integer, the student has more layers than
        the teacher, or there is no such `kind`.

    Examples:
      >>> layer_map(4, 12), layer_map(3, 7), layer_map(3, 7, kind="skip")
      ((2, 5, 8, 11), (1, 3, 6), (1, 3, 5))
      >>> layer_map(3, 7, kind="last"), layer_map(3, 7, kind="spaced")
      ((4, 5, 6), (0, 3, 6))

    References:
      Jiao et al., `TinyBERT <https://arxiv.org/abs/1909.10351>`_, 2020, section 3.1
      (uniform, g(m) = 3m); Sun et al., `Patient Knowledge Distillation
      <https://arxiv.org/abs/1908.09355>`_, 2019, section 3.2 (PKD-Skip, PKD-Last);
      Gandhi et al., `Distil-Whisper <https://arxiv.org/abs/2311.00430>`_, 2023, section
      4 (maximally spaced). Differs: PKD leaves the student's last layer to the loss on
      the outputs; drop the last entry for that.
    """
    m, n = student_layers, teacher_layers
    for name, count in (("student_layers", m), ("teacher_layers", n)):
        if not isinstance(count, int) or count < 1:
            raise ValueError(
                f"distill.layer_map: {name} must be a positive integer; got {count!r}."
            )
    if m > n:
        raise ValueError(
            "distill.layer_map: student_layers must be at most teacher_layers; got "
            f"{m} and {n}. Exchange them?"
        )
    if kind not in _LAYER:
        raise ValueError(
            f"distill.layer_map: kind must be one of {tuple(_LAYER)}; got {kind!r}."
        )
    return tuple(_LAYER[kind](i, m, n) for i in range(m))


def _spaced(i: int, m: int, n: int) -> int:
    return n - 1 if m == 1 else (2 * i * (n - 1) + m - 1) // (2 * (m - 1))


_LAYER: dict[str, Callable[[int, int, int], int]] = {
    "uniform": lambda i, m, n: (i + 1) * n // m - 1,
    "skip": lambda i, m, n: (i + 1) * (n // m) - 1,
    "last": lambda i, m, n: n - m + i,
    "first": lambda i, m, n: i,
    "spaced": _spaced,
}


def take_layers(params: Any, path: str, indices: Sequence[int]) -> Any:
    """Parameters of a student whose layers are some of the teacher's.

    Args:
      params: Parameter pytree of the teacher; its containers on the way to the layers
        are mappings, lists or tuples.
      path: Of the layers. With ``{}`` for the number they are apart
        (``"params/layers_{}"``, ``"layers/{}"``); without it every array below is
        stacked, ``[layers, ...]``, as a scan takes them.
      indices: Which layers, in the student's order, as of `layer_map`; a layer may come
        twice.

    Returns:
      `params` with ``len(indices)`` layers, numbered from 0. All else is the same
      objects, and so are the arrays of layers that stand apart: do not donate both.

    Raises:
      ValueError: If nothing is at `path`, an index is out of range, there are none, or
        the layers do not form one stack.

    Examples:
      >>> import jax.numpy as jnp
      >>> params = {"layers_0": jnp.zeros(1), "layers_1": jnp.ones(1), "head": 0}
      >>> take_layers(params, "layers_{}", [1])
      {'layers_0': Array([1.], dtype=float32), 'head': 0}
      >>> take_layers({"layers": jnp.arange(6).reshape(3, 2)}, "layers", [0, 2])
      {'layers': Array([[0, 1], [4, 5]], dtype=int32)}

    References:
      Sanh et al., `DistilBERT <https://arxiv.org/abs/1910.01108>`_, 2019, section 2
      (a student initialized by one layer of the teacher out of two).
    """
    if not len(indices):
        raise ValueError("distill.take_layers: indices is empty; name a layer.")
    *above, last = path.split("/")
    if any(NUMBER in key for key in above) or last.count(NUMBER) > 1:
        raise ValueError(
            f"distill.take_layers: path may hold {NUMBER!r} once, in its last key; got "
            f"{path!r}. Stop at the layers."
        )
    return _rebuilt(params, path.split("/"), [int(i) for i in indices], path)


def _rebuilt(node: Any, keys: list[str], indices: list[int], path: str) -> Any:
    """The containers on the way to the layers, with the chosen layers."""
    if not keys:
        return _sliced(node, indices, path)
    key, *below = keys
    items = _items(node, path)
    if NUMBER in key:
        return _container(node, _renumbered(items, key, indices, path))
    name = next((k for k in items if str(k) == key), None)
    if name is None:
        raise ValueError(
            f"distill.take_layers: nothing is at {path!r}: there is no {key!r} among "
            f"{[str(k) for k in items][:10]}."
        )
    child = _rebuilt(items[name], below, indices, path)
    return _container(node, {**items, name: child})


def _items(node: Any, path: str) -> dict[Any, Any]:
    if isinstance(node, Mapping):
        return dict(node)
    if type(node) in (list, tuple):
        return dict(enumerate(node))
    raise ValueError(
        "distill.take_layers: containers on the way to the layers must be mappings, "
        f"lists or tuples; {path!r} leads through a {type(node).__name__}."
    )


def _container(node: Any, items: dict[Any, Any]) -> Any:
    return type(node)(items if isinstance(node, Mapping) else items.values())


def _renumbered(
    items: dict[Any, Any], key: str, indices: list[int], path: str
) -> dict[Any, Any]:
    """The chosen layers in place of all of them, at the place of the first."""
    pattern = re.compile(r"(\d+)".join(map(re.escape, key.split(NUMBER))))
    found = {k: re.fullmatch(pattern, str(k)) for k in items}
    names = {int(match[1]): k for k, match in found.items() if match}
    if not names:
        raise ValueError(
            f"distill.take_layers: no layer is at {path!r}; there are "
            f"{[str(k) for k in items][:10]}."
        )
    _check_range(indices, sorted(names), path)
    plain = isinstance(next(iter(names.values())), int)
    new = {
        n if plain else key.replace(NUMBER, str(n)): items[names[i]]
        for n, i in enumerate(indices)
    }
    result: dict[Any, Any] = {}
    for k, child in items.items():
        result |= {k: child} if not found[k] else new
    return result


def _sliced(layers: Any, indices: list[int], path: str) -> Any:
    leaves = jax.tree.leaves(layers, is_leaf=is_leaf)
    lengths = {np.shape(a)[:1] for a in leaves}
    if len(lengths) != 1 or lengths == {()}:
        raise ValueError(
            f"distill.take_layers: the arrays below {path!r} must be stacked alike, "
            f"[layers, ...]; their first axes are {sorted(lengths)}. For layers that "
            f"stand apart write {NUMBER!r} in place of the number."
        )
    _check_range(indices, list(range(lengths.pop()[0])), path)
    chosen = np.asarray(indices, np.int32)

    def take(a: Any) -> Any:
        stacked = a.stacked(1) if isinstance(a, Leaf) else a
        if stacked is NotImplemented:
            raise ValueError(
                f"distill.take_layers: {a!r} below {path!r} cannot be cut by layer; "
                "take the layers before compressing."
            )
        return jax.tree.map(lambda x: x[chosen], stacked)

    return jax.tree.map(take, layers, is_leaf=is_leaf)


def _check_range(indices: list[int], layers: list[int], path: str) -> None:
    if wrong := [i for i in indices if i not in layers]:
        raise ValueError(
            f"distill.take_layers: indices must be among the layers {layers} at "
            f"{path!r}; got {wrong[0]}."
        )
