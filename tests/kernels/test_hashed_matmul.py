"""The hash against the package `xxhash`, and hashed matmul against float64 NumPy."""

from __future__ import annotations

import functools
import struct
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xxhash

from kernels_pallas import hashing
from kernels_pallas.hashed_matmul import (
    Hashing,
    choose,
    dequantize,
    exact_sums,
    hashed_matmul,
    reference,
    xla,
)
from kernels_pallas.target import Target

CPU_TARGET, TPU_TARGET = Target("cpu", "cpu"), Target("tpu", "TPU v5e")


@pytest.mark.parametrize("key", [b"\0\0\0\0", b"abcd", b"abcdefgh", b"abcdefghijkl"])
@pytest.mark.parametrize("seed", [0, 1, 0x9747B28C, 2**32 - 1])
def test_the_hash_is_that_of_the_xxhash_package(key: bytes, seed: int) -> None:
    words = [jnp.uint32(w) for w in struct.unpack(f"<{len(key) // 4}I", key)]
    found = hashing.xxhash32(*words, seed=seed)
    assert int(found) == xxhash.xxh32_intdigest(key, seed)


def key_of(row: int, column: int) -> bytes:
    return struct.pack("<2I", row, column)


def bucket_of(h: int, count: int, linear: bool) -> int:
    """Litwin's address: of the larger table, unless there is no such bucket yet."""
    if not linear:
        return h % count
    level = 1
    while level * 2 <= count:
        level *= 2
    return h % (2 * level) if h % (2 * level) < count else h % level


COUNTS = (1, 2, 3, 64, 100, 1000, 2**30 - 1)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("seed", [0, 0x9747B28C])
def test_bucket_and_sign_of_places(seed: int, linear: bool) -> None:
    words = np.random.default_rng(seed).integers(0, 2**32, (2, 50), np.uint32)

    @jax.jit
    def run(rows: jax.Array, columns: jax.Array) -> Any:
        state = hashing.row_state(rows, seed=seed)
        return [
            hashing.place(state, columns, count=count, linear=linear)
            for count in COUNTS
        ]

    for count, (at, negative) in zip(COUNTS, run(*jnp.asarray(words)), strict=True):
        keys = [key_of(*pair) for pair in words.T]
        hashes = [xxhash.xxh32_intdigest(key, seed) for key in keys]
        signs = [
            xxhash.xxh32_intdigest(key, (seed + 0x9E3779B1) % 2**32) for key in keys
        ]
        assert at.tolist() == [bucket_of(h, count, linear) for h in hashes]
        assert negative.tolist() == [s >= 2**31 for s in signs]


def places_of(
    hashed: Hashing, buckets: int, n: int, k: int, origin: tuple[int, int] = (0, 0)
) -> tuple[np.ndarray, np.ndarray]:
    """Bucket and sign of each weight, from the definition, place by place."""
    (bn, bk), width = hashed.block, hashed.block[1] if hashed.aligned else 1
    at, sign = np.zeros((n, k), int), np.zeros((n, k))
    for i, j in np.ndindex(n, k):
        row, column = i + origin[0], j + origin[1]
        key = key_of(row // bn, column // bk)
        h = xxhash.xxh32_intdigest(key, hashed.seed)
        other = xxhash.xxh32_intdigest(key, (hashed.seed + 0x9E3779B1) % 2**32)
        first = bucket_of(h, buckets // width, hashed.linear) * width
        at[i, j] = (first + row % bn * bk + column % bk) % buckets
        sign[i, j] = -1 if other >= 2**31 else 1
    return at, sign


F32, BF16 = jnp.float32, jnp.bfloat16
CASES = {
    "single": (3, 33, 47, 100, Hashing(seed=5), (0, 0), F32),
    "single, a shard": (17, 21, 140, 257, Hashing(), (60, 70), BF16),
    "runs that begin anywhere": (
        *(3, 21, 40, 57),
        Hashing((3, 7), aligned=False),
        (6, 14),
        F32,
    ),
    "a table that grows": (3, 30, 40, 100, Hashing(seed=3, linear=True), (0, 0), F32),
    "odd blocks": (1, 29, 37, 35, Hashing((3, 5), seed=1), (9, 20), F32),
    "blocks": (8, 40, 200, 128 * 5, Hashing((16, 128), seed=2), (16, 256), BF16),
    "wide blocks": (3, 20, 270, 256 * 3, Hashing((16, 256)), (32, 512), F32),
}


@functools.partial(jax.jit, static_argnames=("hashed", "n"))
def everything(
    x: jax.Array, buckets: jax.Array, origin: jax.Array, hashed: Hashing, n: int
) -> tuple[jax.Array, ...]:
    at: Any = {"n": n, "origin": (origin[0], origin[1])}
    run = functools.partial(hashed_matmul, x, buckets, hashed, **at)
    return (
        dequantize(buckets, hashed, k=x.shape[-1], **at),
        run(target=CPU_TARGET),
        run(target=TPU_TARGET, interpret=True),
    )


def agrees(y: jax.Array, x: jax.Array, dense: np.ndarray, extra: float = 0.0) -> None:
    """Within the bound of a float32 sum; `extra` for the rounding of each product."""
    wide = np.asarray(x, float)
    wanted = wide @ dense.T
    limit = abs(wide) @ abs(dense).T * ((x.shape[-1] + 1) * 2.0**-24 + extra)
    if y.dtype == jnp.bfloat16:
        limit += 2.0**-8 * (abs(wanted) + limit)
    np.testing.assert_array_less(abs(np.asarray(y, float) - wanted), limit + 1e-30)


@pytest.mark.parametrize(
    ("m", "n", "k", "count", "hashed", "origin", "dtype"), CASES.values(), ids=CASES
)
def test_reference_xla_and_the_tpu_kernel_agree_with_float64(
    m: int,
    n: int,
    k: int,
    count: int,
    hashed: Hashing,
    origin: tuple[int, int],
    dtype: Any,
) -> None:
    rng = np.random.default_rng(count)
    buckets = rng.standard_normal(count).astype(np.float32)
    x = jnp.asarray(rng.standard_normal((m, k)), dtype)
    at, sign = places_of(hashed, count, n, k, origin)
    dense = sign * buckets.astype(float)[at]
    w, plain, kernel = everything(x, jnp.asarray(buckets), jnp.array(origin), hashed, n)
    np.testing.assert_array_equal(np.asarray(w, float), dense)
    assert plain.dtype == kernel.dtype == dtype
    agrees(plain, x, dense)
    agrees(kernel, x, dense, extra=2.0**-8 if dtype == jnp.bfloat16 else 0.0)


def test_the_reference_multiplies() -> None:
    rng = np.random.default_rng(0)
    buckets = rng.standard_normal(40).astype(np.float32)
    x = jnp.asarray(rng.standard_normal((3, 24)), jnp.float32)
    at, sign = places_of(Hashing(), 40, 10, 24)
    run = jax.jit(reference.hashed_matmul, static_argnames=("hashing", "n"))
    agrees(run(x, jnp.asarray(buckets), Hashing(), n=10), x, sign * buckets[at])


def test_a_shard_computes_its_part_of_the_whole() -> None:
    rng = np.random.default_rng(0)
    hashed = Hashing((2, 4), seed=3)
    buckets = rng.standard_normal(40).astype(np.float32)
    x = jnp.asarray(rng.standard_normal((3, 24)), jnp.float32)
    at, sign = places_of(hashed, 40, 10, 24)
    dense = sign * buckets.astype(float)[at]
    run = jax.jit(
        lambda x, at: hashed_matmul(x, jnp.asarray(buckets), hashed, n=4, origin=at)
    )
    for i, j in ((0, 0), (0, 12), (6, 0), (6, 12)):
        part = x[:, j : j + 12]
        agrees(run(part, (i, j)), part, dense[i : i + 4, j : j + 12])


def test_a_stack_and_leading_axes() -> None:
    hashed = Hashing((16, 128), seed=4)
    rng = np.random.default_rng(1)
    buckets = rng.standard_normal((2, 128 * 6)).astype(np.float32)
    x = jnp.asarray(rng.standard_normal((2, 2, 3, 130)), jnp.float32)
    at, sign = places_of(hashed, 128 * 6, 21, 130)

    @jax.jit
    def both(x: jax.Array, buckets: jax.Array) -> list[jax.Array]:
        run = functools.partial(hashed_matmul, x, buckets, hashed, n=21)
        return [run(target=CPU_TARGET), run(target=TPU_TARGET, interpret=True)]

    for y in both(x, jnp.asarray(buckets)):
        assert y.shape == (2, 2, 3, 21)
        for i in range(2):
            dense = sign * buckets[i].astype(float)[at]
            agrees(y[i].reshape(6, 21), x[i].reshape(6, 130), dense)


@pytest.mark.parametrize(
    ("count", "hashed"),
    [
        (50, Hashing(seed=1)),
        (128 * 4, Hashing((16, 128))),
        (51, Hashing((1, 4), aligned=False)),
    ],
    ids=["single", "blocks", "anywhere"],
)
def test_gradients(count: int, hashed: Hashing) -> None:
    m, n, k, origin = 3, 19, 140, (16, 128)
    rng = np.random.default_rng(2)
    buckets = rng.standard_normal(count).astype(np.float32)
    x = rng.standard_normal((m, k)).astype(np.float32)
    dy = rng.standard_normal((m, n)).astype(np.float32)
    options: Any = {"n": n, "origin": origin}
    forms = (
        functools.partial(hashed_matmul, target=CPU_TARGET, **options),
        functools.partial(hashed_matmul, target=TPU_TARGET, interpret=True, **options),
    )

    @jax.jit
    def pulled(x: jax.Array, b: jax.Array) -> Any:
        pulls = [jax.vjp(lambda x, b, f=f: f(x, b, hashed), x, b)[1] for f in forms]
        parts = functools.partial(
            xla.gradients, x, b, jnp.asarray(dy), hashed, origin=origin
        )
        return [
            *(pull(jnp.asarray(dy)) for pull in pulls),
            parts(chunk=4 * k),
            parts(exact=True),
        ]

    at, sign = places_of(hashed, count, n, k, origin)
    dense = sign * buckets.astype(float)[at]
    dw = dy.T.astype(float) @ x.astype(float)
    dbuckets, size = np.zeros(count), np.zeros(count)
    np.add.at(dbuckets, at, dw * sign)
    np.add.at(size, at, abs(dy.T.astype(float)) @ abs(x.astype(float)))
    terms = (n * k + m + 2) * 2.0**-24
    for dx, found in pulled(jnp.asarray(x), jnp.asarray(buckets)):
        limit = abs(dy.astype(float)) @ abs(dense) * terms
        np.testing.assert_array_less(abs(dx - dy.astype(float) @ dense), limit + 1e-30)
        np.testing.assert_array_less(abs(found - dbuckets), size * terms + 1e-30)


@pytest.mark.parametrize(
    ("count", "hashed"),
    [(512, Hashing()), (128 * 512, Hashing((128, 128)))],
    ids=["single", "blocks"],
)
def test_the_kernel_lowers_for_tpu(count: int, hashed: Hashing) -> None:
    run = lambda x, b: hashed_matmul(x, b, hashed, n=300, target=TPU_TARGET)
    shapes = (
        jax.ShapeDtypeStruct((5, 1000), jnp.bfloat16),
        jax.ShapeDtypeStruct((count,), jnp.float32),
    )
    lowered = jax.jit(run).trace(*shapes).lower(lowering_platforms=("tpu",))
    assert "tpu_custom_call" in lowered.as_text()


def test_exact_sums_are_the_same_in_any_order() -> None:
    """Of magnitudes so far apart that plain sums are not; and right to float32."""
    rng = np.random.default_rng(0)
    size, count = 3000, 7
    scale = 2.0 ** rng.integers(-18, 18, (size, 1))
    values = (rng.standard_normal((size, 2)) * scale).astype(np.float32)
    index = rng.integers(0, count, size)
    run = jax.jit(lambda v, i: exact_sums(v, i, count))
    order = rng.permutation(size)
    plain = jax.jit(lambda v, i: jnp.zeros((count, 2)).at[i].add(v))
    given = jnp.asarray(values), jnp.asarray(index)
    mixed = given[0][order], given[1][order]
    found = run(*given)
    np.testing.assert_array_equal(found, run(*mixed))
    assert (plain(*given) != plain(*mixed)).any()
    wanted = np.zeros((count, 2))
    np.add.at(wanted, index, values.astype(float))
    np.testing.assert_allclose(found, wanted, rtol=2.0**-22)


@pytest.mark.parametrize("size", [0.0, 1e-37, 3e38])
def test_exact_sums_of_extreme_values(size: float) -> None:
    values = jnp.full((3, 1), size, jnp.float32) * jnp.array([[0.5], [0.25], [0.125]])
    found = jax.jit(lambda v: exact_sums(v, jnp.zeros(3, jnp.int32), 1))(values)
    np.testing.assert_allclose(found, [[0.875 * size]], rtol=1e-6)


@pytest.mark.parametrize(
    ("block", "aligned", "most"),
    [((1, 1), True, 1.0), ((16, 16), True, 0.25), ((1, 32), False, 0.5)],
)
def test_training_holds_a_part_of_the_dense_weight(
    block: tuple[int, int], aligned: bool, most: float
) -> None:
    n = k = 1024
    hashed = Hashing(block, aligned=aligned)
    loss = lambda x, b: jnp.square(hashed_matmul(x, b, hashed, n=n)).sum()
    shapes = (
        jax.ShapeDtypeStruct((16, k), jnp.float32),
        jax.ShapeDtypeStruct((n * k // 64,), jnp.float32),
    )
    step = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*shapes).compile()
    memory = step.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < most * 4 * n * k


def test_no_dense_weight_is_made_on_a_cpu() -> None:
    n, k = 1024, 1024
    shapes = (
        jax.ShapeDtypeStruct((2, k), jnp.float32),
        jax.ShapeDtypeStruct((4096,), jnp.float32),
    )
    run = jax.jit(lambda x, b: hashed_matmul(x, b, Hashing((1, 32)), n=n))
    memory = run.lower(*shapes).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < n * k


def test_choose_says_what_runs_and_why() -> None:
    def ask(count: int, block: tuple[int, int], target: Target = TPU_TARGET) -> Any:
        return choose(4, 4096, 4096, count, Hashing(block), target=target)

    assert ask(512, (1, 1)).kernel == ask(2**20, (128, 128)).kernel == "tpu"
    for count, block, why in (
        (513, (1, 1), "more than 512 buckets"),
        (2**20, (1, 128), "whole multiples"),
        (2**20, (16, 64), "whole multiples"),
        (2**20, (16, 1024), "do not tile"),
        (2**22, (16, 128), "more than 8 MiB"),
    ):
        choice = ask(count, block)
        assert choice.kernel == "xla"
        assert why in choice.how
    assert "outputs at a time" in ask(512, (1, 1), CPU_TARGET).how
    assert ask(512, (1, 1), Target("gpu", "NVIDIA H200")).kernel == "xla"


def test_no_rows() -> None:
    y = hashed_matmul(jnp.zeros((0, 3)), jnp.ones(4), Hashing(), n=2)
    assert y.shape == (0, 2)


BAD: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "x": (TypeError, "x must be floating", {"x": jnp.ones((2, 8), jnp.int32)}),
    "type": (TypeError, "buckets must be floating", {"buckets": jnp.arange(8)}),
    "outputs": (ValueError, "must be positive", {"n": 0}),
    "block": (ValueError, "must be positive", {"hashing": Hashing((0, 1))}),
    "seed": (ValueError, "32 bits", {"hashing": Hashing(seed=2**32)}),
    "buckets": (ValueError, "multiple of the block's 3", {"hashing": Hashing((1, 3))}),
    "origin": (
        ValueError,
        "origin must be in whole blocks",
        {"hashing": Hashing((2, 4)), "origin": (2, 2)},
    ),
    "stack": (ValueError, "begin with the stack", {"buckets": jnp.ones((3, 8))}),
}


@pytest.mark.parametrize(("error", "message", "change"), BAD.values(), ids=BAD)
def test_what_is_refused(
    error: type[Exception], message: str, change: dict[str, Any]
) -> None:
    given: dict[str, Any] = {
        "x": jnp.ones((2, 8)),
        "buckets": jnp.ones(8),
        "hashing": Hashing(),
        "n": 4,
    }
    with pytest.raises(error, match=f"hashed_matmul.*{message}"):
        hashed_matmul(**{**given, **change})
