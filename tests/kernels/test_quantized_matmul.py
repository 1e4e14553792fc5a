"""`quantized_matmul` by plain XLA, its gradients, choices and errors."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import formats, layouts
from kernels_pallas.layouts import Weight
from kernels_pallas.quantized_matmul import choose, quantized_matmul, reference, xla
from kernels_pallas.target import Target, current_target
from tests.kernels.weights import FORMATS, matmul_bound, random_weight

N, K = 13, 96
GROUPS = (1, 3)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("name", FORMATS)
def test_agrees_with_float64_whole_and_by_rows(name: str) -> None:
    fmt, rng = FORMATS[name], np.random.default_rng(0)
    made = {g: random_weight(rng, fmt, N, K, g) for g in GROUPS}
    cases = [(*made[g], m) for g, m in ((1, 1), (3, 3), (3, 17))]
    xs = [normal(i, m, K) for i, (_, _, m) in enumerate(cases)]

    @jax.jit
    def run(xs: list[Any], weights: list[Weight]) -> Any:
        pairs = list(zip(xs, weights, strict=True))
        return (
            [reference.quantized_matmul(x, w, fmt) for x, w in pairs[:2]],
            [xla.quantized_matmul(x, w, fmt) for x, w in pairs],
            [xla.quantized_matmul(x, w, fmt, chunk=4 * K) for x, w in pairs[:2]],
        )

    for form in run(xs, [w for w, _, _ in cases]):
        for y, x, (_, dense, _) in zip(form, xs, cases, strict=False):
            error = np.abs(np.asarray(y, np.float64) - x.astype(np.float64) @ dense.T)
            assert (error <= matmul_bound(x, dense)).all()


@pytest.mark.parametrize(("k", "groups"), [(7, 1), (9, 3), (1, 1)])
def test_inputs_that_do_not_fill_a_byte(k: int, groups: int) -> None:
    rng = np.random.default_rng(1)
    made = {n: random_weight(rng, f, 3, k, groups) for n, f in FORMATS.items()}
    x = normal(2, 2, k)
    run = jax.jit(
        lambda x, weights: {
            n: xla.quantized_matmul(x, w, FORMATS[n]) for n, w in weights.items()
        }
    )
    for name, y in run(x, {n: w for n, (w, _) in made.items()}).items():
        dense = made[name][1]
        error = np.abs(np.asarray(y, np.float64) - x.astype(np.float64) @ dense.T)
        assert (error <= matmul_bound(x, dense)).all(), name


@pytest.mark.parametrize("chunk", [N * K, 4 * K], ids=["whole", "by rows"])
@pytest.mark.parametrize("name", ["uint4", "int3", "fp8_e4m3"])
def test_gradients_are_those_of_the_dense_matmul(name: str, chunk: int) -> None:
    fmt = FORMATS[name]
    weight, dense = random_weight(np.random.default_rng(3), fmt, N, K, 3)
    x, dy = normal(4, 5, K), normal(5, 5, N)

    @jax.jit
    def run(x: Any, weight: Weight, dy: Any) -> Any:
        dx = xla.input_gradient(dy, weight, fmt, k=K, chunk=chunk)
        return dx, xla.scale_gradients(dy, x, weight, fmt, chunk=chunk)

    dx, found = run(x, weight, dy)
    assert (
        np.abs(dx - dy.astype(np.float64) @ dense) <= matmul_bound(dy, dense.T)
    ).all()
    scale = np.repeat(np.asarray(weight.scale, np.float64), K // 3, axis=1)
    dw = dy.T.astype(np.float64) @ x
    by_group = lambda a: a.reshape(N, 3, -1).sum(-1)
    dscale = by_group(dw * dense / scale)
    size = by_group(np.abs(dy.T).astype(np.float64) @ np.abs(x) * np.abs(dense / scale))
    assert (np.abs(found.scale - dscale) <= size * (K + 8) * 2.0**-24).all()


def test_a_zero_point_that_floats_has_a_gradient() -> None:
    fmt = FORMATS["uint4"]
    weight, _ = random_weight(np.random.default_rng(6), fmt, N, K, 3)
    weight = weight._replace(zero=weight.zero.astype(jnp.float32))
    x, dy = normal(7, 2, 3, K), normal(8, 2, 3, N)
    plain = lambda x, w: reference.quantized_matmul(x.reshape(-1, K), w, fmt)

    @jax.jit
    def run(x: Any, scale: Any, zero: Any) -> Any:
        of = lambda x, s, z: (x, weight._replace(scale=s, zero=z))
        ours = jax.vjp(lambda *a: quantized_matmul(*of(*a), fmt), x, scale, zero)[1](dy)
        wanted = jax.vjp(lambda *a: plain(*of(*a)), x, scale, zero)[1](
            dy.reshape(-1, N)
        )
        return ours, wanted

    for a, b in zip(*run(x, weight.scale, weight.zero), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5 * np.abs(b).max())


def test_stacks_leading_dims_dtypes_and_vmap() -> None:
    fmt, rng = FORMATS["int4"], np.random.default_rng(9)
    made = [random_weight(rng, fmt, N, K, 3) for _ in range(2)]
    stack = jax.tree.map(lambda *a: jnp.stack(a), *(w for w, _ in made))
    x = normal(10, 2, 4, 3, K)
    run = jax.jit(
        lambda x, w: (
            quantized_matmul(x, w, fmt),
            jax.vmap(lambda x, w: quantized_matmul(x, w, fmt))(x, w),
            quantized_matmul(x.astype(jnp.bfloat16), w, fmt),
        )
    )
    y, mapped, low = run(x, stack)
    dense = np.stack([d for _, d in made])
    exact = np.einsum("sabk,snk->sabn", x.astype(np.float64), dense)
    np.testing.assert_allclose(y, exact, atol=1e-4)
    np.testing.assert_array_equal(y, mapped)
    assert low.dtype == jnp.bfloat16
    assert low.shape == (2, 4, 3, N)
    x16 = np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)
    exact = np.einsum("sabk,snk->sabn", x16, dense)
    low = np.asarray(low, np.float64)
    np.testing.assert_allclose(low, exact, rtol=2**-8, atol=1e-4)


def test_no_dense_weight_exists_on_a_cpu() -> None:
    n = 2048
    shape = jax.ShapeDtypeStruct
    weight = Weight(shape((n, n // 2), jnp.uint8), shape((n, n // 128), jnp.float32))
    x = shape((1, n), jnp.float32)
    run = jax.jit(lambda x, w: quantized_matmul(x, w, formats.INT4))
    compiled = run.lower(x, weight).compile()
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes + memory.argument_size_in_bytes < n * n  # bf16 / 2
    assert f"f32[{n},{n}]" not in compiled.as_text()


def test_a_device_reads_a_layout_only_if_its_kernels_run() -> None:
    kinds = {"TPU v6 lite": "tpu", "NVIDIA H200": "gpu", "NVIDIA A100": "gpu"}
    found = {kind: Target(p, kind).reads for kind, p in kinds.items()}
    new = jax.__version_info__ >= (0, 11)
    assert found == {
        "TPU v6 lite": "tpu",
        "NVIDIA H200": "gpu" if new else "portable",
        "NVIDIA A100": "portable",
    }
    assert Target("cpu", "cpu").reads == "portable"


def test_the_choice_says_what_runs() -> None:
    cpu, v5e = Target("cpu", "cpu"), Target("tpu", "TPU v5 lite")
    large = choose(1, 4096, 4096, formats.INT4, layout=layouts.PORTABLE, target=cpu)
    assert large == ("xla", "int4 dequantized by planes, 448 outputs at a time")
    small = choose(1, 64, 64, formats.NF4, layout=layouts.PORTABLE, target=cpu)
    assert small == ("xla", "nf4 dequantized by planes")
    tpu = choose(1, 4096, 4096, formats.INT4, layout=layouts.TPU, target=v5e)
    assert tpu == ("tpu", "int4 TPU kernel")
    assert current_target().platform == jax.default_backend()


def weight_of(name: str = "int4", groups: int = 3) -> Weight:
    return random_weight(np.random.default_rng(11), FORMATS[name], N, K, groups)[0]


WRONG = {
    "integer x": (lambda w: (np.ones((2, K), np.int8), w, {}), "x must be floating"),
    "words not packed": (
        lambda w: (np.ones((2, K), np.float32), w._replace(words=w.scale), {}),
        "words of the portable layout must be uint8",
    ),
    "another device's layout": (
        lambda w: (
            np.ones((2, K), np.float32),
            layouts.repack(w, FORMATS["int4"], n=N, k=K, to=layouts.TPU),
            {"layout": layouts.TPU},
        ),
        "layout must be portable, or the device's.*got 'tpu'",
    ),
    "other inputs": (
        lambda w: (np.ones((2, K + 3), np.float32), w, {}),
        r"words must be \[..., 13, 50\] for 13 outputs, 99 inputs and int4",
    ),
    "groups that do not divide": (
        lambda w: (np.ones((2, K), np.float32), w._replace(scale=jnp.ones((N, 5))), {}),
        "number of groups that divides the 96 inputs; got 5",
    ),
    "a zero point of another shape": (
        lambda w: (np.ones((2, K), np.float32), w._replace(zero=jnp.ones((N, 1))), {}),
        r"zero must have the shape of scale, \(13, 3\)",
    ),
    "a stack that x lacks": (
        lambda w: (
            np.ones((2, K), np.float32),
            Weight(w.words[None], w.scale[None]),
            {},
        ),
        r"begin with the weight's stack \(1,\)",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_named(case: str) -> None:
    make, message = WRONG[case]
    x, weight, options = make(weight_of())
    with pytest.raises((TypeError, ValueError), match=message):
        quantized_matmul(x, weight, FORMATS["int4"], **options)
