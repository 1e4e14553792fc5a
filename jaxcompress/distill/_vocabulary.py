"""Distillation over a large vocabulary, some classes at a time."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ._check_teacher import require_defined
from ._chunks import Cut, Divergence, Head, as_rows, chunked
from ._divergences import check_beta
from ._logits import check_float, check_positive, check_where, kept, squared


def vocabulary_loss(
    student: jax.Array,
    student_kernel: jax.Array,
    teacher: jax.Array,
    teacher_kernel: jax.Array,
    *,
    temperature: float | jax.Array,
    divergence: Divergence = "forward",
    beta: float | jax.Array = 0.5,
    chunk: int = 4096,
    shards: int = 1,
    student_bias: jax.Array | None = None,
    teacher_bias: jax.Array | None = None,
    where: jax.Array | None = None,
) -> jax.Array:
    r"""A loss of logits, from hidden states, without the logits in memory.

    .. math::
        T^2\, D\big(\sigma((h_t W_t + b_t) / T),\, \sigma((h_s W_s + b_s) / T)\big)

    Logits are made `chunk` classes at a time, three times over: for the normalizers,
    for the loss and, in the backward pass, for the gradient. None are kept between.

    Args:
      student: ``float[..., d_s]`` hidden states, what the head multiplies.
      student_kernel: ``float[d_s, classes]`` of the head; of a compressed leaf, what
        `materialize` gives.
      teacher: ``float[..., d_t]`` hidden states, of the same leading axes.
      teacher_kernel: ``float[d_t, classes]``, of the same classes.
      temperature: Positive; traced or not. No gradient flows to it, to `beta` or to
        the teacher.
      divergence: "forward" for `soft_targets`, "reverse" for `reverse_kl`,
        "jensen_shannon" for `jensen_shannon`. Static.
      beta: Of `jensen_shannon`.
      chunk: Classes at a time, of each shard; need not divide them. Static.
      shards: Devices over which the class axis of both kernels is sharded. Every
        chunk then takes a part from each, and no kernel is gathered. Static.
      student_bias: ``float[classes]``, or none.
      teacher_bias: ``float[classes]``, or none; -inf excludes a class.
      where: ``bool[...]`` examples to count; the loss of others is zero.

    Returns:
      ``float32[...]``, a loss an example: what the loss of the divergence returns for
      the logits, up to the rounding of float32. Beside arguments, results and
      gradients it takes memory for a few arrays of ``[examples, shards * chunk]`` and
      a chunk of each kernel.

    Raises:
      ValueError: If shapes do not agree or a setting is out of range.

    Examples:
      >>> h, w = jnp.array([[1.0, -2.0]]), jnp.array([[1.0, 0.0, 3.0], [0.0, 2.0, 1.0]])
      >>> vocabulary_loss(h, w, h, w, temperature=2.0, chunk=2).tolist()
      [0.0]

    References:
      Hinton et al., `Distilling the Knowledge in a Neural Network
      <https://arxiv.org/abs/1503.02531>`_, 2015, eq. 1 and 2; normalizers as in
      Milakov & Gimelshein, `Online Normalizer Calculation for Softmax
      <https://arxiv.org/abs/1805.02867>`_, 2018, Algorithm 3.
    """
    who = "distill.vocabulary_loss"
    s = Head(student, student_kernel, student_bias)
    t = Head(teacher, teacher_kernel, teacher_bias)
    _check_heads(who, s, t, where)
    require_defined(who, teacher, where, "hidden states")
    check_positive(who, "temperature", temperature)
    cut = _cut(who, student_kernel.shape[-1], shards, chunk, divergence)
    check_beta(who, beta)
    s, t = (as_rows(head, where, shards) for head in (s, t))
    settings = (jnp.asarray(temperature, jnp.float32), jnp.asarray(beta, jnp.float32))
    t, settings = jax.lax.stop_gradient((t, settings))
    loss: Any = chunked(cut, s, t, settings)
    loss = loss * squared(settings[0])
    return kept(loss.reshape(student.shape[:-1]), where)


def _check_heads(who: str, s: Head, t: Head, where: jax.Array | None) -> None:
    for name, head in (("student", s), ("teacher", t)):
        check_float(who, name, head.hidden)
        kernel, d = head.kernel.shape, head.hidden.shape[-1]
        if len(kernel) != 2 or kernel[0] != d:
            raise ValueError(
                f"{who}: {name}_kernel must be [{d}, classes] for hidden states of "
                f"shape {head.hidden.shape}; got {kernel}. Transpose a tied embedding."
            )
        if head.bias is not None and head.bias.shape != kernel[1:]:
            raise ValueError(
                f"{who}: {name}_bias must be of shape {kernel[1:]}; got "
                f"{head.bias.shape}. Flatten it."
            )
    if (
        s.hidden.shape[:-1] != t.hidden.shape[:-1]
        or s.kernel.shape[1] != (t.kernel.shape[1])
    ):
        raise ValueError(
            f"{who}: student and teacher must have the same examples and classes; got "
            f"hidden states {s.hidden.shape} and {t.hidden.shape}, kernels "
            f"{s.kernel.shape} and {t.kernel.shape}. Pad the smaller vocabulary, with "
            "-inf in the bias."
        )
    check_where(who, where, s.hidden.shape[:-1])


def _cut(
    who: str, classes: int, shards: int, chunk: int, divergence: Divergence
) -> Cut:
    if divergence not in ("forward", "reverse", "jensen_shannon"):
        raise ValueError(
            f"{who}: divergence must be 'forward', 'reverse' or 'jensen_shannon'; got "
            f"{divergence!r}."
        )
    if shards < 1 or classes % shards:
        raise ValueError(
            f"{who}: shards must divide the classes; got {shards} for {classes}. Use "
            "the size of the mesh axis that the kernels' class axis lies on."
        )
    if chunk < 1:
        raise ValueError(
            f"{who}: chunk must be 1 or more classes; got {chunk}. Some thousand keep "
            "a device busy."
        )
    return Cut(shards, min(chunk, classes // shards), divergence)
