"""Codebook matmul against float64 NumPy: shared scalars, product, additive."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import packing
from kernels_pallas.codebook_matmul import (
    CodebookWeight,
    choose,
    codebook_matmul,
    dequantize,
    reference,
    repack,
    unpack,
    xla,
)
from kernels_pallas.layouts import GPU, PORTABLE, TPU
from kernels_pallas.target import Target

CPU_TARGET, TPU_TARGET = Target("cpu", "cpu"), Target("tpu", "TPU v5e")
GPU_TARGET = Target("gpu", "NVIDIA H200")


class Case(NamedTuple):
    """Sizes of a weight, and of what it is multiplied with."""

    m: int
    n: int
    k: int
    d: int
    entries: int
    books: int = 1
    blocks: int = 1
    bits: int = 8
    scaled: bool = True

    @property
    def count(self) -> int:
        return -(-self.k // self.d)


SCALARS = Case(m=17, n=37, k=61, d=1, entries=256)
PRODUCT = Case(m=3, n=21, k=130, d=2, entries=16, blocks=13, bits=4)
ADDITIVE = Case(m=8, n=130, k=254, d=8, entries=200, books=2, scaled=False)
ONE_ROW = Case(m=1, n=33, k=270, d=8, entries=100, books=3, blocks=2, bits=7)
CASES = {"scalars": SCALARS, "product": PRODUCT, "additive": ADDITIVE, "one": ONE_ROW}


class Data(NamedTuple):
    """A problem, and its dense weight in float64 with a bound of its magnitude."""

    x: jax.Array
    weight: CodebookWeight
    codes: np.ndarray
    dense: np.ndarray
    size: np.ndarray


def dense_of(
    codes: np.ndarray, books: np.ndarray, scale: np.ndarray | None, k: int
) -> np.ndarray:
    """The definition, code by code, in float64."""
    n, added, count = codes.shape
    d = books.shape[-1]
    w = np.zeros((n, count * d))
    for i, a, s in np.ndindex(n, added, count):
        block = s // (count // books.shape[0])
        w[i, s * d : (s + 1) * d] += books[block, a, codes[i, a, s]]
    return w[:, :k] if scale is None else w[:, :k] * scale[:, None]


def data(case: Case, *, seed: int = 0, dtype: Any = jnp.float32) -> Data:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, case.entries, (case.n, case.books, case.count), np.uint8)
    shape = (case.blocks, case.books, case.entries, case.d)
    books = rng.standard_normal(shape).astype(np.float32)
    scale = rng.uniform(0.5, 2.0, case.n).astype(np.float32) if case.scaled else None
    weight = CodebookWeight(
        packing.pack(jnp.asarray(codes), bits=case.bits),
        jnp.asarray(books),
        None if scale is None else jnp.asarray(scale),
    )
    x = jnp.asarray(rng.standard_normal((case.m, case.k)), dtype)
    exact = None if scale is None else scale.astype(float)
    wide = books.astype(float)
    return Data(
        x,
        weight,
        codes,
        dense_of(codes, wide, exact, case.k),
        dense_of(codes, abs(wide), exact, case.k),
    )


def bound(x: jax.Array, given: Data, extra: float = 0.0) -> np.ndarray:
    """Of a float32 sum of K products of sums of A entries; `extra` for each product."""
    terms = given.codes.shape[1] + x.shape[-1] + 3
    size = abs(np.asarray(x, float)) @ given.size.T
    return size * (terms * 2.0**-24 + extra) + 1e-30


def agrees(y: jax.Array, x: jax.Array, given: Data, extra: float = 0.0) -> None:
    wanted = np.asarray(x, float) @ given.dense.T
    limit = bound(x, given, extra)
    if y.dtype == jnp.bfloat16:
        limit += 2.0**-8 * (abs(wanted) + limit)
    np.testing.assert_array_less(abs(np.asarray(y, float) - wanted), limit)


def interpreted(x: jax.Array, weight: CodebookWeight, case: Case) -> jax.Array:
    """The TPU kernel, by its interpreter."""
    options: Any = {"layout": TPU, "target": TPU_TARGET, "interpret": True}
    return codebook_matmul(x, weight, bits=case.bits, n=case.n, **options)


@functools.partial(jax.jit, static_argnames="case")
def everything(x: jax.Array, weight: CodebookWeight, case: Case) -> Any:
    bits, n, k = case.bits, case.n, case.k
    lanes = repack(weight, bits=bits, k=k, to=TPU)
    return (
        dequantize(weight, bits=bits, k=k),
        unpack(lanes, bits=bits, n=n, k=k, layout=TPU),
        codebook_matmul(x, weight, bits=bits, target=CPU_TARGET),
        interpreted(x, lanes, case),
    )


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_reference_xla_and_the_tpu_kernel_agree_with_float64(case: Case) -> None:
    given = data(case)
    w, back, plain, kernel = everything(given.x, given.weight, case)
    assert (abs(np.asarray(w, float) - given.dense) <= 2.0**-22 * given.size).all()
    jax.tree.map(np.testing.assert_array_equal, back, given.weight)
    for y in (plain, kernel):
        assert y.shape == (case.m, case.n)
        assert w.dtype == y.dtype == jnp.float32
        agrees(y, given.x, given)


def test_the_reference_multiplies() -> None:
    given = data(PRODUCT)
    run = jax.jit(reference.codebook_matmul, static_argnames="bits")
    agrees(run(given.x, given.weight, bits=PRODUCT.bits), given.x, given)


def test_bfloat16() -> None:
    given = data(PRODUCT, dtype=jnp.bfloat16)
    _, _, plain, kernel = everything(given.x, given.weight, PRODUCT)
    assert plain.dtype == kernel.dtype == jnp.bfloat16
    agrees(plain, given.x, given)
    agrees(kernel, given.x, given, extra=2.0**-8)


def test_both_plain_forms_by_chunks() -> None:
    case = ONE_ROW._replace(m=5)
    given = data(case)
    options: Any = {"bits": case.bits, "chunk": 5 * case.k}
    forms = (xla.by_decoding, xla.by_partial_products)
    run = jax.jit(lambda x, w: [form(x, w, **options) for form in forms])
    for y in run(given.x, given.weight):
        agrees(y, given.x, given)


def test_a_stack_and_leading_axes() -> None:
    case = PRODUCT
    parts = [data(case, seed=seed) for seed in (1, 2)]
    weight = jax.tree.map(lambda *a: jnp.stack(a), *(p.weight for p in parts))
    x = jnp.stack([jnp.stack([p.x, p.x[::-1]]) for p in parts])

    @jax.jit
    def both(x: jax.Array, weight: CodebookWeight) -> tuple[jax.Array, jax.Array]:
        lanes = jax.vmap(lambda w: repack(w, bits=case.bits, k=case.k, to=TPU))(weight)
        return codebook_matmul(x, weight, bits=case.bits), interpreted(x, lanes, case)

    for y in both(x, weight):
        assert y.shape == (2, 2, case.m, case.n)
        for i, j in np.ndindex(2, 2):
            agrees(y[i, j], x[i, j], parts[i])


def gradients_of(given: Data, case: Case, dy: np.ndarray) -> tuple[np.ndarray, ...]:
    """Of x, codebooks and scale, in float64; scale as if it were one without."""
    x = np.asarray(given.x, float)
    scale = given.weight.scale
    each = np.ones(case.n) if scale is None else np.asarray(scale, float)
    dw = np.zeros((case.n, case.count * case.d))
    dw[:, : case.k] = dy.T @ x
    dbooks = np.zeros(given.weight.codebooks.shape)
    for i, a, s in np.ndindex(*given.codes.shape):
        block = s // (case.count // case.blocks)
        part = dw[i, s * case.d : (s + 1) * case.d] * each[i]
        dbooks[block, a, given.codes[i, a, s]] += part
    dscale = (dw[:, : case.k] * given.dense).sum(1) / each
    return dy @ given.dense, dbooks, dscale


def test_gradients() -> None:
    case = ONE_ROW._replace(m=3)
    given = data(case)
    dy = np.random.default_rng(9).standard_normal((case.m, case.n)).astype(np.float32)

    def by_xla(x: jax.Array, weight: CodebookWeight) -> jax.Array:
        return codebook_matmul(x, weight, bits=case.bits)

    def by_kernel(x: jax.Array, weight: CodebookWeight) -> jax.Array:
        return interpreted(x, repack(weight, bits=case.bits, k=case.k, to=TPU), case)

    def by_chunks(x: jax.Array, weight: CodebookWeight) -> jax.Array:
        return xla.by_decoding(x, weight, bits=case.bits, chunk=4 * case.k)

    forms = (by_xla, by_kernel, by_chunks)
    pull = jax.jit(lambda x, w: [jax.vjp(f, x, w)[1](jnp.asarray(dy)) for f in forms])
    wanted = gradients_of(given, case, dy.astype(float))
    absolute = given._replace(x=abs(given.x), dense=given.size)
    sizes = gradients_of(absolute, case, abs(dy.astype(float)))
    terms = case.m + case.n * case.count + case.k + case.books + 4
    for dx, (dwords, *rest) in pull(given.x, given.weight):
        assert dwords.dtype == jax.dtypes.float0
        for a, b, size in zip((dx, *rest), wanted, sizes, strict=True):
            assert a.shape == b.shape
            error = abs(np.asarray(a, float) - b)
            np.testing.assert_array_less(error, size * terms * 2.0**-24 + 1e-30)


def test_a_code_past_the_last_entry_reads_the_last_of_its_book() -> None:
    codes = jnp.array([[[3, 250, 5], [1, 0, 7]]], jnp.uint8)
    books = jnp.arange(12, dtype=jnp.float32).reshape(1, 2, 6, 1)
    case = Case(m=3, n=1, k=3, d=1, entries=6, books=2)
    for y in everything(jnp.eye(3), CodebookWeight(codes, books), case)[2:]:
        assert y.ravel().tolist() == [10, 11, 16]


@pytest.mark.parametrize("m", [1, 16], ids=["partial products", "entries"])
def test_the_kernel_lowers_for_tpu(m: int) -> None:
    case = Case(m=m, n=256, k=2048, d=8, entries=256)
    given = jax.eval_shape(lambda: data(case, dtype=jnp.bfloat16)[:2])
    run = lambda x, w: codebook_matmul(
        x,
        repack(w, bits=8, k=case.k, to=TPU),
        bits=8,
        n=case.n,
        layout=TPU,
        target=TPU_TARGET,
    )
    lowered = jax.jit(run).trace(*given).lower(lowering_platforms=("tpu",))
    assert "tpu_custom_call" in lowered.as_text()


def test_no_dense_weight_is_made_on_a_cpu() -> None:
    n, k = 1024, 1024
    shapes = (
        jax.ShapeDtypeStruct((2, k), jnp.float32),
        CodebookWeight(
            jax.ShapeDtypeStruct((n, 1, k // 4), jnp.uint8),
            jax.ShapeDtypeStruct((1, 1, 256, 4), jnp.float32),
        ),
    )
    run = jax.jit(lambda x, w: codebook_matmul(x, w, bits=8))
    memory = run.lower(*shapes).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < n * k


def test_choose_says_what_runs() -> None:
    shape = (1, 1, 256, 8)
    ask = lambda m, **to: choose(m, 8192, 8192, shape, **to)
    assert ask(16, layout=TPU, target=TPU_TARGET).kernel == "tpu"
    assert "partial" in ask(1, layout=TPU, target=TPU_TARGET).how
    assert "outputs at a time" in ask(16, layout=PORTABLE, target=CPU_TARGET).how
    assert "partial" in ask(1, layout=PORTABLE, target=CPU_TARGET).how
    assert ask(16, layout=PORTABLE, target=GPU_TARGET).kernel == "xla"
    large = choose(16, 8192, 8192, (8, 16, 256, 8), layout=TPU, target=TPU_TARGET)
    assert large.kernel == "xla"
    assert "VMEM" in large.how


def test_tables_too_large_for_the_kernel_run_by_xla() -> None:
    case = Case(m=8, n=5, k=16, d=8, entries=256, books=16, blocks=2)
    given = data(case)
    agrees(everything(given.x, given.weight, case)[3], given.x, given)


def test_no_rows() -> None:
    given = data(PRODUCT)
    assert codebook_matmul(given.x[:0], given.weight, bits=4).shape == (0, PRODUCT.n)


BAD: dict[str, tuple[type[Exception], str, Any, Any]] = {
    "x": (TypeError, "x must be floating", lambda x, w: (x.astype(int), w), {}),
    "codebooks": (
        TypeError,
        "codebooks must be floating",
        lambda x, w: (x, w._replace(codebooks=w.codebooks.astype(int))),
        {},
    ),
    "words type": (
        TypeError,
        "words of the portable layout",
        lambda x, w: (x, w._replace(words=w.words.astype(jnp.int32))),
        {},
    ),
    "gpu layout": (ValueError, "layout must", lambda x, w: (x, w), {"layout": GPU}),
    "device": (ValueError, "layout must", lambda x, w: (x, w), {"layout": TPU}),
    "bits": (ValueError, "bits must be 1 to 8", lambda x, w: (x, w), {"bits": 9}),
    "entries": (ValueError, "at most 8 entries", lambda x, w: (x, w), {"bits": 3}),
    "inputs": (ValueError, "words must be", lambda x, w: (x[:, :-26], w), {}),
    "blocks": (ValueError, "blocks that divides", lambda x, w: (x[:, :-2], w), {}),
    "axes": (
        ValueError,
        "words must have axes",
        lambda x, w: (x, w._replace(words=w.words[:, 0])),
        {},
    ),
    "books": (
        ValueError,
        "codebooks must be",
        lambda x, w: (x, w._replace(codebooks=w.codebooks[0])),
        {},
    ),
    "scale": (
        ValueError,
        "scale must be",
        lambda x, w: (x, w._replace(scale=w.scale[:-1])),
        {},
    ),
    "stack": (
        ValueError,
        "begin with the weight's stack",
        lambda x, w: (x, jax.tree.map(lambda a: a[None], w)),
        {},
    ),
}


@pytest.mark.parametrize(
    ("error", "message", "change", "options"), BAD.values(), ids=BAD
)
def test_what_is_refused(
    error: type[Exception], message: str, change: Any, options: Any
) -> None:
    given = data(PRODUCT)
    x, weight = change(given.x, given.weight)
    with pytest.raises(error, match=f"codebook_matmul.*{message}"):
        codebook_matmul(x, weight, **{"bits": 4, "target": CPU_TARGET, **options})
