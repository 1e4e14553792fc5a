"""Losses over 128k classes: `vocabulary_loss` beside logits that are there at once.

Both take hidden states and heads and give the loss and its gradient by the student's
hidden states and kernel. Bytes are the compiled program's temporaries: arguments and
results, which both have, are not in them.

Target: at most 1/8 of the plain form's bytes, gradients within the bound of float32.
"""

from __future__ import annotations

import dataclasses
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

import jaxcompress as jc
from experiments.benchmarks.timing import compare, record
from jaxcompress.distill._chunks import Divergence

ROUNDING = 2.0**-24
PLAIN = {
    "forward": jc.distill.soft_targets,
    "reverse": jc.distill.reverse_kl,
    "jensen_shannon": jc.distill.jensen_shannon,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Sizes of the problem."""

    classes: int = 131_072
    examples: int = 256
    width: int = 128
    teacher_width: int = 192
    chunk: int = 4096
    temperature: float = 2.0


def programs(settings: Settings, divergence: Divergence) -> dict[str, Any]:
    """Both forms of the loss, with their gradient."""
    T = settings.temperature

    def plain(h: Any, w: Any, h_t: Any, w_t: Any) -> jax.Array:
        return PLAIN[divergence](h @ w, h_t @ w_t, temperature=T).mean()

    def chunked(h: Any, w: Any, h_t: Any, w_t: Any) -> jax.Array:
        options: Any = {"chunk": settings.chunk, "divergence": divergence}
        return jc.distill.vocabulary_loss(
            h, w, h_t, w_t, temperature=T, **options
        ).mean()

    return {
        name: jax.jit(jax.value_and_grad(f, (0, 1)))
        for name, f in (("plain", plain), ("chunked", chunked))
    }


def arrays(settings: Settings) -> tuple[np.ndarray, ...]:
    """Hidden states and kernels whose logits have a standard deviation of about 2."""
    rng = np.random.default_rng(0)
    n, k = settings.examples, settings.classes
    found = []
    for d in (settings.width, settings.teacher_width):
        found += [rng.normal(size=(n, d)), rng.normal(size=(d, k)) * 2 / d**0.5]
    return tuple(a.astype(np.float32) for a in found)


def temporary_bytes(settings: Settings, divergence: Divergence) -> dict[str, int]:
    """Of each compiled program; nothing runs."""
    n, k = settings.examples, settings.classes
    shapes = []
    for d in (settings.width, settings.teacher_width):
        shapes += [(n, d), (d, k)]
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return {
        name: f.lower(*args).compile().memory_analysis().temp_size_in_bytes
        for name, f in programs(settings, divergence).items()
    }


def gradients_apart(settings: Settings) -> dict[str, Any]:
    """Largest difference of soft targets' gradients, and in units of its bound."""
    args = arrays(settings)
    each = {
        name: jax.tree.map(np.asarray, f(*args)[1])
        for name, f in programs(settings, "forward").items()
    }
    found = {}
    for i, name in enumerate(("hidden", "kernel")):
        gap = np.abs(each["plain"][i] - each["chunked"][i])
        limit = 2.0 * bounds(settings, args)[i]
        found[name] = {
            "relative_to_largest": float(gap.max() / np.abs(each["plain"][i]).max()),
            "of_bound": float((gap / limit).max()),
        }
    return found


def bounds(
    settings: Settings, args: tuple[np.ndarray, ...]
) -> tuple[np.ndarray, np.ndarray]:
    r"""Bounds of the error of the gradients of soft targets in float32.

    A sum of m terms is off by at most :math:`\gamma_m = m u / (1 - m u)` of the sum of
    magnitudes, in any order. So is each logit, with its width; a probability by twice
    the largest error of its row's logits and :math:`\gamma` of the classes, relatively;
    and the gradients, sums of products with ``T (q - p) / n``, by both.
    """
    h, w, h_t, w_t = (a.astype(np.float64) for a in args)
    n, k, T = settings.examples, settings.classes, settings.temperature
    q, off_q = _probabilities(h, w, T)
    p, off_p = _probabilities(h_t, w_t, T)
    dz = np.abs(q - p) * T / n
    off = (q * off_q + p * off_p) * T / n + 4 * ROUNDING * dz
    hidden = off @ np.abs(w).T + _gamma(k + 2) * (dz @ np.abs(w).T)
    return hidden, np.abs(h).T @ off + _gamma(n + 2) * (np.abs(h).T @ dz)


def _probabilities(h: np.ndarray, w: np.ndarray, T: float) -> tuple[Any, Any]:
    z = h @ w / T
    top = z.max(1, keepdims=True)
    q = np.exp(z - top)
    total = q.sum(1, keepdims=True)
    off_z = (_gamma(h.shape[1] + 2) * (np.abs(h) @ np.abs(w)) / T).max(1, keepdims=True)
    size = np.abs(z).max(1, keepdims=True) + np.abs(top + np.log(total))
    # Four roundings of what the exponential is taken of, four of the exponential.
    off = 2 * off_z + _gamma(w.shape[1]) + ROUNDING * (4 * size + 8)
    return q / total, off


def _gamma(m: int) -> float:
    return m * ROUNDING / (1.0 - m * ROUNDING)


def main() -> None:
    """Measure memory, gradients and time, and record them."""
    settings, memory = Settings(), {}
    for divergence in get_args(Divergence):
        found = temporary_bytes(settings, divergence)
        memory[divergence] = found | {"ratio": found["chunked"] / found["plain"]}
    args = [jnp.asarray(a) for a in arrays(settings)]
    timed = programs(settings, "forward")
    times = compare(
        {name: lambda f=f: lambda: f(*args) for name, f in timed.items()},
        to="plain",
        rounds=3,
    )
    record(
        "vocabulary_loss",
        __doc__,
        {
            "settings": dataclasses.asdict(settings),
            "target_ratio": 0.125,
            "temporary_bytes": memory,
            "gradients_apart": gradients_apart(settings),
            "times": times,
        },
    )


if __name__ == "__main__":
    main()
