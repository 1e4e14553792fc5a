"""The k-means of scalars that no other beats, by dynamic programming in NumPy."""

from __future__ import annotations

import numpy as np

EXACT = 2**16
"""Distinct values up to which every boundary is tried."""


def optimal_entries(x: np.ndarray, entries: int) -> np.ndarray:
    r"""Centroids of least squared error, among all there are.

    The best clusters of scalars are runs of the sorted values, so that the least error
    of the first `j` values in `k` clusters is

    .. math:: D_k(j) = \min_{i \le j} D_{k-1}(i) + c(i, j),

    `c` being the error of one run about its mean. Where the minimum lies does not
    decrease with `j`: halving gives all `n` in `log n` rounds over the values, each a
    few NumPy operations.

    Args:
      x: ``float[n]``, finite.
      entries: E, how many centroids.

    Returns:
      ``float32[E]`` ascending; where there are fewer distinct values, the last is
      repeated. Exact up to 65,536 distinct values (in float64); more are first put
      into as many groups of about equal count, whose values stay together.

    Raises:
      ValueError: If `x` is not finite or `entries` is not positive.

    Examples:
      >>> optimal_entries(np.array([1.0, 9.0, 2.0, 10.0, 30.0]), 3).tolist()
      [1.5, 9.5, 30.0]

    References:
      Wu, `Optimal Quantization by Matrix Searching
      <https://doi.org/10.1016/0196-6774(91)90039-2>`_, 1991; Wang & Song,
      `Ckmeans.1d.dp <https://doi.org/10.32614/RJ-2011-015>`_, 2011. Differs: the
      monotone minima are found by halving, in n log n steps a cluster instead of n.
    """
    if entries < 1 or not np.isfinite(x).all():
        raise ValueError(
            "optimal_entries: x must be finite and entries positive; got "
            f"{int((~np.isfinite(x)).sum())} values that are not, entries={entries}."
        )
    values, counts = _groups(np.asarray(x, np.float64).reshape(-1))
    if len(values) <= entries:
        last = values[-1] if len(values) else 0.0
        padded = np.append(values, np.full(entries - len(values), last))
        return padded.astype(np.float32)
    runs = Runs(values, counts)
    bounds = runs.best(entries)
    return runs.means(bounds).astype(np.float32)


def _groups(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct values and their counts; of too many, means of neighbours."""
    values, counts = np.unique(x, return_counts=True)
    if len(values) <= EXACT:
        return values, counts.astype(np.float64)
    ends = np.cumsum(counts)
    group = (ends - 1) * EXACT // ends[-1]
    first = np.flatnonzero(np.diff(group, prepend=-1))
    total = np.add.reduceat(counts, first).astype(np.float64)
    return np.add.reduceat(values * counts, first) / total, total


class Runs:
    """Errors of runs of weighted, ascending values, by sums of their beginnings."""

    def __init__(self, values: np.ndarray, counts: np.ndarray) -> None:
        """Sums of counts, values and squares, of values about their mean."""
        self.center = (values * counts).sum() / counts.sum()
        x = values - self.center
        begin = lambda a: np.concatenate([[0.0], np.cumsum(a)])
        self.n, self.s, self.q = (
            begin(counts),
            begin(counts * x),
            begin(counts * x * x),
        )

    def error(self, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        """Squared error of the values from i to before j, where ``i < j``."""
        s = self.s[j] - self.s[i]
        return self.q[j] - self.q[i] - s * s / (self.n[j] - self.n[i])

    def means(self, bounds: np.ndarray) -> np.ndarray:
        """Means of the runs between ``bounds[k]`` and ``bounds[k + 1]``."""
        total = np.diff(self.s[bounds])
        return total / np.diff(self.n[bounds]) + self.center

    def best(self, clusters: int) -> np.ndarray:
        """Bounds of that many runs of least error, from 0 to n."""
        n = len(self.n) - 1
        least = np.full(n + 1, np.inf)
        least[1:] = self.error(np.zeros(n, int), np.arange(1, n + 1))
        choices = []
        for k in range(2, clusters + 1):
            least, choice = self._extend(least, k)
            choices.append(choice)
        bounds = [n]
        for choice in reversed(choices):
            bounds.append(choice[bounds[-1]])
        return np.array([0, *reversed(bounds)])

    def _extend(self, least: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Least errors with one run more, and where the last run begins."""
        n = len(least) - 1
        error, choice = np.full(n + 1, np.inf), np.zeros(n + 1, int)
        low, high = np.full(n + 1, k - 1), np.full(n + 1, n - 1)
        step = 1 << max(n.bit_length() - 1, 0)
        while step:
            j = np.arange(step, n + 1, 2 * step)
            j = j[j >= k]
            if len(j):
                # The nearest neighbours that are known bound the choice.
                left, right = np.maximum(j - step, 0), np.minimum(j + step, n)
                first = np.maximum(low[left], k - 1)
                last = np.minimum(np.minimum(high[right], j - 1), n - 1)
                error[j], choice[j] = self._minima(least, j, first, last)
                low[j] = high[j] = choice[j]
            step //= 2
        return error, choice

    def _minima(
        self, least: np.ndarray, j: np.ndarray, first: np.ndarray, last: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """For each j the least of ``least[i] + error(i, j)``, i from first to last."""
        sizes = last - first + 1
        starts = np.cumsum(sizes) - sizes
        i = np.arange(sizes.sum()) + np.repeat(first - starts, sizes)
        total = least[i] + self.error(i, np.repeat(j, sizes))
        found = np.minimum.reduceat(total, starts)
        hit = np.flatnonzero(total == np.repeat(found, sizes))
        place = hit[np.searchsorted(hit, starts)]
        return found, i[place]
