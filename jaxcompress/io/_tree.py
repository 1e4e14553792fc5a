"""Parameter pytrees as plain arrays and JSON, and back.

The JSON form tags every node with its kind: ``{"dict": [[key, node], ...]}``,
``{"array": name}``, ``{"leaf": type, "components": ..., "static": ...}``. Arrays go
to a flat mapping from names to NumPy arrays.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core import FrozenDict

from jaxcompress.io._errors import FileError
from jaxcompress.leaf import LEAF_TYPES, STATIC_TYPES, Leaf

Arrays = dict[str, Any]


def encode(tree: Any, *, abstract: bool = False) -> tuple[Any, Arrays]:
    """A pytree as JSON and arrays.

    Args:
      tree: Any pytree that files can hold.
      abstract: Give shapes and dtypes in place of arrays.

    Raises:
      TypeError: If a node or setting is of a type that files cannot hold.
    """
    arrays: Arrays = {}
    structure = _encode(tree, "", arrays)
    return structure, arrays if abstract else {k: _host(a) for k, a in arrays.items()}


def _host(a: Any) -> np.ndarray:
    """In host memory, little-endian."""
    a = np.asarray(a)
    return a.astype(a.dtype.newbyteorder("<")) if a.dtype.byteorder == ">" else a


def _encode(node: Any, path: str, arrays: Arrays) -> Any:
    below = lambda key: f"{path}/{key}" if path else str(key)
    if isinstance(node, nnx.State):
        return {"nnx.State": _encode(nnx.to_pure_dict(node), path, arrays)}
    if isinstance(node, FrozenDict):
        return {"FrozenDict": _encode(dict(node), path, arrays)}
    if isinstance(node, Leaf):
        return _encode_leaf(node.portable(), path, arrays)
    if type(node) is dict:
        return {
            "dict": [
                [_key(k, path), _encode(v, below(k), arrays)] for k, v in node.items()
            ]
        }
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        raise TypeError(
            f"io.save: {path!r} is a named tuple ({type(node).__name__}), whose class "
            "a file cannot name; save node._asdict() instead."
        )
    if isinstance(node, list | tuple):
        kind = "list" if isinstance(node, list) else "tuple"
        return {kind: [_encode(v, below(i), arrays) for i, v in enumerate(node)]}
    if isinstance(node, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct):
        return _encode_array(node, path, arrays)
    if node is None or isinstance(node, bool | int | float | str):
        return {"value": _number(node)}
    raise TypeError(
        f"io.save: {path!r} is a {type(node).__name__}, which files cannot hold; save "
        "dicts, lists, tuples, arrays, numbers and compressed leaves."
    )


def _key(key: Any, path: str) -> str | int:
    if isinstance(key, str | int):
        return key
    raise TypeError(
        f"io.save: dict keys must be strings or integers; {path!r} has {key!r}."
    )


def _encode_array(a: Any, path: str, arrays: Arrays) -> Any:
    if isinstance(a, jax.Array) and jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        name = _enter(jax.random.key_data(a), path, arrays)
        return {"key": name, "impl": str(jax.random.key_impl(a))}
    if not _is_number(a.dtype):
        raise TypeError(
            f"io.save: {path!r} is an array of {a.dtype}, which files cannot hold; "
            "save numbers and booleans."
        )
    return {"array": _enter(a, path, arrays)}


def _is_number(dtype: Any) -> bool:
    if dtype.kind in "mM":
        return False
    return dtype == np.bool_ or jnp.issubdtype(dtype, jnp.number)


def _enter(a: Any, path: str, arrays: Arrays) -> str:
    """Give an array its name: the path, unless that is taken or reserved."""
    name, n = path, 1
    while name in arrays or name == "__metadata__":
        n += 1
        name = f"{path}#{n}"
    arrays[name] = a
    return name


def _encode_leaf(leaf: Leaf, path: str, arrays: Arrays) -> Any:
    name = type(leaf).__name__
    if LEAF_TYPES.get(name) is not type(leaf):
        raise TypeError(
            f"io.save: {path!r} is a leaf of the unregistered type {name}; declare its "
            "class with jaxcompress.leaf.leaf_type."
        )
    components, settings = {}, {}
    packed = leaf.packed_codes()
    for f in dataclasses.fields(leaf):
        value = getattr(leaf, f.name)
        if "static" in f.metadata:
            settings[f.name] = encode_static(value, path)
        else:
            where = f"{path}/{f.name}" if path else f.name
            components[f.name] = _encode(value, where, arrays)
            if "array" in components[f.name] and f.name in packed:
                components[f.name]["bits"] = packed[f.name]
    return {
        "leaf": name,
        "components": components,
        "static": settings,
        "method": leaf.method,
    }


def encode_static(value: Any, path: str) -> Any:
    """A leaf's setting as JSON."""
    if value is None or isinstance(value, bool | int | str | float):
        return _number(value)
    if isinstance(value, tuple):
        return {"tuple": [encode_static(v, path) for v in value]}
    if isinstance(value, np.dtype):
        return {"dtype": value.name}
    name = type(value).__name__
    if STATIC_TYPES.get(name) is type(value):
        fields = dataclasses.fields(value)
        return {
            "settings": name,
            "fields": {
                f.name: encode_static(getattr(value, f.name), path) for f in fields
            },
        }
    raise TypeError(
        f"io.save: {path!r} has a setting of the type {name}, which files cannot hold; "
        "declare it with jaxcompress.leaf.static_type."
    )


def _number(value: Any) -> Any:
    """Numbers as they are; those that JSON has no word for by name."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    return value


def decode(node: Any, array: Callable[[str], Any], *, file: str) -> Any:
    """The pytree that `encode` wrote.

    Args:
      node: Its JSON form.
      array: Gives the array of a name.
      file: Named in errors.

    Raises:
      FileError: If a node is malformed, or of a type that is not known here.
    """
    go = lambda n: decode(n, array, file=file)
    match node:
        case {"nnx.State": inner}:
            return _nnx_state(go(inner))
        case {"FrozenDict": inner}:
            return FrozenDict(go(inner))
        case {"dict": items}:
            return {k: go(v) for k, v in items}
        case {"list": items}:
            return [go(v) for v in items]
        case {"tuple": items}:
            return tuple(go(v) for v in items)
        case {"array": name}:
            return array(name)
        case {"key": name, "impl": impl}:
            return jax.random.wrap_key_data(jnp.asarray(array(name)), impl=impl)
        case {"value": value}:
            return decode_static(value, file=file)
        case {"leaf": name, "components": components, "static": settings}:
            if name not in LEAF_TYPES:
                raise FileError(
                    f"{file}: it holds a leaf of the type {name!r}, which this version "
                    "of jaxcompress does not know; update jaxcompress, or import the "
                    "module that defines it."
                )
            return LEAF_TYPES[name](
                **{k: go(v) for k, v in components.items()},
                **{k: decode_static(v, file=file) for k, v in settings.items()},
            )
    raise FileError(
        f"{file}: the manifest's tree has a node of no known kind: {node!r}."
    )


def _nnx_state(pure: Any) -> nnx.State:
    """A state of `nnx.Param`, from nested dicts of arrays and leaves."""
    return nnx.State(
        jax.tree.map(nnx.Param, pure, is_leaf=lambda x: isinstance(x, Leaf))
    )


def decode_static(value: Any, *, file: str) -> Any:
    """A setting that `encode_static` wrote."""
    match value:
        case {"tuple": items}:
            return tuple(decode_static(v, file=file) for v in items)
        case {"dtype": name}:
            return jnp.dtype(name)
        case {"float": text}:
            return float(text)
        case {"settings": name, "fields": fields}:
            if name not in STATIC_TYPES:
                raise FileError(
                    f"{file}: it holds settings of the type {name!r}, which this "
                    "version of jaxcompress does not know; update jaxcompress."
                )
            inner = {k: decode_static(v, file=file) for k, v in fields.items()}
            return STATIC_TYPES[name](**inner)
    return value
