"""`fuse_rotations`: Hadamard rotations between two weights, at no cost."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress import tree
from jaxcompress.leaf import Leaf
from jaxcompress.lift._flat import MOVES, FlatProgram, Step, flatten_program
from jaxcompress.quant._rotated import hadamard


class Pair(NamedTuple):
    """A weight whose output reaches another through operations linear in each channel.

    Attributes:
      first: Path of the weight; its last axis are the outputs.
      offsets: Paths of what is added to them.
      second: Path of the weight that contracts them.
      axis: Its axis that does, negative.
      block: Consecutive channels that stay together on the way.
    """

    first: str
    offsets: tuple[str, ...]
    second: str
    axis: int
    block: int


class _Channels(NamedTuple):
    """Channels of a value: blocks of `size` consecutive indices of one axis."""

    variable: int
    axis: int
    size: int


def fuse_rotations(
    fn: Callable[..., Any], params: Any, *example: Any, key: jax.Array
) -> Any:
    r"""Rotate what flows from one weight to the next; the function stays the same.

    .. math:: w_1' = w_1 D H, \quad b_1' = b_1 D H, \quad w_2' = H D w_2

    Where the outputs of a weight reach another one through additions of parameters,
    multiplications by a number, moves and matmuls along other axes alone (attention's
    values and output projection), a randomized Hadamard matrix cancels between the two.
    It spreads outliers over the channels of each block: of both weights, of the
    activations between them, and of a cache that holds them. Blocks are the largest
    powers of two that stay together on the way, within a head for one.

    Args:
      fn: As for `lift`. Scans are looked into.
      params: Its parameters; those found must be arrays.
      *example: Example arguments of `fn`.
      key: Decides the signs.

    Returns:
      Parameters on which `fn` gives what it gave, to float rounding.

    Raises:
      ValueError: If no two weights are so connected.
      TypeError: If one of them is compressed already.

    Examples:
      >>> import jaxcompress as jc
      >>> params = {"v": jnp.zeros((3, 8)).at[1, 2].set(8.0), "o": jnp.ones((8, 2))}
      >>> fn = lambda p, x: (x @ p["v"]) @ p["o"]
      >>> x = jnp.ones((1, 3))
      >>> turned = fuse_rotations(fn, params, x, key=jax.random.key(0))
      >>> round(jnp.abs(turned["v"]).max().item(), 2), fn(turned, x).round(3).tolist()
      (2.83, [[8.0, 8.0]])

    References:
      Ashkboos et al., `QuaRot <https://arxiv.org/abs/2404.00456>`_, 2024, section 4,
      stage 1c (values and output projection). Differs: pairs are found in the traced
      program; the residual stream is not rotated, which would need every norm's scale
      folded away.
    """
    pairs = rotation_pairs(fn, params, *example)
    if not pairs:
        raise ValueError(
            "fuse_rotations: no weight's output reaches another weight through "
            "additions of parameters, factors, moves and matmuls along other axes "
            "alone; rotate the inputs where they are used (quant.rotated_weight)."
        )
    flat, structure = tree.flatten(params)
    for pair in pairs:
        for path in (pair.first, *pair.offsets, pair.second):
            _check(path, flat[path])
    for pair, own in zip(pairs, jax.random.split(key, len(pairs)), strict=True):
        signs = jax.random.rademacher(own, (pair.block,), jnp.float32)
        for path in (pair.first, *pair.offsets):
            flat[path] = _rotated(flat[path], -1, signs)
        flat[pair.second] = _rotated(flat[pair.second], pair.axis, signs)
    return tree.unflatten(structure, flat)


def _check(path: str, w: Any) -> None:
    if isinstance(w, Leaf):
        raise TypeError(
            f"fuse_rotations: {path} must be an array; got {w!r}. Rotate first, then "
            "compress."
        )


def _rotated(w: jax.Array, axis: int, signs: jax.Array) -> jax.Array:
    """``H D`` times each block along an axis."""
    a = jnp.moveaxis(w, axis, -1).astype(jnp.float32)
    blocks = a.reshape(*a.shape[:-1], -1, signs.size)
    ones = (1,) * (blocks.ndim - 1)
    turned = hadamard(blocks * signs.reshape(*ones, -1), signs.size)
    return jnp.moveaxis(turned.reshape(a.shape), -1, axis).astype(w.dtype)


def rotation_pairs(
    fn: Callable[..., Any], params: Any, *example: Any
) -> tuple[Pair, ...]:
    """The pairs of weights that `fuse_rotations` rotates between.

    Args:
      fn: As for `fuse_rotations`.
      params: Its parameters, concrete or abstract.
      *example: Example arguments.
    """
    program = flatten_program(fn, params, *example, who="fuse_rotations", scans=True)
    shapes = {path: tuple(w.shape) for path, w in tree.flatten(params)[0].items()}
    reads = Counter(
        path
        for variable, path in program.params.items()
        for step in program.users.get(variable, ())
        if step.op not in MOVES
    )
    found = (_follow(program, shapes, step) for step in program.steps)
    return tuple(
        pair
        for pair in found
        if pair is not None
        and pair.block > 1
        and all(reads[p] == 1 for p in (pair.first, *pair.offsets, pair.second))
    )


def _follow(
    program: FlatProgram, shapes: dict[str, tuple[int, ...]], start: Step
) -> Pair | None:
    """From a matmul with a weight on its right to the next, if nothing forbids it."""
    first = program.operand(start, 1) if start.op == "dot_general" else None
    if first is None or not _whole(start, 1, shapes[first]):
        return None
    ndim = start.eqn.invars[1].aval.ndim
    axis = _free_axis(start, 1, ndim - 1)
    if axis is None:
        return None
    at = _Channels(start.outs[0], axis, shapes[first][-1])
    offsets: list[str] = []
    while True:
        step = program.only_user(at.variable)
        if step is None or step.eqn is None or step.ins.count(at.variable) > 1:
            return None
        side = step.ins.index(at.variable)
        if step.op == "dot_general":
            second = program.operand(step, 1 - side)
            contract, _ = step.eqn.params["dimension_numbers"]
            if second is not None and at.axis in contract[side]:
                if not _whole(step, 1 - side, shapes[second]):
                    return None
                axis = contract[1 - side][contract[side].index(at.axis)]
                axis -= step.eqn.invars[1 - side].aval.ndim
                block = at.size & -at.size
                return Pair(first, tuple(offsets), second, axis, block)
        path = program.offset(step)
        after = _through(program, step, side, at, shapes[path] if path else ())
        if after is None:
            return None
        if path is not None:
            offsets.append(path)
        at = after


def _whole(step: Step, side: int, shape: tuple[int, ...]) -> bool:
    """Whether an operand is a weight of this shape, or a scan's slice of it."""
    seen = tuple(step.eqn.invars[side].aval.shape)
    return shape[len(shape) - len(seen) :] == seen


def _through(
    program: FlatProgram,
    step: Step,
    side: int,
    at: _Channels,
    added: tuple[int, ...],
) -> _Channels | None:
    """Where the channels are after a step; None if rotations do not pass it."""
    shape = step.eqn.invars[side].aval.shape
    moved: tuple[int, int] | None = at.axis, at.size
    match step.op:
        case "add" | "sub":
            last = at.axis == len(shape) - 1 and added[-1:] == shape[-1:]
            moved = moved if last else None
        case "mul" | "div":
            other = step.ins[1 - side]
            scale = step.eqn.invars[1 - side].aval
            constant = other is None or other in program.fixed
            number = constant and scale.ndim == 0
            moved = moved if number and (step.op == "mul" or side == 0) else None
        case "convert_element_type" | "copy":
            pass
        case "transpose":
            moved = step.eqn.params["permutation"].index(at.axis), at.size
        case "reshape" | "squeeze" | "broadcast_in_dim":
            new = step.eqn.outvars[0].aval.shape
            same = math.prod(new) == math.prod(shape)
            moved = _reshaped(shape, new, at) if same else None
        case "dot_general":
            axis = _free_axis(step, side, at.axis)
            moved = None if axis is None else (axis, at.size)
        case _:
            moved = None
    return None if moved is None else _Channels(step.outs[0], *moved)


def _reshaped(
    shape: tuple[int, ...], new: tuple[int, ...], at: _Channels
) -> tuple[int, int] | None:
    """The axis that holds the channels, which keep their distance in memory."""
    stride = math.prod(shape[at.axis + 1 :])
    for i, n in enumerate(new):
        if n > 1 and math.prod(new[i + 1 :]) == stride:
            return i, math.gcd(at.size, n)
    return None


def _free_axis(step: Step, side: int, axis: int) -> int | None:
    """Where a matmul puts an axis that it neither contracts nor batches over."""
    contract, batch = step.eqn.params["dimension_numbers"]
    ranks = [v.aval.ndim for v in step.eqn.invars]
    taken = [{*contract[i], *batch[i]} for i in (0, 1)]
    if axis in taken[side]:
        return None
    free = [[a for a in range(ranks[i]) if a not in taken[i]] for i in (0, 1)]
    before = len(batch[0]) + (len(free[0]) if side else 0)
    return before + free[side].index(axis)
