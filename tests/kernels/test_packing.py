"""The bit stream against one written out bit by bit."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import packing

BITS = range(1, 9)
COUNTS = (1, 13, 16)


def stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """Bit `j` of code `i` at place ``i * bits + j``, eight places a byte."""
    rows = codes.reshape(-1, codes.shape[-1])
    packed = []
    for row in rows:
        number = sum((int(c) % 2**bits) << (i * bits) for i, c in enumerate(row))
        length = -(-len(row) * bits // 8)
        packed.append(np.frombuffer(number.to_bytes(length, "little"), np.uint8))
    return np.array(packed, np.uint8).reshape(*codes.shape[:-1], -1)


pack = jax.jit(packing.pack, static_argnames="bits")
unpack = jax.jit(packing.unpack, static_argnames=("bits", "count"))


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("bits", BITS)
def test_codes_lie_in_the_stream_and_come_back(bits: int, count: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 2**bits, (2, 3, count), np.uint8)
    words = pack(jnp.asarray(codes), bits=bits)
    assert words.dtype == jnp.uint8
    np.testing.assert_array_equal(words, stream(codes, bits))
    assert words.shape[-1] == packing.packed_length(count, bits=bits)
    np.testing.assert_array_equal(unpack(words, bits=bits, count=count), codes)


@hypothesis.given(codes=st.lists(st.integers(-128, 127), min_size=13, max_size=13))
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_signed_codes_are_stored_in_twos_complement(
    bits: int, codes: list[int]
) -> None:
    signed = np.array(codes, np.int8)
    words = pack(jnp.asarray(signed), bits=bits)
    np.testing.assert_array_equal(words, stream(signed, bits))
    np.testing.assert_array_equal(
        unpack(words, bits=bits, count=13), signed.astype(int) % 2**bits
    )


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint32, jnp.int8])
def test_codes_may_have_any_integer_type(dtype: type) -> None:
    codes = np.array([1, 2, 3, 0, 5, 6, 7], np.uint8)
    words = packing.pack(jnp.asarray(codes, dtype), bits=3)
    np.testing.assert_array_equal(words, stream(codes, 3))


@pytest.mark.parametrize("bits", [3, 8])
def test_no_codes_take_no_bytes(bits: int) -> None:
    words = pack(jnp.zeros((2, 0), jnp.uint8), bits=bits)
    assert words.shape == (2, 0)
    assert unpack(words, bits=bits, count=0).shape == (2, 0)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_only_the_first_codes_are_read(bits: int) -> None:
    codes = np.random.default_rng(0).integers(0, 2**bits, 16, np.uint8)
    found = packing.unpack(jnp.asarray(stream(codes, bits)), bits=bits, count=5)
    np.testing.assert_array_equal(found, codes[:5])


@pytest.mark.parametrize("bits", [4, 8])
def test_words_that_arithmetic_has_changed_are_refused(bits: int) -> None:
    words = jnp.zeros(4, jnp.uint8).astype(jnp.float32)
    with pytest.raises(TypeError, match=r"uint8; got float32.*before `compress`"):
        packing.unpack(words, bits=bits, count=4)
