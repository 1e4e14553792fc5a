"""`ema`: weights trained through a codebook that follows them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress.codebook._array import CodebookArray
from jaxcompress.codebook._beam import nearest as nearest_vectors
from jaxcompress.codebook._lloyd import cluster, exact_sums
from jaxcompress.codebook._scalars import cluster_scalars, nearest
from jaxcompress.layout import Axes, Layout, resolve_axes
from jaxcompress.straight_through import StraightThrough
from jaxcompress.transform import Transform
from jaxcompress.values import Site, check_weights, for_values, leaf_key, map_values

AxesOption = Axes | int | tuple[int, ...] | None


class Tables(NamedTuple):
    """Codebooks that follow their vectors, for ``N`` layers of a stack.

    Attributes:
      entries: ``float32[N, E, d]``.
      counts: ``float32[N, E]``, averaged over updates.
      totals: ``float32[N, E, d]`` sums of vectors, averaged likewise.
    """

    entries: jax.Array
    counts: jax.Array
    totals: jax.Array


class EMAState(NamedTuple):
    """State of `ema`.

    Attributes:
      tables: By path, those of each value.
      step: ``int32`` updates so far.
    """

    tables: dict[str, tuple[Tables, ...]]
    step: jax.Array


def ema(
    *,
    bits: int,
    key: jax.Array,
    dims: int = 1,
    decay: float = 0.99,
    revive_below: float = 0.05,
    iterations: int = 20,
    axes: AxesOption = None,
) -> Transform:
    r"""Train through the nearest entries of a codebook that follows the weights.

    .. math:: N_e \leftarrow \gamma N_e + (1 - \gamma) n_e, \quad
        m_e \leftarrow \gamma m_e + (1 - \gamma) \sum_{i : k_i = e} w_i, \quad
        c_e = m_e / N_e

    where :math:`n_e` vectors are nearest to entry `e`. Gradients pass straight through
    to the weights. An entry that is hardly used any more moves to a weight drawn at
    random. Weights (vectors) that are exactly zero do not count.

    Args:
      bits: Of a code, 1 to 8.
      key: Decides the first entries of vectors, and where unused ones move.
      dims: d, consecutive inputs that have one code; it divides the inputs.
      decay: :math:`\gamma`, in [0, 1).
      revive_below: An entry with fewer vectors than this part of the mean count moves;
        0: none does.
      iterations: Of k-means at the start, at most.
      axes: Contracting axes of the weights, or `Axes`; needed above rank 2 where no
        function was traced.

    Returns:
      A transform whose ``update`` moves the codebooks, the same on any number of
      devices; the view is what is stored, bit for bit.

    Raises:
      ValueError: If an option is out of range; from ``init`` if a weight is not finite,
        its axes are unknown or `dims` does not divide its inputs.

    Examples:
      >>> scheme = ema(bits=1, key=jax.random.key(0), decay=0.5)
      >>> params, state = scheme.init({"w": jnp.array([[1.0, 1.0, -4.0, -4.0]])})
      >>> moved = {"w": jnp.array([[3.0, 3.0, -4.0, -4.0]])}
      >>> moved, state = scheme.update(moved, state)
      >>> scheme.view(moved, state)["w"].materialize().tolist()
      [[2.0, 2.0, -4.0, -4.0]]

    References:
      van den Oord et al., `Neural Discrete Representation Learning
      <https://arxiv.org/abs/1711.00937>`_, 2017, appendix A.1 (updates); Dhariwal et
      al., `Jukebox <https://arxiv.org/abs/2005.00341>`_, 2020 (random restarts of
      unused entries). Differs: of weights instead of activations, from k-means on.
    """
    by = "codebook.ema"
    _check_options(bits, dims, decay, revive_below, by)

    def role(w: Any, site: Site) -> Axes:
        stated = axes if axes is not None else site.axes
        roles = resolve_axes(w.shape, stated, who=by, path=site.path)
        inputs = math.prod(w.shape[a] for a in roles.contract)
        if inputs % dims:
            raise ValueError(
                f"{by}: dims must divide the inputs; got {dims} for {inputs} of "
                f"{site.path!r}."
            )
        return roles

    def vectors(w: jax.Array, site: Site) -> jax.Array:
        roles = role(w, site)
        a = Layout.of(w.shape, roles).to_storage(jax.lax.stop_gradient(w))
        layers = math.prod(w.shape[: roles.stack])
        return a.astype(jnp.float32).reshape(layers, -1, dims)

    def first(w: jax.Array, site: Site) -> Tables:
        x = vectors(w, site)
        keys = jax.random.split(leaf_key(key, site), len(x))
        start = lambda x, key: _first_entries(x, 2**bits, iterations, key)
        entries = jax.vmap(start)(x, keys)
        counts, totals = jax.vmap(_statistics)(x, _codes(x, entries), entries)
        return Tables(entries, counts, totals)

    def init(params: Any) -> tuple[Any, EMAState]:
        check_weights(params, who=by)
        return params, EMAState(for_values(first, params), jnp.zeros((), jnp.int32))

    def encoded(w: jax.Array, site: Site, state: EMAState) -> CodebookArray:
        roles, x = role(w, site), vectors(w, site)
        layout, stack = Layout.of(w.shape, roles), w.shape[: roles.stack]
        entries = _held(state.tables[site.path][site.number].entries, w.dtype)
        outputs = (*stack, *(w.shape[a] for a in layout.out))
        return CodebookArray(
            words=_codes(x, entries).reshape(*outputs, 1, -1),
            codebooks=entries.astype(w.dtype).reshape(*stack, 1, 1, -1, dims),
            layout=layout,
            code_bits=bits,
            packed=False,
            dtype_name=w.dtype.name,
        )

    def view(params: Any, state: EMAState) -> Any:
        fake = lambda w, site: StraightThrough(latent=w, stored=encoded(w, site, state))
        return map_values(fake, params, by=by)

    def update(params: Any, state: EMAState, **extra: Any) -> tuple[Any, EMAState]:
        del extra
        step = state.step + 1

        def moved(w: jax.Array, site: Site) -> Tables:
            x, before = vectors(w, site), state.tables[site.path][site.number]
            draw = jax.random.fold_in(leaf_key(key, site), step)
            keys = jax.random.split(draw, len(x))
            codes = _codes(x, _held(before.entries, w.dtype))
            run = lambda *a: _moved(*a, decay=decay, least=revive_below)
            return jax.vmap(run)(x, codes, before, keys)

        return params, EMAState(for_values(moved, params), step)

    def compress(params: Any, state: EMAState) -> Any:
        stored = lambda w, site: encoded(w, site, state).pack()
        return map_values(stored, params, by=by)

    return Transform(init, view, update, compress)


def _held(entries: jax.Array, dtype: Any) -> jax.Array:
    """As they are stored, in float32."""
    return entries.astype(dtype).astype(jnp.float32)


def _first_entries(
    x: jax.Array, entries: int, iterations: int, key: jax.Array
) -> jax.Array:
    """``float32[E, d]`` by k-means."""
    if x.shape[-1] == 1:
        found = cluster_scalars(
            x, entries=entries, init="density", iterations=iterations
        )
        return found[:, None]
    return cluster(x, entries=entries, key=key, iterations=iterations).entries


def _codes(x: jax.Array, entries: jax.Array) -> jax.Array:
    """``uint8[N, n]`` of vectors ``[N, n, d]``."""
    if x.shape[-1] == 1:
        return jax.vmap(nearest)(x[..., 0], entries[..., 0])
    found = jax.vmap(lambda x, e: nearest_vectors(x, e).codes)(x, entries)
    return found[..., 0].astype(jnp.uint8)


def _statistics(
    x: jax.Array, codes: jax.Array, entries: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """How many vectors each entry has, ``float32[E]``, and their sums."""
    e = entries.shape[0]
    counted = (x != 0).any(-1)
    codes = jnp.where(counted, codes.astype(jnp.int32), e)  # Out of range: dropped.
    ones = jnp.ones((len(x),), jnp.int32)
    counts = jax.ops.segment_sum(ones, codes, e).astype(jnp.float32)
    lacks = jnp.where(counted[:, None], x - entries[jnp.minimum(codes, e - 1)], 0.0)
    return counts, counts[:, None] * entries + exact_sums(lacks, codes, e)


def _moved(
    x: jax.Array,
    codes: jax.Array,
    before: Tables,
    key: jax.Array,
    *,
    decay: float,
    least: float,
) -> Tables:
    """Codebooks of one layer after an update."""
    new, sums = _statistics(x, codes, before.entries)
    counts = decay * before.counts + (1 - decay) * new
    totals = decay * before.totals + (1 - decay) * sums
    used = counts > 0
    mean = totals / jnp.where(used, counts, 1.0)[:, None]
    entries = jnp.where(used[:, None], mean, before.entries)
    usual = counts.sum() / len(counts)
    dead = counts < least * usual
    drawn = x[jax.random.randint(key, (len(counts),), 0, len(x))]
    drawn = jnp.where((drawn != 0).any(-1, keepdims=True), drawn, entries)
    return Tables(
        entries=jnp.where(dead[:, None], drawn, entries),
        counts=jnp.where(dead, usual, counts),
        totals=jnp.where(dead[:, None], usual * drawn, totals),
    )


def _check_options(
    bits: int, dims: int, decay: float, revive_below: float, by: str
) -> None:
    if not 1 <= bits <= 8 or dims < 1:
        raise ValueError(
            f"{by}: bits must be 1 to 8 and dims positive; got {bits} and {dims}."
        )
    if not 0 <= decay < 1:
        raise ValueError(f"{by}: decay must be at least 0 and below 1; got {decay}.")
    if not 0 <= revive_below < 1:
        raise ValueError(
            f"{by}: revive_below is a part of the mean count, at least 0 and below 1; "
            f"got {revive_below}."
        )
