"""Pictures of weights before and after compression; needs the extra ``plots``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxcompress import tree
from jaxcompress.leaf import Leaf, materialize

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from jaxcompress.report._pruning import PruningReport


def histograms(
    params: Any, packed: Any, *, path: Any = "**", bins: int = 101, log: bool = False
) -> Figure:
    """Distributions of the weights before and after, one picture a compressed leaf.

    Args:
      params: The original parameters.
      packed: The compressed ones, with leaves at the same paths.
      path: Glob or predicate ``(path, leaf) -> bool``: which leaves of `packed`.
      bins: Intervals between the lowest and the highest value.
      log: Count on a logarithmic axis.

    Returns:
      A figure, not shown and not known to `pyplot`: ``figure.savefig("weights.png")``.

    Raises:
      ImportError: If matplotlib is not installed.
      ValueError: If `path` matches no compressed leaf, or `params` has no weight of
        that shape there.

    Examples:
      >>> import jax.numpy as jnp
      >>> import jaxcompress as jc
      >>> params = {"w": jnp.arange(32.0).reshape(8, 4)}
      >>> figure = histograms(params, jc.compress(params, {"w": jc.quant.int4()}))
      >>> [axis.get_title() for axis in figure.axes]
      ['w: int4']
    """
    Figure = _figure()
    if not isinstance(bins, int) or bins < 1:
        raise ValueError(f"histograms: bins must be a positive integer; got {bins!r}.")
    pairs = _pairs(params, packed, path)
    figure = Figure(figsize=(6.4, 2.4 * len(pairs)), layout="constrained")
    axes = figure.subplots(len(pairs), squeeze=False)[:, 0]
    for axis, (name, (before, leaf)) in zip(axes, pairs.items(), strict=True):
        values = [_values(before), _values(leaf)]
        low, high = min(v.min() for v in values), max(v.max() for v in values)
        edges = np.histogram_bin_edges([low, high], bins)
        for v, label, fill in zip(
            values, ("before", "after"), (True, False), strict=True
        ):
            counts = np.histogram(v, edges)[0]
            axis.stairs(counts, edges, label=label, fill=fill, alpha=0.6 + 0.4 * fill)
        axis.set(title=f"{name}: {leaf.method}", xlabel="weight", ylabel="count")
        axis.set_yscale("log" if log else "linear")
        axis.legend()
    return figure


def layers(report: PruningReport) -> Figure:
    """Weights and operations of every layer, before and after pruning.

    Args:
      report: From `pruning`.

    Returns:
      A figure with a bar for each weight that a matmul or convolution uses.

    Raises:
      ImportError: If matplotlib is not installed.
    """
    rows = [r for r in report.rows if r.flops][::-1]
    Figure = _figure()
    figure = Figure(figsize=(9.6, 1.2 + 0.24 * len(rows)), layout="constrained")
    places = np.arange(len(rows))
    for axis, name in zip(
        figure.subplots(1, 2, sharey=True), ("weights", "flops"), strict=True
    ):
        axis.barh(places, [getattr(r, name) for r in rows], label="before", alpha=0.4)
        left = [getattr(r, f"{name}_left") for r in rows]
        axis.barh(places, left, label="after")
        axis.set(xlabel=name, yticks=places, yticklabels=[r.path for r in rows])
        axis.legend()
    return figure


def overlaps(history: Mapping[int, Mapping[str, float]]) -> Figure:
    """How far masks have moved from the first ones, over time.

    Args:
      history: By step, by path: what `jaxcompress.prune.mask_overlap` gives for the
        masks of that step and those of the first.

    Returns:
      A figure with a line for each path.

    Raises:
      ImportError: If matplotlib is not installed.
      ValueError: If `history` is empty.
    """
    if not history:
        raise ValueError("overlaps: history must have at least one step; got none.")
    axis = (figure := _figure()(layout="constrained")).subplots()
    for path in next(iter(history.values())):
        values = [float(overlap[path]) for overlap in history.values()]
        axis.plot(list(history), values, label=path)
    axis.set(xlabel="step", ylabel="overlap", ylim=(0, 1.05))
    axis.legend()
    return figure


def _figure() -> type[Figure]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "report: pictures need matplotlib; install jaxcompress with the extra "
            "'plots'."
        ) from error
    return Figure


def _pairs(params: Any, packed: Any, path: Any) -> dict[str, tuple[Any, Leaf]]:
    """By path, the original and the compressed weight."""
    flat = tree.flatten(packed)[0]
    leaves = {p: x for p, x in flat.items() if isinstance(x, Leaf)}
    chosen = tree.choose({path: True}, leaves, who="histograms")
    original = tree.flatten(params)[0]
    for name in chosen:
        if getattr(original.get(name), "shape", None) != leaves[name].shape:
            raise ValueError(
                f"histograms: params has no weight {name!r} of shape "
                f"{leaves[name].shape}; pass the parameters that were compressed."
            )
    return {name: (original[name], leaves[name]) for name in chosen}


def _values(x: Any) -> np.ndarray:
    return np.asarray(materialize(x), np.float32).ravel()
