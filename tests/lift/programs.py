"""Programs of every kind a model is made of: ``name -> (fn, params, args)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

Program = tuple[Callable[..., Any], Any, tuple[Any, ...]]
PROGRAMS: dict[str, Callable[[], Program]] = {}


def program(make: Callable[[], Program]) -> Callable[[], Program]:
    PROGRAMS[make.__name__] = make
    return make


def normal(seed: int, *shape: int, dtype: Any = np.float32) -> jax.Array:
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0]), dtype)


def mesh(n: int = 8) -> jax.sharding.Mesh:
    return jax.make_mesh((n,), ("d",), axis_types=(AxisType.Auto,))


def _linen(module: nn.Module, *args: Any) -> Program:
    return module.apply, module.init(jax.random.key(0), *args), args


@program
def linen_dense() -> Program:
    return _linen(nn.Dense(8), normal(0, 3, 16))


@program
def linen_dense_general() -> Program:
    return _linen(nn.DenseGeneral(6, axis=(-2, -1)), normal(0, 3, 4, 8))


@program
def linen_conv() -> Program:
    return _linen(nn.Conv(8, (3, 3), strides=2), normal(0, 2, 6, 6, 4))


@program
def linen_embed() -> Program:
    return _linen(nn.Embed(12, 8), jnp.array([[0, 11, 3], [5, 5, 1]]))


class TiedEmbedding(nn.Module):
    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embed = nn.Embed(12, 8)
        return embed.attend(jnp.tanh(embed(tokens)))


@program
def linen_tied_embedding() -> Program:
    return _linen(TiedEmbedding(), jnp.array([[0, 11, 3], [5, 5, 1]]))


@program
def linen_attention() -> Program:
    return _linen(
        nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8), normal(0, 2, 5, 8)
    )


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: Any = None) -> tuple[jax.Array, None]:
        return x + nn.Dense(8)(nn.relu(nn.Dense(16)(x))), None


class Stack(nn.Module):
    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        block = nn.remat(Block, prevent_cse=False) if self.remat else Block
        layers = nn.scan(
            block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return layers()(x, None)[0]


@program
def linen_scan() -> Program:
    return _linen(Stack(), normal(0, 2, 8))


@program
def linen_scan_of_remat() -> Program:
    return _linen(Stack(remat=True), normal(0, 2, 8))


class Remat(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.remat(Block)()(x)[0]


@program
def linen_remat() -> Program:
    return _linen(Remat(), normal(0, 2, 8))


class NnxModel(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(2)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return x


@program
def nnx_split_merge() -> Program:
    graph, state = nnx.split(NnxModel(nnx.Rngs(0)))
    return lambda s, x: nnx.merge(graph, s)(x), state, (normal(1, 3, 8),)


@program
def plain_function() -> Program:
    params = [(normal(i, 8, 8), normal(9 + i, 8)) for i in range(2)]

    def fn(params: Any, x: jax.Array) -> jax.Array:
        for w, b in params:
            x = jnp.tanh(x @ w + b[None])
        return x

    return fn, params, (normal(2, 3, 8),)


@program
def einsum_left() -> Program:
    fn = lambda p, x: jnp.einsum("io,bi->ob", p["w"], x)
    return fn, {"w": normal(0, 8, 6)}, (normal(1, 3, 8),)


@program
def einsum_heads() -> Program:
    fn = lambda p, x: jnp.einsum("bshd,hdo->bso", x, p["w"])
    return fn, {"w": normal(0, 2, 4, 6)}, (normal(1, 3, 5, 2, 4),)


@program
def lax_dot() -> Program:
    return (
        lambda p, x: lax.dot(x, p["w"], precision="highest"),
        {"w": normal(0, 8, 6)},
        (normal(1, 3, 8),),
    )


@program
def experts_batched() -> Program:
    fn = lambda p, x: jnp.einsum("ebi,eio->ebo", x, p["w"])
    return fn, {"w": normal(0, 3, 8, 6)}, (normal(1, 3, 2, 8),)


@program
def ragged_dot() -> Program:
    fn = lambda p, x, n: lax.ragged_dot(x, p["w"], n)
    return fn, {"w": normal(0, 3, 8, 6)}, (normal(1, 7, 8), jnp.array([2, 0, 5]))


@program
def transposed() -> Program:
    return lambda p, x: x @ p["w"].T, {"w": normal(0, 6, 8)}, (normal(1, 3, 8),)


@program
def bf16_casts() -> Program:
    fn = lambda p, x: (x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16)).astype(
        jnp.float32
    )
    return fn, {"w": normal(0, 8, 6)}, (normal(1, 3, 8),)


@program
def bf16_params_widened() -> Program:
    fn = lambda p, x: x @ p["w"].astype(jnp.float32)
    return fn, {"w": normal(0, 8, 6, dtype=jnp.bfloat16)}, (normal(1, 3, 8),)


@program
def nested_jit_shardings() -> Program:
    m = mesh()
    inner = jax.jit(
        lambda w, x: x @ w,
        in_shardings=(NamedSharding(m, P(None, "d")), NamedSharding(m, P())),
        out_shardings=NamedSharding(m, P(None, "d")),
    )
    return (
        lambda p, x: inner(p["w"], x) + 1.0,
        {"w": normal(0, 8, 16)},
        (normal(1, 3, 8),),
    )


@program
def sharding_constraint() -> Program:
    s = NamedSharding(mesh(), P(None, "d"))
    fn = lambda p, x: x @ lax.with_sharding_constraint(p["w"], s)
    return jax.jit(fn), {"w": normal(0, 8, 16)}, (normal(1, 3, 8),)


@program
def shard_map_psum() -> Program:
    f = jax.shard_map(
        lambda w, x: lax.psum(x @ w, "d"),
        mesh=mesh(),
        in_specs=(P("d", None), P(None, "d")),
        out_specs=P(),
    )
    return lambda p, x: f(p["w"], x), {"w": normal(0, 64, 4)}, (normal(1, 3, 64),)


@program
def shard_map_replicated() -> Program:
    f = jax.shard_map(
        lambda w, x: jnp.tanh(x) @ w,
        mesh=mesh(),
        in_specs=(P(), P("d")),
        out_specs=P("d"),
    )
    return lambda p, x: f(p["w"], x), {"w": normal(0, 8, 4)}, (normal(1, 16, 8),)


@program
def vmap_of_jit() -> Program:
    inner = jax.jit(lambda w, x: jnp.tanh(x @ w))
    fn = lambda p, x: jax.vmap(inner, in_axes=(None, 0))(p["w"], x)
    return fn, {"w": normal(0, 8, 6)}, (normal(1, 4, 3, 8),)


@program
def vmap_over_weights() -> Program:
    inner = jax.jit(lambda w, x: jnp.tanh(x @ w))
    fn = lambda p, x: jax.vmap(inner)(p["w"], x)
    return fn, {"w": normal(0, 4, 8, 6)}, (normal(1, 4, 3, 8),)


@program
def cond() -> Program:
    fn = lambda p, x, t: lax.cond(
        t > 0, lambda w, x: x @ w, lambda w, x: x + 1.0, p["w"], x
    )
    return fn, {"w": normal(0, 8, 8)}, (normal(1, 3, 8), jnp.array(1))


@program
def cond_returns_weight() -> Program:
    def fn(p: Any, x: jax.Array, t: jax.Array) -> jax.Array:
        return x @ lax.cond(t > 0, lambda a, b: a, lambda a, b: b, p["a"], p["b"])

    return (
        fn,
        {"a": normal(0, 8, 8), "b": normal(1, 8, 8)},
        (normal(2, 3, 8), jnp.array(0)),
    )


@program
def switch() -> Program:
    branches = [lambda w, x: x @ w, lambda w, x: x @ w.T, lambda w, x: x]
    fn = lambda p, x, i: lax.switch(i, branches, p["w"], x)
    return fn, {"w": normal(0, 8, 8)}, (normal(1, 3, 8), jnp.array(1))


@program
def while_loop() -> Program:
    def fn(p: Any, x: jax.Array) -> jax.Array:
        body = lambda c: (c[0] + 1, jnp.tanh(c[1] @ p["w"]))
        return lax.while_loop(lambda c: c[0] < 3, body, (0, x))[1]

    return fn, {"w": normal(0, 8, 8)}, (normal(1, 3, 8),)


@program
def fori_loop_over_layers() -> Program:
    def fn(p: Any, x: jax.Array) -> jax.Array:
        return lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ p["w"][i]), x)

    return fn, {"w": normal(0, 3, 8, 8)}, (normal(1, 3, 8),)


@program
def scan_carries_weight() -> Program:
    def fn(p: Any, x: jax.Array) -> jax.Array:
        step = lambda c, _: ((c[0], jnp.tanh(c[1] @ c[0])), None)
        return lax.scan(step, (p["w"], x), length=2)[0][1]

    return fn, {"w": normal(0, 8, 8)}, (normal(1, 3, 8),)


@program
def custom_jvp() -> Program:
    @jax.custom_jvp
    def doubled_gradient(w: jax.Array, x: jax.Array) -> jax.Array:
        return x @ w

    @doubled_gradient.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        (w, x), (dw, dx) = primals, tangents
        return x @ w, 2.0 * (x @ dw + dx @ w)

    return (
        lambda p, x: doubled_gradient(p["w"], x),
        {"w": normal(0, 8, 6)},
        (normal(1, 3, 8),),
    )


@program
def gradient_inside() -> Program:
    def fn(p: Any, x: jax.Array) -> jax.Array:
        return jax.grad(lambda x: jnp.tanh(x @ p["w"]).sum())(x)

    return fn, {"w": normal(0, 8, 6)}, (normal(1, 3, 8),)


@program
def activation_of_weight_shape() -> Program:
    return lambda p, x: (x @ p["w"]) @ x, {"w": normal(0, 8, 8)}, (normal(1, 8, 8),)


@program
def weight_used_elementwise() -> Program:
    return lambda p, x: x @ (p["w"] * 2.0), {"w": normal(0, 8, 6)}, (normal(1, 3, 8),)


@program
def weight_reshaped() -> Program:
    fn = lambda p, x: x @ p["w"].reshape(8, 6)
    return fn, {"w": normal(0, 2, 4, 6)}, (normal(1, 3, 8),)


@program
def weight_sliced() -> Program:
    return lambda p, x: x @ p["w"][1], {"w": normal(0, 3, 8, 6)}, (normal(1, 3, 8),)


@program
def experts_gathered() -> Program:
    fn = lambda p, x, i: jnp.einsum("bi,bio->bo", x, p["w"].at[i].get(mode="clip"))
    return fn, {"w": normal(0, 3, 8, 6)}, (normal(1, 4, 8), jnp.array([0, 2, 2, 1]))
