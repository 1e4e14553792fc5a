"""E8 and E8P against all their points."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.codebook import E8P, lattice, lattice_weight, nearest_e8
from jaxcompress.codebook._e8 import decode, encode, magnitudes
from jaxcompress.lift import statistics


@functools.cache
def neighbours() -> np.ndarray:
    """The 240 + 2160 points of E8 that bound the cell around zero."""
    whole = np.array(list(itertools.product((-2, -1, 0, 1, 2), repeat=8)))
    halves = np.array(list(itertools.product((-1.5, -0.5, 0.5, 1.5), repeat=8)))
    points = np.concatenate([whole, halves])
    square = np.square(points).sum(1)
    return points[(points.sum(1) % 2 == 0) & (square > 0) & (square <= 4)]


def test_the_nearest_point_of_e8_is_one_and_none_is_nearer() -> None:
    assert len(neighbours()) == 240 + 2160
    x = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32) * 3
    p = np.asarray(nearest_e8(jnp.asarray(x)), np.float64)
    fraction = p - np.floor(p)
    assert ((fraction == 0).all(1) | (fraction == 0.5).all(1)).all()
    assert (p.sum(1) % 2 == 0).all()
    off = x - p
    others = np.square(off[:, None] - neighbours()[None]).sum(-1)
    assert (np.square(off).sum(1) <= others.min(1) + 1e-5).all()


@functools.cache
def every_point() -> np.ndarray:
    return np.asarray(decode(jnp.arange(2**16, dtype=jnp.uint16)))


def test_codes_name_65536_points_of_the_shifted_lattice() -> None:
    points = every_point()
    assert len(np.unique(points, axis=0)) == 2**16
    shift = np.where(np.arange(2**16) >> 15, -0.25, 0.25)[:, None]
    base = points - shift
    assert (base - np.floor(base) == 0.5).all()
    assert (base.sum(1) % 2 == 0).all()
    square = np.square(magnitudes()).sum(1)
    assert ((square <= 10).sum(), (square == 12).sum()) == (227, 29)


def test_codes_are_of_the_nearest_point() -> None:
    x = np.random.default_rng(1).normal(size=(60, 8)).astype(np.float32) * 1.3
    found = np.asarray(decode(encode(jnp.asarray(x))), np.float64)
    points = every_point().astype(np.float64)
    for v, p in zip(x.astype(np.float64), found, strict=True):
        best = np.square(points - v).sum(1).min()
        assert np.square(p - v).sum() <= best + 1e-5


def test_inside_the_table_it_is_the_nearest_point_of_the_lattice() -> None:
    x = jnp.asarray(np.random.default_rng(2).normal(size=(50, 8)) * 0.5, jnp.float32)
    half = jnp.float32(0.25)
    nearest = nearest_e8(x - half) + half
    wanted = jnp.square(nearest - x).sum(-1)
    got = jnp.square(decode(encode(x)) - x).sum(-1)
    # E8 + 1/4 holds both shifts of D8 + 1/2.
    np.testing.assert_allclose(got, wanted, atol=1e-5)


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(3).normal(size=shape), jnp.float32)


def test_normal_weights_lose_less_than_on_the_best_grid_of_2_bits() -> None:
    w = normal(256, 24) * jnp.asarray([0.1, 1.0, 10.0] * 8)[None]
    leaf = jc.compress({"w": w}, {"w": lattice()})["w"]
    relative = np.square(w - leaf.materialize()).sum(0) / np.square(w).sum(0)
    assert relative.mean() < 0.1
    assert relative.max() < 0.1175  # Lloyd-Max levels (Max, 1960).
    assert 8 * leaf.stored_bytes == 2 * w.size + 32 * 24


def test_zeros_and_cut_sub_vectors() -> None:
    w = normal(11, 4).at[:, 1].set(0.0)
    leaf = jc.compress({"w": w}, {"w": lattice()})["w"]
    dense = leaf.materialize()
    assert dense.shape == w.shape
    assert not dense[:, 1].any()
    assert jnp.square(dense - w).sum() < 0.3 * jnp.square(w).sum()


def test_feedback_lowers_the_output_error() -> None:
    rng = np.random.default_rng(4)
    x = rng.normal(size=(64, 24)) @ rng.normal(size=(24, 24))
    stats = statistics(jnp.asarray(x, jnp.float32), gram=True)
    w = normal(24, 16)
    error = lambda leaf: np.square(x @ np.asarray(w - leaf.materialize())).sum()
    plain = lattice_weight(w, E8P(), None)
    fed = lattice_weight(w, E8P(), stats)
    assert error(fed) < 0.9 * error(plain)
    assert (
        jnp.square(w - fed.materialize()).sum()
        > jnp.square(w - plain.materialize()).sum()
    )


def test_rotation_spreads_outliers() -> None:
    w = normal(64, 4) * jnp.where(jnp.arange(64)[:, None] % 16 == 0, 20.0, 1.0)
    error = lambda leaf: float(jnp.square(w - leaf.materialize()).sum())
    rotated = jc.quant.rotated_weight(
        w, E8P(), None, key=jax.random.key(0), base=lattice_weight
    )
    assert error(rotated) < 0.6 * error(lattice_weight(w, E8P(), None))


def test_errors_name_the_rule() -> None:
    with pytest.raises(ValueError, match="last axis of x must be of 8"):
        nearest_e8(jnp.zeros((2, 4)))
    with pytest.raises(ValueError, match="contracting axes of 'w'"):
        lattice().init({"w": normal(2, 8, 4)})
    with pytest.raises(ValueError, match="damping must not be negative"):
        lattice_weight(normal(8, 4), E8P(), None, damping=-1.0)
    specs = {"w": jax.sharding.PartitionSpec("d")}
    leaf = lattice_weight(normal(12, 4), E8P(), None)
    with pytest.raises(ValueError, match="sub-vectors of 8 cannot be cut"):
        leaf.component_specs(specs["w"] + (None,), {"d": 2})
    with pytest.raises(jc.OrderError):
        jc.chain(lattice(), jc.quant.int4()).init({"w": normal(8, 4)})
