"""stories260K: a Llama of 260,000 parameters that tells stories to small children.

    model, params = stories.load()
    logits = model.apply(params, tokens)
    logits, cache = model.apply(params, init_cache(1), tokens, 0, method="decode")

References:
  Touvron et al., `LLaMA <https://arxiv.org/abs/2302.13971>`_, 2023, section 2.2; Su et
  al., `RoFormer <https://arxiv.org/abs/2104.09864>`_, 2021, eq. 34. Weights: Karpathy,
  tinyllamas stories260K.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from experiments import data

LAYERS, VOCABULARY, CONTEXT = 5, 512, 512
HEAD = 8
EPSILON, ROPE_BASE = 1e-5, 10_000.0

Linear = functools.partial(nn.Dense, use_bias=False)


class Sizes(NamedTuple):
    """How wide a model is; the defaults are those of stories260K.

    Attributes:
      width: Channels of a token.
      inner: Channels inside the feed-forward part.
      heads: Of queries, 8 channels each.
      kv_heads: Of keys and values; divides `heads`.
    """

    width: int = 64
    inner: int = 172
    heads: int = 8
    kv_heads: int = 4


FULL, HALF = Sizes(), Sizes(width=32, inner=86, heads=4, kv_heads=2)


class Cache(NamedTuple):
    """Keys and values of all layers, ``[layers, batch, length, kv_heads, head]``."""

    key: jax.Array
    value: jax.Array


def rotate(x: jax.Array, positions: jax.Array) -> jax.Array:
    """RoPE: pair ``i``, channels ``2i`` and ``2i + 1``, turns with the position.

    .. math:: \\theta_i = position \\cdot base^{-2i / head}

    Args:
      x: ``float[batch, time, heads, head]``.
      positions: ``int32[time]``.
    """
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    exponents = jnp.arange(0, HEAD, 2, dtype=jnp.float32) / HEAD
    frequencies = ROPE_BASE**-exponents
    angles = positions.astype(jnp.float32)[:, None] * frequencies[None]
    cos, sin = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = (even * cos - odd * sin, even * sin + odd * cos)
    return jnp.stack(turned, -1).reshape(x.shape)


class Attention(nn.Module):
    """Causal; some query heads share each head of keys and values."""

    sizes: Sizes = FULL

    @nn.compact
    def __call__(
        self, x: jax.Array, positions: jax.Array, cache: Cache | None, layer: Any
    ) -> tuple[jax.Array, Cache | None]:
        split = lambda y: y.reshape(*y.shape[:2], -1, HEAD)
        heads, kv_heads = self.sizes.heads, self.sizes.kv_heads
        query = rotate(split(Linear(heads * HEAD, name="wq")(x)), positions)
        key = rotate(split(Linear(kv_heads * HEAD, name="wk")(x)), positions)
        value = split(Linear(kv_heads * HEAD, name="wv")(x))
        if cache is not None:
            start = (layer, 0, positions[0], 0, 0)
            write = jax.lax.dynamic_update_slice
            cache = Cache(
                write(cache.key, key[None], start),
                write(cache.value, value[None], start),
            )
            key, value = (
                jax.lax.dynamic_index_in_dim(part, layer, keepdims=False)
                for part in cache
            )
        past = positions[:, None] >= jnp.arange(key.shape[1], dtype=jnp.int32)[None]
        y = jax.nn.dot_product_attention(query, key, value, mask=past[None, None])
        y = y.reshape(*y.shape[:2], -1)
        return Linear(self.sizes.width, name="wo")(y), cache


class Block(nn.Module):
    """A Llama layer: each part is added to what it normalized."""

    sizes: Sizes = FULL

    @nn.compact
    def __call__(
        self, x: jax.Array, positions: jax.Array, cache: Cache | None, layer: Any
    ) -> tuple[jax.Array, Cache | None]:
        y = nn.RMSNorm(EPSILON, name="attention_norm")(x)
        y, cache = Attention(self.sizes, name="attention")(y, positions, cache, layer)
        x = x + y
        y = nn.RMSNorm(EPSILON, name="ffn_norm")(x)
        inner, width = self.sizes.inner, self.sizes.width
        gate, up = nn.silu(Linear(inner, name="w1")(y)), Linear(inner, name="w3")(y)
        return x + Linear(width, name="w2")(gate * up), cache


class Stories(nn.Module):
    """The language model.

    Attributes:
      scan: One `layers` whose weights are stacked ``[5, in, out]`` and scanned, instead
        of `layers_0` to `layers_4`. The weights and the result are the same.
      sizes: How wide it is.
    """

    scan: bool = True
    sizes: Sizes = FULL

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits ``[batch, time, 512]`` of what follows ``int32[batch, time]``."""
        return self._run(tokens, jnp.int32(0), None)[0]

    def decode(
        self, cache: Cache, tokens: jax.Array, position: jax.Array | int
    ) -> tuple[jax.Array, Cache]:
        """Logits of what follows tokens that come after those in the cache.

        Args:
          cache: Of `init_cache`, or the last call's.
          tokens: ``int32[batch, time]``; a step of decoding has a `time` of 1.
          position: Of the first of them.
        """
        logits, cache_after = self._run(tokens, jnp.int32(position), cache)
        assert cache_after is not None
        return logits, cache_after

    @nn.compact
    def _run(
        self, tokens: jax.Array, position: jax.Array, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None]:
        embed = nn.Embed(VOCABULARY, self.sizes.width, name="tok_embeddings")
        positions = position + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        x = embed(tokens)
        if self.scan:
            layers = nn.scan(
                lambda block, carry, i: (block(carry[0], positions, carry[1], i), None),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=LAYERS,
            )
            indices = jnp.arange(LAYERS, dtype=jnp.int32)
            block = Block(self.sizes, name="layers")
            (x, cache), _ = layers(block, (x, cache), indices)
        else:
            for i in range(LAYERS):
                block = Block(self.sizes, name=f"layers_{i}")
                x, cache = block(x, positions, cache, jnp.int32(i))
        return embed.attend(nn.RMSNorm(EPSILON, name="norm")(x)), cache


def init_cache(batch: int, length: int = CONTEXT, *, sizes: Sizes = FULL) -> Cache:
    """An empty cache for `length` tokens."""
    shape = (LAYERS, batch, length, sizes.kv_heads, HEAD)
    return Cache(jnp.zeros(shape), jnp.zeros(shape))


def load(*, scan: bool = True, root: Path | str | None = None) -> tuple[Stories, Any]:
    """The model, and the variables that its `apply` takes first."""
    arrays = data.load_npz("stories260k/stories260k.npz", root)
    flat = {
        "tok_embeddings/embedding": arrays.pop("tok_embeddings"),
        "norm/scale": arrays.pop("norm"),
    }
    for name, stacked in arrays.items():
        if name.endswith("norm"):
            path, value = f"{name}/scale", stacked
        else:  # Stored (layer, out, in).
            part = f"attention/{name}" if name in {"wq", "wk", "wv", "wo"} else name
            path, value = f"{part}/kernel", stacked.swapaxes(1, 2)
        if scan:
            flat[f"layers/{path}"] = value
        else:
            flat |= {f"layers_{i}/{path}": value[i] for i in range(LAYERS)}
    params = unflatten_dict({k: jnp.asarray(w) for k, w in flat.items()}, sep="/")
    return Stories(scan), {"params": params}
