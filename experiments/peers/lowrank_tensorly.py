"""Tucker-2, CP and tensor trains beside tensorly: errors at the same ranks.

    python -m experiments.peers.lowrank_tensorly  # pip install --no-deps tensorly

Relative errors |W - W'| / |W| of kernels 3x3x48x64 and, for trains, of a table of
4096x64. Both are sums of outer products of falling size, with noise.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import functools
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorly
from tensorly.decomposition import parafac, partial_tucker, tensor_train

import jaxcompress as jc
from experiments.peers.measure import relative

RESULTS = Path(__file__).with_suffix(".json")
SEEDS = (0, 1)
KERNEL, CONV = (3, 3, 48, 64), (-4, -3, -2)
RANKS, TERMS, ROUNDS = ((12, 16), (24, 32)), (16, 64), 100
ROWS, COLUMNS, TRAIN_RANKS = (16, 16, 16), (4, 4, 4), (8, 32)


def drawn(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """A sum of outer products of falling size, and noise."""
    rng = np.random.default_rng(seed)
    factors = [rng.normal(size=(n, 60)) for n in shape]
    sizes = 0.9 ** np.arange(60)
    letters = "abcdefg"[: len(shape)]
    terms = ",".join(f"{letter}z" for letter in letters)
    w = np.einsum(f"{terms},z->{letters}", *factors, sizes)
    return (w + 0.3 * w.std() * rng.normal(size=shape)).astype(np.float32)


def ours(scheme: jc.Transform, w: np.ndarray) -> float:
    leaf = jax.jit(lambda w: scheme.init({"w": w})[0]["w"])(jnp.asarray(w))
    return relative(np.asarray(leaf.materialize()), w)


def of_kernels(seed: int) -> list[dict[str, Any]]:
    w = drawn(KERNEL, seed)
    found = []
    for p, q in RANKS:
        (core, factors), _ = partial_tucker(
            w, rank=[p, q], modes=[2, 3], n_iter_max=ROUNDS, init="svd"
        )
        theirs = tensorly.tenalg.multi_mode_dot(core, factors, modes=[2, 3])
        mine = ours(jc.lowrank.tucker(ranks=(p, q), steps=ROUNDS, axes=CONV), w)
        found.append({"method": "tucker", "rank": [p, q], "ours": mine})
        found[-1]["tensorly"] = relative(theirs, w)
    for rank in TERMS:
        peer = functools.partial(parafac, w, rank, n_iter_max=ROUNDS, init="svd")
        theirs = tensorly.cp_to_tensor(peer(random_state=seed))
        scheme = jc.lowrank.cp(
            rank=rank, key=jax.random.key(seed), steps=ROUNDS, axes=CONV
        )
        found.append({"method": "cp", "rank": rank, "ours": ours(scheme, w)})
        found[-1]["tensorly"] = relative(theirs, w)
    return found


def of_tables(seed: int) -> list[dict[str, Any]]:
    digits = [n * m for n, m in zip(ROWS, COLUMNS, strict=True)]
    tensor = drawn(tuple(digits), seed)
    sizes = [n for pair in zip(ROWS, COLUMNS, strict=True) for n in pair]
    pairs = tensor.reshape(sizes)
    w = pairs.transpose(0, 2, 4, 1, 3, 5).reshape(np.prod(ROWS), np.prod(COLUMNS))
    found = []
    for rank in TRAIN_RANKS:
        cores = tensor_train(tensor, rank=[1, rank, rank, 1])
        theirs = tensorly.tt_to_tensor(cores)
        scheme = jc.lowrank.tensor_train(rows=ROWS, columns=COLUMNS, rank=rank)
        found.append({"method": "tensor train", "rank": rank, "ours": ours(scheme, w)})
        found[-1]["tensorly"] = relative(theirs, tensor)
    return found


def main() -> None:
    rows = []
    for seed in SEEDS:
        for row in of_kernels(seed) + of_tables(seed):
            rows.append({"seed": seed} | row)
            print(rows[-1], flush=True)
    versions = {n: importlib.metadata.version(n) for n in ("jax", "tensorly")}
    RESULTS.write_text(json.dumps({"versions": versions, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
