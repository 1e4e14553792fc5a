"""Key paths and the rules that choose leaves of a pytree by path and value."""

from __future__ import annotations

import collections
import difflib
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.leaf import FROZEN, WEIGHT, Leaf, is_leaf, static_type

T = TypeVar("T")

Predicate = Callable[[str, Any], bool]


@static_type
class Where:
    """Paths that match `pattern` and none of `exclude`; a rule as `select` takes it."""

    pattern: str
    exclude: tuple[str, ...] = ()

    def __call__(self, path: str, leaf: Any) -> bool:
        """Whether the rule chooses the leaf at `path`."""
        del leaf
        return matches(self.pattern, path) and not any(
            matches(p, path) for p in self.exclude
        )


Rule = str | Predicate


def where(pattern: str, *, exclude: str | Iterable[str] = ()) -> Where:
    """A rule for the paths that match `pattern` but none of `exclude`.

    Examples:
      >>> rule = where("**/kernel", exclude="head/*")
      >>> rule("layers/0/kernel", None), rule("head/kernel", None)
      (True, False)
    """
    return Where(
        pattern=pattern,
        exclude=(exclude,) if isinstance(exclude, str) else tuple(exclude),
    )


def path_str(path: Iterable[Any]) -> str:
    """A JAX key path as ``"params/Dense_0/kernel"``.

    Examples:
      >>> from jax.tree_util import DictKey, SequenceKey
      >>> path_str((DictKey("layers"), SequenceKey(0), DictKey("kernel")))
      'layers/0/kernel'
    """
    return "/".join(_key_name(key) for key in path)


def _key_name(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        value = getattr(key, attribute, None)
        if value is not None:
            return str(value)
    return str(key)


def flatten(tree: Any) -> tuple[dict[str, Any], Any]:
    """The leaves of a pytree by path, compressed leaves whole, and its structure.

    The field of an NNX variable that holds its array is left out: ``layer/kernel``,
    not ``layer/kernel/value``.

    Raises:
      ValueError: If two leaves have the same path.
    """
    leaves, structure = jax.tree.flatten(tree, is_leaf=is_leaf)
    return dict(zip(_paths(structure), leaves, strict=True)), structure


@functools.lru_cache(maxsize=256)
def _paths(structure: Any) -> tuple[str, ...]:
    """The paths of a structure's leaves; kept, since JAX builds them slowly."""
    numbered = jax.tree.unflatten(structure, range(structure.num_leaves))
    pairs, _ = jax.tree_util.tree_flatten_with_path(numbered)
    siblings = collections.Counter(path[:-1] for path, _ in pairs)
    names = tuple(
        path_str(p[:-1] if _is_variable(p) and siblings[p[:-1]] == 1 else p)
        for p, _ in pairs
    )
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"flatten: two leaves of the tree have the path {twice!r}.")
    return names


def _is_variable(path: tuple[Any, ...]) -> bool:
    """Whether a path ends in the field in which NNX keeps a variable's array."""
    return len(path) > 1 and getattr(path[-1], "name", None) in ("value", "raw_value")


def unflatten(structure: Any, flat: Mapping[str, Any]) -> Any:
    """Undo `flatten`; `flat` keeps its order."""
    return jax.tree.unflatten(structure, list(flat.values()))


@functools.lru_cache(maxsize=1024)
def _compiled(pattern: str) -> re.Pattern[str]:
    parts = []
    for part in re.split(r"(\*\*/|\*\*|\*|\?)", pattern):
        parts.append(
            {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}.get(
                part, re.escape(part)
            )
        )
    return re.compile("".join(parts))


def matches(pattern: str, path: str) -> bool:
    """Whether a glob matches a whole path.

    ``*`` stands for anything within one key, ``**`` for any number of keys
    (none included), ``?`` for one character.

    Examples:
      >>> matches("**/kernel", "kernel"), matches("*/kernel", "a/b/kernel")
      (True, False)
    """
    return _compiled(pattern).fullmatch(path) is not None


def choose(rules: Mapping[Any, T], params: Any, *, who: str) -> dict[str, T]:
    """The rule of each chosen leaf, by path, in the tree's order.

    Args:
      rules: Glob patterns, `where(...)` or predicates ``(path, leaf) -> bool``,
        each with its value.
      params: Any pytree.
      who: Function named in errors.

    Raises:
      ValueError: If a rule matches nothing (the nearest paths are listed), or two
        rules match the same leaf. All problems are reported at once.
    """
    flat, _ = flatten(params)
    problems: list[str] = []
    chosen: dict[str, tuple[Any, T]] = {}
    for rule, value in rules.items():
        hits = [path for path, leaf in flat.items() if _hit(rule, path, leaf)]
        if not hits:
            problems.append(f"rule {_name(rule)} matches nothing; {_near(rule, flat)}")
        for path in hits:
            if path in chosen:
                problems.append(
                    f"rules {_name(chosen[path][0])} and {_name(rule)} both match "
                    f"{path!r}; leave it out of one: "
                    f"where({_name(chosen[path][0])}, exclude={_name(rule)})"
                )
            else:
                chosen[path] = (rule, value)
    if problems:
        raise ValueError(f"{who}: " + "; ".join(problems) + ".")
    return {path: chosen[path][1] for path in flat if path in chosen}


def _hit(rule: Any, path: str, leaf: Any) -> bool:
    return matches(rule, path) if isinstance(rule, str) else bool(rule(path, leaf))


def _name(rule: Any) -> str:
    return (
        repr(rule)
        if isinstance(rule, str | Where)
        else getattr(rule, "__name__", repr(rule))
    )


def _near(rule: Any, flat: Mapping[str, Any]) -> str:
    if not flat:
        return "the tree has no leaves"
    pattern = rule.pattern if isinstance(rule, Where) else rule
    if isinstance(pattern, str):
        near = difflib.get_close_matches(
            pattern.replace("*", ""), flat, n=5, cutoff=0.3
        )
        if near:
            return f"the nearest paths are {near}"
    return f"the tree's paths begin {list(flat)[:5]}"


def partition(tree: Any) -> tuple[Any, Any]:
    """Split a tree into what training may change and the rest.

    Args:
      tree: Any pytree, compressed leaves included. Floating components are
        trainable unless their role is frozen; integers never are.

    Returns:
      ``(trainable, rest)``, both of the tree's structure with ``None`` where the
      other holds the array; `merge` undoes it.

    Examples:
      >>> partition({"step": jnp.array(3), "w": jnp.zeros(2)})[0]
      {'step': None, 'w': Array([0., 0.], dtype=float32)}
    """
    trainable = trainable_mask(tree)
    keep = jax.tree.map(lambda x, t: x if t else None, tree, trainable)
    rest = jax.tree.map(lambda x, t: None if t else x, tree, trainable)
    return keep, rest


def merge(trainable: Any, rest: Any) -> Any:
    """Undo `partition`."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, trainable, rest, is_leaf=lambda x: x is None
    )


def trainable_mask(tree: Any) -> Any:
    """True at each trainable array: floating, and not in a frozen component."""
    return _by_role(tree, lambda x, role, rank: role != FROZEN and _is_float(x))


def weight_decay_mask(tree: Any) -> Any:
    """True at each array that weight decay should act on, for `optax.masked`.

    Plain arrays of rank two or more, and components of role ``"weight"`` of leaves that
    stand for such: a learned step, a gate, a codebook, a bias or a normalization scale
    is not decayed.
    """
    return _by_role(
        tree, lambda x, role, rank: role == WEIGHT and _is_float(x) and rank > 1
    )


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.floating)


def _by_role(
    tree: Any,
    f: Callable[[Any, str, int], bool],
    role: str = WEIGHT,
    rank: int | None = None,
) -> Any:
    """`f` of every array, its role and the rank of the array or outermost leaf."""

    def mark(x: Any) -> Any:
        whole = np.ndim(x) if rank is None else rank
        if not isinstance(x, Leaf):
            return f(x, role, whole)
        inner = {
            name: _by_role(value, f, FROZEN if role == FROZEN else own, whole)
            for name, (value, own) in x.components().items()
        }
        return x.replace(**inner)

    return jax.tree.map(mark, tree, is_leaf=is_leaf)
