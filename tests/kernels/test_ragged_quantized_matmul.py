"""`ragged_quantized_matmul`: every form against float64, gradients, errors."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import formats, layouts
from kernels_pallas.layouts import Weight
from kernels_pallas.ragged_quantized_matmul import (
    ragged_quantized_matmul,
    reference,
    tpu,
    visits,
    xla,
)
from kernels_pallas.target import Target
from tests.kernels.weights import FORMATS, matmul_bound, random_weight

N, K, EXPERTS = 13, 256, 4
M = 37
SIZES = {
    "uneven": [5, 0, 20, 9],
    "all one": [0, 0, 37, 0],
    "none": [0, 0, 0, 0],
    "block edges": [16, 16, 4, 1],
}


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def experts_of(fmt: formats.Format, groups: int) -> tuple[Weight, np.ndarray]:
    rng = np.random.default_rng(groups)
    made = [random_weight(rng, fmt, N, K, groups) for _ in range(EXPERTS)]
    stack = jax.tree.map(lambda *a: jnp.stack(a), *(w for w, _ in made))
    return stack, np.stack([d for _, d in made])


def own(sizes: list[int], dense: np.ndarray) -> np.ndarray:
    """The dense weight of each row, ``[M, N, K]``; zero past the last expert."""
    expert = np.repeat(np.arange(EXPERTS), sizes)
    rows = np.zeros((M, *dense.shape[1:]))
    rows[: len(expert)] = dense[expert]
    return rows


@pytest.mark.parametrize("name", ["int4", "uint3", "nf4"])
def test_every_form_agrees_with_float64(name: str) -> None:
    fmt = FORMATS[name]
    weight, dense = experts_of(fmt, 2)
    x = normal(0, M, K)
    repack = lambda w: layouts.repack(w, fmt, n=N, k=K, to=layouts.TPU)
    packed = jax.jit(jax.vmap(repack))(weight)

    @jax.jit
    def run(x: Any, weight: Weight, packed: Weight, sizes: Any) -> Any:
        return (
            reference.ragged_quantized_matmul(x, weight, sizes, fmt),
            xla.ragged_quantized_matmul(x, weight, sizes, fmt, chunk=5 * K),
            tpu.ragged_quantized_matmul(x, packed, sizes, fmt, interpret=True)[:, :N],
        )

    # The kernel's float32 products have the roundings of a table entry split in three.
    for case, sizes in SIZES.items():
        rows = own(sizes, dense)
        exact = np.einsum("mk,mnk->mn", x.astype(np.float64), rows)
        bound = np.stack(
            [matmul_bound(a[None], w)[0] for a, w in zip(x, rows, strict=True)]
        )
        for y in run(x, weight, packed, jnp.asarray(sizes, jnp.int32)):
            assert (np.abs(np.asarray(y, np.float64) - exact) <= bound).all(), case


def test_the_kernel_is_without_races_and_writes_what_it_should() -> None:
    from jax.experimental.pallas import tpu as pltpu

    fmt = formats.INT4
    weight, dense = experts_of(fmt, 2)
    repack = lambda w: layouts.repack(w, fmt, n=N, k=K, to=layouts.TPU)
    packed, x = jax.jit(jax.vmap(repack))(weight), normal(1, M, K)
    sizes = SIZES["uneven"]
    checks = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    with jax.debug_nans(False):
        y = tpu.ragged_quantized_matmul(
            x, packed, jnp.asarray(sizes, jnp.int32), fmt, interpret=checks
        )[:, :N]
    exact = np.einsum("mk,mnk->mn", x.astype(np.float64), own(sizes, dense))
    np.testing.assert_allclose(y, exact, atol=1e-3)


def test_visits_cover_every_row_of_every_expert_once() -> None:
    block = 16
    run = jax.jit(lambda sizes: visits.visits(sizes, rows=M, block=block))
    for sizes in SIZES.values():
        found = jax.tree.map(np.asarray, run(jnp.asarray(sizes, jnp.int32)))
        seen = []
        for i in range(found.there[0]):
            mine = np.asarray(visits.own_rows(found, jnp.int32(i), block=block))[:, 0]
            at = np.flatnonzero(mine) + found.block[i] * block
            assert at.size > 0
            seen += [(row, found.expert[i]) for row in at]
        wanted = list(enumerate(np.repeat(np.arange(EXPERTS), sizes)))
        assert sorted(seen) == wanted
        assert (np.diff(found.block) >= 0).all()


def test_gradients_are_those_of_the_reference() -> None:
    fmt = FORMATS["uint4"]
    weight, _ = experts_of(fmt, 2)
    weight = weight._replace(zero=weight.zero.astype(jnp.float32))
    sizes = jnp.asarray(SIZES["uneven"], jnp.int32)
    x, dy = normal(2, M, K), normal(3, M, N)

    @jax.jit
    def run(x: Any, scale: Any, zero: Any) -> Any:
        def pull(f: Any) -> Any:
            of = lambda x, s, z: f(x, weight._replace(scale=s, zero=z), sizes, fmt)
            return jax.vjp(of, x, scale, zero)[1](dy)

        return pull(ragged_quantized_matmul), pull(reference.ragged_quantized_matmul)

    for a, b in zip(*run(x, weight.scale, weight.zero), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5 * np.abs(b).max())


def test_the_kernel_takes_half_precision_and_refuses_large_tables() -> None:
    fmt, v5e = formats.INT4, Target("tpu", "TPU v5 lite")
    weight, dense = experts_of(fmt, 2)
    repack = lambda w: layouts.repack(w, fmt, n=N, k=K, to=layouts.TPU)
    packed = jax.jit(jax.vmap(repack))(weight)
    x = jnp.asarray(normal(5, M, K), jnp.float16)
    sizes = jnp.asarray(SIZES["uneven"], jnp.int32)
    options: Any = {"n": N, "layout": layouts.TPU, "target": v5e, "interpret": True}
    y = ragged_quantized_matmul(x, packed, sizes, fmt, **options)
    assert y.dtype == jnp.float16
    rows = own(SIZES["uneven"], dense)
    exact = np.einsum("mk,mnk->mn", np.asarray(x, np.float64), rows)
    np.testing.assert_allclose(y, exact, rtol=2**-11, atol=1e-3)
    wide = formats.Table(tuple(map(float, range(17))), name="wide")
    eight = packed._replace(words=jnp.tile(packed.words, (1, 2, 1)))
    with pytest.raises(NotImplementedError, match=r"at most 16 entries; got 17"):
        ragged_quantized_matmul(x, eight, sizes, wide, **options)


WEIGHT = experts_of(formats.INT4, 2)[0]
X = normal(4, M, K)
WRONG = {
    "leading axes": (X[None], [1, 1, 1, 1], r"\[M, K\], rows sorted by expert"),
    "integers": (X.astype(np.int8), [1, 1, 1, 1], "x must be floating"),
    "counts of other experts": (X, [1, 1], r"one entry for each expert.*\(2,\)"),
    "other inputs": (X[:, :10], [1, 1, 1, 1], "128.* or|13, 5.* for 13 outputs"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_named(case: str) -> None:
    x, sizes, message = WRONG[case]
    with pytest.raises((TypeError, ValueError), match=message):
        ragged_quantized_matmul(x, WEIGHT, jnp.asarray(sizes, jnp.int32), formats.INT4)
