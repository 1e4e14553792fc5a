"""`lattice`: sub-vectors of eight weights at points of the lattice E8."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.codebook import _e8
from jaxcompress.codebook._codes import Codes, Laid, lay
from jaxcompress.codebook._hessian import feeding_forward
from jaxcompress.codebook._lattice_array import LatticeArray
from jaxcompress.leaf import static_type
from jaxcompress.lift import Statistics
from jaxcompress.lift._second_moment import check_feedback, factorize, matmul, mean_gram
from jaxcompress.transform import Transform, identity
from jaxcompress.values import Site, replace_weights

_STEP = 1.03
"""Root mean square of normal weights, in units of the lattice, of least error."""
_FITS = 3


@static_type
class E8P:
    """The codebook E8P as a format, for `quant.rotated_weight` and its like."""

    name: str = "E8P"
    axes: int | tuple[int, ...] | None = None
    activations: None = None


def lattice(*, axes: int | tuple[int, ...] | None = None) -> Transform:
    r"""Round sub-vectors of 8 weights to points of E8, at 2 bits a weight.

    .. math:: \hat w_{o, 8s \dots} = s_o p, \quad
        p \in (D_8 + \tfrac12) \pm \tfrac14

    The 65,536 points are 256 vectors of magnitudes, of nearly the least lengths, with
    every choice of signs that makes the sum even, shifted by a quarter to either side:
    denser than any grid of single weights. The table is computed, not stored.

    Args:
      axes: Along which sub-vectors lie, if not along the contracting axes. Static.

    Returns:
      A transform whose ``init`` puts a `LatticeArray` in place of each weight: codes
      stay, the scale of each output (role ``"step"``) is trained. What is trained is
      what is stored. Outputs of zeros come back as exact zeros.

    Raises:
      ValueError: From ``init``, if the axes are unknown.
      TypeError: From ``init``, if a weight is not real floating.

    Examples:
      >>> scheme = lattice()
      >>> params, state = scheme.init({"w": jnp.ones((16, 4))})
      >>> params["w"], params["w"].words.shape
      (LatticeArray(lattice E8P, float32[16, 4]), (4, 2))

    References:
      Tseng et al., `QuIP# <https://arxiv.org/abs/2402.04396>`_, 2024, section 4.
      Differs: which 29 of the vectors of squared length 12 fill the table.
    """
    by = "codebook.lattice"

    def coded(w: jax.Array, site: Site) -> LatticeArray:
        fmt = E8P(axes=axes)
        return lattice_weight(w, fmt, None, axes=site.axes, path=site.path)

    def init(params: Any) -> tuple[Any, tuple[()]]:
        ready = lambda x, path: isinstance(x, LatticeArray)
        return replace_weights(coded, params, ready=ready, by=by), ()

    return identity()._replace(init=init)


def lattice_weight(
    w: jax.Array,
    fmt: E8P,
    stats: Statistics | None,
    *,
    axes: Any = None,
    path: str = "w",
    damping: float = 0.01,
) -> LatticeArray:
    """Round one weight to points of E8; with statistics, with error feedback.

    As the ``base`` of `quant.rotated_weight` it rounds a rotated weight, whose entries
    are nearly normal, as the lattice wants them.

    Args:
      w: ``float[*stack, *core]`` weight.
      fmt: The format. Static.
      stats: Of the rows that entered its matmul, with their gram: each sub-vector then
        makes up for the errors of those before it. Or None.
      axes: Roles of its axes, or its contracting axes. Static.
      path: Named in errors. Static.
      damping: As for `aqlm_weight`. Static.

    Returns:
      A leaf of `w`'s shape and dtype.

    Raises:
      ValueError: If the axes are unknown, or the statistics are not of this weight or
        without gram.
      TypeError: If `w` is not real floating.

    Examples:
      >>> from jaxcompress.quant import rotated_weight
      >>> w = jnp.zeros((64, 2)).at[3, 0].set(64.0)
      >>> key = jax.random.key(0)
      >>> rotated_weight(w, E8P(), None, key=key, base=lattice_weight)
      RotatedArray(lattice E8P rotated, float32[64, 2])

    References:
      Tseng et al., `QuIP# <https://arxiv.org/abs/2402.04396>`_, 2024, sections 3
      (rotations) and 4.1 (feedback by blocks). Differs: a scale for each output.
    """
    who = "codebook.lattice"
    check_feedback(who, damping, 1, 0)
    codes = Codes(dims=_e8.DIMS, axes=fmt.axes)
    laid = lay(w, codes, axes=axes, path=path, who=who)
    if stats is None:
        words, scale = _rounded(laid.vectors)
        return _leaf(laid, words, scale)
    gram = mean_gram(stats, laid.stack, laid.inputs, who=who, path=path)
    extra = laid.real.size - laid.inputs
    gram = jnp.pad(gram, ((0, 0), (0, extra), (0, extra)))
    words, scale = _with_feedback(laid.vectors, gram, damping)
    return _leaf(laid, words, scale)


def _leaf(laid: Laid, words: jax.Array, scale: jax.Array) -> LatticeArray:
    outputs = (laid.shape[a] for a in laid.layout.out)
    lead = (*laid.stack, *outputs)
    return LatticeArray(
        words=words.reshape(*lead, words.shape[-1]),
        scale=scale.reshape(lead),
        layout=laid.layout,
        short=laid.real.size - laid.inputs,
        dtype_name=laid.dtype.name,
    )


@jax.jit
def _rounded(vectors: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Codes ``[N, R, S]`` and scales ``[N, R]``: each the best given the other."""

    def fit(_: int, scale: jax.Array) -> jax.Array:
        return _best_scale(vectors, _nearest(vectors, scale), scale)

    scale = jax.lax.fori_loop(0, _FITS, fit, _first_scale(vectors))
    return _nearest(vectors, scale), scale


def _first_scale(vectors: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(vectors), axis=(-1, -2))) / _STEP


def _nearest(vectors: jax.Array, scale: jax.Array) -> jax.Array:
    """Codes ``uint16[..., S]`` of ``[..., S, 8]``, outputs of scale 0 as scale 1."""
    scaled = vectors / jnp.where(scale > 0, scale, 1.0)[..., None, None]
    return _e8.encode(scaled.reshape(-1, _e8.DIMS)).reshape(vectors.shape[:-1])


def _best_scale(vectors: jax.Array, words: jax.Array, scale: jax.Array) -> jax.Array:
    points = _e8.decode(words)
    along = jnp.sum(points * vectors, axis=(-1, -2))
    found = along / jnp.sum(jnp.square(points), axis=(-1, -2))
    return jnp.where(found > 0, found, scale)


@functools.partial(jax.jit, static_argnames="damping")
def _with_feedback(
    vectors: jax.Array, gram: jax.Array, damping: float
) -> tuple[jax.Array, jax.Array]:
    """Codes and scales, each sub-vector after the errors before it moved it."""

    def one(entry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        w, gram = entry
        metric = feeding_forward(factorize(gram, damping), _e8.DIMS)
        scale = _rounded(w[None])[1][0]

        def step(i: jax.Array, carry: tuple[jax.Array, jax.Array]):
            error, words = carry
            moved = jax.scipy.linalg.solve_triangular(
                metric.root[i], matmul(metric.others[i], error.T), lower=True
            ).T
            found = _nearest((w[:, i] + moved)[:, None], scale)
            value = _e8.decode(found[:, 0]) * scale[:, None]
            put = jax.lax.dynamic_update_slice_in_dim
            error = put(error, w[:, i] - value, i * _e8.DIMS, axis=1)
            return error, words.at[:, i].set(found[:, 0])

        r, s, d = w.shape
        start = jnp.zeros((r, s * d), jnp.float32), jnp.zeros((r, s), jnp.uint16)
        return jax.lax.fori_loop(0, s, step, start)[1], scale

    return jax.lax.map(one, (vectors, gram))
