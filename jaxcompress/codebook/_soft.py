"""`soft_assignment`: vectors as mixtures of entries that sharpen into one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxcompress.codebook._array import CodebookArray
from jaxcompress.codebook._beam import in_chunks, nearest
from jaxcompress.codebook._codes import Codes, Laid, lay
from jaxcompress.codebook._fit import Search, fit_vectors
from jaxcompress.layout import Axes
from jaxcompress.leaf import CODEBOOK, WEIGHT, Leaf, component, leaf_type, static
from jaxcompress.quant._switched import SwitchedArray, switched_on
from jaxcompress.schedules import Schedule
from jaxcompress.transform import Transform
from jaxcompress.values import Site, leaf_key, replace_weights


@leaf_type
class SoftCodedArray(Leaf):
    """A weight in training and the codebook that it approaches, both trained.

    Attributes:
      latent: The weight.
      codebooks: ``float32[*stack, 1, 1, E, d]``.
      codes: The format.
      axes: Roles of the weight's axes.
    """

    latent: jax.Array = component(role=WEIGHT)
    codebooks: jax.Array = component(role=CODEBOOK)
    codes: Codes = static()
    axes: Axes = static()

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""
        return tuple(self.latent.shape)

    @property
    def dtype(self) -> np.dtype:
        """Logical dtype."""
        return self.latent.dtype

    @property
    def method(self) -> str:
        """``"codebook 8 bit d4, softly"``."""
        return f"codebook {self.codes.bits} bit d{self.codes.dims}, softly"

    def materialize(self) -> jax.Array:
        """The weight as it is trained."""
        return self.latent

    def component_specs(
        self, spec: Sequence[Any], sizes: dict[Any, int]
    ) -> SoftCodedArray:
        """The weight's own; codebooks with the stack."""
        del sizes
        stack = PartitionSpec(*spec[: self.axes.stack])
        return self.replace(latent=PartitionSpec(*spec), codebooks=stack)

    def laid(self) -> Laid:
        """The weight in sub-vectors."""
        return lay(self.latent, self.codes, axes=self.axes, path="w", who="codebook")

    def hard(self) -> CodebookArray:
        """The nearest entries, differentiable in the codebooks."""
        laid = self.laid()
        n, r, s, d = laid.vectors.shape
        books = self.codebooks.reshape(n, -1, d)
        x = jax.lax.stop_gradient(laid.vectors).reshape(n, r * s, d)
        real = None
        if not laid.real.all():
            ones = jnp.broadcast_to(jnp.asarray(laid.real, jnp.float32), (r, s, d))
            real = ones.reshape(r * s, d)
        found = jax.lax.map(
            lambda p: nearest(p[0], p[1], real).codes, (x, jax.lax.stop_gradient(books))
        )
        found = jnp.swapaxes(found.reshape(n, r, s, 1), -1, -2)
        return laid.leaf(found, books.reshape(n, 1, 1, -1, d), None)

    def soft(self, sharpness: Any) -> jax.Array:
        """Each sub-vector a mixture of all entries, the nearest counting most."""
        laid = self.laid()
        n, r, s, d = laid.vectors.shape
        books = self.codebooks.reshape(n, -1, d)
        sharp = jnp.asarray(sharpness, jnp.float32)

        def one(entry: tuple[jax.Array, jax.Array]) -> jax.Array:
            x, table = entry
            square = jnp.mean(jnp.square(table))
            unit = sharp / jnp.where(square > 0, square, 1.0)

            def mixed(x: jax.Array) -> jax.Array:
                off = jnp.square(x[:, None] - table[None]).sum(-1)
                share = jax.nn.softmax(-unit * off, axis=-1)
                return jnp.matmul(share, table, precision="highest")

            return in_chunks(jax.checkpoint(mixed), x)

        w = jax.lax.map(one, (laid.vectors.reshape(n, r * s, d), books))
        outputs = (laid.shape[a] for a in laid.layout.out)
        w = w.reshape(*laid.stack, *outputs, s * d)[..., : laid.inputs]
        return laid.layout.from_storage(w).astype(self.dtype)


def soft_assignment(
    *,
    dims: int,
    key: jax.Array,
    sharpness: float | Schedule,
    end: int,
    bits: int = 8,
    axes: int | tuple[int, ...] | None = None,
    iterations: int = 100,
) -> Transform:
    r"""Train weights through mixtures of codebook entries that sharpen into one.

    .. math:: \tilde v = \sum_e \frac{\exp(-\sigma |v - c_e|^2 / u)}
        {\sum_f \exp(-\sigma |v - c_f|^2 / u)}\, c_e

    with u the mean square of the entries' coordinates.

    Args:
      dims: Consecutive inputs of a sub-vector v. Static, as all but the key.
      key: Decides the seeds of the first codebook, which `cluster` finds.
      sharpness: :math:`\sigma > 0`; or a schedule of it, such as
        ``schedules.linear(1.0, 100.0, begin=0, end=5_000)``.
      end: Updates after which the view is the nearest entry: weights then rest, and
        the codebook trains on.
      bits: Of a code, 1 to 8.
      axes: Along which sub-vectors lie, if not along the contracting axes.
      iterations: Of k-means at the start, at most.

    Returns:
      A transform whose ``init`` puts trained leaves in place of the weights; until
      `end` their view is not what is stored, and gradients reach weights and entries.
      From then on it is, bit for bit; `compress` always stores the nearest entries.

    Raises:
      ValueError: If an option is out of range; from ``init``: if axes are unknown.
      TypeError: From ``init``, if a weight is not real floating.

    Examples:
      >>> scheme = soft_assignment(
      ...     dims=1, bits=1, sharpness=1.0, end=1, key=jax.random.key(0)
      ... )
      >>> w = jnp.array([[0.0], [2.0], [0.0], [2.0], [0.9]])
      >>> params, state = scheme.init({"w": w})
      >>> scheme.view(params, state)["w"].materialize()[1, 0].round(2).item()
      1.6...
      >>> params, state = scheme.update(params, state)
      >>> scheme.view(params, state)["w"].materialize()[1, 0].item()
      2.0

    References:
      Agustsson et al., `Soft-to-Hard Vector Quantization
      <https://arxiv.org/abs/1704.00648>`_, 2017, section 3.2. Differs: distances are
      relative to u; the sharpness follows a schedule; no entropy term.
    """
    codes = Codes(dims=dims, bits=bits, axes=axes)
    search = Search(iterations=iterations)
    by = f"codebook.soft_assignment({codes.name})"
    codes.check(by)
    search.check(by)
    if end < 0:
        raise ValueError(f"{by}: end must not be negative; got {end}.")
    if not callable(sharpness) and not (sharpness > 0 and math.isfinite(sharpness)):
        raise ValueError(f"{by}: sharpness must be positive; got {sharpness}.")

    def started(w: jax.Array, site: Site) -> SoftCodedArray:
        laid = lay(w, codes, axes=site.axes, path=site.path, who=by)
        laid = laid._replace(vectors=jax.lax.stop_gradient(laid.vectors))
        _, books = fit_vectors(laid, None, None, leaf_key(key, site), search)
        books = books.reshape(*laid.stack, *books.shape[1:])
        return SoftCodedArray(latent=w, codebooks=books, codes=codes, axes=laid.axes)

    def init(params: Any) -> tuple[Any, jax.Array]:
        ready = lambda x, path: isinstance(x, SoftCodedArray)
        params = replace_weights(started, params, ready=ready, by=by)
        return params, jnp.zeros((), jnp.int32)

    def view(params: Any, state: jax.Array) -> Any:
        alpha = sharpness(state) if callable(sharpness) else sharpness

        def switched(leaf: SoftCodedArray) -> SwitchedArray:
            on = switched_on(state >= end, leaf.shape)
            return SwitchedArray(dense=leaf.soft(alpha), compressed=leaf.hard(), on=on)

        return _at_soft(switched, params)

    def update(params: Any, state: jax.Array, **extra: Any) -> tuple[Any, jax.Array]:
        del extra
        return params, state + 1

    def compress(params: Any, state: jax.Array) -> Any:
        del state
        return _at_soft(SoftCodedArray.hard, params)

    return Transform(init, view, update, compress)


def _at_soft(f: Any, params: Any) -> Any:
    """`f` of every `SoftCodedArray`."""
    is_soft = lambda x: isinstance(x, SoftCodedArray)
    return jax.tree.map(lambda x: f(x) if is_soft(x) else x, params, is_leaf=is_soft)
