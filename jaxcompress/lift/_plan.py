"""`plan`: everything a compression will do, and everything wrong with it, at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxcompress import tree
from jaxcompress.leaf import nbytes
from jaxcompress.lift._explain import (
    MADE_DENSE,
    Explanation,
    UseSite,
    find_sites,
    site_axes,
    table,
)
from jaxcompress.transform import select


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planned:
    """What the plan says of one leaf.

    Attributes:
      path: Key path.
      shape: Logical shape.
      method: What will be done, ``"kept"`` where no rule chose the leaf.
      sites: Where it is used.
      bytes_before: Bytes now.
      bytes_after: Bytes in stored form, or None where they depend on the values.
    """

    path: str
    shape: tuple[int, ...]
    method: str
    sites: tuple[UseSite, ...]
    bytes_before: int
    bytes_after: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The result of `plan`; prints as a table, problems last.

    Attributes:
      leaves: One entry a leaf, in the tree's order.
      problems: Everything that would fail or run dense, in words.
      peak_bytes: Memory that `compress` needs: all weights before and after, and the
        working copies of the largest one.
    """

    leaves: tuple[Planned, ...]
    problems: tuple[str, ...]
    peak_bytes: int

    @property
    def bytes_before(self) -> int:
        """Bytes of all leaves now."""
        return sum(p.bytes_before for p in self.leaves)

    @property
    def bytes_after(self) -> int | None:
        """Bytes of all leaves in stored form, or None if some depend on values."""
        after = [p.bytes_after for p in self.leaves]
        return None if None in after else sum(a for a in after if a is not None)

    def check(self) -> Plan:
        """The plan itself; raises if it has problems.

        Raises:
          ValueError: Listing all of them.
        """
        if self.problems:
            lines = "\n".join(f"- {p}" for p in self.problems)
            raise ValueError(f"plan: {len(self.problems)} problem(s):\n{lines}")
        return self

    def __str__(self) -> str:
        """One line a leaf, the totals, and the problems."""
        rows = [
            (
                p.path,
                "x".join(map(str, p.shape)),
                p.method,
                ", ".join(sorted({f"{s.op}: {s.how}" for s in p.sites})) or "no matmul",
                f"{p.bytes_before:,}",
                _count(p.bytes_after),
            )
            for p in self.leaves
        ]
        total = (
            "total",
            "",
            "",
            "",
            f"{self.bytes_before:,}",
            _count(self.bytes_after),
        )
        header = ("weight", "shape", "method", "used by", "bytes", "after")
        lines = [
            table(header, [*rows, total]),
            f"memory needed: {self.peak_bytes:,} bytes",
        ]
        lines += [f"problem: {p}" for p in self.problems]
        return "\n".join(lines)


def _count(n: int | None) -> str:
    return "by value" if n is None else f"{n:,}"


def plan(
    fn: Callable[..., Any],
    params: Any,
    *example: Any,
    rules: Mapping[Any, Any],
    **kwargs: Any,
) -> Plan:
    """Say what `compress(params, rules, fn=fn)` will do, without running anything.

    Args:
      fn: As for `lift`; `params` is its first argument.
      params: Parameter pytree; abstract arrays will do.
      *example: Example arguments of `fn` after the parameters.
      rules: As for `compress`.
      **kwargs: Example keyword arguments.

    Returns:
      For every leaf its shape, method, sites and bytes before and after; and every
      problem at once: rules that match nothing or overlap, shapes a method refuses,
      chosen weights that no site uses, operations that would turn a leaf dense.

    Examples:
      >>> import jax.numpy as jnp
      >>> import jaxcompress as jc
      >>> p = plan(lambda p, x: x @ p["w"], {"w": jnp.ones((64, 8))}, jnp.ones((1, 64)),
      ...          rules={"w": jc.quant.int8()})
      >>> p.bytes_before, p.bytes_after, p.problems
      (2048, 544, ())
    """
    sites, _ = find_sites(fn, params, example, kwargs, who="plan")
    axes = site_axes(sites)
    flat, structure = tree.flatten(params)
    flat = {path: _struct(leaf) for path, leaf in flat.items()}
    problems: list[str] = []
    stored, after = dict(flat), dict.fromkeys(flat, True)
    chosen = _chosen(rules, tree.unflatten(structure, flat), problems)
    for path, rule in chosen.items():
        stored[path], after[path] = _compress_abstractly(
            path, flat[path], rule, axes, problems
        )
    running, _ = find_sites(
        fn, tree.unflatten(structure, stored), example, kwargs, who="plan"
    )
    used = {s.path for s in (*sites, *running)}
    problems += [
        f"no site uses {path!r}; leave it out of the rules"
        for path in chosen
        if path not in used
    ]
    problems += [
        f"{s.path!r} is made dense by {s.op!r}" + (f" in {s.where}" if s.where else "")
        for s in running
        if s.how == MADE_DENSE
    ]
    explained = Explanation(running)
    leaves = tuple(
        Planned(
            path=path,
            shape=tuple(leaf.shape),
            method=getattr(stored[path], "method", "kept"),
            sites=explained.of(path),
            bytes_before=_tree_bytes(leaf),
            bytes_after=_tree_bytes(stored[path]) if after[path] else None,
        )
        for path, leaf in flat.items()
    )
    largest = max((p.bytes_before for p in leaves), default=0)
    peak = sum(p.bytes_before + (p.bytes_after or p.bytes_before) for p in leaves)
    return Plan(leaves=leaves, problems=tuple(problems), peak_bytes=peak + 4 * largest)


def _chosen(
    rules: Mapping[Any, Any], params: Any, problems: list[str]
) -> dict[str, Any]:
    """The rule of each leaf; rules that cannot be applied become problems."""
    chosen: dict[str, Any] = {}
    for rule, value in rules.items():
        try:
            hits = tree.choose({rule: value}, params, who="plan")
        except ValueError as error:
            problems.append(str(error).removeprefix("plan: "))
            continue
        for path, found in hits.items():
            if path in chosen:
                problems.append(f"two rules match {path!r}; exclude it from one")
            else:
                chosen[path] = found
    return chosen


def _compress_abstractly(
    path: str, leaf: Any, rule: Any, axes: Mapping[str, Any], problems: list[str]
) -> tuple[Any, bool]:
    """The stored form of one leaf and whether its size is known; else the problem."""
    try:
        scheme = select({path: rule}, axes=axes)
        try:
            stored = lambda p: scheme.compress(*scheme.init(p))
            return jax.eval_shape(stored, {path: leaf})[path], True
        except jax.errors.JAXTypeError:  # The size depends on the values.
            view = lambda p: scheme.view(*scheme.init(p))
            return jax.eval_shape(view, {path: leaf})[path], False
    except (TypeError, ValueError) as error:
        problems.append(str(error))
        return leaf, True


def _struct(leaf: Any) -> Any:
    """The abstract form of a leaf or array."""
    return jax.eval_shape(lambda x: x, leaf)


def _tree_bytes(x: Any) -> int:
    return sum(map(nbytes, jax.tree.leaves(x)))
