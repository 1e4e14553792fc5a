"""The pattern that keeps N of every M consecutive inputs."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxcompress.layout import Axes, Layout
from jaxcompress.leaf import Leaf
from jaxcompress.prune._masked import MaskedArray
from jaxcompress.prune._nm_array import store_nm
from jaxcompress.prune._pattern import ByPath, Pattern

M_SIZES = (2, 4, 8, 16)


class NM(Pattern):
    """N of every M; by `nm`."""

    def __init__(self, n: int, m: int) -> None:
        """Check the options."""
        if m not in M_SIZES:
            raise ValueError(
                f"prune.nm: m must be one of {M_SIZES}; got {m}. 2:4 is what hardware "
                "multiplies."
            )
        if not 1 <= n < m:
            raise ValueError(
                f"prune.nm: n weights of m are kept, so n must be from 1 to m - 1 = "
                f"{m - 1}; got {n}."
            )
        self.n, self.m = n, m

    def __repr__(self) -> str:
        """As it is written."""
        return f"nm({self.n}, {self.m})"

    def keep(
        self, scores: ByPath, roles: ByPath, step: jax.Array
    ) -> dict[str, tuple[jax.Array, ...]]:
        """The n of highest score of each group, ties in order of position."""
        del step

        def one(score: jax.Array, axes: Axes) -> jax.Array:
            layout = Layout.of(score.shape, axes)
            kept = keep_of_groups(layout.to_storage(score), self.n, self.m)
            return layout.from_storage(kept)

        return {p: tuple(map(one, values, roles[p])) for p, values in scores.items()}

    def store(self, leaf: MaskedArray, axes: Axes) -> Leaf:
        """Kept values and their places."""
        return store_nm(leaf, Layout.of(leaf.shape, axes), n=self.n, m=self.m)


def nm(n: int = 2, m: int = 4) -> NM:
    """Of every `m` consecutive inputs, keep the `n` of highest score.

    Groups lie along the flattened contracting axes. Where `m` does not divide them the
    last group is shorter, and keeps `n` of what it has.

    Args:
      n: Weights kept, from 1 to ``m - 1``.
      m: Of so many: 2, 4, 8 or 16.

    Returns:
      A `Pattern`, for any ``sparsity=``; it is stored as `NMArray`, the elements and
      ``log2 m`` bits for each.

    Raises:
      ValueError: If an option is out of range.

    Examples:
      >>> import jaxcompress as jc
      >>> scheme = jc.prune.magnitude(sparsity=nm(2, 4))
      >>> w = jnp.array([[1.0], [-4.0], [3.0], [2.0]])
      >>> leaf = scheme.compress(*scheme.init({"w": w}))["w"]
      >>> leaf.method, leaf.elements.tolist(), leaf.materialize().ravel().tolist()
      ('2:4 dense', [[-4.0, 3.0]], [0.0, -4.0, 3.0, 0.0])

    References:
      Mishra et al., `Accelerating Sparse Deep Neural Networks
      <https://arxiv.org/abs/2104.08378>`_, 2021, section 3. Differs: any n of m = 2, 4,
      8 or 16.
    """
    return NM(n, m)


def keep_of_groups(score: jax.Array, n: int, m: int) -> jax.Array:
    """Mask of the `n` highest of every `m` entries along the last axis.

    Args:
      score: ``float[..., K]``.
      n: Entries to keep of each group.
      m: Its size.

    Returns:
      ``bool[..., K]``. Of equal scores the last are kept.
    """
    *lead, k = score.shape
    edge = [(0, 0)] * len(lead) + [(0, -k % m)]
    fill = jnp.array(-jnp.inf, score.dtype)
    # What fills the last group is below all, also below what is pruned already.
    real = jnp.pad(jnp.ones(score.shape, bool), edge).reshape(*lead, -1, m)
    group = jnp.pad(score, edge, constant_values=fill).reshape(*lead, -1, m)
    above = jnp.zeros(group.shape, jnp.int32)
    place = jax.lax.broadcasted_iota(jnp.int32, group.shape, group.ndim - 1)
    for j in range(m):
        other = group[..., j : j + 1]
        beats = (other > group) | ((other == group) & (place < j))
        above += (beats & real[..., j : j + 1]).astype(jnp.int32)
    return (above < n).reshape(*lead, -1)[..., :k]
