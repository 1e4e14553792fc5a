"""Training through a grid: the view, its gradient, its noise, and what is stored."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress import quant as q

KEY = jax.random.key(0)
INT8 = q.Integer(bits=8)


def draw(seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(32, 6)), jnp.float32)


def values_and_gradient(fmt: q.NumberFormat, w: Any) -> tuple[np.ndarray, np.ndarray]:
    """The dense view, and the gradient of its sum weighted by 1, 2, 3, ..."""
    scheme = q.weights(fmt)
    params, state = scheme.init({"w": w})
    view = lambda p: jc.materialize(scheme.view(p, state))["w"]
    found, pull_back = jax.vjp(jax.jit(view), params)
    weight = jnp.arange(1, w.size + 1, dtype=w.dtype).reshape(w.shape)
    return np.asarray(found), np.asarray(pull_back(weight)[0]["w"] / weight)


@pytest.mark.parametrize(
    "fmt", [q.int4(group_size=8), q.ternary(), q.mxfp4()], ids=lambda fmt: fmt.name
)
def test_the_view_is_the_quantized_weight_with_an_identity_gradient(
    fmt: q.NumberFormat,
) -> None:
    found, gradient = values_and_gradient(fmt, draw())
    np.testing.assert_array_equal(
        found, jax.jit(q.fake_quantize, static_argnums=1)(draw(), fmt)
    )
    assert (gradient == 1).all()


def column(*values: float) -> jax.Array:
    return jnp.array(values, jnp.float32)[:, None]


CLIPPED = [
    # sign(w) mean|w|, the mean being 1: BinaryConnect's clip.
    (q.binary(), column(-2, -1, -0.25, 0.5, 1.25), [0, 1, 1, 1, 0]),
    # The mean of 2 and 3; 0.25 lies below the threshold.
    (q.ternary(), column(-3, 0.25, 2, 0.25), [0, 1, 1, 1]),
    # Steps of 1 with zero at code 4: from -4 to 11.
    (q.int4(symmetric=False), column(-3.5, 0, 11, 11.5), [1, 1, 1, 0]),
    # A shared exponent of 0 reaches 6.
    (q.mxfp4(), column(7.5, -6.5, 6, *[-1.0] * 29), [0, 0, 1, *[1] * 29]),
    (q.table((-1.0, 0.0, 0.5)), column(-1, 0.5, 0.75, 1), [1, 1, 0, 0]),
]


@pytest.mark.parametrize(
    ("fmt", "w", "inside"),
    CLIPPED,
    ids=["binary", "ternary", "uint4", "mxfp4", "table"],
)
def test_a_clipped_gradient_is_zero_beyond_the_grid(
    fmt: q.NumberFormat, w: jax.Array, inside: list[int]
) -> None:
    found, gradient = values_and_gradient(fmt.replace(clip_gradient=True), w)
    assert gradient.ravel().tolist() == inside
    unclipped, identity = values_and_gradient(fmt, w)
    np.testing.assert_array_equal(found, unclipped)
    assert (identity == 1).all()


def test_a_scale_from_the_largest_weight_clips_nothing() -> None:
    _, gradient = values_and_gradient(q.int4(clip_gradient=True), draw())
    assert (gradient == 1).all()


def test_a_bfloat16_weight_is_clipped_in_its_own_dtype() -> None:
    w = column(-2, -1, -0.25, 0.5, 1.25).astype(jnp.bfloat16)
    _, gradient = values_and_gradient(q.binary(clip_gradient=True), w)
    assert gradient.ravel().tolist() == [0, 1, 1, 1, 0]


STOCHASTIC = q.int4(rounding="stochastic")


def test_noise_is_drawn_anew_by_every_update_and_kept_in_between() -> None:
    scheme = q.weights(STOCHASTIC, key=KEY)
    params, state = scheme.init({"w": draw()})

    @jax.jit
    def view_and_stored(state: Any) -> list[jax.Array]:
        forms = scheme.view(params, state), scheme.compress(params, state)
        return [jc.materialize(form)["w"] for form in forms]

    first, stored = map(np.asarray, view_and_stored(state))
    np.testing.assert_array_equal(first, stored)
    np.testing.assert_array_equal(view_and_stored(state)[0], first)
    kept, after = scheme.update(params, state, grads=params)
    assert kept is params
    assert int(after.step) == 1
    second, stored = map(np.asarray, view_and_stored(after))
    np.testing.assert_array_equal(second, stored)
    scale = np.abs(draw()).max(0) / 7
    assert np.abs(second - first).max() > 0
    assert (np.abs(second - first) < 1.001 * scale).all()


@jax.jit
def stochastic_words(key: jax.Array, params: dict[str, jax.Array]) -> Any:
    scheme = q.weights(STOCHASTIC, key=key)
    packed = scheme.compress(*scheme.init(params))
    return {path: leaf.words for path, leaf in packed.items()}


def test_noise_depends_on_the_key_and_the_path_alone() -> None:
    alone = stochastic_words(KEY, {"b": draw()})["b"]
    among = stochastic_words(KEY, {"a": draw(), "b": draw()})
    other = stochastic_words(jax.random.key(1), {"b": draw()})["b"]
    np.testing.assert_array_equal(among["b"], alone)
    assert not np.array_equal(among["a"], alone)
    assert not np.array_equal(other, alone)


def test_rounding_to_nearest_needs_no_key_and_does_not_change_with_the_step() -> None:
    scheme = q.weights(q.int4())
    params, state = scheme.init({"w": draw()})
    assert state.key is None
    _, after = scheme.update(params, state)
    compress = jax.jit(scheme.compress)
    before, later = (compress(params, s)["w"].words for s in (state, after))
    np.testing.assert_array_equal(before, later)


def test_every_leaf_stores_the_calibrated_scale() -> None:
    fmt = q.int8(activations=q.static(INT8))
    scheme = q.weights(fmt, activation_scale=0.5)
    params, state = scheme.init({"w": draw()})
    packed = jax.jit(scheme.compress)(params, state)["w"]
    np.testing.assert_array_equal(packed.activation_scale, [[0.5]])
    view = scheme.view(params, state)["w"]
    x = jnp.array([[0.2, 0.3, -70.0]])
    assert view.prepare_activations(x).tolist() == [[0.0, 0.5, -63.5]]


def test_a_format_stands_for_its_transform() -> None:
    w = {"w": draw(), "b": jnp.ones(6)}
    scheme = jc.select({"w": q.int4(group_size=8)})
    params, state = scheme.init(w)
    packed = jax.jit(scheme.compress)(params, state)
    expected = jax.jit(lambda w: q.quantize(w, q.int4(group_size=8)))(w["w"])
    np.testing.assert_array_equal(packed["w"].words, expected.words)
    assert packed["w"].method == "int4 g8"
    np.testing.assert_array_equal(packed["b"], w["b"])


@pytest.mark.parametrize(
    ("fmt", "params", "error", "message"),
    [
        (STOCHASTIC, draw(), ValueError, "stochastic rounding needs a key"),
        (
            q.int8(activations=q.static(INT8)),
            draw(),
            ValueError,
            "static activations need their calibrated scale",
        ),
        (
            q.int4(group_size=5),
            draw(),
            ValueError,
            "group_size .* 'layer/w', 32; got 5",
        ),
        (q.int4(), jnp.ones((2, 3, 4)), ValueError, "contracting axes of 'layer/w'"),
        (q.int4(), jnp.array([jnp.inf]), ValueError, "'layer/w' has 1 NaN or infinite"),
        (q.int4(), jnp.ones(()), ValueError, r"'layer/w' has shape \(\)"),
        (q.int4(), jnp.arange(4), TypeError, "'layer/w' is int32"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_init(
    fmt: q.NumberFormat, params: jax.Array, error: type[Exception], message: str
) -> None:
    scheme = q.weights(fmt)
    with pytest.raises(error, match=message):
        scheme.init({"layer": {"w": params}})
