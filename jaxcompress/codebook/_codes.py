"""`Codes`: how a weight is cut in sub-vectors, and what codes name them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.codebook._array import CodebookArray
from jaxcompress.layout import Axes, Layout, resolve_axes
from jaxcompress.leaf import static_type
from jaxcompress.values import check_weight

_DTYPES = ("float32", "bfloat16", "float16")


@static_type
class Codes:
    r"""A codebook format: `books` codes of `bits` bits for every `dims` weights.

    .. math:: w_{o, ds+j} = s_o \sum_{a=1}^{A} C^{(b(s), a)}_{c_{oas}, j}

    A weight of K inputs and R outputs takes ``books * bits / dims`` bits, and beside
    them ``blocks * books * 2**bits * dims / (K * R)`` and ``1 / K`` numbers of `dtype`.

    Attributes:
      dims: d, consecutive inputs of a sub-vector; the last may lack some.
      bits: Of a code, 1 to 8.
      books: A, codes that are added.
      blocks: B, runs of sub-vectors with codebooks of their own; None: every one.
      scale: Whether each output has a scale.
      dtype: Of codebooks and scales: float32, bfloat16 or float16.
      axes: The axes along which sub-vectors lie, where the rule states them: -1 of a
        table of embeddings.
    """

    dims: int = 8
    bits: int = 8
    books: int = 1
    blocks: int | None = 1
    scale: bool = False
    dtype: str = "float32"
    axes: int | tuple[int, ...] | None = None

    @property
    def entries(self) -> int:
        """Of a codebook."""
        return 2**self.bits

    @property
    def name(self) -> str:
        """``"2x8 bit d8"``."""
        return f"{self.books}x{self.bits} bit d{self.dims}"

    def check(self, who: str) -> None:
        """Refuse numbers that are out of range.

        Raises:
          ValueError: If one is.
        """
        if not 1 <= self.bits <= 8:
            raise ValueError(
                f"{who}: bits must be from 1 to 8; got {self.bits}. For more, add up "
                "several codes (residual, additive)."
            )
        for name in ("dims", "books", "blocks"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{who}: {name} must be positive; got {value}.")
        if self.dtype not in _DTYPES:
            raise ValueError(f"{who}: dtype must be of {_DTYPES}; got {self.dtype!r}.")

    def rounded(self, a: jax.Array) -> jax.Array:
        """As it will be stored, in float32."""
        return a.astype(self.dtype).astype(jnp.float32)


class Laid(NamedTuple):
    """A weight cut in sub-vectors.

    Attributes:
      vectors: ``float32[N, R, S, d]``: stack entries, outputs, sub-vectors.
      real: ``bool[S, d]``, false where the last sub-vector lacks inputs.
      codes: The format.
      axes: Roles of the weight's axes.
      shape: Logical shape.
      dtype: Logical dtype.
    """

    vectors: jax.Array
    real: np.ndarray
    codes: Codes
    axes: Axes
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def layout(self) -> Layout:
        """How the axes lie in storage."""
        return Layout.of(self.shape, self.axes)

    @property
    def stack(self) -> tuple[int, ...]:
        """Sizes of the stack axes."""
        return self.shape[: self.axes.stack]

    @property
    def inputs(self) -> int:
        """K."""
        return math.prod(self.shape[a] for a in self.axes.contract)

    @property
    def blocks(self) -> int:
        """B."""
        return self.codes.blocks or self.vectors.shape[2]

    def cut(self, a: jax.Array) -> jax.Array:
        """An array of the weight's shape as `vectors`."""
        a = self.layout.to_storage(a.astype(jnp.float32))
        extra = self.real.size - a.shape[-1]
        a = jnp.pad(a, ((0, 0),) * (a.ndim - 1) + ((0, extra),))
        return a.reshape(math.prod(self.stack), -1, *self.real.shape)

    def leaf(
        self, codes: jax.Array, books: jax.Array, scale: jax.Array | None
    ) -> CodebookArray:
        """The stored form.

        Args:
          codes: ``int32[N, R, A, S]``.
          books: ``float32[N, B, A, E, d]``.
          scale: ``float32[N, R]``, or None.
        """
        outputs = tuple(self.shape[a] for a in self.layout.out)
        lead = (*self.stack, *outputs)
        words = codes.astype(jnp.uint8).reshape(*lead, *codes.shape[-2:])
        if scale is not None:
            scale = scale.reshape(lead).astype(self.codes.dtype)
        return CodebookArray(
            words=words,
            codebooks=books.reshape(*self.stack, *books.shape[1:]).astype(
                self.codes.dtype
            ),
            scale=scale,
            layout=self.layout,
            code_bits=self.codes.bits,
            packed=False,
            short=self.real.size - self.inputs,
            dtype_name=self.dtype.name,
        ).pack()


def lay(w: jax.Array, codes: Codes, *, axes: Any, path: str, who: str) -> Laid:
    """Check a weight and cut it in sub-vectors.

    Raises:
      ValueError: If the weight, its axes or the format cannot be used.
      TypeError: If it is not real floating.
    """
    codes.check(who)
    check_weight(w, path, who)
    stated = codes.axes if codes.axes is not None else axes
    roles = resolve_axes(w.shape, stated, who=who, path=path)
    inputs = math.prod(w.shape[a] for a in roles.contract)
    count = -(-inputs // codes.dims)
    blocks = codes.blocks or count
    if count % blocks:
        able = [n for n in range(1, count + 1) if count % n == 0]
        raise ValueError(
            f"{who}: blocks must divide the {count} sub-vectors of {path!r}; got "
            f"{blocks}. It can be one of {able}, or None for all."
        )
    real = (np.arange(count * codes.dims) < inputs).reshape(count, codes.dims)
    laid = Laid(w, real, codes, roles, tuple(w.shape), np.dtype(w.dtype))
    return laid._replace(vectors=laid.cut(jnp.asarray(w)))


def output_scale(vectors: jax.Array, real: np.ndarray, codes: Codes) -> jax.Array:
    """Root mean square of each output ``float32[N, R]``, as stored; 1 of zeros."""
    mean = jnp.square(vectors).sum((-1, -2)) / jnp.float32(real.sum())
    scale = codes.rounded(jnp.sqrt(mean))
    return jnp.where(scale > 0, scale, 1.0)
