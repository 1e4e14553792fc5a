"""Output errors and seconds of our GPTQ and of peers, on the same layers and inputs.

    python -m experiments.peers.run layers           writes layers.npz for both sides
    python peers.py layers.npz peers.json            in the peers' venv
    python -m experiments.peers.run ours peers.json  adds ours; writes results.json

Errors are ``|X (W - Q)| / |X W|`` on the inputs that GPTQ saw; integers with a zero
point on both sides. Seconds are the second of two calls.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import quant
from jaxcompress.lift import statistics

HERE = Path(__file__).parent
LAYERS = Path(os.environ.get("PEERS_LAYERS", "layers.npz"))
SIZES = (512, 1024, 2048)
FORMATS = ((4, 128), (4, 32), (3, 128), (3, 32), (2, 128), (2, 32))
OURS: dict[str, dict[str, Any]] = {
    "rounding": {},
    "gptq, refined": {"refine": 2, "act_order": True},
}


def layer(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Correlated inputs with a few channels ten times as large, and a weight."""
    rng = np.random.default_rng(n)
    mix = rng.normal(size=(n // 4, n)) / np.sqrt(n // 4)
    x = rng.normal(size=(2 * n, n // 4)) @ mix + 0.3 * rng.normal(size=(2 * n, n))
    x[:, rng.choice(n, n // 64, replace=False)] *= 10
    w = 0.02 * rng.normal(size=(n, n)) * np.exp(0.3 * rng.normal(size=(n, 1)))
    return x.astype(np.float32), w.astype(np.float32)


def write_layers() -> None:
    arrays: dict[str, Any] = {}
    cases = []
    for n in SIZES:
        arrays[f"{n}/x"], arrays[f"{n}/w"] = layer(n)
        formats = FORMATS if n == SIZES[0] else FORMATS[:1]
        cases += [{"layer": str(n), "bits": b, "group": g} for b, g in formats]
    np.savez(LAYERS, cases=np.array(json.dumps(cases)), **arrays)


def measure(name: str, x: Any, w: Any, stats: Any, bits: int, group: int) -> Any:
    fmt = quant.integer(bits, group_size=group, symmetric=False)

    def run() -> quant.QuantizedArray:
        if name == "rounding":
            return quant.quantize(w, fmt)
        return quant.gptq_weight(w, fmt, stats, **OURS[name])

    leaf = jax.block_until_ready(run())
    seconds = []
    for _ in range(2):
        wall, cpu = time.perf_counter(), time.process_time()
        leaf = jax.block_until_ready(run())
        seconds.append((time.perf_counter() - wall, time.process_time() - cpu))
    error = jnp.linalg.norm(x @ (w - leaf.materialize())) / jnp.linalg.norm(x @ w)
    return {
        "error": float(error),
        "seconds": min(seconds)[0],
        "cpu_seconds": min(seconds)[1],
    }


def ours(peers: str) -> None:
    data = np.load(LAYERS)
    results = []
    for case in json.loads(str(data["cases"])):
        x, w = (jnp.asarray(data[f"{case['layer']}/{a}"]) for a in "xw")
        stats = statistics(x, gram=True)
        for name in OURS:
            found = measure(name, x, w, stats, case["bits"], case["group"])
            results.append({**case, "by": f"ours: {name}", **found})
            print(results[-1], flush=True)
    with open(peers) as f:
        out = json.load(f)
    out["versions"]["jax"] = jax.__version__
    out["results"] += results
    with open(HERE / "results.json", "w") as f:
        json.dump(out, f, indent=1)
    table(out["results"])


def table(results: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(r["by"] for r in results))
    print("| layer, format |", " | ".join(names), "|")
    print("|---|" + "---|" * len(names))
    rows: dict[str, dict[str, str]] = {}
    for r in results:
        key = f"{r['layer']}, uint{r['bits']} g{r['group']}"
        cell = "failed"
        if "error" in r:
            cell = f"{r['error']:.4f} ({r['seconds']:.2f} s)"
        rows.setdefault(key, {})[r["by"]] = cell
    for key, row in rows.items():
        print(f"| {key} |", " | ".join(row.get(n, "") for n in names), "|")


if __name__ == "__main__":
    write_layers() if sys.argv[1] == "layers" else ours(sys.argv[2])
