"""The contract of a compressed leaf: what stands in a parameter pytree for an array.

A leaf is a frozen dataclass of arrays (its *components*) and static settings,
registered as a pytree. Everything above this file - transforms, `lift`, `io`,
`report` - knows only the class `Leaf`; a family adds a method by writing a leaf.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, Self, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np

_C = TypeVar("_C", bound=type)

WEIGHT, STEP, GATE, CODEBOOK, FROZEN = "weight", "step", "gate", "codebook", "frozen"
ROLES = (WEIGHT, STEP, GATE, CODEBOOK, FROZEN)

LEAF_TYPES: dict[str, type[Leaf]] = {}
"""Every leaf class by name; `io` writes the name and looks it up again."""

STATIC_TYPES: dict[str, type] = {}
"""Every dataclass that may stand in a leaf's static settings, by name, for `io`."""


def component(*, role: str, default: Any = dataclasses.MISSING) -> Any:
    """Declare an array field, or a field that may itself be a leaf.

    Args:
      role: What training may do with it: ``"weight"`` (trained and decayed),
        ``"step"``, ``"gate"``, ``"codebook"`` (trained, not decayed) or
        ``"frozen"`` (never trained).
      default: Value when the field is not given; only ``None`` makes sense.
    """
    assert role in ROLES, role
    return dataclasses.field(default=default, metadata={"role": role})


def static(*, default: Any = dataclasses.MISSING) -> Any:
    """Declare a hashable setting, compared when JAX compares tree structures."""
    return dataclasses.field(default=default, metadata={"static": True})


@dataclass_transform(
    kw_only_default=True,
    frozen_default=True,
    eq_default=False,
    field_specifiers=(component, static),
)
def leaf_type(cls: _C) -> _C:
    """Freeze a `Leaf` class, register it as a pytree and enter it in `LEAF_TYPES`."""
    cls = dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)(cls)
    fields = dataclasses.fields(cls)
    jax.tree_util.register_dataclass(
        cls,
        data_fields=[f.name for f in fields if "role" in f.metadata],
        meta_fields=[f.name for f in fields if "static" in f.metadata],
    )
    LEAF_TYPES[cls.__name__] = cls
    return cls


@dataclass_transform(kw_only_default=True, frozen_default=True)
def static_type(cls: _C) -> _C:
    """Freeze a dataclass of settings and enter it in `STATIC_TYPES`, for `io`."""
    cls = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    STATIC_TYPES[cls.__name__] = cls
    return cls


class Ran(NamedTuple):
    """What a leaf's rule returns: the value, and how it ran (for `explain`)."""

    out: jax.Array
    how: str


@static_type
class Transpose:
    """Layout operation: reorder the logical axes, as `jnp.transpose`."""

    permutation: tuple[int, ...]


@static_type
class Reshape:
    """Layout operation: give the same elements another logical shape."""

    shape: tuple[int, ...]


@static_type
class Cast:
    """Layout operation: `materialize` in another floating dtype."""

    dtype: np.dtype


LayoutOp = Transpose | Reshape | Cast


class Place(NamedTuple):
    """A part of an array that is written, cut along its first axes alone.

    Attributes:
      axes: How many.
      write: ``(array, part) -> array``, for arrays that begin with those axes.
      read: What of an array goes with the part, where it has those axes or ones in
        their place; or ``NotImplemented``.
    """

    axes: int
    write: Callable[[jax.Array, jax.Array], jax.Array]
    read: Callable[[jax.Array], jax.Array]


class Traits(NamedTuple):
    """What a leaf's storage keeps and its rules can, for those that build on it.

    Attributes:
      preserves_zeros: A zero weight comes back as an exact zero.
      elementwise: Each weight has a stored element of its own, so that a mask survives.
      own_matmul: `Leaf.dot_general` does other than dequantize and multiply.
    """

    preserves_zeros: bool = False
    elementwise: bool = False
    own_matmul: bool = False


class Leaf(abc.ABC):
    """A compressed array: logical `shape` and `dtype`, and the buffers it is stored in.

    Shape and packing are derived from the components relative to their *last*
    axes, so that a leaf stacked on leading axes can be sliced by `jax.lax.scan`,
    mapped by `jax.vmap` and sharded, and is a leaf again.

    A method that cannot do what is asked returns ``NotImplemented``; the caller
    then materializes, and says so. No method validates in ``__post_init__``: JAX
    rebuilds nodes with placeholders.
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    # -- what every leaf defines

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Logical shape of the array the leaf stands for."""

    @property
    @abc.abstractmethod
    def dtype(self) -> np.dtype:
        """Logical dtype: that of `materialize()`."""

    @property
    @abc.abstractmethod
    def method(self) -> str:
        """What was done, in the field's terms: ``"int4 g128"``, for reports."""

    @abc.abstractmethod
    def materialize(self) -> jax.Array:
        """The dense array, of `shape` and `dtype`."""

    # -- what a leaf may define

    @property
    def traits(self) -> Traits:
        """What its storage keeps and its rules can."""
        return Traits()

    def portable(self) -> Leaf:
        """The form that files hold: itself, but for what one device alone reads."""
        return self

    def packed_codes(self) -> dict[str, int]:
        """Components that are codes packed along the last axis: the bits of each.

        Files may store them in fewer bytes (`io.save` with ``entropy=``).
        """
        return {}

    def values(self) -> tuple[Any, ...]:
        """The float arrays (or leaves) that a later transform in a chain may act on."""
        return ()

    def map_values(self, f: Callable[[jax.Array], jax.Array | Leaf]) -> Leaf:
        """The leaf with `f` applied to each of `values()`, keeping its structure.

        Raises:
          OrderError: If nothing may follow this leaf (its values are on a grid).
        """
        raise OrderError(
            f"{self.method} fixes the value of every weight, so a later transform "
            "would undo it; chain structure first (low rank, hashing), then masks, "
            "then clusters or grids."
        )

    def value_axes(self) -> tuple[Any, ...]:
        """Roles of the axes of each of `values()` (`Axes` or None); empty: not known.

        Of use where a value has another shape than the weight: a factor, a table.
        """
        return ()

    def relayout(self, op: LayoutOp) -> Leaf:
        """The leaf seen through a layout operation, or ``NotImplemented``."""
        del op
        return NotImplemented

    def stacked(self, ndim: int) -> Leaf:
        """The same leaf with the first `ndim` logical axes leading every component.

        Such a leaf can be sliced, indexed or scanned component by component.
        Returns ``NotImplemented`` where the storage does not allow it.
        """
        del ndim
        return NotImplemented

    def map_leading(self, f: Callable[[jax.Array], jax.Array], ndim: int) -> Leaf:
        """The leaf after `f`, which acts on the first `ndim` logical axes alone.

        A slice, a look-up of rows. Of every component of the stacked leaf, unless some
        need not follow: tables that all rows share. Returns ``NotImplemented`` where
        the storage does not allow it.
        """
        stacked = self.stacked(ndim)
        return stacked if stacked is NotImplemented else jax.tree.map(f, stacked)

    def written(self, values: jax.Array, place: Place) -> Leaf:
        """This leaf with dense values encoded in its format and written into a part.

        Args:
          values: ``float[*stack, *core]``: this leaf's core, any stack.
          place: Where they go.

        Returns:
          A leaf of the same form, or ``NotImplemented`` where values cannot be encoded
          apart.
        """
        del values, place
        return NotImplemented

    def dot_general(
        self,
        x: jax.Array,
        dimension_numbers: Any,
        *,
        leaf_is_lhs: bool,
        **params: Any,
    ) -> Ran:
        """`jax.lax.dot_general` of ``x`` and this leaf (in the order said)."""
        return dense_dot_general(
            self, x, dimension_numbers, leaf_is_lhs=leaf_is_lhs, **params
        )

    def ragged_dot_general(
        self, x: jax.Array, group_sizes: jax.Array, numbers: Any, **params: Any
    ) -> Ran:
        """`jax.lax.ragged_dot_general` of ``x`` and this leaf.

        Args:
          x: Rows sorted by the matrix of the leaf (the expert) that is theirs.
          group_sizes: How many rows each has.
          numbers: `jax.lax.RaggedDotDimensionNumbers`.
          **params: Others of the operation.
        """
        return dense_ragged_dot(self, x, group_sizes, numbers, **params)

    def conv_general_dilated(self, x: jax.Array, **params: Any) -> Ran:
        """`jax.lax.conv_general_dilated` of ``x`` and this leaf.

        Returns ``NotImplemented`` where that is no better than the dense convolution.
        """
        del x, params
        return NotImplemented

    def take(self, index: jax.Array) -> jax.Array:
        """Dense ``w[index]`` of the first axis, without the rest of the weight.

        Args:
          index: ``int32[...]``, in range.

        Returns ``NotImplemented`` where the storage does not allow it.
        """
        del index
        return NotImplemented

    def prepare_activations(
        self, x: jax.Array, axes: tuple[int, ...] = (-1,)
    ) -> jax.Array:
        """What the leaf makes of the other operand of a matmul or convolution.

        The identity, unless the leaf quantizes activations.

        Args:
          x: The operand.
          axes: Its contracted axes: those of one token.
        """
        del axes
        return x

    def component_specs(self, spec: Sequence[Any], sizes: dict[Any, int]) -> Self:
        """`PartitionSpec` of every component, from that of the logical array.

        Args:
          spec: One entry a logical axis (mesh axis name, tuple of names or None).
          sizes: Size of each mesh axis.

        Raises:
          ValueError: If a packed or grouped axis would be cut inside a word or group.
        """
        del spec, sizes
        raise ValueError(
            f"{type(self).__name__}: this leaf cannot be sharded; replicate it."
        )

    # -- what follows

    @property
    def ndim(self) -> int:
        """Number of logical axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of logical elements."""
        return math.prod(self.shape)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the real buffers: words, scales, masks, everything."""
        return sum(nbytes(a) for a in jax.tree.leaves(self))

    def components(self) -> dict[str, tuple[Any, str]]:
        """The array fields: name to (value, role); absent ones are left out."""
        return {
            f.name: (getattr(self, f.name), f.metadata["role"])
            for f in dataclasses.fields(self)
            if "role" in f.metadata and getattr(self, f.name) is not None
        }

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields replaced."""
        return dataclasses.replace(self, **changes)

    def __repr__(self) -> str:
        try:
            what = f"{self.method}, {self.dtype}{list(self.shape)}"
        except (AttributeError, TypeError):  # tree.map put other things in its place.
            what = ", ".join(f"{n}={a!r}" for n, (a, _) in self.components().items())
        return f"{type(self).__name__}({what})"

    def _no_arithmetic(self, *_: Any) -> Any:
        raise TypeError(
            f"{self!r} is a compressed leaf, not an array: pass it as an argument of a "
            "lifted function (jaxcompress.lift), or call jaxcompress.materialize on it."
        )

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _no_arithmetic
    __truediv__ = __rtruediv__ = __matmul__ = __rmatmul__ = _no_arithmetic
    __neg__ = __pow__ = __rpow__ = __getitem__ = __array__ = _no_arithmetic
    __iter__ = None


class OrderError(ValueError):
    """A chain whose later transform would undo an earlier one."""


def nbytes(a: Any) -> int:
    """Bytes of an array, concrete or abstract; of a typed key, those of its data."""
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        a = jax.eval_shape(jax.random.key_data, a)
    return math.prod(a.shape) * np.dtype(a.dtype).itemsize


def map_value(f: Callable[[jax.Array], jax.Array | Leaf], value: Any) -> Any:
    """`f` of an array, or of the values inside a leaf."""
    return value.map_values(f) if isinstance(value, Leaf) else f(value)


def is_leaf(x: Any) -> bool:
    """Whether `x` is a compressed leaf; the `is_leaf=` of tree functions."""
    return isinstance(x, Leaf)


def materialize(tree: Any) -> Any:
    """Replace every compressed leaf of a pytree by its dense array.

    Args:
      tree: Any pytree; its plain arrays pass through as the same objects.

    Returns:
      A pytree of plain arrays, of the leaves' logical shapes and dtypes.

    Examples:
      >>> materialize({"bias": 1.0})
      {'bias': 1.0}
    """
    return jax.tree.map(
        lambda x: x.materialize() if isinstance(x, Leaf) else x, tree, is_leaf=is_leaf
    )


def traits(value: Any) -> Traits:
    """Those of a leaf, or of an array."""
    if isinstance(value, Leaf):
        return value.traits
    return Traits(preserves_zeros=True, elementwise=True)


def relayout_array(a: jax.Array, op: LayoutOp) -> jax.Array:
    """Apply a layout operation to a dense array."""
    match op:
        case Transpose(permutation=permutation):
            return jnp.transpose(a, permutation)
        case Reshape(shape=shape):
            return jnp.reshape(a, shape)
        case Cast(dtype=dtype):
            return a.astype(dtype)


def relayout_mask(mask: jax.Array, op: LayoutOp) -> jax.Array:
    """Apply a layout operation to a mask, which has no dtype to cast."""
    return mask if isinstance(op, Cast) else relayout_array(mask, op)


def relayout(value: Any, op: LayoutOp) -> Any:
    """Apply a layout operation to an array or leaf; a leaf may say NotImplemented."""
    return value.relayout(op) if isinstance(value, Leaf) else relayout_array(value, op)


def dense_dot_general(
    leaf: Leaf,
    x: jax.Array,
    dimension_numbers: Any,
    *,
    leaf_is_lhs: bool,
    **params: Any,
) -> Ran:
    """Dequantize, then the dense `dot_general`: the rule every leaf falls back on."""
    w = dequantize(leaf)
    operands = (w, x) if leaf_is_lhs else (x, w)
    out = jax.lax.dot_general(*operands, dimension_numbers, **params)
    if out.dtype.itemsize < 4:
        # XLA may leave out the rounding of a result that is widened at once, and does
        # so in the training view and not in the stored leaf, or the other way round.
        info = jnp.finfo(out.dtype)
        out = jax.lax.reduce_precision(out, info.nexp, info.nmant)
    return Ran(out, "dequantized dot")


def result_dtype(x: jax.Array, leaf: Any, params: dict[str, Any]) -> Any:
    """The dtype that a matmul's parameters ask for, or that of both operands."""
    stated = params.get("preferred_element_type")
    return jnp.result_type(x, leaf.dtype) if stated is None else stated


def dense_ragged_dot(
    leaf: Leaf, x: jax.Array, group_sizes: jax.Array, numbers: Any, **params: Any
) -> Ran:
    """Prepare the activations as the leaf asks and dequantize, then the dense dot."""
    tokens = tuple(numbers.dot_dimension_numbers[0][0])
    x = leaf.prepare_activations(x, tokens)
    out = jax.lax.ragged_dot_general(
        x, dequantize(leaf), group_sizes, numbers, **params
    )
    return Ran(out, "dequantized")


@jax.jit
def dequantize(leaf: Leaf) -> jax.Array:
    """`leaf.materialize()`, for the operand of a matmul or convolution.

    XLA's CPU back end picks another summation order for a dot whose operand it
    fuses; a barrier makes the training view and the stored leaf run the same
    program from here on. Elsewhere the fusion is what makes low bits fast.
    (Jitted so that leaves alike are traced once.)
    """
    return jax.lax.platform_dependent(
        leaf.materialize(), cpu=jax.lax.optimization_barrier, default=lambda w: w
    )
