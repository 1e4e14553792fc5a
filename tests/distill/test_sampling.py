"""Sampling from a student, with and without a cache, and mixing with data."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import distill
from jaxcompress.distill import Sampled

RNG = np.random.default_rng(0)
VOCABULARY, LENGTH = 7, 4
TABLE = (RNG.normal(size=(VOCABULARY, VOCABULARY)) * 2).astype(np.float32)
WAVES = np.sin(np.outer(np.arange(12), np.arange(VOCABULARY))).astype(np.float32)
PROMPTS = np.array([[1, 2, 3], [4, 0, 6]])
KEY = jax.random.key(3)


def model(table: Any, tokens: jax.Array) -> jax.Array:
    """Logits that depend on all tokens up to a position and on the position."""
    seen = jnp.cumsum(jnp.asarray(table)[tokens], axis=1)
    return seen + jnp.asarray(WAVES)[None, : tokens.shape[1]]


def step(table: Any, cache: Any, token: jax.Array, position: jax.Array) -> Any:
    """The same, one position at a time."""
    cache = cache + jnp.asarray(table)[token]
    return cache + jnp.asarray(WAVES)[position][None], cache


def greedy(prompt: list[int], positions: int) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < positions:
        at = len(tokens) - 1
        logits = TABLE.astype(np.float64)[tokens].sum(0)
        tokens.append(int(np.argmax(logits + np.sin(at * np.arange(VOCABULARY)))))
    return tokens


STATIC = ("length", "top_k", "end")
sample = jax.jit(
    lambda *args, **kw: distill.sample(model, TABLE, *args, **kw),
    static_argnames=STATIC,
)
cache = np.zeros((2, VOCABULARY), np.float32)
cached = jax.jit(
    lambda *args, **kw: distill.sample_with_cache(step, TABLE, cache, *args, **kw),
    static_argnames=STATIC,
)


@pytest.mark.parametrize("lengths", [None, [1, 2]])
def test_at_temperature_zero_the_likeliest_tokens_follow(lengths: Any) -> None:
    given = None if lengths is None else jnp.array(lengths)
    run = lambda f, *args: f(
        *args, PROMPTS, KEY, length=LENGTH, temperature=0, prompt_lengths=given
    )
    expected = [
        greedy(list(p[:n]), 3 + LENGTH)
        for p, n in zip(PROMPTS, lengths or [3, 3], strict=True)
    ]
    whole = jax.jit(lambda: run(distill.sample, model, TABLE))()
    stepped = jax.jit(lambda: run(distill.sample_with_cache, step, TABLE, cache))()
    for sampled in (whole, stepped):
        assert sampled.tokens.tolist() == expected
        assert sampled.tokens.dtype == jnp.int32
        written = [[i >= n for i in range(3 + LENGTH)] for n in lengths or [3, 3]]
        assert sampled.written.tolist() == written


def test_a_cache_changes_nothing_and_the_key_decides() -> None:
    first = sample(PROMPTS, KEY, length=LENGTH, temperature=0.7)
    again = cached(PROMPTS, KEY, length=LENGTH, temperature=0.7)
    other = sample(PROMPTS, jax.random.key(4), length=LENGTH, temperature=0.7)
    np.testing.assert_array_equal(first.tokens, again.tokens)
    np.testing.assert_array_equal(first.written, again.written)
    assert (first.tokens != other.tokens).any()
    np.testing.assert_array_equal(first.tokens[:, :3], PROMPTS)


@pytest.mark.parametrize("top_k", [None, 3])
def test_tokens_follow_the_softened_distribution(top_k: int | None) -> None:
    n, temperature = 20_000, 2.0
    prompts = np.full((n, 1), 5)
    sampled = sample(prompts, KEY, length=2, temperature=temperature, top_k=top_k)
    tokens = np.asarray(sampled.tokens)
    z = TABLE[5].astype(np.float64) / temperature
    p = np.exp(z - z.max())
    if top_k is not None:
        p[np.argsort(-p)[top_k:]] = 0
    p /= p.sum()
    counts = np.bincount(tokens[:, 1], minlength=VOCABULARY)
    error = 5 * np.sqrt(p * (1 - p) * n)
    assert (np.abs(counts - n * p) <= error).all()


def test_every_position_is_drawn_anew() -> None:
    even = lambda _, tokens: jnp.zeros((*tokens.shape, VOCABULARY))
    prompts = np.zeros((2000, 1), np.int32)
    sampled = jax.jit(lambda: distill.sample(even, None, prompts, KEY, length=2))()
    same = (sampled.tokens[:, 1] == sampled.tokens[:, 2]).mean()
    assert abs(float(same) - 1 / VOCABULARY) < 5 * np.sqrt(0.12 / 2000)


def test_nothing_counts_after_the_end_but_one_in_the_prompt() -> None:
    sampled = sample(np.full((64, 1), 2), KEY, length=8, temperature=3.0, end=2)
    tokens, written = np.asarray(sampled.tokens), np.asarray(sampled.written)
    ended = 0
    for row, mask in zip(tokens[:, 1:], written[:, 1:], strict=True):
        at = list(row).index(2) if 2 in row else len(row) - 1
        assert mask[: at + 1].all()
        assert not mask[at + 1 :].any()
        assert (row[at + 1 :] == 2).all()
        ended += at < len(row) - 1
    assert 10 < ended < 64
    assert not written[:, 0].any()


DATA = Sampled(jnp.zeros((2, 7), jnp.int32), jnp.ones((2, 7), jnp.bool_))
mixed = jax.jit(
    lambda key, fraction: distill.on_policy_or_data(
        lambda k: distill.sample(model, TABLE, PROMPTS, k, length=LENGTH),
        DATA,
        key,
        fraction=fraction,
    )
)


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_a_fraction_of_batches_is_the_students(fraction: float) -> None:
    keys = list(jax.random.split(KEY, 200))
    mine = [bool(mixed(k, fraction).tokens.any()) for k in keys]
    error = 4 * np.sqrt(fraction * (1 - fraction) / 200)
    assert abs(np.mean(mine) - fraction) <= error
    assert mine == [bool(mixed(k, fraction).tokens.any()) for k in keys]


def test_the_students_batch_is_new_for_every_key() -> None:
    batches = {mixed(k, 1.0).tokens.tobytes() for k in jax.random.split(KEY, 10)}
    assert len(batches) > 5


def test_the_loss_on_what_the_student_wrote() -> None:
    """GKD: teacher and student are compared where the student wrote, and only there."""
    sampled = cached(PROMPTS, KEY, length=LENGTH, temperature=1.0)

    def loss(table: Any) -> jax.Array:
        logits, taught = model(table, sampled.tokens), model(TABLE, sampled.tokens)
        where = sampled.written[:, 1:]
        loss = distill.soft_targets(
            logits[:, :-1], taught[:, :-1], temperature=1.0, where=where
        )
        assert loss.shape == (2, 6)
        return loss

    losses = jax.jit(loss)(TABLE.T)
    assert not np.asarray(losses)[:, :2].any()
    assert (np.asarray(losses[:, 2:]) > 1e-3).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": PROMPTS[0]}, r"prompts must be integers .*got int64\[3\]"),
        ({"prompts": PROMPTS * 1.0}, r"got float64\[2, 3\]"),
        ({"prompts": PROMPTS[:, :0]}, "Begin with a start token"),
        ({"length": 0}, "length must be at least 1; got 0"),
        ({"top_k": 0}, "top_k must be at least 1; got 0"),
        ({"temperature": -1.0}, "temperature must be positive"),
        ({"prompt_lengths": np.array([1, 4])}, "between 1 and 3"),
        ({"prompt_lengths": np.array([0, 1])}, "between 1 and 3"),
        ({"prompt_lengths": np.array([1])}, r"must be int\[2\]"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change: Any, message: str) -> None:
    settings = {"prompts": PROMPTS, "length": 2} | change
    with pytest.raises(ValueError, match=rf"distill\.sample: .*{message}"):
        distill.sample(model, TABLE, settings.pop("prompts"), KEY, **settings)


@pytest.mark.parametrize("fraction", [-0.1, 1.1])
def test_a_fraction_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match=rf"in \[0, 1\]; got {fraction}"):
        distill.on_policy_or_data(lambda _: DATA, DATA, KEY, fraction=fraction)


def test_batches_of_other_shapes_are_refused() -> None:
    wide = Sampled(jnp.zeros((2, 8), jnp.int32), jnp.ones((2, 8), jnp.bool_))
    with pytest.raises(ValueError, match=r"data's shapes.*\(2, 7\).*got .*\(2, 8\)"):
        distill.on_policy_or_data(lambda _: wide, DATA, KEY, fraction=0.5)
