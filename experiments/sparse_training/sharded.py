"""Whether eight devices that share the params find the masks of one device."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from experiments.digits.run import Part
from experiments.sparse_training.methods import Settings
from experiments.sparse_training.training import QUICK, Trained, fit, train

DEVICES = 8


def compare(
    name: str, sparsity: float, settings: Settings, part: Part, steps: int
) -> dict[str, Any]:
    """Train twice with the same key; compare the masks of every checkpoint.

    Kernels, momentum and masks are kept in eight parts, an eighth of the outputs or
    inputs each. The products are computed whole on each device, so that gradients are
    the same numbers; everything the method does runs on the parts.
    """
    settings = dataclasses.replace(settings, steps=steps, checkpoints=4)
    mesh = jax.make_mesh((DEVICES,), ("d",), axis_types=(AxisType.Auto,))
    whole = NamedSharding(mesh, P())

    def spec(a: jax.Array) -> P:
        if a.ndim < 2:
            return P()
        return P(None, "d") if a.shape[1] % DEVICES == 0 else P("d", None)

    def keep(tree: Any) -> Any:
        return jax.tree.map(
            lambda a: jax.lax.with_sharding_constraint(a, NamedSharding(mesh, spec(a))),
            tree,
        )

    def gather(tree: Any) -> Any:
        return jax.lax.with_sharding_constraint(tree, whole)

    key = jax.random.key(0)
    one = fit(name, sparsity, settings, part, key)
    run = functools.partial(train, name, sparsity, settings, sharded=keep, whole=gather)
    placed = jax.device_put((part, key), whole)
    many = jax.jit(run, compiler_options=QUICK)(*placed)
    return {
        "method": name,
        "sparsity": sparsity,
        "steps": steps,
        "devices": len(kernels(many)[0].sharding.device_set),
        "kernels_are_cut": all(
            not a.sharding.is_fully_replicated for a in kernels(many)
        ),
        "masks_are_identical": same(masks(one), masks(many)),
        "mask_changes": changes(one),
        "params_are_identical": same(kernels(one), kernels(many)),
    }


def kernels(trained: Trained) -> list[jax.Array]:
    """The trained kernels."""
    return [a for a in jax.tree.leaves(trained.params) if a.ndim == 2]


def masks(trained: Trained) -> list[jax.Array]:
    """Masks at every checkpoint and at the end."""
    states = (trained.history, trained.state)
    return [m for s in states for v in jc.prune.masks(s).values() for m in v]


def changes(trained: Trained) -> int:
    """Weights that were kept at the start or at the end, not at both."""
    last = jc.prune.masks(trained.state)
    return sum(
        int((np.asarray(m)[0] != np.asarray(end)).sum())
        for path, ms in jc.prune.masks(trained.history).items()
        for m, end in zip(ms, last[path], strict=True)
    )


def same(a: list[jax.Array], b: list[jax.Array]) -> bool:
    """Whether all arrays have the same bits."""
    return all(
        np.array_equal(np.asarray(x), np.asarray(y)) for x, y in zip(a, b, strict=True)
    )
