"""Divergences of the logits of two heads, which are made some classes at a time.

With softened logits ``s`` and ``t`` and a divergence ``sum_k f(log p_k, log q_k)``,
three loops over the chunks of the class axis find the normalizers; the sums of ``f``
and of its slope ``f'`` by ``log q``; and the gradient by ``s_k``, which is
``f'_k - q_k sum_j f'_j``.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from ._logits import counted
from ._shares import (
    Shares,
    excluded,
    forward_shares,
    jensen_shannon_shares,
    reverse_shares,
)

Divergence = Literal["forward", "reverse", "jensen_shannon"]


class Head(NamedTuple):
    """What makes logits.

    Attributes:
      hidden: ``[rows, d]``.
      kernel: ``[d, classes]``, or ``[d, shards, classes of each]``.
      bias: ``[classes]``, or ``[shards, classes of each]``, or none.
    """

    hidden: jax.Array
    kernel: jax.Array
    bias: jax.Array | None


class Cut(NamedTuple):
    """How the class axis is cut: `shards` parts, of each `chunk` classes at a time."""

    shards: int
    chunk: int
    divergence: Divergence


def as_rows(head: Head, where: jax.Array | None, shards: int) -> Head:
    """The counted hidden states as rows, and class axes as shards of classes."""
    hidden = counted(head.hidden, where)
    d = hidden.shape[-1]
    rows = head._replace(hidden=hidden.reshape(-1, d))
    if shards == 1:
        return rows
    bias = None if head.bias is None else head.bias.reshape(shards, -1)
    return rows._replace(kernel=head.kernel.reshape(d, shards, -1), bias=bias)


Settings = tuple[jax.Array, jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def chunked(cut: Cut, s: Head, t: Head, settings: Settings) -> jax.Array:
    """The loss a row, without the square of the temperature."""
    return _forward(cut, s, t, settings)[0]


def _forward(
    cut: Cut, s: Head, t: Head, settings: Settings
) -> tuple[jax.Array, tuple[Any, ...]]:
    """The loss a row, and what the gradient needs: normalizers and its own sum."""
    rows = s.hidden.shape[0]
    low = jnp.full((rows,), -jnp.inf, jnp.float32)
    zero = jnp.zeros((rows,), jnp.float32)

    def normalize(i: jax.Array, carry: Any) -> Any:
        z_s, z_t = _logits(cut, s, t, settings, i)
        return _accumulate(carry[0], z_s), _accumulate(carry[1], z_t)

    first = ((low, zero), (low, zero))
    sums = jax.lax.fori_loop(0, _steps(cut, s), normalize, first)
    norms = tuple(m + jnp.log(total) for m, total in sums)

    def add(i: jax.Array, carry: Any) -> Any:
        shares, slopes, _ = _terms(cut, s, t, settings, norms, i)
        return carry[0] + shares.sum(1), carry[1] + slopes.sum(1)

    loss, slope = jax.lax.fori_loop(0, _steps(cut, s), add, (zero, zero))
    return loss, (s, t, settings, norms, slope)


def _backward(cut: Cut, kept: tuple[Any, ...], g: jax.Array) -> tuple[Any, ...]:
    """Of a row's loss by its logit: ``slope - probability * sum of slopes``."""
    s, t, settings, norms, slope = kept
    scale = (g / settings[0])[:, None]

    def add(i: jax.Array, grads: Head) -> Head:
        _, slopes, log_q = _terms(cut, s, t, settings, norms, i)
        dz = scale * (slopes - jnp.exp(log_q) * slope[:, None])
        new = _window(cut, s, i)[1]
        dz = jnp.where(new & (log_q > -jnp.inf), dz, 0.0)
        return _add_gradient(cut, s, grads, dz, i)

    zeros = s._replace(
        hidden=jnp.zeros(s.hidden.shape, jnp.float32),
        kernel=jnp.zeros_like(s.kernel),
        bias=None if s.bias is None else jnp.zeros_like(s.bias),
    )
    grads = jax.lax.fori_loop(0, _steps(cut, s), add, zeros)
    hidden = grads.hidden.astype(s.hidden.dtype)
    none = jax.tree.map(jnp.zeros_like, (t, settings))
    return (grads._replace(hidden=hidden), *none)


chunked.defvjp(_forward, _backward)


def _steps(cut: Cut, head: Head) -> int:
    return -(-head.kernel.shape[-1] // cut.chunk)


def _window(cut: Cut, head: Head, i: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where chunk i begins, and which of its classes no earlier chunk had.

    The last chunk is moved back to end where the classes do.
    """
    begin = jnp.minimum(i * cut.chunk, head.kernel.shape[-1] - cut.chunk)
    place = jax.lax.broadcasted_iota(jnp.int32, (cut.shards, cut.chunk), 1)
    return begin, (begin + place >= i * cut.chunk).reshape(1, -1)


def _logits(
    cut: Cut, s: Head, t: Head, settings: Settings, i: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Softened logits of chunk i, ``[rows, shards * chunk]``; -inf for old classes."""
    begin, new = _window(cut, s, i)
    z_s, z_t = (_product(cut, head, begin) / settings[0] for head in (s, t))
    if cut.divergence == "reverse":
        z_s = excluded(z_s, z_t)
    return jnp.where(new, z_s, -jnp.inf), jnp.where(new, z_t, -jnp.inf)


def _product(cut: Cut, head: Head, begin: jax.Array) -> jax.Array:
    kernel = _part(head.kernel, begin, cut).reshape(head.kernel.shape[0], -1)
    z = jnp.matmul(head.hidden, kernel, preferred_element_type=jnp.float32)
    if head.bias is None:
        return z
    return z + _part(head.bias, begin, cut).reshape(1, -1).astype(jnp.float32)


def _part(a: jax.Array, begin: jax.Array, cut: Cut) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(a, begin, cut.chunk, axis=a.ndim - 1)


def _accumulate(
    carry: tuple[jax.Array, jax.Array], z: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The largest logit so far, and the sum of exponentials relative to it."""
    largest, total = carry
    new = jnp.maximum(largest, z.max(1))
    base = jnp.where(new > -jnp.inf, new, 0.0)
    now = jnp.exp(z - base[:, None]).sum(1)
    return new, total * jnp.exp(largest - base) + now


def _terms(
    cut: Cut,
    s: Head,
    t: Head,
    settings: Settings,
    norms: tuple[jax.Array, ...],
    i: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Shares of the loss, their slopes by the student's log q, and log q."""
    z_s, z_t = _logits(cut, s, t, settings, i)
    log_q, log_p = z_s - norms[0][:, None], z_t - norms[1][:, None]
    of = functools.partial(_shares(cut.divergence, settings[1]), log_p)
    shares, slopes = jax.jvp(of, (log_q,), (jnp.ones_like(log_q),))
    return shares, slopes, log_q


def _shares(divergence: Divergence, beta: jax.Array) -> Shares:
    if divergence == "jensen_shannon":
        return jensen_shannon_shares(beta)
    return {"forward": forward_shares, "reverse": reverse_shares}[divergence]


def _add_gradient(cut: Cut, s: Head, grads: Head, dz: jax.Array, i: jax.Array) -> Head:
    begin = _window(cut, s, i)[0]
    kernel = _part(s.kernel, begin, cut).reshape(s.kernel.shape[0], -1)
    hidden = jnp.matmul(
        dz.astype(kernel.dtype), kernel.T, preferred_element_type=jnp.float32
    )
    columns = jnp.matmul(
        s.hidden.T, dz.astype(s.hidden.dtype), preferred_element_type=jnp.float32
    )
    bias = None if grads.bias is None else _add(cut, grads.bias, dz.sum(0), begin)
    return Head(grads.hidden + hidden, _add(cut, grads.kernel, columns, begin), bias)


def _add(cut: Cut, total: jax.Array, part: jax.Array, begin: jax.Array) -> jax.Array:
    """`part` added to the window of `total` that begins at `begin`; last axis."""
    old = _part(total, begin, cut)
    new = old + part.reshape(old.shape).astype(total.dtype)
    return jax.lax.dynamic_update_slice_in_dim(total, new, begin, total.ndim - 1)
