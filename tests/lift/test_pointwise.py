"""Convolutions with a window of one run by the leaf's own matmul."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.quant._elements import Integer

AXES = jc.Axes(contract=(-4, -3, -2))


def normal(seed: int, *shape: int) -> jax.Array:
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def conv(window: int = 1, **options: Any) -> Any:
    def fn(w: Any, x: Any) -> Any:
        return jax.lax.conv_general_dilated(
            x,
            w,
            **{"window_strides": (1, 1), "padding": "VALID"} | options,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    return fn, jc.quant.quantize(
        normal(0, window, window, 8, 6),
        jc.quant.int8(activations=jc.quant.dynamic(Integer(bits=8))),
        axes=AXES,
    )


@pytest.mark.parametrize("strides", [(1, 1), (2, 3)])
def test_it_is_the_integer_matmul_of_each_pixel(strides: tuple[int, int]) -> None:
    fn, leaf = conv(window_strides=strides)
    x = normal(1, 2, 7, 5, 8)
    assert [s.how for s in jc.explain(fn, leaf, x)] == ["int8 dot (1x1)"]
    y = jax.jit(jc.lift(fn))(leaf, x)
    pixels = leaf.prepare_activations(x)[:, :: strides[0], :: strides[1]]
    exact = np.einsum(
        "bhwi,io->bhwo",
        np.asarray(pixels, np.float64),
        np.asarray(leaf.materialize(), np.float64)[0, 0],
    )
    assert y.shape == exact.shape
    np.testing.assert_allclose(y, exact, atol=1e-5)


OTHERS = {
    "a larger window": conv(window=3),
    "padded": conv(padding=((1, 0), (0, 0))),
    "dilated inputs": conv(lhs_dilation=(2, 1), padding=((0, 0), (0, 0))),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_convolutions_stay_convolutions(name: str) -> None:
    fn, leaf = OTHERS[name]
    x = normal(2, 2, 5, 5, 8)
    assert [s.how for s in jc.explain(fn, leaf, x)] == ["dequantized"]
    y = jax.jit(jc.lift(fn))(leaf, x)
    wanted = fn(leaf.materialize(), leaf.prepare_activations(x))
    np.testing.assert_allclose(y, wanted, atol=1e-4)
