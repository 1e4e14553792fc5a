"""`CodebookArray`: decoding, layouts, look-ups, gradients, sharding."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from jaxcompress.codebook import CodebookArray
from jaxcompress.layout import Axes, Layout


def make(
    shape: tuple[int, ...],
    axes: Axes,
    *,
    books: int = 1,
    blocks: int = 1,
    entries: int = 16,
    d: int = 1,
    bits: int = 4,
    scale: bool = False,
    seed: int = 0,
) -> CodebookArray:
    rng = np.random.default_rng(seed)
    layout = Layout.of(shape, axes)
    *lead, k = jax.eval_shape(layout.to_storage, jnp.zeros(shape)).shape
    s = -(-k // d)
    own = shape[: axes.stack]
    codes = rng.integers(0, entries, size=(*lead, books, s))
    tables = rng.normal(size=(*own, blocks, books, entries, d))
    return CodebookArray(
        words=jnp.asarray(codes, jnp.uint8),
        codebooks=jnp.asarray(tables, jnp.float32),
        scale=jnp.asarray(rng.normal(size=lead), jnp.float32) if scale else None,
        layout=layout,
        code_bits=bits,
        packed=False,
        short=s * d - k,
        dtype_name="float32",
    )


def additive() -> CodebookArray:
    """Everything at once: added codes, runs, a cut sub-vector, scales."""
    plain = Axes(contract=(-2,))
    return make((19, 6), plain, books=2, blocks=2, entries=7, d=5, bits=3, scale=True)


def oracle(leaf: CodebookArray, k: int, n: int) -> np.ndarray:
    """The definition, weight by weight."""
    codes = np.asarray(leaf.codes())
    tables = np.asarray(leaf.codebooks, np.float64)
    blocks, books, _, d = tables.shape
    w = np.zeros((k, n))
    for o in range(n):
        for i in range(k):
            s, j = divmod(i, d)
            b = s * blocks // codes.shape[-1]
            w[i, o] = sum(tables[b, a, codes[o, a, s], j] for a in range(books))
            if leaf.scale is not None:
                w[i, o] *= leaf.scale[o]
    return w


def test_materialize_is_the_definition_packed_or_not() -> None:
    leaf = additive()
    dense = leaf.materialize()
    assert leaf.shape == dense.shape == (19, 6)
    np.testing.assert_allclose(dense, oracle(leaf, 19, 6), rtol=1e-6, atol=1e-6)
    packed = leaf.pack()
    assert packed.words.shape == (6, 2, 2)  # Four codes of three bits.
    np.testing.assert_array_equal(packed.materialize(), dense)
    assert packed.stored_bytes == 6 * 2 * 2 + 2 * 2 * 7 * 5 * 4 + 6 * 4


def test_a_code_past_the_last_entry_reads_the_last() -> None:
    leaf = make((4, 2), Axes(contract=(-2,)), entries=5)
    past = leaf.replace(words=jnp.full_like(leaf.words, 15))
    np.testing.assert_array_equal(
        past.materialize(), jnp.full((4, 2), leaf.codebooks[0, 0, 4, 0])
    )


def test_transposes_and_reshapes_keep_the_words() -> None:
    leaf = make((3, 8, 6), Axes(contract=(-2,), stack=1)).pack()
    f = lambda w: jnp.swapaxes(w, 1, 2).reshape(3, 6, 2, 4)
    moved = leaf.relayout(jc.leaf.Transpose(permutation=(0, 2, 1)))
    moved = moved.relayout(jc.leaf.Reshape(shape=(3, 6, 2, 4)))
    assert isinstance(moved, CodebookArray)
    assert moved.words is leaf.words
    np.testing.assert_array_equal(moved.materialize(), f(leaf.materialize()))


def test_a_look_up_decodes_only_rows_and_never_repeats_codebooks() -> None:
    table = make((500, 24), Axes(contract=(-1,)), d=8, entries=64, bits=6).pack()
    ids = jnp.array([[3, 499], [0, 3]])
    look_up = jc.lift(lambda t, i: jnp.take(t, i, axis=0))
    found = jax.jit(look_up)(table, ids)
    np.testing.assert_array_equal(found, table.materialize()[ids])
    sizes = [
        v.aval.size
        for eqn in jax.make_jaxpr(look_up)(table, ids).eqns
        for v in eqn.outvars
    ]
    assert max(sizes) <= table.codebooks.size
    tied = jc.lift(lambda t, x: x @ t.T)(table, jnp.ones((2, 24)))
    np.testing.assert_allclose(
        tied, jnp.ones((2, 24)) @ table.materialize().T, rtol=1e-5
    )


def test_axes_that_share_codebooks_can_be_scanned() -> None:
    leaf = make((3, 8, 4), Axes(contract=(-2,))).pack()
    assert leaf.own == 0
    run = jc.lift(lambda w, x: jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0])
    square = make((3, 4, 4), Axes(contract=(-2,))).pack()
    dense = square.materialize()
    x = jnp.ones((2, 4))
    expected = x @ dense[0] @ dense[1] @ dense[2]
    np.testing.assert_allclose(run(square, x), expected, rtol=1e-4, atol=1e-5)
    first = jc.lift(lambda w: jc.materialize(w[1:]))(leaf)
    np.testing.assert_array_equal(first, leaf.materialize()[1:])


def test_gradients_are_sums_by_code() -> None:
    leaf = additive()
    dy = jnp.asarray(np.random.default_rng(1).normal(size=(19, 6)), jnp.float32)

    def loss(books: jax.Array, scale: jax.Array) -> jax.Array:
        return (leaf.replace(codebooks=books, scale=scale).materialize() * dy).sum()

    assert leaf.scale is not None
    books, scale = jax.grad(loss, (0, 1))(leaf.codebooks, leaf.scale)
    wanted, codes = np.zeros(leaf.codebooks.shape), np.asarray(leaf.codes())
    for o in range(6):
        for i in range(19):
            s, j = divmod(i, 5)
            for a in range(2):
                wanted[s * 2 // 4, a, codes[o, a, s], j] += dy[i, o] * leaf.scale[o]
    np.testing.assert_allclose(books, wanted, rtol=1e-4, atol=1e-5)
    unscaled = oracle(leaf.replace(scale=None), 19, 6)
    np.testing.assert_allclose(scale, (unscaled * dy).sum(0), rtol=1e-4, atol=1e-5)


def test_an_entry_that_is_held_at_zero_stays_there() -> None:
    leaf = make((8, 4), Axes(contract=(-2,))).replace(zero_entry=True)
    loss = lambda b: (leaf.replace(codebooks=b).materialize() ** 2).sum()
    assert leaf.traits.preserves_zeros
    assert not leaf.entries()[0, 0, 0].any()
    assert not jax.grad(loss)(leaf.codebooks)[0, 0, 0].any()
    assert jax.grad(loss)(leaf.codebooks)[0, 0, 1:].any()


def test_a_large_weight_runs_by_the_kernel() -> None:
    leaf = make((2048, 1024), Axes(contract=(-2,)), d=2, entries=4, bits=2).pack()
    x = jnp.asarray(np.random.default_rng(2).normal(size=(2, 2048)), jnp.float32)
    sites = jc.explain(lambda p, x: x @ p, leaf, x)
    assert leaf.traits.own_matmul
    assert "gathered" in str(sites)
    y = jax.jit(jc.lift(lambda p, x: x @ p))(leaf, x)
    np.testing.assert_allclose(y, x @ leaf.materialize(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("blocks", [1, 2])
def test_inputs_can_be_cut_at_whole_words(blocks: int) -> None:
    leaf = make((32, 4), Axes(contract=(-2,)), d=2, blocks=blocks).pack()
    specs = leaf.component_specs(("d", None), {"d": 2})
    assert specs.words == P(None, None, "d")
    assert specs.codebooks == P("d" if blocks > 1 else None)
    with pytest.raises(ValueError, match=r"cannot be cut in 32 .*\[2"):
        leaf.component_specs(("d", None), {"d": 32})


def test_words_that_arithmetic_corrupted_are_refused() -> None:
    leaf = make((8, 4), Axes(contract=(-2,)))
    for bad in (leaf, leaf.pack()):
        spoilt: Any = jax.tree.map(lambda a: a.astype(jnp.float32), bad)
        with pytest.raises(TypeError, match="words must be uint8"):
            spoilt.materialize()


def test_codebooks_may_be_quantized_and_refuse_a_mask() -> None:
    leaf = {"w": make((8, 4), Axes(contract=(-2,))).pack()}
    scheme = jc.select({"w": jc.quant.int8()})
    packed = scheme.compress(*scheme.init(leaf))["w"]
    assert isinstance(packed.codebooks, jc.quant.QuantizedArray)
    np.testing.assert_allclose(packed.materialize(), leaf["w"].materialize(), atol=0.02)
    rule = jc.select({"w": jc.presets.W8A8})
    ready = rule.init(leaf)
    with pytest.raises(jc.OrderError, match="not on 16 values that weights share"):
        rule.view(*ready)
    gates = jc.prune.l0(key=jax.random.key(0), end=0)
    for mask in (jc.prune.magnitude(sparsity=0.5), gates):
        with pytest.raises(jc.OrderError, match="at 'w': weights share the entries"):
            jc.select({"w": mask}).init(leaf)
