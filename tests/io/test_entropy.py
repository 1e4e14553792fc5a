"""Entropy coding: lossless, near the entropy, damage refused; files of few bytes."""

from __future__ import annotations

import contextlib
import itertools
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxcompress as jc
from jaxcompress.io import entropy
from jaxcompress.io._compact import pack_codes, unpack_codes
from jaxcompress.io.entropy._gaps import from_gaps, to_gaps
from jaxcompress.io.entropy._huffman import canonical_codes, code_lengths
from jaxcompress.io.entropy._places import LOGIT, ODDS
from jaxcompress.io.entropy._rans import PRECISION, frequencies
from kernels_pallas import packing

coders = pytest.mark.parametrize("coder", entropy.CODERS)
RNG = lambda: np.random.default_rng(0)


def bits_of(symbols: np.ndarray) -> float:
    """Entropy of symbols that do not depend on each other, in bytes."""
    p = np.bincount(symbols.ravel()) / symbols.size
    p = p[p > 0]
    return float(-(p * np.log2(p)).sum() * symbols.size / 8)


def fibonacci() -> np.ndarray:
    """Counts that make Huffman codes as long as can be."""
    counts = [1, 1]
    while len(counts) < 20:
        counts.append(counts[-1] + counts[-2])
    return np.repeat(np.arange(20), counts).astype(np.uint8)


ADVERSARIAL = {
    "empty": np.zeros(0, np.uint8),
    "no rows": np.zeros((0, 5), np.uint8),
    "no columns": np.zeros((5, 0), np.uint8),
    "scalar": np.array(7, np.uint8),
    "one": np.array([255], np.uint8),
    "constant": np.full(1000, 5, np.uint8),
    "zeros": np.zeros((30, 30), np.uint8),
    "ones": np.ones((3, 4, 5), np.uint8),
    "last of many": np.eye(1, 5000, 4999, dtype=np.uint8)[0],
    "every symbol": np.arange(256, dtype=np.uint8),
    "uniform": RNG().integers(0, 256, 3000).astype(np.uint8),
    "fibonacci": fibonacci(),
    "one in many": np.append(np.zeros(40_000, np.uint8), np.uint8(200)),
    "alternating": np.tile(np.array([0, 1], np.uint8), 500),
}


@coders
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_round_trip(name: str, coder: entropy.Coder) -> None:
    symbols = ADVERSARIAL[name]
    data = entropy.encode(symbols, coder=coder)
    again = entropy.decode(data)
    assert again.dtype == np.uint8
    assert again.shape == symbols.shape
    np.testing.assert_array_equal(again, symbols)
    assert len(data) <= symbols.size + 20


@coders
@given(
    symbols=hnp.arrays(
        np.uint8, hnp.array_shapes(max_dims=3, min_side=0), elements=st.integers(0, 9)
    )
)
def test_round_trip_of_anything(coder: entropy.Coder, symbols: np.ndarray) -> None:
    np.testing.assert_array_equal(
        entropy.decode(entropy.encode(symbols, coder=coder)), symbols
    )


def test_rans_reaches_the_entropy_and_huffman_a_bit_a_symbol() -> None:
    symbols = np.minimum(RNG().geometric(0.7, 20_000) - 1, 255).astype(np.uint8)
    least = bits_of(symbols)
    assert least < len(entropy.encode(symbols)) < 1.01 * least + 40
    huffman = len(entropy.encode(symbols, coder="huffman"))
    assert huffman < least + len(symbols) / 8
    assert len(entropy.encode(symbols)) < huffman


def test_columns_of_unlike_density_cost_less_than_the_entropy_of_all() -> None:
    rng = RNG()
    share = np.where(rng.permutation(100) < 20, 0.4, 0.002)
    mask = (rng.random((200, 100)) < share).astype(np.uint8)
    alike = rng.permuted(mask.ravel()).reshape(mask.shape)
    assert len(entropy.encode(mask)) < 0.8 * bits_of(mask)
    assert len(entropy.encode(alike)) < 1.05 * bits_of(mask)
    assert len(entropy.encode(mask)) < 0.8 * len(entropy.encode(mask, coder="huffman"))


def test_what_lies_close_together_costs_less() -> None:
    """Runs along rows, each somewhere else."""
    rng = RNG()
    mask = np.zeros((100, 200), np.uint8)
    for row, start in enumerate(rng.integers(0, 180, 100)):
        mask[row, start : start + 20] = 1
    alike = rng.permuted(mask.ravel()).reshape(mask.shape)
    assert len(entropy.encode(mask)) < 0.4 * len(entropy.encode(alike))


def test_no_entry_of_a_table_is_near_a_tie() -> None:
    """Another machine's logarithm rounds to the same integers."""
    p = (np.arange(4096) + 0.5) / 4096
    logits = 256 * np.log(p / (1 - p))
    odds = 2**PRECISION / (1 + np.exp(-np.arange(-2048, 2049) / 256))
    for exact, table in ((logits, LOGIT), (odds, ODDS)):
        assert np.abs(exact - np.floor(exact) - 0.5).min() > 1e-9
        assert np.abs(exact - table).max() <= 0.5


def test_huffman_lengths_are_the_best_prefix_code() -> None:
    """Against every set of lengths that a code can have."""
    counts = np.array([5, 9, 12, 13, 16])
    lengths = code_lengths(counts)
    cost = min(
        int((counts * np.array(tried)).sum())
        for tried in itertools.product(range(1, 5), repeat=5)
        if sum(0.5**n for n in tried) <= 1
    )
    assert (counts * lengths).sum() == cost
    codes = canonical_codes(lengths)
    words = [format(c, f"0{n}b") for c, n in zip(codes.tolist(), lengths, strict=True)]
    assert len(set(words)) == 5
    assert not any(a != b and b.startswith(a) for a in words for b in words)
    assert code_lengths(2 ** np.arange(30)).max() == 16


@pytest.mark.parametrize("width", [1, 3, 8])
def test_gaps_keep_positions(width: int) -> None:
    bits = (RNG().random(2000) < 0.02).astype(np.uint8)
    gaps = to_gaps(bits, width=width)
    assert gaps.max() < 2**width
    np.testing.assert_array_equal(from_gaps(gaps, width=width, count=2000), bits)
    assert to_gaps(np.array([0, 0, 1, 0, 0, 0, 0, 1], np.uint8), width=2).tolist() == [
        2,
        3,
        1,
    ]


def test_frequencies_add_up_and_leave_nothing_out() -> None:
    for counts in ([1], [10**9, 1, 1], [1] * 256, [3, 0, 5]):
        found = frequencies(np.array(counts))
        assert found.sum() == 2**PRECISION
        assert ((found > 0) == (np.array(counts) > 0)).all()


@coders
def test_every_flipped_bit_is_noticed(coder: entropy.Coder) -> None:
    symbols = np.minimum(RNG().geometric(0.3, 200), 40).astype(np.uint8)
    data = entropy.encode(symbols, coder=coder)
    for i in range(8 * len(data)):
        spoilt = bytearray(data)
        spoilt[i // 8] ^= 1 << i % 8
        with pytest.raises(jc.io.FileError, match="checksum"):
            entropy.decode(bytes(spoilt))
    for end in range(len(data)):
        with pytest.raises(jc.io.FileError):
            entropy.decode(data[:end])


@coders
@pytest.mark.parametrize("name", ["uniform", "last of many", "ones", "constant"])
def test_data_made_to_mislead_are_an_error_or_symbols(
    name: str, coder: entropy.Coder
) -> None:
    """With a checksum that is right, nothing but a named error may come."""
    rng, data = RNG(), entropy.encode(ADVERSARIAL[name][:300], coder=coder)[4:]
    for _ in range(60):
        spoilt = bytearray(data)
        spoilt[rng.integers(0, min(len(data), 40))] ^= 1 << rng.integers(0, 8)
        sealed = zlib.crc32(spoilt).to_bytes(4, "little") + bytes(spoilt)
        found = np.zeros(0, np.uint8)
        with contextlib.suppress(jc.io.FileError):
            found = entropy.decode(sealed, most=10**5)
        assert found.size <= 10**5


def test_more_symbols_than_asked_for_are_refused() -> None:
    data = entropy.encode(np.zeros(1000, np.uint8))
    with pytest.raises(jc.io.FileError, match="more than most=999"):
        entropy.decode(data, most=999)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="uint8; got int64"):
        entropy.encode(np.zeros(3, np.int64))
    with pytest.raises(ValueError, match="coder must be in"):
        entropy.encode(np.zeros(3, np.uint8), coder="zip")  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_unpack_on_the_host_as_on_the_device(bits: int) -> None:
    codes = RNG().integers(0, 2**bits, (3, 21)).astype(np.uint8)
    words = np.asarray(packing.pack(jnp.asarray(codes), bits=bits))
    found = unpack_codes(words, bits)
    np.testing.assert_array_equal(found[:, :21], codes)
    assert not found[:, 21:].any()
    np.testing.assert_array_equal(pack_codes(found, bits, words.shape), words)


@pytest.fixture(scope="module")
def tree() -> Any:
    """Every kind of packed component: codes, places, masks, and floats beside."""
    w = jnp.asarray(RNG().normal(size=(64, 24)), jnp.float32)
    rule = lambda *parts: jc.chain(*parts)
    zeros = jc.prune.magnitude(sparsity=0.9)
    scheme = jc.select(
        {
            "sparse": rule(zeros, jc.codebook.kmeans(bits=5)),
            "quantized": jc.quant.int3(),
            "nm": rule(jc.prune.magnitude(sparsity=jc.prune.nm(1, 4)), jc.quant.int4()),
            "shared": jc.codebook.kmeans(bits=3),
        }
    )
    params = dict.fromkeys(("sparse", "quantized", "nm", "shared", "plain"), w)
    return scheme.compress(*scheme.init(params))


@coders
def test_a_file_comes_back_to_the_bit_and_is_smaller(
    coder: entropy.Coder, tree: Any, tmp_path: Path
) -> None:
    path = tmp_path / "m.jc"
    jc.io.save(path, tree, entropy=coder, recipe=("a", 1), metadata={"b": "c"})
    again = jc.io.load(path)
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(tree), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    assert jc.io.file_bytes(tree, entropy=coder) <= path.stat().st_size
    assert path.stat().st_size < jc.io.file_bytes(tree) - 2000
    manifest = jc.io.read_manifest(path)
    assert manifest["recipe"] == ("a", 1)
    assert manifest["metadata"] == {"b": "c"}
    assert jc.io.verify(path).version == 2


def test_what_a_file_adds_is_less_than_a_kilobyte(tree: Any) -> None:
    one = {"w": tree["sparse"]}
    mask = entropy.encode(unpack_codes(np.asarray(one["w"].mask), 1))
    codes = entropy.encode(unpack_codes(np.asarray(one["w"].elements), 5))
    payload = len(mask) + min(len(codes), one["w"].elements.nbytes) + 32 * 4
    assert jc.io.file_bytes(one, entropy="rans") < payload + 500


def test_damage_to_a_file_is_refused(tree: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.jc"
    jc.io.save(path, {"w": tree["sparse"]}, entropy="rans")
    data = path.read_bytes()
    for i in range(0, len(data), 7):
        path.write_bytes(data[:i] + bytes([data[i] ^ 4]) + data[i + 1 :])
        with pytest.raises(jc.io.FileError, match=r"m\.jc"):
            jc.io.load(path)
    for part in (data[:-1], data[:60], data[:20], data + b"x"):
        path.write_bytes(part)
        with pytest.raises(jc.io.FileError):
            jc.io.load(path)


def test_saving_checks_its_arguments(tree: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"entropy must be in .*'zip'"):
        jc.io.save(tmp_path / "m.jc", tree, entropy="zip")  # type: ignore[arg-type]
    assert not (tmp_path / "m.jc").exists()
    with pytest.raises(FileExistsError, match="is a folder"):
        jc.io.save(tmp_path, tree, entropy="rans", overwrite=True)
