"""Layouts: the bits where the words say, and back without a change."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from kernels_pallas import layouts
from kernels_pallas.formats import Format
from tests.kernels.weights import FORMATS, random_weight

N, K, GROUPS = 5, 192, 6
CHIPS = [layouts.TPU, layouts.GPU]


@pytest.mark.parametrize("layout", CHIPS, ids=lambda layout: layout.name)
def test_repack_and_unpack_are_inverse(layout: layouts.Layout) -> None:
    rng = np.random.default_rng(0)
    given = {n: random_weight(rng, f, N, K, GROUPS)[0] for n, f in FORMATS.items()}

    @jax.jit
    def there(weights: dict[str, layouts.Weight]) -> dict[str, layouts.Weight]:
        return {
            name: layouts.repack(w, FORMATS[name], n=N, k=K, to=layout)
            for name, w in weights.items()
        }

    @jax.jit
    def back(weights: dict[str, layouts.Weight]) -> dict[str, layouts.Weight]:
        return {
            name: layouts.unpack(w, layouts.Stored(FORMATS[name], N, K, GROUPS, layout))
            for name, w in weights.items()
        }

    packed = there(given)
    for name, found in back(packed).items():
        wanted = layout.words_shape(N, K, GROUPS, FORMATS[name])
        assert packed[name].words.shape == wanted, name
        assert packed[name].words.dtype == layout.dtype
        assert layout.sizes(packed[name].scale.shape)[0] == layout.padded(N, K, 6)[0]
        for a, b in zip(found, given[name], strict=True):
            if b is not None:
                np.testing.assert_array_equal(a, b, err_msg=name)


def _field(words: np.ndarray, layout: layouts.Layout, bits: int, i: int, j: int) -> int:
    """The code of output i and input j as the layout's definition places it."""
    if layout.name == "tpu":
        row, place = divmod(j * bits, 32)
        return int(words[row, i]) >> place & (2**bits - 1)
    # Strips and blocks of 64; in a block, thread 32 p + 4 r + q and pair 4 s + 2 c + h.
    (strip, out), (block, inside) = divmod(i, 64), divmod(j, 64)
    p, h, r = out // 16, out // 8 % 2, out % 8
    s, c, q, half = inside // 16, inside // 8 % 2, inside // 2 % 4, inside % 2
    pair, thread = 4 * s + 2 * c + h, 32 * p + 4 * r + q
    word, place = divmod(pair, 16 // bits)
    vector = min(bits, 4)
    a, b = divmod(word, vector)
    at = block * bits * 128 + vector * (128 * a + thread) + b
    return int(words[strip, at]) >> (bits * place + 16 * half) & (2**bits - 1)


@pytest.mark.parametrize("layout", CHIPS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("name", ["int4", "int3", "int2", "uint4", "nf4", "int8"])
def test_a_code_is_where_the_layout_says(layout: layouts.Layout, name: str) -> None:
    fmt: Format = FORMATS[name]
    weight, dense = random_weight(np.random.default_rng(1), fmt, N, K, GROUPS)
    packed = layouts.repack(weight, fmt, n=N, k=K, to=layout)
    words, bits = np.asarray(packed.words), layouts.width(fmt)
    scale, zero = np.asarray(packed.scale), packed.zero
    for i, j in [(0, 0), (4, 191), (2, 33), (3, 100)]:
        code, group = _field(words, layout, bits, i, j), j // (K // GROUPS)
        if name == "nf4":
            value = fmt.values[code]
        else:
            value = code - 2**bits * (code >= 2 ** (bits - 1))
        offset = 0.0 if zero is None else float(zero[group, i])
        found = (value - offset) * float(scale[group, i])
        np.testing.assert_allclose(found, dense[i, j], rtol=1e-7)


def test_padding_is_zero() -> None:
    weight, _ = random_weight(np.random.default_rng(2), FORMATS["int4"], N, K, GROUPS)
    packed = layouts.repack(weight, FORMATS["int4"], n=N, k=K, to=layouts.TPU)
    assert not np.asarray(packed.words)[:, N:].any()
    assert not np.asarray(packed.words)[K // 8 :].any()
    assert not np.asarray(packed.scale)[GROUPS:].any()
