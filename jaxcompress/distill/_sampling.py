"""Sequences that the student writes itself, to be taught on its own mistakes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ._logits import check_positive

Step = Callable[[Any, Any, jax.Array, jax.Array], tuple[jax.Array, Any]]
"""``(params, cache, int32[batch] tokens, int32 position) -> (logits, cache)``."""


class Sampled(NamedTuple):
    """Token sequences, and who wrote what.

    The logits at a position predict the next token, so a loss takes
    ``logits[:, :-1]`` and ``where=sampled.written[:, 1:]``.

    Attributes:
      tokens: ``int32[batch, positions]``.
      written: ``bool[batch, positions]``: of the student's own (or, for a data batch,
        of the answer): no prompt, and nothing after the end.
    """

    tokens: jax.Array
    written: jax.Array


def sample(
    fn: Callable[[Any, jax.Array], jax.Array],
    params: Any,
    prompts: jax.Array,
    key: jax.Array,
    *,
    length: int,
    temperature: float | jax.Array = 1.0,
    top_k: int | None = None,
    prompt_lengths: jax.Array | None = None,
    end: int | None = None,
) -> Sampled:
    """Let a language model go on from prompts, by running it anew for every token.

    For a model with a cache see `sample_with_cache`, which takes one position a step.

    Args:
      fn: From params and ``int32[batch, positions]`` to logits
        ``float[batch, positions, vocabulary]``; causal, since what follows a position
        is filled with zeros.
      params: Of the student.
      prompts: ``int[batch, prompt]``.
      key: Consumed. The same key gives the same tokens.
      length: Tokens to add to `prompts`. Static.
      temperature: Positive, traced or not; or the number 0, for the likeliest token.
      top_k: Draw from this many of the likeliest tokens only. Static.
      prompt_lengths: ``int[batch]``, if prompts are shorter than `prompts` is wide;
        the student's tokens begin there.
      end: Token after which nothing counts; the rest is filled with it. Static.

    Returns:
      ``prompt + length`` positions each. Pure, and may be jitted; tokens carry no
      gradient.

    Raises:
      ValueError: If `prompts` are not a matrix of integers, or a setting is out of
        range.

    Examples:
      >>> successor = lambda _, tokens: 50.0 * jax.nn.one_hot(tokens + 1, 8)
      >>> key, prompts = jax.random.key(0), jnp.array([[2, 3]])
      >>> sample(successor, None, prompts, key, length=3, temperature=0).tokens.tolist()
      [[2, 3, 4, 5, 6]]
    """
    how = _How(length, temperature, top_k, prompt_lengths, end)
    _check("distill.sample", prompts, how)

    def step(
        params: Any, tokens: jax.Array, token: jax.Array, position: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        tokens = tokens.at[:, position].set(token)
        return fn(params, tokens)[:, position], tokens

    begin = prompts.shape[1] - 1 if prompt_lengths is None else 0
    return _run(step, params, _padded(prompts, length), prompts, key, how, begin)


def sample_with_cache(
    step: Step,
    params: Any,
    cache: Any,
    prompts: jax.Array,
    key: jax.Array,
    *,
    length: int,
    temperature: float | jax.Array = 1.0,
    top_k: int | None = None,
    prompt_lengths: jax.Array | None = None,
    end: int | None = None,
) -> Sampled:
    """As `sample`, for a model that keeps what it needs of earlier positions.

    Args:
      step: From params, cache, ``int32[batch]`` tokens and their ``int32`` position
        to logits ``float[batch, vocabulary]`` of the next token and the new cache.
        Called for every position from 0 on, those of the prompts included.
      params: Of the student.
      cache: Any pytree, empty, with room for ``prompt + length - 1`` positions.
      prompts: As for `sample`, as all that follows.
      key: Consumed.
      length: Static.
      temperature: Positive or the number 0.
      top_k: Static.
      prompt_lengths: ``int[batch]``.
      end: Static.

    Returns:
      The tokens that `sample` gives for a model of the same logits.

    Raises:
      ValueError: As `sample`.
    """
    how = _How(length, temperature, top_k, prompt_lengths, end)
    _check("distill.sample_with_cache", prompts, how)
    return _run(step, params, cache, prompts, key, how, 0)


class _How(NamedTuple):
    length: int
    temperature: float | jax.Array
    top_k: int | None
    prompt_lengths: jax.Array | None
    end: int | None


def _run(
    step: Step,
    params: Any,
    cache: Any,
    prompts: jax.Array,
    key: jax.Array,
    how: _How,
    begin: int,
) -> Sampled:
    """Go through the positions from `begin` on."""
    tokens = _padded(prompts, how.length)
    batch, positions = tokens.shape
    prompt = prompts.shape[1] if how.prompt_lengths is None else how.prompt_lengths
    prompt = jnp.broadcast_to(jnp.asarray(prompt, jnp.int32), batch)

    def body(carry: Any, position: jax.Array) -> tuple[Any, jax.Array]:
        tokens, cache, ended = carry
        logits, cache = step(params, cache, tokens[:, position], position)
        new = _draw(logits, jax.random.fold_in(key, position), how)
        written = (position + 1 >= prompt) & ~ended
        if how.end is not None:
            new = jnp.where(ended, jnp.int32(how.end), new)
            ended |= written & (new == how.end)
        kept = jnp.where(position + 1 < prompt, tokens[:, position + 1], new)
        return (tokens.at[:, position + 1].set(kept), cache, ended), written

    ended = jnp.zeros(batch, jnp.bool_)
    steps = jnp.arange(begin, positions - 1, dtype=jnp.int32)
    (tokens, _, _), written = jax.lax.scan(body, (tokens, cache, ended), steps)
    return Sampled(tokens, jnp.pad(written.T, ((0, 0), (begin + 1, 0))))


def _draw(logits: jax.Array, key: jax.Array, how: _How) -> jax.Array:
    """``int32[batch]``, the next tokens."""
    if not isinstance(how.temperature, jax.Array) and how.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    z = logits.astype(jnp.float32) / jnp.asarray(how.temperature, jnp.float32)
    if how.top_k is None:
        return jax.random.categorical(key, z).astype(jnp.int32)
    z, tokens = jax.lax.top_k(z, how.top_k)
    chosen = jax.random.categorical(key, z)[..., None]
    return jnp.take_along_axis(tokens, chosen, axis=-1)[..., 0].astype(jnp.int32)


def _padded(prompts: jax.Array, length: int) -> jax.Array:
    return jnp.pad(jnp.asarray(prompts).astype(jnp.int32), ((0, 0), (0, length)))


def _check(who: str, prompts: jax.Array, how: _How) -> None:
    if (
        prompts.ndim != 2
        or prompts.shape[1] < 1
        or not jnp.issubdtype(prompts.dtype, jnp.integer)
    ):
        raise ValueError(
            f"{who}: prompts must be integers [batch, prompt] with one token or more "
            f"each; got {prompts.dtype}{list(prompts.shape)}. Begin with a start token."
        )
    for name, value in {"length": how.length, "top_k": how.top_k}.items():
        if value is not None and value < 1:
            raise ValueError(f"{who}: {name} must be at least 1; got {value}.")
    if isinstance(how.temperature, jax.Array) or how.temperature != 0:
        check_positive(who, "temperature", how.temperature)
    _check_lengths(who, prompts, how.prompt_lengths)


def _check_lengths(who: str, prompts: jax.Array, lengths: jax.Array | None) -> None:
    if lengths is None:
        return
    batch, widest = prompts.shape
    fits = lengths.shape == (batch,)
    if fits and not isinstance(lengths, Tracer):
        known = np.asarray(lengths)
        fits = bool(((known >= 1) & (known <= widest)).all())
    if not fits:
        raise ValueError(
            f"{who}: prompt_lengths must be int[{batch}] between 1 and {widest}, the "
            f"width of prompts; got {lengths}. Count no padding."
        )
