"""product, residual and additive: the leaf, its error, its training."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.codebook import CodebookArray, Codes

KEY = jax.random.key(0)
product = functools.partial(jc.codebook.product, key=KEY, iterations=4)
residual = functools.partial(jc.codebook.residual, key=KEY, iterations=4)
additive = functools.partial(jc.codebook.additive, key=KEY, iterations=4)


def weight(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def coded(transform: jc.Transform, w: jax.Array) -> CodebookArray:
    return transform.init({"w": w})[0]["w"]


def decode(leaf: CodebookArray) -> np.ndarray:
    """The weight ``[K, R]`` of a plain leaf, code by code, in float64."""
    codes = np.asarray(leaf.codes())
    books = np.asarray(leaf.codebooks, np.float64)
    outputs, stages, count = codes.shape
    d = books.shape[-1]
    w = np.zeros((outputs, count * d))
    for o, a, s in itertools.product(range(outputs), range(stages), range(count)):
        w[o, s * d : (s + 1) * d] += books[s * len(books) // count, a, codes[o, a, s]]
    if leaf.scale is not None:
        w *= np.asarray(leaf.scale, np.float64)[:, None]
    return w[:, : leaf.inputs].T


def error(leaf: CodebookArray, w: jax.Array) -> float:
    return float(((decode(leaf) - np.asarray(w, np.float64)) ** 2).sum())


OPTIONS = [{}, {"blocks": None}, {"scale": True, "dtype": "bfloat16", "blocks": 2}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_codes_name_the_weight_and_are_the_nearest(options: dict[str, Any]) -> None:
    w = weight(7, 20)  # The last of four sub-vectors lacks an input.
    leaf = coded(product(dims=2, bits=2, **options), w)
    np.testing.assert_allclose(leaf.materialize(), decode(leaf), atol=1e-6)
    books = np.asarray(leaf.codebooks, np.float64)
    scale = np.ones(20) if leaf.scale is None else np.asarray(leaf.scale, np.float64)
    for o, s in itertools.product(range(20), range(4)):
        v = np.asarray(w, np.float64)[2 * s : 2 * s + 2, o] / scale[o]
        entries = books[s * len(books) // 4, 0, :, : len(v)]
        distance = ((entries - v) ** 2).sum(-1)
        code = int(leaf.codes()[o, 0, s])
        assert distance[code] <= distance.min() + 1e-6


def test_codebooks_for_each_place_have_less_error() -> None:
    w = weight(8, 60) * jnp.asarray([1.0, 1.0, 5.0, 5.0] * 2)[:, None]
    shared = coded(product(dims=2, bits=2), w)
    own = coded(product(dims=2, bits=2, blocks=None), w)
    assert own.codebooks.shape == (4, 1, 4, 2)
    assert error(own, w) < 0.8 * error(shared, w)


def test_scales_help_outputs_of_unlike_size() -> None:
    w = weight(24, 60) * jnp.asarray([0.1, 1.0, 10.0] * 20)[None, :]
    small = np.s_[:, ::3]
    relative = lambda leaf: float(
        np.square(decode(leaf) - w)[small].sum() / np.square(w)[small].sum()
    )
    plain = coded(product(dims=2, bits=4), w)
    scaled = coded(product(dims=2, bits=4, scale=True), w)
    assert relative(scaled) < 0.5 * relative(plain)


def test_stages_fit_what_is_left_and_sums_chosen_together_fit_better() -> None:
    w = weight(24, 64)
    one = coded(product(dims=3, bits=3), w)
    stages = coded(residual(dims=3, stages=2, bits=3), w)
    together = coded(additive(dims=3, books=2, bits=3, rounds=6), w)
    assert stages.codes().shape == together.codes().shape == (64, 2, 8)
    assert error(stages, w) < 0.7 * error(one, w)
    assert error(together, w) < 0.95 * error(stages, w)


@pytest.mark.parametrize("make", [residual, additive], ids=["residual", "additive"])
def test_a_second_fit_of_sums_loses_less_than_the_first(make: Any) -> None:
    """Sums of entries are not found again to the bit, but nearly."""
    w = weight(24, 64)
    named = {"stages": 2} if make is residual else {"books": 2}
    once = coded(make(dims=3, bits=4, **named), w)
    again = coded(make(dims=3, bits=4, **named), once.materialize())
    assert 0 < error(again, once.materialize()) < 0.8 * error(once, w)


def test_important_rows_of_a_table_have_less_error() -> None:
    table = weight(60, 8)
    counts = jnp.where(jnp.arange(60)[:, None] < 6, 50.0, 1.0)
    options = {"dims": 4, "bits": 3, "axes": -1}
    plain = coded(product(**options), table)
    weighed = coded(product(**options, importance={"w": counts}), table)
    first = lambda leaf: float(jnp.square(leaf.materialize() - table)[:6].sum())
    assert first(weighed) < 0.5 * first(plain)


def test_a_table_is_looked_up_in_rows() -> None:
    leaf = coded(product(dims=4, bits=3, axes=-1), weight(60, 8))
    rows = jax.jit(jc.lift(lambda t, i: jnp.take(t, i, axis=0)))
    index = jnp.array([3, 59, 3], jnp.int32)
    np.testing.assert_array_equal(rows(leaf, index), leaf.materialize()[index])


def test_what_is_trained_is_the_codebook() -> None:
    scheme = product(dims=2, bits=2, scale=True)
    params, state = scheme.init({"w": weight(8, 12)})
    x = weight(5, 8)
    grads = jax.grad(
        lambda p: jc.lift(jnp.matmul)(x, scheme.view(p, state)["w"]).sum(),
        allow_int=True,
    )(params)["w"]
    leaf = params["w"]
    wanted = np.zeros((4, 2))
    dw = np.asarray(x, np.float64).sum(0)[:, None] * np.asarray(leaf.scale, np.float64)
    for o, s in itertools.product(range(12), range(4)):
        wanted[leaf.codes()[o, 0, s]] += dw[2 * s : 2 * s + 2, o]
    np.testing.assert_allclose(grads.codebooks[0, 0], wanted, rtol=1e-4, atol=1e-5)
    assert jnp.any(grads.scale != 0)
    trainable, _ = jc.partition(params)
    shapes = sorted(a.shape for a in jax.tree.leaves(trainable))
    assert shapes == [(1, 1, 4, 2), (12,)]
    assert scheme.init(params)[0]["w"] is leaf


def test_stacks_have_codebooks_of_their_own() -> None:
    stack = weight(2, 8, 12)
    scheme = product(dims=2, bits=2, axes=-2)
    leaf = coded(scheme, stack)
    assert leaf.codebooks.shape == (2, 1, 1, 4, 2)
    for i in range(2):
        layer = jax.tree.map(lambda a, i=i: a[i], leaf)
        np.testing.assert_allclose(layer.materialize(), decode(layer), atol=1e-6)


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda: product(dims=2, bits=9), "bits must be from 1 to 8; got 9"),
        (lambda: product(dims=0), "dims must be positive"),
        (lambda: residual(dims=2, stages=0), "books must be positive"),
        (lambda: product(dims=2, dtype="int8"), "dtype must be of"),
        (lambda: additive(dims=2, books=2, width=0), "width must be at least 1"),
        (lambda: coded(product(dims=2, blocks=3), weight(8, 4)), "blocks must divide"),
        (lambda: coded(product(dims=2), weight(2, 8, 4)), "contracting axes of 'w'"),
        (
            lambda: coded(product(dims=2, importance={}), weight(8, 4)),
            "no importance for 'w'",
        ),
        (
            lambda: coded(product(dims=2, importance={"w": jnp.ones(3)}), weight(8, 4)),
            "must broadcast to the shape of 'w'",
        ),
    ],
)
def test_errors_name_the_rule(make: Any, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        make()


def test_a_format_says_its_bits() -> None:
    codes = Codes(dims=8, bits=8, books=2)
    assert (codes.name, codes.entries) == ("2x8 bit d8", 256)
