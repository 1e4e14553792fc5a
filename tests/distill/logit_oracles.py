"""The definitions of the losses of logits, in loops of float64, and their gradients."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import jaxcompress as jc

RNG = np.random.default_rng(7)
STUDENT = RNG.normal(size=(2, 3, 5)).astype(np.float32) * 2
TEACHER = RNG.normal(size=(2, 3, 5)).astype(np.float32) * 2
LABELS = np.array([[0, 4, 2], [2, 3, 1]])
WHERE = np.array([[True, False, True], [True, True, False]])


def softmax(row: Any) -> list[float]:
    top = max(row)
    each = [math.exp(z - top) for z in row]
    return [e / sum(each) for e in each]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def by_row(f: Callable[..., float]) -> Callable[..., np.ndarray]:
    """A loss of rows of logits, over any leading axes."""

    def loss(student: Any, teacher: Any, *rest: Any, **settings: Any) -> np.ndarray:
        out = np.zeros(student.shape[:-1])
        for i in np.ndindex(out.shape):
            more = [r[i] for r in rest]
            out[i] = f(student[i].tolist(), teacher[i].tolist(), *more, **settings)
        return out

    return loss


@by_row
def soft_targets(s: Any, t: Any, *, temperature: float) -> float:
    p, q = (softmax([z / temperature for z in row]) for row in (t, s))
    return temperature**2 * kl(p, q)


@by_row
def reverse_kl(s: Any, t: Any, *, temperature: float) -> float:
    left = [k for k in range(len(t)) if t[k] > -math.inf]
    p, q = (softmax([row[k] / temperature for k in left]) for row in (t, s))
    return temperature**2 * kl(q, p)


@by_row
def jensen_shannon(s: Any, t: Any, *, temperature: float, beta: float) -> float:
    p, q = (softmax([z / temperature for z in row]) for row in (t, s))
    m = [beta * a + (1 - beta) * b for a, b in zip(p, q, strict=True)]
    return temperature**2 * (beta * kl(p, m) + (1 - beta) * kl(q, m))


@by_row
def logit_mse(s: Any, t: Any, *, centred: bool = False) -> float:
    gap = [a - b for a, b in zip(s, t, strict=True) if b > -math.inf]
    shift = sum(gap) / len(gap) if centred else 0.0
    return sum((g - shift) ** 2 for g in gap) / len(gap)


@by_row
def decoupled(
    s: Any, t: Any, label: int, *, temperature: float, alpha: float, beta: float
) -> float:
    p, q = (softmax([z / temperature for z in row]) for row in (t, s))
    binary = kl([p[label], 1 - p[label]], [q[label], 1 - q[label]])
    others = [
        [v / (1 - row[label]) for k, v in enumerate(row) if k != label]
        for row in (p, q)
    ]
    return temperature**2 * (alpha * binary + beta * kl(*others))


def pearson(u: Any, v: Any) -> float:
    a, b = np.asarray(u) - np.mean(u), np.asarray(v) - np.mean(v)
    return float((a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum()))


def dist(
    student: Any, teacher: Any, *, inter: float, intra: float, temperature: float
) -> float:
    """Of ``[n, classes]``; one number for the batch."""
    s, t = (
        np.array([softmax((row / temperature).tolist()) for row in z])
        for z in (student, teacher)
    )
    rows = [1 - pearson(a, b) for a, b in zip(s, t, strict=True)]
    columns = [1 - pearson(a, b) for a, b in zip(s.T, t.T, strict=True)]
    return inter * float(np.mean(rows)) + intra * float(np.mean(columns))


def slope(f: Callable[[np.ndarray], Any], x: Any, h: float = 1e-5) -> np.ndarray:
    """Gradient of the sum of `f`, by central differences in float64."""
    x = np.asarray(x, np.float64)
    grad = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        if np.isfinite(x[i]):
            step = np.zeros_like(x)
            step[i] = h
            grad[i] = (np.sum(f(x + step)) - np.sum(f(x - step))) / (2 * h)
    return grad


@functools.cache
def compiled(name: str, **static: Any) -> Callable[..., tuple[Any, Any]]:
    """``(student, *rest, **traced) -> (losses, gradient of their sum)``, in one jit."""

    def total(student: Any, *rest: Any, **traced: Any) -> Any:
        loss = getattr(jc.distill, name)(student, *rest, **traced, **static)
        return loss.sum(), loss

    def run(student: Any, *rest: Any, **traced: Any) -> tuple[Any, Any]:
        grad, loss = jax.grad(total, has_aux=True)(student, *rest, **traced)
        return loss, grad

    return jax.jit(run)


def hidden(z: np.ndarray) -> np.ndarray:
    """The logits with NaN in the examples that do not count."""
    return np.where(WHERE[..., None], z, np.nan).astype(np.float32)
