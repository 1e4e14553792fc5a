"""Random small programs of the operations that structured removal follows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Params = dict[str, Any]
Part = Callable[[Params, jax.Array], jax.Array]
BATCH, TIME = 2, 5


class Builder:
    """Adds parts: functions of the params and of ``float[batch, time, width]``."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.params: Params = {}
        self.parts: list[Part] = []
        self.width = 6
        self.names: list[str] = []

    def weight(self, *shape: int) -> str:
        name = f"w{len(self.params)}"
        scale = 1.0 / np.sqrt(shape[-2] if len(shape) > 1 else 1.0)
        value = self.rng.normal(size=shape) * scale
        self.params[name] = jnp.asarray(value, jnp.float32)
        return name

    def program(self, parts: int) -> tuple[Callable[..., jax.Array], Params]:
        """A program of so many random parts, and its params."""
        enter = self.weight(3, self.width)
        for name in self.rng.choice(sorted(PARTS), parts):
            self.names.append(name)
            self.parts.append(PARTS[name](self))
        leave = self.weight(self.width, 4)
        chain = list(self.parts)

        def apply(params: Params, x: jax.Array) -> jax.Array:
            h = x @ params[enter]
            for part in chain:
                h = part(params, h)
            return h.mean(1) @ params[leave]

        return apply, self.params


def dense(b: Builder) -> Part:
    out = int(b.rng.integers(4, 9))
    w, bias = b.weight(b.width, out), b.weight(out)
    act = [jnp.tanh, jax.nn.relu, jax.nn.silu, jax.nn.sigmoid][b.rng.integers(4)]
    b.width = out
    return lambda p, h: act(h @ p[w] + p[bias][None, None])


def residual(b: Builder) -> Part:
    w1, w2 = b.weight(b.width, 8), b.weight(8, b.width)
    return lambda p, h: h + jax.nn.gelu(h @ p[w1]) @ p[w2]


def gated(b: Builder) -> Part:
    w = b.weight(b.width, 12)
    b.width = 6

    def part(p: Params, h: jax.Array) -> jax.Array:
        gate, up = jnp.split(h @ p[w], 2, axis=-1)
        return jax.nn.sigmoid(gate) * up

    return part


def attention(b: Builder) -> Part:
    names = [b.weight(b.width, n) for n in (12, 6, 6)]
    out = b.weight(12, b.width)

    def part(p: Params, h: jax.Array) -> jax.Array:
        q, k, v = (
            (h @ p[n]).reshape(*h.shape[:2], -1, 3) for n in names
        )  # Four heads, two of keys and values.
        k, v = jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k)
        y = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
        return h + y.reshape(*h.shape[:2], -1) @ p[out]

    return part


def concatenation(b: Builder) -> Part:
    w1, w2 = b.weight(b.width, 3), b.weight(b.width, 4)
    b.width += 7
    return lambda p, h: jnp.concatenate([h @ p[w1], h, jnp.tanh(h @ p[w2])], -1)


def normalization(b: Builder) -> Part:
    scale = b.weight(b.width)
    return lambda p, h: (
        h * jax.lax.rsqrt((h * h).mean(-1, keepdims=True) + 1e-3) * p[scale][None, None]
    )


def convolution(b: Builder) -> Part:
    out = int(b.rng.integers(4, 9))
    w = b.weight(3, b.width, out)
    b.width = out
    return lambda p, h: jax.lax.conv_general_dilated(
        h, p[w], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )


def depthwise(b: Builder) -> Part:
    w, n = b.weight(3, 1, b.width), b.width
    return lambda p, h: jax.lax.conv_general_dilated(
        h,
        p[w],
        (1,),
        "SAME",
        dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=n,
    )


def scanned(b: Builder) -> Part:
    w1, w2 = b.weight(3, b.width, 5), b.weight(3, 5, b.width)

    def part(p: Params, h: jax.Array) -> jax.Array:
        def layer(h: jax.Array, ws: Any) -> tuple[jax.Array, None]:
            return h + jnp.tanh(h @ ws[0]) @ ws[1], None

        return jax.lax.scan(layer, h, (p[w1], p[w2]))[0]

    return part


def stacked(b: Builder) -> Part:
    w = b.weight(b.width, b.width)
    return lambda p, h: jnp.stack([h, h @ p[w]]).sum(0)


def padded(b: Builder) -> Part:
    b.width += 3
    w = b.weight(b.width, b.width)
    return lambda p, h: (wide := jnp.pad(h, ((0, 0), (0, 0), (1, 2)))) + wide @ p[w]


def turned(b: Builder) -> Part:
    w = b.weight(b.width, b.width)
    return lambda p, h: jnp.swapaxes(jnp.swapaxes(h, 1, 2)[:, ::-1], 1, 2) @ p[w]


def looked_up(b: Builder) -> Part:
    table = b.weight(TIME, b.width)
    return lambda p, h: h + p[table][jnp.array([3, 0, 1, 1, 4])][None]


def conditional(b: Builder) -> Part:
    w1, w2 = b.weight(b.width, 6), b.weight(b.width, 6)
    b.width = 6
    return lambda p, h: jax.lax.cond(
        h[0, 0].sum() > 0, lambda h: h @ p[w1], lambda h: jnp.tanh(h @ p[w2]), h
    )


def looped(b: Builder) -> Part:
    scale = b.weight(b.width)
    return lambda p, h: jax.lax.fori_loop(
        0, 2, lambda i, h: jnp.tanh(h * p[scale][None, None]), h
    )


def tiled(b: Builder) -> Part:
    w = b.weight(2 * b.width, b.width)
    return lambda p, h: jnp.tile(h, (1, 1, 2)) @ p[w]


def flattened(b: Builder) -> Part:
    w = b.weight(TIME * b.width, b.width)
    return lambda p, h: h + (h.reshape(h.shape[0], -1) @ p[w])[:, None]


def checkpointed(b: Builder) -> Part:
    inner = residual(b)
    return lambda p, h: jax.checkpoint(lambda h: inner(p, h))(h)


PARTS: dict[str, Callable[[Builder], Part]] = {
    f.__name__: f
    for f in (
        *(dense, residual, gated, attention, concatenation, normalization),
        *(convolution, depthwise, scanned, stacked, padded, turned, looked_up),
        *(conditional, looped, tiled, flattened, checkpointed),
    )
}
