"""Where a program uses its weights: every site, and what it ran as."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jaxcompress.layout import Axes
from jaxcompress.lift import _compat
from jaxcompress.lift._lift import CustomVjp
from jaxcompress.lift._trace import Trace, Tracer, refuse_closures
from jaxcompress.lift._tracked import dense, track
from jaxcompress.lift._walk import Dense, Use, Walker


@dataclasses.dataclass(frozen=True, kw_only=True)
class UseSite:
    """One place where a program uses a weight.

    Attributes:
      path: Key path of the weight.
      op: The operation: ``"dot_general"``, ``"gather"``, ...
      how: What it ran as: ``"int8 dot"``, ``"dequantized dot"``, ``"dense"``, or, for
        a compressed weight in an operation without a rule, ``"made dense"``.
      where: Name stack at the site (module names under Flax), may be empty.
      times: How often it runs in one call, counting enclosing scans.
      axes: Roles of the weight's axes there, or None where unknown.
    """

    path: str
    op: str
    how: str
    where: str
    times: int
    axes: Axes | None

    @property
    def turned_dense(self) -> bool:
        """Whether a compressed weight is expanded outside a rule."""
        return self.how == MADE_DENSE


MADE_DENSE = "made dense"


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Every site of a program, in program order; prints as a table."""

    sites: tuple[UseSite, ...]

    def __iter__(self) -> Iterator[UseSite]:
        """Iterate over the sites."""
        return iter(self.sites)

    def of(self, path: str) -> tuple[UseSite, ...]:
        """The sites of one weight."""
        return tuple(s for s in self.sites if s.path == path)

    def __str__(self) -> str:
        """One line a site."""
        rows = [(s.path, s.op, s.how, str(s.times), s.where) for s in self.sites]
        return table(("weight", "operation", "ran as", "times", "where"), rows)


def explain(
    fn: Callable[..., Any],
    params: Any,
    *args: Any,
    custom_vjp: CustomVjp = "error",
    **kwargs: Any,
) -> Explanation:
    """List every site where `fn` uses the weights of `params`, without running it.

    Args:
      fn: As for `lift`; `params` is its first argument.
      params: Parameter pytree, compressed or not, concrete or abstract.
      *args: Example arguments (arrays or `jax.ShapeDtypeStruct`).
      custom_vjp: As for `lift`.
      **kwargs: Example keyword arguments.

    Returns:
      The sites in program order, those that would turn a leaf dense included.
    """
    sites, _ = find_sites(
        fn, params, args, kwargs, who="explain", custom_vjp=custom_vjp
    )
    return Explanation(sites)


def find_sites(
    fn: Callable[..., Any],
    params: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    who: str,
    custom_vjp: CustomVjp = "inline",
) -> tuple[tuple[UseSite, ...], Any]:
    """The sites of a program, and its abstract result."""
    found: dict[Any, UseSite] = {}

    def note(event: Use | Dense, how: str, axes: Axes | None) -> None:
        for path in event.weight.paths:
            key = (*map(id, (*event.scope, event.eqn)), path)
            found.setdefault(key, _site(path, event, how, axes))

    def ran(use: Use, how: str) -> None:
        note(use, how, use.axes)

    def turned(event: Dense) -> None:
        note(event, MADE_DENSE, None)

    walker = Walker(on_ran=ran, on_dense=turned, inline=True, custom_vjp=custom_vjp)
    tracer = Tracer(fn, who=who)
    tracked = track(params, arrays=True)
    signature, operands = tracer.signature((tracked, *args), kwargs)

    def make(trace: Trace) -> Trace:
        refuse_closures(trace, operands, who=who)
        return trace

    trace = tracer(signature, make)
    out = jax.eval_shape(
        lambda v: [dense(o) for o in walker.run(trace.jaxpr, v)[0]], operands
    )
    return tuple(found.values()), jax.tree.unflatten(trace.out_tree, out)


def _site(path: str, event: Use | Dense, how: str, axes: Axes | None) -> UseSite:
    stacks = [_compat.name_stack(e) for e in (*event.scope, event.eqn)]
    return UseSite(
        path=path,
        op=event.eqn.primitive.name,
        how=how,
        where="/".join(filter(None, stacks)),
        times=event.times,
        axes=axes,
    )


def site_axes(sites: tuple[UseSite, ...]) -> dict[str, Axes]:
    """Roles of the axes of each weight: of its first matmul, else of a look-up."""
    axes: dict[str, Axes] = {}
    for lookup in (False, True):
        for site in sites:
            if site.axes is not None and (site.op == "gather") == lookup:
                axes.setdefault(site.path, site.axes)
    return axes


def trace_axes(
    fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any
) -> dict[str, Axes]:
    """Roles of the axes of every weight, read off the traced function.

    Args:
      fn: As for `lift`; `params` is its first argument.
      params: Parameter pytree, concrete or abstract.
      *args: Example arguments.
      **kwargs: Example keyword arguments.

    Returns:
      By path: which axes are contracted and which stack scanned layers or experts;
      for ``select(rules, axes=...)``.

    Examples:
      >>> import jax.numpy as jnp
      >>> trace_axes(lambda p, x: x @ p["w"], {"w": jnp.eye(4)}, jnp.ones((1, 4)))
      {'w': Axes(contract=(-2,), stack=0)}
    """
    return site_axes(find_sites(fn, params, args, kwargs, who="trace_axes")[0])


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A plain table with aligned columns."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
