"""Fitted buckets: means with signs, what comes back, what is weighted."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import hashing as h
from tests.hashing.oracle import places
from tests.hashing.test_array import FORMS, draw
from tests.jitted import run


@pytest.mark.parametrize("form", ["elements", "blocks", "robe", "grows"])
def test_buckets_are_signed_means(form: str) -> None:
    w, hashing = draw(0, 20, 12), FORMS[form]
    leaf = h.fit_hashed(w, ratio=6.0, hashing=hashing)
    at, sign = places(hashing, 40, 12, 20)
    total, load = np.zeros(40), np.zeros(40)
    np.add.at(total, at, sign * np.float64(w).T)
    np.add.at(load, at, 1)
    wanted = total / np.maximum(load, 1)
    np.testing.assert_allclose(leaf.buckets, wanted, rtol=1e-6, atol=1e-7)
    assert (np.asarray(leaf.buckets)[load == 0] == 0).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_shared_weights_come_back_bit_for_bit(scale: float, dtype: Any) -> None:
    w = (draw(1, 2, 48, 32) * scale).astype(dtype)
    fit = lambda w: h.fit_hashed(w, ratio=16.0, axes=-2)
    once = fit(w)
    np.testing.assert_array_equal(fit(once.materialize()).buckets, once.buckets)
    assert once.buckets.dtype == dtype


def test_importance_moves_the_means_and_lowers_the_weighted_error() -> None:
    w, g = draw(2, 24, 16), jnp.square(draw(3, 24, 16))
    g = g.at[0].set(0.0)
    fits = [h.fit_hashed(w, ratio=8.0, importance=i) for i in (None, g)]
    at, sign = places(h.Hashing(), 48, 16, 24)
    total, load = np.zeros(48), np.zeros(48)
    np.add.at(total, at, sign * np.float64(w * g).T)
    np.add.at(load, at, np.float64(g).T)
    some = load > 0
    wanted = total / np.where(some, load, 1)
    found = np.asarray(fits[1].buckets)
    np.testing.assert_allclose(found[some], wanted[some], rtol=1e-4, atol=1e-6)
    error = lambda found: (g * jnp.square(w - found.materialize())).sum()
    plain, weighted = (run(error, found) for found in fits)
    assert weighted < 0.95 * plain


def test_buckets_without_importance_take_the_mean() -> None:
    w = draw(4, 6, 6)
    plain = h.fit_hashed(w, ratio=4.0)
    none = h.fit_hashed(w, ratio=4.0, importance=jnp.zeros_like(w))
    np.testing.assert_array_equal(none.buckets, plain.buckets)


BAD: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "ratio": (ValueError, "ratio is of weights to buckets", {"ratio": 0.5}),
    "nan": (ValueError, "ratio is of weights", {"ratio": float("nan")}),
    "kind": (TypeError, "real floating", {"w": jnp.ones((4, 4), jnp.int32)}),
    "axes": (ValueError, "cannot be told from its rank", {"w": jnp.ones((2, 4, 4))}),
    "block": (ValueError, "not be wider", {"hashing": h.Hashing((1, 5))}),
    "empty": (ValueError, "must be positive", {"hashing": h.Hashing((0, 1))}),
    "seed": (ValueError, "of 32 bits", {"hashing": h.Hashing(seed=-1)}),
    "grows": (
        ValueError,
        "each weight apart",
        {"hashing": h.Hashing((1, 2), linear=True)},
    ),
    "shape": (ValueError, "of the shape of 'w'", {"importance": jnp.ones((4, 1))}),
}


@pytest.mark.parametrize(("error", "message", "change"), BAD.values(), ids=BAD)
def test_what_is_refused(
    error: type[Exception], message: str, change: dict[str, Any]
) -> None:
    given: dict[str, Any] = {"w": jnp.ones((4, 4)), "ratio": 2.0, **change}
    with pytest.raises(error, match=f"fit_hashed.*{message}"):
        h.fit_hashed(given.pop("w"), **given)
