"""The contract of a leaf, the straight-through estimate, and `materialize`."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.leaf import FROZEN, WEIGHT, Cast, Leaf, Reshape, Transpose
from jaxcompress.prune import MaskedArray
from jaxcompress.straight_through import straight_through

W = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)
X = jnp.asarray(np.random.default_rng(1).normal(size=(3, 6)), jnp.float32)
QUANTIZED = jc.quant.quantize(W, jc.quant.int4(group_size=2))
DENSE = QUANTIZED.materialize()
MASK = W > 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Constant(Leaf):
    """A leaf that defines no more than it must."""

    shape, dtype, method = (6, 4), np.dtype(np.float32), "constant"

    def materialize(self) -> jax.Array:
        return jnp.full(self.shape, 2.0)


class TestStraightThrough:
    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    def test_the_value_is_exact_where_a_difference_is_not(self, dtype: Any) -> None:
        w = jnp.array([1e8, -1.0, 3e-5, 0.1], dtype)
        value = jnp.array([0.1, 1e8, 1.0, -0.3], dtype)
        assert (w + (value - w) != value).any()
        np.testing.assert_array_equal(jax.jit(straight_through)(w, value), value)

    def test_the_gradient_goes_to_the_weight_alone(self) -> None:
        f = lambda w, value: (X @ straight_through(w, jnp.round(value))).sum()
        to_w, to_value = jax.grad(f, (0, 1))(W, W)
        expected = np.asarray(X, np.float64).sum(0)[:, None] * np.ones(4)
        np.testing.assert_allclose(to_w, expected, rtol=1e-5)
        assert not np.asarray(to_value).any()

    def test_it_maps_over_a_batch(self) -> None:
        grad = jax.grad(lambda w: straight_through(w, jnp.round(w)) ** 2)
        w = jnp.array([0.4, 0.6, 2.3])
        np.testing.assert_allclose(jax.vmap(grad)(w), [0.0, 2.0, 4.0])


def view(**options: Any) -> jc.StraightThrough:
    return jc.StraightThrough(latent=W, stored=QUANTIZED, **options)


class TestStraightThroughLeaf:
    def test_it_is_the_stored_form_bit_for_bit(self) -> None:
        leaf = view()
        np.testing.assert_array_equal(leaf.materialize(), DENSE)
        assert (leaf.shape, leaf.dtype) == (QUANTIZED.shape, QUANTIZED.dtype)
        assert leaf.method == "int4 g2 (training view)"
        assert leaf.traits.preserves_zeros
        assert leaf.traits.elementwise
        assert not leaf.traits.own_matmul

    @pytest.mark.parametrize("gate", [None, MASK], ids=["open", "gated"])
    def test_the_gradient_goes_to_the_latent_through_the_gate(
        self, gate: jax.Array | None
    ) -> None:
        loss = lambda leaf: (leaf.materialize() ** 2).sum()
        grads = jax.grad(loss, allow_int=True)(view(gate=gate))
        open_ = np.ones(W.shape, bool) if gate is None else gate
        np.testing.assert_allclose(grads.latent, np.where(open_, 2 * DENSE, 0))
        assert not np.asarray(grads.stored.scale).any()

    def test_its_latent_may_be_narrower_or_wider(self) -> None:
        leaf = jc.StraightThrough(latent=W.astype(jnp.bfloat16), stored=QUANTIZED)
        grad = jax.grad(lambda w: leaf.replace(latent=w).materialize().sum())
        assert leaf.materialize().dtype == jnp.float32
        assert grad(leaf.latent).dtype == jnp.bfloat16

    @pytest.mark.parametrize(
        ("op", "f"),
        [
            (Transpose(permutation=(1, 0)), jnp.transpose),
            (Reshape(shape=(2, 3, 4)), lambda a: a.reshape(2, 3, 4)),
            (Cast(dtype=np.dtype(jnp.bfloat16)), lambda a: a.astype(jnp.bfloat16)),
        ],
        ids=["transpose", "reshape", "cast"],
    )
    def test_layout_operations_act_on_every_part(
        self, op: Any, f: Callable[[jax.Array], jax.Array]
    ) -> None:
        after = view(gate=MASK).relayout(op)
        np.testing.assert_array_equal(after.materialize(), f(DENSE))
        np.testing.assert_array_equal(after.latent, f(W))
        assert after.gate.shape == after.shape
        assert after.gate.dtype == bool

    def test_a_layout_operation_that_the_stored_form_refuses_is_refused(self) -> None:
        assert view().relayout(Reshape(shape=(24,))) is NotImplemented

    def test_its_own_matmul_runs_stored_and_differentiates_dense(self) -> None:
        scheme = jc.quant.weights(jc.presets.W8A8)
        leaf = jax.jit(scheme.view)(*scheme.init({"w": W}))["w"]
        assert leaf.traits.own_matmul
        f = jax.jit(jc.lift(lambda w, x: x @ w))
        np.testing.assert_array_equal(f(leaf, X), f(leaf.stored, X))
        g = jnp.asarray(np.random.default_rng(2).normal(size=(3, 4)), jnp.float32)
        loss = lambda w, x: (f(leaf.replace(latent=w), x) * g).sum()
        to_w, to_x = jax.grad(loss, (0, 1))(W, X)
        rounded = np.asarray(leaf.prepare_activations(X), np.float64)
        assert np.abs(rounded - X).max() > 1e-4
        np.testing.assert_allclose(to_w, rounded.T @ g, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(
            to_x, g @ np.asarray(leaf.stored.materialize()).T, rtol=1e-4, atol=1e-5
        )


ARITHMETIC: dict[str, Callable[[Any], Any]] = {
    "leaf + 1": lambda leaf: leaf + 1,
    "1 + leaf": lambda leaf: 1 + leaf,
    "leaf - 1": lambda leaf: leaf - 1,
    "1 - leaf": lambda leaf: 1 - leaf,
    "leaf * 2": lambda leaf: leaf * 2,
    "2 * leaf": lambda leaf: 2 * leaf,
    "leaf / 2": lambda leaf: leaf / 2,
    "2 / leaf": lambda leaf: 2 / leaf,
    "leaf @ x": lambda leaf: leaf @ X.T,
    "x @ leaf": lambda leaf: X @ leaf,
    "numpy @ leaf": lambda leaf: np.asarray(X) @ leaf,
    "leaf + leaf": lambda leaf: leaf + leaf,
    "-leaf": operator.neg,
    "leaf ** 2": lambda leaf: leaf**2,
    "2 ** leaf": lambda leaf: 2**leaf,
    "leaf[0]": operator.itemgetter(0),
    "np.asarray": np.asarray,
}


@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic_is_refused_with_the_remedy(name: str) -> None:
    message = r"QuantizedArray\(int4 g2.*jaxcompress\.lift.*jaxcompress\.materialize"
    with pytest.raises(TypeError, match=message):
        ARITHMETIC[name](QUANTIZED)


def test_a_leaf_is_not_iterable() -> None:
    with pytest.raises(TypeError, match="not iterable"):
        iter(QUANTIZED)


def test_it_says_what_it_is() -> None:
    assert repr(QUANTIZED) == "QuantizedArray(int4 g2, float32[6, 4])"
    scheme = jc.quant.lsq(jc.quant.int4())
    shapes = jax.tree.map(jnp.shape, scheme.init({"w": jnp.ones((6, 4))})[0]["w"])
    assert repr(shapes) == "SteppedArray(latent=(6, 4), step=(4, 1))"
    assert (QUANTIZED.ndim, QUANTIZED.size) == (2, 24)


def test_stored_bytes_are_those_of_all_buffers() -> None:
    codes, scales = 24 * 4 // 8, 4 * 12
    assert QUANTIZED.stored_bytes == codes + scales
    both = MaskedArray(inner=QUANTIZED, mask=MASK)
    assert both.stored_bytes == codes + scales + 24


def test_replace_copies_and_leaves_are_frozen() -> None:
    gated = view().replace(gate=MASK)
    assert gated.gate is MASK
    assert gated.stored is QUANTIZED
    with pytest.raises(dataclasses.FrozenInstanceError):
        gated.gate = None  # type: ignore[misc]


def test_components_are_the_arrays_that_are_there_with_their_roles() -> None:
    gated = view(gate=MASK)
    assert gated.components() == {
        "latent": (W, WEIGHT),
        "stored": (QUANTIZED, FROZEN),
        "gate": (MASK, FROZEN),
    }
    assert list(view().components()) == ["latent", "stored"]


@pytest.mark.parametrize(
    "placeholder", [None, object(), 0], ids=["None", "object", "int"]
)
def test_jax_may_rebuild_a_leaf_around_anything(placeholder: Any) -> None:
    leaf = view(gate=MASK)
    rebuilt = jax.tree.map(lambda _: placeholder, leaf)
    assert type(rebuilt) is type(leaf)
    assert rebuilt.stored.element == leaf.stored.element


def test_settings_belong_to_the_structure() -> None:
    build = lambda fmt: jax.eval_shape(lambda w: jc.quant.quantize(w, fmt), W)
    same = build(jc.quant.int4(group_size=2))
    other = build(jc.quant.int4(group_size=2, symmetric=False))
    assert jax.tree.structure(QUANTIZED) == jax.tree.structure(same)
    assert jax.tree.structure(QUANTIZED) != jax.tree.structure(other)


class TestDefaults:
    def test_what_a_leaf_does_not_define_it_does_not_do(self) -> None:
        leaf = Constant()
        assert leaf.values() == ()
        assert leaf.relayout(Transpose(permutation=(1, 0))) is NotImplemented
        assert leaf.stacked(1) is NotImplemented
        assert leaf.prepare_activations(X) is X
        with pytest.raises(jc.OrderError, match="constant fixes the value of every"):
            leaf.map_values(lambda a: a)
        with pytest.raises(ValueError, match="Constant: this leaf cannot be sharded"):
            leaf.component_specs((None, "d"), {"d": 2})

    @pytest.mark.parametrize("leaf_is_lhs", [False, True])
    def test_its_matmul_is_that_of_the_dense_array(self, leaf_is_lhs: bool) -> None:
        numbers = (((0,), (1,)) if leaf_is_lhs else ((1,), (0,)), ((), ()))
        out, how = Constant().dot_general(X, numbers, leaf_is_lhs=leaf_is_lhs)
        expected = np.asarray(X, np.float64) @ np.full((6, 4), 2.0)
        np.testing.assert_allclose(
            out, expected.T if leaf_is_lhs else expected, rtol=1e-5
        )
        assert how == "dequantized dot"

    def test_a_leaf_must_say_how_it_becomes_dense(self) -> None:
        partial = type("Partial", (Leaf,), {"shape": (1,), "method": "none"})
        with pytest.raises(TypeError, match="abstract"):
            partial()


class TestMaterialize:
    def test_leaves_become_arrays_and_arrays_stay_the_same_objects(self) -> None:
        params = {"a": [QUANTIZED, W], "b": (view(), None), "c": 1.5}
        dense = jc.materialize(params)
        assert dense["a"][1] is W
        assert dense["b"][1] is None
        assert dense["c"] == 1.5
        np.testing.assert_array_equal(dense["a"][0], DENSE)
        np.testing.assert_array_equal(dense["b"][0], DENSE)
        assert not any(map(jc.is_leaf, jax.tree.leaves(dense, is_leaf=jc.is_leaf)))

    def test_a_leaf_alone_and_leaves_in_leaves(self) -> None:
        np.testing.assert_array_equal(jc.materialize(QUANTIZED), DENSE)
        nested = MaskedArray(inner=view(), mask=MASK)
        np.testing.assert_array_equal(jc.materialize(nested), np.where(MASK, DENSE, 0))


def test_only_leaves_are_leaves() -> None:
    assert jc.is_leaf(QUANTIZED)
    assert jc.is_leaf(Constant())
    assert not any(map(jc.is_leaf, [W, {"w": QUANTIZED}, [QUANTIZED], None, Leaf]))
