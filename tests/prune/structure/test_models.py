"""Real architectures: what is coupled in them, and that removed equals masked."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.models import mobilenet, resnet, stories
from jaxcompress import prune
from tests.jitted import run

KEY = jax.random.key(0)
IMAGES = jax.random.normal(KEY, (2, 8, 8, 3))


def filled(variables: Any) -> Any:
    """Random values everywhere, so that norms and biases matter."""
    rng = np.random.default_rng(0)

    def fill(path: Any, w: Any) -> jax.Array:
        value = rng.normal(size=w.shape).astype(np.float32) / np.sqrt(w.size) * 4
        positive = "var" in str(path) or "scale" in str(path)
        return jnp.asarray(np.abs(value) + 0.5 if positive else value)

    return jax.tree_util.tree_map_with_path(fill, variables)


def check(fn: Any, variables: Any, x: jax.Array, **options: Any) -> prune.Graph:
    graph = prune.dependency_graph(fn, variables, x)
    units = prune.choose_units(graph, variables, **options)
    removal = prune.Removal.of(graph, units)
    small = removal.take(variables)
    both = lambda s, m, x: (removal.smaller(fn)(s, x), fn(m, x))
    found, masked = run(both, small, removal.mask(variables), x)
    scale = float(jnp.abs(masked).max())
    np.testing.assert_allclose(found, masked, atol=2e-5 * scale, rtol=0)
    return graph


def members(graph: prune.Graph, size: int, path: str) -> set[tuple[str, int]]:
    (found,) = (g for g in graph.removable if g.size == size and path in g.paths)
    return {(m.path.removeprefix("params/"), m.axis) for m in found.members}


def test_mobilenet_couples_a_depthwise_filter_with_its_channel() -> None:
    stages = (mobilenet.Stage(3, 6, 2, 2),)
    model = mobilenet.MobileNetV2(stages=stages, head=8)
    shapes = jax.eval_shape(model.init, KEY, IMAGES)
    graph = check(
        model.apply,
        filled(shapes),
        IMAGES,
        importance=prune.filter_norm(),
        parameters=0.5,
        scope="group",
    )
    inner = members(graph, 18, "params/stage0_1/depthwise/kernel")
    kernels = {(p, axis) for p, axis in inner if p.endswith("kernel")}
    assert kernels == {
        ("stage0_1/expand/kernel", 3),
        ("stage0_1/depthwise/kernel", 3),
        ("stage0_1/project/kernel", 2),
    }
    assert ("stage0_1/depthwise_norm/scale", 0) in inner


def test_resnet_couples_the_channels_that_a_shortcut_pads() -> None:
    model = resnet.ResNet(8)
    shapes = jax.eval_shape(model.init, KEY, IMAGES)
    graph = check(model.apply, filled(shapes), IMAGES, flops=0.5)
    stream = members(graph, 16, "params/conv1/kernel")
    assert {
        ("conv1/kernel", 3),
        ("layer2_0/conv2/kernel", 3),
        ("layer3_0/conv2/kernel", 3),
        ("linear/kernel", 0),
    } <= stream
    wider = members(graph, 32, "params/layer3_0/conv2/kernel")
    assert ("layer2_0/conv2/kernel", 3) not in wider


def test_llama_heads_go_by_keys_and_channels_by_rotated_pairs() -> None:
    model = stories.Stories()
    tokens = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)
    shapes = jax.eval_shape(model.init, KEY, tokens)
    graph = check(model.apply, filled(shapes), tokens, parameters=0.6)
    sizes = {
        (g.size, g.layers, len(g.members), g.inexact is None) for g in graph.removable
    }
    assert sizes == {
        (64, 1, 11, True),  # The residual stream.
        (4, 5, 4, True),  # Two query heads, their key and value head.
        (4, 1, 2, True),  # Pairs of channels that turn together: one angle for all.
        (2, 5, 2, True),  # The query heads of each key head.
        (8, 5, 2, True),  # Channels of values.
        (172, 5, 3, True),  # MLP width.
        (5, 1, 9, False),  # Layers.
    }
