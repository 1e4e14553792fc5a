"""`kmeans`: weights that share a few trained values."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress.codebook._clustered import ClusteredArray, at_clusters, clusters
from jaxcompress.codebook._scalars import (
    INITS,
    KEYED,
    MOST,
    Init,
    cluster_scalars,
    nearest,
)
from jaxcompress.layout import Axes, Layout, resolve_axes
from jaxcompress.leaf import OrderError
from jaxcompress.transform import Transform
from jaxcompress.tree import flatten
from jaxcompress.values import Site, leaf_key, replace_weights

AxesOption = Axes | int | tuple[int, ...] | None


class KMeansState(NamedTuple):
    """State of `kmeans`.

    Attributes:
      codes: By path, ``uint8[*stack, *out, 1, K]`` of each clustered weight.
    """

    codes: dict[str, tuple[jax.Array, ...]]


def kmeans(
    *,
    bits: int,
    init: Init = "linear",
    iterations: int = 300,
    zero: bool = False,
    axes: AxesOption = None,
    key: jax.Array | None = None,
) -> Transform:
    r"""Let the weights of a layer share :math:`2^b` values, and train those.

    .. math:: \min_{c, k} \sum_{w_i \ne 0} (w_i - c_{k_i})^2, \qquad
        \frac{\partial L}{\partial c_j} = \sum_{i : k_i = j}
        \frac{\partial L}{\partial w_i}

    Weights that are exactly zero take no part in the clusters: pruned before, by an
    earlier transform of a chain, they stay zero and the values are those of the kept.

    Args:
      bits: Of a code, 1 to 8.
      init: Where Lloyd's algorithm starts: ``"linear"``, evenly between the least and
        the largest weight; ``"density"``, evenly in their order; ``"random"``, at
        random weights; ``"kmeans++"``, at random weights far from each other;
        ``"optimal"``, at the least error there is (`optimal_entries`, on the host).
      iterations: Of Lloyd's algorithm, at most.
      zero: Whether one of the values is zero, for the weights that are; without a mask
        it keeps them.
      axes: Contracting axes of the weights, or `Axes`; needed above rank 2 where no
        function was traced.
      key: Decides random starts, for ``"random"`` and ``"kmeans++"``.

    Returns:
      A transform whose ``init`` finds the clusters, each layer of a stack for itself,
      and puts a `ClusteredArray` in place of each weight: its codebooks, of role
      ``"codebook"``, are trained, while which weight has which value stays. Gradients
      are summed in a fixed order. What is trained is what is stored. Up to
      :math:`2^b` distinct values are kept as they are.

    Raises:
      ValueError: If an option is out of range; from ``init`` if a weight is not finite
        or its axes are unknown.
      OrderError: From ``chain(...).init``, if what follows cannot act on the shared
        values.

    Examples:
      >>> scheme = kmeans(bits=1)
      >>> w = jnp.array([[1.0, 0.0, -4.0], [3.0, 2.0, -2.0]])
      >>> params, state = scheme.init({"w": w})
      >>> scheme.compress(params, state)["w"].materialize().tolist()
      [[2.0, 2.0, -3.0], [2.0, 2.0, -3.0]]
      >>> loss = lambda p: scheme.view(p, state)["w"].materialize().sum()
      >>> jax.grad(loss)(params)["w"].codebooks.ravel().tolist()
      [2.0, 4.0]

    References:
      Han et al., `Deep Compression <https://arxiv.org/abs/1510.00149>`_, 2016, section
      3, eq. 2 and 3. Differs: clusters that have lost their weights are moved to the
      weights farthest from theirs.
    """
    by = "codebook.kmeans"
    _check_options(bits, init, iterations, key, by)
    entries = 2**bits - int(zero)

    def find(w: jax.Array, key: jax.Array | None) -> jax.Array:
        return cluster_scalars(
            w,
            entries=entries,
            init=init,
            iterations=iterations,
            key=key,
            keep_zero=not zero,
        )

    def clustered(w: jax.Array, site: Site) -> ClusteredArray:
        stated = axes if axes is not None else site.axes
        roles = resolve_axes(w.shape, stated, who=by, path=site.path)
        _check_size(w, roles, site.path, by)
        stack = w.shape[: roles.stack]
        layers = jax.lax.stop_gradient(w).reshape(math.prod(stack), -1)
        own = (
            None if key is None else jax.random.split(leaf_key(key, site), len(layers))
        )
        books = jax.vmap(find)(layers, own).reshape(*stack, -1)
        if zero:
            books = jnp.pad(books, [(0, 0)] * len(stack) + [(1, 0)])
        return ClusteredArray(
            latent=w,
            codebooks=books[..., None, None, :, None].astype(w.dtype),
            layout=Layout.of(w.shape, roles),
            code_bits=bits,
            zero_entry=zero,
        )

    def missing(w: jax.Array, site: Site) -> Any:
        raise OrderError(
            f"the values at {site.path!r} have no clusters; pass the params that init "
            "returned, and cluster weights once."
        )

    def start(params: Any) -> tuple[Any, KMeansState]:
        ready = lambda x, path: bool(clusters(x))
        params = replace_weights(clustered, params, ready=ready, by=by)
        flat, _ = flatten(params)
        codes = {path: tuple(map(assigned, clusters(x))) for path, x in flat.items()}
        return params, KMeansState(codes)

    def view(params: Any, state: KMeansState) -> Any:
        coded = lambda leaf, path, i: leaf.coded(state.codes[path][i])
        return at_clusters(coded, missing, params, by=by)

    def update(params: Any, state: Any, **extra: Any) -> tuple[Any, Any]:
        del extra
        return params, state

    def compress(params: Any, state: KMeansState) -> Any:
        coded = lambda leaf, path, i: leaf.coded(state.codes[path][i], packed=True)
        return at_clusters(coded, missing, params, by=by)

    return Transform(start, view, update, compress)


@jax.jit
def assigned(leaf: ClusteredArray) -> jax.Array:
    """``uint8[*stack, *out, 1, K]``: the nearest centroid of each weight."""
    w = leaf.layout.to_storage(leaf.weight)
    books = leaf.codebooks.astype(jnp.float32)
    stack, entries = books.shape[:-4], books.reshape(*books.shape[:-4], -1)

    def one(w: jax.Array, entries: jax.Array) -> jax.Array:
        if not leaf.zero_entry:
            return nearest(w, entries)
        code = nearest(w, entries[1:]) + jnp.uint8(1)
        return jnp.where(w == 0, jnp.uint8(0), code)

    for _ in stack:
        one = jax.vmap(one)
    return one(w, entries)[..., None, :]


def _check_options(
    bits: int, init: str, iterations: int, key: jax.Array | None, by: str
) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"{by}: bits must be 1 to 8; got {bits}.")
    if init not in INITS:
        raise ValueError(f"{by}: init must be one of {INITS}; got {init!r}.")
    if iterations < 0:
        raise ValueError(f"{by}: iterations must not be negative; got {iterations}.")
    if init in KEYED and key is None:
        raise ValueError(
            f"{by}: init={init!r} draws weights at random; pass key=jax.random.key(0)."
        )


def _check_size(w: jax.Array, roles: Axes, path: str, by: str) -> None:
    size = math.prod(w.shape[roles.stack :])
    if size > MOST:
        raise ValueError(
            f"{by}: a layer must have at most {MOST} weights; {path!r} has {size}. "
            "Cluster it by codebook.product, in blocks with codebooks of their own."
        )
