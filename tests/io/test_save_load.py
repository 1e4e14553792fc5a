"""What is saved comes back bit for bit, from one file or from a directory."""

from __future__ import annotations

import collections
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from flax import nnx
from flax.core import FrozenDict

import jaxcompress as jc
from jaxcompress.leaf import Leaf

DTYPES = (
    *("bool", "uint8", "uint16", "uint32", "int8", "int16", "int32", "int4"),
    *("float16", "bfloat16", "float32", "complex64", "float8_e4m3fn", "float8_e5m2"),
)


def array(dtype: str, *shape: int) -> np.ndarray:
    """Arbitrary bits as `dtype`: NaN with payloads, infinities and subnormals too."""
    kind, n = jnp.dtype(dtype), int(np.prod(shape))
    if dtype in ("bool", "int4"):
        return np.resize(np.arange(-8, 8), shape).astype(kind)
    bits = np.random.default_rng(0).integers(0, 256, n * kind.itemsize, np.uint8)
    return bits.view(kind).reshape(shape)


def weight(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)


def stored(*rules: Any, shape: tuple[int, ...] = (16, 6)) -> Leaf:
    scheme = jc.chain(*rules)
    return jax.jit(lambda w: scheme.compress(*scheme.init(w)))(weight(*shape))


def viewed(*rules: Any) -> Leaf:
    scheme = jc.chain(*rules)
    return jax.jit(lambda w: scheme.view(*scheme.init(w)))(weight(16, 6))


def nnx_state() -> nnx.State:
    layers = {i: {"kernel": nnx.Param(weight(16, 6))} for i in range(2)}
    state = nnx.State({"layers": layers})
    return jc.compress(state, {"layers/0/kernel": jc.quant.int4()})


half = jc.prune.magnitude(sparsity=0.5)
static8 = jc.quant.int8(activations=jc.quant.static(jc.quant.Integer(bits=8)))

LEAVES: dict[str, Callable[[], Leaf]] = {
    "int4 in groups": lambda: stored(jc.quant.int4(group_size=8)),
    "int3 padded": lambda: stored(jc.quant.int3(), shape=(13, 6)),
    "int4 asymmetric": lambda: stored(jc.quant.int4(symmetric=False)),
    "nf4": lambda: stored(jc.quant.nf4(group_size=16)),
    "nvfp4": lambda: stored(jc.quant.nvfp4()),
    "static activations": lambda: stored(
        jc.quant.weights(static8, activation_scale=0.02)
    ),
    "bitmask": lambda: stored(half),
    "bitmask of int4": lambda: stored(half, jc.quant.int4(group_size=8)),
    "masked": lambda: viewed(half),
    "masked view of int4": lambda: viewed(half, jc.quant.int4()),
    "view with a gate": lambda: viewed(jc.quant.int4(clip_gradient=True)),
}


@functools.cache
def leaf(name: str) -> Leaf:
    return LEAVES[name]()


def leaves() -> dict[str, Leaf]:
    return {name: leaf(name) for name in sorted(LEAVES)}


TREES: dict[str, Callable[[], Any]] = {
    **{name: (lambda name=name: {"w": leaf(name)}) for name in LEAVES},
    **{
        dtype: (lambda dtype=dtype: {"w": jnp.asarray(array(dtype, 5, 3))})
        for dtype in DTYPES
    },
    "nested": lambda: {
        "b": [weight(2), (weight(3), ()), []],
        "a": {"": weight(1), "ü / \n": weight(1, 2), "none": {}},
        "numbered": {10: weight(4), 9: weight(4)},
    },
    "frozen dict": lambda: FrozenDict({"a": {"b": weight(2)}, "c": [weight(1)]}),
    "nnx state": nnx_state,
    "numbers": lambda: (
        *(0, -3, 2**80, True, False, None, "", "naïve \ud800", 0.1, 5e-324, -0.0),
        *(float("inf"), float("-inf"), float("nan")),
    ),
    "an array alone": lambda: weight(3),
    "nothing": lambda: None,
    "empty arrays": lambda: {
        "f": jnp.zeros((0, 3)),
        "b": jnp.zeros((2, 0), jnp.bfloat16),
    },
    "scalars": lambda: {
        "f": jnp.float32(2.5),
        "b": jnp.bfloat16(-3),
        "i": np.int32(7),
    },
    "typed keys": lambda: {
        "one": jax.random.key(3),
        "many": jax.random.split(jax.random.key(5, impl="rbg"), 2),
    },
}

trees = pytest.mark.parametrize("make", TREES.values(), ids=TREES)


def bits(x: Any) -> tuple[Any, ...]:
    """All that makes a leaf what it is: two with the same are the same."""
    if not hasattr(x, "dtype"):
        return type(x), repr(x)
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    data = jax.random.key_data(x) if is_key else x
    return str(x.dtype), x.shape, np.asarray(data).tobytes()


def assert_same(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    assert list(map(bits, jax.tree.leaves(actual))) == list(
        map(bits, jax.tree.leaves(expected))
    )


# -- round trips


@trees
def test_a_file_gives_back_the_same_bits(make: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.jc"
    jc.io.save(path, make())
    assert path.is_file()
    assert_same(jc.io.load(path), make())


@trees
def test_a_directory_of_shards_gives_back_the_same_bits(
    make: Any, tmp_path: Path
) -> None:
    tree = {"tree": make(), "end": weight(64)}
    jc.io.save(tmp_path / "m.jc", tree, max_shard_bytes=64)
    assert (tmp_path / "m.jc").is_dir()
    assert_same(jc.io.load(tmp_path / "m.jc"), tree)


def test_loaded_leaves_have_the_same_dense_values(tmp_path: Path) -> None:
    jc.io.save(tmp_path / "m.jc", leaves())
    loaded = jc.io.load(tmp_path / "m.jc")
    assert [x.method for x in loaded.values()] == [x.method for x in leaves().values()]
    dense = jax.jit(jc.materialize)
    assert_same(dense(loaded), dense(leaves()))


@pytest.mark.parametrize("dtype", ["float64", "int64", "complex128", "bfloat16"])
def test_numpy_arrays_keep_their_bits_in_host_memory(
    dtype: str, tmp_path: Path
) -> None:
    tree = {"w": array(dtype, 4, 3).T}
    jc.io.save(tmp_path / "m.jc", tree)
    loaded = jc.io.load(tmp_path / "m.jc", as_numpy=True)
    assert isinstance(loaded["w"], np.ndarray)
    assert_same(loaded, tree)


@pytest.mark.parametrize("value", [np.float64(1 / 3), np.int64(2**40 + 3)], ids=str)
def test_wide_numbers_are_not_narrowed_in_silence(value: Any, tmp_path: Path) -> None:
    jc.io.save(tmp_path / "m.jc", {"w": value})
    with pytest.raises(ValueError, match=r"'w'.*as_numpy"):
        jc.io.load(tmp_path / "m.jc")


@pytest.mark.parametrize("dtype", [">f4", ">c8"])
def test_arrays_of_the_other_byte_order_keep_their_values(
    dtype: str, tmp_path: Path
) -> None:
    jc.io.save(tmp_path / "m.jc", np.array([1.0, -2.5], dtype))
    assert jc.io.load(tmp_path / "m.jc").tolist() == [1.0, -2.5]


@pytest.mark.parametrize(
    "tree",
    [{"a/b": 1, "a": {"b": 2}}, {"a": [1], "a/0": 2}, {"": {"a": 1}, "a": 2}],
    ids=str,
)
def test_keys_that_join_to_one_path_keep_their_own_arrays(
    tree: Any, tmp_path: Path
) -> None:
    tree = jax.tree.map(np.int32, tree)
    jc.io.save(tmp_path / "m.jc", tree)
    assert_same(jc.io.load(tmp_path / "m.jc"), tree)


def test_no_key_is_reserved(tmp_path: Path) -> None:
    tree = {"__metadata__": weight(2)}
    jc.io.save(tmp_path / "m.jc", tree)
    assert_same(jc.io.load(tmp_path / "m.jc"), tree)


def test_dicts_keep_the_order_of_their_keys(tmp_path: Path) -> None:
    jc.io.save(tmp_path / "m.jc", {"b": 1, "c": 2, "a": 3})
    assert list(jc.io.load(tmp_path / "m.jc")) == ["b", "c", "a"]


def test_variables_of_an_nnx_state_come_back_as_params(tmp_path: Path) -> None:
    jc.io.save(tmp_path / "m.jc", nnx.State({"mean": nnx.BatchStat(weight(2))}))
    loaded = jc.io.load(tmp_path / "m.jc")
    assert type(loaded["mean"]) is nnx.Param
    assert bits(loaded["mean"][...]) == bits(weight(2))


def test_saving_what_was_loaded_gives_the_same_file(tmp_path: Path) -> None:
    jc.io.save(tmp_path / "a.jc", leaves())
    jc.io.save(tmp_path / "b.jc", jc.io.load(tmp_path / "a.jc"))
    assert (tmp_path / "a.jc").read_bytes() == (tmp_path / "b.jc").read_bytes()


# -- what a file is


def parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and body of a safetensors file, read by its published layout."""
    n = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + n]), data[8 + n :]


def test_a_file_is_json_and_the_bytes_of_its_arrays_and_nothing_else(
    tmp_path: Path,
) -> None:
    pruned = leaf("bitmask of int4")
    jc.io.save(tmp_path / "m.jc", {"w": pruned, "b": weight(5)})
    header, body = parts((tmp_path / "m.jc").read_bytes())
    _, _, manifest = header.pop("__metadata__")["jaxcompress"].partition(" ")
    assert json.loads(manifest)["tree"]["dict"][0][1]["leaf"] == "BitmaskArray"
    spans = sorted(entry["data_offsets"] for entry in header.values())
    assert spans[0][0] == 0
    assert spans[-1][1] == len(body)
    assert [end for _, end in spans[:-1]] == [begin for begin, _ in spans[1:]]
    begin, end = header["b"]["data_offsets"]
    assert body[begin:end] == np.asarray(weight(5)).tobytes()
    assert len(body) == pruned.stored_bytes + weight(5).nbytes


def test_any_reader_of_safetensors_finds_the_arrays(tmp_path: Path) -> None:
    packed = leaf("int4 asymmetric")
    tree = {"w": packed, "half": jnp.asarray(array("bfloat16", 4))}
    jc.io.save(tmp_path / "m.jc", tree)
    found = safetensors.numpy.load_file(tmp_path / "m.jc")
    assert set(found) == {"w/words", "w/scale", "w/zero_point", "half"}
    for name in ("words", "scale", "zero_point"):
        assert bits(found[f"w/{name}"]) == bits(getattr(packed, name))
    assert found["half"].tobytes() == array("bfloat16", 4).tobytes()


def test_shards_are_safetensors_no_larger_than_asked(tmp_path: Path) -> None:
    tree = {f"{i:02}": weight(4) + i for i in range(11)}
    jc.io.save(tmp_path / "m.jc", tree, max_shard_bytes=32)
    shards = sorted((tmp_path / "m.jc").glob("*.safetensors"))
    found = [safetensors.numpy.load_file(shard) for shard in shards]
    assert [len(arrays) for arrays in found] == [2, 2, 2, 2, 2, 1]
    assert_same({k: a for arrays in found for k, a in arrays.items()}, tree)
    others = {p.name for p in (tmp_path / "m.jc").iterdir()} - {s.name for s in shards}
    assert others == {"manifest.json"}


def test_one_array_above_the_limit_has_a_shard_of_its_own(tmp_path: Path) -> None:
    tree = {"a": weight(2), "b": weight(64), "c": weight(2)}
    jc.io.save(tmp_path / "m.jc", tree, max_shard_bytes=16)
    assert len(list((tmp_path / "m.jc").glob("*.safetensors"))) == 3
    assert_same(jc.io.load(tmp_path / "m.jc"), tree)


def test_a_tree_of_just_the_limit_is_one_file(tmp_path: Path) -> None:
    jc.io.save(tmp_path / "m.jc", [weight(4), weight(4)], max_shard_bytes=32)
    assert (tmp_path / "m.jc").is_file()


@pytest.mark.parametrize("limit", [8, 2**20], ids=["directory", "file"])
def test_the_manifest_gives_back_recipe_and_metadata(
    limit: int, tmp_path: Path
) -> None:
    recipe = ("W4", 0.5, None, jc.quant.int4(group_size=8, axes=(-3, -2)))
    jc.io.save(
        tmp_path / "m.jc",
        {"w": weight(4)},
        recipe=recipe,
        metadata={"licence": "Apache", "Übung": "ja"},
        max_shard_bytes=limit,
    )
    manifest = jc.io.read_manifest(tmp_path / "m.jc")
    assert manifest["recipe"] == recipe
    assert manifest["metadata"] == {"licence": "Apache", "Übung": "ja"}
    assert manifest["version"] == 1
    assert manifest["arrays"]["w"]["shape"] == [4]


@pytest.mark.parametrize("recipe", ["W4A16", 7, 0.25, None])
def test_a_plain_recipe_reads_as_it_was_given(recipe: Any, tmp_path: Path) -> None:
    jc.io.save(tmp_path / "m.jc", {}, recipe=recipe)
    assert jc.io.read_manifest(tmp_path / "m.jc")["recipe"] == recipe


def test_verify_counts_arrays_and_bytes(tmp_path: Path) -> None:
    pruned = leaf("bitmask of int4")
    tree = {"w": pruned, "b": weight(3)}
    for name, limit in (("file", 2**20), ("directory", 8)):
        jc.io.save(tmp_path / name, tree, max_shard_bytes=limit)
        found = jc.io.verify(tmp_path / name)
        assert (found.version, found.arrays) == (1, len(jax.tree.leaves(tree)))
        assert found.bytes == pruned.stored_bytes + 12


# -- the size foretold


def test_file_bytes_is_the_size_of_the_file(tmp_path: Path) -> None:
    sizes = {}
    for i, (name, make) in enumerate(TREES.items()):
        jc.io.save(tmp_path / str(i), make())
        sizes[name] = (tmp_path / str(i)).stat().st_size
    assert {name: jc.io.file_bytes(make()) for name, make in TREES.items()} == sizes


names = st.text(max_size=12).filter(lambda s: s.isprintable() and "/" not in s)
arrays = st.builds(
    lambda n, dtype: np.zeros(n, jnp.dtype(dtype)),
    st.integers(0, 3000),
    st.sampled_from(["uint8", "bfloat16", "float32", "int64"]),
)


@hypothesis.example(tree={"a": np.zeros(1000, np.uint8), "b": np.zeros(1, np.float32)})
@hypothesis.given(tree=st.dictionaries(names, arrays, max_size=6))
def test_file_bytes_of_arrays_of_any_name_dtype_and_size(
    tree: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("files") / "m.jc"
    jc.io.save(path, tree)
    assert jc.io.file_bytes(tree) == path.stat().st_size


def test_file_bytes_of_one_array_counts_whole_words_of_header(tmp_path: Path) -> None:
    for n in (0, 1, 999, 1000):
        jc.io.save(tmp_path / "m.jc", np.zeros(n, np.int8), overwrite=True)
        size = (tmp_path / "m.jc").stat().st_size
        assert jc.io.file_bytes(np.zeros(n, np.int8)) == size
        assert (size - n) % 8 == 0


def test_file_bytes_of_abstract_arrays_is_that_of_the_arrays() -> None:
    abstract = jax.eval_shape(leaves)
    assert jc.io.file_bytes(abstract) == jc.io.file_bytes(leaves())


# -- what cannot be stored


class Pair(NamedTuple):
    left: Any
    right: Any


class Unregistered(jc.prune.MaskedArray):
    """A leaf whose class no file can name."""


def unregistered() -> Leaf:
    return Unregistered(inner=weight(2), mask=jnp.array([True, False]))


def with_setting(setting: Any) -> Leaf:
    return leaf("int4 in groups").replace(activations=setting)


REFUSED = {
    "named tuple": (lambda: Pair(1, 2), "'a/1' is a named tuple (Pair)"),
    "object": (object, "'a/1' is a object"),
    "set": (lambda: {1}, "'a/1' is a set"),
    "bytes": (lambda: b"x", "'a/1' is a bytes"),
    "function": (lambda: len, "'a/1' is a builtin_function_or_method"),
    "complex": (lambda: 1j, "'a/1' is a complex"),
    "key of a dict": (lambda: {1.5: 1}, "'a/1' has 1.5"),
    "unregistered leaf": (unregistered, "'a/1' is a leaf of the unregistered type"),
    "setting": (lambda: with_setting([4]), "'a/1' has a setting of the type list"),
    "inside a leaf": (
        lambda: jc.prune.MaskedArray(inner={1}, mask=None),
        "'a/1/inner' is a set",
    ),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_stored_is_named_and_nothing_is_written(
    make: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(TypeError) as caught:
        jc.io.save(tmp_path / "new" / "m.jc", {"a": [weight(2), make()]})
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []


UNREADABLE = {
    "text": lambda: np.array(["abc"]),
    "text scalar": lambda: np.str_("abc"),
    "objects": lambda: np.array([object()]),
    "dates": lambda: np.array(["2020-01-01"], "datetime64[D]"),
    "records": lambda: np.zeros(2, [("a", "f4"), ("b", "i4")]),
}


@pytest.mark.parametrize("make", UNREADABLE.values(), ids=UNREADABLE)
def test_arrays_without_a_number_format_are_refused(make: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="'a/1'"):
        jc.io.save(tmp_path / "m.jc", {"a": [0, make()]})
    assert list(tmp_path.iterdir()) == []


def test_other_mappings_are_refused_or_come_back_as_they_were(tmp_path: Path) -> None:
    tree = collections.OrderedDict(b=1, a=2)
    try:
        jc.io.save(tmp_path / "m.jc", tree)
    except TypeError:
        return
    assert_same(jc.io.load(tmp_path / "m.jc"), tree)


@pytest.mark.parametrize(
    "recipe", [{"a": 1}, [1], object()], ids=["dict", "list", "object"]
)
def test_a_recipe_that_cannot_be_stored_is_named(recipe: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="'recipe' has a setting of the type"):
        jc.io.save(tmp_path / "m.jc", {}, recipe=recipe)
    assert list(tmp_path.iterdir()) == []
