"""`hashed_matmul`: checks, the choice of a kernel, gradients."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.errors import refuse
from kernels_pallas.hashed_matmul import _tpu_blocks, xla
from kernels_pallas.hashed_matmul.reference import Hashing, Origin
from kernels_pallas.hashing import MOST
from kernels_pallas.target import Choice, Target, current_target

WHO = "hashed_matmul"


class _Problem(NamedTuple):
    """What is static about a call."""

    hashing: Hashing
    n: int
    kernel: str
    chunk: int
    exact: bool
    interpret: Any


def hashed_matmul(
    x: jax.Array,
    buckets: jax.Array,
    hashing: Hashing,
    *,
    n: int,
    origin: Origin = (0, 0),
    target: Target | None = None,
    interpret: Any = False,
) -> jax.Array:
    r"""Multiply activations by a weight whose values are shared by hashing.

    .. math:: y_{mo} = \sum_k x_{mk}\, \xi_{ok}\, b_{h_{ok} \bmod B}, \qquad
        h_{ok} = \operatorname{xxh32}(o, k)

    No index is stored: hashes are computed as the weight is read, and :math:`\xi` is
    the sign of a second one. With blocks, one hash names a run of consecutive buckets
    (`Hashing`). Differentiable in `x` and the buckets, whose gradient is the sum of
    their weights', in the same order at every call (on a GPU, in fixed point, where
    order cannot matter); the dense weight is not kept for it.

    Args:
      x: ``float[*stack, ..., K]``.
      buckets: ``float[*stack, B]``; every weight of a stack hashes alike.
      hashing: Block and seed. Static.
      n: Outputs. Static.
      origin: Where in the whole weight this part of it begins, ``(output, input)``, in
        whole blocks; traced or not. A shard that gives its own computes what the whole
        would.
      target: The device; by default the one in use. Static.
      interpret: Run a Pallas kernel by its interpreter, as `pallas_call` takes it.

    Returns:
      ``[*stack, ..., n]`` of the dtype of `x`; sums are float32.

    Raises:
      TypeError: If `x` or the buckets do not float.
      ValueError: If stacks disagree, blocks do not divide the buckets or the origin, or
        sizes are not positive.

    Examples:
      >>> buckets = jnp.array([1.0, 10.0, 100.0])
      >>> hashed_matmul(jnp.eye(2), buckets, Hashing(), n=2).T.tolist()
      [[-100.0, 10.0], [1.0, -100.0]]

    References:
      Chen et al., `Compressing Neural Networks with the Hashing Trick
      <https://arxiv.org/abs/1504.04788>`_, 2015, eq. 3 and 7. Desai et al.,
      `Random Offset Block Embedding Array (ROBE)
      <https://arxiv.org/abs/2108.02191>`_, 2022, for runs that begin anywhere; by
      default they begin at multiples of a block's row.
    """
    target = current_target() if target is None else target
    _check(x, buckets, hashing, n, origin)
    stack, k = buckets.ndim - 1, x.shape[-1]
    m = x[(0,) * stack].size // max(1, k)
    if m == 0:
        return jnp.zeros((*x.shape[:-1], n), x.dtype)
    choice = choose(m, n, k, buckets.shape[-1], hashing, target=target)
    problem = _Problem(
        hashing,
        n,
        choice.kernel,
        _chunk(n, k, target),
        exact=target.platform == "gpu",
        interpret=interpret,
    )
    run = functools.partial(_matmul, problem=problem)
    for _ in range(stack):
        run = jax.vmap(run, in_axes=(0, 0, None))
    place = jnp.stack([jnp.asarray(o, jnp.int32) for o in origin])
    rows = x.reshape(*x.shape[:stack], m, k)
    return run(rows, buckets, place).reshape(*x.shape[:-1], n)


def choose(
    m: int, n: int, k: int, buckets: int, hashing: Hashing, *, target: Target
) -> Choice:
    """What `hashed_matmul` runs for ``[m, k] x [k, n]``.

    Args:
      m: Rows of x.
      n: Outputs.
      k: Inputs.
      buckets: How many.
      hashing: Block and seed.
      target: The device.
    """
    del m
    why = _tpu_blocks.refusal(hashing, buckets) if target.platform == "tpu" else ""
    if target.platform == "tpu" and not why:
        what = "weights" if hashing.block == (1, 1) else "blocks"
        return Choice("tpu", f"{what} hashed in the TPU kernel")
    rows = _chunk(n, k, target) // max(1, k)
    at_once = "" if rows >= n else f", {rows} outputs at a time"
    why = f" ({why})" if why else ""
    return Choice("xla", f"buckets gathered, then a dot{at_once}{why}")


def _chunk(n: int, k: int, target: Target) -> int:
    """Weights to look up at a time: a 16th, in 0.25 to 4 MB of float32 on a CPU."""
    most = 2**20 if target.platform == "cpu" else 2**26
    return max(min(n * k // 16, most), min(n * k, 2**16), k)


@functools.partial(jax.custom_vjp, nondiff_argnames=("problem",))
def _matmul(
    x: jax.Array, buckets: jax.Array, origin: jax.Array, problem: _Problem
) -> jax.Array:
    if problem.kernel == "tpu":
        from kernels_pallas.hashed_matmul import tpu

        exact = x if x.dtype == jnp.bfloat16 else x.astype(jnp.float32)
        y = tpu.hashed_matmul(
            exact,
            buckets,
            problem.hashing,
            n=problem.n,
            origin=(origin[0], origin[1]),
            interpret=problem.interpret,
        )
        return y.astype(x.dtype)
    y = xla.hashed_matmul(
        x,
        buckets,
        problem.hashing,
        n=problem.n,
        origin=(origin[0], origin[1]),
        chunk=problem.chunk,
    )
    return y.astype(x.dtype)


def _forward(
    x: jax.Array, buckets: jax.Array, origin: jax.Array, problem: _Problem
) -> Any:
    return _matmul(x, buckets, origin, problem), (x, buckets, origin)


def _backward(problem: _Problem, residuals: Any, dy: jax.Array) -> Any:
    x, buckets, origin = residuals
    dx, dbuckets = xla.gradients(
        x,
        buckets,
        dy,
        problem.hashing,
        origin=(origin[0], origin[1]),
        chunk=problem.chunk,
        exact=problem.exact,
    )
    return dx.astype(x.dtype), dbuckets.astype(buckets.dtype), None


_matmul.defvjp(_forward, _backward)


def _check(
    x: jax.Array, buckets: jax.Array, hashing: Hashing, n: int, origin: Origin
) -> None:
    for name, array in (("x", x), ("buckets", buckets)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(
                f"{WHO}: {name} must be floating; got {array.dtype}. Convert by astype."
            )
    bn, bk = hashing.block
    if min(bn, bk, n) < 1 or not 0 <= hashing.seed < 2**32:
        refuse(
            WHO,
            "n, block and seed",
            "be positive, the seed of 32 bits",
            (n, hashing),
            "block=(1, 1) hashes each weight apart.",
        )
    stack = buckets.shape[:-1]
    if buckets.ndim < 1 or x.shape[: len(stack)] != stack or x.ndim == len(stack):
        refuse(
            WHO,
            "x",
            f"begin with the stack of the buckets, {stack}, and have inputs",
            x.shape,
            "Move the stack to the front, or use jax.vmap.",
        )
    if buckets.shape[-1] > MOST:
        refuse(
            WHO,
            "buckets",
            f"be {MOST} at most",
            buckets.shape[-1],
            "Cut the weight in parts.",
        )
    if buckets.shape[-1] < bk or (hashing.aligned and buckets.shape[-1] % bk):
        refuse(
            WHO,
            "buckets",
            f"be a positive multiple of the block's {bk} inputs",
            buckets.shape[-1],
            "Runs of buckets begin at multiples of it.",
        )
    known = zip(origin, hashing.block, strict=True)
    if any(isinstance(o, int) and o % b for o, b in known):
        refuse(
            WHO,
            "origin",
            f"be in whole blocks of {(bn, bk)}",
            origin,
            "Cut the weight between blocks.",
        )
