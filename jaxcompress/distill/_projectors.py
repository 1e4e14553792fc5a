"""Maps from the student's features to the teacher's, trained with the student."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Params = Any
Size = int | jax.Array | jax.ShapeDtypeStruct
"""A number of features, or an example whose last axis has them."""


class Projector(NamedTuple):
    """Two pure functions; the params belong among the student's.

    Attributes:
      init: ``key -> params``, a small tree of ``float32`` arrays.
      apply: ``(params, float[..., student features]) -> float32[..., teacher
        features]``.
    """

    init: Callable[[jax.Array], Params]
    apply: Callable[[Params, jax.Array], jax.Array]


def linear_projector(
    student: Size, teacher: Size, *, bias: bool = True, layer_norm: bool = False
) -> Projector:
    r"""An affine map of the last axis, which for images is a 1x1 convolution.

    .. math:: x W + b

    Args:
      student: Number of the student's features, or an example of them.
      teacher: The same of the teacher.
      bias: Whether there is a :math:`b`, zero at the start.
      layer_norm: Whether the result is normalized over its features, with a trained
        scale and offset, as the hidden states of most transformers are.

    Returns:
      A projector, whose kernel starts as random normal of variance ``1 / inputs``.
      It multiplies in the dtype of its input, accumulates in ``float32``.

    Raises:
      ValueError: If a size is below 1; from ``apply``, if the input is of another size.

    Examples:
      >>> projector = linear_projector(2, 3)
      >>> params = projector.init(jax.random.key(0))
      >>> jax.tree.map(jnp.shape, params)
      {'linear': {'bias': (3,), 'kernel': (2, 3)}}
      >>> projector.apply(params, jnp.ones((5, 2))).shape
      (5, 3)

    References:
      Romero et al., `FitNets <https://arxiv.org/abs/1412.6550>`_, 2015, section 2.2
      (the regressor).
    """
    who = "distill.linear_projector"
    sizes = _size(who, "student", student), _size(who, "teacher", teacher)

    def init(key: jax.Array) -> Params:
        params = {"linear": _init_linear(key, *sizes, bias)}
        if layer_norm:
            params["norm"] = _init_norm(sizes[1])
        return params

    def apply(params: Params, x: jax.Array) -> jax.Array:
        y = _linear(who, params["linear"], x)
        return _layer_norm(params["norm"], y) if layer_norm else y

    return Projector(init, apply)


def mlp_projector(
    student: Size,
    teacher: Size,
    *,
    hidden: Sequence[int] | None = None,
    activation: Callable[[jax.Array], jax.Array] = jax.nn.relu,
    layer_norm: bool = False,
) -> Projector:
    r"""Affine maps of the last axis with nonlinearities between them.

    Args:
      student: Number of the student's features, or an example of them.
      teacher: The same of the teacher.
      hidden: Sizes of the hidden layers; by default one, of the teacher's size.
      activation: Applied to each hidden layer.
      layer_norm: As for `linear_projector`, of the result.

    Returns:
      A projector.

    Raises:
      ValueError: As for `linear_projector`.

    Examples:
      >>> projector = mlp_projector(2, 3, hidden=(4,))
      >>> sorted(projector.init(jax.random.key(0)))
      ['linear_0', 'linear_1']

    References:
      Ahn et al., `Variational Information Distillation
      <https://arxiv.org/abs/1904.05835>`_, 2019, section 2 (two hidden layers).
    """
    who = "distill.mlp_projector"
    first, last = _size(who, "student", student), _size(who, "teacher", teacher)
    between = [last] if hidden is None else [_size(who, "hidden", n) for n in hidden]
    sizes = list(itertools.pairwise([first, *between, last]))

    def init(key: jax.Array) -> Params:
        keys = jax.random.split(key, len(sizes))
        params = {
            f"linear_{i}": _init_linear(keys[i], *size, bias=True)
            for i, size in enumerate(sizes)
        }
        if layer_norm:
            params["norm"] = _init_norm(last)
        return params

    def apply(params: Params, x: jax.Array) -> jax.Array:
        dtype = x.dtype
        for i in range(len(sizes)):
            x = _linear(who, params[f"linear_{i}"], x.astype(dtype))
            x = activation(x) if i < len(sizes) - 1 else x
        return _layer_norm(params["norm"], x) if layer_norm else x

    return Projector(init, apply)


def convolution_projector(
    student: jax.Array | jax.ShapeDtypeStruct,
    teacher: jax.Array | jax.ShapeDtypeStruct,
) -> Projector:
    r"""A convolution that brings a student's larger map to the size of the teacher's.

    .. math:: k = N_s - N_t + 1

    is the size of its window along an axis of :math:`N_s` student and :math:`N_t`
    teacher positions, without padding.

    Args:
      student: Example of the student's map, ``[..., height, width, channels]``.
      teacher: The same of the teacher, at most as high and wide.

    Returns:
      A projector, for maps of the example's height and width.

    Raises:
      ValueError: If a map has fewer than three axes, or the teacher's is larger.

    Examples:
      >>> s, t = jnp.zeros((1, 6, 6, 2)), jnp.zeros((1, 4, 4, 3))
      >>> projector = convolution_projector(s, t)
      >>> params = projector.init(jax.random.key(0))
      >>> params["convolution"]["kernel"].shape, projector.apply(params, s).shape
      ((3, 3, 2, 3), (1, 4, 4, 3))

    References:
      Romero et al., `FitNets <https://arxiv.org/abs/1412.6550>`_, 2015, section 2.2
      (the convolutional regressor).
    """
    who = "distill.convolution_projector"
    s, t = student.shape[-3:], teacher.shape[-3:]
    if len(s) < 3 or len(t) < 3 or t[0] > s[0] or t[1] > s[1]:
        raise ValueError(
            f"{who}: student and teacher must be maps [..., height, width, channels], "
            f"the teacher's at most as large; got {student.shape} and {teacher.shape}. "
            "Resize the student's with jax.image.resize, then use linear_projector."
        )
    window = (s[0] - t[0] + 1, s[1] - t[1] + 1)

    def init(key: jax.Array) -> Params:
        shape = (*window, s[2], t[2])
        kernel = jax.nn.initializers.lecun_normal()(key, shape, jnp.float32)
        return {"convolution": {"kernel": kernel, "bias": jnp.zeros(t[2], jnp.float32)}}

    def apply(params: Params, x: jax.Array) -> jax.Array:
        kernel, bias = params["convolution"]["kernel"], params["convolution"]["bias"]
        _check_input(who, jnp.shape(x)[-3:], s)
        y = jax.lax.conv_general_dilated(
            x.reshape(-1, *s),
            kernel.astype(x.dtype),
            window_strides=(1, 1),
            padding="VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        y = y.astype(jnp.float32) + bias.reshape(1, 1, 1, -1)
        return y.reshape(*x.shape[:-3], *y.shape[1:])

    return Projector(init, apply)


def _size(who: str, argument: str, size: Size) -> int:
    found = size if isinstance(size, int) else (*size.shape, 0)[-2 if size.shape else 0]
    if found < 1:
        raise ValueError(
            f"{who}: {argument} must be 1 or more features, or an example with them on "
            f"its last axis; got {found}."
        )
    return found


def _init_linear(key: jax.Array, size: int, out: int, bias: bool) -> Params:
    kernel = jax.nn.initializers.lecun_normal()(key, (size, out), jnp.float32)
    return {"kernel": kernel} | ({"bias": jnp.zeros(out, jnp.float32)} if bias else {})


def _linear(who: str, params: Params, x: jax.Array) -> jax.Array:
    kernel = params["kernel"]
    _check_input(who, jnp.shape(x)[-1:], kernel.shape[:1])
    y = jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)
    if "bias" in params:
        y = y + jnp.broadcast_to(params["bias"], y.shape)
    return y


def _init_norm(size: int) -> Params:
    return {"scale": jnp.ones(size, jnp.float32), "bias": jnp.zeros(size, jnp.float32)}


def _layer_norm(params: Params, x: jax.Array) -> jax.Array:
    x = jax.nn.standardize(x, axis=-1, epsilon=1e-6)
    scale, bias = (
        jnp.broadcast_to(params[name], x.shape) for name in ("scale", "bias")
    )
    return x * scale + bias


def _check_input(who: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise ValueError(
            f"{who}: apply got features of size {found}, but its params are for size "
            f"{expected}. Make the projector from an example of these features."
        )
