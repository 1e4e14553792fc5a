"""Losses on features in float64, in loops, from the papers."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

Array = np.ndarray


def length(v: Any) -> float:
    return float(np.sqrt(np.dot(v, v)))


def cosine(a: Array, b: Array) -> float:
    return float(np.dot(a, b)) / (length(a) * length(b))


def softmax(z: Array) -> Array:
    e = np.exp(z - z.max())
    return e / e.sum()


def huber(x: float, y: float) -> float:
    gap = abs(x - y)
    return gap**2 / 2 if gap <= 1 else gap - 0.5


def by_vector(one: Any) -> Any:
    """A loss of vectors as a loss of arrays of vectors, zero where masked."""

    def loss(s: Array, t: Array, where: Array) -> Array:
        out = np.zeros(where.shape)
        for i in np.argwhere(where):
            out[tuple(i)] = one(s[tuple(i)], t[tuple(i)])
        return out

    return loss


def by_batch(share: Any) -> Any:
    """A loss of the rows that count as a loss of a batch, zero for other rows."""

    def loss(s: Array, t: Array, where: Array) -> Array:
        rows = np.flatnonzero(where.reshape(len(s), -1).any(-1))
        mask = lambda x: where.reshape(where.shape + (1,) * (x.ndim - where.ndim))
        flat = [np.where(mask(x), x, 0).reshape(len(s), -1)[rows] for x in (s, t)]
        out = np.zeros(len(s))
        out[rows] = share(*flat)
        return out

    return loss


@by_vector
def hint(s: Array, t: Array) -> float:
    return sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / len(s)


@by_vector
def normalized_hint(s: Array, t: Array) -> float:
    return sum((s / length(s) - t / length(t)) ** 2)


@by_vector
def cosine_embedding(s: Array, t: Array) -> float:
    return 1 - cosine(s, t)


@by_vector
def pair_cosine(s: Array, t: Array) -> float:
    return (cosine(s[0], s[1]) - cosine(t[0], t[1])) ** 2


RAW_VARIANCE = np.array([-3.0, 0.5, 2.0, 0.0])


@by_vector
def variational_information(s: Array, t: Array) -> float:
    total = 0.0
    for c in range(len(s)):
        variance = np.log(1 + np.exp(RAW_VARIANCE[c])) + 1e-3
        total += np.log(np.sqrt(variance)) + (t[c] - s[c]) ** 2 / (2 * variance)
    return total / len(s)


def attention_transfer(s: Array, t: Array, where: Array, power: int = 2) -> Array:
    """Eq. 2 with sums of powers; `where` of examples or of positions."""
    out = np.zeros(len(s))
    for n in range(len(s)):
        counted = np.broadcast_to(
            where[n].reshape(where[n].shape + (1,) * (s.ndim - 1 - where.ndim)),
            s.shape[1:-1],
        )
        if not counted.any():
            continue
        maps = []
        for x in (s, t):
            q = [
                sum(abs(a) ** power for a in x[n][tuple(j)])
                for j in np.argwhere(counted)
            ]
            maps.append(np.array(q) / length(q))
        out[n] = ((maps[0] - maps[1]) ** 2).sum() / counted.sum()
    return out


def attention_kl(s: Array, t: Array, where: Array) -> Array:
    out = np.zeros(s.shape[:-1])
    for *i, k in np.argwhere(where):
        p, q = t[(*i, k)], s[(*i, k)]
        out[tuple(i)] += p * np.log(p / q)
    return out


def attention_mse(s: Array, t: Array, where: Array) -> Array:
    out = np.zeros(s.shape[:-1])
    for *i, k in np.argwhere(where):
        keys = where[tuple(i)].sum()
        out[tuple(i)] += (s[(*i, k)] - t[(*i, k)]) ** 2 / keys
    return out


def relation(s: Array, t: Array, where: Array, heads: int = 2) -> Array:
    """KL of softmax of scaled products, within the tokens that count."""
    out = np.zeros(where.shape)
    for n in range(len(s)):
        tokens = np.flatnonzero(where[n])
        for a in range(heads):
            for i in tokens:
                p, q = (_relations(x[n], a, heads, i, tokens) for x in (t, s))
                out[n, i] += (p * np.log(p / q)).sum() / heads
    return out


def _relations(x: Array, head: int, heads: int, i: int, tokens: Array) -> Array:
    size = x.shape[-1] // heads
    part = x[:, head * size : (head + 1) * size]
    return softmax(np.array([part[i] @ part[j] for j in tokens]) / np.sqrt(size))


@by_batch
def similarity_preserving(s: Array, t: Array) -> Array:
    b = len(s)
    g = []
    for f in (s, t):
        gram = np.array([[x @ y for y in f] for x in f])
        g.append(np.array([row / length(row) for row in gram]))
    return np.array([sum((g[0][i] - g[1][i]) ** 2) / b for i in range(b)])


@by_batch
def relational_distance(s: Array, t: Array) -> Array:
    b = len(s)
    pairs = list(itertools.permutations(range(b), 2))
    mean = [np.mean([length(x[i] - x[j]) for i, j in pairs]) for x in (s, t)]
    out = np.zeros(b)
    for i, j in pairs:
        d = [length(x[i] - x[j]) / m for x, m in zip((s, t), mean, strict=True)]
        out[i] += huber(*d) / (b - 1)
    return out


@by_batch
def relational_angle(s: Array, t: Array) -> Array:
    b = len(s)
    out = np.zeros(b)
    for i, j, k in itertools.permutations(range(b), 3):
        angles = [cosine(x[i] - x[j], x[k] - x[j]) for x in (s, t)]
        out[j] += huber(*angles) / ((b - 1) * (b - 2))
    return out


@by_batch
def probabilistic_transfer(s: Array, t: Array) -> Array:
    b = len(s)
    p, q = (np.array([_neighbours(x, i) for i in range(b)]) for x in (t, s))
    return np.array(
        [
            sum(p[i, j] * np.log(p[i, j] / q[i, j]) for j in range(b) if j != i)
            for i in range(b)
        ]
    )


def _neighbours(x: Array, i: int) -> Array:
    k = np.array([0.5 * (cosine(x[i], y) + 1) for y in x])
    k[i] = 0
    return k / k.sum()


@by_batch
def info_nce(s: Array, t: Array) -> Array:
    scores = np.array([[cosine(x, y) for y in t] for x in s]) / 0.3
    return np.array([-np.log(softmax(row)[i]) for i, row in enumerate(scores)])


def gradient(f: Any, x: Array, step: float = 1e-6) -> Array:
    """Central differences of a scalar function."""
    out = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        moved = [x.copy(), x.copy()]
        moved[0][i] += step
        moved[1][i] -= step
        out[i] = (f(moved[0]) - f(moved[1])) / (2 * step)
    return out
