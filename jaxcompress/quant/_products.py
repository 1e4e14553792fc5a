"""Attention's own products, of queries and keys, of probabilities and values."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp

from jaxcompress import tree
from jaxcompress.lift import _compat
from jaxcompress.lift._lift import results
from jaxcompress.lift._products import Key, Product, find_products
from jaxcompress.lift._trace import Trace, Tracer, refuse_closures
from jaxcompress.lift._tracked import track
from jaxcompress.lift._walk import Walker
from jaxcompress.quant._activations import (
    Activations,
    activation_scale,
    encode_activations,
    fake_quantize_activations,
)
from jaxcompress.quant._elements import Integer

P = ParamSpec("P")
R = TypeVar("R")

INT8 = Activations(element=Integer(bits=8))
Where = str | Callable[[str], bool]


def attention_products(
    fn: Callable[P, R],
    *,
    activations: Activations = INT8,
    where: Where = "**",
    params_argnum: int | None = 0,
    custom_vjp: Literal["error", "inline", "opaque"] = "error",
) -> Callable[P, R]:
    r"""`fn` with both operands quantized in the matmuls where no weight takes part.

    .. math:: x y \approx s_x s_y\, q_x q_y

    These are the matmuls with batch axes whose operands both depend on the data:
    queries by keys, probabilities by values. Integers multiply as int8 and sum in
    int32; an operand that is provably nonnegative, as softmax and relu make it, takes
    the unsigned range, with half the step. Gradients are straight-through. Other
    operations run as they were traced. Compressed leaves may be passed as to `lift`;
    a product with a leaf (a quantized cache) runs by the leaf's own rule.

    Args:
      fn: A forward function, as for `lift`; call the result under `jax.jit`, or
        apply `jax.grad` to it, not to what is inside.
      activations: Format of the operands, with a scale for each row along the
        contracted axes, or one a tensor; dynamic.
      where: Glob or predicate over named scopes (module names under Flax), joined by
        slashes: the products to quantize.
      params_argnum: Which positional argument is the parameters; None for none. What is
        computed from them and from constants alone counts as a weight.
      custom_vjp: What to do with a `jax.custom_vjp` around a product: raise, quantize
        inside it and differentiate through its body (``"inline"``), or leave it alone
        (``"opaque"``).

    Returns:
      A function of the same signature. The error of a product is at most
      :math:`\tfrac12 (s_x \|y\|_1 + s_y \|x\|_1 + \tfrac12 s_x s_y K)` an entry, `K`
      being the number of terms, for integers; products of zeros are exact zeros.

    Raises:
      ValueError: If `activations` is static; when called, if `where` matches nothing.
      LiftError: When called: a product inside a custom_vjp, and as `lift` does.

    Examples:
      >>> attend = lambda q, k: jnp.einsum("hqd,hkd->hqk", q, k)
      >>> x = jnp.array([[[0.5, -1.0], [0.25, 0.75]]])
      >>> rounded = attention_products(attend, params_argnum=None)(x, x)
      >>> bool(jnp.allclose(rounded, attend(x, x), atol=0.01))
      True

    References:
      Kim et al., `I-BERT <https://arxiv.org/abs/2101.01321>`_, 2021, section 3.1
      (integer attention); Bondarenko et al., `Understanding and Overcoming the
      Challenges of Efficient Transformer Quantization
      <https://arxiv.org/abs/2109.12948>`_, 2021, section 2 (asymmetric activations).
      Differs: scales are computed in the forward pass, one a row.
    """
    if activations.static:
        raise ValueError(
            "attention_products: there is no leaf to keep a calibrated scale in; use "
            f"dynamic(...); got {activations.label}."
        )
    tracer = Tracer(fn, who="attention_products")

    @functools.wraps(fn)
    def quantized(*args: P.args, **kwargs: P.kwargs) -> R:
        tracked = [track(a, arrays=False) for a in args]
        named = track(kwargs, arrays=False)
        signature, operands = tracer.signature(tuple(tracked), named)

        def make(trace: Trace) -> Any:
            refuse_closures(trace, operands, who="attention_products")
            data = _is_data(tracer, tracked, named, params_argnum)
            found = find_products(trace.jaxpr, data, custom_vjp=custom_vjp)
            walker = Walker(
                rewrites=_rewrites(found, activations, where),
                inline=True,
                custom_vjp=custom_vjp,
            )
            return trace, jax.jit(
                lambda values: results(walker.run(trace.jaxpr, values)[0], values)
            )

        trace, run = tracer(signature, make)
        return jax.tree.unflatten(trace.out_tree, run(operands))

    return quantized


def _is_data(
    tracer: Tracer, args: list[Any], kwargs: Any, params_argnum: int | None
) -> list[bool]:
    """For each operand of the program, whether it is data."""
    counts = [len(tracer.signature((a,), {})[1]) for a in args]
    flags = [[i != params_argnum] * n for i, n in enumerate(counts)]
    flags.append([True] * len(tracer.signature((), kwargs)[1]))
    return [flag for part in flags for flag in part]


def _rewrites(
    found: dict[Key, Product], activations: Activations, where: Where
) -> dict[Key, Callable[[Any, list[Any]], list[Any]]]:
    """What to run instead of each product that `where` chooses."""
    chooses = (
        functools.partial(tree.matches, where) if isinstance(where, str) else where
    )
    chosen = {key: p for key, p in found.items() if chooses(p.where)}
    if not chosen:
        scopes = sorted({p.where for p in found.values()})
        raise ValueError(
            f"attention_products: where={where!r} matches none of the scopes {scopes}."
            if found
            else "attention_products: the function has no matmul with batch axes of "
            "two operands that depend on the data; see params_argnum."
        )
    return {
        key: functools.partial(_product, activations=activations, product=product)
        for key, product in chosen.items()
    }


class Operand(NamedTuple):
    """How one operand is quantized.

    Attributes:
      scheme: Its format.
      axes: Its contracted axes.
      offset: What is taken from its codes so that they fit into int8.
    """

    scheme: Activations
    axes: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, activations: Activations, axes: Any, nonnegative: bool) -> Operand:
        """Unsigned where the operand is nonnegative and the format has two forms."""
        element, offset = activations.element, 0
        if nonnegative and isinstance(element, Integer) and not element.fraction:
            element = dataclasses.replace(element, symmetric=False, narrow=False)
            offset = 2 ** (element.bits - 1)
        scheme = dataclasses.replace(activations, element=element)
        return cls(scheme, tuple(axes), offset)

    @property
    def whole(self) -> bool:
        """Whether codes less the offset are int8 numbers without a zero point."""
        element = self.scheme.element
        return isinstance(element, Integer) and (
            self.offset > 0 or (element.symmetric and element.fraction == 0)
        )

    def fake(self, x: jax.Array) -> jax.Array:
        """Rounded values, with a straight-through gradient."""
        return fake_quantize_activations(x, self.scheme, axes=self.axes)

    def codes(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """int8 codes less the offset; scales, of size one along contracted axes."""
        x = x.astype(jnp.float32)
        scale, _ = activation_scale(x, self.scheme, self.axes)
        codes = encode_activations(x, scale, None, self.scheme.element)
        return (codes - self.offset).astype(jnp.int8), scale


def _product(
    eqn: Any, values: list[Any], *, activations: Activations, product: Product
) -> list[jax.Array]:
    """One product; as integers where its sums fit into int32."""
    contract, _ = eqn.params["dimension_numbers"]
    pair = [
        Operand.of(activations, axes, nonnegative)
        for axes, nonnegative in zip(contract, product.nonnegative, strict=True)
    ]

    def reference(x: jax.Array, y: jax.Array) -> jax.Array:
        return _compat.bind(eqn, [pair[0].fake(x), pair[1].fake(y)])[0]

    @jax.custom_jvp
    def run(x: jax.Array, y: jax.Array) -> jax.Array:
        return _integer_product(eqn, pair, x, y)

    @run.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        return run(*primals), jax.jvp(reference, primals, tangents)[1]

    largest = math.prod(values[0].shape[a] for a in contract[0]) * math.prod(
        max(map(abs, p.scheme.element.range)) for p in pair
    )
    if all(p.whole for p in pair) and largest < 2**31:
        return [run(*values)]
    return [reference(*values)]


def _integer_product(
    eqn: Any, pair: list[Operand], x: jax.Array, y: jax.Array
) -> jax.Array:
    numbers = eqn.params["dimension_numbers"]
    (a, a_scale), (b, b_scale) = pair[0].codes(x), pair[1].codes(y)
    sums = jax.lax.dot_general(a, b, numbers, preferred_element_type=jnp.int32)
    left, right = pair[0].offset, pair[1].offset
    if right:
        sums = sums + right * _aligned(_totals(a, pair[0]), numbers, 0, b.ndim)
    if left:
        sums = sums + left * _aligned(_totals(b, pair[1]), numbers, 1, a.ndim)
    terms = math.prod(a.shape[i] for i in pair[0].axes)
    scale = _aligned(a_scale, numbers, 0, b.ndim) * _aligned(
        b_scale, numbers, 1, a.ndim
    )
    value = (sums + left * right * terms).astype(jnp.float32) * scale
    return value.astype(eqn.outvars[0].aval.dtype)


def _totals(codes: jax.Array, operand: Operand) -> jax.Array:
    return codes.astype(jnp.int32).sum(operand.axes, keepdims=True)


def _aligned(a: jax.Array, numbers: Any, side: int, other_ndim: int) -> jax.Array:
    """An operand of size one along contracted axes, with the axes of the result."""
    contract, batch = numbers[0][side], numbers[1][side]
    free = [i for i in range(a.ndim) if i not in contract and i not in batch]
    ones = (1,) * (other_ndim - len(contract) - len(batch))
    lead, own = [a.shape[i] for i in batch], [a.shape[i] for i in free]
    a = jnp.transpose(a, (*batch, *free, *contract))
    return a.reshape(*lead, *own, *ones) if side == 0 else a.reshape(*lead, *ones, *own)
