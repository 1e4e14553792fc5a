"""Calibration statistics against NumPy sums over the inputs seen by each matmul."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from jaxcompress.lift import Statistics
from jaxcompress.lift._tracked import LiftError
from tests.lift.disguise import disguise
from tests.lift.programs import PROGRAMS, mesh, normal


def oracle(rows: np.ndarray) -> dict[str, np.ndarray]:
    """Statistics of ``rows[n, K]`` in float64."""
    rows = np.asarray(rows, np.float64)
    return {
        "count": np.float64(len(rows)),
        "absmax": np.abs(rows).max(0),
        "mean": rows.mean(0),
        "second_moment": (rows**2).mean(0),
        "gram": rows.T @ rows,
    }


def assert_statistics(actual: Statistics, expected: dict[str, np.ndarray]) -> None:
    for name, value in expected.items():
        np.testing.assert_allclose(
            getattr(actual, name), value, rtol=1e-5, atol=1e-5, err_msg=name
        )


def stack(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.stack([p[name] for p in parts]) for name in parts[0]}


def test_dense_layers_over_two_batches() -> None:
    params = {"a": normal(0, 8, 6), "b": normal(1, 6, 4)}
    fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]
    batches = [normal(2, 5, 8), (normal(3, 2, 8),)]
    stats = jc.calibrate(fn, params, batches, gram=True)
    x = np.concatenate([np.asarray(batches[0]), np.asarray(batches[1][0])])
    assert list(stats) == ["a", "b"]
    assert_statistics(stats["a"], oracle(x))
    assert_statistics(stats["b"], oracle(np.tanh(x @ np.asarray(params["a"]))))


def test_scanned_layers_are_stacked() -> None:
    params = {"w": normal(0, 3, 8, 8)}
    fn = lambda p, x: lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["w"])[0]
    x = normal(1, 5, 8)
    stats = jc.calibrate(fn, params, [x], gram=True)["w"]
    inputs, h = [], np.asarray(x, np.float64)
    for w in np.asarray(params["w"], np.float64):
        inputs.append(h)
        h = np.tanh(h @ w)
    assert stats.gram is not None
    assert stats.gram.shape == (3, 8, 8)
    assert_statistics(stats, stack([oracle(i) for i in inputs]))


def test_a_weight_shared_by_scan_steps_sees_all_of_them() -> None:
    params = {"w": normal(0, 8, 8)}
    step = lambda p: lambda c, _: (jnp.tanh(c @ p["w"]), None)
    fn = lambda p, x: lax.scan(step(p), x, length=3)[0]
    x = normal(1, 5, 8)
    stats = jc.calibrate(fn, params, [x])["w"]
    inputs, h = [], np.asarray(x, np.float64)
    for _ in range(3):
        inputs.append(h)
        h = np.tanh(h @ np.asarray(params["w"], np.float64))
    expected = oracle(np.concatenate(inputs))
    del expected["gram"]
    assert stats.gram is None
    assert_statistics(stats, expected)


def test_contracting_axes_follow_the_weight() -> None:
    params = {"w": normal(0, 2, 4, 6)}
    fn = lambda p, x: jnp.einsum("bdh,hdo->bo", x, p["w"])
    x = normal(1, 5, 4, 2)
    stats = jc.calibrate(fn, params, [x], gram=True)["w"]
    assert_statistics(stats, oracle(np.asarray(x).transpose(0, 2, 1).reshape(5, 8)))


def test_experts_have_their_own() -> None:
    fn, params, (x,) = PROGRAMS["experts_batched"]()
    stats = jc.calibrate(fn, params, [x], gram=True)["w"]
    assert_statistics(stats, stack([oracle(rows) for rows in np.asarray(x)]))


def test_ragged_experts_and_one_without_tokens() -> None:
    fn, params, (x, sizes) = PROGRAMS["ragged_dot"]()
    stats = jc.calibrate(fn, params, [(x, sizes)], gram=True)["w"]
    np.testing.assert_array_equal(stats.count, [2, 0, 5])
    for group, rows in ((0, x[:2]), (2, x[2:])):
        assert_statistics(jax.tree.map(lambda a, g=group: a[g], stats), oracle(rows))
    assert not np.asarray(stats.absmax[1]).any()
    assert not np.asarray(stats.mean[1]).any()


@pytest.mark.parametrize("groups", [1, 2])
def test_convolution_patches(groups: int) -> None:
    x, w = normal(0, 2, 5, 5, 4), normal(1, 3, 3, 4 // groups, 6)
    fn = lambda p, x: lax.conv_general_dilated(
        x,
        p["w"],
        (2, 2),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )
    stats = jc.calibrate(fn, {"w": w}, [x], gram=True)["w"]
    a, width = np.asarray(x), 4 // groups
    rows = [
        a[n, i : i + 3, j : j + 3, g * width : (g + 1) * width].reshape(-1)
        for n in range(2)
        for i in (0, 2)
        for j in (0, 2)
        for g in range(groups)
    ]
    assert_statistics(stats, oracle(np.stack(rows)))
    if groups == 1:  # The Gram matrix predicts the size of the layer's output.
        flat = np.asarray(w, np.float64).reshape(-1, 6)
        assert stats.gram is not None
        energy = np.trace(flat.T @ np.asarray(stats.gram, np.float64) @ flat)
        np.testing.assert_allclose(
            energy, np.square(np.asarray(fn({"w": w}, x), np.float64)).sum(), rtol=1e-4
        )


def test_cond_counts_the_branch_taken() -> None:
    fn, params, (x, _) = PROGRAMS["cond"]()
    batches = [(x, jnp.array(1)), (x, jnp.array(0)), (x, jnp.array(1))]
    assert float(jc.calibrate(fn, params, batches)["w"].count) == 6.0


@pytest.mark.parametrize(
    "name", ["linen_attention", "linen_scan_of_remat", "nnx_split_merge", "custom_jvp"]
)
def test_every_matmul_is_seen(name: str) -> None:
    fn, params, args = PROGRAMS[name]()
    stats = jc.calibrate(fn, params, [args], where=jc.where("**", exclude="**bias"))
    kernels = {p for p in jc.tree.flatten(params)[0] if not p.endswith("bias")}
    assert set(stats) == kernels
    assert all(float(s.count.min()) > 0 for s in stats.values())


def test_compressed_leaves_are_calibrated_too() -> None:
    fn, params, args = PROGRAMS["plain_function"]()
    dense, packed = (jc.calibrate(fn, p, [args]) for p in (params, disguise(params)))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), dense, packed
    )


def test_sharded_batches_give_the_same_statistics() -> None:
    fn, params, _ = PROGRAMS["plain_function"]()
    x = normal(3, 16, 8)
    placed = jax.device_put(x, NamedSharding(mesh(), P("d")))
    one, many = (jc.calibrate(fn, params, [a], gram=True) for a in (x, placed))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), one, many
    )


def test_errors() -> None:
    fn, params, args = PROGRAMS["while_loop"]()
    with pytest.raises(LiftError, match="'w' is used inside a while loop"):
        jc.calibrate(fn, params, [args])
    fn, params, args = PROGRAMS["shard_map_psum"]()
    with pytest.raises(LiftError, match="'w' is used inside shard_map"):
        jc.calibrate(fn, params, [args])
    fn, params, args = PROGRAMS["plain_function"]()
    with pytest.raises(ValueError, match="batches is empty"):
        jc.calibrate(fn, params, [])
    with pytest.raises(ValueError, match="matches nothing"):
        jc.calibrate(fn, params, [args], where="kernel")

    def by_size(p: Any, x: jax.Array) -> jax.Array:
        return x @ (p["w"] if x.shape[0] > 2 else p["w"].T)

    batches = [normal(0, 3, 4), normal(1, 2, 6)]
    with pytest.raises(
        ValueError, match=r"batch 1 gives 'w' statistics of shape \(6,\)"
    ):
        jc.calibrate(by_size, {"w": normal(2, 4, 6)}, batches)
