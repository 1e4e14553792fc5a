"""One sweep through a program that compresses each weight where it is used.

What is compressed next sees what the compressed weights before it give. The program
runs in segments between the weights, each jitted once: a scanned layer is compiled
once, however often it runs. The algorithm for one weight comes from a family.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress import tree
from jaxcompress.layout import Axes
from jaxcompress.leaf import Leaf
from jaxcompress.lift import _compat
from jaxcompress.lift._algorithm import Algorithm, Layer
from jaxcompress.lift._explain import UseSite, find_sites, site_axes
from jaxcompress.lift._journal import Journal, fingerprint
from jaxcompress.lift._memory import check_memory, sweep_bytes
from jaxcompress.lift._output_error import moved, relative_error
from jaxcompress.lift._pending import Pending
from jaxcompress.lift._rows import ROWS
from jaxcompress.lift._statistics import Statistics, statistics
from jaxcompress.lift._streams import Interpreter, Streams
from jaxcompress.lift._trace import Tracer, refuse_closures
from jaxcompress.lift._tracked import LiftError, Tracked, track
from jaxcompress.lift._walk import Use
from jaxcompress.progress import say
from jaxcompress.values import check_weight


def sweep(
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    algorithms: Mapping[Any, Algorithm],
    *,
    reference: bool = False,
    damping: float = 0.01,
    work_dir: Any = None,
    histogram: bool = False,
    memory_limit: int | None = None,
    on_layer: Callable[[Layer], None] = say,
) -> Any:
    r"""Compress the chosen weights one after another, in the order the program runs.

    Each sees the inputs that the compressed weights before it produce. With
    `reference` the float model runs beside, and each weight is first moved to make up
    for the errors before it, :math:`(\hat X^T \hat X)^{-1} \hat X^T X W`, with
    :math:`\hat X` the compressed model's inputs and :math:`X` the float model's.

    Args:
      fn: As for `lift`; ``fn(params, *batch)`` is called.
      params: Parameter pytree.
      batches: Example inputs: tuples of arguments, or single arguments, alike in shape.
        All are kept at once, with their activations between two weights.
      algorithms: From rules, as for `compress`, to algorithms.
      reference: Run the float model beside; twice the time and memory.
      damping: Of that move, relative to the mean second moment.
      work_dir: Folder for the log and finished layers; a sweep that was killed goes on
        from there, and refuses to if the model, the batches or the rules differ.
      histogram: Collect histograms of the inputs too, for activation ranges.
      memory_limit: Bytes that it may take; by default those of the device. What it
        needs is estimated from the program.
      on_layer: Called with the report of every layer; by default says it on a terminal.

    Returns:
      `params` with compressed leaves where the rules chose.

    Raises:
      ValueError: If batches is empty or unlike, a rule matches nothing, or an algorithm
        refuses a weight, before anything runs; or if what enters a chosen weight's
        matmul is not finite.
      MemoryError: If the estimate is above the limit; before anything runs.
      LiftError: If a chosen weight is used where a sweep cannot reach (a while loop,
        shard_map, a conditional that depends on the data), or not at all.
    """
    inputs = [b if isinstance(b, tuple) else (b,) for b in batches]
    if not inputs:
        raise ValueError("sweep: batches is empty; pass at least one batch.")
    chosen = tree.choose(algorithms, params, who="sweep")
    flat, structure = tree.flatten(params)
    _refuse_leaves({path: flat[path] for path in chosen})
    pending = tree.unflatten(
        structure, {p: Pending.of(w) if p in chosen else w for p, w in flat.items()}
    )
    sites, _ = find_sites(fn, pending, inputs[0], {}, who="sweep")
    axes = _check(sites, flat, chosen)
    journal = None
    if work_dir is not None:
        recipe = {path: a.name for path, a in chosen.items()}
        recipe["reference"] = f"{reference} {damping}"
        journal = Journal(work_dir, fingerprint(params, inputs, recipe))
    streams = inputs * 2 if reference else inputs
    run = Sweep(
        chosen,
        axes,
        streams=len(streams),
        references=len(inputs) if reference else 0,
        damping=damping,
        histogram=histogram,
        journal=journal,
        on_layer=on_layer,
    )

    def check(jaxpr: Any, weights: list[bool]) -> None:
        needed = sweep_bytes(
            jaxpr,
            weights,
            streams=len(streams),
            params={path: flat[path] for path in chosen},
            sites=sites,
            axes=axes,
        )
        check_memory(needed, memory_limit, who="sweep")

    run(fn, pending, streams, check)
    packed = {p: run.result(p, w) if p in chosen else w for p, w in flat.items()}
    return tree.unflatten(structure, packed)


def _refuse_leaves(weights: Mapping[str, Any]) -> None:
    for path, w in weights.items():
        if isinstance(w, Leaf):
            raise LiftError(
                f"sweep: {path!r} is compressed already; leave it out of the rules."
            )
        check_weight(w, path, "sweep")


def _check(
    sites: tuple[UseSite, ...],
    flat: Mapping[str, Any],
    chosen: Mapping[str, Algorithm],
) -> dict[str, Axes]:
    """Refuse what can be refused before the first weight; the axes of each."""
    axes = site_axes(sites)
    for path, algorithm in chosen.items():
        if path not in axes:
            raise LiftError(
                f"sweep: no matmul or look-up uses {path!r}; leave it out of the rules."
            )
        # The whole weight stands for each of its slices: blocks lie behind the stack.
        run = functools.partial(algorithm.baseline, axes=axes[path], path=path)
        jax.eval_shape(run, flat[path], None)
    return axes


class Sweep:
    """Compresses the weights that an interpreter meets."""

    def __init__(
        self,
        chosen: Mapping[str, Algorithm],
        axes: Mapping[str, Axes],
        *,
        streams: int,
        references: int,
        damping: float,
        histogram: bool,
        journal: Journal | None,
        on_layer: Callable[[Layer], None],
    ) -> None:
        """A sweep over `streams` batches, the first `references` of them float."""
        self.chosen = chosen
        self.axes = axes
        self.damping = damping
        self.histogram = histogram
        self.journal = journal
        self.on_layer = on_layer
        self.program = Interpreter(
            streams=streams, references=references, visit=self.visit, who="sweep"
        )
        self.done: dict[str, dict[tuple[int, int], Leaf]] = {p: {} for p in chosen}
        self._shared: tuple[Any, Any] | None = None
        self._number = 0

    def __call__(
        self,
        fn: Callable[..., Any],
        params: Any,
        batches: list[tuple[Any, ...]],
        check: Callable[[Any, list[bool]], None],
    ) -> None:
        """Run `fn` on every batch at once.

        First `check` sees its jaxpr, and which of the inputs are weights.
        """
        tracer = Tracer(fn, who="sweep")
        tracked = track(params, arrays=False)
        signed = [tracer.signature((tracked, *batch), {}) for batch in batches]
        for number, (signature, _) in enumerate(signed):
            if signature.key != signed[0][0].key:
                raise ValueError(
                    f"sweep: batches must be alike in structure, shapes and dtypes; "
                    f"batch {number} differs from the first. Pad it, or leave it out."
                )
        trace = tracer(signed[0][0], lambda trace: trace)
        operands = [
            v[0] if isinstance(v[0], Tracked) else Streams(v)
            for v in zip(*(ops for _, ops in signed), strict=True)
        ]
        refuse_closures(trace, signed[0][1], who="sweep")
        check(trace.jaxpr, [isinstance(v, Tracked) for v in operands])
        self.program.run(trace.jaxpr, operands)

    def result(self, path: str, w: jax.Array) -> Leaf:
        """The compressed parameter; entries that never ran had no data."""
        done = self.done[path]
        depth = max((depth for depth, _ in done), default=0)
        if not depth:
            return done.get((0, 0)) or self._without_data(path, w, 0, None)
        entries = jnp.reshape(w, (-1, *w.shape[depth:]))
        leaves = [
            done.get((depth, i)) or self._without_data(path, entries[i], depth, i)
            for i in range(entries.shape[0])
        ]
        stack = w.shape[:depth]
        return jax.tree.map(
            lambda *a: jnp.stack(a).reshape(*stack, *a[0].shape), *leaves
        )

    def _without_data(
        self, path: str, w: jax.Array, depth: int, entry: int | None
    ) -> Leaf:
        """The compressed form of a weight, or an entry of it, that never ran."""
        axes = self.axes[path]
        axes = dataclasses.replace(axes, stack=max(axes.stack - depth, 0))
        leaf = self.chosen[path].run(w, None, axes=axes, path=path)
        self.on_layer(
            Layer(
                path=path,
                entry=entry,
                method=leaf.method,
                rows=0.0,
                error_before=None,
                error=None,
                seconds=0.0,
            )
        )
        return leaf

    def visit(
        self, weight: Tracked, site: Callable[..., Use], others: list[Streams]
    ) -> Any:
        """What the program goes on with at a use of a weight."""
        pending = weight.value
        if not isinstance(pending, Pending) or pending.index.ndim:
            return pending
        return pending.repeat_on(self._leaf(weight, site, others))

    def _leaf(self, weight: Tracked, site: Callable[..., Use], others: Any) -> Leaf:
        """The weight's compressed form: its own of an earlier use, or made now."""
        pending, path = weight.value, weight.path
        key = (pending.depth, int(pending.index))
        if key in self.done[path]:
            return self.done[path][key]
        start = time.perf_counter()
        use = site(weight, [o[0] for o in others])
        axes = use.axes
        if axes is None:
            raise LiftError(
                f"sweep: contracting and other axes of {path!r} were merged before its "
                "use; leave it out of the rules."
            )
        axes = dataclasses.replace(axes, stack=max(axes.stack - pending.depth, 0))
        algorithm, w = self.chosen[path], pending.value
        stats, cross = self._statistics(weight, site, others)
        if cross is not None:
            move = self.program.jit(
                ("move", axes), functools.partial(moved, axes, self.damping)
            )
            w = move(w, stats.gram, cross)
        like = jax.eval_shape(self._compressor(algorithm.run, axes, path), w, stats)
        leaf = self.journal.load(self._number, like) if self.journal else None
        resumed = leaf is not None
        if leaf is None:
            leaf = self._compressor(algorithm.run, axes, path)(w, stats)
        error = before = None
        if stats is not None:
            measure = self.program.jit(
                ("error", axes), functools.partial(relative_error, axes)
            )
            base = self._compressor(algorithm.baseline, axes, path)(w, stats)
            before = float(measure(w, base, stats.gram))
            error = float(measure(w, leaf, stats.gram))
        jax.block_until_ready(leaf)
        layer = Layer(
            path=path,
            entry=key[1] if pending.depth else None,
            method=leaf.method,
            rows=0.0 if stats is None else float(stats.count.sum()),
            error_before=before,
            error=error,
            seconds=time.perf_counter() - start,
            resumed=resumed,
        )
        if self.journal is not None and not resumed:
            self.journal.save(self._number, leaf)
            self.journal.log(dataclasses.asdict(layer))
        self._number += 1
        self.done[path][key] = leaf
        self.on_layer(layer)
        return leaf

    def _compressor(self, f: Callable[..., Leaf], axes: Axes, path: str) -> Any:
        """One jitted function for all weights of a rule, but for the path in errors."""
        return self.program.jit((f, axes), functools.partial(f, axes=axes, path=path))

    def _statistics(
        self, weight: Tracked, site: Callable[..., Use], others: Any
    ) -> tuple[Any, Any]:
        """Statistics of the compressed inputs, and ``X_hat^T X`` with a reference.

        Weights that share their input (q, k, v) share them.
        """
        use = site(weight, [o[0] for o in others])
        rows = ROWS.get(use.op)
        if rows is None:
            return None, None
        key = (
            tuple(id(x) for o in others for x in o),
            str(use.eqn.params),
            use.weight.dims,
            tuple(use.weight.shape[a] for a in use.contracted),
        )
        if self._shared is not None and self._shared[0] == key:
            return self._shared[1][:2]

        def collect(w: Tracked, *others: Any) -> Statistics:
            x, mask = rows(site(w, others))
            return statistics(x, weights=mask, gram=True, histogram=self.histogram)

        def cross(w: Tracked, float_: Any, compressed: Any) -> jax.Array:
            (a, _), (b, mask) = rows(site(w, float_)), rows(site(w, compressed))
            if mask is not None:
                b = b * mask[..., None]
            return jnp.matmul(
                jnp.matrix_transpose(b.astype(jnp.float32)),
                a.astype(jnp.float32),
                precision="highest",
            )

        like = (_compat.likeness(use.eqn), use.position, use.contracted, use.batch)
        nameless = dataclasses.replace(weight, path="")
        each = self.program.jit(("stats", like), collect)
        stats = None
        crossed = None
        for i in range(self.program.references, self.program.streams):
            mine = [o[i] for o in others]
            new = each(nameless, *mine)
            stats = new if stats is None else stats.merge(new)
            if self.program.references:
                j = i - self.program.references
                both = self.program.jit(("cross", like), cross)
                c = both(nameless, [o[j] for o in others], mine)
                crossed = c if crossed is None else crossed + c
        assert stats is not None
        _refuse_infinite(stats, weight.path)
        # The streams are kept with their identities, which are the key.
        self._shared = (key, (stats, crossed, others))
        return stats, crossed


def _refuse_infinite(stats: Statistics, path: str) -> None:
    bad = int(jnp.sum(~jnp.isfinite(stats.total_square)))
    if bad:
        raise ValueError(
            f"sweep: what enters the matmul of {path!r} must be finite; {bad} of "
            f"{stats.total_square.size} channels are NaN, infinite or overflow when "
            "squared. Look at the batches, or leave the weight out of the rules."
        )
