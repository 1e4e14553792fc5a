"""What follows a matmul and can be moved into it: norms, biases, channel scales."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxcompress import tree
from jaxcompress.layout import Layout
from jaxcompress.leaf import Leaf, materialize
from jaxcompress.lift import calibrate, trace_axes
from jaxcompress.lift._flat import FlatProgram, Step, flatten_program

_MATMULS = ("dot_general", "conv_general_dilated")


class BatchNorm(NamedTuple):
    """Paths of a batch norm's arrays, and of the kernel and bias before it."""

    kernel: str
    bias: str | None
    mean: str
    var: str
    scale: str
    offset: str


def fold_batch_norm(
    fn: Callable[..., Any], variables: Any, *example: Any, epsilon: float = 1e-5
) -> Any:
    r"""Move every batch norm into the matmul or convolution before it.

    .. math:: w' = w\,\gamma / \sqrt{\sigma^2 + \epsilon}, \quad
              \beta' = \beta + (b - \mu)\,\gamma / \sqrt{\sigma^2 + \epsilon}

    The norm stays in the program with mean 0, variance :math:`1 - \epsilon` and scale
    1, which XLA fuses into the addition of :math:`\beta'`, so `fn` is as it was.

    Args:
      fn: A function of `variables` in which the norms use their running statistics.
      variables: With Linen's collections ``params`` (kernel, bias, scale) and
        ``batch_stats`` (mean, var).
      *example: Example arguments of `fn`.
      epsilon: The norms' own.

    Returns:
      Variables on which `fn` gives what it gave, to float rounding.

    Raises:
      ValueError: If no norm follows a kernel.

    References:
      Jacob et al., 2018, section 3.2, eq. 14.
    """
    norms = batch_norms(fn, variables, *example)
    if not norms:
        raise ValueError(
            "fold_batch_norm: no batch norm with running statistics follows a kernel; "
            "pass the function in inference mode and variables with batch_stats."
        )
    flat, structure = tree.flatten(variables)
    for norm in norms:
        gain = flat[norm.scale] / jnp.sqrt(flat[norm.var] + epsilon)
        bias = 0.0 if norm.bias is None else flat[norm.bias]
        flat[norm.kernel] = flat[norm.kernel] * gain.reshape(
            (1,) * (flat[norm.kernel].ndim - 1) + gain.shape
        )
        flat[norm.offset] = flat[norm.offset] + (bias - flat[norm.mean]) * gain
        if norm.bias is not None:
            flat[norm.bias] = jnp.zeros_like(flat[norm.bias])
        flat[norm.mean] = jnp.zeros_like(gain)
        flat[norm.var] = jnp.full_like(gain, 1.0 - epsilon)
        flat[norm.scale] = jnp.ones_like(gain)
    return tree.unflatten(structure, flat)


def batch_norms(
    fn: Callable[..., Any], variables: Any, *example: Any
) -> tuple[BatchNorm, ...]:
    """The batch norms that directly follow a matmul or convolution, found by tracing.

    Args:
      fn: As for `fold_batch_norm`.
      variables: Its variables.
      *example: Example arguments.
    """
    program = flatten_program(fn, variables, *example, who="batch_norms")
    paths = set(tree.flatten(variables)[0])
    found = []
    for step, kernel in _matmuls(program):
        bias, after = None, program.only_user(step.outs[0])
        if after is not None and after.op == "add":
            bias, after = program.param(after), program.only_user(after.outs[0])
        mean = program.param(after) if after is not None and after.op == "sub" else None
        if mean is None or not mean.endswith("/mean"):
            continue
        module = mean.split("/", 1)[1].removesuffix("/mean")
        norm = BatchNorm(
            kernel=kernel,
            bias=bias,
            mean=mean,
            var=mean.removesuffix("mean") + "var",
            scale=f"params/{module}/scale",
            offset=f"params/{module}/bias",
        )
        if {norm.var, norm.scale, norm.offset} <= paths:
            found.append(norm)
    return tuple(found)


def equalize(
    fn: Callable[..., Any], params: Any, *example: Any, iterations: int = 20
) -> Any:
    r"""Even out the channel ranges of consecutive layers; the function stays the same.

    Where the output of one kernel reaches a second one through additions of parameters
    and ReLU only, :math:`w_1 / s`, :math:`b_1 / s` and :math:`s\, w_2` give the same
    function, with :math:`s_i = \sqrt{r^{(1)}_i / r^{(2)}_i}` and the ranges
    :math:`r_i = \max |w|` of output channel i of the first and input channel i of the
    second.

    Args:
      fn: A function of `params`; batch norms folded.
      params: Its parameters.
      *example: Example arguments of `fn`.
      iterations: Passes over all pairs.

    Returns:
      Parameters on which `fn` gives what it gave, to float rounding.

    Raises:
      ValueError: If no two kernels are so connected.

    References:
      Nagel et al., `Data-Free Quantization <https://arxiv.org/abs/1906.04721>`_, 2019,
      eq. 7-11.
    """
    program = flatten_program(fn, params, *example, who="equalize")
    flat, structure = tree.flatten(params)
    pairs = _pairs(program, flat)
    if not pairs:
        raise ValueError(
            "equalize: no kernel's output reaches another kernel through additions and "
            "ReLU alone; fold batch norms first (quant.fold_batch_norm)."
        )
    for _ in range(iterations):
        for first, offsets, second in pairs:
            a, b = flat[first], flat[second]
            out = jnp.abs(a).max(tuple(range(a.ndim - 1)))
            into = jnp.abs(b).max((*range(b.ndim - 2), b.ndim - 1))
            live = (out > 0) & (into > 0)
            ratio = jnp.where(live, out, 1.0) / jnp.where(live, into, 1.0)
            s = jnp.sqrt(ratio)
            flat[first] = a / s.reshape((1,) * (a.ndim - 1) + s.shape)
            flat[second] = b * s.reshape((1,) * (b.ndim - 2) + (*s.shape, 1))
            for path in offsets:
                flat[path] = flat[path] / s
    return tree.unflatten(structure, flat)


def _pairs(
    program: FlatProgram, flat: dict[str, Any]
) -> list[tuple[str, tuple[str, ...], str]]:
    """Kernels, the parameters added between them, and the kernels they feed."""
    kernels = {id(step): path for step, path in _matmuls(program)}
    pairs = []
    for step, first in _matmuls(program):
        offsets: list[str] = []
        after = program.only_user(step.outs[0])
        while after is not None and id(after) not in kernels:
            path = program.offset(after)
            if path is not None:
                offsets.append(path)
            elif not _commutes(program, after):
                break
            after = program.only_user(after.outs[0])
        second = kernels.get(id(after))
        if second is not None and _plain(flat[first], flat[second]):
            pairs.append((first, tuple(offsets), second))
    return pairs


def _commutes(program: FlatProgram, step: Step) -> bool:
    """Whether a step commutes with positive factors of its input's channels."""
    if step.op == "mul":
        return any(i is None or i in program.fixed for i in step.ins)
    if step.op == "div":
        return step.ins[1] is None or step.ins[1] in program.fixed
    if step.op != "max":
        return False
    return [v.val for v in step.eqn.invars if hasattr(v, "val")] == [0.0]


def _plain(first: Any, second: Any) -> bool:
    """Whether the last axis of one kernel is the input axis of the other."""
    return first.ndim > 1 and second.ndim > 1 and first.shape[-1] == second.shape[-2]


def correct_bias(
    fn: Callable[..., Any],
    params: Any,
    packed: Any,
    batches: Iterable[Any],
) -> Any:
    r"""Take the mean error of every compressed matmul out of what is added after it.

    .. math:: b' = b - \operatorname{E}[x]\,(Q - W)

    Args:
      fn: As for `lift`.
      params: The float parameters.
      packed: The compressed ones.
      batches: Calibration inputs: tuples of arguments, or single arguments.

    Returns:
      `packed` with corrected biases; of a kernel that a batch norm follows, with a
      corrected running mean.

    Raises:
      ValueError: If nothing is added after any compressed kernel.

    References:
      Nagel et al., Data-Free Quantization, 2019, eq. 16-17. Differs: the mean input is
      measured.
    """
    batches = [b if isinstance(b, tuple) else (b,) for b in batches]
    stats = calibrate(fn, params, batches)
    axes = trace_axes(fn, params, *batches[0])
    program = flatten_program(fn, params, *batches[0], who="correct_bias")
    dense, _ = tree.flatten(params)
    flat, structure = tree.flatten(packed)
    corrected = 0
    for step, kernel in _matmuls(program):
        after = program.only_user(step.outs[0])
        path = None if after is None else program.offset(after)
        if (
            after is None
            or path is None
            or not isinstance(flat[kernel], Leaf)
            or axes[kernel].stack
        ):
            continue
        layout = Layout.of(dense[kernel].shape, axes[kernel])
        off = materialize(flat[kernel]).astype(jnp.float32) - dense[kernel]
        error = layout.to_storage(off) @ stats[kernel].mean
        sign = -1.0 if after.op == "add" else 1.0
        value = flat[path]
        flat[path] = value + (sign * error.reshape(value.shape)).astype(value.dtype)
        corrected += 1
    if not corrected:
        raise ValueError(
            "correct_bias: no bias is added after a compressed kernel; give the layers "
            "a bias, or leave the correction out."
        )
    return tree.unflatten(structure, flat)


def _matmuls(program: FlatProgram) -> list[tuple[Step, str]]:
    """Every matmul or convolution whose right operand is a parameter."""
    return [
        (step, program.params[step.ins[1]])
        for step in program.steps
        if step.op in _MATMULS and step.ins[1] in program.params
    ]
